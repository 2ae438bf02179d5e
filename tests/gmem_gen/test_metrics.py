"""Distances between sets of features, against closed forms and slow oracles."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest
from scipy.linalg import sqrtm

from gmem_bank import ConfigError, Moments
from gmem_gen.estimates import (
    NORMAL_QUANTILE,
    Estimate,
    bootstrap_mean,
    jackknife_deviation,
    parts_left_out,
    random_numbers,
)
from gmem_gen.frechet import frechet_distance, frechet_estimate, merged, moments_of
from gmem_gen.judgement import compare
from gmem_gen.kernel_distance import discrepancy_variance, kernel_distance, polynomial_kernel, squared_discrepancy
from gmem_gen.neighbours import BLOCK_ROWS, neighbourhoods, squared_radii

# ---- Fréchet distance


def gaussian(mean, covariance, count: int = 1000) -> Moments:
    """Moments of rows with exactly this mean and unbiased covariance."""
    return Moments(count=count, mean=np.asarray(mean, float), scatter=np.asarray(covariance, float) * (count - 1))


def turn(dim: int, rng) -> np.ndarray:
    return np.linalg.qr(rng.normal(size=(dim, dim)))[0]


def test_frechet_equals_the_closed_form_of_commuting_gaussians() -> None:
    """Σ (√a - √b)² + ‖μ‖² for covariances with the same axes, from 1e-8 to 1e4 in one spectrum, in 200 dimensions."""
    rng = np.random.default_rng(0)
    axes, one, two = turn(200, rng), 10 ** rng.uniform(-8, 4, 200), 10 ** rng.uniform(-8, 4, 200)
    means = rng.normal(size=(2, 200))
    found = frechet_distance(gaussian(means[0], axes * one @ axes.T), gaussian(means[1], axes * two @ axes.T))
    assert found == pytest.approx(((one**0.5 - two**0.5) ** 2).sum() + ((means[0] - means[1]) ** 2).sum(), rel=1e-6)


def test_frechet_equals_the_closed_form_of_any_gaussians_in_the_plane() -> None:
    """In two dimensions tr (AB)^½ = √(tr AB + 2 √det AB), whatever the axes."""
    rng = np.random.default_rng(1)
    for _ in range(50):
        a, b = (factor @ factor.T for factor in rng.normal(size=(2, 2, 2)))
        product = a @ b
        trace = np.sqrt(np.trace(product) + 2 * np.sqrt(max(np.linalg.det(product), 0.0)))
        expected = np.trace(a) + np.trace(b) - 2 * trace + 5.0
        assert frechet_distance(gaussian([0, 0], a), gaussian([1, 2], b)) == pytest.approx(expected, rel=1e-6, abs=1e-6)


def test_frechet_equals_the_textbook_formula_where_that_works() -> None:
    """SciPy's matrix square root of the product of two well-conditioned covariances."""
    rng = np.random.default_rng(2)
    one, two = rng.normal(size=(500, 30)) @ rng.normal(size=(30, 30)), rng.normal(size=(400, 30)) + 0.3
    covariances = np.cov(one.T), np.cov(two.T)
    trace = np.trace(sqrtm(covariances[0] @ covariances[1]).real)
    expected = ((one.mean(0) - two.mean(0)) ** 2).sum() + sum(map(np.trace, covariances)) - 2 * trace
    assert frechet_distance(moments_of(one), moments_of(two)) == pytest.approx(expected, rel=1e-6)


def test_frechet_of_rank_deficient_features_is_that_of_the_space_they_span() -> None:
    """Ten rows of five dimensions, turned into 400: never NaN, and the same distance; a constant column changes nothing."""
    rng = np.random.default_rng(3)
    one, two = rng.normal(size=(10, 5)), rng.normal(size=(12, 5)) * 2 + 1
    expected = frechet_distance(moments_of(one), moments_of(two))
    axes = turn(400, rng)[:5]
    found = frechet_distance(moments_of(one @ axes + 3.0), moments_of(two @ axes + 3.0))
    assert found == pytest.approx(expected, rel=1e-6)
    same = moments_of(np.ones((20, 7)))
    assert frechet_distance(same, same) == 0.0
    assert frechet_distance(same, gaussian(np.ones(7), np.eye(7))) == pytest.approx(7.0)


