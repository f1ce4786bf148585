from __future__ import annotations

import pytest
import torch
from scipy import stats
from torch import Tensor

from pyro_vi_lab.families import Normal
from pyro_vi_lab.families.particles import ROOM, antithetic

EPS = torch.finfo(torch.float64).eps


def particles(num_particles: int, dim: int, batch: tuple[int, ...] = (), seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return antithetic(Normal(), num_particles, batch, dim, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("batch", [(), (3,), (2, 2)])
@pytest.mark.parametrize(("num_particles", "dim"), [(4, 1), (16, 2), (64, 10), (200, 40), (64, 200)])
def test_they_come_in_pairs_of_opposite_sign(num_particles: int, dim: int, batch: tuple[int, ...]) -> None:
    eps = particles(num_particles, dim, batch)
    assert eps.shape == (num_particles, *batch, dim)
    half = num_particles // 2
    assert torch.equal(eps[:half], -eps[half:])
    assert float(eps.mean(0).abs().max()) < 10 * EPS
    # the third moment as well
    third = torch.einsum("k...a,k...b,k...c->...abc", *[eps[..., :3]] * 3) / num_particles
    assert float(third.abs().max()) < 1e3 * EPS


@pytest.mark.parametrize("batch", [(), (3,)])
@pytest.mark.parametrize("dim", [1, 2, 7, 40])
@pytest.mark.parametrize("spare", [0, 5])
def test_the_second_moment_is_exactly_the_identity(dim: int, batch: tuple[int, ...], spare: int) -> None:
    pairs = int(ROOM * dim + 1) + 1 + spare
    eps = particles(2 * pairs, dim, batch)
    second = torch.einsum("k...d,k...e->...de", eps, eps) / len(eps)
    identity = torch.eye(dim, dtype=torch.float64).expand_as(second)
    # errors of a Cholesky factor grow with the condition number, here of a sample covariance
    torch.testing.assert_close(second, identity, rtol=0, atol=1e5 * EPS)


def test_too_few_for_that_are_plain_draws() -> None:
    dim = 40
    pairs = int(ROOM * dim + 1) - 1
    plain = Normal().sample((pairs, dim), generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    assert torch.equal(particles(2 * pairs, dim, seed=3)[:pairs], plain)


def test_an_odd_number_is_rounded_down_to_pairs() -> None:
    assert len(particles(65, 2)) == 64


def test_matched_particles_are_still_close_to_normal() -> None:
    values = torch.cat([particles(64, 2, seed=seed)[:32].reshape(-1) for seed in range(300)])
    assert stats.kstest(values.numpy(), stats.norm.cdf).pvalue > 1e-3


def test_same_seed_same_particles() -> None:
    assert torch.equal(particles(64, 3, seed=5), particles(64, 3, seed=5))
    assert not torch.equal(particles(64, 3, seed=5), particles(64, 3, seed=6))
