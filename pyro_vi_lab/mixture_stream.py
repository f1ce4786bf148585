r"""Fit a mixture of normals to rows that are read batch by batch: stochastic natural gradients.

Each batch, scaled to all rows, says where the factors should go; they go a part of the way,

.. math:: \eta \leftarrow (1 - \rho_t) \eta + \rho_t \hat\eta_t, \qquad \rho_t = (t + \tau)^{-\kappa},

which is a step along the natural gradient of the bound. Memory holds a batch and the factors, however many rows there
are.

References:
    Hoffman, Blei, Wang & Paisley 2013, "Stochastic variational inference", JMLR 14, Section 2.4 and Figure 4.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pyro_vi_lab.callbacks import Watch
from pyro_vi_lab.conjugate_mixture import guide_at, mixture_ascent
from pyro_vi_lab.density_engine import Status
from pyro_vi_lab.errors import ArgumentError
from pyro_vi_lab.fitted import Fit
from pyro_vi_lab.mixture_bayes import Factors, MixtureUpdates
from pyro_vi_lab.mixture_fit import MixtureRows, mixture_of, starts
from pyro_vi_lab.problem import Problem
from pyro_vi_lab.program_fit import objective_of

BLOCKS = 64
"""Pieces of neighboring rows in a batch: rows on disk are often in an order that means something."""
START_ROWS = 20_000
"""Rows on which the start is found."""
START_SWEEPS = 100
NUM_PASSES = 5
"""Most passes over the rows by default."""


class StreamStart(NamedTuple):
    """Where a fit batch by batch begins.

    Args:
        factors: Those of a fit to some of the rows.
        updates: With the prior, moved with the rows.
        rows: These rows, with their mean at the origin.
        orders: Batches of rows to come, pass by pass.
    """

    factors: Factors
    updates: MixtureUpdates
    rows: MixtureRows
    orders: Iterator[list[tuple[int, int]]]


def stream_start(problem: Problem, *, seed: int = 0) -> StreamStart:
    """A fit to some of the rows, as :func:`fit_stream` begins with it.

    Raises:
        ArgumentError: A problem of another model or without batches.
    """
    model = mixture_of(problem, "fit_stream")
    size, number = problem.minibatch, problem.num_rows
    if size is None or number is None:
        raise ArgumentError(f"problem {problem.name} sees all of its rows at once: make it with minibatch=...")
    generator = torch.Generator().manual_seed(seed)
    pieces = next(_orders(number, min(number, max(START_ROWS, size)), generator))
    first = _batch(_by_name(problem), pieces, None)
    updates = MixtureUpdates(model.prior.like(first.X).centered(first.center))
    found = starts(first, model, init="kmeans", num_restarts=1, seed=seed)[0]
    factors = mixture_ascent(first, updates, updates.started(found), max_sweeps=START_SWEEPS).factors
    return StreamStart(factors, updates, first, _orders(number, size, generator))


def fit_stream(
    problem: Problem,
    guide: Any = "conjugate",
    *,
    num_restarts: int = 1,
    seed: int = 0,
    max_steps: int | None = None,
    lr: float | None = None,
    forgetting: float = 0.75,
    delay: float = 1.0,
    watch: Watch | None = None,
) -> Fit:
    """Fit the guide ``"conjugate"`` of a :class:`~pyro_vi_lab.models.GaussianMixture` with ``minibatch=``.

    Starts from a fit to some of the rows. After each pass over all rows the mean bound of the last quarter of the
    batches is compared with that of the quarter before: ``CONVERGED`` means that they differ by no more than their
    noise.

    Args:
        problem: The problem; its rows may be memory-mapped.
        guide: ``"conjugate"``, or its class.
        num_restarts: One.
        seed: Seed of the start and of the order of the rows.
        max_steps: Most batches; by default five passes over the rows.
        lr: None: the step sizes follow from the next two.
        forgetting: κ, in (½, 1]: how quickly the steps become small.
        delay: τ, at least 1: how small the first ones are.
        watch: Who is told of every batch.

    Raises:
        ArgumentError: A problem of another model or without batches, or a number out of range.
    """
    if num_restarts != 1:
        raise ArgumentError(f"num_restarts={num_restarts}: a fit on batches of rows has one start")
    if lr is not None:
        raise ArgumentError(f"lr={lr}: a fit of a mixture on batches of rows has step sizes of its own: leave it out")
    if not 0.5 < forgetting <= 1:
        raise ArgumentError(f"forgetting is κ in (1/2, 1], got {forgetting!r}")
    if not 1 <= delay < math.inf:
        raise ArgumentError(f"delay is τ, from 1 up, got {delay!r}")
    began, data = time.perf_counter(), _by_name(problem)
    factors, updates, first, orders = stream_start(problem, seed=seed)
    size, number = problem.minibatch, problem.num_rows
    assert size is not None
    assert number is not None
    elbo: list[float] = []
    rates: list[float] = []
    seconds: list[float] = []
    most = NUM_PASSES * math.ceil(number / size) if max_steps is None else max_steps
    status, pass_began = Status.OUT_OF_STEPS, 0
    total = float(data["sample_weight"].sum()) if "sample_weight" in data else float(number)
    while len(elbo) < most:
        rows = next(orders)
        batch = _batch(data, rows, first.center)
        rate = (len(elbo) + delay) ** -forgetting
        normals, divergence = updates.expected(factors)
        found = batch.moments(normals)
        scale = total / batch.total
        elbo.append(float(scale * found.log_likelihood - divergence))
        factors = updates.updated(found._replace(counts=scale * found.counts), factors, lr=rate)
        rates.append(rate)
        seconds.append(time.perf_counter() - began)
        row = {"negative_elbo": -elbo[-1], "step_size": rate, "seconds": seconds[-1]}
        if watch is not None and watch(len(elbo), lambda row=row: row):  # type: ignore[misc]
            break
        if len(elbo) - pass_began >= math.ceil(number / size):
            if _stands_still(elbo[pass_began:]):
                status = Status.CONVERGED
                break
            pass_began = len(elbo)
    made = guide_at(problem, guide, factors, first.center, {"X": first.X[:2]}, seed=seed)
    still = "the bound no longer moves by more than its noise from batch to batch"
    return Fit(
        problem=problem,
        method="conjugate",
        guide=made,
        params=None,
        statuses=(status,),
        message=f"converged: {still}"
        if status is Status.CONVERGED
        else f"stopped after {len(elbo)} batches while the bound still moved by more than its noise: raise max_steps",
        num_steps=len(elbo),
        num_gradients=0,
        seconds=time.perf_counter() - began,
        seed=seed,
        history={"negative_elbo": -np.array(elbo), "step_size": np.array(rates), "seconds": np.array(seconds)},
        objective=objective_of(problem, made, None, None, "auto"),
    )


def _by_name(problem: Problem) -> dict[str, Any]:
    """The arguments by row, as they are held: tensors or memory-mapped arrays."""
    return {key: value for key, value in problem.kwargs.items() if value is not None}


def _orders(number: int, size: int, generator: torch.Generator) -> Iterator[list[tuple[int, int]]]:
    """Batches as lists of pieces (first row, end), without end; each pass visits every row once."""
    piece = max(1, math.ceil(size / BLOCKS))
    pieces, each = math.ceil(number / piece), math.ceil(size / piece)
    while True:
        order = torch.randperm(pieces, generator=generator).tolist()
        for start in range(0, pieces, each):
            chosen = sorted(order[start : start + each])  # in the order of the disk
            yield [(i * piece, min(number, (i + 1) * piece)) for i in chosen]


def _batch(data: dict[str, Any], pieces: list[tuple[int, int]], center: Tensor | None) -> MixtureRows:
    X, observed, weight = (_rows(data.get(name), pieces) for name in ("X", "observed", "sample_weight"))
    assert X is not None
    if center is None:
        part = torch.ones_like(X) if observed is None else observed.to(X)
        part = part if weight is None else part * weight[:, None]
        center = (part * X).sum(0) / part.sum(0).clamp_min(torch.finfo(X.dtype).tiny)
    X = X - center
    return MixtureRows(X if observed is None else torch.where(observed, X, 0.0), observed, weight, center)


def _rows(values: Any, pieces: list[tuple[int, int]]) -> Tensor | None:
    if values is None:
        return None
    if isinstance(values, Tensor):
        return torch.cat([values[start:end] for start, end in pieces])
    return torch.from_numpy(np.concatenate([values[start:end] for start, end in pieces]))


def _stands_still(elbo: list[float]) -> bool:
    """Whether the means of the last two quarters differ by less than two standard errors."""
    quarter = len(elbo) // 4
    if quarter < 2:
        return False
    late, before = np.array(elbo[-quarter:]), np.array(elbo[-2 * quarter : -quarter])
    error = math.sqrt((late.var(ddof=1) + before.var(ddof=1)) / quarter)
    return bool(late.mean() - before.mean() <= 2 * error)
