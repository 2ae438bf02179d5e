"""gmem-bank remove-concept, remove, select, mask, unmask, rename, interpolate, compose and undo."""

from __future__ import annotations

from typing import Any

import click

from gmem_bank.cli.options import (
    edit_options,
    print_bytes,
    print_cosines,
    print_edit,
    refit_option,
    selection_from,
    selection_options,
)
from gmem_bank.console import bank_argument, bank_option, device_option, json_option, note, print_json, printable


def _edit(output: str | None, dry_run: bool, no_undo: bool) -> dict[str, Any]:
    return {"output": output, "dry_run": dry_run, "undo": not no_undo}


@click.command("remove-concept")
@click.argument("name")
@bank_option
@refit_option
@edit_options
def remove_concept(
    name: str, bank: str, refit: bool, output: str | None, dry_run: bool, no_undo: bool, as_json: bool
) -> None:
    """Delete the concept NAME and its rows from a bank."""
    import gmem_bank

    report = gmem_bank.remove_concept(bank, name, refit=refit, **_edit(output, dry_run, no_undo))
    print_edit(report, as_json, f"of concept {printable(name)!r}", f"has concept {printable(name)!r} removed already")
    _print_basis(report, as_json)


@click.command()
@bank_argument
@selection_options
@refit_option
@edit_options
def remove(
    bank: str, refit: bool, output: str | None, dry_run: bool, no_undo: bool, as_json: bool, **selection: Any
) -> None:
    """Delete rows from BANK: by key, pattern, concept or at random."""
    import gmem_bank

    report = gmem_bank.remove(bank, selection_from(**selection), refit=refit, **_edit(output, dry_run, no_undo))
    drawn = "has had these rows drawn and removed (another --seed draws others)" if selection["random"] else ""
    print_edit(report, as_json, "(removal)", drawn)
    _print_basis(report, as_json)


def _print_basis(report: Any, as_json: bool) -> None:
    """Say what became of a factored bank's basis."""
    facts = report.details
    if as_json or "basis" not in facts:
        return
    if facts["basis"] == "kept":
        note("the basis was kept, removed rows included: --refit fits it to the rows that are left")
        return
    click.echo(f"  basis     refitted, rank {facts['rank_before']} → {facts['rank']}")
    if "coefficient_mask" in facts:
        note("the coefficient mask has ended: 'gmem-bank mask --keep' makes one again")


@click.command()
@bank_argument
@selection_options
@edit_options
def select(bank: str, output: str | None, dry_run: bool, no_undo: bool, as_json: bool, **selection: Any) -> None:
    """Keep only some rows of BANK: by key, pattern, concept or at random."""
    import gmem_bank

    report = gmem_bank.select(bank, selection_from(**selection), **_edit(output, dry_run, no_undo))
    print_edit(report, as_json, "(selection)")


@click.command()
@bank_argument
@click.option(
    "--keep", type=click.IntRange(min=1), metavar="K", help="Coefficients: the K largest of each snippet stay."
)
@click.option(
    "--keep-energy", "--energy", type=click.FloatRange(0, 1, min_open=True), metavar="E",
    help="Coefficients: the fewest that hold this share of each snippet's squared norm stay.",
)  # fmt: skip
@click.option(
    "--keep-random", type=click.FloatRange(0, 1, min_open=True), metavar="P",
    help="Coefficients: each stays with this probability, by --seed.",
)  # fmt: skip
@click.option(
    "--allow-larger", is_flag=True,
    help="Coefficients: mask them although the bank takes more room so: each kept one takes two bytes more.",
)  # fmt: skip
@selection_options
@edit_options
def mask(
    bank: str, keep: int | None, keep_energy: float | None, keep_random: float | None, allow_larger: bool,
    output: str | None, dry_run: bool, no_undo: bool, as_json: bool, **selection: Any,
) -> None:  # fmt: skip
    """Hide rows of BANK: they stay in the file, and nothing reads them until 'unmask'. Or, with --keep, --keep-energy or
    --keep-random, drop coefficients of every row of a factored bank.
    """  # noqa: D205 - click takes the first paragraph for the summary
    import gmem_bank

    kept: dict[str, Any] = {"keep": keep, "keep_energy": keep_energy, "keep_random": keep_random}
    if any(value is not None for value in kept.values()):
        if not selection_from(**selection).empty or selection["invert"]:
            raise click.UsageError(
                "mask rows (--concept, --key, …) or coefficients (--keep, …), not both in one command"
            )
        if sum(value is not None for value in kept.values()) > 1:
            raise click.UsageError("give one of --keep, --keep-energy and --keep-random")
        report = gmem_bank.mask_coefficients(
            bank, seed=selection["seed"], allow_larger=allow_larger, **kept, **_edit(output, dry_run, no_undo)
        )
        facts = report.details
        before, after = facts.get("coefficient_bytes_before", 0), facts.get("coefficient_bytes_after", 0)
        if after > before:
            note(
                f"coefficients take {after:,} bytes now, without a mask {before:,}: a mask saves room where no row keeps more "
                f"than {facts['break_even']}"
            )
        print_edit(report, as_json, f"{facts.get('num_kept')} of {facts.get('num_coefficients')} coefficients kept")
        if not as_json and not report.unchanged:
            print_bytes(facts)
            print_cosines(facts)
        return
    report = gmem_bank.mask(bank, selection_from(**selection), **_edit(output, dry_run, no_undo))
    _print_mask(report, as_json, "hidden")


