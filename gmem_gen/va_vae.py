"""VA-VAE f16d32 (arXiv 2501.01423): 16×16 pixels to one latent of 32 channels, from its published checkpoint.

The checkpoint is that of a latent-diffusion autoencoder (arXiv 2112.10752): `encoder.*`, `decoder.*`, `quant_conv.*`,
`post_quant_conv.*` under "state_dict". The network is diffusers' AutoencoderKL; what is here is where each tensor goes.

Shapes: B batch, K channels.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

import gmem_bank
from gmem_bank.errors import EncoderError, GMemError
from gmem_gen.autoencoders import Autoencoder
from gmem_gen.diffusers_autoencoders import posterior_of, require_diffusers

WIDTH, MULTIPLES, RES_BLOCKS, LATENT_CHANNELS = 128, (1, 1, 2, 2, 4), 2, 32
TRAINING_ONLY = ("loss.", "foundation_model.", "linear_proj.")
"""Beginnings of the names of what only its training used: the discriminator, and the alignment with a vision model."""
MAX_BYTES = 4 << 30
MAX_ENTRIES, MAX_PICKLE_BYTES = 100_000, 64 << 20
"""Parts of the archive and bytes of its structure: the published one has some hundred, with its optimizer some thousand."""
WHERE = "hustvl/vavae-imagenet256-f16d32-dinov2"

HALVES = {"encoder": "down", "decoder": "up"}
_RES_NET = (("nin_shortcut.", "conv_shortcut."),)
_ATTENTION = (("norm.", "group_norm."), ("q.", "to_q."), ("k.", "to_k."), ("v.", "to_v."), ("proj_out.", "to_out.0."))


def load(name: str, place: str, revision: str | None, *, known: bool) -> Autoencoder:  # noqa: ARG001 - a file has neither
    """Load VA-VAE from its checkpoint file, .pt, .ckpt or .safetensors; raises EncoderError."""
    diffusers, path = require_diffusers(), Path(place)
    model = make_network(diffusers)
    tensors = translated(read_checkpoint(path), len(MULTIPLES), path)
    _fill(model, tensors, path)
    return Autoencoder(
        module=model, factor=2 ** (len(MULTIPLES) - 1), channels=LATENT_CHANNELS, posterior=posterior_of(model),
        decode=lambda latents: model.decode(latents).sample, place=path.resolve().as_posix(), revision=None,
        sha256=gmem_bank.sha256_of_file(path), facts={"software": f"diffusers {diffusers.__version__}"},
    )  # fmt: skip


def make_network(diffusers: Any, width: int = WIDTH, latent_channels: int = LATENT_CHANNELS, groups: int = 32) -> Any:
    """Return the network, with attention at the lowest resolution only."""
    plain = len(MULTIPLES) - 1
    return diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * plain + ("AttnDownEncoderBlock2D",),
        up_block_types=("AttnUpDecoderBlock2D",) + ("UpDecoderBlock2D",) * plain,
        block_out_channels=tuple(width * multiple for multiple in MULTIPLES), layers_per_block=RES_BLOCKS,
        latent_channels=latent_channels, norm_num_groups=groups, sample_size=256, scaling_factor=1.0,
    )  # fmt: skip


def read_checkpoint(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a checkpoint; nothing in it is run.

    Raises:
        EncoderError: absent, too large, unreadable, or something else than a table of tensors.
    """
    if not path.is_file():
        raise EncoderError(
            f"no file {path}: tokenizer 'va-vae' takes its published checkpoint, such as vavae-imagenet256-f16d32-dinov2.pt of "
            f"{WHERE} on the hub",
            path=path,
        )
    if path.stat().st_size > MAX_BYTES:
        raise EncoderError(f"{path} has more than {MAX_BYTES >> 30} GiB: this is not a checkpoint of VA-VAE", path=path)
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        stored = gmem_bank.read_torch_archive(
            path, what="checkpoint", holding="the state dict alone", max_entries=MAX_ENTRIES,
            max_pickle_bytes=MAX_PICKLE_BYTES,
        )  # fmt: skip
    except (OSError, GMemError, SafetensorError) as error:
        raise EncoderError(
            f"{path} is not a checkpoint that can be read without running code: {error}", path=path
        ) from error
    tensors = stored.get("state_dict", stored) if isinstance(stored, dict) else None
    if not isinstance(tensors, dict) or not all(map(_is_plain, tensors.values())):
        raise EncoderError(f"{path} holds no table of tensors (under 'state_dict' or at the top)", path=path)
    return tensors


