"""Fit any guide by stochastic gradients of a captured objective."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pyro
import torch
from pyro import poutine
from pyro.infer import ELBO as PyroELBO
from pyro.infer import Trace_ELBO, TraceEnum_ELBO
from pyro.infer.autoguide import AutoGuide
from pyro.nn import PyroModule
from pyro.optim.optim import PyroOptim
from torch import Tensor
from torch.utils import _pytree as pytree

from pyro_vi_lab.callbacks import Watch
from pyro_vi_lab.captured import Captured
from pyro_vi_lab.density_engine import Status
from pyro_vi_lab.errors import ArgumentError
from pyro_vi_lab.fitted import Fit
from pyro_vi_lab.fused_adam import FusedAdam
from pyro_vi_lab.guides import GUIDES, Amortized, Conjugate, FamilyGuide, Flow, NetworkNormal, guide_named
from pyro_vi_lab.isolation import default_dtype, seeded, threads
from pyro_vi_lab.natural_gradient import NaturalGradient
from pyro_vi_lab.natural_step import tolerance
from pyro_vi_lab.objectives import ELBO
from pyro_vi_lab.objectives.elbo import Gradient
from pyro_vi_lab.problem import Problem
from pyro_vi_lab.program_engine import Training, enumerated, train
from pyro_vi_lab.tiers import Compile

ADAM_LR, NATURAL_LR = 0.01, 0.1
"""First step sizes."""
MOMENTUM, CURVATURE_MOMENTUM = 0.9, 0.999
"""Of the online Newton steps for the weights of a network, as :class:`~pyro_vi_lab.NaturalGradient` recommends."""
FLOW_LR = 3e-3
"""First step size of a flow, whose parameters are of order one in the coordinates that it starts in."""
FAMILY_PARTICLES, FLOW_PARTICLES = 8, 32
"""Particles of guides over a family and of flows: vectorized, they cost hardly more than one."""
_NUMBERS = itertools.count(1)
PARALLEL_WORK = 2**22
"""Numbers of a batch times parameters from which a second intra-op thread pays."""


def fit_program(
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
    """See :func:`pyro_vi_lab.fit`."""
    if num_restarts != 1:
        raise ArgumentError(
            f"num_restarts={num_restarts}: a guide that is trained in place, as {name_of(guide)} is here, has one start"
        )
    if optim is not None and not isinstance(optim, PyroOptim):
        raise ArgumentError(f"optim must be a Pyro optimizer such as pyro.optim.Adam, got {type(optim).__name__}")
    if optim is not None and lr is not None:
        raise ArgumentError("lr and optim were both given: the step size of an optimizer is set where it is made")
    began = time.perf_counter()
    name, made, model = name_of(guide), instance_of(problem, guide), enumerated(problem)
    captured = objective_of(problem, made, objective, num_particles, compile)
    with (
        seeded(seed),
        default_dtype(problem.dtype),
        threads(num_threads(problem)),
    ):
        result = train(
            problem,
            model,
            made,
            objective=captured,
            optim=optim,
            default_optim=lambda: _optim(problem, made, lr),
            max_steps=max_steps,
            seed=seed,
            on_step=lambda step, done: watch(step, lambda: _row(done)),
            least_fall=_least_fall(problem, made),
        )
    if made is not guide and isinstance(made, PyroModule):
        forget(made)
    return Fit(
        problem=problem,
        method=name,
        guide=made,
        params=None,
        statuses=(result.status,),
        message=_message(result, max_steps),
        num_steps=len(result.losses),
        num_gradients=result.num_gradients,
        seconds=time.perf_counter() - began,
        seed=seed,
        history={
            "negative_elbo": np.array(result.losses),
            "step_size": np.array(result.step_sizes),
            "seconds": np.array(result.seconds),
        },
        objective=captured,
    )


def _row(done: Training) -> dict[str, float]:
    """The last step."""
    return {"negative_elbo": done.losses[-1], "step_size": done.step_sizes[-1], "seconds": done.seconds[-1]}


def _least_fall(problem: Problem, guide: Any) -> float:
    """Nats by which the loss has to fall, whatever its noise, for a fit to go on.

    Near its optimum the bound of a flow has next to no noise to stop at; and neither the parameters of a flow nor the
    weights of a network are identified, so that their drift says nothing.
    """
    if not isinstance(guide, (Flow, NetworkNormal)):
        return 0.0
    return tolerance(sum(site.unconstrained_shape.numel() for site in problem.sites.values() if site.kind == "latent"))


def name_of(guide: Any) -> str:
    """What to call a guide: its name in ``GUIDES``, or that of the class or the function."""
    if isinstance(guide, str):
        return guide
    kind = guide if isinstance(guide, type) else type(guide)
    names = {one: name for name, one in GUIDES.items()}
    return names.get(kind) or str(getattr(guide, "__name__", kind.__name__))


def instance_of(problem: Problem, guide: Any) -> Callable[..., Any]:
    """A guide that can be called; ours are twins, all others are what was given."""
    if isinstance(guide, str):
        guide = guide_named(guide)
    if isinstance(guide, type):
        if not issubclass(guide, AutoGuide):
            raise ArgumentError(f"guide {guide.__name__} is a class, but no Pyro autoguide: give an instance of it")
        discrete = [site.name for site in problem.sites.values() if site.kind == "discrete"]
        return _named(guide(poutine.block(problem.model, hide=discrete) if discrete else problem.model))
    if not callable(guide):
        raise ArgumentError(f"guide must be a name, a guide class or a Pyro guide, got {type(guide).__name__}")
    return _named(guide.twin()) if isinstance(guide, FamilyGuide) else guide


def _named(guide: PyroModule) -> PyroModule:
    """A guide that shares no names in the param store with others of its class."""
    guide._pyro_name = f"{type(guide).__name__}_{next(_NUMBERS)}"
    return guide


def forget(guide: PyroModule) -> None:
    """Take the parameters of a guide that we have made out of the param store; the guide keeps them."""
    store = pyro.get_param_store()
    for name in [name for name in store.keys() if name.startswith(f"{guide._pyro_name}.")]:  # noqa: SIM118
        del store[name]


def objective_of(
    problem: Problem, guide: Any, objective: PyroELBO | None, num_particles: int | None, compile: Compile
) -> Captured:
    """The captured objective of a fit: the one that was given, or the one that suits the guide."""
    if isinstance(objective, Captured):
        return objective
    if objective is not None:
        if num_particles is not None:
            raise ArgumentError("num_particles and objective were both given: the objective has its own")
        return Captured(objective, compile=compile)
    if any(site.kind == "discrete" for site in problem.sites.values()):
        nesting = problem.max_plate_nesting
        return Captured(TraceEnum_ELBO(num_particles or 1, max_plate_nesting=nesting), compile=compile)
    if isinstance(guide, NetworkNormal):
        # the rows of a batch are draws enough, and the KL divergence is in closed form
        return Captured(ELBO(num_particles or 1), compile=compile)
    if isinstance(guide, (FamilyGuide, Conjugate)):
        return Captured(ELBO(num_particles or FAMILY_PARTICLES), compile=compile)
    if isinstance(guide, Flow):
        # the density of an autoregressive flow at a given point takes D passes
        gradient: Gradient = "stl" if guide.has_quick_inverse else "reparam"
        return Captured(ELBO(num_particles or FLOW_PARTICLES, gradient=gradient), compile=compile)
    if isinstance(guide, Amortized):
        return Captured(ELBO(num_particles or 1), compile=compile)
    return Captured(Trace_ELBO(num_particles or 1), compile=compile)


def _optim(problem: Problem, guide: Any, lr: float | None) -> PyroOptim:
    others = FusedAdam({"lr": ADAM_LR})
    if isinstance(guide, NetworkNormal) and not problem.has_local_sites:
        return NaturalGradient(
            guide, lr=lr or NATURAL_LR, momentum=MOMENTUM, curvature_momentum=CURVATURE_MOMENTUM, others=others
        )
    if isinstance(guide, (FamilyGuide, Conjugate)) and not problem.has_local_sites:
        return NaturalGradient(guide, lr=lr or NATURAL_LR, others=others)
    return FusedAdam({"lr": lr or (FLOW_LR if isinstance(guide, Flow) else ADAM_LR)})


def num_threads(problem: Problem) -> int:
    """Intra-op threads that pay for a step."""
    example = problem.example
    leaves = pytree.tree_leaves((problem.args, problem.kwargs) if example is None else (example.args, example.kwargs))
    numbers = sum(leaf.numel() for leaf in leaves if isinstance(leaf, Tensor))
    parameters = sum(value.numel() for value in pyro.get_param_store()._params.values())
    return torch.get_num_threads() if numbers * max(parameters, 1) >= PARALLEL_WORK else 1


def _message(result: Training, max_steps: int) -> str:
    if result.status is Status.DIVERGED:
        return (
            f"diverged: {result.culprit}; take a smaller step size (lr=...), or check the supports of the sites "
            "that depend on it"
        )
    if result.status is Status.OUT_OF_STEPS:
        return (
            f"stopped after max_steps={max_steps} while the loss was still falling, or the step size: raise max_steps, "
            "or give a larger first step size (lr=...)"
        )
    kept = ", parameters averaged over the last stage" if result.averaged else ""
    return f"converged: at the smallest step size the loss no longer falls by more than its noise{kept}"
