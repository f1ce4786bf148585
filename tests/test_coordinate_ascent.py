"""Coordinate ascent against posteriors in closed form and the updates of the textbook."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import init_to_value
from torch import Tensor

import pyro_vi_lab as vl
from pyro_vi_lab.coordinate_ascent import coordinate_ascent, elbo, natural_sweep
from pyro_vi_lab.errors import ArgumentError, FitError, ModelError
from pyro_vi_lab.expected_log_joint import LogJoint
from pyro_vi_lab.guides import Conjugate, init_to_prior

EXACT = {"rtol": 1e-9, "atol": 1e-9}


@pytest.fixture(autouse=True)
def double() -> None:
    torch.set_default_dtype(torch.float64)


def numbers(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# --- one step is the posterior ----------------------------------------------------------------------------------------


class Exact(NamedTuple):
    """A model, its data, and the posterior: standard parameters by site, and log p(y) where it is simple."""

    model: Callable[..., Any]
    data: tuple[Tensor, ...]
    posterior: dict[str, dict[str, Tensor]]
    log_evidence: Tensor | None = None


def unknown_mean_and_precision() -> Exact:
    y, (a, b, m, k) = 2 * numbers(40) + 3, (2.0, 3.0, 1.0, 0.5)

    def model(y: Tensor) -> None:
        tau = pyro.sample("tau", dist.Gamma(a, b))
        mu = pyro.sample("mu", dist.Normal(m, (k * tau).rsqrt()))
        with pyro.plate("row", len(y)):
            pyro.sample("y", dist.Normal(mu, tau.rsqrt()), obs=y)

    n = len(y)
    a_n, k_n = torch.tensor(a + n / 2), torch.tensor(k + n)
    loc = (k * m + y.sum()) / k_n
    b_n = b + 0.5 * (y - y.mean()).square().sum() + 0.5 * k * n / k_n * (y.mean() - m) ** 2
    posterior = {"mu": {"concentration": a_n, "rate": b_n, "loc": loc, "relative_precision": k_n}}
    evidence = (
        torch.lgamma(a_n)
        - math.lgamma(a)
        + a * math.log(b)
        - a_n * b_n.log()
        + 0.5 * (math.log(k) - k_n.log())
        - n / 2 * math.log(2 * math.pi)
    )
    return Exact(model, (y,), posterior, evidence)


def means_and_precisions_in_plates() -> Exact:
    """Three groups, each with a mean and a precision of its own."""
    y = numbers(3, 10) * torch.tensor([[1.0], [2.0], [0.5]]) + torch.tensor([[0.0], [1.0], [-2.0]])

    def model(y: Tensor) -> None:
        group = pyro.plate("group", 3, dim=-2)
        with group:
            tau = pyro.sample("tau", dist.Gamma(2.0, 1.0))
            mu = pyro.sample("mu", dist.Normal(0.0, (0.1 * tau).rsqrt()))
        with group, pyro.plate("row", 10, dim=-1):
            pyro.sample("y", dist.Normal(mu, tau.rsqrt()), obs=y)

    k_n = torch.full((3, 1), 10.1)
    mean = y.mean(1, keepdim=True)
    rate = 1 + 0.5 * (y - mean).square().sum(1, keepdim=True) + 0.5 * 0.1 * 10 / k_n * mean**2
    posterior = {"concentration": torch.full((3, 1), 7.0), "rate": rate, "loc": 10 * mean / k_n}
    return Exact(model, (y,), {"tau": {**posterior, "relative_precision": k_n}})


def tosses() -> Exact:
    y = torch.tensor([1.0, 0.0, 1.0, 1.0, 0.0, 1.0])

    def model(y: Tensor) -> None:
        p = pyro.sample("p", dist.Beta(0.5, 2.0))
        with pyro.plate("row", len(y)):
            pyro.sample("y", dist.Bernoulli(p), obs=y)

    a, b = torch.tensor(4.5), torch.tensor(4.0)
    evidence = torch.lgamma(a) + torch.lgamma(b) - torch.lgamma(a + b)
    evidence = evidence - math.lgamma(0.5) - math.lgamma(2.0) + math.lgamma(2.5)
    return Exact(model, (y,), {"p": {"concentration1": a, "concentration0": b}}, evidence)


def binomials() -> Exact:
    def model(y: Tensor) -> None:
        p = pyro.sample("p", dist.Beta(1.0, 1.0))
        with pyro.plate("row", len(y)):
            pyro.sample("y", dist.Binomial(10, p), obs=y)

    posterior = {"concentration1": torch.tensor(11.0), "concentration0": torch.tensor(21.0)}
    return Exact(model, (torch.tensor([3.0, 7.0, 0.0]),), {"p": posterior})


def sparse_choices() -> Exact:
    """With concentrations whose draws underflow."""
    y = torch.tensor([0, 2, 2, 1, 2, 0, 2])

    def model(y: Tensor) -> None:
        with pyro.plate("group", 2):
            weights = pyro.sample("weights", dist.Dirichlet(torch.tensor([0.01, 0.5, 2.0, 0.01])))
        with pyro.plate("row", len(y)):
            pyro.sample("y", dist.Categorical(weights[0]), obs=y)

    prior = torch.tensor([0.01, 0.5, 2.0, 0.01])
    counts = torch.tensor([2.0, 1.0, 4.0, 0.0])
    return Exact(model, (y,), {"weights": {"concentration": torch.stack([prior + counts, prior])}})


def counts() -> Exact:
    y = torch.tensor([3.0, 0.0, 2.0, 5.0])

    def model(y: Tensor) -> None:
        rate = pyro.sample("rate", dist.Gamma(2.0, 0.5))
        with pyro.plate("row", len(y)):
            pyro.sample("y", dist.Poisson(rate), obs=y)

    a, b = torch.tensor(12.0), torch.tensor(4.5)
    evidence = 2 * math.log(0.5) - math.lgamma(2.0) + torch.lgamma(a) - a * b.log() - torch.lgamma(y + 1).sum()
    return Exact(model, (y,), {"rate": {"concentration": a, "rate": b}}, evidence)


def waiting_times() -> Exact:
    y = torch.tensor([0.3, 1.2, 0.1])

    def model(y: Tensor) -> None:
        rate = pyro.sample("rate", dist.Exponential(2.0))
        with pyro.plate("row", len(y)):
            pyro.sample("y", dist.Exponential(rate), obs=y)

    return Exact(model, (y,), {"rate": {"concentration": torch.tensor(4.0), "rate": 2 + y.sum()}})


def unknown_variances() -> Exact:
    y = numbers(2, 9) * torch.tensor([[1.0], [3.0]])

    def model(y: Tensor) -> None:
        with pyro.plate("group", 2, dim=-2):
            variance = pyro.sample("variance", dist.InverseGamma(0.5, 2.0))
            with pyro.plate("row", 9, dim=-1):
                pyro.sample("y", dist.Normal(1.0, variance.sqrt()), obs=y)

    rate = 2 + (y - 1).square().sum(1, keepdim=True) / 2
    return Exact(model, (y,), {"variance": {"concentration": torch.full((2, 1), 5.0), "rate": rate}})


def regression_with_known_noise() -> Exact:
    X = numbers(30, 4) @ (torch.eye(4) + 0.5)
    y = X @ torch.tensor([1.0, -2.0, 0.5, 0.0]) + 0.3 * numbers(30, seed=2)

    def model(X: Tensor, y: Tensor) -> None:
        beta = pyro.sample("beta", dist.Normal(torch.zeros(4), torch.tensor([1.0, 2.0, 0.5, 10.0])).to_event(1))
        with pyro.plate("row", len(X)):
            pyro.sample("y", dist.Normal(X @ beta, 0.3), obs=y)

    prior = torch.tensor([1.0, 2.0, 0.5, 10.0]) ** -2
    covariance = torch.linalg.inv(X.T @ X / 0.09 + prior.diag())
    marginal = 0.09 * torch.eye(30) + X @ (1 / prior).diag() @ X.T
    evidence = dist.MultivariateNormal(torch.zeros(30), marginal).log_prob(y)
    beta = {"loc": covariance @ (X.T @ y) / 0.09, "scale_tril": torch.linalg.cholesky(covariance)}
    return Exact(model, (X, y), {"beta": beta}, evidence)


def vectors_with_known_covariance() -> Exact:
    y = numbers(12, 3) + 1

    def model(y: Tensor) -> None:
        mu = pyro.sample("mu", dist.MultivariateNormal(torch.ones(3), 2 * torch.eye(3) + 0.5))
        with pyro.plate("row", len(y)):
            pyro.sample("y", dist.MultivariateNormal(mu, torch.eye(3)), obs=y)

    prior = torch.linalg.inv(2 * torch.eye(3) + 0.5)
    covariance = torch.linalg.inv(prior + 12 * torch.eye(3))
    loc = covariance @ (prior @ torch.ones(3) + y.sum(0))
    return Exact(model, (y,), {"mu": {"loc": loc, "scale_tril": torch.linalg.cholesky(covariance)}})


def unknown_precision_matrix() -> Exact:
    y = numbers(15, 2)

    def model(y: Tensor) -> None:
        precision = pyro.sample("precision", dist.Wishart(torch.tensor(4.0), torch.eye(2)))
        with pyro.plate("row", len(y)):
            pyro.sample("y", dist.MultivariateNormal(torch.zeros(2), precision_matrix=precision), obs=y)

    scale = torch.linalg.inv(torch.eye(2) + y.T @ y)
    posterior = {"df": torch.tensor(19.0), "scale_tril": torch.linalg.cholesky(scale)}
    return Exact(model, (y,), {"precision": posterior})


def unknown_mean_and_precision_matrix() -> Exact:
    y = numbers(15, 2) + torch.tensor([2.0, -1.0])
    V = torch.tensor([[1.0, 0.3], [0.3, 0.5]])

    def model(y: Tensor) -> None:
        precision = pyro.sample("precision", dist.Wishart(torch.tensor(4.0), V))
        mu = pyro.sample("mu", dist.MultivariateNormal(torch.ones(2), precision_matrix=0.2 * precision))
        with pyro.plate("row", len(y)):
            pyro.sample("y", dist.MultivariateNormal(mu, precision_matrix=precision), obs=y)

    mean, centered = y.mean(0), y - y.mean(0)
    apart = mean - torch.ones(2)
    inverse = torch.linalg.inv(V) + centered.T @ centered + 0.2 * 15 / 15.2 * torch.outer(apart, apart)
    posterior = {
        "df": torch.tensor(19.0),
        "scale_tril": torch.linalg.cholesky(torch.linalg.inv(inverse)),
        "loc": (0.2 + 15 * mean) / 15.2,
        "relative_precision": torch.tensor(15.2),
    }
    return Exact(model, (y,), {"mu": posterior})


EXACTS = {
    make.__name__: make
    for make in (
        unknown_mean_and_precision,
        means_and_precisions_in_plates,
        tosses,
        binomials,
        sparse_choices,
        counts,
        waiting_times,
        unknown_variances,
        regression_with_known_noise,
        vectors_with_known_covariance,
        unknown_precision_matrix,
        unknown_mean_and_precision_matrix,
    )
}


@pytest.mark.parametrize("make", EXACTS.values(), ids=EXACTS)
def test_one_sweep_is_the_posterior(make: Callable[[], Exact]) -> None:
    exact = make()
    guide = Conjugate(exact.model)
    ascent = coordinate_ascent(vl.Problem(exact.model, *exact.data), guide, max_sweeps=1)
    for site, parameters in exact.posterior.items():
        for name, value in guide.standard(site).items():
            torch.testing.assert_close(value, parameters[name], **EXACT)
    if exact.log_evidence is not None:
        torch.testing.assert_close(ascent.elbo[-1], exact.log_evidence, **EXACT)


@pytest.mark.parametrize("make", EXACTS.values(), ids=EXACTS)
def test_a_sweep_of_a_smaller_size_goes_a_part_of_the_way(make: Callable[[], Exact]) -> None:
    exact = make()
    guide, half = Conjugate(exact.model), Conjugate(exact.model)
    half(*exact.data)
    before = {name: half.natural(name) for name in half.factors}
    problem = vl.Problem(exact.model, *exact.data)
    coordinate_ascent(problem, guide, max_sweeps=1)
    coordinate_ascent(problem, half, lr=0.3, max_sweeps=1)
    for name, eta in before.items():
        torch.testing.assert_close(half.natural(name), eta + 0.3 * (guide.natural(name) - eta), **EXACT)


# --- textbook updates -------------------------------------------------------------------------------------------------


def test_independent_mean_and_precision() -> None:
    """Bishop 2006, eq. 10.26-10.30, update by update."""
    exact = unknown_mean_and_precision()
    (y,) = exact.data
    guide = Conjugate(exact.model, joint={})
    problem = vl.Problem(exact.model, y)
    n, precision = len(y), torch.tensor(2.0 / 3.0)
    for _ in range(4):
        coordinate_ascent(problem, guide, max_sweeps=1)
        loc, lam = (0.5 * 1.0 + y.sum()) / (0.5 + n), (0.5 + n) * precision  # 10.26, 10.27
        a = torch.tensor(2.0 + (n + 1) / 2)  # 10.29
        squares = (y - loc).square().sum() + n / lam + 0.5 * ((loc - 1.0) ** 2 + 1 / lam)
        b = 3.0 + squares / 2  # 10.30
        precision = a / b
        torch.testing.assert_close(guide.standard("mu"), {"loc": loc, "scale": lam.rsqrt()}, **EXACT)
        torch.testing.assert_close(guide.standard("tau"), {"concentration": a, "rate": b}, **EXACT)


def mixture(y: Tensor, num_components: int = 3) -> None:
    weights = pyro.sample("weights", dist.Dirichlet(torch.full((num_components,), 0.5)))
    with pyro.plate("component", num_components):
        precision = pyro.sample("precision", dist.Wishart(torch.tensor(3.0), torch.eye(2)))
        mean = pyro.sample("mean", dist.MultivariateNormal(torch.zeros(2), precision_matrix=0.1 * precision))
    with pyro.plate("row", len(y)):
        kind = pyro.sample("kind", dist.Categorical(weights))
        pyro.sample("y", dist.MultivariateNormal(mean[kind], precision_matrix=precision[kind]), obs=y)


CENTERS = torch.tensor([[0.0, 0.0], [4.0, 4.0], [4.0, -4.0]], dtype=torch.float64)


def three_groups() -> Tensor:
    return numbers(60, 2) + CENTERS.repeat(20, 1)


def test_a_mixture_of_normals() -> None:
    """Bishop 2006, eq. 10.46-10.49, 10.51-10.53, 10.58 and 10.60-10.66, sweep by sweep."""
    y = three_groups()
    guide = Conjugate(mixture, init_to_value(values={"mean": CENTERS + 0.5}, fallback=init_to_prior))
    problem = vl.Problem(mixture, y)
    nu, beta, m, W, alpha = (
        torch.full((3,), 3.0),
        torch.full((3,), 0.1),
        CENTERS + 0.5,
        torch.eye(2).expand(3, 2, 2),
        torch.full((3,), 0.5),
    )
    last = -math.inf
    for _ in range(3):
        ascent = coordinate_ascent(problem, guide, max_sweeps=1)
        apart = y[:, None] - m
        squares = 2 / beta + nu * torch.einsum("nki,kij,nkj->nk", apart, W, apart)
        log_det = torch.digamma((nu[:, None] - torch.arange(2)) / 2).sum(1) + 2 * math.log(2) + torch.logdet(W)
        log_weights = torch.digamma(alpha) - torch.digamma(alpha.sum())
        responsibilities = (log_weights + log_det / 2 - squares / 2).softmax(1)
        number = responsibilities.sum(0)
        mean = responsibilities.T @ y / number[:, None]
        centered = y[:, None] - mean
        scatter = torch.einsum("nk,nki,nkj->kij", responsibilities, centered, centered)
        alpha, beta, nu = 0.5 + number, 0.1 + number, 3.0 + number
        m = number[:, None] * mean / beta[:, None]
        outer = mean[:, :, None] * mean[:, None]
        W = torch.linalg.inv(torch.eye(2) + scatter + (0.1 * number / (0.1 + number))[:, None, None] * outer)
        torch.testing.assert_close(guide.standard("kind")["logits"].exp(), responsibilities, **EXACT)
        torch.testing.assert_close(guide.standard("weights")["concentration"], alpha, **EXACT)
        standard = guide.standard("mean")
        torch.testing.assert_close(standard["loc"], m, **EXACT)
        torch.testing.assert_close(standard["relative_precision"], beta, **EXACT)
        torch.testing.assert_close(standard["df"], nu, **EXACT)
        torch.testing.assert_close(standard["scale_tril"], torch.linalg.cholesky(W), **EXACT)
        assert ascent.elbo[-1] > ascent.elbo[0] >= last
        last = float(ascent.elbo[-1]) - 1e-9 * abs(float(ascent.elbo[-1]))


def test_regression_with_unknown_noise() -> None:
    """The fixed point of q(β) q(τ): Bishop 2006, Section 10.3, with the roles of the precisions exchanged."""
    X = numbers(40, 3)
    y = X @ torch.tensor([1.0, -1.0, 2.0]) + 0.5 * numbers(40, seed=3)

    def model(X: Tensor, y: Tensor) -> None:
        tau = pyro.sample("tau", dist.Gamma(1.0, 1.0))
        beta = pyro.sample("beta", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        with pyro.plate("row", len(X)):
            pyro.sample("y", dist.Normal(X @ beta, tau.rsqrt()), obs=y)

    guide = Conjugate(model)
    ascent = coordinate_ascent(vl.Problem(model, X, y), guide)
    assert ascent.converged
    assert (ascent.elbo.diff() > -1e-9).all()
    tau, beta = guide.standard("tau"), guide.standard("beta")
    precision = tau["concentration"] / tau["rate"]
    covariance = torch.linalg.inv(torch.eye(3) + precision * X.T @ X)
    torch.testing.assert_close(beta["scale_tril"] @ beta["scale_tril"].T, covariance, **EXACT)
    torch.testing.assert_close(beta["loc"], precision * covariance @ X.T @ y, **EXACT)
    squares = (y - X @ beta["loc"]).square().sum() + (X @ covariance @ X.T).trace()
    torch.testing.assert_close(tau["rate"], 1 + squares / 2, **EXACT)


def test_members_that_depend_on_each_other_are_updated_one_by_one() -> None:
    """Independent coefficients: the means are those of the posterior, the precisions its precision's diagonal."""
    X = numbers(40, 4)
    y = X @ numbers(4, seed=4) + 0.5 * numbers(40, seed=3)

    def model(X: Tensor, y: Tensor) -> None:
        with pyro.plate("feature", 4):
            beta = pyro.sample("beta", dist.Normal(0.0, 1.0))
        with pyro.plate("row", len(X)):
            pyro.sample("y", dist.Normal(X @ beta, 0.5), obs=y)

    guide = Conjugate(model)
    ascent = coordinate_ascent(vl.Problem(model, X, y), guide, tolerance=1e-20)
    assert ascent.converged
    assert (ascent.elbo.diff() > -1e-8).all()
    precision = torch.eye(4) + 4 * X.T @ X
    expected = {"loc": torch.linalg.solve(precision, 4 * X.T @ y), "scale": precision.diagonal().rsqrt()}
    torch.testing.assert_close(guide.standard("beta"), expected, rtol=1e-8, atol=1e-8)


