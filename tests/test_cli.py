"""The commands: exit codes, JSON, help, and how fast they start."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner, Result

from gmem_bank.cli import main as bank_main
from gmem_gen.cli import main as gen_main

TINY = [
    "--set", "model.width=16", "--set", "model.depth=1", "--set", "model.num_heads=2", "--set", "data.image_size=8",
    "--set", "train.max_steps=3", "--set", "train.batch_size=8", "--set", "train.num_threads=1",
]  # fmt: skip


def bank(*arguments: str, code: int = 0) -> Result:
    result = CliRunner().invoke(bank_main, arguments, catch_exceptions=False)
    assert result.exit_code == code, result.output
    return result


def gen(*arguments: str, code: int = 0) -> Result:
    result = CliRunner().invoke(gen_main, arguments, catch_exceptions=False)
    assert result.exit_code == code, result.output
    return result


def as_json(result: Result) -> object:
    return json.loads(result.stdout)


def test_the_whole_path_by_commands_alone(photos: Path, new_photos: Path) -> None:
    """build, insert, interpolate, search, train, sample, remove: each says in JSON what it did."""
    built = as_json(bank("build", str(photos), "--encoder", "hog", "--json"))
    assert (built["num_rows"], built["encoder"], built["concepts"]["hat"]) == (24, "hog", 8)
    inserted = as_json(bank("insert-concept", "images/", "--json"))
    assert (inserted["concept"], inserted["num_added"], inserted["num_rows"]) == ("images", 8, 32)
    info = as_json(bank("info", "--json"))
    wanted = {"num_rows": 32, "dim": built["dim"], "rank": None, "kind": "dense", "space": "unit"}
    assert {name: info[name] for name in wanted} == wanted
    assert info["encoder"]["name"] == "hog"
    assert info["concepts"] == {"dress": 8, "hat": 8, "shoes": 8, "images": 8}
    assert info["fingerprint"] == inserted["fingerprint"]
    assert info["bytes"] == Path("bank.safetensors").stat().st_size
    between = as_json(bank("interpolate", "hat", "images", "--steps", "4", "--json"))
    assert between["keys"] == [f"hat-to-images/{i}" for i in range(4)]
    found = as_json(bank("search", "bank.safetensors", "images", "-k", "3", "--json"))
    assert len(found[0]["hits"]) == 3
    assert as_json(bank("verify", "--json"))["ok"]
    listed = as_json(bank("list", "-c", "images", "--json"))
    assert [row["row"] for row in listed["rows"]] == list(range(24, 32))
    assert [entry["operation"] for entry in as_json(bank("history", "--json"))] == [
        "build",
        "insert-concept",
        "interpolate",
    ]
    trained = as_json(gen("train", "--bank", "bank.safetensors", *TINY, "--json"))
    assert (trained["step"], trained["num_images"], trained["run"]) == (3, 32, "runs/bank")
    drawn = as_json(
        gen("sample", "--concept", "hat-to-images", "-n", "4", "--steps", "2", "--save-images", "out", "--json")
    )
    assert drawn["nfe"] == 4
    assert len(drawn["keys"]) == 4
    assert Path(drawn["grid"]).is_file()
    assert len(list(Path("out").glob("*.png"))) == 4
    removed = as_json(bank("remove-concept", "hat-to-images", "--json"))
    assert (removed["num_removed"], removed["num_rows"]) == (4, 32)


def test_text_output_says_the_same_in_words(photos: Path, new_photos: Path) -> None:
    """Without --json a person can read it."""
    assert "24 rows × 324, unit space, hog, 3 concepts" in bank("build", str(photos), "-e", "hog").stdout
    assert "+8 rows as concept 'images', 32 rows now" in bank("insert-concept", "images").stdout
    assert "already holds these images" in bank("insert-concept", "images").stderr
    assert "dress (8), hat (8), shoes (8), images (8)" in bank("info").stdout
    assert "sound (32 rows" in bank("verify").stdout
    assert "-8 rows of concept 'hat'" in bank("remove-concept", "hat").stdout
    assert "removed" in bank("remove-concept", "hat").stderr
    assert "+6 rows as concept 'dress-to-shoes'" in bank("interpolate", "dress", "shoes").stdout
    assert "already holds this way" in bank("interpolate", "dress", "shoes").stderr
    assert "concept\tdress\t8 rows" in bank("list", "--limit", "0").stdout
    assert "step 3 of 3" in gen("train", *TINY).stdout
    assert "done already" in gen("train", *TINY).stdout
    again = gen("train", *TINY, "--resume-from", "runs/bank/checkpoints/step-00000003", "--set", "train.max_steps=4")
    assert "resuming runs/bank at step 3" in again.stderr
    assert "loss" in again.stderr.splitlines()[-1]
    assert "images/s" in again.stderr.splitlines()[-1]
    assert "none before the latest" in gen("train", *TINY, "--out", "new", "--resume-from", "previous", code=1).stderr
    assert "no folder of shards" in gen("train", *TINY, "--tokens", "nowhere", code=1).stderr
    assert "NFE 2" in gen("sample", "--concept", "images", "--solver", "euler", "--steps", "2").stdout


def test_our_errors_are_one_line_and_exit_1_usage_errors_exit_2(photos: Path) -> None:
    """--traceback re-raises."""
    result = bank("info", "none.safetensors", code=1)
    assert result.stderr.startswith("Error: no bank at none.safetensors")
    assert len(result.stderr.splitlines()) == 1
    bank("build", str(photos), "-e", "hog")
    assert "did you mean" in bank("build", "--encodr", "x", code=2).stderr.lower()
    assert "'hog'" in bank("build", str(photos), "--encoder", "hogg", "-o", "x.safetensors", code=2).stderr
    assert "train.max_steps" in gen("train", "--set", "train.max_stps=3", code=2).stderr
    with pytest.raises(FileNotFoundError):
        CliRunner().invoke(bank_main, ["--traceback", "info", "none.safetensors"], catch_exceptions=False)


def test_a_damaged_bank_fails_verify_with_exit_1(photos: Path) -> None:
    """What is wrong goes to stderr."""
    bank("build", str(photos), "-e", "hog")
    path = Path("bank.safetensors")
    data = bytearray(path.read_bytes())
    data[-200] ^= 1
    path.write_bytes(data)
    assert "does not match its hash" in bank("verify", code=1).stderr
    path.write_bytes(data[: len(data) // 2])
    assert "cut short" in bank("info", code=1).stderr


def test_keys_can_come_from_a_file_and_dry_run_trains_nothing(photos: Path) -> None:
    """--keys-from reads keys; --dry-run prints resolved settings."""
    bank("build", str(photos), "-e", "hog")
    planned = as_json(gen("train", *TINY, "--dry-run", "--json"))
    assert planned["data"]["image_size"] == 8
    assert planned["model"]["patch_size"] == 1
    assert not Path("runs").exists()
    gen("train", *TINY)
    key = as_json(bank("list", "--json"))["rows"][5]["key"]
    Path("keys.txt").write_text(f"{key}\n{key}\n")
    drawn = as_json(gen("sample", "--keys-from", "keys.txt", "--steps", "1", "--json"))
    assert drawn["keys"] == [key, key]


def test_numbers_out_of_range_are_answered_in_one_line(photos: Path) -> None:
    """Negative seeds, infinities, absurd sizes, unknown devices, empty files of keys: never a traceback."""
    bank("build", str(photos), "-e", "hog")
    gen("train", *TINY)
    for setting in ("train.seed=-5", "model.mlp_ratio=inf", "train.max_minutes=nan", "train.num_threads=100000",
                    "model.width=1000000000", "data.image_size=100000000", "train.device=meta", "train.device=banana"):  # fmt: skip
        code = 1 if setting in ("train.device=meta", "train.device=banana") else 2
        assert "\nError: " in "\n" + gen("train", *TINY, "--out", "other", "--set", setting, code=code).stderr, setting
    for option in (
        ("--guidance", "nan"),
        ("--timestep-shift", "inf"),
        ("--steps", "100000000000"),
        ("--device", "meta"),
    ):
        assert "\nError: " in gen("sample", *option, code=2).stderr, option
    Path("empty.txt").touch()
    Path("binary.txt").write_bytes(b"\xff\xfe\x00")
    for option in (("--seed", "-3"), ("--keys-from", "empty.txt"), ("--keys-from", "binary.txt")):
        gen("sample", *option, code=2)
    bank("interpolate", "hat", "dress", "--method", "mask", "--seed", "-1", code=2)
    assert (
        "unknown device"
        in bank("build", str(photos), "-e", "hog", "-o", "x.safetensors", "--device", "banana", code=2).stderr
    )
    assert "query is empty" in bank("search", "bank.safetensors", "", code=1).stderr
    assert (
        "up to 4096"
        in bank("build", str(photos), "-e", "hog", "--set", "size=1000000", "-o", "x.safetensors", code=2).stderr
    )
    Path("folder.safetensors").mkdir()
    assert "is a folder" in bank("build", str(photos), "-e", "hog", "-o", "folder.safetensors", code=2).stderr


def test_sampling_takes_the_runs_settings_and_the_command_lines_over_them(photos: Path) -> None:
    """Method, steps, diffusion, last step, shift, interval; what makes no sense is refused in one line."""
    bank("build", str(photos), "-e", "hog")
    gen("train", *TINY, "--set", "sample.method=sde-heun", "--set", "sample.num_steps=4")
    record = as_json(gen("sample", "--num", "2", "--json"))
    assert (record["method"], record["nfe"], record["last_step"]) == ("sde-heun", 7, "mean")
    record = as_json(gen(
        "sample", "--num", "2", "--json", "--method", "sde-euler", "--steps", "5", "--diffusion", "sigma", "--last-step",
        "tweedie", "--guidance", "3", "--guidance-interval", "0.5", "0.9", "--set", "sample.last_step_size=0.1",
    ))  # fmt: skip
    assert (record["diffusion"], record["last_step"], record["last_step_size"]) == ("sigma", "tweedie", 0.1)
    assert (record["guidance_start"], record["guidance_end"], record["nfe"]) == (0.5, 0.9, 5)
    assert record["evaluations_per_image"] == 7  # t = 0, 0.225, 0.45, 0.675 and 0.9, of which the last two are guided
    assert as_json(gen("sample", "--num", "1", "--json", "--method", "euler", "--shift", "0.3"))["nfe"] == 4
    for arguments, answer in (
        (("--shift", "0.3"), "only the ODE's methods shift"),
        (("--method", "huen"), "'heun'"),
        (("--guidance-interval", "0.9", "0.1"), "in order"),
        (("--set", "sample.diffusio=sigma"), "'sample.diffusion'"),
    ):
        assert answer in gen("sample", *arguments, code=2).stderr, arguments
    gen("sample", "--set", "train.seed=3", code=2)
    assert "'sde-heun'" in gen("train", *TINY, "--set", "sample.method=sde_heun", code=2).stderr


def test_help_lists_its_commands_line_by_line() -> None:
    """Click's own mark for a block of lines is not printed."""
    for run in (bank, gen):
        text = run("--help").stdout
        assert "\\b" not in text
        assert "\b" not in text
        assert any(line.strip() == "gmem-gen train --bank bank.safetensors" for line in text.splitlines())


