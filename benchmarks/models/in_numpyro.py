"""The posteriors of the race as NumPyro models, equal to the Pyro models of ``tests/posteriordb.py``.

Each takes the arrays that the Pyro model of the same name takes, and has on the unconstrained scale the same log
density, constants included; `tests/test_benchmarks.py` compares them at random points.
"""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from jax import Array
from numpyro.distributions import constraints


def flat(support: constraints.Constraint, *shape: int) -> dist.ImproperUniform:
    """The density 1 on a support."""
    return dist.ImproperUniform(support, (), shape)


def flat_linear_regression(X: Array, y: Array) -> None:
    beta = numpyro.sample("beta", flat(constraints.real_vector, X.shape[-1]))
    sigma = numpyro.sample("sigma", flat(constraints.positive))
    numpyro.sample("y", dist.Normal(X @ beta, sigma), obs=y)


def cauchy_linear_regression(X: Array, y: Array) -> None:
    beta = numpyro.sample("beta", flat(constraints.real_vector, X.shape[-1]))
    sigma = numpyro.sample("sigma", dist.HalfCauchy(2.5))
    numpyro.sample("y", dist.Normal(X @ beta, sigma), obs=y)


def normal_linear_regression(X: Array, y: Array) -> None:
    beta = numpyro.sample("beta", dist.Normal(0, 10).expand([X.shape[-1]]).to_event(1))
    sigma = numpyro.sample("sigma", dist.HalfNormal(10))
    numpyro.sample("y", dist.Normal(X @ beta, sigma), obs=y)


def wells(X: Array, switched: Array) -> None:
    alpha = numpyro.sample("alpha", flat(constraints.real))
    beta = numpyro.sample("beta", flat(constraints.real_vector, X.shape[-1]))
    numpyro.sample("switched", dist.Bernoulli(logits=alpha + X @ beta), obs=switched)


def dogs(num_avoided: Array, num_shocked: Array, y: Array) -> None:
    beta = numpyro.sample("beta", dist.Normal(0, 100).expand([3]).to_event(1))
    logits = beta[0] + beta[1] * num_avoided + beta[2] * num_shocked
    numpyro.sample("y", dist.Bernoulli(logits=logits), obs=y)


def cubic_trend(year: Array) -> Array:
    alpha = numpyro.sample("alpha", dist.Uniform(-20, 20))
    beta1 = numpyro.sample("beta1", dist.Uniform(-10, 10))
    beta2 = numpyro.sample("beta2", dist.Uniform(-10, 10))
    beta3 = numpyro.sample("beta3", dist.Uniform(-10, 10))
    return alpha + beta1 * year + beta2 * year**2 + beta3 * year**3


def poisson_regression(year: Array, C: Array) -> None:
    numpyro.sample("C", dist.Poisson(jnp.exp(cubic_trend(year))), obs=C)


def poisson_mixed_regression(year: Array, C: Array) -> None:
    trend = cubic_trend(year)
    sigma = numpyro.sample("sigma", dist.Uniform(0, 5))
    with numpyro.plate("time", len(year)):
        eps = numpyro.sample("eps", dist.Normal(0, sigma))
        numpyro.sample("C", dist.Poisson(jnp.exp(trend + eps)), obs=C)


def eight_schools_centered(y: Array, sigma: Array) -> None:
    mu = numpyro.sample("mu", dist.Normal(0, 5))
    tau = numpyro.sample("tau", dist.HalfCauchy(5))
    with numpyro.plate("school", len(y)):
        theta = numpyro.sample("theta", dist.Normal(mu, tau))
        numpyro.sample("y", dist.Normal(theta, sigma), obs=y)


def eight_schools_noncentered(y: Array, sigma: Array) -> None:
    mu = numpyro.sample("mu", dist.Normal(0, 5))
    tau = numpyro.sample("tau", dist.HalfCauchy(5))
    with numpyro.plate("school", len(y)):
        theta_trans = numpyro.sample("theta_trans", dist.Normal(0, 1))
        numpyro.sample("y", dist.Normal(mu + tau * theta_trans, sigma), obs=y)


NUM_COUNTIES = 85


def radon_noncentered(county: Array, log_uppm: Array, floor: Array, log_radon: Array) -> None:
    sigma_alpha = numpyro.sample("sigma_alpha", dist.HalfNormal(1))
    sigma_y = numpyro.sample("sigma_y", dist.HalfNormal(1))
    mu_alpha = numpyro.sample("mu_alpha", dist.Normal(0, 10))
    beta = numpyro.sample("beta", dist.Normal(0, 10).expand([2]).to_event(1))
    with numpyro.plate("county", NUM_COUNTIES):
        alpha_raw = numpyro.sample("alpha_raw", dist.Normal(0, 1))
    alpha = mu_alpha + sigma_alpha * alpha_raw
    mean = alpha[county] + beta[0] * log_uppm + beta[1] * floor
    numpyro.sample("log_radon", dist.Normal(mean, sigma_y), obs=log_radon)


def autoregression(lagged: Array, y: Array) -> None:
    alpha = numpyro.sample("alpha", dist.Normal(0, 10))
    beta = numpyro.sample("beta", dist.Normal(0, 10).expand([lagged.shape[-1]]).to_event(1))
    sigma = numpyro.sample("sigma", dist.HalfCauchy(2.5))
    numpyro.sample("y", dist.Normal(alpha + lagged @ beta, sigma), obs=y)


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
