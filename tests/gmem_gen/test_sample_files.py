"""Samples in files: exact counts, one seed an image, and the same call goes on where it was killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import gmem_bank
import gmem_gen
from gmem_bank.errors import ConfigError, OutputExistsError, WriteError
from gmem_gen import array_store, folder_store, sampling
from gmem_gen.array_store import ArrayStore
from gmem_gen.config import Config, DataConfig, ModelConfig, TrainConfig
from gmem_gen.sample_files import SampleFiles, sample_to

SETTINGS = {"num_steps": 2, "batch_size": 3}


@pytest.fixture
def setting(photos: Path):
    """A bank and a tiny generator; gives a function that samples 8 images of a concept into files."""
    gmem_bank.build(photos, gmem_bank.load_encoder("hog"), "bank.safetensors")
    config = Config(
        data=DataConfig(image_size=8), model=ModelConfig(width=16, depth=1, num_heads=2),
        train=TrainConfig(max_steps=20, batch_size=8, num_threads=1),
    )  # fmt: skip
    gmem_gen.train("bank.safetensors", config)
    bank, loaded = gmem_bank.open("bank.safetensors"), gmem_gen.load_checkpoint("runs/bank")
    conditions = gmem_gen.choose_conditions(bank, concept="hat", keys=(), num=8, per_snippet=1, seed=0)

    def run(files: SampleFiles, options: dict | None = None, **more: object) -> gmem_gen.SampleReport:
        return sample_to(
            files, bank, loaded, conditions, gmem_gen.SampleConfig(**{**SETTINGS, **(options or {})}), **more
        )

    run.expected = gmem_gen.sample(bank, loaded, conditions, gmem_gen.SampleConfig(**SETTINGS)).images
    run.keys = conditions.keys
    return run


def kept(folder: str) -> np.ndarray:
    """The images of a folder, which must be exactly 000000.png to 000007.png."""
    names = sorted(path.name for path in Path(folder).glob("*.png"))
    assert names == [f"{i:06d}.png" for i in range(8)]
    return np.stack([np.asarray(Image.open(Path(folder) / name)) for name in names])


def test_every_output_holds_the_samples_and_a_record_beside_it(setting) -> None:
    """Grid, folder and .npz have the same pixels; each record says sampler, NFE, seed, precision, fingerprints, versions."""
    files = SampleFiles(grid=Path("g.png"), folder=Path("all"), npz=Path("a.npz"), columns=3)
    report = setting(files)
    assert (report.num_images, report.num_drawn, report.complete) == (8, 8, True)
    np.testing.assert_array_equal(kept("all"), setting.expected)
    with np.load("a.npz", allow_pickle=False) as arrays:
        assert arrays["arr_0"].dtype == np.uint8
        np.testing.assert_array_equal(arrays["arr_0"], setting.expected)
        np.testing.assert_array_equal(arrays["arr_1"], [1] * 8)
    grid = np.asarray(Image.open("g.png"))
    np.testing.assert_array_equal(grid[2 : 2 + 64 : 8, 2 + 66 : 2 + 66 + 64 : 8], setting.expected[1])
    for place in ("g.json", "all/samples.json", "a.npz.json"):
        record = json.loads(Path(place).read_text())
        for name in ("method", "num_steps", "guidance", "seed", "precision", "bank", "trained_on", "tokenizer", "versions",
                     "weights_step", "device"):  # fmt: skip
            assert name in record, name
        assert (record["nfe"], record["evaluations_per_image"], record["num_images"]) == (4, 4, 8)
        assert record["keys"] == setting.keys
        assert record["classes"][1] == "hat"
    assert not list(Path().glob(".a.npz*"))
    with zipfile.ZipFile("a.npz") as archive:
        assert archive.testzip() is None


@pytest.mark.parametrize("what", ["folder", "npz"])
@pytest.mark.parametrize("stopped_after", [1, 2])
def test_the_same_call_draws_only_what_is_missing(setting, monkeypatch, what: str, stopped_after: int) -> None:
    """Stopped in the middle and taken up with another batch size: the same images, none drawn twice, none too many."""
    files = SampleFiles(**{what: Path("all" if what == "folder" else "a.npz")})
    Path("all").mkdir()
    Path("all/..gmem-samples.1.tmp").touch()  # killed before the plan was written
    honest, drawn = sampling.draw, []

    def until(*arguments):
        for number, batch in enumerate(honest(*arguments)):
            if number == stopped_after:
                raise KeyboardInterrupt
            drawn.extend(batch.places.tolist())
            yield batch

    monkeypatch.setattr("gmem_gen.sample_files.draw", until)
    with pytest.raises(KeyboardInterrupt):
        setting(files)
    assert not Path("a.npz").exists() and not Path("all/samples.json").exists()
    monkeypatch.setattr("gmem_gen.sample_files.draw", honest)
    report = setting(files, {"batch_size": 2})
    assert (report.num_drawn, report.complete) == (8 - 3 * stopped_after, True)
    images = kept("all") if what == "folder" else np.load("a.npz")["arr_0"]
    assert np.abs(images.astype(int) - setting.expected).max() <= 1
    assert what == "npz" or not list(Path("all").glob("*.tmp"))
    assert (report.record["nfe"], report.record["evaluations_per_image"]) == (4, 4)
    again = setting(files)
    assert (again.num_drawn, again.complete, again.record["nfe"]) == (0, True, 4)


def test_what_is_complete_in_one_place_is_drawn_again_for_another(setting) -> None:
    """An .npz that is whole stays as it is while a folder is filled; a grid of its name never touches its record."""
    setting(SampleFiles(npz=Path("a.npz")))
    before, record = Path("a.npz").read_bytes(), Path("a.npz.json").read_bytes()
    assert setting(SampleFiles(npz=Path("a.npz"), folder=Path("all"))).num_drawn == 8
    np.testing.assert_array_equal(kept("all"), setting.expected)
    setting(SampleFiles(grid=Path("a.png")), {"seed": 9})
    assert (Path("a.npz").read_bytes(), Path("a.npz.json").read_bytes()) == (before, record)
    assert json.loads(Path("a.json").read_text())["seed"] == 9


def test_processes_share_a_folder_and_an_npz(setting) -> None:
    """Each draws its own samples; whoever is last finishes; the images are those of one process."""
    files = SampleFiles(folder=Path("all"), npz=Path("a.npz"), grid=Path("g.png"))
    first = setting(files, num_shards=3, shard=2)
    assert (first.num_drawn, first.complete, first.outputs) == (2, False, [])
    assert not Path("a.npz").exists() and not Path("g.png").exists()
    assert setting(files, num_shards=3, shard=0).num_drawn == 3
    last = setting(files, num_shards=3, shard=1)
    assert last.complete and last.record["nfe"] == 4
    for images in (kept("all"), np.load("a.npz")["arr_0"]):
        assert np.abs(images.astype(int) - setting.expected).max() <= 1
    for options in ({"num_shards": 2, "shard": 2}, {"num_shards": 1, "shard": -1}):
        with pytest.raises(ConfigError, match="shard must be"):
            setting(files, **options)


def test_samples_made_otherwise_never_mix(setting) -> None:
    """Another seed, method or bank in the same place is refused and named; with overwrite it takes the whole place."""
    files = SampleFiles(folder=Path("all"), npz=Path("a.npz"))
    setting(files)
    for place in (SampleFiles(folder=Path("all")), SampleFiles(npz=Path("a.npz"))):
        with pytest.raises(OutputExistsError, match=r"sample\.seed was 0, is 5.*--overwrite"):
            setting(place, {"seed": 5})
    np.testing.assert_array_equal(kept("all"), setting.expected)
    report = setting(files, {"seed": 5}, overwrite=True)
    assert report.num_drawn == 8
    assert np.abs(kept("all").astype(int) - setting.expected).max() > 10
    np.testing.assert_array_equal(np.load("a.npz")["arr_0"], kept("all"))
    assert json.loads(Path("a.npz.json").read_text())["seed"] == 5


def test_what_is_not_ours_is_never_replaced(setting) -> None:
    """Somebody's pictures, arrays and texts; wrong endings; nowhere to put samples."""
    Path("mine").mkdir()
    Path("mine/000000.png").write_text("precious")
    np.savez("theirs.npz", arr_0=np.zeros(3))
    Path("a.npz.json").write_text("{}")
    for files, answer in (
        (SampleFiles(folder=Path("mine")), "--save-images"),
        (SampleFiles(npz=Path("theirs.npz")), "no samples of ours"),
        (SampleFiles(npz=Path("a.npz")), "no samples of ours"),
    ):
        for overwrite in (False, True):
            with pytest.raises(OutputExistsError, match=answer):
                setting(files, overwrite=overwrite)
    assert Path("mine/000000.png").read_text() == "precious"
    assert np.load("theirs.npz")["arr_0"].shape == (3,)
    with pytest.raises(ConfigError, match=r"is an \.npz file"):
        setting(SampleFiles(npz=Path("a.npy")))
    with pytest.raises(ConfigError, match="nowhere to put"):
        setting(SampleFiles())


