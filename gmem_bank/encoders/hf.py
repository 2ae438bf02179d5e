"""Vision models of the transformers library: DINOv2, DINOv3, CLIP, SigLIP 2, and any other by hf:REPOSITORY-OR-FOLDER.

Shapes: B images, S×S pixels of the crop, T tokens, D dimensions.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from gmem_bank.encoders import EncoderOptions, preprocess, refuse_unknown
from gmem_bank.encoders.loading import (
    TEXT_LENGTHS,
    Tokenize,
    choose_device,
    load_network,
    require_complete,
    require_transformers,
    tokenizer_of,
)  # fmt: skip
from gmem_bank.encoders.names import PRESETS, HubModel, model_named
from gmem_bank.encoders.native import native_preprocessing
from gmem_bank.encoders.pooling import (
    POOLINGS,
    TOKEN_POOLINGS,
    TokenLayout,
    choose_pooling,
    layout_of,
    layout_seen,
    pool,
)
from gmem_bank.encoders.precision import TORCH_DTYPES, choose_dtype, mean_cosine
from gmem_bank.encoders.sizing import best_batch_size
from gmem_bank.encoders.weights import hub_folder, local_folder, model_sha256, read_config, revision_of
from gmem_bank.errors import EncoderError
from gmem_bank.provenance import EncoderSpec

DEFAULTS: dict[str, Any] = {
    "input_size": None, "pooling": None, "layer": -1, "preset": None, "dtype": "auto", "revision": None,
}  # fmt: skip
"""Parameters of every encoder here; None: the model's own."""


