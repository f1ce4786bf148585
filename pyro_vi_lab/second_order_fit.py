"""Fit a normal family by other ways than the natural gradient: over fixed draws, or by matching scores."""

from __future__ import annotations

import math
import time
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pyro_vi_lab.batch_and_match import Round, batch_and_match
from pyro_vi_lab.callbacks import Watch
from pyro_vi_lab.density_engine import Status
from pyro_vi_lab.density_fit import message, num_threads, starts
from pyro_vi_lab.errors import ArgumentError
from pyro_vi_lab.families import Params
from pyro_vi_lab.fit_guide import name_by_content, prepared
from pyro_vi_lab.fitted import Fit, FixedOptimum
from pyro_vi_lab.fixed_draws import FixedDrawELBO, fixed_draws, takes_fixed_draws
from pyro_vi_lab.guides import FamilyGuide
from pyro_vi_lab.isolation import threads
from pyro_vi_lab.problem import Problem
from pyro_vi_lab.trust_region import Ascent, End, Mark, maximize

SMALL = 100
"""Parameters up to which the Monte Carlo error is computed with the fit."""
_STATUS = {End.MAXIMUM: Status.CONVERGED, End.OUT_OF_STEPS: Status.OUT_OF_STEPS}
_RANK = [Status.CONVERGED, Status.OUT_OF_STEPS, Status.DIVERGED]


def fit_fixed_draws(
    problem: Problem,
    guide: Any,
    *,
    num_particles: int | None,
    num_restarts: int,
    seed: int,
    max_steps: int,
    watch: Watch,
) -> Fit:
    """Maximize the ELBO over fixed draws by Newton steps; see :mod:`pyro_vi_lab.fixed_draws`.

    Raises:
        ArgumentError: A family other than the mean-field and full-rank normals, or too few draws for it.
    """
    began = time.perf_counter()
    name, made = prepared(problem, guide, seed)
    density, family = problem.density(), made.family
    if not takes_fixed_draws(family):
        raise _not_for("fixed_draws", name, "mean_field", "full_rank")
    generator = torch.Generator().manual_seed(seed)
    start = starts(made, num_restarts, generator, density)
    eps = fixed_draws(family, density.dim, num_particles, generator).to(density.device, density.dtype)
    number = len(eps)
    if family.is_dense and number <= 4 * density.dim:
        raise ArgumentError(
            f"num_particles={num_particles}: over {number} antithetic draws the bound of a full-rank normal in "
            f"{density.dim} dimensions is too loose, and has no maximum if there are fewer than that many pairs: take "
            f"more than {4 * density.dim}, or the guide 'mean_field'"
        )
    target, ascents = FixedDrawELBO(density, family, eps), []
    with threads(num_threads(density)):
        for restart in range(num_restarts):
            ascents.append(
                maximize(
                    target,
                    Params(start.loc[restart], start.scale[restart]),
                    max_steps=max_steps,
                    on_step=partial(_tell, watch, restart, number),
                )
            )
    judged = [_STATUS.get(one.end, Status.DIVERGED) for one in ascents]
    order = _best_first(judged, [one.local.value for one in ascents])
    ascents, statuses = [ascents[i] for i in order], tuple(judged[i] for i in order)
    params = Params(*(torch.stack(parts) for parts in zip(*(one.point for one in ascents), strict=True)))
    optimum = FixedOptimum(target, ascents[0].point) if statuses[0] is Status.CONVERGED else None
    said = f"Newton's steps have reached the optimum over {number} fixed draws"
    if optimum is not None and target.num_parameters <= SMALL:
        worst = float((optimum.sensitivity.loc_error / family.variance(ascents[0].point).sqrt()).max())
        said += f", which moves the means by about {worst:.1g} standard deviations at most"
    return _fit(
        problem,
        name,
        made,
        params,
        message=message(
            statuses, density, family, params, gap=ascents[0].marks[-1].gain, max_steps=max_steps, converged=said
        ),
        statuses=statuses,
        num_steps=max(len(one.marks) - 1 for one in ascents),
        num_gradients=target.num_gradients,
        seconds=time.perf_counter() - began,
        seed=seed,
        history=_history(ascents, number),
        fixed=optimum,
    )


