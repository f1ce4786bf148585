from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from pyro_vi_lab import arviz_bridge
from pyro_vi_lab.checks import discrepancy, importance
from pyro_vi_lab.errors import ArgumentError
from pyro_vi_lab.models import LinearRegression, linear_regression
from pyro_vi_lab.posterior import Posterior

KNOWN = LinearRegression(noise_scale=0.6, prior_scale=1.5, intercept_scale=3.0)
UNKNOWN = LinearRegression(prior_scale=1.5, intercept_scale=3.0, precision_shape=2.5, precision_rate=0.8)
BOTH = pytest.mark.parametrize("model", [KNOWN, UNKNOWN], ids=["known", "unknown"])


def data(model: LinearRegression, num_rows: int = 12, num_features: int = 3, seed: int = 0) -> tuple[Tensor, Tensor]:
    X, y, _ = model.simulate(num_rows, num_features, seed=seed)
    return X, y


def with_ones(X: Tensor) -> np.ndarray:
    return np.column_stack([np.ones(len(X)), X.numpy()])


def prior_scales(model: LinearRegression, num_features: int) -> np.ndarray:
    return np.array([model.intercept_scale] + [model.prior_scale] * num_features)


def split(model: LinearRegression, z: np.ndarray) -> tuple[float | None, np.ndarray]:
    """The precision and the coefficients of an unconstrained point."""
    return (None, z) if model.noise_scale is not None else (math.exp(z[0]), z[1:])


def log_joint(model: LinearRegression, X: Tensor, y: Tensor, z: np.ndarray) -> float:
    """The formula of the model's docstring, in SciPy; z = (log precision, intercept, beta)."""
    precision, coefficients = split(model, z)
    unit, sigma, result = 1.0, model.noise_scale, 0.0
    if precision is not None:
        unit = sigma = precision**-0.5
        gamma = stats.gamma(model.precision_shape, scale=1 / model.precision_rate)
        result = gamma.logpdf(precision) + z[0]
    result += stats.norm(0, unit * prior_scales(model, len(coefficients) - 1)).logpdf(coefficients).sum()
    return float(result + stats.norm(with_ones(X) @ coefficients, sigma).logpdf(y.numpy()).sum())


def log_exact(model: LinearRegression, X: Tensor, y: Tensor, z: np.ndarray) -> float:
    """Log density of the exact posterior at an unconstrained point, from what ``exact`` returns."""
    exact = model.exact(X, y)
    precision, coefficients = split(model, z)
    covariance, result = exact.covariance.numpy(), 0.0
    if precision is not None:
        assert exact.precision_shape is not None
        assert exact.precision_rate is not None
        gamma = stats.gamma(exact.precision_shape, scale=1 / exact.precision_rate)
        result = gamma.logpdf(precision) + z[0]
        covariance = (exact.covariance_factor @ exact.covariance_factor.T).numpy() / precision
    return float(result + stats.multivariate_normal(exact.mean.numpy(), covariance).logpdf(coefficients))


# --- the model ----------------------------------------------------------------------------------------


@BOTH
def test_the_density_is_that_of_the_formula(model: LinearRegression) -> None:
    X, y = data(model)
    density = model.problem(X, y).density()
    for z in np.random.default_rng(0).normal(size=(5, density.dim)):
        value = float(density.log_prob(torch.tensor(z)))
        assert value == pytest.approx(log_joint(model, X, y, z), rel=1e-12)


def test_sites_and_names() -> None:
    X, y = data(UNKNOWN)
    problem = UNKNOWN.problem(X, y, features=["age", "bmi", "bp"], name="patients")
    assert (problem.name, problem.coords, problem.dims("beta")) == (
        "patients",
        {"feature": ["age", "bmi", "bp"]},
        ("feature",),
    )
    assert problem.density().labels == ["precision", "intercept", "beta[0]", "beta[1]", "beta[2]"]
    values = problem.density().constrain(torch.randn(7, 5, dtype=torch.float64))
    torch.testing.assert_close(values["sigma"], values["precision"] ** -0.5)


