"""What a family is: a distribution over z with a location and a scale, and its natural step."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor

MAX_DENSE = 512
"""Largest D for which a family whose scale is not dense uses the full mean Hessian for its location."""


class Params(NamedTuple):
    """Parameters of a batch of members of a family: ``loc (*R, D)`` and ``scale`` in the family's own shape."""

    loc: Tensor
    scale: Tensor


class Tangent(NamedTuple):
    r"""A natural gradient of the ELBO, in the coordinates of the family.

    Args:
        shift: Of the location, ``(*R, D)``.
        stretch: Of the scale, in its own shape.
        curvature: In whitened coordinates the identity plus the mean Hessian of log p, ``(*R, D, D)``, where the
            location is to take a Newton step; ``None`` if it is not known.
    """

    shift: Tensor
    stretch: Tensor
    curvature: Tensor | None = None


class Step(NamedTuple):
    """What a natural step did: the new parameters, the step size ρ ``(*R)`` and KL(new ‖ old) ``(*R)``."""

    params: Params
    size: Tensor
    kl: Tensor


class Estimate(NamedTuple):
    r"""The ELBO and its natural gradient at a batch of members, from K particles.

    Args:
        elbo: Mean of log p - log q, ``(*R)``.
        error: Its Monte Carlo standard error.
        tangent: The natural gradient.
        length: Half its squared Fisher length in nats: to first order the gain of a full step.
        gap: Newton decrement in nats: what the bound is below its optimum, to second order.
        noise: Expected part of ``gap`` that is Monte Carlo noise.
    """

    elbo: Tensor
    error: Tensor
    tangent: Tangent
    length: Tensor
    gap: Tensor
    noise: Tensor


