from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_vi_lab as vl
from pyro_vi_lab.errors import ArgumentError


@pytest.fixture(autouse=True)
def double() -> None:
    torch.set_default_dtype(torch.float64)


def banana() -> None:
    x = pyro.sample("x", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Normal(x * x, 0.5))


def test_a_flow_starts_from_the_normal_and_beats_it() -> None:
    """The evidence is 1, so that its log is 0."""
    problem = vl.Problem(banana)
    before = set(pyro.get_param_store().keys())
    normal = vl.fit(problem, "full_rank", progress=False)
    flow = vl.fit(problem, "flow", max_steps=500, progress=False)
    elbo, error = flow.elbo(2000)
    assert elbo > normal.elbo(2000)[0] + 0.2
    assert elbo < 5 * error
    assert flow.method == "flow"
    assert flow.num_gradients > normal.num_gradients
    assert set(pyro.get_param_store().keys()) == before
    assert flow.posterior(50).draws["x"].shape == (1, 50)


def test_a_diverged_normal_says_so() -> None:
    def improper() -> None:
        pyro.sample("x", dist.Normal(0.0, 1.0))
        y = pyro.sample("y", dist.ImproperUniform(dist.constraints.real, (), ()))
        pyro.factor("rise", y)

    fit = vl.fit(vl.Problem(improper), "flow", progress=False)
    assert fit.status is not vl.Status.CONVERGED
    assert "normal that the flow starts from" in fit.message


def test_restarts_are_refused() -> None:
    with pytest.raises(ArgumentError, match="num_restarts=3: a flow"):
        vl.fit(vl.Problem(banana), "flow", num_restarts=3, progress=False)
