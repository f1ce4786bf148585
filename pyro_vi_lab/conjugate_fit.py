"""Fit a guide of exponential families by coordinate ascent with exact expectations."""

from __future__ import annotations

import math
import time
from typing import Any

import numpy as np

from pyro_vi_lab.callbacks import Watch
from pyro_vi_lab.coordinate_ascent import coordinate_ascent
from pyro_vi_lab.density_engine import Status
from pyro_vi_lab.errors import ArgumentError, FitError, ModelError
from pyro_vi_lab.fitted import Fit
from pyro_vi_lab.guides import Conjugate
from pyro_vi_lab.problem import Problem
from pyro_vi_lab.program_fit import forget, instance_of, objective_of

SWEEPS = 1000
"""Most sweeps by default."""
TOLERANCE = 1e-10
"""Squared Fisher length of a sweep, in nats, below which it has converged."""


def fit_conjugate(
    problem: Problem,
    guide: Any,
    *,
    num_restarts: int,
    seed: int,
    max_steps: int | None,
    lr: float | None,
    watch: Watch,
) -> Fit:
    """See :func:`pyro_vi_lab.fit`; a guide that was given as an instance is changed.

    Raises:
        ModelError: A site is not conditionally conjugate; the message names it.
    """
    if num_restarts != 1:
        raise ArgumentError(f"num_restarts={num_restarts}: a guide of exponential families is changed in place")
    max_steps, lr = max_steps or SWEEPS, lr or 1.0
    began, made = time.perf_counter(), instance_of(problem, guide)
    assert isinstance(made, Conjugate)
    try:
        ascent = coordinate_ascent(
            problem,
            made,
            lr=lr,
            max_sweeps=max_steps,
            tolerance=TOLERANCE,
            on_sweep=lambda sweep, elbo, seconds: watch(
                sweep, lambda: {"negative_elbo": -elbo, "step_size": lr, "seconds": seconds}
            ),
        )
        elbo, seconds = ascent.elbo.detach().cpu().double().numpy(), np.array(ascent.seconds)
        status = Status.CONVERGED if ascent.converged else Status.OUT_OF_STEPS
        message = (
            "converged: a sweep of exact updates changes nothing more"
            if ascent.converged
            else f"stopped after max_steps={max_steps} sweeps; the bound still rises: raise max_steps"
        )
    except FitError as error:
        elbo, seconds = np.array([math.nan]), np.array([time.perf_counter() - began])
        status, message = Status.DIVERGED, f"diverged: {error}"
    except ModelError as error:
        # Pyro adds the shapes of the trace to errors
        raise ModelError(f"{str(error).splitlines()[0]}, or fit 'mean_field' or 'full_rank'") from error
    if made is not guide:
        forget(made)
    return Fit(
        problem=problem,
        method="conjugate",
        guide=made,
        params=None,
        statuses=(status,),
        message=message,
        num_steps=len(elbo) - 1,
        num_gradients=0,
        seconds=time.perf_counter() - began,
        seed=seed,
        history={
            "negative_elbo": -elbo,
            "step_size": np.full(len(elbo), lr),
            "seconds": seconds,
        },
        objective=objective_of(problem, made, None, None, "auto"),
    )
