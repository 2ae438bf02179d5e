"""Training: learns, resumes bit for bit, refuses what is not the same training."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import gmem_bank
import gmem_gen
from gmem_bank.errors import CheckpointError, ConfigError, EncoderMismatchError, GMemError, WriteError
from gmem_gen import checkpoint as checkpoints
from gmem_gen import optim
from gmem_gen.config import Config, DataConfig, ModelConfig, TrainConfig
from gmem_gen.data import Order
from gmem_gen.distributed import Processes

TINY = ModelConfig(width=16, depth=1, num_heads=2)


def config(**train: object) -> Config:
    defaults = {
        "max_steps": 6,
        "batch_size": 8,
        "warmup_steps": 2,
        "log_every": 1,
        "checkpoint_every": 2,
        "num_threads": 1,
    }
    return Config(data=DataConfig(image_size=8), model=TINY, train=TrainConfig(**{**defaults, **train}))


@pytest.fixture
def bank(photos: Path) -> str:
    """A HOG bank of the photos."""
    gmem_bank.build(photos, gmem_bank.load_encoder("hog"), "bank.safetensors")
    return "bank.safetensors"


def tensors(run: str) -> dict[str, torch.Tensor]:
    """All tensors of a run's newest checkpoint."""
    newest = checkpoints.list_checkpoints(Path(run))[-1]
    names = (checkpoints.MODEL, checkpoints.EMA, checkpoints.OPTIMIZER)
    return {f"{name}:{key}": value for name in names for key, value in load_file(newest / name).items()}


def lines(run: str) -> list[dict]:
    """The lines of a run's log, without the times."""
    whole = [json.loads(line) for line in Path(run, "log.jsonl").read_text().splitlines()]
    return [
        {name: value for name, value in line.items() if name not in ("elapsed", "images_per_second")} for line in whole
    ]


def losses(run: str) -> list[tuple[int, float]]:
    return [(line["step"], line["loss"]) for line in lines(run)]


@pytest.mark.parametrize("cut", [1, 3, 5])
@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_stopped_and_resumed_equals_uninterrupted_bit_for_bit(bank: str, cut: int, schedule: str) -> None:
    """Model, averaged weights, optimizer and log are the same numbers."""

    class Stop(BaseException):
        pass

    def stop_at(done: int, total: int) -> None:
        if done == cut:
            raise Stop

    whole = config(schedule=schedule, snippet_noise=0.1, log_every=3)
    gmem_gen.train(bank, whole, out="whole")
    with pytest.raises(Stop):
        gmem_gen.train(bank, whole, out="parts", progress=stop_at)
    report = gmem_gen.train(bank, whole, out="parts")
    assert report.step == 6
    first, second = tensors("whole"), tensors("parts")
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert lines("whole") == lines("parts")


def test_the_mean_loss_is_over_the_last_logged_steps_only(bank: str) -> None:
    """log_every of them, resumed or not; with log_every 1 it is the loss."""
    gmem_gen.train(bank, config(log_every=1), out="one")
    assert all(line["mean_loss"] == line["loss"] for line in lines("one"))
    gmem_gen.train(bank, config(log_every=2), out="two")
    single = dict(losses("one"))
    for line in lines("two"):
        assert line["mean_loss"] == pytest.approx((single[line["step"]] + single[line["step"] - 1]) / 2)


def test_training_leaves_the_callers_random_numbers_alone(bank: str) -> None:
    """The global generator is where it was."""
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    gmem_gen.train(bank, config(max_steps=1), out="run")
    assert torch.equal(torch.rand(3), expected)


def test_a_setting_that_is_newer_than_a_checkpoint_does_not_stop_its_resume(bank: str) -> None:
    """It has its default there."""
    gmem_gen.train(bank, config(), out="run")
    state = checkpoints.list_checkpoints(Path("run"))[-1] / checkpoints.STATE
    record = json.loads(state.read_text())
    del record["config"]["train"]["snippet_noise"], record["sha256"]
    state.write_text(json.dumps(record))
    assert gmem_gen.train(bank, config(max_steps=8), out="run").step == 8


