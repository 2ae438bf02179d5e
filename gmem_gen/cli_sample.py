"""gmem-gen sample. Only click is imported here; the command imports the library when it runs."""

from __future__ import annotations

import time
from typing import Any

import click

import gmem_bank
from gmem_gen.cli_shared import bank_option, json_option, print_json, quiet_option, set_option


def _sample_settings(config: Any, given: dict[str, Any], settings: tuple[str, ...]) -> Any:
    """Return the run's sample settings with those of the command line over them."""
    import gmem_gen

    for setting in settings:
        if not setting.strip().startswith("sample."):
            raise click.UsageError(f"--set {setting}: sampling takes settings of the section 'sample' only")
    words = [*settings, *(f"sample.{name}={value}" for name, value in given.items())]
    return gmem_gen.apply_settings(config, words).sample


def _read_keys(path: str) -> list[str]:
    try:
        with click.open_file(path, encoding="utf-8") as lines:
            keys = [line.rstrip("\n") for line in lines if line.strip()]
    except UnicodeDecodeError as error:
        raise click.UsageError(f"--keys-from {path}: not a text of keys, one a line ({error.reason})") from error
    if not keys:
        raise click.UsageError(f"--keys-from {path}: there is no key in it")
    return keys


@click.command()
@bank_option
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
@click.option(
    "--method",
    "--solver",
    default=None,
    help="ODE: euler, heun, midpoint, heun3, rk4, dopri5; SDE: sde-euler, sde-heun. [default: the run's sample.method: heun]",
)
@click.option(
    "--steps",
    "num_steps",
    type=int,
    default=None,
    help="Steps, an SDE's last one counted; heun evaluates twice a step. [25]",
)
@click.option(
    "--shift",
    "--timestep-shift",
    "timestep_shift",
    type=float,
    default=None,
    help="ODE: below 1: shorter steps near the noise. [1]",
)
@click.option(
    "--diffusion", default=None, help="SDE: its noise over time: constant, SBDM, sigma, linear, decreasing, … [linear]"
)
@click.option("--diffusion-norm", type=float, default=None, help="SDE: factor on its noise. [1]")
@click.option("--last-step", default=None, help="SDE: mean, tweedie, euler or none. [mean]")
@click.option("--last-step-size", type=float, default=None, help="SDE: length of the last step. [0.004]")
@click.option("--guidance", type=float, default=None, help="Guidance away from the null snippet; 1: none. [1]")
@click.option(
    "--guidance-interval",
    type=float,
    nargs=2,
    default=None,
    metavar="START END",
    help="Guidance between these times only (0 noise, 1 data); published: 0.89 1. [0 1]",
)
@click.option(
    "--weights", type=click.Choice(["ema", "model"]), default="ema", show_default=True, help="Averaged or last weights."
)
@click.option(
    "--seed", type=click.IntRange(min=0), default=None, help="Sample i depends on it and i, not on the batch. [0]"
)
@click.option("--batch-size", type=int, default=None, help="Samples computed together. [64]")
@set_option
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
@json_option
@quiet_option
def sample(
    bank: str, checkpoint: str | None, concept: str | None, keys: tuple[str, ...], keys_from: str | None, num: int | None,
    per_snippet: int, weights: str, device: str, output: str | None, columns: int | None, save_images: str | None,
    settings: tuple[str, ...], as_json: bool, quiet: bool, **drawing: Any,
) -> None:  # fmt: skip
    """Draw samples for rows of a bank: a concept's, given keys', or (with neither) random ones.

    The bank may have been edited since the training: inserted concepts need none. What is not given here is as the run's
    sample settings say ('gmem-gen config' lists them; in brackets what they are where nothing was set).
    """
    from pathlib import Path

    import gmem_gen
    from gmem_gen.conditioning import open_bank
    from gmem_gen.images import require_own, write_samples
    from gmem_gen.run import default_run
    from gmem_gen.runtime import pick_device

    given = {name: value for name, value in drawing.items() if value is not None}
    if "guidance_interval" in given:
        given["guidance_start"], given["guidance_end"] = given.pop("guidance_interval")
    gmem_gen.SampleConfig(**given)  # wrong values are told before anything is opened
    opened = open_bank(bank)
    if keys_from is not None:
        keys = (*keys, *_read_keys(keys_from))
    grid = None if output is None else Path(output)
    if grid is not None:
        require_own(grid)  # before minutes go into sampling
    loaded = gmem_gen.load_checkpoint(checkpoint or default_run(bank), weights=weights, device=str(pick_device(device)))
    config = _sample_settings(loaded.config, given, settings)
    conditions = gmem_gen.choose_conditions(
        opened, concept=concept, keys=keys, num=num, per_snippet=per_snippet, seed=config.seed
    )
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
        print_json({"grid": str(grid), "images": save_images, **record})
        return
    click.echo(
        f"{grid}: {len(samples.images)} samples of {conditions.label!r}, NFE {samples.nfe}, {record['seconds']} s"
    )
