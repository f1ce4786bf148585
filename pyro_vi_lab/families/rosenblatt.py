r"""The map between a mixture of normals and standard normal noise, one coordinate after the other.

With :math:`L_c` lower triangular and :math:`u_c = L_c^{-1}(z - m_c)`, the coordinate :math:`z_i` given those before it
is a mixture of normals in one dimension,

.. math:: F_i(z_i \mid z_{<i}) = \sum_c w_{c,i}\, \Phi(u_{c,i}), \qquad
          w_{c,i} \propto \pi_c \prod_{j<i} N(u_{c,j}) / L_{c,jj}.

All is done on the side of the distribution where the tail is, in logarithms and relative to the conditional density
:math:`q_i`, so that nothing is lost far out.

References:
    Rosenblatt 1952, "Remarks on a multivariate transformation", Annals of Mathematical Statistics 23. Graves 2016,
    "Stochastic backpropagation through mixture density distributions", arXiv:1607.05690. Figurnov, Mohamed & Mnih 2018,
    "Implicit reparameterization gradients", NeurIPS, eq. 5 and Section 4 (mixtures).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.special import erfc, erfcx, ndtri

HALVINGS = 64
"""Halvings of an interval, which go beyond the bits of a float64."""


class Components(NamedTuple):
    """Mixtures of normals: ``log_weights (*R, C)``, ``locs (*R, C, D)`` and ``trils (*R, C, D, D)``."""

    log_weights: Tensor
    locs: Tensor
    trils: Tensor

    def detached(self) -> Components:
        """The same without gradients."""
        return Components(*(value.detach() for value in self))


class _Conditionals:
    """The distributions of each coordinate given those before it, at ``z (K, *R, D)``; tensors ``(K, *R, C, D)``."""

    def __init__(self, mixture: Components, z: Tensor) -> None:
        trils = mixture.trils
        identity = torch.eye(trils.shape[-1], dtype=trils.dtype, device=trils.device)
        self.inverse = torch.linalg.solve_triangular(trils, identity.expand(trils.shape), upper=False)
        self.u = torch.einsum("...ij,...j->...i", self.inverse, z.unsqueeze(-2) - mixture.locs)
        log_size = trils.diagonal(dim1=-2, dim2=-1).log()
        terms = log_normal(self.u) - log_size
        before = terms.cumsum(-1) - terms
        self.log_weights = torch.log_softmax(mixture.log_weights.unsqueeze(-1) + before, -2)
        self.log_density = (self.log_weights + terms).logsumexp(-2)  # log q_i, (K, *R, D)

    def log_tails(self) -> tuple[Tensor, Tensor]:
        """Log F and log (1 - F), ``(K, *R, D)``."""
        lower, upper = ((self.log_weights + log_ndtr(sign * self.u)).logsumexp(-2) for sign in (1, -1))
        return lower, upper

    def side(self) -> Tensor:
        """1 in the lower half of the conditional distribution, -1 in the upper, ``(K, *R, 1, D)``."""
        lower, upper = self.log_tails()
        return torch.where(lower < upper, 1.0, -1.0).to(lower.dtype).unsqueeze(-2)

    def relative_parts(self, side: Tensor, log_density: Tensor) -> Tensor:
        """Each component's part of F / q, or of (F - 1) / q: what its derivative is does not depend on the side."""
        return side * (self.log_weights + log_ndtr(side * self.u) - log_density.unsqueeze(-2)).exp()

    def jacobian(self) -> Tensor:
        """Derivative of F by z, each row divided by q: unit lower triangular, ``(K, *R, D, D)``."""
        parts = self.relative_parts(self.side(), self.log_density)
        centered = parts - self.log_weights.exp() * parts.sum(-2, keepdim=True)
        # derivative of log w_c,i by z_j up to what all components share: minus the sum of u_l (1/L)_lj over l < i
        products = self.u.unsqueeze(-1) * self.inverse
        before = products.cumsum(-2) - products
        density = (self.log_weights + log_normal(self.u) - self.log_density.unsqueeze(-2)).exp()
        direct = torch.einsum("...ci,...cij->...ij", density, self.inverse.expand(before.shape))
        return (direct - torch.einsum("...ci,...cij->...ij", centered, before)).tril()


