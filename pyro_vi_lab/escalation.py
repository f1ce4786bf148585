"""Climb from the simplest guide to NUTS until a posterior may be believed."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from pyro_vi_lab.density_engine import Status
from pyro_vi_lab.families import MAX_DENSE
from pyro_vi_lab.fitted import Fit, Stage
from pyro_vi_lab.hierarchy import noncentered
from pyro_vi_lab.nuts import nuts
from pyro_vi_lab.posterior import Posterior
from pyro_vi_lab.problem import Problem
from pyro_vi_lab.trust import trust
from pyro_vi_lab.verdict import Verdict

TIME_BUDGET = 120.0
"""Seconds after which no new stage begins."""
FLOW_SECONDS = 120.0
"""What a flow takes, about."""
RICH_DIM = 32
"""Largest D at which heavy tails and flows are tried before NUTS: beyond, chains take fewer seconds than they do."""
HARDER: tuple[dict[str, Any], ...] = ({}, {"target_accept": 0.99, "num_warmup": 2000, "num_draws": 2000})
"""Settings of NUTS, one after the other until a run passes its own checks."""
SLOW = ("flow", "full_rank_student_t")
RANK = {"trust": 0, "reweight": 1, "refine": 2, "sample": 3}

FitOne = Callable[..., Fit]


@dataclass
class _Climb:
    """What has been tried."""

    problem: Problem
    fit_one: FitOne
    seed: int
    progress: bool
    deadline: float
    path: list[Stage]
    best: tuple[Fit, Verdict] | None = None
    gradients: int = 0

    def stage(self, guide: str) -> Verdict:
        """Fit one guide and judge it."""
        began = time.perf_counter()
        found = self.fit_one(self.problem, guide, seed=self.seed, progress=self.progress)
        verdict = trust(found, seed=self.seed)
        self.gradients += found.num_gradients + verdict.num_gradients
        self.path.append(
            Stage(guide, verdict.decision, tuple(verdict.reasons), time.perf_counter() - began, self._changes)
        )
        if self.best is None or RANK[verdict.decision] < RANK[self.best[1].decision]:
            self.best = found, verdict
        return verdict

    _changes: tuple[str, ...] = ()

    def non_center(self, sites: list[str]) -> None:
        """Go on with the same model, written in another way; what was fitted before is another problem's."""
        self.problem = noncentered(self.problem, sites)
        self._changes = (*self._changes, *(f"non-center {site}" for site in sites))

    @property
    def late(self) -> bool:
        return time.perf_counter() > self.deadline


def climb(problem: Problem, fit_one: FitOne, *, time_budget: float, seed: int, progress: bool) -> Fit:
    """See :func:`pyro_vi_lab.fit` with the guide ``"auto"``."""
    began = time.perf_counter()
    state = _Climb(problem, fit_one, seed, progress, began + time_budget, [])
    verdict = _by_guides(state)
    if verdict.decision == "trust" or state.late:
        assert state.best is not None
        found, verdict = state.best
        return replace(
            found,
            path=tuple(state.path),
            verdict=verdict,
            num_gradients=state.gradients,
            seconds=time.perf_counter() - began,
        )
    return _by_chains(state, began)


def _by_guides(state: _Climb) -> Verdict:
    """The verdict on the first guide that is trusted, or on the last that was tried."""
    dense = state.problem.density().dim <= MAX_DENSE
    queue, tried = ["mean_field"], set[str]()
    while True:
        guide = queue.pop(0)
        tried.add(guide)
        verdict = state.stage(guide)
        if verdict.decision == "trust" or state.late:
            return verdict
        sites = [one.removeprefix("non-center ") for one in verdict.suggestions if one.startswith("non-center ")]
        if sites:
            state.non_center(sites)
            queue, tried = ["mean_field"], set()
            continue
        new = [one for one in verdict.suggestions if one not in tried and one not in queue]
        wanted = [one for one in new if one not in SLOW or _has_time_for(one, state)]
        if guide == "mean_field" and not wanted:
            wanted = ["full_rank" if dense else "low_rank"]
        queue += wanted
        if not queue:
            return verdict


def _has_time_for(guide: str, state: _Climb) -> bool:
    if state.problem.density().dim > RICH_DIM:
        return False
    return guide != "flow" or time.perf_counter() + 2 * FLOW_SECONDS < state.deadline


def _by_chains(state: _Climb, began: float) -> Fit:
    """NUTS, started from the best fit, until it passes its own checks."""
    assert state.best is not None
    found, _ = state.best
    usable = found.problem is state.problem and found.params is not None and found.status is not Status.DIVERGED
    start = found if usable else None
    for settings in HARDER:
        first = time.perf_counter()
        posterior: Posterior = nuts(state.problem, start=start, seed=state.seed, progress=state.progress, **settings)
        problems = posterior.problems()
        state.gradients += int(posterior.info["num_gradients"])
        said = ("its chains pass all checks",) if not problems else tuple(problems)
        state.path.append(Stage("nuts", "sample", said, time.perf_counter() - first, state._changes))
        if not problems:
            break
    if problems and state.best is not None and state.best[1].posterior is not None:
        return _reweighted(state, began)
    tried = ", ".join(stage.guide for stage in state.path if stage.guide != "nuts")
    message = (
        f"converged: NUTS, as no guide was trusted ({tried}); its chains pass all checks"
        if not problems
        else f"stopped: no guide was trusted ({tried}), and NUTS is unfit: {'; '.join(problems)}"
    )
    status = Status.OUT_OF_STEPS if problems else Status.CONVERGED
    chosen: dict[str, Any] = {"problem": state.problem, "method": "nuts", "sampled": posterior, "message": message}
    return replace(
        found,
        **chosen,
        guide=None,
        params=None,
        statuses=(status,),
        num_steps=posterior.num_chains * posterior.num_draws,
        num_gradients=state.gradients,
        seconds=time.perf_counter() - began,
        history={},
        objective=None,
        fixed=None,
        path=tuple(state.path),
        verdict=None,
    )


def _reweighted(state: _Climb, began: float) -> Fit:
    """The best fit with its reweighted draws: chains could do no better."""
    assert state.best is not None
    found, verdict = state.best
    return replace(
        found,
        sampled=verdict.posterior,
        message=f"{found.method}, reweighted: no guide was trusted, and NUTS is unfit; {verdict.reasons[-1]}",
        path=tuple(state.path),
        verdict=verdict,
        num_gradients=state.gradients,
        seconds=time.perf_counter() - began,
    )
