"""Fits of a mode: closed forms, maxima that are none, and what a point refuses."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Predictive
from pyro.infer.autoguide import init_to_value
from torch import Tensor
from torch.distributions import constraints

import pyro_vi_lab as vl
from pyro_vi_lab.errors import ArgumentError, FitError
from pyro_vi_lab.guides import MAP, FullRankNormal, LaplaceApproximation
from pyro_vi_lab.models import LinearRegression

Status = vl.Status


@pytest.fixture(autouse=True)
def double() -> None:
    torch.set_default_dtype(torch.float64)


def mode(model: Callable[..., Any], *args: Any, guide: Any = "map", **options: Any) -> vl.Fit:
    return vl.fit(vl.Problem(model, *args), guide, progress=False, **options)


Y = torch.tensor([0.3, -1.2, 2.5, 0.9, 1.4], dtype=torch.float64)
COUNTS = torch.tensor([3.0, 0.0, 4.0, 2.0, 2.0], dtype=torch.float64)


def normal(y: Tensor) -> None:
    loc = pyro.sample("loc", dist.Normal(0.0, 2.0))
    scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
    with pyro.plate("row", len(y)):
        pyro.sample("y", dist.Normal(loc, scale), obs=y)


def poisson(y: Tensor) -> None:
    rate = pyro.sample("rate", dist.Gamma(3.0, 2.0))
    pyro.deterministic("double", 2 * rate)
    with pyro.plate("row", len(y)):
        pyro.sample("y", dist.Poisson(rate), obs=y)


def shares(counts: Tensor) -> None:
    p = pyro.sample("p", dist.Dirichlet(torch.tensor([2.0, 3.0, 4.0])))
    pyro.sample("counts", dist.Multinomial(int(counts.sum()), p), obs=counts)


# Closed forms


def test_gamma_poisson() -> None:
    """MAP (3 - 1 + 11) / (2 + 5), MLE 11/5; Laplace on the logarithm: mode 14/7, variance 1/14."""
    fit = mode(poisson, COUNTS)
    assert fit.status is Status.CONVERGED, fit.message
    assert float(fit.point()["rate"]) == pytest.approx(13 / 7, rel=1e-9)
    assert float(fit.point()["double"]) == pytest.approx(26 / 7, rel=1e-9)
    assert float(mode(poisson, COUNTS, guide="mle").point()["rate"]) == pytest.approx(11 / 5, rel=1e-9)
    laplace = mode(poisson, COUNTS, guide="laplace")
    assert float(laplace.loc) == pytest.approx(math.log(2), rel=1e-9)
    assert float(laplace.covariance()) == pytest.approx(1 / 14, rel=1e-9)


def test_shares_on_the_simplex() -> None:
    """The density of the simplex is that of Dirichlet's formula: modes (α + n - 1) / Σ(α + n - 1), and n / N."""
    counts = torch.tensor([5.0, 1.0, 10.0])
    expected = torch.tensor([6.0, 3.0, 13.0]) / 22
    torch.testing.assert_close(mode(shares, counts).point()["p"], expected, rtol=1e-8, atol=0)
    torch.testing.assert_close(mode(shares, counts, guide="mle").point()["p"], counts / 16, rtol=1e-8, atol=0)


def test_normal_likelihood() -> None:
    point = mode(normal, Y, guide="mle").point()
    torch.testing.assert_close(point["loc"], Y.mean(), rtol=1e-9, atol=0)
    torch.testing.assert_close(point["scale"], Y.std(correction=0), rtol=1e-9, atol=0)


def test_map_has_no_gradient_left() -> None:
    """Of the density of the sites, by autograd of the distributions themselves."""
    point = mode(normal, Y).point()
    values = [point[name].clone().requires_grad_() for name in ("loc", "scale")]
    log_p = dist.Normal(0.0, 2.0).log_prob(values[0]) + dist.LogNormal(0.0, 1.0).log_prob(values[1])
    log_p = log_p + dist.Normal(*values).log_prob(Y).sum()
    for grad in torch.autograd.grad(log_p, values):
        assert abs(float(grad)) < 1e-7


