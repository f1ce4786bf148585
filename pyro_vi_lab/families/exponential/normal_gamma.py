"""The normal-gamma family: mean and precision of normal numbers together."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from pyro_vi_lab.families.exponential.family import Conditional, ExponentialFamily, Values, by_sign, line
from pyro_vi_lab.families.exponential.gamma import Gamma, line_in_precision, relative_size, shape_of_gap
from pyro_vi_lab.families.exponential.normal import LOG_2_PI


class NormalGamma(ExponentialFamily):
    r"""τ ~ Gamma(a, b), μ | τ ~ N(m, 1 / (κτ)).

    .. math:: T = (\log \tau, \tau, \tau\mu, \tau\mu^2)

    .. math:: \eta = (a - \tfrac12,\; -b - \tfrac12 \kappa m^2,\; \kappa m,\; -\tfrac12 \kappa).

    Its variables are the precision τ and the mean μ, in this order.

    References:
        Bernardo & Smith 1994, "Bayesian Theory", Section 5.2 and Appendix A.
    """

    num_parameters = 4
    log_concentrations: ClassVar = slice(1)
    event_dims: ClassVar = (0, 0)
    parameter_dims: ClassVar = {"concentration": 0, "rate": 0, "loc": 0, "relative_precision": 0}
    _precision = Gamma()

    def _split(self, eta: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(a, b, m, κ)."""
        relative = -2 * eta[..., 3]
        loc = eta[..., 2] / relative
        return eta[..., 0] + 0.5, -eta[..., 1] - eta[..., 2] * loc / 2, loc, relative

    def _join(self, shape: Tensor, rate: Tensor, loc: Tensor, relative: Tensor) -> Tensor:
        shift = relative * loc
        return torch.stack([shape - 0.5, -rate - shift * loc / 2, shift, -relative / 2], -1)

    def _gamma(self, eta: Tensor) -> Tensor:
        shape, rate, _, _ = self._split(eta)
        return torch.stack([shape - 1, -rate], -1)

    def statistics(self, values: Values) -> Tensor:
        """(log τ, τ, τμ, τμ²)."""
        precision, mean = values
        return torch.stack([precision.log(), precision, precision * mean, precision * mean.square()], -1)

    def log_normalizer(self, eta: Tensor) -> Tensor:
        """Log Γ(a) - a log b - log(κ / 2π) / 2."""
        shape, rate, _, relative = self._split(eta)
        return torch.lgamma(shape) - shape * rate.log() - relative.log() / 2 + LOG_2_PI / 2

    def mean(self, eta: Tensor) -> Tensor:
        """(ψ(a) - log b, a / b, m a / b, m² a / b + 1 / κ)."""
        shape, rate, loc, relative = self._split(eta)
        mean = shape / rate
        mean_log = torch.digamma(shape) - rate.log()
        return torch.stack([mean_log, mean, loc * mean, loc.square() * mean + 1 / relative], -1)

    def natural(self, mean: Tensor, *, start: Tensor | None = None) -> Tensor:
        """By Newton steps for the shape."""
        mean_log, precision, first, second = mean.unbind(-1)
        loc = first / precision
        variance = second - first * loc
        if start is not None:  # the same, without the rounding of the difference
            variance = variance - variance.detach() - 1 / (2 * start[..., 3])
        gap = precision.log() - mean_log
        shape = shape_of_gap(gap, start=None if start is None else start[..., 0] + 0.5)
        return self._join(shape, shape / precision, loc, 1 / variance)

    def entropy(self, eta: Tensor) -> Tensor:
        """Of the precision, and of the mean given it."""
        gamma, (_, _, _, relative) = self._gamma(eta), self._split(eta)
        mean_log = self._precision.mean(gamma)[..., 0]
        return self._precision.entropy(gamma) + (1 + LOG_2_PI - relative.log() - mean_log) / 2

    def kl(self, eta: Tensor, other: Tensor) -> Tensor:
        """Of the precision, and of the mean given it: without large numbers that cancel."""
        (shape, rate, loc, relative), (_, _, other_loc, other_relative) = self._split(eta), self._split(other)
        ratio = other_relative / relative
        distance = other_relative * (loc - other_loc).square() * shape / rate
        precision = self._precision.kl(self._gamma(eta), self._gamma(other))
        return precision + (ratio - 1 - ratio.log() + distance) / 2

    def cone(self, eta: Tensor) -> tuple[Tensor, Tensor | None]:
        """The shape, and a matrix of which b is the Schur complement of κ."""
        matrix = torch.stack([-2 * eta[..., 1], eta[..., 2], eta[..., 2], -2 * eta[..., 3]], -1)
        return eta[..., :1] + 0.5, matrix.unflatten(-1, (2, 2))

    def unconstrain(self, eta: Tensor) -> Tensor:
        """(log a, log b, m, log κ)."""
        shape, rate, loc, relative = self._split(eta)
        return torch.stack([shape.log(), rate.log(), loc, relative.log()], -1)

    def constrain(self, u: Tensor) -> Tensor:
        """From these."""
        return self._join(u[..., 0].exp(), u[..., 1].exp(), u[..., 2], u[..., 3].exp())

    def standard(self, eta: Tensor) -> dict[str, Tensor]:
        """A ("concentration"), b ("rate"), m ("loc"), κ ("relative_precision")."""
        return dict(zip(self.parameter_dims, self._split(eta), strict=True))

    def from_standard(self, parameters: Mapping[str, Tensor]) -> Tensor:
        """From these."""
        return self._join(*(parameters[name] for name in self.parameter_dims))

    def conditional(self, eta: Tensor, earlier: Values = ()) -> Conditional:
        """Gamma for the precision, Normal for the mean."""
        shape, rate, loc, relative = self._split(eta)
        if not earlier:
            return Conditional("Gamma", {"concentration": shape, "rate": rate})
        return Conditional("Normal", {"loc": loc, "scale": (relative * earlier[0]).rsqrt()})

    def moved(self, eta: Tensor, values: Values) -> Tensor:
        """With the same a and κ."""
        shape, _, _, relative = self._split(eta)
        return self._join(shape, shape / values[0], values[1], relative)

    def point(self, eta: Tensor, signs: Tensor) -> Values:
        """τ as for a gamma distribution; μ off m by amounts that are inversely proportional to τ."""
        shape, rate, loc, relative = self._split(eta)
        gap = torch.digamma(shape) - shape.log()
        precision = shape / rate * relative_size(gap, signs[..., 0])
        # Σ τ d = 0 and the average of τ d² is 1 / κ: d is inversely proportional to τ, up to the sign
        width = gap.exp() * (shape / rate / relative).sqrt()
        return precision, loc + signs[..., 0] * width / precision

    def message(self, eta: Tensor, signs: Tensor, values: Values, grads: Values) -> Tensor:
        """In μ the gradient is τ (η₃ + 2 η₄ μ), in log τ η₁ + τ (η₂ + η₃ μ + η₄ μ²)."""
        (precision, mean), (precision_grad, mean_grad) = values, grads
        (mu_plus, plus), (mu_minus, minus) = by_sign(signs, (mean, mean_grad / precision))
        shift, slope = line(mu_plus, mu_minus, plus, minus)
        rest = precision_grad - mean * (shift + slope / 2 * mean)
        power, rate = line_in_precision(signs, precision, rest * precision)
        return torch.stack([power, rate, shift, slope / 2], -1)
