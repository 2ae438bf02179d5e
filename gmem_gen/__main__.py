"""`python -m gmem_gen` is the gmem-gen command."""

from gmem_gen.cli import main

if __name__ == "__main__":
    main(prog_name="gmem-gen")
