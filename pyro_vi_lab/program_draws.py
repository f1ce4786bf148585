"""Draws of any guide, with the log densities of model and guide at them."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import pyro
import torch
from pyro import poutine
from torch import Tensor

from pyro_vi_lab.captured import Captured
from pyro_vi_lab.errors import ArgumentError
from pyro_vi_lab.isolation import default_dtype, own_params, seeded
from pyro_vi_lab.many_runs import many_runs
from pyro_vi_lab.problem import Problem
from pyro_vi_lab.program_engine import calls_of, enumerated
from pyro_vi_lab.sites import Site

MAX_NUMBERS = 2**28
"""Numbers that draws may hold (2 GiB in float64)."""


class Draws(NamedTuple):
    """Draws of the latent and deterministic sites ``(S, *site shape)`` and log densities of model and guide ``(S,)``.

    ``stats`` is empty where the model has discrete sites, over which each draw would have to be summed, and where it
    does not see all rows at once. Then, without local sites, the guide is run on a batch, and deterministic sites by
    row are left out.
    """

    values: dict[str, Tensor]
    stats: dict[str, Tensor]


class _Wanted(NamedTuple):
    name: str
    shape: torch.Size


def program_draws(problem: Problem, guide: Callable[..., Any], num_draws: int, seed: int) -> Draws:
    """Run the guide, and the model on what it drew, once for every draw.

    Raises:
        ArgumentError: The draws of all rows' local sites would not fit into memory.
        ModelError: Guide or model cannot be run on all rows.
    """
    example = problem.example
    part = example is not None and not problem.has_local_sites
    sites = [
        site
        for site in problem.sites.values()
        if site.kind == "latent" or (site.kind == "deterministic" and not (part and _by_row(problem, site)))
    ]
    numbers = num_draws * sum(site.shape.numel() for site in sites)
    if numbers > MAX_NUMBERS:
        largest = max(sites, key=lambda site: site.shape.numel())
        raise ArgumentError(
            f"{num_draws} draws of all sites of {problem.name} are {numbers:,} numbers, most of them of site "
            f"{largest.name!r} {tuple(largest.shape)}: ask for at most {MAX_NUMBERS * num_draws // numbers} draws"
        )
    around: Callable[[], AbstractContextManager[Any]]
    if example is not None and part:
        args, kwargs, around = example.args, example.kwargs, lambda: problem.rows(example.index, example.size)
    else:
        args, kwargs, around = problem.all_rows()
    summed = any(site.kind == "discrete" for site in problem.sites.values())
    stats = {} if summed or part else {"log_p": "log density of the model", "log_q": "log density of the guide"}

    def both(*args: Any, **kwargs: Any) -> None:
        with poutine.block():
            drawn = poutine.trace(guide).get_trace(*args, **kwargs)
            joint = poutine.trace(poutine.replay(problem.model, trace=drawn)).get_trace(*args, **kwargs)
        for site in sites:
            pyro.deterministic(site.name, torch.as_tensor(joint.nodes[site.name]["value"]))
        if stats:
            pyro.deterministic(stats["log_p"], torch.as_tensor(joint.log_prob_sum()))
            pyro.deterministic(stats["log_q"], torch.as_tensor(drawn.log_prob_sum()))

    wanted = [_Wanted(site.name, site.shape) for site in sites]
    wanted += [_Wanted(name, torch.Size()) for name in stats.values()]
    values = many_runs(
        both,
        args,
        kwargs,
        given={},
        wanted=wanted,
        num_runs=num_draws,
        around=around,
        name=problem.name,
        dtype=problem.dtype,
        seed=seed,
    )
    return Draws(values, {key: values.pop(name) for key, name in stats.items()})


def _by_row(problem: Problem, site: Site) -> bool:
    return any(plate is not None and plate[0] in problem.row_plates for plate in site.plates)


def program_elbo(
    problem: Problem, guide: Callable[..., Any], objective: Captured, num_draws: int, seed: int
) -> tuple[float, float]:
    """ELBO and its standard error from independent draws of the guide, and of batches if there are any."""
    calls, program = calls_of(problem, enumerated(problem), guide, seed)
    with seeded(seed), default_dtype(problem.dtype), own_params(), torch.no_grad():
        losses = []
        for _ in range(math.ceil(num_draws / objective.num_particles)):
            args, kwargs = next(calls)
            losses.append(float(objective.loss(*program, *args, **kwargs)))
    bounds = -torch.tensor(losses, dtype=torch.float64)
    return float(bounds.mean()), float(bounds.std() / math.sqrt(len(bounds)))
