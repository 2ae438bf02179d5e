"""Wrong usage of gmem-gen ends with exit code 2 before anything is opened or written; errors of data with 1."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from gmem_gen.cli import main


def run(*words: str) -> tuple[int, str]:
    result = CliRunner().invoke(main, words, catch_exceptions=False)
    return result.exit_code, " ".join(result.stderr.split())


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("sample --steps 0", "num_steps"), ("sample --method foo", "sample.method must be one of"),
        ("sample --guidance nan", "guidance"), ("sample --num-shards 2 --shard 2", "--num-shards - 1, got 2 of 2"),
        ("sample --output x.txt", "is a .png file"), ("sample --npz x.png", "is an .npz file"),
        ("sample --device warp", "device 'warp' cannot be used here"), ("sample --device cuda:99", "use --device cpu or auto"),
        ("train --preset nanoo", "Did you mean 'nano'"), ("train --set train.max_steps=ten", "must be int, got 'ten'"),
        ("train --set train.max_stepz=3", "Did you mean 'train.max_steps'"), ("train --set max_steps", "is not SECTION.FIELD=VALUE"),
        ("config --set model.width=-1", "width"), ("encode -t taef2 --device warp", "device 'warp' cannot be used here"),
        ("evaluate -e hog --num 3", "50 or more, got 3"), ("evaluate -e quantum", "unknown encoder 'quantum'"),
        ("import-checkpoint x.pt -e hgo", "unknown encoder 'hgo'"),
    ],
)  # fmt: skip
def test_what_is_typed_wrongly(words: str, said: str) -> None:
    """Values, names, numbers of parts, suffixes and devices."""
    code, told = run(*words.split())
    assert (code, said in told) == (2, True), told
    assert not list(Path().iterdir())


def test_errors_of_data_are_not_wrong_usage() -> None:
    """Banks, runs, files of settings and checkpoints that are not there."""
    for words in ("sample", "train", "encode -t taef2", "train --config nope.toml", "import-checkpoint nope.pt -e hog"):
        assert run(*words.split())[0] == 1, words
