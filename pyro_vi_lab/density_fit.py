"""Fit a guide over a family by natural gradients of the log density."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pyro_vi_lab.callbacks import Watch
from pyro_vi_lab.density import LogDensity
from pyro_vi_lab.density_batch import DensityBatch
from pyro_vi_lab.density_engine import Record, Result, Status, ascend
from pyro_vi_lab.density_stages import ascend_in_stages
from pyro_vi_lab.errors import ArgumentError, LabWarning
from pyro_vi_lab.families import Family, Params
from pyro_vi_lab.fit_guide import name_by_content, prepared
from pyro_vi_lab.fit_progress import fit_progress
from pyro_vi_lab.fitted import Fit, draw
from pyro_vi_lab.guides import FamilyGuide
from pyro_vi_lab.heavy_tails import MAX_RARE_SHARE, rare_shares, unbounded_coordinate
from pyro_vi_lab.isolation import threads
from pyro_vi_lab.natural_step import tolerance
from pyro_vi_lab.problem import Problem
from pyro_vi_lab.tiers import Compile

MAX_KL = 8.0
"""First radius of the trust region by default, in nats."""
RESTART_RADIUS = 2.0
"""Half-width of the uniform jitter of the restarts' locations, as Stan's initial values."""
PARALLEL_WORK = 2**22
"""Numbers per evaluation from which a second intra-op thread pays."""


def fit_density(
    problem: Problem,
    guide: Any,
    *,
    lr: float,
    max_kl: float,
    num_particles: int | None,
    num_restarts: int,
    seed: int,
    max_steps: int,
    watch: Watch,
    compile: Compile,
) -> Fit:
    """See :func:`pyro_vi_lab.fit`."""
    if num_particles is not None and num_particles < 4:
        raise ArgumentError(f"num_particles must be at least 4, got {num_particles!r}")
    began = time.perf_counter()
    density = problem.density()
    name, made = prepared(problem, guide, seed)
    generator = torch.Generator(device="cpu").manual_seed(seed)
    start = starts(made, num_restarts, generator, density)
    # a guide that has parameters says where to start, a class or a new guide starts anywhere
    in_stages = not (isinstance(guide, FamilyGuide) and guide.has_params)
    settings = _Settings(lr, max_kl, num_particles, max_steps, generator, compile, in_stages)
    result = _ascended(density, made.family, start, settings, watch)
    restarts = list(range(num_restarts))
    return _fit_of(problem, name, made, result, restarts, max_steps=max_steps, seed=seed, began=began)


def fit_each(
    problem: Problem,
    data: Mapping[str, Tensor],
    guide: str | type[FamilyGuide] | FamilyGuide = "full_rank",
    *,
    lr: float = 1.0,
    max_kl: float = MAX_KL,
    num_particles: int | None = None,
    seed: int = 0,
    max_steps: int = 500,
    progress: bool = True,
    compile: Compile = "auto",
) -> list[Fit]:
    """Fit a guide over a family to each of R data sets of the same shapes, all in one batch.

    Args:
        problem: The model, with data such as these.
        data: Argument name to a value for each data set; arguments that are not named stay as they are.
        guide: A name of ``GUIDES``, a guide class, or an instance, whose present location and scale are the start.
        lr: As for :func:`pyro_vi_lab.fit`, like all that follow.
        max_kl: First radius of the trust region.
        num_particles: Particles per step and data set at the start.
        seed: Seed of all randomness; the fits share none of it.
        max_steps: Most steps.
        progress: Show a progress line on a terminal when the work takes long.
        compile: Whether graphs are compiled.

    Shape:
        each value of ``data`` ``(R, *shape of the argument)``.

    Returns:
        A fit for each data set. Their ``seconds`` are those of the whole batch.

    Raises:
        ArgumentError: An unknown name of an argument, a shape that does not fit, or an option out of range.
        DataError: A value is not finite.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> def model(y):
        ...     mean = pyro.sample("mean", dist.Normal(0.0, 10.0))
        ...     with pyro.plate("row", len(y)):
        ...         pyro.sample("y", dist.Normal(mean, 1.0), obs=y)
        >>> many = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
        >>> fits = fit_each(Problem(model, many[0]), {"y": many}, progress=False)
        >>> [round(fit.loc.item(), 1) for fit in fits]
        [2.0, 5.0]
    """
    began = time.perf_counter()
    problems = problem.each(data)
    batch = DensityBatch([one.density() for one in problems])
    if not batch.together:
        warnings.warn(
            f"the data sets of model {problem.name} are fitted with a run of their own each, which is slower: its "
            f"density {problem.density().reason or 'holds its data as constants'}",
            LabWarning,
            stacklevel=2,
        )
    name, made = prepared(problem, guide, seed)
    generator = torch.Generator(device="cpu").manual_seed(seed)
    start = Params(*(value.expand(len(problems), *value.shape).clone() for value in made.params))
    # a guide that has parameters says where to start, a class or a new guide starts anywhere
    in_stages = not (isinstance(guide, FamilyGuide) and guide.has_params)
    settings = _Settings(lr, max_kl, num_particles, max_steps, generator, compile, in_stages)
    with fit_progress(progress, f"{len(problems)} {name} fits of {problem.name}") as line:
        result = _ascended(batch, made.family, start, settings, Watch(line))
    return [
        _fit_of(one, name, made.twin(), result, [r], max_steps=max_steps, seed=seed, began=began)
        for r, one in enumerate(problems)
    ]


class _Settings(NamedTuple):
    lr: float
    max_kl: float
    num_particles: int | None
    max_steps: int
    generator: torch.Generator
    compile: Compile
    in_stages: bool


def _ascended(
    density: LogDensity | DensityBatch, family: Family, start: Params, settings: _Settings, watch: Watch
) -> Result:
    with threads(num_threads(density)):
        options = settings._asdict()
        run = ascend_in_stages if options.pop("in_stages") else ascend
        return run(
            density,
            family,
            start,
            on_step=lambda step, record: watch(step, lambda: _row(record)),
            **options,
        )


def _row(record: Record) -> dict[str, float]:
    """The best of the restarts."""
    best = int(torch.nan_to_num(record.negative_elbo, nan=math.inf).argmin())
    names = ("negative_elbo", "gap", "step_size", "kl")
    values = {name: float(getattr(record, name)[best]) for name in names}
    return {**values, "num_particles": record.num_particles, "seconds": record.seconds}


def _fit_of(
    problem: Problem,
    name: str,
    guide: FamilyGuide,
    result: Result,
    rows: list[int],
    *,
    max_steps: int,
    seed: int,
    began: float,
) -> Fit:
    """The fit whose restarts are some of a batch; they are put in order, best first."""
    density, family = problem.density(), guide.family
    params = Params(*(value[rows] for value in result.params))
    judged = [result.status[i] for i in rows]
    if family.num_moments < math.inf:
        judged = [
            Status.DIVERGED if status is Status.CONVERGED and share > MAX_RARE_SHARE else status
            for status, share in zip(judged, rare_shares(density, family, params), strict=True)
        ]
    best = best_first(density, family, params, judged, seed)
    params, statuses = Params(*(value[best] for value in params)), tuple(judged[i] for i in best)
    order = [rows[i] for i in best]
    if statuses[0] is not Status.DIVERGED:
        guide.params = Params(*(value[0] for value in params))
    name_by_content(guide)
    return Fit(
        problem=problem,
        method=name,
        guide=guide,
        params=params,
        statuses=statuses,
        message=message(statuses, density, family, params, gap=float(result.gap[order[0]]), max_steps=max_steps),
        num_steps=len(result.records) - 1,
        num_gradients=result.num_gradients,
        seconds=time.perf_counter() - began,
        seed=seed,
        history=_history(result.records, order),
    )


def starts(guide: FamilyGuide, num_restarts: int, generator: torch.Generator, density: LogDensity) -> Params:
    """Where each restart starts: the first where the guide is, the others jittered."""
    params = Params(*(value.to(density.device, density.dtype).unsqueeze(0) for value in guide.params))
    loc = params.loc.repeat(num_restarts, 1)
    jitter = (torch.rand(loc[1:].shape, generator=generator, dtype=loc.dtype) * 2 - 1) * RESTART_RADIUS
    loc[1:] += jitter.to(loc.device)
    return Params(loc, params.scale.repeat(num_restarts, *(1 for _ in params.scale.shape[1:])))


def num_threads(density: LogDensity | DensityBatch) -> int:
    """Intra-op threads that pay for a density of this size."""
    present = torch.get_num_threads()
    return present if density.work * 64 >= PARALLEL_WORK else 1


def best_first(density: LogDensity, family: Family, params: Params, status: list[Status], seed: int) -> list[int]:
    """Restarts by status, then by ELBO from draws that all of them share."""
    if len(status) == 1:
        return [0]
    rank = [Status.CONVERGED, Status.OUT_OF_STEPS, Status.DIVERGED]
    _, log_p, log_q = draw(density, family, params, 1000, seed)
    elbo = torch.nan_to_num((log_p - log_q).mean(0), nan=-math.inf).tolist()
    return sorted(range(len(status)), key=lambda i: (rank.index(status[i]), -elbo[i]))


def message(
    statuses: tuple[Status, ...],
    density: LogDensity,
    family: Family,
    params: Params,
    *,
    gap: float,
    max_steps: int,
    converged: str = "",
) -> str:
    """What the status of the best restart means, and what to do.

    Args:
        statuses: How each restart ended, best first.
        density: What was fitted.
        family: The family.
        params: Its members, best first.
        gap: Nats that the best one may still gain; NaN if that is not known.
        max_steps: Most steps.
        converged: What to say of a fit that has converged; by default what the natural gradient says.
    """
    others = sum(status is not Status.CONVERGED for status in statuses)
    suffix = f"; {others} of {len(statuses)} restarts did not converge" if others and len(statuses) > 1 else ""
    loc, sd = params.loc[0], family.variance(Params(*(value[0] for value in params))).sqrt()
    if statuses[0] is Status.CONVERGED:
        said = converged or f"the natural gradient promises less than {tolerance(density.dim):.2g} nats more"
        return f"converged: {said}{_caveat(density, family, loc, sd)}{suffix}"
    size = sd.maximum(loc.abs())
    worst = int(size.argmax())
    farthest = (
        f"{density.labels[worst]} went to {float(loc[worst]):.3g} with standard deviation {float(sd[worst]):.3g} on "
        "the unconstrained scale"
    )
    if family.num_moments < math.inf:
        suffix = (
            "; the bound of a Student-t guide is minus infinity where the log density falls exponentially, as in the "
            f"logarithm of a scale: a guide with normal noise has a finite one{suffix}"
        )
    if statuses[0] is Status.OUT_OF_STEPS:
        left = "" if math.isnan(gap) else f" with about {gap:.2g} nats still to gain"
        return (
            f"stopped after max_steps={max_steps}{left}: raise max_steps, or start nearer with the guide's "
            f"init_loc_fn; {farthest}: if it goes on and on, give this site a proper prior{suffix}"
        )
    if not bool(torch.isfinite(density.log_prob(loc))):
        return (
            f"diverged: the log density of site {density.blame(loc)!r} is not finite at the guide's location; check "
            f"its data and prior{suffix}"
        )
    if family.num_moments < math.inf and rare_shares(density, family, params)[0] > MAX_RARE_SHARE:
        return f"diverged: draws of the guide that are rarer than one in a million decide on its bound{suffix}"
    if float(size[worst]) > 1e8:
        return f"diverged: {farthest}; the posterior seems to be improper: give this site a proper prior{suffix}"
    z, log_p, _ = draw(density, family, Params(*(value[:1] for value in params)), 1000, seed=0)
    outside = z[~torch.isfinite(log_p)]
    if len(outside):
        return (
            f"diverged: the log density of site {density.blame(outside[0])!r} is not finite at {len(outside)} of 1000 "
            "draws of the guide: give the sites that it depends on a support where it is (a positive scale, a "
            f"probability){suffix}"
        )
    return (
        "diverged: no step, however small, kept the bound finite; start nearer with the guide's init_loc_fn, or "
        f"reparameterize the sites with large gradients; {farthest}{suffix}"
    )


def _caveat(density: LogDensity, family: Family, loc: Tensor, sd: Tensor) -> str:
    """What to know of a bound that is minus infinity but for draws that nobody sees."""
    heavy = family.num_moments < math.inf
    worst = unbounded_coordinate(density, loc, sd, family.num_moments) if heavy else None
    if worst is None:
        return ""
    return (
        f"; but along {density.labels[worst]} the log density falls faster than the tails of this guide, so that its "
        "bound is minus infinity but for draws rarer than one in a million, which are left out here; a guide with "
        "normal noise has a finite one"
    )


def _history(records: list[Record], order: list[int]) -> dict[str, NDArray[Any]]:
    columns = {
        name: torch.stack([getattr(record, name) for record in records])[:, order].numpy(force=True)
        for name in ("negative_elbo", "gap", "step_size", "kl")
    }
    if len(order) == 1:
        columns = {name: values[:, 0] for name, values in columns.items()}
    columns["num_particles"] = np.array([record.num_particles for record in records])
    columns["seconds"] = np.array([record.seconds for record in records])
    return columns
