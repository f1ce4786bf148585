"""Adam on our captured density: the same family, parameters of Pyro's kind, start and number of particles as ours."""

from __future__ import annotations

import math
import time
from typing import Any

import pyro
import torch

from benchmarks.natural_gradient.evaluation import JUDGE_DRAWS, JUDGE_SEED, Bound, arrival, finite
from benchmarks.natural_gradient.suited import entry
from pyro_vi_lab.density import LogDensity
from pyro_vi_lab.families import Params
from pyro_vi_lab.guides import GUIDES, FamilyGuide
from pyro_vi_lab.problem import Problem

LEARNING_RATES = (0.1, 0.01, 0.001, 1.0)
"""Likely winners first, so that the others can be cut off."""
FIRST_BLOCK, GROWTH = 10, 1.1
"""Checkpoints grow further apart, so that the step of arrival is known to a tenth."""
CAP_SECONDS, MOST_SECONDS = 2.5, 8.0
ENOUGH_TIMES = 40
"""A run that has not arrived in its time goes on until it has taken that many times our steps, or the most seconds."""
SLOWER = 1.2
"""A learning rate is cut off when it has taken that many times the steps of the best so far."""
POLISH_STEPS, POLISH_BLOCK, POLISH_SECONDS = 3000, 100, 1.5
KEPT = 2.0
"""Nats below the reference from which checkpoints are kept."""


class Ascent:
    """Stochastic gradient ascent of the bound by Adam, with the sticking-the-landing gradient.

    Args:
        density: The target.
        guide: A guide that has been set up, at its start; its parameters are changed.
        lr: Learning rate.
        num_particles: Independent draws per step.
    """

    def __init__(self, density: LogDensity, guide: FamilyGuide, *, lr: float, num_particles: int) -> None:
        self.density, self.guide, self.num_particles = density, guide, num_particles
        self._leaves = list(guide.parameters())
        self.optim = torch.optim.Adam(self._leaves, lr=lr)
        self.top: tuple[float, Params] = (-math.inf, guide.params)
        """The best checkpoint so far."""
        self.seconds = 0.0
        """Of the steps alone."""

    def run(self, num_steps: int) -> list[Params]:
        """Take steps; last and mean iterate."""
        began = time.perf_counter()
        total = [torch.zeros_like(value) for value in self._leaves]
        for _ in range(num_steps):
            self._step()
            for sum_, value in zip(total, self._leaves, strict=True):
                sum_ += value.detach()
        self.seconds += time.perf_counter() - began
        last, kept = self.guide.params, [value.detach().clone() for value in self._leaves]
        self._set([sum_ / num_steps for sum_ in total])
        mean = self.guide.params
        self._set(kept)
        return [last, mean]

    def checkpoint(self, bound: Bound, reference: float, num_steps: int) -> float:
        """Take steps; the better bound of the last and the mean iterate."""
        points = self.run(num_steps)
        values = [bound.near(point, reference) for point in points]
        best = max(range(len(points)), key=lambda i: values[i])
        if values[best] > self.top[0]:
            self.top = values[best], points[best]
        return values[best]

    @property
    def blown(self) -> bool:
        """Whether a parameter is not finite."""
        return not all(bool(torch.isfinite(value).all()) for value in self._leaves)

    def _step(self) -> None:
        z = self.guide.get_posterior().rsample((self.num_particles,))
        at = z.detach().requires_grad_()
        with torch.enable_grad():
            (score,) = torch.autograd.grad(self.guide.family.log_prob(self.guide.params, at).sum(), at)
        _, grad = self.density.value_and_grad(at.detach())
        self.optim.zero_grad()
        z.backward((score - grad) / self.num_particles)
        self.optim.step()

    def _set(self, values: list[torch.Tensor]) -> None:
        with torch.no_grad():
            for leaf, value in zip(self._leaves, values, strict=True):
                leaf.copy_(value)


def start(problem: Problem, family: str) -> FamilyGuide:
    """A guide at the default start."""
    pyro.clear_param_store()  # it goes by names: a guide of the same class would go on where the last one was
    guide = GUIDES[family](problem.model)
    guide(*problem.args, **problem.kwargs)
    return guide


