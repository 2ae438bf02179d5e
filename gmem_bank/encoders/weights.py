"""Where a model's files are: a local folder, the hub cache or the hub; safetensors only, hashed.

Shapes: none here.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gmem_bank.encoders.native import PREPROCESSOR
from gmem_bank.errors import EncoderError
from gmem_bank.provenance import sha256_of, sha256_of_file

WEIGHTS = "model.safetensors"
STEM = "model"
"""Weights of the transformers library are named after it, those of diffusers "diffusion_pytorch_model"."""
CONFIG = "config.json"
COMMIT = re.compile("[0-9a-f]{40}")
TOKENIZER = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt", "merges.txt",
    "special_tokens_map.json", "spiece.model", "*.tiktoken",
)  # fmt: skip
"""What is fetched of a tokenizer: data, never a file of code."""
TOKENIZER_FILES = (
    ("tokenizer.json",), ("vocab.json", "merges.txt"), ("tokenizer.model",), ("spiece.model",),
)  # fmt: skip
"""Of which a folder must have one set, or the library makes up a tokenizer without words."""
# Fields of config.json that name things without changing a number.
CONFIG_LABELS = (
    "_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version", "id2label", "label2id",
    "_diffusers_version", "_class_name",
)  # fmt: skip


def local_folder(folder: Path) -> Path:
    """Return the folder; raises EncoderError where there is none."""
    if not folder.is_dir():
        raise EncoderError(f"no folder {folder}: --weights takes a folder with {CONFIG} and {WEIGHTS}", path=folder)
    return folder


@dataclass(frozen=True, kw_only=True)
class ModelFiles:
    """A model's files, found."""

    folder: Path
    repository: str | None
    """Of the hub; None for a local folder."""
    revision: str | None
    """The commit, where it is known."""
    config: dict[str, Any]
    sha256: str
    """Over weights and those fields of the config that change numbers."""


def find_model(
    place: str, *, stem: str, revision: str | None = None, or_main: bool = False, option: str = "--weights"
) -> ModelFiles:
    """Return the files of a model in a local folder, in the hub cache or on the hub.

    Args:
        place: a folder with config.json and weights, or "OWNER/NAME" on the hub.
        stem: the weights are `<stem>.safetensors`, or shards of it with an index.
        revision: as in `hub_folder`.
        or_main: as in `hub_folder`.
        option: what the command calls the folder, for messages.

    Raises:
        EncoderError: it is in none of them, or its weights are not safetensors.
    """
    folder = Path(place)
    known = place.count("/") == 1 and not place.startswith((".", "/", "~")) and not folder.exists()
    if known:
        folder = hub_folder(place, revision, or_main=or_main, stem=stem, option=option)
    elif not folder.is_dir():
        raise EncoderError(f"no folder {folder}: {option} takes a folder with {CONFIG} and {stem}.safetensors, or "
                           "OWNER/NAME of the hub", path=folder)  # fmt: skip
    config = read_config(folder)
    return ModelFiles(
        folder=folder, repository=place if known else None, revision=revision_of(folder), config=config,
        sha256=model_sha256(folder, config, stem),
    )  # fmt: skip


