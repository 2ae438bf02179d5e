"""What comes out of a folder of the transformers library: the network and its tokenizer, nothing of them made up.

Shapes: none here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from gmem_bank.encoders.names import HubModel
from gmem_bank.encoders.pooling import TOKEN_POOLINGS
from gmem_bank.encoders.weights import TOKENIZER_FILES, has_tokenizer, require_readable
from gmem_bank.errors import EncoderError, EncoderSettingError, MissingDependencyError

UNUSED_WEIGHTS = ("mask_token",)  # read only while an encoder is pre-trained
PROBES = ["a", "two zebras by a river"]
"""Texts that no tokenizer with words takes for the same."""
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
    require_readable(folder)
    try:
        model, info = transformers.AutoModel.from_pretrained(
            folder, local_files_only=True, use_safetensors=True, trust_remote_code=False, dtype=torch.float32,
            output_loading_info=True, ignore_mismatched_sizes=True,
        )  # fmt: skip
    except Exception as error:  # whatever a damaged folder makes the library raise
        if "trust_remote_code" in str(error):
            raise EncoderError(
                f"{folder} needs code of its own ('auto_map' in its config.json), which gmem never runs: export the model to "
                "ONNX and take onnx:FILE, or wrap it as a plug-in encoder",
                path=folder,
            ) from error
        raise EncoderError(f"could not load the model in {folder}: {error}", path=folder) from error
    for name, stored, wanted in sorted(info["mismatched_keys"])[:1]:
        raise EncoderError(
            f"the weights in {folder} do not fit its config.json: tensor {name!r} is {list(stored)}, by the config "
            f"{list(wanted)} ({len(info['mismatched_keys'])} such tensors): fetch both files from one place",
            path=folder,
            tensor=name,
        )
    return model, sorted(info["missing_keys"])


def require_type(name: str, folder: Path, config: Mapping[str, Any], facts: HubModel) -> None:
    """Raise EncoderError where the model is none of the types of the name, or does not look at images."""
    found = config.get("model_type")
    if facts.model_types and found not in facts.model_types:
        raise EncoderError(
            f"{folder} holds a {found!r} model, encoder {name!r} needs {' or '.join(facts.model_types)}: hf:FOLDER takes any",
            path=folder,
        )
    vision = config.get("vision_config", config)
    if not isinstance(vision, dict) or not {"patch_size", "image_size", "num_channels"} & set(vision):
        raise EncoderError(
            f"{folder} holds a {found!r} model, which does not look at images: a vision model is needed", path=folder
        )


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

    Texts are padded and cut to what the tower takes: SigLIP to its full length always, without a mask, and in lower case, as it
    was trained (Tschannen et al. 2025, arXiv 2502.14786); CLIP to the longest of them. SigLIP 2 has the tokenizer of Gemma, whose
    files say nothing of the case.
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
        given = [text.lower() for text in texts] if whole else list(texts)
        inputs = loaded[0](given, padding=padding, max_length=length, truncation=True, return_tensors="pt")
        return {name: inputs[name] for name in ("input_ids", "attention_mask")[: 1 if whole else 2]}

    return tokenize


def _tokenizer(transformers: Any, folder: Path) -> Any:
    if not has_tokenizer(folder):
        known = ", ".join(" with ".join(names) for names in TOKENIZER_FILES)
        raise EncoderError(
            f"{folder} has no tokenizer files ({known}), so texts mean nothing to it: copy them from the model's repository",
            path=folder,
        )
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        first, second = tokenizer(PROBES)["input_ids"]
    except Exception as error:  # whatever a damaged file makes the library raise
        raise EncoderError(f"{folder} has no usable tokenizer: {error}", path=folder) from error
    if set(first) == set(second):
        raise EncoderError(
            f"the tokenizer in {folder} gives the same numbers for {PROBES[0]!r} and {PROBES[1]!r}: copy its files from the "
            "model's repository again",
            path=folder,
        )
    return tokenizer


def choose_device(name: str) -> torch.device:
    """Return the device of a name, "auto" being CUDA where there is one; raises EncoderError."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise EncoderSettingError(f"device {name!r} cannot be used here: {error}", key="device") from error
    return device