def test_laplace_of_a_gaussian_posterior_is_exact() -> None:
    model = LinearRegression(noise_scale=0.7, prior_scale=1.5)
    X, y, _ = model.simulate(30, 4, seed=0)
    fit = vl.fit(model.problem(X, y), "laplace", progress=False)
    exact = model.exact(X, y)
    assert fit.status is Status.CONVERGED
    assert isinstance(fit.guide, FullRankNormal)
    torch.testing.assert_close(fit.loc, exact.mean, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(fit.covariance(), exact.covariance, rtol=1e-8, atol=1e-12)
    value, error = fit.elbo()
    assert value == pytest.approx(exact.log_evidence, rel=1e-10)
    assert error < 1e-9
    assert fit.importance().ess == pytest.approx(10_000)
    assert fit.posterior(500).draws.keys() == fit.problem.density().constrain(fit.loc).keys()
    draws = Predictive(fit.guide, num_samples=50)(*fit.problem.args)
    assert all(len(value) == 50 for value in draws.values())


def test_laplace_is_not_invariant_and_map_is_neither() -> None:
    """The mode of a log-normal variable: of its density exp(m - s²), on the unconstrained scale exp(m)."""

    def model() -> None:
        pyro.sample("x", dist.LogNormal(1.0, 0.5))

    assert float(mode(model).point()["x"]) == pytest.approx(math.exp(0.75), rel=1e-9)
    laplace = mode(model, guide="laplace")
    assert float(laplace.loc) == pytest.approx(1.0)
    assert float(laplace.covariance()) == pytest.approx(0.25)


def test_dependent_support() -> None:
    """A density of 6(1 - a - b)·... has its mode inside the triangle, wherever the supports come from."""

    def model() -> None:
        a = pyro.sample("a", dist.Uniform(0.0, 1.0))
        b = pyro.sample("b", dist.Uniform(0.0, 1.0 - a))
        pyro.factor("weight", (1 - a).log() + a.log() + b.log() + (1 - a - b).log())

    point = mode(model).point()
    assert float(point["a"]) == pytest.approx(1 / 3, rel=1e-8)
    assert float(point["b"]) == pytest.approx(1 / 3, rel=1e-8)


def test_discrete_sites_are_summed_out() -> None:
    y = torch.tensor([-1.0, 0.3, 2.5, 2.2])

    def mixture(y: Tensor) -> None:
        weight = pyro.sample("weight", dist.Beta(2.0, 2.0))
        with pyro.plate("row", len(y)):
            k = pyro.sample("k", dist.Bernoulli(weight))
            pyro.sample("y", dist.Normal(3 * k, 1.0), obs=y)

    grid = torch.linspace(0, 1, 100_001)[1:-1]
    likelihood = torch.stack(
        [
            (1 - grid) * dist.Normal(0.0, 1.0).log_prob(one).exp() + grid * dist.Normal(3.0, 1.0).log_prob(one).exp()
            for one in y
        ]
    )
    best = grid[likelihood.log().sum(0).argmax()]
    assert float(mode(mixture, y, guide="mle").point()["weight"]) == pytest.approx(float(best), abs=2e-5)
    best = grid[(likelihood.log().sum(0) + dist.Beta(2.0, 2.0).log_prob(grid)).argmax()]
    assert float(mode(mixture, y).point()["weight"]) == pytest.approx(float(best), abs=2e-5)


def test_scales_far_apart() -> None:
    """Raw data: a coefficient of a million beside one of a millionth, and flat priors."""
    x = torch.linspace(-1.0, 1.0, 20)
    X = torch.stack([1e-6 * x, 1e6 * x**2], 1)
    y = X @ torch.tensor([3e6, -2e-6]) + 0.1 * torch.cos(30 * x)

    def model(X: Tensor, y: Tensor) -> None:
        b = pyro.sample("b", dist.ImproperUniform(constraints.real_vector, (), (2,)))
        with pyro.plate("row", len(y)):
            pyro.sample("y", dist.Normal(X @ b, 0.5), obs=y)

    fit = mode(model, X, y, guide="laplace")
    assert fit.status is Status.CONVERGED, fit.message
    expected = torch.linalg.lstsq(X * torch.tensor([1e6, 1e-6]), y).solution * torch.tensor([1e6, 1e-6])
    torch.testing.assert_close(fit.loc, expected, rtol=1e-7, atol=0)


def test_more_dimensions_than_a_hessian_is_formed_for() -> None:
    """Conjugate gradients; the mode of a product of normals."""
    size = 600
    scale = torch.linspace(0.1, 3.0, size)

    def model() -> None:
        pyro.sample("x", dist.Normal(torch.arange(size) / 100.0, scale).to_event(1))

    fit = mode(model)
    assert fit.status is Status.CONVERGED, fit.message
    torch.testing.assert_close(fit.point()["x"], torch.arange(size) / 100.0, rtol=0, atol=1e-5)


# No maximum


def schools(y: Tensor, noise: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("school", len(y)):
        theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(mu + tau * theta, noise), obs=y)


def centered(y: Tensor, noise: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("school", len(y)):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("y", dist.Normal(theta, noise), obs=y)


SCHOOLS = (
    torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0]),
    torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0]),
)


