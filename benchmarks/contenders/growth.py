"""One fit of one size in a process of its own: seconds and peak memory."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

import pyro_vi_lab as vl
from benchmarks.channel import Channel
from tests.posteriordb import POSTERIORS

PRIOR_SD = 2.5


def logistic_regression(X: Tensor, y: Tensor) -> None:
    beta = pyro.sample("beta", dist.Normal(X.new_zeros(X.shape[-1]), PRIOR_SD).to_event(1))
    with pyro.plate("row", len(y)):
        pyro.sample("y", dist.Bernoulli(logits=beta @ X.T), obs=y)


def linear_regression(X: Tensor, y: Tensor) -> None:
    beta = pyro.sample("beta", dist.Normal(X.new_zeros(X.shape[-1]), PRIOR_SD).to_event(1))
    sigma = pyro.sample("sigma", dist.HalfNormal(X.new_tensor(PRIOR_SD)))
    with pyro.plate("row", len(y)):
        pyro.sample("y", dist.Normal(beta @ X.T, sigma), obs=y)


def normal_means(y: Tensor) -> None:
    tau = pyro.sample("tau", dist.HalfNormal(y.new_tensor(2.0)))
    with pyro.plate("row", len(y)):
        theta = pyro.sample("theta", dist.Normal(y.new_zeros(()), tau))
        pyro.sample("y", dist.Normal(theta, 1.0), obs=y)


MODELS: dict[str, Callable[..., None]] = {
    "logistic_regression": logistic_regression,
    "linear_regression": linear_regression,
    "normal_means": normal_means,
}


def peak_mebibytes() -> float:
    """Most memory that the process has had so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def _problem(model: str, data: dict[str, np.ndarray]) -> vl.Problem:
    program = MODELS[model] if model in MODELS else POSTERIORS[model].model
    return vl.Problem(program, **{key: torch.from_numpy(value) for key, value in data.items()})


def fit(
    channel: Channel, *, model: str, data: dict[str, np.ndarray], family: str, options: dict[str, int], repeats: int
) -> None:
    """Fits with the density captured before; seconds of each, steps, gradients, and memory before and at the peak."""
    problem = _problem(model, data)
    problem.density().value_and_grad(torch.zeros(problem.density().dim, dtype=torch.float64))
    before = peak_mebibytes()
    seconds = []
    for seed in range(repeats):
        began = time.perf_counter()
        result = vl.fit(problem, family, seed=seed, progress=False, **options)
        seconds.append(time.perf_counter() - began)
    converged = sum(status is vl.Status.CONVERGED for status in result.statuses)
    channel.send(
        {
            "seconds": seconds,
            "steps": result.num_steps,
            "gradients": result.num_gradients,
            "converged": f"{converged}/{len(result.statuses)}",
            "before": before,
            "peak": peak_mebibytes(),
        }
    )


def gradients(channel: Channel, *, model: str, data: dict[str, np.ndarray], num_particles: int, repeats: int) -> None:
    """Seconds of one evaluation of the density's gradient for a batch of particles, each the mean of ten."""
    density = _problem(model, data).density()
    z = torch.randn(num_particles, density.dim, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    density.value_and_grad(z)
    before, seconds = peak_mebibytes(), []
    for _ in range(repeats):
        began = time.perf_counter()
        for _ in range(10):
            density.value_and_grad(z)
        seconds.append((time.perf_counter() - began) / 10)
    channel.send({"seconds": seconds, "before": before, "peak": peak_mebibytes()})


COMMANDS: dict[str, Callable[..., None]] = {"fit": fit, "gradients": gradients}