def test_what_was_chosen_at_the_beginning_stays_when_smaller_images_come(bank: str) -> None:
    """Image size, patch and prediction are the checkpoint's, not resolved anew from the edited bank."""
    from PIL import Image

    free = dataclasses.replace(config(), data=DataConfig())
    assert gmem_gen.train(bank, free, out="run").image_size == 64
    Path("tiny").mkdir()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (20, 20, 3), dtype=np.uint8)).save("tiny/a.png")
    gmem_bank.insert_concept(bank, ["tiny"], gmem_bank.load_encoder("hog"))
    longer = dataclasses.replace(config(max_steps=7), data=DataConfig())
    report = gmem_gen.train(bank, longer, out="run", accept_bank_change=True)
    assert (report.step, report.image_size, report.num_images) == (7, 64, 25)


def test_seeds_decide_everything(bank: str) -> None:
    """Same seed, same numbers; another seed, others."""
    for run, seed in (("a", 0), ("b", 0), ("c", 1)):
        gmem_gen.train(bank, config(seed=seed, max_steps=2), out=run)
    assert losses("a") == losses("b") != losses("c")


def test_a_step_is_the_formula(bank: str) -> None:
    """The first logged loss is the mean squared error of a fresh model, which predicts zero: mean of (x_1 − x_0)²."""
    gmem_gen.train(bank, config(max_steps=1), out="run")
    opened = gmem_bank.open(bank)
    places = Order(24, 8, 0).batch(0)
    rows = opened.image_rows()[places]
    from gmem_gen.data import to_pixels

    x_1 = np.stack([to_pixels(opened.read_image(int(row)), 8, 3) for row in rows]).astype(np.float32) / 127.5 - 1
    streams = [np.random.Philox(key=[0, 0], counter=[0, 0, sample, 0]) for sample in range(8)]
    x_0 = np.stack([np.random.Generator(each).standard_normal((3, 8, 8), dtype=np.float32) for each in streams])
    expected = float(((x_1.transpose(0, 3, 1, 2) - x_0) ** 2).mean())
    assert losses("run")[0][1] == pytest.approx(expected, rel=1e-5)


def test_training_lowers_the_loss(bank: str) -> None:
    """Two hundred small steps learn something."""
    gmem_gen.train(bank, config(max_steps=200, learning_rate=3e-3), out="run")
    values = [loss for _, loss in losses("run")]
    assert np.mean(values[-30:]) < 0.6 * np.mean(values[:10])


def test_the_order_sees_every_image_once_an_epoch() -> None:
    """A permutation an epoch, another the next; any step can be asked for directly."""
    order = Order(10, 3, seed=4)
    epoch = np.concatenate([order.batch(step) for step in range(3)])
    assert len(set(epoch.tolist())) == 9
    assert order.batch(4).tolist() == Order(10, 3, seed=4).batch(4).tolist()
    assert order.batch(0).tolist() != order.batch(3).tolist()
    assert Order(2, 64, seed=0).batch(5).tolist() in ([0, 1], [1, 0])


def test_learning_rate_warms_up_and_decays() -> None:
    """Linear to the peak; cosine to zero at the last step."""
    settings = TrainConfig(learning_rate=2.0, warmup_steps=4, schedule="cosine")
    rates = [optim.learning_rate(step, 104, settings) for step in range(104)]
    assert rates[:4] == [0.5, 1.0, 1.5, 2.0]
    assert rates[54] == pytest.approx(1.0)
    assert rates[-1] == pytest.approx(0, abs=1e-3)
    assert optim.learning_rate(99, 104, dataclasses.replace(settings, schedule="constant")) == 2.0


def test_averaged_weights_follow_the_formula() -> None:
    """θ̄ ← d·θ̄ + (1 − d)·θ with d = min(decay, (1 + n)/(10 + n)); the first update copies."""
    model = torch.nn.Linear(1, 1, bias=False)
    average = optim.make_average(model, 0.5)
    expected = None
    for n in range(20):
        with torch.no_grad():
            model.weight.fill_(float(n * n))
        average.update_parameters(model)
        decay = min(0.5, (1 + n) / (10 + n))
        expected = float(n * n) if expected is None else decay * expected + (1 - decay) * n * n
    assert float(average.module.weight.detach()) == pytest.approx(expected, rel=1e-5)


