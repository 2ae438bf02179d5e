"""Latents by key: those of a direct forward, with statistics over all of them; resumable; refused where they do not fit."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import gmem_bank
import gmem_gen
from gmem_bank.errors import ConfigError, CorruptError, OutputExistsError, SourceError
from gmem_gen import checkpoint as checkpoints
from gmem_gen import latents, taef2
from gmem_gen.autoencoders import Weights
from gmem_gen.channel_moments import ChannelMoments
from gmem_gen.config import Config
from gmem_gen.data import to_pixels
from gmem_gen.image_plan import plan_images
from gmem_gen.tokenizers import TokenizerMaker, make_tokenizer
from tests.gmem_gen.test_tokenizers import make_taef2

TINY = ["model.width=16", "model.depth=1", "model.num_heads=2", "train.max_steps=3", "train.batch_size=8",
        "train.num_threads=1", "train.warmup_steps=1"]  # fmt: skip


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    return make_taef2(tmp_path / "taef2")


@pytest.fixture
def bank(photos: Path) -> str:
    """A bank of 24 photos; it has the twins of its first ones as rows."""
    encoder = gmem_bank.load_encoder("pixels")
    gmem_bank.build(photos, encoder, "bank.safetensors")
    return "bank.safetensors"


def encode(bank: str, weights: Path, output: str = "lat", **options: object) -> gmem_bank.ShardsReport:
    place = Weights(place=str(weights), posterior=options.pop("posterior", "mean"))
    return gmem_gen.encode(bank, "taef2", output, weights=place, image_size=16, **options)


def config(*settings: str) -> Config:
    return gmem_gen.apply_settings(Config(), [*TINY, *settings])


def direct(bank: str, weights: Path, key: str) -> torch.Tensor:
    """The raw latent of one key, encoded alone."""
    opened = gmem_bank.open(bank)
    image = opened.read_image(int(opened.rows_for([key.removesuffix("#flip")])[0]))
    pixels = to_pixels(image, 16, 3)
    if key.endswith("#flip"):
        pixels = np.ascontiguousarray(pixels[:, ::-1])
    return TokenizerMaker("taef2", Weights(place=str(weights))).make(16).encode(pixels[None])[0]


@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16"])
def test_latents_are_those_of_a_direct_forward(bank: str, weights: Path, dtype: str) -> None:
    """Of every key and its twin, in a file that other programs read."""
    report = encode(bank, weights, dtype=dtype, flip=True)
    keys = gmem_bank.open(bank).keys(gmem_bank.open(bank).rows())
    found = gmem_bank.Shards("lat")
    assert (report.num_rows, report.shape) == (2 * len(keys), [32, 2, 2])
    assert found.keys() == [name for key in keys for name in (key, key + "#flip")]
    step = {"f32": 0.0, "f16": 2.0**-11, "bf16": 2.0**-8}[dtype]
    for key in (keys[7], keys[0] + "#flip"):
        got, wanted = found.read(found.rows_for([key]))[0], direct(bank, weights, key).numpy()
        np.testing.assert_allclose(got, wanted, rtol=step, atol=2e-5)
    with safe_open("lat/00000.safetensors", "pt") as stored:
        whole = stored.get_tensor("values")
    assert whole.dtype == {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}[dtype]
    np.testing.assert_array_equal(whole.float().numpy(), found.read(np.arange(len(found))))


def test_statistics_are_those_of_all_latents(bank: str, weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As NumPy has them in float64 over every stored value, both flips, whatever the shards and after an interruption."""
    monkeypatch.setattr(latents, "SHARD_ROWS", 8)
    encode(bank, weights, flip=True, batch_size=4)
    found = gmem_bank.Shards("lat")
    values = found.read(np.arange(len(found))).astype(np.float64)
    record = found.facts["tokenizer"]
    np.testing.assert_allclose(record["mean"], values.mean(axis=(0, 2, 3)), rtol=1e-12, atol=1e-13)
    np.testing.assert_allclose(record["std"], values.std(axis=(0, 2, 3)), rtol=1e-11)
    join = latents.join_latents(gmem_bank.open(bank), found, 16, None, allow_missing=False)
    read = latents.LatentImages(found, join, make_tokenizer(record)).read(np.arange(len(join.rows))).numpy()
    alone = values[::2]
    expected = (alone - values.mean(axis=(0, 2, 3), keepdims=True)) / values.std(axis=(0, 2, 3), keepdims=True)
    np.testing.assert_allclose(read, expected, atol=2e-5)


