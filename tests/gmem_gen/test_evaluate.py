"""Evaluation: what is said of samples is true, the same twice, and refused where it would mean nothing."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image
from sklearn.datasets import load_digits

import gmem_bank
import gmem_gen
from gmem_bank import ConfigError, EncoderMismatchError, SourceError
from gmem_gen.cli import main
from gmem_gen.embedding_cache import EmbeddingCache
from gmem_gen.image_sets import embed, from_pixels
from gmem_gen.judgement import judge_concepts, judge_snippets
from gmem_gen.memorisation import nearest_others, vote
from gmem_gen.neighbours import neighbourhoods
from gmem_gen.outputs import no_progress


def write_digits(folder: Path, first: int, count: int) -> Path:
    """Digits 0 to 3 as class folders of 8×8 PNGs."""
    data = load_digits()
    chosen = np.flatnonzero(data.target < 4)[first : first + count]
    for index in chosen:
        target = folder / f"d{data.target[index]}"
        target.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.rint(data.images[index] * (255 / 16)).astype(np.uint8)).save(target / f"{index:04d}.png")
    return folder


@pytest.fixture
def bank(tmp_path: Path) -> Path:
    """A bank of hog snippets of 120 digits."""
    write_digits(tmp_path / "digits", 0, 120)
    gmem_bank.build("digits", gmem_bank.load_encoder("hog", parameters={"size": 16}), "bank.safetensors")
    return Path("bank.safetensors")


@pytest.fixture
def held_out(tmp_path: Path) -> Path:
    """Eighty other digits."""
    return write_digits(tmp_path / "held", 120, 80)


def pixels(space: str = "raw"):
    return gmem_bank.load_encoder("pixels", space=space, parameters={"size": 8})


OPTIONS = gmem_gen.EvaluationOptions(num=60, num_resamples=10)


def trained() -> str:
    settings = ["train.max_steps=2", "model.patch_size=2", "model.depth=1", "data.channels=1", "sample.num_steps=2"]
    gmem_gen.train("bank.safetensors", gmem_gen.apply_settings(gmem_gen.preset("nano"), settings))
    return "runs/bank"


# ---- What is embedded


def test_embeddings_are_those_of_a_bank_and_come_from_the_cache_only_unchanged(bank: Path, held_out: Path) -> None:
    """encode_images gives what a build stores; a cache of embeddings is used for the same pixels and encoder alone."""
    source = gmem_bank.open_images(held_out)
    images = [source.read(place) for place in range(len(source))]
    gmem_bank.build(held_out, pixels(), "held.safetensors")
    stored = gmem_bank.open("held.safetensors")
    assert source.keys == stored.keys(stored.rows())
    assert {name: places.tolist() for name, places in source.concepts.items()} == {
        name: stored.rows_of(name).tolist() for name in stored.names
    }
    found = gmem_bank.encode_images(pixels("unit"), images)
    assert np.array_equal(found, stored.snippets(stored.rows()))
    calls = []
    judge = pixels()
    encode = judge.encode
    judge.encode = lambda crops: calls.append(len(crops)) or encode(crops)
    made = from_pixels(np.stack(images), source.keys, "digits")
    for again, expected in ((False, 80), (True, 80)):
        values = embed(made, judge, EmbeddingCache(Path("cache")), progress=no_progress).values
        assert np.array_equal(values, found)
        assert sum(calls) == expected, again
    other = from_pixels(255 - np.stack(images), source.keys, "digits")
    assert not np.array_equal(embed(other, judge, EmbeddingCache(Path("cache")), progress=no_progress).values, found)
    assert sum(calls) == 160


def test_images_are_read_from_tar_files_and_arrays(held_out: Path) -> None:
    """As from their folder, with the same classes."""
    folder = gmem_bank.open_images(held_out)
    with tarfile.open("held.tar", "w") as archive:
        archive.add(held_out, arcname="")
    images = np.stack([folder.read(place) for place in range(len(folder))])
    np.savez("held.npz", arr_0=images)
    tar, array = gmem_bank.open_images("held.tar"), gmem_bank.open_images("held.npz")
    assert tar.keys == folder.keys
    assert set(tar.concepts) == set(folder.concepts) == {"d0", "d1", "d2", "d3"}
    assert array.concepts == {}
    for place in (0, 79):
        assert np.array_equal(tar.read(place), images[place])
        assert np.array_equal(array.read(place), images[place])


# ---- The parts


def test_votes_count_members_then_cosines_then_order() -> None:
    """Two of three neighbours decide; one each is decided by the nearer, and exact ties by order."""
    members = np.array([[1, 0], [0, 1], [0, 1], [1, 1]], bool)
    cases = [([0, 1, 2], [0.9, 0.5, 0.5], 1), ([0, 1], [0.8, 0.7], 0), ([1, 0], [0.8, 0.7], 1), ([0, 1], [0.5, 0.5], 0),
             ([3, 1], [0.1, 0.9], 1)]  # fmt: skip
    for found, cosines, expected in cases:
        votes = vote(np.array([cosines], np.float32), np.array([found]), members)
        assert votes.tolist() == [expected]


def test_neighbours_among_others_leave_themselves_out_among_equal_rows() -> None:
    """Copies are neighbours of each other at cosine 1; no row is its own."""
    rng = np.random.default_rng(0)
    rows = np.repeat(rng.normal(size=(5, 8)), 4, axis=0).astype(np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    cosines, found = nearest_others(rows, 2)
    assert np.allclose(cosines, 1, atol=1e-6)
    assert not (found == np.arange(20)[:, None]).any()
    assert (found // 4 == np.arange(20)[:, None] // 4).all()


def test_concepts_are_judged_by_the_real_images_around() -> None:
    """Three clusters, samples of one of them asked to be another: the table has them where they lie."""
    rng = np.random.default_rng(1)
    centres = np.eye(3, 6)
    rows = (np.repeat(centres, 20, axis=0) + rng.normal(size=(60, 6)) * 0.05).astype(np.float32)
    concepts = {name: np.arange(20) + 20 * place for place, name in enumerate("abc")}
    samples = np.repeat(centres[[0, 1, 1]], 10, axis=0).astype(np.float32)
    found = judge_concepts(samples, np.repeat([0, 1, 2], 10), rows, concepts, votes=5, num_resamples=10, seed=0)
    assert found.table.tolist() == [[10, 0, 0], [0, 10, 0], [0, 10, 0]]
    assert found.fidelity.value == pytest.approx(2 / 3)
    assert found.shares() == {"a": 1.0, "b": 1.0, "c": 0.0}
    assert dict(found.of_real) == {"a": 1.0, "b": 1.0, "c": 1.0}


def test_snippets_are_compared_with_their_own_and_with_others() -> None:
    """Orthogonal snippets: 1 with their own, 0 with any other."""
    snippets = np.eye(12, dtype=np.float32)
    found = judge_snippets(snippets, 3 * snippets, (snippets, np.roll(snippets, 1, axis=0)), num_resamples=5, seed=0)
    assert (found.cosine.value, found.shuffled, found.of_real) == (1.0, 0.0, 0.0)


# ---- The whole


def test_two_runs_give_the_same_json_and_a_page_that_needs_nothing(bank: Path) -> None:
    """Samples of a checkpoint, drawn once: the second run reads them, and what was embedded, and says the same."""
    run, texts = trained(), []
    for out in ("one", "two", "one"):
        report = gmem_gen.evaluate(bank, pixels(), checkpoint=run, options=OPTIONS, out=out)
        gmem_gen.write_report(report, out)
        texts.append((Path(out) / "report.json").read_text())
    assert texts[0] == texts[1] == texts[2]
    record = json.loads(texts[0])
    assert record["samples"]["count"] == 60
    assert record["samples"]["sampling"]["step"] == 2
    assert record["judge"]["circular"] is False
    assert record["distribution"]["frechet"]["rank_deficient"] is True
    assert np.array(record["concepts"]["confusion"]).sum() == 60
    assert record["snippets"]["of_real_images"] > 0.999
    assert str(Path.cwd()) not in texts[0]
    page = (Path("one") / "report.html").read_text()
    assert "<script" not in page
    assert "http" not in page.replace("http-equiv", "").replace("http://www.w3.org", "")
    assert page.count("<img") >= 60 + 2 * 10
    with np.load("one/samples.npz") as arrays:
        assert arrays["arr_0"].shape == (60, 8, 8, 1)


def test_training_images_given_as_samples_are_found_out(bank: Path, held_out: Path) -> None:
    """Copies: distance 0, precision 1, all of them near-copies; held-out digits: about as near as real images are."""
    copies = gmem_gen.evaluate(bank, pixels(), samples="digits", reference=held_out, options=OPTIONS)
    assert copies.memorisation.near_copies.value == 1.0
    assert copies.memorisation.distances.max() < 1e-6
    assert copies.memorisation.neighbours.tolist() == list(range(120))
    strangers = gmem_gen.evaluate(bank, pixels(), samples=held_out, options=OPTIONS)
    assert strangers.memorisation.near_copies.value < 0.1
    assert copies.memorisation.held_out == pytest.approx(strangers.memorisation.distances)
    assert strangers.concepts.fidelity.value > 0.9  # class folders say what was asked for
    same = gmem_gen.evaluate(bank, pixels(), samples="digits", options=OPTIONS)
    assert same.distribution.frechet.value < 1e-6
    assert same.distribution.measures["precision"].value == 1.0
    assert any("were trained on" in remark for remark in same.remarks)


def test_a_bank_is_a_reference_like_its_images(bank: Path, held_out: Path) -> None:
    """Its rows give what embedding its images at their own size gives; the label says unit space; no encoder has to be named."""
    gmem_bank.build(held_out, pixels("unit"), "held.safetensors")
    options = gmem_gen.EvaluationOptions(num_resamples=0, match_size=False, space="unit")
    by_bank = gmem_gen.evaluate(None, samples="digits", reference="held.safetensors", options=options)
    by_images = gmem_gen.evaluate(None, pixels(), samples="digits", reference=held_out, options=options)
    assert by_bank.distribution.frechet.value == pytest.approx(by_images.distribution.frechet.value, rel=1e-6)
    assert by_bank.distribution.to_json()["recall"] == by_images.distribution.to_json()["recall"]
    assert by_bank.judge["space"] == "unit"
    assert any("length 1" in remark for remark in by_bank.remarks)
    with pytest.raises(ConfigError, match="lost their length"):
        gmem_gen.evaluate(
            None, samples="digits", reference="held.safetensors", options=gmem_gen.EvaluationOptions(space="raw")
        )
    samples, real = (gmem_bank.open_images(folder) for folder in ("digits", held_out))
    raw = [
        gmem_bank.encode_images(pixels(), [source.read(place) for place in range(len(source))])
        for source in (samples, real)
    ]
    unit = [rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in raw]
    expected = {name: values.mean() for name, values in neighbourhoods(*unit).measures().items()}
    assert {name: e.value for name, e in by_images.distribution.measures.items()} == pytest.approx(expected)


def test_what_means_nothing_is_refused(bank: Path, held_out: Path, tmp_path: Path) -> None:
    """An empty folder, too few samples, sizes that are mixed, a bank of another encoder, no reference, an absent concept."""
    gmem_bank.build(held_out, gmem_bank.load_encoder("random-projection"), "other.safetensors")
    few = write_digits(tmp_path / "few", 0, 20)
    (tmp_path / "empty").mkdir()
    mixed = write_digits(tmp_path / "mixed", 0, 60)
    Image.new("RGB", (16, 16)).save(mixed / "large.png")
    np.savez("statistics.npz", mu=np.zeros(64), sigma=np.eye(64))
    Path("cut.npz").write_bytes(Path("statistics.npz").read_bytes()[:100])
    run = trained()
    cases = [
        ({"samples": "empty"}, SourceError, "no images"),
        ({"samples": few}, ConfigError, "20 samples, fewer than 50"),
        ({"samples": mixed}, ConfigError, "different sizes"),
        ({"samples": "digits", "reference": "other.safetensors"}, EncoderMismatchError, "random-projection.*pixels"),
        ({"samples": "digits", "reference": "statistics.npz"}, ConfigError, "an encoder that it does not name"),
        ({"samples": "digits", "reference": few}, ConfigError, "20 real images"),
        ({"checkpoint": run, "concepts": ["d9"]}, gmem_bank.UnknownKeyError, "d9"),
        ({"samples": "statistics.npz"}, ConfigError, "an encoder that it does not name"),
        ({"samples": "cut.npz"}, SourceError, "cut short.*again"),
        ({"samples": "other.safetensors"}, ConfigError, "is a bank, which has no samples"),
        ({}, ConfigError, "either a checkpoint"),
    ]
    for arguments, error, words in cases:
        with pytest.raises(error, match=words):
            gmem_gen.evaluate(bank, pixels(), options=OPTIONS, **arguments)
    with pytest.raises(ConfigError, match=r"nothing to compare.*--reference"):
        gmem_gen.evaluate(None, pixels(), samples="digits", options=OPTIONS)
    for setting in ({"num": 49}, {"space": "both"}, {"near_copy": 3.0}, {"num_real": 3}, {"votes": 0}):
        with pytest.raises(ConfigError):
            gmem_gen.EvaluationOptions(**setting)


def test_images_that_are_gone_leave_the_rest_of_the_report(bank: Path, held_out: Path) -> None:
    """Without training images memorisation is not judged, and the report says why."""
    Path("digits").rename("moved")
    report = gmem_gen.evaluate(bank, pixels(), samples=held_out, reference="moved", options=OPTIONS)
    assert report.memorisation is None
    assert any("Memorisation was not judged" in remark for remark in report.remarks)
    assert "digits" not in json.dumps(report.to_json())
    given = gmem_gen.evaluate(bank, pixels(), samples=held_out, images="moved", options=OPTIONS)
    assert given.memorisation is not None


def test_an_encoder_that_is_gone_costs_its_part_only(bank: Path, held_out: Path) -> None:
    """The bank's own encoder is asked for once all else is done: the rest of the report stands."""

    def gone(made):
        raise gmem_bank.EncoderError("the weights are gone")

    said: list[str] = []
    report = gmem_gen.evaluate(
        bank, pixels(), checkpoint=trained(), reference=held_out, options=OPTIONS, load_own=gone, say=said.append
    )
    assert report.faithfulness is None
    assert any("not compared with their snippets" in remark for remark in report.remarks)
    assert any("the weights are gone" in text for text in said)
    assert report.memorisation is not None


