"""Closed forms site by site: values against Pyro and by hand, the rule of order, scales and masks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import TraceMeanField_ELBO
from torch.distributions import kl_divergence

import pyro_vi_lab as vl
from pyro_vi_lab.guides import FAMILY_GUIDES
from tests.objectives.programs import (
    NORMAL,
    PROGRAMS,
    SEEN,
    STANDARD_ERRORS,
    Autoencoder,
    Y,
    assert_same_mean,
    gradient,
    gradients,
)


@pytest.fixture(autouse=True)
def double() -> None:
    torch.set_default_dtype(torch.float64)


def loss(objective: Any, model: Any, guide: Any, *args: Any, seed: int = 0) -> float:
    pyro.set_rng_seed(seed)
    return float(objective.loss(model, guide, *args))


@pytest.mark.parametrize("name", ["global", "local", "subsampled", "masked", "scaled", "nested"])
def test_loss_and_gradient_are_those_of_pyro(name: str) -> None:
    program = PROGRAMS[name]
    guide = program.guide(NORMAL)
    ours, theirs = vl.ELBO(gradient="reparam", analytic_kl=True), TraceMeanField_ELBO()
    for seed in range(3):
        values = [loss(objective, program.model, guide, seed=seed) for objective in (ours, theirs)]
        assert values[0] == pytest.approx(values[1], rel=1e-12)
        torch.testing.assert_close(
            gradient(ours, program.model, guide, seed=seed), gradient(theirs, program.model, guide, seed=seed)
        )


def test_an_autoencoder() -> None:
    vae = Autoencoder()
    ours, theirs = vl.ELBO(gradient="reparam", analytic_kl=True), TraceMeanField_ELBO()
    values = [loss(objective, vae.model, vae.guide, Y) for objective in (ours, theirs)]
    assert values[0] == pytest.approx(values[1], rel=1e-12)


@pytest.mark.parametrize("vectorize", [False, True])
def test_without_data_the_loss_is_the_divergence(vectorize: bool) -> None:
    """No draw matters, whatever the scale and the mask."""
    p, q = dist.Gamma(2.0, 1.5), dist.Gamma(torch.linspace(1.0, 2.0, 6), 1.2)

    def around(program: Callable[[], None]) -> Callable[[], None]:
        def run() -> None:
            with pyro.plate("row", 6), poutine.mask(mask=SEEN), poutine.scale(scale=0.7):
                program()

        return run

    model, guide = around(lambda: pyro.sample("z", p)), around(lambda: pyro.sample("z", q))
    objective = vl.ELBO(3, gradient="reparam", analytic_kl=True, vectorize_particles=vectorize, max_plate_nesting=1)
    assert loss(objective, model, guide) == pytest.approx(0.7 * kl_divergence(q, p)[SEEN].sum().item())


def test_a_guide_with_a_scale_of_its_own() -> None:
    """With other scales or masks in model and guide, what a divergence leaves out is sampled."""
    program = PROGRAMS["annealed"]
    guide = program.guide(NORMAL)
    closed, plain = (
        torch.tensor(
            [
                loss(vl.ELBO(50, analytic_kl=kl, vectorize_particles=True), program.model, guide, seed=seed)
                for seed in range(20)
            ]
        )
        for kl in (True, False)
    )
    assert_same_mean(closed, plain)
    assert not torch.allclose(closed, plain)

    def masked(name: str, mask: Any, fn: Any) -> Callable[[], None]:
        def run() -> None:
            with pyro.plate("row", 6), poutine.mask(mask=mask):
                pyro.sample(name, fn)

        return run

    model = masked("z", SEEN, dist.Normal(0.0, 1.0))
    other = masked("z", ~SEEN, dist.Normal(0.5, 2.0))
    found = torch.tensor([loss(vl.ELBO(analytic_kl=True), model, other, seed=seed) for seed in range(300)])
    # E log p of the seen ones and the entropy of the others
    expected = -(SEEN * (dist.Normal(0.0, 1.0).log_prob(torch.tensor(0.0)) - (0.25 + 4) / 2)).sum()
    expected = expected - (~SEEN).sum() * dist.Normal(0.5, 2.0).entropy()
    assert abs(found.mean() - expected) < STANDARD_ERRORS * found.std() / 300**0.5


def test_a_site_whose_parent_the_guide_draws_later_is_sampled() -> None:
    """The model draws the mean first, the guide the offset, on which its mean depends."""

    def model() -> None:
        mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        pyro.sample("offset", dist.Normal(mean, 0.5))

    def guide() -> None:
        offset = pyro.sample("offset", dist.Normal(pyro.param("loc", torch.tensor(0.3)), 0.8))
        weight = pyro.param("weight", torch.tensor(-0.6))
        pyro.sample("mean", dist.Normal(weight * offset, 0.4))

    closed, plain = (
        gradients(vl.ELBO(100, gradient="reparam", analytic_kl=kl, vectorize_particles=True), model, guide, num=30)
        for kl in (True, False)
    )
    assert_same_mean(closed, plain)
    # and where a closed form of all sites would be wrong
    with pytest.warns(UserWarning, match="Failed to verify mean field"):
        pyros = gradients(TraceMeanField_ELBO(100, vectorize_particles=True), model, guide, num=10)
    assert (pyros.mean(0) - plain.mean(0)).abs().max() > 0.1


@pytest.mark.parametrize("name", FAMILY_GUIDES)
def test_guides_over_a_family_keep_their_change_of_variables(name: str) -> None:
    """With constrained sites: the mean of all choices is the same bound."""

    def model() -> None:
        scale = pyro.sample("scale", dist.HalfNormal(1.0))
        with pyro.plate("row", 3):
            p = pyro.sample("p", dist.Beta(2.0, 3.0))
            pyro.sample("y", dist.Normal(p, scale + 0.5), obs=Y[:3])

    guide = FAMILY_GUIDES[name](model, init_scale=0.3)
    at_once: dict[str, Any] = {"vectorize_particles": True, "max_plate_nesting": 1}
    guide()
    plain, *closed = (
        torch.tensor([loss(vl.ELBO(100, **at_once, **options), model, guide, seed=seed) for seed in range(12)])
        for options in ({}, {"analytic_kl": True}, {"analytic_entropy": True})
    )
    torch.testing.assert_close(closed[0], plain)  # no site has a closed form; points are exact as they are
    assert_same_mean(closed[1], plain)
    assert not torch.allclose(closed[1], plain) or name in ("full_rank_student_t", "mixture")  # have no closed entropy


def test_points_have_no_divergence() -> None:
    """Pyro's closed form of a Delta leaves out its log density."""

    def guide() -> None:
        u = pyro.sample("u", dist.Normal(pyro.param("loc", torch.tensor(0.2)), 0.5), infer={"is_auxiliary": True})
        pyro.sample("z", dist.Delta(u.exp(), log_density=-u))

    model = lambda: pyro.sample("z", dist.LogNormal(0.0, 1.0))  # noqa: E731
    closed, plain = (loss(vl.ELBO(analytic_kl=kl), model, guide) for kl in (True, False))
    assert closed == pytest.approx(plain, rel=1e-12)
