"""An ONNX file opened by onnxruntime: on the device that was asked for, with weights that the fingerprint covers.

Shapes: none here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from gmem_bank.encoders.onnx_external import external_names
from gmem_bank.errors import EncoderError, EncoderSettingError, MissingDependencyError

CUDA, CPU = "CUDAExecutionProvider", "CPUExecutionProvider"


def require_runtime() -> Any:
    """Return the onnxruntime module; raises MissingDependencyError."""
    try:
        import onnxruntime
    except ImportError as error:
        raise MissingDependencyError(
            "this encoder needs onnxruntime: pip install onnxruntime (the extra gmem[onnx])", extra="onnx"
        ) from error
    return onnxruntime


def weight_files(path: Path, model: bytes) -> list[Path]:
    """Return the files of weights outside the ONNX file: those that it names, each once, beside it.

    Raises:
        EncoderError: the file is malformed, a name leads elsewhere, or a file is not there.
    """
    try:
        names = external_names(model)
    except ValueError as error:
        raise EncoderError(f"{path} is not a network that onnxruntime can load: {error}", path=path) from error
    for name in sorted(names):
        if name in ("", ".", "..") or set("/\\\0") & set(name) or not path.with_name(name).is_file():
            raise EncoderError(
                f"{path} keeps weights in {name!r}, which is not a file beside it: export it anew", path=path
            )
    return [path.with_name(name) for name in sorted(names)]


def open_session(path: Path, device: str) -> Any:
    """Return a session; weights outside the file are only taken from files that the fingerprint covers."""
    runtime = require_runtime()
    providers = _providers(runtime, device)
    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 4
    # the runtime has a format of its own, in which nobody looked for names
    options.add_session_config_entry("session.load_model_format", "ONNX")
    model = path.read_bytes()
    outside = [(part.name, part.read_bytes()) for part in weight_files(path, model)]
    try:
        if outside:
            options.add_external_initializers_from_files_in_memory(
                [name for name, _ in outside], [data for _, data in outside], [len(data) for _, data in outside]
            )
        session = runtime.InferenceSession(model, options, providers=providers)
    except Exception as error:  # the runtime has a class for each of many failures, without a common root
        raise EncoderError(
            f"{path} is not a network that onnxruntime can load: {first_line(error)}", path=path
        ) from error
    if device.startswith("cuda") and CUDA not in session.get_providers():
        raise EncoderError(
            f"onnxruntime has CUDA and could not start it on {device!r} (running: {', '.join(session.get_providers())}): "
            "look whether driver, CUDA and cuDNN are of the versions that it needs, or take --device cpu",
            key="device",
        )
    return session


def _providers(runtime: Any, device: str) -> list[Any]:
    """Return what may run the network, the first that can being taken; "auto" is CUDA where it works."""
    have = runtime.get_available_providers()
    kind, _, number = device.partition(":")
    if kind in ("cuda", "auto") and CUDA in have:
        return [(CUDA, {"device_id": int(number or 0)}), CPU]
    if kind not in ("cpu", "auto"):
        raise EncoderSettingError(
            f"this onnxruntime has no {device!r} (it has {', '.join(have)}): onnxruntime-gpu has CUDA", key="device"
        )
    return [CPU]


def first_line(error: Exception) -> str:
    """Return what an error says first, cut to 300 characters."""
    return str(error).strip().split("\n", 1)[0][:300]