# --- the exact posterior --------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize(("num_rows", "num_features"), [(12, 3), (2, 1), (4, 9), (300, 5)])
def test_joint_over_posterior_is_the_evidence_everywhere(
    model: LinearRegression, num_rows: int, num_features: int
) -> None:
    X, y = data(model, num_rows, num_features)
    evidence = model.exact(X, y).log_evidence
    size = num_features + (1 if model.noise_scale is not None else 2)
    for z in np.random.default_rng(1).normal(size=(5, size)):
        joint = log_joint(model, X, y, z)
        assert joint - log_exact(model, X, y, z) == pytest.approx(evidence, abs=1e-11 * abs(joint) + 1e-9)


@BOTH
def test_evidence_is_the_marginal_density_of_the_outcome(model: LinearRegression) -> None:
    X, y = data(model, 40, 4)
    rows = with_ones(X) * prior_scales(model, 4)
    if model.noise_scale is not None:
        covariance = model.noise_scale**2 * np.eye(40) + rows @ rows.T
        expected = stats.multivariate_normal(np.zeros(40), covariance).logpdf(y.numpy())
    else:
        shape = model.precision_rate / model.precision_shape * (np.eye(40) + rows @ rows.T)
        expected = stats.multivariate_t(np.zeros(40), shape, df=2 * model.precision_shape).logpdf(y.numpy())
    assert model.exact(X, y).log_evidence == pytest.approx(float(expected), rel=1e-12)


def grid_moments(log_density: Callable[[Tensor], Tensor], axes: list[Tensor]) -> tuple[np.ndarray, np.ndarray, float]:
    """Mean, covariance and log of the integral of a density by the trapezoidal rule."""
    points = torch.cartesian_prod(*axes)
    log_weights = log_density(points)
    volume = math.prod(float(axis[1] - axis[0]) for axis in axes)
    weights = torch.softmax(log_weights, 0)
    mean = weights @ points
    centered = points - mean
    covariance = (centered * weights[:, None]).T @ centered
    return mean.numpy(), covariance.numpy(), float(torch.logsumexp(log_weights, 0)) + math.log(volume)


def around(center: float, sd: float, *, width: float, num: int) -> Tensor:
    return torch.linspace(center - width * sd, center + width * sd, num, dtype=torch.float64)


def test_known_noise_agrees_with_brute_force() -> None:
    # For a normal density the rule is exact to rounding with steps below one sd and 9 sds either side.
    X, y = data(KNOWN, 10, 1)
    exact = KNOWN.exact(X, y)
    sds = exact.covariance.diagonal().sqrt()
    axes = [around(float(m), float(s), width=9, num=121) for m, s in zip(exact.mean, sds, strict=True)]
    mean, covariance, evidence = grid_moments(KNOWN.problem(X, y).density().log_prob, axes)
    np.testing.assert_allclose(exact.mean, mean, rtol=1e-9)
    np.testing.assert_allclose(exact.covariance, covariance, rtol=1e-9)
    assert exact.log_evidence == pytest.approx(evidence, rel=1e-9)


def test_unknown_noise_agrees_with_brute_force() -> None:
    X, y = data(UNKNOWN, 30, 1)
    exact = UNKNOWN.exact(X, y)
    assert exact.precision_shape is not None
    assert exact.precision_rate is not None
    sds = exact.covariance.diagonal().sqrt()
    log_precision = math.log(exact.precision_shape / exact.precision_rate)
    axes = [around(log_precision, exact.precision_shape**-0.5, width=9, num=61)]
    axes += [around(float(m), float(s), width=13, num=91) for m, s in zip(exact.mean, sds, strict=True)]
    mean, covariance, evidence = grid_moments(UNKNOWN.problem(X, y).density().log_prob, axes)
    # Student-t tails with 35 degrees of freedom beyond 13 sds hold less than 1e-14 of the mass.
    np.testing.assert_allclose(exact.mean, mean[1:], rtol=1e-8)
    np.testing.assert_allclose(exact.covariance, covariance[1:, 1:], rtol=1e-8)
    assert exact.log_evidence == pytest.approx(evidence, rel=1e-9)


