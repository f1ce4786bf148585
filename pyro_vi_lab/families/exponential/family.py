"""What an exponential family is: natural parameters, sufficient statistics and the log normalizer between them."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

Values = tuple[Tensor, ...]
"""A value of each variable of a family; a joint family has two."""

INSIDE = 0.9
"""Part of the way to the boundary of the cone that a step goes which would lead out of it."""


class Conditional(NamedTuple):
    """The distribution of one variable given those before it: a name of ``torch.distributions`` and its parameters."""

    name: str
    parameters: dict[str, Tensor]


class ExponentialFamily(ABC):
    r"""A minimal exponential family with the base measure one.

    .. math:: q_\eta(x) = \exp(\eta \cdot T(x) - A(\eta)), \qquad \eta \in \Omega,

    with respect to the Lebesgue or counting measure. :math:`\Omega` is an open convex cone up to a shift. Members come
    in batches; η, T and the mean parameters :math:`m = E[T] = \nabla A(\eta)` are vectors of length P along the last
    axis. A symmetric matrix takes its lower triangle in T, and twice the entries below the diagonal in η.

    Shape:
        η ``(*B, P)``, values ``(*S, *B, *event shape of the variable)``.

    References:
        Wainwright & Jordan 2008, "Graphical models, exponential families, and variational inference", Foundations and
        Trends in Machine Learning 1, Chapter 3.
    """

    num_parameters: int
    """P."""
    event_dims: ClassVar[tuple[int, ...]] = (0,)
    """Event dimensions of each variable."""
    parameter_dims: ClassVar[Mapping[str, int]]
    """Names of the standard parameters, and how many dimensions each has beyond those of the batch."""
    is_discrete: ClassVar[bool] = False
    log_concentrations: ClassVar[slice] = slice(0)
    """Which entries of :meth:`unconstrain` are logs of concentrations: those below zero have draws near the edge of
    the support."""
    num_signs: int = 1
    """Number of signs that tell the points of :meth:`point` apart."""

    # --- what a member has to know ------------------------------------------------------------------------------------

    @abstractmethod
    def statistics(self, values: Values) -> Tensor:
        """Sufficient statistics T(x), ``(*S, *B, P)``."""

    @abstractmethod
    def log_normalizer(self, eta: Tensor) -> Tensor:
        """A(η), ``(*B)``."""

    @abstractmethod
    def mean(self, eta: Tensor) -> Tensor:
        """Mean parameters, the gradient of A, ``(*B, P)``."""

    @abstractmethod
    def natural(self, mean: Tensor, *, start: Tensor | None = None) -> Tensor:
        """The inverse of :meth:`mean`, differentiable.

        Args:
            mean: Mean parameters of a member.
            start: The solution, where it is known and only the derivative is asked for.
        """

    @abstractmethod
    def cone(self, eta: Tensor) -> tuple[Tensor, Tensor | None]:
        """Numbers ``(*B, k)`` and a matrix ``(*B, n, n)``, affine in η, that are positive where η is in Ω."""

    @abstractmethod
    def unconstrain(self, eta: Tensor) -> Tensor:
        """Smooth bijection from Ω to vectors ``(*B, P)`` of real numbers."""

    @abstractmethod
    def constrain(self, u: Tensor) -> Tensor:
        """Its inverse: in Ω for every ``u``."""

    @abstractmethod
    def standard(self, eta: Tensor) -> dict[str, Tensor]:
        """Standard parameters by the names of ``torch.distributions``."""

    @abstractmethod
    def from_standard(self, parameters: Mapping[str, Tensor]) -> Tensor:
        """η of standard parameters."""

    @abstractmethod
    def conditional(self, eta: Tensor, earlier: Values = ()) -> Conditional:
        """Distribution of the next variable given values of the earlier ones."""

    def moved(self, eta: Tensor, values: Values) -> Tensor:
        """A member with the mean ``values`` and the spread or concentration of ``eta``; the same one if discrete."""
        return eta

    # --- what follows from it -----------------------------------------------------------------------------------------

    def log_prob(self, eta: Tensor, values: Values) -> Tensor:
        """Log density, ``(*S, *B)``."""
        return (eta * self.statistics(values)).sum(-1) - self.log_normalizer(eta)

    def entropy(self, eta: Tensor) -> Tensor:
        r"""Entropy in nats, :math:`A(\eta) - \eta \cdot m`, ``(*B)``."""
        return self.log_normalizer(eta) - (eta * self.mean(eta)).sum(-1)

    def kl(self, eta: Tensor, other: Tensor) -> Tensor:
        r"""KL(η ‖ other) in nats: the Bregman divergence :math:`A(\eta') - A(\eta) - (\eta' - \eta) \cdot m`."""
        bregman = self.log_normalizer(other) - self.log_normalizer(eta) - ((other - eta) * self.mean(eta)).sum(-1)
        return bregman.clamp_min(0)

    def fisher(self, eta: Tensor) -> Tensor:
        """Fisher matrix, the Hessian of A and the covariance of T, ``(*B, P, P)``."""
        flat = eta.reshape(-1, self.num_parameters)
        hessian: Tensor = torch.func.vmap(torch.func.jacrev(self.mean))(flat)
        return hessian.reshape(*eta.shape, self.num_parameters)

    def solve_fisher(self, eta: Tensor, grad: Tensor) -> Tensor:
        r"""The natural gradient :math:`F^{-1} \nabla_\eta = \nabla_m`: the pullback of :meth:`natural`."""
        with torch.enable_grad():
            mean = self.mean(eta).detach().requires_grad_(True)
            (result,) = torch.autograd.grad(self.natural(mean, start=eta.detach()), mean, grad.detach())
        return result

    def natural_gradient(self, u: Tensor, grad: Tensor) -> Tensor:
        r"""The natural gradient in η, :math:`\nabla_m f`, from the gradient of f with respect to the ``u`` of η."""
        with torch.enable_grad():
            eta = self.constrain(u).detach().requires_grad_(True)
            (eta_grad,) = torch.autograd.grad(self.unconstrain(eta), eta, grad.detach())
        return self.solve_fisher(eta.detach(), eta_grad)

    def contains(self, eta: Tensor) -> Tensor:
        """Whether η is in Ω, ``(*B)``."""
        slack, matrix = self.cone(eta)
        inside = torch.isfinite(eta).all(-1) & (slack > 0).all(-1)
        if matrix is None:
            return inside
        factor, info = torch.linalg.cholesky_ex(matrix)
        return inside & (info == 0) & torch.isfinite(factor).all(-1).all(-1)

    def boundary(self, eta: Tensor, direction: Tensor) -> Tensor:
        """Largest t ≥ 0, perhaps infinite, such that η + s · direction is in Ω for all s < t, ``(*B)``."""
        slack, matrix = self.cone(eta)
        moved_slack, moved_matrix = self.cone(eta + direction)
        rates = (slack - moved_slack) / slack
        if matrix is not None and moved_matrix is not None:
            tril = torch.linalg.cholesky(matrix)
            half = torch.linalg.solve_triangular(tril, matrix - moved_matrix, upper=False)
            whitened = torch.linalg.solve_triangular(tril, half.mT, upper=False)
            rates = torch.cat([rates, torch.linalg.eigvalsh((whitened + whitened.mT) / 2)], -1)
        if rates.shape[-1] == 0:
            return torch.full_like(eta[..., 0], math.inf)
        return rates.amax(-1).clamp_min(0).reciprocal()

    def step_size(self, eta: Tensor, direction: Tensor, *, lr: float) -> Tensor:
        """Step size of each member: ``lr``, or 0.9 of the way to the boundary of Ω where ``lr`` is beyond, ``(*B)``."""
        inside = self.contains(eta + lr * direction)  # and so is all between, as Ω is convex
        return torch.where(inside, lr, INSIDE * self.boundary(eta, direction).clamp_max(lr))

    def sample(self, eta: Tensor, shape: tuple[int, ...] = ()) -> Values:
        """Draws, reparameterized where ``torch.distributions`` has it, ``(*shape, *B, *event shape)`` each."""
        values: Values = ()
        eta = eta.expand(*shape, *eta.shape)
        for _ in self.event_dims:
            values = (*values, draw(self.conditional(eta, values)))
        return values

    def tamed(self, eta: Tensor) -> Tensor:
        """A member whose draws stay away from the edge of the support: no concentration is below one."""
        u = self.unconstrain(eta)
        u[..., self.log_concentrations] = u[..., self.log_concentrations].clamp_min(0)
        return self.constrain(u)

    # --- exact expectations -------------------------------------------------------------------------------------------

    def point(self, eta: Tensor, signs: Tensor) -> Values:
        r"""One of the points whose average of T is E[T], where every sign is once plus and once minus.

        So a function that is linear in T has its expectation as the average over two points, and only a function's
        value and gradient at points are needed for it. The signs are independent in the average: all of them occur
        together with all others (or any few with any few others, where the function asks for no more).

        Args:
            eta: Members of the family.
            signs: Plus and minus ones.

        Shape:
            signs ``(*B or ones, num_signs)``.
        """
        raise NotImplementedError(f"{type(self).__name__} has no such points: its values are summed over")

    def message(self, eta: Tensor, signs: Tensor, values: Values, grads: Values) -> Tensor:
        r"""The :math:`\eta^*` with which :math:`f(x) = \eta^* \cdot T(x)` up to a constant has these gradients.

        Args:
            eta: The members whose points were taken.
            signs: Their signs.
            values: The points of :meth:`point`.
            grads: Gradients of f there; if f depends on others as well, with an average over these at each sign.

        Shape:
            signs ``(R, *B or ones, num_signs)``, values and grads ``(R, *B, *event shape)``, result ``(*B, P)``.
        """
        raise NotImplementedError(f"{type(self).__name__} has no such points: its values are summed over")

    def tangent(self, values: Values, grads: Values) -> Values:
        """What of a gradient is the same for all functions that agree on the support."""
        return grads


def draw(conditional: Conditional) -> Tensor:
    """A draw of the distribution, reparameterized where torch can."""
    kind = getattr(torch.distributions, conditional.name)
    if kind is torch.distributions.Wishart:
        return bartlett(conditional.parameters["df"], conditional.parameters["scale_tril"])
    distribution = kind(**conditional.parameters, validate_args=False)
    value: Tensor = distribution.rsample() if distribution.has_rsample else distribution.sample()
    return value


def bartlett(df: Tensor, scale_tril: Tensor) -> Tensor:
    """Reparameterized draws of the Wishart distribution.

    Torch's own sampler takes the good draws for the singular ones and draws these again, with a warning (as of 2.13).

    Shape:
        df ``(*B)``, scale_tril and result ``(*B, D, D)``.

    References:
        Smith & Hocking 1972, "Wishart variate generator", Applied Statistics 21, algorithm AS 53.
    """
    dim = scale_tril.shape[-1]
    shape = (df.unsqueeze(-1) - torch.arange(dim, dtype=df.dtype, device=df.device)) / 2
    squares = 2 * torch.distributions.Gamma(shape, torch.ones_like(shape), validate_args=False).rsample()
    # smaller ones are lost in the product, which then has no Cholesky factor
    squares = squares.clamp_min(torch.finfo(squares.dtype).eps ** 0.75)
    normal = torch.randn((*squares.shape, dim), dtype=squares.dtype, device=squares.device).tril(-1)
    tril = scale_tril @ (normal + torch.diag_embed(squares.sqrt()))
    return tril @ tril.mT


def by_sign(signs: Tensor, values: Values) -> tuple[Values, Values]:
    """Averages over the runs with a plus, and over those with a minus.

    Shape:
        signs ``(R, *B or ones, 1)``, values ``(R, *B, *event shape)``, each result ``(*B, *event shape)``.
    """
    plus, minus = [], []
    for value in values:
        mask = (signs[..., 0] > 0).reshape(*signs.shape[:-1], *([1] * (value.dim() - signs.dim() + 1)))
        plus.append(torch.where(mask, value, 0).sum(0) / mask.sum(0))
        minus.append(torch.where(mask, 0, value).sum(0) / (~mask).sum(0))
    return tuple(plus), tuple(minus)


def line(first: Tensor, second: Tensor, at_first: Tensor, at_second: Tensor) -> tuple[Tensor, Tensor]:
    """Intercept and slope of the line through two points of the plane."""
    slope = (at_first - at_second) / (first - second)
    return (at_first + at_second - slope * (first + second)) / 2, slope
