"""Autoencoders of the diffusers library: SD-VAE (AutoencoderKL), TAESD (AutoencoderTiny), DC-AE (AutoencoderDC).

The weights are safetensors, in a local folder, the hub cache or on the hub; nothing of the network is made up.

Shapes: B batch, c·h·w latent.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import gmem_bank
from gmem_bank.errors import EncoderError, MissingDependencyError
from gmem_gen.autoencoders import Autoencoder

STEM = "diffusion_pytorch_model"
CLASSES = {"sd-vae": "AutoencoderKL", "taesd": "AutoencoderTiny", "dc-ae": "AutoencoderDC"}
PIPELINE_FOLDER = "vae"
"""Where a folder with a whole pipeline has its autoencoder."""


def require_diffusers() -> Any:
    """Return the diffusers module, silenced; raises MissingDependencyError."""
    try:
        import diffusers
    except ImportError as error:
        raise MissingDependencyError(
            "this tokenizer needs diffusers: pip install diffusers (the extra gmem[vae])", extra="vae"
        ) from error
    return diffusers


@contextlib.contextmanager
def quiet(diffusers: Any) -> Iterator[None]:
    """Keep the library from writing to the user's screen while it loads, and put its setting back."""
    before = diffusers.utils.logging.get_verbosity()
    diffusers.utils.logging.set_verbosity_error()
    try:
        yield
    finally:
        diffusers.utils.logging.set_verbosity(before)


def load(name: str, place: str, revision: str | None, *, known: bool) -> Autoencoder:
    """Load an autoencoder.

    Args:
        name: of CLASSES.
        place: folder, or repository on the hub.
        revision: of the hub.
        known: whether the caller compares the weights' sha256, so that another revision is found out.

    Raises:
        EncoderError: no weights, or those of another network.
    """
    diffusers = require_diffusers()
    inside = Path(place) / PIPELINE_FOLDER
    if (inside / "config.json").is_file() and not (Path(place) / "config.json").is_file():
        place = str(inside)
    files = gmem_bank.find_model(place, stem=STEM, revision=revision, or_main=known, option="--tokenizer-weights")
    found = files.config.get("_class_name")
    if found != CLASSES[name]:
        raise EncoderError(
            f"{files.folder} holds {found!r}, tokenizer {name!r} is {CLASSES[name]!r}", path=files.folder
        )
    model = read_network(diffusers, CLASSES[name], files.folder)
    config = model.config
    return Autoencoder(
        module=model, factor=_factor(model, config), channels=int(config.latent_channels),
        posterior=posterior_of(model), decode=lambda latents: model.decode(latents).sample,
        place=files.repository or files.folder.resolve().as_posix(), revision=files.revision, sha256=files.sha256,
        facts={
            "scaling_factor": float(config.scaling_factor), "shift_factor": float(config.get("shift_factor") or 0.0),
            "software": f"diffusers {diffusers.__version__}",
        },
    )  # fmt: skip


def posterior_of(model: Any) -> Callable[[Tensor], tuple[Tensor, Tensor | None]]:
    """Return the function from images to mean and standard deviation of their latents, without one for AutoencoderTiny and DC."""

    def encode(images: Tensor) -> tuple[Tensor, Tensor | None]:
        output = model.encode(images)
        if hasattr(output, "latent_dist"):
            return output.latent_dist.mean, output.latent_dist.std
        return (output.latents if hasattr(output, "latents") else output.latent), None

    return encode


def read_network(diffusers: Any, kind: str, folder: Path) -> Any:
    """Return a network in float32 with all of its weights; raises EncoderError."""
    try:
        with quiet(diffusers):
            model, info = getattr(diffusers, kind).from_pretrained(
                folder, local_files_only=True, use_safetensors=True, torch_dtype=torch.float32, output_loading_info=True,
                low_cpu_mem_usage=False,
            )  # fmt: skip
    except Exception as error:  # whatever a damaged folder makes the library raise
        raise EncoderError(f"could not load the {kind} in {folder}: {error}", path=folder) from error
    wrong = [*info["missing_keys"], *info["unexpected_keys"], *(str(each) for each in info["mismatched_keys"])]
    if wrong:
        raise EncoderError(
            f"the weights in {folder} do not fit its config: {len(wrong)} tensors are missing, unknown or of another shape, such "
            f"as {wrong[0]}",
            path=folder,
        )
    return model


def _factor(model: Any, config: Any) -> int:
    """Return H / h."""
    ratio = getattr(model, "spatial_compression_ratio", None)
    if ratio is None:
        stages = config.get("block_out_channels") or config.get("encoder_block_out_channels")
        ratio = 2 ** (len(stages) - 1)
    return int(ratio)
