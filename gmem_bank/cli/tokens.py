"""gmem-bank tokens."""

from __future__ import annotations

from typing import Any

import click

from gmem_bank.console import (
    bank_argument,
    encoder_run_options,
    json_option,
    print_json,
    quiet_option,
    usage_errors,
    workers_option,
)


@click.command()
@bank_argument
@click.option(
    "--output", "-o", default="tokens", show_default=True, metavar="FOLDER", help="The folder of shards to write."
)
@click.option(
    "--dtype",
    type=click.Choice(["f16", "f32", "bf16"]),
    default="f16",
    show_default=True,
    help="How tokens are stored.",
)
@click.option("--flip", is_flag=True, help="Also the mirrored twin of each image, under its key with '#flip'.")
@click.option("--images", multiple=True, metavar="FOLDER", help="Where the images are now; may be repeated.")
@click.option(
    "--weights", default=None, metavar="FOLDER", help="The encoder's weights, where the recorded place is gone."
)
@click.option("--overwrite", is_flag=True, help="Replace shards that were made from other rows or in another way.")
@workers_option
@encoder_run_options
@json_option
@quiet_option
def tokens(
    bank: str, output: str, dtype: str, flip: bool, images: tuple[str, ...], weights: str | None, overwrite: bool,
    workers: int | None, device: str, batch_size: Any, as_json: bool, quiet: bool,
) -> None:  # fmt: skip
    """Write the patch tokens of the images of BANK as shards by key, for losses such as REPA.

    After a kill or Ctrl-C the same command continues.
    """
    import gmem_bank
    from gmem_bank.progress import ProgressBar

    opened = gmem_bank.open(bank)
    with usage_errors():
        encoder = gmem_bank.reload_encoder(opened.encoder, opened.folder, weights=weights, device=device)
    with ProgressBar("encode", "image", quiet=quiet) as progress:
        report = gmem_bank.write_tokens(
            opened, encoder, output, dtype=dtype, flip=flip, images=images or None, batch_size=batch_size, num_workers=workers,
            overwrite=overwrite, progress=progress,
        )  # fmt: skip
    if as_json:
        print_json(report.to_json())
        return
    remade = f", of which {report.num_damaged} were damaged and made anew" if report.num_damaged else ""
    num_tokens, dim = report.shape
    click.echo(
        f"{report.output}: {report.num_rows} images × {num_tokens} tokens × {dim}, {report.num_shards} shards{remade}"
    )
