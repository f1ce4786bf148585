"""The bound over fixed draws: exact where the posterior is normal, derivatives, linear response, and its error."""

from __future__ import annotations

from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

import pyro_vi_lab as vl
from pyro_vi_lab.errors import ArgumentError, FitError
from pyro_vi_lab.families import FAMILIES, LocationScale, Params
from pyro_vi_lab.fixed_draws import FixedDrawELBO, fixed_draws
from pyro_vi_lab.models import LinearRegression

each_family = pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
MEAN = torch.tensor([1.0, -2.0, 300.0], dtype=torch.float64)
COVARIANCE = torch.tensor([[2.0, 0.9, 0.3], [0.9, 1.0, 0.2], [0.3, 0.2, 500.0]], dtype=torch.float64)


@pytest.fixture(autouse=True)
def double() -> None:
    torch.set_default_dtype(torch.float64)


def gaussian() -> None:
    pyro.sample("x", dist.MultivariateNormal(MEAN, COVARIANCE))


def logistic(X: Tensor, y: Tensor) -> None:
    slope = pyro.sample("slope", dist.Normal(0.0, 2.0).expand([X.shape[1]]).to_event(1))
    with pyro.plate("row", len(y)):
        pyro.sample("y", dist.Bernoulli(logits=X @ slope), obs=y)


def schools(y: Tensor, noise: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("school", len(y)):
        theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(mu + tau * theta, noise), obs=y)


def classes(num_rows: int = 40, dim: int = 3) -> vl.Problem:
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(num_rows, dim, generator=generator)
    y = (torch.rand(num_rows, generator=generator) < torch.sigmoid(X[:, 0] - 2 * X[:, 1])).double()
    return vl.Problem(logistic, X, y)


def eight() -> vl.Problem:
    y = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
    return vl.Problem(schools, y, torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0]))


def quick(problem: vl.Problem, guide: str = "mean_field", **options: Any) -> vl.Fit:
    return vl.fit(problem, guide, optim="fixed_draws", progress=False, **options)


# The function


@each_family
def test_derivatives(family: LocationScale) -> None:
    """Gradient, Hessian and its products are the differences of the value along steps."""
    density = classes().density()
    generator = torch.Generator().manual_seed(1)
    target = FixedDrawELBO(density, family, fixed_draws(family, 3, 8, generator))
    size = torch.randn(3, 3, generator=generator)
    scale = torch.linalg.cholesky(size @ size.T + torch.eye(3)) if family.is_dense else size.diagonal().exp()
    point = Params(torch.randn(3, generator=generator), 0.5 * scale)
    local, basis, h = target.local(point), torch.eye(target.num_parameters), 1e-5
    assert local.hessian is not None
    assert local.value == pytest.approx(target.value(point), rel=1e-13)

    def gradient(step: Tensor) -> Tensor:
        values = [target.value(target.move(point, step + s * h * e)) for e in basis for s in (1, -1)]
        return torch.tensor(values).reshape(-1, 2) @ torch.tensor([1.0, -1.0]) / (2 * h)

    torch.testing.assert_close(local.grad, gradient(torch.zeros_like(local.grad)), rtol=1e-6, atol=1e-7)
    h = 1e-4
    numeric = torch.stack([(gradient(h * e) - gradient(-h * e)) / (2 * h) for e in basis])
    torch.testing.assert_close(local.hessian, numeric, rtol=1e-4, atol=1e-5)
    for vector in basis:
        torch.testing.assert_close(local.product(vector), local.hessian @ vector, rtol=1e-10, atol=1e-10)


@each_family
def test_draws(family: LocationScale) -> None:
    eps = fixed_draws(family, 4, None, torch.Generator().manual_seed(0))
    torch.testing.assert_close(eps.mean(0), torch.zeros(4), rtol=0, atol=1e-14)
    torch.testing.assert_close(eps.T @ eps / len(eps), torch.eye(4), rtol=0, atol=1e-12)
    assert len(fixed_draws(family, 4, 7, torch.Generator())) == 8


# Fits


@pytest.mark.parametrize("guide", ["mean_field", "full_rank"])
def test_gaussian_posterior(guide: str) -> None:
    """Exact, and known to be: the mean-field optimum has the conditional variances."""
    fit = quick(vl.Problem(gaussian), guide)
    assert fit.status is vl.Status.CONVERGED
    sd = COVARIANCE.diagonal().sqrt()
    torch.testing.assert_close((fit.loc - MEAN) / sd, torch.zeros(3), rtol=0, atol=1e-8)
    expected = COVARIANCE if guide == "full_rank" else torch.diag(1 / torch.linalg.inv(COVARIANCE).diagonal())
    torch.testing.assert_close(fit.covariance(), expected, rtol=1e-8, atol=1e-7)
    for error in fit.monte_carlo_error():
        assert (error / sd).max() < 1e-9


def test_linear_response_has_the_covariance_that_mean_field_lacks() -> None:
    fit = quick(vl.Problem(gaussian))
    torch.testing.assert_close(fit.linear_response(), COVARIANCE, rtol=1e-7, atol=1e-7)
    assert (fit.covariance().diagonal()[:2] < 0.7 * COVARIANCE.diagonal()[:2]).all()


