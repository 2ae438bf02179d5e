"""What a published model is, read off the shapes of its tensors.

Shapes: E width, T tokens, P patch side, C channels, D snippet dimension, F head dimension, H hidden width of the MLP.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from gmem_bank.errors import CheckpointError, first_three, suggest
from gmem_gen.config import ModelConfig
from gmem_gen.model import Generator, LatentShape
from gmem_gen.presets import SIZES

Shapes = Mapping[str, tuple[int, ...]]
PUBLISHED_DEPTH = 4
"""The published projection head reads the tokens after this many blocks; no tensor says so."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """An architecture."""

    model: ModelConfig
    latent: LatentShape
    snippet_dim: int


def deduce(shapes: Shapes, *, num_heads: int = 0) -> Layout:
    """Return the architecture of a published model.

    Args:
        shapes: name → shape of its tensors.
        num_heads: where neither rotary tables nor norms of queries tell it and the width is none of the published sizes.

    Raises:
        CheckpointError: a tensor is missing, misshapen, or there without a place in such a model; which ones is said.
    """
    _require(shapes, "pos_embed", 3)
    _require(shapes, "x_embedder.proj.weight", 4)
    width, channels, patch = shapes["x_embedder.proj.weight"][:3]
    grid = math.isqrt(shapes["pos_embed"][1])
    condition, classes, dim = _condition(shapes)
    depth = 1 + max((int(name.split(".")[1]) for name in shapes if _is_block(name)), default=-1)
    if not depth:
        raise CheckpointError("it has no blocks (blocks.0.…): this is no LightningDiT or SiT", tensor="blocks")
    swiglu = "blocks.0.mlp.w12.weight" in shapes
    head = shapes.get("projector.0.4.weight")
    config: dict[str, Any] = {
        "width": width,
        "depth": depth,
        "num_heads": _num_heads(shapes, width, num_heads),
        "patch_size": patch,
        "snippet_scale": 1.0,
        "mlp_ratio": _mlp_ratio(shapes, width, swiglu),
        "use_rope": "feat_rope.freqs_cos" in shapes,
        "use_swiglu": swiglu,
        "use_rmsnorm": "blocks.0.norm1.weight" in shapes,
        "use_qk_norm": "blocks.0.attn.q_norm.weight" in shapes,
        "use_shift": shapes.get("blocks.0.adaLN_modulation.1.weight", (0,))[0] != 4 * width,
        "condition": condition,
        "num_classes": classes,
        "projection_dim": head[0] if head else 0,
        "encoder_depth": min(PUBLISHED_DEPTH, depth),
    }
    layout = Layout(
        model=ModelConfig(**config), latent=LatentShape(channels=channels, size=grid * patch), snippet_dim=dim
    )
    require_fit(shapes, expected_shapes(layout))
    return layout


def expected_shapes(layout: Layout) -> dict[str, tuple[int, ...]]:
    """Return name → shape of the tensors of an architecture, in the published order."""
    with torch.device("meta"):
        model = Generator(layout.model, layout.latent, layout.snippet_dim)
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def require_fit(found: Shapes, expected: Shapes) -> None:
    """Raise CheckpointError, naming tensors that are missing, have no place, or have another shape."""
    missing = [name for name in expected if name not in found]
    extra = [name for name in found if name not in expected]
    misshapen = [name for name in expected if name in found and found[name] != expected[name]]
    problems = []
    if missing:
        problems.append(f"{len(missing)} missing: {first_three(missing)}")
    if extra:
        near = suggest(extra[0], missing) if missing else ""
        problems.append(f"{len(extra)} without a place in such a model: {first_three(extra)}{near}")
    if misshapen:
        first = misshapen[0]
        problems.append(
            f"{len(misshapen)} of another shape: {first_three(misshapen)} ({first} has {list(found[first])}, expected "
            f"{list(expected[first])})"
        )
    if problems:
        tensor = (missing or extra or misshapen)[0]
        raise CheckpointError(f"its tensors do not make up a published model; {'; '.join(problems)}", tensor=tensor)


def _require(shapes: Shapes, name: str, ndim: int) -> None:
    shape = shapes.get(name)
    if shape is None:
        near = suggest(name, shapes)
        raise CheckpointError(f"it has no tensor {name!r}, so it is no LightningDiT or SiT.{near}", tensor=name)
    if len(shape) != ndim or not all(shape):
        raise CheckpointError(f"its tensor {name!r} has shape {list(shape)}, expected {ndim} sizes", tensor=name)


def _is_block(name: str) -> bool:
    parts = name.split(".")
    return parts[0] == "blocks" and len(parts) > 2 and parts[1].isdigit() and len(parts[1]) <= 5


def _condition(shapes: Shapes) -> tuple[str, int, int]:
    """Return the kind of condition, the number of classes, and the dimension of a snippet."""
    if "condition_projection.linear.weight" in shapes:
        _require(shapes, "condition_projection.linear.weight", 2)
        return "memory", 0, shapes["condition_projection.linear.weight"][1]
    if "y_embedder.embedding_table.weight" in shapes:
        _require(shapes, "y_embedder.embedding_table.weight", 2)
        return "class", shapes["y_embedder.embedding_table.weight"][0] - 1, 0
    return "none", 0, 0


def _num_heads(shapes: Shapes, width: int, given: int) -> int:
    for name in ("feat_rope.freqs_cos", "blocks.0.attn.q_norm.weight"):
        if name in shapes and shapes[name] and shapes[name][-1] and not width % shapes[name][-1]:
            return width // shapes[name][-1]
    known = {size_width: heads for size_width, _, heads in SIZES.values()}
    heads = given or known.get(width, 0)
    if not heads:
        raise CheckpointError(
            f"nothing in it says how many heads its attention has, and a width of {width} is none of the published sizes: give "
            "--num-heads", tensor="blocks.0.attn.qkv.weight",
        )  # fmt: skip
    return heads


def _mlp_ratio(shapes: Shapes, width: int, swiglu: bool) -> float:
    """Return a ratio that gives the hidden width that the tensors have: the published 4, or the nearest one that does."""
    name = "blocks.0.mlp.w12.weight" if swiglu else "blocks.0.mlp.fc1.weight"
    _require(shapes, name, 2)
    hidden = shapes[name][0] // 2 if swiglu else shapes[name][0]
    wide = int(1.5 * hidden) if swiglu else hidden
    for ratio in (4.0, *((wide + more + 0.5) / width for more in range(3))):
        inner = int(width * ratio)
        if (int(2 / 3 * inner) if swiglu else inner) == hidden:
            return ratio
    raise CheckpointError(f"no MLP ratio gives the shape of {name!r}, {list(shapes[name])}", tensor=name)
