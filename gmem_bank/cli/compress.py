"""gmem-bank compress."""

from __future__ import annotations

from typing import Any

import click

from gmem_bank.cli.options import edit_options, print_bytes, print_cosines, print_edit
from gmem_bank.console import ShareType, SizeType, note, print_json, quiet_option


@click.command()
@click.argument("banks", nargs=-1, type=click.Path(), metavar="[BANK]...")
@click.option("--rank", "-r", type=click.IntRange(min=1), default=None, metavar="R", help="Components to keep.")
@click.option(
    "--energy", type=ShareType(), default=None, metavar="E", help="Share of the centred squared norm to keep: 0.95."
)
@click.option(
    "--target-cosine",
    type=ShareType(below_one=True),
    default=None,
    metavar="C",
    help="Mean cosine to the snippets to reach: 0.99.",
)
@click.option(
    "--max-bytes",
    type=SizeType(),
    default=None,
    metavar="B",
    help="Size of the bank not to pass: 500000, 20M, 1.5G (K, M and G are powers of 1024).",
)
@click.option(
    "--dtype", type=click.Choice(["f32", "f16", "i8"]), default=None,
    help="How coefficients are stored; i8 with a scale a component. Default: f32; a sweep shows all.",
)  # fmt: skip
@click.option(
    "--memory-limit",
    type=SizeType(),
    default=None,
    metavar="B",
    help="Working memory, such as 200M; default: some 200 MB.",
)
@click.option(
    "--sweep",
    is_flag=True,
    help="Write no bank: print what ranks, types and coefficient masks keep, and how large they are.",
)
@click.option("--plot", default=None, metavar="FILE", help="Draw the spectrum into a .html or .png file.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Draws the rows compared.")
@edit_options
@quiet_option
def compress(
    banks: tuple[str, ...], max_bytes: int | None, memory_limit: int | None, sweep: bool, plot: str | None, seed: int,
    output: str | None, dry_run: bool, no_undo: bool, as_json: bool, quiet: bool, **goal: Any,
) -> None:  # fmt: skip
    """Store the snippets of BANK as coefficients on their principal directions; give one of --rank, --energy, --target-cosine
    and --max-bytes.

    Of a factored bank components are dropped, by their energy. Several BANKs of one encoder become one, written to -o; all of
    them are read. The same command again after an interruption ends in the same bytes: the first pass over dense rows, which
    has most of the work, continues; all else begins anew.
    """  # noqa: D205 - click takes the first paragraph for the summary
    import gmem_bank
    from gmem_bank.progress import ProgressBar

    paths = list(banks) or ["bank.safetensors"]
    dtype = goal.pop("dtype")
    limits: dict[str, Any] = {"memory_limit": memory_limit, "plot": plot, "seed": seed}
    if sweep:
        asked = [value for value in goal.values() if value is not None]
        if asked or max_bytes or output or len(paths) > 1:
            raise click.UsageError("--sweep shows what each goal would give, of one BANK: give no goal and no --output")
        if dry_run or no_undo:
            raise click.UsageError("--sweep writes no bank: --dry-run and --no-undo are for one that is compressed")
        dtypes: dict[str, Any] = {} if dtype is None else {"dtypes": (dtype,)}
        with ProgressBar("sweep", "row", quiet=quiet) as progress:
            found = gmem_bank.sweep(paths[0], progress=progress, **dtypes, **limits)
        print_json(found.to_json()) if as_json else click.echo(found.table())
        return
    goals = {"--" + name.replace("_", "-"): value for name, value in (goal | {"max_bytes": max_bytes}).items()}
    given = [name for name, value in goals.items() if value is not None]
    if len(given) != 1:
        got = f"got {' and '.join(given)}" if given else "none was given"
        raise click.UsageError(f"give exactly one of {', '.join(goals)}; {got}")
    with ProgressBar("compress", "row", quiet=quiet) as progress:
        report = gmem_bank.compress(
            paths, max_bytes=max_bytes, dtype=dtype or "f32", output=output, dry_run=dry_run, undo=not no_undo,
            progress=progress, **limits, **goal,
        )  # fmt: skip
    facts = report.details
    print_edit(report, as_json, f"rank {facts.get('rank')}, {dtype or 'f32'} coefficients")
    if not as_json and not report.unchanged:
        _print_quality(facts)


def _print_quality(facts: dict[str, Any]) -> None:
    if facts["rank_asked"] > facts["rank"]:
        note(f"rank {facts['rank_asked']} was asked for: the rows span {facts['rank']} directions")
    if facts["bytes_after"] > facts["bytes_before"]:
        note("the bank takes more room than before: a lower rank or --dtype i8 takes less")
    print_bytes(facts)
    error = f", relative error {facts['relative_error']:.4g}" if "relative_error" in facts else ""
    click.echo(f"  energy    {facts['energy']:.4f}{error} (optimum {facts['optimal_relative_error']:.4g})")
    print_cosines(facts)
