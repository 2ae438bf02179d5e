"""gmem-bank info, verify, list and history."""

from __future__ import annotations

from typing import Any

import click

from gmem_bank.console import bank_argument, human_bytes, json_option, note, print_json, printable, quiet_option


@click.command()
@bank_argument
@json_option
def info(bank: str, as_json: bool) -> None:
    """Say what BANK is; reads its header and the sizes of its concepts."""
    import gmem_bank
    from gmem_bank.vectors import coefficients_kept, stored_dtype

    opened = gmem_bank.open(bank)
    record: dict[str, Any] = {
        "path": str(opened.path),
        "format_version": ".".join(map(str, opened.header.version)),
        "kind": opened.header.kind,
        "num_rows": len(opened),
        "num_active": len(opened.rows()),
        "dim": opened.dim,
        "rank": getattr(opened, "rank", None),
        "coefficients_kept": coefficients_kept(opened),
        "space": opened.space,
        "dtype": stored_dtype(opened),
        "encoder": {**opened.encoder.to_json(), "fingerprint": opened.encoder.fingerprint},
        "concepts": opened.concept_sizes(),
        "sources": [source.to_json() for source in opened.sources],
        "num_segments": len(opened.header.segments),
        "num_edits": len(opened.history) - 1,
        "fingerprint": opened.fingerprint,
        "bytes": opened.stored.num_bytes,
    }
    if as_json:
        print_json(record)
        return
    click.echo(f"{record['path']}  (format {record['format_version']}, {human_bytes(record['bytes'])})")
    masked = (
        f" ({record['num_rows'] - record['num_active']} masked)" if record["num_active"] < record["num_rows"] else ""
    )
    rank = f", rank {record['rank']}" if record["rank"] is not None else ""
    click.echo(f"  rows         {record['num_rows']}{masked} in {record['num_segments']} segments")
    kept = record["coefficients_kept"]
    rank += f", at most {kept} coefficients kept a row (coefficient mask)" if kept is not None else ""
    click.echo(
        f"  snippets     {record['kind']}, dim {record['dim']}, {record['dtype']}, {record['space']} space{rank}"
    )
    click.echo(f"  encoder      {opened.encoder.describe()}")
    shown = ", ".join(f"{name} ({count})" for name, count in list(record["concepts"].items())[:8])
    more = f", … {len(record['concepts']) - 8} more" if len(record["concepts"]) > 8 else ""
    click.echo(f"  concepts     {shown or 'none'}{more}")
    for source in opened.sources:
        click.echo(f"  source       {source.path or 'derived rows'}{' as ' + source.prefix if source.prefix else ''}")
    click.echo(f"  fingerprint  {record['fingerprint']}")


@click.command()
@bank_argument
@json_option
@quiet_option
def verify(bank: str, as_json: bool, quiet: bool) -> None:
    """Read every byte of BANK and check it: hashes, finite values, norms, keys, concepts. Exit code 1 if unsound."""
    import gmem_bank
    from gmem_bank.progress import ProgressBar

    with ProgressBar("verify", "byte", quiet=quiet) as progress:
        report = gmem_bank.verify(bank, progress=progress)
    if as_json:
        print_json(report.to_json())
    elif report.ok:
        click.echo(f"{bank}: sound ({report.num_rows} rows, {report.num_entries} entries, {human_bytes(report.bytes)})")
    else:
        for problem in report.problems:
            note(f"  {problem}")
        note(f"Error: {bank} is damaged (problems: {len(report.problems)}): restore it from a copy or build it again")
    if not report.ok:
        raise click.exceptions.Exit(1)


@click.command("list")
@bank_argument
@click.option("--concept", "-c", default=None, help="Only rows of this concept.")
@click.option(
    "--limit", type=click.IntRange(min=0), default=None, help="Print at most this many rows; 0: concepts only."
)
@json_option
def list_rows(bank: str, concept: str | None, limit: int | None, as_json: bool) -> None:
    """List the concepts of BANK, then its rows and their keys."""
    import numpy as np

    import gmem_bank

    opened = gmem_bank.open(bank)
    rows = np.arange(len(opened)) if concept is None else opened.all_rows_of(concept)
    shown = rows[:limit]
    keys = opened.keys(shown)
    active = set(opened.rows().tolist()) if len(opened.rows()) < len(opened) else None
    masked = [active is not None and int(row) not in active for row in shown]
    if as_json:
        print_json({
            "concepts": {name: len(opened.all_rows_of(name)) for name in opened.names},
            "rows": [
                {"row": int(r), "key": k, "masked": m} for r, k, m in zip(shown, keys, masked, strict=True)
            ],
        })  # fmt: skip
        return
    if concept is None:
        for name in opened.names:
            click.echo(f"concept\t{printable(name)}\t{len(opened.all_rows_of(name))} rows")
    for row, key, hidden in zip(shown, keys, masked, strict=True):
        click.echo(f"{row}\t{printable(key)}{chr(9) + 'masked' if hidden else ''}")
    if len(shown) < len(rows):
        note(f"{len(rows) - len(shown)} more rows: raise --limit")


def _shortened(text: str, most: int = 80) -> str:
    """Return a text on one line, cut where it is long; --json has it whole."""
    return printable(text if len(text) <= most else f"{text[: most - 1]}…")


@click.command()
@bank_argument
@json_option
def history(bank: str, as_json: bool) -> None:
    """Print the operations that made BANK, oldest first."""
    import gmem_bank

    entries = [dict(entry) for entry in gmem_bank.open(bank).history]
    if as_json:
        print_json(entries)
        return
    for number, entry in enumerate(entries):
        arguments = " ".join(_shortened(f"{name}={value}") for name, value in entry.get("arguments", {}).items())
        click.echo(f"{number}\t{entry['operation']}\t{entry.get('num_rows', '')} rows\t{arguments}")


@click.command()
@bank_argument
@click.argument("keys", nargs=-1)
@json_option
def provenance(bank: str, keys: tuple[str, ...], as_json: bool) -> None:
    """Print what made BANK: its encoder and sources; with KEYS, where each of those rows came from."""
    import gmem_bank

    opened = gmem_bank.open(bank)
    rows = opened.rows_for(keys)
    ids = opened.source_ids(rows).tolist()
    came = [
        {"key": key, "row": row, "source": number, **opened.sources[number].to_json()}
        for key, row, number in zip(keys, rows.tolist(), ids, strict=True)
    ]
    if as_json:
        sources = [source.to_json() for source in opened.sources]
        encoder = {**opened.encoder.to_json(), "fingerprint": opened.encoder.fingerprint}
        print_json({"encoder": encoder, "sources": sources, "rows": came})
        return
    if not keys:
        click.echo(f"encoder\t{opened.encoder.describe()}\t{opened.encoder.family}\t{opened.encoder.software}")
        for number, source in enumerate(opened.sources):
            place, prefix = source.path or "-", printable(source.prefix) or "-"
            click.echo(f"source {number}\t{source.kind}\t{place}\t{prefix}\t{source.num_images} images")
    for item in came:
        click.echo(f"{printable(item['key'])}\trow {item['row']}\t{item['kind']}\t{item['path'] or '-'}")
