"""Tokenizers: the networks against independent forwards, their records, and what they refuse."""

from __future__ import annotations

import json
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional

import gmem_gen
from gmem_bank.errors import CheckpointError, ConfigError, EncoderError
from gmem_gen import taef2, va_vae
from gmem_gen.autoencoders import Weights
from gmem_gen.diffusers_autoencoders import require_diffusers
from gmem_gen.model import LatentShape
from gmem_gen.tokenizers import Normalisation, Tokenizer, TokenizerMaker, make_tokenizer, require_same


def images(count: int = 3, size: int = 16, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, size, size, 3), dtype=np.uint8)


def make_diffusers(folder: Path, name: str) -> torch.nn.Module:
    """A small random autoencoder of the library, saved as a hub snapshot holds it."""
    import diffusers

    torch.manual_seed(0)
    if name == "sd-vae":
        model = diffusers.AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, block_out_channels=(8, 16),
            layers_per_block=1, latent_channels=4, norm_num_groups=4,
        )  # fmt: skip
    elif name == "taesd":
        model = diffusers.AutoencoderTiny(
            encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8), num_encoder_blocks=(1, 1),
            num_decoder_blocks=(1, 1),
        )  # fmt: skip
    else:
        model = diffusers.AutoencoderDC(
            latent_channels=4, attention_head_dim=4, encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8),
            encoder_layers_per_block=(1, 1), decoder_layers_per_block=(1, 1), encoder_qkv_multiscales=((), ()),
            decoder_qkv_multiscales=((), ()),
        )  # fmt: skip
    model.eval().save_pretrained(folder)
    return model


def make_taef2(folder: Path) -> Path:
    """Random weights under the names of the published files, in f16 as they are."""
    torch.manual_seed(0)
    folder.mkdir()
    for file, network in ((taef2.ENCODER, taef2.make_encoder()), (taef2.DECODER, taef2.make_decoder())):
        save_file({name: tensor.half().contiguous() for name, tensor in network.state_dict().items()}, folder / file)
    return folder


def by_hand(x: torch.Tensor, weights: dict[str, torch.Tensor], plan: list[str]) -> torch.Tensor:
    """TAEF2 by its description, with functions only: c convolution, s of stride 2, b block, p block with pool, u twice as large."""

    def convolve(x, name, stride=1):
        return functional.conv2d(x, weights[f"{name}.weight"], weights.get(f"{name}.bias"), stride, padding=1)

    for place, kind in enumerate(plan):
        if kind == "tanh":
            x = 3 * torch.tanh(x / 3)
        elif kind == "relu":
            x = functional.relu(x)
        elif kind in ("c", "s"):
            x = convolve(x, f"{place}", 2 if kind == "s" else 1)
        elif kind == "u":
            x = x.repeat_interleave(2, -1).repeat_interleave(2, -2)
        else:
            if kind == "p":
                wide = functional.conv2d(x, weights[f"{place}.pool.0.weight"])
                group = wide.reshape(len(wide), 4, -1)
                normal = (group - group.mean(-1, keepdim=True)) / (
                    group.var(-1, keepdim=True, correction=0) + 1e-5
                ).sqrt()
                scale, shift = (weights[f"{place}.pool.1.{what}"].view(1, -1, 1, 1) for what in ("weight", "bias"))
                x = x + functional.conv2d(
                    functional.relu(normal.view_as(wide) * scale + shift), weights[f"{place}.pool.3.weight"]
                )
            y = x
            for number in (0, 2, 4):
                y = convolve(y if number == 0 else functional.relu(y), f"{place}.conv.{number}")
            x = functional.relu(y + x)
    return x


ENCODER_PLAN = ["c", "b", "s", "b", "b", "b", "s", "b", "b", "b", "s", "p", "p", "p", "c"]
DECODER_PLAN = [
    "tanh",
    "c",
    "relu",
    "p",
    "p",
    "p",
    "u",
    "c",
    "b",
    "b",
    "b",
    "u",
    "c",
    "b",
    "b",
    "b",
    "u",
    "c",
    "b",
    "c",
]


