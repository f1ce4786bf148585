"""Our fits: with the defaults, ten times as long, and from many seeds; run inside a contender's process."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch

import pyro_vi_lab as vl
from benchmarks.natural_gradient.evaluation import Bound, common, finite, fresh, judged
from benchmarks.natural_gradient.suited import entry
from benchmarks.target import WITHIN
from pyro_vi_lab import density_engine, natural_step
from pyro_vi_lab.families import Params
from pyro_vi_lab.guides import FamilyGuide
from pyro_vi_lab.heavy_tails import unbounded_coordinate

SEED = 1
TIMES_LONGER = 10
LONG_PARTICLES = 2048
LONG_SECONDS = 3.0
PATH_DRAWS = 1024


def posterior(*, posterior: str, family: str, quick: bool) -> dict[str, Any]:
    """One fit with the defaults from the default start, and what ten times the steps make of it."""
    problem = entry(posterior).problem
    density = problem.density()
    density.value_and_grad(torch.zeros(density.dim, dtype=density.dtype))  # captured before the clock starts
    vl.fit(problem, family, seed=0, max_steps=1, progress=False)
    fit = vl.fit(problem, family, seed=SEED, progress=False)
    row: dict[str, Any] = {"dim": density.dim, **described(fit)}
    if isinstance(fit.guide, FamilyGuide) and fit.family.num_moments < math.inf:
        normal = vl.fit(problem, "mean_field", seed=SEED, progress=False)
        assert normal.params is not None
        sd = normal.family.variance(normal.params)[0].sqrt()
        worst = unbounded_coordinate(density, normal.params.loc[0], sd, fit.family.num_moments)
        if worst is not None:
            why = f"its bound is minus infinity: the log density falls exponentially along {density.labels[worst]}"
            return {**row, "skipped": f"{why}; our fit says *{fit.status.value}*"}
    if fit.status is vl.Status.DIVERGED:
        return {**row, "message": fit.message}
    if fit.status is not vl.Status.CONVERGED:
        row["message"] = fit.message
    (elbo, error), (own, _) = fresh(fit), common(fit)
    row |= {"elbo": finite(elbo), "error": finite(error), "common": finite(own), "judged": finite(judged(fit))}
    if family in ("mean_field", "full_rank"):
        row["baseline"] = entry(posterior).loaded.baseline(family)  # type: ignore[arg-type]
    if isinstance(fit.guide, FamilyGuide):
        row["long"] = longer(fit, seconds=LONG_SECONDS / 8 if quick else LONG_SECONDS)
    return row


def described(fit: vl.Fit) -> dict[str, Any]:
    """How a fit ended and what it took."""
    particles = [int(value) for value in fit.history.get("num_particles", [0])]
    return {
        "status": fit.status.value,
        "steps": fit.num_steps,
        "gradients": fit.num_gradients,
        "seconds": fit.seconds,
        "particles": [particles[0], max(particles)],
    }


def longer(fit: vl.Fit, *, seconds: float) -> dict[str, Any]:
    """Go on from where a fit stopped, with the stop rule off and many particles, for ten times the steps in all."""
    density = fit.problem.density()
    dim, dtype = density.dim, density.dtype
    particles = max(64, min(LONG_PARTICLES, density_engine.MAX_NUMBERS // density.work // 2 * 2))
    z = fit.loc + torch.zeros(particles, dim, dtype=dtype)
    density.value_and_grad(z)  # the first of its shape takes longer
    began = time.perf_counter()
    density.value_and_grad(z)
    per_step = max(time.perf_counter() - began, 1e-4) * 3  # the step itself too, and more particles later
    wanted = (TIMES_LONGER - 1) * max(fit.num_steps, 1)
    steps = max(1, min(wanted, int(seconds / per_step)))
    with no_stop():
        last = vl.fit(
            fit.problem,
            fit.guide,
            seed=fit.seed + 1,
            num_particles=max(particles, 4),
            max_steps=steps,
            compile=False,
            progress=False,
        )
    bounds = [None, None] if last.status is vl.Status.DIVERGED else [finite(common(last)[0]), finite(judged(last))]
    return {"common": bounds[0], "judged": bounds[1], "steps": last.num_steps, "wanted": wanted, "particles": particles}


@contextmanager
def no_stop() -> Iterator[None]:
    """Fits go on until their steps are used up or their gradient is rounding error."""
    with mock.patch.object(natural_step, "tolerance", return_value=0.0):
        yield


@contextmanager
def watched() -> Iterator[list[Params]]:
    """Where a fit was after each of its steps, the start included."""
    path: list[Params] = []
    record = density_engine._record

    def keep(state: Any, *rest: Any) -> Any:
        path.append(Params(*(value[0].clone() for value in state.params)))
        return record(state, *rest)

    with mock.patch.object(density_engine, "_record", keep):
        yield path


def seeds(*, posterior: str, family: str, num_seeds: int, seconds: float) -> dict[str, Any]:
    """Fits from many seeds: where each stopped, and since when it had been there."""
    problem = entry(posterior).problem
    density = problem.density()
    density.value_and_grad(torch.zeros(density.dim, dtype=density.dtype))
    fits: list[dict[str, Any]] = []
    began = time.perf_counter()
    for seed in range(100, 100 + num_seeds):
        with watched() as path:
            fit = vl.fit(problem, family, seed=seed, compile=False, progress=False)
        value, error = common(fit) if fit.status is not vl.Status.DIVERGED else (float("nan"), float("nan"))
        fits.append(
            {
                "status": fit.status.value,
                "common": finite(value),
                "error": finite(error),
                "steps": fit.num_steps,
                "wasted": wasted(Bound(density, fit.family, PATH_DRAWS), path),
            }
        )
        if time.perf_counter() - began > seconds:
            break
    return {"dim": density.dim, "fits": fits, "seconds": time.perf_counter() - began}


def wasted(bound: Bound, path: list[Params]) -> int:
    """Steps taken after the bound had come within 0.1 nat of where it ended, for good."""
    end, count = bound(path[-1]), 0
    for params in reversed(path[:-1]):
        if not bound(params) >= end - WITHIN:
            break
        count += 1
    return count
