"""Encoders: what turns images into snippets, found by name.

Built-in encoders stand in a table here; third parties add theirs through the entry point group `gmem_bank.encoders`.
Listing reads metadata only: no plug-in is imported until it is asked for, so a broken one breaks only itself.

Shapes: none here.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

from gmem_bank.encoders.names import HUB_MODELS
from gmem_bank.encoders.names import may_understand_text as may_understand_text
from gmem_bank.encoders.preprocess import preprocessing_problem
from gmem_bank.encoders.protocols import DEFAULT_BATCH_SIZE as DEFAULT_BATCH_SIZE
from gmem_bank.encoders.protocols import Encoder as Encoder
from gmem_bank.encoders.protocols import EncoderOptions as EncoderOptions
from gmem_bank.encoders.protocols import SupportsBatchSize as SupportsBatchSize
from gmem_bank.encoders.protocols import SupportsPatchTokens as SupportsPatchTokens
from gmem_bank.encoders.protocols import SupportsPrecision as SupportsPrecision
from gmem_bank.encoders.protocols import SupportsText as SupportsText
from gmem_bank.errors import EncoderError, EncoderMismatchError, GMemError, suggest
from gmem_bank.provenance import DECIDING_FIELDS, EncoderSpec

ENTRY_POINT_GROUP = "gmem_bank.encoders"
BUILT_IN = "built in"


Factory = Callable[[str, EncoderOptions], Encoder]


@dataclass(frozen=True, kw_only=True)
class EncoderInfo:
    """A line of `gmem-bank encoders`."""

    name: str
    description: str
    target: str
    """module:factory."""
    origin: str = BUILT_IN
    """"built in", or the distribution that registers it."""
    extra: str | None = None
    """Extra that it needs: pip install 'gmem[extra]'."""


_REFERENCE = "gmem_bank.encoders.reference"
_HUB = "gmem_bank.encoders.hf:make_hub_model"
_BUILT_IN = {
    info.name: info
    for info in (
        *(
            EncoderInfo(
                name=name,
                description=f"{model.repository}" + (" with GMem's preprocessing" if model.preset == "gmem" else ""),
                target=_HUB,
                extra="hf",
            )
            for name, model in HUB_MODELS.items()
        ),
        EncoderInfo(
            name="hf:",
            description="any vision model of transformers: hf:REPOSITORY or hf:FOLDER",
            target=_HUB,
            extra="hf",
        ),
        EncoderInfo(
            name="onnx:",
            description="a network in an ONNX file: onnx:FILE",
            target="gmem_bank.encoders.onnx:make_onnx",
            extra="onnx",
        ),
        EncoderInfo(
            name="precomputed",
            description="snippets computed elsewhere: SOURCE is an array file (npy, npz, safetensors, h5, parquet)",
            target="gmem_bank.encoders:refuse_precomputed",
        ),
        EncoderInfo(
            name="hog", description="histogram of oriented gradients (no download)", target=f"{_REFERENCE}:make_hog"
        ),
        EncoderInfo(
            name="pixels", description="grey pixels at a small size (no download)", target=f"{_REFERENCE}:make_pixels"
        ),
        EncoderInfo(
            name="random-projection",
            description="a seeded random projection of the pixels (no download)",
            target=f"{_REFERENCE}:make_random_projection",
        ),
    )
}
PREFIXES = ("hf:", "onnx:")
"""Names that go on with what the user chooses."""


def available_encoders() -> dict[str, EncoderInfo]:
    """Return name → info of every encoder, built-in ones first; plug-ins are listed from metadata, not imported."""
    found = dict(_BUILT_IN)
    for point in _registered():
        origin = point.dist.name if point.dist is not None else "unknown distribution"
        info = EncoderInfo(name=point.name, description=f"plug-in {point.value}", target=point.value, origin=origin)
        found.setdefault(point.name, info)  # a plug-in cannot take a built-in name
    return found


def _registered() -> list[metadata.EntryPoint]:
    """Return the entry points of our group; a distribution whose metadata cannot be read has none."""
    points: list[metadata.EntryPoint] = []
    for distribution in metadata.distributions():
        with contextlib.suppress(Exception):  # whatever damaged metadata make the parser raise
            points.extend(distribution.entry_points.select(group=ENTRY_POINT_GROUP))
    return points


def load_encoder(
    name: str,
    *,
    weights: str | Path | None = None,
    device: str = "auto",
    space: str = "unit",
    parameters: Mapping[str, Any] | None = None,
) -> Encoder:
    """Load an encoder by name.

    Args:
        name: one of `available_encoders()`; "hf:" goes on with a repository or folder, "onnx:" with a file.
        weights: local folder with the weights, where the encoder has any.
        device: "auto" (CUDA where there is one), "cpu", "cuda", …
        space: "unit" or "raw", recorded in the spec.
        parameters: settings of the encoder itself.

    Raises:
        EncoderError: unknown name, unknown parameter, or weights that cannot be loaded.
        MissingDependencyError: the encoder needs an extra that is not installed.
    """
    options = EncoderOptions(
        weights=None if weights is None else Path(weights),
        device=device,
        space=space,
        parameters=dict(parameters or {}),
    )
    return _load(name, options)


def _load(name: str, options: EncoderOptions) -> Encoder:
    known = available_encoders()
    listed = next((prefix for prefix in PREFIXES if name.startswith(prefix) and name != prefix), name)
    if listed not in known or name in PREFIXES:
        raise EncoderError(
            f"unknown encoder {name!r}.{suggest(name, known)} 'gmem-bank encoders' lists them all", key=name
        )
    if not re.fullmatch(r"auto|cpu|mps|(cuda|xpu)(:\d+)?", options.device):
        raise EncoderError(f"unknown device {options.device!r}: give auto, cpu, cuda, cuda:1, mps or xpu", key="device")
    factory, origin = _factory(known[listed]), known[listed].origin
    try:
        encoder = factory(name, options)
        problem = _encoder_problem(encoder, None if origin == BUILT_IN else name)
    except GMemError:
        raise
    except Exception as error:  # a plug-in may fail in any way while it is made
        raise EncoderError(
            f"encoder {name!r} of {origin} cannot be made: {type(error).__name__}: {error}", key=name
        ) from error
    if problem:
        raise EncoderError(f"encoder {name!r} of {origin}{problem}", key=name)
    return encoder


def _encoder_problem(encoder: Any, registered: str | None) -> str:
    """Return what a message goes on with where a new encoder cannot be used, or ""."""
    if not isinstance(encoder, Encoder):
        return " lacks 'spec' or 'encode'"
    spec: Any = encoder.spec
    if not isinstance(spec, EncoderSpec):
        return f": its spec is a {type(spec).__name__}, not an EncoderSpec"
    if registered is not None and spec.name != registered:
        return f": its spec says {spec.name!r}, a name by which a bank would not find it again"
    problem = preprocessing_problem(spec.preprocessing)
    return f": {problem}" if problem else ""


def refuse_precomputed(name: str, options: EncoderOptions) -> Encoder:
    """Raise EncoderError: there is nothing to load."""
    raise EncoderError(
        f"{name!r} encodes nothing ({options.space} space): build from an array file, and insert arrays with "
        "'gmem-bank insert-concept FILE.npy'",
        key=name,
    )


def _factory(info: EncoderInfo) -> Factory:
    module, _, attribute = info.target.partition(":")
    try:
        factory: Factory = getattr(import_module(module), attribute)
    except GMemError:
        raise
    except Exception as error:  # a plug-in may fail in any way while it is imported
        raise EncoderError(
            f"encoder {info.name!r} ({info.target}, from {info.origin}) cannot be imported: {error}", key=info.name
        ) from error
    return factory


def reload_encoder(
    spec: EncoderSpec, bank_folder: Path, *, weights: str | Path | None = None, device: str = "auto"
) -> Encoder:
    """Load the encoder that made a bank, and make sure that it is the same one.

    Args:
        spec: the bank's encoder.
        bank_folder: what the recorded weights path is relative to.
        weights: folder to use instead of the recorded one.
        device: as in `load_encoder`.

    Raises:
        EncoderMismatchError: what was loaded gives other snippets than the bank's; both are named.
    """
    recorded = None if spec.weights_path is None else bank_folder / spec.weights_path
    folder = weights or recorded
    options = EncoderOptions(
        weights=None if folder is None else Path(folder), device=device, space=spec.space,
        parameters={**spec.parameters, **(_recorded_revision(spec) if folder is None else {})}, reloading=True,
    )  # fmt: skip
    encoder = _load(spec.name, options)
    require_same_encoder(encoder.spec, spec)
    return encoder


def _recorded_revision(spec: EncoderSpec) -> dict[str, str]:
    """Return the parameter that asks for the commit of the hub that a bank names, if it names one."""
    revision = str(spec.labels.get("revision", ""))
    of_the_hub = spec.name in HUB_MODELS or spec.name.startswith("hf:")
    return {"revision": revision} if of_the_hub and re.fullmatch("[0-9a-f]{40}", revision) else {}


def require_same_encoder(offered: EncoderSpec, wanted: EncoderSpec) -> None:
    """Raise EncoderMismatchError, naming both, unless two specs give the same snippets."""
    if offered.fingerprint != wanted.fingerprint:
        raise EncoderMismatchError(
            f"the bank was made by {wanted.describe()}, the snippets offered by {offered.describe()}: "
            f"{_difference(offered, wanted)}. Use the bank's own encoder, or build another bank"
        )


def _difference(offered: EncoderSpec, wanted: EncoderSpec) -> str:
    ours, theirs = wanted.to_json(), offered.to_json()
    names = [n for n in DECIDING_FIELDS if ours[n] != theirs[n]]
    return "they differ in " + ", ".join(names).replace("_", " ")


def refuse_unknown(name: str, parameters: Mapping[str, Any], known: Mapping[str, Any]) -> dict[str, Any]:
    """Return `known` updated by `parameters`; raises EncoderError for a name that is not in `known`."""
    for parameter in parameters:
        if parameter not in known:
            have = ", ".join(known) or "none"
            raise EncoderError(
                f"encoder {name!r} has no parameter {parameter!r} (it has: {have}).{suggest(parameter, known)}",
                key=parameter,
            )
    return {**known, **parameters}
