"""gmem-gen evaluate. Only click is imported here; the command imports the library when it runs."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import click

import gmem_bank
from gmem_gen.cli_shared import json_option, print_json, quiet_option


@click.command()
@click.option(
    "--bank", "-b", default=None, metavar="BANK", help="The generator's bank. [bank.safetensors; with --samples none]"
)
@click.option("--checkpoint", "-c", default=None, metavar="RUN", help="Sample this run. [runs/<bank stem>]")
@click.option("--samples", default=None, metavar="SOURCE", help="Judge these images instead: a folder, a .npz, …")
@click.option("--num", "-n", type=int, default=None, help="Samples to draw; at least 50. [500]")
@click.option("--concept", "concepts", multiple=True, help="Draw this concept; may be repeated. Default: all rows.")
@click.option("--encoder", "-e", default=None, metavar="NAME", help="The judge, see 'gmem-bank encoders'.")
@click.option("--weights", default=None, metavar="FOLDER", help="The judge's weights.")
@click.option("--bank-weights", default=None, metavar="FOLDER", help="Weights of the bank's encoder, if they moved.")
@click.option(
    "--set", "pairs", multiple=True, metavar="NAME=VALUE", help="Of the judge, or sample.FIELD; may be repeated."
)
@click.option("--reference", "-r", default=None, metavar="SOURCE", help="Real images, or a bank of the judge.")
@click.option("--images", multiple=True, metavar="FOLDER", help="Where the bank's images are, if they moved.")
@click.option(
    "--space", type=click.Choice(["raw", "unit"]), default=None, help="Of the features. [raw; the reference bank's own]"
)
@click.option("--neighbours", "-k", type=int, default=None, help="Of precision, recall, density and coverage. [5]")
@click.option("--votes", type=int, default=None, help="Neighbours that vote on a concept. [10]")
@click.option(
    "--near-copy", type=float, default=None, metavar="DISTANCE",
    help="Cosine distance of a near-copy. [below which 1 % of training images lie to their nearest other]",
)  # fmt: skip
@click.option("--num-real", type=int, default=None, help="Real images of each kind at most, drawn by the seed. [all]")
@click.option("--own-size", is_flag=True, help="Embed real images at their own size, not at that of the samples.")
@click.option("--bootstrap", "num_resamples", type=int, default=None, help="Resamples of intervals; 0: none. [100]")
@click.option(
    "--checkpoint-weights", default="ema", show_default=True, metavar="NAME", help="ema, model or ema-<decay>."
)
@click.option("--seed", type=int, default=None, help="Of the choice of rows, subsets and resamples. [0]")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, …")
@click.option(
    "--out", "-o", default=None, metavar="FOLDER", help="For report.json, report.html and the samples. [RUN/evaluation]"
)
@json_option
@quiet_option
def evaluate(
    bank: str | None, checkpoint: str | None, samples: str | None, concepts: tuple[str, ...], encoder: str | None,
    weights: str | None, bank_weights: str | None, pairs: tuple[str, ...], reference: str | None, images: tuple[str, ...],
    own_size: bool, checkpoint_weights: str, device: str, out: str | None, as_json: bool, quiet: bool, **judging: Any,
) -> None:  # fmt: skip
    """Judge a generator: distances to real images, memorisation, concepts and snippets, in the space of any encoder.

    Samples and real images are embedded by --encoder. It should be another encoder than the bank's, which the generator
    learned to satisfy. --reference is held-out images, or a bank built with the judge, whose rows are taken as they are;
    without it the training images. The same command again takes up where it was interrupted.
    """
    import gmem_gen

    if samples is None or bank is not None:
        bank = bank or "bank.safetensors"
    if samples is not None and (checkpoint or concepts or judging["num"]):
        raise click.UsageError("--samples are there already: leave --checkpoint, --concept and --num out")
    settings = [pair for pair in pairs if pair.startswith("sample.")]
    parameters = gmem_bank.parse_parameters(tuple(pair for pair in pairs if pair not in settings))
    given = {name: value for name, value in judging.items() if value is not None}
    with gmem_bank.usage_errors():
        options = gmem_gen.EvaluationOptions(**given, match_size=not own_size)
    run = _run(bank, checkpoint) if samples is None and bank is not None else None
    judge = None
    if encoder is not None:
        with gmem_bank.usage_errors():
            judge = gmem_bank.load_encoder(
                encoder, weights=weights, device=device, space=options.space or "raw", parameters=parameters
            )
    elif parameters:
        raise click.UsageError(f"--set {next(iter(parameters))}: it is a setting of --encoder, which is not given")
    sampling = _sampling(run, settings) if settings else None
    folder = out or _folder(run)

    def load(made: gmem_bank.MemoryBank) -> gmem_bank.Encoder:
        ours = bank is not None and made.path.resolve() == Path(bank).resolve()
        where = bank_weights if ours else weights
        return gmem_bank.reload_encoder(made.encoder, made.folder, weights=where, device=device)

    with contextlib.ExitStack() as bars:
        report = gmem_gen.evaluate(
            bank, judge, checkpoint=run, samples=samples, reference=reference, images=images or None, concepts=concepts,
            options=options, sampling=sampling, weights=checkpoint_weights, load_own=load, device=device, out=folder,
            watch=lambda stage: bars.enter_context(gmem_bank.ProgressBar(stage, "image", quiet=quiet)),
        )  # fmt: skip
    page = gmem_gen.write_report(report, folder)[1]
    for remark in report.remarks:
        click.echo(f"note: {remark}", err=True)
    if as_json:
        print_json(report.to_json())
        return
    click.echo("\n".join([*report.lines(), str(page)]))


def _run(bank: str, checkpoint: str | None) -> str:
    from gmem_gen.run import default_run

    return checkpoint or str(default_run(bank))


def _folder(run: str | None) -> Path:
    """Return where a report goes by default: into the run, also where one of its checkpoints is named."""
    where = None if run is None else Path(run)
    if where is not None and where.parent.name == "checkpoints":
        return where.parent.parent / f"evaluation-{where.name}"
    return Path("evaluation") if where is None or not (where / gmem_bank.RUN_MARKER).is_file() else where / "evaluation"


def _sampling(run: str | None, settings: list[str]) -> Any:
    """Return the run's sample settings with those of the command line over them."""
    import gmem_gen

    if run is None:
        raise click.UsageError(f"--set {settings[0]}: nothing is drawn with --samples")
    config = gmem_gen.load_checkpoint(run).config
    with gmem_bank.usage_errors():
        return gmem_gen.apply_settings(config, settings).sample
