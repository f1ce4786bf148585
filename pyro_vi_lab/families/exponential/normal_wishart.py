"""The normal-Wishart family: mean and precision matrix of normal vectors together."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from pyro_vi_lab.families.exponential.family import Conditional, ExponentialFamily, Values, by_sign
from pyro_vi_lab.families.exponential.gamma import relative_size
from pyro_vi_lab.families.exponential.normal import LOG_2_PI
from pyro_vi_lab.families.exponential.symmetric import (
    factor_of_inverse,
    log_det_of_tril,
    pack,
    pack_dual,
    packed,
    symmetric,
    unpack,
    unpack_dual,
)
from pyro_vi_lab.families.exponential.wishart import Wishart, power_and_matrix


class NormalWishart(ExponentialFamily):
    r"""Λ ~ Wishart(ν, V), μ | Λ ~ N(m, (κΛ)⁻¹), of D dimensions.

    .. math:: T = (\log |\Lambda|, \Lambda, \Lambda\mu, \mu^\top \Lambda \mu)

    .. math:: \eta = (\tfrac12(\nu - D),\; -\tfrac12 (V^{-1} + \kappa m m^\top),\; \kappa m,\; -\tfrac12 \kappa).

    Its variables are the precision matrix Λ and the mean μ, in this order.

    Args:
        dim: D.

    References:
        Bishop 2006, "Pattern Recognition and Machine Learning", eq. 2.157 and B.84.
    """

    event_dims: ClassVar = (2, 1)
    log_concentrations: ClassVar = slice(1)
    parameter_dims: ClassVar = {"df": 0, "scale_tril": 2, "loc": 1, "relative_precision": 0}

    def __init__(self, dim: int) -> None:
        self.dim = dim
        self.num_parameters = 2 + packed(dim) + dim
        self._precision = Wishart(dim)

    def _split(self, eta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """η of the precision matrix alone, m and κ."""
        relative = -2 * eta[..., -1]
        shift = eta[..., -1 - self.dim : -1]
        loc = shift / relative.unsqueeze(-1)
        inverse_scale = -2 * unpack_dual(eta[..., 1 : -1 - self.dim], self.dim) - _outer(shift, loc)
        return self._precision.join(2 * eta[..., 0] + self.dim, inverse_scale), loc, relative

    def _join(self, precision: Tensor, loc: Tensor, relative: Tensor) -> Tensor:
        df, inverse_scale = self._precision.split(precision)
        shift = relative.unsqueeze(-1) * loc
        second = pack_dual(-(inverse_scale + _outer(shift, loc)) / 2)
        return torch.cat([(df.unsqueeze(-1) - self.dim) / 2, second, shift, -relative.unsqueeze(-1) / 2], -1)

    def statistics(self, values: Values) -> Tensor:
        """(log |Λ|, Λ, Λμ, μᵀΛμ)."""
        precision, mean = values
        shift = (precision @ mean.unsqueeze(-1)).squeeze(-1)
        log_det = log_det_of_tril(torch.linalg.cholesky(precision)).unsqueeze(-1)
        return torch.cat([log_det, pack(precision), shift, (shift * mean).sum(-1, keepdim=True)], -1)

    def log_normalizer(self, eta: Tensor) -> Tensor:
        """That of the Wishart distribution, and -D log(κ / 2π) / 2."""
        precision, _, relative = self._split(eta)
        return self._precision.log_normalizer(precision) + self.dim * (LOG_2_PI - relative.log()) / 2

    def mean(self, eta: Tensor) -> Tensor:
        """(E[log |Λ|], νV, νVm, ν mᵀVm + D / κ)."""
        precision, loc, relative = self._split(eta)
        mean = self._precision.mean(precision)
        shift = (unpack(mean[..., 1:], self.dim) @ loc.unsqueeze(-1)).squeeze(-1)
        second = (shift * loc).sum(-1) + self.dim / relative
        return torch.cat([mean, shift, second.unsqueeze(-1)], -1)

    def natural(self, mean: Tensor, *, start: Tensor | None = None) -> Tensor:
        """By Newton steps for the degrees of freedom."""
        first, shift = mean[..., : -1 - self.dim], mean[..., -1 - self.dim : -1]
        tril = torch.linalg.cholesky(unpack(first[..., 1:], self.dim))
        loc = torch.cholesky_solve(shift.unsqueeze(-1), tril).squeeze(-1)
        spread = mean[..., -1] - (shift * loc).sum(-1)
        if start is not None:  # the same, without the rounding of the difference
            spread = spread - spread.detach() - self.dim / (2 * start[..., -1])
        known = None if start is None else self._split(start)[0]
        return self._join(self._precision.natural(first, start=known), loc, self.dim / spread)

    def entropy(self, eta: Tensor) -> Tensor:
        """Of the precision matrix, and of the mean given it."""
        precision, _, relative = self._split(eta)
        mean_log_det = self._precision.mean(precision)[..., 0]
        given = (self.dim * (1 + LOG_2_PI - relative.log()) - mean_log_det) / 2
        return self._precision.entropy(precision) + given

    def kl(self, eta: Tensor, other: Tensor) -> Tensor:
        """Of the precision matrix, and of the mean given it: without large numbers that cancel."""
        (precision, loc, relative), (other_precision, other_loc, other_relative) = self._split(eta), self._split(other)
        ratio = other_relative / relative
        mean = unpack(self._precision.mean(precision)[..., 1:], self.dim)
        apart = loc - other_loc
        distance = other_relative * ((mean @ apart.unsqueeze(-1)).squeeze(-1) * apart).sum(-1)
        first = self._precision.kl(precision, other_precision)
        return first + (self.dim * (ratio - 1 - ratio.log()) + distance) / 2

    def cone(self, eta: Tensor) -> tuple[Tensor, Tensor | None]:
        """ν - D + 1, and a matrix of which V⁻¹ is the Schur complement of κ."""
        shift = eta[..., -1 - self.dim : -1]
        second = -2 * unpack_dual(eta[..., 1 : -1 - self.dim], self.dim)
        last = torch.cat([shift, -2 * eta[..., -1:]], -1)
        matrix = torch.cat([torch.cat([second, shift.unsqueeze(-1)], -1), last.unsqueeze(-2)], -2)
        return 2 * eta[..., :1] + 1, matrix

    def unconstrain(self, eta: Tensor) -> Tensor:
        """That of the Wishart distribution, m and log κ."""
        precision, loc, relative = self._split(eta)
        return torch.cat([self._precision.unconstrain(precision), loc, relative.log().unsqueeze(-1)], -1)

    def constrain(self, u: Tensor) -> Tensor:
        """From these."""
        precision = self._precision.constrain(u[..., : -1 - self.dim])
        return self._join(precision, u[..., -1 - self.dim : -1], u[..., -1].exp())

    def standard(self, eta: Tensor) -> dict[str, Tensor]:
        """ν ("df"), Cholesky factor of V ("scale_tril"), m ("loc"), κ ("relative_precision")."""
        precision, loc, relative = self._split(eta)
        return {**self._precision.standard(precision), "loc": loc, "relative_precision": relative}

    def from_standard(self, parameters: Mapping[str, Tensor]) -> Tensor:
        """From these."""
        precision = self._precision.from_standard(parameters)
        return self._join(precision, parameters["loc"], parameters["relative_precision"])

    def conditional(self, eta: Tensor, earlier: Values = ()) -> Conditional:
        """Wishart for the precision matrix, MultivariateNormal for the mean."""
        precision, loc, relative = self._split(eta)
        if not earlier:
            return self._precision.conditional(precision)
        tril = factor_of_inverse(earlier[0]) * relative[..., None, None].rsqrt()
        return Conditional("MultivariateNormal", {"loc": loc, "scale_tril": tril})

    def moved(self, eta: Tensor, values: Values) -> Tensor:
        """With the same ν and κ."""
        precision, _, relative = self._split(eta)
        return self._join(self._precision.moved(precision, values[:1]), values[1], relative)

    def point(self, eta: Tensor, signs: Tensor) -> Values:
        """Λ as for a Wishart distribution; μ off m by amounts that are inversely proportional to Λ."""
        precision, loc, relative = self._split(eta)
        df, inverse_scale = self._precision.split(precision)
        tril = factor_of_inverse(inverse_scale)
        gap = self._precision.gap(df)
        factor = relative_size(gap, signs[..., 0])
        matrix = (df * factor)[..., None, None] * (tril @ tril.mT)
        # Σ Λd = 0 and the average of dᵀΛd is D / κ, along L⁻ᵀ(1, ..., 1) / √D
        ones = torch.ones_like(loc).unsqueeze(-1)
        direction = torch.linalg.solve_triangular(tril.mT, ones, upper=True).squeeze(-1)
        width = signs[..., 0] * gap.exp() * (relative * df).rsqrt() / factor
        return matrix, loc + width.unsqueeze(-1) * direction

    def message(self, eta: Tensor, signs: Tensor, values: Values, grads: Values) -> Tensor:
        """In μ the gradient is Λ (h + 2 η μ), and in Λ it is linear in log |Λ|'s."""
        (precision, mean), (precision_grad, mean_grad) = values, grads
        tril = torch.linalg.cholesky(precision)
        scaled = torch.cholesky_solve(mean_grad.unsqueeze(-1), tril).squeeze(-1)
        (mu_plus, plus), (mu_minus, minus) = by_sign(signs, (mean, scaled))
        apart = mu_plus - mu_minus
        slope = ((plus - minus) * apart).sum(-1) / apart.square().sum(-1)
        shift = (plus + minus - slope.unsqueeze(-1) * (mu_plus + mu_minus)) / 2
        rest = precision_grad - symmetric(_outer(shift, mean)) - slope[..., None, None] / 2 * _outer(mean, mean)
        power, matrix = power_and_matrix(signs, precision, rest)
        return torch.cat([power.unsqueeze(-1), pack_dual(matrix), shift, slope.unsqueeze(-1) / 2], -1)

    def tangent(self, values: Values, grads: Values) -> Values:
        """Along the symmetric matrices."""
        return symmetric(grads[0]), grads[1]


def _outer(x: Tensor, y: Tensor) -> Tensor:
    return x.unsqueeze(-1) * y.unsqueeze(-2)
