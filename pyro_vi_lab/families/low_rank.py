"""Normal distributions whose covariance is a diagonal plus a matrix of low rank."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_vi_lab.families.factors import low_rank_approximation
from pyro_vi_lab.families.family import Estimate, Family, Params, Step, Tangent, eigh, newton_precision
from pyro_vi_lab.families.location_scale import LocationScale
from pyro_vi_lab.families.noise import Normal
from pyro_vi_lab.families.particles import paired
from pyro_vi_lab.families.scale import Dense, Diagonal, retract

STEP_SIZES = 16
"""Candidate step sizes of the trust region, each half the last, and then one of zero."""
SOLVER_STEPS = 30
SOLVER_TOLERANCE = 1e-4
"""Conjugate gradients stop there, relative to the right-hand side: far below the noise of a gradient."""
DAMPING = 0.01
"""Added to the Fisher matrix of ds/s and of U in standard deviations, whose diagonal is about 2 where both say
something: U and UQ with an orthogonal Q are the same covariance, and s hardly matters where U explains everything."""
MAX_FULL_RANK = 200
"""Largest D for which a full-rank normal is fitted first: it tells in which directions U is to extend."""
NORMAL = Normal()


@dataclass(frozen=True)
class LowRank(Family):
    r"""The distributions :math:`N(\mu, \operatorname{diag}(s^2) + UU^\top)`.

    As :math:`z = \mu + s \circ \varepsilon_1 + U\varepsilon_2`; ``scale (*R, D, 1 + r)`` holds s in its first column,
    then U. All costs are linear in D. The natural gradient of s and U solves a linear system with their Fisher matrix
    :math:`\tfrac12\operatorname{tr}(\Sigma^{-1} d\Sigma\, \Sigma^{-1} d\Sigma)` by conjugate gradients.
    ``Tangent.shift`` is that of the location, and ``Tangent.stretch`` that of s (relative to s) and of U.

    Args:
        rank: r, at least 1.

    References:
        Ong, Nott & Smith 2018, "Gaussian variational approximation with a factor covariance structure", Journal of
        Computational and Graphical Statistics 27, Section 3. Tran, Nguyen, Nott & Kohn 2020, "Bayesian deep net GLM and
        GLMM", ibid. 29, Section 3.3 (natural gradient of such families).
    """

    rank: int
    max_lr = 0.5  # s and U answer for the same variances: together, full steps of both overshoot
    has_small_step = False  # conjugate gradients in a graph are one operator for each of their steps
    safe_kl = 0.5  # no step leaves the family, but U may grow in a direction that noise has chosen

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"rank must be at least 1, got {self.rank}")

    def noise_dim(self, dim: int) -> int:
        """D + r."""
        return dim + self.rank

    def precursor(self, dim: int) -> Family | None:
        """The full-rank family, or beyond :data:`MAX_FULL_RANK` the mean-field family."""
        return LocationScale(Dense() if dim <= MAX_FULL_RANK else Diagonal(), NORMAL)

    def to_precursor(self, params: Params) -> Params:
        """The same normal distributions, or location and s."""
        if params.loc.shape[-1] <= MAX_FULL_RANK:
            return Params(params.loc, torch.linalg.cholesky(self.covariance(params)))
        return Params(params.loc, params.scale[..., 0])

    def from_precursor(self, params: Params) -> Params:
        """The nearest to a full-rank normal; of a mean-field one the same with a small U, from which U grows."""
        loc, scale = params
        if loc.shape[-1] > MAX_FULL_RANK:
            return Params(loc, self._with_columns(scale))
        size, factor = low_rank_approximation(torch.cholesky_inverse(scale), self.rank)
        return Params(loc, torch.cat([size.unsqueeze(-1), factor], -1))

    def initial(self, loc: Tensor, size: float) -> Params:
        """Members at ``loc`` with the standard deviation ``size``, a part of it by a small U."""
        scale = self._with_columns(torch.ones_like(loc))
        return Params(loc, scale * (size / scale.norm(dim=-1, keepdim=True)))

    def _with_columns(self, size: Tensor) -> Tensor:
        """A scale of s and of columns of a cosine transform: orthogonal, the same every time, none of them special."""
        dim = size.shape[-1]
        rows = (torch.arange(dim, dtype=size.dtype, device=size.device) + 0.5) * math.pi / dim
        orders = torch.arange(1, self.rank + 1, dtype=size.dtype, device=size.device)
        factor = torch.cos(rows.unsqueeze(-1) * orders) * (size.unsqueeze(-1) / 2)
        return torch.cat([size.unsqueeze(-1), factor], -1)

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
        return NORMAL.sample((*shape, dim + self.rank), generator=generator, dtype=dtype, device=device)

    def particles(self, half: Tensor) -> Tensor:
        """Pairs ±ε, with exact second moments where there are enough of them."""
        return paired(half)

    def sample(self, params: Params, eps: Tensor) -> Tensor:
        """Z = μ + s∘ε₁ + U·ε₂, ``(K, *R, D)``."""
        size, factor = _parts(params.scale)
        dim = params.loc.shape[-1]
        return params.loc + size * eps[..., :dim] + torch.einsum("...dr,...r->...d", factor, eps[..., dim:])

    def log_prob(self, params: Params, z: Tensor) -> Tensor:
        """Log density of z, ``(K, *R)``."""
        inverse = _Inverse(params.scale)
        x = z - params.loc
        dim = x.shape[-1]
        return -0.5 * ((x * inverse(x)).sum(-1) + inverse.log_det + dim * math.log(2 * math.pi))

    def entropy(self, params: Params) -> Tensor:
        r""":math:`\tfrac{D}{2}\log 2\pi e + \tfrac12\log\det\Sigma`."""
        return NORMAL.entropy(params.loc.shape[-1]) + 0.5 * _Inverse(params.scale).log_det

    def kl(self, params: Params, other: Params) -> Tensor:
        """KL(params ‖ other) in nats, ``(*R)``, at a cost linear in D."""
        ours, theirs = _Inverse(params.scale), _Inverse(other.scale)
        size, factor = _parts(params.scale)
        shift = params.loc - other.loc
        diagonal = theirs.size.square().reciprocal() - theirs.root.square().sum(-1)
        trace = (diagonal * size.square()).sum(-1) + (factor * theirs.of_columns(factor)).sum((-2, -1))
        distance = (shift * theirs(shift)).sum(-1)
        return 0.5 * (trace + distance - shift.shape[-1] + theirs.log_det - ours.log_det)

    def covariance(self, params: Params) -> Tensor:
        """diag(s²) + UUᵀ."""
        size, factor = _parts(params.scale)
        return torch.diag_embed(size.square()) + factor @ factor.mT

    def variance(self, params: Params) -> Tensor:
        """Its diagonal."""
        return params.scale.square().sum(-1)

    def quantile(self, params: Params, probability: float) -> Tensor:
        """Of every coordinate, which is normal."""
        return params.loc + self.noise_quantile(probability) * self.variance(params).sqrt()

    def noise_quantile(self, probability: float) -> float:
        """Of the standard normal distribution."""
        return NORMAL.quantile(probability)

    def spread(self, params: Params, u: Tensor) -> Tensor:
        """S(I + AAᵀ)^½·u with U = S·A."""
        size, factor = _parts(params.scale)
        return size * _root(factor / size.unsqueeze(-1), u)

    def spread_transposed(self, params: Params, x: Tensor) -> Tensor:
        """The transpose of the same."""
        size, factor = _parts(params.scale)
        return _root(factor / size.unsqueeze(-1), size * x)

    def unspread(self, params: Params, x: Tensor) -> Tensor:
        """The inverse of :meth:`spread`."""
        size, factor = _parts(params.scale)
        return _root(factor / size.unsqueeze(-1), x / size, inverse=True)

    def fisher(self, params: Params) -> Tensor:
        """Fisher matrix for the location, and for ``scale`` in row-major order; singular, as U may be turned."""
        covariance = self.covariance(params)
        size, factor = _parts(params.scale)
        dim, columns = params.scale.shape[-2:]
        basis = torch.eye(dim * columns, dtype=size.dtype, device=size.device).reshape(-1, dim, columns)
        basis = basis.reshape(-1, *(1,) * (params.loc.dim() - 1), dim, columns)
        changed = basis[..., 1:] @ factor.mT
        changed = changed + changed.mT + torch.diag_embed(2 * size * basis[..., 0])
        precision = covariance.inverse()
        whitened = precision @ changed
        inner = 0.5 * torch.einsum("p...ij,q...ji->...pq", whitened, whitened)
        zeros = inner.new_zeros(*inner.shape[:-2], dim, dim * columns)
        return torch.cat([torch.cat([precision, zeros], -1), torch.cat([zeros.mT, inner], -1)], -2)

    def tangent(self, params: Params, loc_grad: Tensor, scale_grad: Tensor) -> Tangent:
        """The natural gradient, from gradients of the ELBO with respect to location and scale."""
        size, factor = _parts(params.scale)
        shift = size.square() * loc_grad + torch.einsum(
            "...dr,...r->...d", factor, torch.einsum("...dr,...d->...r", factor, loc_grad)
        )
        relative = torch.cat([(size * scale_grad[..., 0]).unsqueeze(-1), scale_grad[..., 1:]], -1)
        return Tangent(shift, _Fisher(params.scale).solve(relative))

    def inner(self, params: Params, one: Tangent, two: Tangent) -> Tensor:
        """Inner product in the Fisher metric, ``(*R)``."""
        fisher = _Fisher(params.scale)
        location = (one.shift * fisher.inverse(two.shift)).sum(-1)
        return location + (one.stretch * fisher(two.stretch)).sum((-2, -1))

    def estimate(self, params: Params, eps: Tensor, log_p: Tensor, grad: Tensor, *, newton: bool) -> Estimate:
        r"""Sticking-the-landing estimate of the ELBO's natural gradient.

        With :math:`x = z - \mu`, :math:`y = \Sigma^{-1}x` and :math:`g = \nabla\log p + y`, the gradients are
        :math:`E[g]` for the location, and for s and U the diagonal of C times s and CU, where
        :math:`C = \mathrm{sym}\,E[g y^\top]`: the expectation of those over all ε with the same z.

        References:
            Roeder, Wu & Duvenaud 2017, "Sticking the landing", NeurIPS, eq. 8.
        """
        num, num_pairs, dim = len(eps), len(eps) // 2, params.loc.shape[-1]
        size, factor = _parts(params.scale)
        fisher = _Fisher(params.scale)
        inverse = fisher.inverse
        x = self.sample(params, eps) - params.loc
        y = inverse(x)
        log_q = -0.5 * ((x * y).sum(-1) + inverse.log_det + dim * math.log(2 * math.pi))
        values = log_p - log_q
        pairs = (values[:num_pairs] + values[num_pairs:]) / 2
        g = grad + y
        gradient = g.mean(0)
        total = _scale_gradient(g, y, size, factor)
        curvature = None
        if newton:
            root, root_inverse = _dense_root(params.scale)
            h = torch.einsum("...ij,k...i->k...j", root, g)
            white = torch.einsum("...ij,k...j->k...i", root_inverse, x)
            outer = torch.einsum("k...d,k...e->...de", h, white) / num
            curvature = (outer + outer.mT) / 2
            curvatures, vectors = eigh(curvature)
            rest = h - h.mean(0) - torch.einsum("...de,k...e->k...d", curvature, white)
            residual = torch.einsum("...ij,k...i->k...j", root_inverse, rest)
            turned_gradient = torch.einsum("...ij,...i->...j", vectors, h.mean(0))
            turned = torch.einsum("...ij,k...i->k...j", vectors, rest)
            floor = torch.finfo(h.dtype).eps
            precision = torch.where(curvatures < 1, (1 - curvatures).clamp_min(floor), torch.ones_like(curvatures))
            gap = (turned_gradient.square() / precision).sum(-1) / 2
            noise = (turned.square().mean(0) / precision).sum(-1) / (2 * num)
            freedom = max(1 - dim / num_pairs, 0.25)
        else:
            residual = g - gradient - (g * y).mean(0) / y.square().mean(0) * y
            gap = (gradient * fisher.covariance_times(gradient)).sum(-1) / 2
            noise = (residual * fisher.covariance_times(residual)).sum(-1).mean(0) / (2 * num)
            freedom = 1.0
        # two halves of the pairs ±ε are independent: what they disagree in is noise
        rest_pairs, y_pairs = (value.unflatten(0, (2, num_pairs)) for value in (residual, y))
        halves = [
            _scale_gradient(rest_pairs[:, first::2].flatten(0, 1), y_pairs[:, first::2].flatten(0, 1), size, factor)
            for first in (0, 1)
        ]
        stretch, difference = fisher.solve(torch.stack([total, halves[0] - halves[1]]))
        scale_gap = (stretch * total).sum((-2, -1)) / 2
        scale_noise = (difference * (halves[0] - halves[1])).sum((-2, -1)) / 8
        natural = Tangent(fisher.covariance_times(gradient), stretch, curvature)
        return Estimate(
            elbo=values.mean(0),
            error=pairs.std(0) / num_pairs**0.5,
            tangent=natural,
            length=(gradient * natural.shift).sum(-1) / 2 + scale_gap,
            gap=gap + scale_gap,
            noise=(noise + scale_noise) / freedom,
        )

    def step(self, params: Params, tangent: Tangent, *, lr: Tensor | float, max_kl: Tensor | float) -> Step:
        r"""The longest natural step of size ρ ≤ ``lr`` with KL(new ‖ old) ≤ ``max_kl``.

        s moves by :math:`\varphi(2\rho\, ds/s)^{-1/2}`, as with a diagonal scale; so does U in its own column space,
        and linearly outside of it.
        """
        if tangent.curvature is not None:
            loc_values, loc_vectors = torch.linalg.eigh(tangent.curvature)
            root, root_inverse = _dense_root(params.scale)
            white = torch.einsum("...ij,...j->...i", root_inverse, tangent.shift)
            along = torch.einsum("...ij,...i->...j", loc_vectors, white)
            turn = root @ loc_vectors
        move = _Retraction(params.scale, tangent.stretch)

        def moved(rho: Tensor) -> Params:
            if tangent.curvature is None:
                shift = rho.unsqueeze(-1) * tangent.shift
            else:
                local = rho.unsqueeze(-1) * along / newton_precision(rho.unsqueeze(-1) * loc_values)
                shift = torch.einsum("...ij,...j->...i", turn, local)
            return Params(params.loc + shift, move(rho))

        batch = params.loc.shape[:-1]
        size = torch.as_tensor(lr, dtype=params.loc.dtype, device=params.loc.device).expand(batch)
        kl = self.kl(moved(size), params)
        for candidate in range(1, STEP_SIZES + 1):
            outside = ~(kl <= torch.as_tensor(max_kl, dtype=kl.dtype, device=kl.device))
            if not bool(outside.any()):
                break
            shrunk = size * (0.5 if candidate < STEP_SIZES else 0.0)
            size = torch.where(outside, shrunk, size)
            kl = torch.where(outside, self.kl(moved(size), params), kl)
        return Step(moved(size), size, kl)


def _parts(scale: Tensor) -> tuple[Tensor, Tensor]:
    return scale[..., 0], scale[..., 1:]


def _dense_root(scale: Tensor) -> tuple[Tensor, Tensor]:
    """A square root of Σ and its inverse, ``(*R, D, D)``."""
    size, factor = _parts(scale)
    identity = torch.eye(size.shape[-1], dtype=size.dtype, device=size.device)
    batched = identity.reshape(len(identity), *(1,) * (size.dim() - 1), -1)
    spread = factor / size.unsqueeze(-1)
    root = _root(spread, batched).movedim(0, -1)
    inverse = _root(spread, batched, inverse=True).movedim(0, -1)
    return size.unsqueeze(-1) * root, inverse / size.unsqueeze(-2)


def _root(a: Tensor, u: Tensor, *, inverse: bool = False) -> Tensor:
    """(I + AAᵀ)^½·u, or the inverse of that root."""
    values, vectors = torch.linalg.eigh(a.mT @ a)
    values = values.clamp_min(torch.finfo(values.dtype).tiny)
    # (√(1 + λ) - 1)/λ without the difference of nearly equal numbers
    grown = (1 + values).sqrt()
    factor = 1 / (grown + 1)
    if inverse:
        factor = -factor / grown
    along = torch.einsum("...dr,...d->...r", a @ vectors, u)
    return u + torch.einsum("...dr,...r->...d", a @ vectors, factor * along)


class _Inverse:
    """Σ⁻¹ = S⁻² - TTᵀ by the matrix inversion lemma, and log det Σ."""

    def __init__(self, scale: Tensor) -> None:
        self.size, factor = _parts(scale)
        spread = factor / self.size.unsqueeze(-1)
        identity = torch.eye(spread.shape[-1], dtype=scale.dtype, device=scale.device)
        small = torch.linalg.cholesky_ex(identity + spread.mT @ spread).L
        self.root = torch.linalg.solve_triangular(small, spread.mT, upper=False).mT / self.size.unsqueeze(-1)
        self.log_det = 2 * (self.size.log().sum(-1) + small.diagonal(dim1=-2, dim2=-1).log().sum(-1))

    def __call__(self, x: Tensor) -> Tensor:
        """Σ⁻¹·x for ``x (..., D)``."""
        along = torch.einsum("...dr,...d->...r", self.root, x)
        return x / self.size.square() - torch.einsum("...dr,...r->...d", self.root, along)

    def of_columns(self, x: Tensor) -> Tensor:
        """Σ⁻¹·X for ``X (..., D, n)``."""
        return x / self.size.square().unsqueeze(-1) - self.root @ (self.root.mT @ x)


class _Fisher:
    """The Fisher matrix of (ds/s, dU), ``(*R, D, 1 + r)``: times a vector, and its inverse."""

    def __init__(self, scale: Tensor) -> None:
        self.scale = scale
        self.size, self.factor = _parts(scale)
        self.inverse = _Inverse(scale)
        self.columns = self.inverse.of_columns(self.factor)  # Σ⁻¹U

    def covariance_times(self, x: Tensor) -> Tensor:
        """Σ·x for ``x (..., D)``."""
        along = torch.einsum("...dr,...d->...r", self.factor, x)
        return self.size.square() * x + torch.einsum("...dr,...r->...d", self.factor, along)

    def __call__(self, change: Tensor) -> Tensor:
        """The Fisher matrix times a change; one of more leading dimensions is a batch of changes."""
        relative, factor = _parts(change)
        weight = 2 * self.size.square() * relative
        solved = self.inverse.of_columns(factor)  # Σ⁻¹dU
        inverse_square = self.size.square().reciprocal()
        root = self.inverse.root
        # X = Σ⁻¹ dΣ Σ⁻¹ with dΣ = diag(weight) + dU·Uᵀ + U·dUᵀ
        product = (
            self.inverse.of_columns(weight.unsqueeze(-1) * self.columns)
            + solved @ (self.columns.mT @ self.factor)
            + self.columns @ (solved.mT @ self.factor)
        )
        middle = root.mT @ (weight.unsqueeze(-1) * root)
        diagonal = (
            inverse_square.square() * weight
            - 2 * inverse_square * weight * root.square().sum(-1)
            + ((root @ middle) * root).sum(-1)
            + 2 * (solved * self.columns).sum(-1)
        )
        return torch.cat([(self.size.square() * diagonal).unsqueeze(-1), product], -1)

    def diagonal(self) -> Tensor:
        """Its diagonal, to within a factor: what conjugate gradients are preconditioned with."""
        inverse_diagonal = self.size.square().reciprocal() - self.inverse.root.square().sum(-1)
        first = 2 * (self.size.square() * inverse_diagonal).square()
        small = (self.factor * self.columns).sum(-2)  # diagonal of UᵀΣ⁻¹U
        rest = inverse_diagonal.unsqueeze(-1) * small.unsqueeze(-2) + self.columns.square()
        return torch.cat([first.unsqueeze(-1), rest], -1)

    def solve(self, gradient: Tensor) -> Tensor:
        """Natural gradient of a gradient, by preconditioned conjugate gradients, all of a batch at once.

        Starting from zero the solution has no part that only turns U.
        """
        diagonal = self.diagonal()
        variance = self.scale.square().sum(-1, keepdim=True)
        damping = DAMPING * torch.cat([torch.ones_like(variance), (1 / variance).expand(self.factor.shape)], -1)
        precondition = (diagonal + damping).reciprocal()
        solution = torch.zeros_like(gradient)
        residual = gradient
        searched = direction = precondition * residual
        length = _dot(residual, searched)
        limit = SOLVER_TOLERANCE**2 * length
        for _ in range(SOLVER_STEPS):
            if not bool((length > limit).any()):
                break
            image = self(direction) + damping * direction
            rate = length / _dot(direction, image).clamp_min(torch.finfo(length.dtype).tiny)
            rate = torch.where(length > limit, rate, torch.zeros_like(rate))[..., None, None]
            solution = solution + rate * direction
            residual = residual - rate * image
            searched = precondition * residual
            new = _dot(residual, searched)
            ratio = new / length.clamp_min(torch.finfo(length.dtype).tiny)
            direction = searched + ratio[..., None, None] * direction
            length = torch.where(length > limit, new, length)
        return solution


def _dot(x: Tensor, y: Tensor) -> Tensor:
    return (x * y).sum((-2, -1))


def _scale_gradient(g: Tensor, y: Tensor, size: Tensor, factor: Tensor) -> Tensor:
    """Gradient for ds/s and U from particles of g and y, ``(*R, D, 1 + r)``."""
    first = size.square() * (g * y).mean(0)
    g_along = torch.einsum("...dr,k...d->k...r", factor, g)
    y_along = torch.einsum("...dr,k...d->k...r", factor, y)
    rest = torch.einsum("k...d,k...r->...dr", g, y_along) + torch.einsum("k...d,k...r->...dr", y, g_along)
    return torch.cat([first.unsqueeze(-1), rest / (2 * len(g))], -1)


class _Retraction:
    """Where a step of size ρ leads from s and U: s stays positive, and neither overshoots where it shrinks."""

    def __init__(self, scale: Tensor, stretch: Tensor) -> None:
        self.size, self.factor = _parts(scale)
        self.relative, change = _parts(stretch)
        # change = U·N + what is outside of U's columns; the antisymmetric part of N only turns U
        relative = self.factor / self.size.unsqueeze(-1)
        basis, triangle = torch.linalg.qr(relative)
        inside = torch.linalg.solve_triangular(
            _away_from_zero(triangle), basis.mT @ (change / self.size.unsqueeze(-1)), upper=True
        )
        self.outside = change - self.factor @ inside
        self.values, self.vectors = torch.linalg.eigh((inside + inside.mT) / 2)

    def __call__(self, rho: Tensor) -> Tensor:
        """The scale after a step of size ``rho (*R)``."""
        size = self.size * retract(2 * rho.unsqueeze(-1) * self.relative).rsqrt()
        step = rho.unsqueeze(-1) * self.values
        # growth goes along with what is outside: not faster, or U grows where it is and not where it should be
        grown = torch.where(step > 0, 1 + step, retract(2 * step).rsqrt())
        turned = (self.vectors * grown.unsqueeze(-2)) @ self.vectors.mT
        factor = self.factor @ turned + rho[..., None, None] * self.outside
        return torch.cat([size.unsqueeze(-1), factor], -1)


def _away_from_zero(triangle: Tensor) -> Tensor:
    """A triangular matrix that can be solved with, where columns of U are dependent."""
    diagonal = triangle.diagonal(dim1=-2, dim2=-1)
    smallest = torch.finfo(triangle.dtype).eps * diagonal.abs().amax(-1, keepdim=True)
    moved = torch.where(diagonal.abs() < smallest, smallest, diagonal)
    return triangle + torch.diag_embed(moved - diagonal)
