"""The generator: a transformer from (x_t, t, snippet) to a velocity. It knows tensors, no bank.

Shapes: B batch, C·H·W latent, T tokens, E width, D snippet dimension, P patch side.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gmem_bank.errors import ConfigError
from gmem_gen.config import ModelConfig
from gmem_gen.layers import (
    Attention,
    Mlp,
    PatchEmbed,
    RotaryEmbedding,
    SwiGLU,
    TimestepEmbedder,
    make_norm,
    modulate,
    position_table,
)


@dataclass(frozen=True, kw_only=True)
class LatentShape:
    """What the model draws."""

    channels: int
    size: int
    """Side in latent pixels."""


def auto_patch_size(size: int) -> int:
    """Return the patch side for an image side: an eighth, at least 1, dividing it; so 64 → 8, 32 → 4, 28 → 2, 8 → 1."""
    patch = max(1, size // 8)
    while size % patch:
        patch -= 1
    return patch


class Block(nn.Module):
    """Attention and MLP, each modulated and gated by the condition (adaLN, arXiv 2212.09748)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width, rms = config.width, config.use_rmsnorm
        self.use_shift = config.use_shift
        self.norm1 = make_norm(width, rms=rms)
        self.norm2 = make_norm(width, rms=rms)
        self.attn = Attention(width, config.num_heads, qk_norm=config.use_qk_norm, rms=rms)
        hidden = int(width * config.mlp_ratio)
        self.mlp = SwiGLU(width, int(2 / 3 * hidden)) if config.use_swiglu else Mlp(width, hidden)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, (6 if config.use_shift else 4) * width))

    def forward(self, x: Tensor, condition: Tensor, rope: RotaryEmbedding | None) -> Tensor:
        """Return (B, T, E) for tokens (B, T, E) and a condition (B, E)."""
        parts: list[Tensor | None] = list(self.adaLN_modulation(condition).chunk(6 if self.use_shift else 4, dim=-1))
        if not self.use_shift:
            parts = [None, *parts[:2], None, *parts[2:]]
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = parts
        assert scale_1 is not None and gate_1 is not None and scale_2 is not None and gate_2 is not None
        x = x + gate_1[:, None] * self.attn(modulate(self.norm1(x), shift_1, scale_1), rope)
        mixed: Tensor = x + gate_2[:, None] * self.mlp(modulate(self.norm2(x), shift_2, scale_2))
        return mixed


class FinalLayer(nn.Module):
    """Modulated norm and a projection to pixels."""

    def __init__(self, config: ModelConfig, outputs: int) -> None:
        super().__init__()
        self.norm_final = make_norm(config.width, rms=config.use_rmsnorm)
        self.linear = nn.Linear(config.width, outputs)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(config.width, 2 * config.width))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """Return (B, T, P·P·C)."""
        shift, scale = self.adaLN_modulation(condition).chunk(2, dim=-1)
        output: Tensor = self.linear(modulate(self.norm_final(x), shift, scale))
        return output


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


class Generator(nn.Module):
    """A LightningDiT-style flow-matching transformer, conditioned on one snippet an image.

    Args:
        config: the architecture; patch_size 0 and snippet_scale 0 (here √D) are resolved.
        latent: what is drawn.
        snippet_dim: D.

    Raises:
        ConfigError: the patch does not divide the latent.
    """

    def __init__(self, config: ModelConfig, latent: LatentShape, snippet_dim: int) -> None:
        super().__init__()
        self.config, self.latent, self.snippet_dim = config, latent, snippet_dim
        self.patch_size = config.patch_size or auto_patch_size(latent.size)
        if latent.size % self.patch_size:
            raise ConfigError(
                f"model.patch_size {self.patch_size} does not divide the image size {latent.size}",
                key="model.patch_size",
            )
        if config.width % 4:
            raise ConfigError(f"model.width {config.width} must be a multiple of 4", key="model.width")
        self.grid = latent.size // self.patch_size
        self.x_embedder = PatchEmbed(latent.channels, self.patch_size, config.width)
        self.t_embedder = TimestepEmbedder(config.width)
        self.condition_projection = ConditionProjection(
            snippet_dim, config.width, config.snippet_scale or math.sqrt(snippet_dim)
        )
        self.register_buffer("pos_embed", position_table(self.grid, config.width))
        self.pos_embed: Tensor
        self.feat_rope = RotaryEmbedding(self.grid, config.width // config.num_heads) if config.use_rope else None
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.final_layer = FinalLayer(config, self.patch_size**2 * latent.channels)
        self._initialise()

    def _initialise(self) -> None:
        """Xavier-uniform weights, zero biases; modulation and output start at zero, so a block starts as the identity.

        The map of the snippet keeps PyTorch's own initialisation (uniform within 1/√D), which its scale is meant for.
        """
        for module in self.modules():
            if isinstance(module, nn.Linear) and module is not self.condition_projection.linear:
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        for name, parameter in self.named_parameters():
            if name == "x_embedder.proj.weight":
                nn.init.xavier_uniform_(parameter.flatten(1))
            elif name == "x_embedder.proj.bias" or "adaLN_modulation" in name or name.startswith("final_layer.linear"):
                nn.init.zeros_(parameter)
            elif name.startswith("t_embedder") and name.endswith("weight"):
                nn.init.normal_(parameter, std=0.02)

    def forward(self, x_t: Tensor, t: Tensor, snippets: Tensor) -> Tensor:
        """Return the velocity.

        Args:
            x_t: (B, C, H, W) noisy latents.
            t: (B,) times, 0 noise, 1 data.
            snippets: (B, D); zeros for the null snippet.

        Returns:
            (B, C, H, W).
        """
        tokens = self.x_embedder(x_t) + self.pos_embed
        condition = self.t_embedder(t) + self.condition_projection(snippets)
        for block in self.blocks:
            tokens = block(tokens, condition, self.feat_rope)
        return self._unpatchify(self.final_layer(tokens, condition))

    def _unpatchify(self, tokens: Tensor) -> Tensor:
        """Return (B, C, H, W) for (B, T, P·P·C), whose order is (row, column, p, q, channel)."""
        patch, grid = self.patch_size, self.grid
        blocks = tokens.view(len(tokens), grid, grid, patch, patch, self.latent.channels)
        return torch.einsum("nhwpqc->nchpwq", blocks).reshape(
            len(tokens), self.latent.channels, grid * patch, grid * patch
        )


def num_parameters(model: nn.Module) -> int:
    """Return the number of trained parameters."""
    return sum(parameter.numel() for parameter in model.parameters())
