"""Encoders: found by name, the same every time, equal to independent computations."""

from __future__ import annotations

import dataclasses
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from gmem_bank import builder
from gmem_bank.encoders import available_encoders, load_encoder, reload_encoder
from gmem_bank.errors import EncoderError, EncoderMismatchError, MissingDependencyError
from gmem_bank.kinds import open as open_bank
from tests.conftest import SHARED

IMAGES = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)


def slow_hog(image: np.ndarray, parameters: dict) -> np.ndarray:
    """HOG by loops over pixels, cells and bins."""
    size, cell, block, bins = (parameters[name] for name in ("size", "cell", "block", "orientations"))
    grey = (image @ np.array([0.299, 0.587, 0.114])) / 255
    padded = np.pad(grey, 1, mode="edge")
    n = size // cell
    cells = np.zeros((n, n, bins))
    turn = 2 * np.pi if parameters["signed"] else np.pi
    for y in range(size):
        for x in range(size):
            dx = padded[y + 1, x + 2] - padded[y + 1, x]
            dy = padded[y + 2, x + 1] - padded[y, x + 1]
            position = (np.arctan2(dy, dx) % turn) / turn * bins
            low = int(np.floor(position))
            for cy in range(n):
                wy = max(0, 1 - abs((cy + 0.5) * cell - (y + 0.5)) / cell)
                for cx in range(n):
                    wx = max(0, 1 - abs((cx + 0.5) * cell - (x + 0.5)) / cell)
                    for bin_, share in ((low % bins, 1 - (position - low)), ((low + 1) % bins, position - low)):
                        cells[cy, cx, bin_] += wy * wx * share * np.hypot(dx, dy)
    parts = []
    for y in range(n - block + 1):
        for x in range(n - block + 1):
            values = cells[y : y + block, x : x + block].ravel()
            values = np.minimum(values / np.sqrt((values**2).sum() + 1e-2), 0.2)
            parts.append(values / np.sqrt((values**2).sum() + 1e-2))
    return np.concatenate(parts)


@pytest.mark.parametrize("signed", [False, True])
def test_hog_equals_a_slow_hog(signed: bool) -> None:
    """The vectorised histogram is the one of plain loops."""
    encoder = load_encoder("hog", parameters={"signed": signed})
    got = encoder.encode(IMAGES)
    assert got.shape == (3, encoder.spec.dim)
    for image, row in zip(IMAGES, got, strict=True):
        np.testing.assert_allclose(row, slow_hog(image, dict(encoder.spec.parameters)), atol=1e-4)


def test_hog_of_an_edge_votes_for_its_orientation_only() -> None:
    """A vertical edge has a horizontal gradient: bin 0, and signed bins tell light-dark from dark-light."""
    encoder = load_encoder("hog", parameters={"signed": True, "orientations": 8, "block": 1})
    image = np.zeros((1, 32, 32, 3), np.uint8)
    image[:, :, 16:] = 255
    for picture, wanted in ((image, 0), (image[:, :, ::-1], 4)):
        histogram = encoder.encode(np.ascontiguousarray(picture)).reshape(-1, 8).sum(axis=0)
        assert histogram.argmax() == wanted
        assert np.delete(histogram, wanted).max() == 0


def test_pixels_and_random_projection_equal_their_formulas() -> None:
    """Mean-free luma; and a linear map of the centred pixels that depends on the seed."""
    small = IMAGES[:, :16, :16]
    grey = (small @ np.array([0.299, 0.587, 0.114])).reshape(3, -1) / 255
    np.testing.assert_allclose(load_encoder("pixels").encode(small), grey - grey.mean(1, keepdims=True), atol=1e-6)
    encoder = load_encoder("random-projection", parameters={"dim": 64})
    one, other = encoder.encode(IMAGES[:1]), encoder.encode(255 - IMAGES[:1])
    np.testing.assert_allclose(one, -other, atol=1e-4)
    assert (
        np.abs(load_encoder("random-projection", parameters={"dim": 64, "seed": 1}).encode(IMAGES[:1]) - one).max()
        > 0.1
    )
    many = np.random.default_rng(1).integers(0, 256, (50, 32, 32, 3), dtype=np.uint8)
    lengths = np.linalg.norm(load_encoder("random-projection").encode(many), axis=1) / np.linalg.norm(
        many.reshape(50, -1) / 127.5 - 1, axis=1
    )
    assert lengths.mean() == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("name", ["hog", "pixels", "random-projection"])
