"""Short chains: they leave the target as it is, move off what is not it, and say when they are stuck."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from pyro_vi_lab.checks import run_ensemble
from pyro_vi_lab.checks.moments import chain_moments

STANDARD_ERRORS = 5
CHAINS = 128


def correlated(dim: int = 4) -> tuple[Callable[[Tensor], tuple[Tensor, Tensor]], Tensor]:
    """A normal target with correlation 0.9, and its covariance."""
    covariance = torch.full((dim, dim), 0.9).double().fill_diagonal_(1.0)
    precision = torch.linalg.inv(covariance)
    return lambda z: (-0.5 * ((z @ precision) * z).sum(-1), -z @ precision), covariance


def draws(root: Tensor, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    eps = torch.randn(CHAINS, root.shape[-1], generator=generator, dtype=torch.float64)
    return eps * root if root.dim() == 1 else eps @ root.T


def test_a_sample_of_the_target_stays_one() -> None:
    density, covariance = correlated()
    root = torch.linalg.cholesky(covariance)
    chains = run_ensemble(density, draws(root), root, seed=1)
    found = chain_moments(chains.z)
    assert (found.mean.abs() <= STANDARD_ERRORS * found.mean_se).all()
    assert (found.sd.log().abs() <= STANDARD_ERRORS * found.log_sd_se).all()
    assert float(chains.memory.abs().max()) <= STANDARD_ERRORS * chains.memory_se
    assert 0.6 < chains.acceptance < 1.0


@pytest.mark.parametrize("scale", [0.1, 0.3, 3.0])
@pytest.mark.parametrize("shift", [0.0, 2.0])
def test_a_wrong_sample_becomes_one(scale: float, shift: float) -> None:
    """Also from independent coordinates in place of correlated ones."""
    density, _ = correlated()
    sd = torch.full((4,), scale).double()
    found = chain_moments(run_ensemble(density, draws(sd) + shift, sd, seed=2).z)
    assert (found.mean.abs() <= STANDARD_ERRORS * found.mean_se).all()
    assert (found.sd.log().abs() <= STANDARD_ERRORS * found.log_sd_se).all()


def test_more_draws_go_on_where_the_chains_are() -> None:
    density, covariance = correlated()
    root = torch.linalg.cholesky(covariance)
    short = run_ensemble(density, draws(root), root, num_draws=10, seed=3)
    longer = short.more(10)
    whole = run_ensemble(density, draws(root), root, num_draws=20, seed=3)
    assert torch.equal(longer.z, whole.z)
    assert longer.num_gradients == whole.num_gradients
    assert torch.equal(longer.z[:, :10], short.z)


def test_chains_in_far_modes_remember_their_start() -> None:
    def two(z: Tensor) -> tuple[Tensor, Tensor]:
        parts = torch.stack([-0.5 * (z - 20).square().sum(-1), -0.5 * (z + 20).square().sum(-1)])
        share = parts.softmax(0)[..., None]
        return parts.logsumexp(0), -(share * torch.stack([z - 20, z + 20])).sum(0)

    generator = torch.Generator().manual_seed(0)
    side = torch.where(torch.rand(CHAINS, 1, generator=generator) < 0.5, 20.0, -20.0).double()
    chains = run_ensemble(two, side + draws(torch.ones(1).double()), torch.full((1,), 20.0).double(), seed=4)
    assert float(chains.memory[0]) > 0.9


def test_drift_is_seen_until_the_chains_have_settled() -> None:
    """From far away with short steps only."""
    density, _ = correlated(1)
    start = draws(torch.ones(1).double()) + 300
    moving = run_ensemble(density, start, torch.full((1,), 0.05).double(), adapt=(), num_draws=20, seed=6)
    settled = run_ensemble(density, draws(torch.ones(1).double()), torch.ones(1).double(), seed=6)
    assert float(moving.drift[0].abs()) > 10
    assert float(settled.drift.abs().max()) < STANDARD_ERRORS


def test_chains_stay_inside_of_the_support() -> None:
    """An exponential density on the positive numbers."""

    def exponential(z: Tensor) -> tuple[Tensor, Tensor]:
        inside = (z > 0).all(-1)
        return torch.where(inside, -z.sum(-1), torch.full((len(z),), -math.inf).double()), -torch.ones_like(z)

    start = draws(torch.ones(1).double()).abs()
    chains = run_ensemble(exponential, start, torch.ones(1).double(), num_draws=100, seed=5)
    assert (chains.z > 0).all()
    found = chain_moments(chains.z)
    assert (found.mean - 1).abs() <= STANDARD_ERRORS * found.mean_se


def test_same_seed_same_chains() -> None:
    density, covariance = correlated()
    root = torch.linalg.cholesky(covariance)
    one, same, other = (run_ensemble(density, draws(root), root, num_draws=5, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(one.z, same.z)
    assert not torch.equal(one.z, other.z)
