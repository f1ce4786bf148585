"""What published draws say about a fit, and what a verdict said without them."""

from __future__ import annotations

import math
import time
from typing import Any

import numpy as np

import pyro_vi_lab as vl
from tests.posteriordb import Loaded

MAX_SHIFT, MAX_RATIO = 0.3, 1.5
"""A fit is wrong where a mean is off by more standard deviations, or a standard deviation by more than this factor."""
DRAWS, DRAWS_OF_MANY = 20_000, 5_000
"""Draws of the guide from which its moments are taken; fewer where there are more than sixty coordinates."""


def errors(posterior: vl.Posterior, loaded: Loaded) -> dict[str, Any]:
    """Largest mean shift and extreme ratios of standard deviations over the published parameters."""
    mean, sd = posterior.mean(), posterior.sd()
    names = [name for name in loaded.case.parameters if name in mean]
    shift = np.concatenate([np.ravel((mean[name].numpy() - loaded.mean[name]) / loaded.sd[name]) for name in names])
    ratio = np.concatenate([np.ravel(sd[name].numpy() / loaded.sd[name]) for name in names])
    finite = bool(np.isfinite(shift).all() and np.isfinite(ratio).all() and (ratio > 0).all())
    wrong = not finite or np.abs(shift).max() > MAX_SHIFT or np.abs(np.log(ratio)).max() > math.log(MAX_RATIO)
    return {
        "wrong": bool(wrong),
        "shift": float(np.abs(shift).max()) if finite else None,
        "min_ratio": float(ratio.min()) if finite else None,
        "max_ratio": float(ratio.max()) if finite else None,
    }


def judged(problem: vl.Problem, loaded: Loaded, guide: str, seed: int, budget: Any) -> dict[str, Any]:
    """One fit, what is wrong with it, and the verdict."""
    fit = vl.fit(problem, guide, seed=seed, progress=False)
    began = time.perf_counter()
    verdict = vl.trust(fit, budget=budget, seed=seed)
    seconds = time.perf_counter() - began
    row = {
        "status": fit.status.value,
        "decision": verdict.decision,
        "suggestions": list(verdict.suggestions),
        "reasons": list(verdict.reasons[:3]),
        "fit_seconds": fit.seconds,
        "seconds": seconds,
        "fit_gradients": fit.num_gradients,
        "gradients": verdict.num_gradients,
    }
    if fit.status is vl.Status.DIVERGED:
        return row
    number = DRAWS if problem.density().dim <= 60 else DRAWS_OF_MANY
    row |= errors(fit.posterior(number, seed=seed + 77), loaded)
    if verdict.posterior is not None:
        row["reweighted"] = errors(verdict.posterior, loaded)
    return row


def climbed(problem: vl.Problem, loaded: Loaded, seed: int) -> dict[str, Any]:
    """A fit of ``"auto"``, its path, and what is wrong with where it ended."""
    fit = vl.fit(problem, "auto", seed=seed, progress=False)
    row = {
        "method": fit.method,
        "changes": list(fit.path[-1].changes),
        "path": [f"{stage.guide}: {stage.decision}" for stage in fit.path],
        "seconds": fit.seconds,
        "status": fit.status.value,
    }
    return row | errors(fit.posterior(4000, seed=seed + 77), loaded)
