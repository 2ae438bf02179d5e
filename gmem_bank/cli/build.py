"""gmem-bank build and gmem-bank encoders."""

from __future__ import annotations

from typing import Any

import click

from gmem_bank.cli.options import BankNameType, column_options, columns_from
from gmem_bank.console import (
    encoder_run_options,
    human_bytes,
    json_option,
    list_skipped,
    note,
    parse_parameters,
    print_json,
    quiet_option,
    usage_errors,
    workers_option,
)


@click.command()
@click.argument("source", default=".", type=click.Path())
@click.option("--encoder", "-e", default="dinov2", show_default=True, metavar="NAME", help="See 'gmem-bank encoders'.")
@click.option(
    "--weights", default=None, metavar="FOLDER", help="Folder with the encoder's weights, instead of the hub cache."
)
@click.option(
    "--set", "pairs", multiple=True, metavar="NAME=VALUE", help="A parameter of the encoder; may be repeated."
)
@click.option(
    "--output", "-o", "--bank", type=BankNameType(), default="bank.safetensors", show_default=True, metavar="FILE",
    help="The bank to write.",
)  # fmt: skip
@click.option(
    "--space", type=click.Choice(["unit", "raw"]), default="unit", show_default=True, help="unit: snippets of norm 1."
)
@click.option(
    "--dtype",
    type=click.Choice(["f32", "f16", "bf16"]),
    default="f32",
    show_default=True,
    help="How snippets are stored.",
)
@click.option(
    "--include", multiple=True, metavar="GLOB", help="Only images whose path in SOURCE matches; may be repeated."
)
@click.option("--exclude", multiple=True, metavar="GLOB", help="No images whose path matches; may be repeated.")
@click.option("--limit", type=click.IntRange(min=1), default=None, help="Only so many images.")
@click.option("--shuffle-seed", type=click.IntRange(min=0), default=None, help="In a random order, drawn by this seed.")
@click.option("--flip", is_flag=True, help="Add a mirrored twin of each image, under its key with '#flip'.")
@click.option(
    "--num-shards",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Cut the work into so many parts …",
)
@click.option(
    "--shard", type=click.IntRange(min=0), default=0, show_default=True, help="… and do this one; 'merge' joins them."
)
@column_options
@workers_option
@encoder_run_options
@click.option("--overwrite", is_flag=True, help="Replace an existing bank that was built differently.")
@json_option
@quiet_option
def build(
    source: str, encoder: str, weights: str | None, pairs: tuple[str, ...], output: str, space: str, dtype: str,
    workers: int | None, device: str, batch_size: Any, image_column: str | None,
    label_column: str | None, key_column: str | None,
    overwrite: bool, as_json: bool, quiet: bool, **narrowing: Any,
) -> None:  # fmt: skip
    """Encode the images of SOURCE (default: this folder) into a bank.

    SOURCE is a folder, a text file that names images (.txt), tar files (webdataset shards: "shards/*.tar"), arrays of pixels
    (.npy, .npz), a table with a column of images (.parquet, .arrow, a folder of datasets.save_to_disk,
    hf://datasets/OWNER/NAME), or with --encoder precomputed a file of snippets. Class folders, columns of classes and the
    .cls members of tar files become concepts. Unusable images are listed in FILE.report.json and passed over. After a
    kill or Ctrl-C the same command continues.
    """
    import gmem_bank
    from gmem_bank.contents import require_source
    from gmem_bank.narrowing import Narrowing
    from gmem_bank.progress import ProgressBar

    with usage_errors():
        wanted = Narrowing(**narrowing)
    if encoder == "precomputed":
        _refuse_inapplicable(click.get_current_context())
        _build_precomputed(source, pairs, output, space, dtype, overwrite, as_json)
        return
    require_source(source)  # before minutes go into loading an encoder
    with usage_errors():
        loaded = gmem_bank.load_encoder(
            encoder, weights=weights, device=device, space=space, parameters=parse_parameters(pairs)
        )
    if wanted.num_shards > 1:
        _require_one_precision(loaded, parse_parameters(pairs))
    with ProgressBar("encode", "image", quiet=quiet) as progress:
        report = gmem_bank.build(
            source, loaded, output, dtype=dtype, batch_size=batch_size, num_workers=workers, narrowing=wanted,
            columns=columns_from(image_column, label_column, key_column),
            overwrite=overwrite, progress=progress,
        )  # fmt: skip
    _remark(source, report, loaded)
    if as_json:
        print_json(report.to_json())
        return
    if report.unchanged:
        note(f"{report.bank} was built from these images already: nothing to do (--overwrite builds it again)")
    concepts = f", {len(report.concepts)} concepts" if report.concepts else ""
    click.echo(
        f"{report.bank}: {report.num_rows} rows × {report.dim}, {report.space} space, {report.encoder}{concepts}, "
        f"{human_bytes(report.bytes)}"
    )
    num_others = len(report.skipped) - report.num_unreadable
    click.echo(
        f"skipped: {report.num_unreadable} unusable images, {num_others} other files ({report.bank}.report.json)"
    )


