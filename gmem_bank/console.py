"""What every command shares: errors translated once, options spelt once, results on stdout and the rest on stderr."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable
from typing import Any, TypeVar

import click

from gmem_bank.errors import GMemError

Command = TypeVar("Command", bound=Callable[..., Any])


class CommandGroup(click.Group):
    """A command group that turns our errors into one line on stderr and exit code 1; --traceback shows where from."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command."""
        try:
            return super().invoke(ctx)
        except GMemError as error:
            if ctx.params.get("traceback"):
                raise
            click.echo(f"Error: {error}", err=True)
            ctx.exit(1)
        except OSError as error:
            # a path of the user's that cannot be read or written, somewhere our own errors do not reach
            if ctx.params.get("traceback") or error.strerror is None or error.errno == errno.EPIPE:
                raise
            where = f" {error.filename}:" if error.filename else ""
            click.echo(f"Error:{where} {error.strerror}", err=True)
            ctx.exit(1)
        except (MemoryError, RuntimeError) as error:
            out_of_memory = isinstance(error, MemoryError) or any(
                word in str(error) for word in ("alloc", "out of memory")
            )
            if ctx.params.get("traceback") or not out_of_memory:
                raise
            click.echo("Error: out of memory: ask for less (smaller model, batch, image or number)", err=True)
            ctx.exit(1)
        except KeyboardInterrupt:
            if ctx.params.get("traceback"):
                raise
            click.echo("Interrupted. The same command continues where it stopped.", err=True)
            ctx.exit(130)


def json_option(command: Command) -> Command:
    """Add --json."""
    return click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")(command)


def quiet_option(command: Command) -> Command:
    """Add --quiet."""
    return click.option("-q", "--quiet", is_flag=True, help="No progress on stderr.")(command)


def bank_option(command: Command) -> Command:
    """Add --bank with its default."""
    return click.option(
        "--bank", "-b", default="bank.safetensors", show_default=True, metavar="BANK", help="The bank file."
    )(command)


def bank_argument(command: Command) -> Command:
    """Add BANK as the first argument, with its default."""
    return click.argument("bank", default="bank.safetensors", type=click.Path())(command)


def edit_options(command: Command) -> Command:
    """Add what every edit takes: --output, --dry-run, --no-undo, --json."""
    command = json_option(command)
    command = click.option(
        "--no-undo", is_flag=True, help="Keep nothing to go back to, and delete what was kept: for deletion on request."
    )(command)
    command = click.option("--dry-run", is_flag=True, help="Say what would be done, and write nothing.")(command)
    return click.option(
        "--output", "-o", default=None, metavar="FILE", help="Write a new bank here; without it the bank is replaced."
    )(command)


def selection_options(command: Command) -> Command:
    """Add what selects rows: --concept, --key, --keys, --pattern, --random, --seed, --invert."""
    options = (
        click.option("--invert", is_flag=True, help="All other rows instead."),
        click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="For --random."),
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
    random: int | None, seed: int, invert: bool,
) -> Any:  # fmt: skip
    """Return the Selection that the options name; raises click.UsageError for an unreadable file of keys."""
    from gmem_bank.selection import Selection

    if keys_file is not None:
        try:
            with click.open_file(keys_file, encoding="utf-8") as stream:
                keys = (*keys, *(line.rstrip("\r\n") for line in stream if line.strip()))
        except (OSError, UnicodeDecodeError) as error:
            raise click.UsageError(f"--keys {keys_file}: {error}") from error
    return Selection(concepts=concepts, keys=keys, patterns=patterns, random=random, seed=seed, invert=invert)


def print_edit(report: Any, as_json: bool, what: str) -> None:
    """Print what an edit did: JSON, or one line with the rows that came and went."""
    if as_json:
        print_json(report.to_json())
        return
    if report.unchanged:
        note(f"{report.output}: {what} was done already, or there is nothing to do")
        click.echo(f"{report.output}: {report.num_rows} rows")
        return
    changes = [
        f"+{report.num_added} rows" * bool(report.num_added),
        f"-{report.num_removed} rows" * bool(report.num_removed),
    ]
    done = ", ".join(change for change in changes if change) or "no row added or removed"
    would = "would be " if report.dry_run else ""
    click.echo(
        f"{report.output}: {would}{done} ({what}), {would}{report.num_rows} rows{'' if report.dry_run else ' now'}"
    )
    if report.dropped_concepts:
        click.echo(f"these concepts lose their last row too: {', '.join(map(printable, report.dropped_concepts))}")


def printable(text: str) -> str:
    """Return a key or name on one line: line feeds and control characters escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def encoder_run_options(command: Command) -> Command:
    """Add --device and --batch-size."""
    command = click.option(
        "--batch-size",
        type=click.IntRange(min=1),
        default=32,
        show_default=True,
        help="Images per call of the encoder.",
    )(command)
    return device_option(command)


def device_option(command: Command) -> Command:
    """Add --device."""
    return click.option(
        "--device",
        default="auto",
        show_default=True,
        help="auto, cpu, cuda, cuda:1, …; auto takes a GPU where there is one.",
    )(command)


def print_json(value: Any) -> None:
    """Print a value as JSON on stdout."""
    click.echo(json.dumps(value, indent=2, ensure_ascii=False))


def note(text: str) -> None:
    """Print a remark on stderr."""
    click.echo(text, err=True)


def list_skipped(skipped: list[dict[str, str]], most: int = 10) -> None:
    """Print the first skipped files on stderr, and how many there are."""
    for entry in skipped[:most]:
        note(f"  skipped {entry['path']}: {entry['reason']}")
    if len(skipped) > most:
        note(f"  … and {len(skipped) - most} more")


def parse_parameters(pairs: tuple[str, ...]) -> dict[str, Any]:
    """Read NAME=VALUE pairs; a value is JSON where it parses as such, else text."""
    parameters: dict[str, Any] = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if not equals:
            raise click.UsageError(f"{pair!r} is not NAME=VALUE")
        try:
            parameters[name.strip()] = json.loads(text)
        except ValueError:
            parameters[name.strip()] = text
    return parameters


def human_bytes(count: float) -> str:
    """Return 1536 as "1.5 KiB"."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"
