"""Published checkpoints in and out: the same outputs, the same tensors, and a clear word for every file that is none."""

from __future__ import annotations

import argparse
import dataclasses
import json
import pickle
import shlex
import zipfile
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import load_file, save_file

import gmem_bank
import gmem_gen
from gmem_bank.errors import CheckpointError, ConfigError, EncoderMismatchError, FormatError, OutputExistsError
from gmem_gen import conditioning, presets
from gmem_gen.cli import main as gen_main
from gmem_gen.config import ModelConfig
from gmem_gen.guidance import Guided
from gmem_gen.legacy import LatentSource, Memory
from gmem_gen.model import Generator, LatentShape
from gmem_gen.official_layout import deduce
from tests.conftest import DATA
from tests.gmem_gen.golden import WHOLE, model_of, projector_state

CLOSE = {"atol": 2e-5, "rtol": 1e-4}
DINO = Memory(encoder=gmem_bank.EncoderSpec(name="dinov2", family="dinov2", dim=768, space="unit"))


def golden(
    case: str = "patch2", *, head: bool = False
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], dict]:
    """State dict (with the projection head, which is large), vectors, and facts of a small published model."""
    folder = DATA if case == "patch2" else WHOLE
    vectors = load_file(folder / f"lightningdit_{case}.safetensors")
    facts = json.loads((folder / f"lightningdit_{case}.json").read_text())
    model = model_of(facts["class_kwargs"], encoder_depth=facts["encoder_depth"], projection_dim=768 if head else 0)
    state = {name.removeprefix("state."): v for name, v in vectors.items() if name.startswith("state.")}
    state |= projector_state() if head else {}
    return {name: state[name] for name in model.state_dict()}, vectors, facts


def saved(content: object, name: str = "official.pt") -> Path:
    torch.save(content, name)
    return Path(name)


def bring_in(path: Path, out: str = "run", **options: object) -> gmem_gen.ImportReport:
    return gmem_gen.import_checkpoint(path, out, **{"memory": DINO, **options})


def gen(*arguments: str, code: int = 0) -> Result:
    result = CliRunner().invoke(gen_main, arguments, catch_exceptions=False)
    assert result.exit_code == code, result.output
    return result