def test_taef2_is_the_network_of_its_description(tmp_path: Path) -> None:
    """Latents and images equal a forward by functions alone, on the very tensors of the files."""
    folder = make_taef2(tmp_path / "taef2")
    tokenizer = TokenizerMaker("taef2", Weights(place=str(folder))).make(16)
    assert tokenizer.latent == LatentShape(channels=32, size=2)
    pictures = images()
    weights = {name: tensor.float() for name, tensor in load_file(folder / taef2.ENCODER).items()}
    expected = by_hand(torch.from_numpy(pictures).permute(0, 3, 1, 2) / 255, weights, ENCODER_PLAN)
    torch.testing.assert_close(tokenizer.encode(pictures), expected, atol=2e-5, rtol=1e-4)
    latents = torch.randn(3, 32, 2, 2) * 2
    weights = {name: tensor.float() for name, tensor in load_file(folder / taef2.DECODER).items()}
    values = by_hand(latents, weights, DECODER_PLAN).clamp(0, 1).permute(0, 2, 3, 1) * 255
    assert np.abs(tokenizer.decode(latents).astype(np.float32) - values.numpy()).max() <= 0.51
    assert np.ptp(tokenizer.decode(latents)) > 5  # not all clipped to one value


@pytest.mark.parametrize(("name", "channels"), [("sd-vae", 4), ("taesd", 4), ("dc-ae", 4)])
def test_diffusers_autoencoders_give_the_librarys_numbers(name: str, channels: int, tmp_path: Path) -> None:
    """Latents are the network's own (of AutoencoderKL the mean), images what it decodes; sizes are found."""
    model = make_diffusers(tmp_path / "model", name)
    tokenizer = TokenizerMaker(name, Weights(place=str(tmp_path / "model"))).make(16)
    assert isinstance(tokenizer, Tokenizer)
    assert tokenizer.latent == LatentShape(channels=channels, size=8)
    pictures = images()
    with torch.no_grad():
        encoded = model.encode(torch.from_numpy(pictures).permute(0, 3, 1, 2) / 127.5 - 1, return_dict=False)[0]
        expected = encoded.mean if name == "sd-vae" else encoded
        decoded = model.decode(expected, return_dict=False)[0].permute(0, 2, 3, 1) * 127.5 + 127.5
    latents = tokenizer.encode(pictures)
    torch.testing.assert_close(latents, expected, atol=1e-5, rtol=1e-4)
    assert np.abs(tokenizer.decode(latents).astype(np.float32) - decoded.clamp(0, 255).numpy()).max() <= 0.51


def test_a_record_makes_the_same_tokenizer_again(tmp_path: Path) -> None:
    """With its statistics, from JSON, and wherever the same weights lie now; of other weights nothing is made."""
    make_diffusers(tmp_path / "model", "sd-vae")
    made = TokenizerMaker("sd-vae", Weights(place=str(tmp_path / "model"))).make(16)
    own = made.with_normalisation(Normalisation(mean=(1.0, 2.0, 3.0, 4.0), std=(0.5, 1.0, 2.0, 4.0)))
    record = json.loads(json.dumps(own.record()))
    assert (record["name"], record["image_size"], record["latent"]) == ("sd-vae", 16, {"channels": 4, "size": 8})
    assert record["scaling_factor"] == 0.18215
    again = make_tokenizer(record)
    raw, normalised = made.encode(images()), own.encode(images())
    mean, std = torch.tensor([1.0, 2, 3, 4]).view(1, 4, 1, 1), torch.tensor([0.5, 1, 2, 4]).view(1, 4, 1, 1)
    torch.testing.assert_close(normalised, (raw - mean) / std)
    assert torch.equal(again.encode(images()), normalised)
    np.testing.assert_array_equal(again.decode(normalised), made.decode(raw))
    shutil.move(tmp_path / "model", tmp_path / "moved")
    with pytest.raises(EncoderError, match="--tokenizer-weights"):
        make_tokenizer(record).decode(normalised)
    assert torch.equal(make_tokenizer(record, weights=str(tmp_path / "moved")).encode(images()), normalised)
    weights = load_file(tmp_path / "moved/diffusion_pytorch_model.safetensors")
    weights["decoder.conv_out.bias"] += 1
    save_file(weights, tmp_path / "moved/diffusion_pytorch_model.safetensors")
    with pytest.raises(EncoderError, match="other weights of 'sd-vae'"):
        make_tokenizer(record, weights=str(tmp_path / "moved")).decode(normalised)


