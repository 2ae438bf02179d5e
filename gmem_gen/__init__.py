"""gmem_gen: a thin flow-matching generator that draws what a memory bank tells it to.

The names below are the public surface; a path with another module in it is not supported. They are loaded on first use,
so that importing the package costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from gmem_bank import __version__ as __version__

if TYPE_CHECKING:
    from gmem_gen.autoencoders import Weights as Weights
    from gmem_gen.checkpoint import LoadedCheckpoint as LoadedCheckpoint
    from gmem_gen.conditions import Conditions as Conditions
    from gmem_gen.conditions import choose_conditions as choose_conditions
    from gmem_gen.conditions import composition_conditions as composition_conditions
    from gmem_gen.conditions import image_conditions as image_conditions
    from gmem_gen.conditions import interpolation_conditions as interpolation_conditions
    from gmem_gen.conditions import snippet_conditions as snippet_conditions
    from gmem_gen.conditions import text_conditions as text_conditions
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
    from gmem_gen.exporting import export_folder as export_folder
    from gmem_gen.exporting import load_checkpoint as load_checkpoint
    from gmem_gen.images import make_grid as make_grid
    from gmem_gen.latents import encode as encode
    from gmem_gen.legacy import ImportReport as ImportReport
    from gmem_gen.legacy import LatentSource as LatentSource
    from gmem_gen.legacy import Memory as Memory
    from gmem_gen.legacy import import_checkpoint as import_checkpoint
    from gmem_gen.legacy_export import export_official as export_official
    from gmem_gen.model import Generator as Generator
    from gmem_gen.model import LatentShape as LatentShape
    from gmem_gen.presets import MODEL_PRESETS as MODEL_PRESETS
    from gmem_gen.presets import class_conditional as class_conditional
    from gmem_gen.presets import lightningdit as lightningdit
    from gmem_gen.presets import preset as preset
    from gmem_gen.presets import sit as sit
    from gmem_gen.presets import unconditional as unconditional
    from gmem_gen.sample_files import SampleFiles as SampleFiles
    from gmem_gen.sample_files import SampleReport as SampleReport
    from gmem_gen.sample_files import sample_to as sample_to
    from gmem_gen.sampling import Samples as Samples
    from gmem_gen.sampling import sample as sample
    from gmem_gen.tokenizers import Tokenizer as Tokenizer
    from gmem_gen.tokenizers import make_tokenizer as make_tokenizer
    from gmem_gen.trainer import TrainReport as TrainReport
    from gmem_gen.trainer import train as train

_DOOR = {
    "autoencoders": ("Weights",),
    "checkpoint": ("LoadedCheckpoint",),
    "conditions": (
        "Conditions",
        "choose_conditions",
        "composition_conditions",
        "image_conditions",
        "interpolation_conditions",
        "snippet_conditions",
        "text_conditions",
    ),
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
    "exporting": ("export_folder", "load_checkpoint"),
    "images": ("make_grid",),
    "latents": ("encode",),
    "legacy": ("ImportReport", "LatentSource", "Memory", "import_checkpoint"),
    "legacy_export": ("export_official",),
    "model": ("Generator", "LatentShape"),
    "presets": ("MODEL_PRESETS", "class_conditional", "lightningdit", "preset", "sit", "unconditional"),
    "sample_files": ("SampleFiles", "SampleReport", "sample_to"),
    "sampling": ("Samples", "sample"),
    "tokenizers": ("Tokenizer", "make_tokenizer"),
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
