"""gmem-gen sample. Only click is imported here; the command imports the library when it runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import click

import gmem_bank
from gmem_gen.cli_sample_options import condition_options, drawing_options, output_options
from gmem_gen.cli_shared import bank_option, json_option, print_json, quiet_option, set_option

WAYS = ("linear", "slerp", "concat", "mask")
"""How --interpolate may go; no solver is called so."""
KINDS = ("concepts", "keys", "images", "texts", "interpolate", "sums")
SPELT = {"concepts": "--concept", "keys": "--key", "images": "--image", "texts": "--text", "sums": "--compose"}
"""Parameter → option, where they are not spelt alike."""


@click.command()
@bank_option
@click.option(
    "--checkpoint",
    "-c",
    default=None,
    metavar="RUN",
    help="A run, one of its checkpoints, or an exported folder; default: runs/<bank stem>.",
)
@condition_options
@drawing_options
@set_option
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, …")
@output_options
@click.option("--dry-run", is_flag=True, help="Check everything, say what would be drawn, and draw nothing.")
@json_option
@quiet_option
def sample(
    bank: str, checkpoint: str | None, weights: str, device: str, settings: tuple[str, ...], dry_run: bool, as_json: bool,
    quiet: bool, **options: Any,
) -> None:  # fmt: skip
    """Draw samples for rows of a bank (a concept's, given keys', or random ones), for images, texts, the way between two
    snippets, or sums of them. Nothing is trained, and nothing is written to the bank.

    The bank may have been edited since the training: inserted concepts need none. What is not given here is as the run's
    sample settings say ('gmem-gen config' lists them; in brackets what they are where nothing was set).
    """  # noqa: D205 - click takes the first paragraph for the summary
    import gmem_gen
    from gmem_gen.conditioning import open_bank
    from gmem_gen.exporting import held_weights
    from gmem_gen.run import default_run
    from gmem_gen.runtime import pick_device

    kind = _kind_of(options)
    way = _way_of(options) if kind == "interpolate" else {}
    given = _drawing_of(options)
    with gmem_bank.usage_errors():  # wrong values are told before anything is opened
        gmem_gen.SampleConfig(**given)
        _check_places(options)
        place = str(pick_device(device))
    opened = open_bank(bank)
    loaded = gmem_gen.load_checkpoint(checkpoint or default_run(bank), weights=weights, device=place)
    loaded = _with_tokenizer_weights(loaded, options["tokenizer_weights"])
    config = _sample_settings(loaded.config, given, settings)
    conditions = _conditions(opened, kind, way, options, config.seed, device)
    files = _files(options, loaded.run, conditions, way)
    if dry_run:
        _print_plan(opened, loaded, conditions, config, files, as_json)
        return
    try:
        with gmem_bank.ProgressBar("sample", "image", quiet=quiet) as progress:
            report = gmem_gen.sample_to(
                files, opened, loaded, conditions, config, num_shards=options["num_shards"], shard=options["shard"],
                overwrite=options["overwrite"], progress=progress, say=lambda text: click.echo(text, err=True),
                facts={"weights": held_weights(loaded, weights), "bank_path": bank},
            )  # fmt: skip
    except KeyboardInterrupt:
        if files.folder is not None or files.npz is not None:
            click.echo("What was drawn stands; the same command goes on from here.", err=True)
        raise
    _print_report(report, conditions.label, files, as_json)


def _kind_of(options: dict[str, Any]) -> str:
    """Return which kind of condition was given, "" for none; more than one is a usage error."""
    if options["keys_from"] is not None:
        options["keys"] = (*options["keys"], *_read_keys(options["keys_from"]))
    found = [name for name in KINDS if options[name]]
    if len(found) > 1:
        named = " and ".join(SPELT.get(name, f"--{name}") for name in found)
        raise click.UsageError(
            f"{named} were given: one command samples from one kind of condition (each may be repeated)"
        )
    return found[0] if found else ""


def _read_keys(path: str) -> list[str]:
    try:
        with click.open_file(path, encoding="utf-8") as lines:
            keys = [line.rstrip("\n") for line in lines if line.strip()]
    except UnicodeDecodeError as error:
        raise click.UsageError(f"--keys-from {path}: not a text of keys, one a line ({error.reason})") from error
    if not keys:
        raise click.UsageError(f"--keys-from {path}: there is no key in it")
    return keys


def _way_of(options: dict[str, Any]) -> dict[str, Any]:
    """Return frames and method of --interpolate, and leave what belongs to the solver.

    `--steps` and `--method` mean here what they do in 'gmem-bank interpolate', unless --frames or a solver's name is given.
    """
    if options["num"] is not None:
        raise click.UsageError("--num does not go with --interpolate: --frames says how many pictures the way has")
    way: dict[str, Any] = {"frames": 8, "method": "slerp"}
    if options["method"] in WAYS:
        if options["interpolation"] not in (None, options["method"]):
            raise click.UsageError(
                f"--method {options['method']} and --interpolation {options['interpolation']}: give one"
            )
        way["method"], options["method"] = options["method"], None
    if options["interpolation"] is not None:
        way["method"] = options["interpolation"]
    if options["frames"] is not None:
        way["frames"] = options["frames"]
    elif options["num_steps"] is not None:
        way["frames"], options["num_steps"] = options["num_steps"], None
        click.echo(
            f"--steps {way['frames']} is the number of pictures of the way, as in 'gmem-bank interpolate'; --frames says the "
            "same, and leaves --steps to the solver",
            err=True,
        )
    return way


def _drawing_of(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of SampleConfig that were given."""
    way = options["frames"], options["interpolation"]
    if way != (None, None) and not options["interpolate"]:
        raise click.UsageError("--frames and --interpolation go with --interpolate FIRST SECOND")
    if options["method"] in WAYS:
        raise click.UsageError(
            f"--method {options['method']} is a way between two snippets and goes with --interpolate FIRST SECOND"
        )
    for first, second in (("method", "solver"), ("num_steps", "solver_steps")):
        if options[first] is not None and options[second] is not None:
            raise click.UsageError(
                f"--{first.removeprefix('num_')} and --{second.replace('_', '-')} are the same: give one"
            )
    names = (
        "timestep_shift", "diffusion", "diffusion_norm", "last_step", "last_step_size", "guidance", "precision", "seed",
        "batch_size",
    )  # fmt: skip
    given = {name: options[name] for name in names}
    given["method"] = options["solver"] or options["method"]
    given["num_steps"] = options["solver_steps"] if options["num_steps"] is None else options["num_steps"]
    if options["guidance_interval"] is not None:
        given["guidance_start"], given["guidance_end"] = options["guidance_interval"]
    return {name: value for name, value in given.items() if value is not None}


