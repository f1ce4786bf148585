"""Families of a scale operator and a noise with one coordinate of ε for each of z, and their exact natural steps."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_vi_lab.families.family import Estimate, Family, Params, Step, Tangent, eigh, newton_precision
from pyro_vi_lab.families.noise import Laplace, Noise, Normal
from pyro_vi_lab.families.particles import ROOM, paired
from pyro_vi_lab.families.scale import Diagonal, Scale, retract

STEP_SIZES = 49
"""Candidate step sizes of the trust region, each smaller than the last by the square root of two: down to 2⁻²⁴ of
``lr``, and then one that is always inside."""


@dataclass(frozen=True)
class LocationScale(Family):
    r"""The distributions of :math:`z = \mu + \sigma \varepsilon`.

    Natural gradients are in whitened coordinates, where q has the distribution of ε: ``Tangent.shift`` is
    :math:`\delta`, and ``Tangent.stretch`` the symmetric :math:`M = 2S` (in the operator's shape) for which
    :math:`\sigma(I + S)` is the first-order step of the scale. For normal noise :math:`\delta = E[h]` and
    :math:`M = \mathrm{sym}\, E[h \varepsilon^\top]` with :math:`h = \sigma^\top \nabla \log p + \varepsilon`; then
    M is minus the natural gradient of the precision, and :math:`I - M` is the mean negative Hessian.

    Args:
        scale: Kind of scale operator σ.
        noise: Distribution of ε.

    Raises:
        ValueError: A scale that is not diagonal with a noise that is not rotation invariant: σσᵀ would not say what q
            is.
    """

    scale: Scale
    noise: Noise

    def __post_init__(self) -> None:
        if not (self.noise.rotation_invariant or isinstance(self.scale, Diagonal)):
            raise ValueError(f"{self.noise} is not rotation invariant and needs a diagonal scale, not {self.scale}")

    @property
    def is_dense(self) -> bool:  # type: ignore[override]
        """As of the scale."""
        return self.scale.is_dense

    def noise_quantile(self, probability: float) -> float:
        """As of the noise."""
        return self.noise.quantile(probability)

    @property
    def num_moments(self) -> float:
        """As of the noise."""
        return self.noise.num_moments

    def precursor(self, dim: int) -> Family | None:
        """The same with normal noise, whose natural gradients have the least noise of their own."""
        return None if isinstance(self.noise, Normal) else LocationScale(self.scale, Normal())

    def to_precursor(self, params: Params) -> Params:
        """With the same variance."""
        return Params(params.loc, params.scale * self.noise.variance**0.5)

    def from_precursor(self, params: Params) -> Params:
        """With the same variance."""
        return Params(params.loc, params.scale / self.noise.variance**0.5)

    def initial(self, loc: Tensor, size: float) -> Params:
        """Members at ``loc (*R, D)`` with σ a multiple of I and the standard deviation ``size``."""
        batch, size = tuple(loc.shape[:-1]), size / self.noise.variance**0.5
        return Params(loc, self.scale.isotropic(loc.shape[-1], size, batch=batch, dtype=loc.dtype).to(loc.device))

    def draw(
        self,
        shape: tuple[int, ...],
        dim: int,
        *,
        generator: torch.Generator | None,
        dtype: torch.dtype,
        device: torch.device | None = None,
    ) -> Tensor:
        """Draws of the noise."""
        return self.noise.sample((*shape, dim), generator=generator, dtype=dtype, device=device)

    def particles(self, half: Tensor) -> Tensor:
        """Pairs ±ε; of normal noise with exact second moments where there are enough of them."""
        return paired(half) if self.noise.matches_moments else torch.cat([half, -half])

    def sample(self, params: Params, eps: Tensor) -> Tensor:
        """Z = μ + σ·ε, ``(K, *R, D)``."""
        return params.loc + self.scale.multiply(params.scale, eps)

    def whiten(self, params: Params, z: Tensor) -> Tensor:
        """ε = σ⁻¹(z - μ), ``(K, *R, D)``."""
        return self.scale.solve(params.scale, z - params.loc)

    def log_prob(self, params: Params, z: Tensor) -> Tensor:
        """Log density of z, ``(K, *R)``."""
        return self.noise.log_prob(self.whiten(params, z)) - self.scale.log_det(params.scale)

    def entropy(self, params: Params) -> Tensor:
        """Entropy in nats, ``(*R)``."""
        return self.noise.entropy(params.loc.shape[-1]) + self.scale.log_det(params.scale)

    def kl(self, params: Params, other: Params) -> Tensor:
        r"""KL(params ‖ other) in nats, ``(*R)``; closed for normal and for Laplace noise.

        .. math:: \tfrac12 (\|\sigma_2^{-1}\sigma_1\|_F^2 + \|\sigma_2^{-1}(\mu_1 - \mu_2)\|^2 - D) + \log\det\sigma_2
                  - \log\det\sigma_1

        and, for Laplace noise with :math:`r = \sigma_1/\sigma_2` and :math:`d = |\mu_1 - \mu_2|`,
        :math:`\sum r e^{-d/\sigma_1} + d/\sigma_2 - 1 - \log r`.

        Raises:
            NotImplementedError: Student-t noise.
        """
        if isinstance(self.noise, Laplace):
            ratio, distance = params.scale / other.scale, (params.loc - other.loc).abs()
            terms = ratio * (-distance / params.scale).exp() + distance / other.scale - 1 - ratio.log()
            return terms.sum(-1)
        if not isinstance(self.noise, Normal):
            raise NotImplementedError(f"the KL divergence of two members with {self.noise} has no closed form")
        shift = self.scale.solve(other.scale, params.loc - other.loc).square().sum(-1)
        trace = self.scale.trace_of_ratio(params.scale, other.scale)
        log_det = self.scale.log_det(other.scale) - self.scale.log_det(params.scale)
        return 0.5 * (trace + shift - params.loc.shape[-1]) + log_det

    def covariance(self, params: Params) -> Tensor:
        """σσᵀ times the variance of the noise."""
        return self.noise.variance * self.scale.covariance(params.scale)

    def variance(self, params: Params) -> Tensor:
        """The diagonal of the same."""
        return self.noise.variance * self.scale.variance(params.scale)

    def quantile(self, params: Params, probability: float) -> Tensor:
        """Of every coordinate: the noise's own, by location and scale of the coordinate."""
        return params.loc + self.noise_quantile(probability) * self.scale.variance(params.scale).sqrt()

    def spread(self, params: Params, u: Tensor) -> Tensor:
        """σ·u."""
        return self.scale.multiply(params.scale, u)

    def spread_transposed(self, params: Params, x: Tensor) -> Tensor:
        """σᵀ·x."""
        return self.scale.multiply_transposed(params.scale, x)

    def unspread(self, params: Params, x: Tensor) -> Tensor:
        """σ⁻¹·x."""
        return self.scale.solve(params.scale, x)

    def fisher(self, params: Params) -> Tensor:
        """Fisher matrix for the location and the free entries of the scale, ``(*R, P, P)``.

        Raises:
            NotImplementedError: The noise is not normal; see :meth:`Noise.fisher` for whitened coordinates.
        """
        if not isinstance(self.noise, Normal):
            raise NotImplementedError(f"the Fisher matrix in free entries of a scale is for normal noise: {self.noise}")
        loc, scale = self.scale.fisher(params.scale)
        zeros = loc.new_zeros(*loc.shape[:-1], scale.shape[-1])
        return torch.cat([torch.cat([loc, zeros], -1), torch.cat([zeros.mT, scale], -1)], -2)

    def tangent(self, params: Params, loc_grad: Tensor, scale_grad: Tensor) -> Tangent:
        """The natural gradient, from gradients of the ELBO with respect to location and scale."""
        shift = self.scale.multiply_transposed(params.scale, loc_grad)
        return self._natural(shift, self.scale.whitened_gradient(params.scale, scale_grad))

    def _natural(self, shift: Tensor, stretch: Tensor, curvature: Tensor | None = None) -> Tangent:
        """The inverse Fisher matrix times a gradient in whitened coordinates: of δ, and of a symmetric S."""
        dim = shift.shape[-1]
        c, a, b = self.noise.fisher(dim)
        if b:
            stretch = self.scale.add_to_diagonal(stretch, -b / (a + b * dim) * self.scale.trace(stretch))
        return Tangent(shift / c, stretch * (2 / a), curvature)

    def inner(self, params: Params, one: Tangent, two: Tangent) -> Tensor:
        """Inner product in the Fisher metric, ``(*R)``: see :class:`Noise`, with S = M/2."""
        c, a, b = self.noise.fisher(one.shift.shape[-1])
        product = c * (one.shift * two.shift).sum(-1) + a / 4 * self.scale.inner(one.stretch, two.stretch)
        if b:
            product = product + b / 4 * self.scale.trace(one.stretch) * self.scale.trace(two.stretch)
        return product

    def estimate(self, params: Params, eps: Tensor, log_p: Tensor, grad: Tensor, *, newton: bool) -> Estimate:
        r"""Sticking-the-landing estimate of the ELBO's natural gradient.

        With :math:`h = \sigma^\top \nabla\log p + \psi(\varepsilon)`, ψ the noise's score, the gradient in whitened
        coordinates is :math:`E[h]` and :math:`\mathrm{sym}\,E[h\varepsilon^\top]`. The noise is that of the regression
        of h on ε: its residuals do not depend on how far q is from a Gaussian target, so neither does the noise.

        References:
            Roeder, Wu & Duvenaud 2017, "Sticking the landing", NeurIPS, eq. 8. Salimans & Knowles 2013, "Fixed-form
            variational posterior approximation through stochastic linear regression", Bayesian Analysis 8, Section 3
            (the regression).
        """
        num, num_pairs, dim = len(eps), len(eps) // 2, eps.shape[-1]
        c, a, _ = self.noise.fisher(dim)
        values = log_p - self.noise.log_prob(eps) + self.scale.log_det(params.scale)
        pairs = (values[:num_pairs] + values[num_pairs:]) / 2
        h = self.scale.multiply_transposed(params.scale, grad) + self.noise.score(eps)
        gradient = h.mean(0)
        variance = self.noise.variance
        if self.is_dense or newton:
            full, fitted = self._slope(h, eps)
            stretch = self.scale.part(full)
            # I minus the mean negative Hessian in whitened coordinates, scaled so that it is right where q = p
            identity = torch.eye(dim, dtype=full.dtype, device=full.device)
            curvature = full if c == 1 else identity + c * (full - identity)
            residual = h - gradient - fitted
            curvatures, vectors = eigh(curvature)
            turned_gradient = torch.einsum("...ij,...i->...j", vectors, gradient)
            turned = torch.einsum("...ij,k...i->k...j", vectors, residual)
        else:
            stretch = self.scale.mean_outer(h, eps)
            curvature, turned_gradient = None, gradient
            diagonal = self.scale.diagonal(stretch)
            curvatures = diagonal if c == 1 else 1 + c * (diagonal - 1)
            residual = turned = h - gradient - self.scale.apply(stretch, eps) / variance
        natural = self._natural(gradient, stretch, None if self.is_dense else curvature)
        # along each eigenvector of the mean Hessian: the Newton decrement where it is negative, the gradient's length
        # elsewhere
        floor = torch.finfo(h.dtype).eps
        precision = torch.where(curvatures < 1, (1 - curvatures).clamp_min(floor), torch.full_like(curvatures, c))
        scale_gap = self.scale.inner(stretch, natural.stretch) / 4
        location_noise = (turned.square().mean(0) / precision).sum(-1) / (2 * num)
        # residuals of a regression on D variables from n pairs are too small by (n - D) / n
        freedom = max(1 - dim / num_pairs, 0.25) if self.is_dense or newton else 1.0
        return Estimate(
            elbo=values.mean(0),
            error=pairs.std(0) / num_pairs**0.5,
            tangent=natural,
            length=self.squared_norm(params, natural) / 2,
            gap=(turned_gradient.square() / precision).sum(-1) / 2 + scale_gap,
            noise=(location_noise + self.scale.noise(residual, eps) / (a * num)) / freedom,
        )

    def _slope(self, h: Tensor, eps: Tensor) -> tuple[Tensor, Tensor]:
        r"""The symmetric part of :math:`E[h\varepsilon^\top]`, and what a regression on ε explains of h.

        Normal particles have an exact second moment. Other noises have not, and their tails are heavy: there h is
        regressed on both ε and ψ(ε), whose second moments with ε are known (the variance, and I by parts). So nothing
        is left to chance where the target is Gaussian (h is linear in both), nor where q = p (h is zero).
        """
        num, dim = len(eps), eps.shape[-1]
        if self.noise.matches_moments or num // 2 < ROOM * 2 * dim + 1:
            outer = torch.einsum("k...d,k...e->...de", h, eps) / num
            full = (outer + outer.mT) / 2
            return full, torch.einsum("...de,k...e->k...d", full / self.noise.variance, eps)
        features = torch.cat([eps, self.noise.score(eps)], -1)
        gram = torch.einsum("k...a,k...b->...ab", features, features) / num
        cross = torch.einsum("k...a,k...d->...ad", features, h) / num
        coefficients = torch.linalg.solve_ex(gram, cross).result
        full = self.noise.variance * coefficients[..., :dim, :] + coefficients[..., dim:, :]
        return (full + full.mT) / 2, torch.einsum("...ad,k...a->k...d", coefficients, features)

    def step(self, params: Params, tangent: Tangent, *, lr: Tensor | float, max_kl: Tensor | float) -> Step:
        r"""The longest natural step of size ρ ≤ ``lr`` with KL(new ‖ old) ≤ ``max_kl``.

        With :math:`P = \varphi(\rho M)` the new whitened precision (see :mod:`pyro_vi_lab.families.scale`),

        .. math:: \mu \leftarrow \mu + \sigma P^{-1} \rho\delta, \qquad \sigma\sigma^\top \leftarrow \sigma P^{-1}
        \sigma^\top.

        The KL is that of normal members with the same locations and scales, also for other noises.

        References:
            Khan & Rue 2023, "The Bayesian learning rule", JMLR 24, eq. 12 and 13.
        """
        values, vectors = self.scale.decompose(tangent.stretch)
        if tangent.curvature is None:
            loc_values, precision = values, retract
            shift = self.scale.rotate(vectors, tangent.shift)
        else:
            loc_values, loc_vectors = torch.linalg.eigh(tangent.curvature)
            precision = newton_precision
            c, _, _ = self.noise.fisher(params.loc.shape[-1])
            shift = torch.einsum("...ij,...i->...j", loc_vectors, c * tangent.shift)

        factors = torch.logspace(0, -(STEP_SIZES - 1) / 2, STEP_SIZES, base=2, dtype=values.dtype, device=values.device)
        sizes = torch.as_tensor(lr, dtype=values.dtype, device=values.device) * factors.reshape(
            -1, *(1,) * (values.dim() - 1)
        )
        sizes = sizes.expand(STEP_SIZES, *values.shape[:-1])
        last = torch.minimum(sizes[-1], _safe_size(values, loc_values, shift, max_kl))
        sizes = torch.cat([sizes[:-1], last.unsqueeze(0)])
        rho = sizes.unsqueeze(-1)
        kl = _kl_of_step(retract(rho * values), rho * shift / precision(rho * loc_values))
        # the first candidate inside the region; the last one always is, up to rounding
        inside = kl[:-1] <= torch.as_tensor(max_kl, dtype=kl.dtype, device=kl.device)
        index = torch.cat([inside, torch.ones_like(inside[:1])]).int().argmax(0, keepdim=True)
        size, kl = sizes.gather(0, index)[0], kl.gather(0, index)[0]

        rho = size.unsqueeze(-1)
        moved = rho * shift / precision(rho * loc_values)
        if tangent.curvature is None:
            moved = self.scale.rotate_back(vectors, moved, params.loc.shape[-1])
        else:
            moved = torch.einsum("...ij,...j->...i", loc_vectors, moved)
        loc = params.loc + self.scale.multiply(params.scale, moved)
        scale = self.scale.move(params.scale, retract(rho * values).reciprocal(), vectors)
        return Step(Params(loc, scale), size, kl)


def _safe_size(values: Tensor, loc_values: Tensor, shift: Tensor, max_kl: Tensor | float) -> Tensor:
    r"""A step size whose KL is below ``max_kl`` whatever the tangent.

    Where :math:`\rho |x| \le \tfrac12` for all eigenvalues, :math:`1/\varphi - 1 + \log\varphi \le \tfrac54 (\rho x)^2`
    and :math:`\|P^{-1} \rho\delta\|^2 \le 4 \rho^2 \|\delta\|^2`.
    """
    tiny = torch.finfo(values.dtype).tiny
    largest = torch.maximum(values.abs().amax(-1), loc_values.abs().amax(-1))
    bound = (0.625 * values.square()).sum(-1) + (2 * shift.square()).sum(-1)
    return torch.minimum(0.5 / largest.clamp_min(tiny), (max_kl / bound.clamp_min(tiny)).sqrt())


def _kl_of_step(precision: Tensor, moved: Tensor) -> Tensor:
    r"""KL(new ‖ old) of a normal family, from the whitened new precision's eigenvalues and the whitened shift.

    .. math:: \tfrac12 \sum (1/\varphi - 1 + \log\varphi) + \tfrac12 \|P^{-1} \rho\delta\|^2
    """
    return 0.5 * ((precision.reciprocal() - 1 + precision.log()).sum(-1) + moved.square().sum(-1))
