"""The network: the published numbers, and the laws of its parts."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import gmem_gen
from gmem_bank.errors import ConfigError
from gmem_gen import layers
from gmem_gen.config import ModelConfig
from gmem_gen.guidance import guided
from gmem_gen.layers import RMSNorm, position_table, rope_tables, rotate
from gmem_gen.model import Generator, LatentShape, auto_patch_size
from gmem_gen.sizes import flops_per_image
from tests.conftest import DATA
from tests.gmem_gen.golden import WHOLE, model_of


def published(folder, case: str) -> tuple[Generator, dict, dict]:
    """A generator with the published weights, the vectors, and their description."""
    vectors = load_file(folder / f"lightningdit_{case}.safetensors")
    facts = json.loads((folder / f"lightningdit_{case}.json").read_text())
    model = model_of(facts["class_kwargs"])
    state = {name.removeprefix("state."): value for name, value in vectors.items() if name.startswith("state.")}
    for name in ("pos_embed", "feat_rope.freqs_cos", "feat_rope.freqs_sin"):
        torch.testing.assert_close(model.state_dict()[name], state[name], atol=1e-6, rtol=0)
    model.load_state_dict(state)
    return model.eval(), vectors, facts


CASES = [(DATA, "patch2")] + ([(WHOLE, "xlflags")] if WHOLE else [])


@pytest.mark.parametrize(("folder", "case"), CASES)
def test_forward_equals_the_published_model(folder, case: str) -> None:
    """Our tables, keys and forward are the published ones, with a snippet and with the null snippet."""
    model, vectors, _ = published(folder, case)
    x, t, c = vectors["in.x"], vectors["in.t"], vectors["in.c"]
    with torch.no_grad():
        torch.testing.assert_close(model(x, t, c), vectors["eval.out"], atol=2e-5, rtol=1e-4)
        torch.testing.assert_close(model(x, t, torch.zeros_like(c)), vectors["eval.out_c_zero"], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize(("folder", "case"), CASES)
def test_guidance_equals_the_published_one(folder, case: str) -> None:
    """Inside, before and after the interval."""
    model, vectors, facts = published(folder, case)
    for one in facts["cfg"]:
        interval = one.get("cfg_interval", False)
        start = one["cfg_interval_start"] if interval else 0.0
        null = model.null_conditions(vectors["in.c"])
        field = guided(model, vectors["in.c"], null, one["cfg_scale"], start, one.get("cfg_interval_end") or 1.0)
        with torch.no_grad():
            got = field(vectors["in.x"], torch.full((3,), one["t"]))
        torch.testing.assert_close(got, vectors[f"cfg.{one['name']}.out"][:3], atol=5e-5, rtol=1e-4)


@pytest.mark.parametrize("use_shift", [True, False])
@pytest.mark.parametrize("use_swiglu", [True, False])
@pytest.mark.parametrize("use_rmsnorm", [True, False])
@pytest.mark.parametrize("use_rope", [True, False])
def test_every_switch_gives_a_model_whose_gradients_are_right(use_shift, use_swiglu, use_rmsnorm, use_rope) -> None:
    """The gradient of the loss equals a finite difference in a random direction, in float64."""
    torch.manual_seed(0)
    config = ModelConfig(
        width=16, depth=2, num_heads=2, use_shift=use_shift, use_swiglu=use_swiglu, use_rmsnorm=use_rmsnorm,
        use_rope=use_rope, use_qk_norm=use_rope,
    )  # fmt: skip
    model = Generator(config, LatentShape(channels=3, size=4), 5).double()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    x, t, s = torch.randn(2, 3, 4, 4).double(), torch.rand(2).double(), torch.randn(2, 5).double()
    loss = model(x, t, s).square().mean()
    loss.backward()
    direction = [torch.randn_like(parameter) for parameter in model.parameters()]
    slope = sum(float((p.grad * d).sum()) for p, d in zip(model.parameters(), direction, strict=True))
    step = 1e-4
    values = []
    with torch.no_grad():
        for sign in (1, -1):
            for p, d in zip(model.parameters(), direction, strict=True):
                p.add_(d, alpha=sign * step)
            values.append(float(model(x, t, s).square().mean()))
            for p, d in zip(model.parameters(), direction, strict=True):
                p.sub_(d, alpha=sign * step)
    assert (values[0] - values[1]) / (2 * step) == pytest.approx(slope, rel=2e-3, abs=1e-6)


def test_a_fresh_model_predicts_zero_and_its_blocks_are_identities() -> None:
    """Modulation and output start at zero."""
    model = Generator(ModelConfig(width=16, depth=3, num_heads=2), LatentShape(channels=1, size=8), 5)
    x = torch.randn(2, 1, 8, 8)
    assert torch.equal(model(x, torch.rand(2), torch.randn(2, 5)), torch.zeros_like(x))


def test_unpatchify_undoes_the_published_token_order() -> None:
    """Token (row, column) holds pixel (p, q) of channel c at (p·P + q)·C + c."""
    model = Generator(ModelConfig(width=16, depth=1, num_heads=2, patch_size=2), LatentShape(channels=3, size=4), 5)
    image = torch.arange(48.0).view(1, 3, 4, 4)
    tokens = torch.stack([
        image[0, :, 2 * r : 2 * r + 2, 2 * c : 2 * c + 2].permute(1, 2, 0).flatten() for r in range(2) for c in range(2)
    ])[None]  # fmt: skip
    assert torch.equal(model._unpatchify(tokens), image)


def test_rotary_scores_depend_on_the_distance_only() -> None:
    """⟨R_i q, R_j k⟩ is the same for all pairs of positions with the same offset."""
    cosines, sines = rope_tables(5, 8)
    q, k = torch.randn(8), torch.randn(8)
    turned_q, turned_k = (rotate(v.expand(1, 1, 25, 8), cosines, sines)[0, 0] for v in (q, k))
    scores = (turned_q @ turned_k.T).view(5, 5, 5, 5)
    torch.testing.assert_close(scores[0, 0, 1, 2], scores[3, 1, 4, 3])
    torch.testing.assert_close(scores[2, 2, 0, 3], scores[3, 1, 1, 2])
    torch.testing.assert_close(turned_q.norm(dim=-1), q.norm().expand(25))


def test_position_table_has_columns_first() -> None:
    """Moving along a row of tokens changes the first half of the width only."""
    table = position_table(4, 16)[0].view(4, 4, 16)
    assert torch.equal(table[1, 2, 8:], table[1, 3, 8:])
    assert torch.equal(table[1, 2, :8], table[3, 2, :8])
    assert not torch.equal(table[1, 2, :8], table[1, 3, :8])


def test_rms_norm_equals_its_formula() -> None:
    """x / sqrt(mean(x²) + eps) times the weight."""
    norm = RMSNorm(6)
    torch.nn.init.normal_(norm.weight)
    x = torch.randn(3, 6)
    expected = x.numpy() / np.sqrt((x.numpy() ** 2).mean(-1, keepdims=True) + 1e-6) * norm.weight.detach().numpy()
    np.testing.assert_allclose(norm(x).detach().numpy(), expected, rtol=1e-5)


@pytest.mark.parametrize("condition", ["memory", "class", "none"])
@pytest.mark.parametrize("preset", ["LightningDiT-S/2", "SiT-S/4"])
def test_presets_are_the_models_they_name(preset: str, condition: str) -> None:
    """LightningDiT and SiT by their parts; each with memory, classes or nothing."""
    name = preset if condition == "memory" else f"{preset}:{condition}"
    config = dataclasses.replace(gmem_gen.preset(name).model, depth=1, num_classes=10 if condition == "class" else 0)
    model = Generator(config, LatentShape(channels=3, size=8), 12)
    names = {name.split(".")[0] for name, _ in model.named_parameters()}
    assert names & {"condition_projection", "y_embedder"} == {
        "memory": {"condition_projection"}, "class": {"y_embedder"}, "none": set()
    }[condition]  # fmt: skip
    sit = preset.startswith("SiT")
    assert isinstance(model.blocks[0].norm1, torch.nn.LayerNorm) == sit
    assert hasattr(model.blocks[0].mlp, "fc1") == sit
    assert (model.feat_rope is None) == sit
    conditions = torch.tensor([3, 10]) if condition == "class" else torch.randn(2, 12)
    assert model(torch.randn(2, 3, 8, 8), torch.rand(2), conditions).shape == (2, 3, 8, 8)
    null = model.null_conditions(conditions)
    assert null.tolist() == [10, 10] if condition == "class" else not null.any()


def test_a_sit_block_is_its_formula() -> None:
    """x + g·Attention(LN(x)(1 + s) + h), then the same with GELU(tanh) between two linear maps, written out."""
    torch.manual_seed(0)
    config = ModelConfig(width=8, depth=1, num_heads=2, use_rmsnorm=False, use_swiglu=False, use_rope=False)
    block = Generator(config, LatentShape(channels=1, size=4), 3).blocks[0].double()
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    x, condition = torch.randn(2, 5, 8).double(), torch.randn(2, 8).double()

    def norm(value: torch.Tensor) -> torch.Tensor:
        return (value - value.mean(-1, keepdim=True)) / (value.var(-1, unbiased=False, keepdim=True) + 1e-6).sqrt()

    modulation = block.adaLN_modulation[1](condition * torch.sigmoid(condition))[:, None].chunk(6, dim=-1)
    shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = modulation
    q, k, v = block.attn.qkv(norm(x) * (1 + scale_1) + shift_1).view(2, 5, 3, 2, 4).permute(2, 0, 3, 1, 4)
    mixed = torch.softmax(q @ k.transpose(-1, -2) / 2, dim=-1) @ v
    y = x + gate_1 * block.attn.proj(mixed.transpose(1, 2).reshape(2, 5, 8))
    hidden = block.mlp.fc1(norm(y) * (1 + scale_2) + shift_2)
    gelu = 0.5 * hidden * (1 + torch.tanh((2 / np.pi) ** 0.5 * (hidden + 0.044715 * hidden**3)))
    torch.testing.assert_close(block(x, condition, None), y + gate_2 * block.mlp.fc2(gelu))


@pytest.mark.parametrize("condition", ["memory", "class"])
@pytest.mark.parametrize("swiglu", [True, False])
@pytest.mark.parametrize("shift", [True, False])
def test_the_operations_are_those_that_pytorch_counts(condition: str, swiglu: bool, shift: bool) -> None:
    """By torch's own counter, with and without the projection head."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    config = ModelConfig(width=32, depth=3, num_heads=4, patch_size=2, condition=condition, num_classes=5, use_swiglu=swiglu,
                         use_shift=shift, projection_dim=12, encoder_depth=2)  # fmt: skip
    model = Generator(config, LatentShape(channels=3, size=8), 20)
    conditions = torch.tensor([1]) if condition == "class" else torch.randn(1, 20)
    for project in (False, True):
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            model(torch.randn(1, 3, 8, 8), torch.rand(1), conditions, project=project)
        assert flops_per_image(model, training=project) == counter.get_total_flops()


