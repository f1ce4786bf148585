from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import Tensor
from torch.distributions import constraints

import pyro_vi_lab as vl
from pyro_vi_lab.errors import ModelError
from pyro_vi_lab.models import build
from pyro_vi_lab.simulation import observed_arguments, simulate

Y = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64)


def conjugate(x: Tensor, y: Tensor) -> None:
    mean = pyro.sample("mean", dist.Normal(0.0, 2.0))
    with pyro.plate("row", len(y)):
        pyro.sample("obs", dist.Normal(mean * x, 1.0), obs=y)


def test_parameters_and_data_are_those_of_the_joint_distribution() -> None:
    x = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    simulation = simulate(vl.Problem(conjugate, x, Y), 4000, seed=1)
    mean, y = simulation.parameters.draws["mean"][0], simulation.data["y"]
    assert y.shape == (4000, 3)
    assert torch.equal(y, simulation.observed["obs"])
    assert simulation.num_discarded == 0
    error = (mean.square() - 4).mean() / (mean.square().std() / 4000**0.5)
    assert abs(float(error)) < 5
    noise = y - mean[:, None] * x
    assert abs(float(noise.mean() * 12000**0.5)) < 5
    assert abs(float((noise.square().mean() - 1) * (12000 / 2) ** 0.5)) < 5
    assert abs(float((noise.mean(1) * mean).mean() / (noise.mean(1) * mean).std() * 4000**0.5)) < 5


def test_same_seed_same_data() -> None:
    problem = build("eight_schools")
    one, two, three = (simulate(problem, 20, seed=seed) for seed in (3, 3, 4))
    assert torch.equal(one.data["y"], two.data["y"])
    assert not torch.equal(one.data["y"], three.data["y"])
    assert set(one.data) == {"y"}  # sigma stays
    assert set(one.parameters.draws) == {"mu", "tau", "theta_trans", "theta"}


def test_an_argument_that_is_reshaped_is_found_by_its_values() -> None:
    def model(y: Tensor) -> None:
        mean = pyro.sample("mean", dist.Normal(0.0, 2.0))
        pyro.sample("y", dist.Normal(mean, 1.0).expand([3, 1]).to_event(2), obs=y[:, None])

    problem = vl.Problem(model, Y)
    assert observed_arguments(problem) == {"y": "y"}
    assert simulate(problem, 10).data["y"].shape == (10, 3)


def test_deterministic_sites_made_of_the_data_are_left_out() -> None:
    def model(y: Tensor) -> None:
        mean = pyro.sample("mean", dist.Normal(0.0, 2.0))
        pyro.deterministic("residual", y - mean)
        pyro.deterministic("twice", 2 * mean)
        pyro.sample("y", dist.Normal(mean, 1.0).expand([3]).to_event(1), obs=y)

    assert set(simulate(vl.Problem(model, Y), 10).parameters.draws) == {"mean", "twice"}


def test_data_that_are_not_finite_are_counted() -> None:
    def model(y: Tensor) -> None:
        scale = pyro.sample("scale", dist.Normal(0.0, 1000.0))
        pyro.sample("y", dist.Normal(0.0, scale.clamp(-800, 800).exp().clamp_min(1.0)).expand([3]).to_event(1), obs=y)

    simulation = simulate(vl.Problem(model, Y), 200)
    assert 20 < simulation.num_discarded < 180
    assert simulation.parameters.num_draws == len(simulation.data["y"]) == 200 - simulation.num_discarded


def improper(y: Tensor) -> None:
    beta = pyro.sample("beta", dist.ImproperUniform(constraints.real, (), ()))
    pyro.sample("y", dist.Normal(beta, 1.0).expand([3]).to_event(1), obs=y)


def factored(y: Tensor) -> None:
    mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
    pyro.factor("penalty", -mean.abs())
    pyro.sample("y", dist.Normal(mean, 1.0).expand([3]).to_event(1), obs=y)


def transformed(y: Tensor) -> None:
    mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
    pyro.sample("standardized", dist.Normal(mean, 1.0).expand([3]).to_event(1), obs=y / 2)


def autoregressive(y: Tensor, next_y: Tensor) -> None:
    phi = pyro.sample("phi", dist.Normal(0.0, 1.0))
    pyro.sample("next_y", dist.Normal(phi * next_y.roll(1), 1.0).to_event(1), obs=next_y)


def empirical_prior(y: Tensor) -> None:
    mean = pyro.sample("mean", dist.Normal(y.mean(), 1.0))
    pyro.sample("y", dist.Normal(mean, 1.0).expand([3]).to_event(1), obs=y)


def tempered(y: Tensor) -> None:
    mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
    with poutine.scale(scale=0.5):
        pyro.sample("y", dist.Normal(mean, 1.0).expand([3]).to_event(1), obs=y)


def unobserved() -> None:
    pyro.sample("x", dist.Normal(0.0, 1.0))


def twice(y: Tensor) -> None:
    mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
    for key in ("a", "b"):
        pyro.sample(key, dist.Normal(mean, 1.0).expand([3]).to_event(1), obs=y)


@pytest.mark.parametrize(
    ("model", "data", "message"),
    [
        (improper, (Y,), r"site 'beta' has an improper prior \(ImproperUniform\)"),
        (factored, (Y,), "site 'penalty' is a pyro.factor, from which nothing can be drawn"),
        (transformed, (Y,), r"observed site 'standardized' .* are those of no argument \(the arguments: y\)"),
        (autoregressive, (Y + 1, Y), "the distribution of site 'next_y' depends on the observed data themselves"),
        (empirical_prior, (Y,), "the distribution of site 'mean' depends on the observed data themselves"),
        (tempered, (Y,), r"the log density of observed site 'y' is scaled \(poutine.scale\)"),
        (unobserved, (), "it observes nothing"),
        (twice, (Y,), "holds the data of observed site 'b': y, which another site observes too"),
    ],
)
def test_what_cannot_be_simulated_is_named(model: Callable[..., Any], data: tuple[Tensor, ...], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        simulate(vl.Problem(model, *data), 20)


def test_minibatches_cannot_be_simulated() -> None:
    with pytest.raises(ModelError, match="it sees only some of its rows at a time"):
        simulate(vl.Problem(conjugate, Y, Y, minibatch=2), 20)