def test_a_full_disk_keeps_what_was_drawn(setting, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the middle of a folder, and before an .npz is begun; the same call goes on when there is room."""
    honest, written = folder_store.replace_file, []

    def full(path: Path, write: object) -> None:
        written.append(path)
        if len(written) > 4:
            raise OSError(28, "No space left on device", str(path))
        honest(path, write)

    monkeypatch.setattr(folder_store, "replace_file", full)
    with pytest.raises(WriteError, match=r"could not write samples to all.*No space left"):
        setting(SampleFiles(folder=Path("all")))
    monkeypatch.setattr(folder_store, "replace_file", honest)
    report = setting(SampleFiles(folder=Path("all")))
    assert 0 < report.num_drawn < 8
    assert np.abs(kept("all").astype(int) - setting.expected).max() <= 1

    class Full(zipfile.ZipFile):
        def open(self, *arguments: object, **options: object) -> object:
            raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(array_store.zipfile, "ZipFile", Full)
        with pytest.raises(WriteError, match="No space left"):
            setting(SampleFiles(npz=Path("a.npz")))
    assert setting(SampleFiles(npz=Path("a.npz"))).complete


def test_an_npz_is_what_numpy_would_have_written(tmp_path: Path) -> None:
    """Entries, values and checksums, for grey and colour and more than one chunk; zip64 headers do not disturb readers."""
    images = np.random.default_rng(0).integers(0, 256, (6, 700, 900, 3), np.uint8)
    assert images.nbytes > 2 * array_store.CHUNK
    store = ArrayStore(tmp_path / "x.npz", {"seed": 1}, images.shape, np.arange(6))
    for place in (5, 0, 3, 1, 4, 2):
        store.write(np.array([place]), images[[place]])
    store.finish({"nfe": 1, "plan": {"seed": 1}})
    with np.load(tmp_path / "x.npz", allow_pickle=False) as arrays:
        assert arrays.files == ["arr_0", "arr_1"]
        np.testing.assert_array_equal(arrays["arr_0"], images)
        np.testing.assert_array_equal(arrays["arr_1"], np.arange(6))
    np.testing.assert_array_equal(ArrayStore(tmp_path / "x.npz", {"seed": 1}, images.shape).read(3), images[3])


def test_a_finished_command_says_that_nothing_was_left_to_do(setting) -> None:
    """No other processes where there was one, no seconds where nothing was drawn."""
    from click.testing import CliRunner

    from gmem_gen.cli import main

    words = ["sample", "--concept", "hat", "-n", "3", "--steps", "1", "--save-images", "some", "-o", "grid.png", "-q"]
    first, again = (CliRunner().invoke(main, words).stdout for _ in range(2))
    assert first.startswith("grid.png: 3 samples of 'hat', NFE 2, ")
    assert again == "grid.png: all 3 samples of 'hat' were there already, NFE 2\n"


def half_drawn(seed: int, *, overwrite: bool = False) -> ArrayStore:
    """A store of x.npz, with room for two samples, the first of which is drawn and has the seed for pixels."""
    store = ArrayStore(Path("x.npz"), {"seed": seed}, (2, 4, 4, 3), overwrite=overwrite)
    store.write(np.array([0]), np.full((1, 4, 4, 3), seed, np.uint8))
    store.tally("0-of-1", {"images": 1, "evaluations": 4, "nfe": 4})
    return store


def test_an_unfinished_npz_is_not_thrown_away_by_another_plan() -> None:
    """It is refused, saying what differs, as a finished one is; the first plan goes on; --overwrite begins anew."""
    half_drawn(7)
    with pytest.raises(OutputExistsError, match=r"seed was 7, is 9.*--overwrite"):
        half_drawn(9)
    assert ArrayStore(Path("x.npz"), {"seed": 7}, (2, 4, 4, 3)).done().tolist() == [True, False]
    assert ArrayStore(Path("x.npz"), {"seed": 9}, (2, 4, 4, 3), overwrite=True).done().tolist() == [False, False]


def test_calls_with_other_plans_never_finish_each_others_npz() -> None:
    """One whose place was taken says so, whether the other is at work, begun again, or finished; no record lies."""
    first, second = half_drawn(7), half_drawn(9, overwrite=True)
    first.write(np.array([1]), np.full((1, 4, 4, 3), 7, np.uint8))
    first.tally("0-of-1", {"images": 1, "evaluations": 4, "nfe": 4})
    assert second.tally("", {}) == {"images": 1, "evaluations": 4, "nfe": 4}
    with pytest.raises(OutputExistsError, match=r"x\.npz: another call"):
        first.finish({"nfe": 1, "plan": first.plan})
    assert not Path("x.npz").exists() and not Path("x.npz.json").exists()
    third = half_drawn(7, overwrite=True)  # the plan of the first, and not its file
    with pytest.raises(OutputExistsError, match="another call"):
        first.finish({"nfe": 1, "plan": first.plan})
    third.write(np.array([1]), np.full((1, 4, 4, 3), 7, np.uint8))
    twin = ArrayStore(Path("x.npz"), {"seed": 7}, (2, 4, 4, 3))
    third.finish({"nfe": 1, "plan": third.plan})
    assert twin.finish({"nfe": 1, "plan": twin.plan}) == [Path("x.npz"), Path("x.npz.json")]
    with pytest.raises(OutputExistsError, match="another call"):
        second.finish({"nfe": 1, "plan": second.plan})
    with np.load("x.npz") as arrays:
        assert arrays["arr_0"][:, 0, 0, 0].tolist() == [7, 7]
    assert json.loads(Path("x.npz.json").read_text())["plan"] == {"seed": 7}
    assert not list(Path().glob(".x.npz*"))


@pytest.mark.slow
def test_kill_9_at_any_moment_loses_no_whole_batch(setting) -> None:
    """The command is killed again and again; in the end there are exactly as many images, those of one run."""
    command = [
        sys.executable, "-m", "gmem_gen", "sample", "--concept", "hat", "-n", "120", "--steps", "20", "--batch-size", "2",
        "--save-images", "all", "--npz", "a.npz", "--device", "cpu", "-q",
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    kills = 0
    for drawn in (10, 40, 70):
        process = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        while process.poll() is None and len(list(Path("all").glob("*.png"))) < drawn:
            time.sleep(0.002)
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            kills += 1
        process.wait()
    subprocess.run(command, check=True, env=environment, capture_output=True)
    assert kills == 3
    whole = [*command[:-5], "--npz", "b.npz", "--device", "cpu", "-q"]
    whole[whole.index("all")] = "once"
    subprocess.run(whole, check=True, env=environment, capture_output=True)
    assert len(list(Path("all").glob("*.png"))) == 120
    with np.load("a.npz") as killed, np.load("b.npz") as once:
        assert np.abs(killed["arr_0"].astype(int) - once["arr_0"]).max() <= 1
