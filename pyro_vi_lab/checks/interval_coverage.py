"""How much of a reference the central intervals of an approximation hold."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pyro_vi_lab import arviz_bridge
from pyro_vi_lab.checks.scalars import MIN_HALF, common_scalars, halves
from pyro_vi_lab.errors import ArgumentError, DataError
from pyro_vi_lab.posterior import Posterior

Array = NDArray[Any]

LEVELS = (0.5, 0.8, 0.95)


class LevelCoverage(NamedTuple):
    """Coverage of the intervals of one level, ``(P,)`` each.

    Args:
        value: Share of the reference's draws inside.
        se: Its standard error: of both sets of draws.
        noise: How far the coverage of a half of the reference by the intervals of the other is from the level.
    """

    value: Array
    se: Array
    noise: Array


@dataclass(frozen=True, eq=False)
class IntervalCoverage:
    """Coverage of central intervals.

    Args:
        parameters: Names of the scalars.
        levels: Level to its coverage.
    """

    parameters: tuple[str, ...]
    levels: Mapping[float, LevelCoverage]


def interval_coverage(
    reference: Posterior, approximation: Posterior, *, levels: tuple[float, ...] = LEVELS
) -> IntervalCoverage:
    """Probability, under the reference, of the approximation's central intervals.

    Args:
        reference: Draws to compare against.
        approximation: Draws to judge.
        levels: Probabilities of the intervals under the approximation.

    Raises:
        ArgumentError: A level that is no probability strictly between 0 and 1.
        DataError: As :func:`~pyro_vi_lab.checks.discrepancy`; fewer than 50 draws in a half of the reference or of the
            approximation, or so few of the latter that none lies beyond the ends of an interval.

    Example:
        >>> import torch
        >>> x = torch.randn(4, 1000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        >>> coverage = interval_coverage(Posterior({"x": x}), Posterior({"x": x / 2}))
        >>> round(float(coverage.levels[0.95].value[0]), 1)
        0.7
    """
    for level in levels:
        if not 0 < level < 1:
            raise ArgumentError(f"levels are probabilities between 0 and 1, got {level!r}")
    pair = common_scalars(reference, approximation)
    first, second, _ = halves(pair)
    other = pair.approximation.reshape(-1, pair.approximation.shape[-1])
    needed = int(np.ceil(2 / (1 - max(levels)) - 1e-9)) - 1
    if min(len(other), len(first)) < needed:
        raise DataError(
            f"too few draws: {min(len(other), len(first))} of the approximation or of a half of the reference; "
            f"intervals of {100 * max(levels):g} % need at least {max(needed, MIN_HALF)}, one beyond each end"
        )
    effective = _effective(pair.approximation)
    found = {}
    for level in levels:
        inside = _inside(pair.reference, other, level)
        value = inside.mean((0, 1))
        # an interval between two order statistics of n draws covers a Beta share with this variance, about
        found[level] = LevelCoverage(
            value=value,
            se=np.hypot(arviz_bridge.mcse(inside.astype(float)), np.sqrt(level * (1 - level) / effective)),
            noise=np.abs((_inside(first, second, level).mean(0) + _inside(second, first, level).mean(0)) / 2 - level),
        )
    return IntervalCoverage(pair.labels, found)


def _inside(draws: Array, others: Array, level: float) -> Array:
    low, high = np.quantile(others, [(1 - level) / 2, (1 + level) / 2], axis=0)
    return np.asarray((draws >= low) & (draws <= high))


def _effective(draws: Array) -> Array:
    """Effective number of draws of the mean, ``(P,)``."""
    error, sd = arviz_bridge.mcse(draws), draws.reshape(-1, draws.shape[-1]).std(0, ddof=1)
    number = float(draws.shape[0] * draws.shape[1])
    return np.divide(sd**2, error**2, out=np.full(len(sd), number), where=error > 0)
