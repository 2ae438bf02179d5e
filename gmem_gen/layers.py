"""The parts of the transformer. Parameter names and arithmetic follow the published LightningDiT, so that its weights fit.

Shapes: B batch, T tokens, E width, H heads, F head dimension (E/H), h·w token grid.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

TIME_FREQUENCIES = 128
NORM_EPSILON = 1e-6
PROJECTION_WIDTH = 2048
MOST_TOKENS = 512
"""For which attention in half precision on a CPU is made of single products."""


def _wide(x: Tensor) -> Tensor:
    """Return a tensor in float32, one in float64 as it is."""
    return x if x.dtype == torch.float64 else x.float()


class RMSNorm(nn.Module):
    """x / rms(x) · weight, computed in float32 (Zhang & Sennrich 2019, arXiv 1910.07467)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """Return (…, E) normalised over the last axis, in the dtype of x."""
        values = x.float()
        unit = values * torch.rsqrt(values.pow(2).mean(-1, keepdim=True) + NORM_EPSILON)
        return unit.type_as(x) * self.weight


class _ModulatedRMSNorm(torch.autograd.Function):
    """x / rms(x) · weight · (1 + scale) + shift in one pass, with its derivative written out: a fifth of the memory traffic.

    With u = x/rms(x), f = weight·(1 + scale), g the incoming gradient: ∂x = (g·f − u·mean(g·f·u))/rms(x), ∂f = Σ_T g·u.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, shift: Tensor | None, scale: Tensor, epsilon: float) -> Tensor:
        wide = _wide(x)
        inverse = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_()
        inverse = inverse.div_(x.shape[-1]).add_(epsilon).rsqrt_()
        unit = wide * inverse
        factor = (_wide(weight) * (1 + _wide(scale)))[:, None]
        ctx.save_for_backward(unit, inverse, weight, scale, factor)
        ctx.dtypes = (x.dtype, None if shift is None else shift.dtype)
        moved = unit * factor if shift is None else torch.addcmul(_wide(shift)[:, None], unit, factor)
        return moved.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor | None, ...]:
        unit, inverse, weight, scale, factor = ctx.saved_tensors
        x_dtype, shift_dtype = ctx.dtypes
        incoming = _wide(gradients[0])
        along = incoming * unit
        of_factor = along.sum(1)
        inner = torch.matmul(along, factor.transpose(1, 2)).div_(unit.shape[-1])
        of_x = (incoming * factor).addcmul_(unit, inner, value=-1).mul_(inverse)
        of_weight = (of_factor * (1 + _wide(scale))).sum(0).to(weight.dtype)
        of_shift = None if shift_dtype is None else incoming.sum(1).to(shift_dtype)
        return of_x.to(x_dtype), of_weight, of_shift, (of_factor * _wide(weight)).to(scale.dtype), None


def normalise(norm: nn.Module, x: Tensor, shift: Tensor | None, scale: Tensor) -> Tensor:
    """Return norm(x)·(1 + scale) + shift, with (B, E) shift and scale for (B, T, E) x."""
    if isinstance(norm, RMSNorm) and not torch.compiler.is_compiling():
        apply: Any = _ModulatedRMSNorm.apply
        modulated: Tensor = apply(x, norm.weight, shift, scale, NORM_EPSILON)
        return modulated
    return modulate(norm(x), shift, scale)


def make_norm(width: int, *, rms: bool) -> nn.Module:
    """Return RMSNorm with a weight, or LayerNorm without parameters."""
    return RMSNorm(width) if rms else nn.LayerNorm(width, elementwise_affine=False, eps=NORM_EPSILON)


def time_frequencies() -> Tensor:
    """Return the (128,) frequencies of the features of t: 1 down to nearly 1/10000."""
    return torch.exp(-math.log(10_000.0) * torch.arange(TIME_FREQUENCIES, dtype=torch.float32) / TIME_FREQUENCIES)


class TimestepEmbedder(nn.Module):
    """Sine-cosine features of t in [0, 1], unscaled, through a two-layer MLP."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(2 * TIME_FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width))
        self.register_buffer("frequencies", time_frequencies(), persistent=False)
        self.frequencies: Tensor

    def forward(self, t: Tensor) -> Tensor:
        """Return (B, E) for (B,) times: cosines first, then sines."""
        angles = t.float()[:, None] * self.frequencies
        features = torch.cat([angles.cos(), angles.sin()], dim=-1)
        embedded: Tensor = self.mlp(features.to(next(self.mlp.parameters()).dtype))
        return embedded