def test_budgets_epochs_minutes_and_nothing_to_do(bank: str) -> None:
    """Epochs give steps; time stops early and goes on with more; a finished training does nothing."""
    report = gmem_gen.train(bank, config(max_steps=0, epochs=2), out="epochs")
    assert (report.step, report.stopped) == (6, "budget")
    assert gmem_gen.train(bank, config(max_steps=0, epochs=2), out="epochs").stopped == "nothing to do"
    more = gmem_gen.train(bank, config(max_steps=0, epochs=3), out="epochs")
    assert (more.step, more.stopped) == (9, "budget")
    report = gmem_gen.train(bank, config(max_minutes=1e-9), out="time")
    assert report.stopped == "time"
    assert report.step < 6
    assert gmem_gen.train(bank, config(max_minutes=0.0), out="time").step == 6


def test_other_settings_do_not_go_on_in_the_same_run(bank: str) -> None:
    """What differs is named; where it stops and how it reports may differ."""
    gmem_gen.train(bank, config(), out="run")
    with pytest.raises(ConfigError, match=r"train\.learning_rate was 0\.002, is 0\.1.*--out"):
        gmem_gen.train(bank, config(learning_rate=0.1), out="run")
    with pytest.raises(ConfigError, match=r"model\.depth"):
        gmem_gen.train(
            bank, dataclasses.replace(config(), model=ModelConfig(width=16, depth=2, num_heads=2)), out="run"
        )
    assert gmem_gen.train(bank, config(max_steps=8, log_every=3, checkpoint_every=5), out="run").step == 8


def test_an_edited_bank_stops_a_resume_unless_accepted_and_then_joins_the_new_rows(bank: str, new_photos: Path) -> None:
    """The bank's fingerprint gates only the resume."""
    gmem_gen.train(bank, config(), out="run")
    gmem_bank.insert_concept(bank, [new_photos], gmem_bank.load_encoder("hog"))
    with pytest.raises(CheckpointError, match=r"24 rows then, 32 now.*--accept-bank-change"):
        gmem_gen.train(bank, config(max_steps=9), out="run")
    report = gmem_gen.train(bank, config(max_steps=9), out="run", accept_bank_change=True)
    assert (report.step, report.num_images) == (9, 32)


def test_a_foreign_bank_cannot_go_on(bank: str, photos: Path) -> None:
    """Another encoder is refused, and both are named."""
    gmem_gen.train(bank, config(), out="run")
    gmem_bank.build(photos, gmem_bank.load_encoder("pixels"), "other.safetensors")
    with pytest.raises(EncoderMismatchError, match=r"snippets of hog.*snippets of pixels"):
        gmem_gen.train("other.safetensors", config(max_steps=9), out="run")


def test_checkpoints_are_kept_as_asked_and_leftovers_cleared(bank: str) -> None:
    """The newest two, or all; a half-written one is never taken for a checkpoint."""
    gmem_gen.train(bank, config(max_steps=1), out="run")
    Path("run/checkpoints/.saving-dead").mkdir(parents=True)
    gmem_gen.train(bank, config(), out="run")
    assert sorted(path.name for path in Path("run/checkpoints").iterdir()) == ["step-00000004", "step-00000006"]
    gmem_gen.train(bank, config(keep_checkpoints=0), out="all")
    assert len(checkpoints.list_checkpoints(Path("all"))) == 3


def test_a_damaged_checkpoint_is_named_not_skipped(bank: str) -> None:
    """The one before it is used only when the user removes the damaged one."""
    gmem_gen.train(bank, config(), out="run")
    newest = checkpoints.list_checkpoints(Path("run"))[-1]
    path = newest / checkpoints.MODEL
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(CheckpointError, match="delete the folder"):
        gmem_gen.train(bank, config(max_steps=8), out="run")
    path = newest / checkpoints.EMA
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="do not match the hash"):
        gmem_gen.load_checkpoint("run")
    (newest / checkpoints.STATE).write_text("{")
    with pytest.raises(CheckpointError, match="step-00000006"):
        gmem_gen.load_checkpoint("run")


