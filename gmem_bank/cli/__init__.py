"""The gmem-bank command. Only click is imported here; each command imports the library when it runs."""

from __future__ import annotations

import click

import gmem_bank
from gmem_bank.cli import build, compress, edit, insert, inspect, search, tokens, transfer, whole
from gmem_bank.console import CommandGroup


@click.group(cls=CommandGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(gmem_bank.__version__, prog_name="gmem-bank")
@click.option("--traceback", is_flag=True, help="Show the Python traceback of an error.")
def main(traceback: bool) -> None:
    """Build, edit, search and ship banks of semantic snippets.

    \b
    Start in a folder that holds images:
      gmem-bank build --encoder dinov2
      gmem-bank insert-concept images/
      gmem-gen train --bank bank.safetensors
    """  # noqa: D301 - click knows a block of lines by its backspace


for command in (
    build.build, insert.insert_concept, edit.remove_concept, edit.remove, edit.select, edit.rename, edit.mask, edit.unmask,
    edit.interpolate, edit.compose, edit.undo, whole.merge, whole.dedup, whole.coreset, whole.diff, whole.convert, whole.shard,
    whole.compact, compress.compress, transfer.import_, transfer.export, transfer.plot, inspect.info, inspect.verify,
    inspect.list_rows, inspect.history, inspect.provenance, search.index, search.search, tokens.tokens, build.encoders,
):  # fmt: skip
    main.add_command(command)
