r"""Simulation-based calibration: are parameters that made the data distributed as draws of the fits to these data?

Where the fits are right, the rank of a parameter among S independent draws of the fit to its data is uniform on
0, ..., S. What the ranks say is computed here; drawing, simulating and fitting is :func:`pyro_vi_lab.calibrate`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pyro_vi_lab.checks.uniformity import uniformity_p_values
from pyro_vi_lab.errors import ArgumentError, DataError

Array = NDArray[Any]

LEVELS = (0.5, 0.8, 0.95)
"""Central intervals whose coverage is measured."""
NORMAL_QUANTILE = 1.959963984540054
"""Two standard errors, nearly: the 0.975 quantile."""


class Coverage(NamedTuple):
    """How often a central interval held the parameter, and its 95 % Wilson interval, ``(P,)`` each."""

    value: Array
    lower: Array
    upper: Array


@dataclass(frozen=True, eq=False)
class CalibrationCheck:
    """What ranks say about the fits that they come from; one entry per parameter in every array.

    Args:
        parameters: Names.
        fractions: Ranks as numbers in (0, 1), ``(R, P)``: uniform where the fits are right.
        p_value: Of uniformity, from bands that hold at all points at once.
        adjusted_p_value: The same, adjusted for the number of parameters (Holm).
        symmetry_p_value: Of symmetry around one half: small where the fits are shifted to one side.
        coverage: Level of a central interval to its coverage.
        direction: In words what is wrong, ``"too narrow, shifted up"``; empty where the adjusted p-value is not below
            ``alpha``.
        alpha: Probability of a false alarm in any parameter.
    """

    parameters: tuple[str, ...]
    fractions: Array
    p_value: Array
    adjusted_p_value: Array
    symmetry_p_value: Array
    coverage: Mapping[float, Coverage]
    direction: tuple[str, ...]
    alpha: float

    @property
    def alarm(self) -> bool:
        """Whether any parameter is calibrated so badly that chance does not explain it."""
        return bool((self.adjusted_p_value < self.alpha).any())


def check_ranks(
    ranks: Array, num_draws: int, *, parameters: Sequence[str], alpha: float = 0.05, seed: int = 0
) -> CalibrationCheck:
    r"""What the ranks of P parameters in R simulations say.

    Args:
        ranks: Number of draws below the parameter that made the data, 0, ..., S.
        num_draws: S, number of draws that it was ranked among.
        parameters: Their names.
        alpha: Probability of a false alarm in any of them.
        seed: Seed of the position of a number within its rank.

    Shape:
        ranks ``(R, P)``.

    Raises:
        ArgumentError: ``alpha`` is no probability, or the names are not as many as the columns.
        DataError: Fewer than 10 simulations, or ranks outside 0, ..., S.

    References:
        Talts, Betancourt, Simpson, Vehtari & Gelman 2018, "Validating Bayesian inference algorithms with
        simulation-based calibration", arXiv:1804.06788. Yao, Vehtari, Simpson & Gelman 2018, "Yes, but did it work?:
        Evaluating variational inference", ICML, Section 3 (of variational fits). Holm 1979, "A simple sequentially
        rejective multiple test procedure", Scandinavian Journal of Statistics 6.

    Example:
        >>> rng = np.random.default_rng(0)
        >>> truth = rng.normal(size=(200, 1))
        >>> narrow = 0.5 * rng.normal(size=(200, 99, 1))
        >>> check = check_ranks(ranks_of(truth, narrow), 99, parameters=["x"])
        >>> check.alarm, check.direction
        (True, ('too narrow',))
    """
    if not 0 < alpha < 1:
        raise ArgumentError(f"alpha is a probability between 0 and 1, got {alpha!r}")
    if ranks.ndim != 2 or ranks.shape[1] != len(parameters):
        raise ArgumentError(f"ranks have shape {ranks.shape}; expected (simulations, {len(parameters)})")
    if ranks.size and not (ranks.min() >= 0 and ranks.max() <= num_draws):
        raise DataError(f"ranks among {num_draws} draws lie in 0, ..., {num_draws}; got {ranks.min()} to {ranks.max()}")
    fractions = (ranks + np.random.default_rng(seed).random(ranks.shape)) / (num_draws + 1)
    p_value = uniformity_p_values(fractions)
    adjusted = holm(p_value)
    return CalibrationCheck(
        parameters=tuple(parameters),
        fractions=fractions,
        p_value=p_value,
        adjusted_p_value=adjusted,
        symmetry_p_value=symmetry_p_values(fractions),
        coverage={level: coverage_of(fractions, level) for level in LEVELS},
        direction=tuple(direction_of(fractions[:, i]) if adjusted[i] < alpha else "" for i in range(len(parameters))),
        alpha=alpha,
    )


def ranks_of(truth: Array, draws: Array, *, seed: int = 0) -> Array:
    """Rank of each parameter among the draws of its fit; ties, as of discrete parameters, are broken at random.

    Args:
        truth: Parameters that made the data.
        draws: Draws of the fit to these data.
        seed: Seed of the random order of ties.

    Shape:
        truth ``(R, P)``, draws ``(R, S, P)``, result ``(R, P)``, whole numbers from 0 to S.

    References:
        Modrák, Moon, Kim, Bürkner, Huurre, Faltejsková, Gelman & Vehtari 2023, "Simulation-based calibration checking
        for Bayesian computation: the choice of test quantities shapes sensitivity", Bayesian Analysis, Definition 3.

    Example:
        >>> ranks_of(np.array([[0.5]]), np.array([[[0.1], [0.2], [0.9]]]))
        array([[2]])
    """
    below = (draws < truth[:, None]).sum(1)
    ties = (draws == truth[:, None]).sum(1)
    ranks: Array = below + np.random.default_rng(seed).integers(0, ties + 1)
    return ranks


def holm(p_values: Array) -> Array:
    """P-values adjusted for how many there are, so that all below α are real but for a probability of α.

    Example:
        >>> holm(np.array([0.01, 0.04, 0.03])).round(2).tolist()
        [0.03, 0.06, 0.06]
    """
    order = np.argsort(p_values)
    factors = np.arange(len(p_values), 0, -1)
    adjusted = np.empty(len(p_values))
    adjusted[order] = np.minimum(np.maximum.accumulate(factors * p_values[order]), 1)
    return adjusted


def coverage_of(fractions: Array, level: float) -> Coverage:
    """How often the central interval of probability ``level`` held the parameter: fractions ``(R, P)``.

    References:
        Wilson 1927, "Probable inference, the law of succession, and statistical inference", JASA 22.
    """
    number = len(fractions)
    value = (np.abs(fractions - 0.5) <= level / 2).mean(0)
    z2 = NORMAL_QUANTILE**2 / number
    center = (value + z2 / 2) / (1 + z2)
    half = np.sqrt(value * (1 - value) * z2 + z2**2 / 4) / (1 + z2)
    return Coverage(value, center - half, center + half)


def symmetry_p_values(fractions: Array) -> Array:
    r"""P-value of symmetry around one half, for each column.

    Yao et al. compare the distribution of the fractions u with that of :math:`1 - u` by their largest distance. Taken
    in the order of :math:`|u - 1/2|`, from the largest, the distance is that of a walk of the signs from its origin;
    where the distribution is symmetric the signs are fair coins, so the p-value is exact.

    Shape:
        fractions ``(R, P)``, result ``(P,)``.

    References:
        Yao et al. 2018, Section 3.2. Butler 1969, "A test for symmetry using the sample distribution function",
        Annals of Mathematical Statistics 40.

    Example:
        >>> u = np.linspace(0.0, 1.0, 101)[:100, None]
        >>> p = symmetry_p_values(np.concatenate([u, u**2], 1))
        >>> bool(p[0] > 0.9), bool(p[1] < 1e-3)
        (True, True)
    """
    order = np.argsort(-np.abs(fractions - 0.5), axis=0, kind="stable")
    walk = np.cumsum(np.sign(np.take_along_axis(fractions - 0.5, order, 0)), axis=0)
    farthest = np.abs(walk).max(0)
    probabilities = {reach: _walk_reaches(len(fractions), int(reach)) for reach in np.unique(farthest)}
    return np.array([probabilities[reach] for reach in farthest])


def _walk_reaches(num_steps: int, reach: int) -> float:
    """Probability that a fair walk of single steps gets at least so far from its origin."""
    if reach <= 0:
        return 1.0
    inside = np.zeros(2 * reach + 1)  # places from -reach to reach, both ends absorbing
    inside[reach] = 1.0
    left = 0.0
    for _ in range(num_steps):
        inside = (np.concatenate([inside[1:], [0.0]]) + np.concatenate([[0.0], inside[:-1]])) / 2
        left += inside[0] + inside[-1]
        inside[0] = inside[-1] = 0.0
    return min(float(left), 1.0)


def direction_of(fractions: Array) -> str:
    r"""What is wrong with fits whose fractions ``(R,)`` are not uniform, in words.

    Where posterior and fit are normal, the normal scores :math:`w = \Phi^{-1}(u)` of the fractions are normal with the
    mean :math:`-d/s` and the sd :math:`1/s`, for a fit whose mean is d posterior sds too high and whose sd is s times
    as large. A mean of w off zero, or a logarithm of its sd, by more than 1.96 standard errors, :math:`R^{-1/2}` sds
    and :math:`(2R)^{-1/2}`, is named.
    """
    from scipy.special import ndtri

    number = len(fractions)
    scores = ndtri(np.clip(fractions, 0.1 / number, 1 - 0.1 / number))  # finite, and beyond what R numbers reach
    sd = float(scores.std(ddof=1))
    words = []
    if abs(math.log(sd)) * math.sqrt(2 * number) > NORMAL_QUANTILE:
        words.append("too narrow" if sd > 1 else "too wide")
    if abs(float(scores.mean())) * math.sqrt(number) > NORMAL_QUANTILE * sd:
        # low ranks: the draws lie above what made the data
        words.append("shifted up" if scores.mean() < 0 else "shifted down")
    return ", ".join(words) or "of another shape"
