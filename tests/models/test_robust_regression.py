from __future__ import annotations

import numpy as np
import pytest
import torch

import pyro_vi_lab as vl
from pyro_vi_lab.models import LinearRegression, RobustRegression


def expectation_maximization(X: np.ndarray, y: np.ndarray, nu: float) -> tuple[np.ndarray, float]:
    """Maximum likelihood of location and scale (Lange, Little & Taylor 1989, Section 3)."""
    A = np.column_stack([np.ones(len(X)), X])
    theta, variance = np.linalg.lstsq(A, y)[0], float(y.var())
    for _ in range(2000):
        weights = (nu + 1) / (nu + (y - A @ theta) ** 2 / variance)
        root = np.sqrt(weights)
        theta = np.linalg.lstsq(root[:, None] * A, root * y)[0]
        variance = float((weights * (y - A @ theta) ** 2).mean())
    return theta, np.sqrt(variance)


def test_maximum_likelihood_is_that_of_expectation_maximization() -> None:
    X, y, _ = RobustRegression(3.0).simulate(60, 2, seed=0)
    theta, sigma = expectation_maximization(X.numpy(), y.numpy(), 3.0)
    point = vl.fit(RobustRegression(3.0).problem(X, y), "mle", progress=False).point()
    found = torch.cat([point["intercept"][None], point["beta"], point["sigma"][None]])
    torch.testing.assert_close(found, torch.tensor([*theta, sigma]).double(), rtol=1e-5, atol=1e-6)


def test_one_outlier_moves_it_less_than_linear_regression() -> None:
    X, y, values = LinearRegression(0.5).simulate(50, 1, seed=0)
    y[7] += 50.0
    robust = vl.fit(RobustRegression(4.0).problem(X, y), "map", progress=False).point()
    linear = vl.fit(LinearRegression().problem(X, y), "map", progress=False).point()
    # the clean standard error of the intercept is 0.5 / sqrt(50)
    assert abs(float(robust["intercept"] - values["intercept"])) < 5 * 0.5 / np.sqrt(50)
    assert abs(float(linear["intercept"] - values["intercept"])) > 5 * 0.5 / np.sqrt(50)


@pytest.mark.slow
def test_the_fit_agrees_with_nuts() -> None:
    X, y, _ = RobustRegression(4.0).simulate(100, 2, seed=0)
    problem = RobustRegression(4.0).problem(X, y, standardize=True)
    reference = vl.nuts(problem, num_chains=2, num_warmup=300, num_draws=1000, progress=False)
    posterior = vl.fit(problem, progress=False).posterior(4000)
    for key, value in reference.mean().items():
        scale = reference.sd()[key]
        assert bool(((posterior.mean()[key] - value).abs() < 0.1 * scale).all())
        assert bool(((posterior.sd()[key] / scale).log().abs() < 0.1).all())
