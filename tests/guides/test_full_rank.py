from __future__ import annotations

import pyro
import pyro.distributions as dist
import torch
from pyro.infer.autoguide import AutoMultivariateNormal
from torch.distributions import constraints

from pyro_vi_lab.families import Params
from pyro_vi_lab.guides import GUIDES, FullRankNormal

LOC = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
TRIL = torch.tensor([[0.5, 0.0, 0.0], [-1.0, 2.0, 0.0], [0.3, 0.7, 1.5]], dtype=torch.float64)


def model() -> None:
    pyro.sample("x", dist.Normal(torch.zeros(2, dtype=torch.float64), 1.0).to_event(1))
    pyro.sample("y", dist.LogNormal(torch.tensor(0.0, dtype=torch.float64), 1.0))


def made() -> FullRankNormal:
    guide = FullRankNormal(model)
    guide()
    guide.params = Params(LOC, TRIL)
    return guide


def test_name() -> None:
    assert GUIDES["full_rank"] is FullRankNormal


def test_posterior_is_the_multivariate_normal() -> None:
    posterior = made().get_posterior()
    torch.testing.assert_close(posterior.mean, LOC)
    torch.testing.assert_close(posterior.covariance_matrix, TRIL @ TRIL.T)


def test_scale_is_triangular_with_a_positive_diagonal_by_construction() -> None:
    guide = made()
    assert FullRankNormal.scale_constraints == {"scale_tril": constraints.lower_cholesky}
    with torch.no_grad():
        for leaf in guide.parameters():
            leaf.sub_(50)
    tril = guide.scale_tril.detach()
    assert (tril.diagonal() > 0).all()
    assert torch.equal(tril, tril.tril())


def test_draws_and_quantiles_are_those_of_the_guide_of_pyro() -> None:
    """With the same parameters and the same seed; Pyro keeps the scale as a diagonal times a unit triangle."""
    ours, theirs = made(), AutoMultivariateNormal(model)
    theirs()
    theirs.loc.data.copy_(LOC)
    theirs.scale, theirs.scale_tril = TRIL.diagonal().clone(), TRIL / TRIL.diagonal().unsqueeze(-1)
    draws = []
    for guide in (ours, theirs):
        pyro.set_rng_seed(0)
        draws.append({name: value.detach() for name, value in guide().items()})
    assert draws[0].keys() == draws[1].keys()
    for name, value in draws[0].items():
        torch.testing.assert_close(value, draws[1][name])
        torch.testing.assert_close(ours.quantiles([0.1, 0.9])[name], theirs.quantiles([0.1, 0.9])[name])
