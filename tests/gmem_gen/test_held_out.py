"""What is held out stays so: over parts of a training, in other runs, and whatever characters keys have."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

import gmem_bank
import gmem_gen
from gmem_bank.errors import ConfigError
from gmem_gen import checkpoint as checkpoints
from gmem_gen.config import Config, DataConfig
from gmem_gen.held_out import HELD_OUT, hold_out
from gmem_gen.splits import Split, split_rows
from tests.gmem_gen.test_trainer import bank, config

__all__ = ["bank"]  # the fixture


def holding(name: str, **train: object) -> Config:
    return gmem_gen.apply_settings(config(validate_every=2, **train), [f"data.validation_keys={name}"])


def keys_of(bank: str) -> list[str]:
    opened = gmem_bank.open(bank)
    return opened.keys(opened.rows())


def held(run: str) -> list[str]:
    return checkpoints.read_state(checkpoints.list_checkpoints(Path(run))[-1])["held_out"]


def test_another_run_that_goes_on_holds_the_same_out(bank: str) -> None:
    """Its weights were chosen by these rows; without its state a checkpoint is believed by the file beside it."""
    keys = keys_of(bank)
    Path("held.txt").write_text("\n".join(keys[:4]))
    gmem_gen.train(bank, holding("held.txt"), out="first")
    assert held("first") == keys[:4] == Path("first", HELD_OUT).read_text().split()
    with pytest.raises(ConfigError, match=r"4 rows, such as .* were held out so far"):
        gmem_gen.train(bank, config(max_steps=8), out="second", resume_from="first")
    report = gmem_gen.train(bank, holding("held.txt", max_steps=8), out="second", resume_from="first")
    assert (report.num_images, held("second")) == (20, keys[:4])


def test_rows_that_are_masked_for_a_while_stay_held_out(bank: str) -> None:
    """Held out, masked, and unmasked after a part that knew nothing of them."""
    keys = keys_of(bank)
    Path("eight.txt").write_text("\n".join(keys[:8]))
    Path("four.txt").write_text("\n".join(keys[:4]))
    gmem_gen.train(bank, holding("eight.txt"), out="run")
    gmem_bank.mask(bank, gmem_bank.Selection(keys=tuple(keys[4:8])))
    report = gmem_gen.train(bank, holding("four.txt", max_steps=8), out="run", accept_bank_change=True)
    assert (report.num_images, held("run")) == (16, keys[:8])
    gmem_bank.unmask(bank, gmem_bank.Selection(keys=tuple(keys[4:8])))
    with pytest.raises(ConfigError, match="4 rows, such as"):
        gmem_gen.train(bank, holding("four.txt", max_steps=10), out="run", accept_bank_change=True)
    report = gmem_gen.train(bank, holding("eight.txt", max_steps=10), out="run", accept_bank_change=True)
    assert report.num_images == 16


def test_a_best_loss_of_other_rows_is_forgotten(bank: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Losses are compared over the same rows only."""
    from gmem_gen import loop

    keys = keys_of(bank)
    Path("held.txt").write_text("\n".join(keys[:4]))
    values = iter([0.1] * 3 + [0.5, 0.7])
    monkeypatch.setattr(loop, "validate", lambda *_: {"validation_loss": next(values)})
    assert gmem_gen.train(bank, holding("held.txt"), out="run").best == (2, 0.1)
    Path("held.txt").write_text("\n".join(keys[:5]))
    assert gmem_gen.train(bank, holding("held.txt", max_steps=8), out="run").best == (8, 0.5)
    assert gmem_gen.train(bank, holding("held.txt", max_steps=10), out="run").best == (8, 0.5)


def test_keys_are_whole_whatever_characters_they_have(bank: str) -> None:
    """A separator of lines that is no newline belongs to the key; twins are held out with their pictures."""
    keys = ["a\u2028b.png", "a\u2028b.png#flip", "c\x0cd.png", "e.png"]
    Path("held.txt").write_bytes("a\u2028b.png\r\nc\x0cd.png\n".encode())
    split = split_rows(keys, DataConfig(validation_keys="held.txt"), 0)
    assert [keys[place] for place in split.held_out] == keys[:3]
    gmem_gen.train(bank, config(max_steps=2), out="run")
    checkpoint = checkpoints.list_checkpoints(Path("run"))[-1]
    hold_out(None, keys[1:], Split(samples=np.array([[2, 2]]), held_out=np.array([0, 1]))).write(Path("run"))
    old = Path("old/checkpoints/step-00000002")
    shutil.copytree(checkpoint, old)
    shutil.copy(Path("run", HELD_OUT), "old")
    state = checkpoints.read_state(old)
    del state["held_out"], state["validated"]  # as older versions wrote it
    rewrite(old, state)
    for place in (0, 1, 2):
        with pytest.raises(ConfigError, match="1 rows"):
            hold_out(old, keys, Split(samples=np.array([[place, place]]), held_out=np.array([], int)))
    assert hold_out(old, keys, Split(samples=np.array([[3, 3]]), held_out=np.array([], int))).keys == (
        "a\u2028b.png#flip", "c\x0cd.png",
    )  # fmt: skip


def rewrite(checkpoint: Path, state: dict[str, object]) -> None:
    """Write a checkpoint's state as given."""
    import json

    (checkpoint / checkpoints.STATE).write_text(json.dumps(state))
