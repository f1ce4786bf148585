"""The normal family, of numbers and of vectors."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from pyro_vi_lab.families.exponential.family import Conditional, ExponentialFamily, Values, by_sign, line
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

LOG_2_PI = math.log(2 * math.pi)


class Normal(ExponentialFamily):
    r"""N(μ, s²): :math:`T = (x, x^2)`, :math:`\eta = (\mu / s^2, -1 / (2 s^2))`."""

    num_parameters = 2
    parameter_dims: ClassVar = {"loc": 0, "scale": 0}

    def statistics(self, values: Values) -> Tensor:
        """(x, x²)."""
        (x,) = values
        return torch.stack([x, x.square()], -1)

    def log_normalizer(self, eta: Tensor) -> Tensor:
        """μ² / (2 s²) + log s + log(2π) / 2."""
        precision = -2 * eta[..., 1]
        return eta[..., 0].square() / (2 * precision) - precision.log() / 2 + LOG_2_PI / 2

    def mean(self, eta: Tensor) -> Tensor:
        """(μ, μ² + s²)."""
        variance = -1 / (2 * eta[..., 1])
        loc = eta[..., 0] * variance
        return torch.stack([loc, loc.square() + variance], -1)

    def natural(self, mean: Tensor, *, start: Tensor | None = None) -> Tensor:
        """In closed form."""
        variance = mean[..., 1] - mean[..., 0].square()
        if start is not None:  # the same, without the rounding of the difference
            variance = variance - variance.detach() - 1 / (2 * start[..., 1])
        return torch.stack([mean[..., 0] / variance, -1 / (2 * variance)], -1)

    def entropy(self, eta: Tensor) -> Tensor:
        """Log s + (1 + log 2π) / 2."""
        return (1 + LOG_2_PI - (-2 * eta[..., 1]).log()) / 2

    def kl(self, eta: Tensor, other: Tensor) -> Tensor:
        """In closed form, without large numbers that cancel."""
        precision, other_precision = -2 * eta[..., 1], -2 * other[..., 1]
        ratio = other_precision / precision
        shift = eta[..., 0] / precision - other[..., 0] / other_precision
        return (ratio - 1 - ratio.log() + shift.square() * other_precision) / 2

    def cone(self, eta: Tensor) -> tuple[Tensor, Tensor | None]:
        """The precision."""
        return -2 * eta[..., 1:], None

    def unconstrain(self, eta: Tensor) -> Tensor:
        """(μ, log s)."""
        precision = -2 * eta[..., 1]
        return torch.stack([eta[..., 0] / precision, -precision.log() / 2], -1)

    def constrain(self, u: Tensor) -> Tensor:
        """From these."""
        precision = (-2 * u[..., 1]).exp()
        return torch.stack([u[..., 0] * precision, -precision / 2], -1)

    def standard(self, eta: Tensor) -> dict[str, Tensor]:
        """Mean ("loc") and standard deviation ("scale")."""
        precision = -2 * eta[..., 1]
        return {"loc": eta[..., 0] / precision, "scale": precision.rsqrt()}

    def from_standard(self, parameters: Mapping[str, Tensor]) -> Tensor:
        """From these."""
        precision = parameters["scale"] ** -2
        return torch.stack([parameters["loc"] * precision, -precision / 2], -1)

    def conditional(self, eta: Tensor, earlier: Values = ()) -> Conditional:
        """Normal."""
        return Conditional("Normal", self.standard(eta))

    def moved(self, eta: Tensor, values: Values) -> Tensor:
        """With the same standard deviation."""
        return torch.stack([-2 * eta[..., 1] * values[0], eta[..., 1]], -1)

    def point(self, eta: Tensor, signs: Tensor) -> Values:
        """μ ± s."""
        standard = self.standard(eta)
        return (standard["loc"] + signs[..., 0] * standard["scale"],)

    def message(self, eta: Tensor, signs: Tensor, values: Values, grads: Values) -> Tensor:
        """The gradient is η₁ + 2 η₂ x: a line."""
        (x_plus, plus), (x_minus, minus) = by_sign(signs, (values[0], grads[0]))
        intercept, slope = line(x_plus, x_minus, plus, minus)
        return torch.stack([intercept, slope / 2], -1)


class MultivariateNormal(ExponentialFamily):
    r"""N(μ, Σ) over vectors of length D.

    .. math:: T = (x, x x^\top), \qquad \eta = (\Sigma^{-1} \mu, -\tfrac12 \Sigma^{-1})

    Args:
        dim: D.
    """

    event_dims: ClassVar = (1,)
    parameter_dims: ClassVar = {"loc": 1, "scale_tril": 2}

    def __init__(self, dim: int) -> None:
        self.dim = self.num_signs = dim
        self.num_parameters = dim + packed(dim)

    def split(self, eta: Tensor) -> tuple[Tensor, Tensor]:
        """Σ⁻¹μ and Σ⁻¹."""
        return eta[..., : self.dim], -2 * unpack_dual(eta[..., self.dim :], self.dim)

    def join(self, shift: Tensor, precision: Tensor) -> Tensor:
        """From these."""
        return torch.cat([shift, pack_dual(-precision / 2)], -1)

    def statistics(self, values: Values) -> Tensor:
        """(x, x xᵀ)."""
        (x,) = values
        return torch.cat([x, pack(x.unsqueeze(-1) * x.unsqueeze(-2))], -1)

    def log_normalizer(self, eta: Tensor) -> Tensor:
        """(μᵀΣ⁻¹μ + log |2πΣ|) / 2."""
        shift, precision = self.split(eta)
        tril = torch.linalg.cholesky(precision)
        half = torch.linalg.solve_triangular(tril, shift.unsqueeze(-1), upper=False).squeeze(-1)
        return (half.square().sum(-1) - log_det_of_tril(tril) + self.dim * LOG_2_PI) / 2

    def mean(self, eta: Tensor) -> Tensor:
        """(μ, μμᵀ + Σ)."""
        loc, tril = self._loc_tril(eta)
        second = loc.unsqueeze(-1) * loc.unsqueeze(-2) + tril @ tril.mT
        return torch.cat([loc, pack(second)], -1)

    def natural(self, mean: Tensor, *, start: Tensor | None = None) -> Tensor:
        """In closed form."""
        loc = mean[..., : self.dim]
        covariance = unpack(mean[..., self.dim :], self.dim) - loc.unsqueeze(-1) * loc.unsqueeze(-2)
        if start is not None:  # the same, without the rounding of the difference
            tril = self._loc_tril(start)[1]
            covariance = covariance - covariance.detach() + tril @ tril.mT
        precision = torch.cholesky_inverse(torch.linalg.cholesky(covariance))
        return self.join((precision @ loc.unsqueeze(-1)).squeeze(-1), precision)

    def _loc_tril(self, eta: Tensor) -> tuple[Tensor, Tensor]:
        shift, precision = self.split(eta)
        tril = factor_of_inverse(precision)
        return (tril @ (tril.mT @ shift.unsqueeze(-1))).squeeze(-1), tril

    def entropy(self, eta: Tensor) -> Tensor:
        """Log |Σ| / 2 + D (1 + log 2π) / 2."""
        return (self.dim * (1 + LOG_2_PI) - log_det_of_tril(torch.linalg.cholesky(self.split(eta)[1]))) / 2

    def kl(self, eta: Tensor, other: Tensor) -> Tensor:
        """In closed form, without large numbers that cancel."""
        (loc, tril), (other_loc, other_tril) = self._loc_tril(eta), self._loc_tril(other)
        ratio = torch.linalg.solve_triangular(other_tril, tril, upper=False)
        shift = torch.linalg.solve_triangular(other_tril, (loc - other_loc).unsqueeze(-1), upper=False)
        return kl_of_whitened(ratio, shift.squeeze(-1))

    def cone(self, eta: Tensor) -> tuple[Tensor, Tensor | None]:
        """The precision matrix."""
        return eta[..., :0], self.split(eta)[1]

    def unconstrain(self, eta: Tensor) -> Tensor:
        """μ and the Cholesky factor of Σ, its diagonal in logs."""
        loc, tril = self._loc_tril(eta)
        return torch.cat([loc, unconstrain_tril(tril)], -1)

    def constrain(self, u: Tensor) -> Tensor:
        """From these."""
        return self.from_standard(
            {"loc": u[..., : self.dim], "scale_tril": constrain_tril(u[..., self.dim :], self.dim)}
        )

    def standard(self, eta: Tensor) -> dict[str, Tensor]:
        """Mean ("loc") and Cholesky factor of Σ ("scale_tril")."""
        loc, tril = self._loc_tril(eta)
        return {"loc": loc, "scale_tril": tril}

    def from_standard(self, parameters: Mapping[str, Tensor]) -> Tensor:
        """From these."""
        precision = torch.cholesky_inverse(parameters["scale_tril"])
        return self.join((precision @ parameters["loc"].unsqueeze(-1)).squeeze(-1), precision)

    def conditional(self, eta: Tensor, earlier: Values = ()) -> Conditional:
        """MultivariateNormal."""
        return Conditional("MultivariateNormal", self.standard(eta))

    def moved(self, eta: Tensor, values: Values) -> Tensor:
        """With the same covariance."""
        precision = self.split(eta)[1]
        return self.join((precision @ values[0].unsqueeze(-1)).squeeze(-1), precision)

    def point(self, eta: Tensor, signs: Tensor) -> Values:
        """μ + L times the signs, where Σ = L Lᵀ."""
        loc, tril = self._loc_tril(eta)
        return (loc + (tril @ signs.unsqueeze(-1)).squeeze(-1),)

    def message(self, eta: Tensor, signs: Tensor, values: Values, grads: Values) -> Tensor:
        """The gradient is h - P x, so E[grad] = h - P μ and E[grad signsᵀ] = -P L."""
        loc, tril = self._loc_tril(eta)
        (grad,) = grads
        mean = grad.mean(0)
        moment = (grad.unsqueeze(-1) * signs.unsqueeze(-2)).mean(0)
        slope = torch.linalg.solve_triangular(tril, moment, upper=False, left=False)
        precision = -symmetric(slope)
        return self.join(mean + (precision @ loc.unsqueeze(-1)).squeeze(-1), precision)


def kl_of_whitened(ratio: Tensor, shift: Tensor) -> Tensor:
    """KL(N(shift, R Rᵀ) ‖ N(0, I)), R lower triangular."""
    diagonal = ratio.diagonal(dim1=-2, dim2=-1)
    below = ratio.tril(-1).square().sum((-2, -1))
    return (((diagonal - 1) * (diagonal + 1) - 2 * diagonal.log()).sum(-1) + below + shift.square().sum(-1)) / 2
