"""gmem-gen encode. Only click is imported here; the command imports the library when it runs."""

from __future__ import annotations

import click

import gmem_bank
from gmem_gen.cli_shared import bank_option, json_option, print_json, quiet_option


@click.command()
@bank_option
@click.option("--tokenizer", "-t", required=True, metavar="NAME", help="sd-vae, taesd, dc-ae, taef2 or va-vae.")
@click.option(
    "--tokenizer-weights",
    "weights",
    default="",
    metavar="PLACE",
    help="A folder or file, or OWNER/NAME on the hub; default: the tokenizer's own repository there (taef2, va-vae: none).",
)
@click.option("--revision", default="", help="Of the hub: a branch, tag or commit; default: the main branch.")
@click.option("--output", "-o", default="latents", show_default=True, metavar="FOLDER", help="The folder to write.")
@click.option(
    "--image-size", type=click.IntRange(1, 4096), default=None,
    help="Side in pixels; default: 256, or the short side of the smallest image where that is smaller.",
)  # fmt: skip
@click.option("--flip", is_flag=True, help="Also the mirrored twin of each image, under its key with '#flip'.")
@click.option(
    "--posterior",
    type=click.Choice(["mean", "sample"]),
    default="mean",
    show_default=True,
    help="Of a variational autoencoder: the mean, or a sample that the image decides.",
)
@click.option(
    "--dtype", type=click.Choice(["f16", "f32", "bf16"]), default="f16", show_default=True, help="How latents are kept."
)
@click.option("--images", multiple=True, metavar="FOLDER", help="Where the images are now; may be repeated.")
@click.option("--allow-missing", is_flag=True, help="Leave out rows whose image is gone.")
@click.option("--overwrite", is_flag=True, help="Replace latents that were made from other images or in another way.")
@click.option(
    "--workers", type=click.IntRange(min=0), default=None, help="Processes that decode images ahead; 0: none."
)
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, …")
@click.option("--batch-size", type=click.IntRange(min=1), default=None, help="Images at a time. [16; 64 on a GPU]")
@json_option
@quiet_option
def encode(
    bank: str, tokenizer: str, weights: str, revision: str, output: str, image_size: int | None, flip: bool, posterior: str,
    dtype: str, images: tuple[str, ...], allow_missing: bool, overwrite: bool, workers: int | None, device: str,
    batch_size: int | None, as_json: bool, quiet: bool,
) -> None:  # fmt: skip
    """Encode the images of a bank into latents, once, for 'gmem-gen train --latents FOLDER'.

    Mean and standard deviation of each channel, over all latents, are kept with them. After a kill or Ctrl-C the same command
    continues.
    """
    import gmem_gen
    from gmem_gen.autoencoders import Weights
    from gmem_gen.runtime import pick_device

    where = Weights(place=weights, revision=revision, posterior=posterior)
    with gmem_bank.usage_errors():
        computing = str(pick_device(device))
    with gmem_bank.ProgressBar("encode", "image", quiet=quiet) as progress:
        report = gmem_gen.encode(
            bank, tokenizer, output, weights=where, image_size=image_size, flip=flip,
            dtype=dtype, images=images or None, allow_missing=allow_missing, batch_size=batch_size, num_workers=workers,
            overwrite=overwrite, device=computing, progress=progress,
        )  # fmt: skip
    if as_json:
        print_json(report.to_json())
        return
    remade = f", of which {report.num_damaged} were damaged and made anew" if report.num_damaged else ""
    shape = " × ".join(map(str, report.shape))
    click.echo(f"{report.output}: {report.num_rows} latents of {shape}, {report.num_shards} shards{remade}")
