from __future__ import annotations

import math
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

import pyro_vi_lab as vl
from pyro_vi_lab.batch_and_match import Batch, matched
from pyro_vi_lab.errors import ArgumentError
from pyro_vi_lab.families import FAMILIES, Params
from tests.test_fixed_draws import COVARIANCE, MEAN, classes, eight, gaussian

FAMILY: Any = FAMILIES["full_rank"]


@pytest.fixture(autouse=True)
def double() -> None:
    torch.set_default_dtype(torch.float64)


def quick(problem: vl.Problem, **options: Any) -> vl.Fit:
    return vl.fit(problem, "full_rank", optim="batch_and_match", progress=False, **options)


@pytest.mark.parametrize("rate", [1e-3, 1.0, 1e4])
def test_step_solves_the_equation_of_the_paper(rate: float) -> None:
    """S U S + S = V and the mean of Algorithm 1, from unwhitened moments of a batch."""
    generator = torch.Generator().manual_seed(0)
    root = torch.randn(3, 3, generator=generator).tril()
    root = root * root.diagonal().sign()
    params = Params(torch.randn(3, generator=generator), root)
    eps = torch.randn(20, 3, generator=generator)
    z, grad = FAMILY.sample(params, eps), torch.randn(20, 3, generator=generator) * 3 - 1
    batch = Batch(eps, FAMILY.spread_transposed(params, grad), 0.0, 0.0)
    new = matched(FAMILY, params, batch, rate)

    def spread(x: Tensor) -> Tensor:
        return (x - x.mean(0)).T @ (x - x.mean(0)) / len(x)

    weight = rate / (1 + rate)
    offset = params.loc - z.mean(0)
    u = rate * spread(grad) + weight * torch.outer(grad.mean(0), grad.mean(0))
    v = root @ root.T + rate * spread(z) + weight * torch.outer(offset, offset)
    s = new.scale @ new.scale.T
    torch.testing.assert_close(s @ u @ s + s, v, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(new.loc, (1 - weight) * params.loc + weight * (s @ grad.mean(0) + z.mean(0)))
    assert (new.scale.triu(1) == 0).all()
    assert (new.scale.diagonal() > 0).all()


def test_gaussian_posterior() -> None:
    fit = quick(vl.Problem(gaussian))
    assert fit.status is vl.Status.CONVERGED
    assert fit.num_steps < 40
    torch.testing.assert_close(fit.loc, MEAN, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(fit.covariance(), COVARIANCE, rtol=1e-6, atol=1e-6)
    assert fit.history["score_divergence"][-1] < 1e-6


@pytest.mark.parametrize("problem", [classes, eight], ids=["logistic", "schools"])
def test_is_near_the_optimum_of_the_bound(problem: Any) -> None:
    """Where the posterior is nearly normal; the message says that it is another optimum."""
    made = problem()
    natural, fit = vl.fit(made, progress=False), quick(made)
    assert fit.status is vl.Status.CONVERGED
    assert "the optimum of the ELBO where the posterior is normal, and another where it is not" in fit.message
    (one, e1), (two, e2) = natural.elbo(20_000, seed=3), fit.elbo(20_000, seed=4)
    assert abs(one - two) <= 5 * math.hypot(e1, e2) + 0.05


def test_seeds_agree_to_its_own_tolerance() -> None:
    """Half a tolerance of KL is what doubling the number of batches may still move it."""
    problem = classes()
    fits = [quick(problem, seed=seed) for seed in range(5)]
    for fit in fits[1:]:
        one, two = (Params(f.params.loc[0], f.params.scale[0]) for f in (fits[0], fit) if f.params is not None)
        assert float(FAMILY.kl(one, two)) < 0.01
    again = quick(problem, seed=0)
    assert torch.equal(again.loc, fits[0].loc)


def test_result() -> None:
    fit = quick(classes(), num_restarts=2)
    assert fit.posterior(10).num_chains == 2
    assert fit.history["negative_elbo"].shape == (fit.num_steps + 1, 2)
    assert len(fit.history["seconds"]) == fit.num_steps + 1
    assert fit.num_gradients > 0
    short = quick(classes(), max_steps=2)
    assert short.status is vl.Status.OUT_OF_STEPS
    assert "stopped after max_steps=2: raise max_steps" in short.message


def test_density_that_is_not_finite() -> None:
    def model() -> None:
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        pyro.factor("edge", torch.where(x > 0.5, -math.inf, 0.0))

    fit = quick(vl.Problem(model), max_steps=100)
    assert fit.status is not vl.Status.CONVERGED


def test_is_for_the_full_rank_normal() -> None:
    for guide in ("mean_field", "full_rank_student_t", "block"):
        with pytest.raises(ArgumentError, match="optim='batch_and_match' is for the guide 'full_rank', not for"):
            vl.fit(classes(), guide, optim="batch_and_match")
