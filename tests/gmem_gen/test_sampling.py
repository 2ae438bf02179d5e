"""Sampling: one seed an image, any batch; and a record of how it was made."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import gmem_bank
import gmem_gen
from gmem_bank.errors import CheckpointError, ConfigError, EncoderMismatchError, OutputExistsError
from gmem_gen.conditions import Conditions
from gmem_gen.config import Config, DataConfig, ModelConfig, TrainConfig
from gmem_gen.images import make_grid, write_grid
from gmem_gen.tokenizers import PixelTokenizer


@pytest.fixture
def trained(photos: Path) -> str:
    """A bank, and a tiny generator trained on it in runs/bank."""
    gmem_bank.build(photos, gmem_bank.load_encoder("hog"), "bank.safetensors")
    model = ModelConfig(width=16, depth=1, num_heads=2)
    config = Config(
        data=DataConfig(image_size=8), model=model, train=TrainConfig(max_steps=30, batch_size=8, num_threads=1)
    )
    gmem_gen.train("bank.safetensors", config)
    return "bank.safetensors"


def draw(bank: str, num: int = 6, **options: object) -> gmem_gen.Samples:
    opened = gmem_bank.open(bank)
    conditions = gmem_gen.choose_conditions(opened, concept="hat", keys=(), num=num, per_snippet=1, seed=0)
    config = gmem_gen.SampleConfig(**{"num_steps": 4, **options})
    return gmem_gen.sample(opened, gmem_gen.load_checkpoint("runs/bank"), conditions, config)


@pytest.mark.parametrize("method", ["heun", "dopri5", "sde-euler", "sde-heun"])
def test_an_image_does_not_depend_on_its_batch(trained: str, method: str) -> None:
    """Batches of 1, 4 and 6 give the same pixels up to rounding of one level; the seed decides them."""
    whole = draw(trained, batch_size=6, method=method).images.astype(int)
    for batch_size in (1, 4):
        assert np.abs(draw(trained, batch_size=batch_size, method=method).images.astype(int) - whole).max() <= 1
    assert np.abs(draw(trained, num=3, batch_size=6, method=method).images.astype(int) - whole[:3]).max() <= 1
    assert np.abs(draw(trained, seed=1, method=method).images.astype(int) - whole).max() > 10


def test_nfe_counts_what_the_method_asks_for(trained: str) -> None:
    """Euler asks once a step, Heun twice, a last step once; guidance evaluates twice inside its interval only."""
    assert draw(trained, method="euler").nfe == 4
    assert draw(trained, method="heun").nfe == 8
    assert draw(trained, method="sde-heun").nfe == 7
    assert draw(trained, method="sde-heun", last_step="none").nfe == 8
    assert draw(trained, method="sde-euler").nfe == 4
    guided = draw(trained, method="euler", guidance=2.0, guidance_start=0.5, guidance_end=0.6)
    assert (guided.nfe, guided.record["evaluations_per_image"]) == (4, 5)  # t = 0, 1/4, 1/2, 3/4
    unguided = draw(trained, guidance=1.0, guidance_start=0.5, guidance_end=0.6)
    np.testing.assert_array_equal(unguided.images, draw(trained).images)


def test_every_method_and_setting_draws(trained: str) -> None:
    """All of them give pictures; with noise in the steps others than without, and another diffusion others again."""
    methods = ("euler", "heun", "midpoint", "heun3", "rk4", "dopri5", "sde-euler", "sde-heun")
    drawn = {method: draw(trained, num=2, method=method).images for method in methods}
    assert all(images.std() > 0 for images in drawn.values())
    forms = ("constant", "SBDM", "sigma", "linear", "decreasing", "increasing-decreasing")
    pictures = {
        draw(trained, num=2, method="sde-euler", diffusion=form, num_steps=9).images.tobytes() for form in forms
    }
    assert len(pictures) == len(forms) - 1  # "sigma" and "linear" are the same on the linear path
    for last in ("mean", "tweedie", "euler", "none"):
        images = draw(trained, num=2, method="sde-heun", last_step=last, last_step_size=0.2).images
        assert not np.array_equal(images, drawn["heun"])


@pytest.mark.parametrize(
    ("path", "prediction"),
    [("gvp", "velocity"), ("vp", "noise"), ("linear", "score"), ("gvp", "data"), ("vp", "velocity")],
)
def test_every_path_and_prediction_trains_and_draws(trained: str, path: str, prediction: str) -> None:
    """The loss is finite, and so are ODE and SDE samples."""
    config = gmem_gen.apply_settings(
        Config(data=DataConfig(image_size=8), model=ModelConfig(width=16, depth=1, num_heads=2)),
        ["train.max_steps=4", "train.batch_size=8", "train.num_threads=1", f"flow.path={path}",
         f"flow.prediction={prediction}"],
    )  # fmt: skip
    report = gmem_gen.train(trained, config, out="other")
    assert report.loss is not None
    opened, loaded = gmem_bank.open(trained), gmem_gen.load_checkpoint("other")
    conditions = gmem_gen.choose_conditions(opened, concept="hat", keys=(), num=2, per_snippet=1, seed=0)
    for method in ("heun", "sde-heun"):
        samples = gmem_gen.sample(opened, loaded, conditions, gmem_gen.SampleConfig(method=method, num_steps=5))
        assert (samples.record["path"], samples.record["prediction"]) == (path, prediction)
        assert samples.images.std() > 0


def test_a_factored_bank_draws_what_its_snippets_draw(trained: str, make_bank) -> None:
    """Through the absorbed basis and through whole snippets: the same pixels up to rounding of one level."""
    opened, loaded = gmem_bank.open(trained), gmem_gen.load_checkpoint("runs/bank", weights="model")
    spec = opened.encoder
    factored = make_bank(
        "f.safetensors", kind="factored", rank=8, dim=opened.dim, snippets=opened.snippets(opened.rows())
    )

    class Same:
        """The factored bank under the encoder that the model was trained with."""

        encoder = spec

        def __getattr__(self, name: str) -> object:
            return getattr(factored, name)

        def __len__(self) -> int:
            return len(factored)

    class Dense(Same):
        basis = np.zeros((opened.dim, opened.dim), np.float32)  # as many numbers as a snippet: nothing to gain

    conditions = Conditions(rows=np.arange(4), keys=list("abcd"), label="rows")
    drawn = []
    for bank in (Same(), Dense()):
        bank.names = ()
        drawn.append(gmem_gen.sample(bank, loaded, conditions, gmem_gen.SampleConfig(num_steps=4)).images.astype(int))
    assert np.abs(drawn[0] - drawn[1]).max() <= 1


def test_a_checkpoint_of_an_older_version_still_draws(trained: str) -> None:
    """Settings that it does not know have their defaults, and the pixels are the same."""
    expected = draw(trained).images
    state = next(Path("runs/bank/checkpoints").iterdir()) / "state.json"
    record = json.loads(state.read_text())
    del record["config"]["sample"], record["classes"], record["sha256"]
    for section, names in {
        "flow": ("path", "weighting", "cosine_weight", "projection_weight"),
        "model": ("condition", "num_classes", "projection_dim", "encoder_depth"),
        "train": ("ema_warmup",),
    }.items():
        for name in names:
            del record["config"][section][name]
    state.write_text(json.dumps(record))
    np.testing.assert_array_equal(draw(trained).images, expected)


def test_guidance_changes_samples_and_wants_a_null_that_was_trained(trained: str) -> None:
    """Scale 1 is no guidance; of a model that never saw the null snippet it is remarked on, told and recorded, not refused."""
    assert not np.array_equal(draw(trained, guidance=4.0).images, draw(trained).images)
    assert draw(trained, guidance=4.0).record["remarks"] == []
    config = Config(data=DataConfig(image_size=8), model=ModelConfig(width=16, depth=1, num_heads=2),
                    train=TrainConfig(max_steps=1, null_probability=0.0))  # fmt: skip
    gmem_gen.train(trained, config, out="no-null")
    opened, told = gmem_bank.open(trained), []
    conditions = gmem_gen.choose_conditions(opened, concept=None, keys=(), num=1, per_snippet=1, seed=0)
    for guidance, count in ((2.0, 1), (1.0, 0)):
        settings = gmem_gen.SampleConfig(guidance=guidance, num_steps=2)
        samples = gmem_gen.sample(opened, gmem_gen.load_checkpoint("no-null"), conditions, settings, say=told.append)
        assert len(samples.record["remarks"]) == count
        assert all("null_probability=0" in remark for remark in samples.record["remarks"])
    assert len(told) == 1


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_reduced_precision_is_near_and_recorded(trained: str, precision: str) -> None:
    """Pixels differ by rounding of the network, not by much; solver and noise stay in fp32; the record says which."""
    exact, reduced = draw(trained), draw(trained, precision=precision)
    assert (exact.record["precision"], reduced.record["precision"]) == ("fp32", precision)
    difference = np.abs(exact.images.astype(int) - reduced.images.astype(int))
    assert 0 < difference.max() <= 24
    assert difference.mean() < 2


def test_the_snippet_reaches_the_picture(trained: str) -> None:
    """The same noise with another snippet gives another picture."""
    opened = gmem_bank.open(trained)
    loaded = gmem_gen.load_checkpoint("runs/bank", weights="model")
    pictures = []
    for concept in ("hat", "shoes"):
        conditions = gmem_gen.choose_conditions(opened, concept=concept, keys=(), num=1, per_snippet=1, seed=0)
        pictures.append(gmem_gen.sample(opened, loaded, conditions, gmem_gen.SampleConfig(num_steps=4)).images)
    assert not np.array_equal(*pictures)
    with pytest.raises(ConfigError, match="one of 'ema', 'model' in runs/bank"):
        gmem_gen.load_checkpoint("runs/bank", weights="emma")


def test_a_foreign_bank_is_refused_and_both_are_named(trained: str, photos: Path) -> None:
    """A generator draws only from the memory it was trained on the like of."""
    gmem_bank.build(photos, gmem_bank.load_encoder("pixels"), "other.safetensors")
    with pytest.raises(EncoderMismatchError, match=r"snippets of hog \(dim 324.*snippets of pixels \(dim 256"):
        draw("other.safetensors")


def test_an_inserted_concept_is_sampled_without_training(trained: str, new_photos: Path) -> None:
    """The bank may be edited after the training."""
    gmem_bank.insert_concept(trained, [new_photos], gmem_bank.load_encoder("hog"))
    opened = gmem_bank.open(trained)
    conditions = gmem_gen.choose_conditions(opened, concept="images", keys=(), num=2, per_snippet=1, seed=0)
    samples = gmem_gen.sample(
        opened, gmem_gen.load_checkpoint("runs/bank"), conditions, gmem_gen.SampleConfig(num_steps=2)
    )
    assert samples.images.shape == (2, 8, 8, 3)
    assert samples.record["trained_on"]["fingerprint"] != samples.record["bank"]["fingerprint"] == opened.fingerprint


def test_a_grid_never_replaces_a_file_that_is_no_grid() -> None:
    """Not a bank, not somebody's picture, not somebody's JSON."""
    images = np.zeros((1, 8, 8, 3), np.uint8)
    with pytest.raises(ConfigError, match=r"\.png"):
        write_grid(images, {"nfe": 1}, Path("bank.safetensors"))
    for name in ("holiday.png", "notes.json"):
        Path(name).write_text("precious")
        with pytest.raises(OutputExistsError, match="no grid of ours"):
            write_grid(images, {"nfe": 1}, Path(name).with_suffix(".png"))
        assert Path(name).read_text() == "precious"


def test_grids_enlarge_small_images_and_fill_every_cell() -> None:
    """Whole-pixel enlargement; grey becomes RGB; no image is lost."""
    images = np.arange(5, dtype=np.uint8).reshape(5, 1, 1, 1).repeat(8, 1).repeat(8, 2) * 50
    grid = np.asarray(make_grid(images, 3))
    assert grid.shape == (2 * 66 + 2, 3 * 66 + 2, 3)
    assert {int(v) for v in np.unique(grid)} == {0, 50, 100, 150, 200, 255}


def test_pixels_survive_the_tokenizer() -> None:
    """decode(encode(x)) = x for every byte value; latents lie in [−1, 1]."""
    images = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1)
    tokenizer = PixelTokenizer(16, 1)
    latents = tokenizer.encode(images)
    assert (latents.min(), latents.max()) == (-1, 1)
    np.testing.assert_array_equal(tokenizer.decode(latents), images)
    assert tokenizer.decode(torch.full((1, 1, 2, 2), 9.0)).max() == 255


def test_bad_requests_are_clear() -> None:
    """No run, wrong solver, wrong interval."""
    with pytest.raises(CheckpointError, match="gmem-gen train"):
        gmem_gen.load_checkpoint("runs/none")
    with pytest.raises(ConfigError, match="'heun'"):
        gmem_gen.SampleConfig(method="heunn")
    for options, answer in (
        ({"method": "sde-heun", "timestep_shift": 0.3}, "only the ODE's methods shift"),
        ({"diffusion": "lienar"}, "'linear'"),
        ({"last_step": "men"}, "'mean'"),
        ({"method": "sde-euler", "num_steps": 1}, "at least 2"),
        ({"last_step_size": 0.0}, "between 0 and 1"),
    ):
        with pytest.raises(ConfigError, match=answer):
            gmem_gen.SampleConfig(**options)
    for options in (
        {"guidance": -1.0},
        {"guidance": float("nan")},
        {"guidance_start": 0.9, "guidance_end": 0.1},
        {"num_steps": 0},
    ):
        with pytest.raises(ConfigError):
            gmem_gen.SampleConfig(**options)
