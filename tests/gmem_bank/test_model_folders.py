"""Folders of models that lack something, or hold what they should not: said in our words, with what to do."""

from __future__ import annotations

import contextlib
import fnmatch
import json
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner

import gmem_bank
from gmem_bank.cli import main
from gmem_bank.encoders import load_encoder
from gmem_bank.encoders.weights import TOKENIZER
from gmem_bank.errors import EncoderError, EncoderSettingError
from tests.gmem_bank.test_hub_models import images, make_model, save_tokenizer


def change_config(folder: Path, **fields: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | fields))


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_a_text_tower_without_tokenizer_files_answers_nothing(kind: str, photos: Path) -> None:
    """The library would make up a tokenizer without words, and every text would find the same rows."""
    make_model(Path("model"), kind)
    encoder = load_encoder("hf:model")
    gmem_bank.build(photos, encoder, "bank.safetensors")
    with pytest.raises(EncoderError, match=r"model has no tokenizer files \(tokenizer\.json, .*: copy them"):
        encoder.encode_texts(["a hat"])
    result = CliRunner().invoke(main, ["search", "bank.safetensors", "--text", "a hat"])
    assert result.exit_code == 1
    assert "no tokenizer files" in result.output
    Path("model/vocab.json").write_text("{}")  # half of a pair
    with pytest.raises(EncoderError, match="no tokenizer files"):
        load_encoder("hf:model").encode_texts(["a hat"])


def test_a_tokenizer_that_knows_no_words_is_refused() -> None:
    """Files are there, but say nothing: texts would differ by their length alone."""
    make_model(Path("model"), "clip")
    save_tokenizer(Path("model"))
    whole = json.loads(Path("model/tokenizer.json").read_text())
    assert load_encoder("hf:model").encode_texts(["a cat"]).shape == (1, 16)
    whole["model"]["vocab"] = {"[UNK]": 0, "</s>": 2}
    Path("model/tokenizer.json").write_text(json.dumps(whole))
    with pytest.raises(EncoderError, match="the same numbers for 'a' and"):
        load_encoder("hf:model").encode_texts(["a cat"])


def test_code_of_a_models_own_is_never_run() -> None:
    """The library's advice to trust it is not passed on."""
    make_model(Path("model"), "dinov2")
    Path("model/own.py").write_text("raise SystemExit('run')")
    change_config(Path("model"), model_type="own", auto_map={"AutoConfig": "own.C", "AutoModel": "own.M"})
    with pytest.raises(EncoderError, match=r"needs code of its own .* never runs") as caught:
        load_encoder("hf:model")
    assert "trust_remote_code" not in str(caught.value)


