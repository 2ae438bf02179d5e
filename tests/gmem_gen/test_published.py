"""The published models in training: outputs, projection, three optimizer steps, and every tensor's name and shape."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from gmem_gen import losses, optim, paths, presets
from gmem_gen.config import FlowConfig, TrainConfig
from gmem_gen.model import Generator, LatentShape
from gmem_gen.sizes import num_parameters
from tests.conftest import DATA
from tests.gmem_gen.golden import WHOLE, model_of, projector_state

CLOSE = {"atol": 2e-5, "rtol": 1e-4}


def small_model(case: str) -> tuple[Generator, dict[str, torch.Tensor]]:
    """A small published model with its projection head, and its vectors."""
    folder = DATA if case == "patch2" else WHOLE
    vectors = load_file(folder / f"lightningdit_{case}.safetensors")
    if case == "patch2":
        vectors |= load_file(DATA / "lightningdit_patch2_training.safetensors")
    facts = json.loads((folder / f"lightningdit_{case}.json").read_text())
    model = model_of(facts["class_kwargs"], encoder_depth=facts["encoder_depth"], projection_dim=768)
    state = {name.removeprefix("state."): value for name, value in vectors.items() if name.startswith("state.")}
    model.load_state_dict(state | projector_state())
    return model, vectors


@pytest.mark.parametrize("case", ["patch2", *(["xlflags"] if WHOLE else [])])
def test_outputs_and_projection_in_training(case: str) -> None:
    """Without dropout, and for the condition that the published dropout left; the head changes nothing else."""
    model, vectors = small_model(case)
    x, t, c = vectors["in.x"], vectors["in.t"], vectors["in.c"]
    dropped = vectors["train_drop_seed4242.c_dropped"]
    kept = dropped != 0
    torch.testing.assert_close(dropped[kept], (c / 0.6)[kept])  # dropout with rescale, as `regularise` has it
    with torch.no_grad():
        for name, condition in (("train_nodrop", c), ("train_drop_seed4242", dropped)):
            got = model(x, t, condition, project=True)
            torch.testing.assert_close(got.output, vectors[f"{name}.out"], **CLOSE)
            torch.testing.assert_close(got.tokens, vectors[f"{name}.z"], **CLOSE)
            assert torch.equal(model(x, t, condition), got.output)


@pytest.mark.parametrize("case", ["patch2", *(["xlflags"] if WHOLE else [])])
def test_every_stage_inside(case: str) -> None:
    """Time features, embeddings, tokens, each block, the final layer."""
    model, vectors = small_model(case)
    found: dict[str, torch.Tensor] = {}

    def keep(name: str):
        return lambda module, inputs, output: found.update({name: output.detach()})

    model.t_embedder.register_forward_hook(keep("t_emb"))
    model.condition_projection.register_forward_hook(keep("c_proj"))
    model.final_layer.register_forward_hook(keep("final"))
    for number, block in enumerate(model.blocks):
        block.register_forward_hook(keep(f"block{number}"))
    with torch.no_grad():
        model(vectors["in.x"], vectors["in.t"], vectors["in.c"])
    for name, value in found.items():
        torch.testing.assert_close(value, vectors[f"inter.{name}"], **CLOSE, msg=lambda m, n=name: f"{n}: {m}")
    torch.testing.assert_close(found["t_emb"] + found["c_proj"], vectors["inter.cond"], **CLOSE)


def training_vectors() -> tuple[dict[str, torch.Tensor], dict]:
    """Inputs, first weights and results of three steps; all numbers of the results where the whole file is at hand."""
    facts = json.loads((DATA / "trainstep.json").read_text())
    parts = ("inputs", "weights_a", "weights_b", "results")
    vectors = {k: v for part in parts for k, v in load_file(DATA / f"trainstep_{part}.safetensors").items()}
    if WHOLE:  # its first weights are not what they are called, see tools/cut_golden.py
        whole = load_file(WHOLE / "trainstep.safetensors")
        vectors |= {name: value for name, value in whole.items() if not name.startswith("state0.")}
    return vectors, facts


def test_three_optimizer_steps() -> None:
    """Loss terms, gradient norms, clipped gradients, weights and averaged weights."""
    vectors, facts = training_vectors()
    model = model_of(facts["class_kwargs"], encoder_depth=facts["encoder_depth"], projection_dim=768)
    state = {name.removeprefix("state0."): value for name, value in vectors.items() if name.startswith("state0.")}
    model.load_state_dict(state | projector_state())
    config = TrainConfig(learning_rate=2e-4, ema_decay=0.9999, ema_warmup=False, warmup_steps=0)
    flow = FlowConfig(prediction="velocity", cosine_weight=1.0, projection_weight=0.5)
    optimizer, average = optim.make_optimizer(model, config), optim.make_average(model, 0.9999, warmup=False)
    x_0, x_1, t = vectors["in.x0"], vectors["in.x1"], vectors["in.t"]
    x_t = paths.interpolant(x_0, x_1, t)
    for step in facts["steps"]:
        output, projected = model(x_t, t, vectors["in.c"], project=True)
        terms = losses.flow_losses(output, x_0, x_1, x_t, t, flow, projected=projected, tokens=vectors["in.z"])
        optimizer.zero_grad()
        terms.total.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for name, value in (
            ("mse", terms.mse), ("cos", terms.cosine), ("proj", terms.projection), ("total", terms.total), ("grad_norm", norm)
        ):  # fmt: skip
            assert float(value.detach()) == pytest.approx(step[name], rel=1e-4, abs=2e-5), (step["step"], name)
        if step["step"] == 0:
            compare(vectors, "grad_clipped", {name: p.grad for name, p in model.named_parameters()})
        optimizer.step()
        average.update_parameters(model)
    compare(vectors, "state3", dict(model.named_parameters()))
    compare(vectors, "ema3", dict(average.module.named_parameters()))


def compare(vectors: dict[str, torch.Tensor], what: str, tensors: dict[str, torch.Tensor]) -> None:
    """The numbers that are there, of every tensor; of the projection head its first ones and its norm."""
    for name, tensor in tensors.items():
        mine, golden = tensor.detach().flatten(), vectors.get(f"{what}.{name}", vectors.get(f"head8::{what}.{name}"))
        assert golden is not None, name
        golden = golden.flatten()
        torch.testing.assert_close(
            mine[: len(golden)],
            golden,
            atol=1e-5 if what != "grad_clipped" else 1e-6,
            rtol=1e-4,
            msg=lambda m, n=name: f"{n}: {m}",
        )
        if f"norm::{what}.{name}" in vectors:
            norm = float(vectors[f"norm::{what}.{name}"].flatten()[0])  # of 4 million numbers in float32: 3e-4 is lost
            assert float(mine.double().norm()) == pytest.approx(norm, rel=1e-3)


@pytest.mark.parametrize("size", ["S/1", "B/1", "B/2", "XL/1"])
def test_tensors_and_parameter_counts(size: str) -> None:
    """Names in order, shapes and counts, with the projection head of training and without."""
    import dataclasses

    record = json.loads((DATA / "published_tensors.json").read_text())[size.replace("/", "-")]
    config = presets.MODEL_PRESETS[f"LightningDiT-{size}"]()
    with torch.device("meta"):
        model = Generator(dataclasses.replace(config, projection_dim=768), LatentShape(channels=32, size=16), 768)
    shapes = {name: list(value.shape) for name, value in model.state_dict().items()}
    assert list(shapes) == list(record["tensors"])
    assert shapes == record["tensors"]
    assert num_parameters(model) == record["trained"]
    assert num_parameters(model, sampling=True) == record["trained"] - record["projection_head"]
