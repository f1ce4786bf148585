"""Between positive definite matrices and the real numbers, for which torch has no bijection."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Transform, constraints


class ToPositiveDefinite(Transform):
    r"""Packed lower triangles with the diagonal in logs to positive definite matrices :math:`L L^\top`.

    .. math:: \log |\det| = D \log 2 + \sum_{i=1}^{D} (D - i + 2) \log L_{ii}

    Shape:
        x ``(*B, D(D+1)/2)``, y ``(*B, D, D)``.

    References:
        Muirhead 1982, "Aspects of Multivariate Statistical Theory", Theorem 2.1.9.

    Example:
        >>> transform = ToPositiveDefinite()
        >>> transform(torch.zeros(3))
        tensor([[1., 0.],
                [0., 1.]])
    """

    domain = constraints.real_vector
    codomain = constraints.positive_definite
    bijective = True

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ToPositiveDefinite)

    def __hash__(self) -> int:
        return hash(type(self))

    def _call(self, x: Tensor) -> Tensor:
        tril = self._tril(x)
        return tril @ tril.mT

    def _inverse(self, y: Tensor) -> Tensor:
        tril = torch.linalg.cholesky(y)
        row, column = torch.tril_indices(y.shape[-1], y.shape[-1], device=y.device)
        logs = tril.tril(-1) + torch.diag_embed(tril.diagonal(dim1=-2, dim2=-1).log())
        return logs[..., row, column]

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """Log determinant of the map to the entries of the lower triangle of y."""
        dim = y.shape[-1]
        logs = x[..., _diagonal(dim)]
        powers = torch.arange(dim, 0, -1, dtype=x.dtype, device=x.device) + 1
        return (logs * powers).sum(-1) + dim * math.log(2)

    def forward_shape(self, shape: Any) -> torch.Size:
        """``(*B, D, D)``."""
        dim = _dim(shape[-1])
        return torch.Size((*shape[:-1], dim, dim))

    def inverse_shape(self, shape: Any) -> torch.Size:
        """``(*B, D(D+1)/2)``."""
        return torch.Size((*shape[:-2], shape[-1] * (shape[-1] + 1) // 2))

    def _tril(self, x: Tensor) -> Tensor:
        dim = _dim(x.shape[-1])
        row, column = torch.tril_indices(dim, dim, device=x.device)
        place = torch.zeros(dim, dim, dtype=torch.long, device=x.device)
        place[row, column] = torch.arange(len(row), device=x.device)
        tril = x[..., place]
        return tril.tril(-1) + torch.diag_embed(tril.diagonal(dim1=-2, dim2=-1).exp())


def _dim(packed: int) -> int:
    return (math.isqrt(8 * packed + 1) - 1) // 2


def _diagonal(dim: int) -> list[int]:
    """Places of the diagonal in a packed triangle."""
    return [i * (i + 3) // 2 for i in range(dim)]
