"""Data of a few overlapping groups, and textbook forms of what mixtures compute."""

from __future__ import annotations

import numpy as np
import torch
from scipy import stats
from torch import Tensor

from pyro_vi_lab.mixture_moments import Covariance, Moments, Normals
from pyro_vi_lab.mixture_prior import Parameters

KINDS: tuple[Covariance, ...] = ("full", "tied", "diag", "spherical")


def groups(num_rows: int = 120, *, dim: int = 2, num_groups: int = 3, seed: int = 0, apart: float = 3.0) -> Tensor:
    rng = np.random.default_rng(seed)
    centers = apart * rng.normal(size=(num_groups, dim))
    return torch.tensor(centers[np.arange(num_rows) % num_groups] + rng.normal(size=(num_rows, dim)) + 5.0)


def parameters(kind: Covariance, *, dim: int = 2, num_components: int = 3, seed: int = 1) -> Parameters:
    rng = np.random.default_rng(seed)
    weights, loc = rng.dirichlet(np.full(num_components, 3.0)), 5.0 + 2 * rng.normal(size=(num_components, dim))
    root = rng.normal(size=(num_components, dim, dim + 2))
    matrices = root @ root.swapaxes(1, 2) / 2
    covariance = {
        "full": matrices,
        "tied": matrices[0],
        "diag": matrices.diagonal(axis1=1, axis2=2),
        "spherical": matrices[:, 0, 0],
    }[kind]
    return Parameters(torch.tensor(weights), torch.tensor(loc), torch.tensor(covariance.copy()), kind)


def matrices(one: Parameters) -> np.ndarray:
    """Covariance matrices of all components."""
    K, D = one.loc.shape
    covariance = one.covariance.numpy()
    if one.kind == "full":
        return covariance
    if one.kind == "tied":
        return np.broadcast_to(covariance, (K, D, D))
    return np.stack([np.diag(np.broadcast_to(covariance[k], (D,))) for k in range(K)])


def log_densities(X: Tensor, one: Parameters, observed: Tensor | None = None) -> np.ndarray:
    """log π + log Normal of each row and component, by SciPy."""
    covariances, result = matrices(one), np.empty((len(X), len(one.loc)))
    for n in range(len(X)):
        here = np.ones(X.shape[1], bool) if observed is None else observed[n].numpy()
        for k in range(len(one.loc)):
            normal = stats.multivariate_normal(one.loc[k].numpy()[here], covariances[k][np.ix_(here, here)])
            result[n, k] = np.log(float(one.weights[k])) + normal.logpdf(X[n].numpy()[here])
    return result


def expected_log_density(found: Moments, normals: Normals) -> Tensor:
    r"""What the moments say of other components than those that the responsibilities are of.

    .. math:: \sum_{nk} r_{nk} (s_k + \log \mathrm{Normal}(x_n; \mu_k, \Sigma_k))
    """
    counts, means, covariances, _ = found
    apart, kind = means - normals.loc, normals.kind
    if kind in ("full", "tied"):
        white = (apart.unsqueeze(-2) @ normals.factor).squeeze(-2).square().sum(-1)
        spread = (normals.factor.mT @ covariances @ normals.factor).diagonal(dim1=-2, dim2=-1).sum(-1)
    elif kind == "diag":
        white = (apart * normals.factor).square().sum(-1)
        spread = (covariances * normals.factor.square()).sum(-1)
    else:
        white = apart.square().sum(-1) * normals.factor.square()
        spread = covariances * normals.factor.square() * means.shape[-1]
    # a component without rows has no part, however impossible it is
    offsets = torch.where(counts > 0, normals.offsets(), 0.0)
    return (counts * (offsets - (white + spread) / 2)).sum()
