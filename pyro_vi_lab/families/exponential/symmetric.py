"""Symmetric matrices as vectors, and Cholesky factors of them and of their inverses."""

from __future__ import annotations

import torch
from torch import Tensor


def packed(dim: int) -> int:
    """Numbers in a triangle."""
    return dim * (dim + 1) // 2


def pack(matrix: Tensor) -> Tensor:
    """The lower triangle, row by row: ``(*B, D, D)`` to ``(*B, D(D+1)/2)``."""
    row, column = torch.tril_indices(matrix.shape[-1], matrix.shape[-1], device=matrix.device)
    return matrix[..., row, column]


def unpack_tril(vector: Tensor, dim: int) -> Tensor:
    """The lower triangular matrix of a packed triangle."""
    row, column = torch.tril_indices(dim, dim, device=vector.device)
    index = torch.zeros(dim, dim, dtype=torch.long, device=vector.device)
    index[row, column] = torch.arange(len(row), device=vector.device)
    return vector[..., index].tril()


def unpack(vector: Tensor, dim: int) -> Tensor:
    """The symmetric matrix of a packed triangle."""
    tril = unpack_tril(vector, dim)
    return tril + tril.tril(-1).mT


def pack_dual(matrix: Tensor) -> Tensor:
    """The vector whose product with a packed X is the trace of ``matrix`` times X."""
    return pack(matrix.tril() + matrix.tril(-1))


def unpack_dual(vector: Tensor, dim: int) -> Tensor:
    """The inverse of :func:`pack_dual`."""
    tril = unpack_tril(vector, dim)
    return (tril + tril.mT) / 2


def symmetric(matrix: Tensor) -> Tensor:
    """The symmetric part."""
    return (matrix + matrix.mT) / 2


def factor_of_inverse(matrix: Tensor) -> Tensor:
    """Lower Cholesky factor of the inverse of a positive definite matrix, without the inverse."""
    flipped = torch.linalg.cholesky(matrix.flip((-2, -1))).flip((-2, -1)).mT  # lower triangular, Λ = UᵀU
    identity = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    return torch.linalg.solve_triangular(flipped, identity.expand_as(matrix), upper=False)


def log_det_of_tril(tril: Tensor) -> Tensor:
    """Log determinant of L Lᵀ."""
    return 2 * tril.diagonal(dim1=-2, dim2=-1).log().sum(-1)


def unconstrain_tril(tril: Tensor) -> Tensor:
    """A Cholesky factor as real numbers: its diagonal in logs, packed."""
    return pack(tril.tril(-1) + torch.diag_embed(tril.diagonal(dim1=-2, dim2=-1).log()))


def constrain_tril(vector: Tensor, dim: int) -> Tensor:
    """The inverse of :func:`unconstrain_tril`."""
    tril = unpack_tril(vector, dim)
    return tril.tril(-1) + torch.diag_embed(tril.diagonal(dim1=-2, dim2=-1).exp())
