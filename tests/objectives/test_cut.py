"""Gradients through draws and past them, from one run of the guide."""

from __future__ import annotations

from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions.transforms import AffineTransform, Planar, affine_autoregressive
from torch import Tensor, nn

import pyro_vi_lab as vl
from pyro_vi_lab.errors import ModelError
from tests.objectives.programs import Y, assert_same_mean, gradient, gradients, positive


@pytest.fixture(autouse=True)
def double() -> None:
    torch.set_default_dtype(torch.float64)


def target() -> None:
    z = pyro.sample("z", dist.Gamma(3.0, 1.0))
    pyro.sample("y", dist.Normal(z, 0.5), obs=torch.tensor(1.7))


def point() -> None:
    """Log density of a point that depends on a parameter directly: part of the bound, and no score."""
    u = pyro.sample("u", dist.Normal(pyro.param("loc", torch.tensor(0.2)), 0.4), infer={"is_auxiliary": True})
    rate = positive("rate", 0.9)
    pyro.sample("z", dist.Delta((rate * u).exp(), log_density=-rate * u - rate.log()))


def factor() -> None:
    """The same by a factor."""
    u = pyro.sample("u", dist.Normal(pyro.param("loc", torch.tensor(0.2)), 0.4), infer={"is_auxiliary": True})
    rate = positive("rate", 0.9)
    pyro.factor("change", -rate * u - rate.log(), has_rsample=True)
    pyro.sample("z", dist.Delta((rate * u).exp()))


@pytest.mark.parametrize("guide", [point, factor])
@pytest.mark.parametrize("objective", [vl.ELBO, vl.IWAE])
def test_densities_by_hand(guide: Any, objective: Any) -> None:
    kinds = ("stl" if objective is vl.ELBO else "dreg", "reparam")
    pathwise, plain = (
        gradients(objective(20, gradient=kind, vectorize_particles=True), target, guide, num=40) for kind in kinds
    )
    assert_same_mean(pathwise - plain, torch.zeros_like(plain))
    assert pathwise[:, 1].abs().max() > 0.01


def test_parameters_that_model_and_guide_share() -> None:
    def model() -> None:
        shared = pyro.param("shared", torch.tensor(0.6))
        z = pyro.sample("z", dist.Normal(shared, 1.0))
        pyro.sample("y", dist.Normal(z * shared, 1.0), obs=torch.tensor(1.7))

    def guide() -> None:
        shared = pyro.param("shared", torch.tensor(0.6))
        pyro.sample("z", dist.Normal(shared + 0.5, shared.exp()))

    for objective, kind in ((vl.ELBO, "stl"), (vl.IWAE, "dreg")):
        pathwise, plain = (
            gradients(objective(20, gradient=one, vectorize_particles=True), model, guide, num=40)
            for one in (kind, "reparam")
        )
        assert_same_mean(pathwise - plain, torch.zeros_like(plain))


def test_dropout_in_the_guide_is_of_one_run() -> None:
    """The density is that of the draw: where the prior is the guide's own normal, nothing is left of the gradient."""
    encoder = nn.Sequential(nn.Dropout(0.5), nn.Linear(6, 1, bias=False))

    def guide(y: Tensor) -> None:
        pyro.module("encoder", encoder)
        pyro.sample("z", dist.Normal(encoder(y).squeeze(), 1.0))

    def model(y: Tensor) -> None:
        pyro.sample("z", dist.Normal(pyro.param("loc", torch.tensor(0.0)), 1.0))

    objective = vl.ELBO()
    objective.loss(model, guide, Y)
    for seed in range(3):
        pyro.set_rng_seed(seed)
        kept = nn.functional.dropout(Y, 0.5)
        mean = encoder[1](kept).squeeze().detach()
        found = gradient(objective, model, guide, Y, seed=seed)
        # d/dw of log N(z; 0, 1) - log N(z; w · kept, 1) through z = w · kept + eps alone
        torch.testing.assert_close(found[:6], mean * kept)


def test_flows_with_an_inverse() -> None:
    transform = affine_autoregressive(2, hidden_dims=[4])

    def guide() -> None:
        pyro.module("transform", transform)
        pyro.sample("x", dist.TransformedDistribution(dist.Normal(torch.zeros(2), 1.0).to_event(1), [transform]))

    def model() -> None:
        pyro.sample("x", dist.Normal(torch.ones(2), 0.5).to_event(1))

    stl, plain = (gradients(vl.ELBO(gradient=kind), model, guide, num=80) for kind in ("stl", "reparam"))
    assert_same_mean(stl - plain, torch.zeros_like(plain))
    assert ((stl - plain).abs() > 1e-3).any()


def test_flows_without_an_inverse_are_named() -> None:
    planar = Planar(2)

    def guide() -> None:
        pyro.module("planar", planar)
        base = dist.Normal(torch.zeros(2), 1.0).to_event(1)
        pyro.sample("x", dist.TransformedDistribution(base, [AffineTransform(1.0, 2.0), planar]))

    def model() -> None:
        pyro.sample("x", dist.Normal(torch.ones(2), 0.5).to_event(1))

    for objective in (vl.ELBO(), vl.IWAE(2)):
        with pytest.raises(ModelError, match=r"guide site 'x' .* has no inverse; use gradient='reparam'"):
            objective.loss_and_grads(model, guide)
    vl.ELBO(gradient="reparam").loss_and_grads(model, guide)


def test_transforms_of_torch_are_refused() -> None:
    loc = torch.tensor(0.3)

    def loss(loc: Tensor) -> Any:
        return vl.ELBO().differentiable_loss(target, lambda: pyro.sample("z", dist.LogNormal(loc, 1.0)))

    with pytest.raises(ModelError, match=r"inside torch.func transforms; use gradient='reparam'"):
        torch.func.grad(loss)(loc)


def test_a_network_outside_of_the_guide() -> None:
    """What comes in as an argument with a graph gets its gradient."""
    weight = torch.tensor(0.5, requires_grad=True)

    def guide(loc: Tensor) -> None:
        pyro.sample("z", dist.LogNormal(loc, 0.5))

    found = []
    for kind in ("stl", "reparam"):
        pyro.set_rng_seed(0)
        objective = vl.ELBO(500, gradient=kind, vectorize_particles=True, max_plate_nesting=0)
        loss = objective.differentiable_loss(lambda loc: target(), guide, 2 * weight)
        (value,) = torch.autograd.grad(loss, weight)
        found.append(value)
    assert abs(found[0] - found[1]) < 0.2 * abs(found[1])