def _is_plain(value: Any) -> bool:
    return isinstance(value, Tensor) and value.layout == torch.strided and not value.is_nested


def translated(tensors: Mapping[str, Tensor], levels: int, path: Path) -> dict[str, Tensor]:
    """Return tensors under the names that diffusers has for them, without those that only training used.

    Raises:
        EncoderError: a name that is neither; nothing is passed over silently.
    """
    result, foreign = {}, []
    for name, tensor in tensors.items():
        own = name.removeprefix("module.")
        if own.startswith(TRAINING_ONLY):
            continue
        target = translate(own, levels)
        if target is None:
            foreign.append(name)
            continue
        # attention is by 1×1 convolutions there, by linear maps here
        flat = ".attentions." in target and tensor.ndim == 4
        result[target] = tensor[:, :, 0, 0] if flat else tensor
    if foreign:
        raise EncoderError(
            f"{path} holds {len(foreign)} tensors that VA-VAE does not have, such as {foreign[0]!r}",
            path=path,
            key=foreign[0],
        )
    return result


def translate(name: str, levels: int) -> str | None:
    """Return diffusers' name of a latent-diffusion autoencoder's tensor; None where it has none.

    Levels count from the image down in the encoder; in the decoder of latent diffusion too, whereas diffusers counts its up
    blocks in the order in which they run.
    """
    half, _, rest = name.partition(".")
    if half in ("quant_conv", "post_quant_conv") or (half in HALVES and rest.startswith(("conv_in.", "conv_out."))):
        return name
    norm = re.fullmatch(r"norm_out\.(.+)", rest)
    middle = re.fullmatch(r"mid\.(block|attn)_(\d)\.(.+)", rest)
    level = re.fullmatch(rf"{HALVES.get(half, '-')}\.(\d+)\.(?:(block|attn)\.(\d+)|(?:down|up)sample)\.(.+)", rest)
    inside = None
    if half in HALVES and norm:
        inside = f"conv_norm_out.{norm.group(1)}"
    elif half in HALVES and middle:
        inside = f"mid_block.{_inside(middle.group(1), int(middle.group(2)) - 1, middle.group(3))}"
    elif level:
        way, (own, kind, number, tail) = HALVES[half], level.groups()
        block = int(own) if way == "down" else levels - 1 - int(own)
        inside = f"{way}_blocks.{block}." + (
            f"{way}samplers.0.{tail}" if kind is None else _inside(kind, int(number), tail)
        )
    return None if inside is None else f"{half}.{inside}"


def _inside(kind: str, number: int, tail: str) -> str:
    """Return the name of a tensor inside a block: of its residual network or attention of that number."""
    for theirs, ours in _ATTENTION if kind == "attn" else _RES_NET:
        if tail.startswith(theirs):
            tail = ours + tail.removeprefix(theirs)
            break
    return f"{'attentions' if kind == 'attn' else 'resnets'}.{number}.{tail}"


def _fill(model: Any, tensors: Mapping[str, Tensor], path: Path) -> None:
    """Load tensors into the network, all and only those that it has; raises EncoderError."""
    wanted = {name: tensor.shape for name, tensor in model.state_dict().items()}
    missing, foreign = sorted(set(wanted) - set(tensors)), sorted(set(tensors) - set(wanted))
    other = [name for name in wanted if name in tensors and tensors[name].shape != wanted[name]]
    for what, names in (("lacks", missing), ("has, beyond those of VA-VAE,", foreign), ("has in another shape", other)):
        if names:
            raise EncoderError(f"{path} {what} {len(names)} tensors, such as {names[0]!r}", path=path, key=names[0])
    model.load_state_dict({name: tensor.float() for name, tensor in tensors.items()})