class Family(ABC):
    """A family of distributions over z; K particles come first, then the batch of fits ``*R``, then D."""

    is_dense: bool = False
    """Whether the number of parameters of the scale is of the order of D²."""
    max_lr: float = 1.0
    """Largest step size with which ascents settle: 1 where a full step solves a Gaussian target."""
    has_small_step: bool = True
    """Whether the graph of a whole step is small enough for a compiler."""
    safe_kl: float = math.inf
    """Largest KL of a noisy step that nobody takes back where it made things worse, in nats."""
    num_parts: int = 1
    """Parts of a member of which each has particles of its own."""
    has_modes: bool = False
    """Whether a member can have several modes, each of which a fit of the precursor finds."""

    def precursor(self, dim: int) -> Family | None:
        """A family whose optimum is near this one's and quickly found from afar; ``None`` if this one is such."""
        return None

    def to_precursor(self, params: Params) -> Params:
        """A member of the precursor with the same location and about the same scales."""
        return params

    def from_precursor(self, params: Params) -> Params:
        """A member near one of the precursor."""
        return params

    def from_precursors(self, params: Params, elbo: Tensor) -> Params:
        """A member near M of the precursor, each fitted from a place of its own, that have reached ``elbo``.

        Shape:
            params ``(M, *R, ...)``, elbo ``(M, *R)``.
        """
        return self.from_precursor(Params(*(value[0] for value in params)))

    @property
    def num_moments(self) -> float:
        """Order of the moments of a coordinate from which on they are infinite."""
        return math.inf

    @abstractmethod
    def initial(self, loc: Tensor, size: float) -> Params:
        """Members at ``loc (*R, D)`` whose coordinates have the standard deviation ``size``."""

    def noise_dim(self, dim: int) -> int:
        """Length of the ε that a z of length D is made of."""
        return dim

    @abstractmethod
    def draw(
        self,
        shape: tuple[int, ...],
        dim: int,
        *,
        generator: torch.Generator | None,
        dtype: torch.dtype,
        device: torch.device | None = None,
    ) -> Tensor:
        """Draws of ε, ``(*shape, noise_dim(D))``."""

    @abstractmethod
    def particles(self, half: Tensor) -> Tensor:
        """Pairs ±ε of the draws ``half (K / 2, *R, noise_dim(D))``; where it helps, with exact second moments."""

    @abstractmethod
    def sample(self, params: Params, eps: Tensor) -> Tensor:
        """Z = μ + σ·ε, ``(K, *R, D)``."""

    def points(self, params: Params, eps: Tensor) -> Tensor:
        """Where :meth:`estimate` needs the target: at z, or for a family of parts at draws of each of them.

        Shape:
            eps ``(K, *R, noise_dim(D))``, result ``(K * num_parts, *R, D)``.
        """
        return self.sample(params, eps)

    @abstractmethod
    def log_prob(self, params: Params, z: Tensor) -> Tensor:
        """Log density of z, ``(K, *R)``."""

    @abstractmethod
    def entropy(self, params: Params) -> Tensor:
        """Entropy in nats, ``(*R)``.

        Raises:
            NotImplementedError: It has no closed form.
        """

    @abstractmethod
    def kl(self, params: Params, other: Params) -> Tensor:
        """KL(params ‖ other) in nats, ``(*R)``.

        Raises:
            NotImplementedError: It has no closed form.
        """

    @abstractmethod
    def covariance(self, params: Params) -> Tensor:
        """Covariance of z, ``(*R, D, D)``."""

    @abstractmethod
    def variance(self, params: Params) -> Tensor:
        """Its diagonal, ``(*R, D)``."""

    @abstractmethod
    def quantile(self, params: Params, probability: float) -> Tensor:
        """Quantile of every coordinate of z, ``(*R, D)``."""

    @abstractmethod
    def noise_quantile(self, probability: float) -> float:
        """Quantile of one coordinate of ε."""

    @abstractmethod
    def spread(self, params: Params, u: Tensor) -> Tensor:
        """A linear map of u ``(..., D)`` whose image of N(0, I) has the family's shape, without the location."""

    @abstractmethod
    def spread_transposed(self, params: Params, x: Tensor) -> Tensor:
        """The transpose of :meth:`spread`."""

    @abstractmethod
    def unspread(self, params: Params, x: Tensor) -> Tensor:
        """The inverse of :meth:`spread`."""

    @abstractmethod
    def fisher(self, params: Params) -> Tensor:
        """Fisher matrix for the location and the free entries of the scale, ``(*R, P, P)``.

        Raises:
            NotImplementedError: It has no closed form.
        """

    @abstractmethod
    def tangent(self, params: Params, loc_grad: Tensor, scale_grad: Tensor) -> Tangent:
        """The natural gradient, from gradients of the ELBO with respect to location and scale."""

    @abstractmethod
    def inner(self, params: Params, one: Tangent, two: Tangent) -> Tensor:
        """Inner product in the Fisher metric, ``(*R)``."""

    @abstractmethod
    def estimate(self, params: Params, eps: Tensor, log_p: Tensor, grad: Tensor, *, newton: bool) -> Estimate:
        """Sticking-the-landing estimate of the ELBO and its natural gradient from antithetic ``eps``.

        Args:
            params: Members of the family.
            eps: As of :meth:`particles`.
            log_p: Log density of the target at :meth:`points`.
            grad: Its gradient.
            newton: Whether the location may take the full mean Hessian where the scale is not dense.

        Shape:
            eps ``(K, *R, noise_dim(D))``, log_p ``(K * num_parts, *R)``, grad ``(K * num_parts, *R, D)``.

        References:
            Roeder, Wu & Duvenaud 2017, "Sticking the landing", NeurIPS, eq. 8.
        """

    @abstractmethod
    def step(self, params: Params, tangent: Tangent, *, lr: Tensor | float, max_kl: Tensor | float) -> Step:
        """The longest natural step of size ρ ≤ ``lr`` with KL(new ‖ old) ≤ ``max_kl``.

        Args:
            params: Where to start.
            tangent: The natural gradient there.
            lr: Largest step size, a number or one per fit.
            max_kl: Largest KL divergence from the old member, in nats, a number or one per fit.
        """

    def squared_norm(self, params: Params, tangent: Tangent) -> Tensor:
        """Squared length of a natural gradient in the Fisher metric, ``(*R)``.

        A step of size t has KL ≈ t²/2 of it, and gains about as much as that in the bound when t = 1 reaches the
        optimum.
        """
        return self.inner(params, tangent, tangent)


def eigh(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Eigendecomposition; NaN for the matrices of a batch that are not finite (LAPACK would refuse the whole batch)."""
    finite = torch.isfinite(matrix).all(-1).all(-1)
    safe = torch.where(finite[..., None, None], matrix, torch.zeros_like(matrix))
    values, vectors = torch.linalg.eigh(safe)
    return torch.where(finite[..., None], values, torch.full_like(values, torch.nan)), vectors


def newton_precision(x: Tensor) -> Tensor:
    """|1 - x|: the location has no cone to stay in, and a saddle is left downhill (saddle-free Newton)."""
    return (1 - x).abs().clamp_min(torch.finfo(x.dtype).eps)
