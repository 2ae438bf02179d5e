"""The gmem-gen command. Only click is imported here; each command imports the library when it runs."""

from __future__ import annotations

import json
import os
import signal
from typing import Any

import click

import gmem_bank
from gmem_gen.cli_encode import encode
from gmem_gen.cli_evaluate import evaluate
from gmem_gen.cli_sample import sample
from gmem_gen.cli_shared import (
    bank_option,
    config_option,
    json_option,
    preset_option,
    print_json,
    quiet_option,
    set_option,
)
from gmem_gen.cli_weights import export, import_checkpoint


@click.group(cls=gmem_bank.CommandGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(gmem_bank.__version__, prog_name="gmem-gen")
@click.option("--traceback", is_flag=True, help="Show the Python traceback of an error.")
def main(traceback: bool) -> None:
    """Train a thin generator on a memory bank, and sample from it.

    \b
      gmem-gen train --bank bank.safetensors
      gmem-gen sample --bank bank.safetensors --concept NAME
      gmem-gen evaluate --bank bank.safetensors --encoder NAME
    """  # noqa: D301 - click knows a block of lines by its backspace


def _resolved(preset: str, config_file: str | None, settings: tuple[str, ...]) -> Any:
    import gmem_gen

    with gmem_bank.usage_errors():
        config = gmem_gen.preset(preset)
    if config_file is not None:
        config = gmem_gen.load_config(config_file, config)
    with gmem_bank.usage_errors():
        return gmem_gen.apply_settings(config, settings)


@main.command()
@bank_option
@click.option(
    "--images",
    multiple=True,
    metavar="FOLDER",
    help="Folder with the images, where the bank's own record is out of date; may be repeated.",
)
@preset_option
@config_option
@set_option
@click.option("--out", "-o", default=None, metavar="RUN", help="The run's folder; default: runs/<bank stem>.")
@click.option("--seed", type=click.IntRange(min=0), default=None, help="Short for --set train.seed=N.")
@click.option("--device", default=None, help="Short for --set train.device=NAME: auto, cpu, cuda, …")
@click.option("--tokenizer", default=None, metavar="NAME", help="Short for --set data.tokenizer=NAME: what is drawn.")
@click.option(
    "--tokenizer-weights",
    default=None,
    metavar="PLACE",
    help="Short for --set data.tokenizer_weights=PLACE: a folder or file, or OWNER/NAME on the hub.",
)
@click.option(
    "--latents",
    default=None,
    metavar="FOLDER",
    help="Short for --set data.latents=FOLDER: what 'gmem-gen encode' wrote; images are not read.",
)
@click.option(
    "--tokens",
    default=None,
    metavar="FOLDER",
    help="Short for --set data.tokens=FOLDER: what 'gmem-bank tokens' wrote; a projection head learns them (REPA).",
)
@click.option("--allow-missing", is_flag=True, help="Leave out rows whose image or latent is gone.")
@click.option(
    "--accept-bank-change", is_flag=True, help="Go on although the bank was edited since the training stopped."
)
@click.option(
    "--resume-from",
    default="latest",
    show_default=True,
    metavar="WHICH",
    help="latest, previous (the checkpoint before it), or a checkpoint's folder; later checkpoints are set aside.",
)
@click.option("--tensorboard", is_flag=True, help="Also write RUN/tensorboard.")
@click.option("--dry-run", is_flag=True, help="Check bank, images and settings, print the settings, train nothing.")
@json_option
@quiet_option
def train(
    bank: str, images: tuple[str, ...], preset: str, config_file: str | None, settings: tuple[str, ...], out: str | None,
    seed: int | None, device: str | None, tokenizer: str | None, tokenizer_weights: str | None, latents: str | None,
    tokens: str | None, allow_missing: bool, accept_bank_change: bool, resume_from: str, tensorboard: bool, dry_run: bool,
    as_json: bool, quiet: bool,
) -> None:  # fmt: skip
    """Train a generator on the images of a bank. The same command again resumes.

    Pixels at 64 px (less where the images are smaller), a small model, and a budget of epochs bounded to about ten minutes
    on a CPU; all of it are settings, see 'gmem-gen config'. Inserted concepts are trained on too. On several GPUs or
    processes: 'torchrun --nproc-per-node N -m gmem_gen train …', the same training as with one.
    """
    import gmem_gen

    leads = os.environ.get("RANK", "0") == "0"  # of the processes that torchrun starts, one speaks
    quiet = quiet or not leads

    extra = [f"train.seed={seed}"] * (seed is not None) + [f"train.device={device!r}"] * (device is not None)
    places = {"tokenizer": tokenizer, "tokenizer_weights": tokenizer_weights, "latents": latents, "tokens": tokens}
    extra += [f"data.{name}={json.dumps(value)}" for name, value in places.items() if value is not None]
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
            bank, config, images=images or None, out=out, resume_from=resume_from, accept_bank_change=accept_bank_change,
            tensorboard=tensorboard, handle_signals=True, say=lambda text: None if quiet else bar.say(text),
            status=bar.note, read_progress=reading, progress=bar,
        )  # fmt: skip
    if leads and as_json:
        print_json(report.to_json())
    elif leads:
        click.echo(_ended(report))
    if report.stopped == "signal":
        raise click.exceptions.Exit(128 + (report.signal or signal.SIGINT))  # as shells have it


