"""Images of the experiments in halves, and the encoders that condition on them and judge them.

Shapes: n images, S pixels a side.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

import gmem_bank
import gmem_gen

HALVES = {"train": "train.tar", "held-out": "test.tar"}
"""Folder → archive of CIFAR-10."""
OTHERS = "others"
"""Folder of images of the training archive that no generator learns from."""
ONE_THREAD = ("train.max_minutes=0", "train.num_threads=1", "train.keep_checkpoints=0", "sample.method=euler")
DIGITS_TRAINING = ("model.patch_size=2", "model.depth=2", "data.channels=1", "train.snippet_dropout=0.2", *ONE_THREAD,
                   "sample.num_steps=12")  # fmt: skip
CIFAR_TRAINING = ("model.patch_size=4", *ONE_THREAD, "sample.num_steps=16")


@dataclass(frozen=True, kw_only=True)
class EncoderChoice:
    """An encoder by what `load_encoder` takes."""

    name: str
    weights: str | None = None
    parameters: Mapping[str, Any] = field(default_factory=dict)
    called: str = ""
    """What tables say; the name where it is empty."""

    def load(self, space: str = "unit") -> gmem_bank.Encoder:
        """Return the encoder."""
        return gmem_bank.load_encoder(self.name, weights=self.weights, space=space, parameters=dict(self.parameters))

    def words(self) -> str:
        """Return what to call it."""
        return self.called or self.name


@dataclass(frozen=True, kw_only=True)
class Images:
    """Real images in two halves, and what to do with them."""

    name: str
    train: Path
    """Class folders."""
    held_out: Path
    """Class folders."""
    taught: Path
    """Class folders that networks of the experiment learn from: other images than the generator's, where there are enough."""
    encoder: EncoderChoice
    """Conditions the generator."""
    training: Sequence[str]
    """Settings of the generator."""
    settings: Mapping[str, Any]
    """What decides the images, for the names of cells."""
    flip: bool = False
    """Banks that a generator learns from have mirrored twins of the images, which doubles the shapes it sees."""

    def build(self, source: Path, bank: Path) -> gmem_bank.MemoryBank:
        """Build a bank of the conditioning encoder, or open it where it is there."""
        gmem_bank.build(source, self.encoder.load(), bank, narrowing=gmem_bank.Narrowing(flip=self.flip))
        return gmem_bank.open(bank)

    def config(self, preset: str, *settings: str) -> gmem_gen.Config:
        """Return a preset with the settings of these images, and more."""
        return gmem_gen.apply_settings(gmem_gen.preset(preset), [*self.training, *settings])

    def identity(self) -> dict[str, Any]:
        """Return all that decides what a generator of these images is, for the names of cells."""
        return {
            "images": self.settings,
            "flip": self.flip,
            "training": list(self.training),
            "encoder": dataclasses.asdict(self.encoder),
        }


def digits(folder: Path) -> Images:
    """Write scikit-learn's 1,797 digits as class folders: of every four the first is held out."""
    from sklearn.datasets import load_digits

    data = load_digits()
    train, held_out = folder / "digits" / "train", folder / "digits" / "held-out"
    if not (folder / "digits" / "written").is_file():
        shutil.rmtree(folder / "digits", ignore_errors=True)
        for index, (image, label) in enumerate(zip(data.images, data.target, strict=True)):
            target = (held_out if index % 4 == 0 else train) / str(label)
            target.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.rint(image * (255 / 16)).astype(np.uint8)).save(target / f"{index:04d}.png")
        (folder / "digits" / "written").touch()
    hog = EncoderChoice(name="hog", parameters={"size": 40, "orientations": 12})
    return Images(name="digits", train=train, held_out=held_out, taught=train, encoder=hog, training=DIGITS_TRAINING,
                  settings={"digits": 1797})  # fmt: skip


def cifar10(data: Path, folder: Path, per_class: int) -> Images:
    """Write images of each class of CIFAR-10 as class folders, from a folder with train.tar and test.tar.

    Args:
        data: the folder; members of the archives are `class/name.jpg` or `.png`.
        folder: for the class folders.
        per_class: the first so many of each class are the generator's, and of the other archive are held out.
    """
    target = folder / f"cifar10-{per_class}"
    if not (target / "written").is_file():
        shutil.rmtree(target, ignore_errors=True)
        for half, archive in HALVES.items():
            source = gmem_bank.open_images(data / archive)
            for name, places in source.concepts.items():
                _write(source, places[:per_class], target / half / name)
                if half == "train":
                    _write(source, places[per_class:], target / OTHERS / name)
        (target / "written").touch()
    hog = EncoderChoice(name="hog", parameters={"size": 40})
    return Images(name="CIFAR-10", train=target / "train", held_out=target / "held-out", taught=target / OTHERS, encoder=hog,
                  training=CIFAR_TRAINING, settings={"cifar10": per_class})  # fmt: skip


