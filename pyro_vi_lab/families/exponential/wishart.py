"""The Wishart family: precision matrices."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from pyro_vi_lab.families.exponential.family import Conditional, ExponentialFamily, Values, by_sign, line
from pyro_vi_lab.families.exponential.gamma import relative_size, shape_of_gap
from pyro_vi_lab.families.exponential.symmetric import (
    constrain_tril,
    factor_of_inverse,
    log_det_of_tril,
    pack,
    pack_dual,
    packed,
    symmetric,
    unconstrain_tril,
    unpack,
    unpack_dual,
)

LOG_2 = math.log(2)


class Wishart(ExponentialFamily):
    r"""Wishart(ν, V) over D × D precision matrices, with the mean νV.

    .. math:: T = (\log |\Lambda|, \Lambda), \qquad \eta = (\tfrac12 (\nu - D - 1), -\tfrac12 V^{-1})

    Args:
        dim: D.
    """

    event_dims: ClassVar = (2,)
    log_concentrations: ClassVar = slice(1)
    parameter_dims: ClassVar = {"df": 0, "scale_tril": 2}

    def __init__(self, dim: int) -> None:
        self.dim = dim
        self.num_parameters = 1 + packed(dim)

    def split(self, eta: Tensor) -> tuple[Tensor, Tensor]:
        """Degrees of freedom ν and V⁻¹."""
        return 2 * eta[..., 0] + self.dim + 1, -2 * unpack_dual(eta[..., 1:], self.dim)

    def join(self, df: Tensor, inverse_scale: Tensor) -> Tensor:
        """From these."""
        return torch.cat([(df.unsqueeze(-1) - self.dim - 1) / 2, pack_dual(-inverse_scale / 2)], -1)

    def statistics(self, values: Values) -> Tensor:
        """(log |Λ|, Λ)."""
        (x,) = values
        return torch.cat([log_det_of_tril(torch.linalg.cholesky(x)).unsqueeze(-1), pack(x)], -1)

    def log_normalizer(self, eta: Tensor) -> Tensor:
        """(ν log |2V|) / 2 + log Γ_D(ν / 2)."""
        df, inverse_scale = self.split(eta)
        log_det = self.dim * LOG_2 - log_det_of_tril(torch.linalg.cholesky(inverse_scale))
        return df / 2 * log_det + _log_multigamma(df / 2, self.dim)

    def mean(self, eta: Tensor) -> Tensor:
        """(ψ_D(ν / 2) + log |2V|, νV)."""
        df, inverse_scale = self.split(eta)
        tril = torch.linalg.cholesky(inverse_scale)
        mean = df[..., None, None] * torch.cholesky_inverse(tril)
        mean_log = _multidigamma(df / 2, self.dim) + self.dim * LOG_2 - log_det_of_tril(tril)
        return torch.cat([mean_log.unsqueeze(-1), pack(mean)], -1)

    def natural(self, mean: Tensor, *, start: Tensor | None = None) -> Tensor:
        """By Newton steps for the degrees of freedom."""
        tril = torch.linalg.cholesky(unpack(mean[..., 1:], self.dim))
        gap = log_det_of_tril(tril) - mean[..., 0]
        half = None if start is None else self.split(start)[0] / 2
        df = 2 * shape_of_gap(gap, dim=self.dim, start=half)
        return self.join(df, df[..., None, None] * torch.cholesky_inverse(tril))

    def cone(self, eta: Tensor) -> tuple[Tensor, Tensor | None]:
        """ν - D + 1 and V⁻¹."""
        df, inverse_scale = self.split(eta)
        return df.unsqueeze(-1) - self.dim + 1, inverse_scale

    def unconstrain(self, eta: Tensor) -> Tensor:
        """log(ν - D + 1) and the Cholesky factor of V, its diagonal in logs."""
        df, inverse_scale = self.split(eta)
        tril = factor_of_inverse(inverse_scale)
        return torch.cat([(df - self.dim + 1).log().unsqueeze(-1), unconstrain_tril(tril)], -1)

    def constrain(self, u: Tensor) -> Tensor:
        """From these."""
        df = u[..., 0].exp() + self.dim - 1
        return self.join(df, torch.cholesky_inverse(constrain_tril(u[..., 1:], self.dim)))

    def standard(self, eta: Tensor) -> dict[str, Tensor]:
        """Degrees of freedom ("df") and Cholesky factor of V ("scale_tril")."""
        df, inverse_scale = self.split(eta)
        return {"df": df, "scale_tril": factor_of_inverse(inverse_scale)}

    def from_standard(self, parameters: Mapping[str, Tensor]) -> Tensor:
        """From these."""
        return self.join(parameters["df"], torch.cholesky_inverse(parameters["scale_tril"]))

    def conditional(self, eta: Tensor, earlier: Values = ()) -> Conditional:
        """Wishart."""
        return Conditional("Wishart", self.standard(eta))

    def moved(self, eta: Tensor, values: Values) -> Tensor:
        """With the same degrees of freedom."""
        df = self.split(eta)[0]
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(values[0]))
        return self.join(df, df[..., None, None] * inverse)

    def point(self, eta: Tensor, signs: Tensor) -> Values:
        """E[Λ] times two numbers."""
        df, inverse_scale = self.split(eta)
        tril = factor_of_inverse(inverse_scale)
        size = df * relative_size(self.gap(df), signs[..., 0])
        return (size[..., None, None] * (tril @ tril.mT),)

    def gap(self, df: Tensor) -> Tensor:
        """E[log |Λ|] without log |E[Λ]|, by dimension."""
        return _multidigamma(df / 2, self.dim) / self.dim - (df / 2).log()

    def message(self, eta: Tensor, signs: Tensor, values: Values, grads: Values) -> Tensor:
        """The gradient is η₁ Λ⁻¹ + H; both points are multiples of one matrix."""
        power, matrix = power_and_matrix(signs, values[0], grads[0])
        return torch.cat([power.unsqueeze(-1), pack_dual(matrix)], -1)

    def tangent(self, values: Values, grads: Values) -> Values:
        """Along the symmetric matrices."""
        return (symmetric(grads[0]),)


def power_and_matrix(signs: Tensor, precision: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """The a and H of a gradient a Λ⁻¹ + H at two multiples of one matrix."""
    (plus, grad_plus), (minus, grad_minus) = by_sign(signs, (precision, symmetric(grad)))
    trace_plus, trace_minus = ((x * g).sum((-2, -1)) for x, g in ((plus, grad_plus), (minus, grad_minus)))
    # tr(Λ grad) = a D + tr(Λ H), and tr(Λ H) is proportional to the size of Λ
    size_plus, size_minus = (x.diagonal(dim1=-2, dim2=-1).sum(-1) for x in (plus, minus))
    intercept, _ = line(size_plus, size_minus, trace_plus, trace_minus)
    power = intercept / precision.shape[-1]
    inverses = [torch.cholesky_inverse(torch.linalg.cholesky(x)) for x in (plus, minus)]
    return power, (grad_plus + grad_minus - power[..., None, None] * (inverses[0] + inverses[1])) / 2


def _shifted(a: Tensor, dim: int) -> Tensor:
    return a.unsqueeze(-1) - torch.arange(dim, dtype=a.dtype, device=a.device) / 2


def _log_multigamma(a: Tensor, dim: int) -> Tensor:
    return torch.lgamma(_shifted(a, dim)).sum(-1) + dim * (dim - 1) / 4 * math.log(math.pi)


def _multidigamma(a: Tensor, dim: int) -> Tensor:
    return torch.digamma(_shifted(a, dim)).sum(-1)
