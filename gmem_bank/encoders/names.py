"""The encoders of the transformers library by the names a user types: repository, model types, what is taken by default."""

from __future__ import annotations

from dataclasses import dataclass

DTYPES = ("auto", "fp32", "bf16", "fp16")
PRESETS = ("gmem", "native")


@dataclass(frozen=True, kw_only=True)
class HubModel:
    """One name."""

    repository: str
    """On the hub; "" for hf:…, whose rest names it."""
    model_types: tuple[str, ...] = ()
    """What its config may call itself; empty: any vision model."""
    preset: str = "native"


def _sizes(prefix: str, template: str, sizes: dict[str, str], default: str, **facts: object) -> dict[str, HubModel]:
    models = {f"{prefix}-{size}": HubModel(repository=template.format(name), **facts) for size, name in sizes.items()}  # type: ignore[arg-type]
    return {prefix: models[f"{prefix}-{default}"], **models}


_DINOV2_SIZES = {size: size for size in ("small", "base", "large", "giant")}
_DINOV2 = _sizes(
    "dinov2",
    "facebook/dinov2-{}",
    _DINOV2_SIZES,
    "base",
    model_types=("dinov2", "dinov2_with_registers"),
    preset="gmem",
)
_REGISTERS = _sizes(
    "dinov2", "facebook/dinov2-with-registers-{}", _DINOV2_SIZES, "base",
    model_types=("dinov2", "dinov2_with_registers"), preset="gmem",
)  # fmt: skip
_DINOV3 = _sizes(
    "dinov3", "facebook/dinov3-vit{}-pretrain-lvd1689m",
    {"small": "s16", "small-plus": "s16plus", "base": "b16", "large": "l16", "huge-plus": "h16plus", "7b": "7b16"}, "base",
    model_types=("dinov3_vit",),
)  # fmt: skip
_CLIP = _sizes(
    "clip", "openai/clip-vit-{}",
    {"base-32": "base-patch32", "base-16": "base-patch16", "large-14": "large-patch14", "large-14-336": "large-patch14-336"},
    "large-14", model_types=("clip",),
)  # fmt: skip
_SIGLIP2 = _sizes(
    "siglip2", "google/siglip2-{}",
    {
        "base-224": "base-patch16-224", "base-256": "base-patch16-256", "large-256": "large-patch16-256",
        "large-384": "large-patch16-384", "so400m-224": "so400m-patch14-224", "so400m-384": "so400m-patch14-384",
    },
    "base-224", model_types=("siglip", "siglip_model"),
)  # fmt: skip
HUB_MODELS: dict[str, HubModel] = {
    **_DINOV2, **{f"{name}-with-registers": model for name, model in _REGISTERS.items()}, **_DINOV3, **_CLIP, **_SIGLIP2,
}  # fmt: skip
"""Name → model; "dinov2" and the like are their default sizes."""


def model_named(name: str) -> HubModel:
    """Return the model of a name: one of HUB_MODELS, or "hf:REPOSITORY" or "hf:FOLDER", for any vision model."""
    if name.startswith("hf:"):
        return HubModel(repository=name.removeprefix("hf:"))
    return HUB_MODELS[name]


def may_understand_text(name: str) -> bool:
    """Say whether the encoder of a name may have a text tower: False only where it is known to have none."""
    model = HUB_MODELS.get(name)
    return model is None or bool({"clip", "siglip"} & set(model.model_types))
