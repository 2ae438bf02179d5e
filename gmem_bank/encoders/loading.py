"""What comes out of a folder of the transformers library: the network and its tokenizer, nothing of them made up.

Shapes: none here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from gmem_bank.encoders.pooling import TOKEN_POOLINGS
from gmem_bank.errors import EncoderError, MissingDependencyError

UNUSED_WEIGHTS = ("mask_token",)  # read only while an encoder is pre-trained
TEXT_LENGTHS = {"clip": 77, "siglip": 64, "siglip_model": 64}
"""Model types with a text tower → tokens that it takes, where the config says nothing."""
Tokenize = Callable[[Sequence[str]], Mapping[str, Any]]


def require_transformers() -> Any:
    """Return the transformers module, silenced; raises MissingDependencyError."""
    try:
        import transformers
    except ImportError as error:
        raise MissingDependencyError(
            "this encoder needs transformers: pip install transformers (the extra gmem[hf])", extra="hf"
        ) from error
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return transformers


def load_network(transformers: Any, folder: Path) -> tuple[torch.nn.Module, list[str]]:
    """Return the model in float32, and the names of what its weights lack; raises EncoderError."""
    try:
        model, info = transformers.AutoModel.from_pretrained(
            folder, local_files_only=True, use_safetensors=True, trust_remote_code=False, dtype=torch.float32,
            output_loading_info=True,
        )  # fmt: skip
    except Exception as error:  # whatever a damaged folder makes the library raise
        raise EncoderError(f"could not load the model in {folder}: {error}", path=folder) from error
    return model, sorted(info["missing_keys"])


def require_complete(folder: Path, missing: Sequence[str], pooling: str) -> None:
    """Raise EncoderError where something is missing that the pooling uses: the library fills it with random numbers."""
    unused = ("pooler",) if pooling in TOKEN_POOLINGS else ()
    used = [key for key in missing if not key.endswith(UNUSED_WEIGHTS) and not any(part in key for part in unused)]
    if used:
        raise EncoderError(
            f"the weights in {folder} lack {len(used)} tensors that pooling {pooling!r} uses, such as {used[0]}",
            path=folder,
        )


def tokenizer_of(transformers: Any, folder: Path, config: Mapping[str, Any]) -> Tokenize | None:
    """Return what turns texts into inputs of the text tower, loaded on first use; None for a model without one.

    Texts are padded and cut to what the tower takes: SigLIP to its full length always, and without a mask, as it was trained;
    CLIP to the longest of them.
    """
    kind = config["model_type"]
    if kind not in TEXT_LENGTHS:
        return None
    length = int((config.get("text_config") or {}).get("max_position_embeddings") or TEXT_LENGTHS[kind])
    loaded: list[Any] = []

    def tokenize(texts: Sequence[str]) -> Mapping[str, Any]:
        if not loaded:
            loaded.append(_tokenizer(transformers, folder))
        whole = kind != "clip"
        padding = "max_length" if whole else "longest"
        inputs = loaded[0](list(texts), padding=padding, max_length=length, truncation=True, return_tensors="pt")
        return {name: inputs[name] for name in ("input_ids", "attention_mask")[: 1 if whole else 2]}

    return tokenize


def _tokenizer(transformers: Any, folder: Path) -> Any:
    try:
        return transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # whatever an absent or damaged file makes the library raise
        raise EncoderError(f"{folder} has no usable tokenizer: {error}", path=folder) from error


def choose_device(name: str) -> torch.device:
    """Return the device of a name, "auto" being CUDA where there is one; raises EncoderError."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise EncoderError(f"device {name!r} cannot be used here: {error}", key="device") from error
    return device
