"""What a step sees: random numbers by sample, pairs of mirror images, what is held out, patch tokens, and reading ahead."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

import gmem_bank
import gmem_gen
from gmem_bank.errors import ConfigError, SourceError, UnknownKeyError
from gmem_gen import conditioning, draws
from gmem_gen.config import Config, DataConfig, FlowConfig, ModelConfig, TrainConfig
from gmem_gen.data import PixelCache, PixelImages, to_pixels
from gmem_gen.loader import Batch, BatchMaker, Prefetch
from gmem_gen.patch_tokens import PatchTokens
from gmem_gen.splits import split_rows
from gmem_gen.tokenizers import PixelTokenizer

SHAPE = (3, 4, 4)


def test_random_numbers_are_those_of_a_philox_generator_of_each_sample() -> None:
    """Key (seed, step), counter (0, 0, sample, stream): choices in stream 1 in a fixed order, noise in stream 0."""
    samples = np.array([0, 7, 300])
    found = draws.draw(5, 9, samples, SHAPE, normal_times=True, dropout=6, snippet_noise=4)
    for place, sample in enumerate(samples):
        noise = np.random.Generator(np.random.Philox(key=[5, 9], counter=[0, 0, sample, 0]))
        np.testing.assert_array_equal(found.noise[place], noise.standard_normal(SHAPE, dtype=np.float32))
        choices = np.random.Generator(np.random.Philox(key=[5, 9], counter=[0, 0, sample, 1]))
        flip, null = choices.random(2, dtype=np.float32)
        assert (found.flip[place], found.null[place, 0]) == (flip < 0.5, null)
        assert found.time[place] == np.float32(choices.standard_normal())
        np.testing.assert_array_equal(found.dropout[place], choices.random(6, dtype=np.float32))
        np.testing.assert_array_equal(found.snippet_noise[place], choices.standard_normal(4, dtype=np.float32))


def test_random_numbers_do_not_depend_on_how_a_batch_is_split_and_differ_by_all_else() -> None:
    """Any subset in any order; another seed, step, sample or purpose is another stream."""
    options = {"normal_times": False, "dropout": 8}
    whole = draws.draw(1, 2, np.arange(10), SHAPE, **options)
    part = draws.draw(1, 2, np.array([7, 3]), SHAPE, **options)
    for name in ("noise", "time", "null", "dropout"):
        assert torch.equal(getattr(part, name), getattr(whole, name)[[7, 3]])
    others = [
        whole.noise,
        draws.draw(2, 2, np.arange(10), SHAPE, **options).noise,
        draws.draw(1, 3, np.arange(10), SHAPE, **options).noise,
        draws.draw(1, 2, np.arange(10), SHAPE, purpose=draws.VALIDATION, **options).noise,
    ]
    numbers = torch.cat(others).flatten(1)
    assert len(torch.unique(numbers, dim=0)) == 40
    correlation = torch.corrcoef(numbers) - torch.eye(40)
    assert correlation.abs().max() < 0.7


def test_random_numbers_have_their_distributions() -> None:
    """Normal noise and uniform choices, by moments over many samples."""
    found = draws.draw(0, 0, np.arange(4000), (1, 4, 4), normal_times=True, dropout=16)
    assert float(found.noise.mean()) == pytest.approx(0, abs=0.02)
    assert float(found.noise.std()) == pytest.approx(1, abs=0.02)
    assert float(found.time.std()) == pytest.approx(1, abs=0.05)
    assert float(found.dropout.mean()) == pytest.approx(0.5, abs=0.01)
    assert found.flip.mean() == pytest.approx(0.5, abs=0.03)
    assert float(found.null.mean()) == pytest.approx(0.5, abs=0.03)


KEYS = [f"c{i % 3}/{i:03d}.png{suffix}" for i in range(200) for suffix in ("", "#flip")] + [
    "alone.png",
    "bare.png#flip",
]


@pytest.mark.parametrize("flip", ["rows", "random", "none"])
def test_pairs_are_samples_as_asked_and_never_apart(flip: str) -> None:
    """rows: every row; random: a pair once; none: only pictures that are not mirrored. Held out with their twins."""
    split = split_rows(KEYS, DataConfig(flip=flip, validation_fraction=0.3), seed=3)
    held = {KEYS[place].removesuffix("#flip") for place in split.held_out}
    trained = [[KEYS[place] for place in pair] for pair in split.samples]
    assert not held & {key.removesuffix("#flip") for pair in trained for key in pair}
    assert len(held) == pytest.approx(0.3 * 202, abs=20)
    assert len(split.held_out) == sum(key.removesuffix("#flip") in held for key in KEYS)
    rest = [key for key in KEYS if key.removesuffix("#flip") not in held]
    if flip == "rows":
        assert [pair[0] for pair in trained] == [pair[1] for pair in trained] == rest
    elif flip == "none":
        assert [pair[0] for pair in trained] == [pair[1] for pair in trained] == [key for key in rest if "#" not in key]
    else:
        pairs = {key: (key + "#flip" if key + "#flip" in KEYS else key) for key in rest if "#" not in key}
        pairs |= {"bare.png#flip": "bare.png#flip"} if "bare.png#flip" in rest else {}
        assert dict(trained) == pairs


def test_what_is_held_out_depends_on_key_and_seed_alone(tmp_path: Path) -> None:
    """Other rows do not change it; another seed does; a file and a concept add theirs; nonsense is refused."""
    config = DataConfig(validation_fraction=0.2)

    def held(
        keys: list[str], config: DataConfig = config, seed: int = 0, concept: frozenset[str] = frozenset()
    ) -> set[str]:
        return {keys[place] for place in split_rows(keys, config, seed, concept).held_out}

    assert held(KEYS[:100]) == held(KEYS) & set(KEYS[:100])
    assert held(KEYS) == held(KEYS[::-1]) != held(KEYS, seed=1)
    (tmp_path / "keys.txt").write_text("c0/000.png\nc1/001.png#flip\n")
    named = DataConfig(validation_keys=str(tmp_path / "keys.txt"))
    assert held(KEYS, named) == {"c0/000.png", "c0/000.png#flip", "c1/001.png", "c1/001.png#flip"}
    by_concept = DataConfig(validation_concept="c0")
    assert held(KEYS, by_concept, concept=frozenset(KEYS[:2])) == set(KEYS[:2])
    (tmp_path / "keys.txt").write_text("nobody.png\n")
    with pytest.raises(UnknownKeyError, match=r"1 keys.*'nobody\.png'"):
        split_rows(KEYS, named, 0)
    with pytest.raises(ConfigError, match="could not read"):
        split_rows(KEYS, DataConfig(validation_keys="absent.txt"), 0)
    with pytest.raises(ConfigError, match="none of 2 rows was held out"):
        split_rows(KEYS[:2], DataConfig(validation_fraction=1e-9), 0)
    with pytest.raises(ConfigError, match="no row is left"):
        split_rows(KEYS[:2], by_concept, 0, frozenset(KEYS[:2]))
    with pytest.raises(ConfigError, match="mirrored twins"):
        split_rows(["a.png", "b.png"], DataConfig(flip="random"), 0)


@pytest.fixture
def flipped(photos: Path) -> gmem_bank.MemoryBank:
    """A HOG bank of the photos and their mirrored twins."""
    gmem_bank.build(
        photos, gmem_bank.load_encoder("hog"), "flipped.safetensors", narrowing=gmem_bank.Narrowing(flip=True)
    )
    return gmem_bank.open("flipped.safetensors")


def maker_of(bank: gmem_bank.MemoryBank, config: Config, tokens: object = None) -> tuple[BatchMaker, conditioning.Join]:
    join = conditioning.join_images(bank, None, allow_missing=False)
    cache = PixelCache(Path("cache"), bank, join, None, size=8, channels=3, progress=lambda done, total: None)
    split = split_rows(join.keys, config.data, config.train.seed)
    return BatchMaker(bank, config, PixelImages(cache, PixelTokenizer(8, 3)), join, split, tokens=tokens), join


def test_latent_snippet_and_tokens_are_always_of_the_same_side(flipped: gmem_bank.MemoryBank) -> None:
    """One decision a sample: in every batch all three are the picture's or all three the mirrored twin's."""
    config = Config(
        data=DataConfig(image_size=8, flip="random"), flow=FlowConfig(prediction="velocity"),
        train=TrainConfig(batch_size=12, null_probability=0.0, snippet_dropout=0.0),
    )  # fmt: skip
    maker, join = maker_of(flipped, config, tokens=lambda places: torch.from_numpy(places)[:, None, None])
    mirrored, seen = 0, set()
    for step in range(20):
        batch = maker.training(step, range(12))
        for sample, place in enumerate(batch.places):
            row, key = int(join.rows[place]), join.keys[place]
            pixels = to_pixels(flipped.read_image(row), 8, 3).transpose(2, 0, 1).astype(np.float32) / 127.5 - 1
            np.testing.assert_allclose(batch.x_1[sample], pixels, atol=1e-6)
            np.testing.assert_array_equal(batch.conditions[sample], flipped.snippets(np.array([row]))[0])
            assert int(batch.tokens[sample, 0, 0]) == place
            mirrored += key.endswith("#flip")
            seen.add(key.removesuffix("#flip"))
    assert mirrored / 240 == pytest.approx(0.5, abs=0.12)
    assert len(seen) == 24
    assert maker.order.steps_per_epoch == 2  # 24 pairs, not 48 rows


def test_a_share_of_a_batch_is_that_part_of_the_batch(flipped: gmem_bank.MemoryBank) -> None:
    """So two processes together see what one sees; and a part of a share is that part."""
    config = Config(data=DataConfig(image_size=8), train=TrainConfig(batch_size=11, snippet_noise=0.1))
    maker, _ = maker_of(flipped, config)
    whole = maker.training(3, range(11))
    first, second = maker.training(3, range(5)), maker.training(3, range(5, 11))
    for name in ("x_1", "x_0", "t", "conditions"):
        assert torch.equal(torch.cat([getattr(first, name), getattr(second, name)]), getattr(whole, name))
        parts = [getattr(whole.part(number, 3), name) for number in range(3)]
        assert torch.equal(torch.cat(parts), getattr(whole, name))
    assert [len(whole.part(number, 3)) for number in range(3)] == [3, 4, 4]


def test_a_bank_is_asked_by_one_thread_at_a_time(
    flipped: gmem_bank.MemoryBank, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its interface does not promise more, and several threads make batches."""
    config = Config(data=DataConfig(image_size=8), train=TrainConfig(batch_size=4))
    maker, _ = maker_of(flipped, config)
    inside, most, real = [], [], conditioning.gather

    def slow(*args: object) -> torch.Tensor:
        inside.append(1)
        most.append(len(inside))
        time.sleep(0.02)
        inside.pop()
        return real(*args)

    monkeypatch.setattr(conditioning, "gather", slow)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda step: maker.training(step, range(4)), range(8)))
    assert most == [1] * 8


