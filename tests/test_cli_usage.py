"""Wrong usage of build, insert-concept and tokens ends with exit code 2 and writes nothing; errors of data with 1."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from gmem_bank.cli import main


def run(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(main, arguments, catch_exceptions=False)
    return result.exit_code, result.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--num-shards", "2", "--shard", "2"), "shard must be 0 to num_shards - 1, got 2 of 2"),
        (("-e", "quantum"), "unknown encoder 'quantum'"), (("-e", "hf:"), "hf:REPOSITORY"),
        (("-e", "hog", "--device", "quantum"), "unknown device 'quantum'"), (("-e", "hog", "--device", "cuda"), "on the CPU only"),
        (("-e", "hog", "--set", "cells=3"), "Did you mean 'cell'"), (("-e", "hog", "--set", "cell=0"), "positive integer"),
        (("-e", "hog", "--weights", "photos"), "has no weights"), (("-e", "hog", "-o", "bank.npz"), "a bank ends in"),
        (("-e", "hog", "-o", "photos"), "is a folder"), (("-e", "precomputed", "--set", "modle=x"), "Did you mean 'model'"),
        (("--limit", "0"), "0 is not in the range"), (("--batch-size", "0"), "'0' is neither 'auto'"),
    ],
)  # fmt: skip
def test_a_build_that_is_typed_wrongly(photos: Path, arguments: tuple[str, ...], words: str) -> None:
    """Names, numbers, devices, parameters and suffixes, before anything is encoded."""
    before = sorted(Path().rglob("*"))
    code, said = run("build", "photos", *arguments)
    assert (code, words in " ".join(said.split())) == (2, True), said
    assert sorted(Path().rglob("*")) == before


def test_errors_of_data_are_not_wrong_usage(photos: Path) -> None:
    """No such source, no such file of a model, a bank that is there already."""
    for arguments in (("nosuch", "-e", "hog"), ("photos", "-e", "hf:./nosuch"), ("photos", "-e", "onnx:nosuch.onnx")):
        assert run("build", *arguments)[0] == 1
    assert run("build", "photos", "-e", "hog")[0] == 0
    assert run("build", "photos", "-e", "pixels")[0] == 1


def test_edits_and_tokens_that_are_typed_wrongly(photos: Path, new_photos: Path) -> None:
    """Devices, names, and several folders without a name for all of them."""
    run("build", "photos", "-e", "hog", "-q")
    before = Path("bank.safetensors").read_bytes()
    hat, images = str(photos / "hat"), str(new_photos)
    for arguments, words in (
        (("insert-concept", images, "--device", "cuda"), "on the CPU only"), (("insert-concept", images, hat), "need a --name"),
        (("insert-concept", images, "--name", "a/b"), "cannot name a concept"), (("tokens", "--device", "warp"), "unknown device"),
        (("insert-concept", images, "-o", "bank.pt"), "a bank ends in"), (("remove", "--key", "x", "-o", "bank.npy"), "a bank ends in"),
    ):  # fmt: skip
        code, said = run(*arguments)
        assert (code, words in " ".join(said.split())) == (2, True), said
    assert Path("bank.safetensors").read_bytes() == before
    assert run("tokens")[0] == 1  # hog has no patch tokens: an error of what the bank is
    np.save("wide.npy", np.ones((2, 3), np.float32))
    assert run("insert-concept", "wide.npy", "--same-encoder")[0] == 1
