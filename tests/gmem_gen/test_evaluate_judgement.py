"""What is said of samples: near-copies among duplicates and twins, concepts that overlap, few images, repeated snippets."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import gmem_bank
import gmem_gen
from gmem_gen.judgement import find_copies, judge_concepts, judge_snippets
from gmem_gen.memorisation import EQUAL, images_of, nearest, nearest_others, why_no_search


def unit(rows) -> np.ndarray:
    found = np.asarray(rows, np.float64)
    return (found / np.linalg.norm(found, axis=1, keepdims=True)).astype(np.float32)


def strangers(count: int, seed: int, dim: int = 16) -> np.ndarray:
    return unit(np.random.default_rng(seed).normal(size=(count, dim)))


def slow_between(rows: np.ndarray, images) -> np.ndarray:
    """Cosine distance to the nearest row of another image, by NumPy in float64."""
    distances = 1 - rows.astype(np.float64) @ rows.astype(np.float64).T
    distances[np.equal.outer(images, images)] = np.inf
    return distances.min(axis=1)


# ---- Near-copies


@pytest.mark.parametrize("dim", [4, 64])
def test_neighbours_equal_those_by_numpy(dim: int, monkeypatch) -> None:
    """In small blocks: cosines to rounding, and positions; among others the twin of a row is left out like itself."""
    monkeypatch.setattr("gmem_gen.memorisation.BLOCK_ROWS", 7)
    queries, rows = strangers(40, 0, dim), strangers(90, 1, dim)
    scores = queries.astype(np.float64) @ rows.astype(np.float64).T
    cosines, found = nearest(queries, rows, 3)
    assert np.array_equal(found, np.argsort(-scores, axis=1)[:, :3])
    assert np.allclose(cosines, -np.sort(-scores, axis=1)[:, :3], atol=1e-6)
    images = np.repeat(np.arange(45), 2)
    scores = rows.astype(np.float64) @ rows.astype(np.float64).T
    scores[np.equal.outer(images, images)] = -np.inf
    cosines, found = nearest_others(rows, 4, images)
    assert np.array_equal(found, np.argsort(-scores, axis=1)[:, :4])
    assert np.allclose(cosines, -np.sort(-scores, axis=1)[:, :4], atol=1e-6)


@pytest.mark.parametrize("share", [0.02, 0.5, 1.0])
def test_copies_are_found_among_duplicates(share: float) -> None:
    """However many training images are there twice: the threshold is that of those without an equal, and copies lie below it."""
    apart = strangers(200, 2)
    training = np.vstack([apart, apart[: round(200 * share)]])
    samples = np.vstack([training[::4], strangers(30, 3)])
    found = find_copies(samples, training, None, threshold=None, num_resamples=0, seed=0)
    assert found.near_copies.value == pytest.approx(len(training[::4]) / len(samples), abs=0.03)
    assert found.near_copies.value >= len(training[::4]) / len(samples)
    alone = slow_between(training, np.arange(len(training)))
    alone = alone[alone > 1e-6]
    assert found.threshold == pytest.approx(np.quantile(alone, 0.01) if len(alone) else EQUAL, rel=1e-4)
    assert found.duplicates == pytest.approx(2 * share * 200 / len(training))
    assert "have an equal" in found.remarks()[0]
    record = found.to_json()
    assert record["duplicates_in_training"] == pytest.approx(found.duplicates, rel=1e-5)


def test_without_duplicates_the_threshold_is_the_plain_quantile() -> None:
    """Bit by bit, and nothing is remarked; a given threshold of 0 still finds what float32 calls equal."""
    training = strangers(300, 4)
    found = find_copies(training, training, None, threshold=None, num_resamples=0, seed=0)
    assert found.threshold == float(np.quantile(found.between_real, 0.01))
    assert found.remarks() == []
    assert find_copies(training, training, None, threshold=0.0, num_resamples=0, seed=0).near_copies.value == 1.0


def test_a_mirrored_twin_is_no_other_image() -> None:
    """Twins that lie nearer than any other image leave distances and threshold as if they were not there."""
    own = strangers(100, 5)
    twins = unit(own + 1e-3 * strangers(100, 6))
    keys = [name for place in range(100) for name in (f"{place}.png", f"{place}.png#flip")]
    rows = np.stack([own, twins], axis=1).reshape(200, 16)
    assert images_of(keys).tolist() == np.repeat(np.arange(100), 2).tolist()
    found = find_copies(strangers(60, 7), rows, None, threshold=None, num_resamples=0, seed=0, keys=keys)
    expected = slow_between(rows, np.repeat(np.arange(100), 2))
    assert found.between_real == pytest.approx(expected, abs=1e-6)
    assert found.threshold > 100 * find_copies(rows, rows, None, threshold=None, num_resamples=0, seed=0).threshold
    assert found.duplicates == 0


def test_few_training_images_have_no_threshold() -> None:
    """Fifty at least, twins apart; with a threshold given two, of which each is the other's neighbour."""
    keys = [f"{place}.png" for place in range(50)]
    assert why_no_search(keys, None) == ""
    assert "49 training images" in why_no_search(keys[1:], None)
    assert "25 training images" in why_no_search([name + end for name in keys[:25] for end in ("", "#flip")], None)
    assert why_no_search(keys[:2], 0.1) == ""
    assert "fewer than 2" in why_no_search(["a.png", "a.png#flip"], 0.1)
    found = find_copies(
        strangers(3, 8), strangers(3, 8)[:2], None, threshold=0.1, num_resamples=0, seed=0, keys=keys[:2]
    )
    assert found.near_copies.value == pytest.approx(2 / 3)


