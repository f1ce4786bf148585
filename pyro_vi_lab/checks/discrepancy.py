"""How far the draws of an approximation are from those of a reference, scalar by scalar."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pyro_vi_lab import arviz_bridge
from pyro_vi_lab.checks.scalars import common_scalars
from pyro_vi_lab.posterior import Posterior

Array = NDArray[Any]


class DiscrepancySummary(NamedTuple):
    """The worst of a :class:`Discrepancy`, with the names of the parameters."""

    max_mean_shift: float
    worst_mean_parameter: str
    min_sd_ratio: float
    min_sd_parameter: str
    max_sd_ratio: float
    max_sd_parameter: str


@dataclass(frozen=True, eq=False)
class Discrepancy:
    """Differences of an approximation from a reference; one entry per scalar parameter in every array.

    Args:
        parameters: Names, ``"theta[3]"``.
        reference_mean: Mean of the reference.
        reference_sd: Standard deviation of the reference.
        mean: Mean of the approximation.
        sd: Standard deviation of the approximation.
        mean_shift: (mean - reference mean) / reference sd.
        mean_shift_mcse: Monte Carlo standard error of ``mean_shift``.
        sd_ratio: sd / reference sd.
        sd_ratio_mcse: Monte Carlo standard error of ``sd_ratio``.
        wasserstein: 1-Wasserstein distance between the marginals / reference sd.
        wasserstein_noise: What ``wasserstein`` comes to, on average, between draws of one and the same
            distribution.
        constant: Names of scalars that were left out because they are the same constant in both, such as the
            zeros of a Cholesky factor.
        missing: Names of sites that only one of the two has.
    """

    parameters: tuple[str, ...]
    reference_mean: Array
    reference_sd: Array
    mean: Array
    sd: Array
    mean_shift: Array
    mean_shift_mcse: Array
    sd_ratio: Array
    sd_ratio_mcse: Array
    wasserstein: Array
    wasserstein_noise: Array
    constant: tuple[str, ...]
    missing: tuple[str, ...]

    def summary(self) -> DiscrepancySummary:
        """Largest absolute mean shift, smallest and largest sd ratio."""
        shift, low, high = (
            int(np.abs(self.mean_shift).argmax()),
            int(self.sd_ratio.argmin()),
            int(self.sd_ratio.argmax()),
        )
        return DiscrepancySummary(
            max_mean_shift=float(abs(self.mean_shift[shift])),
            worst_mean_parameter=self.parameters[shift],
            min_sd_ratio=float(self.sd_ratio[low]),
            min_sd_parameter=self.parameters[low],
            max_sd_ratio=float(self.sd_ratio[high]),
            max_sd_parameter=self.parameters[high],
        )


def discrepancy(reference: Posterior, approximation: Posterior) -> Discrepancy:
    r"""Mean shift, sd ratio and 1-Wasserstein distance of every scalar, in reference standard deviations.

    With means :math:`m`, standard deviations :math:`s` and distribution functions :math:`F` of reference (1)
    and approximation (2),

    .. math:: d = \frac{m_2 - m_1}{s_1}, \qquad r = \frac{s_2}{s_1}, \qquad
              W = \frac1{s_1} \int |F_2^{-1}(t) - F_1^{-1}(t)| \, dt .

    The errors of d and r are those of both sets of draws, to first order (delta method): a draw x of the
    reference, at :math:`u = (x - m_1)/s_1`, moves d by :math:`-u - d(u^2-1)/2` and r by :math:`-r(u^2-1)/2`;
    a draw y of the approximation, at :math:`v = (y - m_2)/s_1`, moves d by v and r by :math:`(v^2-r^2)/2r`.
    The Monte Carlo standard errors of the means of these take the autocorrelation of the chains into account.

    W of finite draws is never zero. Its noise is what W comes to where the approximation is right and has as
    many draws as it has,

    .. math:: \frac1{s_1} \Big[ \frac{h^2}{4C}
              + \frac{2}{\pi n_2} \Big(\int \sqrt{F_1(1-F_1)}\Big)^2 \Big]^{1/2} .

    The first term is the share of the reference: h is the distance between the first and the second half of a
    chain, averaged over its C chains; distances fall with the square root of the number of draws. The second
    is the expected distance of :math:`n_2` independent draws from their distribution, with the effective
    sample size of the approximation's mean for :math:`n_2`: too much by up to a third where its draws are
    strongly correlated.

    Sites that only one of the two has are passed over and listed. A scalar that is constant in the reference,
    where no distance can be measured in its standard deviations, is left out if it is the same constant in
    the approximation.

    Args:
        reference: Draws to compare against.
        approximation: Draws to judge.

    Raises:
        DataError: No common site; sites whose shapes disagree; values that are not finite; a scalar that is
            constant in the reference and not in the approximation; fewer than four draws per chain.

    References:
        Vehtari, Gelman, Simpson, Carpenter, Bürkner 2021, "Rank-normalization, folding, and localization",
        Bayesian Analysis 16(2), Section 3 (effective sample size). del Barrio, Giné, Matrán 1999, "Central
        limit theorems for the Wasserstein distance between the empirical and the true distributions", Annals
        of Probability 27(2) (expected distance).

    Example:
        >>> import torch
        >>> draws = torch.linspace(-1, 1, 100, dtype=torch.float64).reshape(1, 100)
        >>> reference, moved = Posterior({"mu": draws}), Posterior({"mu": draws + draws.std()})
        >>> round(discrepancy(reference, moved).summary().max_mean_shift, 6)
        1.0
    """
    pair = common_scalars(reference, approximation)
    return Discrepancy(
        parameters=pair.labels,
        **_compare(pair.reference, pair.approximation),
        constant=pair.constant,
        missing=pair.missing,
    )


def _compare(x: Array, y: Array) -> dict[str, Array]:
    """The arrays of a :class:`Discrepancy` for reference draws ``(C, S, P)`` and others ``(C', S', P)``."""
    mean_x, mean_y = x.mean((0, 1)), y.mean((0, 1))
    sd_x, sd_y = _sd(x), _sd(y)
    shift, ratio = (mean_y - mean_x) / sd_x, sd_y / sd_x
    u, v = (x - mean_x) / sd_x, (y - mean_y) / sd_x
    spread_u = (u**2 - 1) / 2
    spread_v = np.divide(v**2 - ratio**2, 2 * ratio, out=np.zeros_like(v), where=np.broadcast_to(ratio > 0, v.shape))
    error_v = arviz_bridge.mcse(v)
    noise_x = _half_distance(u) / math.sqrt(4 * len(x))
    error_y = np.divide(
        error_v, ratio, out=np.zeros_like(ratio), where=ratio > 0
    )  # one over the square root of the ESS
    noise_y = math.sqrt(2 / math.pi) * error_y * _integral(u)
    return {
        "reference_mean": mean_x,
        "reference_sd": sd_x,
        "mean": mean_y,
        "sd": sd_y,
        "mean_shift": shift,
        "mean_shift_mcse": np.hypot(arviz_bridge.mcse(-u - shift * spread_u), error_v),
        "sd_ratio": ratio,
        "sd_ratio_mcse": np.hypot(ratio * arviz_bridge.mcse(spread_u), arviz_bridge.mcse(spread_v)),
        "wasserstein": _wasserstein(u, (y - mean_x) / sd_x),
        "wasserstein_noise": np.hypot(noise_x, noise_y),
    }


def _sd(draws: Array) -> Array:
    return np.asarray(draws.reshape(-1, draws.shape[-1]).std(0, ddof=1))


def _wasserstein(x: Array, y: Array) -> Array:
    from scipy.stats import wasserstein_distance

    return np.array([wasserstein_distance(x[..., i].ravel(), y[..., i].ravel()) for i in range(x.shape[-1])])


def _half_distance(x: Array) -> Array:
    """Distance between the first and the second half of a chain, averaged over chains, ``(P,)``."""
    half = x.shape[1] // 2
    return np.asarray(np.mean([_wasserstein(chain[None, :half], chain[None, half : 2 * half]) for chain in x], axis=0))


def _integral(x: Array) -> Array:
    r""":math:`\int \sqrt{F(1-F)}` of the distribution function F of all draws, ``(P,)``."""
    pooled = np.sort(x.reshape(-1, x.shape[-1]), axis=0)
    below = np.arange(1, len(pooled)) / len(pooled)
    return np.asarray(np.sqrt(below * (1 - below)) @ np.diff(pooled, axis=0))
