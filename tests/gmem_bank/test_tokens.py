"""Patch tokens by key: those of a direct forward, resumable, read back by memory map."""

from __future__ import annotations

import json
import os
import resource
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import gmem_bank
from gmem_bank import tokens
from gmem_bank.encoders import preprocess
from gmem_bank.errors import (
    CorruptError,
    EncoderError,
    FormatError,
    GMemError,
    OutputExistsError,
    SourceError,
    UnknownKeyError,
)
from tests.gmem_bank.test_hub_models import make_model

PARAMETERS = {"input_size": 32, "dtype": "fp32"}


@pytest.fixture
def bank(photos: Path, tmp_path: Path) -> tuple[gmem_bank.MemoryBank, gmem_bank.Encoder]:
    make_model(tmp_path / "model", "registers")
    encoder = gmem_bank.load_encoder("dinov2", weights=tmp_path / "model", parameters=PARAMETERS)
    gmem_bank.build(photos, encoder, "b.safetensors")
    return gmem_bank.open("b.safetensors"), encoder


def direct(model_folder: Path, picture: np.ndarray) -> np.ndarray:
    """The patch tokens of one image by transformers itself: three registers and the class token come first."""
    import transformers

    model = transformers.AutoModel.from_pretrained(model_folder).eval()
    crop = torch.from_numpy(gmem_bank.center_crop(picture, 256)[None].copy())
    with torch.inference_mode():
        states = model(preprocess.to_input(crop, preprocess.gmem_preprocessing(32))).last_hidden_state
    return states[0, 4:].numpy()


def test_tokens_are_those_of_a_direct_forward(bank, tmp_path: Path, photos: Path) -> None:
    """Of every key, in the order of the image's patches; mirrored twins are those of the mirrored image."""
    opened, encoder = bank
    report = gmem_bank.write_tokens(opened, encoder, "tokens", dtype="f32", flip=True)
    found = gmem_bank.Shards("tokens")
    keys = opened.keys(opened.rows())
    assert (report.num_rows, report.shape) == (2 * len(keys), [16, 32])
    assert found.keys() == [name for key in keys for name in (key, key + "#flip")]
    assert found.facts["encoder"]["weights_sha256"] == opened.encoder.weights_sha256
    for key in (keys[5], keys[0]):
        picture = gmem_bank.read_image(photos / key)
        got = found.read(found.rows_for([key, key + "#flip"]))
        np.testing.assert_allclose(got[0], direct(tmp_path / "model", picture), atol=1e-5)
        np.testing.assert_allclose(got[1], direct(tmp_path / "model", picture[:, ::-1]), atol=1e-4)