def shards_of(keys: list[str], side: int) -> np.ndarray:
    rng = np.random.default_rng(0)
    values = rng.standard_normal((len(keys), side * side, 5)).astype(np.float32)
    writer = gmem_bank.ShardWriter(Path("tokens"), {"made": "here"})
    writer.write(0, keys, values)
    writer.finish(1, {"encoder": {"name": "made-up"}})
    return values


def test_patch_tokens_are_joined_by_key_and_brought_to_the_grid() -> None:
    """In the order of the rows asked for; resampled as PyTorch's interpolation does it; a constant stays constant."""
    keys = ["b.png", "a.png", "a.png#flip"]
    values = shards_of(keys, 4)
    tokens = PatchTokens("tokens", ["a.png", "a.png#flip", "b.png"], "bilinear")
    assert (tokens.num_tokens, tokens.dim, tokens.record()["encoder"]) == (16, 5, {"name": "made-up"})
    tokens.fit(4)
    np.testing.assert_array_equal(tokens(np.array([2, 0])), values[[0, 1]])
    tokens.fit(2)
    resampled = tokens(np.array([1]))[0].reshape(2, 2, 5)
    image = torch.from_numpy(values[2]).reshape(4, 4, 5).permute(2, 0, 1)[None]
    expected = torch.nn.functional.interpolate(image, (2, 2), mode="bilinear", antialias=True)[0].permute(1, 2, 0)
    torch.testing.assert_close(resampled, expected)
    assert resampled.mean(dim=(0, 1)).sub(torch.from_numpy(values[2].mean(0))).abs().max() < 0.5


