r"""One step of natural-gradient ascent as a function of tensors, state to state, for a batch of fits.

A step is taken back when the bound falls by more than its noise explains; then the radius of the trust region shrinks
to a quarter of that step's KL. The radius grows fourfold where the first-order prediction held. What the particles
leave of the bound is known with its own noise, so a fit that has converged is one whose gradients of successive steps,
which use independent draws, no longer point the same way.

References:
    Khan & Rue 2023, "The Bayesian learning rule", JMLR 24. Nocedal & Wright 2006, "Numerical optimization",
    Algorithm 4.1 (the radius). Robbins & Monro 1951, Polyak & Juditsky 1992 (averaging).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from pyro_vi_lab.families import MAX_DENSE, Estimate, Family, Params

ACTIVE, CONVERGED, DIVERGED = 0, 1, 2
"""Values of ``State.status``."""
MAX_RADIUS = 1e15
"""Nats: a far location that a diagonal scale of a correlated posterior has to go to is 10⁹ and more away."""
ERROR_GROWTH = 3.0
"""How much larger than before the error of a proposal's bound may be to still count as noise."""
UNLUCKY = 10.0
"""Standard errors by which the bound may fall in a step that is too small to change it: estimates have heavy tails."""
REJECTIONS = 40
"""Steps in a row that may be taken back: the radius has then shrunk by 4⁻⁴⁰."""
MAX_SIZE = 1e15
"""Largest location or standard deviation on the unconstrained scale: beyond it the posterior is improper."""
TOLERANCE_PER_DIMENSION = 5e-4
"""Nats per dimension left at the end: an error of 3 % of a standard deviation in each mean."""
MAX_TOLERANCE = 0.01
AVERAGED_STEPS = 3
"""Fewest steps averaged before the stop."""

