r"""Scale operators σ: the linear map from ε to z - μ, and how a natural step moves it.

A step is described in *whitened* coordinates, in which the present q is N(0, I): the new precision there is

.. math:: P = \varphi(\rho M), \qquad
          \varphi(x) = \begin{cases} 1 - x & x \le \tfrac12 \\ \tfrac12 e^{1 - 2x} & x > \tfrac12 \end{cases}

applied to the eigenvalues of the symmetric :math:`M`. For :math:`x \le 1/2` this is the exact natural step of the
precision, :math:`(1 - \rho) P + \rho\, E[-\nabla^2 \log p]` in whitened coordinates, so a full step
(:math:`\rho = 1`) is exact for a Gaussian target. Beyond, where that line would leave the positive-definite cone,
:math:`\varphi` goes on as an exponential with the same value and slope: it is positive for every step, so no step can
leave the cone.

References:
    Khan & Rue 2023, "The Bayesian learning rule", JMLR 24, eq. 12 (natural step of the precision). Lin, Schmidt &
    Khan 2020, "Handling the positive-definite constraint in the Bayesian learning rule", ICML (retractions
    that stay in the cone).
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor


def retract(x: Tensor) -> Tensor:
    """The function φ above, elementwise: positive, decreasing, differentiable, ``1 - x`` up to one half."""
    return torch.where(x <= 0.5, 1 - x, 0.5 * torch.exp(1 - 2 * x.clamp_min(0.5)))


class Scale(ABC):
    """A kind of scale operator; its parameters are plain tensors with a leading batch of fits ``(*R, ...)``.

    A *stretch* is a symmetric matrix in whitened coordinates, in the shape of the scale.
    """

    is_dense: bool = False
    """Whether the parameters are of the order of D²."""

    @abstractmethod
    def multiply(self, scale: Tensor, x: Tensor) -> Tensor:
        """σ·x for ``x (..., D)``."""

    @abstractmethod
    def multiply_transposed(self, scale: Tensor, x: Tensor) -> Tensor:
        """σᵀ·x for ``x (..., D)``."""

    @abstractmethod
    def solve(self, scale: Tensor, x: Tensor) -> Tensor:
        """σ⁻¹·x for ``x (..., D)``."""

    @abstractmethod
    def log_det(self, scale: Tensor) -> Tensor:
        """Log det σ, ``(*R)``."""

    @abstractmethod
    def covariance(self, scale: Tensor) -> Tensor:
        """σσᵀ, ``(*R, D, D)``."""

    @abstractmethod
    def variance(self, scale: Tensor) -> Tensor:
        """Diagonal of σσᵀ, ``(*R, D)``."""

    @abstractmethod
    def isotropic(self, dim: int, size: float, *, batch: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Parameters of σ = size·I."""

    @abstractmethod
    def inner(self, one: Tensor, two: Tensor) -> Tensor:
        """Frobenius inner product of two stretches, ``(*R)``."""

    @abstractmethod
    def diagonal(self, stretch: Tensor) -> Tensor:
        """Diagonal of a stretch, ``(*R, D)``."""

    def trace(self, stretch: Tensor) -> Tensor:
        """Trace of a stretch, ``(*R)``."""
        return self.diagonal(stretch).sum(-1)

    @abstractmethod
    def add_to_diagonal(self, stretch: Tensor, number: Tensor) -> Tensor:
        """A stretch plus ``number (*R)`` times the identity."""

    @abstractmethod
    def apply(self, stretch: Tensor, x: Tensor) -> Tensor:
        """A stretch times ``x (..., D)``."""

    @abstractmethod
    def part(self, matrix: Tensor) -> Tensor:
        """The stretch that a symmetric matrix ``(*R, D, D)`` holds."""

    @abstractmethod
    def mean_outer(self, x: Tensor, y: Tensor) -> Tensor:
        """The stretch of the symmetric part of the mean of xyᵀ over the particles, ``x`` and ``y (K, *R, D)``."""

    @abstractmethod
    def noise(self, x: Tensor, y: Tensor) -> Tensor:
        """Half the mean squared norm of the stretches of xyᵀ, ``(*R)``."""

    @abstractmethod
    def whitened_gradient(self, scale: Tensor, grad: Tensor) -> Tensor:
        """The gradient for a stretch S in σ(I + S), from the gradient with respect to the scale."""

    @abstractmethod
    def decompose(self, stretch: Tensor) -> tuple[Tensor, Tensor | None]:
        """Eigenvalues ``(*R, P)`` and eigenvectors (``None`` for the identity) of a stretch."""

    @abstractmethod
    def rotate(self, vectors: Tensor | None, x: Tensor) -> Tensor:
        """Coordinates ``(*R, P)`` of ``x (*R, D)`` along the eigenvectors."""

    @abstractmethod
    def rotate_back(self, vectors: Tensor | None, x: Tensor, dim: int) -> Tensor:
        """The vector ``(*R, D)`` with these coordinates."""

    @abstractmethod
    def move(self, scale: Tensor, values: Tensor, vectors: Tensor | None) -> Tensor:
        """The scale whose whitened covariance is ``vectors · diag(values) · vectorsᵀ``."""

    @abstractmethod
    def trace_of_ratio(self, scale: Tensor, other: Tensor) -> Tensor:
        """Squared Frobenius norm of other⁻¹·scale, ``(*R)``: the trace term of a normal's KL divergence."""

    @abstractmethod
    def fisher(self, scale: Tensor) -> tuple[Tensor, Tensor]:
        """Fisher matrices of N(loc, σσᵀ) for ``loc`` and for the free entries of ``scale`` in row-major order."""