def _check_places(options: Mapping[str, Any]) -> None:
    """Refuse outputs that are in the way before minutes go into sampling."""
    from gmem_gen.array_store import require_npz
    from gmem_gen.images import require_own

    if options["output"] is not None:
        require_own(Path(options["output"]))
    if options["npz"] is not None:
        require_npz(Path(options["npz"]))
    if options["shard"] >= options["num_shards"]:
        raise click.UsageError(f"--shard is 0 to --num-shards - 1, got {options['shard']} of {options['num_shards']}")


def _sample_settings(config: Any, given: dict[str, Any], settings: tuple[str, ...]) -> Any:
    """Return the run's sample settings with those of the command line over them."""
    import gmem_gen

    for setting in settings:
        if not setting.strip().startswith("sample."):
            raise click.UsageError(f"--set {setting}: sampling takes settings of the section 'sample' only")
    words = [*settings, *(f"sample.{name}={value}" for name, value in given.items())]
    with gmem_bank.usage_errors():
        return gmem_gen.apply_settings(config, words).sample


def _with_tokenizer_weights(checkpoint: Any, place: str | None) -> Any:
    """Return a checkpoint whose tokenizer's weights are looked for elsewhere; they must be the same."""
    import dataclasses

    if place is None:
        return checkpoint
    return dataclasses.replace(checkpoint, tokenizer={**checkpoint.tokenizer, "weights": place, "revision": ""})


