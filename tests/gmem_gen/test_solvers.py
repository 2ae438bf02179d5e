"""Solvers of the ODE and the SDE: the published samples, orders of convergence, exact solutions."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from gmem_bank.errors import ConfigError, MissingDependencyError
from gmem_gen import ode, paths, predictions, sde, times
from gmem_gen.config import FlowConfig, SampleConfig
from gmem_gen.sampling import solve
from tests.gmem_gen.golden import FOLDERS, gaussian, runs

MEAN, SCALE = torch.tensor([0.5, -1.0, 2.0, 0.25]).view(1, 4, 1, 1), 0.7
MU, S = 0.7, 0.5
torch.manual_seed(0)
X_0 = torch.randn(4, 3, 5, 5).double()


def counted(field):
    """The field, and how many points it was evaluated at."""
    seen = []

    def call(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        seen.append((float(t[0]), x.clone()))
        return field(x, t)

    return call, seen


@pytest.mark.parametrize("folder", FOLDERS, ids=str)
@pytest.mark.parametrize("path", ["Linear", "GVP", "VP"])
def test_the_published_ode_samples(folder, path: str) -> None:
    """Every path, prediction, method and shift; n time points there are n − 1 steps here; the NFE is the same."""
    vectors, records = runs(folder, "transport_ode")
    compared = 0
    for run in [run for run in records if run["path"] == path and not run.get("error")]:
        flow = FlowConfig(path=path, prediction=run["prediction"])
        config = SampleConfig(
            method=run["method"], num_steps=run["num_steps"] - 1, timestep_shift=run["timestep_shift"] or 1.0
        )
        field = gaussian(flow.path, flow.prediction, MEAN, SCALE)
        solution = solve(field, flow, config, lambda: vectors["in.init"])
        torch.testing.assert_close(
            solution.x_1, vectors[run["key"]], atol=1e-4, rtol=1e-4, msg=lambda m, k=run["key"]: f"{k}: {m}"
        )
        assert solution.nfe == run["nfe"]
        compared += 1
    assert compared > 30


@pytest.mark.parametrize("folder", FOLDERS, ids=str)
@pytest.mark.parametrize("path", ["Linear", "GVP", "VP"])
def test_the_published_sde_samples(folder, path: str) -> None:
    """Every diffusion and last step, from the published noise, with half the evaluations; finite where theirs is not."""
    vectors, records = runs(folder, "transport_sde")
    compared = 0
    for run in [run for run in records if run["path"] == path]:
        last = str(run["last_step"])
        config = SampleConfig(
            method=f"sde-{run['method']}", num_steps=run["num_steps"] - (last == "None"), last_step=last,
            last_step_size=run["last_step_size"], diffusion=run["diffusion_form"],
            diffusion_norm=float(run["diffusion_norm"]),
        )  # fmt: skip
        flow = FlowConfig(path=path, prediction=run["prediction"])
        stream = iter([vectors["in.init"], *vectors["noise.seed99"]])
        field, seen = counted(gaussian(flow.path, flow.prediction, MEAN, SCALE))
        solution = solve(field, flow, config, lambda stream=stream: next(stream))
        assert torch.isfinite(solution.x_1).all(), run["key"]
        assert solution.nfe == len(seen)
        if run.get("error") or not run["finite"]:
            continue
        torch.testing.assert_close(
            solution.x_1, vectors[run["key"]], atol=1e-4, rtol=1e-4, msg=lambda m, k=run["key"]: f"{k}: {m}"
        )
        assert 2 * solution.nfe - (last in ("Tweedie", "Euler")) == run["nfe"]
        assert max(time for time, _ in seen) == pytest.approx(run["t_last"], abs=1e-6)
        compared += 1
    assert compared > 30


def test_the_published_setting_takes_99_evaluations_each_of_another_point() -> None:
    """SDE Heun, 50 steps with a last step of 0.004: no (x, t) is evaluated twice."""
    field, seen = counted(gaussian("linear", "velocity", MU, S))
    generator = torch.Generator().manual_seed(0)
    config = SampleConfig(method="sde-heun", num_steps=50)
    solution = solve(
        field, FlowConfig(prediction="velocity"), config, lambda: torch.randn(8, generator=generator)[:, None]
    )
    assert solution.nfe == len(seen) == 99
    for index, (time, x) in enumerate(seen):
        assert not any(time == other and torch.equal(x, y) for other, y in seen[:index])


def blow_down(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """x' = −(1 + t)·x², whose solution is 1 / (1/x_0 + t + t²/2)."""
    return -(1 + t.view(-1, 1, 1, 1)) * x**2


def order_of(field, method: str, x_0: torch.Tensor, exact: torch.Tensor) -> np.ndarray:
    """By how many powers of 2 the error falls when the step is halved; checks the NFE too."""
    errors = []
    for steps in (40, 80, 160):
        solution = ode.solve_ode(field, x_0, torch.linspace(0, 1, steps + 1, dtype=torch.float64), method)
        assert solution.nfe == steps * len(ode.TABLEAUX[method].b)
        errors.append(float((solution.x_1 - exact).abs().max()))
    return np.log2(np.array(errors[:-1]) / np.array(errors[1:]))


