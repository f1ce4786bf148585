from __future__ import annotations

import io
import math
import random
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Predictive, Trace_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoNormal, init_to_value
from pyro.nn import PyroModule
from torch import Tensor
from torch.distributions import constraints, kl_divergence

import pyro_vi_lab as vl
from pyro_vi_lab.errors import ArgumentError, FitError, LabError, LabWarning
from pyro_vi_lab.families import FAMILIES, Params
from pyro_vi_lab.guides import FullRankNormal, MeanFieldNormal
from pyro_vi_lab.models import EightSchools, LinearRegression, build
from pyro_vi_lab.natural_step import tolerance

STANDARD_ERRORS = 5  # fails a right answer once in two million
each_guide = pytest.mark.parametrize("guide", vl.guides.FAMILY_GUIDES)
each_normal = pytest.mark.parametrize("guide", ["mean_field", "full_rank", "block", "low_rank"])


# Problems


def regression(num_features: int = 3, seed: int = 0) -> tuple[vl.Problem, Any]:
    """Conjugate, with its exact posterior."""
    model = LinearRegression(noise_scale=0.7, prior_scale=1.5)
    X, y, _ = model.simulate(3 * num_features + 10, num_features, seed=seed)
    return model.problem(X, y), model.exact(X, y)


def skewed(y: Tensor) -> None:
    """A scale with few data: not normal."""
    scale = pyro.sample("scale", dist.HalfCauchy(2.0))
    loc = pyro.sample("loc", dist.Normal(0.0, 5.0))
    with pyro.plate("row", len(y)):
        pyro.sample("y", dist.Normal(loc, scale), obs=y)


Y = torch.tensor([0.3, -1.2, 2.5, 0.9, 1.4], dtype=torch.float64)


def two_modes() -> None:
    """N(-4, 1) with weight 1/4 and N(4, 1) with weight 3/4."""
    x = pyro.sample("x", dist.ImproperUniform(constraints.real, (), ()))
    pyro.factor(
        "modes", torch.stack([math.log(0.25) - (x + 4) ** 2 / 2, math.log(0.75) - (x - 4) ** 2 / 2]).logsumexp(0)
    )


def dependent() -> None:
    """As in a GARCH model: the second support ends where the first value leaves off."""
    a = pyro.sample("a", dist.Beta(4.0, 5.0))
    b = pyro.sample("b", dist.Uniform(0.0, 1.0 - a))
    pyro.sample("y", dist.Normal(a + b, 0.1), obs=torch.tensor(0.7))


def quick(problem: vl.Problem, guide: Any = "full_rank", **options: Any) -> vl.Fit:
    return vl.fit(problem, guide, progress=False, **options)


def distance(one: vl.Fit, other: vl.Fit) -> float:
    """KL divergence between two fits of one family."""
    first, second = (Params(fit.params.loc[0], fit.params.scale[0]) for fit in (one, other))
    return float(one.family.kl(first, second))


# Exactness


@pytest.mark.parametrize("num_features", [1, 2, 3, 5, 8, 20, 40])
@pytest.mark.parametrize("seed", range(4))
def test_conjugate_regression_is_exact(num_features: int, seed: int) -> None:
    problem, exact = regression(num_features, seed)
    fit = quick(problem, seed=seed)
    assert fit.status is vl.Status.CONVERGED
    assert fit.num_steps <= 50
    sd = exact.covariance.diagonal().sqrt()
    assert ((fit.loc - exact.mean) / sd).abs().max() < 1e-6
    assert ((fit.covariance() - exact.covariance) / (sd * sd.unsqueeze(-1))).abs().max() < 1e-6
    value, error = fit.elbo()
    assert value == pytest.approx(exact.log_evidence, rel=1e-9)  # log p - log q is constant where q = p
    assert error < 1e-6


@pytest.mark.parametrize("dim", [1, 10, 50])
@pytest.mark.parametrize("condition", [1.0, 1e3, 1e6])
def test_a_gaussian_target_of_any_condition(dim: int, condition: float) -> None:
    """Standard deviations from 1 down to 1e-3, turned; the start is 1e-1 wide, and a thousand of the smallest away."""
    generator = torch.Generator().manual_seed(dim)
    turn, _ = torch.linalg.qr(torch.randn(dim, dim, generator=generator, dtype=torch.float64))
    values = torch.logspace(-math.log10(condition), 0, dim, dtype=torch.float64)
    covariance, loc = (turn * values) @ turn.T, torch.randn(dim, generator=generator, dtype=torch.float64)
    precision = (turn / values) @ turn.T

    def model() -> None:
        pyro.sample("x", dist.MultivariateNormal(loc, precision_matrix=(precision + precision.T) / 2))

    fit = quick(vl.Problem(model))
    assert fit.status is vl.Status.CONVERGED
    assert fit.num_steps <= 25
    exact = dist.MultivariateNormal(loc, (covariance + covariance.T) / 2)
    assert float(kl_divergence(dist.MultivariateNormal(fit.loc, fit.covariance()), exact)) < 1e-8


