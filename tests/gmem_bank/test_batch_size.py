"""The batch size: chosen by the encoder for "auto", kept by unfinished work, and without effect on the numbers beyond rounding."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import save_file

import gmem_bank
from gmem_bank.encoders.sizing import LARGEST, SHARE, best_batch_size, largest_that_fits
from gmem_bank.errors import ConfigError, OutputExistsError
from tests.gmem_bank.test_hub_models import make_model


class Wishful:
    """A hog that wants to be given some number of images."""

    def __init__(self, wish: int) -> None:
        self._hog = gmem_bank.load_encoder("hog")
        self.wish, self.given = wish, []

    @property
    def spec(self):
        return self._hog.spec

    def best_batch_size(self) -> int:
        return self.wish

    def encode(self, images):
        self.given.append(len(images))
        return self._hog.encode(images)


def test_auto_asks_the_encoder_and_a_number_does_not(photos: Path) -> None:
    """What was taken stands in the history; 32 for an encoder without a wish."""
    gmem_bank.build(photos, Wishful(5), "a.safetensors")
    gmem_bank.build(photos, Wishful(5), "b.safetensors", batch_size=7)
    gmem_bank.build(photos, gmem_bank.load_encoder("hog"), "c.safetensors")
    sizes = [gmem_bank.open(f"{n}.safetensors").history[0]["arguments"]["batch_size"] for n in "abc"]
    assert sizes == [5, 7, 32]
    for wrong in (0, -1, 2.5, "many"):
        with pytest.raises(ConfigError, match="batch_size must be 'auto' or at least 1"):
            gmem_bank.build(photos, Wishful(5), "d.safetensors", batch_size=wrong)


def test_unfinished_work_keeps_its_batch_size(photos: Path) -> None:
    """A build that is taken up on a machine with another wish goes on with the first, and its finished batches count."""

    def stop(done: int, total: int) -> None:
        if done >= 10:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        gmem_bank.build(photos, Wishful(5), "a.safetensors", progress=stop)
    later = Wishful(8)
    report = gmem_bank.build(photos, later, "a.safetensors")
    assert report.num_resumed == 10
    assert max(later.given) == 5
    gmem_bank.build(photos, Wishful(5), "b.safetensors")
    assert Path("a.safetensors").read_bytes() == Path("b.safetensors").read_bytes()


@pytest.mark.parametrize("kind", ["dinov2", "clip", "siglip"])
def test_snippets_do_not_depend_on_the_batch_size(kind: str, tmp_path: Path) -> None:
    """In float32 to 1e-5 whatever the batch: stated in docs/DESIGN.md."""
    make_model(tmp_path, kind)
    encoder = gmem_bank.load_encoder(f"hf:{tmp_path}", parameters={"preset": "gmem", "input_size": 32, "dtype": "fp32"})
    images = np.random.default_rng(0).integers(0, 256, (37, 256, 256, 3), dtype=np.uint8)
    whole = encoder.encode(images)
    for size in (1, 8, 32):
        parts = np.concatenate([encoder.encode(images[at : at + size]) for at in range(0, 37, size)])
        np.testing.assert_allclose(parts, whole, atol=1e-5)


def test_the_choice_on_a_gpu_follows_memory_alone() -> None:
    """The largest power of two within its share; a CPU has the default whatever the network."""
    total = 80 << 30
    for bytes_an_image in (1 << 20, 50 << 20, 3 << 30, 200 << 30):
        size = largest_that_fits(bytes_an_image, total)
        assert size & (size - 1) == 0
        assert size == 1 or size * bytes_an_image <= SHARE * total
        assert size == LARGEST or 2 * size * bytes_an_image > SHARE * total
    assert best_batch_size(torch.device("cpu"), lambda count: pytest.fail("not tried")) == 32


def test_a_finished_bank_is_recognised_whatever_this_machine_would_choose(photos: Path) -> None:
    """ "auto" accepts the batch size by which the bank was built elsewhere; a number is taken at its word."""
    gmem_bank.build(photos, Wishful(5), "a.safetensors")
    assert gmem_bank.build(photos, Wishful(8), "a.safetensors").unchanged
    with pytest.raises(OutputExistsError):
        gmem_bank.build(photos, Wishful(8), "a.safetensors", batch_size=8)


def test_other_builds_leave_an_interrupted_one_alone(photos: Path) -> None:
    """A build onto the same bank with another batch size, interrupted too, takes nothing from the first; the end clears both."""

    def stop(done: int, total: int) -> None:
        if done >= 10:
            raise KeyboardInterrupt

    for size in (5, 2):
        with pytest.raises(KeyboardInterrupt):
            gmem_bank.build(photos, Wishful(5), "a.safetensors", batch_size=size, progress=stop)
    assert gmem_bank.build(photos, Wishful(5), "a.safetensors", batch_size=5).num_resumed == 10
    assert not Path(".a.safetensors.build").exists()


def test_a_kill_in_the_middle_of_clearing_up_leaves_nothing_for_ever(photos: Path) -> None:
    """Batches whose plan is gone already are cleared by the next run of the same command; another job's stay."""

    def stop(done: int, total: int) -> None:
        if done >= 10:
            raise KeyboardInterrupt

    for size in (5, 2):
        with pytest.raises(KeyboardInterrupt):
            gmem_bank.build(photos, Wishful(5), "a.safetensors", batch_size=size, progress=stop)
    gmem_bank.build(photos, Wishful(5), "b.safetensors", batch_size=5)
    half, other = sorted(
        Path(".a.safetensors.build").iterdir(), key=lambda own: '"batch_size":2' in (own / "plan.json").read_text()
    )
    Path("b.safetensors").rename("a.safetensors")
    (half / "plan.json").unlink()
    assert gmem_bank.build(photos, Wishful(5), "a.safetensors", batch_size=5).unchanged
    assert list(Path(".a.safetensors.build").iterdir()) == [other]


