"""A scale operator of dense blocks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from pyro_vi_lab.families.scale import Dense, Scale

_DENSE = Dense()


@dataclass(frozen=True)
class BlockDiagonal(Scale):
    """σ of lower triangular blocks with positive diagonals, of shape ``(*R, B, b, b)``; b is the size of the largest.

    Smaller blocks are filled up with rows of the identity, on which nothing depends.

    Args:
        blocks: The coordinates of each block; every coordinate is in exactly one.

    Raises:
        ValueError: A coordinate is in no block or in two.
    """

    blocks: tuple[tuple[int, ...], ...]

    def __post_init__(self) -> None:
        coordinates = sorted(i for block in self.blocks for i in block)
        if not coordinates or coordinates != list(range(len(coordinates))):
            raise ValueError(f"every coordinate has to be in exactly one block, got {self.blocks}")

    @property
    def dim(self) -> int:
        """Number of coordinates, D."""
        return sum(map(len, self.blocks))

    @cached_property
    def _index(self) -> Tensor:
        """Coordinate of each place ``(B·b)``; D where there is none."""
        size = max(map(len, self.blocks))
        rows: list[Sequence[int]] = [[*sorted(block), *[self.dim] * (size - len(block))] for block in self.blocks]
        return torch.tensor(rows).flatten()

    @cached_property
    def _place(self) -> Tensor:
        """Place of each coordinate ``(D)`` among ``B·b``."""
        place = torch.empty(self.dim + 1, dtype=torch.long)
        place[self._index] = torch.arange(len(self._index))
        return place[:-1]

    def _split(self, x: Tensor) -> Tensor:
        """``(..., D)`` to ``(..., B, b)``, zero where there is no coordinate."""
        padded = torch.nn.functional.pad(x, (0, 1))
        return padded[..., self._index.to(x.device)].unflatten(-1, (len(self.blocks), -1))

    def _join(self, x: Tensor) -> Tensor:
        """``(..., B, b)`` to ``(..., D)``."""
        return x.flatten(-2)[..., self._place.to(x.device)]

    def multiply(self, scale: Tensor, x: Tensor) -> Tensor:
        """L·x in every block."""
        return self._join(_DENSE.multiply(scale, self._split(x)))

    def multiply_transposed(self, scale: Tensor, x: Tensor) -> Tensor:
        """Lᵀ·x in every block."""
        return self._join(_DENSE.multiply_transposed(scale, self._split(x)))

    def solve(self, scale: Tensor, x: Tensor) -> Tensor:
        """L⁻¹·x in every block."""
        return self._join(_DENSE.solve(scale, self._split(x)))

    def log_det(self, scale: Tensor) -> Tensor:
        """Σ log of the diagonals."""
        return _DENSE.log_det(scale).sum(-1)

    def tril(self, scale: Tensor) -> Tensor:
        """The whole lower triangular matrix, ``(*R, D, D)``: blocks keep the order of their coordinates."""
        identity = torch.eye(self.dim, dtype=scale.dtype, device=scale.device)
        return self.multiply(scale.unsqueeze(0), identity.reshape(self.dim, *(1,) * (scale.dim() - 3), -1)).movedim(
            0, -1
        )

    def covariance(self, scale: Tensor) -> Tensor:
        """LLᵀ, zero between blocks."""
        tril = self.tril(scale)
        return tril @ tril.mT

    def variance(self, scale: Tensor) -> Tensor:
        """Row sums of L²."""
        return self._join(_DENSE.variance(scale))

    def isotropic(self, dim: int, size: float, *, batch: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """L = size·I, and one in places without a coordinate."""
        diagonal = torch.where(self._index < self.dim, size, 1.0).to(dtype).unflatten(0, (len(self.blocks), -1))
        return torch.diag_embed(diagonal).expand(*batch, -1, -1, -1).clone()

    def inner(self, one: Tensor, two: Tensor) -> Tensor:
        """Sum of products."""
        return (one * two).sum((-3, -2, -1))

    def diagonal(self, stretch: Tensor) -> Tensor:
        """The diagonals."""
        return self._join(stretch.diagonal(dim1=-2, dim2=-1))

    def add_to_diagonal(self, stretch: Tensor, number: Tensor) -> Tensor:
        """Plus the number times the identity, where there are coordinates."""
        ones = self._split(torch.ones(self.dim, dtype=stretch.dtype, device=stretch.device))
        return stretch + number[..., None, None, None] * torch.diag_embed(ones)

    def apply(self, stretch: Tensor, x: Tensor) -> Tensor:
        """M·x in every block."""
        return self._join(_DENSE.apply(stretch, self._split(x)))

    def part(self, matrix: Tensor) -> Tensor:
        """The blocks of the matrix."""
        columns = self._split(matrix)  # (*R, D, B, b)
        both = self._split(columns.movedim(-3, -1))  # (*R, B, b, B, b), the latter of rows
        return both.diagonal(dim1=-4, dim2=-2).movedim(-1, -3).mT

    def mean_outer(self, x: Tensor, y: Tensor) -> Tensor:
        """Symmetric parts of the means of xyᵀ in every block."""
        return _DENSE.mean_outer(self._split(x), self._split(y))

    def noise(self, x: Tensor, y: Tensor) -> Tensor:
        """As of dense stretches, summed over the blocks."""
        return _DENSE.noise(self._split(x), self._split(y)).sum(-1)

    def whitened_gradient(self, scale: Tensor, grad: Tensor) -> Tensor:
        """As of dense scales, in every block; nothing where there is no coordinate."""
        there = self._split(torch.ones(self.dim, dtype=grad.dtype, device=grad.device))
        return _DENSE.whitened_gradient(scale, grad) * there.unsqueeze(-1) * there.unsqueeze(-2)

    def decompose(self, stretch: Tensor) -> tuple[Tensor, Tensor | None]:
        """Symmetric eigenvalue decompositions; zero where there is no coordinate."""
        values, vectors = torch.linalg.eigh(stretch)
        return values.flatten(-2), vectors

    def rotate(self, vectors: Tensor | None, x: Tensor) -> Tensor:
        """Uᵀ·x in every block."""
        return _DENSE.rotate(vectors, self._split(x)).flatten(-2)

    def rotate_back(self, vectors: Tensor | None, x: Tensor, dim: int) -> Tensor:
        """U·x in every block."""
        return self._join(_DENSE.rotate_back(vectors, x.unflatten(-1, (len(self.blocks), -1)), dim))

    def move(self, scale: Tensor, values: Tensor, vectors: Tensor | None) -> Tensor:
        """As of dense scales, in every block."""
        return _DENSE.move(scale, values.unflatten(-1, (len(self.blocks), -1)), vectors)

    def trace_of_ratio(self, scale: Tensor, other: Tensor) -> Tensor:
        """‖other⁻¹L‖², without the places that hold no coordinate."""
        nowhere = len(self._index) - self.dim
        return _DENSE.trace_of_ratio(scale, other).sum(-1) - nowhere

    def fisher(self, scale: Tensor) -> tuple[Tensor, Tensor]:
        """(LLᵀ)⁻¹, and for all entries of the blocks' lower triangles, block by block."""
        loc, entries = _DENSE.fisher(scale)
        inverse = torch.zeros(*scale.shape[:-3], self.dim, self.dim, dtype=scale.dtype, device=scale.device)
        kept = []
        for number, block in enumerate(self.blocks):
            index, size = torch.tensor(sorted(block)), len(block)
            inverse[..., index.unsqueeze(-1), index] = loc[..., number, :size, :size]
            rows, columns = torch.tril_indices(scale.shape[-1], scale.shape[-1])
            inside = torch.nonzero((rows < size) & (columns < size)).squeeze(-1)
            kept.append(entries[..., number, :, :][..., inside.unsqueeze(-1), inside])
        total = sum(part.shape[-1] for part in kept)
        whole = torch.zeros(*scale.shape[:-3], total, total, dtype=scale.dtype, device=scale.device)
        position = 0
        for part in kept:
            size = part.shape[-1]
            whole[..., position : position + size, position : position + size] = part
            position += size
        return inverse, whole
