"""One line per family: how to make members of it, and what its parameters and its optimum are."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_vi_lab.families import FAMILIES, Params, Tangent


class Kind(NamedTuple):
    """What a test needs to know of a family.

    Args:
        random_scale: Any scale of shape ``(*R, ...)`` from a generator.
        part_of: What the family keeps of a symmetric matrix ``(*R, D, D)``.
        to_free: The free entries of a scale, in the order of ``Scale.fisher``.
        from_free: The scale of given free entries.
        optimal_scale: The scale that is nearest in KL(q ‖ p) to a normal with this covariance.
    """

    random_scale: Callable[[torch.Generator, tuple[int, ...], int], Tensor]
    part_of: Callable[[Tensor], Tensor]
    to_free: Callable[[Tensor], Tensor]
    from_free: Callable[[Tensor, int], Tensor]
    optimal_scale: Callable[[Tensor], Tensor]


def normal(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def lower_triangle(generator: torch.Generator, batch: tuple[int, ...], dim: int) -> Tensor:
    matrix = normal(generator, *batch, dim, dim) / dim**0.5
    return matrix.tril(-1) + torch.diag_embed(normal(generator, *batch, dim).mul(0.5).exp())


def lower_entries(scale: Tensor) -> Tensor:
    rows, columns = torch.tril_indices(*scale.shape[-2:])
    return scale[..., rows, columns]


def from_lower_entries(entries: Tensor, dim: int) -> Tensor:
    rows, columns = torch.tril_indices(dim, dim)
    basis = torch.zeros(len(rows), dim, dim, dtype=entries.dtype)
    basis[torch.arange(len(rows)), rows, columns] = 1
    return torch.einsum("...p,pij->...ij", entries, basis)


KINDS: dict[str, Kind] = {
    "mean_field": Kind(
        random_scale=lambda generator, batch, dim: normal(generator, *batch, dim).mul(0.5).exp(),
        part_of=lambda matrix: matrix.diagonal(dim1=-2, dim2=-1),
        to_free=lambda scale: scale,
        from_free=lambda entries, _: entries,
        optimal_scale=lambda covariance: covariance.inverse().diagonal(dim1=-2, dim2=-1).rsqrt(),
    ),
    "full_rank": Kind(
        random_scale=lower_triangle,
        part_of=lambda matrix: matrix,
        to_free=lower_entries,
        from_free=from_lower_entries,
        optimal_scale=torch.linalg.cholesky,
    ),
}


def member(name: str, *, batch: tuple[int, ...] = (), dim: int = 3, seed: int = 0) -> Params:
    """Any member of a family."""
    generator = torch.Generator().manual_seed(seed)
    return Params(normal(generator, *batch, dim), KINDS[name].random_scale(generator, batch, dim))


def tangent(name: str, *, batch: tuple[int, ...] = (), dim: int = 3, seed: int = 0, curved: bool = False) -> Tangent:
    """Any natural gradient of a family; with ``curved`` the location has its own curvature where it can."""
    generator = torch.Generator().manual_seed(seed)
    matrix = normal(generator, *batch, dim, dim)
    matrix = (matrix + matrix.mT) / 2
    stretch = KINDS[name].part_of(matrix)
    return Tangent(normal(generator, *batch, dim), stretch, matrix if curved and stretch.dim() < matrix.dim() else None)


def to_vector(name: str, params: Params) -> Tensor:
    """Location and free entries of the scale, as ``Family.fisher`` orders them."""
    return torch.cat([params.loc, KINDS[name].to_free(params.scale)], -1)


def from_vector(name: str, vector: Tensor, dim: int) -> Params:
    return Params(vector[..., :dim], KINDS[name].from_free(vector[..., dim:], dim))


assert KINDS.keys() == FAMILIES.keys()
