"""The Dirichlet and the beta family: probabilities."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from pyro_vi_lab.families.exponential.family import Conditional, ExponentialFamily, Values, by_sign

NEWTON_STEPS = 60
"""Most Newton steps for the concentrations; far from the solution they are short."""


class Dirichlet(ExponentialFamily):
    r"""Dirichlet(α) over K probabilities: :math:`T = \log x`, :math:`\eta = \alpha - 1`.

    Args:
        dim: K, at least 2.
    """

    event_dims: ClassVar = (1,)
    log_concentrations: ClassVar = slice(None)
    parameter_dims: ClassVar = {"concentration": 1}

    def __init__(self, dim: int) -> None:
        self.num_parameters = dim

    def statistics(self, values: Values) -> Tensor:
        """Log x."""
        return values[0].log()

    def log_normalizer(self, eta: Tensor) -> Tensor:
        """Σ log Γ(αₖ) - log Γ(Σ αₖ)."""
        alpha = eta + 1
        return torch.lgamma(alpha).sum(-1) - torch.lgamma(alpha.sum(-1))

    def mean(self, eta: Tensor) -> Tensor:
        """ψ(αₖ) - ψ(Σ αₖ)."""
        alpha = eta + 1
        return torch.digamma(alpha) - torch.digamma(alpha.sum(-1, keepdim=True))

    def natural(self, mean: Tensor, *, start: Tensor | None = None) -> Tensor:
        """By Newton steps for all concentrations together, at a cost linear in K.

        References:
            Minka 2000, "Estimating a Dirichlet distribution", eq. 15-18.
        """
        with torch.no_grad():
            alpha = _concentrations(mean) if start is None else start + 1
        return alpha - 1 + _newton(alpha, mean - self.mean(alpha - 1).detach())

    def cone(self, eta: Tensor) -> tuple[Tensor, Tensor | None]:
        """The concentrations."""
        return eta + 1, None

    def unconstrain(self, eta: Tensor) -> Tensor:
        """Their logs."""
        return (eta + 1).log()

    def constrain(self, u: Tensor) -> Tensor:
        """From these."""
        return u.exp() - 1

    def standard(self, eta: Tensor) -> dict[str, Tensor]:
        """The concentrations."""
        return {"concentration": eta + 1}

    def from_standard(self, parameters: Mapping[str, Tensor]) -> Tensor:
        """From the concentrations."""
        return parameters["concentration"] - 1

    def conditional(self, eta: Tensor, earlier: Values = ()) -> Conditional:
        """Dirichlet."""
        return Conditional("Dirichlet", self.standard(eta))

    def moved(self, eta: Tensor, values: Values) -> Tensor:
        """With the same sum of concentrations, none of which falls by more than a factor of twenty."""
        # a draw of small concentrations has zeros in it
        alpha = eta + 1
        return torch.maximum(alpha.sum(-1, keepdim=True) * values[0], alpha / 20) - 1

    def point(self, eta: Tensor, signs: Tensor) -> Values:
        r"""Two vectors of probabilities with the geometric means :math:`G_k = \exp E[\log x_k]`.

        With :math:`a = G_1` and :math:`b = G_2 + \dots + G_K`, one of them is :math:`(a u, (1 - a u) G_k / b)`, the
        other :math:`(a / u, (1 - a / u) G_k / b)`, and u solves
        :math:`a (u + 1 / u) = 1 + a^2 - b^2`.
        """
        geometric = self.mean(eta).exp()
        first, rest = geometric[..., :1], geometric[..., 1:].sum(-1, keepdim=True)
        gap = (1 - first - rest) * (1 - first + rest) * (1 + first - rest) * (1 + first + rest)
        larger = (1 + first**2 - rest**2 + gap.clamp_min(0).sqrt()) / 2
        smaller = first**2 / larger
        plus = signs > 0
        one = torch.where(plus, larger, smaller)
        others = torch.where(plus, rest**2 / (1 - smaller), 1 - smaller)
        return (torch.cat([one, others * geometric[..., 1:] / rest], -1),)

    def message(self, eta: Tensor, signs: Tensor, values: Values, grads: Values) -> Tensor:
        """With x = softmax(u) the gradient in u is η - x Σ η: two of them give Σ η."""
        (x_plus, plus), (x_minus, minus) = by_sign(signs, (values[0], _softmax_grad(values[0], grads[0])))
        apart = x_plus - x_minus
        total = -((plus - minus) * apart).sum(-1, keepdim=True) / apart.square().sum(-1, keepdim=True)
        return (plus + minus + (x_plus + x_minus) * total) / 2

    def tangent(self, values: Values, grads: Values) -> Values:
        """Along the simplex."""
        return (_softmax_grad(values[0], grads[0]),)


class Beta(ExponentialFamily):
    r"""Beta(a, b): :math:`T = (\log x, \log(1 - x))`, :math:`\eta = (a - 1, b - 1)`."""

    num_parameters = 2
    log_concentrations: ClassVar = slice(None)
    parameter_dims: ClassVar = {"concentration1": 0, "concentration0": 0}
    _pair = Dirichlet(2)

    def statistics(self, values: Values) -> Tensor:
        """(log x, log(1 - x))."""
        (x,) = values
        return torch.stack([x.log(), torch.log1p(-x)], -1)

    def log_normalizer(self, eta: Tensor) -> Tensor:
        """Log B(a, b)."""
        return self._pair.log_normalizer(eta)

    def mean(self, eta: Tensor) -> Tensor:
        """(ψ(a) - ψ(a + b), ψ(b) - ψ(a + b))."""
        return self._pair.mean(eta)

    def natural(self, mean: Tensor, *, start: Tensor | None = None) -> Tensor:
        """As for a Dirichlet distribution."""
        return self._pair.natural(mean, start=start)

    def cone(self, eta: Tensor) -> tuple[Tensor, Tensor | None]:
        """The two shapes."""
        return eta + 1, None

    def unconstrain(self, eta: Tensor) -> Tensor:
        """Their logs."""
        return (eta + 1).log()

    def constrain(self, u: Tensor) -> Tensor:
        """From these."""
        return u.exp() - 1

    def standard(self, eta: Tensor) -> dict[str, Tensor]:
        """The two shapes, a ("concentration1") first."""
        return {"concentration1": eta[..., 0] + 1, "concentration0": eta[..., 1] + 1}

    def from_standard(self, parameters: Mapping[str, Tensor]) -> Tensor:
        """From the two shapes."""
        return torch.stack([parameters["concentration1"] - 1, parameters["concentration0"] - 1], -1)

    def conditional(self, eta: Tensor, earlier: Values = ()) -> Conditional:
        """Beta."""
        return Conditional("Beta", self.standard(eta))

    def moved(self, eta: Tensor, values: Values) -> Tensor:
        """With the same a + b."""
        return self._pair.moved(eta, (_both(values[0]),))

    def point(self, eta: Tensor, signs: Tensor) -> Values:
        """As for a Dirichlet distribution."""
        return (self._pair.point(eta, signs)[0][..., 0],)

    def message(self, eta: Tensor, signs: Tensor, values: Values, grads: Values) -> Tensor:
        """As for a Dirichlet distribution."""
        grad = torch.stack([grads[0], torch.zeros_like(grads[0])], -1)
        return self._pair.message(eta, signs, (_both(values[0]),), (grad,))


def _both(x: Tensor) -> Tensor:
    return torch.stack([x, 1 - x], -1)


def _softmax_grad(x: Tensor, grad: Tensor) -> Tensor:
    return x * (grad - (x * grad).sum(-1, keepdim=True))


def _newton(alpha: Tensor, residual: Tensor) -> Tensor:
    """F⁻¹ times the residual: F is a diagonal minus a constant."""
    diagonal, constant = torch.polygamma(1, alpha), torch.polygamma(1, alpha.sum(-1, keepdim=True))
    diagonal, constant = diagonal.detach(), constant.detach()
    inner = (residual / diagonal).sum(-1, keepdim=True)
    return (residual + constant * inner / (1 - constant * (1 / diagonal).sum(-1, keepdim=True))) / diagonal


def _concentrations(mean: Tensor) -> Tensor:
    """Newton steps in log α, none by more than a factor of e, from Minka's fixed point."""
    weight = mean.exp()
    # Σ exp(E log xₖ) is near 1 where the concentrations are large: 1 - Σ ≈ (K - 1) / (2 Σ α)
    left = (1 - weight.sum(-1, keepdim=True)).clamp_min(torch.finfo(mean.dtype).eps)
    alpha = weight / weight.sum(-1, keepdim=True) * (mean.shape[-1] - 1) / (2 * left)
    # ψ(α) ≈ -1/α for small α: never start below what the mean alone says
    alpha = torch.maximum(alpha, -1 / mean)
    for _ in range(NEWTON_STEPS):
        step = _newton(alpha, mean - torch.digamma(alpha) + torch.digamma(alpha.sum(-1, keepdim=True)))
        alpha = alpha * (step / alpha).clamp(-0.63, 1.7) + alpha
    return alpha