class PatchEmbed(nn.Module):
    """A convolution whose stride is its size."""

    def __init__(self, channels: int, patch_size: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, width, patch_size, stride=patch_size)

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, T, E) for (B, C, H, W)."""
        tokens: Tensor = self.proj(x)
        return tokens.flatten(2).transpose(1, 2)


def position_table(grid: int, width: int) -> Tensor:
    """Return the fixed (1, T, E) table: first half of the width for the column, second for the row, each sines then cosines.

    Args:
        grid: tokens a side.
        width: E, a multiple of 4.
    """
    quarter = width // 4
    omega = 10_000.0 ** (-torch.arange(quarter, dtype=torch.float64) / quarter)
    angles = torch.arange(grid, dtype=torch.float64)[:, None] * omega
    axis = torch.cat([angles.sin(), angles.cos()], dim=1)
    columns, rows = axis.repeat(grid, 1), axis.repeat_interleave(grid, dim=0)
    return torch.cat([columns, rows], dim=1).float()[None]


def rope_tables(grid: int, head_dim: int) -> tuple[Tensor, Tensor]:
    """Return the (T, F) cosines and sines of the 2-D rotary embedding (Su et al. 2021, arXiv 2104.09864).

    The first half of F turns with the row, the second with the column; each frequency serves a neighbouring pair.
    """
    half = head_dim // 2
    frequencies = 10_000.0 ** (-torch.arange(0, half, 2, dtype=torch.float64) / half)
    angles = (torch.arange(grid, dtype=torch.float64)[:, None] * frequencies).repeat_interleave(2, dim=1)
    rows = angles[:, None, :].expand(grid, grid, half)
    columns = angles[None, :, :].expand(grid, grid, half)
    table = torch.cat([rows, columns], dim=-1).reshape(grid * grid, head_dim)
    return table.cos().float(), table.sin().float()


def rotate(x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """Return (B, T, H, F) turned by (T, F) tables: (x₁, x₂) → (x₁cos − x₂sin, x₂cos + x₁sin) for neighbouring pairs.

    Eager, a pair is a complex number and the turn one product, a third of the time; a compiler fuses the real formula instead.
    """
    cosines, sines = cosines[:, None], sines[:, None]
    if torch.compiler.is_compiling():
        first, second = x.unflatten(-1, (-1, 2)).unbind(-1)  # type: ignore[no-untyped-call]
        turned = torch.stack([-second, first], dim=-1).flatten(-2)
        return x * cosines.to(x.dtype) + turned * sines.to(x.dtype)
    wide = _wide(x)
    turns = torch.complex(cosines[..., ::2], sines[..., ::2])
    pairs = torch.view_as_complex(wide.reshape(*x.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * turns).flatten(-2).to(x.dtype)


class RotaryEmbedding(nn.Module):
    """The rotary tables, stored with the weights as the published model does."""

    def __init__(self, grid: int, head_dim: int) -> None:
        super().__init__()
        cosines, sines = rope_tables(grid, head_dim)
        self.register_buffer("freqs_cos", cosines)
        self.register_buffer("freqs_sin", sines)
        self.freqs_cos: Tensor
        self.freqs_sin: Tensor

    def forward(self, x: Tensor) -> Tensor:
        """Return queries or keys (B, T, H, F), turned."""
        return rotate(x, self.freqs_cos, self.freqs_sin)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Return softmax(q·kᵀ/√F)·v for (B, H, T, F).

    A CPU multiplies half-precision matrices twice as fast one by one as in PyTorch's fused kernel; up to 512 tokens the weights
    in between have room.
    """
    if q.device.type == "cpu" and q.dtype not in (torch.float32, torch.float64) and q.shape[2] <= MOST_TOKENS:
        weights = torch.softmax(torch.matmul(q * q.shape[-1] ** -0.5, k.transpose(-1, -2)), dim=-1)
        return torch.matmul(weights.to(v.dtype), v)
    return functional.scaled_dot_product_attention(q, k, v)