def test_a_batch_that_was_damaged_on_disk_is_encoded_again(photos: Path) -> None:
    """Its values stand under a hash until they are in the bank."""

    def stop(done: int, total: int) -> None:
        if done >= 10:
            raise KeyboardInterrupt

    gmem_bank.build(photos, Wishful(5), "b.safetensors")
    with pytest.raises(KeyboardInterrupt):
        gmem_bank.build(photos, Wishful(5), "a.safetensors", progress=stop)
    [first] = Path(".a.safetensors.build").glob("*/00000000.safetensors")
    data = bytearray(first.read_bytes())
    data[-8:] = b"\x00\x00\x80\x7f\x01\x02\x03\x04"
    first.write_bytes(data)
    assert gmem_bank.build(photos, Wishful(5), "a.safetensors").num_resumed == 5
    assert Path("a.safetensors").read_bytes() == Path("b.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("was", "becomes"),
    [
        ('"places":[0,1', '"places":[1,0'), ('"hashes":["', '"hashes":["f'), ('"skipped"', '"Skipped"'),
        ('"places"', '"Places"'), ('"places":[0', '"places":[NaN'),
    ],
)  # fmt: skip
def test_what_is_said_of_a_staged_batch_is_under_its_hash_too(photos: Path, was: str, becomes: str) -> None:
    """Which image has which row, the hashes of the images, and those passed over: damage there is found, and encoded again."""

    def stop(done: int, total: int) -> None:
        if done >= 10:
            raise KeyboardInterrupt

    gmem_bank.build(photos, Wishful(5), "b.safetensors")
    with pytest.raises(KeyboardInterrupt):
        gmem_bank.build(photos, Wishful(5), "a.safetensors", progress=stop)
    [first] = Path(".a.safetensors.build").glob("*/00000000.safetensors")
    with safe_open(first, framework="numpy") as stored:
        snippets, facts = stored.get_tensor("snippets"), stored.metadata()
    assert was in facts["batch"]
    save_file({"snippets": snippets}, first, {**facts, "batch": facts["batch"].replace(was, becomes, 1)})
    assert gmem_bank.build(photos, Wishful(5), "a.safetensors").num_resumed == 5
    assert Path("a.safetensors").read_bytes() == Path("b.safetensors").read_bytes()
