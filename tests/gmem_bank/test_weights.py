"""Where weights come from: the recorded commit of the hub, the shards that an index names, and nothing beside them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import gmem_bank
from gmem_bank.encoders import load_encoder, reload_encoder
from gmem_bank.encoders.weights import model_sha256
from gmem_bank.errors import EncoderError, EncoderMismatchError
from tests.gmem_bank.test_hub_models import images, make_model

OLD, NEW = "0" * 40, "a" * 40


def publish(snapshot: Path, *, shift: float) -> Path:
    """Put a second commit beside a snapshot, whose weights differ by a shift, and move `main` to it."""
    later = Path(shutil.copytree(snapshot, snapshot.with_name(NEW)))
    tensors = load_file(later / "model.safetensors")
    tensors["layernorm.bias"] = tensors["layernorm.bias"] + np.float32(shift)
    save_file(tensors, later / "model.safetensors", metadata={"format": "pt"})
    main = snapshot.parent.parent / "refs/main"
    main.write_text(NEW)
    return main


def test_a_bank_takes_the_commit_that_made_it(hf_cache: Path, photos: Path, new_photos: Path) -> None:
    """Although `main` has moved to other weights, or is gone from the cache; a new bank takes `main`."""
    gmem_bank.build(photos, load_encoder("dinov2"), "bank.safetensors")
    bank = gmem_bank.open("bank.safetensors")
    assert bank.encoder.labels["revision"] == OLD
    crops = images(2, 256)
    before = load_encoder("dinov2").encode(crops)
    main = publish(hf_cache, shift=1.0)
    np.testing.assert_allclose(load_encoder("dinov2").encode(crops), before + 1, atol=1e-4)
    np.testing.assert_array_equal(reload_encoder(bank.encoder, bank.folder).encode(crops), before)
    main.unlink()
    again = reload_encoder(bank.encoder, bank.folder)
    np.testing.assert_array_equal(again.encode(crops), before)
    assert gmem_bank.insert_concept("bank.safetensors", [new_photos], again).num_added == 8


def test_a_commit_that_is_whole_in_the_cache_is_taken_without_asking(
    hf_cache: Path, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a network the hub's client would try for half a minute; where a file is lacking, the hub is asked for it."""
    asked: list[bool] = []
    download = huggingface_hub.snapshot_download

    def recorded(repository: str, **options: object) -> str:
        asked.append(not options.get("local_files_only"))
        return str(download(repository, **options))

    encoder = load_encoder("dinov2")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", recorded)
    (hf_cache / "preprocessor_config.json").write_text("{}")
    assert reload_encoder(encoder.spec, Path()).spec.fingerprint == encoder.spec.fingerprint
    assert asked == [False]
    (hf_cache / "preprocessor_config.json").unlink()
    reload_encoder(encoder.spec, Path())
    assert asked == [False, False, True]


@pytest.mark.parametrize("shift", [0.0, 1.0])
def test_where_the_commit_is_gone_the_main_branch_is_compared(hf_cache: Path, shift: float) -> None:
    """Same weights under another commit do; others are refused."""
    encoder = load_encoder("dinov2")
    publish(hf_cache, shift=shift)
    shutil.rmtree(hf_cache)
    if shift:
        with pytest.raises(EncoderMismatchError, match="weights sha256"):
            reload_encoder(encoder.spec, Path())
    else:
        assert reload_encoder(encoder.spec, Path()).spec.labels["revision"] == NEW
    with pytest.raises(
        EncoderError, match=rf"dinov2-base at {OLD} .*hf download facebook/dinov2-base --revision {OLD}"
    ):
        load_encoder("dinov2", parameters={"revision": OLD})


def sharded(folder: Path) -> Path:
    """A small model in several files; gives its index."""
    make_model(folder, "dinov2").save_pretrained(folder, max_shard_size="40KB")
    (folder / "model.safetensors").unlink(missing_ok=True)
    return folder / "model.safetensors.index.json"


def load(folder: Path) -> gmem_bank.Encoder:
    return load_encoder("dinov2", weights=folder, parameters={"preset": "native"})


def test_sharded_weights_are_those_that_the_index_names(tmp_path: Path) -> None:
    """The numbers are those of one file; a stray file changes nothing, a byte of a shard or of the index does."""
    index = sharded(tmp_path / "parts")
    names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    assert len(names) > 1
    make_model(tmp_path / "whole", "dinov2")
    crops = images(2, 32)
    np.testing.assert_array_equal(load(tmp_path / "parts").encode(crops), load(tmp_path / "whole").encode(crops))
    config = json.loads((index.parent / "config.json").read_text())
    before = model_sha256(index.parent, config)
    shutil.copy(index.parent / names[0], index.parent / "model-00099-of-00099.safetensors")
    assert model_sha256(index.parent, config) == before
    shard = index.parent / names[-1]
    data = shard.read_bytes()
    shard.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    assert model_sha256(index.parent, config) != before
    shard.write_bytes(data)
    assert model_sha256(index.parent, config) == before
    index.write_text(index.read_text() + "\n")
    assert model_sha256(index.parent, config) != before


@pytest.mark.parametrize(
    "name", ["../model.safetensors", "/etc/model.safetensors", "gone.safetensors", "model.bin", "", 7]
)
def test_an_index_that_leads_elsewhere_is_refused(tmp_path: Path, name: object) -> None:
    """Out of the folder, to a file that is not there, to a pickle: the index and the name are in the message."""
    index = sharded(tmp_path / "parts")
    (tmp_path / "model.safetensors").touch()
    (tmp_path / "parts/model.bin").touch()
    record = json.loads(index.read_text())
    record["weight_map"]["layernorm.bias"] = name
    index.write_text(json.dumps(record))
    with pytest.raises(EncoderError, match=rf"index\.json names {name!r}, which is not a safetensors file beside it"):
        load(tmp_path / "parts")


@pytest.mark.parametrize(
    "text", ["{", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": []}}', '{"weight_map": {}}']
)
def test_an_index_that_is_none_is_refused(tmp_path: Path, text: str) -> None:
    """Damaged or empty."""
    index = sharded(tmp_path / "parts")
    index.write_text(text)
    with pytest.raises(EncoderError, match=r"index\.json (is not an index of weights|names '')"):
        load(tmp_path / "parts")
