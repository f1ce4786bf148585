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

from pyro_vi_lab.density import LogDensity
from pyro_vi_lab.families import Dense, Family, Params, Tangent
from pyro_vi_lab.families.particles import antithetic
from pyro_vi_lab.natural_gradient import Estimate, estimate

MIN_PARTICLES = 64
"""Fewest particles; a batch of this size costs hardly more than one gradient of a small model."""
PARTICLES_PER_DIMENSION = 4
"""Particles per dimension that leave the regression of h on ε as many degrees of freedom as it has slopes."""
MAX_PARTICLES = 4096
MAX_NUMBERS = 2**25
"""Numbers in the intermediate results of one evaluation (256 MiB in float64), which limits the particles of large "
"models."""
MAX_DENSE = 512
"""Largest D for which particles grow with D and a diagonal family uses the full mean Hessian for its location."""
MAX_RADIUS = 1e7
ERROR_GROWTH = 3.0
"""How much larger than before the error of a proposal's bound may be to still count as noise."""
REJECTIONS = 40
"""Steps in a row that may be taken back: the radius has then shrunk by 4⁻⁴⁰."""
MAX_SIZE = 1e15
"""Largest location or standard deviation on the unconstrained scale: beyond it the posterior is improper."""
TOLERANCE_PER_DIMENSION = 5e-4
"""Nats per dimension left at the end: an error of 3 % of a standard deviation in each mean."""
MAX_TOLERANCE = 0.01
AVERAGED_STEPS = 3
"""Fewest steps averaged before the stop."""


class Status(Enum):
    """How a fit ended."""

    CONVERGED = "converged"
    OUT_OF_STEPS = "out of steps"
    DIVERGED = "diverged"


@dataclass
class State:
    """One batch of fits on its way; all tensors ``(R,)`` but the parameters and the estimate."""

    params: Params
    estimate: Estimate
    radius: Tensor
    lr: Tensor
    averaged: Tensor
    signal: Tensor
    rejected: Tensor
    status: list[Status | None]


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


def tolerance(dim: int) -> float:
    """Nats that may be left of the bound at the end."""
    return min(MAX_TOLERANCE, TOLERANCE_PER_DIMENSION * dim)