def test_a_sample_of_the_posterior_belongs_to_the_image(tmp_path: Path) -> None:
    """The same in every batch, of the mean and spread of the distribution; another for its twin."""
    model = make_diffusers(tmp_path / "model", "sd-vae")
    weights = Weights(place=str(tmp_path / "model"), posterior="sample")
    tokenizer = TokenizerMaker("sd-vae", weights).make(16)
    pictures = images(64)
    drawn = tokenizer.encode(pictures)
    torch.testing.assert_close(tokenizer.encode(pictures[5:7]), drawn[5:7], atol=1e-5, rtol=1e-4)
    with torch.no_grad():
        distribution = model.encode(torch.from_numpy(pictures).permute(0, 3, 1, 2) / 127.5 - 1).latent_dist
    normal = ((drawn - distribution.mean) / distribution.std).flatten()
    assert abs(float(normal.mean())) < 0.05
    assert abs(float(normal.std()) - 1) < 0.05
    assert tokenizer.record()["posterior"] == "sample"


def ldm_names(name: str, levels: int) -> str:
    """Latent diffusion's name of a tensor of diffusers' AutoencoderKL, by its own rules, the other way round."""
    half, _, rest = name.partition(".")
    if half in ("quant_conv", "post_quant_conv") or rest.startswith(("conv_in", "conv_out")):
        return name
    if rest.startswith("conv_norm_out"):
        return f"{half}.norm_out.{rest.split('.', 1)[1]}"
    parts = rest.split(".")
    swaps = {
        "conv_shortcut": "nin_shortcut",
        "group_norm": "norm",
        "to_q": "q",
        "to_k": "k",
        "to_v": "v",
        "to_out": "proj_out",
    }
    if parts[0] == "mid_block":
        kind = "block" if parts[1] == "resnets" else "attn"
        tail = [swaps.get(part, part) for part in parts[3:] if not (kind == "attn" and part == "0")]
        return f"{half}.mid.{kind}_{int(parts[2]) + 1}.{'.'.join(tail)}"
    way, block = parts[0].split("_")[0], int(parts[1])
    level = block if way == "down" else levels - 1 - block
    if parts[2].endswith("samplers"):
        return f"{half}.{way}.{level}.{way}sample.{'.'.join(parts[4:])}"
    kind = "block" if parts[2] == "resnets" else "attn"
    tail = [swaps.get(part, part) for part in parts[4:] if not (kind == "attn" and part == "0")]
    return f"{half}.{way}.{level}.{kind}.{parts[3]}.{'.'.join(tail)}"