# ---- Concepts


def clusters(sizes, seed: int = 0, spread: float = 0.05) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Rows around axes, so many each, and concepts a, b, …"""
    rng = np.random.default_rng(seed)
    centres = np.repeat(np.eye(len(sizes), 8), sizes, axis=0)
    ends = np.cumsum([0, *sizes])
    members = {name: np.arange(ends[i], ends[i + 1]) for i, name in enumerate("abcdef"[: len(sizes)])}
    return unit(centres + spread * rng.normal(size=centres.shape)), members


def judged(samples, asked, rows, concepts, keys=None, votes: int = 5):
    return judge_concepts(
        unit(samples), np.asarray(asked), rows, concepts, votes=votes, num_resamples=10, seed=0, keys=keys
    )


def test_a_concept_within_another_is_no_rival_of_it() -> None:
    """Cats and dogs are animals: samples of each are right as what they were asked for, and wrong as the other."""
    rows, parts = clusters([30, 30, 30])
    concepts = {"animal": np.arange(60), "cat": parts["a"], "dog": parts["b"], "car": parts["c"]}
    asked = np.repeat([0, 1, 2, 1, 0], 10)
    found = judged(np.eye(3, 8)[np.repeat([0, 0, 1, 1, 2], 10)], asked, rows, concepts)
    assert found.shares() == {"animal": 0.5, "cat": 0.5, "dog": 1.0, "car": None}
    assert dict(found.of_real) == {"animal": 1.0, "cat": 1.0, "dog": 1.0, "car": 1.0}
    assert found.table.tolist() == [[10, 0, 0, 10], [0, 10, 10, 0], [0, 0, 10, 0], [0, 0, 0, 0]]
    assert found.overlapping == (("animal", "cat"), ("animal", "dog"))
    assert "'animal and cat', 'animal and dog'" in found.remarks()[-1]


def slow_concepts(samples, asked, rows, concepts, votes: int) -> tuple[float, dict[str, float]]:
    """The rule for concepts without a common row, one image at a time."""
    names = list(concepts)
    concept_of = {int(row): place for place, name in enumerate(names) for row in concepts[name]}

    def predict(row, left_out: int) -> int:
        scores = sorted(
            ((float(row @ other), -at) for at, other in enumerate(rows) if at != left_out and at in concept_of)
        )[::-1]
        counted = [[0, 0.0] for _ in names]
        for cosine, at in scores[:votes]:
            counted[concept_of[-at]][0] += 1
            counted[concept_of[-at]][1] += cosine
        return max(range(len(names)), key=lambda place: (*counted[place], -place))

    right = np.mean([predict(row, -1) == a for row, a in zip(samples, asked, strict=True)])
    real = {name: np.mean([predict(rows[at], at) == i for at in concepts[name]]) for i, name in enumerate(names)}
    return right, real


def test_fidelity_of_concepts_apart_is_the_plain_vote() -> None:
    """Of clusters that run into each other, with rows of no concept between them: as one image at a time has it."""
    rows, concepts = clusters([40, 25, 30, 20], seed=1, spread=0.6)
    del concepts["d"]
    asked = np.arange(60) % 3
    samples = unit(np.eye(3, 8)[asked] + 0.6 * np.random.default_rng(2).normal(size=(60, 8)))
    found = judged(samples, asked, rows, concepts)
    right, real = slow_concepts(samples.astype(float), asked, rows.astype(float), concepts, 5)
    assert 0.4 < right < 0.95
    assert found.fidelity.value == pytest.approx(right)
    assert dict(found.of_real) == pytest.approx(real, rel=1e-5)
    assert found.overlapping == ()
    assert found.remarks() == []
    weights = np.bincount(asked[:50], minlength=3) / 50
    some = judged(samples[:50], asked[:50], rows, concepts)
    assert some.of_real_as_asked == pytest.approx(weights @ np.array(list(real.values())), rel=1e-5)


def test_real_images_have_the_weight_that_concepts_have_among_samples() -> None:
    """Asked for one concept alone, its own images are what its samples are compared with."""
    rows, concepts = clusters([60, 60], seed=3, spread=0.9)
    found = judged(np.eye(2, 8)[[1] * 10], [1] * 10, rows, concepts)
    assert found.of_real["a"] != found.of_real["b"]
    assert found.of_real_as_asked == found.of_real["b"]
    assert found.to_json()["fidelity_of_real_images"] == found.of_real["b"]


def test_a_concept_of_few_images_is_remarked_with_what_they_reach() -> None:
    """Twenty beside 400 that surround them; a concept that holds the few is not "beside" them."""
    rows, concepts = clusters([400, 20], seed=4, spread=0.8)
    found = judged(np.eye(2, 8)[[1] * 10], [1] * 10, rows, concepts)
    assert found.of_real["b"] < 0.8
    assert f"b (20 beside 400; {found.of_real['b']:.2g} of them are taken for it)" in found.remarks()[0]
    assert judged(np.eye(2, 8)[[0] * 10], [0] * 10, rows, concepts).remarks() == []
    within = judged(np.eye(2, 8)[[1] * 10], [1] * 10, rows, {"all": np.arange(420), "b": concepts["b"]})
    assert [words.startswith("Concepts that share") for words in within.remarks()] == [True]


def test_a_mirrored_twin_does_not_vote_on_its_image() -> None:
    """Images of no pattern, whose twins are equal: with them each would be right, without them half are."""
    rng = np.random.default_rng(5)
    rows = np.repeat(unit(rng.normal(size=(200, 8))), 2, axis=0)
    keys = [f"{place}.png{end}" for place in range(200) for end in ("", "#flip")]
    concepts = {"a": np.arange(200), "b": np.arange(200, 400)}
    with_twins = judged(rows[:10], [0] * 10, rows, concepts, votes=1)
    found = judged(rows[:10], [0] * 10, rows, concepts, keys=keys, votes=1)
    assert min(with_twins.of_real.values()) == 1.0
    assert all(0.35 < share < 0.65 for share in found.of_real.values())


def test_no_voters_give_no_figure() -> None:
    """One image of two concepts, or an image and its twin: nobody is left to vote on them."""
    rows = strangers(2, 9, dim=8)
    assert judged(rows, [0, 1], rows, {"a": np.array([0]), "b": np.array([0])}) is None
    assert judged(rows, [0, 1], rows, {"a": np.array([0]), "b": np.array([1])}, keys=["x", "x#flip"]) is None
    assert judged(rows, [0, 1], rows, {"a": np.array([0]), "b": np.array([1])}).votes == 1


# ---- Snippets


def test_samples_of_one_snippet_are_compared_with_other_snippets() -> None:
    """Orthogonal snippets, each drawn from five times: 0 with others; one snippet alone has no other."""
    snippets = np.repeat(np.eye(6, dtype=np.float32), 5, axis=0)[np.random.default_rng(0).permutation(30)]
    for seed in range(5):
        found = judge_snippets(snippets, 2 * snippets, None, num_resamples=5, seed=seed)
        assert (found.cosine.value, found.shuffled) == (1.0, 0.0)
    alone = judge_snippets(snippets[:1].repeat(9, axis=0), snippets[:9], None, num_resamples=5, seed=0)
    assert alone.shuffled is None
    assert alone.to_json()["shuffled"] is None


def test_samples_of_one_snippet_are_resampled_together() -> None:
    """Ten samples each that are equally far from their snippet: as wide an interval as one sample each has."""
    rng = np.random.default_rng(1)
    snippets = rng.normal(size=(40, 8)).astype(np.float32)
    samples = (snippets + rng.normal(size=(40, 8))).astype(np.float32)
    once = judge_snippets(snippets, samples, None, num_resamples=100, seed=0)
    ten = judge_snippets(np.tile(snippets, (10, 1)), np.tile(samples, (10, 1)), None, num_resamples=100, seed=0)
    assert ten.cosine.high - ten.cosine.low == pytest.approx(once.cosine.high - once.cosine.low, rel=1e-6)
    assert ten.shuffled == pytest.approx(once.shuffled)


# ---- The report


def test_the_report_says_what_was_left_out(tmp_path: Path) -> None:
    """A flipped bank of pictures with a duplicate; then a bank of too few images for near-copies: each is remarked."""
    rng = np.random.default_rng(6)
    for folder, count in (("many", 60), ("few", 30), ("samples", 60)):
        (tmp_path / folder / "c").mkdir(parents=True)
        for place in range(count):
            pixels = rng.integers(0, 256, (8, 8)).astype(np.uint8)
            Image.fromarray(pixels).save(tmp_path / folder / "c" / f"{place:02d}.png")
    (tmp_path / "many" / "c" / "60.png").write_bytes((tmp_path / "many" / "c" / "00.png").read_bytes())
    judge = gmem_bank.load_encoder("pixels", space="raw", parameters={"size": 8})
    options = gmem_gen.EvaluationOptions(num_resamples=0)
    for folder in ("many", "few"):
        gmem_bank.build(
            folder,
            gmem_bank.load_encoder("hog", parameters={"size": 16}),
            f"{folder}.safetensors",
            narrowing=gmem_bank.Narrowing(flip=True),
        )
    report = gmem_gen.evaluate("many.safetensors", judge, samples="many", reference="samples", options=options)
    assert report.memorisation.near_copies.value == 1.0
    assert report.memorisation.duplicates == pytest.approx(4 / 122)
    assert any("3.28% of the training images have an equal" in remark for remark in report.remarks)
    short = gmem_gen.evaluate("few.safetensors", judge, samples="samples", reference="samples", options=options)
    assert short.memorisation is None
    assert any("30 training images" in remark for remark in short.remarks)
    page = gmem_gen.write_report(report, "out")[1].read_text()
    assert "how far a figure would move with other samples" in page
