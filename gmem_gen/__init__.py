"""gmem_gen: a thin flow-matching generator that draws what a memory bank tells it to.

The names below are the public surface; a path with another module in it is not supported. They are loaded on first use,
so that importing the package costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from gmem_bank import __version__ as __version__

if TYPE_CHECKING:
    from gmem_gen.checkpoint import LoadedCheckpoint as LoadedCheckpoint
    from gmem_gen.checkpoint import load_checkpoint as load_checkpoint
    from gmem_gen.conditioning import Conditions as Conditions
    from gmem_gen.conditioning import choose_conditions as choose_conditions
    from gmem_gen.config import Config as Config
    from gmem_gen.config import DataConfig as DataConfig
    from gmem_gen.config import FlowConfig as FlowConfig
    from gmem_gen.config import ModelConfig as ModelConfig
    from gmem_gen.config import SampleConfig as SampleConfig
    from gmem_gen.config import TrainConfig as TrainConfig
    from gmem_gen.config import apply_settings as apply_settings
    from gmem_gen.config import load_config as load_config
    from gmem_gen.evaluation_page import write_report as write_report
    from gmem_gen.evaluation_report import EvaluationOptions as EvaluationOptions
    from gmem_gen.evaluation_report import EvaluationReport as EvaluationReport
    from gmem_gen.evaluator import evaluate as evaluate
    from gmem_gen.images import make_grid as make_grid
    from gmem_gen.model import Generator as Generator
    from gmem_gen.model import LatentShape as LatentShape
    from gmem_gen.presets import MODEL_PRESETS as MODEL_PRESETS
    from gmem_gen.presets import class_conditional as class_conditional
    from gmem_gen.presets import lightningdit as lightningdit
    from gmem_gen.presets import preset as preset
    from gmem_gen.presets import sit as sit
    from gmem_gen.presets import unconditional as unconditional
    from gmem_gen.sampling import Samples as Samples
    from gmem_gen.sampling import sample as sample
    from gmem_gen.trainer import TrainReport as TrainReport
    from gmem_gen.trainer import train as train

_DOOR = {
    "checkpoint": ("LoadedCheckpoint", "load_checkpoint"),
    "conditioning": ("Conditions", "choose_conditions"),
    "config": (
        "Config",
        "DataConfig",
        "FlowConfig",
        "ModelConfig",
        "SampleConfig",
        "TrainConfig",
        "apply_settings",
        "load_config",
    ),
    "evaluation_page": ("write_report",),
    "evaluation_report": ("EvaluationOptions", "EvaluationReport"),
    "evaluator": ("evaluate",),
    "images": ("make_grid",),
    "model": ("Generator", "LatentShape"),
    "presets": ("MODEL_PRESETS", "class_conditional", "lightningdit", "preset", "sit", "unconditional"),
    "sampling": ("Samples", "sample"),
    "trainer": ("TrainReport", "train"),
}
"""Module → the public names that live there."""
_HOMES = {name: module for module, names in _DOOR.items() for name in names}

__all__ = sorted([*_HOMES, "__version__"])  # noqa: PLE0605 - a test holds it equal to a golden list


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
