"""gmem-gen import-checkpoint and export. Only click is imported here; the commands import the library when they run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

import gmem_bank
from gmem_gen.cli_shared import json_option, print_json, set_option


@click.command("import-checkpoint")
@click.argument("file", type=click.Path())
@click.option("--out", "-o", default=None, metavar="RUN", help="The run's folder, new or empty. [runs/<FILE's stem>]")
@click.option("--bank", "-b", default=None, metavar="BANK", help="A bank of the snippets that it was trained on; or:")
@click.option("--encoder", "-e", default=None, metavar="NAME", help="Their encoder. [neither: dinov2, as published]")
@click.option("--encoder-weights", default=None, metavar="FOLDER", help="The encoder's weights.")
@click.option(
    "--encoder-set",
    "encoder_settings",
    multiple=True,
    metavar="NAME=VALUE",
    help="A setting of the encoder; may be repeated.",
)
@click.option(
    "--space", type=click.Choice(["unit", "raw"]), default="unit", show_default=True, help="Of --encoder's snippets."
)
@click.option(
    "--tokenizer",
    default="",
    metavar="NAME",
    help="What turns its latents into pixels. [by channels: 3 pixels, 4 sd-vae, 32 va-vae]",
)
@click.option(
    "--tokenizer-weights",
    default="",
    metavar="PLACE",
    help="The tokenizer's weights; without them 'sample' wants them.",
)
@click.option(
    "--latent-stats", default=None, type=click.Path(), metavar="FILE",
    help="Mean and standard deviation of its latents' channels: the published latents_stats.pt. [0 and 1]",
)  # fmt: skip
@click.option(
    "--num-heads", type=click.IntRange(min=1), default=None, help="Attention heads, where the file does not tell."
)
@set_option
@json_option
def import_checkpoint(
    file: str, out: str | None, bank: str | None, encoder: str | None, encoder_weights: str | None,
    encoder_settings: tuple[str, ...], space: str, tokenizer: str, tokenizer_weights: str, latent_stats: str | None,
    num_heads: int | None, settings: tuple[str, ...], as_json: bool,
) -> None:  # fmt: skip
    """Make a run of FILE, a published checkpoint (.pt or .safetensors): 'sample' and 'train' take it as one of ours.

    The architecture is read off the tensors. Nothing in FILE is executed. What FILE does not say, which snippets it was
    trained on and what turns its latents into pixels, is given here.
    """
    import gmem_gen

    spec = None
    if encoder is not None:
        with gmem_bank.usage_errors():
            loaded = gmem_bank.load_encoder(
                encoder, weights=encoder_weights, space=space, parameters=gmem_bank.parse_parameters(encoder_settings)
            )
        spec = loaded.spec
    report = gmem_gen.import_checkpoint(
        file, out or Path("runs") / Path(file).stem,
        memory=gmem_gen.Memory(bank=bank, encoder=spec), num_heads=num_heads or 0, settings=settings,
        latents=gmem_gen.LatentSource(
            tokenizer=tokenizer, weights=tokenizer_weights, stats=None if latent_stats is None else Path(latent_stats)
        ),
    )  # fmt: skip
    if as_json:
        print_json(report.to_json())
        return
    for remark in report.remarks:
        click.echo(remark, err=True)
    model, latent = report.model, report.latent
    click.echo(
        f"{report.checkpoint}: {' and '.join(report.parts)}, {report.num_tensors} tensors, "
        f"{report.num_parameters / 1e6:.2f} M numbers\n"
        f"  width {model['width']}, depth {model['depth']}, {model['num_heads']} heads, patch {model['patch_size']}, "
        f"latents of {latent['channels']}×{latent['size']}×{latent['size']} by {report.tokenizer['name']}, "
        f"snippets of {report.memory['encoder']}"
    )


@click.command()
@click.option(
    "--checkpoint", "-c", default="runs/bank", show_default=True, metavar="RUN", help="A run or one of its checkpoints."
)
@click.option(
    "--to", "target", type=click.Choice(["diffusers", "official"]), default="diffusers", show_default=True,
    help="diffusers: a folder with config.json, safetensors and a model card; official: the published names in one .safetensors.",
)  # fmt: skip
@click.option("--output", "-o", required=True, metavar="PLACE", help="The folder, or the .safetensors.")
@click.option(
    "--weights", default=None, metavar="NAME",
    help="ema, model or ema-<decay>; official: also both. [ema; official: both]",
)  # fmt: skip
@click.option("--license", "licence", default="", metavar="ID", help="For the model card, such as mit or cc-by-nc-4.0.")
@click.option("--name", default="", help="The model's name, for the card; default: the run's.")
@json_option
def export(
    checkpoint: str, target: str, output: str, weights: str | None, licence: str, name: str, as_json: bool
) -> None:
    """Write a generator to share: a folder as diffusers has it, or the tensors of the published code."""
    import gmem_gen

    report: dict[str, Any]
    if target == "official":
        parts = ("model", "ema") if weights in (None, "both") else (str(weights),)
        report = gmem_gen.export_official(checkpoint, output, parts=parts)
    else:
        loaded = gmem_gen.load_checkpoint(checkpoint, weights=weights or "ema")
        report = gmem_gen.export_folder(loaded, output, weights=weights or "ema", licence=licence, name=name)
    if as_json:
        print_json(report)
        return
    if target == "official":
        click.echo(f"{report['output']}: {report['num_tensors']} tensors each of {' and '.join(report['parts'])}")
        click.echo(f"its transport: path_type {report['path_type']}, prediction {report['prediction']}")
        click.echo(f"a .pt of it: {report['to_pt']}")
        for remark in report["remarks"]:
            click.echo(remark, err=True)
        return
    click.echo(f"{report['output']}: {report['weights']} weights of step {report['step']}, with a model card")
