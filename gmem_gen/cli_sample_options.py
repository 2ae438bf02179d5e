"""The options of gmem-gen sample, in groups."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import click

Option = Callable[[Any], Any]
Command = TypeVar("Command", bound=Callable[..., Any])


CONDITIONS: tuple[Option, ...] = (
     click.option(
         "--concept", "concepts", multiple=True, metavar="NAME",
         help="Rows of this concept; repeated: of all of them.",
     ),
     click.option("--key", "keys", multiple=True, metavar="KEY", help="This row; may be repeated."),
     click.option(
         "--keys-from", default=None, metavar="FILE", help="Rows whose keys stand in FILE, one a line; - is stdin."
     ),
     click.option(
         "--image", "images", multiple=True, metavar="FILE",
         help="An image (or a folder of them), encoded on the spot by the bank's own encoder; may be repeated.",
     ),
     click.option(
         "--text", "texts", multiple=True, metavar="WORDS",
         help="A text, for banks of CLIP and SigLIP 2; may be repeated.",
     ),
     click.option(
         "--interpolate", nargs=2, default=None, metavar="FIRST SECOND",
         help="The way between two keys, concepts (their means) or image files, both ends included.",
     ),
     click.option(
         "--frames", type=click.IntRange(min=2), default=None,
         help="--interpolate: pictures of the way. Without it --steps counts them, as in 'gmem-bank interpolate'. [8]",
     ),
     click.option(
         "--interpolation", type=click.Choice(["linear", "slerp", "concat", "mask"]), default=None,
         help="--interpolate: how it goes; --method with one of these words says the same. [slerp]",
     ),
     click.option(
         "--compose", "sums", multiple=True, metavar="TERMS",
         help="A weighted sum, such as \"cat + 0.5*neon - dog\", of keys, concepts or image files; may be repeated.",
     ),
     click.option(
         "--encoder-weights", default=None, metavar="FOLDER",
         help="The encoder's weights for images and texts, where the recorded place is gone.",
     ),
     click.option(
         "--num", "-n", type=click.IntRange(min=1, max=10_000_000), default=None,
         help="Samples; default: 16 of a concept or at random (fewer where there are fewer rows), else one each.",
     ),
     click.option(
         "--per-snippet", type=click.IntRange(min=1), default=1, show_default=True,
         help="Samples of each snippet, one after the other.",
     ),
     click.option(
         "--same-noise", is_flag=True,
         help="Every snippet begins from the same noise, so that only the snippet differs.",
     ),
)  # fmt: skip
DRAWING: tuple[Option, ...] = (
     click.option(
         "--method", default=None,
         help="ODE: euler, heun, midpoint, heun3, rk4, dopri5; SDE: sde-euler, sde-heun. "
         "[default: the run's sample.method: heun]",
     ),
     click.option("--solver", default=None, help="The same as --method."),
     click.option(
         "--steps", "num_steps", type=int, default=None,
         help="Steps, an SDE's last one counted; heun evaluates twice a step. [25]",
     ),
     click.option("--solver-steps", type=int, default=None, help="The same as --steps, also with --interpolate."),
     click.option(
         "--shift", "--timestep-shift", "timestep_shift", type=float, default=None,
         help="ODE: below 1: shorter steps near the noise. [1]",
     ),
     click.option(
         "--diffusion", default=None,
         help="SDE: its noise over time: constant, SBDM, sigma, linear, decreasing, … [linear]",
     ),
     click.option("--diffusion-norm", type=float, default=None, help="SDE: factor on its noise. [1]"),
     click.option("--last-step", default=None, help="SDE: mean, tweedie, euler or none. [mean]"),
     click.option("--last-step-size", type=float, default=None, help="SDE: length of the last step. [0.004]"),
     click.option("--guidance", type=float, default=None, help="Guidance away from the null snippet; 1: none. [1]"),
     click.option(
         "--guidance-interval", type=float, nargs=2, default=None, metavar="START END",
         help="Guidance between these times only (0 noise, 1 data); published: 0.89 1. [0 1]",
     ),
     click.option("--precision", default=None, help="What the network computes in: fp32, bf16 or fp16. [fp32]"),
     click.option(
         "--weights", default="ema", show_default=True,
         help="Averaged weights, by the first train.ema_decay; ema-0.999: by that one; model: the last ones.",
     ),
     click.option(
         "--seed", type=click.IntRange(min=0), default=None,
         help="Sample i depends on it and i, not on the batch. [0]",
     ),
     click.option("--batch-size", type=int, default=None, help="Samples computed together. [64]"),
     click.option(
         "--tokenizer-weights", default=None, metavar="FOLDER",
         help="The tokenizer's weights, where the recorded place is gone.",
     ),
)  # fmt: skip
OUTPUTS: tuple[Option, ...] = (
     click.option(
         "--output", "-o", default=None, metavar="PNG",
         help="The grid; default: RUN/samples/<what>.png. A JSON goes beside it.",
     ),
     click.option("--columns", type=click.IntRange(min=1), default=None, help="Images in a row of the grid."),
     click.option(
         "--save-images", default=None, metavar="FOLDER",
         help="Every sample as a PNG of its own; the same command goes on where it stopped.",
     ),
     click.option(
         "--npz", default=None, metavar="FILE",
         help="All samples as arr_0 (N, H, W, C) uint8, with labels as arr_1 where each has a concept; goes on likewise.",
     ),
     click.option(
         "--overwrite", is_flag=True, help="Replace samples made otherwise in that folder or file of ours."
     ),
     click.option(
         "--num-shards", type=click.IntRange(min=1), default=1, show_default=True,
         help="Processes that fill one folder or .npz together …",
     ),
     click.option(
         "--shard", type=click.IntRange(min=0), default=0, show_default=True, help="… and which this is, from 0."
     ),
)  # fmt: skip


def _all(options: Sequence[Option], command: Command) -> Command:
    for option in reversed(options):
        command = option(command)
    return command


def condition_options(command: Command) -> Command:
    """Add what samples are drawn from, and how many."""
    return _all(CONDITIONS, command)


def drawing_options(command: Command) -> Command:
    """Add how samples are drawn: fields of SampleConfig."""
    return _all(DRAWING, command)


def output_options(command: Command) -> Command:
    """Add where samples go."""
    return _all(OUTPUTS, command)
