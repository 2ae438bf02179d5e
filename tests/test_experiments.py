"""The experiments' own machinery: cells are computed once, sections are written from figures."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import gmem_bank
import gmem_gen
from gmem_gen.judgement import cosines_of
from tools import experiment_backbones, experiment_insertion, experiments
from tools.experiment_composition import METHODS, blend, packed, pairs, shares, snippets_of, unpacked
from tools.experiment_data import EncoderChoice, Images, choose_encoder, digits
from tools.experiment_encoders import known, majority
from tools.experiment_generalisation import ASKED, Generalisation, snippets_asked
from tools.experiment_judging import RealImages, embedded
from tools.experiment_kit import Cells, save_pictures, trained, write_section
from tools.experiment_networks import captions, train_classifier
from tools.experiment_size import _reduced
from tools.experiment_speed import ratios


def test_a_cell_is_computed_once_for_its_settings(tmp_path: Path) -> None:
    """Other settings are another cell; a cell that failed is computed again."""
    calls = []

    def compute(work: Path) -> dict:
        calls.append(work)
        if len(calls) == 1:
            raise RuntimeError
        return {"figure": len(calls)}

    cells = Cells(tmp_path)
    with pytest.raises(RuntimeError):
        cells.get("a", {"steps": 1}, compute)
    assert cells.get("a", {"steps": 1}, compute)["figure"] == 2
    assert Cells(tmp_path).get("a", {"steps": 1}, compute)["figure"] == 2
    assert cells.get("a", {"steps": 2}, compute)["figure"] == 3


def test_a_section_replaces_itself_and_nothing_else(tmp_path: Path) -> None:
    """Written twice it is there once, in its place."""
    page = tmp_path / "RESULTS.md"
    for name, text in (("a", "first"), ("b", "second"), ("a", "third"), ("a", "third")):
        write_section(name, text, page)
    assert page.read_text().split("<!-- a -->")[1].split("<!-- end of a -->")[0].strip() == "third"
    assert page.read_text().count("second") == 1
    assert "first" not in page.read_text()
    assert page.read_text().index("third") < page.read_text().index("second")
    before = page.read_bytes()
    write_section("a", "third", page)
    assert page.read_bytes() == before
    assert b"<!-- end of a -->\n\n<!-- b -->" in before


def test_ratios_are_of_steps_to_the_baselines_best() -> None:
    """The best of 'classes' is 3, at 400 steps, which the memory has at 100; 'nothing' has 1, which it never reaches."""
    curves = {"memory": (3, 2.5, 2), "classes": (9, 5, 3), "nothing": (9, 5, 1)}
    rows = [
        {"model": name, "step": step, "frechet": value}
        for name, values in curves.items()
        for step, value in zip((100, 200, 400), values, strict=True)
    ]
    assert ratios(rows) == {"classes": 4.0, "nothing": None}


def test_shares_count_samples_with_both_parents_near() -> None:
    """Of four samples two have 0 and 6 near; the third and fourth have more of the 3 than of either parent."""
    near = np.array([["0", "6", "3"], ["6", "0", "0"], ["3", "3", "0"], ["3", "3", "3"]])
    assert shares(near, "0", "6") == {"both": 0.5, "elsewhere": 0.5}
    assert shares(near[:2, :2], "0", "6") == {"both": 1.0, "elsewhere": 0.0}


def test_every_class_is_paired_twice() -> None:
    """Ten classes, ten pairs, all around."""
    found = pairs([str(digit) for digit in range(10)], 3)
    assert found[:2] == [("0", "3"), ("1", "4")]
    assert found[-1] == ("9", "2")
    assert sorted(name for pair in found for name in pair) == sorted(2 * [str(digit) for digit in range(10)])
    with pytest.raises(SystemExit, match="give 1 to 9"):
        pairs([str(digit) for digit in range(10)], 10)


def test_a_blend_is_the_mean_of_pixels_without_overflow() -> None:
    """250 and 252 give 251, not what 8 bits would leave of their sum; pictures survive JSON."""
    mean = blend(np.full((2, 2, 3), 250, np.uint8), np.full((2, 2, 3), 252, np.uint8))
    assert mean.dtype == np.uint8
    assert (mean == 251).all()
    noise = np.random.default_rng(0).integers(0, 256, (5, 4, 3), np.uint8)
    assert (unpacked(json.loads(json.dumps(packed(noise)))) == noise).all()


def test_snippets_half_way_are_of_each_pair_of_rows(tmp_path: Path) -> None:
    """Linear ones are what `compose` makes of "a + b"; mixed dimensions come from one of the two; parents are rows as they are."""
    np.save(tmp_path / "rows.npy", np.random.default_rng(0).normal(size=(8, 6)).astype(np.float32))
    gmem_bank.build_precomputed(gmem_bank.read_array(tmp_path / "rows.npy"), tmp_path / "bank.safetensors")
    bank = gmem_bank.open(tmp_path / "bank.safetensors")
    keys = [bank.keys(np.arange(3)), bank.keys(np.arange(3, 6))]
    a, b = (snippets_of(bank, way, keys, 0) for way in ("first parent", "second parent"))
    np.testing.assert_array_equal(np.concatenate([a, b]), bank.snippets(np.arange(6)))
    composed = [gmem_bank.compose_snippet(bank, {one: 1.0, other: 1.0}) for one, other in zip(*keys, strict=True)]
    np.testing.assert_allclose(snippets_of(bank, "linear", keys, 0), composed, atol=1e-6)
    concatenated = np.concatenate([a[:, :3], b[:, 3:]], axis=1)
    concatenated /= np.linalg.norm(concatenated, axis=1, keepdims=True)
    np.testing.assert_allclose(snippets_of(bank, "concat", keys, 0), concatenated, atol=1e-6)
    for way in METHODS:
        np.testing.assert_allclose(np.linalg.norm(snippets_of(bank, way, keys, 0), axis=1), 1, atol=1e-6)


def test_real_images_vote_and_classify(tmp_path: Path) -> None:
    """Bars that stand and bars that lie: each image is nearest to itself, and a classifier knows copies from wrong folders."""
    rng = np.random.default_rng(0)
    for index in range(16):
        pixels = rng.integers(0, 60, (8, 8), np.uint8)
        name = ("lying", "standing")[index % 2]
        pixels[(slice(2, 5), slice(None))[:: 1 if name == "lying" else -1]] += 190
        for folder, label in (("real", name), ("right", name), ("wrong", "standing")):
            (tmp_path / folder / label).mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(tmp_path / folder / label / f"{index:02d}.png")
    choice = EncoderChoice(name="pixels", parameters={"size": 8})
    real, judge = RealImages(choice, tmp_path / "real"), choice.load("raw")
    assert real.classified(tmp_path / "right") == 1.0
    assert real.classified(tmp_path / "wrong") == 0.5
    source = gmem_bank.open_images(tmp_path / "real")
    near = real.classes_near([source.read(place) for place in range(len(source))], 8)
    assert (near == embedded(judge, tmp_path / "real")[1][:, None]).all()


def test_both_judges_have_columns_and_a_ratio() -> None:
    """Votes and classifier, each with its control."""
    names = ("seen", "trained on", "not inserted", "projected", "basis grown")
    row = {"class": "0", **dict.fromkeys(names, 0.5), **{f"{name}: classifier": 0.25 for name in names}}
    said = experiment_insertion.words({"rows": [row], "share_of_seen": 1.0, "share_of_seen_classified": 0.75})
    assert said.count("(classifier)") == 5
    assert said.endswith("1; by the classifier: 0.75.")


def bars(folder: Path, count: int = 12) -> Images:
    """Noise with a bar that stands or lies, in two halves."""
    rng = np.random.default_rng(0)
    for half in ("train", "held-out"):
        for index in range(count):
            pixels = rng.integers(0, 60, (8, 8), np.uint8)
            name = ("lying", "standing")[index % 2]
            pixels[(slice(2, 5), slice(None))[:: 1 if name == "lying" else -1]] += 190
            (folder / half / name).mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(folder / half / name / f"{index:02d}.png")
    hog = EncoderChoice(name="hog", parameters={"size": 16})
    return Images(name="digits", train=folder / "train", held_out=folder / "held-out", taught=folder / "train", encoder=hog,
                  training=(), settings={"bars": count})  # fmt: skip


def test_captions_say_light_tint_and_class() -> None:
    """A dark grey, a plain red and a bright blue picture of classes 1, 0 and 2; tokens after begin (0), and end (1)."""
    colours = np.array([[10, 10, 10], [150, 90, 90], [200, 200, 255]], np.uint8)
    images = np.broadcast_to(colours[:, None, None], (3, 4, 4, 3))
    words = ["begin", "end", "dark", "plain", "bright", "grey", "red", "green", "blue", "class 0", "class 1", "class 2"]
    said = [[words[token] for token in row] for row in captions(images, np.array([1, 0, 2])).tolist()]
    assert said == [
        ["begin", "dark", "grey", "class 1", "end"],
        ["begin", "plain", "red", "class 0", "end"],
        ["begin", "bright", "blue", "class 2", "end"],
    ]


def test_a_trained_classifier_is_an_encoder_that_tells_classes_apart(tmp_path: Path) -> None:
    """Red and blue noise: ten batches are enough; the folder is read like any other, and the same seed gives the same weights."""
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 120, (80, 8, 8, 3), np.uint8), np.arange(80) % 2
    images[labels == 0, ..., 0] += 120
    images[labels == 1, ..., 2] += 120
    for name in ("first", "again"):
        train_classifier(images, labels, tmp_path / name, steps=10)
    encoders = [
        EncoderChoice(name=f"hf:{tmp_path / name}", parameters={"preset": "native", "dtype": "fp32"}).load()
        for name in ("first", "again")
    ]
    found = gmem_bank.encode_images(encoders[0], list(images))
    assert encoders[0].spec.weights_sha256 == encoders[1].spec.weights_sha256
    means = np.stack([found[labels == label].mean(axis=0) for label in (0, 1)])
    nearer = np.linalg.norm(found[:, None] - means, axis=2).argmin(axis=1)
    assert (nearer == labels).mean() > 0.95


def test_snippets_asked_are_rows_midpoints_or_of_held_out_images(tmp_path: Path) -> None:
    """Rows are in the bank; what lies between is equally far from two rows of one class, or of two; held-out ones are in no bank."""
    images, config = bars(tmp_path), Generalisation(num=6)
    bank = images.build(images.train, tmp_path / "bank.safetensors")
    stored = bank.snippets(np.arange(len(bank)))
    classes = np.array([key.partition("/")[0] for key in bank.keys(np.arange(len(bank)))])
    asked = {name: snippets_asked(config, images, bank, name) for name in ASKED}
    for name, found in asked.items():
        np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-6)
        assert (stored @ found.T).max(axis=0).min() > (1 - 1e-6 if name == "rows of the bank" else 0)
        np.testing.assert_array_equal(found, snippets_asked(config, images, bank, name))
    assert (stored @ asked["held-out images"].T).max() < 1 - 1e-4
    sums = {(a, b): stored[a] + stored[b] for a in range(12) for b in range(a)}
    middles = {pair: total / np.linalg.norm(total) for pair, total in sums.items()}
    for name, same in (("between rows of a class", True), ("between two classes", False)):
        for snippet in asked[name]:
            (a, b), _ = max(middles.items(), key=lambda item: float(item[1] @ snippet))
            np.testing.assert_allclose(middles[a, b], snippet, atol=1e-5)
            assert (classes[a] == classes[b]) == same
    assert cosines_of(stored, stored) == pytest.approx(np.ones(12))
    assert cosines_of(stored[:1], -3 * stored[:1]) == pytest.approx([-1])


def test_smaller_banks_hold_rows_of_the_whole_one(tmp_path: Path) -> None:
    """By chance or as a coreset; another seed draws others, into another file."""
    images, cells = bars(tmp_path), Cells(tmp_path / "cells")
    whole = images.build(images.train, tmp_path / "bank.safetensors")
    keys = {}
    for kept, seed in (("at random", 0), ("at random", 1), ("coreset", 0)):
        bank = gmem_bank.open(_reduced(cells, Path(whole.path), 5, kept, seed))
        keys[kept, seed] = bank.keys(np.arange(len(bank)))
        assert len(set(keys[kept, seed]) & set(whole.keys(np.arange(12)))) == 5
    assert keys["at random", 0] != keys["at random", 1]


def test_what_an_encoder_knows_is_voted_by_rows(tmp_path: Path) -> None:
    """Standing and lying bars are known by their gradients; of equally many votes the nearest counts."""
    images = bars(tmp_path)
    images.build(images.train, tmp_path / "bank.safetensors")
    assert known(images, tmp_path / "bank.safetensors", 3) == 1.0
    assert majority(["b", "a", "a", "b"]) == "b"
    assert majority(["b", "a", "a"]) == "a"


def test_pictures_are_written_grey_or_in_colour_without_old_ones(tmp_path: Path) -> None:
    """Into folders of their classes; what lay there before is gone."""
    grey, colour = (np.random.default_rng(0).integers(0, 256, (2, 4, 5, depth), np.uint8) for depth in (1, 3))
    save_pictures(colour, tmp_path / "out")
    save_pictures(grey, tmp_path / "out", ["a", "b"])
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.png")) == [
        "out/a/00000.png",
        "out/b/00001.png",
    ]
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "out" / "b" / "00001.png")), grey[1, ..., 0])


def test_what_an_experiment_lacks_is_said(tmp_path: Path) -> None:
    """Encoders and tokenizers that need weights name the option; unknown names list what there is."""
    images = bars(tmp_path)
    for name, words in (("real", "--real"), ("hogg", "give hog, pixels, classifier, clip or real")):
        with pytest.raises(SystemExit, match=words):
            choose_encoder(name, images, tmp_path, None)
    bench = experiments.Bench(
        images=images, judge=images.encoder, cells=Cells(tmp_path / "c"), choose=lambda name: images.encoder
    )
    for name, words in (("taef2", "--taef2"), ("taef3", "pixel or taef2")):
        with pytest.raises(SystemExit, match=words):
            experiment_backbones.run(experiment_backbones.Backbones(tokenizers=(name,), held=("lying",)), bench)


def test_what_is_published_has_its_figures_and_its_command() -> None:
    """Every section of the page has figures and a picture, none is without a section, and the README's commands are theirs."""
    root = Path(experiments.__file__).parents[1]
    page = (root / "docs" / "RESULTS.md").read_text(encoding="utf-8")
    names = {line[5:-4] for line in page.splitlines() if line.startswith("<!-- ") and " of " not in line}
    for suffix in ("json", "png"):
        assert {path.stem for path in (root / "docs" / "results").glob(f"*.{suffix}")} == names
    figures = [json.loads((root / "docs" / "results" / f"{name}.json").read_text(encoding="utf-8")) for name in names]
    commands = {found["command"].removeprefix("python -m tools.experiments ") for found in figures}
    readme = (
        (root / "README.md").read_text(encoding="utf-8").partition("What the memory buys")[2].partition("## Develop")[0]
    )
    said = [line.rpartition("| `")[2].removesuffix("` |") for line in readme.splitlines() if line.endswith("` |")]
    assert len(said) > 8
    assert set(said) <= commands