def test_code_of_a_tokenizer_is_neither_fetched_nor_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody is asked either whether to trust it."""
    make_model(Path("model"), "clip")
    save_tokenizer(Path("model"))
    Path("model/tokenizer_own.py").write_text("raise SystemExit('run')")
    settings = json.loads(Path("model/tokenizer_config.json").read_text())
    own = {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["tokenizer_own.Own", "tokenizer_own.Own"]}}
    Path("model/tokenizer_config.json").write_text(json.dumps(settings | own))
    asked = []
    monkeypatch.setattr("builtins.input", lambda *words: asked.append(words) or "y")
    with contextlib.suppress(EncoderError):  # or the library takes a class of its own
        load_encoder("hf:model").encode_texts(["a cat"])
    assert not asked
    names = [path.name for path in Path("model").iterdir()]
    assert [name for name in names if any(fnmatch.fnmatch(name, pattern) for pattern in TOKENIZER)] == [
        name for name in names if name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
    ]


def test_weights_of_another_size_than_the_config_are_named_with_both_shapes() -> None:
    """One tensor, what the file has and what the config asks for."""
    make_model(Path("model"), "dinov2")
    change_config(Path("model"), hidden_size=64)
    with pytest.raises(
        EncoderError, match=r"tensor '\S+' is \[.*32.*\], by the config \[.*64.*\] \(\d+ such tensors\)"
    ):
        load_encoder("hf:model")


def test_weights_that_were_cut_short_are_to_be_fetched_again() -> None:
    """The file is named, in one piece or in shards."""
    make_model(Path("whole"), "dinov2")
    shutil.copytree("whole", "cut")
    weights = Path("cut/model.safetensors")
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(EncoderError, match=r"cut/model\.safetensors is cut short or damaged .*: fetch it again"):
        load_encoder("hf:cut")
    make_model(Path("parts"), "dinov2").save_pretrained("parts", max_shard_size="40KB")
    Path("parts/model.safetensors").unlink(missing_ok=True)
    shard = sorted(Path("parts").glob("model-*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(EncoderError, match=rf"{shard.name} is cut short"):
        load_encoder("hf:parts")


def test_pickles_are_refused_before_anything_else_is_missed() -> None:
    """A folder as old repositories have it: weights as .bin, and no preprocessor."""
    make_model(Path("model"), "dinov2")
    Path("model/model.safetensors").rename("model/pytorch_model.bin")
    Path("model/preprocessor_config.json").unlink()
    with pytest.raises(EncoderError, match=r"pytorch_model\.bin, a pickle"):
        load_encoder("hf:model")


@pytest.mark.parametrize("name", ["./nosuch", "../nosuch", "~/nosuch", "/no/such", "a/b/c", "nosuch/"])
def test_what_cannot_be_a_repository_is_a_folder_that_is_not_there(name: str) -> None:
    """The hub is not asked, nor is the user told to fetch it from there."""
    with pytest.raises(EncoderError, match=r"no folder .* here, and no repository") as caught:
        load_encoder(f"hf:{name}")
    assert "hf download" not in str(caught.value)
    with pytest.raises(EncoderError, match="hf download own/er"):
        load_encoder("hf:own/er")


@pytest.mark.parametrize(
    ("name", "parameters", "words"),
    [
        ("hf:", {}, "give hf:REPOSITORY or hf:FOLDER"), ("onnx:", {}, "give onnx:FILE"), ("quantum", {}, "unknown encoder"),
        ("hf:model", {"precision": "bf16"}, "Did you mean 'dtype'"), ("hf:model", {"resolution": 3}, "Did you mean 'input_size'"),
        ("hog", {"precision": "bf16"}, r"no parameter 'precision'"),
    ],
)  # fmt: skip
def test_names_and_parameters_that_are_not_there(name: str, parameters: dict[str, object], words: str) -> None:
    """Prefixes alone, and words that other programs use for a parameter."""
    make_model(Path("model"), "dinov2")
    with pytest.raises(EncoderSettingError, match=words):
        load_encoder(name, parameters=parameters)


@pytest.mark.parametrize("name", ["hog", "pixels", "random-projection"])
def test_encoders_without_a_use_for_a_device_say_so(name: str) -> None:
    """A GPU that was asked for would stay idle."""
    with pytest.raises(EncoderSettingError, match="on the CPU only: leave --device cuda out"):
        load_encoder(name, device="cuda")
    assert (
        load_encoder(name, device="cpu")
        .encode(images(1, 32)[:, :16, :16] if name == "pixels" else images(1, 32))
        .shape[0]
        == 1
    )


def test_a_banks_own_parameters_are_no_wrong_usage(photos: Path) -> None:
    """What a bank records and this version does not know is an error of the bank; a device is the user's."""
    gmem_bank.build(photos, load_encoder("hog"), "bank.safetensors")
    spec = gmem_bank.open("bank.safetensors").encoder
    spec.parameters["of_the_future"] = 1
    with pytest.raises(EncoderError, match="the bank records") as caught:
        gmem_bank.reload_encoder(spec, Path())
    assert not isinstance(caught.value, EncoderSettingError)