def _ended(report: Any) -> str:
    done = f"{report.run}: step {report.step} of {report.total_steps} ({report.epochs:g} epochs)"
    loss = "" if report.loss is None else f", loss {report.loss:.4f}"
    remarks = {
        "budget": "done",
        "nothing to do": "done already; a larger train.epochs or train.max_steps goes on",
        "time": "stopped at train.max_minutes; a larger one goes on from here",
        "signal": "interrupted; the same command goes on from here",
    }
    best = "" if report.best is None else f", best validation loss {report.best[1]:.4f} at step {report.best[0]}"
    return f"{done}{loss}{best}, {report.seconds:.0f} s of training: {remarks[report.stopped]}"


main.add_command(encode)
main.add_command(sample)
main.add_command(import_checkpoint)
main.add_command(export)
main.add_command(evaluate)


@main.command()
@click.option("--image-size", type=click.IntRange(min=1), default=64, show_default=True, help="Side of what is drawn.")
@click.option("--channels", type=click.IntRange(min=1), default=3, show_default=True, help="Channels of what is drawn.")
@click.option("--dim", type=click.IntRange(min=1), default=768, show_default=True, help="Dimension of a snippet.")
@click.option(
    "--condition",
    type=click.Choice(["memory", "class", "none"]),
    default="memory",
    show_default=True,
    help="A bank's snippets; a label of 1000 classes (preset NAME:class); nothing (NAME:none).",
)
@json_option
def models(image_size: int, channels: int, dim: int, condition: str, as_json: bool) -> None:
    """List the presets with their parameters and the operations of one evaluation for one image.

    A latent of a tokenizer is an image too: 'gmem-gen models --image-size 16 --channels 32' is that of a 256-pixel image.
    """
    from gmem_gen.sizes import describe

    rows, left_out = describe(image_size, channels, dim, condition)
    if as_json:
        print_json(rows)
        return
    for row in rows:
        click.echo(
            f"{row['name']:<19} width {row['width']:>4}  depth {row['depth']:>2}  heads {row['heads']:>2}  "
            f"patch {row['patch']}  tokens {row['tokens']:>5}  {row['parameters'] / 1e6:7.2f} M parameters  "
            f"{row['flops'] / 1e9:9.2f} GFLOPs"
        )
    if left_out:
        click.echo(f"left out, since the patch does not divide {image_size}: {', '.join(left_out)}", err=True)


@main.command()
@preset_option
@config_option
@set_option
@json_option
def config(preset: str, config_file: str | None, settings: tuple[str, ...], as_json: bool) -> None:
    """Print every setting with its value, as TOML that --config reads."""
    resolved = _resolved(preset, config_file, settings)
    if as_json:
        print_json(resolved.to_json())
    else:
        click.echo(resolved.to_toml(), nl=False)
