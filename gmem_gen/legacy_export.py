"""A checkpoint as the published code names its tensors, in a safetensors file; a pickle is never written.

Shapes: E width, D snippet dimension.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from gmem_bank.errors import CheckpointError, ConfigError, FormatError, OutputExistsError, WriteError
from gmem_gen import checkpoint as checkpoints
from gmem_gen.config import Config
from gmem_gen.pretrained import save_tensors

ONE_LINE = (
    "python -c \"import json, torch; from safetensors import safe_open; f = safe_open({source!r}, 'pt'); "
    "o = json.loads(f.metadata()['gmem'])['order']; "
    "torch.save({{p: {{n: f.get_tensor(p + '.' + n) for n in o}} for p in {parts!r}}}, {target!r})\""
)
"""What makes the .pt of the published code from an export."""
PATH_TYPES = {"linear": "Linear", "gvp": "GVP", "vp": "VP"}
"""What the published configurations call the paths."""
NO_DATA = "the published code has no prediction of data: it can load this, not use it"


def export_official(
    checkpoint: str | Path, output: str | Path, *, parts: tuple[str, ...] = ("model", "ema")
) -> dict[str, Any]:
    """Write the tensors of a checkpoint under their published names: "model.<name>" and "ema.<name>".

    What was imported comes out as it went in: names, values and types; their order is in the file's metadata.

    Args:
        checkpoint: a run or one of its checkpoints.
        output: .safetensors to write; must not be there.
        parts: which weights: "model", "ema", or both.

    Returns:
        What was written: file, tensors, and the line that makes a .pt of it.

    Raises:
        CheckpointError: none there, or damaged.
        ConfigError: a model that the published code does not have.
        FormatError: another ending.
        OutputExistsError: something is there.
        WriteError: no room.
    """
    target = Path(output)
    if target.suffix != ".safetensors":
        raise FormatError(f"{target}: an export ends in .safetensors, since no pickle is ever written", path=target)
    if target.exists():
        raise OutputExistsError(f"{target} exists: choose another name, or delete it first", path=target)
    loaded = checkpoints.load_checkpoint(checkpoint)
    state = checkpoints.read_state(loaded.path)
    _require_published(loaded.config)
    order = list(loaded.model.state_dict())
    tensors: dict[str, Tensor] = {}
    for part in parts:
        tensors |= {f"{part}.{name}": tensor for name, tensor in _official(loaded.path, state, part, order).items()}
    flow = loaded.config.flow
    settings = [f"flow.{name}={getattr(flow, name)}" for name in ("path", "prediction")]
    settings.append(f"train.null_probability={loaded.config.train.null_probability}")
    metadata = {"gmem": json.dumps({"order": order, "step": loaded.step, "settings": settings})}
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        save_tensors(tensors, target, metadata)
    except (OSError, SafetensorError) as error:
        raise WriteError(f"could not write {target}: {error}. Free some space", path=target) from error
    line = ONE_LINE.format(source=str(target), parts=parts, target=str(target.with_suffix(".pt")))
    return {
        "output": str(target), "parts": list(parts), "num_tensors": len(order), "step": loaded.step, "to_pt": line,
        "path_type": PATH_TYPES[flow.path], "prediction": flow.prediction,
        "remarks": [NO_DATA] if flow.prediction == "data" else [],
    }  # fmt: skip


def _require_published(config: Config) -> None:
    if config.model.condition != "memory":
        raise ConfigError(
            f"the published code has models with a memory only, this one has model.condition={config.model.condition!r}: export "
            "it with --to diffusers", key="model.condition",
        )  # fmt: skip


def _official(checkpoint: Path, state: Mapping[str, Any], part: str, order: list[str]) -> dict[str, Tensor]:
    """Return the tensors of a part: the factor on snippets multiplied into their map, types as they were imported."""
    stored = checkpoints.read_tensors(checkpoint, checkpoints.weights_file(part))
    tensors = {name.removeprefix("module.") if part != "model" else name: value for name, value in stored.items()}
    missing = [name for name in order if name not in tensors]
    if missing:
        raise CheckpointError(f"{checkpoint} lacks {missing[0]!r}", path=checkpoint, tensor=missing[0])
    scale = float(state["config"]["model"]["snippet_scale"])
    if scale != 1.0:  # the published model has no such factor
        name = "condition_projection.linear.weight"
        tensors[name] = (tensors[name].double() * scale).float()
    dtypes = state.get("imported", {}).get("dtypes", {})
    kept = dtypes.get(part, next(iter(dtypes.values()), {}))
    return {name: tensors[name].to(getattr(torch, kept.get(name, "float32"))) for name in order}
