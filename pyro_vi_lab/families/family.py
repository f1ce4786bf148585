"""A family: a scale operator and a noise; its density, and its exact natural step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_vi_lab.families.noise import Noise
from pyro_vi_lab.families.scale import Scale, retract

STEP_SIZES = 49
"""Candidate step sizes of the trust region, each smaller than the last by the square root of two: down to 2⁻²⁴ of
``lr``, and then one that is always inside."""


class Params(NamedTuple):
    """Parameters of a batch of members of a family: ``loc (*R, D)`` and ``scale`` in the operator's own shape."""

    loc: Tensor
    scale: Tensor


class Tangent(NamedTuple):
    r"""A natural gradient of the ELBO in whitened coordinates, in which q is N(0, I).

    Args:
        shift: :math:`\delta = E[h]`, the natural gradient of the location there, ``(*R, D)``.
        stretch: :math:`M = \mathrm{sym}\, E[h \varepsilon^\top]` in the operator's shape: minus the natural gradient
        of the
            precision there; :math:`I - M` is the mean negative Hessian.
        curvature: The full :math:`M`, ``(*R, D, D)``, for families whose ``stretch`` is a part of it: then the
        location takes a
            Newton step with it. ``None`` if it is not known.
    """

    shift: Tensor
    stretch: Tensor
    curvature: Tensor | None = None


class Step(NamedTuple):
    """What a natural step did: the new parameters, the step size ρ ``(*R)`` and KL(new ‖ old) ``(*R)``."""

    params: Params
    size: Tensor
    kl: Tensor


@dataclass(frozen=True)
class Family:
    r"""The distributions of :math:`z = \mu + \sigma \varepsilon`.

    Args:
        scale: Kind of scale operator σ.
        noise: Distribution of ε.

    Shape:
        K particles come first, then the batch of fits ``*R``, then D: ``eps (K, *R, D)``.
    """

    scale: Scale
    noise: Noise

    def initial(self, loc: Tensor, size: float) -> Params:
        """Members at ``loc (*R, D)`` with σ = size·I."""
        batch = tuple(loc.shape[:-1])
        return Params(loc, self.scale.isotropic(loc.shape[-1], size, batch=batch, dtype=loc.dtype).to(loc.device))

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
        r"""KL(params ‖ other) in nats, ``(*R)``; closed for normal noise.

        .. math:: \tfrac12 (\|\sigma_2^{-1}\sigma_1\|_F^2 + \|\sigma_2^{-1}(\mu_1 - \mu_2)\|^2 - D) + \log\det\sigma_2
                  - \log\det\sigma_1
        """
        shift = self.scale.solve(other.scale, params.loc - other.loc).square().sum(-1)
        trace = self.scale.trace_of_ratio(params.scale, other.scale)
        log_det = self.scale.log_det(other.scale) - self.scale.log_det(params.scale)
        return 0.5 * (trace + shift - params.loc.shape[-1]) + log_det

    def fisher(self, params: Params) -> Tensor:
        """Fisher matrix for the location and the free entries of the scale, ``(*R, P, P)``."""
        loc, scale = self.scale.fisher(params.scale)
        zeros = loc.new_zeros(*loc.shape[:-1], scale.shape[-1])
        return torch.cat([torch.cat([loc, zeros], -1), torch.cat([zeros.mT, scale], -1)], -2)

    def squared_norm(self, tangent: Tangent) -> Tensor:
        r"""Squared length of a natural gradient in the Fisher metric, ``(*R)``.

        .. math:: \|\delta\|^2 + \tfrac12 \|M\|^2

        A step of size t has KL ≈ t²/2 of it, and gains about as much as that in the bound when t = 1 reaches the
        optimum.
        """
        return tangent.shift.square().sum(-1) + self.scale.squared_norm(tangent.stretch) / 2

    def step(self, params: Params, tangent: Tangent, *, lr: Tensor | float, max_kl: Tensor | float) -> Step:
        r"""The longest natural step of size ρ ≤ ``lr`` with KL(new ‖ old) ≤ ``max_kl``.

        With :math:`P = \varphi(\rho M)` the new whitened precision (see :mod:`pyro_vi_lab.families.scale`),

        .. math:: \mu \leftarrow \mu + \sigma P^{-1} \rho\delta, \qquad \sigma\sigma^\top \leftarrow \sigma P^{-1}
        \sigma^\top.

        Args:
            params: Where to start.
            tangent: The natural gradient there.
            lr: Largest step size, a number or one per fit.
            max_kl: Largest KL divergence from the old member, in nats, a number or one per fit.

        References:
            Khan & Rue 2023, "The Bayesian learning rule", JMLR 24, eq. 12 and 13.
        """
        values, vectors = self.scale.decompose(tangent.stretch)
        if tangent.curvature is None:
            loc_values, loc_vectors, loc_precision = values, vectors, retract
        else:
            loc_values, loc_vectors = torch.linalg.eigh(tangent.curvature)
            loc_precision = _newton_precision
        shift = tangent.shift if loc_vectors is None else torch.einsum("...ij,...i->...j", loc_vectors, tangent.shift)

        factors = torch.logspace(0, -(STEP_SIZES - 1) / 2, STEP_SIZES, base=2, dtype=values.dtype, device=values.device)
        sizes = torch.as_tensor(lr, dtype=values.dtype, device=values.device) * factors.reshape(
            -1, *(1,) * (values.dim() - 1)
        )
        sizes = sizes.expand(STEP_SIZES, *values.shape[:-1])
        last = torch.minimum(sizes[-1], _safe_size(values, loc_values, shift, max_kl))
        sizes = torch.cat([sizes[:-1], last.unsqueeze(0)])
        rho = sizes.unsqueeze(-1)
        kl = _kl_of_step(retract(rho * values), rho * shift / loc_precision(rho * loc_values))
        # the first candidate inside the region; the last one always is, up to rounding
        inside = kl[:-1] <= torch.as_tensor(max_kl, dtype=kl.dtype, device=kl.device)
        index = torch.cat([inside, torch.ones_like(inside[:1])]).int().argmax(0, keepdim=True)
        size, kl = sizes.gather(0, index)[0], kl.gather(0, index)[0]

        rho = size.unsqueeze(-1)
        moved = rho * shift / loc_precision(rho * loc_values)
        if loc_vectors is not None:
            moved = torch.einsum("...ij,...j->...i", loc_vectors, moved)
        loc = params.loc + self.scale.multiply(params.scale, moved)
        scale = self.scale.move(params.scale, retract(rho * values).reciprocal(), vectors)
        return Step(Params(loc, scale), size, kl)


