"""gmem-bank search."""

from __future__ import annotations

import click

from gmem_bank.console import encoder_run_options, json_option, print_json, printable, quiet_option


@click.command()
@click.argument("bank", type=click.Path())
@click.argument("query")
@click.option("-k", "k", type=click.IntRange(min=1), default=10, show_default=True, help="Rows a query.")
@click.option(
    "--weights", default=None, metavar="FOLDER", help="The encoder's weights, where the recorded place is gone."
)
@click.option("--text", is_flag=True, help="QUERY is a text in words, for banks of CLIP or SigLIP 2.")
@encoder_run_options
@json_option
@quiet_option
def search(
    bank: str,
    query: str,
    k: int,
    weights: str | None,
    text: bool,
    device: str,
    batch_size: int,
    as_json: bool,
    quiet: bool,
) -> None:
    """Find the rows of BANK nearest to QUERY: a concept or key of the bank, an image file, or a folder of images."""
    import gmem_bank
    from gmem_bank.progress import ProgressBar
    from gmem_bank.query import search as find

    opened = gmem_bank.open(bank)
    with ProgressBar("encode", "image", quiet=quiet) as progress:
        results = find(
            opened, query, k=k, text=text, batch_size=batch_size, progress=progress,
            load=lambda: gmem_bank.reload_encoder(opened.encoder, opened.folder, weights=weights, device=device),
        )  # fmt: skip
    if as_json:
        print_json([result.to_json() for result in results])
        return
    for result in results:
        if len(results) > 1:
            click.echo(result.query)
        for rank, hit in enumerate(result.hits, 1):
            click.echo(f"{rank:>3}  {hit.score:+.4f}  {printable(hit.key)}  {' '.join(hit.concepts)}".rstrip())
