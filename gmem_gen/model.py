"""The generator: a transformer from (x_t, t, condition) to a prediction. It knows tensors, no bank.

Shapes: B batch, C·H·W latent, T tokens, E width, D snippet dimension, P patch side.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple, overload

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gmem_bank.errors import CheckpointError, ConfigError
from gmem_gen.config import ModelConfig
from gmem_gen.layers import (
    Attention,
    ConditionProjection,
    LabelEmbedding,
    Mlp,
    PatchEmbed,
    RotaryEmbedding,
    SwiGLU,
    TimestepEmbedder,
    make_norm,
    normalise,
    position_table,
    projection_head,
    time_frequencies,
)
from gmem_gen.pretrained import read_model, write_model


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
        x = x + gate_1[:, None] * self.attn(normalise(self.norm1, x, shift_1, scale_1), rope)
        mixed: Tensor = x + gate_2[:, None] * self.mlp(normalise(self.norm2, x, shift_2, scale_2))
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
        output: Tensor = self.linear(normalise(self.norm_final, x, shift, scale))
        return output


class Projected(NamedTuple):
    """What a model gives in training with a projection head."""

    output: Tensor
    """(B, C, H, W)."""
    tokens: Tensor
    """(B, T, P) what the head makes of the tokens after block `encoder_depth`."""


class Generator(nn.Module):
    """A flow-matching transformer: LightningDiT, SiT or between, conditioned on one snippet an image, a class, or nothing.

    Args:
        config: the architecture; patch_size 0 and snippet_scale 0 (here √D) are resolved.
        latent: what is drawn.
        snippet_dim: D; of no meaning without memory.

    Raises:
        ConfigError: the patch does not divide the latent, or classes without a number.
    """

    def __init__(self, config: ModelConfig, latent: LatentShape, snippet_dim: int) -> None:
        super().__init__()
        self.config, self.latent, self.snippet_dim = config, latent, snippet_dim
        self.patch_size = config.patch_size or auto_patch_size(latent.size)
        if latent.size % self.patch_size:
            raise ConfigError(
                f"model.patch_size {self.patch_size} does not divide {latent.size}, the side of what is drawn "
                "(with a tokenizer: of its latents)",
                key="model.patch_size",
            )
        if config.condition == "class" and not config.num_classes:
            raise ConfigError(
                "model.condition 'class' needs model.num_classes, the number of classes", key="model.num_classes"
            )
        if config.width % 4:
            raise ConfigError(f"model.width {config.width} must be a multiple of 4", key="model.width")
        self.grid = latent.size // self.patch_size
        self.x_embedder = PatchEmbed(latent.channels, self.patch_size, config.width)
        self.t_embedder = TimestepEmbedder(config.width)
        if config.condition == "memory":
            scale = config.snippet_scale or math.sqrt(snippet_dim)
            self.condition_projection = ConditionProjection(snippet_dim, config.width, scale)
        elif config.condition == "class":
            self.y_embedder = LabelEmbedding(config.num_classes, config.width)
        self.register_buffer("pos_embed", position_table(self.grid, config.width))
        self.pos_embed: Tensor
        self.feat_rope = RotaryEmbedding(self.grid, config.width // config.num_heads) if config.use_rope else None
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        if config.projection_dim:
            self.projector = nn.ModuleList([projection_head(config.width, config.projection_dim)])
        self.final_layer = FinalLayer(config, self.patch_size**2 * latent.channels)
        self.recompute = False
        """Whether the backward pass computes each block again instead of keeping what is in it."""
        self._initialise()

    def _initialise(self) -> None:
        """Xavier-uniform weights, zero biases; modulation and output start at zero, so a block starts as the identity.

        The map of the snippet keeps PyTorch's own initialisation (uniform within 1/√D), which its scale is meant for.
        """
        snippet_map = self.condition_projection.linear if self.config.condition == "memory" else None
        for module in self.modules():
            if isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
            elif isinstance(module, nn.Linear) and module is not snippet_map:
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        for name, parameter in self.named_parameters():
            if name == "x_embedder.proj.weight":
                nn.init.xavier_uniform_(parameter.flatten(1))
            elif name == "x_embedder.proj.bias" or "adaLN_modulation" in name or name.startswith("final_layer.linear"):
                nn.init.zeros_(parameter)
            elif name.startswith("t_embedder") and name.endswith("weight"):
                nn.init.normal_(parameter, std=0.02)

    @overload
    def forward(
        self, x_t: Tensor, t: Tensor, conditions: Tensor | None, *, project: Literal[False] = ...
    ) -> Tensor: ...
    @overload
    def forward(self, x_t: Tensor, t: Tensor, conditions: Tensor | None, *, project: Literal[True]) -> Projected: ...
    def forward(
        self, x_t: Tensor, t: Tensor, conditions: Tensor | None, *, project: bool = False
    ) -> Tensor | Projected:
        """Return the prediction.

        Args:
            x_t: (B, C, H, W) noisy latents.
            t: (B,) times, 0 noise, 1 data.
            conditions: (B, D) snippets, zeros for the null snippet; (B,) int64 labels, `num_classes` for the null class;
                not looked at by an unconditional model.
            project: return a `Projected`, for the projection loss of training.

        Returns:
            (B, C, H, W).

        Raises:
            ConfigError: `project` of a model without projection head.
        """
        if project and not self.config.projection_dim:
            raise ConfigError(
                "this model has no projection head: set model.projection_dim to the dimension of the encoder's patch tokens",
                key="model.projection_dim",
            )
        condition = self._condition(t, conditions)
        tokens, projected = self.x_embedder(x_t) + self.pos_embed, None
        for number, block in enumerate(self.blocks, start=1):
            if self.recompute and torch.is_grad_enabled():
                tokens = checkpoint(block, tokens, condition, self.feat_rope, use_reentrant=False)
            else:
                tokens = block(tokens, condition, self.feat_rope)
            if project and number == self.config.encoder_depth:
                projected = self.projector[0](tokens)
        output = self._unpatchify(self.final_layer(tokens, condition))
        if projected is None:
            return output
        return Projected(output, projected)

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write config.json and the weights into a folder, as `from_pretrained` reads them; raises WriteError."""
        facts = {
            "model": dataclasses.asdict(self.config), "latent": dataclasses.asdict(self.latent),
            "snippet_dim": self.snippet_dim,
        }  # fmt: skip
        write_model(Path(folder), facts, self.state_dict())

    @classmethod
    def from_pretrained(cls, place: str | os.PathLike[str], *, revision: str | None = None) -> Generator:
        """Return a model, in evaluation mode, from a folder that `save_pretrained` or 'gmem-gen export' wrote.

        Args:
            place: the folder, or "OWNER/NAME" on the hub.
            revision: of the hub.

        Raises:
            CheckpointError: not there, damaged, or weights that do not fit.
        """
        facts, tensors = read_model(place, revision)
        try:
            config = ModelConfig(**facts["model"])
            model = cls.of_tensors(config, LatentShape(**facts["latent"]), int(facts["snippet_dim"]), tensors)
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise CheckpointError(f"the weights of {place} do not fit its configuration: {error}") from error
        return model.eval()

    @classmethod
    def of_tensors(
        cls, config: ModelConfig, latent: LatentShape, snippet_dim: int, tensors: Mapping[str, Tensor]
    ) -> Generator:
        """Return a model of these tensors in float32, allocating nothing else; raises RuntimeError where they do not fit."""
        blocks = {name.split(".")[1] for name in tensors if name.startswith("blocks.")}
        if len(blocks) != config.depth:
            raise RuntimeError(f"model.depth is {config.depth}, the weights have {len(blocks)} blocks")
        with torch.device("meta"):
            model = cls(config, latent, snippet_dim)
        model.load_state_dict({name: tensor.float() for name, tensor in tensors.items()}, assign=True)
        model.t_embedder.frequencies = time_frequencies()  # not among what is stored
        return model

    def null_conditions(self, conditions: Tensor) -> Tensor:
        """Return the null conditions for a batch of conditions, of the same shape."""
        if self.config.condition == "class":
            return torch.full_like(conditions, self.config.num_classes)
        return torch.zeros_like(conditions)

    def with_condition_projection(self, projection: ConditionProjection) -> Generator:
        """Return this model with another first map of the condition; everything else is shared, not copied."""
        other = copy.copy(self)
        other._modules = {**self._modules, "condition_projection": projection}
        return other

    def _condition(self, t: Tensor, conditions: Tensor | None) -> Tensor:
        embedded: Tensor = self.t_embedder(t)
        if self.config.condition == "none":
            return embedded
        assert conditions is not None
        mapping = self.condition_projection if self.config.condition == "memory" else self.y_embedder
        conditioned: Tensor = embedded + mapping(conditions)
        return conditioned

    def _unpatchify(self, tokens: Tensor) -> Tensor:
        """Return (B, C, H, W) for (B, T, P·P·C), whose order is (row, column, p, q, channel)."""
        patch, grid = self.patch_size, self.grid
        blocks = tokens.view(len(tokens), grid, grid, patch, patch, self.latent.channels)
        return torch.einsum("nhwpqc->nchpwq", blocks).reshape(
            len(tokens), self.latent.channels, grid * patch, grid * patch
        )