@BOTH
def test_the_units_of_a_covariate_do_not_matter(model: LinearRegression) -> None:
    X, y = data(model, 50, 1)
    scaled = LinearRegression(
        model.noise_scale,
        prior_scale=model.prior_scale / 1e6,
        intercept_scale=model.intercept_scale,
        precision_shape=model.precision_shape,
        precision_rate=model.precision_rate,
    )
    first, second = model.exact(X, y), scaled.exact(1e6 * X, y)
    units = torch.tensor([1.0, 1e-6], dtype=torch.float64)
    torch.testing.assert_close(second.mean, first.mean * units, rtol=1e-12, atol=0)
    torch.testing.assert_close(second.covariance, first.covariance * units.outer(units), rtol=1e-11, atol=0)
    assert second.log_evidence == pytest.approx(first.log_evidence, rel=1e-12)


def test_much_data_gives_least_squares() -> None:
    model = LinearRegression(prior_scale=1e6, intercept_scale=1e6)
    X, y = data(UNKNOWN, 500, 4)
    expected, residual = np.linalg.lstsq(with_ones(X), y.numpy())[:2]
    exact = model.exact(X, y)
    np.testing.assert_allclose(exact.mean, expected, rtol=1e-9)
    assert exact.precision_shape == 1 + 250
    assert exact.precision_rate == pytest.approx(1 + residual[0] / 2, rel=1e-9)


# --- draws from it --------------------------------------------------------------------------------------


@BOTH
def test_draws_have_the_exact_moments(model: LinearRegression) -> None:
    X, y = data(model, 15, 3)
    exact = model.exact(X, y)
    posterior = model.exact_posterior(X, y, num_chains=2, num_draws=20_000, seed=3)
    draws = torch.cat([posterior.draws["intercept"][..., None], posterior.draws["beta"]], -1).numpy()
    assert np.all(np.abs(draws.mean((0, 1)) - exact.mean.numpy()) < 5 * arviz_bridge.mcse(draws))
    offsets = draws - exact.mean.numpy()
    products = offsets[..., :, None] * offsets[..., None, :]
    assert np.all(np.abs(products.mean((0, 1)) - exact.covariance.numpy()) < 5 * arviz_bridge.mcse(products))
    if model.noise_scale is None:
        assert exact.precision_shape is not None
        assert exact.precision_rate is not None
        precision = posterior.draws["precision"]
        gamma = stats.gamma(exact.precision_shape, scale=1 / exact.precision_rate)
        # p-value as far out as five standard errors
        assert stats.kstest(precision.flatten().numpy(), gamma.cdf).pvalue > 2 * stats.norm.sf(5)
        torch.testing.assert_close(posterior.draws["sigma"], precision.rsqrt())


def test_marginals_are_student_t() -> None:
    X, y = data(UNKNOWN, 4, 2)
    exact = UNKNOWN.exact(X, y)
    assert exact.precision_shape is not None
    posterior = UNKNOWN.exact_posterior(X, y, num_draws=20_000)
    df = 2 * exact.precision_shape
    scale = float((exact.covariance[0, 0] * (df - 2) / df).sqrt())
    marginal = stats.t(df, float(exact.mean[0]), scale)
    draws = posterior.draws["intercept"].flatten().numpy()
    assert stats.kstest(draws, marginal.cdf).pvalue > 2 * stats.norm.sf(5)


@BOTH
def test_draws_and_model_give_constant_weights(model: LinearRegression) -> None:
    X, y = data(model, 15, 3)
    problem, posterior = model.problem(X, y), model.exact_posterior(X, y, num_draws=50)
    z = problem.density().unconstrain({name: posterior.draws[name][0] for name in problem.density().sites})
    log_q = torch.tensor([log_exact(model, X, y, point) for point in z.numpy()], dtype=torch.float64)
    check = importance(problem.density().log_prob(z), log_q)
    assert check.khat == -math.inf
    assert check.ess == 50


