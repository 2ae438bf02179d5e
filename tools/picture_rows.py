"""Held-out pictures of a training beside what its generator draws for their snippets, as one PNG.

python -m tools.picture_rows BANK RUN -o rows.png [--num 8] [--guidance 2] [--steps 25]

Rows: the pictures; what the tokenizer keeps of them; samples without guidance; samples with it. The pictures were never trained
on (RUN/validation_keys.txt); the bank holds their snippets.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path

import numpy as np

import gmem_bank
import gmem_gen


def main() -> int:
    """Draw, and write the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bank", type=Path)
    parser.add_argument("run", type=Path)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--num", type=int, default=8)
    parser.add_argument("--guidance", type=float, default=2.0)
    parser.add_argument("--steps", type=int, default=25)
    given = parser.parse_args()
    bank, checkpoint = gmem_bank.open(given.bank), gmem_gen.load_checkpoint(given.run)
    held = (given.run / "validation_keys.txt").read_text(encoding="utf-8").splitlines()
    keys = [held[place] for place in np.linspace(0, len(held) - 1, given.num).astype(int)]
    tokenizer = gmem_gen.make_tokenizer(checkpoint.tokenizer)
    size = int(checkpoint.tokenizer["image_size"])
    real = np.stack([gmem_bank.center_crop(bank.read_image(int(row)), size) for row in bank.rows_for(keys)])
    conditions = gmem_gen.choose_conditions(bank, concept=None, keys=keys, num=None, per_snippet=1, seed=0)
    plain = dataclasses.replace(checkpoint.config.sample, num_steps=given.steps)
    drawn = [
        gmem_gen.sample(bank, checkpoint, conditions, dataclasses.replace(plain, guidance=guidance)).images
        for guidance in (1.0, given.guidance)
    ]
    rows = [real, tokenizer.decode(tokenizer.encode(real)), *drawn]
    given.output.parent.mkdir(parents=True, exist_ok=True)
    gmem_gen.make_grid(np.concatenate(rows), given.num).save(given.output, optimize=True)
    print(f"{given.output}: {given.output.stat().st_size} bytes, step {checkpoint.step}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