def hub_folder(
    repository: str, revision: str | None = None, *, or_main: bool = False, stem: str = STEM, option: str = "--weights"
) -> Path:
    """Return the folder of a repository in the hub cache, fetched where it is not there and a network is.

    Args:
        repository: "facebook/dinov2-base".
        revision: branch, tag or commit; None takes the main branch.
        or_main: take the main branch where the revision is not to be had; the caller compares the weights.
        stem: how the weights' files begin.
        option: what the command calls a folder of weights, for the message.

    Raises:
        EncoderError: it is not in the cache and could not be fetched; what to do instead is said.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise EncoderError(
            f"no folder {repository} here, and no repository of the hub can be called so (OWNER/NAME)", key=repository
        ) from error
    if revision is not None and COMMIT.fullmatch(revision) and stem == STEM:
        kept = _kept(repository, revision)
        if kept is not None:
            return kept
    weights = [f"{stem}.safetensors", f"{stem}.safetensors.index.json", f"{stem}-*.safetensors"]
    patterns = [CONFIG, *weights, *((PREPROCESSOR, *TOKENIZER) if stem == STEM else ())]
    try:
        return Path(snapshot_download(repository, revision=revision, allow_patterns=patterns))
    except Exception as error:  # the hub client raises its own, its transport's and the system's errors
        if or_main and revision is not None:
            return hub_folder(repository, stem=stem, option=option)
        at, which = ("", "") if revision is None else (f" at {revision}", f" --revision {revision}")
        raise EncoderError(
            f"the weights of {repository}{at} are not in the hub cache and could not be fetched ({type(error).__name__}). "
            f"On a machine with a network run 'hf download {repository}{which}' and copy the cache (HF_HOME), or give a "
            f"folder with {CONFIG} and {stem}.safetensors: {option} FOLDER."
            + " A new bank can also be built without weights: --encoder hog"
            * (stem == STEM),
            key=repository,
        ) from error


def _kept(repository: str, commit: str) -> Path | None:
    """Return the folder of a commit in the cache where all is there that a model may need: it never changes, nobody is asked."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(repository, revision=commit, local_files_only=True))
        config = read_config(folder)
        weight_files(folder)
    except (LocalEntryNotFoundError, EncoderError):
        return None
    whole = (folder / PREPROCESSOR).is_file() and ("text_config" not in config or has_tokenizer(folder))
    return folder if whole else None


def has_tokenizer(folder: Path) -> bool:
    """Say whether a folder has the files of a tokenizer."""
    return any(all((folder / name).is_file() for name in names) for names in TOKENIZER_FILES)


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


def model_sha256(folder: Path, config: dict[str, Any], stem: str = STEM) -> str:
    """Return one sha256 over weights and those fields of the config that change numbers; raises EncoderError."""
    deciding = {name: value for name, value in config.items() if name not in CONFIG_LABELS}
    return sha256_of({"config": deciding, "weights": _weights_sha256(folder, stem)})


def _weights_sha256(folder: Path, stem: str) -> str:
    whole, index = f"{stem}.safetensors", f"{stem}.safetensors.index.json"
    files = weight_files(folder, stem)
    if files == [whole]:
        return sha256_of_file(folder / whole)
    return sha256_of({name: sha256_of_file(folder / name) for name in [index, *files]})


def require_readable(folder: Path) -> None:
    """Raise EncoderError where a file of weights is cut short or damaged; only headers are read."""
    from safetensors import SafetensorError, safe_open

    for name in weight_files(folder):
        try:
            with safe_open(folder / name, framework="numpy"):
                pass
        except (SafetensorError, OSError) as error:
            raise EncoderError(
                f"{folder / name} is cut short or damaged ({error}): fetch it again", path=folder / name
            ) from error


def weight_files(folder: Path, stem: str = STEM) -> list[str]:
    """Return the names of the files of weights in a folder, safetensors all of them; raises EncoderError."""
    whole, index = f"{stem}.safetensors", f"{stem}.safetensors.index.json"
    if (folder / whole).is_file():
        return [whole]
    if (folder / index).is_file():
        return _shards(folder / index)
    pickles = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern))
    reason = f" (it has {pickles[0]}, a pickle, which can run code and is never read)" if pickles else ""
    if revision_of(folder):
        reason = " (pickles such as pytorch_model.bin can run code and are never fetched)"
    raise EncoderError(f"{folder} has no {whole}{reason}: convert the weights to safetensors", path=folder)


def _shards(index: Path) -> list[str]:
    """Return the names of the files that an index of weights refers to, each once; raises EncoderError."""
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise EncoderError(
            f"{index} is not an index of weights: {error!r}. Fetch the model anew", path=index
        ) from error
    for name in names or {""}:
        plain = isinstance(name, str) and name.endswith(".safetensors") and not set("/\\\0") & set(name)
        if not plain or not (index.parent / name).is_file():
            raise EncoderError(
                f"{index} names {name!r}, which is not a safetensors file beside it: fetch the model anew", path=index
            )
    return sorted(names)
