"""From tokens to one embedding an image: which tokens are patches, which is the class token, and what is taken of them.

Shapes: B images, T tokens, D dimensions, H×W places of a map.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from gmem_bank.errors import EncoderSettingError

TOKEN_POOLINGS = ("cls", "mean", "cls+mean")
"""Of tokens, whichever model gives them."""
POOLINGS = (*TOKEN_POOLINGS, "pooler", "projected")


@dataclass(frozen=True)
class TokenLayout:
    """What the tokens of a model's output are: special ones first, then patches."""

    has_class: bool
    """The first token stands for the whole image."""
    num_special: int
    """Tokens that are no patches: class token, registers and the like."""

    @property
    def default_pooling(self) -> str:
        """The class token where there is one, else the mean of the patches."""
        return "cls" if self.has_class else "mean"


WITH_CLASS = {
    "beit": 1, "chinese_clip_vision_model": 1, "clip_vision_model": 1, "data2vec-vision": 1, "deit": 2, "dinov2": 1,
    "dinov2_with_registers": 1, "dinov3_convnext": 1, "dinov3_vit": 1, "dpt": 1, "internvl_vision": 1,
    "mlcd_vision_model": 1, "sapiens2": 1, "tipsv2_vision_model": 1, "vit": 1, "vit_mae": 1, "vit_msn": 1,
}  # fmt: skip
"""Model types whose first token is a class token → special tokens without registers (DeiT has one for distillation)."""
PATCHES_ONLY = (
    "aimv2_vision_model", "donut-swin", "focalnet", "hiera", "ijepa", "siglip_vision_model", "swin", "swinv2",
)  # fmt: skip
"""Model types that give patches alone."""


def layout_of(model: Any) -> TokenLayout | None:
    """Return the layout of a model by its config, None for a type that is not in the tables."""
    vision = getattr(model.config, "vision_config", model.config)
    kind = str(getattr(vision, "model_type", ""))
    if kind in PATCHES_ONLY:
        return TokenLayout(has_class=False, num_special=0)
    if kind not in WITH_CLASS:
        return None
    registers = int(getattr(vision, "num_register_tokens", 0) or 0)
    return TokenLayout(has_class=True, num_special=WITH_CLASS[kind] + registers)


def layout_seen(model: Any, pixels: torch.Tensor) -> TokenLayout | None:
    """Return the layout of a model by what it gives for two different images, None where that does not tell.

    Special tokens enter the first block the same for every image, those of patches do not; and there are as many patches as
    the grid of the input has cells.

    Args:
        model: of the transformers library.
        pixels: (2, 3, H, H) noise, as the network takes it.
    """
    try:
        with torch.inference_mode():
            output = getattr(model, "vision_model", model)(pixel_values=pixels, output_hidden_states=True)
            states, entering = output.last_hidden_state, (getattr(output, "hidden_states", None) or [None])[0]
    except (AttributeError, IndexError, RuntimeError, ValueError, TypeError):
        return None  # it may yet have a pooler of its own
    if states.ndim == 4:  # a map has no token but of places
        return TokenLayout(has_class=False, num_special=0)
    cells = _grid_cells(getattr(model.config, "vision_config", model.config), pixels.shape[-1])
    if cells is None or entering is None or entering.ndim != 3 or entering.shape != states.shape:
        return None
    special = (entering[0] == entering[1]).all(dim=-1)
    count = int(special.sum())
    if not special[:count].all() or special.numel() - count != cells:
        return None
    return TokenLayout(has_class=count == 1, num_special=count)  # which of several is the class token cannot be seen


def _grid_cells(vision: Any, side: int) -> int | None:
    patch = getattr(vision, "patch_size", None)
    patch = patch[0] if isinstance(patch, (list, tuple)) and len(set(patch)) == 1 else patch
    return (side // patch) ** 2 if type(patch) is int and patch > 0 else None


def choose_pooling(name: str, asked: str | None, layout: TokenLayout | None) -> str:
    """Return the pooling asked for, or for None the model's own.

    Raises:
        EncoderSettingError: the model's tokens do not allow it; what does work is said.
    """
    pooling = asked or (layout.default_pooling if layout else "pooler")
    if pooling not in TOKEN_POOLINGS:
        return pooling
    if layout is None:
        raise EncoderSettingError(
            f"encoder {name!r}: which of its tokens are patches is not known, so there is no {pooling!r} of them: take "
            "pooling=pooler, if the model has a pooler",
            key="pooling",
        )
    if "cls" in pooling and not layout.has_class:
        raise EncoderSettingError(
            f"encoder {name!r} has no class token, which {pooling!r} needs: take pooling=mean", key="pooling"
        )
    return pooling


def pool(values: torch.Tensor, pooling: str, num_special: int) -> torch.Tensor:
    """Return (B, D), or (B, 2D) for "cls+mean", of tokens or of a map.

    Args:
        values: (B, T, D) with special tokens first, or (B, D, H, W), for "mean" only.
        pooling: "cls", "mean" (of the patches) or "cls+mean" (one after the other).
        num_special: how many tokens come before those of the patches.

    Raises:
        ValueError: a class token of a map, which has none.
    """
    if values.ndim == 4:
        if pooling != "mean":
            raise ValueError("its output is a map, which has no class token: take pooling=mean")
        return values.mean(dim=(2, 3))
    mean = values[:, num_special:].mean(dim=1)
    if pooling == "mean":
        return mean
    return values[:, 0] if pooling == "cls" else torch.cat([values[:, 0], mean], dim=1)