def test_mean_field_of_a_conjugate_regression() -> None:
    """The exact mean, and one over the diagonal of the precision."""
    problem, exact = regression()
    fit = quick(problem, "mean_field")
    assert fit.status is vl.Status.CONVERGED
    precision = torch.linalg.inv(exact.covariance)
    best = Params(exact.mean, precision.diagonal().rsqrt())
    assert fit.family.kl(Params(fit.params.loc[0], fit.params.scale[0]), best) <= tolerance(4)


@each_normal
@pytest.mark.parametrize("seed", range(5))
def test_eight_schools(guide: str, seed: int) -> None:
    fit = quick(build("eight_schools"), guide, seed=seed)
    assert fit.status is vl.Status.CONVERGED
    assert fit.num_steps <= 60
    value, error = fit.elbo(20_000, seed=1)
    bound = {"full_rank": -31.65, "low_rank": -31.65}.get(guide, -31.68)
    assert value - STANDARD_ERRORS * error >= bound - STANDARD_ERRORS * 0.01
    assert value >= bound


@each_normal
def test_every_seed_reaches_the_same_optimum(guide: str) -> None:
    """Each is within the tolerance of it, so no two are farther apart than the sum of their distances."""
    problem = vl.Problem(skewed, Y)
    fits = [quick(problem, guide, seed=seed) for seed in range(6)]
    assert all(fit.status is vl.Status.CONVERGED for fit in fits)
    assert max(distance(fits[0], fit) for fit in fits) <= 4 * tolerance(2)


# Seeds


@each_guide
def test_same_seed_same_numbers(guide: str) -> None:
    # the log of a scale has no finite bound under a Student-t
    problem = vl.Problem(two_modes) if "student_t" in guide else vl.Problem(skewed, Y)
    one, other = (quick(problem, guide, seed=3, num_restarts=3) for _ in range(2))
    assert torch.equal(one.params.loc, other.params.loc)
    assert torch.equal(one.params.scale, other.params.scale)
    assert one.elbo(100, seed=2) == other.elbo(100, seed=2)
    for name, values in one.history.items():
        if name != "seconds":
            np.testing.assert_array_equal(values, other.history[name])
    for name, values in one.posterior(10, seed=4).draws.items():
        assert torch.equal(values, other.posterior(10, seed=4).draws[name])
    assert not torch.equal(one.params.loc, quick(problem, guide, seed=4, num_restarts=3).params.loc)


def test_seed_of_the_session_does_not_matter() -> None:
    locs = []
    for seed in (1, 2):
        pyro.set_rng_seed(seed)
        locs.append(quick(vl.Problem(skewed, Y), seed=0).loc)
    assert torch.equal(*locs)


# Restarts


@each_normal
def test_best_restart_is_first(guide: str) -> None:
    problem = vl.Problem(two_modes)
    fit = quick(problem, guide, num_restarts=12, seed=1)
    assert fit.num_restarts == len(fit.statuses) == len(fit.params.loc) == 12
    modes = fit.params.loc[:, 0]
    assert 0 < (modes > 0).sum() < 12  # both were found
    assert (modes.diff() <= 1).all()  # the higher one before the lower one
    assert fit.loc[0] == pytest.approx(4, abs=0.1)
    assert fit.elbo()[0] == pytest.approx(math.log(0.75) + math.log(2 * math.pi) / 2, abs=0.01)
    assert torch.equal(fit.guide.params.loc, fit.loc)


def test_converged_restarts_come_first() -> None:
    """A restart that starts where the density is not a number counts as diverged, and has no draws."""

    def model() -> None:
        x = pyro.sample("x", dist.ImproperUniform(constraints.real, (), ()))
        pyro.factor("p", torch.where(x < 1.5, -50 * (x + 1) ** 2, torch.nan))

    fit = quick(vl.Problem(model), num_restarts=20)
    diverged = [status is vl.Status.DIVERGED for status in fit.statuses]
    assert 0 < sum(diverged) < 20
    assert diverged == sorted(diverged)
    assert fit.status is vl.Status.CONVERGED
    assert f"{sum(diverged)} of 20 restarts did not converge" in fit.message
    assert fit.posterior(5).num_chains == 20 - sum(diverged)


