from __future__ import annotations

import pyro
import pyro.distributions as dist
import torch
from pyro.infer.autoguide import AutoDiagonalNormal
from torch.distributions import constraints

from pyro_vi_lab.families import Params
from pyro_vi_lab.guides import GUIDES, MeanFieldNormal


def model() -> None:
    pyro.sample("x", dist.Normal(torch.zeros(2, dtype=torch.float64), 1.0).to_event(1))
    pyro.sample("y", dist.LogNormal(torch.zeros(2, dtype=torch.float64), 1.0).to_event(1))


def made() -> MeanFieldNormal:
    guide = MeanFieldNormal(model)
    guide()
    loc = torch.tensor([1.0, -2.0, 0.5, 3.0], dtype=torch.float64)
    guide.params = Params(loc, torch.tensor([0.1, 2.0, 0.7, 1.5], dtype=torch.float64))
    return guide


def test_name() -> None:
    assert GUIDES["mean_field"] is MeanFieldNormal


def test_posterior_is_a_product_of_normals() -> None:
    posterior = made().get_posterior()
    assert posterior.event_shape == (4,)
    torch.testing.assert_close(posterior.mean, torch.tensor([1.0, -2.0, 0.5, 3.0], dtype=torch.float64))
    torch.testing.assert_close(posterior.variance.sqrt(), torch.tensor([0.1, 2.0, 0.7, 1.5], dtype=torch.float64))
    assert type(posterior.base_dist) is dist.Normal


def test_scale_is_positive_by_construction() -> None:
    guide = made()
    assert MeanFieldNormal.scale_constraint is constraints.positive
    with torch.no_grad():
        for leaf in guide.parameters():
            leaf.sub_(100)
    assert (guide.scale > 0).all()


def test_draws_and_quantiles_are_those_of_the_guide_of_pyro() -> None:
    """With the same parameters and the same seed."""
    ours, theirs = made(), AutoDiagonalNormal(model)
    theirs()
    theirs.loc.data.copy_(ours.params.loc)
    theirs.scale = ours.params.scale
    draws = []
    for guide in (ours, theirs):
        pyro.set_rng_seed(0)
        draws.append({name: value.detach() for name, value in guide().items()})
    assert draws[0].keys() == draws[1].keys()
    for name, value in draws[0].items():
        torch.testing.assert_close(value, draws[1][name])
        torch.testing.assert_close(ours.quantiles([0.1, 0.9])[name], theirs.quantiles([0.1, 0.9])[name])
