"""The inverse gamma family: variances."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from pyro_vi_lab.families.exponential.family import Conditional, ExponentialFamily, Values
from pyro_vi_lab.families.exponential.gamma import Gamma


class InverseGamma(ExponentialFamily):
    r"""InverseGamma(a, b), whose reciprocals are Gamma(a, b).

    .. math:: T = (\log x, 1 / x), \qquad \eta = (-a - 1, -b)
    """

    num_parameters = 2
    log_concentrations: ClassVar = slice(1)
    parameter_dims: ClassVar = {"concentration": 0, "rate": 0}
    _reciprocal = Gamma()

    def statistics(self, values: Values) -> Tensor:
        """(log x, 1 / x)."""
        (x,) = values
        return torch.stack([x.log(), 1 / x], -1)

    def log_normalizer(self, eta: Tensor) -> Tensor:
        """Log Γ(a) - a log b."""
        return self._reciprocal.log_normalizer(_gamma(eta))

    def mean(self, eta: Tensor) -> Tensor:
        """(log b - ψ(a), a / b)."""
        return _reflected(self._reciprocal.mean(_gamma(eta)))

    def natural(self, mean: Tensor, *, start: Tensor | None = None) -> Tensor:
        """By Newton steps for the shape."""
        known = None if start is None else _gamma(start)
        return _gamma(self._reciprocal.natural(_reflected(mean), start=known))

    def cone(self, eta: Tensor) -> tuple[Tensor, Tensor | None]:
        """Shape and rate."""
        return self._reciprocal.cone(_gamma(eta))

    def unconstrain(self, eta: Tensor) -> Tensor:
        """Logs of shape and rate."""
        return self._reciprocal.unconstrain(_gamma(eta))

    def constrain(self, u: Tensor) -> Tensor:
        """From these."""
        return _gamma(self._reciprocal.constrain(u))

    def standard(self, eta: Tensor) -> dict[str, Tensor]:
        """Shape ("concentration") and rate."""
        return self._reciprocal.standard(_gamma(eta))

    def from_standard(self, parameters: Mapping[str, Tensor]) -> Tensor:
        """From shape and rate."""
        return _gamma(self._reciprocal.from_standard(parameters))

    def conditional(self, eta: Tensor, earlier: Values = ()) -> Conditional:
        """InverseGamma."""
        return Conditional("InverseGamma", self.standard(eta))

    def moved(self, eta: Tensor, values: Values) -> Tensor:
        """With the same shape; the harmonic mean is the value, as there need not be another."""
        return _gamma(self._reciprocal.moved(_gamma(eta), (1 / values[0],)))

    def point(self, eta: Tensor, signs: Tensor) -> Values:
        """Reciprocals of those of a gamma distribution."""
        return (1 / self._reciprocal.point(_gamma(eta), signs)[0],)

    def message(self, eta: Tensor, signs: Tensor, values: Values, grads: Values) -> Tensor:
        """As of a gamma distribution of 1 / x."""
        (x,), (grad,) = values, grads
        power, rate = self._reciprocal.message(_gamma(eta), signs, (1 / x,), (-x.square() * grad,)).unbind(-1)
        return torch.stack([-power, rate], -1)


def _gamma(eta: Tensor) -> Tensor:
    """η of 1 / x from that of x, and back."""
    return torch.stack([-eta[..., 0] - 2, eta[..., 1]], -1)


def _reflected(mean: Tensor) -> Tensor:
    """Mean parameters of 1 / x from those of x, and back."""
    return torch.stack([-mean[..., 0], mean[..., 1]], -1)