def test_frechet_is_a_symmetric_distance_and_zero_for_the_same() -> None:
    """Of float32 features with a mean a thousand times their spread, too."""
    rng = np.random.default_rng(4)
    one = (rng.normal(size=(300, 64)) + 1000).astype(np.float32)
    two = (rng.normal(size=(200, 64)) + 1001).astype(np.float32)
    assert frechet_distance(moments_of(one), moments_of(one)) == pytest.approx(0.0, abs=1e-9)
    there, back = frechet_distance(moments_of(one), moments_of(two)), frechet_distance(moments_of(two), moments_of(one))
    assert there == pytest.approx(back, rel=1e-9)
    assert there > 50


def test_moments_of_parts_are_those_of_the_whole() -> None:
    """Whatever the parts, with means 100,000 times a spread, and with counts as if rows were written that often."""
    rng = np.random.default_rng(5)
    rows = rng.normal(size=(9001, 6)) * 10.0 ** np.arange(-3, 3) + 100
    whole = moments_of(rows)
    assert np.allclose(whole.mean, rows.mean(axis=0), rtol=1e-13)
    assert np.allclose(whole.scatter, np.cov(rows.T) * 9000, rtol=1e-9, atol=1e-9)
    for cuts in ([1, 2, 9000], [4500], range(1000, 9000, 777)):
        parts = merged((moments_of(part) for part in np.split(rows, cuts)), 6)
        assert parts.count == 9001
        scale = np.sqrt(np.outer(np.diag(whole.scatter), np.diag(whole.scatter)))
        assert np.abs((parts.scatter - whole.scatter) / scale).max() < 1e-9
        assert frechet_distance(parts, whole) < 1e-9 * np.trace(whole.scatter) / 9000
    counts = rng.integers(0, 3, len(rows))
    weighted, repeated = moments_of(rows, counts), moments_of(np.repeat(rows, counts, axis=0))
    assert weighted.count == repeated.count
    assert np.abs((weighted.scatter - repeated.scatter) / scale).max() < 1e-9


def test_frechet_refuses_what_has_no_distance() -> None:
    """Other dimensions, one row, and features that are not finite."""
    good = moments_of(np.random.default_rng(6).normal(size=(10, 3)))
    for bad, words in [
        (moments_of(np.zeros((10, 4))), "3 and of 4 dimensions"),
        (moments_of(np.zeros((1, 3))), "two rows or more, there are 1"),
        (moments_of(np.full((10, 3), np.nan)), "not finite"),
    ]:
        with pytest.raises(ConfigError, match=words):
            frechet_distance(good, bad)


# ---- Kernel distance


def slow_discrepancy(one, two) -> float:
    def kernel(x, y) -> float:
        return (sum(a * b for a, b in zip(x, y, strict=True)) / len(x) + 1) ** 3

    def within(rows) -> float:
        pairs = [kernel(x, y) for i, x in enumerate(rows) for j, y in enumerate(rows) if i != j]
        return sum(pairs) / len(pairs)

    between = [kernel(x, y) for x in one for y in two]
    return within(one) + within(two) - 2 * sum(between) / len(between)


def test_discrepancy_equals_the_sum_over_pairs() -> None:
    """Sets of different sizes."""
    rng = np.random.default_rng(7)
    one, two = rng.normal(size=(9, 4)), rng.normal(size=(6, 4)) + 0.5
    assert squared_discrepancy(one, two) == pytest.approx(slow_discrepancy(one.tolist(), two.tolist()), rel=1e-12)


def test_kid_is_unbiased() -> None:
    """Over 60 pairs of equal distributions its mean is 0 within its error."""
    found = []
    for seed in range(60):
        rng = np.random.default_rng(seed)
        found.append(kernel_distance(rng.normal(size=(80, 5)), rng.normal(size=(90, 5)), rng=rng, num_subsets=40))
    values = np.array([one.estimate.value for one in found])
    assert abs(values.mean()) < 3 * values.std() / len(values) ** 0.5


def test_variance_of_the_discrepancy_equals_the_sum_over_rows(monkeypatch) -> None:
    """U² less the mean of h(x₁, x₂) h(x₃, x₄) over all orders of four different rows, by loops; in small blocks, far from 0."""
    monkeypatch.setattr("gmem_gen.kernel_distance.BLOCK_ROWS", 3)
    rng = np.random.default_rng(11)
    for rows, real in (
        (rng.normal(size=(7, 3)), rng.normal(size=(5, 3))),
        (rng.normal(size=(8, 2)) + 9, rng.normal(size=(4, 2))),
    ):
        to_real = polynomial_kernel(rows, real).mean(axis=1)
        h = polynomial_kernel(rows, rows) - to_real[:, None] - to_real
        u = np.mean([h[i, j] for i, j in permutations(range(len(rows)), 2)])
        apart = np.mean([h[i, j] * h[p, q] for i, j, p, q in permutations(range(len(rows)), 4)])
        assert discrepancy_variance(rows, real) == pytest.approx(u**2 - apart, rel=1e-8)


