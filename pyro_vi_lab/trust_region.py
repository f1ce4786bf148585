r"""Maximum of a smooth function by Newton steps inside a trust region.

Each step maximizes the quadratic model :math:`g^\top p + \frac12 p^\top H p` over :math:`\|p\| \le r`: exactly, by the
eigenvectors of H, where H is given (lengths are then in units of :math:`|H_{ii}|^{-1/2}`, one for each coordinate); by
conjugate gradients, truncated at the region's edge, where only its products with vectors are. The radius follows how
well the model predicted the gain. It needs no concavity: saddles are left.

The maximum is reached when a Newton step promises no more than rounding error, and Newton's steps get shorter as fast
as they do near a maximum. At a supremum that lies at infinity they promise nothing either, and go on and on.

References:
    Nocedal & Wright 2006, "Numerical optimization", Algorithms 4.1 and 7.2, Section 4.3. Moré & Sorensen 1983,
    "Computing a trust region step", SIAM J. Sci. Stat. Comput. 4(3).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from enum import Enum
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

GAIN = 1e-9
"""Nats that a Newton step may still promise at the maximum; the step itself is taken."""
SMALL_STEP = 1e-5
"""Relative length of a step that counts as none."""
CONTRACTION = 0.25
"""Length of a Newton step relative to the one before from which on the steps converge."""
PATIENCE = 20
"""Newton steps that promise nothing, and do not get shorter, after which the maximum lies at infinity."""
REJECTIONS = 40
"""Steps in a row that may be taken back: the radius has then shrunk by 4⁻⁴⁰."""
BISECTIONS = 80
MAX_PRODUCTS = 250
"""Most products with the Hessian per step."""


class Local(NamedTuple):
    """A function near a point: its value, gradient ``(P,)``, and second derivatives or their products with vectors."""

    value: float
    grad: Tensor
    hessian: Tensor | None
    product: Callable[[Tensor], Tensor]


class Target(Protocol):
    """What is maximized, over points of any type."""

    def value(self, point: Any) -> float:
        """The function's value; not finite where there is none."""

    def local(self, point: Any) -> Local:
        """The function near a point."""

    def move(self, point: Any, step: Tensor) -> Any:
        """The point that a step ``(P,)`` from another leads to."""

    def relative(self, point: Any, step: Tensor) -> float:
        """Length of a step, relative to what counts as long there."""


class End(Enum):
    """How an ascent ended."""

    MAXIMUM = "a maximum"
    FLAT = "a maximum along which it is flat"
    OUT_OF_STEPS = "out of steps"
    NO_START = "the start has no finite value"
    RUNS_AWAY = "rises towards infinity"
    STUCK = "no step rises"


class Mark(NamedTuple):
    """One step of the history; ``gain`` is what the quadratic model promised of it, in nats."""

    value: float
    gain: float
    radius: float
    seconds: float


class Ascent(NamedTuple):
    """The end of an ascent: the point, what is known there, the last Newton step, and the way."""

    point: Any
    local: Local
    end: End
    step: Tensor
    marks: list[Mark]


class Proposal(NamedTuple):
    """A step, what it promises, whether it is Newton's own, inside the region, and its length there."""

    step: Tensor
    gain: float
    is_newton: bool
    length: float


