"""Write docs/CLI.md from the commands' own help; --check fails when the file is stale.

python -m tools.make_cli_docs [--check]
"""

from __future__ import annotations

import sys
from pathlib import Path

import click

TARGET = Path(__file__).parents[1] / "docs" / "CLI.md"


def render() -> str:
    """Return the document."""
    from gmem_bank.cli import main as bank
    from gmem_gen.cli import main as gen

    parts = ["# Commands\n\nWritten by `python -m tools.make_cli_docs` from the commands' own help.\n"]
    for name, group in (("gmem-bank", bank), ("gmem-gen", gen)):
        parts.append(_section(name, group))
        parts += [_section(f"{name} {sub}", command) for sub, command in group.commands.items()]
    return "\n".join(parts)


def _section(name: str, command: click.Command) -> str:
    names = ["-h", "--help"]  # as the groups hand them on
    context = click.Context(command, info_name=name, terminal_width=110, max_content_width=110, help_option_names=names)
    level = "###" if " " in name else "##"
    return f"{level} {name}\n\n```text\n{command.get_help(context)}\n```\n"


def main() -> int:
    """Write, or compare."""
    text = render()
    if "--check" in sys.argv[1:]:
        if TARGET.read_text(encoding="utf-8") == text:
            return 0
        print("docs/CLI.md is stale: run python -m tools.make_cli_docs", file=sys.stderr)
        return 1
    TARGET.write_text(text, encoding="utf-8")
    print(TARGET)
    return 0


if __name__ == "__main__":
    sys.exit(main())
