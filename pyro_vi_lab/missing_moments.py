r"""Moments of a mixture of normals where values are missing: each row counts by what is known of it.

Given the component, the missing coordinates m of a row are normal given the observed ones o,

.. math::
    E[x_m] = \mu_m + \Sigma_{mo} \Sigma_{oo}^{-1} (x_o - \mu_o), \qquad
    \mathrm{Cov}[x_m] = \Sigma_{mm} - \Sigma_{mo} \Sigma_{oo}^{-1} \Sigma_{om},

and the row's log density is that of its observed coordinates.

References:
    Ghahramani & Jordan 1994, "Supervised learning from incomplete data via an EM approach", NeurIPS 6, Section 3.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pyro_vi_lab.mixture_moments import LOG_2_PI, Moments, Normals, covariance_of_factor


def patterns(observed: Tensor) -> tuple[Tensor, Tensor]:
    """The different rows of a mask, and which of them each row has: ``(P, D)`` and ``(N,)``."""
    found, index = torch.unique(observed, dim=0, return_inverse=True)
    return found, index


def full_covariances(normals: Normals) -> Tensor:
    """Covariance matrices of all components, ``(K, D, D)``."""
    covariance, (num_components, dim) = covariance_of_factor(normals.factor, normals.kind), normals.loc.shape
    if normals.kind == "spherical":
        covariance = covariance[:, None].expand(num_components, dim)
    if normals.kind in ("diag", "spherical"):
        return torch.diag_embed(covariance)
    return covariance.expand(num_components, dim, dim)


def observed_log_densities(X: Tensor, observed: Tensor, normals: Normals) -> Tensor:
    r""":math:`s_k + \log \mathrm{Normal}(x_o; \mu_o, \Sigma_{oo})` of each row and component, ``(N, K)``."""
    covariances = full_covariances(normals)
    result = X.new_empty(len(X), len(normals.loc))
    known, index = patterns(observed)
    for p, here in enumerate(known):
        rows = (index == p).nonzero()[:, 0]
        result[rows] = _of_pattern(X[rows], here, normals, covariances)[0].mT
    return result


def observed_moments(X: Tensor, observed: Tensor, normals: Normals, *, weight: Tensor | None = None) -> Moments:
    """One pass over the rows; see :func:`pyro_vi_lab.mixture_moments.moments`.

    Args:
        X: Data; what is not observed is not looked at.
        observed: Which values are observed.
        normals: The components.
        weight: Of each row; one by default.

    Shape:
        X and observed ``(N, D)``, weight ``(N,)``.
    """
    (num_components, dim), covariances = normals.loc.shape, full_covariances(normals)
    counts, first = X.new_zeros(num_components), X.new_zeros(num_components, dim)
    second, total = X.new_zeros(num_components, dim, dim), X.new_zeros(())
    known, index = patterns(observed)
    for p, here in enumerate(known):
        rows = (index == p).nonzero()[:, 0]
        logits, apart, rest = _of_pattern(X[rows], here, normals, covariances)
        lse = logits.logsumexp(0)
        w = None if weight is None else weight[rows]
        r = (logits - lse).exp() if w is None else (logits - lse).exp() * w
        total += lse.sum() if w is None else (w * lse).sum()
        number = r.sum(1)
        counts += number
        Z = apart * r.unsqueeze(-1)
        first += Z.sum(1)
        second += Z.mT @ apart + number[:, None, None] * rest
    safe = counts.clamp_min(torch.finfo(X.dtype).tiny)
    m = first / safe[:, None]
    spread = second / safe[:, None, None] - m.unsqueeze(-1) * m.unsqueeze(-2)
    return Moments(counts, normals.loc + m, reduced(spread, counts, normals), total)


def reduced(covariances: Tensor, counts: Tensor, normals: Normals) -> Tensor:
    """Covariance matrices ``(K, D, D)`` as what moments of a kind keep of them."""
    if normals.kind == "full":
        return covariances
    if normals.kind == "tied":
        return (covariances * (counts / counts.sum())[:, None, None]).sum(0)
    variances = covariances.diagonal(dim1=-2, dim2=-1)
    return variances if normals.kind == "diag" else variances.mean(-1)


def _of_pattern(x: Tensor, here: Tensor, normals: Normals, covariances: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Log densities ``(K, n)``, E[x] - μ ``(K, n, D)`` and Cov[x] ``(K, D, D)`` of rows with one pattern."""
    o, m = here.nonzero()[:, 0], (~here).nonzero()[:, 0]
    of_observed = covariances[:, o[:, None], o]
    tril = torch.linalg.cholesky(of_observed)
    apart = x[:, o] - normals.loc[:, None, o]
    white = torch.linalg.solve_triangular(tril, apart.mT, upper=False)
    log_det = tril.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    logits = (normals.log_scale - log_det - len(o) * LOG_2_PI / 2)[:, None] - white.square().sum(-2) / 2
    expected = x.new_zeros(len(covariances), len(x), x.shape[1])
    expected[..., o] = apart
    rest = torch.zeros_like(covariances)
    if len(m):
        half = torch.linalg.solve_triangular(tril, covariances[:, o[:, None], m], upper=False)  # Σₒₘ
        expected[..., m] = white.mT @ half
        rest[:, m[:, None], m] = covariances[:, m[:, None], m] - half.mT @ half
    return logits, expected, rest