class Attention(nn.Module):
    """Multi-head self-attention."""

    def __init__(self, width: int, num_heads: int, *, qk_norm: bool, rms: bool) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(width, 3 * width)
        # here, unlike in a block, LayerNorm has weights and PyTorch's own epsilon: published weights have it so
        qk = RMSNorm if rms else nn.LayerNorm
        self.q_norm = qk(width // num_heads) if qk_norm else nn.Identity()
        self.k_norm = qk(width // num_heads) if qk_norm else nn.Identity()
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, rope: RotaryEmbedding | None) -> Tensor:
        """Return (B, T, E)."""
        qkv: Tensor = self.qkv(x)
        q, k, v = qkv.view(*x.shape[:2], 3, self.num_heads, -1).unbind(2)
        q, k = self.q_norm(q), self.k_norm(k)
        if rope is not None:
            q, k = rope(q), rope(k)
        mixed = attend(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        output: Tensor = self.proj(mixed.transpose(1, 2).flatten(2))
        return output


class SwiGLU(nn.Module):
    """w3(silu(a)·b) with [a, b] = w12(x) (Shazeer 2020, arXiv 2002.05202)."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.w12 = nn.Linear(width, 2 * hidden)
        self.w3 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, T, E)."""
        gate, value = self.w12(x).chunk(2, dim=-1)
        output: Tensor = self.w3(functional.silu(gate) * value)
        return output


class Mlp(nn.Module):
    """Linear, GELU (tanh), Linear."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, T, E)."""
        output: Tensor = self.fc2(functional.gelu(self.fc1(x), approximate="tanh"))
        return output


def modulate(x: Tensor, shift: Tensor | None, scale: Tensor) -> Tensor:
    """Return x·(1 + scale) + shift, with (B, E) shift and scale for (B, T, E) x."""
    scaled = x * (1 + scale[:, None])
    return scaled if shift is None else scaled + shift[:, None]


class ConditionProjection(nn.Module):
    """Linear map from a snippet to the width; its dropout belongs to the trainer, which draws it reproducibly."""

    def __init__(self, snippet_dim: int, width: int, scale: float) -> None:
        super().__init__()
        self.scale = scale
        self.linear = nn.Linear(snippet_dim, width)

    def forward(self, snippets: Tensor) -> Tensor:
        """Return (B, E) for (B, D) snippets; the null snippet is zeros."""
        projected: Tensor = self.linear(self.scale * snippets)
        return projected


class LabelEmbedding(nn.Module):
    """A vector for each class, and one more for the null class, whose label is the number of classes."""

    def __init__(self, num_classes: int, width: int) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + 1, width)

    def forward(self, labels: Tensor) -> Tensor:
        """Return (B, E) for (B,) int64 labels."""
        embedded: Tensor = self.embedding_table(labels)
        return embedded


def projection_head(width: int, outputs: int) -> nn.Sequential:
    """Return the three-layer head of REPA (arXiv 2410.06940), from tokens (B, T, E) to an encoder's (B, T, P)."""
    return nn.Sequential(
        nn.Linear(width, PROJECTION_WIDTH), nn.SiLU(), nn.Linear(PROJECTION_WIDTH, PROJECTION_WIDTH), nn.SiLU(),
        nn.Linear(PROJECTION_WIDTH, outputs),
    )  # fmt: skip