def _require_one_precision(encoder: Any, parameters: dict[str, Any]) -> None:
    """Raise UsageError where the machine would choose the precision of a part: another's would not be merged with it."""
    chosen = encoder.spec.parameters.get("dtype")
    if chosen is not None and parameters.get("dtype", "auto") == "auto":
        raise click.UsageError(
            f"parts must be computed alike on whatever machine, and this one would choose {chosen}: give every part "
            "--set dtype=fp32 or --set dtype=bf16"
        )


def _remark(source: str, report: Any, encoder: Any) -> None:
    """Print on stderr what a build passed over, and what its precision cost."""
    import gmem_bank
    from gmem_bank.encoders import SupportsPrecision

    if report.num_outdated:
        note(
            f"{source} does not list the images that it had when a build of it was interrupted: {report.num_outdated} finished "
            "batches of that build were not used"
        )
    list_skipped(report.skipped)
    dtype_used = encoder.spec.parameters.get("dtype", "fp32")
    cosine = gmem_bank.open(report.bank).encoder.labels.get("cosine_to_fp32")
    if cosine is not None:
        note(f"computed in {dtype_used}: cosine to float32 {cosine} on the first eight images (--set dtype=fp32)")
    elif isinstance(encoder, SupportsPrecision) and dtype_used != "fp32":
        note(f"computed in {dtype_used}: none of the first eight images says how far from float32 (--set dtype=fp32)")


FOR_PRECOMPUTED = {"source", "encoder", "pairs", "output", "space", "dtype", "overwrite", "as_json", "quiet"}


def _refuse_inapplicable(context: click.Context) -> None:
    """Raise UsageError for an option that is given and has no effect on snippets that are there already."""
    for parameter in context.command.params:
        given = context.get_parameter_source(str(parameter.name)) == click.core.ParameterSource.COMMANDLINE
        if given and parameter.name not in FOR_PRECOMPUTED:
            raise click.UsageError(
                f"{parameter.opts[0]} has no meaning for --encoder precomputed: nothing is decoded or encoded"
            )


def _build_precomputed(
    source: str, pairs: tuple[str, ...], output: str, space: Any, dtype: str, overwrite: bool, as_json: bool
) -> None:
    from pathlib import Path

    import gmem_bank
    from gmem_bank.encoders import refuse_unknown

    with usage_errors():
        parameters = refuse_unknown("precomputed", parse_parameters(pairs), {"model": ""})
    report = gmem_bank.build_precomputed(
        gmem_bank.read_array(Path(source)), output, space=space, dtype=dtype, model=str(parameters["model"]),
        overwrite=overwrite,
    )  # fmt: skip
    if as_json:
        print_json(report.to_json())
        return
    if report.unchanged:
        note(f"{report.bank} was built from these snippets already: nothing to do (--overwrite builds it again)")
    click.echo(
        f"{report.bank}: {report.num_rows} rows × {report.dim}, {report.space} space, {human_bytes(report.bytes)}"
    )


@click.command()
@json_option
def encoders(as_json: bool) -> None:
    """List the encoders, plug-ins included."""
    import gmem_bank

    infos: list[Any] = list(gmem_bank.available_encoders().values())
    if as_json:
        print_json(
            [{"name": i.name, "description": i.description, "origin": i.origin, "extra": i.extra} for i in infos]
        )
        return
    width = max(len(info.name) for info in infos)
    for info in infos:
        needs = f"  (extra gmem[{info.extra}])" if info.extra else ""
        click.echo(f"{info.name:<{width}}  {info.description}{needs}")
