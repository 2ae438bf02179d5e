"""Which tokens are patches: by the model's type, or by what it does; never a patch in place of a class token."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import gmem_bank
from gmem_bank.encoders import preprocess
from gmem_bank.encoders.pooling import PATCHES_ONLY, WITH_CLASS, layout_of, layout_seen
from gmem_bank.errors import EncoderError
from tests.gmem_bank.test_hub_models import TOWER, images

SMALL = {**TOWER, "num_hidden_layers": 2}
STAGES = {"embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2], "window_size": 2, "image_size": 32, "patch_size": 4}
SETTINGS = {
    **dict.fromkeys(("swin", "swinv2", "donut-swin"), STAGES),
    "focalnet": {"embed_dim": 8, "depths": [1, 1], "hidden_sizes": [8, 16], "focal_levels": [2, 2],
                 "focal_windows": [3, 3], "image_size": 32, "patch_size": 4},
    "hiera": {"embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2], "image_size": [32, 32], "embed_dim_multiplier": 2.0,
              "num_query_pool": 1, "masked_unit_size": [2, 2], "patch_stride": [4, 4], "patch_size": [7, 7]},
    "dinov3_vit": {**SMALL, "num_register_tokens": 2}, "dinov2_with_registers": {**SMALL, "num_register_tokens": 3},
    "dinov3_convnext": {"hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1], "image_size": 64},
    "vit_mae": {**SMALL, "mask_ratio": 0.0},
    "resnet": {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"},
    "yolos": {**SMALL, "image_size": [32, 32], "num_detection_tokens": 5},
}  # fmt: skip
# Written down from the papers and the library's documentation: class tokens and others beside the patches, and patches for
# an image of 32 pixels in patches of 8 (or in stages that end there).
SPECIAL = {
    **dict.fromkeys(WITH_CLASS, 1), "deit": 2, "dinov3_vit": 3, "dinov2_with_registers": 4, "sapiens2": 9, "tipsv2_vision_model": 2,
}  # fmt: skip


def tiny(kind: str, folder: Path | None = None) -> torch.nn.Module:
    """A small random model of a type, written to a folder where one is given."""
    import transformers as t

    torch.manual_seed(0)
    config = t.AutoConfig.for_model(kind, **SETTINGS.get(kind, SMALL))
    model = t.AutoModel.from_config(config).eval()
    if folder is not None:
        model.save_pretrained(folder)
    return model


def gmem(folder: Path, **parameters: object) -> object:
    return gmem_bank.load_encoder(
        f"hf:{folder}", parameters={"preset": "gmem", "input_size": 32, "dtype": "fp32", **parameters}
    )


@pytest.mark.parametrize("kind", [*WITH_CLASS, *PATCHES_ONLY])
def test_the_tables_agree_with_the_models(kind: str) -> None:
    """Special tokens and the patches of the grid are all tokens there are, and special ones do not see the image at first."""
    model = tiny(kind)
    layout = layout_of(model)
    assert layout is not None
    assert (layout.has_class, layout.num_special) == (kind in WITH_CLASS, SPECIAL.get(kind, 0))
    side = 64 if kind == "dinov3_convnext" else 32
    pixels = torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        output = model(pixel_values=pixels, output_hidden_states=True)
    cells = {"dinov3_convnext": 4}.get(kind, 16)
    assert output.last_hidden_state.shape[1] == cells + layout.num_special
    if kind != "dinov3_convnext":  # there the first token is the mean of the map
        same = (output.hidden_states[0][0] == output.hidden_states[0][1]).flatten(1).all(1)
        assert torch.equal(same.nonzero().flatten(), torch.arange(layout.num_special))


@pytest.mark.parametrize("kind", ["vit", "deit", "dinov3_vit", "dinov2_with_registers", "siglip_vision_model", "ijepa"])
def test_a_look_finds_what_the_tables_say(kind: str) -> None:
    """For types that are in no table the same is found without it; which of several special tokens is of the class, not."""
    model = tiny(kind)
    pixels = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    known, seen = layout_of(model), layout_seen(model, pixels)
    assert seen is not None
    assert seen.num_special == known.num_special
    assert seen.has_class == (known.has_class and known.num_special == 1)


@pytest.mark.parametrize("kind", ["siglip_vision_model", "swin", "ijepa", "resnet", "pixio"])
def test_without_a_class_token_the_mean_of_all_patches_is_taken(tmp_path: Path, kind: str) -> None:
    """By default and on record; "cls" is refused with the way out; no patch is left out of the mean."""
    model = tiny(kind, tmp_path / "model")
    encoder = gmem(tmp_path / "model")
    assert encoder.spec.parameters["pooling"] == "mean"
    crops = images(3, encoder.spec.preprocessing["crop_size"])
    pixels = preprocess.to_input(torch.from_numpy(crops), encoder.spec.preprocessing)
    with torch.inference_mode():
        states = model(pixel_values=pixels).last_hidden_state
    patches = states.flatten(2).transpose(1, 2) if states.ndim == 4 else states[:, {"pixio": 8}.get(kind, 0) :]
    np.testing.assert_allclose(encoder.encode(crops), patches.mean(dim=1).numpy(), atol=1e-5)
    if kind != "resnet":
        np.testing.assert_allclose(encoder.encode_tokens(crops), patches.numpy(), atol=1e-5)
    for pooling in ("cls", "cls+mean"):
        with pytest.raises(EncoderError, match=r"no class token.*pooling=mean"):
            gmem(tmp_path / "model", pooling=pooling)


def test_tokens_that_nobody_can_tell_apart_are_not_pooled(tmp_path: Path) -> None:
    """YOLOS has detection tokens behind its patches: only its pooler can be taken, and is by default."""
    model = tiny("yolos", tmp_path / "model")
    for pooling in ("cls", "mean", "cls+mean"):
        with pytest.raises(EncoderError, match=r"not known.*pooling=pooler"):
            gmem(tmp_path / "model", pooling=pooling)
    encoder = gmem(tmp_path / "model")
    assert encoder.spec.parameters["pooling"] == "pooler"
    crops = images(2, 256)
    with torch.inference_mode():
        direct = model(pixel_values=preprocess.to_input(torch.from_numpy(crops), encoder.spec.preprocessing))
    np.testing.assert_allclose(encoder.encode(crops), direct.pooler_output.numpy(), atol=1e-5)
    with pytest.raises(EncoderError, match="not known"):
        encoder.encode_tokens(crops)


class Stub:
    """A model whose tokens are given: the first are the same for both images."""

    def __init__(self, same: int, different: int, **config: object) -> None:
        generator = torch.Generator().manual_seed(0)
        tokens = torch.rand(2, same + different, 4, generator=generator)
        tokens[1, :same] = tokens[0, :same]
        self.config = SimpleNamespace(model_type="unheard-of", **config)
        self._output = SimpleNamespace(last_hidden_state=tokens, hidden_states=(tokens,))

    def __call__(self, **inputs: object) -> SimpleNamespace:
        return self._output


@pytest.mark.parametrize(
    ("same", "different", "patch", "found"),
    [(1, 16, 8, (True, 1)), (0, 16, (8, 8), (False, 0)), (3, 16, [8, 8], (False, 3)), (1, 15, 8, None), (0, 17, 8, None),
     (0, 16, (8, 4), None), (0, 16, None, None), (0, 4, 16, (False, 0)), (0, 16, 0, None)],
)  # fmt: skip
def test_a_look_believes_only_a_full_grid(same: int, different: int, patch: object, found: tuple | None) -> None:
    """Of an input of 32 pixels; patches that were dropped, merged or added are no grid."""
    layout = layout_seen(Stub(same, different, patch_size=patch), torch.rand(2, 3, 32, 32))
    assert found == (layout and (layout.has_class, layout.num_special))


@pytest.mark.parametrize("ratio", [0.75, 0.0])
def test_a_model_that_draws_lots_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ratio: float) -> None:
    """ViTMAE masks patches at random, and with nothing to mask still shuffles them."""
    monkeypatch.setitem(SETTINGS, "vit_mae", {**SMALL, "mask_ratio": ratio})
    tiny("vit_mae", tmp_path / "model")
    with pytest.raises(EncoderError, match="other numbers each time for the same image"):
        gmem(tmp_path / "model")


def test_a_pooler_without_weights_is_not_made_up(tmp_path: Path) -> None:
    """The library would fill it with random numbers: other snippets each time under one fingerprint."""
    model = tiny("vit", tmp_path / "model")
    crops = images(2, 256)
    encoder = gmem(tmp_path / "model", pooling="pooler")
    with torch.inference_mode():
        direct = model(pixel_values=preprocess.to_input(torch.from_numpy(crops), encoder.spec.preprocessing))
    np.testing.assert_allclose(encoder.encode(crops), direct.pooler_output.numpy(), atol=1e-5)
    tensors = load_file(tmp_path / "model/model.safetensors")
    kept = {name: values for name, values in tensors.items() if "pooler" not in name}
    assert len(kept) == len(tensors) - 2
    save_file(kept, tmp_path / "model/model.safetensors", metadata={"format": "pt"})
    with pytest.raises(EncoderError, match=r"lack 2 tensors that pooling 'pooler' uses, such as pooler\.dense\.bias"):
        gmem(tmp_path / "model", pooling="pooler")
    np.testing.assert_allclose(
        gmem(tmp_path / "model").encode(crops), direct.last_hidden_state[:, 0].numpy(), atol=1e-5
    )
