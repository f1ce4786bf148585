from __future__ import annotations

import itertools
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI

import pyro_vi_lab as vl
from pyro_vi_lab.errors import ArgumentError
from pyro_vi_lab.guides import LowRankNormal

DIM = 12


@pytest.fixture(autouse=True)
def double() -> None:
    torch.set_default_dtype(torch.float64)


def factors(rank: int = 2) -> Any:
    """A normal whose covariance is a diagonal plus a matrix of low rank."""
    generator = torch.Generator().manual_seed(0)
    factor = torch.randn(DIM, rank, generator=generator)
    size = torch.linspace(0.1, 3.0, DIM)
    covariance = torch.diag(size.square()) + (size.unsqueeze(-1) * factor) @ (size.unsqueeze(-1) * factor).T

    def model() -> None:
        pyro.sample("x", dist.MultivariateNormal(torch.arange(float(DIM)), covariance))

    return model, covariance


def test_equals_dense_when_the_rank_suffices() -> None:
    model, covariance = factors()
    guide = LowRankNormal(model, rank=2)
    fit = vl.fit(vl.Problem(model), guide, progress=False)
    assert fit.status is vl.Status.CONVERGED
    assert fit.elbo(5000)[0] == pytest.approx(0.0, abs=0.02)  # the log evidence of a prior; full rank: exactly
    sd = covariance.diagonal().sqrt()
    assert float(((fit.covariance() - covariance) / (sd * sd.unsqueeze(-1))).abs().max()) < 0.05


def test_more_rank_is_never_worse() -> None:
    model, _ = factors(rank=4)
    problem = vl.Problem(model)
    bounds = [vl.fit(problem, LowRankNormal(model, rank=rank), progress=False).elbo(5000) for rank in (1, 2, 4)]
    for (lower, error), (higher, other) in itertools.pairwise(bounds):
        assert higher > lower - 5 * (error + other)
    assert bounds[-1][0] > bounds[0][0] + 0.1


@pytest.mark.parametrize(("dim", "rank"), [(1, 1), (2, 1), (3, 1), (10, 3), (90, 9), (400, 10)])
def test_default_rank(dim: int, rank: int) -> None:
    guide = LowRankNormal(lambda: pyro.sample("x", dist.Normal(torch.zeros(dim), 1.0).to_event(1)))
    guide()
    assert guide.cov_factor.shape == (dim, rank)


@pytest.mark.parametrize("rank", [0, -1, 1.5, True, "2"])
def test_rank_is_a_whole_number(rank: Any) -> None:
    with pytest.raises(ArgumentError, match="rank must be a whole number of at least 1"):
        LowRankNormal(factors()[0], rank=rank)


def test_svi_with_the_natural_gradient() -> None:
    pyro.set_rng_seed(0)
    model, _ = factors()
    guide = LowRankNormal(model, rank=2, init_scale=1.0)
    svi = SVI(
        model,
        guide,
        vl.NaturalGradient(guide, lr=0.3),
        vl.ELBO(num_particles=64, vectorize_particles=True, max_plate_nesting=0),
    )
    first = svi.evaluate_loss()
    for _ in range(150):
        svi.step()
    assert float(svi.evaluate_loss()) < min(0.5, first / 10)