def edge(y: Tensor) -> None:
    scale = pyro.sample("scale", dist.Exponential(1.0))
    pyro.sample("y", dist.Normal(0.0, 1 + scale), obs=y)


def logistic(x: Tensor, y: Tensor) -> None:
    slope = pyro.sample("slope", dist.Normal(0.0, 2.0))
    with pyro.plate("row", len(y)):
        pyro.sample("y", dist.Bernoulli(logits=slope * x), obs=y)


def perfect(y: Tensor) -> None:
    """All values equal: the likelihood of a scale rises without bound towards zero."""
    loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    scale = pyro.sample("scale", dist.HalfNormal(1.0))
    with pyro.plate("row", 4):
        pyro.sample("y", dist.Normal(loc, scale), obs=y)


@pytest.mark.parametrize("guide", ["map", "mle"])
@pytest.mark.parametrize(
    ("model", "args", "site"),
    [
        (schools, SCHOOLS, "tau"),
        (edge, (torch.tensor(0.1),), "scale"),
        (perfect, (torch.full((4,), 0.5),), "scale"),
    ],
)
def test_mode_at_the_edge_is_none(guide: str, model: Callable[..., None], args: tuple[Tensor, ...], site: str) -> None:
    fit = mode(model, *args, guide=guide)
    assert fit.status is not Status.CONVERGED
    if (guide, site) != ("mle", "tau"):  # without priors tau·theta is one number
        assert site in fit.message
    if fit.status is Status.DIVERGED:
        with pytest.raises(FitError, match=f"the {guide} fit of {model.__name__} has no mode: diverged"):
            fit.point()
        with pytest.raises(FitError):
            fit.posterior()


@pytest.mark.parametrize("guide", ["map", "laplace"])
def test_funnel_without_a_mode(guide: str) -> None:
    """Of a centered hierarchical model the density is infinite where all effects are equal and their scale zero."""
    fit = mode(centered, *SCHOOLS, guide=guide, max_steps=100)
    assert fit.status is not Status.CONVERGED
    assert "tau" in fit.message


def test_separated_classes() -> None:
    x = torch.linspace(-1.0, 1.0, 10)
    assert mode(logistic, x, (x > 0).double()).status is Status.CONVERGED
    fit = mode(logistic, x, (x > 0).double(), guide="mle")
    assert fit.status is Status.DIVERGED
    assert "slope" in fit.message


def test_likelihood_without_some_sites() -> None:
    """The mean and the scale of random effects are in no likelihood given the effects."""
    fit = mode(centered, *SCHOOLS, guide="mle")
    assert fit.status is Status.DIVERGED
    assert "the likelihood is flat along mu, tau" in fit.message
    assert "fit 'map', which has the priors too" in fit.message


def test_improper_posterior() -> None:
    def model() -> None:
        x = pyro.sample("x", dist.ImproperUniform(constraints.real, (), ()))
        pyro.sample("y", dist.Normal(0 * x, 1.0), obs=torch.tensor(0.3))

    fit = mode(model, guide="laplace")
    assert fit.status is Status.DIVERGED
    assert "flat along x" in fit.message
    with pytest.raises(FitError):
        fit.posterior()


def test_start_without_a_density() -> None:
    def model() -> None:
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        pyro.factor("root", torch.where(x > 1, (x - 1).abs().log(), -math.inf))

    fit = mode(model)
    assert fit.status is Status.DIVERGED
    assert "is not finite at the start" in fit.message
    fit = mode(model, guide=MAP(model, init_loc_fn=init_to_value(values={"x": torch.tensor(2.0)})))
    assert fit.status is Status.CONVERGED
    # -x²/2 + log(x - 1) is highest at x(x - 1) = 1
    assert float(fit.point()["x"]) == pytest.approx((1 + math.sqrt(5)) / 2)


