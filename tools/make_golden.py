"""Write the golden bank of the current format version to tests/data/banks (an existing one is never replaced).

python -m tools.make_golden
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np

from gmem_bank import kinds, segments
from gmem_bank import keys as key_tables
from gmem_bank.provenance import EncoderSpec, Source
from gmem_bank.space import to_space
from gmem_bank.storage import Payload, write
from gmem_bank.storage.schema import VERSION, Header, Segment

KEYS = ["cat/1.png", "cat/2.png", "dog/café.png", "root.png", "new/a.png", "new/子.png"]


def main() -> int:
    """Write the file and what a reader must find in it."""
    folder = Path(__file__).parents[1] / "tests" / "data" / "banks"
    target = folder / f"v{VERSION[0]}.{VERSION[1]}-dense.safetensors"
    if target.exists():
        print(f"{target} exists: golden files are kept for ever")
        return 1
    snippets = to_space(np.random.default_rng(7).standard_normal((6, 4)).astype(np.float32), "unit")
    concepts = segments.concepts_of_folders(KEYS)
    payloads: dict[str, Payload] = {}
    for name, start, stop in (("0", 0, 4), ("1", 4, 6)):
        block = snippets[start:stop]
        stored = segments.snippet_payload(lambda block=block: [block], stop - start, 4, "f32")
        payloads |= segments.segment_payloads(
            name, key_tables.encode(KEYS[start:stop]), np.full(stop - start, int(name)), stored
        )
    payloads |= segments.key_table_payloads(*key_tables.sorted_table(key_tables.hashes_of(KEYS)))
    payloads |= segments.concept_payloads(concepts)
    payloads["active"] = Payload.of(np.ones(6, np.bool_))
    header = Header(
        kind="dense",
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
    folder.mkdir(parents=True, exist_ok=True)
    write(target, header, payloads)
    opened = kinds.open(target)
    expected = {
        "keys": KEYS,
        "concepts": {name: rows.tolist() for name, rows in concepts.items()},
        "fingerprint": opened.fingerprint,
        "snippets": snippets.tolist(),
    }
    target.with_suffix(".json").write_text(json.dumps(expected, indent=1, ensure_ascii=False), encoding="utf-8")
    print(target)
    return 0


if __name__ == "__main__":
    sys.exit(main())
