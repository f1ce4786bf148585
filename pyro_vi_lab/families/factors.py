"""The diagonal plus a matrix of low rank that is nearest to a covariance."""

from __future__ import annotations

import torch
from torch import Tensor

STARTS = 8
"""Random starts beside the conditional variances: of some matrices one start in three finds the best optimum."""
ITERATIONS = 100
NEGLIGIBLE = 1e-5
"""Nats per iteration below which the best start has settled."""
SMALLEST = 1e-3
"""Least share of a conditional variance that is left to the diagonal, where the columns could explain all of it."""
SHORTEST = 0.03
"""Least length of a column in units of s, so that one that is not needed here can still grow elsewhere."""


def low_rank_approximation(precision: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    r"""Minimize KL(N(0, diag(s²) + UUᵀ) ‖ N(0, P⁻¹)) over s and the D × r matrix U.

    Where s is given, the best :math:`U = SWB` has the eigenvectors W of the r smallest eigenvalues
    :math:`a_j < 1` of :math:`SPS`, and :math:`B = \operatorname{diag}(1/a_j - 1)^{1/2}`. What is left is a function
    of s alone, whose gradient is zero where :math:`P_{ii} s_i^2 = 1 - \sum_j (1 - a_j) W_{ij}^2`: this is iterated from
    several starts, as there may be several optima.

    Args:
        precision: P.
        rank: r.

    Shape:
        precision ``(*R, D, D)``; s ``(*R, D)``, U ``(*R, D, r)`` with short columns where r is more than needed.

    References:
        Jöreskog 1967, "Some contributions to maximum likelihood factor analysis", Psychometrika 32 (the same with
        the Kullback-Leibler divergence the other way round).
    """
    conditional = precision.diagonal(dim1=-2, dim2=-1).reciprocal()
    generator = torch.Generator().manual_seed(0)
    shares = torch.rand((STARTS, *conditional.shape), generator=generator, dtype=conditional.dtype)
    shares = torch.cat([torch.ones_like(conditional).unsqueeze(0), shares.to(conditional.device)]).clamp_min(SMALLEST)
    best = torch.full(conditional.shape[:-1], torch.inf, dtype=conditional.dtype, device=conditional.device)
    for _ in range(ITERATIONS):
        size = (conditional * shares).sqrt()
        values, vectors = _smallest(precision, size, rank)
        found = (shares.sum(-1) - shares.log().sum(-1) + (1 - values + values.log()).sum(-1)) / 2
        before, best = best, found.amin(0)
        if bool((before - best < NEGLIGIBLE).all()):
            break
        shares = (1 - ((1 - values).unsqueeze(-2) * vectors.square()).sum(-1)).clamp_min(SMALLEST)
    index = (found <= found.amin(0) + NEGLIGIBLE).int().argmax(0, keepdim=True)[..., None]  # the first of equals
    size = size.gather(0, index.expand(1, *size.shape[1:]))[0]
    values, vectors = _smallest(precision, size, rank)
    lengths = (1 / values - 1).sqrt().clamp_min(SHORTEST)
    return size, size.unsqueeze(-1) * vectors * lengths.unsqueeze(-2)


def _smallest(precision: Tensor, size: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The ``rank`` smallest eigenvalues of SPS, at most 1, and their vectors."""
    values, vectors = torch.linalg.eigh(size.unsqueeze(-1) * precision * size.unsqueeze(-2))
    smallest = torch.finfo(values.dtype).eps
    return values[..., :rank].clamp(smallest, 1.0), vectors[..., :rank]