ValueAndGrad = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Log density ``(K, R)`` and gradient ``(K, R, D)`` at z ``(K, R, D)``."""


class State(NamedTuple):
    """One batch of fits on its way; all tensors ``(R,)`` but the parameters and the tangent.

    Args:
        params: Location and scale.
        estimate: The bound and its natural gradient there.
        radius: Of the trust region, in nats.
        lr: Largest step size.
        averaged: Steps averaged so far.
        signal: What is left of the bound without its noise; NaN before the first step.
        rejected: Steps taken back in a row.
        status: ``ACTIVE``, ``CONVERGED`` or ``DIVERGED``.
    """

    params: Params
    estimate: Estimate
    radius: Tensor
    lr: Tensor
    averaged: Tensor
    signal: Tensor
    rejected: Tensor
    status: Tensor


class Report(NamedTuple):
    """What a step did, ``(R,)``: its size, its KL (zero if taken back), and whether noise is what is left."""

    size: Tensor
    kl: Tensor
    noisy: Tensor


def tolerance(dim: int) -> float:
    """Nats that may be left of the bound at the end."""
    return min(MAX_TOLERANCE, TOLERANCE_PER_DIMENSION * dim)


def evaluate(function: ValueAndGrad, family: Family, params: Params, half: Tensor) -> Estimate:
    """The bound and its natural gradient from the pairs ±``half``.

    Shape:
        half ``(K / 2, R, noise_dim(D))``.
    """
    eps = family.particles(half)
    dim = params.loc.shape[-1]
    log_p, grad = function(family.points(params, eps))
    return family.estimate(params, eps, log_p, grad, newton=dim <= MAX_DENSE and len(half) > dim)


def first_state(
    function: ValueAndGrad, family: Family, params: Params, half: Tensor, *, lr: float, max_kl: float
) -> State:
    """Where an ascent starts."""
    first = evaluate(function, family, params, half)
    ones = torch.ones_like(first.elbo)
    good = torch.isfinite(first.elbo) & torch.isfinite(first.length)
    status = torch.where(good, ACTIVE, DIVERGED)
    return State(params, first, ones * max_kl, ones * lr, ones * 0, ones * torch.nan, ones * 0, status)


def advance(
    function: ValueAndGrad, family: Family, state: State, half: Tensor, *, lr: float, max_kl: float, can_grow: bool
) -> tuple[State, Report]:
    """Propose, evaluate, keep or take back a step of the active fits, and judge them.

    Args:
        function: The target.
        family: The approximating family.
        state: Where the fits are.
        half: Standard noise for the pairs of particles, ``(K / 2, R, noise_dim(D))``.
        lr: Largest step size.
        max_kl: First radius of the trust region.
        can_grow: Whether there can be more particles, so that a noisy fit need not be averaged yet.
    """
    old = state.estimate
    size = state.lr / (1 + state.averaged)
    proposal = family.step(state.params, old.tangent, lr=size, max_kl=state.radius)
    new = evaluate(function, family, proposal.params, half)

    # where the proposal is bad, a few particles make both the fall of its bound and the error of that fall: cap the
    # error
    noise = torch.hypot(old.error, torch.minimum(new.error, ERROR_GROWTH * old.error))
    predicted = 2 * old.length * proposal.size * (1 - proposal.size / 2)
    gain = new.elbo - old.elbo
    finite = torch.isfinite(new.elbo) & torch.isfinite(new.length) & torch.isfinite(new.gap) & torch.isfinite(new.noise)
    # where a step can hardly change the bound, a fall says that the old estimate was a lucky one: it must not stay
    # for ever
    slack = torch.where(predicted < noise, UNLUCKY, 3.0)
    kept = finite & (gain >= -slack * noise - 1e-10 * old.elbo.abs())
    ratio = gain / predicted.clamp_min(1e-300)

    radius = state.radius
    shrink = kept & (predicted > 3 * noise) & (ratio < 0.25)
    grow = kept & ~shrink & (proposal.size < size) & ((ratio > 0.6) | (predicted < noise))
    radius = torch.where(shrink, radius / 2, torch.where(grow, (radius * 4).clamp_max(max(MAX_RADIUS, max_kl)), radius))
    radius = torch.where(kept, radius, torch.minimum(radius, proposal.kl) / 4)

    # successive gradients that point against each other mean that the step overshoots
    cosine = family.inner(proposal.params, old.tangent, new.tangent) / (2 * (old.length * new.length).sqrt()).clamp_min(
        1e-300
    )
    resolved = kept & (new.gap > 3 * new.noise) & (proposal.size >= state.lr)
    rate = state.lr
    rate = torch.where(resolved & (cosine < -0.3), (rate * 0.75).clamp_min(lr / 20), rate)
    rate = torch.where(resolved & (cosine > 0), (rate * 1.15).clamp_max(lr), rate)

    signal = cosine.clamp_min(0) * new.gap
    # no more than there is now: on the way down the gap falls by orders of magnitude, which a mean would remember
    signal = torch.where(torch.isnan(state.signal), signal, torch.minimum((state.signal + signal) / 2, new.gap))
    limit = tolerance(state.params.loc.shape[-1])
    noisy = kept & (new.gap < 3 * new.noise) & (new.noise > limit)
    falling = kept & (new.gap > 3 * new.noise) & ((new.gap > limit) | (2 * new.gap < old.gap))
    moved = State(
        params=choose(kept, proposal.params, state.params),
        estimate=choose(kept, new, old),
        radius=radius,
        lr=rate,
        averaged=state.averaged,
        signal=torch.where(kept, signal, state.signal),
        rejected=torch.where(kept, 0, state.rejected + 1),
        status=state.status,
    )
    active = state.status == ACTIVE
    judged = choose(active, _judged(moved, falling | noisy if can_grow else falling), state)
    kl = torch.where(kept & active, proposal.kl, 0)
    return judged, Report(torch.where(active, proposal.size, 0), kl, noisy & active)


def _judged(state: State, going_on: Tensor) -> State:
    """Start, go on with or leave averaging; stop what has converged or cannot go on.

    Not what is ``going_on``: steps that overshoot turn against each other too and leave little signal, and a gap that
    falls fast is soon down to rounding error.
    """
    loc, scale = state.params
    dim, limit = loc.shape[-1], tolerance(loc.shape[-1])
    gap, noise, signal, averaged = state.estimate.gap, state.estimate.noise, state.signal, state.averaged
    kept = state.rejected == 0
    size = torch.maximum(loc.abs().amax(-1), scale.abs().flatten(1).amax(-1))
    diverged = torch.where(kept, size > MAX_SIZE, state.rejected >= REJECTIONS)
    exact = gap + noise < 1e3 * dim * torch.finfo(loc.dtype).eps
    open_ = kept & ~diverged & ~exact

    averaged = torch.where(open_ & (averaged > 0) & (signal > 2 * noise.clamp_min(limit)), 0, averaged)
    still = open_ & ~going_on & (signal < (noise / 2).clamp_min(limit / 4))
    quiet = (noise / (1 + averaged) < limit / 2) & (averaged >= AVERAGED_STEPS)
    converged = (kept & ~diverged & exact) | (still & quiet & (signal < limit / 2))
    status = torch.where(diverged, DIVERGED, torch.where(converged, CONVERGED, state.status))
    return state._replace(averaged=torch.where(still & ~quiet, averaged + 1, averaged), status=status)


def choose(mask: Tensor, yes: Any, no: Any) -> Any:
    """``yes`` where ``mask (R,)``, else ``no``, for all tensors of two equal trees of named tuples."""

    def one(a: Any, b: Any) -> Any:
        return None if a is None else torch.where(mask.reshape(-1, *(1,) * (a.dim() - 1)), a, b)

    return pytree.tree_map(one, yes, no)
