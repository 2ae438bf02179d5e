"""Lower precisions: a bank made in one can be used on every machine, and what it costs is measured where it can be."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

import gmem_bank
from gmem_bank.cli import main
from gmem_bank.encoders.precision import mean_cosine
from gmem_bank.errors import EncoderError
from tests.gmem_bank.test_hub_models import images, make_model


def test_an_fp16_bank_can_be_used_on_a_cpu(tmp_path: Path) -> None:
    """Slow is better than not at all: refused for a new bank only."""
    make_model(tmp_path / "model", "dinov2")
    exact = gmem_bank.load_encoder("hf:model", parameters={"dtype": "fp32"}, device="cpu")
    with pytest.raises(EncoderError, match="fp16 is slower than fp32 on a CPU"):
        gmem_bank.load_encoder("hf:model", parameters={"dtype": "fp16"}, device="cpu")
    spec = dataclasses.replace(exact.spec, parameters={**exact.spec.parameters, "dtype": "fp16"})
    half = gmem_bank.reload_encoder(spec, tmp_path, device="cpu")
    assert half.spec.fingerprint == spec.fingerprint != exact.spec.fingerprint
    crops = images(4, 32)
    a, b = exact.encode(crops), half.encode(crops)
    assert not np.array_equal(a, b)
    cosines = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    assert cosines.min() > 0.9999
    assert half.cosine_to_fp32(crops) == pytest.approx(cosines.mean(), abs=1e-6)


def test_rows_without_a_direction_do_not_count() -> None:
    """NaN, infinity and zero on either side; nothing at all where there is no other row."""
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((2, 7, 5)).astype(np.float32)
    a[0, 1], a[1], b[2], b[3, 0], a[4, 2] = np.nan, 0, 0, np.inf, -np.inf
    angles = [np.arccos(a[i] @ b[i] / np.linalg.norm(a[i]) / np.linalg.norm(b[i])) for i in (5, 6)]
    assert mean_cosine(a, b) == pytest.approx(np.cos(angles).mean(), abs=1e-6)
    assert mean_cosine(a[:5], b[:5]) is None
    assert mean_cosine(a[:0], b[:0]) is None


class Coarse:
    """A hog that says it runs in bf16, and knows or does not know what that costs."""

    def __init__(self, cosine: float | None) -> None:
        self._hog, self._cosine = gmem_bank.load_encoder("hog"), cosine
        self.spec = dataclasses.replace(self._hog.spec, parameters={**self._hog.spec.parameters, "dtype": "bf16"})

    def encode(self, images: np.ndarray) -> np.ndarray:
        return self._hog.encode(images)

    def cosine_to_fp32(self, images: np.ndarray) -> float | None:
        assert len(images) == 8
        return self._cosine


@pytest.mark.parametrize(
    ("cosine", "label", "said"),
    [
        (0.98765432, 0.987654, "computed in bf16: cosine to float32 0.987654 on the first eight images"),
        (None, None, "computed in bf16: none of the first eight images says how far from float32"),
        (float("nan"), None, "computed in bf16: none of the first eight images says how far from float32"),
    ],
)
def test_a_build_does_not_fail_for_its_last_measurement(
    photos: Path, monkeypatch: pytest.MonkeyPatch, cosine: float | None, label: float | None, said: str
) -> None:
    """What is not known is not recorded, and the command says so."""
    encoder = Coarse(cosine)
    monkeypatch.setattr(gmem_bank, "load_encoder", lambda *names, **options: encoder)
    result = CliRunner().invoke(
        main, ["build", str(photos), "--encoder", "hog", "-o", "bank.safetensors", "--workers", "0"]
    )
    assert result.exit_code == 0, result.output
    assert said in " ".join(result.stderr.split())
    assert gmem_bank.open("bank.safetensors").encoder.labels.get("cosine_to_fp32") == label