def test_restarts_are_single_fits_started_there() -> None:
    """Each restart ends in the mode on whose side it began, as a single fit from a guide at that point does."""
    problem = vl.Problem(two_modes)
    fit = quick(problem, num_restarts=8, seed=2, max_steps=1, max_kl=1e-12)  # stays where it starts
    assert fit.status is vl.Status.OUT_OF_STEPS
    starts = fit.params.loc
    assert ((starts.abs() <= 2) | (starts == 0)).all()
    batch = quick(problem, num_restarts=8, seed=2)
    single = []
    for start in starts:
        guide = FullRankNormal(two_modes, init_loc_fn=init_to_value(values={"x": start[0]}))
        single.append(quick(problem, guide))
    assert all(one.status is vl.Status.CONVERGED for one in single)
    assert sorted(batch.params.loc[:, 0].sign().tolist()) == sorted(one.loc[0].sign().item() for one in single)
    for one in single:
        nearest = (batch.params.loc[:, 0] - one.loc[0]).abs().argmin()
        kl = one.family.kl(
            Params(one.params.loc[0], one.params.scale[0]),
            Params(batch.params.loc[nearest], batch.params.scale[nearest]),
        )
        assert float(kl) <= 4 * tolerance(1)


# What a fit holds


def test_history() -> None:
    one, many = (quick(vl.Problem(skewed, Y), num_restarts=number) for number in (1, 3))
    assert set(one.history) == {"negative_elbo", "gap", "step_size", "kl", "num_particles", "seconds"}
    for fit, shape in ((one, (one.num_steps + 1,)), (many, (many.num_steps + 1, 3))):
        for name, values in fit.history.items():
            assert values.shape == (shape if name not in ("num_particles", "seconds") else shape[:1]), name
        assert (np.diff(fit.history["seconds"]) >= 0).all()
        assert fit.seconds >= fit.history["seconds"][-1]
        assert fit.history["kl"][0].max() == 0
    assert one.history["negative_elbo"][-1] == pytest.approx(-one.elbo(10_000)[0], abs=0.1)
    columns = many.history["negative_elbo"][-1]
    assert columns[0] <= columns.min() + 0.1  # the order of the restarts is that of the params


def test_gradients_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = vl.Problem(skewed, Y)
    density, rows = problem.density(), 0
    plain = density.value_and_grad

    def counted(z: Tensor) -> tuple[Tensor, Tensor]:
        nonlocal rows
        rows += z[..., 0].numel()
        return plain(z)

    monkeypatch.setattr(density, "value_and_grad", counted)
    assert quick(problem, num_restarts=4).num_gradients == rows


@pytest.mark.parametrize("guide", ["mean_field", "full_rank"])
def test_standard_error_of_the_elbo_is_honest(guide: str) -> None:
    """z-scores against the exact bound, log p(y) - KL(q ‖ p), have mean zero and variance one."""
    problem, exact = regression()
    start = FAMILIES["full_rank"].initial(exact.mean, 0.3)
    made: Any = {"full_rank": FullRankNormal, "mean_field": MeanFieldNormal}[guide](problem.model)
    made(*problem.args, **problem.kwargs)
    made.params = Params(exact.mean + 0.2, start.scale if guide == "full_rank" else start.scale.diagonal())
    fit = quick(problem, made, max_steps=1, max_kl=1e-9)  # any guide will do, but not the exact posterior
    scale = fit.params.scale[0] if guide == "full_rank" else fit.params.scale[0].diag()
    kl = FAMILIES["full_rank"].kl(Params(fit.loc, scale), Params(exact.mean, torch.linalg.cholesky(exact.covariance)))
    repeats = 300
    z_scores = np.array(
        [
            (value - (exact.log_evidence - float(kl))) / error
            for value, error in (fit.elbo(400, seed=seed) for seed in range(repeats))
        ]
    )
    assert abs(z_scores.mean()) < STANDARD_ERRORS / repeats**0.5
    fourth = ((z_scores - z_scores.mean()) ** 4).mean() / z_scores.var() ** 2
    assert abs(z_scores.var() - 1) < STANDARD_ERRORS * ((fourth - 1) / repeats) ** 0.5


def test_elbo_of_the_fit_is_that_of_its_guide_in_pyro() -> None:
    problem = vl.Problem(skewed, Y)
    fit = quick(problem)
    value, error = fit.elbo(4000)
    losses = torch.tensor([Trace_ELBO().loss(skewed, fit.guide, Y) for _ in range(1000)])
    assert abs(value + float(losses.mean())) <= STANDARD_ERRORS * math.hypot(error, float(losses.std()) / 1000**0.5)


@pytest.mark.parametrize("num_draws", [1, 0, -3])
def test_elbo_needs_two_draws(num_draws: int) -> None:
    with pytest.raises(ArgumentError, match=f"num_draws must be at least 2 for a standard error, got {num_draws}"):
        quick(vl.Problem(skewed, Y)).elbo(num_draws)


