from __future__ import annotations

import numpy as np
import pytest
import torch

import pyro_vi_lab as vl
from pyro_vi_lab.models import PoissonRegression
from pyro_vi_lab.models.poisson_regression import example_simulated


def reweighted_least_squares(X: np.ndarray, y: np.ndarray, offset: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Maximum likelihood and its covariance (McCullagh & Nelder 1989, Section 2.5)."""
    A = np.column_stack([np.ones(len(X)), X])
    eta = np.log(y + 0.5)
    for _ in range(50):
        mean = np.exp(eta)
        z = eta - offset + (y - mean) / mean
        root = np.sqrt(mean)[:, None]
        theta = np.linalg.lstsq(root * A, root[:, 0] * z)[0]
        eta = A @ theta + offset
    return theta, np.linalg.inv(A.T @ (np.exp(eta)[:, None] * A))


@pytest.mark.parametrize("with_exposure", [False, True])
def test_maximum_likelihood_is_that_of_reweighted_least_squares(with_exposure: bool) -> None:
    X, y, _ = PoissonRegression(prior_scale=0.5, intercept_scale=1.0).simulate(60, 3, seed=0)
    exposure = torch.linspace(0.5, 3.0, 60).double()
    problem = PoissonRegression().problem(X, y, exposure=exposure if with_exposure else None)
    offset = np.log(exposure.numpy()) if with_exposure else np.zeros(60)
    expected, _ = reweighted_least_squares(X.numpy(), y.numpy(), offset)
    point = vl.fit(problem, "mle", progress=False).point()
    found = torch.cat([point["intercept"][None], point["beta"]])
    torch.testing.assert_close(found, torch.from_numpy(expected), rtol=1e-6, atol=1e-7)


def test_with_wide_priors_laplace_is_the_normal_of_maximum_likelihood() -> None:
    X, y, _ = PoissonRegression(prior_scale=0.5, intercept_scale=1.0).simulate(60, 2, seed=0)
    wide = PoissonRegression(prior_scale=1e6, intercept_scale=1e6)
    result = vl.fit(wide.problem(X, y), "laplace", progress=False)
    expected, covariance = reweighted_least_squares(X.numpy(), y.numpy(), np.zeros(60))
    torch.testing.assert_close(result.loc, torch.from_numpy(expected), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(result.covariance(), torch.from_numpy(covariance), rtol=1e-6, atol=1e-9)


def test_twice_the_exposure_is_twice_the_count() -> None:
    X, y, _ = PoissonRegression().simulate(20, 2, seed=0)
    model = PoissonRegression()
    prior = model.problem(X, y, exposure=torch.full((20,), 2.0)).prior(5)
    once, twice = model.predict(prior, X), model.predict(prior, X, exposure=torch.full((20,), 2.0))
    torch.testing.assert_close(twice, 2 * once)
    draws = model.predictive(prior, X, exposure=torch.full((20,), 2.0))
    assert torch.equal(draws, draws.floor())


@pytest.mark.slow
def test_the_fit_agrees_with_nuts() -> None:
    problem = example_simulated()
    reference = vl.nuts(problem, num_chains=2, num_warmup=300, num_draws=700, progress=False)
    result = vl.fit(problem, progress=False)
    mean, sd = result.posterior(4000).mean(), result.posterior(4000).sd()
    for key, value in reference.mean().items():
        scale = reference.sd()[key]
        assert bool(((mean[key] - value).abs() < 0.1 * scale).all())
        # the standard error of a standard deviation of n draws is 1 / sqrt(2 n)
        assert bool(((sd[key] / scale).log().abs() < 0.1).all())
