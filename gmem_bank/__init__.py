"""gmem_bank: build, edit, search and ship banks of semantic snippets.

The names below are the public surface; a path with another module in it is not supported. They are loaded on first use,
so that importing the package costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from gmem_bank.array_insertion import concept_of_rows as concept_of_rows
    from gmem_bank.array_insertion import insert_snippets as insert_snippets
    from gmem_bank.arrays import read_array as read_array
    from gmem_bank.bank import MemoryBank as MemoryBank
    from gmem_bank.builder import BuildReport as BuildReport
    from gmem_bank.builder import build as build
    from gmem_bank.columns import Columns as Columns
    from gmem_bank.combine import merge as merge
    from gmem_bank.compare import DiffReport as DiffReport
    from gmem_bank.compare import diff as diff
    from gmem_bank.compression import compress as compress
    from gmem_bank.console import CommandGroup as CommandGroup
    from gmem_bank.console import parse_parameters as parse_parameters
    from gmem_bank.console import usage_errors as usage_errors
    from gmem_bank.decoding import read_image as read_image
    from gmem_bank.derive import compose as compose
    from gmem_bank.derive import interpolate as interpolate
    from gmem_bank.editing import EditReport as EditReport
    from gmem_bank.encoders import Encoder as Encoder
    from gmem_bank.encoders import EncoderInfo as EncoderInfo
    from gmem_bank.encoders import EncoderOptions as EncoderOptions
    from gmem_bank.encoders import available_encoders as available_encoders
    from gmem_bank.encoders import load_encoder as load_encoder
    from gmem_bank.encoders import reload_encoder as reload_encoder
    from gmem_bank.encoders.preprocess import center_crop as center_crop
    from gmem_bank.encoders.weights import ModelFiles as ModelFiles
    from gmem_bank.encoders.weights import find_model as find_model
    from gmem_bank.errors import BankNotFoundError as BankNotFoundError
    from gmem_bank.errors import CheckpointError as CheckpointError
    from gmem_bank.errors import ConceptExistsError as ConceptExistsError
    from gmem_bank.errors import ConfigError as ConfigError
    from gmem_bank.errors import CorruptError as CorruptError
    from gmem_bank.errors import EncoderError as EncoderError
    from gmem_bank.errors import EncoderMismatchError as EncoderMismatchError
    from gmem_bank.errors import EncoderSettingError as EncoderSettingError
    from gmem_bank.errors import FormatError as FormatError
    from gmem_bank.errors import FormatVersionError as FormatVersionError
    from gmem_bank.errors import GMemError as GMemError
    from gmem_bank.errors import LockedError as LockedError
    from gmem_bank.errors import MaskedRowError as MaskedRowError
    from gmem_bank.errors import MissingDependencyError as MissingDependencyError
    from gmem_bank.errors import OutputExistsError as OutputExistsError
    from gmem_bank.errors import SourceError as SourceError
    from gmem_bank.errors import StaleIndexError as StaleIndexError
    from gmem_bank.errors import UnknownKeyError as UnknownKeyError
    from gmem_bank.errors import WriteError as WriteError
    from gmem_bank.image_shards import ImageWork as ImageWork
    from gmem_bank.image_shards import ShardsReport as ShardsReport
    from gmem_bank.image_shards import write_image_shards as write_image_shards
    from gmem_bank.image_source import ImageSource as ImageSource
    from gmem_bank.image_source import encode_images as encode_images
    from gmem_bank.image_source import open_images as open_images
    from gmem_bank.index import require_faiss as require_faiss
    from gmem_bank.index_build import IndexReport as IndexReport
    from gmem_bank.index_build import build_index as build_index
    from gmem_bank.index_update import update_index as update_index
    from gmem_bank.indexed import BankIndex as BankIndex
    from gmem_bank.indexed import find_index as find_index
    from gmem_bank.indexed import open_index as open_index
    from gmem_bank.insertion import insert_concept as insert_concept
    from gmem_bank.interface import Bank as Bank
    from gmem_bank.kinds import open as open  # noqa: A004
    from gmem_bank.legacy import import_official as import_official
    from gmem_bank.legacy_export import export_official as export_official
    from gmem_bank.mixing import compose_snippet as compose_snippet
    from gmem_bank.mixing import interpolate_snippets as interpolate_snippets
    from gmem_bank.moments import Moments as Moments
    from gmem_bank.naming import FLIP_SUFFIX as FLIP_SUFFIX
    from gmem_bank.narrowing import Narrowing as Narrowing
    from gmem_bank.official import read_torch_archive as read_torch_archive
    from gmem_bank.ops import mask as mask
    from gmem_bank.ops import remove as remove
    from gmem_bank.ops import remove_concept as remove_concept
    from gmem_bank.ops import rename as rename
    from gmem_bank.ops import select as select
    from gmem_bank.ops import unmask as unmask
    from gmem_bank.parquet import export_parquet as export_parquet
    from gmem_bank.plotting import plot as plot
    from gmem_bank.precomputed import build_precomputed as build_precomputed
    from gmem_bank.progress import ProgressBar as ProgressBar
    from gmem_bank.provenance import EncoderSpec as EncoderSpec
    from gmem_bank.provenance import sha256_of_file as sha256_of_file
    from gmem_bank.query import QueryHits as QueryHits
    from gmem_bank.query import search as search
    from gmem_bank.reduce import coreset as coreset
    from gmem_bank.reduce import dedup as dedup
    from gmem_bank.resolving import image_snippets as image_snippets
    from gmem_bank.resolving import snippet_of as snippet_of
    from gmem_bank.resolving import snippet_or_image as snippet_or_image
    from gmem_bank.resolving import text_snippets as text_snippets
    from gmem_bank.results_page import write_results_page as write_results_page
    from gmem_bank.rewrite import compact as compact
    from gmem_bank.rewrite import save as save
    from gmem_bank.rewrite import shard as shard
    from gmem_bank.selection import Selection as Selection
    from gmem_bank.shards import Shards as Shards
    from gmem_bank.shards import ShardWriter as ShardWriter
    from gmem_bank.sources import RUN_MARKER as RUN_MARKER
    from gmem_bank.storage import is_bank_path as is_bank_path
    from gmem_bank.sweeping import sweep as sweep
    from gmem_bank.thinning import mask_coefficients as mask_coefficients
    from gmem_bank.tokens import write_tokens as write_tokens
    from gmem_bank.undoing import undo as undo
    from gmem_bank.verifier import verify as verify

_DOOR = {
    "array_insertion": ("concept_of_rows", "insert_snippets"),
    "arrays": ("read_array",),
    "bank": ("MemoryBank",),
    "builder": ("BuildReport", "build"),
    "columns": ("Columns",),
    "combine": ("merge",),
    "compare": ("DiffReport", "diff"),
    "compression": ("compress",),
    "console": ("CommandGroup", "parse_parameters", "usage_errors"),
    "decoding": ("read_image",),
    "derive": ("compose", "interpolate"),
    "editing": ("EditReport",),
    "encoders": ("Encoder", "EncoderInfo", "EncoderOptions", "available_encoders", "load_encoder", "reload_encoder"),
    "encoders.preprocess": ("center_crop",),
    "encoders.weights": ("ModelFiles", "find_model"),
    "errors": (
        "BankNotFoundError",
        "CheckpointError",
        "ConceptExistsError",
        "ConfigError",
        "CorruptError",
        "EncoderError",
        "EncoderMismatchError",
        "EncoderSettingError",
        "FormatError",
        "FormatVersionError",
        "GMemError",
        "LockedError",
        "MaskedRowError",
        "MissingDependencyError",
        "OutputExistsError",
        "SourceError",
        "StaleIndexError",
        "UnknownKeyError",
        "WriteError",
    ),
    "image_source": ("ImageSource", "encode_images", "open_images"),
    "image_shards": ("ImageWork", "ShardsReport", "write_image_shards"),
    "index": ("require_faiss",),
    "index_build": ("IndexReport", "build_index"),
    "index_update": ("update_index",),
    "indexed": ("BankIndex", "find_index", "open_index"),
    "insertion": ("insert_concept",),
    "interface": ("Bank",),
    "kinds": ("open",),
    "legacy": ("import_official",),
    "legacy_export": ("export_official",),
    "moments": ("Moments",),
    "mixing": ("compose_snippet", "interpolate_snippets"),
    "naming": ("FLIP_SUFFIX",),
    "narrowing": ("Narrowing",),
    "official": ("read_torch_archive",),
    "ops": ("mask", "remove", "remove_concept", "rename", "select", "unmask"),
    "parquet": ("export_parquet",),
    "plotting": ("plot",),
    "precomputed": ("build_precomputed",),
    "progress": ("ProgressBar",),
    "provenance": ("EncoderSpec", "sha256_of_file"),
    "query": ("QueryHits", "search"),
    "resolving": ("image_snippets", "snippet_of", "snippet_or_image", "text_snippets"),
    "reduce": ("coreset", "dedup"),
    "results_page": ("write_results_page",),
    "rewrite": ("compact", "save", "shard"),
    "selection": ("Selection",),
    "shards": ("ShardWriter", "Shards"),
    "sources": ("RUN_MARKER",),
    "storage": ("is_bank_path",),
    "sweeping": ("sweep",),
    "thinning": ("mask_coefficients",),
    "tokens": ("write_tokens",),
    "undoing": ("undo",),
    "verifier": ("verify",),
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