@each_normal
def test_posterior_draws_are_those_of_the_guide(guide: str) -> None:
    problem = build("eight_schools")
    fit, num_draws = quick(problem, guide, num_restarts=2), 4000
    posterior = fit.posterior(num_draws, seed=5)
    z = posterior.unconstrained
    assert z is not None
    assert z.shape == (2, num_draws, 10)
    for chain in range(2):
        params = Params(fit.params.loc[chain], fit.params.scale[chain])
        covariance = fit.family.covariance(params)
        normal = dist.MultivariateNormal(params.loc, covariance)
        torch.testing.assert_close(posterior.stats["log_q"][chain], normal.log_prob(z[chain]), rtol=1e-9, atol=1e-9)
        error = covariance.diagonal().sqrt() / num_draws**0.5
        assert ((z[chain].mean(0) - params.loc).abs() <= STANDARD_ERRORS * error).all()
        products = torch.einsum("si,sj->sij", z[chain] - params.loc, z[chain] - params.loc)
        error = products.std(0) / num_draws**0.5
        assert ((products.mean(0) - covariance).abs() <= STANDARD_ERRORS * error).all()
    torch.testing.assert_close(posterior.stats["log_p"], problem.density().log_prob(z))
    for name, value in problem.density().constrain(z).items():
        torch.testing.assert_close(posterior.draws[name], value)
    assert posterior.draws["theta"].shape == (2, num_draws, 8)
    assert posterior.method == guide
    assert posterior.info["status"] == "converged"
    assert posterior.info["num_steps"] == fit.num_steps
    assert posterior.info["num_gradients"] == fit.num_gradients
    assert posterior.problems() == []


def test_posterior_draws_by_seed() -> None:
    fit = quick(vl.Problem(skewed, Y))
    one, same, other = (fit.posterior(3, seed=seed).draws["loc"] for seed in (0, 0, 1))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    with pytest.raises(ArgumentError, match="num_draws must be positive, got 0"):
        fit.posterior(0)


def test_plot() -> None:
    fit = quick(build("eight_schools"))
    axes = fit.plot()
    assert axes.get_title() == "eight_schools"
    assert len(axes.lines) == 1
    values = axes.lines[0].get_ydata()
    np.testing.assert_allclose(np.diff(values), np.diff(fit.history["negative_elbo"]), rtol=1e-9)
    assert values[0] > 10
    assert abs(values[-1]) < 0.1
    assert axes.lines[0].get_xdata().tolist() == list(range(fit.num_steps + 1))


def test_plot_against_seconds() -> None:
    fit = quick(build("eight_schools"))
    axes = fit.plot()
    assert fit.plot(against="seconds", ax=axes) is axes
    assert axes.get_xlabel() == "seconds"
    np.testing.assert_array_equal(axes.lines[1].get_xdata(), fit.history["seconds"])
    with pytest.raises(ArgumentError, match="against must be 'steps' or 'seconds', got 'time'"):
        fit.plot(against="time")


# Guides


def test_guide_by_name_class_and_instance() -> None:
    problem = vl.Problem(skewed, Y)
    by_name, by_class, by_instance = (
        quick(problem, guide) for guide in ("mean_field", MeanFieldNormal, MeanFieldNormal(skewed))
    )
    assert torch.equal(by_name.loc, by_class.loc)
    assert torch.equal(by_name.loc, by_instance.loc)
    assert {fit.method for fit in (by_name, by_class, by_instance)} == {"mean_field"}


def test_instance_is_the_start_and_stays_as_it_is() -> None:
    problem, exact = regression()
    guide = FullRankNormal(problem.model)
    guide(*problem.args, **problem.kwargs)
    guide.params = Params(exact.mean, torch.linalg.cholesky(exact.covariance))
    fit = quick(problem, guide)
    assert fit.num_steps <= 1  # it starts at the posterior
    assert fit.history["negative_elbo"][0] == pytest.approx(-exact.log_evidence, rel=1e-10)
    guide.params = started = Params(exact.mean + 100, guide.params.scale)
    again = quick(problem, guide)
    assert again.history["negative_elbo"][0] > 1000
    torch.testing.assert_close(again.loc, exact.mean, rtol=1e-6, atol=1e-6)
    assert torch.equal(again.guide.params.loc, again.loc)
    assert again.guide is not guide
    assert torch.equal(guide.params.loc, started.loc)