def ldm_checkpoint(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """A network's tensors as latent diffusion stores them: attention by 1×1 convolutions."""
    return {
        ldm_names(name, 5): (
            tensor[:, :, None, None] if ".attentions." in name and tensor.ndim == 2 else tensor
        ).clone()
        for name, tensor in model.state_dict().items()
    }


@pytest.fixture
def small_va_vae(monkeypatch: pytest.MonkeyPatch) -> torch.nn.Module:
    """VA-VAE's network, narrow; the code under test makes it as narrow."""
    monkeypatch.setattr(va_vae, "make_network", lambda diffusers, make=va_vae.make_network: make(diffusers, 8, 32, 4))
    torch.manual_seed(0)
    return va_vae.make_network(require_diffusers()).eval()


def test_va_vae_reads_the_published_layout(small_va_vae: torch.nn.Module, tmp_path: Path) -> None:
    """Every tensor finds its place: the same latents and images; what only its training used is left out."""
    stored = ldm_checkpoint(small_va_vae)
    expected = {"encoder.down.4.attn.1.q.weight", "encoder.down.3.downsample.conv.weight", "decoder.up.4.attn.2.proj_out.bias",
                "decoder.up.1.upsample.conv.bias", "decoder.up.0.block.2.norm1.weight", "encoder.mid.attn_1.norm.weight",
                "encoder.down.2.block.0.nin_shortcut.weight", "decoder.norm_out.weight", "quant_conv.weight"}  # fmt: skip
    assert expected <= set(stored)
    assert "decoder.up.0.upsample.conv.weight" not in stored  # the highest resolution is the last
    extra = {"loss.discriminator.main.0.weight": torch.zeros(1), "linear_proj.weight": torch.zeros(1)}
    torch.save({"state_dict": {**stored, **extra}, "epoch": 3}, tmp_path / "va.pt")
    save_file({name: tensor.contiguous() for name, tensor in stored.items()}, tmp_path / "va.safetensors")
    pictures = images(2, 32)
    with torch.no_grad():
        mean = small_va_vae.encode(torch.from_numpy(pictures).permute(0, 3, 1, 2) / 127.5 - 1).latent_dist.mean
        decoded = small_va_vae.decode(mean).sample.permute(0, 2, 3, 1) * 127.5 + 127.5
    for file in ("va.pt", "va.safetensors"):
        tokenizer = TokenizerMaker("va-vae", Weights(place=str(tmp_path / file))).make(32)
        assert tokenizer.latent == LatentShape(channels=32, size=2)
        torch.testing.assert_close(tokenizer.encode(pictures), mean, atol=1e-5, rtol=1e-4)
        assert np.abs(tokenizer.decode(mean).astype(np.float32) - decoded.clamp(0, 255).numpy()).max() <= 0.51


def test_va_vae_at_its_published_size_has_the_published_tensors() -> None:
    """Width 128, levels 1, 1, 2, 2, 4, 32 channels: shapes at places where other layouts differ."""
    with torch.device("meta"):
        shapes = {name: tuple(t.shape) for name, t in va_vae.make_network(require_diffusers()).state_dict().items()}
    named = {ldm_names(name, 5): shape for name, shape in shapes.items()}
    assert named["encoder.conv_in.weight"] == (128, 3, 3, 3)
    assert named["encoder.down.4.block.0.conv1.weight"] == (512, 256, 3, 3)
    assert named["encoder.down.4.attn.0.q.weight"] == (512, 512)
    assert named["encoder.conv_out.weight"] == (64, 512, 3, 3)
    assert named["quant_conv.weight"] == (64, 64, 1, 1)
    assert named["post_quant_conv.weight"] == (32, 32, 1, 1)
    assert named["decoder.conv_in.weight"] == (512, 32, 3, 3)
    assert named["decoder.up.0.block.0.conv1.weight"] == (128, 128, 3, 3)
    assert {va_vae.translate(name, 5) for name in named} == set(shapes)


class _Code:
    """Runs something when it is unpickled."""

    def __reduce__(self):
        return Path.touch, (Path("ran"),)


def test_va_vae_refuses_what_is_not_its_checkpoint(small_va_vae: torch.nn.Module, tmp_path: Path) -> None:
    """Missing, unknown or misshapen tensors, code, other files: named; nothing is loaded halfway."""
    stored = ldm_checkpoint(small_va_vae)

    def refused(content: object, match: str) -> None:
        torch.save(content, tmp_path / "bad.ckpt")
        with pytest.raises(EncoderError, match=match):
            TokenizerMaker("va-vae", Weights(place=str(tmp_path / "bad.ckpt"))).make(32)

    lacking = {name: tensor for name, tensor in stored.items() if name != "quant_conv.bias"}
    refused({"state_dict": lacking}, r"lacks 1 tensors, such as 'quant_conv.bias'")
    refused(
        {"state_dict": {**stored, "encoder.more.weight": torch.zeros(1)}}, r"1 tensors .* does not have.*encoder.more"
    )
    refused({"state_dict": {**stored, "quant_conv.bias": torch.zeros(3)}}, "in another shape")
    refused({"state_dict": {"foundation_model.model.a": torch.zeros(1)}}, "lacks")
    refused({"state_dict": {**stored, "encoder.down.9.block.0.conv1.bias": torch.zeros(1)}}, "beyond those of VA-VAE")
    refused({"state_dict": [1, 2]}, "no table of tensors")
    refused({"state_dict": stored, "hook": _Code()}, "without running code")
    assert not Path("ran").exists()
    (tmp_path / "bad.ckpt").write_bytes(b"not a checkpoint")
    with pytest.raises(EncoderError, match="without running code"):
        TokenizerMaker("va-vae", Weights(place=str(tmp_path / "bad.ckpt"))).make(32)
    with pytest.raises(EncoderError, match="published checkpoint"):
        TokenizerMaker("va-vae", Weights(place=str(tmp_path / "gone.pt"))).make(32)


def test_va_vae_is_read_like_any_foreign_checkpoint(small_va_vae: torch.nn.Module, tmp_path: Path) -> None:
    """A packed structure, one that breaks the reader, a damaged part, tensors that are no plain ones: told, never a bare error."""
    torch.save(ldm_checkpoint(small_va_vae), tmp_path / "whole.pt")

    def refused(match: str) -> None:
        with pytest.raises(EncoderError, match=match):
            TokenizerMaker("va-vae", Weights(place=str(tmp_path / "bad.pt"))).make(32)

    def rewritten(method: int, change: Callable[[str, bytes], bytes]) -> None:
        with zipfile.ZipFile(tmp_path / "whole.pt") as old, zipfile.ZipFile(tmp_path / "bad.pt", "w", method) as new:
            for info in old.infolist():
                new.writestr(info.filename, change(info.filename, old.read(info)))

    rewritten(zipfile.ZIP_DEFLATED, lambda name, data: data)
    refused("compressed after")
    rewritten(zipfile.ZIP_STORED, lambda name, data: b"\x80\x02t." if name.endswith("data.pkl") else data)
    refused("nothing in it was executed")
    broken = bytearray((tmp_path / "whole.pt").read_bytes())
    broken[len(broken) // 2] ^= 1
    (tmp_path / "bad.pt").write_bytes(broken)
    refused("does not match its sum")
    torch.save({"quant_conv.bias": torch.zeros(3).to_sparse()}, tmp_path / "bad.pt")
    refused("no table of tensors")


def test_refusals(tmp_path: Path) -> None:
    """Unknown names, sizes that do not divide, grey, no weights, pickles, another network, a lack of tensors."""
    make_diffusers(tmp_path / "kl", "sd-vae")
    folder = Weights(place=str(tmp_path / "kl"))
    with pytest.raises(ConfigError, match="Did you mean 'sd-vae'"):
        TokenizerMaker("sdvae").make(16)
    with pytest.raises(ConfigError, match="multiple of that, got 15"):
        TokenizerMaker("sd-vae", folder).make(15, 3)
    with pytest.raises(ConfigError, match=r"data.channels=3"):
        TokenizerMaker("sd-vae", folder).make(16, 1)
    with pytest.raises(EncoderError, match=r"needs its weights: --tokenizer-weights"):
        TokenizerMaker("taef2").make(16)
    with pytest.raises(EncoderError, match="'AutoencoderKL', tokenizer 'taesd' is 'AutoencoderTiny'"):
        TokenizerMaker("taesd", folder).make(16)
    with pytest.raises(EncoderError, match=r"not in the hub cache.*--tokenizer-weights FOLDER"):
        TokenizerMaker("sd-vae").make(16)
    with pytest.raises(EncoderError, match="no folder"):
        TokenizerMaker("sd-vae", Weights(place="nowhere")).make(16)
    with pytest.raises(EncoderError, match=r"no folder kl/config\.json: --tokenizer-weights takes a folder"):
        TokenizerMaker("sd-vae", Weights(place="kl/config.json")).make(16)
    weights = tmp_path / "kl/diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    save_file({name: tensor for name, tensor in tensors.items() if name != "quant_conv.bias"}, weights)
    with pytest.raises(EncoderError, match=r"quant_conv\.bias"):
        TokenizerMaker("sd-vae", folder).make(16)
    weights.unlink()
    torch.save(tensors, weights.with_suffix(".bin"))
    with pytest.raises(EncoderError, match="a pickle, which can run code and is never read"):
        TokenizerMaker("sd-vae", folder).make(16)
    with pytest.raises(EncoderError, match=r"no file .*taef2_encoder.safetensors"):
        TokenizerMaker("taef2", folder).make(16)
    cut = make_taef2(tmp_path / "cut") / taef2.ENCODER
    cut.write_bytes(cut.read_bytes()[:-9])
    with pytest.raises(EncoderError, match="does not hold the weights of TAEF2"):
        TokenizerMaker("taef2", Weights(place=str(cut.parent))).make(16)


def test_a_pipelines_folder_and_the_hub_cache_will_do(tmp_path: Path, hub_home: Path) -> None:
    """The autoencoder inside a pipeline's folder; a snapshot of the hub, whose commit is recorded."""
    make_diffusers(tmp_path / "pipeline/vae", "sd-vae")
    inside = TokenizerMaker("sd-vae", Weights(place=str(tmp_path / "pipeline"))).make(16)
    root = hub_home / "hub/models--stabilityai--sd-vae-ft-mse"
    make_diffusers(root / "snapshots" / ("0" * 40), "sd-vae")
    (root / "refs").mkdir()
    (root / "refs/main").write_text("0" * 40)
    try:
        cached = TokenizerMaker("sd-vae").make(16)
        record = cached.record()
        assert (record["weights"], record["revision"]) == ("stabilityai/sd-vae-ft-mse", "0" * 40)
        assert record["weights_sha256"] == inside.record()["weights_sha256"]
        assert torch.equal(make_tokenizer(record).encode(images()), inside.encode(images()))
    finally:
        shutil.rmtree(root)


def test_old_and_damaged_records() -> None:
    """A name alone is pixels of the model's latent; records that lack something are refused."""
    assert make_tokenizer("pixels", LatentShape(channels=1, size=8)).latent == LatentShape(channels=1, size=8)
    whole = {"name": "taef2", "weights": "w", "weights_sha256": "0", "posterior": "mean", "image_size": 16,
             "latent": {"channels": 2, "size": 2}, "mean": [0, 0], "std": [1, 1]}  # fmt: skip
    assert make_tokenizer(whole).latent == LatentShape(channels=2, size=2)
    for change in ({"std": [1, 0]}, {"mean": [0]}, {"latent": {}}, {"std": None}, {"image_size": "x"}):
        with pytest.raises(CheckpointError, match="cannot be read"):
            make_tokenizer({**whole, **change})
    with pytest.raises(CheckpointError):
        make_tokenizer({"name": "pixels"})
    with pytest.raises(ConfigError, match=r"weights_sha256 was '0'"):
        require_same(whole, make_tokenizer({**whole, "weights_sha256": "1"}), "this")
    assert gmem_gen.make_tokenizer is make_tokenizer