ORDERS = {"euler": 1, "heun": 2, "midpoint": 2, "heun3": 3, "rk4": 4}


@pytest.mark.parametrize("method", ORDERS)
def test_ode_methods_have_their_order(method: str) -> None:
    """On a nonlinear equation with a known solution."""
    x_0 = X_0.abs() + 0.2
    np.testing.assert_allclose(order_of(blow_down, method, x_0, 1 / (1 / x_0 + 1.5)), ORDERS[method], atol=0.25)


@pytest.mark.parametrize("method", ORDERS)
@pytest.mark.parametrize("path", ["linear", "gvp"])
def test_ode_methods_converge_to_the_exact_sample(method: str, path: str) -> None:
    """Of a Gaussian, whose exact flow keeps the quantile: x_1 = MU + S·x_0. (The midpoint rule does better on it.)"""
    rates = order_of(gaussian(path, "velocity", MU, S), method, X_0, MU + S * X_0)
    assert rates.min() > ORDERS[method] - 0.4
    assert method == "midpoint" or rates.max() < ORDERS[method] + 0.3


@pytest.mark.parametrize("path", ["linear", "gvp"])
def test_dopri5_keeps_its_tolerance(path: str) -> None:
    """A tighter tolerance gives a smaller error and takes more evaluations."""
    grid = torch.tensor([0.0, 1.0], dtype=torch.float64)
    errors, costs = [], []
    for tolerance in (1e-3, 1e-7):
        solution = ode.solve_ode(gaussian(path, "velocity", MU, S), X_0, grid, "dopri5", rtol=tolerance, atol=tolerance)
        errors.append(float((solution.x_1 - (MU + S * X_0)).abs().max()))
        costs.append(solution.nfe)
    assert errors[0] < 0.1
    assert errors[1] < 1e-5
    assert costs[1] > costs[0]


@pytest.mark.parametrize("path", ["linear", "gvp", "vp"])
def test_dopri5_can_end_on_its_last_time(path: str) -> None:
    """Without overshoot the field is never asked past the end; the error stays in the order of the tolerance."""
    grid = times.time_grid(1, 1.0, *times.usable_interval(path, "velocity")).double()
    at = paths.coefficients(path, grid[[0, 1]], X_0)
    deviation = (at.alpha**2 * S**2 + at.sigma**2).sqrt().flatten()
    exact = at.alpha[1] * MU + deviation[1] / deviation[0] * (X_0 - at.alpha[0] * MU)
    for overshoot in (True, False):
        field, seen = counted(gaussian(path, "velocity", MU, S))
        end = ode.solve_ode(field, X_0, grid, "dopri5", overshoot=overshoot).x_1
        latest = max(time for time, _ in seen)
        assert latest > 1 if overshoot else latest == pytest.approx(float(grid[-1]))
        assert float((end - exact).abs().max()) < (0.1 if overshoot else 0.02)


def test_dopri5_without_its_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    """And what else would do."""
    monkeypatch.setitem(__import__("sys").modules, "torchdiffeq", None)
    with pytest.raises(MissingDependencyError, match=r"gmem\[train\].*heun"):
        ode.solve_ode(gaussian("linear", "velocity", MU, S), X_0, torch.tensor([0.0, 1.0]), "dopri5")


@pytest.mark.parametrize("prediction", predictions.PREDICTIONS)
@pytest.mark.parametrize("path", ["linear", "gvp", "vp"])
def test_every_prediction_of_one_field_draws_the_same_sample(path: str, prediction: str) -> None:
    """The exact field as velocity, noise, score or data, over an interval inside which all are bounded."""
    grid = torch.linspace(0.05, 0.9, 60, dtype=torch.float64)
    ends = [
        ode.solve_ode(predictions.velocity_field(gaussian(path, name, MU, S), name, path), X_0, grid, "heun").x_1
        for name in ("velocity", prediction)
    ]
    torch.testing.assert_close(ends[1], ends[0], atol=1e-8, rtol=1e-8)


def brownian(steps: int, levels: int, count: int) -> list[torch.Tensor]:
    """Increments of one Brownian motion on `steps`, steps/2, … intervals, as standard normals."""
    fine = torch.randn(steps, count, 1, generator=torch.Generator().manual_seed(5)).double()
    found = [fine]
    for _ in range(levels - 1):
        fine = (fine[0::2] + fine[1::2]) / 2**0.5
        found.append(fine)
    return found