def test_where_an_instance_starts_is_its_own_affair() -> None:
    values = {"scale": torch.tensor(2.0), "loc": torch.tensor(-1.5)}
    guide = MeanFieldNormal(skewed, init_loc_fn=init_to_value(values=values), init_scale=0.25)
    fit = quick(vl.Problem(skewed, Y), guide, max_steps=1, max_kl=1e-12)
    torch.testing.assert_close(fit.loc, torch.tensor([math.log(2.0), -1.5]).double(), rtol=0, atol=1e-5)
    torch.testing.assert_close(fit.params.scale[0], torch.full((2,), 0.25).double(), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"guide": "map", "num_particles": 4}, "num_particles"),
        ({"guide": "laplace", "max_kl": 1.0}, "max_kl"),
        ({"guide": "mle", "compile": True}, "compile"),
        ({"guide": "conjugate", "num_particles": 4}, "num_particles"),
        ({"guide": "flow", "max_kl": 1.0}, "max_kl"),
        ({"guide": "full_rank", "optim": "fixed_draws", "lr": 0.5}, "lr"),
        ({"guide": "full_rank", "optim": "batch_and_match", "compile": True}, "compile"),
        ({"guide": "full_rank", "objective": vl.ELBO()}, "objective"),
    ],
)
def test_settings_without_a_meaning_are_refused(settings: dict[str, object], named: str) -> None:
    with pytest.raises(ArgumentError, match=f"for which {named} has no meaning"):
        quick(vl.Problem(skewed, Y), **settings)


def test_guide_of_a_fit_works_in_pyro() -> None:
    """Whatever else there is in the param store under the name of its class."""
    other = FullRankNormal(skewed, init_scale=9.0)
    other(Y)
    fit = quick(vl.Problem(skewed, Y))
    draws = Predictive(skewed, guide=fit.guide, num_samples=500)(Y)
    quick(vl.Problem(skewed, 10 * Y)).guide(Y)
    sample = fit.posterior(500).draws["loc"][0]
    error = math.hypot(float(sample.std()), float(draws["loc"].std())) / 500**0.5
    assert abs(float(draws["loc"].mean() - sample.mean())) <= STANDARD_ERRORS * error
    assert torch.equal(fit.guide.params.scale, fit.params.scale[0])
    assert torch.equal(other.params.scale, 9.0 * torch.eye(2))
    svi = SVI(skewed, fit.guide, vl.NaturalGradient(fit.guide, lr=0.1), vl.ELBO(num_particles=32))
    before = fit.elbo(4000)
    for _ in range(5):
        svi.step(Y)
    params = Params(*(value.unsqueeze(0).double() for value in fit.guide.params))
    assert float(fit.family.kl(params, Params(fit.params.loc[:1], fit.params.scale[:1]))) < 0.1
    assert fit.elbo(4000) == before  # the fit itself is left as it was


@pytest.mark.parametrize(
    ("name", "suggestion"), [("fullrank", "full_rank"), ("meanfield", "mean_field"), ("mean_feild", "mean_field")]
)
def test_unknown_name(name: str, suggestion: str) -> None:
    with pytest.raises(ArgumentError, match=f"unknown guide '{name}': did you mean '{suggestion}'"):
        quick(vl.Problem(skewed, Y), name)