def test_linear_response_is_a_derivative() -> None:
    """Of the mean of z, when the log density is tilted; by fits of the tilted model over the same draws."""
    generator = torch.Generator().manual_seed(3)
    X = torch.randn(40, 2, generator=generator)
    y = (X[:, 0] + X[:, 1] > 0).double()

    def tilted(X: Tensor, y: Tensor, tilt: Tensor) -> None:
        slope = pyro.sample("slope", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        pyro.factor("tilt", tilt @ slope)
        with pyro.plate("row", len(y)):
            pyro.sample("y", dist.Bernoulli(logits=X @ slope), obs=y)

    def fit(tilt: list[float]) -> vl.Fit:
        return quick(vl.Problem(tilted, X, y, torch.tensor(tilt)))

    h = 1e-3
    slope = (fit([h, 0.0]).loc - fit([-h, 0.0]).loc) / (2 * h)
    torch.testing.assert_close(fit([0.0, 0.0]).linear_response()[0], slope, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("guide", ["mean_field", "full_rank"])
@pytest.mark.parametrize("problem", [classes, eight], ids=["logistic", "schools"])
def test_agrees_with_the_natural_gradient(problem: Any, guide: str) -> None:
    """To what the natural gradient leaves of the bound, and five Monte Carlo standard errors."""
    made = problem()
    natural = vl.fit(made, guide, optim="natural_gradient", progress=False)
    fixed = quick(made, guide)
    assert fixed.status is vl.Status.CONVERGED
    (one, e1), (two, e2) = natural.elbo(20_000, seed=3), fixed.elbo(20_000, seed=4)
    assert abs(one - two) <= 5 * (e1**2 + e2**2) ** 0.5 + 0.02
    sd = natural.covariance().diagonal().sqrt()
    assert ((fixed.loc - natural.loc).abs() <= 5 * fixed.monte_carlo_error()[0] + 0.1 * sd).all()


def test_monte_carlo_error_is_that_of_the_seeds() -> None:
    """Over 20 seeds, means and logarithms of scales scatter as each fit says, within what 20 seeds can tell."""
    problem = classes()
    fits = [quick(problem, seed=seed, num_particles=200) for seed in range(20)]
    for what, values in ((0, [fit.loc for fit in fits]), (1, [fit.covariance().diagonal().log() / 2 for fit in fits])):
        said = torch.stack([fit.monte_carlo_error()[what] for fit in fits]).square().mean(0).sqrt()
        ratio = torch.stack(values).std(0) / said
        # a standard deviation of 20 numbers has a relative error of 1/√38
        assert ((ratio - 1).abs() <= 5 / 38**0.5).all(), ratio


def test_same_seed_same_numbers_and_the_seed_matters() -> None:
    problem = classes()
    one, two, other = quick(problem, seed=1), quick(problem, seed=1), quick(problem, seed=2)
    assert torch.equal(one.loc, two.loc)
    assert not torch.equal(one.loc, other.loc)


def test_by_conjugate_gradients_it_is_the_same() -> None:
    """27 parameters are too many for a Hessian in each step, 24 are not; both reach the optimum over the same draws."""
    problem = classes(60, 6)
    fit = quick(problem, "full_rank")
    density = problem.density()
    eps = fixed_draws(FAMILIES["full_rank"], 6, None, torch.Generator().manual_seed(0))
    target = FixedDrawELBO(density, FAMILIES["full_rank"], eps)
    point = Params(fit.params.loc[0], fit.params.scale[0]) if fit.params else None
    local = target.local(point)
    assert local.hessian is None
    assert local.grad.abs().max() < 1e-4
    assert fit.linear_response().shape == (6, 6)


def test_restarts_and_history() -> None:
    fit = quick(classes(), num_restarts=3)
    assert fit.statuses == (vl.Status.CONVERGED,) * 3
    assert fit.history["negative_elbo"].shape == (fit.num_steps + 1, 3)
    assert fit.history["gap"][-1].max() < 1e-6
    assert fit.posterior(10).num_chains == 3
    assert (fit.history["num_particles"] == 512).all()


def test_improper_posterior_does_not_converge() -> None:
    def model() -> None:
        x = pyro.sample("x", dist.ImproperUniform(dist.constraints.real, (), ()))
        pyro.sample("y", dist.Normal(0 * x, 1.0), obs=torch.tensor(0.3))

    fit = quick(vl.Problem(model))
    assert fit.status is not vl.Status.CONVERGED
    with pytest.raises(FitError, match="has no linear response"):
        fit.linear_response()


# What it refuses


def test_refusals() -> None:
    problem = classes()
    with pytest.raises(ArgumentError, match="unknown optim 'fixed_draw': did you mean 'fixed_draws'"):
        vl.fit(problem, optim="fixed_draw")
    with pytest.raises(ArgumentError, match=r"optim='fixed_draws' is for the guides 'mean_field' and 'full_rank', not"):
        quick(problem, "low_rank")
    with pytest.raises(ArgumentError, match="take more than 12, or the guide 'mean_field'"):
        quick(problem, "full_rank", num_particles=10)
    with pytest.raises(ArgumentError, match="for which lr has no meaning"):
        quick(problem, lr=0.1)
    with pytest.raises(ArgumentError, match="for guides over a family and problems that see all rows at once"):
        vl.fit(vl.Problem(logistic, *problem.args, minibatch=10), optim="fixed_draws")
    with pytest.raises(ArgumentError, match="this fit has no Monte Carlo error: fit 'mean_field' or 'full_rank' with"):
        vl.fit(problem, progress=False).monte_carlo_error()


def test_regression_by_all_ways() -> None:
    model = LinearRegression(noise_scale=0.7, prior_scale=1.5)
    X, y, _ = model.simulate(30, 4, seed=0)
    exact = model.exact(X, y)
    for optim in ("natural_gradient", "fixed_draws", "batch_and_match"):
        fit = vl.fit(model.problem(X, y), optim=optim, progress=False)
        assert fit.status is vl.Status.CONVERGED
        assert fit.elbo()[0] == pytest.approx(exact.log_evidence, abs=1e-8)
