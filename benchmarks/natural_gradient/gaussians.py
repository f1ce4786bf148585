"""Gaussian targets of many dimensions and conditions, where the optimum is known exactly."""

from __future__ import annotations

import statistics
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

import pyro_vi_lab as vl

DIMENSIONS = (1, 2, 5, 20, 50, 100, 200)
CONDITIONS = (1.0, 1e2, 1e4, 1e6)
FAMILIES = ("full_rank", "mean_field")
SEEDS, SEEDS_IF_LARGE, LARGE = (1, 2, 3), (1,), 100
"""A fit of 200 dimensions takes ten seconds."""


def target(dim: int, condition: float) -> tuple[Tensor, Tensor]:
    """Location and covariance: eigenvalues from 1 down to 1 / condition, in random directions."""
    generator = torch.Generator().manual_seed(dim)
    directions, _ = torch.linalg.qr(torch.randn(dim, dim, generator=generator, dtype=torch.float64))
    values = torch.logspace(0, -float(torch.tensor(condition).log10()), dim, dtype=torch.float64)
    loc = 3 * torch.randn(dim, generator=generator, dtype=torch.float64)
    return loc, (directions * values) @ directions.mT


def fit(*, dim: int, condition: float, family: str) -> dict[str, Any]:
    """KL(q ‖ p) above the least of the family, for a few seeds."""
    loc, covariance = target(dim, condition)
    factor = torch.linalg.cholesky(covariance)

    def model() -> None:
        pyro.sample("z", dist.MultivariateNormal(loc, scale_tril=factor))

    problem = vl.Problem(model)
    problem.density().value_and_grad(torch.zeros(dim, dtype=torch.float64))
    seeds = SEEDS if dim < LARGE else SEEDS_IF_LARGE
    fits = [vl.fit(problem, family, seed=seed, progress=False) for seed in seeds]
    least = least_kl(covariance, family)
    kls = [kl(one.loc, one.covariance(), loc, covariance) - least for one in fits]
    return {
        "dim": dim,
        "condition": condition,
        "family": family,
        "statuses": [one.status.value for one in fits],
        "kl": kls,
        "least": least,
        "steps": [one.num_steps for one in fits],
        "seconds": statistics.median(one.seconds for one in fits),
    }


def kl(loc: Tensor, covariance: Tensor, target_loc: Tensor, target_covariance: Tensor) -> float:
    """KL(N(loc, covariance) ‖ the target) in nats."""
    factor = torch.linalg.cholesky(target_covariance)
    ratio = torch.cholesky_solve(covariance, factor)
    shift = torch.linalg.solve_triangular(factor, (loc - target_loc)[:, None], upper=False).square().sum()
    log_det = torch.linalg.slogdet(target_covariance)[1] - torch.linalg.slogdet(covariance)[1]
    return float(0.5 * (ratio.diagonal().sum() + shift - len(loc) + log_det))


def least_kl(covariance: Tensor, family: str) -> float:
    """What the family can reach: the best diagonal covariance has the conditional variances."""
    if family == "full_rank":
        return 0.0
    zeros = torch.zeros(len(covariance), dtype=covariance.dtype)
    precision = torch.cholesky_inverse(torch.linalg.cholesky(covariance))
    return kl(zeros, (1 / precision.diagonal()).diag(), zeros, covariance)
