r"""Are numbers uniform on (0, 1)? Their empirical distribution function against bands that hold at all points at once.

Of N independent uniform numbers, the count below z is binomial, and the counts at :math:`z_1 < z_2 < \dots` are a
Markov chain: of the numbers that are not below :math:`z_{k-1}`, each is below :math:`z_k` with probability
:math:`(z_k - z_{k-1}) / (1 - z_{k-1})`. So the probability that all counts stay in their bands is a sum over paths,
which is exact and takes milliseconds; nothing is simulated.

References:
    Säilynoja, Bürkner & Vehtari 2022, "Graphical test for discrete uniformity and its applications in goodness-of-fit
    evaluation and multiple sample comparison", Statistics and Computing 32, Sections 2.2 and 2.3.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pyro_vi_lab.errors import ArgumentError, DataError

Array = NDArray[Any]

MAX_POINTS = 100
"""Points at which the distribution function is looked at; no more than there are numbers."""
MIN_TAIL = 1e-13
"""Tail probability below which bands are not widened: what lies beyond is less than the rounding of the sum."""
MIN_NUMBERS = 10
"""Fewest numbers of which anything but a gross deviation could be seen."""


class Band(NamedTuple):
    """Where the empirical distribution function of uniform numbers lies, at all points at once, ``(K,)`` each.

    Args:
        points: z.
        lower: Smallest value at z.
        upper: Largest value at z.
    """

    points: Array
    lower: Array
    upper: Array


def ecdf(values: Array, points: Array) -> Array:
    """Share of the values at or below each point: ``(N, ...)`` and ``(K,)`` to ``(K, ...)``."""
    shares: Array = (values[None] <= points.reshape(-1, *(1 for _ in values.shape))).mean(1)
    return shares


def ecdf_band(num_values: int, level: float = 0.95) -> Band:
    r"""The band that the empirical distribution function of N uniform numbers leaves with probability 1 - ``level``.

    At each point it is a central interval of the binomial count, with the tail probability
    :math:`\gamma` that gives all points together their level.

    Args:
        num_values: N, at least 10.
        level: Probability that all of the function lies inside; it may be a little larger, as counts are whole.

    Raises:
        ArgumentError: ``level`` is no probability strictly between 0 and 1.
        DataError: Fewer than 10 numbers.

    Example:
        >>> band = ecdf_band(200)
        >>> round(float((band.upper - band.points).max()), 2)
        0.11
    """
    if not 0 < level < 1:
        raise ArgumentError(f"level is a probability between 0 and 1, got {level!r}")
    points = evaluation_points(num_values)
    tails, gamma = _pointwise_tails(num_values), _gamma(num_values, level)
    inside = tails > gamma
    counts = np.arange(num_values + 1)
    lower = np.where(inside, counts, num_values).min(1)
    upper = np.where(inside, counts, 0).max(1)
    return Band(points, lower / num_values, upper / num_values)


def uniformity_p_values(values: Array) -> Array:
    r"""P-value of each column of independent numbers that should be uniform on (0, 1).

    The statistic is the smallest pointwise tail probability of the empirical distribution function,

    .. math:: \gamma = \min_k 2 \min\{P(B_k \le c_k),\, P(B_k \ge c_k)\}, \qquad B_k \sim \mathrm{Bin}(N, z_k),

    the p-value the probability that N uniform numbers have one at most as large: exact, whatever the points. It is
    below α where the function leaves the band of level 1 - α.

    Args:
        values: Numbers in [0, 1].

    Shape:
        ``(N, P)``, result ``(P,)``.

    Raises:
        DataError: Fewer than 10 numbers, or numbers outside [0, 1].

    Example:
        >>> even = (np.arange(100) + 0.5)[:, None] / 100
        >>> p = uniformity_p_values(np.concatenate([even, even**2], 1))
        >>> bool(p[0] > 0.99), bool(p[1] < 1e-4)
        (True, True)
    """
    if not ((values >= 0) & (values <= 1)).all():
        raise DataError("numbers that should be uniform on (0, 1) lie outside of it, or are not finite")
    num_values = len(values)
    counts = np.rint(ecdf(values, evaluation_points(num_values)) * num_values).astype(int)
    tails = _pointwise_tails(num_values)
    statistic = np.take_along_axis(tails, counts, 1).min(0)
    return tail_p_values(statistic, num_values)


def tail_p_values(statistic: Array, num_values: int) -> Array:
    """Probability that N uniform numbers have a smallest pointwise tail probability at most as large: ``(P,)`` each."""
    inside = _stays_inside(np.maximum(statistic, MIN_TAIL), num_values)
    num_points = len(evaluation_points(num_values))
    # what the sum cannot resolve lies between the largest of the pointwise probabilities and their sum
    return np.clip(1 - inside, statistic, np.minimum(num_points * statistic, 1))


def evaluation_points(num_values: int) -> Array:
    """Evenly spaced points inside (0, 1), one for each number up to a hundred."""
    if num_values < MIN_NUMBERS:
        raise DataError(f"uniformity is judged from at least {MIN_NUMBERS} numbers, got {num_values}")
    number = min(num_values, MAX_POINTS)
    return np.arange(1, number) / number


@functools.lru_cache(maxsize=32)
def _pointwise_tails(num_values: int) -> Array:
    """Twice the smaller tail probability of every count at every point, ``(K, N + 1)``."""
    from scipy.stats import binom

    counts, points = np.arange(num_values + 1), evaluation_points(num_values)[:, None]
    lower, upper = binom.cdf(counts, num_values, points), binom.sf(counts - 1, num_values, points)
    tails: Array = np.minimum(2 * np.minimum(lower, upper), 1.0)
    tails.flags.writeable = False
    return tails


@functools.lru_cache(maxsize=32)
def _gamma(num_values: int, level: float) -> float:
    """Largest pointwise tail probability whose band uniform numbers leave with probability at most 1 - level."""
    low, high = MIN_TAIL, 1.0
    for _ in range(5):  # each time the bracket shrinks to a sixteenth
        grid = np.geomspace(low, high, 17)
        good = 1 - _stays_inside(grid, num_values) <= 1 - level
        last = int(np.flatnonzero(good)[-1])
        low, high = grid[last], grid[min(last + 1, 16)]
    return float(low)


def _stays_inside(gamma: Array, num_values: int) -> Array:
    """Probability that all counts have pointwise tail probabilities above γ: ``(P,)`` to ``(P,)``."""
    from scipy.special import gammaln

    # counts that mirror each other have tails that are equal but for rounding
    allowed = _pointwise_tails(num_values)[:, None] > gamma[:, None] * (1 + 1e-9)
    log_factorial = gammaln(np.arange(num_values + 1) + 1.0)
    paths, first, before = np.ones((len(gamma), 1)), 0, 0.0
    for point, inside in zip(evaluation_points(num_values), allowed, strict=True):
        reached = np.flatnonzero(inside.any(0))
        if not len(reached):
            return np.zeros(len(gamma))
        share = (point - before) / (1 - before)
        old, new = np.arange(first, first + paths.shape[1])[:, None], np.arange(reached[0], reached[-1] + 1)[None]
        gained = np.maximum(new - old, 0)
        log_step = (
            log_factorial[num_values - old]
            - log_factorial[gained]
            - log_factorial[np.maximum(num_values - old - gained, 0)]
            + gained * np.log(share)
            + (num_values - old - gained) * np.log1p(-share)
        )
        paths = paths @ np.where(new >= old, np.exp(log_step), 0.0) * inside[:, reached[0] : reached[-1] + 1]
        first, before = int(reached[0]), float(point)
    total: Array = paths.sum(1)
    return total