@pytest.mark.parametrize(
    ("guide", "message"),
    [
        (3, "guide must be a name, a guide class or a Pyro guide, got int"),
        (None, "guide must be a name, a guide class or a Pyro guide, got NoneType"),
        (dict, "guide dict is a class, but no Pyro autoguide"),
    ],
    ids=str,
)
def test_guides_that_fit_does_not_take(guide: Any, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        quick(vl.Problem(skewed, Y), guide)


def test_guide_of_another_model() -> None:
    guide = FullRankNormal(skewed)
    guide(Y)
    with pytest.raises(ArgumentError, match="the guide has 2 latent dimensions, problem eight_schools has 10"):
        quick(build("eight_schools"), guide)


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("lr", 0.0, r"lr is a step size in \(0, 1\], got 0.0"),
        ("lr", 1.5, r"lr is a step size in \(0, 1\], got 1.5"),
        ("lr", math.nan, r"lr is a step size in \(0, 1\], got nan"),
        ("max_kl", 0.0, "max_kl is a KL divergence in nats and must be positive, got 0.0"),
        ("max_kl", math.inf, "max_kl is a KL divergence in nats and must be positive, got inf"),
        ("num_particles", 2, "num_particles must be at least 4, got 2"),
        ("num_restarts", 0, "num_restarts must be a positive whole number, got 0"),
        ("num_restarts", True, "num_restarts must be a positive whole number, got True"),
        ("max_steps", 0, "max_steps must be a positive whole number, got 0"),
        ("max_steps", 1.5, "max_steps must be a positive whole number, got 1.5"),
    ],
)
def test_numbers_out_of_range(option: str, value: Any, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        quick(vl.Problem(skewed, Y), **{option: value})


def test_model_instead_of_a_problem() -> None:
    with pytest.raises(ArgumentError, match=r"problem must be a pyro_vi_lab.Problem, got function; wrap it: Problem\("):
        quick(skewed)  # type: ignore[arg-type]


# Kinds of models


def test_dependent_support() -> None:
    """The bound agrees with Pyro's SVI of the same guide, and every draw is in its support."""
    fit = quick(vl.Problem(dependent))
    assert fit.status is vl.Status.CONVERGED
    draws = fit.posterior(2000).draws
    assert (draws["a"] > 0).all()
    assert (draws["b"] > 0).all()
    assert (draws["a"] + draws["b"] < 1).all()
    guide = FullRankNormal(dependent)
    optimizer = vl.NaturalGradient(guide, lr=0.5)
    svi = SVI(dependent, guide, optimizer, vl.ELBO(num_particles=50, vectorize_particles=True, max_plate_nesting=0))
    for step in range(80):
        optimizer.lr = 0.5 if step < 20 else 1 / (step - 18)
        svi.step()
    found = Params(*(value.double() for value in guide.params))
    # 3000 averaged draws of five numbers leave a KL of about five half three-thousandths
    assert float(fit.family.kl(found, Params(fit.loc, fit.params.scale[0]))) < 5 / 6000 * (1 + 5 * 2**0.5) + 0.01


def test_discrete_latents_are_summed_out() -> None:
    y = torch.tensor([-1.0, 0.3, 2.5, 2.2, 3.7, 0.1])

    def mixture(y: Tensor) -> None:
        weight = pyro.sample("weight", dist.Beta(2.0, 2.0))
        with pyro.plate("row", len(y)):
            component = pyro.sample("component", dist.Bernoulli(weight))
            pyro.sample("y", dist.Normal(3 * component, 1.0), obs=y)

    def marginal(y: Tensor) -> None:
        weight = pyro.sample("weight", dist.Beta(2.0, 2.0))
        logits = torch.stack([torch.log1p(-weight), weight.log()])
        components = dist.Normal(torch.tensor([0.0, 3.0]).to(y), 1.0)
        with pyro.plate("row", len(y)):
            pyro.sample("y", dist.MixtureSameFamily(dist.Categorical(logits=logits), components), obs=y)

    one, other = (quick(vl.Problem(model, y)) for model in (mixture, marginal))
    assert one.status is other.status is vl.Status.CONVERGED
    assert distance(one, other) <= 4 * tolerance(1)
    assert one.elbo(100)[0] == pytest.approx(other.elbo(100)[0], abs=tolerance(1))
    assert set(one.posterior(3).draws) == {"weight"}


def test_single_precision_model() -> None:
    layer = torch.nn.Linear(3, 3, bias=False)  # float32, and no argument, so it stays as it is
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[1.0, 0.0, 0.0], [0.5, 1.0, 0.0], [0.0, -0.5, 2.0]]))

    def model(y: Tensor) -> None:
        loc = pyro.sample("loc", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        pyro.sample("y", dist.Normal(layer(loc), 1.0).to_event(1), obs=y)

    with pytest.warns(LabWarning, match=r"holds torch.float32 tensors of its own"):
        problem = vl.Problem(model, torch.tensor([1.0, 2.0, 3.0]))
    fit = quick(problem)
    assert fit.status is vl.Status.CONVERGED
    assert fit.loc.dtype == fit.posterior(3).draws["loc"].dtype == torch.float32
    weight = layer.weight.detach()
    covariance = torch.linalg.inv(torch.eye(3) + weight.T @ weight)
    best = Params(covariance @ weight.T @ torch.tensor([1.0, 2.0, 3.0]), torch.linalg.cholesky(covariance))
    assert float(fit.family.kl(Params(fit.loc, fit.params.scale[0]), best)) <= tolerance(3)


def test_module_with_parameters_held_fixed() -> None:
    class Model(PyroModule):
        def __init__(self) -> None:
            super().__init__()
            self.offset = torch.nn.Parameter(torch.tensor(5.0, dtype=torch.float64))

        def forward(self, y: Tensor) -> None:
            scale = pyro.param("spread", torch.tensor(2.0), constraint=constraints.positive)
            loc = pyro.sample("loc", dist.Normal(0.0, scale))
            pyro.sample("y", dist.Normal(loc + self.offset, 1.0), obs=y)

    model = Model()
    fit = quick(vl.Problem(model, torch.tensor(7.0)))
    # precision 1/4 + 1, mean 2 / (5/4)
    assert fit.loc.item() == pytest.approx(1.6, rel=1e-6)
    assert fit.covariance().item() == pytest.approx(0.8, rel=1e-6)
    assert model.offset.grad is None
    assert model.offset.item() == 5.0
    assert "spread" not in pyro.get_param_store()


def test_flat_priors_and_a_raw_scale() -> None:
    """Least squares with coefficients of a million, from the default start, without standardizing."""
    generator = torch.Generator().manual_seed(0)
    x = 1000 + torch.randn(50, generator=generator, dtype=torch.float64)
    y = 3e5 + 2e3 * x + 100 * torch.randn(50, generator=generator, dtype=torch.float64)

    def model(x: Tensor, y: Tensor) -> None:
        intercept = pyro.sample("intercept", dist.ImproperUniform(constraints.real, (), ()))
        slope = pyro.sample("slope", dist.ImproperUniform(constraints.real, (), ()))
        with pyro.plate("row", len(y)):
            pyro.sample("y", dist.Normal(intercept + slope * x, 100.0), obs=y)

    fit = quick(vl.Problem(model, x, y))
    assert fit.status is vl.Status.CONVERGED
    X = torch.stack([torch.ones_like(x), x], -1)
    covariance = 100**2 * torch.linalg.inv(X.T @ X)
    expected = torch.linalg.lstsq(X, y.unsqueeze(-1)).solution.squeeze()
    assert ((fit.loc - expected) / covariance.diagonal().sqrt()).abs().max() < 1e-4
    torch.testing.assert_close(fit.covariance(), covariance, rtol=1e-4, atol=0)


# Fits that fail


def no_data() -> None:
    pyro.sample("slope", dist.ImproperUniform(constraints.real, (), ()))
    pyro.sample("other", dist.Normal(0.0, 1.0))


def no_scale() -> None:
    pyro.sample("other", dist.Normal(0.0, 1.0))
    pyro.sample("sigma", dist.ImproperUniform(constraints.positive, (), ()))


def separated() -> None:
    x = torch.linspace(-1, 1, 20)
    alpha = pyro.sample("alpha", dist.Normal(0.0, 1.0))
    beta = pyro.sample("beta", dist.ImproperUniform(constraints.real, (), ()))
    with pyro.plate("row", 20):
        pyro.sample("y", dist.Bernoulli(logits=alpha + beta * x), obs=(x > 0).to(x))


def half_a_density() -> None:
    x = pyro.sample("x", dist.Normal(0.0, 3.0))
    pyro.factor("half", (x + 2.5).log())


def explosive() -> None:
    x = pyro.sample("x", dist.Normal(0.0, 1.0))
    pyro.factor("up", (x * x).exp())


@each_normal
@pytest.mark.parametrize(
    ("model", "site"),
    [(no_data, "slope"), (no_scale, "sigma"), (separated, "beta"), (half_a_density, "'half'"), (explosive, "x")],
)
@pytest.mark.parametrize("seed", range(2))
def test_failure_is_a_status_that_names_the_site(guide: str, model: Callable[[], None], site: str, seed: int) -> None:
    fit = quick(vl.Problem(model), guide, seed=seed)
    assert fit.status in (vl.Status.DIVERGED, vl.Status.OUT_OF_STEPS)
    assert site in fit.message
    if fit.status is vl.Status.DIVERGED:
        assert fit.message.startswith("diverged: ")
        with pytest.raises(
            FitError, match=f"the {guide} fit of {model.__name__} has no posterior: diverged: "
        ) as caught:
            fit.posterior()
        assert isinstance(caught.value, LabError)
        assert isinstance(caught.value, RuntimeError)
    else:
        assert fit.message.startswith("stopped after max_steps=500 with about ")


def test_guide_of_a_failed_fit_is_where_it_started() -> None:
    fit = quick(vl.Problem(no_data), MeanFieldNormal(no_data, init_scale=0.5))
    assert fit.status is vl.Status.DIVERGED
    assert fit.guide.params.loc.tolist() == [0.0, 0.0]
    assert fit.guide.params.scale.tolist() == pytest.approx([0.5, 0.5])


def test_start_without_a_density_names_the_site() -> None:
    guide = MeanFieldNormal(half_a_density, init_loc_fn=init_to_value(values={"x": torch.tensor(-5.0)}))
    fit = quick(vl.Problem(half_a_density), guide)
    assert fit.status is vl.Status.DIVERGED
    assert fit.num_steps == 0
    assert "site 'half' is not finite at the guide's location" in fit.message


def test_out_of_steps_has_a_posterior_and_says_what_to_do() -> None:
    fit = quick(build("eight_schools"), max_steps=3)
    assert fit.status is vl.Status.OUT_OF_STEPS
    assert fit.num_steps == 3
    assert fit.message.startswith("stopped after max_steps=3 with about ")
    assert "raise max_steps" in fit.message
    assert fit.posterior(10).info["status"] == "out of steps"


# What it leaves behind


@pytest.fixture
def surroundings() -> Iterator[None]:
    """Every global setting, unlike its default, must be the same afterwards."""
    pyro.param("mine", torch.tensor(1.5))
    pyro.enable_validation(False)
    torch.set_num_threads(2)
    torch.set_default_dtype(torch.float64)
    yield
    pyro.enable_validation(True)


def surrounding_state() -> dict[str, Any]:
    return {
        "params": {name: value.tolist() for name, value in pyro.get_param_store().items()},
        "torch": torch.get_rng_state().tolist(),
        "numpy": np.random.get_state()[1].tolist(),  # noqa: NPY002
        "random": random.getstate(),
        "settings": pyro.settings.get(),
        "distributions": torch.distributions.Distribution._validate_args,
        "dtype": torch.get_default_dtype(),
        "threads": torch.get_num_threads(),
        "grad": torch.is_grad_enabled(),
        "filters": list(warnings.filters),
    }


@pytest.mark.usefixtures("surroundings")
def test_global_state_is_left_as_found() -> None:
    def with_param(y: Tensor) -> None:
        scale = pyro.param("prior_scale", torch.tensor(3.0), constraint=constraints.positive)
        loc = pyro.sample("loc", dist.Normal(0.0, scale))
        pyro.sample("y", dist.Normal(loc, 1.0).expand([5]).to_event(1), obs=y)

    guide = FullRankNormal(with_param)
    guide(Y)  # its parameters are in the store from here on
    before = surrounding_state()
    for kind in ("mean_field", guide):
        fit = quick(vl.Problem(with_param, Y), kind, num_restarts=2)
        fit.elbo()
        fit.posterior()
        assert surrounding_state() == before


@pytest.mark.usefixtures("surroundings")
def test_global_state_is_left_as_found_after_an_error() -> None:
    calls = 0

    def model() -> None:
        nonlocal calls
        calls += 1
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        if calls > 6:
            raise ValueError("no more")
        pyro.factor("f", x)

    before = surrounding_state()
    with pytest.raises(ValueError, match="no more"):
        quick(vl.Problem(model), FullRankNormal(model))
    assert surrounding_state() == before


# Progress and speed


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A line on a terminal, none elsewhere, and none where the work is short."""
    quiet = quick(vl.Problem(skewed, Y))
    monkeypatch.setattr(sys, "stderr", Terminal())
    shown = vl.fit(vl.Problem(skewed, Y))
    assert torch.equal(shown.loc, quiet.loc)
    assert sys.stderr.getvalue() == ""
    monkeypatch.setattr("pyro_vi_lab.fit_progress.BEGIN_SECONDS", 0.0)
    monkeypatch.setattr("pyro_vi_lab.fit_progress.SECONDS", 0.0)
    assert torch.equal(vl.fit(vl.Problem(skewed, Y)).loc, quiet.loc)
    assert "negative ELBO" in sys.stderr.getvalue()
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    vl.fit(vl.Problem(skewed, Y))
    assert sys.stderr.getvalue() == ""


@each_normal
def test_warm_fit_of_eight_schools_is_fast(guide: str) -> None:
    """A new problem each time, its capture included: no more than 300 steps of Pyro's own SVI, which needs thousands.

    The best of five, in seconds of this process: machines differ, and are shared.
    """
    model = EightSchools(centered=False)
    args = build("eight_schools").args
    svi = SVI(model, AutoNormal(model), pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
    seconds, steps = [], []
    for seed in range(6):
        problem = build("eight_schools")
        began = time.process_time()
        fit = quick(problem, guide, seed=seed)
        seconds.append(time.process_time() - began)
        assert fit.status is vl.Status.CONVERGED
        began = time.process_time()
        for _ in range(20):
            svi.step(*args)
        steps.append((time.process_time() - began) / 20)
    assert min(seconds[1:]) < 300 * min(steps)


def test_model_of_the_package_in_pyros_own_loop() -> None:
    """With the mean-field bound of Pyro: the value of the fit's guide is the fit's."""
    problem = build("eight_schools")
    fit = quick(problem, "mean_field")
    losses = torch.tensor(
        [TraceMeanField_ELBO().loss(EightSchools(centered=False), fit.guide, *problem.args) for _ in range(300)]
    )
    value, error = fit.elbo(4000)
    assert abs(value + float(losses.mean())) <= STANDARD_ERRORS * math.hypot(error, float(losses.std()) / 300**0.5)