def test_moments_add_up_and_constant_channels_become_zeros() -> None:
    """Parts in any order of merging, a large mean, a channel without spread, and one that is zero."""
    rng = np.random.default_rng(0)
    values = rng.standard_normal((50, 4, 3, 3)).astype(np.float32) * np.array([1, 1e-3, 0, 0]).reshape(1, 4, 1, 1)
    values = (values + np.array([0, 1000, 0.1, 0]).reshape(1, 4, 1, 1)).astype(np.float32)
    whole = ChannelMoments(4)
    for start, stop in ((0, 1), (1, 20), (20, 20), (20, 50)):
        part = ChannelMoments(4)
        part.add(values[start:stop])
        whole.merge(part.to_array())
    statistics = whole.statistics()
    wide = values.astype(np.float64)
    np.testing.assert_allclose(statistics["mean"], wide.mean(axis=(0, 2, 3)), rtol=1e-12)
    np.testing.assert_allclose(statistics["std"][:2], wide.std(axis=(0, 2, 3))[:2], rtol=1e-9)
    assert statistics["std"][2:] == (1.0, 1.0)


def test_interrupted_work_goes_on_and_gives_the_same_bytes(
    bank: str, weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Finished shards are kept; workers or none, one run or two, the folder is the same; other plans are refused."""
    monkeypatch.setattr(latents, "SHARD_ROWS", 8)

    def stop(done: int, total: int) -> None:
        if done > 13:
            raise KeyboardInterrupt

    encode(bank, weights, "whole", batch_size=4)
    with pytest.raises(KeyboardInterrupt):
        encode(bank, weights, "parts", batch_size=4, progress=stop)
    with pytest.raises(SourceError, match="is unfinished"):
        latents.open_latents(config('data.latents="parts"').data)
    assert encode(bank, weights, "parts", batch_size=4, num_workers=2).num_resumed == 1
    names = sorted(path.name for path in Path("whole").iterdir())
    assert len(names) == 5
    assert [(Path("whole") / n).read_bytes() for n in names] == [(Path("parts") / n).read_bytes() for n in names]
    for other in ({"dtype": "f32"}, {"flip": True}):
        with pytest.raises(OutputExistsError, match="in another way"):
            encode(bank, weights, "parts", batch_size=4, **other)


def test_damaged_latents_are_made_anew_by_the_same_call(
    bank: str, weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A flipped bit, a file cut short or gone, an index that is none: told by a training, mended to the same bytes."""
    monkeypatch.setattr(latents, "SHARD_ROWS", 8)
    encode(bank, weights, batch_size=4)
    names = [path.name for path in Path("lat").iterdir() if not path.name.startswith(".")]
    whole = {name: (Path("lat") / name).read_bytes() for name in names}
    first = whole["00000.safetensors"]
    last = first[:-1] + bytes([first[-1] ^ 1])
    damages = [("00000.safetensors", last, "bytes have changed", 1), ("00001.safetensors", first[:-9], "cut short", 1),
               ("index.json", b"{}", "not an index of shards: it has no 'format'", 0)]  # fmt: skip
    for name, data, said, num_damaged in damages:
        (Path("lat") / name).write_bytes(data)
        with pytest.raises(CorruptError, match=f"{said}.*makes damaged shards anew"):
            gmem_gen.train(bank, config('data.latents="lat"'), out="run")
        report = encode(bank, weights, batch_size=4)
        assert (report.num_damaged, report.num_resumed) == (num_damaged, 3 - num_damaged)
        assert {name: (Path("lat") / name).read_bytes() for name in names} == whole
    (Path("lat") / "00002.safetensors").unlink()
    assert encode(bank, weights, batch_size=4).num_resumed == 2
    assert {name: (Path("lat") / name).read_bytes() for name in names} == whole


def test_work_that_made_nothing_is_not_in_the_way(bank: str, weights: Path, photos: Path) -> None:
    """A plan whose first shard never came holds nothing to lose: another may be made there."""
    image = sorted(photos.rglob("*.jpg"))[0]
    data = image.read_bytes()
    image.write_bytes(b"no picture")
    with pytest.raises(SourceError):
        encode(bank, weights)
    assert {path.name for path in Path("lat").iterdir() if not path.name.startswith(".")} == {"plan.json"}
    image.write_bytes(data)
    assert encode(bank, weights, dtype="f32").num_rows == 24


def test_unreadable_images_are_told_together(
    bank: str, weights: Path, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By encode and by a training on pixels; shards without them stand, and go on once the images are restored."""
    monkeypatch.setattr(latents, "SHARD_ROWS", 8)
    keys = [gmem_bank.open(bank).keys(np.array([row]))[0] for row in (1, 17)]
    whole = {key: ((photos / key).read_bytes(), (photos / key).stat()) for key in keys}
    encode(bank, weights, "whole", batch_size=4)
    for key in keys:
        (photos / key).write_bytes(b"x" * whole[key][1].st_size)
        os.utime(photos / key, ns=(0, whole[key][1].st_mtime_ns))
    said = rf"2 of 24 images cannot be used: '{keys[0]}' \(.*\), '{keys[1]}' \(.*gmem-bank remove --key"
    with pytest.raises(SourceError, match=said):
        encode(bank, weights, batch_size=4)
    for _ in range(2):
        with pytest.raises(SourceError, match=said):
            gmem_gen.train(bank, config("data.allow_missing=true"), out="run")
    for key in keys:
        (photos / key).write_bytes(whole[key][0])
        os.utime(photos / key, ns=(0, whole[key][1].st_mtime_ns))
    assert encode(bank, weights, batch_size=4).num_resumed == 1
    found, wanted = gmem_bank.Shards("lat"), gmem_bank.Shards("whole")
    np.testing.assert_array_equal(found.read(np.arange(24)), wanted.read(np.arange(24)))
    assert gmem_gen.train(bank, config(), out="run").num_images == 24


@pytest.mark.slow
def test_kill_9_at_any_moment_gives_the_same_bytes(bank: str, weights: Path) -> None:
    """Killed over and over, the same command ends in the folder of a run that was left alone."""
    code = (
        "import sys; from gmem_gen import latents; latents.SHARD_ROWS = 4; from gmem_gen.cli import main; "
        "sys.exit(main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", code, "encode", "-q", "-b", bank, "-t", "taef2", "--tokenizer-weights", str(weights),
               "--image-size", "64", "--batch-size", "2", "--flip", "--workers", "0"]  # fmt: skip
    subprocess.run([*command, "-o", "whole"], check=True)
    rng = np.random.default_rng(0)
    kills = done = 0
    for _ in range(6):
        process = subprocess.Popen([*command, "-o", "parts"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while process.poll() is None and len(list(Path("parts").glob("*.safetensors"))) <= done:
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.1))
        process.kill()
        if process.wait() == 0:
            break
        kills, done = kills + 1, len(list(Path("parts").glob("*.safetensors")))
    assert kills >= 2
    subprocess.run([*command, "-o", "parts"], check=True)
    names = sorted(path.name for path in Path("whole").iterdir())
    assert names == sorted(path.name for path in Path("parts").iterdir() if not path.name.startswith("."))
    assert all((Path("whole") / name).read_bytes() == (Path("parts") / name).read_bytes() for name in names)


def test_a_training_reads_latents_and_a_checkpoint_decodes_with_their_statistics(bank: str, weights: Path) -> None:
    """Without the images; sampled with what the checkpoint says, whatever becomes of the folder (the published code's W13)."""
    encode(bank, weights)
    shutil.move("photos", "gone")
    gmem_gen.train(bank, config('data.latents="lat"'), out="run")
    state = checkpoints.read_state(checkpoints.list_checkpoints(Path("run"))[-1])
    record = gmem_bank.Shards("lat").facts["tokenizer"]
    assert state["tokenizer"] == record
    assert state["latent"] == {"channels": 32, "size": 2}
    assert (state["config"]["data"]["tokenizer"], state["config"]["data"]["image_size"]) == ("taef2", 16)
    shutil.rmtree("lat")
    opened, loaded = gmem_bank.open(bank), gmem_gen.load_checkpoint("run")
    conditions = gmem_gen.choose_conditions(opened, concept=None, keys=(), num=3, per_snippet=1, seed=0)
    drawn = gmem_gen.sample(opened, loaded, conditions).images
    assert drawn.shape == (3, 16, 16, 3)
    changed = json.loads(json.dumps(loaded.tokenizer))
    changed["mean"] = [value + 3 for value in changed["mean"]]
    other = gmem_gen.sample(opened, gmem_gen.load_checkpoint("run"), conditions).images
    np.testing.assert_array_equal(drawn, other)
    loaded.tokenizer.update(changed)
    assert not np.array_equal(gmem_gen.sample(opened, loaded, conditions).images, drawn)


def test_latents_made_first_equal_latents_made_before(bank: str, weights: Path) -> None:
    """`--tokenizer` alone encodes into the run's cache, and trains as on that folder; again, nothing is encoded twice."""
    place = f'data.tokenizer_weights="{weights}"'
    encode(bank, weights)
    gmem_gen.train(bank, config('data.latents="lat"'), out="before")
    own = config("data.tokenizer=taef2", place, "data.image_size=16")
    gmem_gen.train(bank, own, out="first")
    newest = [checkpoints.list_checkpoints(Path(run))[-1] / checkpoints.MODEL for run in ("before", "first")]
    one, two = (load_file(path) for path in newest)
    assert all(torch.equal(one[name], two[name]) for name in one)
    seen = []
    longer = gmem_gen.apply_settings(own, ["train.max_steps=4"])
    gmem_gen.train(bank, longer, out="first", read_progress=lambda done, total: seen.append(done))
    assert set(seen) <= {24}  # all there already


def test_images_that_were_only_copied_are_not_encoded_again(
    bank: str, weights: Path, photos: Path, monkeypatch
) -> None:
    """A training goes on with the latents that it began with, whatever times the files have; of other pictures they are made anew."""
    from gmem_gen import image_plan

    settings = ["data.tokenizer=taef2", f'data.tokenizer_weights="{weights}"', "data.image_size=16"]
    made, really = [], image_plan.encode
    monkeypatch.setattr(image_plan, "encode", lambda *given, **more: made.append(1) or really(*given, **more))
    gmem_gen.train(bank, config(*settings), out="run")
    before = gmem_bank.Shards("run/cache/latents").facts
    files = sorted(photos.rglob("*.jpg"))
    for path in files:
        os.utime(path, (1, 1))
    gmem_gen.train(bank, config(*settings, "train.max_steps=4"), out="run")
    assert made == [1]
    shard = Path("run/cache/latents/00000.safetensors")
    shard.write_bytes(shard.read_bytes()[:-1])
    gmem_gen.train(bank, config(*settings, "train.max_steps=5"), out="run")
    assert made == [1, 1]
    assert gmem_bank.Shards("run/cache/latents").facts == before
    for path in files[1:]:
        shutil.copy(files[0], path)
    gmem_gen.train(bank, config(*settings, "train.max_steps=6"), out="run")
    assert made == [1, 1, 1]


def test_on_the_fly_the_statistics_are_of_the_images_asked_for(bank: str, weights: Path) -> None:
    """Measured once over so many images, kept by the checkpoint; read like latents that lie ready, but for rounding."""
    settings = ["data.tokenizer=taef2", f'data.tokenizer_weights="{weights}"', "data.image_size=16",
                "data.encode_on_the_fly=true"]  # fmt: skip
    opened = gmem_bank.open(bank)
    planned = plan_images(opened, None, config(*settings))
    ready = planned.open(Path("cache"), lambda done, total: None)
    encode(bank, weights, dtype="f32")
    stored = gmem_bank.Shards("lat")
    np.testing.assert_allclose(ready.tokenizer.record()["mean"], stored.facts["tokenizer"]["mean"], atol=1e-5)
    places = np.array([5, 0, 23])
    lying = plan_images(opened, None, config('data.latents="lat"')).open(Path("cache"), lambda done, total: None)
    torch.testing.assert_close(ready.read(places), lying.read(places), atol=2e-4, rtol=1e-3)
    few = plan_images(opened, None, config(*settings, "data.statistics_images=2"))
    record = few.open(Path("cache"), lambda done, total: None).tokenizer.record()
    raw = stored.read(stored.rows_for([planned.join.keys[0], planned.join.keys[-1]])).astype(np.float64)
    np.testing.assert_allclose(record["mean"], raw.mean(axis=(0, 2, 3)), atol=1e-5)
    gmem_gen.train(bank, config(*settings, "data.statistics_images=2"), out="run")
    again = config(*settings, "data.statistics_images=2", "train.max_steps=5")
    gmem_gen.train(bank, again, out="run")
    kept = [checkpoints.read_state(path)["tokenizer"] for path in checkpoints.list_checkpoints(Path("run"))]
    assert len(kept) == 2
    assert kept[0] == kept[1]
    assert {**record, "mean": None, "std": None} == {**kept[0], "mean": None, "std": None}
    for name in ("mean", "std"):  # measured by another process of training: convolutions may round otherwise
        np.testing.assert_allclose(kept[0][name], record[name], atol=1e-6)


def test_twins_of_a_bank_are_rows_of_their_own(photos: Path, weights: Path) -> None:
    """A bank built with flips trains on the mirrored latent with the mirrored snippet: the flip is one decision."""
    gmem_bank.build(
        photos, gmem_bank.load_encoder("pixels"), "bank.safetensors", narrowing=gmem_bank.Narrowing(flip=True)
    )
    opened = gmem_bank.open("bank.safetensors")
    assert encode("bank.safetensors", weights).num_rows == 48
    assert encode("bank.safetensors", weights, "both", flip=True).num_rows == 48
    planned = plan_images(opened, None, config('data.latents="lat"'))
    ready = planned.open(Path("cache"), lambda done, total: None)
    place = planned.join.keys.index(next(key for key in planned.join.keys if key.endswith("#flip")))
    key = planned.join.keys[place]
    raw = ready.tokenizer.normalisation.undo(ready.read(np.array([place])))[0]
    torch.testing.assert_close(raw, direct("bank.safetensors", weights, key), atol=2e-3, rtol=2e-3)
    mirrored = opened.read_image(int(planned.join.rows[place]))
    np.testing.assert_array_equal(
        mirrored[:, ::-1], opened.read_image(int(opened.rows_for([key.removesuffix("#flip")])[0]))
    )


def test_missing_latents_are_counted_and_named(bank: str, weights: Path, new_photos: Path) -> None:
    """Rows inserted since have none: how many, which, and what to do; left out on request. Rows computed from others have none."""
    encode(bank, weights)
    gmem_bank.insert_concept(bank, [new_photos], gmem_bank.load_encoder("pixels"), name="new")
    gmem_bank.interpolate(bank, "hat", "new", name="between", steps=3)
    with pytest.raises(SourceError, match=r"no latents in lat for 8 of 32 rows, such as 'new/.*--allow-missing"):
        gmem_gen.train(bank, config('data.latents="lat"'), out="run")
    report = gmem_gen.train(bank, config('data.latents="lat"', "data.allow_missing=true"), out="run")
    assert report.num_images == 24
    planned = plan_images(gmem_bank.open(bank), None, config('data.latents="lat"', "data.allow_missing=true"))
    assert (len(planned.join.missing), planned.join.num_derived) == (8, 3)
    gmem_bank.remove(bank, gmem_bank.Selection(concepts=("new", "between")))
    gmem_gen.train(bank, config('data.latents="lat"'), out="other")


def test_latents_that_do_not_fit_are_refused(bank: str, weights: Path, photos: Path, tmp_path: Path) -> None:
    """Another tokenizer, size, bank or weights; patch tokens; a damaged shard. The reason is said."""
    encode(bank, weights)

    def refused(match: str, *settings: str, error: type[Exception] = ConfigError, of: str = bank) -> None:
        with pytest.raises(error, match=match):
            plan_images(gmem_bank.open(of), None, config('data.latents="lat"', *settings))

    refused("were made with tokenizer 'taef2', and data.tokenizer is 'sd-vae'", "data.tokenizer=sd-vae")
    refused("were made with image_size 16, and data.image_size is 32", "data.image_size=32")
    shutil.copytree(weights, "other-weights")
    stored = (Path("other-weights") / taef2.ENCODER).read_bytes()
    (Path("other-weights") / taef2.ENCODER).write_bytes(stored[:-2] + b"\0\0")
    refused("other weights of 'taef2'", 'data.tokenizer_weights="other-weights"', error=gmem_bank.EncoderError)
    shutil.copytree(photos, "turned")
    for path in Path("turned").rglob("*.jpg"):
        shutil.copy(next(iter(sorted(photos.rglob("*.jpg")))), path)
    gmem_bank.build("turned", gmem_bank.load_encoder("pixels"), "turned.safetensors")
    refused("are of another bank: the image of row", error=SourceError, of="turned.safetensors")
    gmem_bank.build(photos / "hat", gmem_bank.load_encoder("pixels"), "hat.safetensors")
    refused("for any row of this bank, whose keys are such as", error=SourceError, of="hat.safetensors")
    gmem_bank.ShardWriter(Path("tokens"), {"plan": 1}).finish(0, {"holds": "patch tokens"})
    with pytest.raises(ConfigError, match="holds patch tokens, not latents"):
        plan_images(gmem_bank.open(bank), None, config('data.latents="tokens"'))
    shard = Path("lat/00000.safetensors")
    shard.write_bytes(shard.read_bytes()[:-1])
    refused("cut short", error=CorruptError)


def test_a_training_does_not_go_on_with_other_latents(bank: str, weights: Path) -> None:
    """Of another size or posterior; the same in another folder will do, and its statistics stay the checkpoint's."""
    encode(bank, weights)
    gmem_gen.train(bank, config('data.latents="lat"'), out="run")
    gmem_gen.encode(bank, "taef2", "large", weights=Weights(place=str(weights)), image_size=32)
    with pytest.raises(ConfigError, match="image_size"):
        gmem_gen.train(bank, config('data.latents="large"'), out="run")
    gmem_bank.remove(bank, gmem_bank.Selection(concepts=("hat",)))
    encode(bank, weights, "fewer")
    more = config('data.latents="fewer"', "train.max_steps=5")
    assert gmem_gen.train(bank, more, out="run", accept_bank_change=True).step == 5
    first, last = (checkpoints.read_state(path)["tokenizer"] for path in checkpoints.list_checkpoints(Path("run")))
    assert first["mean"] == last["mean"] != gmem_bank.Shards("fewer").facts["tokenizer"]["mean"]


def test_a_tokenizer_that_was_moved_draws_the_samples_on_the_way(bank: str, weights: Path, monkeypatch) -> None:
    """From its new place, which later checkpoints remember; its weights are read once a training."""
    encode(bank, weights)
    settings = ['data.latents="lat"', "train.sample_every=1", "train.sample_images=2", "sample.num_steps=2"]
    gmem_gen.train(bank, config(*settings), out="run")
    shutil.move(weights, "moved")
    read, load = [], taef2.load
    monkeypatch.setattr(
        taef2, "load", lambda name, place, *rest, **more: read.append(place) or load(name, place, *rest, **more)
    )
    told = ['data.tokenizer_weights="moved"', "train.max_steps=5"]
    assert gmem_gen.train(bank, config(*settings, *told), out="run").step == 5
    assert Path("run/samples/step-00000005.png").is_file()
    assert read == ["moved"]
    loaded = gmem_gen.load_checkpoint("run")
    assert loaded.tokenizer["weights"] == Path("moved").resolve().as_posix()
    opened = gmem_bank.open(bank)
    conditions = gmem_gen.choose_conditions(opened, concept=None, keys=(), num=1, per_snippet=1, seed=0)
    assert gmem_gen.sample(opened, loaded, conditions).images.shape == (1, 16, 16, 3)


def test_what_would_do_nothing_is_refused(bank: str, weights: Path) -> None:
    """A sample of a posterior where there is none, and how latents are made where they lie ready; nothing false is recorded."""
    with pytest.raises(ConfigError, match="'taef2' makes one latent of an image"):
        encode(bank, weights, posterior="sample")
    with pytest.raises(ConfigError, match="'pixels' makes one latent of an image"):
        plan_images(gmem_bank.open(bank), None, config("data.posterior=sample"))
    encode(bank, weights)
    for setting in ("channels=1", "posterior=sample", "tokenizer_revision=main", "statistics_images=7"):
        with pytest.raises(ConfigError, match=rf"data\.{setting.split('=')[0]} is .* made already") as caught:
            plan_images(gmem_bank.open(bank), None, config('data.latents="lat"', f"data.{setting}"))
        assert caught.value.key == f"data.{setting.split('=')[0]}"


def test_an_image_of_512_pixels_is_512_pixels(photos: Path, weights: Path) -> None:
    """Its latent has 64 × 64 places, and is that of the crop at 512 (the published code's W19)."""
    one = gmem_bank.Narrowing(limit=1)
    gmem_bank.build(photos, gmem_bank.load_encoder("pixels"), "one.safetensors", narrowing=one)
    report = gmem_gen.encode("one.safetensors", "taef2", "large", weights=Weights(place=str(weights)), image_size=512)
    assert report.shape == [32, 64, 64]
    crop = gmem_bank.center_crop(gmem_bank.open("one.safetensors").read_image(0), 512)
    np.testing.assert_array_equal(gmem_bank.Shards("large").entry("thumbnails"), [latents.thumbnail(crop)])
    cells = crop.reshape(8, 64, 8, 64, 3).mean(axis=(1, 3))
    assert np.abs(latents.thumbnail(crop) - cells).max() <= 1


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="counts reads as Linux tells them")
def test_a_sample_costs_one_read_of_its_own_bytes(bank: str, weights: Path) -> None:
    """As many calls as samples, and not a byte more than theirs."""
    encode(bank, weights)
    found = gmem_bank.Shards("lat")
    rows = np.random.default_rng(0).permutation(len(found))
    found.read_stored(rows[:1])

    def counts() -> dict[str, int]:
        return {
            name: int(value)
            for name, value in (line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
        }

    before, again = counts(), counts()
    own = {name: again[name] - before[name] for name in ("rchar", "syscr")}  # what looking costs
    start = counts()
    found.read_stored(rows)
    end = counts()
    assert end["syscr"] - start["syscr"] - own["syscr"] == len(rows)
    assert (
        abs(end["rchar"] - start["rchar"] - own["rchar"] - len(rows) * 32 * 2 * 2 * 2) < 16
    )  # the counters' own digits


def test_the_commands(bank: str, weights: Path) -> None:
    """encode, train and sample by command; results on stdout as JSON; errors in one line."""
    from click.testing import CliRunner

    from gmem_gen.cli import main

    def call(*words: str, code: int = 0) -> str:
        result = CliRunner().invoke(main, list(words))
        assert result.exit_code == code, result.output
        return result.output

    own = ["--tokenizer", "taef2", "--tokenizer-weights", str(weights)]
    report = json.loads(
        call("encode", "-q", "--json", "-b", bank, *own, "--image-size", "16", "-o", "lat", "--dtype", "bf16")
    )
    assert (report["num_rows"], report["shape"], report["num_resumed"]) == (24, [32, 2, 2], 0)
    settings = [word for setting in TINY for word in ("--set", setting)]
    trained = json.loads(call("train", "-q", "--json", "-b", bank, "--latents", "lat", *settings))
    assert (trained["image_size"], trained["num_images"]) == (16, 24)
    call("sample", "-q", "-b", bank, "-n", "2", "--steps", "2", "-o", "grid.png")
    assert Path("grid.png").is_file()
    assert "24 latents of 32 × 2 × 2" in call(
        "encode", "-q", "-b", bank, *own, "--image-size", "16", "-o", "lat", "--dtype", "bf16"
    )
    assert "multiple of that, got 12" in call(
        "encode", "-q", "-b", bank, *own, "--image-size", "12", "-o", "lat", code=1
    )
    planned = json.loads(call("train", "--dry-run", "--json", "-b", bank, *own, *settings))
    assert (planned["data"]["tokenizer"], planned["model"]["patch_size"]) == ("taef2", 1)
