"""Results of plain Pyro as posteriors: of its sampler, and of a guide that a loop of the user's own has trained."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from pyro import poutine
from pyro.infer import MCMC
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from pyro_vi_lab.errors import ArgumentError, LabWarning, ModelError
from pyro_vi_lab.isolation import model_run
from pyro_vi_lab.posterior import Posterior
from pyro_vi_lab.problem import Problem
from pyro_vi_lab.program_draws import program_draws
from pyro_vi_lab.program_fit import name_of

MAX_UNCONSTRAINED = 2**25
"""Numbers that draws on the unconstrained scale may have where they are worked out for the export alone."""


def from_mcmc(mcmc: MCMC) -> Posterior:
    """The draws of Pyro's own sampler.

    Pyro keeps which transitions diverged and each chain's rate of acceptance; log density and energy it does not.

    Raises:
        ArgumentError: It was not run.
    """
    if mcmc._samples is None:
        raise ArgumentError("this MCMC has no draws yet: call its run(...) first")
    draws = mcmc.get_samples(group_by_chain=True)
    diverging = torch.zeros(next(iter(draws.values())).shape[:2], dtype=torch.bool)
    found: list[Any] = [values or {} for values in mcmc._diagnostics]
    for chain, values in enumerate(found):
        diverging[chain, list(values.get("divergences", []))] = True
    info: dict[str, Any] = {"num_warmup": mcmc.warmup_steps, "backend": "pyro"}
    if any("acceptance rate" in values for values in found):
        info["acceptance_rate_by_chain"] = [float(values.get("acceptance rate", torch.nan)) for values in found]
    method = type(mcmc.kernel).__name__.lower()
    return Posterior(draws, {"diverging": diverging}, method=method, info=info)


def problem_of(mcmc: MCMC) -> Problem | None:
    """The problem that a sampler was run on; ``None`` if it has no model but a potential, or one that is no problem."""
    model = getattr(mcmc.kernel, "model", None)
    if model is None or mcmc._args is None:
        return None
    try:
        return problem_with(model, mcmc._args, mcmc._kwargs or {})
    except ModelError as error:
        warnings.warn(f"only the draws are exported: {error}", LabWarning, stacklevel=5)
        return None


def problem_with(model: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Problem:
    """The problem of a model that a loop of the user's own ran: in the type of its data."""
    leaves = pytree.tree_leaves((args, dict(kwargs)))
    types = {leaf.dtype for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()}
    return Problem(model, *args, dtype=types.pop() if len(types) == 1 else torch.get_default_dtype(), **kwargs)


def from_triple(triple: tuple[Any, ...], problem: Problem | None) -> tuple[Problem, Callable[..., Any]]:
    """The problem and the guide of ``(model, guide, args)`` or ``(model, guide, args, kwargs)``.

    Raises:
        ArgumentError: It is something else.
    """
    if len(triple) not in (3, 4):
        raise ArgumentError(
            f"a tuple must be (model, guide, args) or (model, guide, args, kwargs), got {len(triple)} values"
        )
    model, guide, args, *rest = triple
    kwargs = rest[0] if rest else {}
    if not (callable(model) and callable(guide)):
        kinds = f"{type(model).__name__} and {type(guide).__name__}"
        raise ArgumentError(f"(model, guide, args) begins with two Pyro programs, got {kinds}")
    args = args if isinstance(args, (tuple, list)) else (args,)
    if not isinstance(kwargs, Mapping):
        raise ArgumentError(f"the fourth value, kwargs, must be a dict, got {type(kwargs).__name__}")
    return problem or problem_with(model, tuple(args), kwargs), guide


def draws_of_guide(problem: Problem, guide: Callable[..., Any], num_draws: int, seed: int) -> Posterior:
    """Independent draws of a guide as it is now, in one chain."""
    drawn = program_draws(problem, guide, num_draws, seed)
    return Posterior(
        draws={name: value[None] for name, value in drawn.values.items()},
        stats={name: value[None] for name, value in drawn.stats.items()},
        method=name_of(guide),
        info={"draws_seed": seed},
    )


def unconstrained(posterior: Posterior, problem: Problem) -> tuple[Tensor, Tensor] | None:
    """The draws on the unconstrained scale ``(C, S, D)`` and their log densities there, ``(C, S)``.

    ``None`` where that would take long: the model cannot be captured, sees some of its rows only, or is too large.
    """
    latent = {name: site for name, site in problem.sites.items() if site.kind == "latent"}
    numbers = sum(site.shape.numel() for site in latent.values()) * posterior.num_chains * posterior.num_draws
    if problem.subsamples or numbers > MAX_UNCONSTRAINED or not latent.keys() <= posterior.draws.keys():
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", LabWarning)  # that it cannot be captured: then it is not run
        density = problem.density()
        if density.tier != "graph":
            return None
    z = density.unconstrain({name: posterior.draws[name] for name in latent})
    return z, density.log_prob(z)


def params_of_guide(problem: Problem, guide: Callable[..., Any]) -> dict[str, Tensor]:
    """The parameters that a run of the guide uses, by their names in Pyro's param store."""
    around: Callable[[], AbstractContextManager[Any]] = nullcontext
    example = problem.example
    if example is None:
        args, kwargs = problem.args, problem.kwargs
    else:
        args, kwargs, around = example.args, example.kwargs, lambda: problem.rows(example.index, example.size)
    with (
        model_run(seed=0, dtype=problem.dtype, validate=False),
        torch.no_grad(),
        poutine.block(),
        poutine.trace(param_only=True) as tracer,
        around(),
    ):
        guide(*args, **kwargs)
    nodes: dict[str, Any] = tracer.trace.nodes
    found = {name: node["value"].detach() for name, node in nodes.items() if node["type"] == "param"}
    if not found and isinstance(guide, nn.Module):
        found = {name: value.detach() for name, value in guide.named_parameters()}
    return found