def test_many_sites_that_depend_on_each_other_at_a_time() -> None:
    """Factor analysis, where the square of a product of two vectors has four signs and a precision: a stronger table."""
    y = numbers(20, 1) * torch.tensor([1.0, -1.0, 0.5]) + 0.2 * numbers(20, 3, seed=5)

    def model(y: Tensor) -> None:
        with pyro.plate("output", 3, dim=-1):
            tau = pyro.sample("tau", dist.Gamma(1.0, 1.0))
            loading = pyro.sample("loading", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        with pyro.plate("row", len(y), dim=-2):
            factor = pyro.sample("factor", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            with pyro.plate("column", 3, dim=-1):
                pyro.sample("y", dist.Normal((factor * loading).sum(-1), tau.rsqrt()), obs=y)

    guide = Conjugate(model, init_to_value(values={"loading": numbers(3, 2)}, fallback=init_to_prior))
    ascent = coordinate_ascent(vl.Problem(model, y), guide, max_sweeps=3)
    assert (ascent.elbo.diff() > 0).all()
    tau, loading, factor = (guide.standard(name) for name in ("tau", "loading", "factor"))
    squares = torch.zeros(3)
    w, V = loading["loc"], loading["scale_tril"] @ loading["scale_tril"].mT
    z, S = factor["loc"][:, 0], (factor["scale_tril"] @ factor["scale_tril"].mT)[:, 0]
    for d in range(3):
        second = torch.outer(w[d], w[d]) + V[d]
        total = (z[:, :, None] * z[:, None] + S).sum(0)
        squares[d] = y[:, d].square().sum() - 2 * (y[:, d] * (z @ w[d])).sum() + (second * total).sum()
    torch.testing.assert_close(tau["rate"], 1 + squares / 2, **EXACT)


def test_the_elbo_is_that_of_pyro() -> None:
    from pyro.infer import TraceEnum_ELBO, config_enumerate

    y = three_groups()
    guide = Conjugate(config_enumerate(mixture), init_to_value(values={"mean": CENTERS}, fallback=init_to_prior))
    ascent = coordinate_ascent(vl.Problem(mixture, y), guide, max_sweeps=2)
    weights = guide.standard("weights")["concentration"]  # where not every draw has the same value
    guide.set_natural("weights", 2 * weights - 1)
    guide.set_natural("kind", 0.5 * guide.natural("kind"))
    joint = LogJoint(guide, mixture, (y,), {})
    expected = elbo(joint, joint.design(2))
    assert expected < ascent.elbo[-1]
    objective = TraceEnum_ELBO(max_plate_nesting=1)
    draws = -torch.tensor([objective.loss(config_enumerate(mixture), guide, y) for _ in range(40)])
    assert (draws.mean() - expected).abs() < 5 * draws.std() / math.sqrt(40)


# --- minibatches ------------------------------------------------------------------------------------------------------


def test_sweeps_on_batches_converge_to_the_posterior() -> None:
    """Robbins-Monro: the average over the last epochs is within Monte Carlo error."""
    exact = unknown_mean_and_precision()
    (y,) = exact.data

    def model(y: Tensor) -> None:
        tau = pyro.sample("tau", dist.Gamma(2.0, 3.0))
        mu = pyro.sample("mu", dist.Normal(1.0, (0.5 * tau).rsqrt()))
        with pyro.plate("row", len(y), subsample_size=8) as index:
            pyro.sample("y", dist.Normal(mu, tau.rsqrt()), obs=y[index])

    whole, guide = Conjugate(exact.model), Conjugate(model)
    coordinate_ascent(vl.Problem(exact.model, y), whole)
    target = whole.natural("mu")
    # with ρ = 1/t the parameters are the average of independent estimates of the posterior's
    each = []
    other = Conjugate(model)
    for t in range(60):
        natural_sweep(guide, y, lr=1 / (t + 1))
        natural_sweep(other, y, lr=1.0)
        each.append(other.natural("mu"))
    error = torch.stack(each).std(0) / math.sqrt(60)
    assert ((guide.natural("mu") - target).abs() <= 5 * error + 1e-9).all()


def test_rows_that_are_seen_take_a_full_step_and_others_none() -> None:
    y = three_groups()

    def model(y: Tensor) -> None:
        weights = pyro.sample("weights", dist.Dirichlet(torch.ones(3)))
        with pyro.plate("component", 3):
            mean = pyro.sample("mean", dist.MultivariateNormal(torch.zeros(2), 10 * torch.eye(2)))
        with pyro.plate("row", len(y), subsample_size=12) as index:
            kind = pyro.sample("kind", dist.Categorical(weights))
            pyro.sample("y", dist.MultivariateNormal(mean[kind], torch.eye(2)), obs=y[index])

    guide = Conjugate(model, init_to_value(values={"mean": CENTERS}, fallback=init_to_prior))
    guide(y)
    assert guide.natural("kind").shape == (60, 2)
    before = guide.natural("kind")
    weights = guide.standard("weights")["concentration"]
    natural_sweep(guide, y, lr=0.1)
    changed = (guide.natural("kind") != before).any(-1)
    assert changed.sum() == 12
    assert (guide.standard("kind")["logits"].argmax(-1)[changed] == torch.arange(60)[changed] % 3).all()
    torch.testing.assert_close(guide.standard("weights")["concentration"].sum(), 0.9 * weights.sum() + 0.1 * 63)
    for t in range(20):
        natural_sweep(guide, y, lr=(t + 2) ** -0.7)
    # its posterior standard deviations are about 1 / √20
    assert ((guide.standard("mean")["loc"] - y.reshape(20, 3, 2).mean(0)).abs() < 3 / math.sqrt(20)).all()


# --- what cannot be done ----------------------------------------------------------------------------------------------


def test_a_site_that_is_not_conjugate_is_named() -> None:
    def model(y: Tensor) -> None:
        p = pyro.sample("p", dist.Beta(1.0, 1.0))
        slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
        with pyro.plate("row", len(y)):
            pyro.sample("x", dist.Bernoulli(p), obs=y)
            pyro.sample("y", dist.Bernoulli(logits=slope * torch.arange(len(y))), obs=y)

    with pytest.raises(ModelError, match=r"site 'slope' is not conditionally conjugate.*Normal.*NaturalGradient"):
        coordinate_ascent(vl.Problem(model, torch.tensor([0.0, 1.0, 1.0])), Conjugate(model))


def test_gamma_likelihood_with_unknown_shape_is_not_conjugate() -> None:
    def model(y: Tensor) -> None:
        shape = pyro.sample("shape", dist.Gamma(1.0, 1.0))
        with pyro.plate("row", len(y)):
            pyro.sample("y", dist.Gamma(shape, 1.0), obs=y)

    with pytest.raises(ModelError, match="'shape'"):
        coordinate_ascent(vl.Problem(model, torch.tensor([0.5, 1.0, 1.0])), Conjugate(model))


def test_an_improper_distribution_is_named() -> None:
    def model() -> None:
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        pyro.factor("push", x**2)

    with pytest.raises(FitError, match="site 'x' given the others is improper"):
        coordinate_ascent(vl.Problem(model), Conjugate(model))


def test_a_row_outside_of_the_plate_of_a_choice_is_named() -> None:
    def model(y: Tensor) -> None:
        pyro.sample("p", dist.Normal(0.0, 1.0))
        with pyro.plate("row", len(y)):
            kind = pyro.sample("kind", dist.Bernoulli(0.5))
        pyro.sample("y", dist.Normal(kind.sum(-1, keepdim=True), 1.0), obs=y.sum().reshape(1))

    with pytest.raises(ModelError, match=r"'y' depends on the discrete site 'kind'"):
        coordinate_ascent(vl.Problem(model, torch.zeros(3)), Conjugate(model))


def test_arguments() -> None:
    exact = tosses()
    problem = vl.Problem(exact.model, *exact.data)
    for wrong in ({"lr": 0.0}, {"lr": 1.5}, {"max_sweeps": 0}):
        with pytest.raises(ArgumentError, match=next(iter(wrong))):
            coordinate_ascent(problem, Conjugate(exact.model), **wrong)
    with pytest.raises(ArgumentError, match="lr"):
        natural_sweep(Conjugate(exact.model), *exact.data, lr=2.0)


def test_a_problem_that_sees_some_rows_is_refused() -> None:
    exact = tosses()
    problem = vl.Problem(exact.model, *exact.data, minibatch=2)
    with pytest.raises(ModelError, match="natural_sweep"):
        coordinate_ascent(problem, Conjugate(exact.model))


def test_nothing_else_is_changed() -> None:
    exact = unknown_mean_and_precision()
    problem, state = vl.Problem(exact.model, *exact.data), torch.get_rng_state()
    coordinate_ascent(problem, Conjugate(exact.model))
    assert torch.equal(torch.get_rng_state(), state)
    assert not dict(pyro.get_param_store())


def test_concentrations_that_are_too_small_are_named() -> None:
    def model(y: Tensor) -> None:
        weights = pyro.sample("weights", dist.Dirichlet(torch.full((3,), 1e-4)))
        with pyro.plate("row", len(y)):
            pyro.sample("y", dist.Categorical(weights), obs=y)

    with pytest.raises(FitError, match="logarithm of site 'weights'"):
        coordinate_ascent(vl.Problem(model, torch.tensor([0, 1])), Conjugate(model))


def test_documents_with_topics_and_rows_in_two_plates() -> None:
    """Latent Dirichlet allocation: Blei, Ng & Jordan 2003, eq. 6-7 and 9, with a Dirichlet prior of the topics."""
    generator = torch.Generator().manual_seed(0)
    words = torch.randint(6, (7, 4), generator=generator)
    start = torch.rand(3, 6, generator=generator) + 0.1

    def model(words: Tensor) -> None:
        with pyro.plate("topic", 3):
            phi = pyro.sample("phi", dist.Dirichlet(0.5 * torch.ones(6)))
        with pyro.plate("document", 4, dim=-1):
            theta = pyro.sample("theta", dist.Dirichlet(0.3 * torch.ones(3)))
            with pyro.plate("word", 7, dim=-2):
                z = pyro.sample("z", dist.Categorical(theta))
                pyro.sample("w", dist.Categorical(phi[z]), obs=words)

    guide = Conjugate(model, init_to_value(values={"phi": start / start.sum(1, keepdim=True)}, fallback=init_to_prior))
    problem = vl.Problem(model, words)
    guide(words)
    phi, theta = guide.standard("phi")["concentration"], guide.standard("theta")["concentration"]
    ascent = coordinate_ascent(problem, guide, max_sweeps=1)
    log_phi = torch.digamma(phi) - torch.digamma(phi.sum(1, keepdim=True))
    log_theta = torch.digamma(theta) - torch.digamma(theta.sum(1, keepdim=True))
    chosen = (log_phi.T[words] + log_theta).softmax(-1)  # word, document, topic
    torch.testing.assert_close(guide.standard("z")["logits"].exp(), chosen, **EXACT)
    torch.testing.assert_close(guide.standard("theta")["concentration"], 0.3 + chosen.sum(0), **EXACT)
    counts = torch.zeros(3, 6).index_add(1, words.flatten(), chosen.reshape(-1, 3).T)
    torch.testing.assert_close(guide.standard("phi")["concentration"], 0.5 + counts, **EXACT)
    more = coordinate_ascent(problem, guide, max_sweeps=5)
    assert (torch.cat([ascent.elbo, more.elbo[1:]]).diff() > -1e-9).all()


def test_a_chain_of_choices() -> None:
    """A hidden Markov model with independent states: the ELBO rises to below the evidence, and states are found."""
    y = torch.cat([numbers(3), numbers(3, seed=2) + 6])

    def model(y: Tensor) -> None:
        with pyro.plate("state", 2):
            stay = pyro.sample("stay", dist.Dirichlet(torch.ones(2)))
            loc = pyro.sample("loc", dist.Normal(0.0, 3.0))
        z: Any = 0
        for t in range(len(y)):
            z = pyro.sample(f"z{t}", dist.Categorical(stay[z]))
            pyro.sample(f"y{t}", dist.Normal(loc[z], 1.0), obs=y[t])

    guide = Conjugate(model, init_to_value(values={"loc": torch.tensor([0.0, 5.0])}, fallback=init_to_prior))
    ascent = coordinate_ascent(vl.Problem(model, y), guide, max_sweeps=4)
    assert (ascent.elbo.diff() > -1e-9).all()
    assert [int(guide.median()[f"z{t}"]) for t in range(6)] == [0] * 3 + [1] * 3
