"""GMem's preprocessing, pixel for pixel."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import load_file

from gmem_bank import decode_worker
from gmem_bank.decoding import read_image
from gmem_bank.encoders import native
from gmem_bank.encoders.preprocess import center_crop, crop, gmem_preprocessing, square_preprocessing, to_input
from gmem_bank.sources import list_images
from tests.conftest import DATA, SHARED

GOLDEN = load_file(DATA / "preprocess.safetensors")


def picture(index: int) -> np.ndarray:
    if index < 3:
        return read_image(DATA / f"preprocess_{index}.jpg")
    enlarged = Image.fromarray(read_image(DATA / "preprocess_0.jpg")).resize((1600, 1200), Image.Resampling.BICUBIC)
    return np.asarray(enlarged)


@pytest.mark.parametrize("index", range(4))
def test_crop_and_network_input_equal_the_published_ones(index: int) -> None:
    """The crop is equal to the byte; the network's input to 1e-5 (sampled at 4096 places)."""
    crop = center_crop(picture(index), 256)
    np.testing.assert_array_equal(crop, GOLDEN[f"{index}.crop_u8"])
    values = to_input(torch.from_numpy(crop)[None], gmem_preprocessing())[0].numpy()
    assert values.shape == (3, 224, 224)
    sampled = values.reshape(-1)[GOLDEN[f"{index}.places"]]
    assert np.abs(sampled - GOLDEN[f"{index}.encoder_in"]).max() <= 1e-5


def test_every_published_value_at_hand_is_matched_in_one_batch() -> None:
    """All 4 × 150,528 values with the reference folder beside the checkout, the 4,096 kept of each without it."""
    path = SHARED / "golden" / "preprocess.safetensors"
    whole = load_file(path) if path.exists() else {}
    crops = np.stack([center_crop(picture(index), 256) for index in range(4)])
    values = to_input(torch.from_numpy(crops), gmem_preprocessing()).numpy().reshape(4, -1)
    for index in range(4):
        places = np.arange(values.shape[1]) if whole else GOLDEN[f"{index}.places"]
        expected = whole[f"{index}.encoder_in"].reshape(-1) if whole else GOLDEN[f"{index}.encoder_in"]
        assert np.abs(values[index][places] - expected).max() <= 1e-5


@pytest.mark.parametrize(
    ("height", "width", "size"),
    [(8, 8, 32), (300, 257, 256), (257, 300, 256), (511, 2000, 256), (1, 50, 16), (64, 64, 64)],
)
def test_any_size_gives_the_asked_square(height: int, width: int, size: int) -> None:
    """Small images are enlarged, long ones cropped; a constant image stays constant."""
    crop = center_crop(np.full((height, width, 3), 77, np.uint8), size)
    assert crop.shape == (size, size, 3)
    assert (crop == 77).all()


def test_the_crop_is_central() -> None:
    """A mark in the middle stays in the middle."""
    image = np.zeros((100, 301, 3), np.uint8)
    image[:, 150] = 255
    crop = center_crop(image, 100)
    assert crop[50, :, 0].argmax() == 50


RECORDS = {
    "adm": square_preprocessing(64),
    **{
        f"native {kind}": {
            "crop": "native", "resize": {"shortest_edge": edge}, "crop_size": 48, "resample": kind, "center_crop": True,
        }
        for kind, edge in (("bicubic", 60), ("bilinear", 40), ("lanczos", 48))
    },
}  # fmt: skip


@pytest.mark.parametrize("record", RECORDS.values(), ids=RECORDS)
@pytest.mark.parametrize(("height", "width"), [(1, 999), (3, 700), (801, 2), (5, 64), (30, 1500)])
def test_the_crop_of_a_long_line_is_made_alone(
    record: dict, height: int, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is what resizing the whole picture and cropping gives, to a step of the last rounding, black margins with it."""
    image = np.random.default_rng(height).integers(0, 256, (height, width, 3), dtype=np.uint8)
    whole = crop(image, record).astype(int)
    monkeypatch.setattr(native, "MOST_RESIZED", 0)
    assert np.abs(crop(image, record) - whole).max() <= 1


@pytest.mark.parametrize("record", RECORDS.values(), ids=RECORDS)
def test_a_line_of_pixels_takes_no_memory_but_its_own(record: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    """3,000,000 × 1 pixels would be hundreds of gigabytes before the crop; no resized picture is larger than the source."""
    sizes = []
    resize = Image.Image.resize

    def counted(self: Image.Image, size: tuple[int, int], *args: object, **options: object) -> Image.Image:
        sizes.append(size[0] * size[1])
        assert sizes[-1] <= 3_000_000
        return resize(self, size, *args, **options)

    monkeypatch.setattr(Image.Image, "resize", counted)
    side = record["crop_size"]
    assert crop(np.full((1, 3_000_000, 3), 77, np.uint8), record).shape == (side, side, 3)
    assert crop(np.full((3_000_000, 1, 3), 77, np.uint8), record).max() == 77
    assert sizes


def test_an_image_for_which_memory_ends_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """It has its reason, and the hash of its bytes."""

    def none_left(*_: object) -> np.ndarray:
        raise MemoryError

    monkeypatch.setattr(decode_worker, "crop", none_left)
    [item] = list_images(DATA / "preprocess_0.jpg").items
    digest, reason = decode_worker.decode_one(item, square_preprocessing(8))
    assert len(digest) == 64
    assert "too little memory" in reason
