"""The nearest covariances that are a diagonal plus a matrix of low rank."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.distributions import MultivariateNormal, kl_divergence

from pyro_vi_lab.families.factors import low_rank_approximation


def precision_of(*shape: int, seed: int) -> Tensor:
    """Precisions of random covariances with a wide spectrum and scales of several orders of magnitude."""
    generator = torch.Generator().manual_seed(seed)
    dim = shape[-1]
    root = torch.randn(*shape, dim, generator=generator, dtype=torch.float64)
    size = (2 * torch.randn(*shape, generator=generator, dtype=torch.float64)).exp()
    covariance = size.unsqueeze(-1) * (root @ root.mT + 0.1 * torch.eye(dim, dtype=torch.float64)) * size.unsqueeze(-2)
    return covariance.inverse()


def distance(size: Tensor, factor: Tensor, precision: Tensor) -> Tensor:
    zeros = torch.zeros_like(size)
    covariance = torch.diag_embed(size.square()) + factor @ factor.mT
    return kl_divergence(MultivariateNormal(zeros, covariance), MultivariateNormal(zeros, precision_matrix=precision))


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("rank", [1, 2, 4])
def test_no_search_by_gradients_from_many_starts_ends_nearer(rank: int, seed: int) -> None:
    precision = precision_of(7, seed=seed)
    found = float(distance(*low_rank_approximation(precision, rank), precision))
    generator = torch.Generator().manual_seed(100 + seed)
    scale = precision.diagonal().rsqrt().unsqueeze(-1)
    free = torch.randn(20, 7, 1 + rank, generator=generator, dtype=torch.float64).requires_grad_(True)
    optimizer = torch.optim.Adam([free], lr=0.05)
    for _ in range(600):
        optimizer.zero_grad()
        far = distance(scale.squeeze(-1) * free[..., 0].exp(), scale * free[..., 1:], precision)
        far.sum().backward()
        optimizer.step()
    assert found < float(far.detach().min()) + 0.01


def test_each_of_a_batch_as_alone() -> None:
    precision = precision_of(2, 3, 5, seed=0)
    size, factor = low_rank_approximation(precision, 2)
    assert size.shape == (2, 3, 5)
    assert factor.shape == (2, 3, 5, 2)
    together = distance(size, factor, precision)
    alone = torch.stack([distance(*low_rank_approximation(one, 2), one) for one in precision.flatten(0, 1)])
    torch.testing.assert_close(together.flatten(), alone, rtol=0, atol=0.01)


def test_columns_that_are_not_needed_are_short_and_not_zero() -> None:
    size, factor = low_rank_approximation(torch.eye(4, dtype=torch.float64), 2)
    assert 0 < float(factor.norm(dim=0).min()) <= float(factor.norm(dim=0).max()) < 0.1
    torch.testing.assert_close(size, torch.ones_like(size), rtol=0, atol=0.01)
