from __future__ import annotations

from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoDiagonalNormal, AutoNormal
from torch.distributions import biject_to, constraints

from pyro_vi_lab.guides import init_to_origin

SITES: dict[str, Any] = {
    "real": dist.Normal(torch.tensor(3.0, dtype=torch.float64), 2.0),
    "positive": dist.Gamma(torch.tensor([2.0, 3.0], dtype=torch.float64), 1.0),
    "interval": dist.Uniform(torch.tensor(-1.0, dtype=torch.float64), 4.0),
    "simplex": dist.Dirichlet(torch.tensor([5.0, 2.0, 3.0], dtype=torch.float64)),
    "tril": dist.LKJCholesky(3, torch.tensor(1.5, dtype=torch.float64)),
    "ordered": dist.ImproperUniform(pyro.distributions.constraints.ordered_vector, (), (3,)),
    "flat": dist.ImproperUniform(constraints.greater_than(2.0), (4,), ()),
    "expanded": dist.LogNormal(torch.tensor(1.0, dtype=torch.float64), 1.0).expand([2, 3]).to_event(1),
    "masked": dist.LogNormal(torch.tensor(1.0, dtype=torch.float64), 1.0).expand([2]).mask(torch.tensor([True, False])),
}


@pytest.mark.parametrize("name", SITES)
def test_value_is_zero_on_the_unconstrained_scale(name: str) -> None:
    fn = SITES[name]
    value = init_to_origin({"name": name, "fn": fn})
    assert value.shape == fn.shape()
    assert fn.support.check(value).all()
    z = biject_to(fn.support).inv(value)
    assert z.abs().max() <= 10 * torch.finfo(value.dtype).eps


def test_a_site_may_say_where_to_start() -> None:
    start = torch.tensor(3.0, requires_grad=True)
    value = init_to_origin({"name": "x", "fn": SITES["real"], "infer": {"start": start}})
    assert float(value) == 3.0
    assert not value.requires_grad


@pytest.mark.parametrize("name", [name for name in SITES if name not in ("ordered", "flat")])
def test_value_has_the_type_of_the_distribution(name: str) -> None:
    assert init_to_origin({"name": name, "fn": SITES[name]}).dtype == torch.float64


@pytest.mark.parametrize("kind", [AutoNormal, AutoDiagonalNormal])
def test_guides_of_pyro_take_it(kind: Any) -> None:
    """Also called without a site, as the init functions of Pyro are."""

    def model() -> None:
        pyro.sample("flat", dist.ImproperUniform(constraints.positive, (), ()))
        pyro.sample("x", dist.Normal(7.0, 1.0))

    for init in (init_to_origin, init_to_origin()):
        pyro.clear_param_store()
        guide = kind(model, init_loc_fn=init)
        guide()
        assert {name: value.item() for name, value in guide.median().items()} == {"flat": 1.0, "x": 0.0}