def posterior(
    *, posterior: str, family: str, num_particles: int, reference: float, our_steps: int, quick: bool
) -> dict[str, Any]:
    """Adam with each learning rate until its bound is within 0.1 nat of the reference, and the best one further on.

    Args:
        reference: The best bound known so far by the common draws.
        our_steps: Steps of our fit.
    """
    if not issubclass(GUIDES[family], FamilyGuide):
        return {"skipped": "the guide is not over a family"}
    pyro.enable_validation(False)
    torch.set_default_dtype(torch.float64)
    problem, evidence = entry(posterior).problem, entry(posterior).loaded.log_evidence
    density = problem.density()
    bound = Bound(density, start(problem, family).family, evidence=evidence)
    runs: list[dict[str, Any]] = []
    ascents: dict[float, Ascent] = {}
    for lr in LEARNING_RATES[:2] if quick else LEARNING_RATES:
        arrivals = [run["arrived"][0] for run in runs if run["arrived"]]
        most = SLOWER * min(arrivals) if arrivals else math.inf
        torch.manual_seed(0)
        ascents[lr] = Ascent(density, start(problem, family), lr=lr, num_particles=num_particles)
        runs.append({"lr": lr, **climb(ascents[lr], bound, reference, our_steps, most, quick=quick)})
    best = min(runs, key=lambda run: (run["arrived"] is None, run["arrived"][0] if run["arrived"] else -_top(run)))
    polish(ascents[best["lr"]], bound, reference, seconds=POLISH_SECONDS / 8 if quick else POLISH_SECONDS)
    top, member = max((ascent.top for ascent in ascents.values()), key=lambda one: one[0])
    judge = Bound(density, ascents[best["lr"]].guide.family, JUDGE_DRAWS, seed=JUDGE_SEED, evidence=evidence)
    kept = [point for point in best["path"] if point[2] is not None and reference - point[2] <= KEPT]
    path = [[step, round(seconds, 4), round(value, 4)] for step, seconds, value in kept]
    return {
        "num_particles": num_particles,
        "lr": best["lr"],
        "steps": best["steps"],
        "seconds": best["seconds"],
        "path": path,
        "common": finite(top),
        "judged": finite(judge(member)),
        "runs": [
            {**{key: run[key] for key in ("lr", "steps", "seconds", "arrived")}, "top": finite(_top(run))}
            for run in runs
        ],
    }


def climb(
    ascent: Ascent, bound: Bound, reference: float, our_steps: int, most_steps: float, *, quick: bool
) -> dict[str, Any]:
    """Checkpoints ``[steps, seconds, bound]`` until two in a row are near the reference, or time or steps are up."""
    path: list[list[Any]] = []
    steps, seconds, cap = 0, 0.0, CAP_SECONDS / 8 if quick else CAP_SECONDS
    while True:
        block = max(FIRST_BLOCK, int(steps * (GROWTH - 1)))
        value, seconds = ascent.checkpoint(bound, reference, block), ascent.seconds
        steps += block
        path.append([steps, seconds, finite(value)])
        arrived = arrival(path, reference) if len(path) > 1 else None
        if arrived is not None and arrived is not path[-1]:
            return {"steps": steps, "seconds": seconds, "arrived": arrived[:2], "path": path}
        enough = seconds > cap and (quick or steps >= ENOUGH_TIMES * our_steps or seconds > MOST_SECONDS)
        if ascent.blown or steps > most_steps or (enough and arrived is None):
            return {"steps": steps, "seconds": seconds, "arrived": None, "path": path}


def polish(ascent: Ascent, bound: Bound, reference: float, *, seconds: float) -> float:
    """Go on with a tenth of the learning rate: does it end above the reference?"""
    for group in ascent.optim.param_groups:
        group["lr"] /= 10
    began, steps = time.perf_counter(), 0
    while steps < POLISH_STEPS and time.perf_counter() - began < seconds:
        ascent.checkpoint(bound, reference, POLISH_BLOCK)
        steps += POLISH_BLOCK
    return ascent.top[0]


def _top(run: dict[str, Any]) -> float:
    return max((point[2] for point in run["path"] if point[2] is not None), default=-math.inf)