def _conditions(
    bank: Any, kind: str, way: Mapping[str, Any], options: Mapping[str, Any], seed: int, device: str
) -> Any:
    """Return what to sample from."""
    import gmem_gen

    amount = {name: options[name] for name in ("num", "per_snippet", "same_noise")}
    load = _loader(bank, options["encoder_weights"], device)
    if kind == "interpolate":
        del amount["num"]
        first, second = options["interpolate"]
        return gmem_gen.interpolation_conditions(bank, first, second, **way, seed=seed, load=load, **amount)
    if kind == "images":
        return gmem_gen.image_conditions(bank, options["images"], load=load, **amount)
    if kind == "texts":
        return gmem_gen.text_conditions(bank, options["texts"], load=load, **amount)
    if kind == "sums":
        return gmem_gen.composition_conditions(bank, options["sums"], load=load, **amount)
    return gmem_gen.choose_conditions(bank, concept=options["concepts"], keys=options["keys"], seed=seed, **amount)


def _loader(bank: Any, weights: str | None, device: str) -> Callable[[], Any]:
    """Return what loads the bank's own encoder, and checks that it is the same."""
    return lambda: gmem_bank.reload_encoder(bank.encoder, bank.folder, weights=weights, device=device)


def _files(options: Mapping[str, Any], run: Path, conditions: Any, way: Mapping[str, Any]) -> Any:
    """Return where samples go; a way's grid has it in a row, or its samples of one point."""
    import gmem_gen

    columns, several = options["columns"], options["per_snippet"]
    if columns is None and way and max(several, way["frames"]) <= 16:
        columns = several if several > 1 else way["frames"]
    folder, npz, output = options["save_images"], options["npz"], options["output"]
    return gmem_gen.SampleFiles(
        grid=run / "samples" / f"{conditions.label}.png" if output is None else Path(output),
        columns=columns,
        folder=None if folder is None else Path(folder),
        npz=None if npz is None else Path(npz),
    )


def _print_plan(bank: Any, checkpoint: Any, conditions: Any, config: Any, files: Any, as_json: bool) -> None:
    """Say what would be drawn, after the checks that drawing makes."""
    from gmem_gen.sampling import check_request, describe, expected_nfe

    remarks = check_request(bank, checkpoint, conditions, config)
    record = describe(bank, checkpoint, conditions, config) | {"expected_nfe": expected_nfe(config), "remarks": remarks}
    record["outputs"] = {name: str(place) for name, place in vars(files).items() if isinstance(place, Path)}
    if as_json:
        print_json(record)
        return
    for remark in remarks:
        click.echo(remark, err=True)
    places = ", ".join(record["outputs"].values())
    click.echo(
        f"would draw {len(conditions)} samples of {conditions.label!r} by {config.method}, NFE "
        f"{record['expected_nfe'] or 'as the solver chooses'}, {config.precision}, into {places}"
    )
    for key in conditions.keys[:10]:
        click.echo(f"  {key}")
    if len(conditions) > 10:
        click.echo(f"  … and {len(conditions) - 10} more")


def _print_report(report: Any, label: str, files: Any, as_json: bool) -> None:
    record = report.record
    if as_json:
        places = {
            "grid": str(files.grid) if report.complete else None,
            "images": None if files.folder is None else str(files.folder),
            "npz": None if files.npz is None else str(files.npz),
        }
        print_json({**places, "num_drawn": report.num_drawn, "complete": report.complete, **record})
        return
    present = report.num_images - report.num_drawn
    if not report.complete:
        click.echo(
            f"{report.num_drawn} samples drawn in {report.seconds} s; those of other processes are still missing"
        )
        return
    if not report.num_drawn:
        click.echo(f"{files.grid}: all {present} samples of {label!r} were there already, NFE {record['nfe']}")
        return
    others = " or are of other processes" if record.get("num_shards", 1) > 1 else ""
    there = f", {present} of them were there already{others}" if present else ""
    click.echo(
        f"{files.grid}: {report.num_images} samples of {label!r}{there}, NFE {record['nfe']}, {report.seconds} s"
    )
