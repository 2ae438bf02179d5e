"""What the commands share: options, and how results are printed."""

from __future__ import annotations

import json
from typing import Any

import click

bank_option = click.option(
    "--bank", "-b", default="bank.safetensors", show_default=True, metavar="BANK", help="The bank file."
)
preset_option = click.option(
    "--preset", "-p", default="nano", show_default=True, help="Model size, see 'gmem-gen models'."
)
config_option = click.option(
    "--config", "config_file", default=None, metavar="TOML", help="Settings over the preset's."
)
set_option = click.option(
    "--set", "settings", multiple=True, metavar="SECTION.FIELD=VALUE", help="A setting; may be repeated."
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
quiet_option = click.option("-q", "--quiet", is_flag=True, help="No progress on stderr.")


def print_json(value: Any) -> None:
    """Print a result as JSON on stdout."""
    click.echo(json.dumps(value, indent=2, ensure_ascii=False))
