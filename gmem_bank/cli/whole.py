"""gmem-bank merge, dedup, coreset, diff, convert, shard and compact."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from gmem_bank.cli.options import edit_options, print_edit
from gmem_bank.console import bank_argument, human_bytes, json_option, note, print_json, printable, quiet_option


@click.command()
@click.argument("first", type=click.Path())
@click.argument("others", nargs=-1, required=True, type=click.Path())
@click.option(
    "--on-duplicate", type=click.Choice(["error", "first"]), default="error", show_default=True,
    help="A key that an earlier bank has: stop, or keep the earlier row.",
)  # fmt: skip
@edit_options
def merge(
    first: str,
    others: tuple[str, ...],
    on_duplicate: str,
    output: str | None,
    dry_run: bool,
    no_undo: bool,
    as_json: bool,
) -> None:
    """Add the rows of the banks OTHERS to the bank FIRST (or write all to -o); they must be of one encoder."""
    import gmem_bank

    report = gmem_bank.merge(first, others, on_duplicate=on_duplicate, output=output, dry_run=dry_run, undo=not no_undo)
    print_edit(report, as_json, f"({len(others) + 1} banks)")
    missing = report.details.get("parts", {}).get("missing")
    if missing:
        note(f"of {report.details['parts']['of']} parts of the build these are missing: {', '.join(map(str, missing))}")


@click.command()
@bank_argument
@click.option(
    "--threshold", type=click.FloatRange(-1, 1, min_open=True), default=0.98, show_default=True,
    help="Cosine from which a row is a near-duplicate of an earlier one.",
)  # fmt: skip
@edit_options
@quiet_option
def dedup(
    bank: str, threshold: float, output: str | None, dry_run: bool, no_undo: bool, as_json: bool, quiet: bool
) -> None:
    """Remove near-duplicates from BANK; of each group the first row stays. --dry-run only lists them."""
    import gmem_bank
    from gmem_bank.progress import ProgressBar

    with ProgressBar("compare", "row", quiet=quiet) as progress:
        report = gmem_bank.dedup(
            bank, threshold=threshold, output=output, dry_run=dry_run, undo=not no_undo, progress=progress
        )
    print_edit(report, as_json, "of near-duplicates")
    for group in [] if as_json else report.details.get("groups", []):
        members = ", ".join(f"{printable(item['key'])} ({item['cosine']:.4f})" for item in group["removed"])
        click.echo(f"  {printable(group['kept'])} stands for {members}")
    hidden = report.details.get("num_groups", 0) - len(report.details.get("groups", []))
    if hidden > 0 and not as_json:
        note(f"  … and {hidden} more groups")


@click.command()
@bank_argument
@click.option("--num-rows", "-n", type=click.IntRange(min=1), required=True, help="Rows to keep.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of the clustering.")
@click.option("--iterations", type=click.IntRange(min=1), default=25, show_default=True, help="Of k-means.")
@edit_options
@quiet_option
def coreset(
    bank: str, num_rows: int, seed: int, iterations: int, output: str | None, dry_run: bool, no_undo: bool, as_json: bool,
    quiet: bool,
) -> None:  # fmt: skip
    """Keep the rows of BANK that are nearest to the centroids of a k-means clustering."""
    import gmem_bank
    from gmem_bank.progress import ProgressBar

    with ProgressBar("assign", "row", quiet=quiet) as progress:
        report = gmem_bank.coreset(
            bank, num_rows, seed=seed, iterations=iterations, output=output, dry_run=dry_run, undo=not no_undo,
            progress=progress,
        )  # fmt: skip
    print_edit(report, as_json, f"({num_rows} medoids stay)")


@click.command()
@click.argument("first", type=click.Path())
@click.argument("second", type=click.Path())
@click.option("--exit-code", is_flag=True, help="Exit with 1 where the banks differ.")
@json_option
def diff(first: str, second: str, exit_code: bool, as_json: bool) -> None:
    """Say what differs between the banks FIRST and SECOND, by key: rows, snippets, masks, concepts, encoder."""
    import gmem_bank

    report = gmem_bank.diff(first, second)
    if as_json:
        print_json(report.to_json())
    else:
        _print_diff(report)
    if exit_code and not report.same:
        raise click.exceptions.Exit(1)


def _print_diff(report: Any) -> None:
    if report.same:
        click.echo(f"no difference beyond float32 rounding ({report.num_common} rows)")
        return
    for name, (ours, theirs) in report.different_fields.items():
        click.echo(f"{name}: {ours} → {theirs}")
    for sign, count, keys in (
        ("-", report.num_only_first, report.only_first), ("+", report.num_only_second, report.only_second),
    ):  # fmt: skip
        if count:
            click.echo(f"{sign}{count} rows, such as {', '.join(printable(key) for key in keys[:3])}")
    if report.num_changed:
        worst = min(item["cosine"] for item in report.changed)
        click.echo(
            f"{report.num_changed} of {report.num_common} common rows have another snippet (cosine down to {worst:.4f})"
        )
    if report.num_mask_changed:
        click.echo(f"{report.num_mask_changed} rows are masked in only one of them")
    for sign, names in (("-", report.concepts_only_first), ("+", report.concepts_only_second)):
        if names:
            click.echo(f"{sign} concepts {', '.join(map(printable, names))}")
    for name, counts in report.concepts_changed.items():
        click.echo(f"concept {printable(name)}: -{counts['removed']} +{counts['added']} rows")


@click.command()
@click.argument("bank", type=click.Path())
@click.argument("output", type=click.Path())
@click.option("--overwrite", is_flag=True, help="Replace OUTPUT where it exists.")
@json_option
def convert(bank: str, output: str, overwrite: bool, as_json: bool) -> None:
    """Write BANK as OUTPUT in another form: .safetensors, .h5, or .gmem (a folder). Every value stays, both ways."""
    import gmem_bank

    header = gmem_bank.save(gmem_bank.open(bank), output, overwrite=overwrite)
    size = gmem_bank.open(output).stored.num_bytes
    if as_json:
        facts = {"num_rows": header.num_rows, "bytes": size, "fingerprint": header.fingerprint}
        print_json({"bank": bank, "output": output, **facts})
        return
    click.echo(f"{output}: {header.num_rows} rows, {human_bytes(size)}, fingerprint {header.fingerprint[:12]}")


@click.command()
@bank_argument
@click.option(
    "--output",
    "-o",
    default=None,
    metavar="FOLDER",
    help="Folder to write, ending in .gmem; default: BANK's name with .gmem.",
)
@click.option("--rows", type=click.IntRange(min=1), default=None, help="Cut segments that have more rows than this.")
@json_option
def shard(bank: str, output: str | None, rows: int | None, as_json: bool) -> None:
    """Write BANK as a folder with one file a segment: an insert then costs only what is new. 'compact' goes back."""
    import gmem_bank

    target = output if output is not None else str(Path(bank).with_suffix(".gmem"))
    if Path(target).suffix.lower() != ".gmem":
        raise click.UsageError(f"{target}: a bank folder ends in .gmem")
    report = gmem_bank.shard(bank, target, rows_per_segment=rows)
    segments = report.details.get("num_segments")
    print_edit(report, as_json, f"{segments} segments")


@click.command()
@bank_argument
@edit_options
def compact(bank: str, output: str | None, dry_run: bool, no_undo: bool, as_json: bool) -> None:
    """Join the segments of BANK; with '-o bank.safetensors' a folder becomes one file again."""
    import gmem_bank

    report = gmem_bank.compact(bank, output=output, dry_run=dry_run, undo=not no_undo)
    before, after = report.details.get("segments_before", 0), report.details.get("num_segments", 0)
    print_edit(report, as_json, f"{before} → {after} segments")
