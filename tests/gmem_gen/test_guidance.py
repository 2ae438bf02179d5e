"""Guidance: its formula, its interval, and that no half is computed for nothing."""

from __future__ import annotations

import pytest
import torch

from gmem_gen.guidance import Guided

X = torch.arange(1.0, 4.0).view(3, 1, 1, 1)
SNIPPETS = torch.tensor([[2.0], [3.0], [5.0]])
NULL = torch.full((3, 1), -1.0)


def network(x: torch.Tensor, t: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
    """Any function of all three."""
    return x * s.view(-1, 1, 1, 1) + t.view(-1, 1, 1, 1) ** 2


def at(scale: float, t: float | list[float], start: float = 0.0, end: float = 1.0) -> tuple[torch.Tensor, int]:
    """The guided output, and the points that were evaluated."""
    field = Guided(network, SNIPPETS, NULL, scale, start, end)
    when = torch.tensor(t) if isinstance(t, list) else torch.full((3,), t)
    return field(X, when), field.num_points


@pytest.mark.parametrize("scale", [0.5, 2.0, 7.75])
def test_inside_it_is_the_formula(scale: float) -> None:
    """null + scale·(conditional − null), both halves."""
    t = torch.full((3,), 0.5)
    conditional, null = network(X, t, SNIPPETS), network(X, t, NULL)
    got, points = at(scale, 0.5)
    torch.testing.assert_close(got, null + scale * (conditional - null))
    assert points == 6


def test_outside_and_at_the_edges_of_the_scale_only_one_half_is_computed() -> None:
    """Before: conditional; after: null; scale 1: conditional inside the interval; scale 0: null there."""
    t = torch.full((3,), 0.5)
    conditional, null = network(X, t, SNIPPETS), network(X, t, NULL)
    for options, expected in (
        ((3.0, 0.5, 0.6, 1.0), conditional),
        ((3.0, 0.5, 0.0, 0.4), null),
        ((1.0, 0.5, 0.0, 1.0), conditional),
        ((1.0, 0.5, 0.0, 0.4), null),
        ((1.0, 0.5, 0.6, 0.7), conditional),
        ((0.0, 0.5, 0.0, 1.0), null),
        ((0.0, 0.5, 0.6, 1.0), conditional),
    ):
        got, points = at(*options)
        assert torch.equal(got, expected), options
        assert points == 3


@pytest.mark.parametrize("edge", [0.89, 0.1, 0.3, 0.7])
def test_the_ends_belong_to_the_interval(edge: float) -> None:
    """A time that was rounded to float32 still equals the end that was given."""
    assert at(3.0, edge, edge, 1.0)[1] == 6
    assert at(3.0, edge, 0.0, edge)[1] == 6
    assert at(3.0, edge, edge, edge)[1] == 6


def test_an_end_of_1_is_no_end() -> None:
    """A solver that steps past 1 is still guided there."""
    assert at(3.0, 1.3, 0.5, 1.0)[1] == 6
    assert at(3.0, 1.3, 0.5, 0.99)[1] == 3


@pytest.mark.parametrize("scale", [0.0, 1.0, 3.0])
def test_each_sample_is_judged_by_its_own_time(scale: float) -> None:
    """A batch of times before, in and after the interval equals its samples one by one, at the same cost."""
    moments = [0.1, 0.5, 0.9]
    together, points = at(scale, moments, 0.3, 0.7)
    alone = [Guided(network, SNIPPETS[[i]], NULL[[i]], scale, 0.3, 0.7) for i in range(3)]
    single = torch.cat([field(X[[i]], torch.tensor([moments[i]])) for i, field in enumerate(alone)])
    torch.testing.assert_close(together, single)
    assert points == sum(field.num_points for field in alone) == (4 if scale == 3 else 3)


def test_the_published_setting_computes_the_null_half_only_where_it_is_used() -> None:
    """SDE Heun 50 with guidance from 0.89: 99 evaluations, of which 12 have two halves, instead of 198 with two."""
    from gmem_gen.config import FlowConfig, SampleConfig
    from gmem_gen.sampling import solve

    field = Guided(network, SNIPPETS, NULL, 7.75, 0.89, 1.0)
    generator = torch.Generator().manual_seed(0)
    config = SampleConfig(method="sde-heun", num_steps=50)
    solution = solve(
        field, FlowConfig(prediction="velocity"), config, lambda: torch.randn(3, 1, 1, 1, generator=generator)
    )
    assert solution.nfe == 99
    assert field.num_points == 3 * (99 + 12)


def test_a_plain_evaluation_as_published_draws_the_same_images() -> None:
    """The benchmark's peer, which computes every half and the score apart, on a small network."""
    import argparse

    from tools.bench_sample import measure

    options = argparse.Namespace(preset="nano", patch=2, size=8, channels=3, steps=50, images=2, pairs=1, device="cpu")
    result = measure(options)
    assert (result["evaluations_per_image_plain"], result["evaluations_per_image_ours"]) == (396, 111)
    assert result["largest_difference"] < 1e-4 < result["largest_value"]
