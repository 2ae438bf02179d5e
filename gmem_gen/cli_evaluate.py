"""gmem-gen evaluate. Only click is imported here; the command imports the library when it runs."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

import gmem_bank
from gmem_gen.cli_shared import json_option, print_json, quiet_option

DEFAULT = "dinov2"
"""The judge where only its weights are given."""
EMBEDDINGS = ".embeddings"
"""In a run: those of real images, which all evaluations of its checkpoints share."""
OF_DRAWING = {"checkpoint": "--checkpoint", "concepts": "--concept", "checkpoint_weights": "--checkpoint-weights"}
OF_BANK = {"images": "--images", "bank_weights": "--bank-weights", "near_copy": "--near-copy"}
"""What says nothing with --samples, and what says nothing without a bank: names of parameters and options."""


@click.command()
@click.option(
    "--bank", "-b", default=None, metavar="BANK", help="The generator's bank. [bank.safetensors; with --samples none]"
)
@click.option("--checkpoint", "-c", default=None, metavar="RUN", help="Sample this run. [runs/<bank stem>]")
@click.option("--samples", default=None, metavar="SOURCE", help="Judge these images instead: a folder, a .npz, …")
@click.option("--num", "-n", type=int, default=None,
              help="Samples to draw, or of --samples at most; at least 50. [500; all of --samples]")  # fmt: skip
@click.option("--concept", "concepts", multiple=True, help="Draw this concept; may be repeated. Default: all rows.")
@click.option("--encoder", "-e", default=None, metavar="NAME",
              help="The judge, see 'gmem-bank encoders'. [that of a bank as reference; else dinov2]")  # fmt: skip
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
@click.option("--manifold-neighbours", type=int, default=None,
              help="Of precision and recall, where it is another: 3 as published. [as --neighbours]")  # fmt: skip
@click.option("--kid-subset-size", type=int, default=None,
              help="Rows of a subset of KID. [half of the smaller set, at most 1000]")  # fmt: skip
@click.option("--kid-subsets", type=int, default=None, help="Subsets of KID. [100]")
@click.option("--votes", type=int, default=None, help="Neighbours that vote on a concept. [10]")
@click.option(
    "--near-copy", type=float, default=None, metavar="DISTANCE",
    help="Cosine distance of a near-copy. [below which 1 % of training images lie to their nearest other]",
)  # fmt: skip
@click.option(
    "--no-memorisation", is_flag=True, help="Look for no copies, for which all images of the bank are embedded."
)
@click.option("--num-real", type=int, default=None, help="Rows of the reference at most, drawn by the seed. [all]")
@click.option("--own-size", is_flag=True, help="Embed real images at their own size, not at that of the samples.")
@click.option("--grey/--colour", default=None,
              help="Make real images grey before they are embedded, or not. [grey where samples have one channel]")  # fmt: skip
@click.option("--bootstrap", "num_resamples", type=int, default=None, help="Resamples of intervals; 0: none. [100]")
@click.option("--checkpoint-weights", default=None, metavar="NAME", help="ema, model or ema-<decay>. [ema]")
@click.option("--seed", type=int, default=None, help="Of the choice of rows, subsets and resamples. [0]")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, …")
@click.option(
    "--out", "-o", default=None, metavar="FOLDER",
    help="For report.json, report.html and the samples. [RUN/evaluation; RUN/evaluation-STEP for one of its checkpoints; else "
    "evaluation]",
)  # fmt: skip
@click.option("--cache", default=None, metavar="FOLDER",
              help="For embeddings of real images; may be deleted. [RUN/.embeddings; else in --out]")  # fmt: skip
@json_option
@quiet_option
def evaluate(as_json: bool, quiet: bool, **given: Any) -> None:
    """Judge a generator: distances to real images, memorisation, concepts and snippets, in the space of any encoder.

    Samples and real images are embedded by --encoder. It should be another encoder than the bank's, which the generator
    learned to satisfy. --reference is held-out images, or a bank built with the judge, whose rows are taken as they are;
    without it the training images. The same command again takes up where it was interrupted.
    """
    import gmem_gen

    asked = _Asked(**given)
    folder, cache = asked.places()
    with contextlib.ExitStack() as bars:
        report = gmem_gen.evaluate(
            asked.bank, asked.judge(), checkpoint=asked.run, samples=asked.samples, reference=asked.reference,
            images=asked.images or None, concepts=asked.concepts, options=asked.options(), sampling=asked.sampling(),
            weights=asked.checkpoint_weights or "ema", load_own=asked.load, device=asked.device, out=folder, cache=cache,
            watch=lambda stage: bars.enter_context(gmem_bank.ProgressBar(stage, _unit(stage), quiet=quiet)),
            say=lambda text: click.echo(f"note: {text}", err=True),
        )  # fmt: skip
    page = gmem_gen.write_report(report, folder)[1]
    for remark in report.remarks:
        click.echo(f"note: {remark}", err=True)
    if as_json:
        print_json(report.to_json())
        return
    click.echo("\n".join([*report.lines(), str(page)]))


def _unit(stage: str) -> str:
    return "figure" if stage == "compare" else "image"


class _Asked:
    """The command line, looked at together."""

    def __init__(
        self, *, bank: str | None, checkpoint: str | None, samples: str | None, concepts: tuple[str, ...], encoder: str | None,
        weights: str | None, bank_weights: str | None, pairs: tuple[str, ...], reference: str | None, images: tuple[str, ...],
        checkpoint_weights: str | None, device: str, out: str | None, cache: str | None, no_memorisation: bool, own_size: bool,
        **judging: Any,
    ) -> None:  # fmt: skip
        self.samples, self.concepts, self.encoder, self.weights = samples, concepts, encoder, weights
        self.bank_weights, self.reference, self.images, self.device = bank_weights, reference, images, device
        self.checkpoint_weights, self._out, self._cache = checkpoint_weights, out, cache
        self.bank = bank if samples is not None else bank or "bank.safetensors"
        self._judging = {"memorisation": not no_memorisation, "match_size": not own_size, **judging}
        self._settings = [pair for pair in pairs if pair.startswith("sample.")]
        self._parameters = gmem_bank.parse_parameters(tuple(pair for pair in pairs if pair not in self._settings))
        self._refuse(checkpoint)
        self.run = _run(self.bank, checkpoint) if samples is None and self.bank is not None else None

    def _refuse(self, checkpoint: str | None) -> None:
        """Raise UsageError for an option that would say nothing beside the others."""
        given = {**vars(self), **self._judging, "checkpoint": checkpoint}
        if self.samples is not None:
            _refuse_all(OF_DRAWING, given, "--samples are there already")
            if self._settings:
                raise click.UsageError(f"--set {self._settings[0]}: nothing is drawn with --samples")
        if self.bank is None:
            if self.reference is None:
                raise click.UsageError("--samples without --bank need a --reference to be compared with")
            _refuse_all(OF_BANK, given, "it is about a bank, and --samples have none without --bank")

    def options(self) -> Any:
        """Return how to judge."""
        import gmem_gen

        given = {name: value for name, value in self._judging.items() if value is not None}
        if self.samples is not None and "num" in given:
            given["num_given"] = given.pop("num")
        with gmem_bank.usage_errors():
            found = gmem_gen.EvaluationOptions(**given)
        most = max(found.neighbours, found.manifold_neighbours or 0)
        if self.samples is None and most >= found.num:
            raise click.UsageError(f"{most} neighbours need more samples than --num {found.num}")
        return found

    def judge(self) -> gmem_bank.Encoder | None:
        """Return the encoder that is named; None where the library has to choose."""
        by_bank = self.reference is not None and gmem_bank.is_bank_path(self.reference)
        name = self.encoder or (DEFAULT if self.weights is not None and not by_bank else None)
        if name is None:
            if self._parameters:
                first = next(iter(self._parameters))
                raise click.UsageError(f"--set {first}: it is a setting of --encoder, which is not given")
            return None
        with gmem_bank.usage_errors():
            return gmem_bank.load_encoder(
                name, weights=self.weights, device=self.device, space=self._judging["space"] or "raw",
                parameters=self._parameters,
            )  # fmt: skip

    def load(self, made: gmem_bank.MemoryBank) -> gmem_bank.Encoder:
        """Return the encoder that made a bank, the generator's or the reference."""
        ours = self.bank is not None and made.path.resolve() == Path(self.bank).resolve()
        where = self.bank_weights if ours else self.weights
        return gmem_bank.reload_encoder(made.encoder, made.folder, weights=where, device=self.device)

    def sampling(self) -> Any:
        """Return what puts the settings of the command line over a run's; None: there are none."""
        import gmem_gen

        def over(config: gmem_gen.Config) -> gmem_gen.SampleConfig:
            with gmem_bank.usage_errors():
                return gmem_gen.apply_settings(config, self._settings).sample

        return over if self._settings else None

    def places(self) -> tuple[str | Path, str | Path | None]:
        """Return where the report goes, and embeddings of real images; None: where the report goes."""
        run = None if self.run is None else Path(self.run)
        out, cache = Path("evaluation"), None
        if run is not None and run.parent.name == "checkpoints":
            run, name = run.parent.parent, f"evaluation-{run.name}"
            out, cache = run / name, run / EMBEDDINGS
        elif run is not None and (run / gmem_bank.RUN_MARKER).is_file():
            out, cache = run / "evaluation", run / EMBEDDINGS
        return self._out or out, self._cache or cache


def _refuse_all(options: Mapping[str, str], given: Mapping[str, Any], why: str) -> None:
    for name, option in options.items():
        if given[name] not in (None, ()):
            raise click.UsageError(f"{option}: {why}")


def _run(bank: str, checkpoint: str | None) -> str:
    from gmem_gen.run import default_run

    return checkpoint or str(default_run(bank))
