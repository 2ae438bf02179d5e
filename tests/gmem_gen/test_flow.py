"""Flow matching: conversions, orders of convergence, an exact solution."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats

from gmem_bank.errors import ConfigError
from gmem_gen import flow
from gmem_gen.config import FlowConfig

torch.manual_seed(0)
X_0, X_1 = torch.randn(2, 4, 3, 5, 5).double()
T = torch.tensor([0.01, 0.3, 0.6, 0.95]).double()


def test_velocity_is_the_slope_of_the_path() -> None:
    """d x_t / dt by finite differences, and both conversions, which invert one another."""
    x_t, velocity = flow.interpolant(X_0, X_1, T), flow.target_velocity(X_0, X_1)
    slope = (flow.interpolant(X_0, X_1, T + 1e-6) - flow.interpolant(X_0, X_1, T - 1e-6)) / 2e-6
    torch.testing.assert_close(slope, velocity, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(flow.velocity_to_data(velocity, x_t, T), X_1)
    torch.testing.assert_close(flow.data_to_velocity(X_1, x_t, T), velocity)
    torch.testing.assert_close(flow.to_velocity(X_1, x_t, T, "data"), velocity)
    assert flow.to_velocity(X_1, x_t, T, "velocity") is X_1
    assert torch.equal(flow.interpolant(X_0, X_1, torch.zeros(4)), X_0)
    assert torch.equal(flow.interpolant(X_0, X_1, torch.ones(4)), X_1)


def test_data_prediction_stays_finite_at_the_end() -> None:
    """At t = 1 the quotient is bounded."""
    x_t = flow.interpolant(X_0, X_1, torch.ones(4).double())
    assert torch.isfinite(flow.to_velocity(X_1 + 1, x_t, torch.ones(4), "data")).all()


MU, S = 0.7, 0.5


def gaussian_field(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """The exact velocity that carries N(0, 1) to N(MU, S²) along the linear path (closed form)."""
    a, s = flow.expand(t.double(), x), 1 - flow.expand(t.double(), x)
    return MU + (a * S**2 - s) / (a**2 * S**2 + s**2) * (x - a * MU)


def exact(x_0: torch.Tensor) -> torch.Tensor:
    """The flow of that field keeps the quantile: x_1 = MU + S·x_0."""
    return MU + S * x_0


@pytest.mark.parametrize(("solver", "order", "evaluations"), [("euler", 1, 1), ("heun", 2, 2)])
def test_solvers_converge_to_the_exact_solution_with_their_order(solver: str, order: int, evaluations: int) -> None:
    """Halving the step divides the error by 2 to the order; NFE is counted."""
    errors = []
    for steps in (40, 80, 160):
        solution = flow.SOLVERS[solver](gaussian_field, X_0, flow.time_grid(steps).double())
        assert solution.nfe == evaluations * steps
        errors.append(float((solution.x_1 - exact(X_0)).abs().max()))
    rates = np.log2(np.array(errors[:-1]) / np.array(errors[1:]))
    np.testing.assert_allclose(rates, order, atol=0.1)


@pytest.mark.parametrize("solver", ["euler", "heun"])
def test_the_published_ode_samples_on_the_linear_path(solver: str) -> None:
    """The published solver outputs with an exact Gaussian field; n time points there are n − 1 steps here."""
    from safetensors.torch import load_file

    from tests.conftest import DATA

    golden = load_file(DATA / "transport_ode_linear.safetensors")
    mean, scale = torch.tensor([0.5, -1.0, 2.0, 0.25]).view(1, 4, 1, 1), 0.7

    def field(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        a, s = flow.expand(t, x), 1 - flow.expand(t, x)
        return mean + (a * scale**2 - s) / (a**2 * scale**2 + s**2) * (x - a * mean)

    names = [name for name in golden if name.startswith(solver)]
    assert names
    for name in names:
        shift, points = (float(part) for part in name.split("shift")[1].split(".n"))
        got = flow.SOLVERS[solver](field, golden["x_0"], flow.time_grid(int(points) - 1, shift or 1.0)).x_1
        torch.testing.assert_close(got, golden[name], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("config", "law"),
    [
        (FlowConfig(time_sampling="uniform"), stats.uniform().cdf),
        (
            FlowConfig(time_sampling="logit-normal", time_mean=-0.4, time_std=0.8),
            lambda t: stats.norm(-0.4, 0.8).cdf(np.log(t / (1 - t))),
        ),
    ],
)
def test_times_follow_their_law(config: FlowConfig, law) -> None:
    """Kolmogorov-Smirnov against the distribution asked for."""
    times = flow.draw_times(config, 20_000, torch.Generator().manual_seed(1)).numpy()
    assert times.min() > 0 or config.time_sampling == "uniform"
    assert times.max() < 1
    assert stats.kstest(times, law).pvalue > 0.01


def test_guidance_is_linear_in_its_scale_and_skips_what_it_does_not_use() -> None:
    """null + g·(cond − null); outside the interval and at scale 1 only one half is computed."""
    calls: list[int] = []

    def model(x: torch.Tensor, t: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
        calls.append(len(x))
        return x * s.view(-1, 1, 1, 1)

    x, snippets = torch.ones(2, 1, 1, 1), torch.tensor([[2.0], [3.0]])
    t = torch.full((2,), 0.5)
    for scale in (0.0, 2.0, 7.75):
        got = flow.guided(model, snippets, scale, 0.0, 1.0)(x, t)
        torch.testing.assert_close(got.flatten(), scale * snippets.flatten())
    assert calls == [4, 4, 4]
    calls.clear()
    assert torch.equal(flow.guided(model, snippets, 1.0, 0.0, 1.0)(x, t).flatten(), snippets.flatten())
    assert torch.equal(flow.guided(model, snippets, 3.0, 0.6, 1.0)(x, t).flatten(), snippets.flatten())
    assert torch.equal(flow.guided(model, snippets, 3.0, 0.0, 0.4)(x, t).flatten(), torch.zeros(2))
    assert calls == [2, 2, 2]


def test_no_steps_is_an_error() -> None:
    """A grid has at least one step."""
    with pytest.raises(ConfigError):
        flow.time_grid(0)
    with pytest.raises(ConfigError, match="positive"):
        flow.time_grid(4, 0.0)