@pytest.mark.parametrize(("n", "m"), [(60, 600), (600, 60), (150, 150)])
def test_the_interval_of_kid_is_as_wide_as_independent_samples_spread(n: int, m: int) -> None:
    """With the reference held fixed, whichever set is the larger; in the mean of squares, to a quarter, over 80 draws."""
    real, values, widths = np.random.default_rng(12000).normal(size=(m, 6)), [], []
    for seed in range(80):
        rng = np.random.default_rng(seed)
        found = kernel_distance(rng.normal(size=(n, 6)) + 0.1, real, rng=rng).estimate
        values.append(found.value)
        widths.append((found.high - found.low) / 2 / NORMAL_QUANTILE)
    assert np.sqrt(np.mean(np.square(widths))) == pytest.approx(np.std(values, ddof=1), rel=0.25)


def test_kid_is_seeded_and_refuses_what_it_cannot_estimate() -> None:
    """The same seed gives the same figures; subsets beyond half of the rows say nothing of their spread."""
    rows = np.random.default_rng(8).normal(size=(40, 3))
    one, two = (kernel_distance(rows[:20], rows[20:] + 1, rng=random_numbers(5, 1)) for _ in range(2))
    assert one == two
    assert one.subset_size == 10
    assert one.estimate.low < one.estimate.value < one.estimate.high
    for size in (1, 11):
        with pytest.raises(ConfigError, match="at most half of the 20 rows"):
            kernel_distance(rows[:20], rows[20:], rng=random_numbers(0), subset_size=size)


# ---- Precision, recall, density, coverage


def slow_neighbourhoods(samples, real, k: int) -> dict[str, float]:
    """By the definitions, one pair at a time, in exact integers."""

    def squared(x, y) -> int:
        return sum((int(a) - int(b)) ** 2 for a, b in zip(x, y, strict=True))

    def radii(rows) -> list[int]:
        return [sorted(squared(x, y) for j, y in enumerate(rows) if j != i)[k - 1] for i, x in enumerate(rows)]

    of_real, of_ours = radii(real), radii(samples)
    counts = [sum(squared(x, y) <= r for y, r in zip(real, of_real, strict=True)) for x in samples]
    return {
        "precision": sum(c > 0 for c in counts) / len(samples),
        "density": sum(counts) / k / len(samples),
        "recall": sum(any(squared(y, x) <= r for x, r in zip(samples, of_ours, strict=True)) for y in real) / len(real),
        "coverage": sum(any(squared(y, x) <= r for x in samples) for y, r in zip(real, of_real, strict=True)) / len(real),
    }  # fmt: skip


@pytest.mark.parametrize("seed", range(8))
def test_neighbourhoods_equal_the_definitions_ties_included(seed: int, monkeypatch) -> None:
    """On a small grid most distances are tied and many rows equal; small blocks, as many as the rows need."""
    monkeypatch.setattr("gmem_gen.neighbours.BLOCK_ROWS", 7)
    rng = np.random.default_rng(seed)
    dim = int(rng.integers(1, 4))
    real, samples = rng.integers(-3, 4, (30, dim)), rng.integers(-4, 3, (23, dim))
    for k in (1, 3, 5):
        found = neighbourhoods(samples, real, k=k).measures()
        expected = slow_neighbourhoods(samples, real, k)
        assert {name: values.mean() for name, values in found.items()} == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("seed", range(4))
def test_recall_and_coverage_without_a_sample_are_those_of_the_others(seed: int, monkeypatch) -> None:
    """Every sample taken away in truth, and all radii found anew: on the grid of ties, and where no two distances are equal."""
    monkeypatch.setattr("gmem_gen.neighbours.BLOCK_ROWS", 7)
    rng = np.random.default_rng(seed)
    grid = rng.integers(-4, 3, (18, 2)).astype(float), rng.integers(-3, 4, (30, 2)).astype(float)
    for samples, real in (grid, (rng.normal(size=(20, 4)), rng.normal(size=(25, 4)))):
        for k in (1, 3, 5):
            found = neighbourhoods(samples, real, k=k)
            for place in range(len(samples)):
                without = neighbourhoods(np.delete(samples, place, axis=0), real, k=k)
                assert found.recall_without[place] == pytest.approx(without.recalled.mean(), abs=1e-12)
                assert found.coverage_without[place] == pytest.approx(without.covered.mean(), abs=1e-12)


