"""Training: ways to make the same step, averages, validation, previews, records, and which checkpoint goes on."""

from __future__ import annotations

import builtins
import contextlib
import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import gmem_bank
import gmem_gen
from gmem_bank.errors import CheckpointError, ConfigError, GMemError, MissingDependencyError, WriteError
from gmem_gen import checkpoint as checkpoints
from gmem_gen import conditioning, optim
from gmem_gen.config import Config, FlowConfig, TrainConfig
from gmem_gen.data import to_pixels
from gmem_gen.distributed import Processes
from gmem_gen.loader import Batch
from gmem_gen.model import LatentShape
from gmem_gen.stepping import Trainer
from gmem_gen.trainer import plan
from tests.conftest import BankMaker
from tests.gmem_gen.golden import model_of, projector_state
from tests.gmem_gen.test_published import compare, training_vectors
from tests.gmem_gen.test_trainer import bank, config, lines, losses, tensors

__all__ = ["bank"]  # the fixture


def settings(*words: str, **train: object) -> Config:
    return gmem_gen.apply_settings(config(**train), words)


def nearly_equal(first: str, second: str, *, loss: float = 1e-5) -> None:
    """The losses of two runs and all their weights differ by rounding."""
    for mine, theirs in zip(losses(first), losses(second), strict=True):
        assert mine == pytest.approx(theirs, rel=loss)
    nearly_equal_weights(first, second)


def nearly_equal_weights(first: str, second: str, *, weights: float = 1e-4) -> None:
    """Weights and averages differ by less than that, as relative L2 norms."""
    one, two = tensors(first), tensors(second)
    for name in (checkpoints.MODEL, checkpoints.EMA):
        own = [key for key in one if key.startswith(name)]
        difference = sum(float((one[key].double() - two[key].double()).square().sum()) for key in own)
        assert difference**0.5 < weights * sum(float(one[key].double().square().sum()) for key in own) ** 0.5


@pytest.mark.parametrize(
    "option", [{"accumulation": 3}, {"gradient_checkpointing": True}, {"adamw": "foreach"}, {"adamw": "loop"}]
)
def test_the_same_steps_in_another_way(bank: str, option: dict[str, object]) -> None:
    """In parts, with blocks computed twice, with another loop over the weights: the same losses and weights up to rounding."""
    gmem_gen.train(bank, config(snippet_noise=0.1), out="plain")
    gmem_gen.train(bank, config(snippet_noise=0.1, **option), out="other")
    nearly_equal("plain", "other")


