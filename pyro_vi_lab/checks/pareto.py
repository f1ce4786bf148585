"""Pareto k-hat and effective sample size of an approximation, used as an importance sampling proposal."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_vi_lab import arviz_bridge
from pyro_vi_lab.errors import ArgumentError, DataError

MIN_DRAWS = 25
"""Fewest draws whose largest fifth, to which the Pareto distribution is fitted (Vehtari et al. 2024), has the
five values that the fit needs."""
ROUNDING_UNITS = 8
"""Log densities are taken to be known to this many units in the last place."""


@dataclass(frozen=True, eq=False)
class ImportanceCheck:
    r"""What the importance weights of an approximation say about it.

    Args:
        khat: Shape of the generalized Pareto distribution fitted to the largest weights. The weights have
            :math:`\lfloor 1/k \rfloor` finite moments; below 0.7 importance sampling from the approximation
            is practical. Minus infinity where all weights are equal, ``inf`` where too few weights count for
            a fit.
        khat_se: Standard error of ``khat``, :math:`(1 + k) / \sqrt M` with M the size of the tail that was
            fitted; zero where k-hat is infinite.
        ess: Effective number of draws after reweighting.
        ess_fraction: ``ess`` divided by the number of draws, in (0, 1].
        smoothed_log_weights: Pareto-smoothed log weights, whose exponentials sum to one.

    Shape:
        smoothed_log_weights: that of the log densities.
    """

    khat: float
    khat_se: float
    ess: float
    ess_fraction: float
    smoothed_log_weights: Tensor

    def __repr__(self) -> str:
        return (
            f"ImportanceCheck(khat={self.khat:.2f} ± {self.khat_se:.2f}, ess={self.ess:.0f} of "
            f"{self.smoothed_log_weights.numel()} draws)"
        )


def importance(log_p: Tensor, log_q: Tensor) -> ImportanceCheck:
    r"""Pareto k-hat and importance sampling effective sample size of draws from an approximation.

    .. math:: \log w_s = \log p(z_s, \text{data}) - \log q(z_s), \quad z_s \sim q, \qquad
              \mathrm{ESS} = 1 \Big/ \sum_s \tilde w_s^2

    with :math:`\tilde w` the weights after Pareto smoothing, normalized to sum to one. Where q is the
    posterior, all weights are equal (up to rounding) and there is no tail to fit: k-hat is minus infinity,
    the ESS is the number of draws. The draws of several restarts are pooled: the unnormalized weights of each
    have the same mean, the evidence.

    Args:
        log_p: Log joint density of the model at draws from q; need not be normalized.
        log_q: Log density of q at the same draws, on the same scale: both unconstrained or both constrained.

    Shape:
        both ``(S,)``, ``(C, S)`` or any other, the same; all values are pooled.

    Raises:
        ArgumentError: The two shapes differ.
        DataError: Fewer than 25 draws, or log weights that are not finite.

    References:
        Vehtari, Simpson, Gelman, Yao, Gabry 2024, "Pareto smoothed importance sampling", JMLR 25(72),
        Sections 2 and 3. Yao, Vehtari, Simpson, Gelman 2018, "Yes, but did it work?: Evaluating variational
        inference", ICML.

    Example:
        >>> z = torch.linspace(-3, 3, 100)
        >>> importance(-0.5 * z**2, -0.5 * z**2).ess_fraction
        1.0
    """
    if log_p.shape != log_q.shape:
        raise ArgumentError(
            f"log_p has shape {tuple(log_p.shape)} and log_q {tuple(log_q.shape)}; both must be values at "
            "the same draws"
        )
    num_draws = log_p.numel()
    if num_draws < MIN_DRAWS:
        raise DataError(
            f"Pareto k-hat needs at least {MIN_DRAWS} draws, got {num_draws}; draw more from the approximation"
        )
    log_weights = (log_p.double() - log_q.double()).detach()
    _check_finite(log_weights)
    if float(log_weights.max() - log_weights.min()) <= _rounding(log_p, log_q):
        equal = torch.full_like(log_weights, -math.log(num_draws))
        return ImportanceCheck(
            khat=-math.inf, khat_se=0.0, ess=float(num_draws), ess_fraction=1.0, smoothed_log_weights=equal
        )
    array, khat = arviz_bridge.psis(log_weights.flatten().numpy(force=True))
    smoothed = torch.as_tensor(array).to(log_weights).reshape(log_weights.shape)
    ess = float((-torch.logsumexp(2 * smoothed.flatten(), 0)).exp())
    return ImportanceCheck(
        khat=khat,
        khat_se=_standard_error(khat, num_draws),
        ess=ess,
        ess_fraction=ess / num_draws,
        smoothed_log_weights=smoothed,
    )


def _standard_error(khat: float, num_draws: int) -> float:
    r"""Asymptotic standard error of the shape of a generalized Pareto distribution fitted to the largest weights.

    The tail has :math:`M = \min(S/5, 3\sqrt S)` of S draws (Vehtari et al. 2024, eq. 14); the variance of the maximum
    likelihood estimate is :math:`(1 + k)^2 / M` for :math:`k > -1/2` (Smith 1987, "Estimating tails of probability
    distributions", Annals of Statistics 15).
    """
    if not math.isfinite(khat):
        return 0.0
    return max(1 + khat, 0.5) / math.sqrt(min(num_draws / 5, 3 * math.sqrt(num_draws)))


def _check_finite(log_weights: Tensor) -> None:
    bad = ~torch.isfinite(log_weights)
    if count := int(bad.sum()):
        index = tuple(bad.nonzero()[0].tolist())
        raise DataError(
            f"{count} of {log_weights.numel()} log weights (log p - log q) are not finite, the first "
            f"({float(log_weights[index])}) at index {index}; the approximation draws where the model's "
            "density is zero or cannot be computed"
        )


def _rounding(log_p: Tensor, log_q: Tensor) -> float:
    """Spread of log weights below which weights are equal: half their digits, or the densities' rounding."""
    eps = max(torch.finfo(value.dtype).eps if value.is_floating_point() else 0.0 for value in (log_p, log_q))
    largest = max(float(log_p.abs().max()), float(log_q.abs().max()))
    return max(math.sqrt(eps), ROUNDING_UNITS * eps * largest)
