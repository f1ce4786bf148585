"""How far the correlations of an approximation are from those of a reference."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pyro_vi_lab.checks.scalars import NUM_BLOCKS, common_scalars, halves, left_out_errors, without_block
from pyro_vi_lab.errors import DataError
from pyro_vi_lab.posterior import Posterior

Array = NDArray[Any]


@dataclass(frozen=True, eq=False)
class CorrelationError:
    """Differences of the correlations of all pairs of scalars.

    Args:
        parameters: Names of the scalars.
        difference: Correlation of the approximation minus that of the reference, of all draws, ``(P, P)``.
        largest: Largest absolute difference, from as many draws as a half of the reference has.
        largest_pair: The two scalars.
        largest_se: Standard error of the difference of this pair.
        noise: What ``largest`` comes to between the two halves of the reference.
        root_mean_square: Root of the mean of the squared differences of all pairs, from as many draws.
        root_mean_square_noise: What it comes to between the two halves.
    """

    parameters: tuple[str, ...]
    difference: Array
    largest: float
    largest_pair: tuple[str, str]
    largest_se: float
    noise: float
    root_mean_square: float
    root_mean_square_noise: float


def correlation_error(reference: Posterior, approximation: Posterior) -> CorrelationError:
    r"""Differences of correlations, beside those of two halves of the reference.

    .. math:: \Delta_{ij} = \rho_{ij}(q) - \rho_{ij}(p)

    The largest and the mean square difference of P(P-1)/2 noisy numbers are not zero where q is right; they are
    computed from as many draws as a half of the reference has, so that they can be compared with ``noise``.

    Args:
        reference: Draws to compare against.
        approximation: Draws to judge.

    Raises:
        DataError: As :func:`~pyro_vi_lab.checks.discrepancy`; fewer than two scalars; fewer than 50 draws in a half of
            the reference or of the approximation; a scalar that does not move in one of these.

    Example:
        >>> import torch
        >>> x = torch.randn(2, 500, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        >>> along = Posterior({"x": torch.stack([x[..., 0], x[..., 0] + 0.5 * x[..., 1]], -1)})
        >>> result = correlation_error(along, Posterior({"x": x}))
        >>> round(result.largest, 1), round(result.noise, 1), result.largest_pair
        (0.9, 0.0, ('x[0]', 'x[1]'))
    """
    pair = common_scalars(reference, approximation)
    if len(pair.labels) < 2:
        raise DataError(f"a correlation needs two scalars; the posteriors have {pair.labels[0]} in common")
    first, second, other = halves(pair)
    _check_moves(other, pair.labels, "approximation")
    _check_moves(first, pair.labels, "reference")
    _check_moves(second, pair.labels, "reference")
    upper = np.triu_indices(len(pair.labels), 1)
    one, two, three = (np.corrcoef(draws, rowvar=False)[upper] for draws in (first, second, other))
    worst = int(np.maximum(np.abs(three - one), np.abs(three - two)).argmax())
    i, j = int(upper[0][worst]), int(upper[1][worst])
    both = np.concatenate([first, second])
    errors = [
        left_out_errors(
            np.array([np.corrcoef(without_block(draws[:, [i, j]], g), rowvar=False)[0, 1] for g in range(NUM_BLOCKS)])
        )
        for draws in (both, other)
    ]
    flat = [draws.reshape(-1, draws.shape[-1]) for draws in (pair.reference, pair.approximation)]
    before, after = (np.corrcoef(draws, rowvar=False) for draws in flat)
    return CorrelationError(
        parameters=pair.labels,
        difference=after - before,
        largest=float((np.abs(three - one).max() + np.abs(three - two).max()) / 2),
        largest_pair=(pair.labels[i], pair.labels[j]),
        largest_se=float(np.hypot(*errors)),
        noise=float(np.abs(two - one).max()),
        root_mean_square=float(np.sqrt((((three - one) ** 2).mean() + ((three - two) ** 2).mean()) / 2)),
        root_mean_square_noise=float(np.sqrt(((two - one) ** 2).mean())),
    )


def _check_moves(draws: Array, labels: tuple[str, ...], role: str) -> None:
    still = np.flatnonzero(np.ptp(draws, axis=0) == 0)
    if len(still):
        raise DataError(f"{labels[still[0]]} does not move in a half of the draws of the {role}: it has no correlation")
