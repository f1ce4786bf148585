"""Where clusters may start: rows far from each other, and the rows nearest to each."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pyro_vi_lab.errors import DataError

MAX_LLOYD = 20
"""Most steps of k-means: it is a start, not a result."""


def spread_rows(
    X: Tensor, num_clusters: int, *, num_starts: int, generator: torch.Generator, weight: Tensor | None = None
) -> Tensor:
    r"""Indices of rows far from each other, of several starts in one batch: k-means++.

    Each row is drawn with a probability proportional to its weight times its squared distance from the nearest row
    that was drawn before; of a few such draws the one that leaves the least sum of these is kept.

    Args:
        X: Rows, in coordinates in which distances mean something.
        num_clusters: K.
        num_starts: R.
        generator: Of the random numbers.
        weight: Of each row; one by default.

    Shape:
        X ``(N, D)``, weight ``(N,)``, result ``(R, K)``.

    Raises:
        DataError: There are fewer different rows than clusters.

    References:
        Arthur & Vassilvitskii 2007, "k-means++: the advantages of careful seeding", SODA; Grunau, Özüdoğru, Rozhoň &
        Tětek 2023, "A nearly tight analysis of greedy k-means++", SODA, for the choice among several draws.
    """
    w = torch.ones_like(X[:, 0]) if weight is None else weight
    squares, num_trials = X.square().sum(1), 2 + int(math.log(num_clusters))
    nearest = X.new_full((num_starts, len(X)), math.inf)
    chosen = _drawn(w.expand(num_starts, -1), generator, 1)[:, 0]
    result = [chosen]
    for k in range(num_clusters):
        if k > 0:
            mass = nearest * w
            if not bool((mass.sum(1) > 0).all()):
                raise DataError(
                    f"X has {k} different row(s) (of {len(X)}, with positive weights), fewer than "
                    f"num_components={num_clusters}: take fewer components"
                )
            trials = _drawn(mass, generator, num_trials)
            after = [torch.minimum(nearest, _distances(X, squares, one)) for one in trials.unbind(1)]
            best = torch.stack([one @ w for one in after], 1).argmin(1)
            each = torch.arange(num_starts, device=X.device)
            nearest = torch.stack(after)[best, each]
            result.append(trials[each, best])
        else:
            nearest = _distances(X, squares, chosen)
    return torch.stack(result, 1)


def _distances(X: Tensor, squares: Tensor, chosen: Tensor) -> Tensor:
    """Squared distances of all rows from some, ``(R, N)``; of equal rows zero, where rounding is left."""
    distance = squares + squares[chosen, None] - 2 * X[chosen] @ X.mT
    floor = 8 * X.shape[1] * torch.finfo(X.dtype).eps * (squares + squares[chosen, None])
    return torch.where(distance > floor, distance, 0.0)


def nearest_center(X: Tensor, centers: Tensor) -> Tensor:
    """Index of the center nearest to each row, ``(N,)``."""
    return (centers.square().sum(1) / 2 - X @ centers.mT).argmin(1)


def lloyd(X: Tensor, centers: Tensor, *, weight: Tensor | None = None, max_steps: int = MAX_LLOYD) -> Tensor:
    """Labels of the rows after some steps of k-means; a cluster that loses its rows keeps its center.

    Shape:
        X ``(N, D)``, centers ``(K, D)``, weight ``(N,)``, result ``(N,)``.
    """
    labels = nearest_center(X, centers)
    for _ in range(max_steps):
        w = torch.ones_like(X[:, 0]) if weight is None else weight
        counts = X.new_zeros(len(centers)).index_add_(0, labels, w)
        sums = torch.zeros_like(centers).index_add_(0, labels, X * w[:, None])
        centers = torch.where(
            (counts > 0)[:, None], sums / counts.clamp_min(torch.finfo(X.dtype).tiny)[:, None], centers
        )
        before, labels = labels, nearest_center(X, centers)
        if torch.equal(before, labels):
            break
    return labels


def _drawn(mass: Tensor, generator: torch.Generator, number: int) -> Tensor:
    """Indices for each row of masses, ``(R, number)``; ``torch.multinomial`` takes at most 2²⁴ of them."""
    sums = mass.cumsum(1)
    at = torch.rand(len(mass), number, generator=generator, dtype=mass.dtype).to(mass.device) * sums[:, -1:]
    # the first sum above: never a row without mass
    return torch.searchsorted(sums, at, right=True).clamp_max(mass.shape[1] - 1)
