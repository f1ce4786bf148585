"""Maxima of a log density that an approximation does not cover."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

ValueAndGrad = Callable[[Tensor], tuple[Tensor, Tensor]]

MEMORY = 8
"""Pairs of steps and gradient changes behind the quasi-Newton direction (Nocedal & Wright 2006, Section 7.2)."""
SUFFICIENT = 1e-4
"""Share of the predicted rise that a step must bring (Nocedal & Wright 2006, eq. 3.4)."""
MAX_MOVE = 100.0
"""Longest first move, in standard deviations of the approximation."""
RISE = 1e-6
"""Nats: a step promises less than this at a maximum; the direction may be a thousand times too short."""
DIFFERENCE = 1e-4
"""Step of central differences, in standard deviations of the approximation: near the cube root of the precision."""
SAME_PLACE = 0.1
"""Nats, and share of the distance from the approximation in its standard deviations, between ends at one maximum."""
PATH_POINTS = 64
"""Points at which the straight way between two maxima is looked at."""
DIP = 1.0
"""Nats by which the density must fall on the way to another maximum."""


@dataclass(frozen=True, eq=False)
class OtherModes:
    r"""Maxima outside the bulk of an approximation, and their share of the posterior's mass.

    Args:
        points: Where they are, on the unconstrained scale, the heaviest first.
        covariances: Of the Laplace approximation at each.
        mass: Share of the posterior's mass by Laplace's method, relative to all maxima that were found.
        num_inside: Maxima that are apart from each other and lie where the approximation draws.
        num_starts: Starts of the search.
        num_ended: How many of them ended at a maximum; the others left for infinity, or were not there yet.
        num_gradients: Gradients of the log density.

    Shape:
        points ``(K, D)``, covariances ``(K, D, D)``, mass ``(K,)``.
    """

    points: Tensor
    covariances: Tensor
    mass: Tensor
    num_inside: int
    num_starts: int
    num_ended: int
    num_gradients: int

    def __repr__(self) -> str:
        found = ", ".join(f"{float(one):.2g}" for one in self.mass) or "none"
        return f"OtherModes(mass {found}; {self.num_ended} of {self.num_starts} starts ended at a maximum)"


def climb(value_and_grad: ValueAndGrad, start: Tensor, *, max_calls: int = 150) -> tuple[Tensor, Tensor, Tensor, int]:
    """Maximize a log density from many starts at once by L-BFGS with backtracking.

    Args:
        value_and_grad: Log density and gradient, ``(K, D)`` to ``(K)`` and ``(K, D)``, in coordinates in which the
            identity is a good first guess of the inverse Hessian.
        start: The starts.
        max_calls: Most evaluations.

    Returns:
        Ends ``(K, D)``, their values ``(K,)``, which of them are maxima by their gradients, and the evaluations.

    References:
        Nocedal & Wright 2006, "Numerical optimization", Algorithm 7.4 (two loops).
    """
    x = start
    value, grad = value_and_grad(x)
    steps: list[Tensor] = []
    changes: list[Tensor] = []
    calls, done = 1, ~torch.isfinite(value)
    direction = _direction(grad, steps, changes)
    scale = torch.ones_like(value)
    while calls < max_calls and not bool(done.all()):
        slope = (direction * grad).sum(-1)
        done = done | (slope < RISE)
        new = x + scale[:, None] * direction
        new_value, new_grad = value_and_grad(new)
        calls += 1
        rises = new_value >= value + SUFFICIENT * scale * slope  # False where it is NaN
        taken = rises & ~done & torch.isfinite(new_grad).all(-1)
        # a start whose step was too long tries a shorter one along the same line; pairs of others are zero
        step = torch.where(taken[:, None], new - x, torch.zeros_like(x))
        change = torch.where(taken[:, None], grad - new_grad, torch.zeros_like(x))
        x, value = torch.where(taken[:, None], new, x), torch.where(taken, new_value, value)
        grad = torch.where(taken[:, None], new_grad, grad)
        if bool(taken.any()):
            steps, changes = [*steps[1 - MEMORY :], step], [*changes[1 - MEMORY :], change]
        direction = torch.where(taken[:, None], _direction(grad, steps, changes), direction)
        scale = torch.where(taken, torch.ones_like(scale), scale / 4)
        stuck = scale < 1e-12
        direction = torch.where(stuck[:, None], _limited(grad), direction)
        scale = torch.where(stuck, torch.full_like(scale, 1e-3), scale)
    return x, value, done & torch.isfinite(value), calls


def _direction(grad: Tensor, steps: list[Tensor], changes: list[Tensor]) -> Tensor:
    """The quasi-Newton direction of every start; pairs without positive curvature are left out."""
    q = grad.clone()
    kept = []
    for s, y in zip(reversed(steps), reversed(changes), strict=True):
        curvature = (s * y).sum(-1)
        usable = curvature > 1e-10 * y.square().sum(-1)
        rho = torch.where(usable, 1 / curvature.clamp_min(1e-300), torch.zeros_like(curvature))
        alpha = rho * (s * q).sum(-1)
        q = q - alpha[:, None] * y
        kept.append((rho, alpha, s, y, usable, curvature))
    gamma = torch.ones_like(grad[:, 0])
    for _, _, _, y, usable, curvature in reversed(kept):  # the newest usable pair is the last to be seen
        gamma = torch.where(usable, curvature / y.square().sum(-1).clamp_min(1e-300), gamma)
    q = gamma[:, None] * q
    for rho, alpha, s, y, _, _ in reversed(kept):
        beta = rho * (y * q).sum(-1)
        q = q + (alpha - beta)[:, None] * s
    uphill = (q * grad).sum(-1) > 0
    return _limited(torch.where(uphill[:, None], q, grad))


def _limited(direction: Tensor) -> Tensor:
    length = direction.norm(dim=-1, keepdim=True)
    return direction * (MAX_MOVE / length.clamp_min(MAX_MOVE))


def other_modes(
    value_and_grad: ValueAndGrad,
    hessian: Callable[[Tensor], Tensor],
    log_q: Callable[[Tensor], Tensor],
    *,
    starts: Tensor,
    draws: Tensor,
    root: Tensor,
    max_calls: int = 150,
) -> OtherModes:
    r"""Climb from scattered starts, and weigh the maxima that the approximation never draws near.

    A maximum is outside where the density of the approximation is lower than at each of its own draws, and where the
    target falls by more than a nat on the straight way to it. Its mass is Laplace's,

    .. math:: p(z^*)\,(2\pi)^{D/2}\,|{-\nabla^2 \log p(z^*)}|^{-1/2}.

    Args:
        value_and_grad: Log density and gradient of the target, ``(K, D)`` to ``(K)`` and ``(K, D)``.
        hessian: Its second derivatives, ``(K, D)`` to ``(K, D, D)``.
        log_q: Log density of the approximation, ``(K, D)`` to ``(K)``.
        starts: Scattered starts; the mean of the approximation is added as one more.
        draws: Draws of the approximation.
        root: A factor of its covariance: a lower triangle, or standard deviations.
        max_calls: Most evaluations of all starts.

    Shape:
        starts ``(K, D)``, draws ``(S, D)``, root ``(D, D)`` or ``(D,)``.

    References:
        MacKay 2003, "Information theory, inference, and learning algorithms", Chapter 27 (Laplace's method).

    Example:
        >>> def two(z):  # two normals of the same mass
        ...     far = torch.stack([-0.5 * (z - 10).square().sum(-1), -0.5 * (z + 10).square().sum(-1)])
        ...     share = far.softmax(0)[..., None]
        ...     return far.logsumexp(0), -(share * torch.stack([z - 10, z + 10])).sum(0)
        >>> draws = 10 + torch.randn(500, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        >>> found = other_modes(
        ...     two,
        ...     lambda z: -torch.ones(len(z), 1, 1).double(),
        ...     lambda z: -0.5 * (z - 10).square().sum(-1),
        ...     starts=torch.tensor([[-3.0], [2.0]]).double(),
        ...     draws=draws,
        ...     root=torch.ones(1).double(),
        ... )
        >>> found.points.round().tolist(), [round(float(one), 2) for one in found.mass]
        ([[-10.0]], [0.5])
    """
    center, dim = draws.mean(0), draws.shape[-1]

    def whitened(u: Tensor) -> tuple[Tensor, Tensor]:
        value, grad = value_and_grad(center + (u * root if root.dim() == 1 else u @ root.T))
        return value, grad * root if root.dim() == 1 else grad @ root

    u = starts - center
    u = u / root if root.dim() == 1 else torch.linalg.solve_triangular(root, u.T, upper=False).T
    u, value, ended, calls = climb(whitened, torch.cat([torch.zeros_like(u[:1]), u]), max_calls=max_calls)
    z = center + (u * root if root.dim() == 1 else u @ root.T)
    chosen = _distinct(u, value, ended)
    count = calls * len(u)
    inside = log_q(z[chosen]) >= log_q(draws).min()
    outside = [i for i, near in zip(chosen, inside.tolist(), strict=True) if not near]
    main = [i for i, near in zip(chosen, inside.tolist(), strict=True) if near] or [0]
    best = max(main, key=lambda i: float(value[i]))
    apart = [i for i in main if i != best and _apart(value_and_grad, z[best], z[i], float(value[i]))]
    rest = (1 + len(apart), len(starts), int(ended[1:].sum()))
    none = OtherModes(z[:0], z.new_zeros(0, dim, dim), value[:0], *rest, count)
    outside = [i for i in outside if _apart(value_and_grad, z[best], z[i], float(value[i]))]
    if not outside:
        return none
    index = [best, *outside]
    curvature = hessian(z[index])
    count += dim * len(index)
    for row in (~torch.isfinite(curvature).flatten(1).all(1)).nonzero().flatten().tolist():
        # where a density underflows, automatic second derivatives may be 0/0
        curvature[row] = _differences(value_and_grad, z[index[row]], root)
        count += 2 * dim
    precision, info = torch.linalg.cholesky_ex(-curvature)
    log_mass = value[index] + dim / 2 * math.log(2 * math.pi) - precision.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    log_mass = torch.where(info == 0, log_mass, torch.full_like(log_mass, -math.inf))
    if not bool(torch.isfinite(log_mass[0])):
        # the approximation's own maximum has no normal shape (it is a funnel's, or an edge): take its own draws' mass
        log_mass[0] = (value_and_grad(draws)[0] - log_q(draws)).mean()
    share = log_mass.softmax(0)[1:]
    order = [i for i in share.argsort(descending=True).tolist() if share[i] > 0]
    covariances = torch.stack([torch.cholesky_inverse(precision[1 + i]) for i in order]) if order else none.covariances
    points = z[outside][order]
    return OtherModes(points, covariances, share[order], *rest, count)


def _differences(value_and_grad: ValueAndGrad, at: Tensor, root: Tensor) -> Tensor:
    """Second derivatives ``(D, D)`` by central differences of the gradient."""
    size = DIFFERENCE * (root if root.dim() == 1 else root.norm(dim=1))
    steps = size.diag()
    rows = (value_and_grad(at + steps)[1] - value_and_grad(at - steps)[1]) / (2 * size[:, None])
    return (rows + rows.mT) / 2


def _distinct(u: Tensor, value: Tensor, ended: Tensor) -> list[int]:
    """One start of each maximum, the highest first."""
    chosen: list[int] = []
    for i in value.argsort(descending=True).tolist():
        if not bool(ended[i]):
            continue
        radius = SAME_PLACE * (1 + float(u[i].norm()))
        if all(float(value[j] - value[i]) > SAME_PLACE or float((u[i] - u[j]).norm()) > radius for j in chosen):
            chosen.append(i)
    return chosen


def _apart(value_and_grad: ValueAndGrad, one: Tensor, other: Tensor, height: float) -> bool:
    """Whether the density falls between two points below the lower of them."""
    share = torch.linspace(0, 1, PATH_POINTS, dtype=one.dtype, device=one.device)[:, None]
    value = value_and_grad(one + share * (other - one))[0]
    return not bool(value.min() >= min(height, float(value[0])) - DIP)  # NaN: outside of the support
