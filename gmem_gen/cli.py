"""The gmem-gen command. Only click is imported here; each command imports the library when it runs."""

from __future__ import annotations

import json
import time
from typing import Any

import click

import gmem_bank


@click.group(cls=gmem_bank.CommandGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(gmem_bank.__version__, prog_name="gmem-gen")
@click.option("--traceback", is_flag=True, help="Show the Python traceback of an error.")
def main(traceback: bool) -> None:
    """Train a thin generator on a memory bank, and sample from it.

    \b
      gmem-gen train --bank bank.safetensors
      gmem-gen sample --bank bank.safetensors --concept NAME
    """  # noqa: D301 - click knows a block of lines by its backspace


def _print(value: Any) -> None:
    click.echo(json.dumps(value, indent=2, ensure_ascii=False))


def _resolved(preset: str, config_file: str | None, settings: tuple[str, ...]) -> Any:
    import gmem_gen

    config = gmem_gen.preset(preset)
    if config_file is not None:
        config = gmem_gen.load_config(config_file, config)
    return gmem_gen.apply_settings(config, settings)


def _read_keys(path: str) -> list[str]:
    try:
        with click.open_file(path, encoding="utf-8") as lines:
            keys = [line.rstrip("\n") for line in lines if line.strip()]
    except UnicodeDecodeError as error:
        raise click.UsageError(f"--keys-from {path}: not a text of keys, one a line ({error.reason})") from error
    if not keys:
        raise click.UsageError(f"--keys-from {path}: there is no key in it")
    return keys


_bank = click.option(
    "--bank", "-b", default="bank.safetensors", show_default=True, metavar="BANK", help="The bank file."
)
_preset = click.option("--preset", "-p", default="nano", show_default=True, help="Model size, see 'gmem-gen models'.")
_config = click.option("--config", "config_file", default=None, metavar="TOML", help="Settings over the preset's.")
_set = click.option(
    "--set", "settings", multiple=True, metavar="SECTION.FIELD=VALUE", help="A setting; may be repeated."
)
_json = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
_quiet = click.option("-q", "--quiet", is_flag=True, help="No progress on stderr.")


@main.command()
@_bank
@click.option(
    "--images",
    multiple=True,
    metavar="FOLDER",
    help="Folder with the images, where the bank's own record is out of date; may be repeated.",
)
@_preset
@_config
@_set
@click.option("--out", "-o", default=None, metavar="RUN", help="The run's folder; default: runs/<bank stem>.")
@click.option("--seed", type=click.IntRange(min=0), default=None, help="Short for --set train.seed=N.")
@click.option("--device", default=None, help="Short for --set train.device=NAME: auto, cpu, cuda, …")
@click.option("--allow-missing", is_flag=True, help="Leave out rows whose image is gone.")
@click.option(
    "--accept-bank-change", is_flag=True, help="Go on although the bank was edited since the training stopped."
)
@click.option("--dry-run", is_flag=True, help="Check bank, images and settings, print the settings, train nothing.")
@_json
@_quiet
def train(
    bank: str, images: tuple[str, ...], preset: str, config_file: str | None, settings: tuple[str, ...], out: str | None,
    seed: int | None, device: str | None, allow_missing: bool, accept_bank_change: bool, dry_run: bool, as_json: bool,
    quiet: bool,
) -> None:  # fmt: skip
    """Train a generator on the images of a bank. The same command again resumes.

    Pixels at 64 px (less where the images are smaller), a small model, and a budget of epochs bounded to about ten minutes
    on a CPU; all of it are settings, see 'gmem-gen config'. Inserted concepts are trained on too.
    """
    import gmem_gen

    extra = [f"train.seed={seed}"] * (seed is not None) + [f"train.device={device!r}"] * (device is not None)
    extra += ["data.allow_missing=true"] * allow_missing
    config = _resolved(preset, config_file, (*settings, *extra))
    if dry_run:
        from gmem_gen.trainer import plan

        planned = plan(bank, config, images=images or None)
        click.echo(json.dumps(planned.to_json(), indent=2) if as_json else planned.to_toml(), nl=as_json)
        return
    with (
        gmem_bank.ProgressBar("read", "image", quiet=quiet) as reading,
        gmem_bank.ProgressBar("train", "step", quiet=quiet) as bar,
    ):
        report = gmem_gen.train(
            bank, config, images=images or None, out=out, accept_bank_change=accept_bank_change, handle_signals=True,
            say=lambda text: None if quiet else click.echo(text, err=True),
            read_progress=reading, progress=bar,
        )  # fmt: skip
    if as_json:
        _print(report.to_json())
    else:
        click.echo(_ended(report))
    if report.stopped == "signal":
        raise click.exceptions.Exit(130)


def _ended(report: Any) -> str:
    done = f"{report.run}: step {report.step} of {report.total_steps} ({report.epochs:g} epochs)"
    loss = "" if report.loss is None else f", loss {report.loss:.4f}"
    remarks = {
        "budget": "done",
        "nothing to do": "done already; a larger train.epochs or train.max_steps goes on",
        "time": "stopped at train.max_minutes; a larger one goes on from here",
        "signal": "interrupted; the same command goes on from here",
    }
    return f"{done}{loss}, {report.seconds:.0f} s of training: {remarks[report.stopped]}"


@main.command()
@_bank
@click.option(
    "--checkpoint",
    "-c",
    default=None,
    metavar="RUN",
    help="A run or one of its checkpoints; default: runs/<bank stem>.",
)
@click.option("--concept", default=None, help="Sample this concept's rows.")
@click.option("--key", "keys", multiple=True, help="Sample this row; may be repeated.")
@click.option(
    "--keys-from",
    default=None,
    metavar="FILE",
    help="Sample the rows whose keys stand in FILE, one a line; - is stdin.",
)
@click.option(
    "--num",
    "-n",
    type=click.IntRange(min=1, max=1_000_000),
    default=None,
    help="Samples; default: 16 (fewer where the concept has fewer rows), or one for each key.",
)
@click.option(
    "--per-snippet",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Samples of each row, one after the other.",
)
@click.option("--solver", default="heun", show_default=True, help="euler or heun.")
@click.option(
    "--steps", "num_steps", type=int, default=25, show_default=True, help="Solver steps; heun evaluates twice a step."
)
@click.option(
    "--timestep-shift", type=float, default=1.0, show_default=True, help="Below 1: shorter steps near the noise."
)
@click.option(
    "--guidance", type=float, default=1.0, show_default=True, help="Guidance away from the null snippet; 1: none."
)
@click.option(
    "--guidance-start", type=float, default=0.0, show_default=True, help="Guidance from this time on (0 noise, 1 data)."
)
@click.option("--guidance-end", type=float, default=1.0, show_default=True, help="Guidance up to this time.")
@click.option(
    "--weights", type=click.Choice(["ema", "model"]), default="ema", show_default=True, help="Averaged or last weights."
)
@click.option(
    "--seed",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="Sample i depends on it and i, not on the batch.",
)
@click.option("--batch-size", type=int, default=64, show_default=True, help="Samples computed together.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, …")
@click.option(
    "--output",
    "-o",
    default=None,
    metavar="PNG",
    help="The grid; default: RUN/samples/<what>.png. A JSON goes beside it.",
)
@click.option("--columns", type=click.IntRange(min=1), default=None, help="Images in a row of the grid.")
@click.option("--save-images", default=None, metavar="FOLDER", help="Write every sample as a PNG of its own, too.")
@_json
@_quiet
def sample(
    bank: str, checkpoint: str | None, concept: str | None, keys: tuple[str, ...], keys_from: str | None, num: int | None,
    per_snippet: int, weights: str, device: str, output: str | None, columns: int | None, save_images: str | None,
    as_json: bool, quiet: bool, **drawing: Any,
) -> None:  # fmt: skip
    """Draw samples for rows of a bank: a concept's, given keys', or (with neither) random ones.

    The bank may have been edited since the training: inserted concepts need none.
    """
    from pathlib import Path

    import gmem_gen
    from gmem_gen.conditioning import open_bank
    from gmem_gen.images import require_own, write_samples
    from gmem_gen.run import default_run
    from gmem_gen.runtime import pick_device

    config = gmem_gen.SampleConfig(**drawing)  # solver, steps, shift, guidance, seed, batch size
    opened = open_bank(bank)
    if keys_from is not None:
        keys = (*keys, *_read_keys(keys_from))
    grid = None if output is None else Path(output)
    if grid is not None:
        require_own(grid)  # before minutes go into sampling
    conditions = gmem_gen.choose_conditions(
        opened, concept=concept, keys=keys, num=num, per_snippet=per_snippet, seed=config.seed
    )
    loaded = gmem_gen.load_checkpoint(checkpoint or default_run(bank), weights=weights, device=str(pick_device(device)))
    started = time.perf_counter()
    with gmem_bank.ProgressBar("sample", "image", quiet=quiet) as progress:
        samples = gmem_gen.sample(opened, loaded, conditions, config, progress=progress)
    record = {
        **samples.record,
        "weights": weights,
        "bank_path": bank,
        "seconds": round(time.perf_counter() - started, 2),
    }
    grid = grid or loaded.run / "samples" / f"{conditions.label[:100]}.png"
    folder = None if save_images is None else Path(save_images)
    write_samples(samples.images, record, grid, columns=columns, folder=folder)
    if as_json:
        _print({"grid": str(grid), "images": save_images, **record})
        return
    click.echo(
        f"{grid}: {len(samples.images)} samples of {conditions.label!r}, NFE {samples.nfe}, {record['seconds']} s"
    )


@main.command()
@click.option("--image-size", type=click.IntRange(min=1), default=64, show_default=True, help="Side in pixels.")
@click.option("--dim", type=click.IntRange(min=1), default=768, show_default=True, help="Dimension of a snippet.")
@_json
def models(image_size: int, dim: int, as_json: bool) -> None:
    """List the model sizes with their parameters at an image size."""
    import torch

    import gmem_gen
    from gmem_gen.model import num_parameters

    rows: list[dict[str, Any]] = []
    for name in gmem_gen.MODEL_PRESETS:
        config = gmem_gen.preset(name).model
        with torch.device("meta"):
            model = gmem_gen.Generator(config, gmem_gen.LatentShape(channels=3, size=image_size), dim)
        rows.append({
            "name": name, "width": config.width, "depth": config.depth, "heads": config.num_heads,
            "patch": model.patch_size, "tokens": model.grid**2, "parameters": num_parameters(model),
        })  # fmt: skip
    if as_json:
        _print(rows)
        return
    for row in rows:
        click.echo(
            f"{row['name']:<5} width {row['width']:>4}  depth {row['depth']:>2}  heads {row['heads']:>2}  "
            f"patch {row['patch']}  tokens {row['tokens']:>4}  {row['parameters'] / 1e6:7.2f} M parameters"
        )


@main.command()
@_preset
@_config
@_set
@_json
def config(preset: str, config_file: str | None, settings: tuple[str, ...], as_json: bool) -> None:
    """Print every setting with its value, as TOML that --config reads."""
    resolved = _resolved(preset, config_file, settings)
    if as_json:
        _print(resolved.to_json())
    else:
        click.echo(resolved.to_toml(), nl=False)