def _newton_precision(x: Tensor) -> Tensor:
    """|1 - x|: the location has no cone to stay in, and a saddle is left downhill (saddle-free Newton)."""
    return (1 - x).abs().clamp_min(torch.finfo(x.dtype).eps)


def _safe_size(values: Tensor, loc_values: Tensor, shift: Tensor, max_kl: Tensor | float) -> Tensor:
    r"""A step size whose KL is below ``max_kl`` whatever the tangent.

    Where :math:`\rho |x| \le \tfrac12` for all eigenvalues, :math:`1/\varphi - 1 + \log\varphi \le \tfrac54 (\rho x)^2`
    and :math:`\|P^{-1} \rho\delta\|^2 \le 4 \rho^2 \|\delta\|^2`.
    """
    tiny = torch.finfo(values.dtype).tiny
    largest = torch.maximum(values.abs().amax(-1), loc_values.abs().amax(-1))
    bound = (0.625 * values.square() + 2 * shift.square()).sum(-1)
    return torch.minimum(0.5 / largest.clamp_min(tiny), (max_kl / bound.clamp_min(tiny)).sqrt())


def _kl_of_step(precision: Tensor, moved: Tensor) -> Tensor:
    r"""KL(new ‖ old) of a normal family, from the whitened new precision's eigenvalues and the whitened shift.

    .. math:: \tfrac12 \sum (1/\varphi - 1 + \log\varphi) + \tfrac12 \|P^{-1} \rho\delta\|^2
    """
    return 0.5 * (precision.reciprocal() - 1 + precision.log() + moved.square()).sum(-1)