def test_models_and_config_and_encoders_list_what_there_is() -> None:
    """Sizes, settings, encoders."""
    rows = as_json(gen("models", "--json"))
    names = [row["name"] for row in rows]
    assert names[:6] == ["nano", "mini", "S", "B", "L", "XL"]
    assert {"LightningDiT-XL/1", "SiT-B/2", "SiT-S/4"} < set(names)
    assert all(row["flops"] > row["parameters"] for row in rows)
    odd = gen("models", "--image-size", "15", "--condition", "class")
    assert "SiT-B/2" in odd.stderr
    assert "SiT-B/2" not in odd.stdout
    assert as_json(gen("config", "--preset", "S", "--json"))["model"]["width"] == 384
    Path("c.toml").write_text(gen("config", "--set", "train.seed=5").stdout)
    assert as_json(gen("config", "--config", "c.toml", "--json"))["train"]["seed"] == 5
    assert {"dinov2", "hog"} <= {row["name"] for row in as_json(bank("encoders", "--json"))}


def commands() -> list[tuple[str, click.Command]]:
    return [
        (f"{name} {sub}", command)
        for name, group in (("gmem-bank", bank_main), ("gmem-gen", gen_main))
        for sub, command in group.commands.items()
    ]


@pytest.mark.parametrize(("name", "command"), commands())
def test_every_command_and_option_has_help_and_stands_in_the_docs(name: str, command: click.Command) -> None:
    """Nothing undocumented."""
    assert command.help
    for parameter in command.params:
        if isinstance(parameter, click.Option):
            assert parameter.help, parameter.name
    assert name in (Path(__file__).parents[1] / "docs" / "CLI.md").read_text()


def test_the_command_reference_is_current() -> None:
    """docs/CLI.md is what the commands say of themselves."""
    tool = Path(__file__).parents[1] / "tools" / "make_cli_docs.py"
    result = subprocess.run([sys.executable, str(tool), "--check"], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


HEAVY = ("torch", "faiss", "h5py", "transformers", "scipy", "sklearn", "safetensors")


@pytest.mark.parametrize(
    "arguments", [("gmem_bank", "--help"), ("gmem_gen", "--help"), ("gmem_bank", "info", "bank.safetensors")]
)
def test_help_and_info_import_nothing_heavy(photos: Path, arguments: tuple[str, ...]) -> None:
    """They start in a blink because torch and its like are absent from sys.modules."""
    bank("build", str(photos), "-e", "hog")
    module, *rest = arguments
    code = (
        f"import sys\nfrom {module}.cli import main\n"
        f"try:\n    main({rest!r})\nexcept SystemExit as stop:\n    assert stop.code == 0\n"
        f"heavy = [name for name in {HEAVY!r} if name in sys.modules]\nassert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