def maximize(
    target: Target,
    start: Any,
    *,
    max_steps: int,
    radius: float = 1.0,
    on_step: Callable[[int, Mark], bool | None] = lambda step, mark: None,
) -> Ascent:
    """Climb from ``start`` to a local maximum.

    Args:
        target: What is maximized.
        start: Where to start.
        max_steps: Most steps, those taken back included.
        radius: First radius of the trust region.
        on_step: Called with the number and the mark of each step; the climb ends where it returns ``True``.

    Example:
        >>> class Parabola:
        ...     def value(self, point):
        ...         return -float(point.square().sum())
        ...
        ...     def local(self, point):
        ...         hessian = -2 * torch.eye(2)
        ...         return Local(self.value(point), -2 * point, hessian, lambda v: hessian @ v)
        ...
        ...     def move(self, point, step):
        ...         return point + step
        ...
        ...     def relative(self, point, step):
        ...         return float(step.norm())
        >>> ascent = maximize(Parabola(), torch.tensor([3.0, -4.0]), max_steps=20)
        >>> ascent.end, ascent.point.tolist()
        (<End.MAXIMUM: 'a maximum'>, [0.0, 0.0])
    """
    clock = time.perf_counter()
    point, local = start, target.local(start)
    marks = [Mark(local.value, math.nan, radius, time.perf_counter() - clock)]
    stopped = on_step(0, marks[0])
    last = torch.zeros_like(local.grad)
    if not _finite(local):
        return Ascent(point, local, End.NO_START, last, marks)
    eps = torch.finfo(local.grad.dtype).eps
    newton: Tensor | None = None  # the Newton step before
    rejected = idle = 0
    for step in range(1, max_steps + 1):
        if stopped:
            break
        resolution = GAIN + 10 * eps * abs(local.value)
        proposal = propose(local, radius, resolution)
        last, length = proposal.step, proposal.length
        if proposal.is_newton and proposal.gain <= resolution:
            contracts = newton is not None and _contracts(newton, proposal.step)
            if target.relative(point, proposal.step) <= SMALL_STEP or contracts:
                moved = target.move(point, proposal.step)
                new = target.local(moved)
                if _finite(new):
                    point, local = moved, new
                marks.append(Mark(local.value, proposal.gain, radius, time.perf_counter() - clock))
                return Ascent(point, local, End.MAXIMUM, last, marks)
            idle += 1
            if idle > PATIENCE:
                return Ascent(point, local, End.RUNS_AWAY, last, marks)
        elif proposal.gain <= resolution and radius >= 1:
            return Ascent(point, local, End.FLAT, last, marks)
        elif proposal.gain <= resolution:
            radius = 1.0
            continue
        else:
            idle = 0
        moved = target.move(point, proposal.step)
        gain = target.value(moved) - local.value
        noise = 100 * eps * max(1.0, abs(local.value))
        unclear = proposal.gain <= noise
        ratio = 1.0 if unclear else gain / proposal.gain
        kept = math.isfinite(gain) and (gain >= 1e-4 * proposal.gain - noise)
        if kept:
            new = target.local(moved)
            kept = _finite(new)
        if kept:
            newton = proposal.step if proposal.is_newton else None
            point, local, rejected = moved, new, 0
            if ratio > 0.75 and not proposal.is_newton:
                radius = max(radius, 4 * length)
            elif ratio < 0.25:
                radius = length / 2
        else:
            rejected += 1
            radius = length / 4
        marks.append(Mark(local.value, proposal.gain, radius, time.perf_counter() - clock))
        stopped = on_step(step, marks[-1])
        if rejected > REJECTIONS or radius == 0:
            return Ascent(point, local, End.STUCK, last, marks)
    return Ascent(point, local, End.OUT_OF_STEPS, last, marks)


def propose(local: Local, radius: float, resolution: float) -> Proposal:
    """The step that maximizes the quadratic model inside the radius.

    Args:
        local: The model.
        radius: Largest length.
        resolution: Gain that counts as none, so that flat directions are left alone.
    """
    if local.hessian is not None:
        return _exact(local.grad, local.hessian, radius, resolution)
    return _truncated(local.grad, local.product, radius)


