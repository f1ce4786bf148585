r"""Mixtures of normal distributions, for posteriors with several modes, skew or heavy tails."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pyro_vi_lab.families.family import Estimate, Family, Params, Step, Tangent
from pyro_vi_lab.families.location_scale import STEP_SIZES, LocationScale
from pyro_vi_lab.families.noise import Normal
from pyro_vi_lab.families.particles import paired
from pyro_vi_lab.families.rosenblatt import Components, attached, from_normal, quantile, to_normal
from pyro_vi_lab.families.scale import Dense, Scale

NORMAL = Normal()
MIN_LOG_WEIGHT = -50.0
"""Least log weight of a component: it costs nothing in the bound, and the way back takes a few steps only."""
SAME_MODE = 1.0
"""Nats between two fits of the precursor below which they are of one mode."""
NEGLIGIBLE = 10.0
"""Nats below the best fit from which a mode has no weight that matters: half a ten-thousandth."""
OFFSET, UNEVENNESS = 0.6, 0.3
"""How far apart components of one mode start, in its standard deviations, and how different their variances are."""


@dataclass(frozen=True)
class Mixture(Family):
    r"""The distributions :math:`q(z) = \sum_c \pi_c\, N(z \mid m_c, L_c L_c^\top)`.

    ``Params.loc`` is the mean of the mixture, and ``scale (*R, C, P)`` holds for each component the logarithm of its
    weight, up to a constant, the offset of its mean, up to a vector that all share, and the entries of its own scale.

    Natural gradients are those of the joint distribution of z and of the component c it is from, whose Fisher matrix is
    block diagonal: with :math:`h_c = L_c^\top \nabla_z (\log p - \log q)`,

    .. math:: \delta_c = E_{q_c}[h_c], \qquad M_c = \mathrm{sym}\, E_{q_c}[h_c \varepsilon^\top], \qquad
              w_c = E_{q_c}[\log p - \log q] - \textstyle\sum_k \pi_k E_{q_k}[\log p - \log q].

    Each component takes the step of a normal family whose target is :math:`\log p - \log q + \log q_c`. Particles are
    drawn from every component, as many for a light one as for a heavy one. ``Tangent.shift (*R, C, D)`` is
    :math:`\delta`, ``Tangent.stretch (*R, C, 1 + ...)`` holds w and then the entries of M.

    Args:
        num_components: C, at least 1.
        scale: Kind of scale operator of the components, ``Dense()`` or ``Diagonal()``.

    References:
        Lin, Khan & Schmidt 2019, "Fast and simple natural-gradient variational inference with mixture of
        exponential-family approximations", ICML, Section 4. Arenz, Dahlinger, Ye, Volpp & Neumann 2023, "A unified
        perspective on natural gradient variational inference with Gaussian mixture models", TMLR (trust regions of
        components).
    """

    num_components: int
    scale: Scale = field(default_factory=Dense)

    has_small_step = False
    safe_kl = 0.5  # a component that noise moves away from the others comes back slowly

    def __post_init__(self) -> None:
        if self.num_components < 1:
            raise ValueError(f"num_components must be at least 1, got {self.num_components}")

    # --- parameters -------------------------------------------------------------------------------------------------

    @property
    def component(self) -> LocationScale:
        """The family of a component."""
        return LocationScale(self.scale, NORMAL)

    @property
    def is_dense(self) -> bool:  # type: ignore[override]
        """As of the scale."""
        return self.scale.is_dense

    @property
    def num_parts(self) -> int:  # type: ignore[override]
        """One for each component."""
        return self.num_components

    def split(self, params: Params) -> tuple[Tensor, Params]:
        """Log weights ``(*R, C)`` and components ``(*R, C, ...)``."""
        dim = params.loc.shape[-1]
        log_weights = torch.log_softmax(params.scale[..., 0], -1)
        offsets = params.scale[..., 1 : 1 + dim]
        center = params.loc - torch.einsum("...c,...cd->...d", log_weights.exp(), offsets)
        return log_weights, Params(center.unsqueeze(-2) + offsets, self._unpacked(params.scale[..., 1 + dim :], dim))

    def join(self, log_weights: Tensor, components: Params) -> Params:
        """The mixture of components with these log weights, up to a constant."""
        log_weights = torch.log_softmax(log_weights, -1)
        loc = torch.einsum("...c,...cd->...d", log_weights.exp(), components.loc)
        offsets = components.loc - loc.unsqueeze(-2)
        return Params(loc, torch.cat([log_weights.unsqueeze(-1), offsets, self._packed(components.scale)], -1))

    def _packed(self, scale: Tensor) -> Tensor:
        return scale.flatten(-2) if self.is_dense else scale

    def _unpacked(self, scale: Tensor, dim: int) -> Tensor:
        return scale.unflatten(-1, (dim, dim)) if self.is_dense else scale

    def _normals(self, params: Params) -> Components:
        log_weights, (locs, scale) = self.split(params)
        return Components(log_weights, locs, scale if self.is_dense else torch.diag_embed(scale))

    # --- where to start ---------------------------------------------------------------------------------------------

    def precursor(self, dim: int) -> Family | None:
        """One normal distribution, fitted from several places: each finds a mode."""
        return self.component

    @property
    def has_modes(self) -> bool:  # type: ignore[override]
        """Unless there is one component only."""
        return self.num_components > 1

    def to_precursor(self, params: Params) -> Params:
        """With the same mean and covariance, or variances."""
        if self.is_dense:
            return Params(params.loc, torch.linalg.cholesky(self.covariance(params)))
        return Params(params.loc, self.variance(params).sqrt())

    def from_precursor(self, params: Params) -> Params:
        """All components in one mode, apart from each other, with its mean and covariance."""
        components = self._apart(params, self.num_components, UNEVENNESS)
        return self.join(components.loc.new_zeros(components.loc.shape[:-1]), components)

    def from_precursors(self, params: Params, elbo: Tensor) -> Params:
        """The modes that the fits have found, weighted by their evidence; components left over go to the heavy ones.

        Shape:
            params ``(M, *R, ...)``, elbo ``(M, *R)``.
        """
        batch = elbo.shape[1:]
        one, two = (Params(*(value.unsqueeze(axis) for value in params)) for axis in (1, 0))
        distance = self.component.kl(one, two)
        distance = torch.minimum(distance, distance.transpose(0, 1)).reshape(len(elbo), len(elbo), -1)
        flat = Params(*(value.flatten(1, len(batch)) if batch else value.unsqueeze(1) for value in params))
        elbo = torch.nan_to_num(elbo, nan=-math.inf, posinf=-math.inf).reshape(len(elbo), -1)
        each = [
            self._mixture_of_modes(Params(*(value[:, r] for value in flat)), elbo[:, r], distance[..., r])
            for r in range(elbo.shape[1])
        ]
        return Params(*(torch.stack(values).reshape(*batch, *values[0].shape) for values in zip(*each, strict=True)))

    def _mixture_of_modes(self, params: Params, elbo: Tensor, distance: Tensor) -> Params:
        modes: list[int] = []
        for i in elbo.argsort(descending=True).tolist():
            if modes and not float(elbo[i]) > float(elbo[modes[0]]) - NEGLIGIBLE:
                break
            if not modes or float(distance[i, modes].min()) > SAME_MODE:
                modes.append(i)
        modes = modes[: self.num_components]
        log_weights = torch.log_softmax(elbo[modes], 0) if len(modes) > 1 else elbo.new_zeros(1)
        counts = torch.ones_like(log_weights)
        for _ in range(self.num_components - len(modes)):
            counts[(log_weights - counts.log()).argmax()] += 1
        numbers = [int(count) for count in counts]
        parts = [
            self._apart(Params(*(value[i] for value in params)), number, UNEVENNESS)
            for i, number in zip(modes, numbers, strict=True)
        ]
        components = Params(*(torch.cat(values) for values in zip(*parts, strict=True)))
        return self.join((log_weights - counts.log()).repeat_interleave(counts.long()), components)

    def _apart(self, params: Params, number: int, unevenness: float) -> Params:
        """Several components of equal weight ``(*R, number, ...)`` with the mean and (co)variance of one normal."""
        loc, scale = params
        dim = loc.shape[-1]
        if number == 1:
            return Params(loc.unsqueeze(-2), self._unpacked(self._packed(scale).unsqueeze(-2), dim))
        # pairs on either side of the mean, along columns of a cosine transform: the same every time, none special
        rows = (torch.arange(dim, dtype=loc.dtype, device=loc.device) + 0.5) * math.pi / dim
        orders = torch.arange(1, number // 2 + 1, dtype=loc.dtype, device=loc.device) % dim
        columns = torch.cos(rows * orders.unsqueeze(-1))
        columns = OFFSET * columns / columns.norm(dim=-1, keepdim=True)
        offsets = torch.cat([columns, -columns, columns.new_zeros(number % 2, dim)])
        rest = torch.eye(dim, dtype=loc.dtype, device=loc.device) - offsets.mT @ offsets / number
        uneven = 1 + torch.linspace(-unevenness, unevenness, number, dtype=loc.dtype, device=loc.device)
        root = torch.linalg.cholesky(rest * uneven[:, None, None]) if self.is_dense else None
        locs = loc.unsqueeze(-2) + self.scale.multiply(self._per_part(scale), offsets)
        if root is None:
            return Params(locs, scale.unsqueeze(-2) * (rest.diagonal() * uneven.unsqueeze(-1)).sqrt())
        return Params(locs, self._per_part(scale) @ root)

    def _per_part(self, scale: Tensor) -> Tensor:
        """With an axis for components."""
        return scale.unsqueeze(-3 if self.is_dense else -2)

    def initial(self, loc: Tensor, size: float) -> Params:
        """Mixtures that are symmetric about ``loc``, with the covariance ``size²`` times the identity."""
        around = self.component.initial(torch.zeros_like(loc), size)  # loc itself may be infinite, as a prior's mean
        components = self._apart(around, self.num_components, 0.0)
        return self.join(loc.new_zeros(components.loc.shape[:-1]), components)._replace(loc=loc)

    # --- the distribution -------------------------------------------------------------------------------------------

    def noise_dim(self, dim: int) -> int:
        """CD + 1: normal noise for each component, and a normal number that says which of them z is from."""
        return self.num_components * dim + 1

    def draw(
        self,
        shape: tuple[int, ...],
        dim: int,
        *,
        generator: torch.Generator | None,
        dtype: torch.dtype,
        device: torch.device | None = None,
    ) -> Tensor:
        """Standard normal draws."""
        return NORMAL.sample((*shape, self.noise_dim(dim)), generator=generator, dtype=dtype, device=device)

    def particles(self, half: Tensor) -> Tensor:
        """Pairs ±ε for each component, with exact second moments where there are enough of them."""
        which = half[..., -1:]
        return torch.cat([paired(self._noise(half)).flatten(-2), torch.cat([which, which])], -1)

    def _noise(self, eps: Tensor) -> Tensor:
        return eps[..., :-1].unflatten(-1, (self.num_components, -1))

    def sample(self, params: Params, eps: Tensor) -> Tensor:
        """Draws ``(K, *R, D)``, with gradients by implicit reparameterization."""
        with torch.no_grad():
            log_weights, components = self.split(params)
            z = self.component.sample(components, self._noise(eps))
            ends = log_weights.exp().cumsum(-1)[..., :-1]
            chosen = (torch.special.ndtr(eps[..., -1:]) > ends).sum(-1)
            index = chosen[..., None, None].expand(*z.shape[:-2], 1, z.shape[-1])
            z = z.gather(-2, index).squeeze(-2)
        if torch.is_grad_enabled() and (params.loc.requires_grad or params.scale.requires_grad):
            return attached(self._normals(params), z)
        return z

    def points(self, params: Params, eps: Tensor) -> Tensor:
        """A draw from each component, ``(K·C, *R, D)``."""
        _, components = self.split(params)
        return self.component.sample(components, self._noise(eps)).movedim(-2, 1).flatten(0, 1)

    def log_prob(self, params: Params, z: Tensor) -> Tensor:
        """Log density of z, ``(K, *R)``."""
        log_weights, components = self.split(params)
        return (log_weights + self.component.log_prob(components, z.unsqueeze(-2))).logsumexp(-1)

    def entropy(self, params: Params) -> Tensor:
        """Not closed.

        Raises:
            NotImplementedError: Always.
        """
        raise NotImplementedError("the entropy of a mixture has no closed form: take the mean of -log_prob over draws")

    def kl(self, params: Params, other: Params) -> Tensor:
        """Not closed; see :meth:`kl_bound`.

        Raises:
            NotImplementedError: Always.
        """
        raise NotImplementedError("the KL divergence of two mixtures has no closed form: kl_bound() is above it")

    def kl_bound(self, params: Params, other: Params) -> Tensor:
        r"""The KL divergence of the joint distributions of z and its component, which is above that of z, ``(*R)``.

        .. math:: \sum_c \pi_c \bigl(\mathrm{KL}(q_c \,\|\, q'_c) + \log \pi_c - \log \pi'_c\bigr)
        """
        (ours, one), (theirs, two) = self.split(params), self.split(other)
        return (ours.exp() * (self.component.kl(one, two) + ours - theirs)).sum(-1)

    def covariance(self, params: Params) -> Tensor:
        """Within the components and between them."""
        log_weights, components = self.split(params)
        away = components.loc - params.loc.unsqueeze(-2)
        outer = away.unsqueeze(-1) * away.unsqueeze(-2)
        return torch.einsum("...c,...cij->...ij", log_weights.exp(), self.component.covariance(components) + outer)

    def variance(self, params: Params) -> Tensor:
        """The diagonal of the same."""
        log_weights, components = self.split(params)
        away = components.loc - params.loc.unsqueeze(-2)
        return torch.einsum("...c,...ci->...i", log_weights.exp(), self.component.variance(components) + away.square())

    def quantile(self, params: Params, probability: float) -> Tensor:
        """Of every coordinate, which is a mixture in one dimension."""
        u = self.noise_quantile(probability)
        if math.isinf(u):
            return torch.full_like(params.loc, u)
        log_weights, components = self.split(params)
        size = self.component.variance(components).sqrt()
        return quantile(log_weights.unsqueeze(-2), components.loc.mT, size.mT, torch.full_like(params.loc, u))

    def noise_quantile(self, probability: float) -> float:
        """Of the standard normal distribution."""
        return NORMAL.quantile(probability)

    def to_normal(self, params: Params, z: Tensor) -> Tensor:
        """Standard normal noise from draws, by the conditional distribution functions."""
        return to_normal(self._normals(params), z)

    def from_normal(self, params: Params, u: Tensor) -> Tensor:
        """The inverse of :meth:`to_normal`, with gradients by implicit differentiation."""
        mixture = self._normals(params)
        with torch.no_grad():
            z = from_normal(mixture, u)
        needs = torch.is_grad_enabled() and any(value.requires_grad for value in (*params, u))
        return attached(mixture, z, u) if needs else z

    def spread(self, params: Params, u: Tensor) -> Tensor:
        """Along the Cholesky factor of the covariance, or the standard deviations."""
        return self.scale.multiply(self.to_precursor(params).scale, u)

    def spread_transposed(self, params: Params, x: Tensor) -> Tensor:
        """The transpose of the same."""
        return self.scale.multiply_transposed(self.to_precursor(params).scale, x)

    def unspread(self, params: Params, x: Tensor) -> Tensor:
        """The inverse of :meth:`spread`."""
        return self.scale.solve(self.to_precursor(params).scale, x)

    # --- natural gradients ------------------------------------------------------------------------------------------

    def fisher(self, params: Params) -> Tensor:
        """Not closed; :meth:`inner` is in the Fisher metric of the joint distribution of z and its component.

        Raises:
            NotImplementedError: Always.
        """
        raise NotImplementedError("the Fisher matrix of a mixture has no closed form")

    def tangent(self, params: Params, loc_grad: Tensor, scale_grad: Tensor) -> Tangent:
        """The natural gradient, from gradients of the ELBO with respect to location and scale."""
        dim = params.loc.shape[-1]
        log_weights, components = self.split(params)
        weights = log_weights.exp()
        away = components.loc - params.loc.unsqueeze(-2)
        # the mean stays where it is when a weight or an offset changes: take back what that moves of all components
        of_locs = scale_grad[..., 1 : 1 + dim] / weights.unsqueeze(-1) + loc_grad.unsqueeze(-2)
        of_weights = scale_grad[..., 0] / weights + torch.einsum("...cd,...d->...c", away, loc_grad)
        of_scales = self._unpacked(scale_grad[..., 1 + dim :] / weights.unsqueeze(-1), dim)
        part = self.component.tangent(components, of_locs, of_scales)
        return self._tangent(log_weights, of_weights, part)

    def _tangent(self, log_weights: Tensor, of_weights: Tensor, part: Tangent) -> Tangent:
        of_weights = of_weights - (log_weights.exp() * of_weights).sum(-1, keepdim=True)
        return Tangent(
            part.shift, torch.cat([of_weights.unsqueeze(-1), self._packed(part.stretch)], -1), part.curvature
        )

    def _parts(self, tangent: Tangent) -> tuple[Tensor, Tangent]:
        stretch = self._unpacked(tangent.stretch[..., 1:], tangent.shift.shape[-1])
        return tangent.stretch[..., 0], Tangent(tangent.shift, stretch, tangent.curvature)

    def inner(self, params: Params, one: Tangent, two: Tangent) -> Tensor:
        """Inner product in the Fisher metric of the joint distribution of z and its component, ``(*R)``."""
        log_weights, components = self.split(params)
        (first, one), (second, two) = self._parts(one), self._parts(two)
        return (log_weights.exp() * (self.component.inner(components, one, two) + first * second)).sum(-1)

    def estimate(self, params: Params, eps: Tensor, log_p: Tensor, grad: Tensor, *, newton: bool) -> Estimate:
        r"""Sticking-the-landing estimate of the ELBO's natural gradient from draws of every component.

        That of each component is a normal family's, with :math:`\log p - \log q + \log q_c` as its target.

        Shape:
            eps ``(K, *R, CD + 1)``, log_p ``(K·C, *R)``, grad ``(K·C, *R, D)``.
        """
        log_weights, components = self.split(params)
        weights, number = log_weights.exp(), self.num_components
        noise = self._noise(eps)  # (K, *R, C, D)
        z = self.component.sample(components, noise)
        inverse = self._inverse(components.scale)
        # of every draw under every component, (K, *R, C, C, D)
        white = self.scale.multiply(_per_draw(inverse, self.is_dense), z.unsqueeze(-2) - components.loc.unsqueeze(-3))
        log_normals = NORMAL.log_prob(white) - self.scale.log_det(components.scale).unsqueeze(-2)
        joint = log_weights.unsqueeze(-2) + log_normals
        log_q = joint.logsumexp(-1)
        scores = self.scale.multiply_transposed(_per_draw(inverse, self.is_dense), white)  # minus those of log q_k
        score = torch.einsum("...ck,...ckd->...cd", (joint - log_q.unsqueeze(-1)).exp(), scores)
        own = torch.arange(number, device=z.device)
        log_p = log_p.unflatten(0, (-1, number)).movedim(1, -1)
        grad = grad.unflatten(0, (-1, number)).movedim(1, -2)
        target = log_p - log_q + log_normals[..., own, own]
        of_target = grad + score - scores[..., own, own, :]
        each = self.component.estimate(components, noise, target, of_target, newton=newton)
        elbo = (weights * each.elbo).sum(-1)
        natural = self._tangent(log_weights, each.elbo, each.tangent)
        gain = natural.stretch[..., 0]
        return Estimate(
            elbo=elbo,
            error=(weights * each.error).square().sum(-1).sqrt(),
            tangent=natural,
            length=(weights * (each.length + gain.square() / 2)).sum(-1),
            gap=(weights * each.gap).sum(-1) + (log_weights + gain).logsumexp(-1).clamp_min(0),
            noise=(weights * (each.noise + (1 - weights) * each.error.square() / 2)).sum(-1),
        )

    def _inverse(self, scale: Tensor) -> Tensor:
        if not self.is_dense:
            return scale.reciprocal()
        identity = torch.eye(scale.shape[-1], dtype=scale.dtype, device=scale.device)
        return torch.linalg.solve_triangular(scale, identity.expand(scale.shape), upper=False)

    def step(self, params: Params, tangent: Tangent, *, lr: Tensor | float, max_kl: Tensor | float) -> Step:
        r"""The longest natural step of each component and of the weights with KL(new ‖ old) ≤ ``max_kl``.

        By the chain rule that divergence is at most

        .. math:: \sum_c \pi'_c\, \mathrm{KL}(q'_c \,\|\, q_c) + \mathrm{KL}(\pi' \,\|\, \pi),

        of which half is for the components, each with a trust region of its own, and half for the weights. The size of
        the step is the mean of theirs, weighted by what they promise to gain, and the KL is that bound.
        """
        log_weights, components = self.split(params)
        gain, part = self._parts(tangent)
        lr = torch.as_tensor(lr, dtype=gain.dtype, device=gain.device).expand(gain.shape[:-1])
        max_kl = torch.as_tensor(max_kl, dtype=gain.dtype, device=gain.device).expand(gain.shape[:-1])
        wide_lr, wide_kl = (value.unsqueeze(-1).expand(gain.shape) for value in (lr, max_kl / 2))
        moved = self.component.step(components, part, lr=wide_lr, max_kl=wide_kl)
        weights_size, new, weights_kl = _weights_step(log_weights, gain, lr, max_kl / 2)

        lengths = self.component.squared_norm(components, part)
        shares = torch.cat([log_weights.exp() * lengths, (log_weights.exp() * gain.square()).sum(-1, keepdim=True)], -1)
        sizes = torch.cat([moved.size, weights_size.unsqueeze(-1)], -1)
        mean = (shares * sizes).sum(-1) / shares.sum(-1).clamp_min(torch.finfo(gain.dtype).tiny)
        size = torch.where((sizes >= lr.unsqueeze(-1)).all(-1) | (shares.sum(-1) <= 0), lr, mean)
        return Step(self.join(new, moved.params), size, (new.exp() * moved.kl).sum(-1) + weights_kl)


def _per_draw(scale: Tensor, is_dense: bool) -> Tensor:
    """With an axis for the components that draws are from, before that of the components."""
    return scale.unsqueeze(-4 if is_dense else -3)


def _weights_step(log_weights: Tensor, gain: Tensor, lr: Tensor, max_kl: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    r"""Size, new log weights and KL(new ‖ old) of the longest step :math:`\log\pi + \rho w` inside the trust region."""
    factors = torch.logspace(
        0, -(STEP_SIZES - 1) / 2, STEP_SIZES, base=2, dtype=gain.dtype, device=gain.device
    ).reshape(-1, *(1,) * lr.dim())
    # the last of them is inside for certain: no ratio of weights changes by more than exp(max_kl)
    spread = (gain.amax(-1) - gain.amin(-1)).clamp_min(torch.finfo(gain.dtype).tiny)
    sizes = lr * factors
    sizes = torch.cat([sizes[:-1], torch.minimum(sizes[-1], max_kl / spread).unsqueeze(0)])
    moved = torch.log_softmax(log_weights + sizes.unsqueeze(-1) * gain, -1).clamp_min(MIN_LOG_WEIGHT)
    moved = torch.log_softmax(moved, -1)
    kl = (moved.exp() * (moved - log_weights)).sum(-1).clamp_min(0)
    inside = torch.cat([kl[:-1] <= max_kl, torch.ones_like(kl[:1], dtype=torch.bool)])
    index = inside.int().argmax(0, keepdim=True)
    chosen = moved.gather(0, index.unsqueeze(-1).expand(1, *gain.shape))[0]
    return sizes.gather(0, index)[0], chosen, kl.gather(0, index)[0]
