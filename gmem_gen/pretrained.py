"""A model's own folder: config.json beside its weights in safetensors, as diffusers and the hub have it.

Nothing in such a folder is executed, and no pickle is read or written.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

import gmem_bank
from gmem_bank.errors import CheckpointError, WriteError

CONFIG, WEIGHTS = "config.json", "diffusion_pytorch_model.safetensors"
SUBFOLDER = "transformer"
"""Where the model lies in a folder of a whole generator."""


def save_tensors(tensors: Mapping[str, Tensor], target: Path, metadata: dict[str, str]) -> None:
    """Write a safetensors file whole or not at all, readable to whom new files are; raises OSError or SafetensorError."""
    temporary, plain = (target.with_name(f".{target.name}.{os.getpid()}.{end}") for end in ("tmp", "mode"))
    try:
        plain.touch()  # the library's own files are for their owner alone
        save_file(dict(tensors), temporary, metadata=metadata)
        shutil.copymode(plain, temporary)
        temporary.replace(target)
    finally:
        plain.unlink(missing_ok=True)
        temporary.unlink(missing_ok=True)


def write_model(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write config.json and the weights; raises WriteError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        plain = {name: tensor.detach().to("cpu").contiguous() for name, tensor in tensors.items()}
        save_tensors(plain, folder / WEIGHTS, {"format": "pt"})
        text = json.dumps({"_class_name": "Generator", "_gmem_version": gmem_bank.__version__, **config}, indent=2)
        (folder / CONFIG).write_text(text + "\n", encoding="utf-8")
    except (OSError, SafetensorError) as error:
        raise WriteError(f"could not write the model to {folder}: {error}. Free some space", path=folder) from error


def read_model(place: str | os.PathLike[str], revision: str | None = None) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the configuration and the tensors of a model.

    Args:
        place: a folder that `write_model` wrote, or one with such a folder `transformer`; else "OWNER/NAME" on the hub.
        revision: of the hub: branch, tag or commit; None: the main branch.

    Raises:
        CheckpointError: not there, damaged, or of another kind.
    """
    folder = _folder(place, revision)
    folder = folder / SUBFOLDER if (folder / SUBFOLDER / CONFIG).is_file() else folder
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        if not isinstance(config, dict) or config.get("_class_name") != "Generator":
            raise ValueError("its config.json is not that of a generator of gmem")
        return config, load_file(folder / WEIGHTS)
    except (OSError, ValueError, SafetensorError) as error:
        raise CheckpointError(f"{folder} holds no model that can be loaded: {error}", path=folder) from error


def _folder(place: str | os.PathLike[str], revision: str | None) -> Path:
    path = Path(place)
    if path.is_dir() or not isinstance(place, str) or place.count("/") != 1 or place.startswith((".", "/", "~")):
        return path
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
    except ImportError as error:
        raise gmem_bank.MissingDependencyError(
            f"there is no folder {place}, and models of the hub need huggingface_hub: pip install 'gmem[hf]'",
            extra="hf",
        ) from error
    try:
        patterns = ["*.json", "*.safetensors", "README.md"]
        return Path(snapshot_download(place, revision=revision, allow_patterns=patterns))
    except (OSError, HfHubHTTPError, LocalEntryNotFoundError, HFValidationError) as error:
        raise CheckpointError(f"there is no folder {place}, and it could not be had from the hub: {error}") from error
