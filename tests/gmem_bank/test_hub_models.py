"""Models of the transformers library: the same numbers as the library's own, by every name, pooling and layer."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import gmem_bank
from gmem_bank.encoders import preprocess
from gmem_bank.encoders.native import native_preprocessing
from gmem_bank.encoders.precision import choose_dtype
from gmem_bank.errors import EncoderError
from gmem_bank.query import search

TOWER = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 32,
    "patch_size": 8,
}  # fmt: skip
TEXT = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 99}
PROCESSORS = {
    "squash": {"size": {"height": 32, "width": 32}, "resample": 3, "image_mean": [0.5] * 3, "image_std": [0.5] * 3},
    "crop": {
        "size": {"shortest_edge": 40}, "crop_size": {"height": 32, "width": 32}, "do_center_crop": True, "resample": 3,
        "image_mean": [0.48, 0.46, 0.41], "image_std": [0.27, 0.26, 0.28], "rescale_factor": 1 / 255,
    },
    "bilinear": {
        "size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}, "do_center_crop": True, "resample": 2,
        "image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225],
    },
}  # fmt: skip


def make_model(folder: Path, kind: str, processor: str = "squash") -> torch.nn.Module:
    """A small random model in a folder, as a hub snapshot holds it."""
    import transformers as t

    torch.manual_seed(0)
    if kind == "clip":
        model = t.CLIPModel(
            t.CLIPConfig(
                text_config={**TEXT, "bos_token_id": 1, "eos_token_id": 2}, vision_config=TOWER, projection_dim=16
            )
        )
    elif kind == "siglip":
        text = {**TEXT, "bos_token_id": 1, "eos_token_id": 2, "max_position_embeddings": 16}
        model = t.SiglipModel(t.SiglipConfig(text_config=text, vision_config=TOWER))
    elif kind == "dinov3":
        model = t.DINOv3ViTModel(t.DINOv3ViTConfig(**TOWER, num_register_tokens=2))
    elif kind == "registers":
        model = t.Dinov2WithRegistersModel(t.Dinov2WithRegistersConfig(**TOWER, num_register_tokens=3))
    elif kind == "vit":
        model = t.ViTModel(t.ViTConfig(**TOWER))
    else:
        model = t.Dinov2Model(t.Dinov2Config(**TOWER))
    model.eval().save_pretrained(folder)
    types = {"squash": "ViTImageProcessor", "crop": "CLIPImageProcessor", "bilinear": "CLIPImageProcessor"}
    config = {"image_processor_type": types[processor], **PROCESSORS[processor]}
    (folder / "preprocessor_config.json").write_text(json.dumps(config))
    return model


def images(count: int, size: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, size, size, 3), dtype=np.uint8)


@pytest.mark.parametrize(
    ("kind", "name"),
    [("dinov2", "dinov2"), ("registers", "dinov2-with-registers"), ("dinov3", "dinov3"), ("vit", "hf:"),
     ("clip", "clip-base-32"), ("siglip", "siglip2")],
)  # fmt: skip
@pytest.mark.parametrize("preset", ["native", "gmem"])
def test_embeddings_are_those_of_a_direct_forward(tmp_path: Path, kind: str, name: str, preset: str) -> None:
    """By every name and preset, the library's own forward of the same pixels."""
    model = make_model(tmp_path / "model", kind)
    parameters = {"preset": preset} | ({"input_size": 32} if preset == "gmem" else {})
    weights = None if name == "hf:" else tmp_path / "model"
    encoder = gmem_bank.load_encoder(
        f"hf:{tmp_path}/model" if name == "hf:" else name, weights=weights, parameters=parameters
    )
    crops = images(5, encoder.spec.preprocessing["crop_size"])
    pixels = preprocess.to_input(torch.from_numpy(crops), encoder.spec.preprocessing)
    assert pixels.shape == (5, 3, 32, 32)
    with torch.inference_mode():
        if kind in ("clip", "siglip"):
            output = model.get_image_features(pixel_values=pixels)
            direct = output if isinstance(output, torch.Tensor) else output.pooler_output
        else:
            direct = model(pixel_values=pixels).last_hidden_state[:, 0]
    np.testing.assert_allclose(encoder.encode(crops), direct.numpy(), atol=1e-5)
    assert encoder.spec.dim == direct.shape[1]
    assert encoder.spec.parameters["dtype"] == "fp32"
    np.testing.assert_allclose(encoder.encode(crops[:2]), encoder.encode(crops)[:2], atol=1e-5)


