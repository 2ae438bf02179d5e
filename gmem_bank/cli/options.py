"""What the editing commands share: which rows, what every edit takes, how its report is printed."""

from __future__ import annotations

from typing import Any

import click

from gmem_bank.console import Command, human_bytes, json_option, note, print_json, printable


class BankNameType(click.ParamType):  # type: ignore[type-arg]
    """The name of a bank to write, by a suffix that says in which form."""

    name = "file"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the name; one that no bank can have is a usage error."""
        from gmem_bank.errors import FormatError
        from gmem_bank.storage import require_known_suffix

        try:
            require_known_suffix(value)
        except FormatError as error:
            self.fail(str(error), param, ctx)
        return value


def edit_options(command: Command) -> Command:
    """Add what every edit takes: --output, --dry-run, --no-undo, --json."""
    command = json_option(command)
    command = click.option(
        "--no-undo",
        is_flag=True,
        help="Keep nothing to go back to, and delete what was kept, an index beside the bank that holds rows it no longer has "
        "too: for deletion on request.",
    )(command)
    command = click.option("--dry-run", is_flag=True, help="Say what would be done, and write nothing.")(command)
    return click.option(
        "--output", "-o", type=BankNameType(), default=None, metavar="FILE",
        help="Write a new bank here; without it the bank is replaced.",
    )(command)  # fmt: skip


def refit_option(command: Command) -> Command:
    """Add --refit."""
    return click.option(
        "--refit", is_flag=True,
        help="Factored banks: fit basis and coefficients to the rows left; with --no-undo for deletion on request.",
    )(command)  # fmt: skip


def selection_options(command: Command) -> Command:
    """Add what selects rows: --concept, --key, --keys, --pattern, --random, --seed, --invert."""
    options = (
        click.option("--invert", is_flag=True, help="All other rows instead."),
        click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of what is drawn."),
        click.option(
            "--random", type=click.IntRange(min=1), metavar="N", help="N of those rows (default: of all) at random."
        ),
        click.option(
            "--pattern", "-p", "patterns", multiple=True, metavar="GLOB", help="Rows whose key matches: 'cat/*.jpg'."
        ),
        click.option(
            "--keys",
            "keys_file",
            type=click.Path(),
            metavar="FILE",
            help="Rows by keys in FILE, a line each; -: stdin.",
        ),
        click.option("--key", "-k", "keys", multiple=True, help="The row of this key; may be repeated."),
        click.option("--concept", "-c", "concepts", multiple=True, help="Rows of this concept; may be repeated."),
    )
    for option in options:
        command = option(command)
    return command


def selection_from(
    concepts: tuple[str, ...], keys: tuple[str, ...], keys_file: str | None, patterns: tuple[str, ...],
    random: int | None, seed: int, invert: bool, *, needed: bool = False,
) -> Any:  # fmt: skip
    """Return the Selection that the options name; raises click.UsageError where keys cannot be read, or rows are `needed`."""
    from gmem_bank.selection import Selection

    if keys_file is not None:
        try:
            with click.open_file(keys_file, encoding="utf-8") as stream:
                keys = (*keys, *(line.rstrip("\r\n") for line in stream if line.strip()))
        except (OSError, UnicodeDecodeError) as error:
            raise click.UsageError(f"--keys {keys_file}: {error}") from error
    selection = Selection(concepts=concepts, keys=keys, patterns=patterns, random=random, seed=seed, invert=invert)
    if needed and selection.empty and keys_file is None:
        raise click.UsageError("say which rows: by --concept, --key, --keys, --pattern or --random")
    return selection


def print_edit(report: Any, as_json: bool, what: str, unchanged: str = "") -> None:
    """Print what an edit did: JSON, or one line: rows that came and went, `what` ("as concept 'x'"), rows there are.

    `unchanged` says what was there already, where the edit had nothing to do.
    """
    if report.deleted_index is not None:
        note(
            f"{report.deleted_index} held rows as they were, and is deleted: 'gmem-bank index {report.output}' builds a new one"
        )
    if as_json:
        print_json(report.to_json())
        return
    for text in report.details.get("warnings", []):
        note(text)
    if report.unchanged:
        note(f"{report.output} {unchanged or 'is what this would make of it already'}: nothing to do")
        click.echo(f"{report.output}: {report.num_rows} rows")
        return
    changes = [f"{sign}{count} rows" for sign, count in (("+", report.num_added), ("-", report.num_removed)) if count]
    would, now = ("would be ", "") if report.dry_run else ("", " now")
    done = " ".join([", ".join(changes), what]) if changes else what.strip("()")
    click.echo(f"{report.output}: {would}{done}, {would}{report.num_rows} rows{now}")
    if report.dropped_concepts:
        click.echo(f"concepts that lose their last row: {', '.join(map(printable, report.dropped_concepts))}")


def print_bytes(facts: dict[str, Any]) -> None:
    """Print the size of a bank before and after an edit, where both are known."""
    before, after = facts.get("bytes_before"), facts.get("bytes_after")
    if before is not None and after is not None:
        click.echo(f"  bytes     {human_bytes(before)} → {human_bytes(after)}")


def print_cosines(facts: dict[str, Any]) -> None:
    """Print how near snippets are to what they were, and how many neighbours stayed, where that was measured."""
    if "cosine" in facts:
        cosine = facts["cosine"]
        click.echo(f"  cosine    mean {cosine['mean']:.4f}, p1 {cosine['p1']:.4f}, min {cosine['min']:.4f}")
    same = facts.get("neighbour_overlap_at_10")
    if same is not None:
        click.echo(f"  overlap   {same:.3f} of the 10 nearest among {facts['neighbours_among']} rows")


def column_options(command: Command) -> Command:
    """Add --image-column, --label-column and --key-column."""
    for name, text in (
        ("key", "Column of a table that names the images; default: the file's name and the row's number."),
        (
            "label",
            "Column (or array) of classes, which become concepts; tar files: 'cls', the .cls members; 'none': no classes.",
        ),
        ("image", "Column of a table, or array of a .npz, with the images; default: the only one."),
    ):
        command = click.option(f"--{name}-column", default=None, metavar="NAME", help=text)(command)
    return command


def columns_from(image_column: str | None, label_column: str | None, key_column: str | None) -> Any:
    """Return the Columns of the options, None where none is given."""
    from gmem_bank.columns import Columns

    given = Columns(image=image_column, label=label_column, key=key_column)
    return None if given == Columns() else given