def to_normal(mixture: Components, z: Tensor) -> Tensor:
    """Φ⁻¹(F(z)), ``(K, *R, D)``: standard normal where z is of the mixture."""
    lower, upper = _Conditionals(mixture, z).log_tails()
    tiny = torch.finfo(z.dtype).tiny
    smaller = torch.minimum(lower, upper).exp().clamp_min(tiny)
    return torch.where(lower < upper, 1.0, -1.0).to(z.dtype) * ndtri(smaller)


def from_normal(mixture: Components, u: Tensor) -> Tensor:
    """The inverse of :func:`to_normal`, coordinate by coordinate."""
    log_weights, locs, trils = mixture
    shape = torch.broadcast_shapes(u.shape[:-1], log_weights.shape[:-1])
    log_weights = log_weights.expand(*shape, -1)
    whitened = u.new_zeros(*shape, *locs.shape[-2:])
    columns = []
    for i in range(u.shape[-1]):
        mean = locs[..., i] + (trils[..., i, :i] * whitened[..., :i]).sum(-1)
        size = trils[..., i, i]
        value = quantile(log_weights, mean, size.expand(mean.shape), u[..., i])
        inner = (value.unsqueeze(-1) - mean) / size
        whitened = torch.cat([whitened[..., :i], inner.unsqueeze(-1), whitened[..., i + 1 :]], -1)
        log_weights = torch.log_softmax(log_weights + log_normal(inner) - size.log(), -1)
        columns.append(value)
    return torch.stack(columns, -1)


def quantile(log_weights: Tensor, loc: Tensor, size: Tensor, u: Tensor) -> Tensor:
    """Where mixtures in one dimension ``(..., C)`` have the distribution function Φ(u), ``(...)``, by bisection."""
    each = loc + size * u.unsqueeze(-1)  # of the components: between the least and the largest of these
    low, high = each.amin(-1), each.amax(-1)
    side = torch.where(u < 0, 1.0, -1.0).to(u.dtype)
    aim = log_ndtr(side * u)
    for _ in range(HALVINGS):
        middle = low / 2 + high / 2  # both may be infinite
        inner = side.unsqueeze(-1) * (middle.unsqueeze(-1) - loc) / size
        below = side * ((log_weights + log_ndtr(inner)).logsumexp(-1) - aim) < 0
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return low / 2 + high / 2


def attached(mixture: Components, z: Tensor, u: Tensor | None = None) -> Tensor:
    r"""The draws z with the gradients that they have as a function of the mixture, and of ``u`` if given.

    .. math:: dz = -J^{-1} (\partial_\phi F\, d\phi - dU), \qquad F(z; \phi) = U = \Phi(u), \quad J = \partial_z F

    Args:
        mixture: What the draws are from.
        z: The draws; what they depend on is not asked.
        u: Their noise, as of :func:`to_normal`.

    Shape:
        z and u ``(K, *R, D)``.
    """
    z = z.detach()
    with torch.no_grad():
        fixed = _Conditionals(mixture.detached(), z)
        side, log_density, jacobian = fixed.side(), fixed.log_density, fixed.jacobian()
    change = _Conditionals(mixture, z).relative_parts(side, log_density).sum(-2)
    change = change - change.detach()
    if u is not None:
        change = change - (log_normal(u.detach()) - log_density).exp() * (u - u.detach())
    step = torch.linalg.solve_triangular(jacobian, change.unsqueeze(-1), upper=False, unitriangular=True).squeeze(-1)
    return torch.where(torch.isfinite(z).all(-1, keepdim=True), z - step, z)


def log_ndtr(x: Tensor) -> Tensor:
    """Log Φ(x), as :func:`torch.special.log_ndtr`, which ``vmap`` has no rule for."""
    low, high = x.clamp_max(-1), x.clamp_min(-1)
    tail = (erfcx(low * -(0.5**0.5)) / 2).log() - low.square() / 2
    return torch.where(x < -1, tail, torch.log1p(-erfc(high * 0.5**0.5) / 2))


def log_normal(u: Tensor) -> Tensor:
    """Log density of a standard normal number, elementwise."""
    return -0.5 * (u.square() + math.log(2 * math.pi))
