"""Log importance weights of an approximation, checked, and the tail that their moments hang on."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_vi_lab.errors import ArgumentError, DataError

MIN_DRAWS = 25
"""Fewest draws whose largest fifth, to which the Pareto distribution is fitted (Vehtari et al. 2024), has the
five values that the fit needs."""
ROUNDING_UNITS = 8
"""Log densities are taken to be known to this many units in the last place."""


class LogWeights(NamedTuple):
    """Log weights that may be minus infinity, where the model's density is zero, and are finite otherwise.

    Args:
        values: log p - log q in double precision, in the shape of the log densities.
        rounding: Spread below which they are taken to be equal.
    """

    values: Tensor
    rounding: float

    @property
    def counted(self) -> Tensor:
        """Those of positive weights, ``(n,)``."""
        flat = self.values.flatten()
        return flat[torch.isfinite(flat)]

    @property
    def support_mismatch(self) -> float:
        """Fraction of the draws at which the model's density is zero."""
        return 1 - self.counted.numel() / self.values.numel()

    @property
    def flat(self) -> Tensor:
        """All of them, ``(S,)``; those that are equal up to rounding are exactly so."""
        flat = self.values.flatten()
        return torch.where(torch.isfinite(flat), self.counted.mean(), flat) if self.equal else flat

    @property
    def equal(self) -> bool:
        """Whether all weights but those of zero are the same, up to rounding."""
        counted = self.counted
        return float(counted.max() - counted.min()) <= self.rounding


def log_weights(log_p: Tensor, log_q: Tensor) -> LogWeights:
    r"""Log importance weights :math:`\log p(z_s, \text{data}) - \log q(z_s)` of draws :math:`z_s \sim q`.

    A draw where the model's density is zero, of log density minus infinity, has weight zero: it is legitimate, and
    says that q has mass outside of the support of the posterior.

    Args:
        log_p: Log joint density of the model at draws from q; need not be normalized.
        log_q: Log density of q at the same draws.

    Shape:
        both the same.

    Raises:
        ArgumentError: The two shapes differ.
        DataError: Fewer than 25 draws, or so few of positive weight; a log density that is NaN or plus infinity, or a
            log q of minus infinity at a draw of q.

    Example:
        >>> found = log_weights(torch.tensor([0.0, -torch.inf] * 30), torch.zeros(60))
        >>> found.support_mismatch
        0.5
    """
    if log_p.shape != log_q.shape:
        raise ArgumentError(
            f"log_p has shape {tuple(log_p.shape)} and log_q {tuple(log_q.shape)}; both must be values at "
            "the same draws"
        )
    number = log_p.numel()
    if number < MIN_DRAWS:
        raise DataError(
            f"Pareto k-hat needs at least {MIN_DRAWS} draws, got {number}; draw more from the approximation"
        )
    values = (log_p.double() - log_q.double()).detach()
    bad = torch.isnan(values) | (values == math.inf)
    if count := int(bad.sum()):
        index = tuple(bad.nonzero()[0].tolist())
        raise DataError(
            f"{count} of {number} log weights (log p - log q) are not finite, the first ({float(values[index])}: log p "
            f"{float(log_p[index])}, log q {float(log_q[index])}) at index {index}; the density of the model or of the "
            "approximation cannot be computed there"
        )
    found = LogWeights(values, _rounding(log_p, log_q))
    if (left := found.counted.numel()) < MIN_DRAWS:
        raise DataError(
            f"mismatch of support: the model's density is zero at {number - left} of {number} draws of the "
            f"approximation, and the {left} others are too few for importance weights ({MIN_DRAWS}); take a guide on "
            "the support of the model"
        )
    return found


def _rounding(log_p: Tensor, log_q: Tensor) -> float:
    """Spread of log weights below which weights are equal: half their digits, or the densities' rounding."""
    eps = max(torch.finfo(value.dtype).eps if value.is_floating_point() else 0.0 for value in (log_p, log_q))
    finite = [value[torch.isfinite(value)].abs() for value in (log_p.detach(), log_q.detach())]
    largest = max(float(value.max()) if value.numel() else 0.0 for value in finite)
    return max(math.sqrt(eps), ROUNDING_UNITS * eps * largest)


def tail_size(num_draws: int) -> int:
    r"""Draws of the tail that the Pareto distribution is fitted to, :math:`\lceil\min(S/5, 3\sqrt S)\rceil`.

    References:
        Vehtari, Simpson, Gelman, Yao, Gabry 2024, "Pareto smoothed importance sampling", JMLR 25(72), eq. 14.

    Example:
        >>> tail_size(100), tail_size(10_000)
        (20, 300)
    """
    return math.ceil(min(num_draws / 5, 3 * math.sqrt(num_draws)))