def fit_batch_and_match(
    problem: Problem,
    guide: Any,
    *,
    num_particles: int | None,
    num_restarts: int,
    seed: int,
    max_steps: int,
    watch: Watch,
) -> Fit:
    """Match the scores of a full-rank normal; see :mod:`pyro_vi_lab.batch_and_match`.

    Raises:
        ArgumentError: Another family.
    """
    began = time.perf_counter()
    name, made = prepared(problem, guide, seed)
    density, family = problem.density(), made.family
    if not (takes_fixed_draws(family) and family.is_dense):
        raise _not_for("batch_and_match", name, "full_rank")
    generator = torch.Generator().manual_seed(seed)
    start = starts(made, num_restarts, generator, density)
    with threads(num_threads(density)):
        matches = [
            batch_and_match(
                density,
                family,
                Params(start.loc[restart], start.scale[restart]),
                num_particles=num_particles,
                max_steps=max_steps,
                generator=generator,
                on_step=partial(_tell_round, watch, restart),
            )
            for restart in range(num_restarts)
        ]
    judged = [one.status for one in matches]
    order = _best_first(judged, [-one.rounds[-1].score_divergence for one in matches])
    matches, statuses = [matches[i] for i in order], tuple(judged[i] for i in order)
    params = Params(*(torch.stack(parts) for parts in zip(*(one.params for one in matches), strict=True)))
    last = matches[0].rounds[-1].score_divergence
    said = (
        "the normal whose scores match best no longer moves but for noise; that is the optimum of the ELBO "
        f"where the posterior is normal, and another where it is not (here the scores differ by {last:.2g} per draw, "
        f"out of {density.dim})"
    )
    names = ("negative_elbo", "score_divergence", "kl", "step_size", "seconds")
    return _fit(
        problem,
        name,
        made,
        params,
        message=message(statuses, density, family, params, gap=math.nan, max_steps=max_steps, converged=said),
        statuses=statuses,
        num_steps=max(len(one.rounds) - 1 for one in matches),
        num_gradients=sum(one.num_gradients for one in matches),
        seconds=time.perf_counter() - began,
        seed=seed,
        history=_columns({key: [[getattr(row, key) for row in one.rounds] for one in matches] for key in names}),
    )


def _tell(watch: Watch, restart: int, number: int, step: int, mark: Mark) -> bool:
    def row() -> dict[str, float]:
        known = {"negative_elbo": -mark.value, "gap": mark.gain, "radius": mark.radius, "seconds": mark.seconds}
        return {**known, "num_particles": number, "restart": restart}

    return watch(step, row)


def _tell_round(watch: Watch, restart: int, step: int, one: Round) -> bool:
    return watch(step, lambda: {**one._asdict(), "restart": restart})


def _fit(problem: Problem, name: str, guide: FamilyGuide, params: Params, **fields: Any) -> Fit:
    if fields["statuses"][0] is not Status.DIVERGED:
        guide.params = Params(*(value[0] for value in params))
    name_by_content(guide)
    return Fit(problem=problem, method=name, guide=guide, params=params, **fields)


def _not_for(optim: str, name: str, *known: str) -> ArgumentError:
    names = " and ".join(repr(one) for one in known)
    return ArgumentError(f"optim={optim!r} is for the guide{'s' * (len(known) > 1)} {names}, not for {name!r}")


def _best_first(judged: list[Status], goodness: list[float]) -> list[int]:
    known = [value if math.isfinite(value) else -math.inf for value in goodness]
    return sorted(range(len(judged)), key=lambda i: (_RANK.index(judged[i]), -known[i]))


def _history(ascents: list[Ascent], number: int) -> dict[str, NDArray[Any]]:
    columns = _columns(
        {
            key: [[sign * getattr(mark, name) for mark in one.marks] for one in ascents]
            for key, name, sign in (
                ("negative_elbo", "value", -1),
                ("gap", "gain", 1),
                ("radius", "radius", 1),
                ("seconds", "seconds", 1),
            )
        }
    )
    columns["num_particles"] = np.full(len(columns["seconds"]), number)
    return columns


def _columns(values: dict[str, list[list[float]]]) -> dict[str, NDArray[Any]]:
    """One row per step, and one column per restart where there are several; one that has ended stays as it is."""
    rows = max(len(one) for one in values["seconds"])
    filled = {
        key: np.array([one + one[-1:] * (rows - len(one)) for one in restarts]).T for key, restarts in values.items()
    }
    seconds = filled["seconds"].sum(1)  # one restart after the other
    single = len(values["seconds"]) == 1
    return {**{key: value[:, 0] if single else value for key, value in filled.items()}, "seconds": seconds}