def test_another_setting_is_another_run(tmp_path: Path) -> None:
    """What a checkpoint was trained with is what its cell says, in one folder of cells too."""
    images, cells = bars(tmp_path), Cells(tmp_path / "cells")
    bank = Path(images.build(images.train, tmp_path / "bank.safetensors").path)
    tiny = dataclasses.replace(
        images, training=("model.width=16", "model.depth=1", "model.num_heads=1", "data.channels=1")
    )
    for guidance in (1.0, 3.0):
        other = dataclasses.replace(tiny, training=(*tiny.training, f"sample.guidance={guidance}"))
        run = trained(cells, "all", other, bank, 1)
        assert gmem_gen.load_checkpoint(run.folder).config.sample.guidance == guidance


def test_wrong_words_are_refused_before_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No traceback: what is wrong, and what to give."""
    for given, said in (
        (["speed", "--set", "steps=abc"], "must be JSON"), (["speed", "--set", "step=1"], "FIELD=JSON with a field of"),
        (["speed", "--flip"], "--flip is for insertion"), (["encoders", "--tokenizer", "taef2"], "of its own"),
        (["speed", "--set", "steps=[10,25]"], "rising multiples"), (["speed", "--cifar10", "nowhere"], "nowhere"),
    ):  # fmt: skip
        monkeypatch.setattr(sys, "argv", ["experiments", *given, "--out", str(tmp_path)])
        with pytest.raises(SystemExit, match=said):
            experiments.main()


def test_the_digits_are_all_there_once(tmp_path: Path) -> None:
    """1,797 images in two halves, ten classes in each."""
    images = digits(tmp_path)
    counts = [len(list(half.rglob("*.png"))) for half in (images.train, images.held_out)]
    assert counts == [1347, 450]
    assert {path.name for path in images.train.iterdir()} == {path.name for path in images.held_out.iterdir()}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("speed", ["steps=[2,4]", "num=50"]),
        ("compression", ["steps=2", "num=50", "ranks=[8]", 'dtypes=["i8"]', "keep=[1.0,0.5]"]),
        ("insertion", ["steps=2", "num=50", 'classes=["9"]']),
        ("composition", ["steps=2", "num=3"]),
        ("generalisation", ["steps=2", "num=50", "dropouts=[0.2]"]),
        ("size", ["steps=2", "num=50", "rows=[60]", "retrained=[60]"]),
        ("encoders", ["steps=2", "num=50", 'encoders=["hog"]']),
        ("backbones", ["steps=2", "num=50", 'tokenizers=["pixel"]', 'encoders=["hog"]', 'held=["9"]']),
    ],
)
def test_an_experiment_runs_and_is_written_from_its_figures(name: str, settings: list[str], monkeypatch) -> None:
    """At a tiny size: table, plot and section; then again from the stored figures alone."""
    results = Path("results")
    monkeypatch.setattr(experiments, "FIGURES", results)
    monkeypatch.setattr(experiments, "write_section", lambda stem, text: write_section(stem, text, Path("RESULTS.md")))
    words = [
        "experiments",
        name,
        "--publish",
        "--variant",
        "tiny",
        *(word for pair in settings for word in ("--set", pair)),
    ]
    monkeypatch.setattr(sys, "argv", words)
    assert experiments.main() == 0
    found = json.loads((results / f"{name}-digits-tiny.json").read_text())
    assert found["figures"]["rows"]
    assert (results / f"{name}-digits-tiny.png").stat().st_size > 1000
    page = Path("RESULTS.md").read_text()
    Path("RESULTS.md").unlink()
    monkeypatch.setattr(sys, "argv", ["experiments", name, "--from-json"])
    assert experiments.main() == 0
    assert Path("RESULTS.md").read_text() == page
