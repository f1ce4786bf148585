"""Kernel Stein discrepancy: whether draws could come from a density of which only the gradient is known."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyro_vi_lab.errors import ArgumentError, DataError

MAX_PAIRED_DRAWS = 2000
"""Most draws of which all pairs are taken: 32 MB for each matrix."""
SCALE_DRAWS = 500
"""Draws from whose pairs the median distance is taken."""


class Whitening(NamedTuple):
    """Location and lower-triangular (or diagonal, as a vector) scale of a guide: z = loc + scale @ eps."""

    loc: Tensor
    scale: Tensor


@dataclass(frozen=True)
class SteinCheck:
    r"""How far draws are from a density by the kernel Stein discrepancy, and whether that could be chance.

    Args:
        ksd2: Squared discrepancy, without bias: of draws from the density itself its mean is zero, and it may be
            negative.
        ksd2_se: Its standard error.
        p_value: Probability of a discrepancy as large from draws of the density itself. Any approximation that is not
            exact has a small one if there are draws enough: the size is in ``ksd2``.
        num_draws: Draws that were taken.
        length_scale: Of the kernel.
    """

    ksd2: float
    ksd2_se: float
    p_value: float
    num_draws: int
    length_scale: float

    def __repr__(self) -> str:
        return (
            f"SteinCheck(ksd2={self.ksd2:.3g} ± {self.ksd2_se:.2g}, p={self.p_value:.3g} from {self.num_draws} draws)"
        )

    def to_dict(self) -> dict[str, Any]:
        """The numbers by name."""
        return asdict(self)


def stein(
    draws: Tensor,
    scores: Tensor,
    *,
    whitening: Whitening | None = None,
    flip_probability: float = 0.5,
    num_bootstraps: int = 1000,
    seed: int = 0,
) -> SteinCheck:
    r"""Kernel Stein discrepancy of draws from the density p whose scores :math:`s = \nabla \log p` are given.

    .. math:: \mathrm{KSD}^2 = \frac1{S(S-1)} \sum_{i \ne j} u_p(z_i, z_j), \qquad
        u_p(x, y) = s(x)^\top s(y)\, k + s(x)^\top \nabla_y k + s(y)^\top \nabla_x k
        + \operatorname{tr} \nabla_x \nabla_y k

    with the inverse multiquadric kernel :math:`k(x, y) = (1 + \|x - y\|^2 / \ell^2)^{-1/2}`, whose discrepancy goes to
    zero only where the draws converge to p; ℓ is the median distance of two draws. The normalization of p is not
    needed. Under the null hypothesis that the draws are from p, the sum has the distribution of
    :math:`\sum_{i \ne j} \epsilon_i \epsilon_j u_p(z_i, z_j)` with random signs ε given the draws (wild bootstrap).

    In the coordinates of the guide's own noise, :math:`\epsilon = L^{-1}(z - m)` with scores :math:`L^\top s`, the
    result does not depend on the units of the parameters.

    Args:
        draws: Draws on the unconstrained scale; of more than 2,000, evenly spread ones are taken.
        scores: Gradient of the model's log density at them.
        whitening: Location and scale of the guide; by default the coordinates are those of the draws.
        flip_probability: Probability that the sign changes from one draw to the next: 1/2 for independent draws, less
            for those of a chain (about one over its autocorrelation time).
        num_bootstraps: Random signs, for a p-value in steps of one over it.
        seed: Seed of the signs.

    Shape:
        draws and scores ``(S, D)``, whitening ``(D,)`` and ``(D, D)`` or ``(D,)``.

    Raises:
        ArgumentError: Shapes that disagree, or an option out of range.
        DataError: Fewer than four draws, draws that are all equal, or values that are not finite.

    References:
        Liu, Lee, Jordan 2016, "A kernelized Stein discrepancy for goodness-of-fit tests", ICML, eqs. 6 and 14.
        Chwialkowski, Strathmann, Gretton 2016, "A kernel test of goodness of fit", ICML, Section 3.
        Gorham, Mackey 2017, "Measuring sample quality with kernels", ICML, Theorem 8.

    Example:
        >>> z = torch.randn(500, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        >>> stein(z, -z).p_value > 0.05  # standard normal draws against a standard normal
        True
        >>> stein(z, -z / 4).p_value  # against one that is twice as wide
        0.000999000999000999
    """
    _check(draws, scores, flip_probability, num_bootstraps)
    step = math.ceil(len(draws) / MAX_PAIRED_DRAWS)
    z, s = (value.detach()[::step].double() for value in (draws, scores))
    if whitening is not None:
        z, s = _whitened(z, s, whitening)
    length = _median_distance(z)
    kernel = stein_kernel(z, s, length)
    number = len(z)
    kernel.fill_diagonal_(0.0)
    statistic = float(kernel.sum()) / (number * (number - 1))
    rows = kernel.sum(1) / (number - 1)
    generator = torch.Generator().manual_seed(seed)
    signs = _signs(num_bootstraps, number, flip_probability, generator).to(kernel)
    null = ((signs @ kernel) * signs).sum(1) / (number * (number - 1))
    # the first-order part of the error vanishes where the draws are from p: then the null distribution has it all
    error = math.hypot(2 * float(rows.std()) / math.sqrt(number), float(null.std()))
    return SteinCheck(
        ksd2=statistic,
        ksd2_se=error,
        p_value=float(1 + (null >= statistic).sum()) / (1 + num_bootstraps),
        num_draws=number,
        length_scale=length,
    )


def stein_kernel(draws: Tensor, scores: Tensor, length_scale: float) -> Tensor:
    r"""The Stein kernel :math:`u_p` of all pairs of draws, ``(S, S)``, of an inverse multiquadric kernel.

    With :math:`r = x - y` and :math:`t = 1 + \|r\|^2/\ell^2`,

    .. math:: u_p = s_x^\top s_y\, t^{-1/2} + \big((s_x - s_y)^\top r + D\big)\, \ell^{-2} t^{-3/2}
              - 3 \|r\|^2 \ell^{-4} t^{-5/2} .
    """
    square = length_scale**2
    distance = torch.cdist(draws, draws, compute_mode="donot_use_mm_for_euclid_dist").square()
    base = 1 + distance / square
    along = scores @ draws.T
    own = along.diagonal()
    # (s_x - s_y)ᵀ(x - y), pair by pair
    turn = own[:, None] + own[None, :] - along - along.T
    return (
        (scores @ scores.T) * base.pow(-0.5)
        + (turn + draws.shape[-1]) / square * base.pow(-1.5)
        - 3 * distance / square**2 * base.pow(-2.5)
    )


def _check(draws: Tensor, scores: Tensor, flip_probability: float, num_bootstraps: int) -> None:
    if draws.dim() != 2 or draws.shape != scores.shape:
        raise ArgumentError(
            f"draws have shape {tuple(draws.shape)} and scores {tuple(scores.shape)}; both must be (draws, dimensions)"
        )
    if len(draws) < 4:
        raise DataError(f"the kernel Stein discrepancy needs at least 4 draws, got {len(draws)}")
    if not 0 < flip_probability <= 0.5:
        raise ArgumentError(f"flip_probability must lie in (0, 0.5], got {flip_probability!r}")
    if num_bootstraps < 20:
        raise ArgumentError(f"num_bootstraps must be at least 20, got {num_bootstraps!r}")
    for name, value in (("draws", draws), ("scores", scores)):
        bad = ~torch.isfinite(value).all(1)
        if count := int(bad.sum()):
            raise DataError(
                f"{count} of {len(value)} {name} are not finite, the first is number {int(bad.nonzero()[0])}; where "
                "the model's density is zero it has no score: take a guide on the support of the model"
            )


def _whitened(draws: Tensor, scores: Tensor, whitening: Whitening) -> tuple[Tensor, Tensor]:
    loc, scale = (value.detach().to(draws) for value in whitening)
    if scale.dim() == 1:
        return (draws - loc) / scale, scores * scale
    return torch.linalg.solve_triangular(scale, (draws - loc).T, upper=False).T, scores @ scale


def _median_distance(draws: Tensor) -> float:
    some = draws[:: math.ceil(len(draws) / SCALE_DRAWS)]
    median = float(torch.nn.functional.pdist(some).median())
    if not median > 0:
        raise DataError("more than half of the draws are equal: they are no sample of a continuous distribution")
    return median


def _signs(number: int, length: int, flip_probability: float, generator: torch.Generator) -> Tensor:
    """Random signs ``(number, length)`` that change from one draw to the next with the given probability."""
    flips = torch.rand(number, length, generator=generator) < flip_probability
    flips[:, 0] = torch.rand(number, generator=generator) < 0.5
    return 1 - 2 * (flips.long().cumsum(1) % 2)
