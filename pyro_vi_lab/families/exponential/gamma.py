"""The gamma family: precisions and rates."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from pyro_vi_lab.families.exponential.family import Conditional, ExponentialFamily, Values, by_sign, line

NEWTON_STEPS = 12
"""Newton steps for the shape: six are enough for a double, the others cost little."""


class Gamma(ExponentialFamily):
    r"""Gamma(a, b): :math:`T = (\log x, x)`, :math:`\eta = (a - 1, -b)`; b is a rate."""

    num_parameters = 2
    log_concentrations: ClassVar = slice(1)
    parameter_dims: ClassVar = {"concentration": 0, "rate": 0}

    def statistics(self, values: Values) -> Tensor:
        """(log x, x)."""
        (x,) = values
        return torch.stack([x.log(), x], -1)

    def log_normalizer(self, eta: Tensor) -> Tensor:
        """Log Γ(a) - a log b."""
        shape, rate = eta[..., 0] + 1, -eta[..., 1]
        return torch.lgamma(shape) - shape * rate.log()

    def mean(self, eta: Tensor) -> Tensor:
        """(ψ(a) - log b, a / b)."""
        shape, rate = eta[..., 0] + 1, -eta[..., 1]
        return torch.stack([torch.digamma(shape) - rate.log(), shape / rate], -1)

    def natural(self, mean: Tensor, *, start: Tensor | None = None) -> Tensor:
        """By Newton steps for the shape."""
        log_mean, mean_log = mean[..., 1].log(), mean[..., 0]
        shape = shape_of_gap(log_mean - mean_log, start=None if start is None else start[..., 0] + 1)
        return torch.stack([shape - 1, -shape / mean[..., 1]], -1)

    def cone(self, eta: Tensor) -> tuple[Tensor, Tensor | None]:
        """Shape and rate."""
        return torch.stack([eta[..., 0] + 1, -eta[..., 1]], -1), None

    def unconstrain(self, eta: Tensor) -> Tensor:
        """Logs of shape and rate."""
        return self.cone(eta)[0].log()

    def constrain(self, u: Tensor) -> Tensor:
        """From these."""
        shape, rate = u.exp().unbind(-1)
        return torch.stack([shape - 1, -rate], -1)

    def standard(self, eta: Tensor) -> dict[str, Tensor]:
        """Shape ("concentration") and rate."""
        return {"concentration": eta[..., 0] + 1, "rate": -eta[..., 1]}

    def from_standard(self, parameters: Mapping[str, Tensor]) -> Tensor:
        """From shape and rate."""
        return torch.stack([parameters["concentration"] - 1, -parameters["rate"]], -1)

    def conditional(self, eta: Tensor, earlier: Values = ()) -> Conditional:
        """Gamma."""
        return Conditional("Gamma", self.standard(eta))

    def moved(self, eta: Tensor, values: Values) -> Tensor:
        """With the same shape."""
        return torch.stack([eta[..., 0], -(eta[..., 0] + 1) / values[0]], -1)

    def point(self, eta: Tensor, signs: Tensor) -> Values:
        """Two numbers with arithmetic mean E[x] and geometric mean exp E[log x]."""
        shape, rate = eta[..., 0] + 1, -eta[..., 1]
        return (shape / rate * relative_size(torch.digamma(shape) - shape.log(), signs[..., 0]),)

    def message(self, eta: Tensor, signs: Tensor, values: Values, grads: Values) -> Tensor:
        """In log x the gradient is η₁ + η₂ x: a line."""
        (x,), (grad,) = values, grads
        return torch.stack(line_in_precision(signs, x, grad * x), -1)


def line_in_precision(signs: Tensor, x: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """Intercept and slope of a gradient that is linear in x."""
    (x_plus, plus), (x_minus, minus) = by_sign(signs, (x, grad))
    return line(x_plus, x_minus, plus, minus)


def relative_size(gap: Tensor, sign: Tensor) -> Tensor:
    r"""One of :math:`1 \pm s`, two numbers whose logarithms have the average ``gap``."""
    larger = 1 + (-torch.expm1(2 * gap)).sqrt()
    smaller = (2 * gap).exp().clamp_min(torch.finfo(gap.dtype).tiny) / larger
    return torch.where(sign > 0, larger, smaller)


def shape_of_gap(gap: Tensor, *, dim: int = 1, start: Tensor | None = None) -> Tensor:
    r"""The a with :math:`p \log a - \sum_{i<p} \psi(a - i/2)` equal to ``gap``, differentiable; p is ``dim``.

    For p = 1 the shape of a gamma distribution with :math:`\log E[x] - E[\log x]` equal to ``gap``, and for others half
    the degrees of freedom of a Wishart distribution. Both logarithms are nearly linear in each other, so that Newton
    steps between them cannot miss.

    References:
        Minka 2002, "Estimating a gamma distribution", for p = 1.
    """
    lowest = (dim - 1) / 2
    with torch.no_grad():
        if start is None:
            above = (dim * (dim + 1) / (4 * gap)).log()
            for _ in range(NEWTON_STEPS):
                shape = lowest + above.exp()
                value, derivative = _gap(shape, dim)
                above = above - (value / gap).log() * value / (derivative * above.exp())
            start = lowest + above.exp()
        value, derivative = _gap(start, dim)
    return start + (gap - value) / derivative


def _gap(shape: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    shifted = shape.unsqueeze(-1) - torch.arange(dim, dtype=shape.dtype, device=shape.device) / 2
    value = dim * shape.log() - torch.digamma(shifted).sum(-1)
    return value, dim / shape - torch.polygamma(1, shifted).sum(-1)