def _exact(grad: Tensor, hessian: Tensor, radius: float, resolution: float) -> Proposal:
    # in units of the curvature of each coordinate: rounding would hide a coordinate whose own is far below the others'
    size = hessian.diagonal().abs()
    unit = torch.where(size > 0, size, 1.0).rsqrt()
    spectrum, vectors = torch.linalg.eigh(unit.unsqueeze(-1) * (hessian + hessian.mT) / 2 * unit)
    values, slope = spectrum.double().numpy(force=True), (vectors.mT @ (unit * grad)).double().numpy(force=True)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        step, is_newton = _inside(values, slope, radius, resolution, eps=torch.finfo(grad.dtype).eps)
        gain, length = float(slope @ step + values @ step**2 / 2), float(np.linalg.norm(step))
    return Proposal(unit * _along(vectors, step), gain, is_newton, length)


def _inside(
    values: NDArray[np.float64], slope: NDArray[np.float64], radius: float, resolution: float, *, eps: float
) -> tuple[NDArray[np.float64], bool]:
    """The best step in coordinates along the eigenvectors, and whether it is Newton's."""
    flat = np.abs(values) <= 10 * len(values) * eps * np.abs(values).max()
    flat &= np.abs(slope) * max(radius, 1.0) <= resolution
    highest = float(values[~flat].max(initial=-math.inf))

    def at(shift: float) -> NDArray[np.float64]:
        gap = np.where(flat, 1.0, shift - values)
        found: NDArray[np.float64] = np.where(flat | (slope == 0), 0.0, slope / gap)
        return found

    newton = at(0.0) if highest < 0 else None
    if newton is not None and np.linalg.norm(newton) <= radius:
        return newton, not flat.any()
    floor = max(highest, 0.0)
    low, high = floor, floor + float(np.linalg.norm(slope)) / radius
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if np.linalg.norm(at(middle)) > radius else (low, middle)
    step = at(high) if high > floor else np.zeros_like(slope)
    missing = radius * radius - float(step @ step)
    if highest > 0 and missing > 1e-6 * radius * radius:
        # the hard case: at a saddle the gradient says nothing of the way up
        top = int(values.argmax())
        step[top] += math.copysign(math.sqrt(missing), slope[top])
    return step, False


def _along(vectors: Tensor, coordinates: NDArray[np.float64]) -> Tensor:
    return vectors @ torch.as_tensor(coordinates).to(vectors)


def _truncated(grad: Tensor, product: Callable[[Tensor], Tensor], radius: float) -> Proposal:
    """Conjugate gradients from the origin, to the region's edge where the model rises for ever or leads out."""
    size = float(grad.norm())
    goal = min(0.1, math.sqrt(size)) * size
    step, image = torch.zeros_like(grad), torch.zeros_like(grad)  # and H times the step
    residual, direction = grad.clone(), grad.clone()
    for _ in range(min(MAX_PRODUCTS, 2 * len(grad))):
        if float(residual.norm()) <= goal:
            break
        bent = product(direction)
        curvature = -float(direction @ bent)
        square = float(residual.square().sum())
        length = square / curvature if curvature > 0 else math.inf
        if not math.isfinite(length) or float((step + length * direction).norm()) >= radius:
            length = _to_edge(step, direction, radius)
            step, image = step + length * direction, image + length * bent
            return Proposal(step, float(grad @ step + step @ image / 2), False, radius)
        step, image = step + length * direction, image + length * bent
        residual = residual + length * bent
        direction = residual + float(residual.square().sum()) / square * direction
    return Proposal(step, float(grad @ step + step @ image / 2), True, float(step.norm()))


def _to_edge(step: Tensor, direction: Tensor, radius: float) -> float:
    a, b = float(direction @ direction), float(step @ direction)
    c = max(radius**2 - float(step @ step), 0.0)
    return c / (b + math.sqrt(b * b + a * c)) if c > 0 else 0.0


def _contracts(before: Tensor, now: Tensor) -> bool:
    return float(now.norm()) <= CONTRACTION * float(before.norm()) or float(before @ now) < 0


def _finite(local: Local) -> bool:
    hessian = local.hessian is None or bool(torch.isfinite(local.hessian).all())
    return math.isfinite(local.value) and bool(torch.isfinite(local.grad).all()) and hessian
