"""Parts of a build: together they are the whole or the reason is said."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import gmem_bank
from gmem_bank.cli import main
from gmem_bank.errors import ConfigError, SourceError
from tests.gmem_bank.test_batch_size import Wishful
from tests.gmem_bank.test_hub_models import make_model

HOG = gmem_bank.load_encoder("hog")


def part(photos: Path, shard: int, of: int, batch_size: int, name: str, **narrowing: int) -> None:
    gmem_bank.build(
        photos, HOG, name, batch_size=batch_size, narrowing=gmem_bank.Narrowing(num_shards=of, shard=shard, **narrowing)
    )


def test_parts_cut_in_different_ways_are_not_merged(photos: Path) -> None:
    """Another batch size, another number of parts, another limit, or images that came between: each would leave gaps."""
    part(photos, 0, 2, 8, "first.safetensors")
    part(photos, 1, 2, 5, "batch.safetensors")
    part(photos, 2, 3, 8, "number.safetensors")
    part(photos, 1, 2, 8, "limit.safetensors", limit=20)
    copy = next(photos.rglob("*.jpg"))
    (copy.parent / "new.jpg").write_bytes(copy.read_bytes())
    part(photos, 1, 2, 8, "grown.safetensors")
    for other, what in [
        ("batch", "batch_size 8 and 5"), ("number", "num_shards 2 and 3"), ("limit", "limit None and 20"), ("grown", "num_listed 24 and 25"),
    ]:  # fmt: skip
        with pytest.raises(ConfigError, match=f"cut in different ways .*{what}"):
            gmem_bank.merge("first.safetensors", [f"{other}.safetensors"], output="m.safetensors")
    assert not Path("m.safetensors").exists()


def test_missing_parts_are_named_and_all_of_them_are_the_whole(
    photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The merge of all parts has the rows of one build, in value and order."""
    for shard in range(3):
        part(photos, shard, 3, 4, f"p{shard}.safetensors")
    with pytest.raises(SystemExit):
        main(["merge", "p0.safetensors", "p2.safetensors", "-o", "two.safetensors"])
    assert "of 3 parts of the build these are missing: 1" in capsys.readouterr().err
    gmem_bank.merge("p0.safetensors", ["p1.safetensors", "p2.safetensors"], output="all.safetensors")
    gmem_bank.build(photos, HOG, "whole.safetensors", batch_size=4)
    merged, whole = gmem_bank.open("all.safetensors"), gmem_bank.open("whole.safetensors")
    assert merged.keys(merged.rows()) == whole.keys(whole.rows())
    np.testing.assert_array_equal(merged.snippets(merged.rows()), whole.snippets(whole.rows()))


def test_parts_are_cut_alike_on_whatever_machine(photos: Path) -> None:
    """ "auto" is 32 for a part, whatever the encoder wishes there, so that parts fit; a size that was begun or built is kept."""
    encoders = Wishful(5), Wishful(7)
    for shard, encoder in enumerate(encoders):
        narrowing = gmem_bank.Narrowing(num_shards=2, shard=shard, flip=True)
        gmem_bank.build(photos, encoder, f"p{shard}.safetensors", narrowing=narrowing)
        assert gmem_bank.build(photos, encoder, f"p{shard}.safetensors", narrowing=narrowing).unchanged
    assert [encoder.given for encoder in encoders] == [[32], [16]]
    gmem_bank.merge("p0.safetensors", ["p1.safetensors"], output="all.safetensors")
    gmem_bank.build(photos, HOG, "whole.safetensors", narrowing=gmem_bank.Narrowing(flip=True))
    merged, whole = gmem_bank.open("all.safetensors"), gmem_bank.open("whole.safetensors")
    assert merged.keys(merged.rows()) == whole.keys(whole.rows())
    np.testing.assert_array_equal(merged.snippets(merged.rows()), whole.snippets(whole.rows()))
    narrowing = gmem_bank.Narrowing(num_shards=3, shard=1, flip=True)
    gmem_bank.build(photos, HOG, "small.safetensors", batch_size=8, narrowing=narrowing)
    assert gmem_bank.build(photos, HOG, "small.safetensors", narrowing=narrowing).unchanged
    with pytest.raises(SourceError, match=r"48 images are 2 batches of 32: too few for 3 shards; .*smaller batch size"):
        gmem_bank.build(photos, HOG, "other.safetensors", narrowing=narrowing)


def test_the_precision_of_a_part_is_not_left_to_the_machine(photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One with units for bf16 and one without would give parts that cannot be joined, hours later."""
    make_model(Path("model"), "dinov2")
    arguments = [
        "build",
        str(photos),
        "-e",
        "hf:model",
        "--set",
        "preset=native",
        "--limit",
        "6",
        "--batch-size",
        "3",
        "-q",
    ]
    for more in ((), ("--set", "dtype=auto")):
        with pytest.raises(SystemExit) as ended:
            main([*arguments, *more, "--num-shards", "2", "--shard", "0"])
        assert ended.value.code == 2
        assert "give every part --set dtype=fp32 or" in " ".join(capsys.readouterr().err.split())
    for shard in range(2):
        with pytest.raises(SystemExit) as ended:
            main(
                [
                    *arguments,
                    "--set",
                    "dtype=fp32",
                    "--num-shards",
                    "2",
                    "--shard",
                    str(shard),
                    "-o",
                    f"{shard}.safetensors",
                ]
            )
        assert ended.value.code == 0
    assert gmem_bank.merge("0.safetensors", ["1.safetensors"], output="all.safetensors").num_rows == 6