class Diagonal(Scale):
    """σ = diag(s), kept as s > 0 of shape ``(*R, D)``."""

    def multiply(self, scale: Tensor, x: Tensor) -> Tensor:
        """s·x."""
        return scale * x

    def multiply_transposed(self, scale: Tensor, x: Tensor) -> Tensor:
        """s·x."""
        return scale * x

    def solve(self, scale: Tensor, x: Tensor) -> Tensor:
        """x/s."""
        return x / scale

    def log_det(self, scale: Tensor) -> Tensor:
        """Σ log s."""
        return scale.log().sum(-1)

    def covariance(self, scale: Tensor) -> Tensor:
        """diag(s²)."""
        return torch.diag_embed(scale.square())

    def variance(self, scale: Tensor) -> Tensor:
        """s²."""
        return scale.square()

    def isotropic(self, dim: int, size: float, *, batch: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """S = size everywhere."""
        return torch.full((*batch, dim), size, dtype=dtype)

    def inner(self, one: Tensor, two: Tensor) -> Tensor:
        """Sum of products."""
        return (one * two).sum(-1)

    def diagonal(self, stretch: Tensor) -> Tensor:
        """All of it."""
        return stretch

    def add_to_diagonal(self, stretch: Tensor, number: Tensor) -> Tensor:
        """Plus the number everywhere."""
        return stretch + number.unsqueeze(-1)

    def apply(self, stretch: Tensor, x: Tensor) -> Tensor:
        """M·x."""
        return stretch * x

    def part(self, matrix: Tensor) -> Tensor:
        """The diagonal."""
        return matrix.diagonal(dim1=-2, dim2=-1)

    def mean_outer(self, x: Tensor, y: Tensor) -> Tensor:
        """Mean of x·y."""
        return (x * y).mean(0)

    def noise(self, x: Tensor, y: Tensor) -> Tensor:
        """Half the mean of ‖x·y‖²."""
        return (x * y).square().sum(-1).mean(0) / 2

    def whitened_gradient(self, scale: Tensor, grad: Tensor) -> Tensor:
        """s·grad."""
        return scale * grad

    def decompose(self, stretch: Tensor) -> tuple[Tensor, Tensor | None]:
        """M is its own eigenvalues."""
        return stretch, None

    def rotate(self, vectors: Tensor | None, x: Tensor) -> Tensor:
        """As it is."""
        return x

    def rotate_back(self, vectors: Tensor | None, x: Tensor, dim: int) -> Tensor:
        """As it is."""
        return x

    def move(self, scale: Tensor, values: Tensor, vectors: Tensor | None) -> Tensor:
        """s·√values."""
        return scale * values.sqrt()

    def trace_of_ratio(self, scale: Tensor, other: Tensor) -> Tensor:
        """Σ (s/other)²."""
        return (scale / other).square().sum(-1)

    def fisher(self, scale: Tensor) -> tuple[Tensor, Tensor]:
        """1/s² and 2/s²."""
        precision = torch.diag_embed(scale.square().reciprocal())
        return precision, 2 * precision


class Dense(Scale):
    """σ = L, lower triangular with a positive diagonal, of shape ``(*R, D, D)``."""

    is_dense = True

    def multiply(self, scale: Tensor, x: Tensor) -> Tensor:
        """L·x."""
        return torch.einsum("...ij,...j->...i", scale, x)

    def multiply_transposed(self, scale: Tensor, x: Tensor) -> Tensor:
        """Lᵀ·x."""
        return torch.einsum("...ij,...i->...j", scale, x)

    def solve(self, scale: Tensor, x: Tensor) -> Tensor:
        """L⁻¹·x by forward substitution."""
        batch = torch.broadcast_shapes(scale.shape[:-2], x.shape[:-1])
        wide = x.expand(*batch, x.shape[-1]).unsqueeze(-1)
        return torch.linalg.solve_triangular(scale, wide, upper=False).squeeze(-1)

    def log_det(self, scale: Tensor) -> Tensor:
        """Σ log of the diagonal."""
        return scale.diagonal(dim1=-2, dim2=-1).log().sum(-1)

    def covariance(self, scale: Tensor) -> Tensor:
        """LLᵀ."""
        return scale @ scale.mT

    def variance(self, scale: Tensor) -> Tensor:
        """Row sums of L²."""
        return scale.square().sum(-1)

    def isotropic(self, dim: int, size: float, *, batch: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """L = size·I."""
        return torch.eye(dim, dtype=dtype).mul(size).expand(*batch, dim, dim).clone()

    def inner(self, one: Tensor, two: Tensor) -> Tensor:
        """Sum of products."""
        return (one * two).sum((-2, -1))

    def diagonal(self, stretch: Tensor) -> Tensor:
        """The diagonal."""
        return stretch.diagonal(dim1=-2, dim2=-1)

    def add_to_diagonal(self, stretch: Tensor, number: Tensor) -> Tensor:
        """Plus the number times the identity."""
        identity = torch.eye(stretch.shape[-1], dtype=stretch.dtype, device=stretch.device)
        return stretch + number[..., None, None] * identity

    def apply(self, stretch: Tensor, x: Tensor) -> Tensor:
        """M·x."""
        return torch.einsum("...ij,...j->...i", stretch, x)

    def part(self, matrix: Tensor) -> Tensor:
        """All of it."""
        return matrix

    def mean_outer(self, x: Tensor, y: Tensor) -> Tensor:
        """Symmetric part of the mean of xyᵀ."""
        outer = torch.einsum("k...d,k...e->...de", x, y) / len(x)
        return (outer + outer.mT) / 2

    def noise(self, x: Tensor, y: Tensor) -> Tensor:
        """Half the mean of ½‖x‖²‖y‖², without the small part of both along each other."""
        return (x.square().sum(-1) * y.square().sum(-1)).mean(0) / 4

    def whitened_gradient(self, scale: Tensor, grad: Tensor) -> Tensor:
        """The lower triangle of Lᵀ·grad, mirrored: it asks for the lower triangle of ``grad`` alone."""
        lower = (scale.mT @ grad.tril()).tril()
        return lower + lower.tril(-1).mT

    def decompose(self, stretch: Tensor) -> tuple[Tensor, Tensor | None]:
        """Symmetric eigenvalue decomposition."""
        values, vectors = torch.linalg.eigh(stretch)
        return values, vectors

    def rotate(self, vectors: Tensor | None, x: Tensor) -> Tensor:
        """Uᵀ·x."""
        return torch.einsum("...ij,...i->...j", vectors, x)

    def rotate_back(self, vectors: Tensor | None, x: Tensor, dim: int) -> Tensor:
        """U·x."""
        return torch.einsum("...ij,...j->...i", vectors, x)

    def move(self, scale: Tensor, values: Tensor, vectors: Tensor | None) -> Tensor:
        """L·chol(U diag(values) Uᵀ): a product of two lower triangles is one."""
        assert vectors is not None
        # U·√values = Q·R gives U·diag(values)·Uᵀ = RᵀR without ever forming it: no Cholesky that could fail.
        root = torch.linalg.qr((vectors * values.sqrt().unsqueeze(-2)).mT, mode="r").R.mT
        sign = root.diagonal(dim1=-2, dim2=-1).sign()
        return scale @ (root * sign.unsqueeze(-2))

    def trace_of_ratio(self, scale: Tensor, other: Tensor) -> Tensor:
        """‖other⁻¹L‖²."""
        return torch.linalg.solve_triangular(other, scale, upper=False).square().sum((-2, -1))

    def fisher(self, scale: Tensor) -> tuple[Tensor, Tensor]:
        r"""(LLᵀ)⁻¹, and for the lower entries of L the form ½‖W + Wᵀ‖² with W = L⁻¹·dL."""
        dim = scale.shape[-1]
        inverse = torch.linalg.solve_triangular(scale, torch.eye(dim, dtype=scale.dtype), upper=False)
        rows, columns = torch.tril_indices(dim, dim)
        # W for a unit change of L[r, c] has the column inverse[:, r] in place c
        basis = torch.zeros(*scale.shape[:-2], len(rows), dim, dim, dtype=scale.dtype)
        basis[..., torch.arange(len(rows)), :, columns] = inverse[..., :, rows].movedim(-1, 0)
        symmetric = (basis + basis.mT).flatten(-2)
        return inverse.mT @ inverse, 0.5 * symmetric @ symmetric.mT
