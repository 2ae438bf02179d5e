"""gmem-bank insert-concept, remove-concept and interpolate."""

from __future__ import annotations

import click

from gmem_bank.console import (
    bank_option,
    encoder_run_options,
    json_option,
    list_skipped,
    note,
    output_option,
    print_json,
    quiet_option,
)


@click.command("insert-concept")
@click.argument("images", nargs=-1, required=True, type=click.Path())
@bank_option
@click.option("--name", "-n", default=None, help="The concept's name; default: the folder's name.")
@click.option(
    "--weights", default=None, metavar="FOLDER", help="The encoder's weights, where the recorded place is gone."
)
@output_option
@encoder_run_options
@json_option
@quiet_option
def insert_concept(
    images: tuple[str, ...], bank: str, name: str | None, weights: str | None, output: str | None, device: str,
    batch_size: int, as_json: bool, quiet: bool,
) -> None:  # fmt: skip
    """Add IMAGES (folders, or image files) to a bank as a new concept, without any training.

    The images are encoded by the encoder that made the bank. Rows that are there already stay byte for byte.
    """
    import gmem_bank
    from gmem_bank.progress import ProgressBar
    from gmem_bank.sources import require_path

    opened = gmem_bank.open(bank)
    for path in images:
        require_path(path)
    encoder = gmem_bank.reload_encoder(opened.encoder, opened.folder, weights=weights, device=device)
    with ProgressBar("encode", "image", quiet=quiet) as progress:
        report = gmem_bank.insert_concept(
            bank, images, encoder, name=name, output=output, batch_size=batch_size, progress=progress
        )
    list_skipped(report.skipped)
    if as_json:
        print_json(report.to_json())
    elif report.unchanged:
        note(f"{report.output} already holds these images as concept {report.concept!r}: nothing to do")
        click.echo(f"{report.output}: {report.num_rows} rows")
    else:
        click.echo(
            f"{report.output}: +{report.num_added} rows as concept {report.concept!r}, {report.num_rows} rows now"
        )
        if report.skipped:
            click.echo(f"skipped: {len(report.skipped)} files")


@click.command("remove-concept")
@click.argument("name")
@bank_option
@output_option
@json_option
def remove_concept(name: str, bank: str, output: str | None, as_json: bool) -> None:
    """Delete the concept NAME and its rows from a bank."""
    import gmem_bank

    report = gmem_bank.remove_concept(bank, name, output=output)
    if as_json:
        print_json(report.to_json())
        return
    if report.unchanged:
        note(f"concept {name!r} was removed from {report.output} already: nothing to do")
        return
    click.echo(f"{report.output}: -{report.num_removed} rows of concept {name!r}, {report.num_rows} rows now")
    if report.dropped_concepts:
        click.echo(f"these concepts lost their last row too: {', '.join(report.dropped_concepts)}")


@click.command()
@click.argument("first")
@click.argument("second")
@bank_option
@click.option(
    "--method", type=click.Choice(["linear", "slerp", "concat", "mask"]), default="slerp", show_default=True,
    help="slerp: along the great arc; concat: first dimensions of one, last of the other; mask: a seeded choice per dimension.",
)  # fmt: skip
@click.option(
    "--steps", type=click.IntRange(min=2), default=6, show_default=True, help="Rows to write, both ends included."
)
@click.option("--name", "-n", default=None, help="The new concept's name; default: FIRST-to-SECOND.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="For --method mask.")
@output_option
@json_option
def interpolate(
    first: str, second: str, bank: str, method: str, steps: int, name: str | None, seed: int, output: str | None,
    as_json: bool,
) -> None:  # fmt: skip
    """Write the way from FIRST to SECOND (keys or concepts) as rows of a new concept."""
    import gmem_bank

    report = gmem_bank.interpolate(bank, first, second, method=method, steps=steps, name=name, seed=seed, output=output)
    if as_json:
        print_json(report.to_json())
        return
    if report.unchanged:
        note(f"{report.output} already holds this way as concept {report.concept!r}: nothing to do")
        return
    click.echo(f"{report.output}: +{report.num_added} rows as concept {report.concept!r}, {report.num_rows} rows now")