def test_a_damaged_state_is_named_wherever_it_is_damaged(bank: str) -> None:
    """By its hash; in the form of older versions, which have none, by what is missing or of another type."""
    gmem_gen.train(bank, config(max_steps=2), out="run")
    path = checkpoints.list_checkpoints(Path("run"))[-1] / checkpoints.STATE
    whole = path.read_bytes()
    assert b"hog" in whole
    for old, new in ((b'"step": 2', b'"step": 3'), (b'"hog"', b'"hug"'), (b'"elapsed"', b'"elapsee"')):
        path.write_bytes(whole.replace(old, new))
        with pytest.raises(CheckpointError, match="do not match the hash"):
            gmem_gen.load_checkpoint("run")
    record = json.loads(whole)
    del record["sha256"]
    wrong = [{name: None} for name in ("elapsed", "keys_digest", "hashes", "step", "latent", "bank", "config")]
    for change in [*wrong, {"bank": {}}, {"bank": {**record["bank"], "dim": "9"}}, {"hashes": []}, {"step": True}]:
        path.write_text(json.dumps({**record, **change}))
        with pytest.raises(
            CheckpointError, match=r"step-00000002 is not a checkpoint that can be read.*(is|is missing)\b"
        ):
            gmem_gen.train(bank, config(), out="run")
        with pytest.raises(CheckpointError, match="previous"):
            gmem_gen.load_checkpoint("run")
    for name in ("elapsed", "keys_digest"):
        path.write_text(json.dumps({key: value for key, value in record.items() if key != name}))
        with pytest.raises(CheckpointError, match=f"incomplete: {name} is missing"):
            gmem_gen.train(bank, config(), out="run")
    path.write_text(json.dumps(record))
    assert gmem_gen.train(bank, config(), out="run").step == 6


