"""Priors of the components of a mixture of normals: checked, taken from data, and sampled."""

from __future__ import annotations

import math
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_vi_lab.errors import ArgumentError, DataError
from pyro_vi_lab.mixture_moments import Covariance
from pyro_vi_lab.mixture_prior import Prior
from pyro_vi_lab.models.design import positive
from pyro_vi_lab.models.wishart import Wishart


def check_priors(kind: Covariance, mean: Tensor | None, scatter: Tensor | None, df: float | None) -> None:
    """Check those that are given.

    Raises:
        ArgumentError: A shape that does not fit the kind of covariances, or a number out of range.
    """
    if mean is not None and (mean.dim() != 1 or len(mean) == 0 or not bool(mean.isfinite().all())):
        raise ArgumentError(f"mean_prior must be a vector of finite numbers, got shape {tuple(mean.shape)}")
    if scatter is not None:
        dims = {"full": 2, "tied": 2, "diag": 1, "spherical": 0}[kind]
        square = scatter.dim() < 2 or scatter.shape[0] == scatter.shape[1]
        if scatter.dim() != dims or not square or (mean is not None and dims and len(scatter) != len(mean)):
            expected = ("a number", "one number for each column", "a matrix of as many rows as columns")[dims]
            raise ArgumentError(
                f"covariance_prior has shape {tuple(scatter.shape)}; of {kind!r} covariances it is {expected}"
            )
        if dims < 2:
            right = bool((scatter > 0).all() and scatter.isfinite().all())
        else:
            symmetric = torch.allclose(scatter, scatter.mT, rtol=1e-8, atol=0.0)
            right = symmetric and not bool(torch.linalg.cholesky_ex(scatter)[1])
        if not right:
            raise ArgumentError("covariance_prior must be positive, and a matrix symmetric and positive definite")
    if df is not None:
        positive(degrees_of_freedom=df)
        if mean is not None and kind in ("full", "tied") and not df > len(mean) - 1:
            raise ArgumentError(
                f"degrees_of_freedom must be above D - 1 = {len(mean) - 1} for {kind!r} covariances, got {df!r}"
            )


def covariance_prior_of(kind: Covariance, covariance: Tensor, num_rows: int) -> Tensor:
    """The scatter of the prior from the covariance of the data, ``(D, D)``, in the shape of its kind.

    Raises:
        DataError: It is singular, and the kind needs its inverse.
    """
    variances = covariance.diagonal()
    if kind not in ("full", "tied"):
        return variances.clone() if kind == "diag" else variances.mean()
    sd, dim = variances.sqrt(), len(variances)
    smallest = float(torch.linalg.eigvalsh(covariance / sd / sd[:, None])[0])
    if num_rows <= dim or smallest < dim * math.sqrt(torch.finfo(covariance.dtype).eps):
        raise DataError(
            f"the covariance of the {num_rows} rows and {dim} columns of X is singular, so that it makes no prior: "
            "give covariance_prior (torch.diag(X.var(0)), say), take covariance='diag', or remove columns that are "
            "sums of others"
        )
    return covariance


def sample_precision(prior: Prior) -> Tensor:
    """Sample the site ``precision`` of a component, or of all."""
    if prior.kind in ("full", "tied"):
        root = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(prior.scatter)))
        fn: Any = Wishart(prior.scatter.new_tensor(prior.df), scale_tril=root)
    else:
        fn = dist.Gamma(prior.scatter.new_tensor(prior.df / 2), prior.scatter / 2)
        fn = fn.to_event(1) if prior.kind == "diag" else fn
    value: Tensor = pyro.sample("precision", fn)
    return value


def sample_loc(prior: Prior, precision: Tensor) -> Tensor:
    """Sample the site ``loc`` given the precision."""
    beta = prior.relative_precision
    if prior.kind in ("full", "tied"):
        fn: Any = dist.MultivariateNormal(prior.loc, precision_matrix=beta * precision)
    else:
        each = precision if prior.kind == "diag" else precision.unsqueeze(-1)
        fn = dist.Normal(prior.loc, (beta * each).rsqrt()).to_event(1)
    value: Tensor = pyro.sample("loc", fn)
    return value