def test_restarts() -> None:
    """Modes at ±4 with weights 1/4 and 3/4: the first start, at -3, finds the lower one."""

    def model() -> None:
        x = pyro.sample("x", dist.ImproperUniform(constraints.real, (), ()))
        low, high = math.log(0.25) - (x + 1.5) ** 2 * 8, math.log(0.75) - (x - 1.5) ** 2 * 8
        pyro.factor("modes", torch.stack([low, high]).logsumexp(0))

    start = init_to_value(values={"x": torch.tensor(-1.0)})
    alone = mode(model, guide=MAP(model, init_loc_fn=start))
    assert float(alone.point()["x"]) == pytest.approx(-1.5)
    fit = mode(model, guide=MAP(model, init_loc_fn=start), num_restarts=6)
    assert float(fit.point()["x"]) == pytest.approx(1.5)
    assert "found a lower maximum, by 1.1 nats or more" in fit.message
    assert fit.num_restarts == 6
    assert fit.history["negative_log_density"].shape == (fit.num_steps + 1, 6)
    laplace = mode(model, guide=LaplaceApproximation(model, init_loc_fn=start), num_restarts=6)
    assert laplace.posterior(10).num_chains == 6


# The result


def test_a_point_is_no_distribution() -> None:
    problem = vl.Problem(poisson, COUNTS)
    fit = vl.fit(problem, "map", progress=False)
    for what in (fit.elbo, fit.importance, fit.covariance, fit.linear_response):
        with pytest.raises(ArgumentError, match=r"it is a point|this fit has no"):
            what()
    posterior = fit.posterior(7)
    assert posterior.draws["rate"].shape == (1, 7)
    assert float(posterior.sd()["rate"]) < 1e-12
    assert problem.predictive(posterior)["y"].shape == (1, 7, 5)
    for result in (fit, posterior):
        with pytest.raises(ArgumentError, match="all one point and no posterior"):
            vl.to_arviz(result)
    with pytest.raises(ArgumentError, match="guide 'map' is a point"):
        vl.compare(problem, ["full_rank", "map"])
    with pytest.raises(ArgumentError, match="a fit of the guide full_rank is no point"):
        vl.fit(problem, progress=False).point()
    assert fit.plot() is not None


def test_result_of_a_fit() -> None:
    problem = vl.Problem(normal, Y)
    fit, again = (vl.fit(problem, "map", progress=False, num_restarts=3, seed=5) for _ in range(2))
    assert fit.point()["loc"].equal(again.point()["loc"])
    assert (fit.method, fit.problem) == ("map", problem)
    assert fit.num_gradients >= 3 * (fit.num_steps // 3)
    assert fit.seconds > 0
    median = fit.guide.median()
    for name, value in fit.point().items():
        torch.testing.assert_close(median[name], value)
    assert "map of normal: converged" in repr(fit)
    assert not list(pyro.get_param_store().keys())


def test_the_users_guide_is_the_start_and_stays_as_it_is() -> None:
    guide = MAP(normal)
    guide(Y)
    before = guide.loc.detach().clone()
    pyro.clear_param_store()
    fit = mode(normal, Y, guide=guide)
    assert torch.equal(guide.loc, before)
    assert not torch.equal(fit.guide.loc, before)


def test_minibatches() -> None:
    """By stochastic gradients: the same mode, and the same refusals."""
    generator = torch.Generator().manual_seed(0)
    y = 2 + torch.randn(60, generator=generator)
    whole = mode(normal, y).point()
    problem = vl.Problem(normal, y, minibatch=20)
    fit = vl.fit(problem, "map", progress=False)
    assert fit.status is Status.CONVERGED
    for name, value in fit.point().items():
        assert float(value) == pytest.approx(float(whole[name]), abs=0.01)
    assert fit.posterior(3).draws["loc"].shape == (1, 3)
    with pytest.raises(ArgumentError, match="it is a point"):
        fit.elbo()
    with pytest.raises(ArgumentError, match="needs the second derivatives at all rows"):
        vl.fit(problem, "laplace", progress=False)


@pytest.mark.parametrize("options", [{"lr": 0.1}, {"optim": pyro.optim.Adam({"lr": 0.1})}, {"objective": vl.ELBO()}])
def test_options_of_other_fits(options: dict[str, Any]) -> None:
    with pytest.raises(ArgumentError, match="is fitted by Newton steps of the log density"):
        mode(normal, Y, **options)


def test_new_data() -> None:
    problem = vl.Problem(poisson, COUNTS)
    vl.fit(problem, "mle", progress=False)
    other = vl.fit(problem.with_data(2 * COUNTS), "mle", progress=False)
    assert float(other.point()["rate"]) == pytest.approx(22 / 5)
