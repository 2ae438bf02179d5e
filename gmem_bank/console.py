"""What every command shares: errors translated once, options spelt once, results on stdout and the rest on stderr."""

from __future__ import annotations

import contextlib
import errno
import json
import re
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import click

from gmem_bank.errors import ConfigError, GMemError, is_out_of_memory

Command = TypeVar("Command", bound=Callable[..., Any])


RESUMABLE = ("build", "insert-concept", "tokens", "compress", "encode", "train", "evaluate")
"""Commands that go on where they were interrupted."""


class CommandGroup(click.Group):
    """A command group that turns our errors into one line on stderr and exit code 1; --traceback shows where from."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command."""
        try:
            return super().invoke(ctx)
        except GMemError as error:
            if ctx.params.get("traceback"):
                raise
            click.echo(f"Error: {self._by_options(ctx, str(error))}", err=True)
            ctx.exit(1)
        except OSError as error:
            # a path of the user's that cannot be read or written, somewhere our own errors do not reach
            if ctx.params.get("traceback") or error.strerror is None or error.errno == errno.EPIPE:
                raise
            where = f" {error.filename}:" if error.filename else ""
            click.echo(f"Error:{where} {error.strerror}", err=True)
            ctx.exit(1)
        except (MemoryError, RuntimeError) as error:
            if ctx.params.get("traceback") or not is_out_of_memory(error):
                raise
            click.echo("Error: out of memory: ask for less (smaller model, batch, image or number)", err=True)
            ctx.exit(1)
        except KeyboardInterrupt:
            if ctx.params.get("traceback"):
                raise
            resumable = ctx.invoked_subcommand in RESUMABLE
            click.echo("Interrupted." + " The same command continues where it stopped." * resumable, err=True)
            ctx.exit(130)

    def _by_options(self, ctx: click.Context, message: str) -> str:
        """Return a message with the library's names of arguments, such as max_bytes, as the options that they are."""
        command = self.commands.get(ctx.invoked_subcommand or "")
        for param in command.params if command is not None else []:
            if isinstance(param, click.Option) and param.name and "_" in param.name:
                spelt = max(param.opts, key=len)
                message = re.sub(rf"(?<![\w./'-]){param.name}(?![\w./'])", spelt, message)
        return message


@contextlib.contextmanager
def usage_errors() -> Iterator[None]:
    """Turn a setting that is unknown or out of range, whatever the data, into a usage error: exit code 2.

    For lines that make objects of what was typed; a setting that does not suit a bank or source is found later: exit code 1.
    """
    try:
        yield
    except ConfigError as error:
        raise click.UsageError(str(error)) from error


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


def printable(text: str) -> str:
    """Return a key or name on one line: line feeds and control characters escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def encoder_run_options(command: Command) -> Command:
    """Add --device and --batch-size."""
    command = click.option(
        "--batch-size",
        type=BatchSizeType(),
        default="auto",
        show_default=True,
        metavar="auto|N",
        help="Images per call of the encoder; auto: the encoder's own choice, 32 for parts of a build.",
    )(command)
    return device_option(command)


class BatchSizeType(click.ParamType):  # type: ignore[type-arg]
    """A whole number of at least 1, or "auto"."""

    name = "auto|N"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return "auto" or the number; anything else is a usage error."""
        if value == "auto":
            return value
        try:
            number = int(value)
        except (TypeError, ValueError):
            number = 0
        return (
            number
            if number >= 1
            else self.fail(f"{value!r} is neither 'auto' nor a whole number of at least 1", param, ctx)
        )


def workers_option(command: Command) -> Command:
    """Add --workers."""
    return click.option(
        "--workers", type=click.IntRange(min=0), default=None,
        help="Processes that decode images ahead; 0: none. Default: one a core, where there are enough images.",
    )(command)  # fmt: skip


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


class SizeType(click.ParamType):  # type: ignore[type-arg]
    """A number of bytes, at least 1: "1.5G" is 1610612736, since K, M and G (or KiB, MiB, GiB) are powers of 1024."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Return the bytes; anything else is a usage error."""
        match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]?)(?:i?B)?", str(value).strip(), re.IGNORECASE)
        if match is None:
            self.fail(f"{value!r} is not a size: write 500000, 20M or 1.5G (K, M and G are powers of 1024)", param, ctx)
        count = int(float(match[1]) * 1024 ** " KMG".index(match[2].upper() or " "))
        return count if count >= 1 else self.fail("a size must be at least 1 byte", param, ctx)


class ShareType(click.FloatRange):
    """A number above 0, and at most (or below) 1; NaN is none."""

    def __init__(self, *, below_one: bool = False) -> None:
        super().__init__(0, 1, min_open=True, max_open=below_one)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Return the number; anything else is a usage error."""
        number = float(super().convert(value, param, ctx))
        return number if number == number else self.fail(f"{value!r} is not a number", param, ctx)  # noqa: PLR0124
