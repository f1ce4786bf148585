"""Fit a normalizing flow: a normal first, whose location and scale are the flow's coordinates."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

from pyro.infer import ELBO as PyroELBO
from pyro.optim.optim import PyroOptim

from pyro_vi_lab.callbacks import Watch
from pyro_vi_lab.density_engine import Status
from pyro_vi_lab.density_fit import MAX_KL, fit_density
from pyro_vi_lab.errors import ArgumentError
from pyro_vi_lab.families import MAX_DENSE
from pyro_vi_lab.fitted import Fit
from pyro_vi_lab.guides import Flow
from pyro_vi_lab.isolation import model_run
from pyro_vi_lab.problem import Problem
from pyro_vi_lab.program_fit import fit_program, forget, instance_of
from pyro_vi_lab.tiers import Compile

NORMAL_STEPS = 500
"""Most steps of the normal that a flow starts from, as by default."""


def fit_flow(
    problem: Problem,
    guide: Any,
    *,
    optim: PyroOptim | None,
    objective: PyroELBO | None,
    lr: float | None,
    num_particles: int | None,
    num_restarts: int,
    seed: int,
    max_steps: int,
    watch: Watch,
    compile: Compile,
) -> Fit:
    """See :func:`pyro_vi_lab.fit`; an instance that has been run goes on from where it is."""
    if num_restarts != 1:
        raise ArgumentError(f"num_restarts={num_restarts}: a flow is trained in place and has one start")
    began, made = time.perf_counter(), instance_of(problem, guide)
    assert isinstance(made, Flow)
    normal: Fit | None = None
    if made.prototype_trace is None:
        with model_run(seed=seed, dtype=problem.dtype, validate=False):
            made._setup_prototype(*problem.args, **problem.kwargs)
        kind = "full_rank" if problem.density().dim <= MAX_DENSE else "mean_field"
        normal = fit_density(
            problem,
            kind,
            lr=1.0,
            max_kl=MAX_KL,
            num_particles=None,
            num_restarts=1,
            seed=seed,
            max_steps=NORMAL_STEPS,
            watch=watch,
            compile=compile,
        )
        if normal.status is not Status.CONVERGED or normal.params is None:
            return replace(normal, method="flow", message=f"of the normal that the flow starts from: {normal.message}")
        made.whiten(normal.params.loc[0], normal.params.scale[0])
    fit = fit_program(
        problem,
        made,
        optim=optim,
        objective=objective,
        lr=lr,
        num_particles=num_particles,
        num_restarts=1,
        seed=seed,
        max_steps=max_steps,
        watch=watch,
        compile=compile,
    )
    if made is not guide:
        forget(made)
    before = 0 if normal is None else normal.num_gradients
    return replace(fit, method="flow", num_gradients=fit.num_gradients + before, seconds=time.perf_counter() - began)
