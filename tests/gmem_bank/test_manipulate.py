"""Four ways from one snippet to another, held against their laws and the published values."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from gmem_bank import manipulate

vectors = hnp.arrays(np.float64, 8, elements=st.floats(-10, 10, width=32)).filter(lambda v: np.linalg.norm(v) > 1e-3)
times = st.floats(0, 1)


@given(a=vectors, b=vectors)
@pytest.mark.parametrize("method", manipulate.METHODS)
def test_the_ends_are_the_ends(method: str, a: np.ndarray, b: np.ndarray) -> None:
    """t = 0 is the first, t = 1 the second, for every method."""
    np.testing.assert_allclose(manipulate.METHODS[method](a, b, 0.0), a, atol=1e-6)
    np.testing.assert_allclose(manipulate.METHODS[method](a, b, 1.0), b, atol=1e-6)


@given(a=vectors, b=vectors, t=times)
def test_slerp_of_unit_vectors_stays_on_the_sphere_at_the_right_angle(a: np.ndarray, b: np.ndarray, t: float) -> None:
    """The point at t has norm 1 and lies t of the way along the arc."""
    a, b = a / np.linalg.norm(a), b / np.linalg.norm(b)
    point = manipulate.spherical(a, b, t)
    assert np.linalg.norm(point) == pytest.approx(1, abs=1e-9)
    whole = np.arccos(np.clip(a @ b, -1, 1))
    assert np.arccos(np.clip(a @ point, -1, 1)) == pytest.approx(t * whole, abs=2e-6)


@pytest.mark.parametrize("sign", [1, -1])
@given(a=vectors, t=times)
def test_slerp_of_identical_or_opposite_vectors_is_never_zero(sign: int, a: np.ndarray, t: float) -> None:
    """The published code returns zeros here."""
    point = manipulate.spherical(a, sign * a, t)
    assert np.linalg.norm(point) == pytest.approx(np.linalg.norm(a), rel=1e-6)
    if sign == 1:
        np.testing.assert_allclose(point, a, atol=1e-6)


@given(a=vectors, b=vectors, t=times)
def test_slerp_backwards_is_slerp(a: np.ndarray, b: np.ndarray, t: float) -> None:
    """From b to a at 1 − t is from a to b at t, unless they are opposite."""
    if np.linalg.norm(a / np.linalg.norm(a) + b / np.linalg.norm(b)) > 1e-3:
        np.testing.assert_allclose(manipulate.spherical(a, b, t), manipulate.spherical(b, a, 1 - t), atol=1e-5)


def test_mask_moves_dimension_by_dimension() -> None:
    """A dimension that has gone over to b stays there as t grows, and about t of them have."""
    a, b = np.zeros(1000), np.ones(1000)
    steps = [manipulate.masked(a, b, t, seed=1) for t in np.linspace(0, 1, 11)]
    for t, (before, after) in zip(np.linspace(0, 1, 11)[1:], zip(steps[:-1], steps[1:], strict=True), strict=True):
        assert (after >= before).all()
        assert after.mean() == pytest.approx(t, abs=0.05)


def test_concat_at_one_half_is_two_halves() -> None:
    """First half of the one, second half of the other, as published."""
    np.testing.assert_array_equal(manipulate.concat(np.zeros(6), np.ones(6), 0.5), [0, 0, 0, 1, 1, 1])


def test_published_linear_spherical_and_concat_values() -> None:
    """The published interpolations at 0.2 and 0.5, where they are sound."""
    from safetensors.numpy import load_file

    from tests.conftest import DATA

    golden = load_file(DATA / "interpolation.safetensors")
    a, b = (golden[f"interp.linear.{t}"].astype(np.float64) for t in ("0.0", "1.0"))
    for t in (0.2, 0.5):
        np.testing.assert_allclose(manipulate.linear(a, b, t), golden[f"interp.linear.{t}"], atol=1e-6)
        np.testing.assert_allclose(manipulate.spherical(a, b, t), golden[f"interp.spherical.{t}"], atol=1e-5)
    np.testing.assert_allclose(manipulate.concat(a, b, 0.5), golden["interp.concat.0.5"], atol=1e-6)
