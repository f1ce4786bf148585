"""The posteriors of the race as PyMC models, equal to the Pyro models of ``tests/posteriordb.py``.

Each takes the arrays that the Pyro model of the same name takes, within a model context, and has on the unconstrained
scale the same log density, constants included.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pymc as pm
from pytensor.tensor import TensorVariable

Array = np.ndarray


def flat_linear_regression(X: Array, y: Array) -> None:
    beta = pm.Flat("beta", shape=X.shape[-1])
    sigma = pm.HalfFlat("sigma", initval=1.0)
    pm.Normal("y", X @ beta, sigma, observed=y)


def cauchy_linear_regression(X: Array, y: Array) -> None:
    beta = pm.Flat("beta", shape=X.shape[-1])
    sigma = pm.HalfCauchy("sigma", 2.5, initval=1.0)
    pm.Normal("y", X @ beta, sigma, observed=y)


def normal_linear_regression(X: Array, y: Array) -> None:
    beta = pm.Normal("beta", 0.0, 10.0, shape=X.shape[-1])
    sigma = pm.HalfNormal("sigma", 10.0, initval=1.0)
    pm.Normal("y", X @ beta, sigma, observed=y)


def wells(X: Array, switched: Array) -> None:
    alpha = pm.Flat("alpha")
    beta = pm.Flat("beta", shape=X.shape[-1])
    pm.Bernoulli("switched", logit_p=alpha + X @ beta, observed=switched.astype(np.int64))


def dogs(num_avoided: Array, num_shocked: Array, y: Array) -> None:
    beta = pm.Normal("beta", 0.0, 100.0, shape=3)
    pm.Bernoulli("y", logit_p=beta[0] + beta[1] * num_avoided + beta[2] * num_shocked, observed=y.astype(np.int64))


def cubic_trend(year: Array) -> TensorVariable:
    alpha = pm.Uniform("alpha", -20.0, 20.0, initval=0.0)
    beta1 = pm.Uniform("beta1", -10.0, 10.0, initval=0.0)
    beta2 = pm.Uniform("beta2", -10.0, 10.0, initval=0.0)
    beta3 = pm.Uniform("beta3", -10.0, 10.0, initval=0.0)
    return alpha + beta1 * year + beta2 * year**2 + beta3 * year**3


def poisson_regression(year: Array, C: Array) -> None:
    pm.Poisson("C", pm.math.exp(cubic_trend(year)), observed=C.astype(np.int64))


def poisson_mixed_regression(year: Array, C: Array) -> None:
    trend = cubic_trend(year)
    sigma = pm.Uniform("sigma", 0.0, 5.0, initval=2.5)
    eps = pm.Normal("eps", 0.0, sigma, shape=len(year))
    pm.Poisson("C", pm.math.exp(trend + eps), observed=C.astype(np.int64))


def eight_schools_centered(y: Array, sigma: Array) -> None:
    mu = pm.Normal("mu", 0.0, 5.0)
    tau = pm.HalfCauchy("tau", 5.0, initval=1.0)
    theta = pm.Normal("theta", mu, tau, shape=len(y))
    pm.Normal("y", theta, sigma, observed=y)


def eight_schools_noncentered(y: Array, sigma: Array) -> None:
    mu = pm.Normal("mu", 0.0, 5.0)
    tau = pm.HalfCauchy("tau", 5.0, initval=1.0)
    theta_trans = pm.Normal("theta_trans", 0.0, 1.0, shape=len(y))
    pm.Normal("y", mu + tau * theta_trans, sigma, observed=y)


NUM_COUNTIES = 85


def radon_noncentered(county: Array, log_uppm: Array, floor: Array, log_radon: Array) -> None:
    sigma_alpha = pm.HalfNormal("sigma_alpha", 1.0, initval=1.0)
    sigma_y = pm.HalfNormal("sigma_y", 1.0, initval=1.0)
    mu_alpha = pm.Normal("mu_alpha", 0.0, 10.0)
    beta = pm.Normal("beta", 0.0, 10.0, shape=2)
    alpha = mu_alpha + sigma_alpha * pm.Normal("alpha_raw", 0.0, 1.0, shape=NUM_COUNTIES)
    pm.Normal("log_radon", alpha[county] + beta[0] * log_uppm + beta[1] * floor, sigma_y, observed=log_radon)


def autoregression(lagged: Array, y: Array) -> None:
    alpha = pm.Normal("alpha", 0.0, 10.0)
    beta = pm.Normal("beta", 0.0, 10.0, shape=lagged.shape[-1])
    sigma = pm.HalfCauchy("sigma", 2.5, initval=1.0)
    pm.Normal("y", alpha + lagged @ beta, sigma, observed=y)


MODELS: dict[str, Callable[..., None]] = {
    model.__name__: model
    for model in (
        autoregression,
        cauchy_linear_regression,
        dogs,
        eight_schools_centered,
        eight_schools_noncentered,
        flat_linear_regression,
        normal_linear_regression,
        poisson_mixed_regression,
        poisson_regression,
        radon_noncentered,
        wells,
    )
}
