"""Vision models of the transformers library: weights from a local folder, the hub cache or the hub, safetensors only.

Shapes: B images, S×S pixels of the crop, D dimensions.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from gmem_bank.encoders import EncoderOptions, preprocess, refuse_unknown
from gmem_bank.errors import EncoderError, MissingDependencyError
from gmem_bank.provenance import EncoderSpec, sha256_of, sha256_of_file

WEIGHTS = "model.safetensors"
WEIGHTS_INDEX = "model.safetensors.index.json"
CONFIG = "config.json"
# Fields of config.json that name things without changing a number.
CONFIG_LABELS = (
    "_name_or_path",
    "architectures",
    "dtype",
    "torch_dtype",
    "transformers_version",
    "id2label",
    "label2id",
)
UNUSED_WEIGHTS = ("mask_token",)  # read only while an encoder is pre-trained
DINOV2_TYPES = ("dinov2", "dinov2_with_registers")


class TransformersEncoder:
    """CLS token of a transformers vision model.

    Args:
        model: the network, in eval mode, on its device.
        spec: what decides the numbers.
    """

    def __init__(self, model: torch.nn.Module, spec: EncoderSpec) -> None:
        self._model = model
        self._spec = spec
        self._device = next(model.parameters()).device

    @property
    def spec(self) -> EncoderSpec:
        """What decides the numbers."""
        return self._spec

    def encode(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Return (B, D) float32 normalised CLS tokens of (B, S, S, 3) uint8 images (not yet in any space)."""
        with torch.inference_mode():
            pixels = preprocess.to_input(torch.from_numpy(images).to(self._device), self._spec.preprocessing)
            # pooler_output is the CLS token after the final norm: x_norm_clstoken of the original code.
            tokens = self._model(pixel_values=pixels).last_hidden_state[:, 0]
            return tokens.float().cpu().numpy()  # type: ignore[no-any-return]


def repository_of(name: str) -> str:
    """Return the hub repository of a dinov2 name: "dinov2" is facebook/dinov2-base."""
    registers = name.endswith("-with-registers")
    size = name.removesuffix("-with-registers").removeprefix("dinov2").lstrip("-") or "base"
    return f"facebook/dinov2-with-registers-{size}" if registers else f"facebook/dinov2-{size}"


def make_dinov2(name: str, options: EncoderOptions) -> TransformersEncoder:
    """Load a DINOv2 encoder.

    Args:
        name: "dinov2", "dinov2-small", "dinov2-large-with-registers", …
        options: weights folder, device, space; parameter `input_size` (default 224).

    Raises:
        MissingDependencyError: transformers is not installed.
        EncoderError: the weights are absent, are not safetensors, or are not of a DINOv2 model.
    """
    repository = repository_of(name)
    parameters = refuse_unknown(name, options.parameters, {"input_size": preprocess.GMEM_INPUT, "pooling": "cls"})
    if parameters["pooling"] != "cls":
        raise EncoderError(f"encoder {name!r} pools the CLS token only, not {parameters['pooling']!r}", key="pooling")
    transformers = _require_transformers()
    folder = _local_folder(options.weights) if options.weights else _cached_folder(repository)
    config, weights_sha256 = _read_config(folder), _weights_sha256(folder)
    if config.get("model_type") not in DINOV2_TYPES:
        raise EncoderError(
            f"{folder} holds a {config.get('model_type')!r} model, encoder {name!r} needs {' or '.join(DINOV2_TYPES)}",
            path=folder,
        )
    patch = int(config.get("patch_size", 14))
    if int(parameters["input_size"]) % patch:
        raise EncoderError(f"input_size {parameters['input_size']} is not a multiple of the model's patch size {patch}")
    model = _load(transformers, folder).to(_device(options.device)).eval()
    spec = EncoderSpec(
        name=name,
        family=f"transformers:{config['model_type']}",
        dim=int(config["hidden_size"]),
        space=options.space,
        weights_sha256=sha256_of(
            {"config": {k: v for k, v in config.items() if k not in CONFIG_LABELS}, "weights": weights_sha256}
        ),
        preprocessing=preprocess.gmem_preprocessing(int(parameters["input_size"])),
        parameters=parameters,
        weights_path=None if options.weights is None else options.weights.as_posix(),
        software=f"transformers {transformers.__version__}",
    )
    return TransformersEncoder(model, spec)


def _require_transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise MissingDependencyError(
            "this encoder needs transformers: pip install transformers (the extra gmem[hf])", extra="hf"
        ) from error
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return transformers


def _local_folder(folder: Path) -> Path:
    if not folder.is_dir():
        raise EncoderError(f"no folder {folder}: --weights takes a folder with {CONFIG} and {WEIGHTS}", path=folder)
    return folder


def _cached_folder(repository: str) -> Path:
    from huggingface_hub import snapshot_download

    patterns = [CONFIG, WEIGHTS, WEIGHTS_INDEX, "model-*.safetensors"]
    try:
        return Path(snapshot_download(repository, allow_patterns=patterns))
    except Exception as error:  # the hub client raises its own, its transport's and the system's errors
        raise EncoderError(
            f"the weights of {repository} are not in the hub cache and could not be fetched ({type(error).__name__}). "
            f"On a machine with a network run 'hf download {repository}' and copy the cache (HF_HOME), or give a folder "
            f"with {CONFIG} and {WEIGHTS}: --weights FOLDER. A new bank can also be built without weights: --encoder hog",
            key=repository,
        ) from error


def _read_config(folder: Path) -> dict[str, Any]:
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise EncoderError(f"{folder} has no readable {CONFIG}: {error}", path=folder) from error
    if not isinstance(config, dict):
        raise EncoderError(f"{folder / CONFIG} is not a JSON object", path=folder)
    return config


def _weights_sha256(folder: Path) -> str:
    if (folder / WEIGHTS).is_file():
        return sha256_of_file(folder / WEIGHTS)
    shards = sorted(folder.glob("model-*.safetensors"))
    if (folder / WEIGHTS_INDEX).is_file() and shards:
        return sha256_of([sha256_of_file(shard) for shard in shards])
    pickles = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern))
    reason = f" (it has {pickles[0]}, a pickle, which can run code and is never read)" if pickles else ""
    raise EncoderError(f"{folder} has no {WEIGHTS}{reason}: convert the weights to safetensors", path=folder)


def _load(transformers: Any, folder: Path) -> torch.nn.Module:
    try:
        model, info = transformers.AutoModel.from_pretrained(
            folder, local_files_only=True, use_safetensors=True, trust_remote_code=False, dtype=torch.float32,
            output_loading_info=True,
        )  # fmt: skip
    except Exception as error:  # whatever a damaged folder makes the library raise
        raise EncoderError(f"could not load the model in {folder}: {error}", path=folder) from error
    missing = sorted(key for key in info["missing_keys"] if not key.endswith(UNUSED_WEIGHTS))
    if missing:
        raise EncoderError(f"the weights in {folder} lack {len(missing)} tensors, such as {missing[0]}", path=folder)
    return model  # type: ignore[no-any-return]


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise EncoderError(f"device {name!r} cannot be used here: {error}", key="device") from error
    return device
