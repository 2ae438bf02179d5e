"""Where a model's files are: a local folder, the hub cache or the hub; safetensors only, hashed.

Shapes: none here.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from gmem_bank.errors import EncoderError
from gmem_bank.provenance import sha256_of, sha256_of_file

WEIGHTS = "model.safetensors"
WEIGHTS_INDEX = "model.safetensors.index.json"
CONFIG = "config.json"
TOKENIZER = ("tokenizer*", "vocab*", "merges*", "special_tokens_map.json", "spiece.model", "*.tiktoken")
# Fields of config.json that name things without changing a number.
CONFIG_LABELS = (
    "_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version", "id2label", "label2id",
)  # fmt: skip


def local_folder(folder: Path) -> Path:
    """Return the folder; raises EncoderError where there is none."""
    if not folder.is_dir():
        raise EncoderError(f"no folder {folder}: --weights takes a folder with {CONFIG} and {WEIGHTS}", path=folder)
    return folder


def hub_folder(repository: str, revision: str | None = None, *, or_main: bool = False) -> Path:
    """Return the folder of a repository in the hub cache, fetched where it is not there and a network is.

    Args:
        repository: "facebook/dinov2-base".
        revision: branch, tag or commit; None takes the main branch.
        or_main: take the main branch where the revision is not to be had; the caller compares the weights.

    Raises:
        EncoderError: it is not in the cache and could not be fetched; what to do instead is said.
    """
    from huggingface_hub import snapshot_download

    patterns = [CONFIG, WEIGHTS, WEIGHTS_INDEX, "model-*.safetensors", "preprocessor_config.json", *TOKENIZER]
    try:
        return Path(snapshot_download(repository, revision=revision, allow_patterns=patterns))
    except Exception as error:  # the hub client raises its own, its transport's and the system's errors
        if or_main and revision is not None:
            return hub_folder(repository)
        at, which = ("", "") if revision is None else (f" at {revision}", f" --revision {revision}")
        raise EncoderError(
            f"the weights of {repository}{at} are not in the hub cache and could not be fetched ({type(error).__name__}). "
            f"On a machine with a network run 'hf download {repository}{which}' and copy the cache (HF_HOME), or give a "
            f"folder with {CONFIG} and {WEIGHTS}: --weights FOLDER. A new bank can also be built without weights: "
            "--encoder hog",
            key=repository,
        ) from error


def revision_of(folder: Path) -> str | None:
    """Return the commit that a folder of the hub cache is a snapshot of, None for any other folder."""
    return folder.name if folder.parent.name == "snapshots" else None


def read_config(folder: Path) -> dict[str, Any]:
    """Return config.json; raises EncoderError."""
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise EncoderError(f"{folder} has no readable {CONFIG}: {error}", path=folder) from error
    if not isinstance(config, dict):
        raise EncoderError(f"{folder / CONFIG} is not a JSON object", path=folder)
    return config


def model_sha256(folder: Path, config: dict[str, Any]) -> str:
    """Return one sha256 over weights and those fields of the config that change numbers; raises EncoderError."""
    deciding = {name: value for name, value in config.items() if name not in CONFIG_LABELS}
    return sha256_of({"config": deciding, "weights": _weights_sha256(folder)})


def _weights_sha256(folder: Path) -> str:
    if (folder / WEIGHTS).is_file():
        return sha256_of_file(folder / WEIGHTS)
    if (folder / WEIGHTS_INDEX).is_file():
        files = [WEIGHTS_INDEX, *_shards(folder)]
        return sha256_of({name: sha256_of_file(folder / name) for name in files})
    pickles = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern))
    reason = f" (it has {pickles[0]}, a pickle, which can run code and is never read)" if pickles else ""
    if revision_of(folder):
        reason = " (pickles such as pytorch_model.bin can run code and are never fetched)"
    raise EncoderError(f"{folder} has no {WEIGHTS}{reason}: convert the weights to safetensors", path=folder)


def _shards(folder: Path) -> list[str]:
    """Return the names of the files that an index of weights refers to, each once; raises EncoderError."""
    index = folder / WEIGHTS_INDEX
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise EncoderError(
            f"{index} is not an index of weights: {error!r}. Fetch the model anew", path=index
        ) from error
    for name in names or {""}:
        plain = isinstance(name, str) and name.endswith(".safetensors") and not set("/\\\0") & set(name)
        if not plain or not (folder / name).is_file():
            raise EncoderError(
                f"{index} names {name!r}, which is not a safetensors file beside it: fetch the model anew", path=index
            )
    return sorted(names)