def ascend(
    density: LogDensity,
    family: Family,
    start: Params,
    *,
    lr: float,
    max_kl: float,
    num_particles: int | None,
    max_steps: int,
    generator: torch.Generator,
    on_step: Callable[[int, Record], None],
) -> Result:
    """Maximize the ELBO from ``start (R, D)``.

    Args:
        density: The target.
        family: The approximating family.
        start: Where each fit starts.
        lr: Largest step size.
        max_kl: First radius of the trust region, in nats.
        num_particles: Particles at the start; chosen from D if ``None``.
        max_steps: Most steps.
        generator: Source of all randomness.
        on_step: Called with the number and the record of each step.
    """
    num_fits, dim = start.loc.shape
    clock = time.perf_counter()
    most = max(MIN_PARTICLES, min(MAX_PARTICLES, MAX_NUMBERS // (density.work * num_fits) // 2 * 2))
    particles = num_particles or max(MIN_PARTICLES, PARTICLES_PER_DIMENSION * dim if dim <= MAX_DENSE else 0)
    particles += particles % 2
    most = max(most, particles)
    gradients = particles * num_fits
    if isinstance(family.scale, Dense):
        # from too few particles the largest eigenvalue of a sample covariance makes a full step overshoot
        pairs = particles / 2
        lr = lr if pairs >= 1.5 * dim + 1 else min(lr, pairs / (pairs + dim + 1))
    first = _evaluate(density, family, start, particles, generator)
    ones = torch.ones(num_fits, dtype=density.dtype, device=density.device)
    state = State(start, first, ones * max_kl, ones * lr, ones * 0, ones * torch.nan, ones * 0, [None] * num_fits)
    _give_up_on_bad_starts(state)
    records = [_record(state, ones * 0, ones * 0, particles, clock)]
    on_step(0, records[0])
    for step in range(1, max_steps + 1):
        active = [i for i, status in enumerate(state.status) if status is None]
        if not active:
            break
        index = torch.tensor(active, device=density.device)
        sizes, kls, noisy, falling = _advance(density, family, state, index, particles, lr, max_kl, generator)
        gradients += particles * len(active)
        _judge(state, index, dim, falling | noisy if particles < most else falling)
        records.append(_record(state, _spread(sizes, index, ones), _spread(kls, index, ones), particles, clock))
        on_step(step, records[-1])
        if 2 * int(noisy.sum()) > len(active):
            particles = min(4 * particles, most)
    status = [one or Status.OUT_OF_STEPS for one in state.status]
    return Result(state.params, status, state.estimate.gap, records, gradients)


def _evaluate(
    density: LogDensity, family: Family, params: Params, num_particles: int, generator: torch.Generator
) -> Estimate:
    num_fits, dim = params.loc.shape
    eps = antithetic(family.noise, num_particles, (num_fits,), dim, generator=generator, dtype=density.dtype).to(
        density.device
    )
    log_p, grad = density.value_and_grad(family.sample(params, eps))
    newton = dim <= MAX_DENSE and num_particles // 2 > dim
    return estimate(family, params, eps, log_p, grad, newton=newton)


def _advance(
    density: LogDensity,
    family: Family,
    state: State,
    index: Tensor,
    particles: int,
    lr: float,
    max_kl: float,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Propose, evaluate, keep or take back a step of the active fits.

    Returns:
        Step sizes, KL divergences, who wants more particles, and whose gap is clearly signal and large or falling fast.
    """
    old_params, old = _take(state.params, index), _take_estimate(state.estimate, index)
    size = state.lr[index] / (1 + state.averaged[index])
    proposal = family.step(old_params, old.tangent, lr=size, max_kl=state.radius[index])
    new = _evaluate(density, family, proposal.params, particles, generator)

    # where the proposal is bad, a few particles make both the fall of its bound and the error of that fall: cap the
    # error
    noise = torch.hypot(old.error, torch.minimum(new.error, ERROR_GROWTH * old.error))
    predicted = 2 * old.length * proposal.size * (1 - proposal.size / 2)
    gain = new.elbo - old.elbo
    finite = torch.isfinite(new.elbo) & torch.isfinite(new.length) & torch.isfinite(new.gap) & torch.isfinite(new.noise)
    kept = finite & (gain >= -3 * noise - 1e-10 * old.elbo.abs())
    ratio = gain / predicted.clamp_min(1e-300)

    radius = state.radius[index]
    shrink = kept & (predicted > 3 * noise) & (ratio < 0.25)
    grow = kept & ~shrink & (proposal.size < size) & ((ratio > 0.6) | (predicted < noise))
    radius = torch.where(shrink, radius / 2, torch.where(grow, (radius * 4).clamp_max(max(MAX_RADIUS, max_kl)), radius))
    radius = torch.where(kept, radius, torch.minimum(radius, proposal.kl) / 4)

    # successive gradients that point against each other mean that the step overshoots
    inner = _inner(family, old.tangent, new.tangent)
    cosine = inner / (2 * (old.length * new.length).sqrt()).clamp_min(1e-300)
    resolved = kept & (new.gap > 3 * new.noise) & (proposal.size >= state.lr[index])
    rate = state.lr[index]
    rate = torch.where(resolved & (cosine < -0.3), (rate * 0.75).clamp_min(lr / 20), rate)
    rate = torch.where(resolved & (cosine > 0), (rate * 1.15).clamp_max(lr), rate)

    signal = cosine.clamp_min(0) * new.gap
    before = state.signal[index]
    # no more than there is now: on the way down the gap falls by orders of magnitude, which a mean would remember
    signal = torch.where(torch.isnan(before), signal, torch.minimum((before + signal) / 2, new.gap))

    state.radius[index], state.lr[index] = radius, rate
    state.signal[index] = torch.where(kept, signal, before)
    state.rejected[index] = torch.where(kept, torch.zeros_like(rate), state.rejected[index] + 1)
    state.params = Params(*(_put(a, index, b, kept) for a, b in zip(state.params, proposal.params, strict=True)))
    state.estimate = _put_estimate(state.estimate, index, new, kept)
    limit = tolerance(old_params.loc.shape[-1])
    noisy = kept & (new.gap < 3 * new.noise) & (new.noise > limit)
    falling = kept & (new.gap > 3 * new.noise) & ((new.gap > limit) | (2 * new.gap < old.gap))
    return proposal.size, torch.where(kept, proposal.kl, torch.zeros_like(proposal.kl)), noisy, falling


def _judge(state: State, index: Tensor, dim: int, going_on: Tensor) -> None:
    """Start, go on with or leave averaging; stop what has converged or cannot go on.

    Not what is ``going_on``: steps that overshoot turn against each other too and leave little signal, and a gap that
    falls fast is soon down to rounding error.
    """
    limit = tolerance(dim)
    for position, i in enumerate(index.tolist()):
        gap, noise, signal = (float(x[i]) for x in (state.estimate.gap, state.estimate.noise, state.signal))
        loc, scale = state.params.loc[i], state.params.scale[i]
        if state.rejected[i] > 0:
            if state.rejected[i] >= REJECTIONS:
                state.status[i] = Status.DIVERGED
            continue
        if float(loc.abs().max()) > MAX_SIZE or float(scale.abs().max()) > MAX_SIZE:
            state.status[i] = Status.DIVERGED
            continue
        rounding = 1e3 * dim * torch.finfo(loc.dtype).eps
        if gap + noise < rounding:
            state.status[i] = Status.CONVERGED
            continue
        if state.averaged[i] > 0 and signal > 2 * max(noise, limit):
            state.averaged[i] = 0
        if bool(going_on[position]):
            continue
        if signal < max(noise / 2, limit / 4):
            quiet = noise / (1 + float(state.averaged[i])) < limit / 2 and state.averaged[i] >= AVERAGED_STEPS
            if not quiet:
                state.averaged[i] += 1
            elif signal < limit / 2:
                state.status[i] = Status.CONVERGED


def _give_up_on_bad_starts(state: State) -> None:
    finite = torch.isfinite(state.estimate.elbo) & torch.isfinite(state.estimate.length)
    for i, good in enumerate(finite.tolist()):
        if not good:
            state.status[i] = Status.DIVERGED


def _record(state: State, sizes: Tensor, kls: Tensor, particles: int, clock: float) -> Record:
    current = state.estimate
    return Record(-current.elbo.clone(), current.gap.clone(), sizes, kls, particles, time.perf_counter() - clock)


def _spread(values: Tensor, index: Tensor, like: Tensor) -> Tensor:
    return torch.zeros_like(like).index_put((index,), values)


def _inner(family: Family, one: Tangent, two: Tangent) -> Tensor:
    stretch = (one.stretch * two.stretch).flatten(1).sum(-1)
    return (one.shift * two.shift).sum(-1) + stretch / 2


def _take(params: Params, index: Tensor) -> Params:
    return Params(*(value[index] for value in params))


def _take_estimate(values: Estimate, index: Tensor) -> Estimate:
    tangent = Tangent(*(None if value is None else value[index] for value in values.tangent))  # type: ignore[arg-type]
    return values._replace(
        tangent=tangent,
        **{name: getattr(values, name)[index] for name in Estimate._fields if name != "tangent"},
    )


def _put(whole: Tensor, index: Tensor, part: Tensor, kept: Tensor) -> Tensor:
    rows = index[kept]
    return whole if not len(rows) else whole.index_copy(0, rows, part[kept])


def _put_estimate(whole: Estimate, index: Tensor, part: Estimate, kept: Tensor) -> Estimate:
    tangent = Tangent(
        *(
            None if a is None or b is None else _put(a, index, b, kept)
            for a, b in zip(whole.tangent, part.tangent, strict=True)
        )  # type: ignore[arg-type]
    )
    return whole._replace(
        tangent=tangent,
        **{
            name: _put(getattr(whole, name), index, getattr(part, name), kept)
            for name in Estimate._fields
            if name != "tangent"
        },
    )
