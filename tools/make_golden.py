"""Write the golden banks of the current format version to tests/data/banks (an existing one is never replaced).

python -m tools.make_golden
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np

from gmem_bank import factors, kinds, segments
from gmem_bank import keys as key_tables
from gmem_bank.provenance import EncoderSpec, Source
from gmem_bank.space import to_space
from gmem_bank.storage import Payload, write
from gmem_bank.storage.schema import VERSION, Header, Segment
from gmem_bank.vectors import coefficient_payloads

KEYS = ["cat/1.png", "cat/2.png", "dog/café.png", "root.png", "new/a.png", "new/子.png"]
BANKS = {
    "dense.safetensors": ("dense", "f32"), "dense-bf16.h5": ("dense", "bf16"), "factored-i8.safetensors": ("factored", "i8"),
    "factored-f32.h5": ("factored", "f32"), "sparse-f16.gmem": ("sparse", "f16"),
}  # fmt: skip
"""Name → kind and type."""
BASIS = np.array([[0.5, 0.5, 0.5, 0.5], [0.5, -0.5, 0.5, -0.5]], np.float32)
MEAN = np.array([0.125, 0.0, -0.25, 0.5], np.float32)


def vectors(block: np.ndarray, kind: str, dtype: str) -> dict[str, Payload]:
    """Return the vector entries of a segment."""
    if kind == "dense":
        return {"snippets": segments.snippet_payload(lambda: [block], len(block), 4, dtype)}
    coefficients = factors.project(block, BASIS, MEAN)
    if kind == "factored":
        return coefficient_payloads(coefficients, dtype)
    largest = np.abs(coefficients).argmax(axis=1)[:, None]
    kept = np.take_along_axis(coefficients, largest, axis=1)
    return {"values": Payload.of(kept.astype("<f2")), "index": Payload.of(largest.astype(np.uint16))}


def make(target: Path, kind: str, dtype: str) -> None:
    """Write one bank, and beside it what a reader must find in it."""
    snippets = to_space(np.random.default_rng(7).standard_normal((6, 4)).astype(np.float32), "unit")
    concepts = segments.concepts_of_folders(KEYS)
    payloads: dict[str, Payload] = {}
    for name, start, stop in (("0", 0, 4), ("1", 4, 6)):
        own = vectors(snippets[start:stop], kind, dtype)
        keys = dict(zip(("bytes", "offsets"), map(Payload.of, key_tables.encode(KEYS[start:stop])), strict=True))
        payloads |= {f"{name}/{what}": payload for what, payload in own.items()}
        payloads |= {f"{name}/keys.{what}": payload for what, payload in keys.items()}
        payloads[f"{name}/source"] = Payload.of(np.full(stop - start, int(name), np.uint32))
    payloads |= segments.key_table_payloads(*key_tables.sorted_table(key_tables.hashes_of(KEYS)))
    payloads |= segments.concept_payloads(concepts)
    payloads["active"] = Payload.of(np.ones(6, np.bool_))
    if kind != "dense":
        payloads |= {"basis": Payload.of(BASIS), "mean": Payload.of(MEAN)}
    header = Header(
        kind="dense" if kind == "dense" else "factored",
        space="unit",
        dim=4,
        segments=(Segment(name="0", num_rows=4), Segment(name="1", num_rows=2)),
        encoder=EncoderSpec(
            name="hog", family="hog", dim=4, space="unit", parameters={"size": 32}, software="gmem 0.1.0"
        ),
        sources=(
            Source(kind="folder", path=".", digest="0" * 64, num_images=4),
            Source(kind="folder", path="new", prefix="new/", digest="1" * 64, num_images=2),
        ),
        concepts=tuple(concepts),
        history=(
            {"operation": "build", "arguments": {"dtype": "f32"}, "num_rows": 4},
            {"operation": "insert-concept", "arguments": {"name": "new"}, "num_rows": 2, "parent": "2" * 64},
        ),
    )
    write(target, header, payloads)
    opened = kinds.open(target)
    expected = {
        "keys": KEYS,
        "concepts": {name: rows.tolist() for name, rows in concepts.items()},
        "fingerprint": opened.fingerprint,
        "snippets": opened.snippets(opened.rows()).tolist(),
    }
    beside = target.with_name(target.name.replace(".safetensors", "") + ".json")
    beside.write_text(json.dumps(expected, indent=1, ensure_ascii=False), encoding="utf-8")


def main() -> int:
    """Write those that are not there."""
    folder = Path(__file__).parents[1] / "tests" / "data" / "banks"
    folder.mkdir(parents=True, exist_ok=True)
    for name, (kind, dtype) in BANKS.items():
        target = folder / f"v{VERSION[0]}.{VERSION[1]}-{name}"
        if target.exists():
            print(f"{target} exists: golden files are kept for ever")
            continue
        make(target, kind, dtype)
        print(target)
    return 0


if __name__ == "__main__":
    sys.exit(main())
