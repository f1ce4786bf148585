"""Draws of any guide, with the log densities of model and guide at them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import pyro
import torch
from pyro import poutine
from torch import Tensor

from pyro_vi_lab.batches import Batch
from pyro_vi_lab.captured import Captured
from pyro_vi_lab.errors import ArgumentError, ModelError
from pyro_vi_lab.isolation import default_dtype, own_params, seeded
from pyro_vi_lab.many_runs import many_runs
from pyro_vi_lab.problem import Problem
from pyro_vi_lab.program_engine import calls_of, enumerated
from pyro_vi_lab.program_traces import Reading, read_guide, sample_sites, traces_of
from pyro_vi_lab.sites import Site

MAX_NUMBERS = 2**28
"""Numbers that draws may hold (2 GiB in float64)."""


class Draws(NamedTuple):
    """Draws of the latent and deterministic sites ``(S, *site shape)`` and log densities of model and guide ``(S,)``.

    ``stats`` is empty where there are no weights: the guide has a site that is a point, or none were asked for. Where
    the model does not see all rows at once and has no local sites, the guide is run on a batch, and deterministic sites
    by row are left out.
    """

    values: dict[str, Tensor]
    stats: dict[str, Tensor]


class Wanted(NamedTuple):
    """A number or an array that runs give."""

    name: str
    shape: torch.Size


LOG_P, LOG_Q = "log density of the model", "log density of the guide"


def program_draws(
    problem: Problem, guide: Callable[..., Any], num_draws: int, seed: int, *, weigh: bool | None = None
) -> Draws:
    """Run the guide, and the model on what it drew, once for every draw.

    Discrete sites that the guide does not draw are summed out of the model's density.

    Args:
        problem: Model and data.
        guide: The guide.
        num_draws: S.
        seed: Seed of the draws.
        weigh: Whether to give the log densities; by default where this costs no runs of its own, which it does where
            the model does not see all of its rows at once, or discrete sites are summed out.

    Raises:
        ArgumentError: The draws of all rows' local sites would not fit into memory; log densities were asked for, and a
            site of the guide is a point or has no density.
        ModelError: Guide or model cannot be run on all rows.
    """
    example = problem.example
    part = example is not None and not problem.has_local_sites
    sites = [
        site
        for site in problem.sites.values()
        if site.kind == "latent" or (site.kind == "deterministic" and not (part and _by_row(problem, site)))
    ]
    _check_memory(problem, sites, num_draws)
    around: Callable[[], AbstractContextManager[Any]]
    if example is not None and part:
        args, kwargs, around = example.args, example.kwargs, lambda: problem.rows(example.index, example.size)
    else:
        args, kwargs, around = problem.all_rows()
    reading = read_guide(problem, guide, args, kwargs, around, seed=seed)
    if weigh:
        reading.refuse(problem, guide)
    apart = part or bool(reading.missing)
    weigh = reading.has_weights and (not apart if weigh is None else weigh)
    named = [name for name, wanted in ((LOG_P, weigh and not apart), (LOG_Q, weigh)) if wanted]

    def both(*args: Any, **kwargs: Any) -> None:
        with poutine.block():
            joint, drawn = traces_of(problem.model, guide, args, kwargs)
        for site in sites:
            pyro.deterministic(site.name, torch.as_tensor(joint.nodes[site.name]["value"]))
        for name, trace in ((LOG_P, joint), (LOG_Q, drawn)):
            if name in named:
                pyro.deterministic(name, torch.as_tensor(trace.log_prob_sum()))

    values = many_runs(
        both,
        args,
        kwargs,
        given={},
        wanted=[*(Wanted(site.name, site.shape) for site in sites), *(Wanted(name, torch.Size()) for name in named)],
        num_runs=num_draws,
        around=around,
        numbers=_numbers(reading),
        name=problem.name,
        dtype=problem.dtype,
        seed=seed,
    )
    found = {name: values.pop(name) for name in named}
    if not weigh:
        return Draws(values, {})
    log_p = found[LOG_P] if not apart else log_joint(problem, values, summed=reading.missing)
    return Draws(values, {"log_p": log_p, "log_q": found[LOG_Q]})


def _check_memory(problem: Problem, sites: list[Site], num_draws: int) -> None:
    numbers = num_draws * sum(site.shape.numel() for site in sites)
    if numbers > MAX_NUMBERS:
        largest = max(sites, key=lambda site: site.shape.numel())
        raise ArgumentError(
            f"{num_draws} draws of all sites of {problem.name} are {numbers:,} numbers, most of them of site "
            f"{largest.name!r} {tuple(largest.shape)}: ask for at most {MAX_NUMBERS * num_draws // numbers} draws"
        )


def _numbers(reading: Reading) -> int:
    """Numbers that the sites of one run hold."""
    sites = [site for trace in reading.traces for site in sample_sites(trace).values()]
    return sum(torch.as_tensor(site["value"]).numel() for site in sites)


def _by_row(problem: Problem, site: Site) -> bool:
    return any(plate is not None and plate[0] in problem.row_plates for plate in site.plates)


# --- the model's density at given draws ------------------------------------------------------------------------------


def log_joint(problem: Problem, values: Mapping[str, Tensor], *, summed: tuple[str, ...] = ()) -> Tensor:
    """Log joint density of the model on all rows at draws of its continuous latent sites, on their own scale.

    Discrete latent sites are summed out. Data that are not held as a whole, and models whose plates take a part of
    their rows, are gone through batch by batch.

    Args:
        problem: Model and data.
        values: Draws of every continuous latent site.
        summed: The discrete sites.

    Shape:
        values ``(S, *site shape)``, result ``(S,)``.

    Raises:
        ModelError: The rows cannot be gone through one by one, or have discrete sites that would have to be.
    """
    try:
        density = problem.density()
    except ModelError as error:
        if not problem.subsamples or summed:
            raise
        if problem.has_local_sites:
            raise ModelError(f"importance weights need all rows: {error}") from error
        return _log_joint_by_pieces(problem, values)
    return density.of_part("constrained").log_prob(density.unconstrain(values))


def _log_joint_by_pieces(problem: Problem, values: Mapping[str, Tensor]) -> Tensor:
    latent = {name: values[name] for name, site in problem.sites.items() if site.kind == "latent"}
    num_draws = len(next(iter(latent.values())))
    total: Tensor | None = None
    for batch, kept in problem.pieces():
        found = _log_joint_of_piece(problem, latent, batch, kept, num_draws)
        total = found["rest"] + found["rows"] if total is None else total + found["rows"]
    assert total is not None
    return total


def _log_joint_of_piece(
    problem: Problem, latent: Mapping[str, Tensor], batch: Batch, kept: int, num_draws: int
) -> dict[str, Tensor]:
    """Log densities of the batch's rows, unscaled, and of all else."""
    assert problem.num_rows is not None
    share = batch.size / problem.num_rows

    def joint(*args: Any, **kwargs: Any) -> None:
        with poutine.trace() as tracer:
            problem.model(*args, **kwargs)
        tracer.trace.compute_log_prob()
        rows: Any = torch.zeros(())
        rest: Any = torch.zeros(())
        for site in sample_sites(tracer.trace).values():
            frame = next((one for one in site["cond_indep_stack"] if one.name in problem.row_plates), None)
            if frame is None:
                rest = rest + site["log_prob_sum"]
            elif not frame.vectorized:
                rows = rows + (site["log_prob_sum"] * share if frame.counter < kept else 0.0)
            else:
                by_row = site["log_prob"].narrow(frame.dim, 0, kept)
                rows = rows + by_row.sum() * share
        pyro.deterministic("rows", rows)
        pyro.deterministic("rest", rest)

    return many_runs(
        joint,
        batch.args,
        batch.kwargs,
        given=latent,
        wanted=[Wanted("rows", torch.Size()), Wanted("rest", torch.Size())],
        num_runs=num_draws,
        around=lambda: problem.rows(batch.index, batch.size),
        numbers=sum(site.shape.numel() for site in problem.sites.values()),
        name=problem.name,
        dtype=problem.dtype,
        seed=0,
    )


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
