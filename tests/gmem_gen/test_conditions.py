"""Conditions that are in no bank: images, texts, ways, sums; nothing is trained or written."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result

import gmem_bank
import gmem_gen
from gmem_bank.errors import ConfigError, EncoderError, EncoderMismatchError, GMemError, SourceError, UnknownKeyError
from gmem_gen import conditioning
from gmem_gen.cli import main as gen_main
from gmem_gen.conditions import Conditions, snippet_conditions
from gmem_gen.config import Config, DataConfig, ModelConfig, TrainConfig


@pytest.fixture
def bank(photos: Path, new_photos: Path) -> gmem_bank.MemoryBank:
    """A bank of photos; other photos lie in images/."""
    gmem_bank.build(photos, gmem_bank.load_encoder("hog"), "bank.safetensors")
    return gmem_bank.open("bank.safetensors")


def train(bank: str = "bank.safetensors", out: str = "runs/bank", **model: object) -> gmem_gen.LoadedCheckpoint:
    config = Config(
        data=DataConfig(image_size=8), model=ModelConfig(**{"width": 16, "depth": 1, "num_heads": 2, **model}),
        train=TrainConfig(max_steps=2, batch_size=8, num_threads=1),
    )  # fmt: skip
    gmem_gen.train(bank, config, out=out)
    return gmem_gen.load_checkpoint(out)


def gen(*arguments: str, code: int = 0) -> Result:
    result = CliRunner().invoke(gen_main, arguments, catch_exceptions=False)
    assert result.exit_code == code, result.output
    return result


def test_an_image_of_the_bank_gives_the_snippet_of_its_row(bank: gmem_bank.MemoryBank, photos: Path) -> None:
    """Same decoding, crop, encoder and space as the build: the very numbers; and nothing of the bank has changed."""
    before = Path("bank.safetensors").read_bytes()
    keys = bank.keys(bank.rows())[3:9]
    conditions = gmem_gen.image_conditions(bank, [str(photos / key) for key in keys], per_snippet=2)
    np.testing.assert_allclose(conditions.snippets, bank.snippets(bank.rows_for(keys)), atol=1e-6)
    assert conditions.rows.tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5]
    assert conditions.keys[2] == str(photos / keys[1])
    whole = gmem_gen.image_conditions(bank, [str(photos / "hat")])
    np.testing.assert_allclose(whole.snippets, bank.snippets(bank.rows_of("hat")), atol=1e-6)
    assert Path("bank.safetensors").read_bytes() == before
    inserted = gmem_bank.insert_concept("bank.safetensors", ["images"], gmem_bank.load_encoder("hog"))
    own = gmem_bank.open("bank.safetensors")
    fresh = gmem_gen.image_conditions(
        bank, [str(Path(key)) for key in inserted.details.get("keys", own.keys(own.rows())[-8:])]
    )
    np.testing.assert_allclose(fresh.snippets, own.snippets(own.rows_of("images")), atol=1e-6)


def test_a_way_and_a_sum_are_what_the_bank_would_write(bank: gmem_bank.MemoryBank) -> None:
    """The same code and grammar as interpolate and compose: the rows that those write are these snippets."""
    image = str(next(Path("images").iterdir()))
    for method in ("linear", "slerp", "concat", "mask"):
        conditions = gmem_gen.interpolation_conditions(bank, "hat", image, frames=5, method=method, seed=3)
        gmem_bank.interpolate(
            "bank.safetensors", "hat", image, method=method, steps=5, seed=3, name="way", resolve=gmem_bank.snippet_or_image,
            output=f"{method}.safetensors",
        )  # fmt: skip
        written = gmem_bank.open(f"{method}.safetensors")
        np.testing.assert_array_equal(conditions.snippets, written.snippets(written.rows_of("way")))
        np.testing.assert_allclose(conditions.snippets[0], gmem_bank.snippet_of(bank, "hat"), atol=1e-6)  # t = 0: first
        np.testing.assert_allclose(conditions.snippets[-1], gmem_bank.snippet_or_image(bank, image), atol=1e-6)
    terms = "hat + 0.5*'shoes' - dress"
    conditions = gmem_gen.composition_conditions(bank, [terms, "hat"])
    gmem_bank.compose("bank.safetensors", terms, name="sum", output="sum.safetensors")
    written = gmem_bank.open("sum.safetensors")
    np.testing.assert_array_equal(conditions.snippets[:1], written.snippets(written.rows_of("sum")))
    assert conditions.keys == [terms, "hat"]


def test_the_middle_of_opposite_snippets(make_bank) -> None:
    """slerp has a way round, of length 1 everywhere; the straight line has none and says so."""
    snippets = np.zeros((3, 8), np.float32)
    snippets[0, 0], snippets[1, 0], snippets[2, 1] = 1, -1, 1
    opposite = make_bank("o.safetensors", snippets=snippets, keys=["a", "b", "c"])
    way = gmem_gen.interpolation_conditions(opposite, "a", "b", frames=3).snippets
    np.testing.assert_allclose(np.linalg.norm(way, axis=1), 1, atol=1e-6)
    np.testing.assert_allclose(way @ snippets[0], [1, 0, -1], atol=1e-6)
    with pytest.raises(GMemError, match="no direction: try slerp"):
        gmem_gen.interpolation_conditions(opposite, "a", "b", frames=3, method="linear")
    with pytest.raises(GMemError, match="cancel out"):
        gmem_gen.composition_conditions(opposite, ["a + b"])


def test_counts_and_streams() -> None:
    """Snippets over and over, each as often as asked; the same noise for every snippet, another for each of its samples."""
    pair = np.eye(2, 4, dtype=np.float32)
    assert snippet_conditions(pair, ["a", "b"], num=5).rows.tolist() == [0, 1, 0, 1, 0]
    same = snippet_conditions(pair, ["a", "b"], per_snippet=3, same_noise=True)
    assert same.rows.tolist() == [0, 0, 0, 1, 1, 1]
    assert same.streams.tolist() == [0, 1, 2, 0, 1, 2]
    other = snippet_conditions(pair, ["a", "b"], per_snippet=3)
    assert other.streams is None
    assert len({same.digest(), other.digest(), snippet_conditions(pair * 2, ["a", "b"], per_snippet=3).digest()}) == 3
    for bad in (np.zeros((0, 4)), np.zeros(4), np.full((2, 4), np.nan)):
        with pytest.raises(ConfigError):
            snippet_conditions(bad.astype(np.float32), ["a", "b"])


def test_the_same_noise_makes_equal_snippets_equal_pictures(bank: gmem_bank.MemoryBank) -> None:
    """With it the snippet alone decides the picture; without it the noise does too."""
    loaded = train(projection_dim=0)
    key = bank.keys(bank.rows())[0]
    for same, count in ((True, 1), (False, 3)):
        conditions = gmem_gen.choose_conditions(
            bank, concept=None, keys=[key] * 3, num=None, per_snippet=1, seed=0, same_noise=same
        )
        images = gmem_gen.sample(bank, loaded, conditions, gmem_gen.SampleConfig(num_steps=2)).images
        assert len({image.tobytes() for image in images}) == count


@pytest.mark.parametrize("kind", ["dense", "factored", "sparse"])
def test_arbitrary_snippets_draw_what_rows_of_the_bank_draw(bank, make_bank, kind: str) -> None:
    """A row's own snippet, given from outside, draws the row's picture, absorbed basis or not."""
    loaded = train()
    spec = bank.encoder
    other = make_bank("k.safetensors", kind=kind, rank=8, dim=bank.dim, snippets=bank.snippets(bank.rows()))

    class Same:
        encoder, names = spec, ()

        def __getattr__(self, name: str) -> object:
            return getattr(other, name)

        def __len__(self) -> int:
            return len(other)

    rows = np.array([4, 1, 4])
    given = snippet_conditions(other.snippets(rows), ["x", "y", "z"])
    own = Conditions(rows=rows, keys=["x", "y", "z"], label="rows")
    settings = gmem_gen.SampleConfig(num_steps=3, guidance=2.0)
    drawn = [gmem_gen.sample(Same(), loaded, each, settings).images.astype(int) for each in (given, own)]
    assert np.abs(drawn[0] - drawn[1]).max() <= 1


@pytest.mark.parametrize("dtype", ["f32", "i8"])
def test_a_basis_that_has_grown_is_absorbed_too(bank: gmem_bank.MemoryBank, dtype: str) -> None:
    """Rows of old segments, whose coefficients are fewer, and of new ones; the null condition is that of the whole snippet."""
    gmem_bank.compress("bank.safetensors", rank=4, dtype=dtype, output="small.safetensors")
    gmem_bank.insert_concept("small.safetensors", ["images"], gmem_bank.load_encoder("hog"), grow_below=0.9)
    grown = gmem_bank.open("small.safetensors")
    assert grown.rank > 4
    torch.manual_seed(0)
    network = gmem_gen.Generator(
        ModelConfig(width=16, depth=1, num_heads=2, snippet_scale=3.0),
        gmem_gen.LatentShape(channels=1, size=4),
        grown.dim,
    )
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    reader, cpu = conditioning.reader(grown, network), torch.device("cpu")
    assert reader.numbers_per_row == grown.rank + 1
    rows = np.array([0, 31, 24, 5])
    x, t = torch.randn(4, 1, 4, 4), torch.rand(4)
    with torch.no_grad():
        codes, snippets = reader.read(rows, cpu), conditioning.gather(grown, rows, cpu)
        torch.testing.assert_close(reader.network(x, t, codes), network(x, t, snippets), atol=1e-5, rtol=1e-5)
        null = network(x, t, network.null_conditions(snippets))
        torch.testing.assert_close(reader.network(x, t, network.null_conditions(codes)), null, atol=1e-6, rtol=1e-6)


def test_what_cannot_be_a_condition_is_refused(bank: gmem_bank.MemoryBank, photos: Path) -> None:
    """A broken image among good ones, texts and other encoders, names with a slip, and models without a memory."""
    good = str(next(Path("images").iterdir()))
    Path("cut.jpg").write_bytes(Path(good).read_bytes()[:300])
    with pytest.raises(SourceError, match=r"cut\.jpg"):
        gmem_gen.image_conditions(bank, [good, "cut.jpg"])
    shutil.copytree(photos / "hat", "mixed")
    shutil.copy("cut.jpg", "mixed")
    with pytest.raises(SourceError, match=r"mixed/cut\.jpg cannot be used"):
        gmem_gen.image_conditions(bank, ["mixed"])
    with pytest.raises(SourceError, match="no such file"):
        gmem_gen.image_conditions(bank, ["none.png"])
    with pytest.raises(EncoderMismatchError):
        gmem_gen.image_conditions(bank, [good], load=lambda: gmem_bank.load_encoder("pixels"))
    with pytest.raises(EncoderError, match="does not understand text: CLIP"):
        gmem_gen.text_conditions(bank, ["a hat"])
    with pytest.raises(ConfigError, match="text is empty"):
        gmem_gen.text_conditions(bank, [" "])
    with pytest.raises(UnknownKeyError, match="'hat'"):
        gmem_gen.composition_conditions(bank, ["hta + shoes"])
    with pytest.raises(ConfigError, match="has no item"):
        gmem_gen.composition_conditions(bank, [""])
    loaded = train(out="labels", condition="class")
    with pytest.raises(ConfigError, match="no memory"):
        gmem_gen.sample(bank, loaded, gmem_gen.image_conditions(bank, [good]))


def test_a_text_on_a_bank_of_dinov2_is_refused_before_its_weights_are_looked_for(make_bank) -> None:
    """The reason is the encoder, not a folder that is not there."""
    dino = make_bank("dino.safetensors", encoder="dinov2")
    with pytest.raises(EncoderError, match="'dinov2' does not understand text"):
        gmem_gen.text_conditions(dino, ["a hat"])


def test_texts_of_a_clip_bank_are_its_text_towers_embeddings(tmp_path: Path, photos: Path) -> None:
    """In the bank's space, by the function and by the command, whose --encoder-weights may name another place."""
    from tests.gmem_bank.test_hub_models import make_model, save_tokenizer

    make_model(tmp_path / "clip", "clip")
    save_tokenizer(tmp_path / "clip")
    encoder = gmem_bank.load_encoder("clip", weights=tmp_path / "clip")
    gmem_bank.build(photos, encoder, "bank.safetensors")
    opened = gmem_bank.open("bank.safetensors")
    conditions = gmem_gen.text_conditions(opened, ["a cat", "a dog"], per_snippet=2)
    expected = encoder.encode_texts(["a cat", "a dog"])
    np.testing.assert_allclose(
        conditions.snippets, expected / np.linalg.norm(expected, axis=1, keepdims=True), atol=1e-6
    )
    assert conditions.keys == ["a cat", "a cat", "a dog", "a dog"]
    train()
    shutil.move(tmp_path / "clip", tmp_path / "moved")
    words = ("sample", "--text", "a cat", "--steps", "1", "-q", "--json")
    assert "clip" in gen(*words, code=1).stderr
    assert json.loads(gen(*words, "--encoder-weights", str(tmp_path / "moved")).stdout)["keys"] == ["a cat"]