@pytest.mark.parametrize("method", ["sde-euler", "sde-heun"])
def test_the_sde_methods_converge_strongly(method: str) -> None:
    """Against the finest grid, driven by the same Brownian motion: additive noise gives order 1."""
    dynamics = predictions.dynamics(gaussian("linear", "velocity", MU, S), "velocity", "linear")
    start = torch.randn(400, 1, generator=torch.Generator().manual_seed(3)).double()
    ends = []
    for normals in brownian(512, 6, 400):
        grid = torch.linspace(0.1, 0.9, len(normals) + 1, dtype=torch.float64)
        solution = sde.solve_sde(
            dynamics, start, grid, draw=lambda step, normals=normals: normals[step], method=method, last_step="none"
        )
        ends.append(solution.x_1)
    errors = [float((end - ends[0]).abs().mean()) for end in ends[2:]]
    rates = np.log2(np.array(errors[1:]) / np.array(errors[:-1]))
    np.testing.assert_allclose(rates, 1, atol=0.35)


@pytest.mark.parametrize("prediction", ["velocity", "data"])
@pytest.mark.parametrize("diffusion", list(sde.DIFFUSIONS))
@pytest.mark.parametrize("path", ["linear", "gvp", "vp"])
def test_the_sde_carries_noise_to_the_data_for_every_diffusion(path: str, diffusion: str, prediction: str) -> None:
    """N(0, 1) becomes N(MU, S²), in mean and standard deviation."""
    generator = torch.Generator().manual_seed(1)
    config = SampleConfig(method="sde-heun", num_steps=100, diffusion=diffusion)
    flow = FlowConfig(path=path, prediction=prediction)
    drawn = solve(
        gaussian(path, prediction, MU, S), flow, config, lambda: torch.randn(20_000, 1, generator=generator)
    ).x_1
    tolerance = 0.04 if prediction == "data" else 0.03  # its velocity is bounded near t = 1
    assert float(drawn.mean()) == pytest.approx(MU, abs=tolerance)
    assert float(drawn.std()) == pytest.approx(S, abs=tolerance)


@pytest.mark.parametrize("method", ["sde-euler", "sde-heun"])
def test_the_sde_draws_predicted_data_itself(method: str) -> None:
    """Where the network says the same image everywhere, every sample is that image: no noise is left on it."""
    generator = torch.Generator().manual_seed(1)
    config = SampleConfig(method=method, num_steps=250)
    flow = FlowConfig(path="linear", prediction="data")
    drawn = solve(
        lambda x, _: torch.full_like(x, 0.8), flow, config, lambda: torch.randn(2_000, 1, generator=generator)
    ).x_1
    assert float(drawn.mean()) == pytest.approx(0.8, abs=0.005)
    assert float(drawn.std()) < 0.005


def test_the_score_of_predicted_data_is_not_bounded_where_its_velocity_is() -> None:
    """At t = 0.99 the velocity is divided by 0.05, the score by the true σ²."""
    t = torch.full((len(X_0),), 0.99, dtype=torch.float64)
    velocity, score = predictions.dynamics(lambda x, _: torch.ones_like(x), "data", "linear")(X_0, t)
    torch.testing.assert_close(velocity, (1 - X_0) / 0.05)
    torch.testing.assert_close(score, (0.99 - X_0) / (1 - t.view(-1, 1, 1, 1)) ** 2)


def test_last_steps_are_their_formulas() -> None:
    """One evaluation at the last time: along the drift, along the velocity, or to the expected data."""
    dynamics = predictions.dynamics(gaussian("gvp", "noise", MU, S), "noise", "gvp")
    t = torch.tensor([0.3, 0.6], dtype=torch.float64)
    zeros = torch.zeros_like(X_0)

    def end(last: str) -> torch.Tensor:
        return sde.solve_sde(
            dynamics, X_0, t, draw=lambda _: zeros, method="sde-euler", path="gvp", diffusion="sigma", last_step=last,
            last_step_size=0.1,
        ).x_1  # fmt: skip

    x, when = end("none"), torch.full((len(X_0),), 0.6).double()
    velocity, score = dynamics(x, when)
    strength = sde.diffusion_at("sigma", when, x, "gvp")
    torch.testing.assert_close(end("euler"), x + 0.1 * velocity)
    torch.testing.assert_close(end("mean"), x + 0.1 * (velocity + strength * score))
    torch.testing.assert_close(end("tweedie"), gaussian("gvp", "data", MU, S)(x, when))


def test_grids_are_shifted_as_published_and_unknown_names_are_answered() -> None:
    """s·t / (1 + (s − 1)·t); methods and last steps with suggestions."""
    grid = times.time_grid(10, 0.3)
    t = torch.linspace(0, 1, 11)
    torch.testing.assert_close(grid, 0.3 * t / (1 - 0.7 * t))
    with pytest.raises(ConfigError, match="'heun'"):
        ode.solve_ode(gaussian("linear", "velocity", MU, S), X_0, t, "huen")
    dynamics = predictions.dynamics(gaussian("linear", "velocity", MU, S), "velocity", "linear")
    for wrong in ({"method": "sde-huen"}, {"last_step": "twedie"}):
        with pytest.raises(ConfigError, match="Did you mean"):
            sde.solve_sde(dynamics, X_0, t, draw=lambda _: X_0, **wrong)
