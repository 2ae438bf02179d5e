"""gmem-bank index, search."""

from __future__ import annotations

from typing import Any

import click

from gmem_bank.console import (
    ShareType,
    SizeType,
    encoder_run_options,
    human_bytes,
    json_option,
    list_skipped,
    note,
    print_json,
    printable,
    quiet_option,
)


@click.command()
@click.argument("bank", default="bank.safetensors", type=click.Path())
@click.option(
    "--kind",
    type=click.Choice(["auto", "flat", "ivf-rabitq", "ivf-flat", "ivf-pq", "hnsw"]),
    default="auto",
    show_default=True,
    help="auto: flat, which is exact, where that is fast, else ivf-rabitq.",
)
@click.option(
    "--recall", type=ShareType(), default=0.95, show_default=True, help="Recall@10 to tune for; 1 is exact search."
)
@click.option(
    "--max-bytes",
    type=SizeType(),
    default=None,
    metavar="SIZE",
    help="Most that the file of the index may take: 500000, 20M, 1.5G (K, M and G are powers of 1024).",
)
@click.option(
    "--nlist", type=click.IntRange(min=1), default=None, help="Clusters of an ivf index. Default: about 4 √rows."
)
@click.option(
    "--effort", "--nprobe", "nprobe", type=click.IntRange(min=1), default=None,
    help="Clusters looked into a query; for hnsw, its efSearch. Default: tuned.",
)  # fmt: skip
@click.option(
    "--rerank",
    type=click.IntRange(1, 1 << 16),
    default=None,
    help="Candidates a result that are compared by exact values. Default: tuned.",
)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of training and measuring.")
@click.option(
    "--update",
    is_flag=True,
    help="Follow the bank's inserts and removals, without training anew: "
    "clusters stay as removed rows have made them, so that deletion on request wants a new index.",
)
@click.option(
    "--output", "-o", default=None, metavar="FILE", help="The index file. Default: beside the bank, BANK.index."
)
@json_option
@quiet_option
def index(
    bank: str, kind: str, recall: float, max_bytes: int | None, nlist: int | None, nprobe: int | None, rerank: int | None,
    seed: int, update: bool, output: str | None, as_json: bool, quiet: bool,
) -> None:  # fmt: skip
    """Build the index of BANK, measure it, and write it beside the bank, where search finds it."""
    import gmem_bank

    with gmem_bank.ProgressBar("index", "row", quiet=quiet) as progress:
        if update:
            _require_plain_update()
            report = gmem_bank.update_index(bank, path=output, progress=progress)
        else:
            report = gmem_bank.build_index(
                bank, kind=kind, recall=recall, max_bytes=max_bytes, nlist=nlist, nprobe=nprobe, rerank=rerank,
                output=output, seed=seed, progress=progress,
            )  # fmt: skip
    if as_json:
        print_json(report.to_json())
        return
    _print_report(report, update)


OPTIONS = {"max_bytes": "max-bytes", "nprobe": "effort"}
"""Parameter → option, where they are not spelt alike."""


def _require_plain_update() -> None:
    context = click.get_current_context()
    for name in ("kind", "recall", "max_bytes", "nlist", "nprobe", "rerank", "seed"):
        if _is_given(context, name):
            raise click.UsageError(
                f"--update keeps the index as it was made: --{OPTIONS.get(name, name)} needs a new one"
            )


def _print_report(report: Any, update: bool) -> None:
    if report.unchanged:
        note(f"{report.path} has the rows of {report.bank} already: nothing to do")
    settings = "".join(f", {name} {value}" for name, value in report.settings.items())
    why = f" ({report.why})" if report.why else ""
    click.echo(
        f"{report.path}: {report.kind}{why}{settings}, {report.num_rows:,} rows, {human_bytes(report.num_bytes)}"
    )
    if update:
        click.echo(f"+{report.num_added} rows, -{report.num_removed} rows; measured when it was built:")
    if report.recall_of_added is not None:
        note(
            f"the basis has grown since: recall@10 of the new rows is {report.recall_of_added:.3f}; "
            f"'gmem-bank index {report.bank}' builds a new one"
        )
    click.echo(f"{'':12}{'effort':>8}{'rerank':>8}{'recall@10':>11}{'queries/s':>11}{'size':>12}")
    for line in report.measured:
        probe, factor = (line.get(name, "") for name in ("nprobe", "rerank"))
        speed, size = line["queries_per_second"], human_bytes(line["bytes"])
        how = f"  {printable(line['how'])}" if "how" in line else ""
        click.echo(
            f"{printable(line['kind']):12}{probe:>8}{factor:>8}{line['recall']:>11.3f}{speed:>11,.0f}{size:>12}{how}"
        )
    if report.outgrown:
        note(
            f"the bank has far more rows than the index was trained on: 'gmem-bank index {report.bank}' makes a better one"
        )