@pytest.mark.parametrize("case", ["patch2", *(["xlflags"] if WHOLE else [])])
def test_an_imported_model_gives_the_published_outputs(case: str) -> None:
    """Conditional, null and guided: every stored output of the small models."""
    state, vectors, facts = golden(case, head=True)
    report = bring_in(saved({"ema": state, "model": state, "args": argparse.Namespace(lr=1)}))
    kwargs = facts["class_kwargs"]
    wanted = {"width": kwargs["hidden_size"], "depth": kwargs["depth"], "num_heads": kwargs["num_heads"],
              "patch_size": kwargs["patch_size"], "snippet_scale": 1.0, "mlp_ratio": 4.0, "projection_dim": 768,
              "use_shift": not kwargs["wo_shift"], "use_qk_norm": kwargs["use_qknorm"]}  # fmt: skip
    assert {name: report.model[name] for name in wanted} == wanted
    assert report.latent == {"channels": kwargs["in_channels"], "size": kwargs["input_size"]}
    model = gmem_gen.load_checkpoint("run").model
    x, t, c = vectors["in.x"], vectors["in.t"], vectors["in.c"]
    with torch.no_grad():
        torch.testing.assert_close(model(x, t, c), vectors["eval.out"], **CLOSE)
        torch.testing.assert_close(model(x, t, torch.zeros_like(c)), vectors["eval.out_c_zero"], **CLOSE)
        for run in facts["cfg"]:
            interval = (
                (run.get("cfg_interval_start", 0), run.get("cfg_interval_end", 1))
                if run.get("cfg_interval")
                else (0, 1)
            )
            field = Guided(model, c, torch.zeros_like(c), run["cfg_scale"], *map(float, interval))
            out = vectors[f"cfg.{run['name']}.out"]
            torch.testing.assert_close(field(x, torch.full((len(x),), run["t"])), out[: len(x)], atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("form", ["both", "ema", "model", "bare", "module", "compiled", "safetensors", "nested"])
def test_every_form_of_file_is_read(form: str) -> None:
    """Under "model" and "ema", one of them, or bare; with the prefixes of DDP and torch.compile; the step, where it is said."""
    state = golden()[0]
    other = {name: value + 1 for name, value in state.items()}
    if form == "safetensors":
        path = Path("official.safetensors")
        save_file(state, path)
    elif form == "nested":
        path = Path("official.safetensors")
        save_file({f"ema.{n}": v for n, v in state.items()} | {f"model.{n}": v for n, v in other.items()}, path)
    else:
        path = saved({
            "both": {"model": other, "ema": state, "opt": {"state": {}}, "steps": 70}, "ema": {"ema": state},
            "model": {"model": state}, "bare": state, "module": {"ema": {f"module.{n}": v for n, v in state.items()}},
            "compiled": {f"module._orig_mod.{n}": v for n, v in state.items()},
        }[form])  # fmt: skip
    report = bring_in(path)
    assert report.step == (70 if form == "both" else 0)
    assert set(report.parts) == (
        {"model", "ema"} if form in ("both", "nested") else {"model" if form == "model" else "ema"}
    )
    two = form in ("both", "nested")
    for weights, expected in (("ema", state), ("model", other if two else state)):
        found = gmem_gen.load_checkpoint("run", weights=weights).model.state_dict()
        assert all(torch.equal(found[name], value) for name, value in expected.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_round_trip_is_exact(dtype: torch.dtype) -> None:
    """Names, order, types and every bit, through the run and back to a .pt by the line that the export names."""
    state = golden()[0]
    small = {name: value.to(dtype) if name.startswith("blocks") else value for name, value in state.items()}
    original = {"model": {name: value * 2 for name, value in small.items()}, "ema": small}
    bring_in(saved(original))
    report = json.loads(gen("export", "-c", "run", "--to", "official", "-o", "back.safetensors", "--json").stdout)
    python, flag, code = shlex.split(report["to_pt"])
    assert (python, flag) == ("python", "-c")
    exec(code, {})  # the line that a shell would run
    back = torch.load("back.pt", weights_only=True)
    assert list(back) == ["model", "ema"]
    for part, table in original.items():
        assert list(back[part]) == list(table)
        for name, value in table.items():
            assert back[part][name].dtype == value.dtype
            assert torch.equal(back[part][name], value), (part, name)
    again = bring_in(Path("back.safetensors"), out="second")
    assert again.parts == ("model", "ema")
    gen("export", "-c", "second", "--to", "official", "-o", "again.safetensors", "--weights", "ema")
    first, second = load_file("back.safetensors"), load_file("again.safetensors")
    assert all(torch.equal(first[name], value) for name, value in second.items())
    with pytest.raises(OutputExistsError):
        gmem_gen.export_official("run", "back.safetensors")
    with pytest.raises(FormatError, match="no pickle is ever written"):
        gmem_gen.export_official("run", "back.pt.pth")


@pytest.mark.parametrize("size", ["S-1", "B-1", "B-2", "XL-1"])
def test_the_published_sizes_are_recognised_by_their_shapes(size: str) -> None:
    """The lists of the published tensors give the published presets."""
    record = json.loads((DATA / "published_tensors.json").read_text())[size]
    layout = deduce({name: tuple(shape) for name, shape in record["tensors"].items()})
    preset = presets.MODEL_PRESETS[f"LightningDiT-{size.replace('-', '/')}"]()
    assert layout.model == dataclasses.replace(preset, snippet_scale=1.0, projection_dim=768)
    assert (layout.latent, layout.snippet_dim) == (LatentShape(channels=32, size=16), 768)


@pytest.mark.parametrize("switch", [
    {}, {"use_swiglu": False}, {"use_rmsnorm": False}, {"use_rope": False, "use_qk_norm": True}, {"use_shift": False},
    {"mlp_ratio": 3.0}, {"mlp_ratio": 2.7}, {"condition": "none"}, {"condition": "class", "num_classes": 7},
    {"use_qk_norm": True, "use_rmsnorm": False}, {"width": 48, "num_heads": 4, "mlp_ratio": 3.3, "use_swiglu": False},
])  # fmt: skip
def test_every_switch_is_read_off_the_shapes(switch: dict) -> None:
    """The model built from what was deduced has the same tensors."""
    config = ModelConfig(**{"width": 64, "depth": 3, "num_heads": 4, "patch_size": 2, "snippet_scale": 1.0, **switch})
    model = Generator(config, LatentShape(channels=3, size=8), 24)
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    layout = deduce(shapes)
    again = Generator(layout.model, layout.latent, layout.snippet_dim).state_dict()
    assert {name: tuple(value.shape) for name, value in again.items()} == shapes
    same = ("width", "depth", "num_heads", "use_rope", "use_swiglu", "use_rmsnorm", "use_qk_norm", "use_shift", "condition",
            "num_classes")  # fmt: skip
    assert {name: getattr(layout.model, name) for name in same} == {name: getattr(config, name) for name in same}


def test_heads_that_nothing_tells_are_asked_for() -> None:
    """Without rotary tables and norms of queries a width that is no published one says nothing."""
    config = ModelConfig(width=64, depth=1, num_heads=2, use_rope=False, patch_size=1, snippet_scale=1.0)
    state = Generator(config, LatentShape(channels=3, size=4), 768).state_dict()
    path = saved(dict(state))
    with pytest.raises(CheckpointError, match="--num-heads"):
        bring_in(path)
    assert bring_in(path, num_heads=2).model["num_heads"] == 2


def test_wrong_missing_extra_and_misshapen_tensors_are_named() -> None:
    """Each by its name and number, with the file."""
    state = golden()[0]

    def refused(change: dict, answer: str, **options: object) -> None:
        table = {name: value for name, value in {**state, **change}.items() if value is not None}
        with pytest.raises(CheckpointError, match=answer):
            bring_in(saved(table), **options)

    refused({"blocks.1.mlp.w3.bias": None}, r"official\.pt: .*1 missing: 'blocks\.1\.mlp\.w3\.bias'")
    refused(
        {"blocks.1.mlp.w3.bais": torch.zeros(3), "blocks.1.mlp.w3.bias": None}, "Did you mean 'blocks.1.mlp.w3.bias'"
    )
    refused({"extra.weight": torch.zeros(3)}, r"1 without a place in such a model: 'extra\.weight'")
    refused({"t_embedder.mlp.0.weight": torch.zeros(64, 128)}, r"of another shape: 't_embedder.*expected \[64, 256\]")
    width = state["final_layer.linear.bias"].numel()
    refused({"final_layer.linear.bias": torch.zeros(2 * width)}, r"final_layer\.linear\.bias has")  # learned variance
    refused({"pos_embed": None}, "no tensor 'pos_embed'")
    refused({"blocks.0.norm1.weight": torch.full_like(state["blocks.0.norm1.weight"], torch.nan)}, "not finite")
    refused({"blocks.0.norm1.weight": 3}, "is a int, not a tensor")
    refused({"module.pos_embed": state["pos_embed"]}, "two tensors 'pos_embed'")
    refused({"pos_embed": state["pos_embed"].double()}, "float64")
    with pytest.raises(CheckpointError, match="missing"):
        bring_in(saved({"model": state, "ema": {"pos_embed": state["pos_embed"]}}))
    assert not list(Path("run").glob("checkpoints/*"))


def test_files_that_are_no_checkpoint_are_refused_and_never_run() -> None:
    """Code in a pickle, plain pickles, cut and damaged files, other objects."""

    class Mischief:
        def __reduce__(self) -> tuple:
            return (Path("owned").touch, ())

    saved({"ema": {"pos_embed": Mischief()}}, "code.pt")
    Path("plain.pt").write_bytes(pickle.dumps(Mischief()))
    whole = saved(golden()[0]).read_bytes()
    Path("cut.pt").write_bytes(whole[: len(whole) // 2])
    broken = bytearray(whole)
    broken[len(whole) // 2] ^= 1
    Path("flipped.pt").write_bytes(broken)
    saved([1, 2], "list.pt")
    saved({"ema": {}}, "empty.pt")
    with zipfile.ZipFile("official.pt") as archive, zipfile.ZipFile("packed.pt", "w", zipfile.ZIP_DEFLATED) as packed:
        for info in archive.infolist():
            packed.writestr(info.filename, archive.read(info))
    Path("x.safetensors").write_bytes(b"12345678901")
    for name, answer in (
        ("code.pt", r"nothing in it was executed \(it asks for [\w.]+\)"), ("plain.pt", "plain pickle"), ("cut.pt", "cut short"),
        ("flipped.pt", "does not match its sum"), ("list.pt", "holds a list"), ("empty.pt", "no table of tensors"),
        ("packed.pt", "compressed after"), ("x.safetensors", "no file of safetensors"), ("none.pt", "no file at"),
    ):  # fmt: skip
        with pytest.raises(CheckpointError, match=answer) as caught:
            bring_in(Path(name))
        assert name in str(caught.value)
    assert not Path("owned").exists()


def test_what_the_file_does_not_say_is_asked_for(make_bank) -> None:
    """Memory and tokenizer; one that does not fit is refused; statistics of latents are taken over."""
    state = golden()[0]
    path = saved(state)
    small = gmem_bank.EncoderSpec(name="hog", family="hog", dim=324, space="unit")
    with pytest.raises(EncoderMismatchError, match="dimension 768, those of hog have 324"):
        bring_in(path, memory=Memory(encoder=small))
    with pytest.raises(ConfigError, match="read off the file"):
        bring_in(path, settings=["model.depth=9"])
    channels = state["x_embedder.proj.weight"].shape[1]
    stats = {"mean": torch.arange(channels).view(1, -1, 1, 1).float(), "std": torch.full((1, channels, 1, 1), 2.0)}
    saved(stats, "latents_stats.pt")
    saved({"mean": stats["mean"]}, "half.pt")
    latents = LatentSource(tokenizer="va-vae" if channels == 32 else "sd-vae", stats=Path("half.pt"))
    with pytest.raises(CheckpointError, match=r"half\.pt holds no statistics"):
        bring_in(path, latents=latents)
    saved({"mean": torch.zeros(3), "std": torch.ones(3)}, "three.pt")
    with pytest.raises(ConfigError, match="statistics of 3 channels"):
        bring_in(path, latents=dataclasses.replace(latents, stats=Path("three.pt")))
    bank = make_bank("m.safetensors", dim=768, encoder="dinov2")
    report = bring_in(
        path, memory=Memory(bank=str(bank.path)), latents=dataclasses.replace(latents, stats=Path("latents_stats.pt")),
        settings=["sample.num_steps=9"],
    )  # fmt: skip
    loaded = gmem_gen.load_checkpoint("run")
    assert loaded.tokenizer["mean"] == list(range(channels)) and loaded.tokenizer["std"] == [2.0] * channels
    assert loaded.bank["fingerprint"] == bank.fingerprint == report.memory["fingerprint"]
    assert (loaded.config.sample.method, loaded.config.sample.num_steps) == ("sde-heun", 9)
    assert loaded.config.train.null_probability == 0
    with pytest.raises(OutputExistsError):
        bring_in(path)


def test_without_a_word_the_memory_is_the_published_one(make_bank) -> None:
    """It is said aloud; banks of dinov2 fit by name, others and other spaces do not."""
    saved(golden()[0])
    told = gen("import-checkpoint", "official.pt")
    assert "snippets of dinov2 in unit space" in told.stderr and "--latent-stats" in told.stderr
    loaded = gmem_gen.load_checkpoint("runs/official")
    for name, encoder, space, fits in (
        ("a", "dinov2", "unit", True), ("b", "dinov2-base", "unit", True), ("c", "dinov2-large", "unit", False),
        ("d", "clip", "unit", False), ("e", "dinov2", "raw", False),
    ):  # fmt: skip
        bank = make_bank(f"{name}.safetensors", dim=768, encoder=encoder, space=space)
        if fits:
            conditioning.require_same_memory(bank, loaded.bank, "it")
            continue
        with pytest.raises(EncoderMismatchError, match="was trained on snippets of dinov2"):
            conditioning.require_same_memory(bank, loaded.bank, "it")


def test_a_tokenizer_without_weights_is_told_before_anything_is_drawn(make_bank, monkeypatch) -> None:
    """Not after the network has done its work."""
    from gmem_gen import sampling

    bring_in(saved(golden()[0]), latents=LatentSource(tokenizer="taef2"), settings=["sample.num_steps=2"])
    bank = make_bank(dim=768, encoder="dinov2")
    loaded = dataclasses.replace(gmem_gen.load_checkpoint("run"), bank=conditioning.record_of(bank))
    monkeypatch.setattr(sampling, "solve", lambda *_: pytest.fail("it was drawn first"))
    conditions = gmem_gen.choose_conditions(bank, concept=None, keys=(), num=1, per_snippet=1, seed=0)
    with pytest.raises(gmem_bank.GMemError, match="--tokenizer-weights"):
        gmem_gen.sample(bank, loaded, conditions)


def test_an_imported_run_samples_and_trains_on(photos: Path) -> None:
    """By the commands: a small model with pixels as its latents draws at once, and a training goes on from its weights."""
    gmem_bank.build(photos, gmem_bank.load_encoder("hog"), "bank.safetensors")
    torch.manual_seed(0)
    config = ModelConfig(width=32, depth=1, num_heads=2, patch_size=2, snippet_scale=1.0)
    model = Generator(config, LatentShape(channels=3, size=8), 324)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    saved({"ema": model.state_dict()})
    told = json.loads(gen("import-checkpoint", "official.pt", "-o", "run", "--encoder", "hog", "--json").stdout)
    assert (told["memory"]["encoder"], told["tokenizer"]["name"]) == ("hog", "pixels")
    drawn = gen(
        "sample", "-c", "run", "--concept", "hat", "-n", "2", "--steps", "3", "--guidance", "7.75", "--json", "-q"
    )
    assert "null_probability=0" in drawn.stderr
    assert json.loads(drawn.stdout)["nfe"] == 5
    words = ["train", "--out", "run", "--config", "run/config.toml", "--accept-bank-change", "--json", "-q"]
    words += ["--set", "train.max_steps=2", "--set", "train.batch_size=256", "--set", "train.num_threads=1"]
    trained = json.loads(gen(*words).stdout)
    assert trained["step"] == 2
    first = gmem_gen.load_checkpoint("run", weights="ema").model.state_dict()
    nearly = [torch.allclose(first[name], value, atol=1e-3) for name, value in model.state_dict().items()]
    assert all(nearly)  # 0.9999 of the imported average is still there
    exported = json.loads(gen("export", "-c", "run", "--to", "official", "-o", "mine.safetensors", "--json").stdout)
    assert (exported["path_type"], exported["prediction"], exported["remarks"]) == ("Linear", "velocity", [])
    assert "with --encoder" in gen("import-checkpoint", "official.pt", code=1).stderr
    assert "no file at none.pt" in gen("import-checkpoint", "none.pt", "-o", "x", "-e", "hog", code=1).stderr


@pytest.mark.parametrize("tokens", ["", "tokens"])
def test_an_imported_projection_head_learns_from_any_patch_tokens_or_is_kept(photos: Path, tokens: str) -> None:
    """The file does not say which tokens it saw; once the training has gone on, its checkpoints do."""
    import numpy as np

    gmem_bank.build(photos, gmem_bank.load_encoder("hog"), "bank.safetensors")
    writer = gmem_bank.ShardWriter(Path("tokens"), {"made": "here"})
    bank = gmem_bank.open("bank.safetensors")
    keys = bank.keys(bank.rows())
    writer.write(0, keys, np.random.default_rng(0).standard_normal((len(keys), 4, 7)).astype(np.float32))
    writer.finish(1, {"encoder": {"name": "made-up"}})
    config = ModelConfig(
        width=32, depth=1, num_heads=2, patch_size=2, snippet_scale=1.0, projection_dim=7, encoder_depth=1
    )
    torch.manual_seed(0)
    model = Generator(config, LatentShape(channels=3, size=8), 324)
    bring_in(saved({"ema": model.state_dict()}), memory=Memory(bank="bank.safetensors"))
    words = ["train", "--out", "run", "--config", "run/config.toml", "--accept-bank-change", "--json", "-q"]
    words += ["--set", "train.num_threads=1", "--set", "train.batch_size=256"]
    free = ["--set", "model.projection_dim=0"]
    told = ["--tokens", tokens] if tokens else []
    assert json.loads(gen(*words, *told, "--set", "train.max_steps=2").stdout)["step"] == 2
    assert json.loads(gen(*words, *told, *free, "--set", "train.max_steps=3").stdout)["step"] == 3
    trained = gmem_gen.load_checkpoint("run", weights="model").model
    head = [
        torch.equal(a, b) for a, b in zip(trained.projector.parameters(), model.projector.parameters(), strict=True)
    ]
    assert any(head) != bool(tokens) and all(head) == (not tokens)
    assert not torch.equal(trained.x_embedder.proj.weight, model.x_embedder.proj.weight)
    other = ["--set", "data.tokens=" + ("" if tokens else "tokens"), "--set", "train.max_steps=4"]
    refused = gen(*words, *other, code=1)
    assert "other patch tokens" in refused.stderr


def test_an_export_of_our_own_keeps_its_transport_and_the_factor_on_snippets(photos: Path) -> None:
    """A model that predicts data, with snippets scaled: brought back it draws what it drew, up to rounding of one level."""
    import numpy as np

    gmem_bank.build(photos, gmem_bank.load_encoder("hog"), "bank.safetensors")
    settings = ["model.width=16", "model.depth=1", "model.num_heads=2", "data.image_size=8", "train.max_steps=8",
                "train.batch_size=8", "train.num_threads=1", "flow.path=gvp", "flow.prediction=data"]  # fmt: skip
    gmem_gen.train("bank.safetensors", gmem_gen.apply_settings(gmem_gen.preset("nano"), settings), out="mine")
    report = gmem_gen.export_official("mine", "mine.safetensors")
    assert "no prediction of data" in report["remarks"][0]
    bring_in(Path("mine.safetensors"), out="back", memory=Memory(bank="bank.safetensors"))
    mine, back = gmem_gen.load_checkpoint("mine"), gmem_gen.load_checkpoint("back")
    assert mine.model.config.snippet_scale > 10 and back.model.config.snippet_scale == 1
    assert (back.config.flow.path, back.config.flow.prediction) == ("gvp", "data")
    bank = gmem_bank.open("bank.safetensors")
    conditions = gmem_gen.choose_conditions(bank, concept="hat", keys=(), num=3, per_snippet=1, seed=0)
    drawn = [
        gmem_gen.sample(bank, each, conditions, gmem_gen.SampleConfig(num_steps=3)).images for each in (mine, back)
    ]
    assert np.abs(drawn[0].astype(int) - drawn[1]).max() <= 1
    with pytest.raises(ConfigError, match="models with a memory only"):
        gmem_gen.train("bank.safetensors", gmem_gen.apply_settings(gmem_gen.preset("nano:none"), settings), out="none")
        gmem_gen.export_official("none", "none.safetensors")
