r"""Maximum of the ELBO over fixed draws, by Newton steps: variational inference with a deterministic objective.

With the draws :math:`\varepsilon_n` fixed, the ELBO of a normal family is a function like any other,

.. math:: \hat{\mathcal L}(\mu, \sigma) = \frac1N \sum_{n=1}^N \log p(\mu + \sigma \varepsilon_n)
          + \log\det\sigma + \text{const},

concave where log p is, with second derivatives made of those of log p. So its optimum is found to rounding error, and
three things can be computed there that a stochastic optimum does not give: how far it lies from the optimum over all
draws, and the covariances that the bound says the posterior has when it is tilted (linear response).

Everything is in coordinates in which the present q is a standard normal: the step (δ, T) goes to
:math:`\mu + \sigma\delta` and :math:`\sigma(I + T)`.

References:
    Giordano, Ingram & Broderick 2024, "Black box variational inference with a deterministic objective", JMLR 25.
    Burroni, Domke & Sheldon 2024, "Sample average approximation for black-box variational inference", UAI.
    Giordano, Broderick & Jordan 2018, "Covariances, robustness, and variational Bayes", JMLR 19.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_vi_lab.density import LogDensity
from pyro_vi_lab.families import Dense, Diagonal, LocationScale, Params
from pyro_vi_lab.families.particles import matches_moments
from pyro_vi_lab.trust_region import Local

MIN_DRAWS = 512
DRAWS_PER_DIMENSION, DENSE_DRAWS_PER_DIMENSION, MAX_DRAWS = 64, 128, 4096
"""Draws per dimension of a mean-field normal, and of a full-rank one; most of the former."""
SPARE = 1.25
"""Pairs of draws per moment that the Monte Carlo error may be cleared of."""
MAX_PARAMETERS = 24
"""Most parameters whose Hessian is formed in each step: it costs D products with vectors per draw. In whitened
coordinates it is near the identity, so that conjugate gradients need few products."""
CHUNK_NUMBERS = 2**24
"""Numbers held at a time to form a Hessian (128 MiB in float64)."""


class Sensitivity(NamedTuple):
    r"""What the second derivatives at the optimum over fixed draws say.

    Args:
        linear_response: Covariance of z, :math:`[(-\nabla^2 \hat{\mathcal L})^{-1}]_{\mu\mu}`.
        loc_error: Standard error of the location, from the choice of the draws.
        log_sd_error: Standard error of the logarithm of every coordinate's standard deviation.

    Shape:
        linear_response ``(D, D)``, the others ``(D,)``.
    """

    linear_response: Tensor
    loc_error: Tensor
    log_sd_error: Tensor


class FixedDrawELBO:
    """The ELBO of a normal over fixed draws, as what is maximized over ``Params`` without a batch of fits.

    Args:
        density: Log density of z.
        family: A normal family with a diagonal or a dense scale.
        eps: The draws, as of :func:`fixed_draws`.

    Shape:
        eps ``(N, D)``.

    Attributes:
        num_gradients: Gradients so far, over draws; a product of second derivatives with a vector counts as one.
    """

    def __init__(self, density: LogDensity, family: LocationScale, eps: Tensor) -> None:
        self.density, self.family = density, family
        self.eps = eps
        self.dim = eps.shape[-1]
        self.is_dense = isinstance(family.scale, Dense)
        if self.is_dense:
            self.rows, self.columns = torch.tril_indices(self.dim, self.dim, device=eps.device).unbind()
        else:
            self.rows = self.columns = torch.arange(self.dim, device=eps.device)
        self.num_gradients = 0

    @property
    def num_parameters(self) -> int:
        """Free entries of location and scale, P."""
        return self.dim + len(self.rows)

    def value(self, point: Params) -> float:
        """The bound; minus infinity where the scale is not positive."""
        diagonal = point.scale.diagonal() if self.is_dense else point.scale
        if not bool((diagonal > 0).all()):
            return -math.inf
        log_p = self.density.log_prob(self.family.sample(point, self.eps))
        return float(log_p.mean() + self.family.entropy(point))

    def local(self, point: Params) -> Local:
        """The bound and its derivatives with respect to the step."""
        if not math.isfinite(self.value(point)):
            nothing = self.eps.new_full((self.num_parameters,), math.nan)
            return Local(math.nan, nothing, None, lambda vector: vector)
        z = self.family.sample(point, self.eps)
        log_p, grad = self.density.value_and_grad(z)
        self.num_gradients += len(z)
        scores = self._scores(point, grad)
        gradient = scores.mean(0) + self._entropy_grad()
        hessian = self._hessian(point, z) if self.num_parameters <= MAX_PARAMETERS else None

        def product(vector: Tensor) -> Tensor:
            return self._product(point, z, vector)

        return Local(float(log_p.mean() + self.family.entropy(point)), gradient, hessian, product)

    def move(self, point: Params, step: Tensor) -> Params:
        """The member that a step leads to."""
        shift, stretch = step[: self.dim], step[self.dim :]
        loc = point.loc + self.family.scale.multiply(point.scale, shift)
        if not self.is_dense:
            return Params(loc, point.scale * (1 + stretch))
        return Params(loc, point.scale @ (torch.eye(self.dim).to(self.eps) + self._triangle(stretch)))

    def relative(self, point: Params, step: Tensor) -> float:
        """Longest coordinate of a step, in standard deviations."""
        return float(step.abs().max())

    def sensitivity(self, point: Params) -> Sensitivity:
        r"""Linear response and Monte Carlo error at the optimum.

        With :math:`g_n` the gradient over one antithetic pair, it pulls the optimum by :math:`(-H)^{-1} g_n / n`, and
        the standard error is that of the mean of n independent pulls. Draws with exact second moments lack the part
        of the pulls that is linear in these moments, which is taken out by regression; where there are too few pairs
        for that, only the squares are taken out, and the error is overestimated.

        References:
            Giordano, Ingram & Broderick 2024, Section 3.3, with pairs of draws in place of draws. Giordano, Broderick &
            Jordan 2018, Theorem 1. MacKinnon & White 1985, "Some heteroskedasticity-consistent covariance matrix
            estimators", J. Econometrics 29(3), the estimator HC3 (the error of a mean after a regression).
        """
        z, dim = self.family.sample(point, self.eps), self.dim
        _, grad = self.density.value_and_grad(z)
        self.num_gradients += len(z)
        each = self._scores(point, grad).unflatten(0, (2, -1)).mean(0)
        hessian = self._hessian(point, z)
        inverse = torch.linalg.inv(-(hessian + hessian.mT) / 2)
        pulls = each @ inverse
        logs = pulls[:, dim:]
        if self.is_dense:
            moved = point.scale @ self._triangle(logs)
            logs = (moved * point.scale).sum(-1) / self.family.variance(point)
        wanted = torch.cat([self.family.spread(point, pulls[:, :dim]), logs], -1)
        basis = torch.linalg.qr(self._moments()).Q
        # a residual is as much smaller than the error as its pair has had a say in the regression
        residual = (wanted - basis @ (basis.mT @ wanted)) / (1 - basis.square().sum(-1, keepdim=True))
        error = residual.square().sum(0).sqrt() / len(basis)
        whole = self.family.spread(point, self.family.spread(point, inverse[:dim, :dim]).mT)
        return Sensitivity(whole, error[:dim], error[dim:])

    def _moments(self) -> Tensor:
        """What the draws have exactly: a one for each pair, and products of coordinates where these were matched."""
        half = self.eps[: len(self.eps) // 2]
        ones = half.new_ones(len(half), 1)
        if not matches_moments(len(half), self.dim):
            return ones
        rows, columns = torch.tril_indices(self.dim, self.dim, device=half.device)
        if len(half) < SPARE * len(rows) + 1:
            rows = columns = torch.arange(self.dim, device=half.device)
        return torch.cat([ones, half[:, rows] * half[:, columns]], -1)

    # --- derivatives --------------------------------------------------------------------------------------------------

    def _scores(self, point: Params, grad: Tensor) -> Tensor:
        """Derivatives of each draw's log density with respect to the step, ``(N, P)``, from its gradient."""
        whitened = self.family.scale.multiply_transposed(point.scale, grad)
        return torch.cat([whitened, whitened[:, self.rows] * self.eps[:, self.columns]], -1)

    def _entropy_grad(self) -> Tensor:
        """Of log det(I + T) at T = 0."""
        return torch.cat([self.eps.new_zeros(self.dim), (self.rows == self.columns).to(self.eps)])

    def _hessian(self, point: Params, z: Tensor) -> Tensor:
        """Of the bound with respect to the step; -log det(I + T) adds one for each diagonal entry."""
        rows = max(1, CHUNK_NUMBERS // max(self.dim**2, len(self.rows) ** 2))
        total = self.eps.new_zeros(self.num_parameters, self.num_parameters)
        for some, eps in zip(z.split(rows), self.eps.split(rows), strict=True):
            hessian = self.density.hessian(some)
            self.num_gradients += len(some) * self.dim
            # each row is one vector for the scale, once from the left and once from the right
            scale = point.scale.expand(len(some), 1, *point.scale.shape)
            whitened = self.family.scale.multiply_transposed(scale, hessian).mT
            whitened = self.family.scale.multiply_transposed(scale, whitened)
            ends = eps[:, self.columns]
            mixed = torch.einsum("nia,na->ia", whitened[:, :, self.rows], ends)
            twice = torch.einsum("nab,na,nb->ab", whitened[:, self.rows][:, :, self.rows], ends, ends)
            total += torch.cat([torch.cat([whitened.sum(0), mixed], 1), torch.cat([mixed.mT, twice], 1)])
        return total / len(z) - torch.diag(self._entropy_grad())

    def _product(self, point: Params, z: Tensor, vector: Tensor) -> Tensor:
        shift, stretch = vector[: self.dim], vector[self.dim :]
        turned = self.eps @ self._triangle(stretch).mT if self.is_dense else self.eps * stretch
        moved = self.family.scale.multiply(point.scale, shift + turned)
        image = self.density.hessian_product(z, moved)
        self.num_gradients += len(z)
        diagonal = torch.where(self.rows == self.columns, stretch, 0.0)
        return self._scores(point, image).mean(0) - torch.cat([torch.zeros_like(shift), diagonal])

    def _triangle(self, entries: Tensor) -> Tensor:
        matrix = entries.new_zeros(*entries.shape[:-1], self.dim, self.dim)
        matrix[..., self.rows, self.columns] = entries
        return matrix


def fixed_draws(family: LocationScale, dim: int, num_particles: int | None, generator: torch.Generator) -> Tensor:
    """Antithetic draws, with exact second moments where there are enough of them.

    Args:
        family: A normal family.
        dim: D.
        num_particles: Draws, at least four; chosen from D if ``None``.
        generator: Source of the draws.

    Shape:
        result ``(N, D)``, float64.
    """
    if num_particles is None:
        each = DENSE_DRAWS_PER_DIMENSION * dim if family.is_dense else min(DRAWS_PER_DIMENSION * dim, MAX_DRAWS)
        num_particles = max(MIN_DRAWS, each)
    return family.particles(
        family.draw((max(2, -(-num_particles // 2)),), dim, generator=generator, dtype=torch.float64)
    )


def takes_fixed_draws(family: object) -> bool:
    """Whether the family is a normal one with a diagonal or a dense scale."""
    return (
        isinstance(family, LocationScale)
        and family.noise.matches_moments
        and isinstance(family.scale, Dense | Diagonal)
    )
