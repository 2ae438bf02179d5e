"""gmem-bank import, export and plot."""

from __future__ import annotations

from typing import Any

import click

from gmem_bank.cli.options import print_edit
from gmem_bank.console import bank_argument, device_option, json_option, print_json, quiet_option


@click.command("import")
@click.argument("source", type=click.Path())
@click.option(
    "--output", "-o", "--bank", default="bank.safetensors", show_default=True, metavar="FILE", help="The bank to write."
)
@click.option(
    "--space", type=click.Choice(["raw", "unit"]), default=None,
    help="raw: values as they are; unit: normalised on read, as the official code does later. Default: the encoder's, else raw.",
)  # fmt: skip
@click.option(
    "--dtype",
    type=click.Choice(["f32", "f16", "bf16", "i8"]),
    default="f32",
    show_default=True,
    help="How it is stored.",
)
@click.option("--prefix", default=None, help="Keys are PREFIX/<number>; default: the file's name.")
@click.option(
    "--encoder", "-e", default=None, metavar="NAME",
    help="The encoder that made it, which the file does not say: then concepts can be inserted.",
)  # fmt: skip
@click.option("--weights", default=None, metavar="FOLDER", help="Folder with that encoder's weights.")
@click.option("--overwrite", is_flag=True, help="Replace FILE where it exists.")
@device_option
@json_option
def import_(
    source: str, output: str, space: Any, dtype: str, prefix: str | None, encoder: str | None, weights: str | None,
    overwrite: bool, device: str, as_json: bool,
) -> None:  # fmt: skip
    """Make a bank of the official GMem file SOURCE (.pth): a plain tensor, or a factored bank (C, M, S, mean).

    The file is read with torch.load(weights_only=True) and checked; nothing in it is run.
    """
    import gmem_bank

    spec = None
    if encoder is not None:
        spec = gmem_bank.load_encoder(encoder, weights=weights, device=device, space=space or "unit").spec
    report = gmem_bank.import_official(
        source, output, space=space, dtype=dtype, prefix=prefix, encoder_spec=spec, overwrite=overwrite
    )
    print_edit(report, as_json, "imported")


@click.command()
@bank_argument
@click.option("--output", "-o", required=True, metavar="FILE", help="The file to write.")
@click.option(
    "--to", "form", type=click.Choice(["parquet", "official"]), default=None,
    help="parquet: a table with keys, concepts and vectors; official: the tensors of GMem's own banks. Default: by the suffix.",
)  # fmt: skip
@click.option("--vectors/--no-vectors", default=True, show_default=True, help="Parquet: a column with the snippets.")
@click.option(
    "--coordinates",
    type=click.Choice(["pca", "tsne"]),
    default=None,
    help="Parquet: columns x and y, a map of all rows.",
)
@click.option("--overwrite", is_flag=True, help="Replace FILE where it exists.")
@json_option
@quiet_option
def export(
    bank: str, output: str, form: str | None, vectors: bool, coordinates: str | None, overwrite: bool, as_json: bool, quiet: bool,
) -> None:  # fmt: skip
    """Write BANK for other programs: a Parquet table, or the tensors that the official GMem code reads.

    The official tensors come as safetensors; pickles are never written. In Python, after tensors =
    safetensors.torch.load_file(FILE), torch.save(tensors, "bank.pth") makes the official file of a factored bank, and
    torch.save(tensors["memory_bank"], "bank.pth") that of a dense one.
    """
    import gmem_bank
    from gmem_bank.progress import ProgressBar

    opened = gmem_bank.open(bank)
    chosen = form or ("official" if output.lower().endswith(".safetensors") else "parquet")
    if overwrite and chosen == "official":
        raise click.UsageError("official tensors are written to a new file: --overwrite is for tables")
    if chosen == "official":
        print_edit(gmem_bank.export_official(opened, output), as_json, "as official tensors")
        return
    place = None
    if coordinates is not None:
        from gmem_bank.plot_measures import project

        place = project(opened, method=coordinates, num_rows=len(opened)).coordinates
    with ProgressBar("export", "row", quiet=quiet) as progress:
        report = gmem_bank.export_parquet(
            opened, output, vectors=vectors, coordinates=place, overwrite=overwrite, progress=progress
        )
    if as_json:
        print_json(report.to_json())
        return
    click.echo(f"{output}: {report.num_rows} rows")


@click.command()
@bank_argument
@click.option("--output", "-o", default=None, metavar="FILE", help=".html or .png; default: BANK's name with .html.")
@click.option(
    "--what", type=click.Choice(["spectrum", "map", "neighbours"]), multiple=True, help="Only this; may be repeated."
)
@click.option("--method", type=click.Choice(["pca", "tsne"]), default="pca", show_default=True, help="Of the map.")
@click.option("--rows", type=click.IntRange(min=1), default=5000, show_default=True, help="Rows on the map at most.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Draws those rows.")
@click.option("--overwrite", is_flag=True, help="Replace FILE where it exists.")
@click.option(
    "--thumbnails/--no-thumbnails", default=True, show_default=True, help="Pictures of rows whose image is there."
)
@json_option
@quiet_option
def plot(
    bank: str, output: str | None, what: tuple[str, ...], method: str, rows: int, seed: int, overwrite: bool, thumbnails: bool,
    as_json: bool, quiet: bool,
) -> None:  # fmt: skip
    """Draw BANK: its singular values, a map of its rows by concept, and how near neighbours are."""
    from pathlib import Path

    import gmem_bank
    from gmem_bank.progress import ProgressBar

    target = output if output is not None else str(Path(bank).with_suffix(".html"))
    options: dict[str, Any] = {"what": what} if what else {}
    with ProgressBar("thumbnails", "image", quiet=quiet) as progress:
        report = gmem_bank.plot(
            gmem_bank.open(bank), target, method=method, num_rows=rows, seed=seed, thumbnails=thumbnails,
            overwrite=overwrite, progress=progress, **options,
        )  # fmt: skip
    if as_json:
        print_json(report.to_json())
        return
    click.echo(f"{report.output}")