@pytest.mark.parametrize("kind", ["dinov2", "registers", "dinov3", "clip"])
def test_poolings_and_layers_pick_what_they_say(tmp_path: Path, kind: str) -> None:
    """Patch tokens without class and register tokens; the output of a block by its number."""
    model = make_model(tmp_path / "model", kind)
    tower, first = getattr(model, "vision_model", model), {"dinov2": 1, "registers": 4, "dinov3": 3, "clip": 1}[kind]
    crops = images(3, 32)
    for pooling, layer in (("cls", -1), ("mean", -1), ("cls+mean", -1), ("mean", 1), ("cls", -2)):
        encoder = gmem_bank.load_encoder(
            f"hf:{tmp_path}/model", parameters={"preset": "native", "pooling": pooling, "layer": layer}
        )
        pixels = preprocess.to_input(torch.from_numpy(crops), encoder.spec.preprocessing)
        with torch.inference_mode():
            output = tower(pixel_values=pixels, output_hidden_states=True)
        states = (output.last_hidden_state if layer == -1 else output.hidden_states[layer]).numpy()
        assert states.shape[1] == 16 + first
        mean = states[:, first:].mean(axis=1)
        expected = {"cls": states[:, 0], "mean": mean, "cls+mean": np.concatenate([states[:, 0], mean], axis=1)}
        np.testing.assert_allclose(encoder.encode(crops), expected[pooling], atol=1e-5)
        assert encoder.spec.dim == expected[pooling].shape[1]


@pytest.mark.parametrize("processor", PROCESSORS)
@pytest.mark.parametrize("size", [(50, 37), (37, 50), (33, 200), (64, 64), (20, 31)])
def test_native_preprocessing_is_that_of_the_librarys_pillow_processors(
    tmp_path: Path, processor: str, size: tuple[int, int]
) -> None:
    """The pixels that enter the network, to 1e-5, up and down, wide and high."""
    from transformers import CLIPImageProcessor, ViTImageProcessor

    make_model(tmp_path / "model", "vit", processor)
    record = native_preprocessing(tmp_path / "model", 32)
    picture = Image.fromarray(np.random.default_rng(1).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))
    ours = preprocess.to_input(torch.from_numpy(preprocess.crop(picture, record)[None]), record)[0]
    kind = ViTImageProcessor if processor == "squash" else CLIPImageProcessor
    theirs = kind.from_pretrained(tmp_path / "model")(picture, return_tensors="np")["pixel_values"][0]
    np.testing.assert_allclose(ours.numpy(), theirs, atol=1e-5)


def save_tokenizer(folder: Path) -> None:
    """Words to ids, as a folder of a text tower has them; the padding is 2."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"[UNK]": 0, "a": 3, "cat": 4, "dog": 5, "</s>": 2}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token="</s>", unk_token="[UNK]").save_pretrained(folder)


@pytest.mark.parametrize(("kind", "length"), [("clip", 77), ("siglip", 16)])
def test_texts_of_any_length_are_embedded_as_the_library_does(tmp_path: Path, kind: str, length: int) -> None:
    """CLIP's as each alone, SigLIP's padded by hand to its full length; what is too long is cut."""
    model = make_model(tmp_path / "model", kind)
    save_tokenizer(tmp_path / "model")
    ids = [[3, 4], [3, 4, 3, 5, 5], [5] * length]
    encoder = gmem_bank.load_encoder(f"hf:{tmp_path}/model")
    got = encoder.encode_texts(["a cat", "a cat a dog dog", "dog " * 100])
    for row, text in zip(got, ids, strict=True):
        padded = text + [2] * (length - len(text)) if kind == "siglip" else text
        with torch.inference_mode():
            output = model.get_text_features(input_ids=torch.tensor([padded]))
        direct = output if isinstance(output, torch.Tensor) else output.pooler_output
        np.testing.assert_allclose(row, direct.numpy()[0], atol=1e-5)


@pytest.mark.parametrize(("kind", "lowered"), [("siglip", True), ("clip", False)])
def test_siglip_reads_lower_case_alone(tmp_path: Path, kind: str, lowered: bool) -> None:
    """It was trained so, and its tokenizer does not say; what CLIP's tokenizer does about it is its own affair."""
    make_model(tmp_path / "model", kind)
    save_tokenizer(tmp_path / "model")
    upper, lower = gmem_bank.load_encoder(f"hf:{tmp_path}/model").encode_texts(["A Cat", "a cat"])
    assert np.array_equal(upper, lower) == lowered


