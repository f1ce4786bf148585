"""What holds of every regression: its density, standardization that is undone, predictions, bad input."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pandas as pd
import pyro
import pytest
import torch
from pyro import poutine
from scipy import stats
from torch import Tensor

import pyro_vi_lab as vl
from pyro_vi_lab.errors import ArgumentError, DataError
from pyro_vi_lab.models import (
    HierarchicalRegression,
    LinearRegression,
    LogisticRegression,
    MultinomialRegression,
    NegativeBinomialRegression,
    PoissonRegression,
    RobustRegression,
)
from pyro_vi_lab.models.priors import CoefficientPrior
from pyro_vi_lab.models.regression import Regression
from pyro_vi_lab.problem import Problem

Log = Callable[[np.ndarray, np.ndarray, Mapping[str, float]], np.ndarray]

MODELS: dict[str, tuple[Callable[..., Regression], dict[str, float], Log]] = {
    "linear": (
        lambda **kw: LinearRegression(0.7, **kw),
        {},
        lambda y, eta, v: stats.norm(eta, 0.7).logpdf(y),
    ),
    "robust": (
        RobustRegression,
        {"sigma": 0.8, "nu": 5.0},
        lambda y, eta, v: stats.t(v["nu"], eta, v["sigma"]).logpdf(y),
    ),
    "robust, known": (
        lambda **kw: RobustRegression(3.0, **kw),
        {"sigma": 0.8},
        lambda y, eta, v: stats.t(3.0, eta, v["sigma"]).logpdf(y),
    ),
    "logistic": (LogisticRegression, {}, lambda y, eta, v: stats.bernoulli(1 / (1 + np.exp(-eta))).logpmf(y)),
    "poisson": (PoissonRegression, {}, lambda y, eta, v: stats.poisson(np.exp(eta)).logpmf(y)),
    "negative binomial": (
        NegativeBinomialRegression,
        {"dispersion": 0.4},
        lambda y, eta, v: stats.nbinom(1 / v["dispersion"], 1 / (1 + v["dispersion"] * np.exp(eta))).logpmf(y),
    ),
}
PRIORS = {
    "sigma": stats.halfnorm(0, 1).logpdf,
    "nu": stats.gamma(2, scale=10).logpdf,
    "dispersion": stats.halfnorm(0, 1).logpdf,
}
PLAIN = {"prior_scale": 0.7, "intercept_scale": 1.3}


def tensor(value: Any) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


def data(name: str, num_rows: int = 40, num_features: int = 3, seed: int = 0) -> tuple[Regression, Tensor, Tensor]:
    model = MODELS[name][0](**PLAIN)
    X, y, _ = model.simulate(num_rows, num_features, seed=seed)
    return model, X, y


def log_joint(problem: Problem, values: Mapping[str, Any]) -> float:
    given = {key: tensor(value) for key, value in values.items()}
    with torch.no_grad():
        trace = poutine.trace(poutine.condition(problem.model, data=given)).get_trace(*problem.args, **problem.kwargs)
    assert all(key in trace.nodes for key in given)
    return float(trace.log_prob_sum())


@pytest.mark.parametrize("name", MODELS)
def test_the_density_is_that_of_the_formula(name: str) -> None:
    model, X, y = data(name)
    _, values, log = MODELS[name]
    beta, intercept = np.array([0.3, -0.4, 0.2]), 0.5
    expected = log(y.numpy(), intercept + X.numpy() @ beta, values).sum()
    expected += stats.norm(0, 1.3).logpdf(intercept) + stats.norm(0, 0.7).logpdf(beta).sum()
    expected += sum(float(PRIORS[key](value)) for key, value in values.items())
    found = log_joint(model.problem(X, y), {**values, "intercept": intercept, "beta": beta})
    assert found == pytest.approx(expected, rel=1e-12)


def test_the_ridge_and_the_horseshoe_are_those_of_their_formulas() -> None:
    X, y = data("poisson")[1:]
    intercept, raw, tau, lam, c2 = 0.2, np.array([0.5, -1.0, 2.0]), 0.3, np.array([0.5, 1.0, 4.0]), 2.0
    common = stats.norm(0, 2.5).logpdf(intercept) + stats.norm.logpdf(raw).sum()

    def likelihood(beta: np.ndarray) -> float:
        return float(stats.poisson(np.exp(intercept + X.numpy() @ beta)).logpmf(y.numpy()).sum())

    ridge = PoissonRegression(prior="ridge", prior_scale=1.5).problem(X, y)
    expected = common + stats.halfnorm(0, 1.5).logpdf(tau) + likelihood(tau * raw)
    values = {"intercept": intercept, "beta_raw": raw}
    assert log_joint(ridge, {**values, "beta_scale": tau}) == pytest.approx(expected, rel=1e-12)

    horseshoe = PoissonRegression(prior="horseshoe", prior_scale=1.5, num_relevant=1).problem(X, y)
    tau0 = 1 / (3 - 1) / math.sqrt(40)
    shrunk = np.sqrt(c2 * lam**2 / (c2 + tau**2 * lam**2))
    expected = common + stats.halfcauchy(0, tau0).logpdf(tau) + stats.halfcauchy.logpdf(lam).sum()
    expected += stats.invgamma(2, scale=2 * 1.5**2).logpdf(c2) + likelihood(tau * shrunk * raw)
    values |= {"global_scale": tau, "local_scale": lam, "slab_variance": c2}
    assert log_joint(horseshoe, values) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prior": "horsehoe"}, "unknown prior 'horsehoe': did you mean 'horseshoe'"),
        ({"prior": "horseshoe"}, "needs num_relevant"),
        ({"prior": "ridge", "num_relevant": 2}, "num_relevant is for prior='horseshoe'"),
        ({"prior": "horseshoe", "num_relevant": 0}, "num_relevant must be a positive number, got 0"),
        ({"prior": "ridge", "prior_scale": -1.0}, "prior_scale must be a positive number, got -1"),
    ],
)
def test_wrong_priors_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        PoissonRegression(**options)


def test_more_relevant_coefficients_than_there_are() -> None:
    X, y = data("poisson")[1:]
    with pytest.raises(ArgumentError, match="num_relevant is 3; it must be below the number of coefficients, 3"):
        PoissonRegression(prior="horseshoe", num_relevant=3).problem(X, y)
    assert CoefficientPrior("normal", 1.0).num_relevant is None


# --- standardization ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["linear", "robust, known", "poisson", "negative binomial"])
def test_maximum_likelihood_is_the_same_with_and_without_standardization(name: str) -> None:
    model, X, y = data(name, 60, 2, seed=1)
    X = X * tensor([20.0, 0.1]) + tensor([50.0, -3.0])
    points = []
    for standardize in (False, True):
        result = vl.fit(model.problem(X, y, standardize=standardize), "mle", max_steps=500, progress=False)
        assert result.status is vl.Status.CONVERGED
        points.append(result.point())
    for key in ("intercept", "beta", *model.outcome.names):
        # a maximum is found to the square root of the precision of its value
        torch.testing.assert_close(points[1][key], points[0][key], rtol=1e-5, atol=1e-6)


def test_the_exact_posterior_of_standardized_data_is_that_of_its_problem() -> None:
    model = LinearRegression(noise_scale=2.0, prior_scale=0.5)
    X, y, _ = model.simulate(50, 2, seed=0)
    X, y = X * tensor([3.0, 0.2]) + 7.0, 10 * y + 4.0
    problem = model.problem(X, y, standardize=True)
    exact = model.exact_posterior(X, y, num_draws=4000, standardize=True)
    normal = vl.fit(problem, "laplace", progress=False)  # of a normal posterior it is the posterior
    draws = torch.cat([exact.draws["intercept_standardized"][0, :, None], exact.draws["beta_standardized"][0]], 1)
    sd = normal.covariance().diagonal().sqrt()
    assert bool(((draws.mean(0) - normal.loc).abs() < 5 * sd / math.sqrt(4000)).all())
    assert bool(((draws.std(0) / sd - 1).abs() < 5 / math.sqrt(2 * 4000)).all())
    # and the rows are predicted alike from either scale
    scaling = problem.model.binding.scaling
    inner = exact.draws["intercept_standardized"][..., None] + (
        exact.draws["beta_standardized"] @ scaling.covariates(X).T
    )
    torch.testing.assert_close(model.expected(exact, X), scaling.y_center + scaling.y_scale * inner)


def test_the_evidence_of_standardized_data_is_of_the_data_as_they_are() -> None:
    model = LinearRegression()
    X, y, _ = model.simulate(30, 2, seed=0)
    y = 5 * y + 3
    exact = model.exact_posterior(X, y, standardize=True, num_draws=10)
    problem = model.problem(X, y, standardize=True)
    keys = ("precision_standardized", "intercept_standardized", "beta_standardized")
    assert {key: value.shape for key, value in exact.draws.items()} == {
        key: (1, 10, *site.shape) for key, site in problem.sites.items() if site.kind != "observed"
    }
    # p(y) = p(y, draw) / p(draw | y) at any draw; here with the posterior of a second model in its closed form
    scaling = problem.model.binding.scaling
    inner = model.exact(scaling.covariates(X), scaling.outcome(y))
    draw = {key: exact.draws[key][0, 0] for key in keys}
    precision = float(draw["precision_standardized"])
    theta = torch.cat([draw["intercept_standardized"][None], draw["beta_standardized"]])
    given = torch.distributions.MultivariateNormal(
        inner.mean, inner.covariance_factor @ inner.covariance_factor.T / precision
    ).log_prob(theta)
    given += stats.gamma(inner.precision_shape, scale=1 / inner.precision_rate).logpdf(precision)
    joint = log_joint(problem, {key: value.numpy() for key, value in draw.items()})
    assert joint - float(given) == pytest.approx(exact.info["log_evidence"], rel=1e-10)


def test_an_outcome_that_is_constant_cannot_be_standardized() -> None:
    with pytest.raises(DataError, match="y is constant"):
        RobustRegression().problem([[1.0], [2.0]], [3.0, 3.0], standardize=True)


# --- predictions ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_predictions_are_those_of_the_draws(name: str) -> None:
    model, X, y = data(name)
    prior = model.problem(X, y).prior(20, seed=1)
    rows = X[:5]
    expected = model.outcome.mean(prior.draws["intercept"][..., None] + prior.draws["beta"] @ rows.T)
    assert expected.shape == (1, 20, 5)
    torch.testing.assert_close(model.expected(prior, rows), expected)
    torch.testing.assert_close(model.predict(prior, rows), expected.mean((0, 1)))
    draws = model.predictive(prior, rows, seed=3)
    assert draws.shape == (1, 20, 5)
    assert torch.equal(draws, model.predictive(prior, rows, seed=3))
    assert not torch.equal(draws, model.predictive(prior, rows, seed=4))


@pytest.mark.parametrize("name", ["linear", "robust, known", "logistic", "poisson", "negative binomial"])
def test_predictive_draws_have_the_moments_of_the_outcome(name: str) -> None:
    model, X, _ = data(name)
    values = {
        "intercept": tensor(0.3),
        "beta": tensor([0.2, -0.1, 0.3]),
        "sigma": tensor(0.8),
        "dispersion": tensor(0.3),
    }
    point = vl.Posterior({key: value.expand(1, 20_000, *value.shape) for key, value in values.items()}, method="point")
    row = X[:1]
    mean = float(model.predict(values, row))
    variance = {
        "linear": 0.7**2,
        "robust, known": 0.8**2 * 3,  # σ² ν / (ν - 2) at ν = 3
        "logistic": mean * (1 - mean),
        "poisson": mean,
        "negative binomial": mean + 0.3 * mean**2,
    }[name]
    draws = model.predictive(point, row, seed=0)
    assert abs(float(draws.mean()) - mean) < 5 * math.sqrt(variance / 20_000)


def test_a_point_and_the_exact_posterior_predict_the_same_mean_and_other_intervals() -> None:
    model = LinearRegression(noise_scale=0.5)
    X, y, _ = model.simulate(8, 3, seed=0)
    problem = model.problem(X, y)
    point = vl.fit(problem, "map", progress=False)
    exact = model.exact_posterior(X, y, num_draws=20_000)
    new = X * 3
    plug_in = model.predict(point.posterior(10), new)
    torch.testing.assert_close(plug_in, model.predict(point.point(), new))
    spread = model.expected(exact, new).std((0, 1))
    assert bool(((model.predict(exact, new) - plug_in).abs() < 5 * spread / math.sqrt(20_000)).all())
    # Var[y] = σ² of the plug-in, σ² + Var[η] of the full posterior
    wide = model.predictive(exact, new).std((0, 1))
    expected = (0.5**2 + spread.square()).sqrt()
    assert bool(((wide / expected - 1).abs() < 5 / math.sqrt(2 * 20_000)).all())
    narrow = model.predictive(point.posterior(20_000), new).std((0, 1))
    assert bool(((narrow / 0.5 - 1).abs() < 5 / math.sqrt(2 * 20_000)).all())


def test_columns_of_a_data_frame_go_by_name() -> None:
    model, X, y = data("logistic")
    frame = pd.DataFrame(X.numpy(), columns=["a", "b", "c"])
    problem = model.problem(frame, y)
    prior = problem.prior(5)
    turned = problem.model.predict(prior, frame[["c", "a", "b"]])
    torch.testing.assert_close(turned, model.predict(prior, X))
    with pytest.raises(DataError, match="X lacks the column 'b'; the model was made with the columns a, b, c"):
        problem.model.predict(prior, frame[["a", "c"]])
    with pytest.raises(DataError, match="X has 2 columns; the model was made with 3: a, b, c"):
        problem.model.predict(prior, X[:, :2])


def test_wrong_posteriors_are_named() -> None:
    model, X, y = data("robust")
    prior = model.problem(X, y).prior(5)
    with pytest.raises(ArgumentError, match="X has 2 columns; the posterior has 3 coefficients beta"):
        model.predict(prior, X[:, :2])
    with pytest.raises(ArgumentError, match="no draws of the site 'sigma'; it has intercept, beta"):
        model.predictive({key: prior.draws[key][0, 0] for key in ("intercept", "beta")}, X)
    with pytest.raises(ArgumentError, match=r"of a fit give fit.posterior\(\)"):
        model.predict(3, X)
    with pytest.raises(DataError, match=r"X has 1 missing .* row 2, column 'x1'"):
        model.predict(prior, X.index_put((torch.tensor(2), torch.tensor(1)), tensor(math.nan)))


# --- bad data -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [PoissonRegression, NegativeBinomialRegression])
@pytest.mark.parametrize(
    ("y", "message"),
    [
        ([0, 3, -2, 1], r"y has 1 value\(s\) that are no counts, the first \(-2\) in row 2; counts"),
        ([0, 2.5, 1, 0.5], r"y has 2 value\(s\) .* first \(2.5\) in row 1; counts are whole"),
        ([0, math.nan, 1, 1], r"y has 1 missing .* row 1"),
    ],
)
def test_what_is_no_count_is_named(make: Callable[[], PoissonRegression], y: list[float], message: str) -> None:
    with pytest.raises(DataError, match=message):
        make().problem(np.arange(4.0)[:, None], y)


def test_wrong_exposures_are_named() -> None:
    X, y = np.arange(3.0)[:, None], [1, 0, 2]
    with pytest.raises(DataError, match=r"exposure has 1 value\(s\) that are not positive, the first \(0\) in row 1"):
        PoissonRegression().problem(X, y, exposure=[1.0, 0.0, 2.0])
    with pytest.raises(DataError, match=r"offset has shape \(2,\); expected \(3,\)"):
        PoissonRegression().problem(X, y, exposure=[1.0, 2.0])
    with pytest.raises(ArgumentError, match="give one"):
        PoissonRegression().problem(X, y, exposure=[1.0, 1.0, 2.0], offset=[0.0, 0.0, 0.0])


def test_more_coefficients_than_rows_need_a_prior() -> None:
    X, y = torch.randn(4, 6, generator=torch.Generator().manual_seed(0)).double(), tensor([1.0, 0.0, 3.0, 2.0])
    problem = PoissonRegression().problem(X, y)
    result = vl.fit(problem, "mle", progress=False)
    assert result.status is vl.Status.DIVERGED
    assert "beta" in result.message
    assert "fit 'map'" in result.message
    assert vl.fit(problem, "map", progress=False).status is vl.Status.CONVERGED
    assert vl.fit(problem, progress=False).status is vl.Status.CONVERGED


def test_separated_classes_have_no_maximum_of_the_likelihood() -> None:
    X, y = tensor([[-2.0], [-1.0], [1.0], [2.0]]), tensor([0.0, 0.0, 1.0, 1.0])
    problem = LogisticRegression().problem(X, y)
    result = vl.fit(problem, "mle", progress=False)
    assert result.status is vl.Status.DIVERGED
    assert "beta[0]" in result.message
    assert "column 'x0' of X separates the classes of y without an error" in result.message
    for guide in ("map", "full_rank"):
        assert vl.fit(problem, guide, progress=False).status is vl.Status.CONVERGED


def test_a_constant_outcome_leaves_no_noise() -> None:
    X = torch.randn(30, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    y, message = torch.full((30,), 2.0), r"y is constant \(2 in every row\), so that the noise may be zero"
    with pytest.raises(DataError, match=message):
        RobustRegression().problem(X, y)
    with pytest.raises(DataError, match=message):
        HierarchicalRegression().problem(X, y, group=["a", "b"] * 15)


@pytest.mark.parametrize("name", ["bernoulli", "categorical"])
def test_the_column_that_separates_is_named(name: str) -> None:
    X = torch.randn(30, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    y = (X[:, 1] > 0).double()
    features = ["age", "dose", "weight"]
    model = LogisticRegression() if name == "bernoulli" else MultinomialRegression(2)
    result = vl.fit(model.problem(X, y, features=features), "mle", progress=False)
    assert result.status is vl.Status.DIVERGED
    assert "column 'dose' of X separates the classes of y" in result.message
    y[0] = 1 - y[0]
    y[1:7] = tensor([0.0, 1.0] * 3)
    assert "separate" not in vl.fit(model.problem(X, y, features=features), "mle", progress=False).message


def test_one_row_is_refused_by_the_name_of_its_column() -> None:
    for make in (PoissonRegression, LogisticRegression, RobustRegression, lambda: MultinomialRegression(2)):
        with pytest.raises(DataError, match="column 'x0' of X is constant"):
            make().problem([[1.0]], [1.0])
    with pytest.raises(DataError, match="column 'x0' of X is constant"):
        HierarchicalRegression().problem([[1.0]], [1.0], group=["a"])


@pytest.mark.parametrize("name", MODELS)
def test_vectorized_particles_have_the_density_of_single_runs(name: str) -> None:
    torch.set_default_dtype(torch.float64)
    _, X, y = data(name, 12, 2)
    for options in ({}, {"prior": "ridge"}, {"prior": "horseshoe", "num_relevant": 1}):
        for standardize in (False, True):
            problem = MODELS[name][0](**PLAIN, **options).problem(X, y, standardize=standardize)
            same_as_single_runs(problem)


def same_as_single_runs(problem: Problem, particles: int = 4) -> None:
    """A vectorizing plate left of the model's own gives the log density of each of its runs."""
    with pyro.plate("particles", particles, dim=-2), torch.no_grad():
        trace = poutine.trace(problem.model).get_trace(*problem.args, **problem.kwargs)
    trace.compute_log_prob()
    nodes = {k: v for k, v in trace.nodes.items() if "log_prob" in v and v["log_prob"].dim() == 2}
    together = sum(node["log_prob"].sum(-1) for node in nodes.values())
    for k in range(particles):
        given = {
            key: node["value"][k].reshape(problem.sites[key].shape)
            for key, node in nodes.items()
            if not node["is_observed"]
        }
        with torch.no_grad():
            model = poutine.condition(problem.model, data=given)
            single = poutine.trace(model).get_trace(*problem.args, **problem.kwargs)
        torch.testing.assert_close(together[k], single.log_prob_sum())
