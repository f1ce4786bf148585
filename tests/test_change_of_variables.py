from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch.distributions import biject_to, constraints

from pyro_vi_lab.change_of_variables import ChangeOfVariables, bijection, distribution_name, same_support
from pyro_vi_lab.errors import ModelError
from pyro_vi_lab.positive_definite import ToPositiveDefinite

# --- supports ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        (constraints.real, constraints.real, True),
        (constraints.positive, constraints.real, False),
        (constraints.interval(0.0, 1.0), constraints.interval(0.0, 1.0), True),
        (constraints.interval(0.0, 1.0), constraints.interval(0.0, 2.0), False),
        (constraints.interval(0.0, torch.tensor(1.0)), constraints.interval(0.0, torch.tensor(1.0)), True),
        (constraints.interval(0.0, torch.tensor(1.0)), constraints.interval(0.0, torch.tensor(1.5)), False),
        (constraints.interval(0.0, torch.tensor(1.0)), constraints.interval(0.0, torch.ones(2)), False),
        (
            constraints.independent(constraints.positive, 1),
            constraints.independent(constraints.positive, 1),
            True,
        ),
        (
            constraints.independent(constraints.positive, 1),
            constraints.independent(constraints.positive, 2),
            False,
        ),
        (
            constraints.independent(constraints.positive, 1),
            constraints.independent(constraints.real, 1),
            False,
        ),
        (constraints.greater_than(0.0), constraints.greater_than_eq(0.0), False),
    ],
)
def test_supports_are_compared_with_their_bounds(
    one: constraints.Constraint, other: constraints.Constraint, same: bool
) -> None:
    assert same_support(one, other) is same
    assert same_support(other, one) is same


def test_a_support_without_a_bijection_is_named_with_its_site() -> None:
    with pytest.raises(ModelError, match=r"site 'up' \(ProjectedNormal\) has support Sphere"):
        bijection("up", dist.ProjectedNormal(torch.ones(3)))
    assert bijection("cov", dist.Wishart(torch.tensor(3.0), torch.eye(2))) == ToPositiveDefinite()
    assert bijection("x", dist.Gamma(1.0, 1.0)) == biject_to(constraints.positive)


def test_names_of_wrapped_distributions() -> None:
    base = dist.Normal(torch.zeros(2), 1.0)
    for wrapped in (
        base,
        base.to_event(1),
        base.expand([3, 2]),
        base.mask(torch.tensor([True, False])).to_event(1),
    ):
        assert distribution_name(wrapped) == "Normal"


# --- the change of variables ---------------------------------------------------------------------------


def test_change_of_variables_takes_the_support_of_the_run() -> None:
    def model() -> None:
        a = pyro.sample("a", dist.Uniform(0.0, 1.0))
        pyro.sample("b", dist.Uniform(0.0, 1.0 - a))
        pyro.sample("other", dist.Normal(0.0, 1.0))

    u = {"a": torch.tensor(0.3), "b": torch.tensor(-1.0)}
    change = ChangeOfVariables(u)
    with poutine.trace() as tracer, change:
        model()
    a = u["a"].sigmoid()
    b = (1 - a) * u["b"].sigmoid()
    torch.testing.assert_close(change.values, {"a": a, "b": b})
    torch.testing.assert_close(tracer.trace.nodes["b"]["value"], b)
    # log of sigmoid' = s (1 - s), times the width of the interval
    expected = {"a": (a * (1 - a)).log(), "b": ((1 - a) * u["b"].sigmoid() * (1 - u["b"].sigmoid())).log()}
    torch.testing.assert_close(change.log_dets, expected)
    assert change.supports["b"].upper_bound == pytest.approx(float(1 - a))


def test_change_of_variables_leaves_observed_sites_alone() -> None:
    change = ChangeOfVariables({"x": torch.tensor(5.0)})
    with poutine.trace() as tracer, change:
        pyro.sample("x", dist.Normal(0.0, 1.0), obs=torch.tensor(1.0))
    assert tracer.trace.nodes["x"]["value"] == 1
    assert change.values == {}
