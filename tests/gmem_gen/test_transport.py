"""Paths, predictions, losses and times: the published numbers, and the laws behind them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from scipy import stats

from gmem_bank.errors import ConfigError
from gmem_gen import losses, paths, predictions, times
from gmem_gen.config import FlowConfig, SampleConfig
from gmem_gen.sde import DIFFUSIONS, diffusion_at
from tests.gmem_gen.golden import FOLDERS

torch.manual_seed(0)
X_0, X_1 = torch.randn(2, 4, 3, 5, 5).double()
T = torch.tensor([0.02, 0.3, 0.6, 0.95]).double()
NAMES = {"Linear": "linear", "GVP": "gvp", "VP": "vp"}
CLOSE = {"atol": 2e-5, "rtol": 1e-4}


@pytest.mark.parametrize("folder", FOLDERS, ids=str)
@pytest.mark.parametrize("published", NAMES)
def test_the_published_plan(folder, published: str) -> None:
    """α, σ, derivatives, x_t, v, drifts, diffusion forms and conversions."""
    golden, path = load_file(folder / "transport_plan.safetensors"), NAMES[published]
    x_0, x_1, t, value = (golden[f"in.{name}"] for name in ("x0", "x1", "t", "pred"))
    at = paths.coefficients(path, t, x_1)
    x_t = paths.interpolant(x_0, x_1, t, path)
    mine = {
        "xt": x_t,
        "ut": paths.target_velocity(x_0, x_1, t, path),
        "drift_mean": -at.growth * x_t,
        "drift_var": at.strength,
        "noise_from_velocity(pred)": predictions.convert(value, x_t, at, "velocity", "noise"),
        "score_from_velocity(pred)": predictions.convert(value, x_t, at, "velocity", "score"),
        "velocity_from_score(pred)": predictions.convert(value, x_t, at, "score", "velocity"),
    }
    for name in ("alpha", "sigma", "d_alpha", "d_sigma"):
        if f"{published}.{name}" in golden:
            mine[name] = getattr(at, name).flatten()
    forms = [name for name in golden if name.startswith(f"{published}.diffusion.")]
    assert len(forms) == 10
    for name in forms:
        form, norm = name.removeprefix(f"{published}.diffusion.").split(".norm")
        mine[name.removeprefix(f"{published}.")] = diffusion_at(form, t, x_1, path, float(norm))
    for name, got in mine.items():
        torch.testing.assert_close(got, golden[f"{published}.{name}"], **CLOSE, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("folder", FOLDERS, ids=str)
def test_the_published_losses(folder) -> None:
    """Every prediction with every weighting, the cosine term, the projection term."""
    golden = load_file(folder / "transport_plan.safetensors")
    x_0, x_1, t, value = (golden[f"in.{name}"] for name in ("x0", "x1", "t", "pred"))
    count = 0
    for name in [name for name in golden if name.endswith(".loss")]:
        published, prediction, weighting, _ = name.split(".")
        path, weighting = NAMES[published], weighting.removeprefix("w_").lower()
        x_t = paths.interpolant(x_0, x_1, t, path)
        got = losses.squared_errors(value, x_0, x_1, x_t, t, path=path, prediction=prediction, weighting=weighting)
        torch.testing.assert_close(got, golden[name], **CLOSE)
        if prediction == "velocity":
            cosine = losses.cosine_errors(value, paths.target_velocity(x_0, x_1, t, path))
            torch.testing.assert_close(cosine, golden[name.replace(".loss", ".cos_loss")], **CLOSE)
        count += 1
    assert count == 21
    torch.testing.assert_close(
        losses.projection_loss(golden["in.z_tilde"], golden["in.z"]), golden["proj_loss"], **CLOSE
    )


@pytest.mark.parametrize("folder", FOLDERS, ids=str)
def test_the_published_times(folder) -> None:
    """Grids with and without shift; uniform and logit-normal times from the same random numbers."""
    grids = load_file(folder / "transport_odetimes.safetensors")
    for name, golden in grids.items():
        shift, points = (float(part) for part in name.removeprefix("times.shift").split(".n"))
        torch.testing.assert_close(times.time_grid(int(points) - 1, shift or 1.0), golden, atol=1e-6, rtol=1e-6)
    drawn = load_file(folder / "transport_tsample.safetensors")
    normals = torch.from_numpy(np.random.RandomState(3).standard_normal(16))
    torch.testing.assert_close(times.logistic_normal(normals).float(), drawn["lognorm.np_seed3.t"])
    generator = torch.Generator().manual_seed(3)
    x_0 = torch.randn(drawn["uniform.torch_seed3.x0"].shape, generator=generator)
    assert torch.equal(x_0, drawn["uniform.torch_seed3.x0"])
    config = FlowConfig(time_sampling="uniform", prediction="velocity")
    torch.testing.assert_close(times.draw_times(config, 16, generator), drawn["uniform.torch_seed3.t"])


@pytest.mark.parametrize("path", paths.PATHS)
def test_the_velocity_is_the_slope_of_the_path(path: str) -> None:
    """d x_t / dt and the derivatives of α and σ by finite differences; the ends are noise and data."""
    h = 1e-6
    velocity = paths.target_velocity(X_0, X_1, T, path)
    slope = (paths.interpolant(X_0, X_1, T + h, path) - paths.interpolant(X_0, X_1, T - h, path)) / (2 * h)
    torch.testing.assert_close(slope, velocity, atol=1e-6, rtol=1e-6)
    first, last = (paths.interpolant(X_0, X_1, torch.full((4,), end).double(), path) for end in (0.0, 1.0))
    torch.testing.assert_close(last, X_1, atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(first, X_0, atol=0.05 if path == "vp" else 1e-9, rtol=0)


@pytest.mark.parametrize("path", paths.PATHS)
@pytest.mark.parametrize("source", predictions.PREDICTIONS)
@pytest.mark.parametrize("target", predictions.PREDICTIONS)
def test_every_conversion_is_exact_and_inverts(path: str, source: str, target: str) -> None:
    """From the truth to the truth; and there and back for any value."""
    at, x_t = paths.coefficients(path, T, X_0), paths.interpolant(X_0, X_1, T, path)
    truth = {
        "velocity": paths.target_velocity(X_0, X_1, T, path),
        "noise": X_0,
        "score": -X_0 / at.sigma,
        "data": X_1,
    }
    torch.testing.assert_close(predictions.convert(truth[source], x_t, at, source, target), truth[target])
    anything = torch.randn_like(X_0)
    there = predictions.convert(anything, x_t, at, source, target)
    torch.testing.assert_close(predictions.convert(there, x_t, at, target, source), anything)


@pytest.mark.parametrize("path", ["linear", "gvp"])
def test_conversions_hold_at_the_ends_where_they_can(path: str) -> None:
    """Noise and score from a velocity at t = 0, data from a velocity or noise at t = 1: finite and right."""
    velocity = paths.target_velocity(X_0, X_1, torch.zeros(4), path)
    at = paths.coefficients(path, torch.zeros(4), X_0)
    torch.testing.assert_close(predictions.convert(velocity, X_0, at, "velocity", "noise"), X_0)
    torch.testing.assert_close(predictions.convert(velocity, X_0, at, "velocity", "score"), -X_0)
    end = torch.ones(4).double()
    at = paths.coefficients(path, end, X_0)
    velocity = paths.target_velocity(X_0, X_1, end, path)
    torch.testing.assert_close(predictions.convert(velocity, X_1, at, "velocity", "data"), X_1)
    torch.testing.assert_close(predictions.convert(X_0, X_1, at, "noise", "data"), X_1)


def test_data_prediction_stays_finite_at_the_end() -> None:
    """At t = 1 the quotient is bounded, on the linear path by 1 / 0.05."""
    for path in ("linear", "gvp", "vp"):
        x_t = paths.interpolant(X_0, X_1, torch.ones(4).double(), path)
        assert torch.isfinite(predictions.to_velocity(X_1 + 1, x_t, torch.ones(4), "data", path)).all()
    got = predictions.to_velocity(X_1 + 1, X_1, torch.ones(4), "data")
    torch.testing.assert_close(got, torch.full_like(X_1, 20.0))
    when = torch.full((4,), 0.4).double()
    x_t = paths.interpolant(X_0, X_1, when, "gvp")
    got = predictions.to_velocity(X_1, x_t, when, "data", "gvp")
    torch.testing.assert_close(got, paths.target_velocity(X_0, X_1, when, "gvp"))


def test_the_diffusion_forms_equal_their_formulas() -> None:
    """Closed forms on the linear path; "SBDM" there is σ/t; the published spelling is understood."""
    expected = {
        "constant": torch.full_like(T, 2.0),
        "SBDM": 2 * (1 - T) / T,
        "sigma": 2 * (1 - T),
        "linear": 2 * (1 - T),
        "decreasing": 0.25 * (2 * torch.cos(torch.pi * T) + 1) ** 2,
        "increasing-decreasing": 2 * torch.sin(torch.pi * T) ** 2,
    }
    assert expected.keys() == DIFFUSIONS.keys()
    for form, values in expected.items():
        torch.testing.assert_close(diffusion_at(form, T, X_0, "linear", 2.0).flatten(), values)
    misspelt = diffusion_at("inccreasing-decreasing", T, X_0, "linear")
    assert torch.equal(misspelt, diffusion_at("increasing-decreasing", T, X_0, "linear"))


@pytest.mark.parametrize("prediction", predictions.PREDICTIONS)
@pytest.mark.parametrize("path", paths.PATHS)
def test_the_velocity_weighting_is_the_loss_of_the_velocity(path: str, prediction: str) -> None:
    """The weighted error of noise or score is the squared error of the velocity that follows from it."""
    x_t = paths.interpolant(X_0, X_1, T, path)
    output, at = torch.randn_like(X_0), paths.coefficients(path, T, X_0)
    weighting = "velocity" if prediction in ("noise", "score") else "none"
    got = losses.squared_errors(output, X_0, X_1, x_t, T, path=path, prediction=prediction, weighting=weighting)
    velocity = predictions.convert(output, x_t, at, prediction, "velocity")
    expected = (velocity - paths.target_velocity(X_0, X_1, T, path)).square().flatten(1).mean(1)
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("prediction", predictions.PREDICTIONS)
@pytest.mark.parametrize("path", paths.PATHS)
def test_the_truth_has_no_loss_at_any_time(path: str, prediction: str) -> None:
    """Near t = 1 too, where the velocity of predicted data is bounded."""
    t = torch.tensor([0.01, 0.5, 0.96, 0.998]).double()
    x_t, at = paths.interpolant(X_0, X_1, t, path), paths.coefficients(path, t, X_0)
    velocity = paths.target_velocity(X_0, X_1, t, path)
    truth = {"velocity": velocity, "noise": X_0, "score": -X_0 / at.sigma, "data": X_1}[prediction]
    config = FlowConfig(path=path, prediction=prediction, cosine_weight=float(prediction in ("velocity", "data")))
    assert float(losses.flow_losses(truth, X_0, X_1, x_t, t, config).total) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("prediction", ["velocity", "noise", "score", "data"])
def test_the_losses_gradient_equals_a_finite_difference(prediction: str) -> None:
    """Of the total with cosine and projection, in a random direction, in float64."""
    config = FlowConfig(
        prediction=prediction, path="gvp", cosine_weight=0.7 if prediction in ("velocity", "data") else 0.0,
        weighting="likelihood" if prediction in ("noise", "score") else "none",
    )  # fmt: skip
    output, direction = torch.randn_like(X_0), torch.randn_like(X_0)
    x_t = paths.interpolant(X_0, X_1, T, "gvp")
    output.requires_grad_()
    losses.flow_losses(output, X_0, X_1, x_t, T, config).total.backward()
    with torch.no_grad():
        ends = [losses.flow_losses(output + h * direction, X_0, X_1, x_t, T, config).total for h in (1e-5, -1e-5)]
        slope = float(ends[0] - ends[1]) / 2e-5
        assert float((output.grad * direction).sum()) == pytest.approx(slope, rel=1e-5)


def test_the_total_is_the_weighted_sum_and_wants_both_halves_of_the_projection() -> None:
    """MSE + weight·cosine + weight·projection; tokens without a head or a head without tokens are refused."""
    x_0, x_1, t = X_0.float(), X_1.float(), T.float()
    x_t, output = paths.interpolant(x_0, x_1, t), torch.randn_like(x_0)
    tokens = torch.randn(4, 9, 7)
    config = FlowConfig(prediction="velocity", cosine_weight=2.0, projection_weight=0.25)
    got = losses.flow_losses(output, x_0, x_1, x_t, t, config, projected=tokens, tokens=tokens)
    assert got.cosine is not None
    torch.testing.assert_close(got.projection, torch.tensor(-1.0))
    torch.testing.assert_close(got.total, got.mse + 2 * got.cosine - 0.25)
    with pytest.raises(ConfigError, match="both"):
        losses.flow_losses(output, x_0, x_1, x_t, t, config, projected=tokens)
    with pytest.raises(ConfigError, match=r"shape \(4, 9, 7\).*\(4, 8, 7\)"):
        losses.projection_loss(tokens, tokens[:, :8])


@pytest.mark.parametrize(
    ("config", "law"),
    [
        (FlowConfig(time_sampling="uniform"), stats.uniform().cdf),
        (FlowConfig(time_sampling="uniform", prediction="noise"), stats.uniform(1e-3, 1 - 2e-3).cdf),
        (
            FlowConfig(time_sampling="logit-normal", time_mean=-0.4, time_std=0.8),
            lambda t: stats.norm(-0.4, 0.8).cdf(np.log(t / (1 - t))),
        ),
    ],
)
def test_times_follow_their_law(config: FlowConfig, law) -> None:
    """Kolmogorov-Smirnov against the distribution asked for, inside the usable interval."""
    drawn = times.draw_times(config, 20_000, torch.Generator().manual_seed(1)).numpy()
    assert drawn.max() < 1
    if config.prediction == "noise":
        assert drawn.min() >= 1e-3
        assert drawn.max() <= 1 - 1e-3
    assert stats.kstest(drawn, law).pvalue > 0.01


def test_intervals_leave_out_what_is_singular() -> None:
    """As published where it works; where that gives NaN, an end is kept at a distance."""
    assert times.usable_interval("linear", "velocity") == (0.0, 1.0)
    assert times.usable_interval("gvp", "noise") == (1e-3, 1 - 1e-3)
    assert times.usable_interval("vp", "score") == (0.0, 1 - 1e-3)
    assert times.training_interval("vp", "velocity") == (0.0, 1 - 1e-5)
    mean, none = SampleConfig(method="sde-heun"), SampleConfig(method="sde-heun", last_step="none")
    assert times.sde_interval("linear", "velocity", mean) == (0.0, 1 - 0.004)
    assert times.sde_interval("linear", "velocity", none) == (0.0, 1 - 1e-3)
    euler = SampleConfig(method="sde-euler", last_step="none", diffusion="SBDM")
    assert times.sde_interval("linear", "velocity", euler) == (1e-3, 1.0)


def test_unknown_names_are_errors_with_a_suggestion() -> None:
    """Paths, predictions, weightings, diffusions; impossible grids; a weighting where there is none to give."""
    at = paths.coefficients("linear", T, X_0)
    for call, answer in (
        (lambda: paths.coefficients("linaer", T, X_0), "'linear'"),
        (lambda: predictions.convert(X_0, X_0, at, "nosie", "data"), "'noise'"),
        (lambda: losses.weight_of("velcity", at), "'velocity'"),
        (lambda: diffusion_at("lineer", T, X_0, "linear"), "'linear'"),
        (lambda: times.time_grid(0), "at least 1"),
        (lambda: times.time_grid(4, 0.0), "positive"),
        (
            lambda: losses.squared_errors(
                X_0, X_0, X_1, X_0, T, path="linear", prediction="velocity", weighting="likelihood"
            ),
            "noise or score",
        ),
    ):
        with pytest.raises(ConfigError, match=answer):
            call()
