"""gmem-bank insert-concept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from gmem_bank.cli.options import (
    column_options,
    columns_from,
    edit_options,
    print_edit,
    selection_from,
    selection_options,
)
from gmem_bank.console import (
    bank_option,
    encoder_run_options,
    list_skipped,
    note,
    print_json,
    printable,
    quiet_option,
    usage_errors,
    workers_option,
)


@click.command("insert-concept")
@click.argument("images", nargs=-1, type=click.Path())
@bank_option
@click.option("--name", "-n", default=None, help="The concept's name; default: the folder's name.")
@click.option("--flip", is_flag=True, help="Add a mirrored twin of each image, under its key with '#flip'.")
@click.option(
    "--report/--no-report", default=None,
    help="Compare the new rows with the bank: distances and near-duplicates. Default: up to 50,000 rows; with --report a "
    "larger bank is sampled.",
)  # fmt: skip
@click.option(
    "--grow-below", type=click.FloatRange(-1, 1), default=None, metavar="COSINE",
    help="Factored banks: add directions to the basis until each new snippet's reconstruction has this cosine; -1 never.",
)  # fmt: skip
@click.option("--same-encoder", is_flag=True, help="Vouch that the bank's encoder made the snippets of an array file.")
@click.option(
    "--weights", default=None, metavar="FOLDER", help="The encoder's weights, where the recorded place is gone."
)
@selection_options
@edit_options
@column_options
@workers_option
@encoder_run_options
@quiet_option
def insert_concept(
    images: tuple[str, ...], bank: str, name: str | None, flip: bool, report: bool | None, grow_below: float | None,
    same_encoder: bool, weights: str | None, output: str | None, dry_run: bool, no_undo: bool, as_json: bool, device: str,
    workers: int | None, batch_size: Any, image_column: str | None,
    label_column: str | None, key_column: str | None,
    quiet: bool, **selection: Any,
) -> None:  # fmt: skip
    """Add IMAGES to a bank as a new concept, without any training.

    IMAGES are folders, image files or whatever else 'build' takes, encoded by the encoder that made the bank; or array files
    (.npy, .npz, .safetensors, .h5, .parquet) of snippets that it made elsewhere. Without IMAGES, --key, --keys,
    --pattern and so on make a concept of rows that are in the bank already. Rows that are there stay byte for byte.
    """
    import gmem_bank

    chosen = selection_from(**selection)
    _require_sense(images, name, chosen)
    edit: dict[str, Any] = {"output": output, "dry_run": dry_run, "undo": not no_undo}
    if not images:
        result = gmem_bank.concept_of_rows(bank, str(name), chosen, **edit)
    elif _are_arrays(images):
        if flip:
            raise click.UsageError("--flip is for images: an array has no pictures to mirror")
        result = _insert_array(bank, images, name, same_encoder, {"report": report, "grow_below": grow_below, **edit})
    else:
        result = _insert_images(
            bank, images, weights, device, quiet,
            {"name": name, "flip": flip, "report": report, "grow_below": grow_below, "batch_size": batch_size,
             "num_workers": workers, "columns": columns_from(image_column, label_column, key_column), **edit},
        )  # fmt: skip
    list_skipped(result.skipped)
    if as_json:
        print_json(result.to_json())
        return
    name_shown = repr(printable(str(result.concept)))
    what = "images" if images else "rows"
    print_edit(result, False, f"as concept {name_shown}", f"already holds these {what} as concept {name_shown}")
    if result.skipped:
        click.echo(f"skipped: {len(result.skipped)} files")
    _print_novelty(result.details.get("novelty"))
    if "cosine_by_projection" in result.details:
        before, after = result.details["cosine_by_projection"], result.details["cosine"]
        click.echo(
            f"basis: +{result.details['grown_directions']} directions, rank {result.details['rank']} now; cosine of new rows: "
            f"median {after['median']:.3f}, min {after['min']:.3f}; projection alone {before['median']:.3f}, {before['min']:.3f}"
        )


def _require_sense(images: tuple[str, ...], name: str | None, chosen: Any) -> None:
    """Raise UsageError where it is not said what to insert, or the name is lacking or can be none."""
    from gmem_bank.ops import check_concept_name

    if images and not chosen.empty:
        raise click.UsageError("give IMAGES, or rows of the bank (--key, --keys, --pattern, …), not both")
    if not images and chosen.empty:
        raise click.UsageError("give IMAGES, or rows of the bank by --key, --keys, --pattern, …")
    if name is None and not images:
        raise click.UsageError("a concept of rows in the bank needs a --name")
    if name is None and len(images) > 1:
        raise click.UsageError("several folders or images need a --name for the concept")
    if name is not None:
        with usage_errors():
            check_concept_name(name)


def _are_arrays(images: tuple[str, ...]) -> bool:
    from gmem_bank.arrays import is_array_file
    from gmem_bank.contents import has_images

    arrays = [Path(path).is_file() and is_array_file(Path(path)) and not has_images(Path(path)) for path in images]
    if any(arrays) and (len(images) > 1):
        raise click.UsageError("give one array file, or any number of folders and images")
    return arrays[0]


def _insert_array(
    bank: str, images: tuple[str, ...], name: str | None, same_encoder: bool, options: dict[str, Any]
) -> Any:
    import gmem_bank

    opened = gmem_bank.open(bank)
    if not same_encoder and not opened.encoder.family.startswith(("precomputed", "imported")):
        raise click.UsageError(
            f"{images[0]} does not say which encoder made it, and {bank} is of {opened.encoder.describe()}: vouch for it with "
            "--same-encoder"
        )
    rows = gmem_bank.read_array(Path(images[0]))
    return gmem_bank.insert_snippets(bank, rows, name=Path(images[0]).stem if name is None else name, **options)


def _insert_images(
    bank: str, images: tuple[str, ...], weights: str | None, device: str, quiet: bool, options: dict[str, Any]
) -> Any:
    import gmem_bank
    from gmem_bank.contents import require_source
    from gmem_bank.progress import ProgressBar

    opened = gmem_bank.open(bank)
    for path in images:
        require_source(path)
    with usage_errors():
        encoder = gmem_bank.reload_encoder(opened.encoder, opened.folder, weights=weights, device=device)
    with ProgressBar("encode", "image", quiet=quiet) as progress:
        return gmem_bank.insert_concept(bank, images, encoder, progress=progress, **options)


def _print_novelty(novelty: dict[str, Any] | None) -> None:
    if novelty is None:
        return
    sample = f"a sample of {novelty['rows_compared']}" if novelty["sampled"] else f"all {novelty['rows_compared']}"
    own = f"; between rows of the bank: median {novelty['bank']['median']:.3f}" if novelty["bank"] else ""
    click.echo(
        f"cosine to the nearest of {sample} rows: median {novelty['new']['median']:.3f}, "
        f"{novelty['new']['p5']:.3f} to {novelty['new']['p95']:.3f}{own}"
    )
    if novelty["num_near_duplicates"]:
        click.echo(f"near-duplicates (cosine ≥ 0.98): {novelty['num_near_duplicates']}")
        for pair in novelty["near_duplicates"][:5]:
            note(f"  {printable(pair['key'])} ~ {printable(pair['nearest'])} ({pair['cosine']:.4f})")