def test_batches_do_not_matter_and_specs_are_stable(name: str) -> None:
    """One image alone gives what it gives in a batch; loading twice gives the same fingerprint."""
    encoder = load_encoder(name)
    images = np.random.default_rng(2).integers(
        0, 256, (5, *([encoder.spec.preprocessing["crop_size"]] * 2), 3), dtype=np.uint8
    )
    whole = encoder.encode(images)
    np.testing.assert_allclose(np.concatenate([encoder.encode(image[None]) for image in images]), whole, atol=1e-5)
    assert load_encoder(name).spec == encoder.spec
    assert whole.shape == (5, encoder.spec.dim)


def test_fingerprints_follow_what_changes_numbers_and_nothing_else() -> None:
    """Parameters and space count; name, place of the weights and software do not."""
    spec = load_encoder("hog").spec
    same = dataclasses.replace(spec, name="other", weights_path="elsewhere", software="gmem 9")
    assert same.fingerprint == spec.fingerprint
    assert load_encoder("hog", parameters={"cell": 4}).spec.fingerprint != spec.fingerprint
    assert load_encoder("hog", space="raw").spec.fingerprint != spec.fingerprint


def test_wrong_requests_are_answered_with_the_nearest_right_ones() -> None:
    """Unknown names and parameters get suggestions."""
    with pytest.raises(EncoderError, match="'dinov2'"):
        load_encoder("dinov")
    with pytest.raises(EncoderError, match="'orientations'"):
        load_encoder("hog", parameters={"orientation": 3})
    with pytest.raises(EncoderError, match="positive integer"):
        load_encoder("hog", parameters={"cell": 0})
    with pytest.raises(EncoderError, match="multiple of cell"):
        load_encoder("hog", parameters={"cell": 5})
    with pytest.raises(EncoderError, match="has no weights"):
        load_encoder("hog", weights="x")


def test_dinov2_equals_a_direct_transformers_forward(hf_cache: Path) -> None:
    """With the published pixels, our CLS token is the model's, whatever the batch."""
    import torch
    from transformers import AutoModel

    from gmem_bank.encoders.preprocess import to_input

    encoder = load_encoder("dinov2")
    images = np.random.default_rng(3).integers(0, 256, (3, 256, 256, 3), dtype=np.uint8)
    model = AutoModel.from_pretrained(hf_cache).eval()
    with torch.no_grad():
        pixels = to_input(torch.from_numpy(images), encoder.spec.preprocessing)
        expected = model(pixel_values=pixels).pooler_output.numpy()
    got = encoder.encode(images)
    np.testing.assert_allclose(got, expected, atol=1e-5)
    np.testing.assert_allclose(encoder.encode(images[1:2]), expected[1:2], atol=1e-5)
    assert encoder.spec.dim == 32


def test_a_folder_and_the_hub_cache_are_the_same_encoder(hf_cache: Path, photos: Path, tmp_path: Path) -> None:
    """Same weights, same fingerprint; a bank built from a folder finds that folder again."""
    folder = Path(shutil.copytree(hf_cache, tmp_path / "weights"))
    from_cache, from_folder = load_encoder("dinov2"), load_encoder("dinov2", weights=folder)
    assert from_cache.spec.fingerprint == from_folder.spec.fingerprint
    target = tmp_path / "sub" / "bank.safetensors"
    builder.build(photos, from_folder, target)
    bank = open_bank(target)
    assert bank.encoder.weights_path == "../weights"
    assert reload_encoder(bank.encoder, bank.folder).spec.fingerprint == bank.encoder.fingerprint


def test_other_weights_are_another_encoder(hf_cache: Path, tmp_path: Path) -> None:
    """Weights that differ in one number are refused for a bank of the first."""
    from safetensors.numpy import load_file, save_file

    spec = load_encoder("dinov2").spec
    folder = Path(shutil.copytree(hf_cache, tmp_path / "weights"))
    tensors = load_file(folder / "model.safetensors")
    tensors["layernorm.bias"][0] += 1
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(EncoderMismatchError, match="weights sha256"):
        reload_encoder(spec, tmp_path, weights=folder)


def test_absent_weights_say_how_to_get_them() -> None:
    """Without weights in the cache the message names the repository, the folder way and an encoder that needs none."""
    with pytest.raises(EncoderError, match=r"facebook/dinov2-base.*hf download.*--weights FOLDER.*hog"):
        load_encoder("dinov2")
    with pytest.raises(EncoderError, match=r"facebook/dinov2-with-registers-small"):
        load_encoder("dinov2-small-with-registers")