@click.command()
@bank_argument
@selection_options
@edit_options
def unmask(bank: str, output: str | None, dry_run: bool, no_undo: bool, as_json: bool, **selection: Any) -> None:
    """Show hidden rows of BANK again; without a selection all of them."""
    import gmem_bank

    chosen = selection_from(**selection)
    report = gmem_bank.unmask(bank, None if chosen.empty else chosen, **_edit(output, dry_run, no_undo))
    _print_mask(report, as_json, "shown again")


def _print_mask(report: Any, as_json: bool, done: str) -> None:
    changed, active = report.details.get("num_changed", 0), report.details.get("num_active")
    state = f", {active} of {report.num_rows} rows active" if active is not None else ""
    print_edit(report, as_json, f"{changed} rows {done}{state}")


@click.command()
@click.argument("name")
@click.argument("to")
@bank_option
@edit_options
def rename(name: str, to: str, bank: str, output: str | None, dry_run: bool, no_undo: bool, as_json: bool) -> None:
    """Give the concept NAME the name TO; its rows keep their keys."""
    import gmem_bank

    report = gmem_bank.rename(bank, name, to, **_edit(output, dry_run, no_undo))
    print_edit(report, as_json, f"concept {printable(name)!r} is {printable(to)!r}")


def _resolver(weights: str | None, device: str) -> Any:
    """Return what turns a key, a concept or an image file into a snippet; the encoder is loaded only for an image."""
    import gmem_bank

    def load(bank: Any) -> Any:
        return gmem_bank.reload_encoder(bank.encoder, bank.folder, weights=weights, device=device)

    return lambda bank, item: gmem_bank.snippet_or_image(bank, item, lambda: load(bank))


@click.command()
@click.argument("first")
@click.argument("second")
@bank_option
@click.option(
    "--method", type=click.Choice(["linear", "slerp", "concat", "mask"]), default="slerp", show_default=True,
    help="slerp: along the great arc; concat: first dimensions of one, last of the other; mask: a seeded choice per dimension.",
)  # fmt: skip
@click.option(
    "--steps", type=click.IntRange(min=2), default=6, show_default=True, help="Rows to write, both ends included."
)
@click.option("--name", "-n", default=None, help="The new concept's name; default: FIRST-to-SECOND.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="For --method mask.")
@click.option(
    "--weights", default=None, metavar="FOLDER", help="The encoder's weights, where the recorded place is gone."
)
@edit_options
@device_option
def interpolate(
    first: str, second: str, bank: str, method: str, steps: int, name: str | None, seed: int, weights: str | None,
    output: str | None, dry_run: bool, no_undo: bool, as_json: bool, device: str,
) -> None:  # fmt: skip
    """Write the way from FIRST to SECOND (keys, concepts or image files) as rows of a new concept."""
    import gmem_bank

    report = gmem_bank.interpolate(
        bank, first, second, method=method, steps=steps, name=name, seed=seed, resolve=_resolver(weights, device),
        **_edit(output, dry_run, no_undo),
    )  # fmt: skip
    name_shown = repr(printable(str(report.concept)))
    print_edit(report, as_json, f"as concept {name_shown}", f"already holds this way as concept {name_shown}")


@click.command()
@click.argument("terms")
@bank_option
@click.option("--name", "-n", default=None, help="The new concept's name; default: TERMS.")
@click.option(
    "--weights", default=None, metavar="FOLDER", help="The encoder's weights, where the recorded place is gone."
)
@edit_options
@device_option
def compose(
    terms: str, bank: str, name: str | None, weights: str | None, output: str | None, dry_run: bool, no_undo: bool,
    as_json: bool, device: str,
) -> None:  # fmt: skip
    """Write a weighted sum of snippets, such as "cat + 0.5*neon - dog", as the one row of a new concept.

    Items are concepts, keys or image files; quote those with spaces: "'two words' + cat".
    """
    import gmem_bank

    report = gmem_bank.compose(
        bank, terms, name=name, resolve=_resolver(weights, device), **_edit(output, dry_run, no_undo)
    )
    name_shown = repr(printable(str(report.concept)))
    print_edit(report, as_json, f"as concept {name_shown}", f"already holds this sum as concept {name_shown}")


@click.command()
@bank_argument
@click.option("--dry-run", is_flag=True, help="Say what would be undone, and write nothing.")
@json_option
def undo(bank: str, dry_run: bool, as_json: bool) -> None:
    """Take back the last edit of BANK: it is then, byte for byte, the bank that it was."""
    import gmem_bank

    report = gmem_bank.undo(bank, dry_run=dry_run)
    if as_json:
        print_json(report.to_json())
        return
    would = "would be undone" if dry_run else "undone"
    click.echo(f"{report.output}: {report.details['undone']} {would}, {report.num_rows} rows")
