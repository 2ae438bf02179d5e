"""Small networks that experiments train themselves: a classifier that judges, and one like CLIP to be conditioned on.

Both become folders in the form of the transformers library, which `hf:FOLDER` reads. They learn from images that no generator
of the same experiment learns from, where there are enough of them; never from the held-out ones.

Shapes: n images, S pixels a side, D dimensions.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

SIDE = {"classifier": 64, "clip": 32}
"""Pixels that the networks see, enlarged from what there is; a ResNet halves them twice before its first block."""
BATCH = 64
TINTS = ("grey", "red", "green", "blue")
LIGHTS = ("dark", "plain", "bright")
SPECIAL = 2
"""Tokens of a caption that are no words: begin and end."""


def train_classifier(
    images: NDArray[np.uint8], labels: NDArray[np.int64], folder: Path, *, steps: int, seed: int = 0
) -> float:
    """Train a ResNet of three small stages on classes, write it without its last layer, and return its last accuracy.

    Args:
        images: (n, S, S, 3).
        labels: (n,) classes from 0.
        folder: for the network; its embeddings have 128 dimensions.
        steps: batches of 64, mirrored and shifted at random.
        seed: of weights and batches.

    Returns:
        The share of the images of the last tenth of the steps that it took for their class, as it learned from them.
    """
    from transformers import ResNetConfig, ResNetModel

    torch.manual_seed(seed)
    config = ResNetConfig(embedding_size=32, hidden_sizes=[32, 64, 128], depths=[1, 1, 1], layer_type="basic")
    network, last = ResNetModel(config), nn.Linear(128, int(labels.max()) + 1)
    loss_of = nn.CrossEntropyLoss(label_smoothing=0.1)
    right: list[float] = []

    def loss(pixels: torch.Tensor, places: NDArray[np.int64]) -> torch.Tensor:
        wanted = torch.from_numpy(labels[places])
        found = last(network(pixels).pooler_output.flatten(1))
        right.append(float((found.argmax(1) == wanted).float().mean()))
        result: torch.Tensor = loss_of(found, wanted)
        return result

    mirrored = bool(np.ptp(images.astype(np.int16), axis=-1).any())  # a mirrored digit is another or none
    _learn(nn.ModuleList([network, last]), loss, images, "classifier", steps=steps, seed=seed, mirrored=mirrored)
    _save(network, folder, SIDE["classifier"])
    return float(np.mean(right[-max(1, steps // 10) :]))


def train_clip(images: NDArray[np.uint8], names: list[str], labels: NDArray[np.int64], folder: Path, *, steps: int,
               seed: int = 0) -> float:  # fmt: skip
    """Train CLIP's two towers, small, by CLIP's loss on captions of light, tint and class, write them, and return the last loss.

    Args:
        images: (n, S, S, 3).
        names: of the classes, of which captions are made.
        labels: (n,) places in `names`.
        folder: for the network; its embeddings have 64 dimensions.
        steps: batches of 64.
        seed: of weights and batches.
    """
    from transformers import CLIPConfig, CLIPModel

    torch.manual_seed(seed)
    tower = {"hidden_size": 96, "intermediate_size": 288, "num_hidden_layers": 4, "num_attention_heads": 4}
    words = [*LIGHTS, *TINTS, *(f"class {name}" for name in names)]
    config = CLIPConfig(
        text_config={**tower, "num_hidden_layers": 1, "vocab_size": len(words) + SPECIAL, "max_position_embeddings": 5,
                     "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1},
        vision_config={**tower, "image_size": SIDE["clip"], "patch_size": 4}, projection_dim=64,
    )  # fmt: skip
    network, tokens = CLIPModel(config), torch.from_numpy(captions(images, labels))
    lasts: list[float] = []

    def loss(pixels: torch.Tensor, places: NDArray[np.int64]) -> torch.Tensor:
        found = network(input_ids=tokens[places], pixel_values=pixels, return_loss=True).loss
        lasts.append(float(found.detach()))
        result: torch.Tensor = found
        return result

    _learn(network, loss, images, "clip", steps=steps, seed=seed, mirrored=False)
    _save(network, folder, SIDE["clip"])
    return float(np.mean(lasts[-max(1, steps // 10) :]))


def captions(images: NDArray[np.uint8], labels: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return (n, 5) tokens: begin, one of three lights, one of four tints, the class, end.

    Lights are thirds of the images by their mean; a tint is the channel that is above the mean of an image by more than 8 of 255.
    """
    means = images.reshape(len(images), -1, 3).astype(np.float64).mean(axis=1)
    light = np.searchsorted(np.quantile(means.mean(axis=1), (1 / 3, 2 / 3)), means.mean(axis=1))
    above = means - means.mean(axis=1, keepdims=True)
    tint = np.where(above.max(axis=1) > 8, 1 + above.argmax(axis=1), 0)
    words = np.stack([light, len(LIGHTS) + tint, len(LIGHTS) + len(TINTS) + labels], axis=1) + SPECIAL
    return np.concatenate([np.zeros((len(images), 1), np.int64), words, np.ones((len(images), 1), np.int64)], axis=1)


def _learn(network: nn.Module, loss: Callable[[torch.Tensor, NDArray[np.int64]], torch.Tensor], images: NDArray[np.uint8],
           kind: str, *, steps: int, seed: int, mirrored: bool) -> None:  # fmt: skip
    """Take so many steps of AdamW, with a rate that rises and falls once."""
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    rng = np.random.default_rng(seed)
    network.train()
    for places in _batches(len(images), steps, rng):
        pixels = _enlarged(images[places], SIDE[kind])
        if mirrored and rng.random() < 0.5:
            pixels = pixels.flip(-1)
        shift = tuple(rng.integers(-SIDE[kind] // 16, SIDE[kind] // 16 + 1, 2).tolist())
        optimizer.zero_grad()
        found = loss(pixels.roll(shift, (-2, -1)), places)
        found.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    network.eval()


def _batches(count: int, steps: int, rng: np.random.Generator) -> Iterator[NDArray[np.int64]]:
    waiting = np.empty(0, np.int64)
    for _ in range(steps):
        while len(waiting) < BATCH:
            waiting = np.concatenate([waiting, rng.permutation(count)])
        yield waiting[:BATCH]
        waiting = waiting[BATCH:]


def _enlarged(images: NDArray[np.uint8], side: int) -> torch.Tensor:
    """Return (n, 3, side, side) in [−1, 1]."""
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1
    return nn.functional.interpolate(pixels, size=(side, side), mode="bilinear", antialias=True)


def _save(network: Any, folder: Path, side: int) -> None:
    """Write a network and its preprocessing, whole or not at all."""
    temporary = folder.with_name(folder.name + ".partial")
    shutil.rmtree(temporary, ignore_errors=True)
    network.save_pretrained(temporary)
    preprocessing = {
        "do_resize": True, "size": {"height": side, "width": side}, "resample": 2, "do_rescale": True,
        "rescale_factor": 1 / 255, "do_normalize": True, "image_mean": [0.5] * 3, "image_std": [0.5] * 3,
        "do_center_crop": False, "image_processor_type": "ViTImageProcessor",
    }  # fmt: skip
    (temporary / "preprocessor_config.json").write_text(json.dumps(preprocessing, indent=1), encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)
