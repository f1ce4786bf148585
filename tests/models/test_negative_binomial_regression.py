from __future__ import annotations

import numpy as np
import torch
from scipy import optimize, stats

import pyro_vi_lab as vl
from pyro_vi_lab.models import NegativeBinomialRegression, PoissonRegression


def test_maximum_likelihood_is_that_of_scipy() -> None:
    X, y, _ = NegativeBinomialRegression(prior_scale=0.5, intercept_scale=1.0).simulate(80, 2, seed=1)
    exposure = torch.linspace(1.0, 2.0, 80).double()

    def loss(theta: np.ndarray) -> float:
        a, mean = np.exp(theta[0]), exposure.numpy() * np.exp(theta[1] + X.numpy() @ theta[2:])
        return -float(stats.nbinom(1 / a, 1 / (1 + a * mean)).logpmf(y.numpy()).sum())

    best = optimize.minimize(loss, np.zeros(4), method="BFGS", options={"gtol": 1e-6})
    problem = NegativeBinomialRegression().problem(X, y, exposure=exposure)
    point = vl.fit(problem, "mle", progress=False).point()
    found = torch.cat([point["dispersion"].log()[None], point["intercept"][None], point["beta"]])
    # finite differences find it to the square root of their precision
    torch.testing.assert_close(found, torch.from_numpy(best.x), rtol=1e-4, atol=1e-4)


def test_without_dispersion_it_is_poisson() -> None:
    X, y, _ = PoissonRegression(prior_scale=0.3, intercept_scale=1.0).simulate(20, 2, seed=0)
    poisson = PoissonRegression().problem(X, y).density()
    binomial = NegativeBinomialRegression().problem(X, y).density()
    z = torch.randn(5, 3, generator=torch.Generator().manual_seed(0)).double() / 3
    tiny = torch.cat([torch.full((5, 1), -12.0).double(), z], 1)  # a = 6e-6
    gap = binomial.log_prob(tiny) - poisson.log_prob(z)
    # what is left are the prior of a, the same for all, and a (y - mu)^2 / 2 - a y / 2 per row
    mean = torch.exp(z[:, :1] + z[:, 1:] @ X.T)
    second = np.exp(-12) * ((y - mean).square() - y).sum(1) / 2
    torch.testing.assert_close((gap - second) - (gap - second)[0], torch.zeros(5).double(), rtol=0, atol=1e-6)