def test_interrupted_work_goes_on_and_gives_the_same_bytes(bank, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shards that are there are not encoded again; the folder is byte for byte that of one run."""
    opened, encoder = bank
    monkeypatch.setattr(tokens, "SHARD_BYTES", 4 * 4 * 16 * 32 * 3)  # three batches of four a shard
    gmem_bank.write_tokens(opened, encoder, "whole", batch_size=4)

    def stop(done: int, total: int) -> None:
        if done > 14:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        gmem_bank.write_tokens(opened, encoder, "parts", batch_size=4, progress=stop)
    with pytest.raises(SourceError, match="is unfinished: run the command that makes it again"):
        gmem_bank.Shards("parts")
    report = gmem_bank.write_tokens(opened, encoder, "parts", batch_size=4, num_workers=2)
    assert report.num_resumed == 1
    names = sorted(path.name for path in Path("whole").iterdir())
    assert names == sorted(path.name for path in Path("parts").iterdir())
    assert [(Path("whole") / n).read_bytes() for n in names] == [(Path("parts") / n).read_bytes() for n in names]
    assert gmem_bank.write_tokens(opened, encoder, "parts", batch_size=4).num_resumed == report.num_shards
    found = gmem_bank.Shards("parts")
    order = np.random.default_rng(0).permutation(len(found))
    np.testing.assert_array_equal(found.read(order), found.read(np.arange(len(found)))[order])
    with pytest.raises(OutputExistsError, match="made from other rows or in another way"):
        gmem_bank.write_tokens(opened, encoder, "parts", batch_size=4, dtype="f32")
    gmem_bank.write_tokens(opened, encoder, "parts", batch_size=4, dtype="f32", overwrite=True)
    assert gmem_bank.Shards("parts").read(np.array([0])).dtype == np.float32


def test_refusals(bank, photos: Path) -> None:
    """An encoder without tokens, a folder with other files, unknown keys and rows, an image that is gone."""
    opened, encoder = bank
    gmem_bank.build(photos, gmem_bank.load_encoder("hog"), "hog.safetensors")
    hog = gmem_bank.open("hog.safetensors")
    with pytest.raises(EncoderError, match="has no patch tokens"):
        gmem_bank.write_tokens(hog, gmem_bank.load_encoder("hog"), "t")
    Path("busy").mkdir()
    Path("busy/notes.txt").write_text("mine")
    with pytest.raises(OutputExistsError, match=r"other files, such as 'notes.txt'"):
        gmem_bank.write_tokens(opened, encoder, "busy")
    gmem_bank.write_tokens(opened, encoder, "t")
    found = gmem_bank.Shards("t")
    with pytest.raises(UnknownKeyError, match="has nothing for 1 keys, such as 'gone'"):
        found.rows_for(["gone"])
    with pytest.raises(IndexError):
        found.read(np.array([len(found)]))
    [key] = opened.keys(np.array([3]))
    (photos / key).unlink()
    with pytest.raises(
        SourceError, match=rf"1 of \d+ images cannot be used: '{key}' .*restore them, give another folder"
    ):
        gmem_bank.write_tokens(opened, encoder, "again")


def test_damaged_shards_are_refused(bank) -> None:
    """An index of another kind or version, a shard that was cut, and one that is not the index's."""
    opened, encoder = bank
    gmem_bank.write_tokens(opened, encoder, "t")
    index, shard = Path("t/index.json"), Path("t/00000.safetensors")
    text, data = index.read_text(), shard.read_bytes()
    for changed in ("{", "{}", text.replace('"version":1', '"version":2'), text.replace("gmem-shards", "other")):
        index.write_text(changed)
        with pytest.raises(FormatError):
            gmem_bank.Shards("t")
    other = json.loads(text.replace('"num_rows":[', '"num_rows":[1'))
    del other["sha256"]
    index.write_text(json.dumps(other))
    with pytest.raises(CorruptError, match="not the shard that"):
        gmem_bank.Shards("t")
    index.write_text(text)
    for changed in (data[:50], data[:-1], data + b"x", b""):
        shard.write_bytes(changed)
        with pytest.raises(CorruptError):
            gmem_bank.Shards("t")


def test_more_shards_than_files_may_be_open() -> None:
    """Shards are mapped as they are asked for, and let go again."""
    writer = gmem_bank.ShardWriter(Path("many"), {"plan": 1})
    for number in range(300):
        writer.write(number, [f"k{number}"], np.full((1, 2), number, np.float32))
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(list(Path("/proc/self/fd").iterdir())) + 100, before[1]))
    try:
        writer.finish(300, {})
        found = gmem_bank.Shards("many")
        rows = np.random.default_rng(0).permutation(300)
        np.testing.assert_array_equal(found.read(rows)[:, 0], rows)
        assert found.rows_for(["k299", "k0"]).tolist() == [299, 0]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_other_images_are_other_tokens(bank, photos: Path, tmp_path: Path) -> None:
    """Pictures that have changed, or lie elsewhere, are not taken for those that were encoded."""
    opened, encoder = bank
    gmem_bank.write_tokens(opened, encoder, "t")
    shutil.copytree(photos, tmp_path / "elsewhere")
    with pytest.raises(OutputExistsError, match="in another way"):
        gmem_bank.write_tokens(opened, encoder, "t", images=tmp_path / "elsewhere")
    [key] = opened.keys(np.array([3]))
    os.utime(photos / key, (1, 1))
    with pytest.raises(OutputExistsError, match="in another way"):
        gmem_bank.write_tokens(opened, encoder, "t")


def test_tokens_beyond_f16_are_refused(bank) -> None:
    """Never stored as infinity."""
    opened, encoder = bank

    class Loud:
        spec = encoder.spec

        def encode(self, images):
            return encoder.encode(images)

        def encode_tokens(self, images):
            return 1e6 * encoder.encode_tokens(images)

    with pytest.raises(GMemError, match="65504, the largest f16"):
        gmem_bank.write_tokens(opened, Loud(), "t")
    gmem_bank.write_tokens(opened, Loud(), "t32", dtype="f32")
