r"""Responsibilities of normal components, and what of the data an update of the components needs.

Expectation maximization and variational Bayes share it: both have

.. math:: r_{nk} \propto \exp(s_k) \, \mathrm{Normal}(x_n; \mu_k, \Sigma_k)

and need :math:`n_k = \sum_n r_{nk}` and the mean and covariance of the rows, weighted by :math:`r_{nk}`. They differ in
:math:`s_k` and in what they make of the moments.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

Covariance = Literal["full", "tied", "diag", "spherical"]
"""A matrix for each component, one for all, a diagonal for each, or a multiple of the identity for each."""
COVARIANCES: tuple[str, ...] = get_args(Covariance)
CHUNK = 4096
"""Most rows at a time."""
CHUNK_NUMBERS = 2**17
"""Numbers at a time, K coordinates for each row, with full covariances: a mebibyte stays in the cache."""
LOG_2_PI = math.log(2 * math.pi)


class Normals(NamedTuple):
    r"""Normal components, each with a factor in front.

    Args:
        log_scale: s, the log weights in expectation maximization.
        loc: μ.
        factor: P with :math:`\Sigma^{-1} = P P^\top`: triangular matrices, or square roots of the precisions.
        kind: Of the covariances.

    Shape:
        log_scale ``(K,)``, loc ``(K, D)``, factor ``(K, D, D)`` full, ``(D, D)`` tied, ``(K, D)`` diag, ``(K,)``
        spherical.
    """

    log_scale: Tensor
    loc: Tensor
    factor: Tensor
    kind: Covariance

    def offsets(self) -> Tensor:
        """Log density at the mean plus ``log_scale``, ``(K,)``."""
        return self.log_scale + log_det(self.factor, self.kind, self.loc.shape[-1]) - self.loc.shape[-1] * LOG_2_PI / 2


class Moments(NamedTuple):
    """Sums over rows, weighted by the responsibilities.

    Args:
        counts: Rows of each component.
        means: Mean of its rows.
        covariances: Covariance of its rows about this mean (divisor: the count); tied: the mean over all rows, diag:
            the variances, spherical: their mean. Zero for a component without rows.
        log_likelihood: Sum over rows of the log of the sum of the components.

    Shape:
        counts ``(K,)``, means ``(K, D)``, covariances ``(K, D, D)``, ``(D, D)``, ``(K, D)`` or ``(K,)``.
    """

    counts: Tensor
    means: Tensor
    covariances: Tensor
    log_likelihood: Tensor


def log_det(factor: Tensor, kind: Covariance, dim: int) -> Tensor:
    """Log |P| of each component, ``(K,)`` or ``()``; P is triangular."""
    if kind == "spherical":
        return dim * factor.log()
    if kind == "diag":
        return factor.log().sum(-1)
    return factor.diagonal(dim1=-2, dim2=-1).abs().log().sum(-1)


def factor_of_covariance(covariance: Tensor, kind: Covariance) -> Tensor:
    r"""Upper triangular P with :math:`\Sigma^{-1} = P P^\top`, or the inverse of the standard deviations.

    A matrix that is not positive definite gives NaN.
    """
    if kind in ("diag", "spherical"):
        return covariance.rsqrt()
    tril, info = torch.linalg.cholesky_ex(covariance)
    eye = torch.eye(covariance.shape[-1], dtype=covariance.dtype, device=covariance.device)
    factor = torch.linalg.solve_triangular(tril, eye.expand_as(covariance), upper=False).mT
    return torch.where((info == 0)[..., None, None], factor, math.nan)


def covariance_of_factor(factor: Tensor, kind: Covariance) -> Tensor:
    """The inverse of :func:`factor_of_covariance`."""
    if kind in ("diag", "spherical"):
        return factor**-2
    inverse = torch.linalg.inv(factor)
    return inverse.mT @ inverse


def chunks(X: Tensor, normals: Normals, weight: Tensor | None = None) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Rows and their weights, some at a time."""
    size = CHUNK if normals.kind != "full" else min(CHUNK, max(64, CHUNK_NUMBERS // normals.loc.numel()))
    for i, x in enumerate(X.split(size)):
        yield x, None if weight is None else weight[i * size : i * size + len(x)]


def log_densities(X: Tensor, normals: Normals) -> Tensor:
    r""":math:`s_k + \log \mathrm{Normal}(x_n; \mu_k, \Sigma_k)`, ``(N, K)``."""
    return torch.cat([_logits(x, normals)[0].mT for x, _ in chunks(X, normals)])


def moments(X: Tensor, normals: Normals, *, weight: Tensor | None = None) -> Moments:
    r"""One pass over the rows.

    For full covariances in the coordinates in which a component is standard normal, :math:`y = P^\top(x - \mu)`, so
    that nothing large cancels:

    .. math::
        m = \frac1{n_k} \sum_n r_{nk} y_n, \quad \bar x = \mu + P^{-\top} m, \quad
        S = P^{-\top} \Big(\frac1{n_k} \sum_n r_{nk} y_n y_n^\top - m m^\top\Big) P^{-1}

    The others go by products of matrices about the origin, which should be at the mean of the data.

    Args:
        X: Data.
        normals: The components.
        weight: Of each row; one by default.

    Shape:
        X ``(N, D)``, weight ``(N,)``.

    Example:
        >>> X = torch.tensor([[-1.0], [1.0], [9.0], [11.0]])
        >>> two = Normals(torch.zeros(2), torch.tensor([[0.0], [10.0]]), torch.ones(2, 1, 1), "full")
        >>> counts, means, covariances, _ = moments(X, two)
        >>> counts.tolist(), means[1, 0].item(), covariances[:, 0, 0].tolist()
        ([2.0, 2.0], 10.0, [1.0, 1.0])
    """
    kind, (num_components, dim) = normals.kind, normals.loc.shape
    square = {"full": (num_components, dim, dim), "tied": (dim, dim), "diag": (num_components, dim)}
    counts, first = X.new_zeros(num_components), X.new_zeros(num_components, dim)
    second, total = X.new_zeros(square.get(kind, (num_components,))), X.new_zeros(())
    for x, w in chunks(X, normals, weight):
        logits, Y = _logits(x, normals)
        largest = logits.amax(0)
        r = (logits - largest).exp_()
        norm = r.sum(0)
        lse = norm.log() + largest
        r = r.mul_(norm.reciprocal() if w is None else w / norm)
        total += lse.sum() if w is None else (w * lse).sum()
        counts += r.sum(1)
        if kind == "full":
            root = r.sqrt()
            Y.mul_(root.unsqueeze(-1))
            first += (root.unsqueeze(1) @ Y).squeeze(1)
            second += Y.mT @ Y
        elif kind == "tied":
            first += r @ Y
            second += Y.mT @ (Y if w is None else Y * w[:, None])
        else:
            first += r @ x
            second += r @ (x.square() if kind == "diag" else x.square().sum(1))
    number = counts.clamp_min(torch.finfo(X.dtype).tiny)
    m = first / number[:, None]
    if kind == "full":
        inverse = torch.linalg.inv(normals.factor)
        spread = second / number[:, None, None] - m.unsqueeze(-1) * m.unsqueeze(-2)
        means = normals.loc + (m.unsqueeze(-2) @ inverse).squeeze(-2)
        return Moments(counts, means, inverse.mT @ spread @ inverse, total)
    if kind == "tied":
        inverse = torch.linalg.inv(normals.factor)
        spread = (second - (m * counts[:, None]).mT @ m) / counts.sum()
        return Moments(counts, m @ inverse, inverse.mT @ spread @ inverse, total)
    if kind == "diag":
        return Moments(counts, m, (second / number[:, None] - m.square()).clamp_min(0), total)
    spread = (second / number - m.square().sum(1)) / dim
    return Moments(counts, m, spread.clamp_min(0), total)


def hard_moments(X: Tensor, labels: Tensor, num_components: int, kind: Covariance, weight: Tensor | None) -> Moments:
    """Moments of rows that each belong to one component; the log likelihood is NaN.

    Shape:
        X ``(N, D)``, labels ``(N,)``, weight ``(N,)``.
    """
    w = torch.ones_like(X[:, 0]) if weight is None else weight
    counts = X.new_zeros(num_components).index_add_(0, labels, w)
    number = counts.clamp_min(torch.finfo(X.dtype).tiny)
    means = X.new_zeros(num_components, X.shape[1]).index_add_(0, labels, X * w[:, None]) / number[:, None]
    centered = X - means[labels]
    if kind in ("diag", "spherical"):
        sums = torch.zeros_like(means).index_add_(0, labels, centered.square() * w[:, None])
        variances = sums / number[:, None]
        return Moments(counts, means, variances if kind == "diag" else variances.mean(1), X.new_tensor(math.nan))
    each = torch.stack(
        [(centered[labels == k] * w[labels == k, None]).mT @ centered[labels == k] for k in range(num_components)]
    )
    covariances = each / number[:, None, None] if kind == "full" else each.sum(0) / counts.sum()
    return Moments(counts, means, covariances, X.new_tensor(math.nan))


def _logits(x: Tensor, normals: Normals) -> tuple[Tensor, Tensor]:
    """Log densities ``(K, n)``, and the rows in the coordinates in which sums are taken."""
    offsets, loc, factor = normals.offsets()[:, None], normals.loc, normals.factor
    if normals.kind == "full":
        Y = torch.baddbmm(loc.unsqueeze(-2) @ factor, x.expand(len(loc), *x.shape), factor, beta=-1)
        return offsets - Y.square().sum(-1) / 2, Y
    if normals.kind == "tied":
        Y, u = x @ factor, loc @ factor
        squares = Y.square().sum(1) / 2
        return torch.addmm(offsets - u.square().sum(1, keepdim=True) / 2, u, Y.mT) - squares, Y
    if normals.kind == "diag":
        tau = factor.square()
        shift = offsets - (loc.square() * tau).sum(1, keepdim=True) / 2
        return torch.addmm(torch.addmm(shift, loc * tau, x.mT), tau, x.square().mT, alpha=-0.5), x
    tau = factor.square()[:, None]
    shift = offsets - loc.square().sum(1, keepdim=True) * tau / 2
    return torch.addmm(shift, loc * tau, x.mT) - tau * (x.square().sum(1) / 2), x
