"""Encoders in an ONNX file: onnx:FILE, run by onnxruntime.

Shapes: B images, S×S pixels of the crop, T side of the network's input, D dimensions.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from gmem_bank.encoders import DEFAULT_BATCH_SIZE, EncoderOptions, preprocess, refuse_unknown
from gmem_bank.encoders.native import native_preprocessing
from gmem_bank.encoders.onnx_session import first_line, open_session, require_runtime, weight_files
from gmem_bank.encoders.pooling import TOKEN_POOLINGS, pool
from gmem_bank.errors import EncoderError, EncoderSettingError
from gmem_bank.provenance import EncoderSpec, sha256_of, sha256_of_file

PREFIX = "onnx:"
NORMALISATIONS = {
    "imagenet": (preprocess.IMAGENET_MEAN, preprocess.IMAGENET_STD),
    "half": ((0.5,) * 3, (0.5,) * 3),
    "none": ((0.0,) * 3, (1.0,) * 3),
}
"""What is taken from, and what divides, pixels in 0 to 1."""
USUAL_OUTPUTS = ("image_embeds", "embeddings", "last_hidden_state", "pooler_output")
TYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
DEFAULTS: dict[str, Any] = {
    "input_size": None, "output": None, "pooling": "cls", "num_special_tokens": 1, "preset": "gmem", "normalise": "imagenet",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class InputFacts:
    """What a network wants to be given."""

    name: str
    dtype: Any
    channels_last: bool
    side: int | None
    """T; None: any."""
    batch: int | None
    """B; None: any."""


class OnnxEncoder:
    """A network in an ONNX file.

    Args:
        session: an onnxruntime session.
        facts: of its one input.
        spec: what decides the numbers.
    """

    def __init__(self, session: Any, facts: InputFacts, spec: EncoderSpec) -> None:
        self._session, self._facts, self._spec = session, facts, spec

    @property
    def spec(self) -> EncoderSpec:
        """What decides the numbers."""
        return self._spec

    def best_batch_size(self) -> int:
        """Return the network's own batch size where it has one."""
        return self._facts.batch or DEFAULT_BATCH_SIZE

    def encode(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Return (B, D) float32 embeddings of (B, S, S, 3) uint8 images (not yet in any space)."""
        return self._pooled(self._outputs(images))

    def _outputs(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        pixels = preprocess.to_input(torch.from_numpy(images), self._spec.preprocessing).numpy()
        if self._facts.channels_last:
            pixels = pixels.transpose(0, 2, 3, 1)
        size = self._facts.batch or max(1, len(pixels))
        parts = [self._run(part)[:count] for part, count in padded(pixels.astype(self._facts.dtype), size)]
        return np.concatenate(parts).astype(np.float32)

    def encode_tokens(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Return (B, T, D) float32 patch tokens of (B, S, S, 3) images; raises EncoderError where the output has none."""
        found = self._outputs(images)
        if found.ndim != 3:
            raise EncoderError(f"output {self._spec.parameters['output']!r} of {self._spec.name} has no tokens")
        return found[:, int(self._spec.parameters["num_special_tokens"]) :]

    def _run(self, pixels: NDArray[Any]) -> NDArray[Any]:
        output: NDArray[Any] = self._session.run(
            [self._spec.parameters["output"]], {self._facts.name: np.ascontiguousarray(pixels)}
        )[0]
        return output

    def _pooled(self, values: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return (B, D) of (B, D), of tokens (B, T, D), or of a map (B, D, H, W)."""
        if values.ndim == 2:
            return values
        if values.ndim == 4:  # the parameter speaks of tokens
            return np.asarray(values.mean(axis=(2, 3)))
        pooled = pool(
            torch.from_numpy(values),
            str(self._spec.parameters["pooling"]),
            int(self._spec.parameters["num_special_tokens"]),
        )
        return np.ascontiguousarray(pooled.numpy())


def padded(images: NDArray[Any], size: int) -> Iterator[tuple[NDArray[Any], int]]:
    """Yield images `size` at a time, the last part filled up with zeros, and how many of each part are real."""
    for start in range(0, len(images), size):
        part = images[start : start + size]
        count = len(part)
        if count < size:
            part = np.concatenate([part, np.zeros((size - count, *part.shape[1:]), part.dtype)])
        yield part, count


def make_onnx(name: str, options: EncoderOptions) -> OnnxEncoder:
    """Load an encoder from an ONNX file.

    Args:
        name: "onnx:FILE".
        options: device "auto", "cpu" or "cuda" (with onnxruntime-gpu); weights: the file, where it has moved; parameters
            `input_size` (T, where the file leaves it open), `output` (which of several), `pooling` of tokens ("cls", "mean",
            "cls+mean"), `num_special_tokens` (not of patches), `preset` ("gmem"; "native" needs a preprocessor_config.json beside
            the file), `normalise` ("imagenet", "half", "none").

    Raises:
        MissingDependencyError: onnxruntime is not installed.
        EncoderError: no such file, not a network from images to embeddings, or a parameter that does not fit.
    """
    path = options.weights or Path(name.removeprefix(PREFIX))
    if not path.is_file():
        raise EncoderError(f"no file {path}: give onnx:FILE, or the file's new place by --weights", path=path)
    name = f"{PREFIX}{path.name}"
    parameters = refuse_unknown(name, options.parameters, DEFAULTS)
    _check_choices(parameters)
    session = open_session(path, options.device)
    facts = _input_facts(path, session)
    parameters["output"] = _output(path, session, parameters["output"])
    record = _preprocessing(path, facts, parameters)
    probe = EncoderSpec(name=name, family="onnx", dim=1, space="raw", preprocessing=record, parameters=parameters)
    spec = EncoderSpec(
        name=name, family="onnx", dim=_dim(path, OnnxEncoder(session, facts, probe)), space=options.space,
        weights_sha256=sha256_of([sha256_of_file(part) for part in (path, *weight_files(path, path.read_bytes()))]),
        preprocessing=record, parameters=parameters, weights_path=path.as_posix(),
        software=f"onnxruntime {require_runtime().__version__}",
    )  # fmt: skip
    return OnnxEncoder(session, facts, spec)


def _check_choices(parameters: Mapping[str, Any]) -> None:
    for parameter, known in (
        ("pooling", TOKEN_POOLINGS),
        ("preset", ("gmem", "native")),
        ("normalise", tuple(NORMALISATIONS)),
    ):
        if parameters[parameter] not in known:
            raise EncoderSettingError(
                f"{parameter} must be one of {', '.join(known)}, not {parameters[parameter]!r}", key=parameter
            )
    special = parameters["num_special_tokens"]
    if type(special) is not int or special < 0:
        raise EncoderSettingError(
            f"num_special_tokens must be a whole number, got {special!r}", key="num_special_tokens"
        )


def _input_facts(path: Path, session: Any) -> InputFacts:
    inputs = session.get_inputs()
    described = ", ".join(f"{found.name} {found.type} {found.shape}" for found in inputs)
    wanted = "one input of images, float (B, 3, T, T) or (B, T, T, 3)"
    if len(inputs) != 1 or len(inputs[0].shape) != 4 or inputs[0].type not in TYPES:
        raise EncoderError(f"{path} has the inputs {described or 'none'}; expected {wanted}", path=path)
    batch, *rest = [size if isinstance(size, int) and size > 0 else None for size in inputs[0].shape]
    channels_last = rest[2] == 3 and rest[0] != 3
    channels, height, width = (rest[2], rest[0], rest[1]) if channels_last else rest
    if channels not in (3, None) or (height != width and None not in (height, width)):
        raise EncoderError(f"{path} has the input {described}; expected {wanted}", path=path)
    return InputFacts(
        name=inputs[0].name, dtype=TYPES[inputs[0].type], channels_last=channels_last, side=height or width, batch=batch
    )


def _output(path: Path, session: Any, asked: str | None) -> str:
    names = [found.name for found in session.get_outputs()]
    usual = next((name for name in USUAL_OUTPUTS if name in names), names[0] if len(names) == 1 else None)
    chosen = usual if asked is None else str(asked)
    if chosen is None or chosen not in names:
        raise EncoderSettingError(
            f"{path} has the outputs {names}: --set output=NAME says which to take", path=path, key="output"
        )
    return chosen


def _preprocessing(path: Path, facts: InputFacts, parameters: dict[str, Any]) -> dict[str, Any]:
    """Return the record, and put the input's size into the parameters."""
    if parameters["preset"] == "native":
        record = native_preprocessing(path.parent, facts.side or preprocess.GMEM_INPUT)
        found = int(record["crop_size"])
    else:
        found = parameters["input_size"] or facts.side or preprocess.GMEM_INPUT
        if type(found) is not int or found < 1:
            raise EncoderSettingError(f"input_size must be a positive whole number, got {found!r}", key="input_size")
        mean, std = NORMALISATIONS[parameters["normalise"]]
        record = preprocess.gmem_preprocessing(found) | {"mean": list(mean), "std": list(std)}
    wanted = next((w for w in (facts.side, parameters["input_size"]) if w not in (None, found)), None)
    if wanted is not None:
        takes = facts.side or found
        raise EncoderError(
            f"{path} takes images of {takes} pixels, not {found if wanted == takes else wanted}", key="input_size"
        )
    parameters["input_size"] = found
    return record


def _dim(path: Path, encoder: OnnxEncoder) -> int:
    """Return D by a look at what comes out for a black image; raises EncoderError where no embedding does."""
    side = int(encoder.spec.preprocessing["crop_size"])
    try:
        found = encoder.encode(np.zeros((1, side, side, 3), np.uint8))
    except Exception as error:  # as in `open_session`
        raise EncoderError(
            f"{path} does not work with images of {encoder.spec.parameters['input_size']} pixels: {first_line(error)}",
            path=path,
        ) from error
    if found.ndim != 2 or len(found) != 1:
        raise EncoderError(f"{path} gives {list(found.shape)} for one image, expected (1, D)", path=path)
    return int(found.shape[1])