def test_the_command_draws_as_many_of_each_concept(bank: Path, held_out: Path) -> None:
    """Two concepts share the samples; JSON on stdout, remarks on stderr; a folder of somebody else's is left alone."""
    run = trained()
    words = ["evaluate", "-b", "bank.safetensors", "-e", "pixels", "--set", "size=8", "--set", "sample.num_steps=1", "-n", "51",
             "--concept", "d1", "--concept", "d3", "-r", str(held_out), "--bootstrap", "0", "--json", "-q"]  # fmt: skip
    result = CliRunner().invoke(main, [*words, "-c", run])
    assert result.exit_code == 0, result.output
    record = json.loads(result.stdout)
    assert np.array(record["concepts"]["confusion"]).sum(axis=1).tolist() == [0, 26, 0, 25]
    assert record["samples"]["sampling"]["sample.num_steps"] == 1
    assert record["distribution"]["frechet"]["low"] is None
    assert (Path(run) / "evaluation" / "report.html").is_file()
    assert "rank-deficient" in result.stderr
    refused = CliRunner().invoke(main, [*words, "--out", str(held_out)])
    assert refused.exit_code == 1
    assert "holds other files" in refused.output


def test_keys_and_concepts_are_text_on_the_page(tmp_path: Path, held_out: Path) -> None:
    """Markup in a folder's name stays text."""
    held_out.joinpath("d0").rename(held_out / "<b>&x")
    report = gmem_gen.evaluate(None, pixels(), samples=held_out, reference=held_out, options=OPTIONS)
    page = gmem_gen.write_report(report, "out")[1].read_text()
    assert "<b>&x" not in page
    assert "&lt;b&gt;&amp;x" in page