def test_the_commands_words(bank: gmem_bank.MemoryBank) -> None:
    """Each kind of condition by the command; --steps and --method of a way as in gmem-bank interpolate; usage errors."""
    train()
    image = str(next(Path("images").iterdir()))

    def drawn(*words: str) -> dict:
        return json.loads(gen("sample", *words, "--json", "-q").stdout)

    assert drawn("--image", image, "--steps", "1", "--per-snippet", "2")["keys"] == [image, image]
    assert drawn("--concept", "hat", "--concept", "shoes", "-n", "20", "--steps", "1")["num_images"] == 20
    assert drawn("--compose", "hat - shoes", "--compose", "dress", "--steps", "1")["keys"] == ["hat - shoes", "dress"]
    told = gen("sample", "--interpolate", "hat", image, "--steps", "3", "--method", "linear", "--solver", "euler",
               "--solver-steps", "2", "--json", "-q")  # fmt: skip
    assert "--steps 3 is the number of pictures" in told.stderr
    record = json.loads(told.stdout)
    assert (record["conditions"]["frames"], record["conditions"]["method"]) == (3, "linear")
    assert (record["method"], record["nfe"], len(record["keys"])) == ("euler", 2, 3)
    record = drawn(
        "--interpolate", "hat", "shoes", "--frames", "4", "--steps", "2", "--method", "euler", "--same-noise"
    )
    assert (record["nfe"], record["noise"], record["conditions"]["method"]) == (2, [0, 0, 0, 0], "slerp")
    planned = json.loads(gen("sample", "--concept", "hat", "--dry-run", "--json", "-o", "never.png").stdout)
    assert (planned["expected_nfe"], planned["outputs"]) == (50, {"grid": "never.png"})
    assert not Path("never.png").exists()
    for words, answer in (
        (("--concept", "hat", "--image", image), "--concept and --image"),
        (("--method", "slerp"), "goes with --interpolate"),
        (("--frames", "3"), "go with --interpolate"),
        (("--interpolate", "hat", "shoes", "-n", "3"), "--frames"),
        (("--interpolate", "hat", "shoes", "--method", "mask", "--interpolation", "slerp"), "give one"),
        (("--steps", "3", "--solver-steps", "4"), "give one"),
        (("--precision", "fp8"), "'fp16'"),
        (("--device", "cuda:7"), "cannot be used here"),
        (("--set", "sample.num_stepz=3"), "Did you mean 'sample.num_steps'"),
    ):
        assert answer in gen("sample", *words, code=2).stderr, words
    for words, answer in (
        (("--text", "a hat"), "does not understand text"),
        (("--concept", "hta"), "Did you mean 'hat'"),
        (("--num-shards", "2"), "several processes need a folder"),
        (("-n", "2000"), "a grid holds at most"),
    ):
        assert answer in gen("sample", *words, code=1).stderr, words
