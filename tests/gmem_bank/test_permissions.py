"""What may not be read: the place is named, and the rest is taken."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

import gmem_bank
from gmem_bank.encoders import load_encoder
from gmem_bank.errors import EncoderError
from tests.gmem_bank.test_hub_models import make_model


def test_a_folder_that_may_not_be_read_is_said_first(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By its path in the source, since nobody knows how many images it holds."""
    scan = os.scandir
    shutil.copy(Path(__file__), photos / "a.py")

    def refusing(path: object) -> object:
        if str(path).endswith("hat"):  # as for a user who is not root
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", refusing)
    report = gmem_bank.build(photos, load_encoder("hog"), "bank.safetensors")
    assert report.skipped[0] == {
        "path": "hat",
        "reason": "unreadable folder: Permission denied. What it holds is missing",
    }
    assert report.concepts == {"dress": 8, "shoes": 8}


def test_weights_that_may_not_be_read_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """The file and the system's reason, not the name of an exception."""
    make_model(Path("model"), "dinov2")
    opened = Path.open

    def refusing(path: Path, *rest: object, **options: object) -> object:
        if path.name == "model.safetensors":
            raise PermissionError(13, "Permission denied", str(path))
        return opened(path, *rest, **options)

    monkeypatch.setattr(Path, "open", refusing)
    with pytest.raises(
        EncoderError, match=r"^encoder 'hf:model': could not read model/model\.safetensors: Permission denied$"
    ):
        load_encoder("hf:model")
