"""`python -m gmem_bank` is the gmem-bank command."""

from gmem_bank.cli import main

if __name__ == "__main__":
    main(prog_name="gmem-bank")
