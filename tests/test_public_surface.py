"""The doors: what is public, and what imports what."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import gmem_bank
import gmem_gen

ROOT = Path(__file__).parents[1]

BANK_DOOR = [
    "Bank",
    "BankIndex",
    "BankNotFoundError",
    "BuildReport",
    "CheckpointError",
    "Columns",
    "CommandGroup",
    "ConceptExistsError",
    "ConfigError",
    "CorruptError",
    "DiffReport",
    "EditReport",
    "Encoder",
    "EncoderError",
    "EncoderInfo",
    "EncoderMismatchError",
    "EncoderSettingError",
    "EncoderOptions",
    "EncoderSpec",
    "FLIP_SUFFIX",
    "FormatError",
    "FormatVersionError",
    "GMemError",
    "ImageSource",
    "ImageWork",
    "IndexReport",
    "LockedError",
    "MaskedRowError",
    "MemoryBank",
    "MissingDependencyError",
    "Moments",
    "ModelFiles",
    "Narrowing",
    "OutputExistsError",
    "ProgressBar",
    "QueryHits",
    "RUN_MARKER",
    "Selection",
    "ShardWriter",
    "Shards",
    "ShardsReport",
    "SourceError",
    "StaleIndexError",
    "UnknownKeyError",
    "WriteError",
    "__version__",
    "available_encoders",
    "build",
    "build_index",
    "build_precomputed",
    "center_crop",
    "compact",
    "compose",
    "compose_snippet",
    "compress",
    "concept_of_rows",
    "coreset",
    "dedup",
    "diff",
    "encode_images",
    "export_official",
    "export_parquet",
    "find_index",
    "find_model",
    "image_snippets",
    "import_official",
    "insert_concept",
    "insert_snippets",
    "interpolate",
    "interpolate_snippets",
    "is_bank_path",
    "load_encoder",
    "mask",
    "mask_coefficients",
    "merge",
    "open",
    "open_images",
    "open_index",
    "parse_parameters",
    "plot",
    "read_array",
    "read_image",
    "read_torch_archive",
    "reload_encoder",
    "remove",
    "remove_concept",
    "require_faiss",
    "rename",
    "save",
    "search",
    "select",
    "sha256_of_file",
    "shard",
    "snippet_of",
    "snippet_or_image",
    "sweep",
    "text_snippets",
    "undo",
    "unmask",
    "update_index",
    "usage_errors",
    "verify",
    "write_image_shards",
    "write_tokens",
    "write_results_page",
]
GEN_DOOR = [
    "Conditions",
    "Config",
    "DataConfig",
    "EvaluationOptions",
    "EvaluationReport",
    "FlowConfig",
    "Generator",
    "ImportReport",
    "LatentShape",
    "LatentSource",
    "LoadedCheckpoint",
    "MODEL_PRESETS",
    "Memory",
    "ModelConfig",
    "SampleConfig",
    "SampleFiles",
    "SampleReport",
    "Samples",
    "Tokenizer",
    "TrainConfig",
    "TrainReport",
    "Weights",
    "__version__",
    "apply_settings",
    "choose_conditions",
    "encode",
    "class_conditional",
    "evaluate",
    "composition_conditions",
    "export_folder",
    "export_official",
    "image_conditions",
    "import_checkpoint",
    "interpolation_conditions",
    "lightningdit",
    "load_checkpoint",
    "load_config",
    "make_grid",
    "make_tokenizer",
    "preset",
    "sample",
    "sample_to",
    "sit",
    "snippet_conditions",
    "text_conditions",
    "train",
    "unconditional",
    "write_report",
]


def test_the_doors_are_exactly_these() -> None:
    """A name is public when it stands here; each can be had."""
    assert gmem_bank.__all__ == sorted(BANK_DOOR)
    assert gmem_gen.__all__ == sorted(GEN_DOOR)
    for module in (gmem_bank, gmem_gen):
        assert dir(module) == module.__all__
        for name in module.__all__:
            assert getattr(module, name) is not None


def test_verbs_stay_functions_whatever_was_imported_first() -> None:
    """No submodule takes the place of a verb of the same name."""
    code = (
        "import gmem_bank.ops, gmem_bank.builder, gmem_bank.verifier, gmem_gen.trainer, gmem_gen.sampling\n"
        "import gmem_bank, gmem_gen, types\n"
        "for module in (gmem_bank, gmem_gen):\n"
        "    for name in module.__all__:\n"
        "        assert not isinstance(getattr(module, name), types.ModuleType), name\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_errors_have_builtin_twins_and_one_root() -> None:
    """except ValueError works, and so does except GMemError."""
    twins = {
        "BankNotFoundError": FileNotFoundError,
        "FormatError": ValueError,
        "UnknownKeyError": KeyError,
        "MaskedRowError": IndexError,
        "MissingDependencyError": ImportError,
        "OutputExistsError": FileExistsError,
        "WriteError": OSError,
        "ConfigError": ValueError,
    }
    for name in BANK_DOOR:
        if name.endswith("Error"):
            error = getattr(gmem_bank, name)
            assert issubclass(error, gmem_bank.GMemError)
            assert issubclass(error, twins.get(name, Exception))
            raised = error("what, where", path="p", key="k", row=3, tensor="t", extra="e")
            assert (str(raised), raised.path, raised.key, raised.row, raised.tensor, raised.extra) == (
                "what, where",
                "p",
                "k",
                3,
                "t",
                "e",
            )


def test_import_contracts_hold() -> None:
    """Data flows one way."""
    result = subprocess.run(
        [str(Path(sys.executable).with_name("lint-imports"))], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout


def test_the_contracts_name_every_module() -> None:
    """A new module cannot slip past the walls."""
    import tomllib

    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]

    def modules(package: str) -> set[str]:
        names = {path.stem if path.is_file() else path.name for path in (ROOT / package).iterdir()}
        return names - {"__init__", "__main__", "__pycache__", "py"}

    for contract, package in zip(contracts[:2], ("gmem_bank", "gmem_gen"), strict=True):
        listed = {name.strip() for layer in contract["layers"] for name in layer.split("|")}
        assert listed == modules(package)
    seen_by_none = modules("gmem_bank") - {"errors", "interface"}
    assert set(contracts[3]["forbidden_modules"]) == {f"gmem_bank.{name}" for name in seen_by_none}
    assert set(contracts[4]["source_modules"]) == {
        f"gmem_gen.{name}" for name in modules("gmem_gen") - {"conditioning"}
    }


def test_no_module_takes_what_another_keeps_to_itself() -> None:
    """Names that begin with "_" are imported by no other module of the packages."""
    for path in sorted([*(ROOT / "gmem_bank").rglob("*.py"), *(ROOT / "gmem_gen").rglob("*.py")]):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("gmem_"):
                private = [
                    alias.name for alias in node.names if alias.name.startswith("_") and alias.name != "__version__"
                ]
                assert not private, f"{path.relative_to(ROOT)} imports {private} of {node.module}"


def test_a_bank_is_read_in_conditioning_alone() -> None:
    """Other stages of the generator ask a bank what it is and which rows it has; commands and references open their own."""
    plain = {"dim", "space", "encoder", "fingerprint", "rows", "rows_for"}
    own = {"cli_sample": {"folder"}}  # of a bank that gmem_bank.open gave it
    for path in sorted((ROOT / "gmem_gen").glob("*.py")):
        if path.stem == "conditioning":
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and ast.unparse(node.value) in ("bank", "self._bank", "self.bank"):
                assert node.attr in plain | own.get(path.stem, set()), f"{path.name} asks a bank for {node.attr}"


def test_the_options_of_sample_are_tables_and_not_long_functions() -> None:
    """They grow by one at a time."""
    for node in ast.walk(ast.parse((ROOT / "gmem_gen/cli_sample_options.py").read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef) and node.end_lineno:
            assert node.end_lineno - node.lineno < 40, node.name


def test_version_is_one() -> None:
    """pyproject, package and changelog agree."""
    assert f'version = "{gmem_bank.__version__}"' in (ROOT / "pyproject.toml").read_text()
    assert f"## [{gmem_bank.__version__}]" in (ROOT / "CHANGELOG.md").read_text()
    assert gmem_gen.__version__ == gmem_bank.__version__