@BOTH
def test_draws_repeat_and_leave_the_random_state_alone(model: LinearRegression) -> None:
    X, y = data(model)
    state = torch.get_rng_state()
    first, again, other = (model.exact_posterior(X, y, num_chains=2, num_draws=30, seed=s) for s in (1, 1, 2))
    assert torch.equal(state, torch.get_rng_state())
    for name, draws in first.draws.items():
        assert draws.shape[:2] == (2, 30)
        assert draws.dtype == torch.float64
        assert torch.equal(draws, again.draws[name])
        assert not torch.equal(draws, other.draws[name])


@BOTH
def test_it_is_a_reference_that_passes_its_own_checks(model: LinearRegression) -> None:
    X, y = data(model)
    reference = model.exact_posterior(X, y, num_chains=4, seed=0)
    assert (reference.method, reference.problems()) == ("exact", [])
    assert reference.info["log_evidence"] == model.exact(X, y).log_evidence
    result = discrepancy(reference, model.exact_posterior(X, y, seed=1))
    assert np.all(np.abs(result.mean_shift) < 5 * result.mean_shift_mcse)
    assert np.all(np.abs(result.sd_ratio - 1) < 5 * result.sd_ratio_mcse)
    assert result.missing == ()


def test_no_draws_is_an_error() -> None:
    X, y = data(KNOWN)
    with pytest.raises(ArgumentError, match="num_chains and num_draws must be at least 1, got 1 and 0"):
        KNOWN.exact_posterior(X, y, num_draws=0)


def test_the_predictive_of_the_problem_takes_the_draws() -> None:
    X, y = data(UNKNOWN)
    posterior: Posterior = UNKNOWN.exact_posterior(X, y, num_draws=20)
    assert UNKNOWN.problem(X, y).predictive(posterior)["y"].shape == (1, 20, 12)


# --- the examples ---------------------------------------------------------------------------------------


def test_the_diabetes_data_are_standardized_and_named() -> None:
    pytest.importorskip("sklearn")
    problem = linear_regression.example()
    X, y = problem.inputs["X"], problem.observed["y"]
    assert X.shape == (442, 10)
    eps = torch.finfo(torch.float64).eps
    for value in (X, y):
        torch.testing.assert_close(value.mean(0), torch.zeros_like(value[0]), rtol=0, atol=442 * eps)
        torch.testing.assert_close(value.std(0, correction=0), torch.ones_like(value[0]), rtol=442 * eps, atol=0)
    assert problem.coords["feature"] == ["age", "sex", "bmi", "bp", "s1", "s2", "s3", "s4", "s5", "s6"]


def test_the_known_noise_of_the_example_is_what_least_squares_leaves() -> None:
    pytest.importorskip("sklearn")
    problem = linear_regression.example_known_noise()
    X, y = problem.inputs["X"], problem.observed["y"]
    residual = np.linalg.lstsq(with_ones(X), y.numpy())[1][0]
    sigma = math.sqrt(residual / (442 - 11))
    # the standard error of an estimated sd is sd / sqrt(2 df)
    assert abs(sigma - 0.7) < 5 * sigma / math.sqrt(2 * 431)


def test_the_maximum_of_a_known_noise_posterior_is_its_mean() -> None:
    pytest.importorskip("sklearn")
    problem = linear_regression.example_known_noise()
    model = problem.model
    assert isinstance(model, LinearRegression)
    exact = model.exact(problem.inputs["X"], problem.observed["y"])
    density = problem.density()
    gradient = density.value_and_grad(exact.mean)[1]
    step = exact.covariance @ gradient  # Newton step: how far the maximum is
    assert float((step / exact.covariance.diagonal().sqrt()).abs().max()) < 1e-9
    torch.testing.assert_close(-density.hessian(exact.mean), exact.covariance.inverse(), rtol=1e-8, atol=1e-8)
