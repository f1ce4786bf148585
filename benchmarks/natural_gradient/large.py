"""Ten thousand dimensions: what a step costs beside the gradients that it takes, in time and in memory."""

from __future__ import annotations

import statistics
import time
from typing import Any

import numpy as np
import torch

import pyro_vi_lab as vl
from benchmarks.contenders.growth import normal_means, peak_mebibytes
from pyro_vi_lab.guides import LowRankNormal

DIM, RANK = 10_000, 10
FAMILIES = ("mean_field", "low_rank")
STEPS, REPEATS = 20, 10


def _problem() -> vl.Problem:
    y = torch.from_numpy(np.random.default_rng(0).normal(size=DIM - 1) * 2)
    problem = vl.Problem(normal_means, y=y)
    density = problem.density()
    density.value_and_grad(torch.zeros(1, density.dim, dtype=density.dtype))
    return problem


def fit(*, family: str) -> dict[str, Any]:
    """Some steps of a fit: seconds of a step with the most particles, and the peak of the process."""
    problem = _problem()
    guide = LowRankNormal(problem.model, rank=RANK) if family == "low_rank" else family
    before = peak_mebibytes()
    result = vl.fit(problem, guide, seed=1, max_steps=STEPS, progress=False)
    peak = peak_mebibytes()
    particles, clock = result.history["num_particles"], result.history["seconds"]
    most = int(max(particles[1:]))
    times = [float(clock[i] - clock[i - 1]) for i in range(1, len(clock)) if particles[i] == most]
    return {"particles": most, "seconds": statistics.median(times), "before": before, "peak": peak}


def gradient(*, num_particles: int) -> dict[str, Any]:
    """The gradients of one step alone."""
    problem = _problem()
    density = problem.density()
    generator = torch.Generator().manual_seed(0)
    z = 0.1 * torch.randn(num_particles, density.dim, generator=generator, dtype=density.dtype)
    before, times = peak_mebibytes(), []
    for _ in range(REPEATS):
        began = time.perf_counter()
        density.value_and_grad(z)
        times.append(time.perf_counter() - began)
    return {"seconds": statistics.median(times), "before": before, "peak": peak_mebibytes()}
