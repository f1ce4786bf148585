"""Fit a mixture of normals by coordinate ascent, one pass over the rows for each sweep."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pyro_vi_lab.callbacks import Watch
from pyro_vi_lab.conjugate_fit import SWEEPS
from pyro_vi_lab.density_engine import Status
from pyro_vi_lab.fitted import Fit
from pyro_vi_lab.guides import Conjugate
from pyro_vi_lab.isolation import model_run
from pyro_vi_lab.mixture_bayes import Factors, MixtureUpdates
from pyro_vi_lab.mixture_fit import MixtureRows, mixture_of, rows_of, starts
from pyro_vi_lab.problem import Problem
from pyro_vi_lab.program_fit import forget, instance_of, objective_of

TOLERANCE = 1e-10
"""What all later sweeps may still gain, in nats, below which it has converged."""
ROUNDING = 16 * torch.finfo(torch.float64).eps
"""Relative change of the bound below which rounding is all that is left."""
SAME = 1e-3
"""Nats between restarts that have found the same optimum."""


class MixtureAscent(NamedTuple):
    """What a coordinate ascent did.

    Args:
        factors: Where it ended, of rows with their mean at the origin.
        elbo: The bound at the start and after each sweep, with the best responsibilities for the factors.
        seconds: Since the start, at each.
        converged: Whether the last sweep changed nothing.
    """

    factors: Factors
    elbo: list[float]
    seconds: list[float]
    converged: bool


def mixture_ascent(
    rows: MixtureRows,
    updates: MixtureUpdates,
    factors: Factors,
    *,
    max_sweeps: int,
    lr: float = 1.0,
    tolerance: float = TOLERANCE,
    began: float | None = None,
    on_sweep: Callable[[int, float, float], bool | None] = lambda sweep, elbo, seconds: None,
) -> MixtureAscent:
    """Sweep over rows and factors until nothing changes.

    Args:
        rows: The rows.
        updates: The updates, with the prior of rows with their mean at the origin.
        factors: Where to start.
        max_sweeps: Most sweeps.
        lr: Step size; 1 is coordinate ascent, whose bound never falls.
        tolerance: Nats that all later sweeps may still gain when it ends.
        began: When the clock started; now if ``None``.
        on_sweep: Called with the number of each sweep (0: the start), the bound and the seconds; the ascent ends where
            it returns ``True``.
    """
    began = time.perf_counter() if began is None else began
    elbo: list[float] = []
    seconds: list[float] = []
    while True:
        normals, divergence = updates.expected(factors)
        found = rows.moments(normals)
        elbo.append(float(found.log_likelihood - divergence))
        seconds.append(time.perf_counter() - began)
        sweeps, converged = len(elbo) - 1, _remaining(elbo) <= tolerance
        if on_sweep(sweeps, elbo[-1], seconds[-1]) or converged or sweeps == max_sweeps:
            return MixtureAscent(factors, elbo, seconds, converged)
        factors = updates.updated(found, factors, lr=lr)


def _remaining(elbo: list[float]) -> float:
    """What later sweeps may still gain, if each gains the same part of the one before; zero where rounding is left."""
    if len(elbo) < 3:
        return math.inf
    before, last = elbo[-2] - elbo[-3], elbo[-1] - elbo[-2]
    if abs(last) <= ROUNDING * abs(elbo[-1]):
        return 0.0
    return last * last / (before - last) if 0 <= last < before else math.inf


def fit_mixture(
    problem: Problem,
    guide: Any,
    *,
    num_restarts: int,
    seed: int,
    max_steps: int | None,
    lr: float | None,
    watch: Watch,
) -> Fit:
    """A fit of the guide ``"conjugate"`` of a :class:`GaussianMixture`; see :func:`pyro_vi_lab.fit`.

    Starts at hard assignments of the rows to centers from k-means, where a guide at the prior would stay with all
    components alike. Values that are missing are factors too, q(x missing | z), and the bound of
    the history counts them. The guide has all sites but the assignments, of which ``GaussianMixture.responsibilities``
    tells; so its :meth:`Fit.elbo`, with these summed out, is above that of the history.
    """
    began, model = time.perf_counter(), mixture_of(problem, "fit_mixture")
    max_steps, lr = max_steps or SWEEPS, lr or 1.0
    rows = rows_of(problem)
    updates = MixtureUpdates(model.prior.like(rows.X).centered(rows.center))
    ascents = [
        mixture_ascent(
            rows,
            updates,
            updates.started(found),
            max_sweeps=max_steps,
            lr=lr,
            began=began,
            on_sweep=partial(_tell, watch, restart, lr),
        )
        for restart, found in enumerate(starts(rows, model, init="kmeans", num_restarts=num_restarts, seed=seed))
    ]
    ascents.sort(key=lambda one: -one.elbo[-1])
    best = ascents[0]
    made = guide_at(problem, guide, best.factors, rows.center, problem.inputs, seed=seed)
    statuses = tuple(Status.CONVERGED if one.converged else Status.OUT_OF_STEPS for one in ascents)
    history = _history(ascents)
    return Fit(
        problem=problem,
        method="conjugate",
        guide=made,
        params=None,
        statuses=statuses,
        message=_message(ascents, max_steps),
        num_steps=max(len(one.elbo) for one in ascents) - 1,
        num_gradients=0,
        seconds=time.perf_counter() - began,
        seed=seed,
        history={**history, "step_size": np.full(len(history["seconds"]), lr)},
        objective=objective_of(problem, made, None, None, "auto"),
    )


def _tell(watch: Watch, restart: int, lr: float, sweep: int, elbo: float, seconds: float) -> bool:
    row = {"negative_elbo": -elbo, "step_size": lr, "seconds": seconds, "restart": restart}
    return watch(sweep, lambda: row)


def guide_at(
    problem: Problem, guide: Any, factors: Factors, center: Tensor, inputs: Mapping[str, Any], *, seed: int
) -> Conjugate:
    """A guide, given by name or class, with these factors; ``inputs`` are rows for its first run."""
    made = instance_of(problem, guide)
    assert isinstance(made, Conjugate)
    with model_run(seed=seed, dtype=problem.dtype, validate=False):
        made._setup_prototype(**inputs)
    put(made, factors, center)
    forget(made)
    return made


def put(guide: Conjugate, factors: Factors, center: Tensor) -> None:
    """Set the factors of a guide, with the means where the data are."""
    for name, standard in factors.items():
        moved = {**standard, "loc": standard["loc"] + center} if name == "loc" else standard
        guide.set_natural(name, guide.factor(name).family.from_standard(moved))


def _message(ascents: list[MixtureAscent], max_steps: int) -> str:
    best = ascents[0]
    text = (
        "converged: a sweep of exact updates changes nothing more"
        if best.converged
        else f"stopped after max_steps={max_steps} sweeps; the bound still rises: raise max_steps"
    )
    lower = [best.elbo[-1] - one.elbo[-1] for one in ascents[1:] if best.elbo[-1] - one.elbo[-1] > SAME]
    failed = sum(not one.converged for one in ascents[1:])
    text += f"; {failed} of {len(ascents)} restarts did not converge" if failed else ""
    return text + (f"; {len(lower)} found a lower optimum, by {min(lower):.2g} nats or more" if lower else "")


def _history(ascents: list[MixtureAscent]) -> dict[str, Any]:
    number = max(len(one.elbo) for one in ascents)
    elbo = np.array([one.elbo + one.elbo[-1:] * (number - len(one.elbo)) for one in ascents]).T
    seconds = np.array([one.seconds + one.seconds[-1:] * (number - len(one.seconds)) for one in ascents]).max(0)
    return {"negative_elbo": -(elbo[:, 0] if len(ascents) == 1 else elbo), "seconds": seconds}