class TransformersEncoder:
    """A transformers vision model with one pooling.

    Args:
        model: the network, in eval mode, on its device, in float32.
        spec: what decides the numbers; its parameters name pooling, layer and dtype.
        layout: which of its tokens are patches; None: not known.
        tokenize: turns texts into the inputs of the text tower; None for a model without one.
    """

    def __init__(
        self,
        model: Any,
        spec: EncoderSpec,
        layout: TokenLayout | None,
        tokenize: Tokenize | None = None,
    ) -> None:
        self._spec = spec
        self._model = model
        self._layout = layout
        self._tokenize = tokenize
        self._device = next(model.parameters()).device
        self._dtype = TORCH_DTYPES[str(spec.parameters["dtype"])]

    @property
    def spec(self) -> EncoderSpec:
        """What decides the numbers."""
        return self._spec

    def encode(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Return (B, D) float32 embeddings of (B, S, S, 3) uint8 images (not yet in any space)."""
        return self._encode(images, self._dtype)

    def best_batch_size(self) -> int:
        """Return 32 on a CPU; on a GPU as many images as a quarter of its memory holds, up to 512."""
        return best_batch_size(self._device, lambda count: self.encode(self._blank(count)))

    def _blank(self, count: int) -> NDArray[np.uint8]:
        side = int(self._spec.preprocessing["crop_size"])
        return np.zeros((count, side, side, 3), np.uint8)

    def cosine_to_fp32(self, images: NDArray[np.uint8]) -> float | None:
        """Return the mean cosine of what `encode` gives for (B, S, S, 3) images to float32; None: no image has a direction."""
        return mean_cosine(self.encode(images), self._encode(images, torch.float32))

    def encode_tokens(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Return (B, T, D) float32 patch tokens of (B, S, S, 3) images, of the encoder's layer (-1: the last, normalised).

        Raises:
            EncoderError: the model has no tokens, or it is not known which of them are patches.
        """
        states = self.states(images)
        if states.ndim != 3:
            raise EncoderError(f"encoder {self._spec.describe()} is a convolutional network: it has no patch tokens")
        if self._layout is None:
            raise EncoderError(f"encoder {self._spec.describe()}: which of its tokens are patches is not known")
        return states[:, self._layout.num_special :]

    def states(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Return all tokens (B, T, D), or the map (B, D, H, W), of the encoder's layer for (B, S, S, 3) images."""
        with self._running(self._dtype):
            found: NDArray[np.float32] = self._states(self._input(images)).float().cpu().numpy()
        return found

    def encode_texts(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Return (B, D) float32 embeddings of texts, comparable with those of images.

        Raises:
            EncoderError: the model has no text tower, or its images are not pooled into the space of its texts.
        """
        if self._tokenize is None or self._spec.parameters["pooling"] != "projected":
            raise EncoderError(
                f"encoder {self._spec.describe()} does not understand text: CLIP and SigLIP 2 do, with pooling 'projected'"
            )
        with torch.inference_mode():
            inputs = {name: values.to(self._device) for name, values in self._tokenize(texts).items()}
            return _numbers(self._model.get_text_features(**inputs))

    def _encode(self, images: NDArray[np.uint8], dtype: torch.dtype) -> NDArray[np.float32]:
        with self._running(dtype):
            return _numbers(self._pooled(self._input(images)))

    @contextlib.contextmanager
    def _running(self, dtype: torch.dtype) -> Iterator[None]:
        lower = dtype != torch.float32
        with (
            torch.inference_mode(),
            torch.autocast(self._device.type, dtype if lower else torch.bfloat16, enabled=lower),
        ):
            yield

    def _input(self, images: NDArray[np.uint8]) -> torch.Tensor:
        pixels = torch.from_numpy(images)
        if self._device.type == "cuda":  # from pinned memory the copy does not hold up this thread
            pixels = pixels.pin_memory()
        return preprocess.to_input(pixels.to(self._device, non_blocking=True), self._spec.preprocessing)

    def _output(self, pixels: torch.Tensor, layer: int) -> Any:
        tower = getattr(self._model, "vision_model", self._model)
        return tower(pixel_values=pixels, output_hidden_states=layer != -1)

    def _states(self, pixels: torch.Tensor) -> torch.Tensor:
        """Return the tokens (B, T, D), or the map (B, D, H, W), of the encoder's layer."""
        layer = int(self._spec.parameters["layer"])
        output = self._output(pixels, layer)
        states: torch.Tensor = output.last_hidden_state if layer == -1 else output.hidden_states[layer]
        return states

    def _pooled(self, pixels: torch.Tensor) -> Any:
        pooling = str(self._spec.parameters["pooling"])
        if pooling == "projected":
            return self._model.get_image_features(pixel_values=pixels)
        if pooling == "pooler":
            return self._output(pixels, -1).pooler_output
        assert self._layout is not None  # looked at when the encoder was made
        return pool(self._states(pixels), pooling, self._layout.num_special)


def _numbers(output: Any) -> NDArray[np.float32]:
    """Return (B, D) float32 of a tensor, or of the output object that newer versions of the library wrap it in."""
    values = output if isinstance(output, torch.Tensor) else output.pooler_output
    numbers: NDArray[np.float32] = values.float().cpu().numpy()
    return numbers


def make_hub_model(name: str, options: EncoderOptions) -> TransformersEncoder:
    """Load an encoder of the transformers library.

    Args:
        name: a name of `names.HUB_MODELS`, or "hf:REPOSITORY" or "hf:FOLDER".
        options: weights folder, device, space; parameters `input_size` (pixels), `pooling` ("cls", "mean", "cls+mean", "pooler",
            "projected"), `layer` (-1: the last, normalised; else the output of a block), `preset` ("gmem", "native"), `dtype`
            ("auto", "fp32", "bf16", "fp16"), `revision` (of the hub).

    Raises:
        MissingDependencyError: transformers is not installed.
        EncoderError: the weights are absent, are not safetensors, or are not of a model of that name.
    """
    model_facts = model_named(name)
    parameters = refuse_unknown(name, options.parameters, DEFAULTS)
    transformers = require_transformers()
    weights, revision = options.weights, parameters.pop("revision")
    if weights is None and revision is None and name.startswith("hf:") and Path(model_facts.repository).is_dir():
        weights = Path(model_facts.repository)  # recorded as a folder, which can move with the bank
        name = f"hf:{weights.resolve().name}"
    if weights is not None:
        folder = local_folder(weights)
    else:
        folder = hub_folder(model_facts.repository, revision, or_main=options.reloading)
    config = read_config(folder)
    _require_type(name, folder, config, model_facts)
    vision = config.get("vision_config", config)
    parameters = _resolved(name, model_facts, parameters, config)
    digest = model_sha256(folder, config)
    record = _preprocessing(folder, vision, parameters)
    device = choose_device(options.device)
    width = int(vision.get("hidden_size") or 0)
    parameters["dtype"] = choose_dtype(str(parameters["dtype"]), device, width, reloading=options.reloading)
    network, missing = load_network(transformers, folder)
    model = network.to(device).eval()
    pixels = preprocess.to_input(torch.from_numpy(_noise(record)).to(device), record)
    layout = layout_of(model) or layout_seen(model, pixels)
    parameters["pooling"] = choose_pooling(name, parameters["pooling"], layout)
    require_complete(folder, missing, parameters["pooling"])
    labels = {"revision": revision_of(folder)} if revision_of(folder) else {}
    spec = EncoderSpec(
        name=name, family=f"transformers:{config['model_type']}", dim=_dim(model, parameters, record, layout),
        space=options.space, weights_sha256=digest, preprocessing=record, parameters=parameters,
        weights_path=None if weights is None else weights.as_posix(),
        software=f"transformers {transformers.__version__}", labels=labels,
    )  # fmt: skip
    return TransformersEncoder(model, spec, layout, tokenizer_of(transformers, folder, config))


def _require_type(name: str, folder: Path, config: Mapping[str, Any], facts: HubModel) -> None:
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


def _resolved(name: str, facts: HubModel, parameters: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the parameters with the model's own values in place of None; a pooling of None is left to `choose_pooling`."""
    own = {"pooling": "projected" if config["model_type"] in TEXT_LENGTHS else None, "preset": facts.preset}
    resolved = {n: own.get(n) if value is None else value for n, value in parameters.items()}
    for parameter, known in (("pooling", (*POOLINGS, None)), ("preset", PRESETS)):
        if resolved[parameter] not in known:
            raise EncoderError(
                f"{parameter} must be one of {', '.join(filter(None, known))}, not {resolved[parameter]!r}",
                key=parameter,
            )
    if resolved["pooling"] == "projected" and config["model_type"] not in TEXT_LENGTHS:
        raise EncoderError(
            f"encoder {name!r} has no projection: pooling 'projected' is for CLIP and SigLIP 2", key="pooling"
        )
    if type(resolved["layer"]) is not int or (
        resolved["layer"] != -1 and resolved["pooling"] in ("pooler", "projected")
    ):
        raise EncoderError(f"layer must be a whole number, and -1 with pooling {resolved['pooling']!r}", key="layer")
    return resolved


def _preprocessing(folder: Path, vision: Mapping[str, Any], parameters: dict[str, Any]) -> dict[str, Any]:
    """Return the record, and put the input's size into the parameters."""
    size = parameters["input_size"]
    if parameters["preset"] == "native":
        record = native_preprocessing(folder, int(vision.get("image_size", 224)))
        if size not in (None, record["crop_size"]):
            raise EncoderError(
                f"the preset 'native' gives {record['crop_size']} pixels: input_size {size!r} goes with 'gmem'",
                key="input_size",
            )
        parameters["input_size"] = record["crop_size"]
        return record
    size = preprocess.GMEM_INPUT if size is None else size
    patch = int(vision.get("patch_size", 1))
    if type(size) is not int or size < 1 or size % patch:
        raise EncoderError(f"input_size {size!r} is not a multiple of the model's patch size {patch}", key="input_size")
    parameters["input_size"] = size
    return preprocess.gmem_preprocessing(size)


def _noise(record: Mapping[str, Any]) -> NDArray[np.uint8]:
    """Return two different images: blank ones would hide what a network does with places."""
    side = int(record["crop_size"])
    return np.random.Generator(np.random.PCG64(0)).integers(0, 256, (2, side, side, 3), dtype=np.uint8)


def _dim(
    model: torch.nn.Module, parameters: Mapping[str, Any], record: dict[str, Any], layout: TokenLayout | None
) -> int:
    """Return D by a look at what comes out for noise; raises EncoderError where nothing does, or not the same twice."""
    spec = EncoderSpec(name="", family="", dim=1, space="raw", preprocessing=record, parameters=dict(parameters))
    encoder, images = TransformersEncoder(model, spec, layout), _noise(record)
    look = encoder.states if parameters["pooling"] in TOKEN_POOLINGS else encoder.encode
    try:
        dim, first, again = encoder.encode(images).shape[1], look(images), look(images)
    except (AttributeError, IndexError, RuntimeError, ValueError, TypeError) as error:
        size = record.get("input_size", record["crop_size"])
        wanted = f"pooling {parameters['pooling']!r}, layer {parameters['layer']}, {size} pixels"
        raise EncoderError(f"the model does not work with {wanted}: {error}") from error
    # a network that draws lots differs by as much as its numbers are large, one that rounds in another order hardly
    if not np.allclose(first, again, rtol=0, atol=0.01 * float(np.abs(np.nan_to_num(first)).max()), equal_nan=True):
        raise EncoderError(
            f"the {model.__class__.__name__} gives other numbers each time for the same image (one that masks patches at "
            "random does): no bank can be made with it",
        )
    return int(dim)