def test_texts_and_images_share_a_space(tmp_path: Path) -> None:
    """CLIP's text tower is there for queries; a model without one says so."""
    model = make_model(tmp_path / "model", "clip")
    save_tokenizer(tmp_path / "model")
    encoder = gmem_bank.load_encoder(f"hf:{tmp_path}/model")
    got = encoder.encode_texts(["a cat", "a dog"])
    with torch.inference_mode():
        output = model.get_text_features(input_ids=torch.tensor([[3, 4], [3, 5]]))
    direct = output if isinstance(output, torch.Tensor) else output.pooler_output
    np.testing.assert_allclose(got, direct.numpy(), atol=1e-5)
    assert got.shape == (2, encoder.spec.dim)
    rng = np.random.default_rng(0)
    for name in ("x", "y"):
        Path(name).mkdir()
        for index in range(3):
            pixels = rng.integers(0, 256, (40, 40, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(f"{name}/{index}.png")
    gmem_bank.build("x", encoder, "bank.safetensors")
    opened = gmem_bank.open("bank.safetensors")
    [found] = search(opened, "a cat", k=3, load=lambda: encoder, text=True)
    unit = got[0] / np.linalg.norm(got[0])
    expected = np.sort(opened.snippets(opened.rows()) @ unit)[::-1]
    np.testing.assert_allclose([hit.score for hit in found.hits], expected, atol=1e-5)
    hog = gmem_bank.load_encoder("hog")
    gmem_bank.build("y", hog, "hog.safetensors")
    with pytest.raises(EncoderError, match="does not understand text"):
        search(gmem_bank.open("hog.safetensors"), "a cat", k=1, load=lambda: hog, text=True)
    make_model(tmp_path / "plain", "dinov2")
    with pytest.raises(EncoderError, match="does not understand text"):
        gmem_bank.load_encoder(f"hf:{tmp_path}/plain", parameters={"preset": "native"}).encode_texts(["a"])


def has_bf16_units() -> bool:
    """AMX or AVX512_BF16, as the kernel lists them."""
    return bool({"amx_bf16", "avx512_bf16"} & set(Path("/proc/cpuinfo").read_text().split()))


def test_bf16_is_close_recorded_and_chosen_only_where_it_pays(tmp_path: Path) -> None:
    """The fingerprint knows the type; auto takes bf16 for wide networks on machines that compute in it."""
    make_model(tmp_path / "model", "dinov2")
    load = lambda dtype: gmem_bank.load_encoder(  # noqa: E731
        "dinov2", weights=tmp_path / "model", parameters={"dtype": dtype, "preset": "native"}
    )
    exact, coarse = load("fp32"), load("bf16")
    crops = images(6, 32)
    cosine = coarse.cosine_to_fp32(crops)
    a, b = exact.encode(crops), coarse.encode(crops)
    assert cosine == pytest.approx(
        float(np.mean((a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1))), abs=1e-6
    )
    assert 0.999 < cosine < 1
    assert exact.cosine_to_fp32(crops) == pytest.approx(1)
    assert exact.spec.fingerprint != coarse.spec.fingerprint
    cpu = torch.device("cpu")
    assert choose_dtype("auto", cpu, 128) == "fp32"
    assert choose_dtype("auto", cpu, 768) == ("bf16" if has_bf16_units() else "fp32")
    for wrong in ("fp16", "int8"):
        with pytest.raises(EncoderError):
            choose_dtype(wrong, cpu, 768)


def test_siglip_has_no_class_token_and_all_its_tokens_are_patches(tmp_path: Path) -> None:
    """The mean is over all of them, at every layer; "cls" would be the patch at the top left."""
    model = make_model(tmp_path / "model", "siglip")
    crops = images(3, 32)
    for layer in (-1, 1):
        encoder = gmem_bank.load_encoder("hf:model", parameters={"pooling": "mean", "layer": layer})
        pixels = preprocess.to_input(torch.from_numpy(crops), encoder.spec.preprocessing)
        with torch.inference_mode():
            output = model.vision_model(pixel_values=pixels, output_hidden_states=True)
        states = output.last_hidden_state if layer == -1 else output.hidden_states[layer]
        assert states.shape[1] == 16
        np.testing.assert_allclose(encoder.encode(crops), states.mean(dim=1).numpy(), atol=1e-5)
    with pytest.raises(EncoderError, match=r"no class token.*pooling=mean"):
        gmem_bank.load_encoder("hf:model", parameters={"pooling": "cls"})


def test_what_is_no_vision_model_or_has_no_safetensors_is_refused(tmp_path: Path) -> None:
    """A text model, a pickle, an odd pooling, an absent preprocessor: each with its reason."""
    from transformers import BertConfig, BertModel

    config = BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, vocab_size=50)
    BertModel(config).save_pretrained(tmp_path / "text")
    with pytest.raises(EncoderError, match="does not look at images"):
        gmem_bank.load_encoder(f"hf:{tmp_path}/text")
    make_model(tmp_path / "model", "dinov2")
    with pytest.raises(EncoderError, match="needs clip"):
        gmem_bank.load_encoder("clip", weights=tmp_path / "model")
    for parameters, message in (
        ({"pooling": "max"}, "pooling must be one of"), ({"pooling": "projected"}, "no projection"), ({"layer": 9}, "does not work"),
        ({"preset": "own"}, "preset must be one of"), ({"input_size": 33, "preset": "gmem"}, "not a multiple"),
        ({"input_size": 40, "preset": "native"}, "gives 32 pixels"), ({"polling": "cls"}, "Did you mean 'pooling'"),
    ):  # fmt: skip
        with pytest.raises(EncoderError, match=message):
            gmem_bank.load_encoder(f"hf:{tmp_path}/model", parameters={"preset": "native", **parameters})
    (tmp_path / "model/preprocessor_config.json").unlink()
    with pytest.raises(EncoderError, match="'gmem' needs none"):
        gmem_bank.load_encoder(f"hf:{tmp_path}/model", parameters={"preset": "native"})
    (tmp_path / "model/model.safetensors").rename(tmp_path / "model/pytorch_model.bin")
    with pytest.raises(EncoderError, match="pickle"):
        gmem_bank.load_encoder(f"hf:{tmp_path}/model", parameters={"preset": "gmem", "input_size": 32})


def test_a_bank_finds_its_model_again_from_a_folder_beside_it(photos: Path, new_photos: Path, tmp_path: Path) -> None:
    """hf:FOLDER is recorded relative to the bank, so that an insert needs no further word."""
    make_model(tmp_path / "model", "vit", "crop")
    encoder = gmem_bank.load_encoder("hf:model", parameters={"pooling": "cls+mean"})
    gmem_bank.build(photos, encoder, "bank.safetensors")
    bank = gmem_bank.open("bank.safetensors")
    assert (bank.encoder.name, bank.encoder.weights_path, bank.dim) == ("hf:model", "model", 64)
    again = gmem_bank.reload_encoder(bank.encoder, bank.folder)
    assert gmem_bank.insert_concept("bank.safetensors", [new_photos], again).num_added == 8


def test_what_bf16_costs_is_recorded_in_the_bank(photos: Path, tmp_path: Path) -> None:
    """The cosine on the first images stands among the labels; a build that was interrupted gives the same bytes."""
    make_model(tmp_path / "model", "dinov2")
    encoder = gmem_bank.load_encoder("hf:model", parameters={"dtype": "bf16"})
    calls = 0

    def stop(done: int, total: int) -> None:
        nonlocal calls
        calls += 1
        if calls == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        gmem_bank.build(photos, encoder, "a/bank.safetensors", batch_size=5, progress=stop)
    gmem_bank.build(photos, encoder, "a/bank.safetensors", batch_size=5)
    gmem_bank.build(photos, encoder, "b/bank.safetensors", batch_size=5)
    assert Path("a/bank.safetensors").read_bytes() == Path("b/bank.safetensors").read_bytes()
    cosine = gmem_bank.open("a/bank.safetensors").encoder.labels["cosine_to_fp32"]
    assert 0.999 < cosine < 1
    exact = gmem_bank.load_encoder("hf:model", parameters={"dtype": "fp32"})
    gmem_bank.build(photos, exact, "c.safetensors", batch_size=5)
    a, c = (gmem_bank.open(path) for path in ("a/bank.safetensors", "c.safetensors"))
    first = np.arange(5)
    assert cosine == pytest.approx(float((a.snippets(first) * c.snippets(first)).sum(axis=1).mean()), abs=1e-5)
    assert "cosine_to_fp32" not in c.encoder.labels