def test_a_full_disk_keeps_earlier_checkpoints(bank: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A save that fails raises, and leaves nothing half-written."""
    gmem_gen.train(bank, config(max_steps=2), out="run")

    def full(*args: object, **options: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoints, "save_file", full)
    with pytest.raises(WriteError, match=r"No space left.*saved before still stands"):
        gmem_gen.train(bank, config(max_steps=4), out="run")
    assert sorted(path.name for path in Path("run/checkpoints").iterdir()) == ["step-00000002"]


def test_no_room_for_the_training_images_is_an_error_not_a_crash(bank: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks are allocated before they are mapped: a sparse map on a full disk would die of SIGBUS."""

    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(WriteError, match="No space left"):
        gmem_gen.train(bank, config(), out="run")
    assert not list(Path("run/cache").iterdir())


def test_an_interrupted_reading_of_images_goes_on_where_it_stopped(bank: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Images read before the kill are not read again, and the cache is the same."""
    from gmem_gen import data

    monkeypatch.setattr(data, "FLUSH_EVERY", 5)
    gmem_gen.train(bank, config(max_steps=1), out="whole")
    real, calls = data.read_image, []

    def counted(*args: object) -> np.ndarray:
        calls.append(1)
        if len(calls) == 13:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(data, "read_image", counted)
    with pytest.raises(KeyboardInterrupt):
        gmem_gen.train(bank, config(max_steps=1), out="parts")
    gmem_gen.train(bank, config(max_steps=1), out="parts")
    assert len(calls) == 13 + 24 - 10
    [whole], [parts] = (list(Path(run, "cache").iterdir()) for run in ("whole", "parts"))
    assert whole.read_bytes() == parts.read_bytes()


def test_a_half_read_cache_that_was_cut_is_read_from_the_beginning(bank: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The count beside it is of a file that is no longer there: its images would stay black."""
    from gmem_gen import data

    monkeypatch.setattr(data, "FLUSH_EVERY", 4)
    gmem_gen.train(bank, config(max_steps=1), out="whole")

    def stop(done: int, total: int) -> None:
        if done == 13:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        gmem_gen.train(bank, config(max_steps=1), out="parts", read_progress=stop)
    [partial] = Path("parts/cache").glob("*.partial")
    partial.write_bytes(partial.read_bytes()[:-100])
    gmem_gen.train(bank, config(max_steps=1), out="parts")
    [whole], [parts] = (list(Path(run, "cache").iterdir()) for run in ("whole", "parts"))
    assert whole.read_bytes() == parts.read_bytes()


def test_a_cut_cache_is_made_again(bank: str) -> None:
    """The images are derived data."""
    gmem_gen.train(bank, config(max_steps=1), out="run")
    [cache] = Path("run/cache").iterdir()
    whole = cache.read_bytes()
    for left in (10, 500, len(whole) - 1):
        cache.write_bytes(whole[:left])
        gmem_gen.train(bank, config(max_steps=2), out="run")
        assert cache.read_bytes() == whole


def test_a_run_never_moves_into_a_folder_of_other_files(bank: str, photos: Path) -> None:
    """Its marker would make a later build pass over the photos."""
    before = sorted(photos.rglob("*"))
    with pytest.raises(gmem_bank.OutputExistsError, match="holds other files"):
        gmem_gen.train(bank, config(), out=photos)
    assert sorted(photos.rglob("*")) == before


def test_two_trainings_in_one_folder_exclude_one_another(bank: str) -> None:
    """The second one is told."""

    def second(done: int, total: int) -> None:
        with pytest.raises(gmem_bank.LockedError, match="another training"):
            gmem_gen.train(bank, config(), out="run")

    gmem_gen.train(bank, config(max_steps=1), out="run", progress=second)


def test_a_loss_that_is_not_finite_stops_with_advice(bank: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """NaN is never trained on, and never saved."""
    from gmem_gen import losses

    real = losses.squared_errors
    monkeypatch.setattr(losses, "squared_errors", lambda *args, **kwargs: real(*args, **kwargs) * float("nan"))
    with pytest.raises(GMemError, match=r"nan.*learning_rate"):
        gmem_gen.train(bank, config(), out="run")
    assert checkpoints.list_checkpoints(Path("run")) == []


def test_what_is_left_to_us_is_filled_in_and_recorded(bank: str) -> None:
    """Image size, patch, snippet scale and prediction stand resolved in the checkpoint."""
    from gmem_gen.trainer import plan

    resolved = plan(bank, gmem_gen.preset("nano"))
    assert (resolved.data.image_size, resolved.model.patch_size, resolved.flow.prediction) == (64, 8, "data")
    assert resolved.model.snippet_scale == pytest.approx(324**0.5)
    small = plan(bank, gmem_gen.apply_settings(gmem_gen.preset("nano"), ["data.image_size=32"]))
    assert (small.model.patch_size, small.flow.prediction) == (4, "velocity")
    gmem_gen.train(bank, config(max_steps=1), out="run")
    stored = checkpoints.read_state(checkpoints.list_checkpoints(Path("run"))[-1])["config"]
    assert stored["flow"]["prediction"] == "velocity"
    assert stored["model"]["patch_size"] == 1


def test_image_size_is_64_or_the_smallest_images_short_side(bank: str) -> None:
    """The photos' short side is over 64; smaller images are taken as they are."""
    from PIL import Image

    free = dataclasses.replace(config(max_steps=1), data=DataConfig())
    assert gmem_gen.train(bank, free, out="photos-run").image_size == 64
    Path("small/a").mkdir(parents=True)
    for index, size in enumerate([(30, 41), (29, 64)]):
        Image.fromarray(np.random.default_rng(index).integers(0, 255, (*size, 3), dtype=np.uint8)).save(
            f"small/a/{index}.png"
        )
    gmem_bank.build("small", gmem_bank.load_encoder("hog"), "small.safetensors")
    assert gmem_gen.train("small.safetensors", free, out="small-run").image_size == 29


@pytest.mark.slow
def test_kill_9_at_any_moment_loses_nothing(bank: str) -> None:
    """Killed over and over, the same command ends where an uninterrupted run ends, bit for bit."""
    command = [
        sys.executable, "-m", "gmem_gen", "train", "-q", "--bank", bank, "--set", "model.width=16", "--set", "model.num_heads=2",
        "--set", "model.depth=1", "--set", "data.image_size=8", "--set", "train.max_steps=300", "--set", "train.batch_size=8",
        "--set", "train.checkpoint_every=20", "--set", "train.log_every=1",
    ]  # fmt: skip
    subprocess.run([*command, "--out", "whole"], check=True, capture_output=True)
    rng = np.random.default_rng(0)
    for _ in range(40):
        process = subprocess.Popen([*command, "--out", "parts"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(rng.uniform(1.5, 4.0))
        os.kill(process.pid, signal.SIGKILL)
        if process.wait() == 0:
            break
    subprocess.run([*command, "--out", "parts"], check=True, capture_output=True)
    first, second = tensors("whole"), tensors("parts")
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert losses("whole") == losses("parts")


def test_a_signal_saves_and_the_same_command_goes_on(bank: str) -> None:
    """SIGTERM in the middle: a checkpoint of the step in hand, and a report that says so."""

    def interrupt(done: int, total: int) -> None:
        if done == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    report = gmem_gen.train(bank, config(checkpoint_every=100), out="run", handle_signals=True, progress=interrupt)
    assert report.stopped == "signal"
    assert report.step in (3, 4)
    assert gmem_gen.train(bank, config(), out="run").step == 6


def test_a_projection_head_learns_from_patch_tokens(bank: str) -> None:
    """A step with tokens moves the head; the command, which has none, refuses."""
    from gmem_gen import conditioning, stepping
    from gmem_gen.data import PixelCache, PixelImages
    from gmem_gen.tokenizers import PixelTokenizer

    opened = gmem_bank.open(bank)
    whole = gmem_gen.apply_settings(
        config(), ["model.projection_dim=6", "model.encoder_depth=1", "model.patch_size=2", "flow.prediction=velocity"]
    )
    join = conditioning.join_images(opened, None, allow_missing=False)
    cache = PixelCache(Path("cache"), opened, join, None, size=8, channels=3, progress=lambda done, total: None)
    seen = []

    def tokens(places: np.ndarray) -> torch.Tensor:
        seen.append(places)
        return torch.ones(len(places), 16, 6)

    images = PixelImages(cache, PixelTokenizer(8, 3))
    with contextlib.closing(Processes("cpu")) as processes:
        trainer = stepping.Trainer(opened, whole, images, join, processes, tokens=tokens)
        before = trainer.model.projector[0][4].weight.detach().clone()
        step = trainer.make_step()
        trainer.close()
    assert step.norm > 0
    assert step.terms["loss"] == pytest.approx(step.terms["mse"] + 0.5 * step.terms["projection"], rel=1e-5)
    assert len(seen[0]) == 8
    assert not torch.equal(trainer.model.projector[0][4].weight, before)
    with pytest.raises(ConfigError, match="patch tokens"):
        gmem_gen.train(bank, whole, out="run")


def test_classes_of_a_class_conditional_training_stay(bank: str) -> None:
    """Another number of classes than concepts is refused, and so is going on with other concepts."""
    whole = gmem_gen.apply_settings(config(), ["model.condition=class"])
    with pytest.raises(ConfigError, match="the bank has 3 concepts"):
        gmem_gen.train(bank, gmem_gen.apply_settings(whole, ["model.num_classes=2"]), out="run")
    gmem_gen.train(bank, whole, out="run")
    gmem_bank.rename(bank, "hat", "cap")
    longer = gmem_gen.apply_settings(whole, ["train.max_steps=8"])
    with pytest.raises(CheckpointError, match="other concepts"):
        gmem_gen.train(bank, longer, out="run", accept_bank_change=True)


def test_sample_settings_may_change_between_the_parts_of_a_training(bank: str) -> None:
    """They have no part in it; the newest stand in the newest checkpoint."""
    gmem_gen.train(bank, config(), out="run")
    longer = gmem_gen.apply_settings(config(max_steps=8), ["sample.method=sde-heun"])
    assert gmem_gen.train(bank, longer, out="run").step == 8
    assert gmem_gen.load_checkpoint("run").config.sample.method == "sde-heun"


def test_the_published_average_starts_at_the_first_weights(bank: str) -> None:
    """Without warm-up: ema = decay·ema + (1 − decay)·weights from the initial weights on."""
    gmem_gen.train(bank, config(max_steps=1, ema_warmup=False, ema_decay=0.75), out="one")
    gmem_gen.train(bank, config(max_steps=2, ema_warmup=False, ema_decay=0.75), out="two")
    one, two = tensors("one"), tensors("two")
    for name in [name for name in one if name.startswith("ema.safetensors:module.") and "weight" in name]:
        weights = two[name.replace("ema.safetensors:module.", "model.safetensors:")]
        torch.testing.assert_close(two[name], 0.75 * one[name] + 0.25 * weights)