def test_patch_tokens_that_do_not_fit_are_refused() -> None:
    """Keys without tokens (and what to do for twins), another grid where none may be resampled, no square."""
    shards_of(["a.png"], 4)
    with pytest.raises(SourceError, match=r"'b\.png'.*gmem-bank tokens"):
        PatchTokens("tokens", ["a.png", "b.png"], "bilinear")
    with pytest.raises(SourceError, match=r"tokens --flip"):
        PatchTokens("tokens", ["a.png", "a.png#flip"], "bilinear")
    with pytest.raises(ConfigError, match="4×4 patch tokens, the model 8×8"):
        PatchTokens("tokens", ["a.png"], "none").fit(8)


def test_training_by_the_command_learns_from_patch_tokens(photos: Path) -> None:
    """The head has the tokens' dimension, its loss is logged, other tokens do not go on."""
    gmem_bank.build(photos, gmem_bank.load_encoder("hog"), "bank.safetensors")
    bank = gmem_bank.open("bank.safetensors")
    shards_of(bank.keys(bank.rows()), 4)
    settings = ["model.encoder_depth=1", "data.tokens=tokens", "train.max_steps=4", "train.checkpoint_every=2"]
    base = Config(
        data=DataConfig(image_size=8), model=ModelConfig(width=16, depth=1, num_heads=2), train=TrainConfig(log_every=1)
    )
    config = gmem_gen.apply_settings(base, settings)
    gmem_gen.train("bank.safetensors", config, out="run")
    import json

    lines = [json.loads(line) for line in Path("run/log.jsonl").read_text().splitlines()]
    assert all(line["loss"] == pytest.approx(line["mse"] + 0.5 * line["projection"], rel=1e-5) for line in lines)
    assert lines[0]["projection"] > lines[-1]["projection"]
    assert "projection_dim = 5" in Path("run/config.toml").read_text()
    longer = gmem_gen.apply_settings(config, ["train.max_steps=5", "data.tokens="])
    with pytest.raises((ConfigError, gmem_bank.CheckpointError), match=r"projection_dim|patch tokens"):
        gmem_gen.train("bank.safetensors", longer, out="run")
    with pytest.raises(ConfigError, match="patch tokens have 5"):
        gmem_gen.train("bank.safetensors", gmem_gen.apply_settings(config, ["model.projection_dim=6"]), out="other")