def test_recall_has_no_interval_where_the_others_would_lack_neighbours() -> None:
    """Six samples and k = 5: without one of them no ball has a fifth neighbour; coverage needs the reference's balls alone."""
    rng = np.random.default_rng(17)
    found = compare(rng.normal(size=(6, 2)), rng.normal(size=(30, 2)), k=5, num_resamples=10, seed=0).measures
    assert (found["recall"].low, found["recall"].high) == (None, None)
    assert found["coverage"].low < found["coverage"].value < found["coverage"].high
    none = compare(rng.normal(size=(20, 2)), rng.normal(size=(30, 2)), k=5, num_resamples=0, seed=0).measures
    assert {estimate.low for estimate in none.values()} == {None}


def test_intervals_of_the_measures_are_as_wide_as_independent_samples_spread() -> None:
    """With the reference held fixed. The jackknife's may be wider, never much narrower; a bootstrap over 600 reference rows is half."""
    real, values, widths = np.random.default_rng(13000).normal(size=(600, 16)), [], []
    for seed in range(70):
        rows = np.random.default_rng(seed).normal(size=(100, 16)) * 0.85 + 0.3
        found = compare(rows, real, k=5, num_resamples=10, seed=seed).measures
        values.append([estimate.value for estimate in found.values()])
        widths.append([(estimate.high - estimate.low) / 2 / NORMAL_QUANTILE for estimate in found.values()])
    ratios = dict(zip(found, np.sqrt(np.mean(np.square(widths), axis=0)) / np.std(values, axis=0, ddof=1), strict=True))
    assert 0.85 < ratios["precision"] < 1.15
    assert 0.85 < ratios["density"] < 1.15
    assert 0.85 < ratios["recall"] < 1.5
    assert 0.85 < ratios["coverage"] < 1.5


@pytest.mark.parametrize("far", [1e5, 3e7, 1e12])
def test_one_sample_far_away_changes_nothing_for_the_others(far: float) -> None:
    """Rounding is that of each pair: a sample whose numbers overflowed is imprecise, and all others are what they were."""
    rng = np.random.default_rng(14)
    real, rows = rng.normal(size=(200, 6)), rng.normal(size=(60, 6)) * 3
    alone = neighbourhoods(rows, real)
    found = neighbourhoods(np.vstack([rows, np.full(6, far)]), real)
    assert 0 < alone.precise.mean() < 0.7
    assert found.precise.tolist() == [*alone.precise, 0.0]
    assert np.array_equal(found.density, [*alone.density, 0.0])
    assert np.array_equal(found.covered, alone.covered)


def test_neighbourhoods_of_copies_and_of_strangers() -> None:
    """The reference itself scores 1 everywhere and density above 1; rows far away score 0."""
    real = np.random.default_rng(9).normal(size=(BLOCK_ROWS + 50, 8)).astype(np.float32)
    same = {name: values.mean() for name, values in neighbourhoods(real, real).measures().items()}
    assert (same["precision"], same["recall"], same["coverage"]) == (1.0, 1.0, 1.0)
    assert same["density"] >= 1.0
    apart = neighbourhoods(real[:20] + 100, real).measures()
    assert all(values.sum() == 0 for values in apart.values())
    equal = neighbourhoods(np.full((9, 3), 1e3), np.full((9, 3), 1e3)).measures()
    assert all(values.mean() >= 1 for values in equal.values())


def test_radii_do_not_depend_on_where_the_features_lie() -> None:
    """Far from the origin float64 still tells neighbours apart."""
    rows = np.random.default_rng(10).normal(size=(60, 4))
    expected = np.sort(((rows[:, None] - rows) ** 2).sum(-1), axis=1)[:, 3]
    assert np.allclose(squared_radii(rows, 3), expected, rtol=1e-12)
    shifted = {name: v.mean() for name, v in neighbourhoods(rows[:30] + 1e4, rows[30:] + 1e4).measures().items()}
    assert shifted == pytest.approx({n: v.mean() for n, v in neighbourhoods(rows[:30], rows[30:]).measures().items()})