def _write(source: gmem_bank.ImageSource, places: NDArray[np.int64], folder: Path) -> None:
    folder.mkdir(parents=True)
    for place in places.tolist():
        Image.fromarray(source.read(place)).save(folder / f"{place:05d}.png")


def latent_settings(images: Images, folder: Path, weights: Path | None) -> tuple[str, ...]:
    """Encode the images by TAEF2, once, and return the settings of a generator of its latents: one token is 8 pixels a side.

    Args:
        images: to encode.
        folder: for the latents.
        weights: folder of TAEF2.
    """
    if weights is None:
        raise SystemExit("the tokenizer 'taef2' needs --taef2 FOLDER, with the weights of TAEF2")
    name = "-".join(str(part).lower() for part in next(iter(images.settings.items())))
    bank, target = folder / f"latents-{name}.safetensors", folder / f"latents-{name}"
    gmem_bank.build(images.train, EncoderChoice(name="hog", parameters={"size": 16}).load(), bank)
    gmem_gen.encode(bank, "taef2", target, weights=weights, flip=images.flip)
    return (f'data.latents="{target.resolve()}"', "model.patch_size=1")


def read_folder(folder: Path) -> tuple[NDArray[np.uint8], NDArray[np.int64], list[str]]:
    """Return the images (n, S, S, 3) of class folders, the (n,) places of their classes among the sorted names, and these."""
    source = gmem_bank.open_images(folder)
    names = sorted(source.concepts)
    labels = np.zeros(len(source), np.int64)
    for place, name in enumerate(names):
        labels[source.concepts[name]] = place
    return np.stack([source.read(place) for place in range(len(source))]), labels, names


def choose_encoder(name: str, images: Images, folder: Path, real: str | None) -> EncoderChoice:
    """Return the encoder that an experiment calls by a short name.

    Args:
        name: "hog" or "pixels"; "classifier" or "clip", which are trained on the spot, once; "real".
        images: what they are for.
        folder: where trained networks lie.
        real: folder of a real trained network, or a repository of the hub.
    """
    if name == "hog":
        return images.encoder if images.encoder.name == "hog" else EncoderChoice(name="hog", parameters={"size": 40})
    if name == "pixels":
        return EncoderChoice(name="pixels", parameters={"size": 8})
    if name == "real":
        if real is None:
            raise SystemExit(
                "the encoder 'real' needs --real FOLDER-OR-REPOSITORY, such as a ViT in the form of transformers"
            )
        return EncoderChoice(
            name=f"hf:{real}", parameters={"preset": "native", "dtype": "fp32"}, called=Path(real).name
        )
    if name not in TRAINED_STEPS:
        raise SystemExit(f"no encoder {name!r}: give hog, pixels, {', '.join(TRAINED_STEPS)} or real")
    network = folder / "-".join(str(part).lower() for part in (name, *next(iter(images.settings.items()))))
    if not network.is_dir():
        _train(name, images, network)
    return EncoderChoice(name=f"hf:{network}", parameters={"preset": "native", "dtype": "fp32"}, called=name)


TRAINED_STEPS = {"classifier": {"digits": 400, "CIFAR-10": 1500}, "clip": {"digits": 1500, "CIFAR-10": 1500}}
"""Network that is trained on the spot → images → batches."""


def _train(name: str, images: Images, network: Path) -> None:
    from tools import experiment_networks

    print(f"training the encoder {name!r} …", flush=True)
    pixels, labels, names = read_folder(images.taught)
    steps = TRAINED_STEPS[name][images.name]
    if name == "classifier":
        found = experiment_networks.train_classifier(pixels, labels, network, steps=steps)
        print(f"classifier: {found:.3f} of the images it learned from in the end", flush=True)
    else:
        found = experiment_networks.train_clip(pixels, names, labels, network, steps=steps)
        print(f"clip: loss {found:.3f} in the end", flush=True)