def test_a_projection_of_a_model_without_a_head_is_refused() -> None:
    """And so are heads deeper than the model, and classes without a number."""
    model = Generator(ModelConfig(width=16, depth=1, num_heads=2), LatentShape(channels=1, size=8), 5)
    with pytest.raises(ConfigError, match="projection_dim"):
        model(torch.randn(1, 1, 8, 8), torch.rand(1), torch.randn(1, 5), project=True)
    with pytest.raises(ConfigError, match=r"at most model\.depth"):
        ModelConfig(depth=3, projection_dim=8)
    with pytest.raises(ConfigError, match="num_classes"):
        Generator(ModelConfig(width=16, num_heads=2, condition="class"), LatentShape(channels=1, size=8), 5)


def test_patch_sizes_divide() -> None:
    """The automatic patch divides the image; a wrong one is refused."""
    assert [auto_patch_size(size) for size in (8, 28, 32, 64, 60, 256)] == [1, 2, 4, 8, 6, 32]
    with pytest.raises(ConfigError, match="does not divide"):
        Generator(ModelConfig(patch_size=3), LatentShape(channels=3, size=8), 5)


@pytest.mark.parametrize("shifted", [True, False])
def test_the_modulated_norm_is_the_norm_modulated_and_has_its_derivative(shifted: bool) -> None:
    """Values and gradients of the plain formula; by finite differences in float64 too; in the dtype of what comes in."""
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 8, generator=draw, dtype=torch.float64, requires_grad=True)
    shift, scale = (torch.randn(2, 8, generator=draw, dtype=torch.float64, requires_grad=True) for _ in range(2))
    weight = torch.rand(8, generator=draw, dtype=torch.float64).add(0.5).requires_grad_()

    def modulated(x: torch.Tensor, scale: torch.Tensor, weight: torch.Tensor, *moved: torch.Tensor) -> torch.Tensor:
        return layers._ModulatedRMSNorm.apply(x, weight, moved[0] if moved else None, scale, 1e-6)

    inputs = [x, scale, weight, *([shift] if shifted else [])]
    assert torch.autograd.gradcheck(modulated, inputs)
    wide = [value.detach().float().requires_grad_() for value in inputs]
    ours = modulated(*wide)
    other = layers.RMSNorm(8)
    other.weight = torch.nn.Parameter(wide[2].detach().clone())
    plain_inputs = [
        value.detach().clone().requires_grad_() for value in (wide[0], wide[1], *([wide[3]] if shifted else []))
    ]
    plain = layers.modulate(other(plain_inputs[0]), plain_inputs[2] if shifted else None, plain_inputs[1])
    torch.testing.assert_close(ours, plain, atol=2e-6, rtol=2e-6)
    weights = torch.randn(ours.shape, generator=draw)
    (ours * weights).sum().backward()
    (plain * weights).sum().backward()
    for mine, theirs in zip([wide[0], wide[1], *([wide[3]] if shifted else [])], plain_inputs, strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(wide[2].grad, other.weight.grad, atol=1e-5, rtol=1e-5)
    half = layers.normalise(other, wide[0].detach().bfloat16(), None, wide[1].detach().bfloat16())
    assert half.dtype == torch.bfloat16


def test_turning_as_complex_numbers_is_the_formula(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a compiler is given and what runs eagerly are the same, for strided input too."""
    cosines, sines = layers.rope_tables(4, 8)
    x = torch.randn(2, 16, 3, 3, 8)[:, :, 1]
    eager = layers.rotate(x, cosines, sines)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    torch.testing.assert_close(layers.rotate(x, cosines, sines), eager)
    pairs = x.unflatten(-1, (-1, 2))
    first = pairs[..., 0] * cosines[:, None, ::2] - pairs[..., 1] * sines[:, None, ::2]
    torch.testing.assert_close(eager[..., ::2], first)


def test_attention_of_single_products_is_attention() -> None:
    """In half precision on a CPU, up to its rounding, and with its gradients."""
    q, k, v = (torch.randn(2, 3, 16, 8).bfloat16().requires_grad_() for _ in range(3))
    ours = layers.attend(q, k, v)
    expected = torch.nn.functional.scaled_dot_product_attention(q.float(), k.float(), v.float())
    torch.testing.assert_close(ours.float(), expected, atol=0.02, rtol=0.02)
    weights = torch.randn(ours.shape)
    mine = torch.autograd.grad((ours * weights).sum(), (q, k, v))
    theirs = torch.autograd.grad((expected * weights).sum(), (q, k, v))
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a.float(), b.float(), atol=0.05, rtol=0.05)