def test_neighbourhoods_need_more_rows_than_neighbours() -> None:
    """Five rows have no fifth other."""
    rows = np.eye(5)
    with pytest.raises(ConfigError, match="more than 5 rows on each side, there are 5"):
        neighbourhoods(rows, np.eye(6)[:, :5], k=5)


# ---- Intervals


def test_bootstrap_of_a_mean_is_as_wide_as_theory_says() -> None:
    """± 1.96 σ/√n for many values; none where no resamples are asked for."""
    values = random_numbers(1).normal(size=2000)
    found = bootstrap_mean(values, num_resamples=4000, rng=random_numbers(2))
    assert found.value == pytest.approx(values.mean())
    assert (found.high - found.low) / 2 == pytest.approx(1.96 * values.std() / 2000**0.5, rel=0.05)
    assert bootstrap_mean(values, num_resamples=0, rng=random_numbers(2)) == Estimate(value=found.value)


def test_bootstrap_takes_values_of_a_group_together() -> None:
    """Each value written four times has the interval of the values written once; groups of one change no bit."""
    values = random_numbers(7).normal(size=300)
    once = bootstrap_mean(values, num_resamples=2000, rng=random_numbers(8))
    assert bootstrap_mean(values, num_resamples=2000, rng=random_numbers(8), groups=np.arange(300)) == once
    four = bootstrap_mean(
        np.tile(values, 4), num_resamples=2000, rng=random_numbers(8), groups=np.tile(np.arange(300), 4)
    )
    assert (four.low, four.high) == pytest.approx((once.low, once.high))


def test_jackknife_of_a_mean_is_the_textbook_error() -> None:
    """s/√n exactly, each value left out in turn; of parts nearly so, and parts cover every value once."""
    values = random_numbers(3).normal(size=400)
    alone = np.array([np.delete(values, place).mean() for place in range(400)])
    assert jackknife_deviation(alone) == pytest.approx(values.std(ddof=1) / 20, rel=1e-9)
    parts = list(parts_left_out(400, 100, random_numbers(4)))
    assert (np.sum(parts, axis=0) == 99).all()
    assert {int(counts.sum()) for counts in parts} == {396}
    assert jackknife_deviation(np.array([counts @ values / 396 for counts in parts])) == pytest.approx(
        values.std(ddof=1) / 20, rel=0.2
    )


@pytest.mark.parametrize(("n", "m", "dim", "shift"), [(200, 2000, 100, 0.0), (300, 2000, 4, 1.0), (150, 60, 64, 0.3)])
def test_the_interval_of_the_frechet_distance_is_as_wide_as_independent_samples_spread(
    n: int, m: int, dim: int, shift: float
) -> None:
    """With the reference held fixed, of few rows too. It may be half as wide again; at n = 2 D a bootstrap's is four times as wide."""
    real = moments_of(np.random.default_rng(15000).normal(size=(m, dim)))

    def draw(seed: int) -> np.ndarray:
        return np.random.default_rng(seed).normal(size=(n, dim)) * (1 + shift) + shift / 10

    spread = np.std([frechet_distance(moments_of(draw(seed)), real) for seed in range(60)], ddof=1)
    found = [frechet_estimate(draw(seed), real, num_parts=40, rng=random_numbers(seed)) for seed in range(6)]
    widths = [(estimate.high - estimate.value) / NORMAL_QUANTILE for estimate in found]
    assert 0.85 < np.sqrt(np.mean(np.square(widths))) / spread < 1.6
    assert found[0] == frechet_estimate(draw(0), real, num_parts=40, rng=random_numbers(0))
    assert found[0].value == frechet_distance(moments_of(draw(0)), real)


def test_the_frechet_distance_has_no_interval_of_few_samples() -> None:
    """As many samples as dimensions, too few once a part is left out, and no parts: the figure alone."""
    rng = np.random.default_rng(16)
    rows, real = rng.normal(size=(60, 20)), moments_of(rng.normal(size=(200, 20)))
    assert frechet_estimate(rows, real, num_parts=10, rng=rng).low is not None
    for samples, reference, parts in (
        (rows[:20], real, 10), (rows[:22], real, 5), (rows, real, 1), (rows, real, 0),
    ):  # fmt: skip
        found = frechet_estimate(samples, reference, num_parts=parts, rng=rng)
        assert (found.low, found.high) == (None, None)
        assert found.value == frechet_distance(moments_of(samples), reference)


def test_estimates_are_written_to_nine_digits() -> None:
    """What differs further is rounding."""
    assert Estimate(value=1 / 3).to_json() == {"value": 0.333333333, "low": None, "high": None}