def test_folders_that_are_no_dinov2_are_refused(hf_cache: Path, tmp_path: Path) -> None:
    """Absent folder, no weights, pickles, another architecture, damaged weights: each has its reason."""
    with pytest.raises(EncoderError, match="no folder"):
        load_encoder("dinov2", weights=tmp_path / "none")
    folder = Path(shutil.copytree(hf_cache, tmp_path / "weights"))
    config = (folder / "config.json").read_text()
    (folder / "config.json").write_text(config.replace('"dinov2"', '"vit"'))
    with pytest.raises(EncoderError, match="'vit' model"):
        load_encoder("dinov2", weights=folder)
    (folder / "config.json").write_text(config)
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[:1000])
    with pytest.raises(EncoderError, match="is cut short or damaged"):
        load_encoder("dinov2", weights=folder)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(EncoderError, match="pickle"):
        load_encoder("dinov2", weights=folder)


def test_transformers_absent_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    """The exact pip line is in the message."""
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(MissingDependencyError, match=r"pip install transformers \(the extra gmem\[hf\]\)"):
        load_encoder("dinov2")


PLUGIN = """
import numpy as np
from gmem_bank import EncoderSpec

class Mean:
    def __init__(self, name, options):
        self.spec = EncoderSpec(name=name, family="mean", dim=3, space=options.space,
                                preprocessing={"crop": "adm", "crop_size": 8})
    def encode(self, images):
        return images.astype(np.float32).mean(axis=(1, 2)) + 1
"""


def test_a_third_party_encoder_is_listed_without_import_and_used_by_name(tmp_path: Path, photos: Path) -> None:
    """A distribution's entry points are found; a broken one breaks only itself."""
    site = tmp_path / "site"
    (site / "fake-1.0.dist-info").mkdir(parents=True)
    (site / "fake-1.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: fake\nVersion: 1.0\n")
    (site / "fake-1.0.dist-info" / "entry_points.txt").write_text(
        "[gmem_bank.encoders]\nmean-colour = fake_encoder:Mean\nbroken = fake_broken:Nothing\nhog = fake_encoder:Mean\n"
    )
    (site / "fake_encoder.py").write_text(PLUGIN)
    (site / "fake_broken.py").write_text("raise RuntimeError('boom')")
    code = (
        "import sys, gmem_bank\n"
        "names = gmem_bank.available_encoders()\n"
        "assert names['mean-colour'].origin == 'fake' and names['hog'].origin == 'built in', names\n"
        "assert 'fake_encoder' not in sys.modules\n"
        f"report = gmem_bank.build({str(photos)!r}, gmem_bank.load_encoder('mean-colour'), 'plug.safetensors')\n"
        "assert (report.num_rows, report.dim) == (24, 3)\n"
        "try:\n    gmem_bank.load_encoder('broken')\n"
        "except gmem_bank.EncoderError as error:\n    assert 'boom' in str(error)\n"
        "else:\n    raise SystemExit('no error')\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], env={"PYTHONPATH": str(site)}, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr


def test_every_documented_name_is_available() -> None:
    """The names of the design are all there."""
    names = set(available_encoders())
    sizes = ("small", "large", "giant")
    wanted = {"dinov2", "dinov2-with-registers", "hog", "pixels", "random-projection"} | {
        f"dinov2-{size}" for size in sizes
    }
    assert wanted | {f"dinov2-{size}-with-registers" for size in sizes} <= names


def test_a_trained_encoder_equals_a_direct_forward(hf_cache: Path) -> None:
    """The real one where it is at hand, the small random one otherwise."""
    import torch
    from transformers import AutoModel

    from gmem_bank.encoders.preprocess import to_input

    trained = SHARED / "data" / "encoder_vit_tiny16_as_dinov2"
    folder = trained if trained.exists() else hf_cache
    encoder = load_encoder("dinov2", weights=folder)
    images = np.random.default_rng(0).integers(0, 256, (2, 256, 256, 3), dtype=np.uint8)
    with torch.no_grad():
        pixels = to_input(torch.from_numpy(images), encoder.spec.preprocessing)
        expected = AutoModel.from_pretrained(folder).eval()(pixel_values=pixels).pooler_output.numpy()
    np.testing.assert_allclose(encoder.encode(images), expected, atol=1e-5)
