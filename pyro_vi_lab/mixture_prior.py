r"""The prior of a mixture of normals, and the parameters that are best given moments of the data.

.. math::
    \pi \sim \mathrm{Dirichlet}(\alpha), \quad \Lambda_k \sim \mathrm{Wishart}(\nu, C^{-1}), \quad
    \mu_k \mid \Lambda_k \sim \mathrm{Normal}(m, (\beta \Lambda_k)^{-1})

with one Λ for all components (tied); with :math:`\tau_{kd} \sim \mathrm{Gamma}(\nu/2, c_d/2)` (diag) and
:math:`\tau_k \sim \mathrm{Gamma}(\nu/2, c/2)` (spherical) on the diagonal of Λ.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch import distributions as td

from pyro_vi_lab.mixture_moments import Covariance, Moments, Normals, factor_of_covariance


class Prior(NamedTuple):
    """Parameters of the prior.

    Args:
        kind: Of the covariances.
        concentration: α of each component; of a Dirichlet process its concentration, in each of K - 1 entries.
        is_process: Whether the weights are those of a Dirichlet process, broken off a stick piece by piece.
        loc: m.
        relative_precision: β, in rows.
        df: ν.
        scatter: C, or c.

    Shape:
        concentration ``(K,)`` or ``(K - 1,)``, loc ``(D,)``, scatter ``(D, D)`` full and tied, ``(D,)`` diag, ``()``.
    """

    kind: Covariance
    concentration: Tensor
    is_process: bool
    loc: Tensor
    relative_precision: float
    df: float
    scatter: Tensor

    @property
    def num_components(self) -> int:
        """K."""
        return len(self.concentration) + self.is_process

    @property
    def dim(self) -> int:
        """D."""
        return len(self.loc)

    def like(self, value: Tensor) -> Prior:
        """With the type and device of ``value``."""
        return self._replace(
            concentration=self.concentration.to(value), loc=self.loc.to(value), scatter=self.scatter.to(value)
        )

    def centered(self, center: Tensor) -> Prior:
        """The prior of data from which ``center`` is taken away."""
        return self._replace(loc=self.loc - center)


class Parameters(NamedTuple):
    """One mixture of normals.

    Args:
        weights: π.
        loc: μ.
        covariance: Σ, in the shape of its kind.
        kind: Of the covariances.

    Shape:
        weights ``(K,)``, loc ``(K, D)``, covariance ``(K, D, D)``, ``(D, D)``, ``(K, D)`` or ``(K,)``.
    """

    weights: Tensor
    loc: Tensor
    covariance: Tensor
    kind: Covariance

    def normals(self) -> Normals:
        """What responsibilities are taken of."""
        return Normals(self.weights.log(), self.loc, factor_of_covariance(self.covariance, self.kind), self.kind)

    def precision(self) -> Tensor:
        """The inverse of the covariance."""
        if self.kind in ("diag", "spherical"):
            return self.covariance.reciprocal()
        precision = torch.cholesky_inverse(torch.linalg.cholesky(self.covariance))
        return (precision + precision.mT) / 2


def stick_weights(sticks: Tensor) -> Tensor:
    r"""Weights of a stick of length one, :math:`\pi_k = v_k \prod_{j<k} (1 - v_j)`, the last one what is left.

    Shape:
        sticks ``(..., K - 1)``, result ``(..., K)``.

    Example:
        >>> stick_weights(torch.tensor([0.5, 0.5]))
        tensor([0.5000, 0.2500, 0.2500])
    """
    one = torch.ones_like(sticks[..., :1])
    left = torch.cat([one, (1 - sticks).cumprod(-1)], -1)
    return torch.cat([sticks, one], -1) * left


def sticks_of_weights(weights: Tensor) -> Tensor:
    """The inverse of :func:`stick_weights`."""
    left = weights.flip(-1).cumsum(-1).flip(-1)
    return weights[..., :-1] / left[..., :-1].clamp_min(torch.finfo(weights.dtype).tiny)


def maximum_likelihood(found: Moments, kind: Covariance, *, reg_covar: float) -> Parameters:
    """Weights, means and covariances of the rows; ``reg_covar`` is added to all variances."""
    covariance = found.covariances
    if kind in ("diag", "spherical"):
        covariance = covariance + reg_covar
    else:
        covariance = covariance + reg_covar * torch.eye(covariance.shape[-1]).to(covariance)
    return Parameters(found.counts / found.counts.sum(), found.means, covariance, kind)


def sums_of_squares(found: Moments, prior: Prior) -> tuple[Tensor, Tensor]:
    r"""Posterior means of μ and scatter about them, with what the prior has.

    .. math::
        m_k = \frac{\beta m + n_k \bar x_k}{\beta + n_k}, \quad
        C + n_k S_k + \frac{\beta n_k}{\beta + n_k} (\bar x_k - m)(\bar x_k - m)^\top

    Shape:
        ``(K, D)``, and ``(K, D, D)``, ``(D, D)`` (over all components), ``(K, D)`` or ``(K,)`` (over coordinates).
    """
    counts, means, covariances, _ = found
    beta, apart = prior.relative_precision, means - prior.loc
    share = counts / (beta + counts)
    loc = prior.loc + share[:, None] * apart
    pull = beta * share
    if prior.kind == "full":
        outer = apart.unsqueeze(-1) * apart.unsqueeze(-2)
        return loc, prior.scatter + counts[:, None, None] * covariances + pull[:, None, None] * outer
    if prior.kind == "tied":
        return loc, prior.scatter + counts.sum() * covariances + (apart * pull[:, None]).mT @ apart
    if prior.kind == "diag":
        return loc, prior.scatter + counts[:, None] * covariances + pull[:, None] * apart.square()
    return loc, prior.scatter + prior.dim * counts * covariances + pull * apart.square().sum(1)


def least_power(prior: Prior) -> float:
    """Twice the power of |Λ| in the joint density of a component without rows; at a maximum it is positive."""
    if prior.kind == "full":
        return prior.df - prior.dim
    if prior.kind == "tied":
        return prior.df - prior.dim - 1 + prior.num_components
    return prior.df - 1 if prior.kind == "diag" else prior.df - 2 + prior.dim


def maximum_posterior(found: Moments, prior: Prior) -> Parameters:
    r"""The mode of the density of weights (or sticks), precisions and means, given the responsibilities.

    .. math:: \pi_k \propto n_k + \alpha_k - 1, \qquad
        \Sigma_k = \frac{C + n_k S_k + \tfrac{\beta n_k}{\beta + n_k} (\bar x_k - m)(\bar x_k - m)^\top}{\nu - D + n_k}

    and the like for the other kinds. Needs α ≥ 1 and a positive :func:`least_power`.
    """
    loc, squares = sums_of_squares(found, prior)
    power = least_power(prior) + (found.counts.sum() if prior.kind == "tied" else found.counts)
    if prior.kind == "spherical":
        power = least_power(prior) + prior.dim * found.counts
    covariance = squares / power.reshape(-1, *([1] * (squares.dim() - 1))) if prior.kind != "tied" else squares / power
    return Parameters(_mode_of_weights(found.counts, prior), loc, covariance, prior.kind)


def _mode_of_weights(counts: Tensor, prior: Prior) -> Tensor:
    if not prior.is_process:
        free = (counts + prior.concentration - 1).clamp_min(0)
        return free / free.sum()
    rest = counts.flip(0).cumsum(0).flip(0)[1:] + prior.concentration - 1
    return stick_weights(counts[:-1] / (counts[:-1] + rest).clamp_min(torch.finfo(counts.dtype).tiny))


def log_prior(parameters: Parameters, prior: Prior) -> Tensor:
    """Log density of weights (or sticks), precisions and means."""
    weights, loc, precision, beta = parameters.weights, parameters.loc, parameters.precision(), prior.relative_precision
    if prior.is_process:
        sticks = sticks_of_weights(weights)
        gamma = prior.concentration
        # of Beta(1, γ); a stick at the edge has a finite density where γ ≥ 1
        total = gamma.log().sum() + torch.special.xlog1py(gamma - 1, -sticks).sum()
    else:
        alpha = prior.concentration
        total = torch.lgamma(alpha.sum()) - torch.lgamma(alpha).sum() + torch.special.xlogy(alpha - 1, weights).sum()
    if prior.kind in ("full", "tied"):
        scale = torch.cholesky_inverse(torch.linalg.cholesky(prior.scatter))
        df = torch.as_tensor(prior.df).to(scale)
        of_precision: Any = td.Wishart(df, covariance_matrix=(scale + scale.mT) / 2, validate_args=False)
        of_loc: Any = td.MultivariateNormal(prior.loc, precision_matrix=beta * precision, validate_args=False)
    else:
        of_precision = td.Gamma(torch.full_like(precision, prior.df / 2), prior.scatter / 2)
        each = precision if prior.kind == "diag" else precision[:, None]
        of_loc = td.Independent(td.Normal(prior.loc, (beta * each).rsqrt().expand_as(loc)), 1)
    result: Tensor = total + of_precision.log_prob(precision).sum() + of_loc.log_prob(loc).sum()
    return result
