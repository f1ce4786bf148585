r"""Natural-gradient ascent of the ELBO on a captured density, batched over restarts, with a stop rule.

Three things make it need no tuning:

- *a trust region in KL whose radius follows the bound.* A step is taken back when the bound falls by more than its
  noise explains (then the radius shrinks to a quarter of that step's KL), and the radius grows fourfold where the
  first-order prediction held.
- *as many particles as the noise asks for.* The estimate comes with its own noise (in nats). When noise is what is
  left of it, the particles are quadrupled; when there are as many as memory allows, or the noise is small enough, the
  step size falls as :math:`1/t`, which averages the natural parameters over all steps since, until the average is
  quiet enough; there it stays, so that slow directions still move.
- *a stop rule on the signal.* Natural gradients of successive steps use independent draws, so the mean of their inner
  product is free of noise. The ascent has converged when that signal and the averaged noise are both below the
  tolerance.

References:
    Khan & Rue 2023, "The Bayesian learning rule", JMLR 24. Nocedal & Wright 2006, "Numerical optimization",
    Algorithm 4.1 (the radius). Robbins & Monro 1951, Polyak & Juditsky 1992 (averaging).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from pyro_vi_lab.density import LogDensity
from pyro_vi_lab.density_batch import DensityBatch
from pyro_vi_lab.families import MAX_DENSE, Family, Params
from pyro_vi_lab.natural_step import ACTIVE, CONVERGED, DIVERGED, Report, State
from pyro_vi_lab.tiers import Compile
from pyro_vi_lab.whole_step import Stepper

MIN_PARTICLES = 64
"""Fewest particles; a batch of this size costs hardly more than one gradient of a small model."""
PARTICLES_PER_DIMENSION = 4
"""Particles per dimension that leave the regression of h on ε as many degrees of freedom as it has slopes."""
MAX_PARTICLES = 4096
MAX_NUMBERS = 2**25
"""Numbers in the intermediate results of one evaluation (256 MiB in float64), which limits the particles of large
models."""


class Status(Enum):
    """How a fit ended."""

    CONVERGED = "converged"
    OUT_OF_STEPS = "out of steps"
    DIVERGED = "diverged"


_STATUS = {ACTIVE: Status.OUT_OF_STEPS, CONVERGED: Status.CONVERGED, DIVERGED: Status.DIVERGED}


@dataclass(frozen=True)
class Record:
    """One step of the history; tensors ``(R,)``."""

    negative_elbo: Tensor
    gap: Tensor
    step_size: Tensor
    kl: Tensor
    num_particles: int
    seconds: float


@dataclass(frozen=True)
class Result:
    """The end of an ascent."""

    params: Params
    status: list[Status]
    gap: Tensor
    records: list[Record]
    num_gradients: int


def ascend(
    density: LogDensity | DensityBatch,
    family: Family,
    start: Params,
    *,
    lr: float,
    max_kl: float,
    num_particles: int | None,
    max_steps: int,
    generator: torch.Generator,
    on_step: Callable[[int, Record], bool | None],
    compile: Compile = "auto",
    max_particles: int = MAX_PARTICLES,
) -> Result:
    """Maximize the ELBO from ``start (R, D)``.

    Args:
        density: The target; one with a batch of data sets has one fit for each.
        family: The approximating family.
        start: Where each fit starts.
        lr: Largest step size.
        max_kl: First radius of the trust region, in nats.
        num_particles: Particles at the start, of each part of the family; chosen from D if ``None``.
        max_steps: Most steps.
        generator: Source of all randomness.
        on_step: Called with the number and the record of each step; the ascent ends where it returns ``True``.
        compile: ``True`` makes whole steps one graph and machine code of it, ``"auto"`` the gradient of many fits.
        max_particles: Most particles, where a rough optimum will do; never fewer than at the start.
    """
    num_fits, dim = start.loc.shape
    clock = time.perf_counter()
    parts = family.num_parts
    most = max(MIN_PARTICLES, min(max_particles, MAX_NUMBERS // (density.work * num_fits * parts) // 2 * 2))
    particles = num_particles or max(MIN_PARTICLES, PARTICLES_PER_DIMENSION * dim if dim <= MAX_DENSE else 0)
    particles += particles % 2
    most = max(most, particles)
    lr = min(lr, family.max_lr)
    if family.is_dense:
        # from too few particles the largest eigenvalue of a sample covariance makes a full step overshoot
        pairs = particles / 2
        lr = lr if pairs >= 1.5 * dim + 1 else min(lr, pairs / (pairs + dim + 1))

    def noise(number: int) -> Tensor:
        half = family.draw((particles // 2, number), dim, generator=generator, dtype=density.dtype)
        return half.to(density.device)

    step_once = Stepper(density, family, lr=lr, max_kl=max_kl, compile=compile)
    whole = step_once.first(start, noise(num_fits))
    gradients = particles * parts * num_fits
    zero = torch.zeros_like(whole.radius)
    records = [_record(whole, Report(zero, zero, zero > 0), particles, clock)]
    stopped = on_step(0, records[0])
    index: Tensor | None = None  # the fits that go on; all of them as long as that is more than half
    state = whole
    for step in range(1, max_steps + 1):
        status = state.status.tolist()
        active = [i for i, one in enumerate(status) if one == ACTIVE]
        if not active or stopped:
            break
        if 2 * len(active) <= len(status):
            whole = _put(whole, index, state)
            chosen = torch.tensor(active, device=density.device)
            index = chosen if index is None else index[chosen]
            state = pytree.tree_map(lambda value, rows=chosen: None if value is None else value[rows], state)
            step_once.choose(chosen)
        state, report = step_once(state, noise(len(state.radius)), can_grow=particles < most)
        gradients += particles * parts * len(state.radius)
        if index is not None:
            report = Report(*(value.new_zeros(num_fits).index_put((index,), value) for value in report))
        whole = _put(whole, index, state)
        records.append(_record(whole, report, particles, clock))
        stopped = on_step(step, records[-1])
        if particles < most and 2 * int(report.noisy.sum()) > len(active):
            particles = min(4 * particles, most)
    ends = [_STATUS[one] for one in whole.status.tolist()]
    return Result(whole.params, ends, whole.estimate.gap, records, gradients)


def _put(whole: State, index: Tensor | None, part: State) -> State:
    """The state of all fits, with those of ``index`` replaced."""
    if index is None:
        return part
    put: State = pytree.tree_map(lambda old, new: None if old is None else old.index_copy(0, index, new), whole, part)
    return put


def _record(state: State, report: Report, particles: int, clock: float) -> Record:
    now = state.estimate
    return Record(-now.elbo, now.gap, report.size, report.kl, particles, time.perf_counter() - clock)