@click.command()
@click.argument("bank", type=click.Path())
@click.argument("query")
@click.option("-k", "k", type=click.IntRange(min=1), default=10, show_default=True, help="Rows a query.")
@click.option(
    "--weights", default=None, metavar="FOLDER", help="The encoder's weights, where the recorded place is gone."
)
@click.option("--text", is_flag=True, help="QUERY is a text in words, for banks of CLIP or SigLIP 2.")
@click.option("--exact", is_flag=True, help="Compare with every row, whether or not there is an index.")
@click.option("--index", "index_file", default=None, metavar="FILE", help="The index, where it is not beside the bank.")
@click.option(
    "--html", "page", default=None, metavar="FILE", help="Write a page with the pictures that were found, too."
)
@click.option("--overwrite", is_flag=True, help="Replace that page.")
@encoder_run_options
@json_option
@quiet_option
def search(
    bank: str, query: str, k: int, weights: str | None, text: bool, exact: bool, index_file: str | None, page: str | None,
    overwrite: bool, device: str, batch_size: Any, as_json: bool, quiet: bool,
) -> None:  # fmt: skip
    """Find the rows of BANK nearest to QUERY; both are needed, in this order.

    QUERY is a concept of the bank (asked by the mean of its active rows) or one of its keys, an image, a folder of images, a
    file of vectors (.npy, .npz, .safetensors, .h5, .parquet), or another bank of the same encoder. An index beside the bank is
    used where there is one.
    """
    import gmem_bank

    _require_sense(exact, index_file, page, overwrite)
    opened = gmem_bank.open(bank)
    found = None if exact else gmem_bank.find_index(opened, index_file)
    loaded = False

    def load() -> Any:
        nonlocal loaded
        loaded = True
        return gmem_bank.reload_encoder(opened.encoder, opened.folder, weights=weights, device=device)

    how = f"searched by {found.describe()}" if found else "compared with every row"
    with gmem_bank.ProgressBar("encode", "image", quiet=quiet) as progress:
        results = gmem_bank.search(
            opened, query, k=k, index=found, text=text, batch_size=batch_size, progress=progress, load=load,
        )  # fmt: skip
    if found and not quiet:
        note(how)
    if not loaded:
        _note_unused("weights", "device", "batch_size")
    if page is not None:
        gmem_bank.write_results_page(page, opened, results, note=how, overwrite=overwrite)
    list_skipped([{"path": result.query, "reason": result.skipped} for result in results if result.skipped])
    if as_json:
        print_json([result.to_json() for result in results])
        return
    for result in (result for result in results if not result.skipped):
        if len(results) > 1:
            click.echo(printable(result.query))
        for rank, hit in enumerate(result.hits, 1):
            click.echo(f"{rank:>3}  {hit.score:+.4f}  {printable(hit.key)}  {' '.join(hit.concepts)}".rstrip())


def _require_sense(exact: bool, index_file: str | None, page: str | None, overwrite: bool) -> None:
    """Raise UsageError for options that exclude each other, or are about a page where none is asked for or none can be."""
    from pathlib import Path

    if exact and index_file is not None:
        raise click.UsageError("give --exact, which uses no index, or --index, not both")
    if overwrite and page is None:
        raise click.UsageError("--overwrite is for the page of --html")
    if page is not None:
        from gmem_bank.results_page import require_page

        require_page(Path(page), overwrite)  # before minutes go into encoding


def _note_unused(*names: str) -> None:
    """Say which options of the encoder were given where nothing had to be encoded."""
    context = click.get_current_context()
    given = [f"--{name.replace('_', '-')}" for name in names if _is_given(context, name)]
    if given:
        note(f"nothing had to be encoded: {', '.join(given)} changed nothing")


def _is_given(context: click.Context, name: str) -> bool:
    return context.get_parameter_source(name) is not click.core.ParameterSource.DEFAULT
