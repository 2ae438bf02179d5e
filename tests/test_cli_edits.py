"""The editing commands: what they print, what they refuse, and that the library says the same."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import gmem_bank
from tests.conftest import BankMaker
from tests.test_cli import as_json, bank


@pytest.fixture
def twenty(make_bank: BankMaker) -> Path:
    """A bank of 20 rows in three concepts."""
    return make_bank().path


def rows_of(path: str) -> int:
    return as_json(bank("info", path, "--json"))["num_rows"]


def test_every_edit_by_command(twenty: Path, make_bank: BankMaker) -> None:
    """One line each for people, JSON for machines, and the history has them all."""
    make_bank("other.h5", prefix="o", seed=4)
    assert "-7 rows (removal), 13 rows now" in bank("remove", "-c", "class0").output
    assert "+20 rows (2 banks), 33 rows now" in bank("merge", str(twenty), "other.h5").output
    assert "concept 'class1' is 'one'" in bank("rename", "class1", "one").output
    assert "7 rows hidden, 26 of 33 rows active" in bank("mask", "-c", "oclass0").output
    assert as_json(bank("unmask", "--json"))["details"]["num_changed"] == 7
    composed = as_json(bank("compose", "one + 0.5*class2 - 'oclass1'", "--name", "odd", "--json"))
    assert composed["keys"] == ["odd/0"]
    assert as_json(bank("insert-concept", "--name", "both", "-c", "one", "-c", "odd", "--json"))["details"] == {
        "num_tagged": 8
    }
    np.save("fresh.npy", np.random.default_rng(0).standard_normal((3, 8)).astype(np.float32))
    assert "vouch" in bank("insert-concept", "fresh.npy", code=2).output
    result = bank("insert-concept", "fresh.npy", "--same-encoder")
    assert "+3 rows as concept 'fresh'" in result.output
    assert "cosine to the nearest of all 34 rows" in result.output
    assert as_json(bank("coreset", "-n", "30", "--json", "-q"))["num_rows"] == 30
    assert "undone" in bank("undo").output
    operations = [entry["operation"] for entry in as_json(bank("history", "--json"))]
    assert operations == [
        "build", "remove", "merge", "rename", "mask", "unmask", "compose", "insert-concept", "insert-concept",
    ]  # fmt: skip
    assert bank("verify").exit_code == 0


def test_forms_by_command(twenty: Path) -> None:
    """convert, shard, compact and diff: there and back, byte for byte."""
    bank("convert", str(twenty), "bank.h5")
    bank("convert", "bank.h5", "back.safetensors")
    assert Path("back.safetensors").read_bytes() == twenty.read_bytes()
    assert bank("convert", str(twenty), "bank.h5").exit_code == 0  # it is there already, the very same
    bank("convert", "bank.h5", "other.h5")
    bank("remove", "other.h5", "--random", "1")
    assert "exists" in bank("convert", str(twenty), "other.h5", code=1).output
    bank("convert", str(twenty), "bank.h5", "--overwrite")
    assert "3 segments" in bank("shard", str(twenty), "--rows", "8").output
    assert "3 → 1 segments" in bank("compact", "bank.gmem", "-o", "one.safetensors").output
    assert (
        "no difference beyond float32 rounding (20 rows)"
        in bank("diff", "one.safetensors", "bank.h5", "--exit-code").output
    )
    bank("remove", "one.safetensors", "--random", "2")
    assert "-2 rows" in bank("diff", "bank.h5", "one.safetensors").output
    assert bank("diff", "bank.h5", "one.safetensors", "--exit-code", "--json", code=1)
    assert "ends in .gmem" in bank("shard", str(twenty), "-o", "x", code=2).output
    info = as_json(bank("info", "bank.gmem", "--json"))
    assert info["bytes"] == sum(file.stat().st_size for file in Path("bank.gmem").iterdir())


def test_keys_from_a_file_or_a_pipe(twenty: Path) -> None:
    """What list prints can be given back."""
    keys = gmem_bank.open(twenty).keys(np.arange(4))
    Path("keys.txt").write_text("\n".join(keys) + "\n\n", encoding="utf-8")
    assert as_json(bank("select", "--keys", "keys.txt", "--json", "-o", "a.safetensors"))["num_rows"] == 4
    command = [sys.executable, "-m", "gmem_bank", "remove", "--keys", "-", "-o", "b.safetensors", "--json"]
    piped = subprocess.run(command, input="\n".join(keys), capture_output=True, text=True, check=True)
    assert json.loads(piped.stdout)["num_rows"] == 16
    assert "none.txt" in bank("select", "--keys", "none.txt", code=2).output


def test_dry_runs_by_command_change_nothing(twenty: Path) -> None:
    """Each says what it would do."""
    before = twenty.read_bytes()
    for words in (
        ["remove", "-c", "class0"], ["select", "--random", "3"], ["mask", "-c", "class0"], ["rename", "class0", "x"],
        ["remove-concept", "class1"], ["interpolate", "class0", "class1"], ["compose", "class0 + class1"], ["dedup", "-q"],
        ["coreset", "-n", "3", "-q"], ["compact"],
    ):  # fmt: skip
        result = bank(*words, "--dry-run")
        assert "would be" in result.output or "nothing to do" in result.output, (words, result.output)
        assert twenty.read_bytes() == before
    assert {path.name for path in Path.cwd().iterdir()} == {twenty.name}


def test_odd_keys_are_printed_on_one_line(make_bank: BankMaker) -> None:
    """Line feeds and control characters are escaped; emoji and accents are not; 10 kB keys work."""
    keys = ["a\nb.png", "tab\there.png", "naïve 🦊.png", "x" * 10_000 + ".png", "esc\x1b[31m.png"]
    path = make_bank(keys=keys, rows=5).path
    printed = bank("list").output.splitlines()
    assert len(printed) == 5
    assert "0\ta\\nb.png" in printed
    assert "2\tnaïve 🦊.png" in printed
    assert "\x1b" not in bank("list").output
    assert [row["key"] for row in as_json(bank("list", "--json"))["rows"]] == keys
    bank("remove", "--key", keys[0], "--key", keys[3])
    assert gmem_bank.open(path).keys(np.arange(3)) == [keys[1], keys[2], keys[4]]
    assert gmem_bank.verify(path).ok


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["remove"], 2, "say which rows"),
        (["remove", "--pattern", "*"], 1, "no row would be left"),
        (["remove", "-c", "clas0"], 1, "Did you mean"),
        (["select", "--key", "none"], 1, "no row with key 'none'"),
        (["rename", "class0", "a/b"], 1, "looks like a path"),
        (["rename", "class0", "../x"], 1, "looks like a path"),
        (["compose", "class0 + "], 1, "cannot read"),
        (["compose", "class0 class1"], 1, "cannot read"),
        (["compose", "class0 - class0"], 1, "no direction"),
        (["compose", "nothing"], 1, "neither a concept nor a key"),
        (["dedup", "--threshold", "2"], 2, "threshold"),
        (["coreset", "-n", "20"], 1, "fewer than the 20 active ones"),
        (["undo"], 1, "nothing to undo"),
        (["convert", "bank.safetensors", "bank.txt"], 1, "a bank ends in"),
        (["merge", "bank.safetensors", "bank.safetensors"], 1, "20 keys that an earlier bank has"),
        (["insert-concept"], 2, "give IMAGES"),
        (["insert-concept", "--name", "x", "images", "-c", "class0"], 2, "not both"),
        (["insert-concept", "-c", "class0"], 2, "--name"),
        (["diff", "bank.safetensors", "none.h5"], 1, "no bank at none.h5"),
        (["mask", "--pattern", "*"], 1, "no row would be left active"),
    ],
)
def test_bad_words_get_one_line_and_the_bank_stands(twenty: Path, words: list[str], code: int, message: str) -> None:
    """What, where, what to do; exit 1, or 2 for wrong usage."""
    before = twenty.read_bytes()
    result = bank(*words, code=code)
    assert message in result.output
    assert twenty.read_bytes() == before
    assert {path.name for path in Path.cwd().iterdir()} == {twenty.name}


def test_provenance_says_where_rows_came_from(photos: Path, new_photos: Path) -> None:
    """The encoder, the sources, and the source of single rows."""
    bank("build", str(photos), "-e", "hog", "-q")
    bank("insert-concept", "images", "--flip", "-q", "--no-report")
    whole = as_json(bank("provenance", "--json"))
    assert whole["encoder"]["family"].startswith("hog")
    assert [source["path"] for source in whole["sources"]] == ["photos", "images"]
    name = sorted(new_photos.iterdir())[0].name
    rows = as_json(bank("provenance", "bank.safetensors", f"images/{name}#flip", "--json"))["rows"]
    assert (rows[0]["path"], rows[0]["row"]) == ("images", 25)


def test_flipped_twins_are_the_mirrored_pictures(photos: Path, new_photos: Path) -> None:
    """The twin's snippet is that of the mirrored crop, its image the mirrored image; inserting again does nothing."""
    encoder = gmem_bank.load_encoder("pixels")
    gmem_bank.build(photos, encoder, "bank.safetensors")
    gmem_bank.insert_concept("bank.safetensors", [new_photos], encoder, flip=True)
    opened = gmem_bank.open("bank.safetensors")
    name = sorted(new_photos.iterdir())[0].name
    rows = opened.rows_for([f"images/{name}", f"images/{name}#flip"])
    plain, mirrored = (opened.read_image(int(row)) for row in rows)
    np.testing.assert_array_equal(mirrored, plain[:, ::-1])
    from gmem_bank.encoders import preprocess

    crop = preprocess.crop(plain, encoder.spec.preprocessing)
    direct = encoder.encode(np.stack([crop, crop[:, ::-1]]))
    expected = direct / np.linalg.norm(direct, axis=1, keepdims=True)
    np.testing.assert_allclose(opened.snippets(rows), expected, atol=1e-6)
    assert gmem_bank.insert_concept("bank.safetensors", [new_photos], encoder, flip=True).unchanged
    assert len(opened.rows_of("images")) == 16


def test_images_can_be_named_in_interpolate_and_compose(photos: Path, new_photos: Path) -> None:
    """An image file is encoded on the spot; its snippet is the end of the way."""
    bank("build", str(photos), "-e", "hog", "-q")
    image = str(sorted(new_photos.iterdir())[0])
    bank("interpolate", "hat", image, "--steps", "3", "--name", "way")
    bank("insert-concept", image, "--name", "one", "-q", "--no-report")
    opened = gmem_bank.open("bank.safetensors")
    end = opened.snippets(opened.rows_of("way"))[-1]
    np.testing.assert_allclose(end, opened.snippets(opened.rows_of("one"))[0], atol=1e-6)
    assert as_json(bank("compose", f"hat + 0.5*'{image}'", "--name", "mix", "--json"))["num_added"] == 1
