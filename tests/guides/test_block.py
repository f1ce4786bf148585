from __future__ import annotations

from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI

import pyro_vi_lab as vl
from pyro_vi_lab.errors import ArgumentError
from pyro_vi_lab.guides import BlockNormal


@pytest.fixture(autouse=True)
def double() -> None:
    torch.set_default_dtype(torch.float64)


def schools() -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("school", 3):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        slope = pyro.sample("slope", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("y", dist.Normal(theta + slope.sum(-1), 1.0), obs=torch.tensor([2.0, 0.0, -3.0]))


def crossed() -> None:
    with pyro.plate("row", 2, dim=-2), pyro.plate("column", 3, dim=-1):
        pyro.sample("x", dist.Normal(0.0, 1.0))
    with pyro.plate("column_again", 3, dim=-1):
        pyro.sample("y", dist.Normal(0.0, 1.0))


def correlated() -> None:
    """A normal whose covariance crosses no border of a site."""
    tril = torch.tensor([[1.0, 0.0], [0.9, 0.3]])
    pyro.sample("a", dist.MultivariateNormal(torch.zeros(2), scale_tril=tril))
    pyro.sample("b", dist.MultivariateNormal(torch.ones(2), scale_tril=2 * tril))


def blocks(model: Any, **options: Any) -> list[list[int]]:
    pyro.clear_param_store()
    guide = BlockNormal(model, **options)
    guide()
    return [list(block) for block in guide.family.scale.blocks]


def test_a_block_for_each_site() -> None:
    assert blocks(schools) == [[0], [1], [2, 3, 4], [5, 6, 7, 8, 9, 10]]


def test_a_block_for_each_index_of_a_plate() -> None:
    """With all sites in the plate; those in no plate are one block."""
    assert blocks(schools, blocks="plate") == [[0, 1], [2, 5, 6], [3, 7, 8], [4, 9, 10]]
    assert blocks(crossed, blocks="plate") == [[0], [1], [2], [3], [4], [5], [6], [7], [8]]


def test_given_blocks() -> None:
    assert blocks(schools, blocks=[["tau", "theta"]]) == [[0], [1, 2, 3, 4], [5, 6, 7, 8, 9, 10]]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("plates", "blocks must be 'site', 'plate' or lists of names of sites, got 'plates'"),
        ([["tau", "thet"]], "unknown site 'thet': did you mean 'theta'"),
        ([["tau"], ["mu", "tau"]], "site 'tau' is in two of the blocks"),
    ],
)
def test_blocks_that_are_none(given: Any, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        blocks(schools, blocks=given)


def test_a_block_diagonal_posterior_is_found_exactly() -> None:
    fit = vl.fit(vl.Problem(correlated), "block", progress=False)
    assert fit.status is vl.Status.CONVERGED
    assert fit.elbo()[0] == pytest.approx(0.0, abs=1e-6)  # the log evidence of a prior
    tril = torch.tensor([[1.0, 0.0], [0.9, 0.3]])
    expected = torch.block_diag(tril @ tril.T, 4 * tril @ tril.T)
    torch.testing.assert_close(fit.covariance(), expected, rtol=1e-5, atol=1e-5)


def test_svi_with_the_natural_gradient() -> None:
    pyro.set_rng_seed(0)
    guide = BlockNormal(correlated)
    svi = SVI(correlated, guide, vl.NaturalGradient(guide, lr=1.0), vl.ELBO(num_particles=16))
    for _ in range(30):
        svi.step()
    assert float(svi.evaluate_loss()) == pytest.approx(0.0, abs=1e-3)


def test_what_fills_up_small_blocks_stays_the_identity() -> None:
    guide = BlockNormal(schools)
    fit = vl.fit(vl.Problem(schools), guide, progress=False)
    tril = fit.guide.params.scale
    assert tril.shape == (4, 6, 6)
    torch.testing.assert_close(tril[0, 1:, 1:], torch.eye(5))
    assert float(tril[0, 1:, 0].abs().max()) == 0
