"""Distance of two joint distributions, as the mean of their distances along random directions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pyro_vi_lab.checks.scalars import NUM_BLOCKS, common_scalars, halves, left_out_errors, without_block
from pyro_vi_lab.errors import ArgumentError
from pyro_vi_lab.posterior import Posterior

Array = NDArray[Any]

CUTOFF = 1e-8
"""Smallest variance of a direction, of standardized scalars, that is not a linear dependence up to rounding."""
MAX_DRAWS = 2000
"""Draws of each set that are sorted along each direction."""


@dataclass(frozen=True)
class SlicedWasserstein:
    """Sliced 1-Wasserstein distance in units of the reference's standard deviation along each direction.

    Args:
        value: The distance, from as many draws as a half of the reference has.
        se: Its standard error, by the jackknife over blocks of draws.
        noise: What it comes to between the two halves of the reference.
        num_directions: Random directions.
        num_draws: Draws in each of the sets that were compared.
    """

    value: float
    se: float
    noise: float
    num_directions: int
    num_draws: int


def sliced_wasserstein(
    reference: Posterior, approximation: Posterior, *, num_directions: int = 100, seed: int = 0
) -> SlicedWasserstein:
    r"""Sliced Wasserstein distance after whitening, beside that of two halves of the reference.

    .. math:: \mathrm{SW}(p, q) = \mathrm{E}_{u} \int_0^1 |F^{-1}_{u^\top x}(t) - F^{-1}_{u^\top y}(t)| \, dt,
              \qquad u \text{ uniform on the sphere}

    where x and y are whitened by the covariance of the reference: a direction in which the posterior is narrow counts
    as much as any other, and units do not matter.

    Args:
        reference: Draws to compare against.
        approximation: Draws to judge.
        num_directions: Directions.
        seed: Seed of the directions.

    Raises:
        ArgumentError: No directions.
        DataError: As :func:`~pyro_vi_lab.checks.discrepancy`, or fewer than 50 draws in a half of the reference or of
            the approximation.

    References:
        Bonneel, Rabin, Peyré & Pfister 2015, "Sliced and Radon Wasserstein barycenters of measures", Journal of
        Mathematical Imaging and Vision 51.

    Example:
        >>> import torch
        >>> x = torch.randn(2, 1000, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        >>> moved = Posterior({"x": x + torch.tensor([1.0, 0.0, 0.0])})
        >>> result = sliced_wasserstein(Posterior({"x": x}), moved)
        >>> result.value > 0.3, result.noise < 0.1
        (True, True)
    """
    if num_directions < 1:
        raise ArgumentError(f"num_directions must be at least 1, got {num_directions}")
    pair = common_scalars(reference, approximation)
    whiten = whitening(pair.reference.reshape(-1, pair.reference.shape[-1]))
    first, second, other = (draws @ whiten for draws in halves(pair, MAX_DRAWS))
    directions = np.random.default_rng(seed).normal(size=(whiten.shape[1], num_directions))
    directions /= np.linalg.norm(directions, axis=0)
    first, second, other = first @ directions, second @ directions, other @ directions

    def value(*sets: Array) -> float:
        return (_distance(sets[0], sets[2]) + _distance(sets[1], sets[2])) / 2

    deleted = [value(*(without_block(draws, g) for draws in (first, second, other))) for g in range(NUM_BLOCKS)]
    return SlicedWasserstein(
        value=value(first, second, other),
        se=float(left_out_errors(np.array(deleted))),
        noise=_distance(first, second),
        num_directions=num_directions,
        num_draws=len(first),
    )


def whitening(draws: Array) -> Array:
    """A matrix ``(P, K)`` that makes draws ``(n, P)`` white; K < P where they are dependent or do not move."""
    sd = draws.std(0, ddof=1)
    sd = np.where(sd > 0, sd, np.inf)
    eigenvalues, vectors = np.linalg.eigh(np.atleast_2d(np.cov(draws / sd, rowvar=False)))
    kept = eigenvalues > CUTOFF * eigenvalues[-1]
    matrix: Array = vectors[:, kept] / np.sqrt(eigenvalues[kept]) / sd[:, None]
    return matrix


def _distance(x: Array, y: Array) -> float:
    """Mean over columns of the 1-Wasserstein distance of as many draws."""
    return float(np.abs(np.sort(x, axis=0) - np.sort(y, axis=0)).mean())