def test_patch_tokens_of_another_encoder_are_remarked_on(photos: Path) -> None:
    """They may be wanted, and may be a mistake; what says that it holds something else is refused."""
    gmem_bank.build(photos, gmem_bank.load_encoder("hog"), "bank.safetensors")
    bank = gmem_bank.open("bank.safetensors")
    for name, spec in (("own", bank.encoder), ("other", gmem_bank.load_encoder("pixels").spec), ("none", None)):
        writer = gmem_bank.ShardWriter(Path(name), {"made": "here"})
        writer.write(0, ["a.png"], np.zeros((1, 16, 5), np.float32))
        writer.finish(1, {"holds": "patch tokens", "encoder": spec and spec.to_json()})
    record = conditioning.record_of(bank)
    assert PatchTokens("own", ["a.png"], "none").remark(record) == ""
    assert "those of pixels" in PatchTokens("other", ["a.png"], "none").remark(record)
    assert "does not say which encoder" in PatchTokens("none", ["a.png"], "none").remark(record)
    writer = gmem_bank.ShardWriter(Path("latents"), {"made": "here"})
    writer.write(0, ["a.png"], np.zeros((1, 4, 4), np.float32))
    writer.finish(1, {"holds": "latents"})
    with pytest.raises(SourceError, match="but latents"):
        PatchTokens("latents", ["a.png"], "none")
    told: list[str] = []
    shards_of(bank.keys(bank.rows()), 4)
    settings = [
        "model.encoder_depth=1",
        "data.tokens=tokens",
        "train.max_steps=1",
        "data.image_size=8",
        "model.width=16",
    ]
    gmem_gen.train("bank.safetensors", gmem_gen.apply_settings(Config(), settings), out="run", say=told.append)
    assert any("does not say which encoder" in line for line in told)


def empty_batch(step: int) -> Batch:
    zero = torch.full((1,), float(step))
    return Batch(places=np.zeros(1, np.int64), x_1=zero, x_0=zero, t=zero, conditions=zero, tokens=None)


@pytest.mark.parametrize("threads", [0, 1, 3])
def test_batches_come_in_order_whatever_was_made_ahead(threads: int) -> None:
    """From any first step; none is made past the end; an error comes where its step is asked for."""
    made, where = [], set()

    def make(step: int) -> Batch:
        made.append(step)
        where.add(threading.current_thread() is threading.main_thread())
        if step == 8:
            raise SourceError("gone")
        return empty_batch(step)

    loader = Prefetch(make, 9, threads)
    assert [float(loader.take(step).t[0]) for step in range(3, 8)] == [3, 4, 5, 6, 7]
    with pytest.raises(SourceError, match="gone"):
        loader.take(8)
    loader.close()
    assert sorted(made) == list(range(3, 9))
    assert where == {threads == 0}