def test_workers_change_nothing(bank: str) -> None:
    """Bit for bit, with none, one or three threads."""
    for workers in (0, 1, 3):
        gmem_gen.train(bank, config(num_workers=workers), out=f"run{workers}")
    assert lines("run0") == lines("run1") == lines("run3")
    first, second = tensors("run0"), tensors("run3")
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_blocks_are_computed_twice_where_that_is_asked(bank: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each block runs once forward and once more in the backward pass."""
    from gmem_gen import model

    real, calls = model.Block.forward, []
    monkeypatch.setattr(model.Block, "forward", lambda self, *args: calls.append(1) or real(self, *args))
    gmem_gen.train(bank, config(max_steps=3), out="plain")
    gmem_gen.train(bank, config(max_steps=3, gradient_checkpointing=True), out="twice")
    assert len(calls) == 3 + 6


def test_too_many_parts_are_refused(bank: str) -> None:
    """A part without an image has no mean."""
    with pytest.raises(ConfigError, match=r"one each at least"):
        gmem_gen.train(bank, settings(batch_size=40, accumulation=30), out="run")
    with pytest.raises(ConfigError, match=r"accumulation must be at most"):
        TrainConfig(batch_size=4, accumulation=5)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_learns_and_resumes(bank: str, precision: str) -> None:
    """The loss is near fp32's; fp16's scale grows and shrinks as it must and goes into the checkpoint."""
    gmem_gen.train(bank, config(), out="fp32")
    half = config(precision=precision)
    gmem_gen.train(bank, half, out="half")
    for mine, theirs in zip(losses("fp32"), losses("half"), strict=True):
        assert mine == pytest.approx(theirs, rel=0.02)
    gmem_gen.train(bank, config(precision=precision, max_steps=3), out="parts")
    gmem_gen.train(bank, half, out="parts")
    first, second = tensors("half"), tensors("parts")
    assert all(torch.equal(first[name], second[name]) for name in first)
    scale = checkpoints.read_state(checkpoints.list_checkpoints(Path("half"))[-1])["scaler"]
    assert (scale == {}) == (precision == "bf16")


def test_an_overflow_of_fp16_skips_the_step_and_halves_the_scale(bank: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights and averages stay; from a scale that is too large training finds its way."""
    real = optim.make_scaler

    def large(device: torch.device, train: TrainConfig) -> torch.amp.GradScaler:
        scaler = real(device, train)
        scaler.load_state_dict({**scaler.state_dict(), "scale": 2.0**40})
        return scaler

    monkeypatch.setattr(optim, "make_scaler", large)
    gmem_gen.train(bank, config(precision="fp16", max_steps=1), out="run")
    state = checkpoints.read_state(checkpoints.list_checkpoints(Path("run"))[-1])
    assert state["scaler"]["scale"] == 2.0**39
    found = tensors("run")
    states = [value for name, value in found.items() if name.startswith(checkpoints.OPTIMIZER)]
    assert not any(value.any() for value in states)  # no moment, no step counted
    assert found["ema.safetensors:n_averaged"] == 0


def test_the_compiled_network_makes_the_same_steps(bank: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.compile is given what runs, and checkpoints have the names of the model (its own compiler is tried with -m slow)."""
    given = []
    monkeypatch.setattr(torch, "compile", lambda module: given.append(module) or module)
    gmem_gen.train(bank, config(), out="plain")
    gmem_gen.train(bank, config(compile=True), out="compiled")
    assert len(given) == 1
    assert lines("plain") == lines("compiled")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # of what PyTorch imports itself to compile
def test_the_compiled_network_is_the_network(bank: str) -> None:
    """By PyTorch's compiler for real."""
    gmem_gen.train(bank, config(), out="plain")
    gmem_gen.train(bank, config(compile=True), out="compiled")
    nearly_equal("plain", "compiled")


def test_several_averages_at_once(bank: str) -> None:
    """Each is the one that a training with its decay alone has; sampling takes any by name."""
    for name, decay in (("both", (0.9, 0.5)), ("first", 0.9), ("second", 0.5)):
        gmem_gen.train(bank, config(ema_decay=decay, ema_warmup=False), out=name)
    newest = checkpoints.list_checkpoints(Path("both"))[-1]
    both = {name: load_file(newest / f"{name}.safetensors") for name in ("ema", "ema-0.5")}
    for name, run in (("ema", "first"), ("ema-0.5", "second")):
        alone = load_file(checkpoints.list_checkpoints(Path(run))[-1] / "ema.safetensors")
        assert all(torch.equal(both[name][key], alone[key]) for key in alone)
        loaded = gmem_gen.load_checkpoint("both", weights=name).model.state_dict()
        assert all(torch.equal(loaded[key], both[name]["module." + key]) for key in loaded)
    first, named = (gmem_gen.load_checkpoint("both", weights=name).model.state_dict() for name in ("ema", "ema-0.9"))
    assert all(torch.equal(first[name], named[name]) for name in first)
    with pytest.raises(ConfigError, match=r"'ema', 'ema-0\.5', 'model'.*not 'ema-0\.7'"):
        gmem_gen.load_checkpoint("both", weights="ema-0.7")
    assert gmem_gen.apply_settings(Config(), ["train.ema_decay=0.5"]).train.ema_decay == (0.5,)
    assert gmem_gen.apply_settings(Config(), ["train.ema_decay=[0.5, 0.25]"]).train.ema_decay == (0.5, 0.25)
    for wrong in ("[]", "[0.5, 0.5]", "1.5", "many"):
        with pytest.raises(ConfigError, match=r"train\.ema_decay"):
            gmem_gen.apply_settings(Config(), [f"train.ema_decay={wrong}"])


def test_the_validation_loss_is_the_formula(bank: str) -> None:
    """Mean over the held-out rows of the averaged model's squared error, at noise and times that are always the same."""
    whole = settings("data.validation_fraction=0.3", validate_every=3)
    report = gmem_gen.train(bank, whole, out="run")
    keys = Path("run/validation_keys.txt").read_text().splitlines()
    assert report.num_images == 24 - len(keys)
    opened, average = gmem_bank.open(bank), gmem_gen.load_checkpoint("run").model
    rows = opened.rows_for(keys)
    x_1 = np.stack([to_pixels(opened.read_image(int(row)), 8, 3) for row in rows]).transpose(0, 3, 1, 2) / 127.5 - 1
    x_0, t = [], []
    for sample in range(len(keys)):
        noise, choice = (np.random.Generator(np.random.Philox(key=[0, 0], counter=[0, 0, sample, s])) for s in (2, 3))
        x_0.append(noise.standard_normal((3, 8, 8), dtype=np.float32))
        choice.random(2, dtype=np.float32)
        t.append(1 / (1 + np.exp(-choice.standard_normal())))
    x_0, x_1, t = (torch.tensor(np.array(value), dtype=torch.float32) for value in (x_0, x_1, t))
    with torch.no_grad():
        x_t = (1 - t[:, None, None, None]) * x_0 + t[:, None, None, None] * x_1
        found = average(x_t, t, torch.from_numpy(opened.snippets(rows)))
    expected = float((found - (x_1 - x_0)).square().mean())
    validations = [line for line in lines("run") if "validation_loss" in line]
    assert [line["step"] for line in validations] == [3, 6]
    assert validations[-1]["validation_loss"] == pytest.approx(expected, rel=1e-5)
    assert validations[-1]["validation_loss_model"] != validations[-1]["validation_loss"]


def test_what_is_held_out_is_never_trained_on(bank: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not by a step of the training, and not after going on with another choice."""
    from gmem_gen import loader

    seen, real = set(), loader.BatchMaker.training
    monkeypatch.setattr(
        loader.BatchMaker,
        "training",
        lambda self, *args: (seen.update((batch := real(self, *args)).places.tolist()), batch)[1],
    )
    gmem_gen.train(bank, settings("data.validation_concept=hat", max_steps=12), out="run")
    opened = gmem_bank.open(bank)
    keys = opened.keys(opened.image_rows())
    assert {keys[place] for place in seen} == {key for key in keys if not key.startswith("hat/")}
    Path("keys.txt").write_text("hat/00d94e21.jpg\n")
    first = settings("data.validation_keys=keys.txt")
    gmem_gen.train(bank, first, out="named")
    Path("keys.txt").write_text("dress/009b3c31.jpg\n")
    with pytest.raises(ConfigError, match=r"1 rows, such as 'hat/00d94e21\.jpg', were held out"):
        gmem_gen.train(bank, gmem_gen.apply_settings(first, ["train.max_steps=8"]), out="named")


def test_the_best_and_every_nth_checkpoint_stay(bank: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Saved when it is the best, kept until a better one; the newest and the multiples beside it; remembered after a stop."""
    from gmem_gen import loop

    values = iter([3.0, 1.0, 2.0, 4.0, 0.5, 0.6])
    monkeypatch.setattr(loop, "validate", lambda *_: {"validation_loss": next(values)})

    def steps() -> list[int]:
        return [checkpoints.step_of(path) for path in checkpoints.list_checkpoints(Path("run"))]

    common = {"validate_every": 2, "checkpoint_every": 3, "keep_checkpoints": 1, "keep_every": 9}
    held = "data.validation_fraction=0.3"
    gmem_gen.train(bank, settings(held, max_steps=8, **common), out="run")
    assert steps() == [4, 8]
    report = gmem_gen.train(bank, settings(held, max_steps=11, **common), out="run")
    assert steps() == [9, 10, 11]
    assert report.best == (10, 0.5)


def test_a_signal_at_a_step_that_is_validated_loses_no_validation(bank: str) -> None:
    """It is made up for when the training goes on, so that the log is that of a training without a signal."""
    wanted = settings("data.validation_fraction=0.3", validate_every=2, checkpoint_every=100)

    def interrupt(done: int, total: int) -> None:
        if done == 4:
            os.kill(os.getpid(), signal.SIGTERM)

    gmem_gen.train(bank, wanted, out="whole")
    report = gmem_gen.train(bank, wanted, out="parts", handle_signals=True, progress=interrupt)
    assert (report.step, report.stopped) == (4, "signal")
    shutil.rmtree("parts")

    def interrupt_in_a_step(*args: object) -> tuple[bool, ...]:
        interrupt(4, 6)
        return real(*args)

    from gmem_gen.loop import Loop

    real = Loop._asked
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Loop, "_asked", lambda loop: interrupt_in_a_step(loop) if loop.trainer.step == 3 else real(loop))
        report = gmem_gen.train(bank, wanted, out="parts", handle_signals=True)
    assert (report.step, report.stopped) == (4, "signal")
    assert not [line for line in lines("parts") if "validation_loss" in line and line["step"] == 4]
    gmem_gen.train(bank, wanted, out="parts")
    assert lines("parts") == lines("whole")


@pytest.mark.parametrize("where", ["in the last step", "in the last validation", "in the last preview"])
def test_a_signal_at_the_end_loses_neither_validation_nor_preview(
    bank: str, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No further batch is validated, the step is saved; the same command makes up for it, once, and remembers the best."""
    from gmem_gen import loop

    wanted = settings(
        "data.validation_fraction=0.3", "sample.num_steps=2", validate_every=100, sample_every=100, sample_images=1,
        accumulation=4, checkpoint_every=100,
    )  # fmt: skip
    whole = gmem_gen.train(bank, wanted, out="whole")
    batches, maker, preview, step = [], loop.Trainer.evaluate, loop.write_preview, loop.Trainer.make_step

    def send(when: str) -> None:
        if when == where:
            os.kill(os.getpid(), signal.SIGTERM)

    def evaluate(self: Trainer, network: torch.nn.Module, batch: Batch) -> object:
        if torch.is_inference_mode_enabled():
            batches.append(len(batch))
            send("in the last validation")
        return maker(self, network, batch)

    def made(self: Trainer, *args: Callable[[], tuple[bool, ...]]) -> object:
        if self.step == 5:
            send("in the last step")
        return step(self, *args)

    def drawn(*args: object) -> Path:
        send("in the last preview")
        return preview(*args)

    with monkeypatch.context() as patch:
        patch.setattr(loop.Trainer, "evaluate", evaluate)
        patch.setattr(loop, "write_preview", drawn)
        patch.setattr(loop.Trainer, "make_step", made)
        report = gmem_gen.train(bank, wanted, out="parts", handle_signals=True)
    assert (report.step, report.stopped, report.best) == (6, "signal", None)
    assert len(batches) == (where == "in the last validation")
    again = gmem_gen.train(bank, wanted, out="parts")
    assert (again.stopped, again.best) == ("nothing to do", whole.best)
    assert lines("parts") == lines("whole")
    assert Path("parts/samples/step-00000006.png").read_bytes() == Path("whole/samples/step-00000006.png").read_bytes()
    assert gmem_gen.train(bank, wanted, out="parts").best == whole.best
    assert lines("parts") == lines("whole")


def test_a_finished_training_may_be_gone_on_with_elsewhere(bank: str) -> None:
    """Nothing to do, and yet the new run has a checkpoint."""
    gmem_gen.train(bank, config(), out="run")
    report = gmem_gen.train(bank, config(), out="branch", resume_from="run")
    assert (report.step, report.stopped) == (6, "nothing to do")
    first, second = tensors("run"), tensors("branch")
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_previews_are_of_the_same_rows_and_noise(bank: str) -> None:
    """Rows that are held out, their keys told; the picture beside its record is what sampling draws from that checkpoint."""
    told: list[str] = []
    wanted = settings(
        "data.validation_fraction=0.3", "sample.num_steps=3", sample_every=2, sample_images=2, keep_checkpoints=0
    )
    gmem_gen.train(bank, wanted, out="run", say=told.append)
    found = [json.loads(Path(f"run/samples/step-{step:08d}.json").read_text()) for step in (2, 4, 6)]
    held = Path("run/validation_keys.txt").read_text().split()
    assert all(record["keys"] == found[0]["keys"] and set(record["keys"]) <= set(held) for record in found)
    assert any(", ".join(found[0]["keys"]) in line for line in told)
    opened, loaded = gmem_bank.open(bank), gmem_gen.load_checkpoint("run/checkpoints/step-00000004")
    conditions = gmem_gen.choose_conditions(
        opened, concept=None, keys=found[1]["keys"], num=None, per_snippet=1, seed=0
    )
    expected = np.asarray(gmem_gen.make_grid(gmem_gen.sample(opened, loaded, conditions).images))
    from PIL import Image

    with Image.open("run/samples/step-00000004.png") as picture:
        np.testing.assert_array_equal(np.asarray(picture), expected)
    with pytest.raises(ConfigError, match=r"sample\.guidance"):
        gmem_gen.train(bank, settings("sample.guidance=2", "model.condition=none", sample_every=2), out="other")


def test_validation_and_previews_leave_the_training_alone(bank: str) -> None:
    """The same weights without them."""
    held = "data.validation_fraction=0.3"
    gmem_gen.train(bank, settings(held, validate_every=1, sample_every=1, sample_images=1), out="looked")
    gmem_gen.train(bank, settings(held, validate_every=100), out="blind")
    first, second = tensors("looked"), tensors("blind")
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_every_term_is_logged_also_for_tensorboard(bank: str) -> None:
    """The loss is the sum of its terms; TensorBoard has what log.jsonl has, and after a stop nothing twice."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    wanted = settings("flow.cosine_weight=0.5", "data.validation_fraction=0.3", validate_every=3)
    gmem_gen.train(bank, gmem_gen.apply_settings(wanted, ["train.max_steps=4"]), out="run", tensorboard=True)
    gmem_gen.train(bank, wanted, out="run", tensorboard=True)
    records = [json.loads(line) for line in Path("run/log.jsonl").read_text().splitlines()]
    steps = [line for line in records if "loss" in line]
    for line in steps:
        assert line["loss"] == pytest.approx(line["mse"] + 0.5 * line["cosine"], rel=1e-5)
        assert {"gradient_norm", "learning_rate", "images_per_second", "elapsed", "epoch"} <= line.keys()
    events = EventAccumulator("run/tensorboard")
    events.Reload()
    for name in ("loss", "mse", "cosine", "learning_rate", "gradient_norm"):
        shown = [(event.step, event.value) for event in events.Scalars(f"train/{name}")]
        assert shown == [(line["step"], pytest.approx(line[name])) for line in steps]
    assert len(events.Scalars("validation/validation_loss")) == sum("validation_loss" in line for line in records)


def test_a_norm_that_overflowed_is_null_in_the_log(bank: str) -> None:
    """JSON has no Infinity, and strict readers stop at it."""
    from gmem_gen.run import Log

    with contextlib.closing(Log(Path(), 0)) as log:
        log.write({"step": 1, "loss": 0.5, "gradient_norm": float("inf"), "mean_loss": float("nan")})
    text = Path("log.jsonl").read_text()
    assert json.loads(text) == {"step": 1, "loss": 0.5, "gradient_norm": None, "mean_loss": None}


def test_images_a_second_are_those_of_steps(bank: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a clock by which a step takes two seconds, and validation, samples and checkpoints a hundred each."""
    from gmem_gen import loop

    now = [0.0]

    def slow(function: Callable[..., object], seconds: float) -> Callable[..., object]:
        def called(*args: object) -> object:
            now[0] += seconds
            return function(*args)

        return called

    monkeypatch.setattr(loop, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    monkeypatch.setattr(loop, "validate", slow(loop.validate, 100))
    monkeypatch.setattr(loop, "write_preview", slow(loop.write_preview, 100))
    monkeypatch.setattr(Trainer, "save", slow(Trainer.save, 100))
    monkeypatch.setattr(Trainer, "make_step", slow(Trainer.make_step, 2))
    wanted = settings(
        "data.validation_fraction=0.3", "sample.num_steps=1", "train.max_minutes=0", validate_every=2, sample_every=3,
        log_every=2, sample_images=1,
    )  # fmt: skip
    gmem_gen.train(bank, wanted, out="run")
    found = [json.loads(line) for line in Path("run/log.jsonl").read_text().splitlines()]
    assert [line["images_per_second"] for line in found if "loss" in line] == [4.0, 4.0, 4.0]
    assert found[-1]["elapsed"] > 400


def test_tensorboard_that_is_absent_is_told_before_training(bank: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the line that installs it."""
    real = builtins.__import__

    def without(name: str, *args: object, **options: object) -> object:
        if name.startswith(("tensorboard", "torch.utils.tensorboard")):
            raise ImportError(name)
        return real(name, *args, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(MissingDependencyError, match=r"pip install 'gmem\[train\]'"):
        gmem_gen.train(bank, config(), out="run", tensorboard=True)
    assert not Path("run").exists()


def test_the_checkpoint_before_a_damaged_one_goes_on_when_asked(bank: str) -> None:
    """Only then; the damaged one is set aside, and the end is that of a training without damage."""
    gmem_gen.train(bank, config(), out="whole")
    gmem_gen.train(bank, config(), out="run")
    newest = checkpoints.list_checkpoints(Path("run"))[-1]
    (newest / checkpoints.MODEL).write_bytes(b"damaged")
    with pytest.raises(CheckpointError, match="--resume-from previous"):
        gmem_gen.train(bank, config(max_steps=7), out="run")
    told: list[str] = []
    report = gmem_gen.train(bank, config(), out="run", resume_from="previous", say=told.append)
    assert report.step == 6
    assert any("set-aside-step-00000006" in line for line in told)
    first, second = tensors("whole"), tensors("run")
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert lines("whole") == lines("run")


def test_a_training_goes_on_from_the_checkpoint_that_is_named(bank: str) -> None:
    """In its own run or a new one; what is no checkpoint is refused, and so is another run's beside one's own."""
    gmem_gen.train(bank, config(keep_checkpoints=0), out="run")
    third = "run/checkpoints/step-00000002"
    assert gmem_gen.train(bank, config(), out="branch", resume_from=third).step == 6
    first, second = tensors("run"), tensors("branch")
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert gmem_gen.train(bank, config(max_steps=3), out="run", resume_from=third).step == 3
    assert len(list(Path("run/checkpoints").glob("set-aside-*"))) == 2
    with pytest.raises(CheckpointError, match="checkpoints of its own"):
        gmem_gen.train(bank, config(), out="branch", resume_from=third)
    with pytest.raises(CheckpointError, match="no checkpoint in nowhere"):
        gmem_gen.train(bank, config(), out="new", resume_from="nowhere")
    with pytest.raises(CheckpointError, match="none before the latest"):
        gmem_gen.train(bank, config(), out="new", resume_from="previous")


def test_going_back_twice_keeps_what_was_set_aside_first(bank: str) -> None:
    """Under a number of its own."""
    gmem_gen.train(bank, config(keep_checkpoints=0), out="run")
    kept, folder = tensors("run"), Path("run/checkpoints")
    for _ in range(2):
        gmem_gen.train(bank, config(keep_checkpoints=0), out="run", resume_from="previous")
    names = ["set-aside-step-00000006", "set-aside-step-00000006-2"]
    assert sorted(path.name for path in folder.glob("set-aside-*")) == names
    for name in names:
        found = load_file(folder / name / checkpoints.MODEL)
        assert all(torch.equal(value, kept[f"{checkpoints.MODEL}:{key}"]) for key, value in found.items())


def test_a_kill_while_a_checkpoint_is_removed_leaves_none_in_halves(bank: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is left of it is no checkpoint, and goes with the next one."""
    real = shutil.rmtree

    def killed(path: Path, **options: bool) -> None:
        if Path(path).is_dir() and "step-" in Path(path).name:
            next(Path(path).glob("*.json")).unlink()
            raise KeyboardInterrupt
        real(path, **options)

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            gmem_gen.train(bank, config(keep_checkpoints=1), out="run")
    assert [path.name for path in checkpoints.list_checkpoints(Path("run"))] == ["step-00000004"]
    gmem_gen.train(bank, config(keep_checkpoints=1), out="run")
    assert [path.name for path in Path("run/checkpoints").iterdir()] == ["step-00000006"]


def test_not_a_number_leaves_sound_checkpoints(bank: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those before it load, and the training goes on from them."""
    from gmem_gen import losses as terms

    real, calls = terms.squared_errors, []

    def poisoned(*args: object, **options: object) -> torch.Tensor:
        calls.append(1)
        return real(*args, **options) * (float("nan") if len(calls) == 5 else 1.0)

    monkeypatch.setattr(terms, "squared_errors", poisoned)
    with pytest.raises(GMemError, match=r"became nan.*step 4.*checkpoints that were saved stand"):
        gmem_gen.train(bank, config(), out="run")
    found = gmem_gen.load_checkpoint("run", weights="model")
    assert found.step == 4
    assert all(torch.isfinite(value).all() for value in found.model.state_dict().values())
    assert gmem_gen.train(bank, config(), out="run").step == 6


def test_weights_that_are_not_finite_are_never_saved(bank: str) -> None:
    """An update that goes too far is seen before it is saved, not by the loss of the next step."""
    wild = config(learning_rate=1e38, warmup_steps=0, checkpoint_every=1, clip_norm=0.0, ema_decay=(0.5,))
    with pytest.raises(GMemError, match=r"after step \d.*not saved.*--resume-from previous.*train\.learning_rate"):
        gmem_gen.train(bank, wild, out="run")
    for checkpoint in checkpoints.list_checkpoints(Path("run")):
        for name in (checkpoints.MODEL, checkpoints.EMA):
            assert all(torch.isfinite(value).all() for value in load_file(checkpoint / name).values())


def test_a_disk_that_is_full_in_the_middle_of_a_file(bank: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some bytes of the checkpoint are written, then no more: what stood stands, nothing half-written is left, it goes on later."""
    gmem_gen.train(bank, config(max_steps=2), out="run")
    before = tensors("run")
    real = checkpoints.save_file

    def cut(values: dict[str, torch.Tensor], path: Path) -> None:
        real(values, path)
        if path.name == checkpoints.OPTIMIZER:
            path.write_bytes(path.read_bytes()[:100])
            raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "save_file", cut)
        with pytest.raises(WriteError, match="No space left"):
            gmem_gen.train(bank, config(), out="run")
    assert [path.name for path in Path("run/checkpoints").iterdir()] == ["step-00000002"]
    assert all(torch.equal(value, before[name]) for name, value in tensors("run").items())
    gmem_gen.train(bank, config(), out="whole")
    gmem_gen.train(bank, config(), out="run")
    assert lines("run") == lines("whole")


def test_a_state_that_is_no_multiple_of_anything_is_saved_at_the_end(bank: str) -> None:
    """Three steps, checkpoints every two: both 2 and 3 are there. A batch larger than the images is all of them, and said."""
    told: list[str] = []
    gmem_gen.train(bank, config(max_steps=3, batch_size=100), out="run", say=told.append)
    assert [checkpoints.step_of(path) for path in checkpoints.list_checkpoints(Path("run"))] == [2, 3]
    assert any("all 24 images" in line for line in told)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_and_a_patch_that_does_not_fit_are_told_at_once(bank: str) -> None:
    """Before any folder is made or image read."""
    with pytest.raises(ConfigError, match="device 'cuda' cannot be used"):
        gmem_gen.train(bank, config(device="cuda"), out="run")
    assert not Path("run").exists()
    with pytest.raises(ConfigError, match="patch_size 3 does not divide"):
        gmem_gen.train(bank, settings("model.patch_size=3"), out="run")
    assert not Path("run/cache").exists()


def test_what_cannot_be_trained_is_told_before_images_are_read(bank: str) -> None:
    """Rows of two classes or none, too many parts, patch tokens that do not fit: nothing is in the cache, by `plan` either."""
    opened = gmem_bank.open(bank)
    keys = opened.keys(opened.rows())
    writer = gmem_bank.ShardWriter(Path("tokens"), {"made": "here"})
    writer.write(0, keys, np.zeros((len(keys), 9, 5), np.float32))
    writer.finish(1, {"encoder": opened.encoder.to_json()})
    gmem_bank.concept_of_rows(bank, "twice", gmem_bank.Selection(keys=tuple(keys[:2])))
    for words, message in (
        (["model.condition=class"], "must not overlap"),
        (["train.accumulation=8", "data.validation_fraction=0.75"], "one each at least"),
        (["data.tokens=tokens", "data.token_resampling=none", "model.encoder_depth=1"], "3×3 patch tokens"),
    ):
        with pytest.raises(ConfigError, match=message):
            plan(bank, settings(*words))
        with pytest.raises(ConfigError, match=message):
            gmem_gen.train(bank, settings(*words), out="run")
    assert not Path("run/cache").exists()


def test_accelerate_is_left_as_it_was(bank: str) -> None:
    """A caller may set it up in another way afterwards."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    gmem_gen.train(bank, config(max_steps=1), out="run")
    assert Accelerator(mixed_precision="bf16", cpu=True).mixed_precision == "bf16"
    AcceleratorState._reset_state(reset_partial_state=True)


def test_three_published_steps_by_the_trainer(make_bank: BankMaker) -> None:
    """Loss terms, gradient norms, clipped gradients, weights and averages, through the trainer's own step."""
    vectors, facts = training_vectors()
    shape = model_of(facts["class_kwargs"], encoder_depth=facts["encoder_depth"], projection_dim=768)
    start = {name.removeprefix("state0."): value for name, value in vectors.items() if name.startswith("state0.")}
    batch = Batch(
        places=np.arange(len(vectors["in.t"])), x_1=vectors["in.x1"], x_0=vectors["in.x0"], t=vectors["in.t"],
        conditions=vectors["in.c"], tokens=vectors["in.z"],
    )  # fmt: skip
    rows = np.arange(len(batch))
    whole = Config(
        model=shape.config, flow=FlowConfig(prediction="velocity", cosine_weight=1.0, projection_weight=0.5),
        train=TrainConfig(
            learning_rate=2e-4, ema_decay=0.9999, ema_warmup=False, warmup_steps=0, batch_size=len(rows), max_steps=3, num_workers=0
        ),
    )  # fmt: skip
    join = conditioning.Join(rows=rows, keys=[str(row) for row in rows], num_derived=0, missing=[])
    images = SimpleNamespace(latent=LatentShape(channels=batch.x_1.shape[1], size=batch.x_1.shape[2]))
    with contextlib.closing(Processes("cpu")) as processes:
        trainer = Trainer(
            make_bank(rows=len(rows), dim=768), whole, images, join, processes, tokens=lambda _: batch.tokens
        )
        trainer.loader = SimpleNamespace(take=lambda step: batch)
        trainer.model.load_state_dict(start | projector_state())
        trainer.averages = optim.make_averages(trainer.model, whole.train)
        for expected in facts["steps"]:
            made = trainer.make_step()
            found = {
                "mse": made.terms["mse"], "cos": made.terms["cosine"], "proj": made.terms["projection"], "total": made.terms["loss"],
                "grad_norm": made.norm,
            }  # fmt: skip
            assert found == {name: pytest.approx(expected[name], rel=1e-4, abs=2e-5) for name in found}
            if expected["step"] == 0:
                compare(vectors, "grad_clipped", {name: p.grad for name, p in trainer.model.named_parameters()})
    compare(vectors, "state3", dict(trainer.model.named_parameters()))
    compare(vectors, "ema3", dict(trainer.average.named_parameters()))


def test_runs_do_not_share_what_was_copied(bank: str) -> None:
    """A copied run goes on by itself: nothing in it points at where it was."""
    gmem_gen.train(bank, config(max_steps=4), out="run")
    shutil.copytree("run", "copy")
    shutil.rmtree("run")
    assert gmem_gen.train(bank, config(), out="copy").step == 6


@pytest.mark.slow
def test_a_short_soak(photos: Path, tmp_path: Path) -> None:
    """Killed every few seconds for a while, the training is the one that nobody disturbed."""
    from tools.soak import soak

    report = soak(tmp_path, photos, minutes=0.6, every=9, checkpoint_every=20)
    assert report["kills"] >= 3
    assert report["lines_equal"]
    assert report["tensors_equal"]
