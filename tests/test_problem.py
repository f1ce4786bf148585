from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pyro import poutine
from pyro.nn import PyroModule, PyroSample
from scipy import stats
from torch import Tensor

from pyro_vi_lab.errors import ArgumentError, DataError, LabError, LabWarning, ModelError
from pyro_vi_lab.posterior import Posterior
from pyro_vi_lab.problem import Problem

SIGMA = torch.tensor([15.0, 10.0, 16.0])
EFFECT = torch.tensor([28.0, 8.0, -3.0])
LEVEL = 5e-7
"""A right answer has a smaller p-value once in two million tests, as it has an error of five standard errors."""


def schools(sigma: Tensor, y: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("school", len(y)):
        eta = pyro.sample("eta", dist.Normal(0.0, 1.0))
        theta = pyro.deterministic("theta", mu + tau * eta)
        pyro.sample("y", dist.Normal(theta, sigma), obs=y)


def regression(X: Tensor, y: Tensor, *, scale: float = 1.0) -> None:
    beta = pyro.sample("beta", dist.Normal(torch.zeros(X.shape[1]), 1.0).to_event(1))
    with pyro.plate("row", len(y)):
        pyro.sample("y", dist.Normal(X @ beta, scale), obs=y)


def mean_of(y: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("row", len(y)):
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y)


def grid(y: Tensor) -> None:
    rows, columns = pyro.plate("row", 2, dim=-2), pyro.plate("column", 3, dim=-1)
    with rows:
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
    with columns:
        k = pyro.sample("k", dist.Bernoulli(0.5))
    with rows, columns:
        pyro.sample("y", dist.Normal(a + k, 1.0), obs=y)


def posterior_of(num_chains: int = 2, num_draws: int = 500, **values: Any) -> Posterior:
    """Draws that are all at the given values."""
    return Posterior(
        {
            name: torch.as_tensor(value, dtype=torch.float64).expand(num_chains, num_draws, *np.shape(value))
            for name, value in values.items()
        }
    )


runs: list[None] = []
"""One entry for every run of the models that count theirs."""


# --- what it says of itself ----------------------------------------------------------------------------


def test_repr_lists_the_sites_with_their_dimensions() -> None:
    assert repr(Problem(schools, SIGMA, EFFECT)) == (
        "Problem(schools: latent mu, tau, eta (school); deterministic theta (school); observed y (school))"
    )
    assert repr(Problem(grid, torch.zeros(2, 3), name="two ways")) == (
        "Problem(two ways: latent a (row, a_dim_1); discrete k (column); observed y (row, column))"
    )


def test_names_come_from_the_model() -> None:
    class Module(PyroModule):
        def __init__(self) -> None:
            super().__init__()
            self.mu = PyroSample(dist.Normal(0.0, 1.0))

        def forward(self, y: Tensor) -> None:
            pyro.sample("y", dist.Normal(self.mu, 1.0), obs=y)

    assert Problem(mean_of, EFFECT).name == "mean_of"
    assert Problem(Module(), torch.tensor(1.0)).name == "Module"
    assert list(Problem(Module(), torch.tensor(1.0)).sites) == ["mu", "y"]


def test_inputs_and_observed_data() -> None:
    problem = Problem(regression, torch.ones(3, 2), y=EFFECT, scale=2.0)
    assert set(problem.inputs) == {"X", "y"}
    assert problem.inputs["X"].shape == (3, 2)
    assert problem.observed["y"].tolist() == EFFECT.tolist()

    def many(*arrays: Tensor, **named: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(mu, 1.0).expand(arrays[0].shape).to_event(1), obs=arrays[0] + named["other"])

    assert set(Problem(many, EFFECT, EFFECT, other=EFFECT).inputs) == {"arrays[0]", "arrays[1]", "other"}


def test_the_density_is_made_once() -> None:
    problem = Problem(mean_of, EFFECT)
    assert problem.density() is problem.density()


# --- dimensions and labels -----------------------------------------------------------------------------


def test_plates_name_dimensions_and_users_rename_them() -> None:
    problem = Problem(regression, torch.ones(3, 2), EFFECT, dims={"beta": ["feature"], "y": ("patient",)})
    assert (problem.dims("beta"), problem.dims("y")) == (("feature",), ("patient",))
    assert Problem(regression, torch.ones(3, 2), EFFECT).dims("beta") == ("beta_dim_0",)
    assert problem.sizes(problem.sites["beta"]) == {"feature": 2}


def test_labels_come_from_a_pandas_index_or_from_the_user() -> None:
    frame = pd.DataFrame({"a": [1.0, 2.0, 3.0], "b": [0.5, 0.1, 0.2]}, index=["x", "y", "z"])
    target = pd.Series([1, 2, 3], index=["x", "y", "z"])
    assert Problem(regression, frame, target).coords == {"row": ["x", "y", "z"]}
    given = Problem(regression, frame, target, coords={"row": [7, 8, 9], "feature": ["a", "b"]})
    assert given.coords == {"row": [7, 8, 9], "feature": ["a", "b"]}
    assert Problem(regression, frame.reset_index(drop=True), target.reset_index(drop=True)).coords == {}


def test_an_index_that_could_be_of_two_plates_labels_neither() -> None:
    def model(y: Tensor) -> None:
        with pyro.plate("school", 3):
            pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("row", 3):
            pyro.sample("y", dist.Normal(0.0, 1.0), obs=y)

    assert Problem(model, pd.Series([1.0, 2.0, 3.0], index=["x", "y", "z"])).coords == {}


# --- arguments -----------------------------------------------------------------------------------------

X = np.array([[1.0, 2.0], [0.5, -1.0], [3.0, 0.0]])
Y = np.array([1.0, -2.0, 0.5])

SAME_DATA: dict[str, tuple[Any, Any]] = {
    "float64 tensors": (torch.tensor(X), torch.tensor(Y)),
    "float32 tensors": (torch.tensor(X, dtype=torch.float32), torch.tensor(Y, dtype=torch.float32)),
    "arrays": (X, Y),
    "float32 arrays": (X.astype(np.float32), Y.astype(np.float32)),
    "transposed array": (np.asfortranarray(X), Y[::-1][::-1]),
    "pandas": (pd.DataFrame(X), pd.Series(Y)),
    "named pandas": (pd.DataFrame(X, columns=["a", "b"], index=list("pqr")), pd.Series(Y, name="y")),
}


@pytest.mark.parametrize("name", SAME_DATA)
def test_the_same_data_in_any_form_are_the_same_problem(name: str) -> None:
    problem = Problem(regression, *SAME_DATA[name])
    assert {value.dtype for value in problem.inputs.values()} == {torch.float64}
    beta = torch.tensor([0.3, -0.2], dtype=torch.float64)
    expected = stats.norm.logpdf(beta).sum() + stats.norm(X @ beta.numpy(), 1).logpdf(Y).sum()
    assert float(problem.density().log_prob(beta)) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("kind", [np.int8, np.int64, np.uint8, np.bool_, "category codes"])
def test_whole_numbers_stay_whole_numbers(kind: Any) -> None:
    def by_group(group: Tensor, y: Tensor) -> None:
        with pyro.plate("group", 2):
            mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("row", len(y)):
            pyro.sample("y", dist.Normal(mu[group.long()], 1.0), obs=y)

    values = [0, 1, 1]
    group = pd.Series(list("abb"), dtype="category").cat.codes if kind == "category codes" else np.array(values, kind)
    problem = Problem(by_group, group, Y)
    assert not problem.inputs["group"].is_floating_point()
    assert problem.inputs["group"].long().tolist() == values


def test_nested_arguments_are_converted_too() -> None:
    def nested(data: dict[str, Any], rest: list[Any]) -> None:
        beta = pyro.sample("beta", dist.Normal(torch.zeros(2), rest[1]).to_event(1))
        with pyro.plate("row", len(data["y"])):
            pyro.sample("y", dist.Normal(data["X"] @ beta, rest[0]), obs=data["y"])

    problem = Problem(nested, {"X": X, "y": pd.Series(Y)}, [torch.tensor(1.0), 1.0])
    beta = torch.zeros(2, dtype=torch.float64)
    expected = 2 * stats.norm.logpdf(0) + stats.norm.logpdf(Y).sum()
    assert float(problem.density().log_prob(beta)) == pytest.approx(expected, rel=1e-12)
    with pytest.raises(DataError, match=r"argument \"data\['y'\]\" is not numeric"):
        Problem(nested, {"X": X, "y": np.array(list("abc"))}, [1.0, 1.0])


def test_arrays_are_copied() -> None:
    y = Y.copy()
    problem = Problem(mean_of, y)
    y[:] = 100
    assert problem.observed["y"].tolist() == Y.tolist()


def test_a_model_with_float32_tensors_of_its_own_runs_in_float32_and_says_so() -> None:
    weight = torch.tensor(X, dtype=torch.float32)

    def model(y: Tensor) -> None:
        beta = pyro.sample("beta", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        with pyro.plate("row", len(y)):
            pyro.sample("y", dist.Normal(weight @ beta, 1.0), obs=y)

    with pytest.warns(LabWarning, match="model model holds torch.float32 tensors of its own"):
        problem = Problem(model, Y)
    assert problem.dtype == problem.density().dtype == problem.inputs["y"].dtype == torch.float32
    # who asks for it need not be told
    for asked in (Problem(model, Y, dtype=torch.float32), Problem(model, Y, dtype=torch.float32).with_data(2 * Y)):
        assert asked.dtype == asked.density().dtype == asked.inputs["y"].dtype == torch.float32
    with pytest.raises(ArgumentError, match=r"dtype must be a floating-point type .* got torch\.int64"):
        Problem(model, Y, dtype=torch.int64)


# --- the prior -----------------------------------------------------------------------------------------


def test_prior_draws_have_the_distribution_of_the_model() -> None:
    prior = Problem(schools, SIGMA, EFFECT).prior(num_draws=4000, seed=1)
    assert (prior.method, prior.num_chains, prior.num_draws) == ("prior", 1, 4000)
    assert {key: tuple(value.shape) for key, value in prior.draws.items()} == {
        "mu": (1, 4000),
        "tau": (1, 4000),
        "eta": (1, 4000, 3),
        "theta": (1, 4000, 3),
    }
    flat = {key: value.numpy() for key, value in prior.flat().items()}
    assert stats.kstest(flat["mu"], stats.norm(0, 5).cdf).pvalue > LEVEL
    assert stats.kstest(flat["tau"], stats.halfcauchy(0, 5).cdf).pvalue > LEVEL
    assert stats.kstest(flat["eta"].reshape(-1), stats.norm.cdf).pvalue > LEVEL
    correlation = np.corrcoef(np.column_stack([flat["mu"], flat["eta"]]).T) - np.eye(4)
    assert np.abs(correlation).max() < 5 / math.sqrt(4000)
    np.testing.assert_allclose(flat["theta"], flat["mu"][:, None] + flat["tau"][:, None] * flat["eta"], rtol=1e-12)


def test_prior_draws_depend_on_the_seed_and_on_nothing_else() -> None:
    problem = Problem(schools, SIGMA, EFFECT)
    before = torch.get_rng_state()
    one, two, other = (problem.prior(5, seed=seed).draws["eta"].tolist() for seed in (3, 3, 4))
    assert one == two != other
    assert torch.equal(torch.get_rng_state(), before)


def test_an_improper_prior_cannot_be_drawn_from() -> None:
    def model() -> None:
        pyro.sample("x", dist.Normal(0.0, 1.0))
        pyro.sample("flat", dist.ImproperUniform(dist.constraints.positive, (), ()))

    with pytest.raises(ModelError, match="site 'flat' has an improper prior"):
        Problem(model).prior()


# --- predictions ---------------------------------------------------------------------------------------

vector = torch.tensor([0.2, 0.5, 0.3])
CONTINUOUS: dict[str, tuple[Callable[[Tensor], Any], Any]] = {
    "normal": (lambda x: dist.Normal(x, 2.0), stats.norm(0.7, 2)),
    "gamma": (lambda x: dist.Gamma(x, 2.0), stats.gamma(0.7, scale=0.5)),
    "beta": (lambda x: dist.Beta(x, 2.0), stats.beta(0.7, 2)),
    "Student t": (lambda x: dist.StudentT(3.0, x, 2.0), stats.t(3, 0.7, 2)),
    "exponential": (lambda x: dist.Exponential(x), stats.expon(scale=1 / 0.7)),
    "log normal": (lambda x: dist.LogNormal(x, 0.5), stats.lognorm(0.5, scale=math.exp(0.7))),
    "uniform": (lambda x: dist.Uniform(0.0, x), stats.uniform(0, 0.7)),
    "Cauchy": (lambda x: dist.Cauchy(x, 1.0), stats.cauchy(0.7)),
    "Weibull": (lambda x: dist.Weibull(x, 2.0), stats.weibull_min(2, scale=0.7)),
}
DISCRETE: dict[str, tuple[Callable[[Tensor], Any], np.ndarray]] = {
    "Bernoulli": (lambda x: dist.Bernoulli(x), stats.bernoulli(0.7).pmf([0, 1])),
    "Poisson": (lambda x: dist.Poisson(x), stats.poisson(0.7).pmf(range(12))),
    "binomial": (lambda x: dist.Binomial(4, x), stats.binom(4, 0.7).pmf(range(5))),
    "categorical": (lambda x: dist.Categorical(vector.to(x) * x), vector.double().numpy()),
    "geometric": (lambda x: dist.Geometric(x), stats.geom(0.7, -1).pmf(range(15))),
    "negative binomial": (lambda x: dist.NegativeBinomial(3, x), stats.nbinom(3, 0.3).pmf(range(60))),
}


def predictions(make: Callable[[Tensor], Any], example: float) -> np.ndarray:
    def model(y: Tensor) -> None:
        runs.append(None)
        x = pyro.sample("x", dist.Beta(1.0, 1.0))
        with pyro.plate("row", 3):
            pyro.sample("y", make(x), obs=y)

    problem = Problem(model, torch.full((3,), example))
    runs.clear()
    draws = problem.predictive(posterior_of(x=0.7, num_draws=1000), seed=2)["y"]
    # vectorized, unless torch's own gradients of the distribution cannot be
    assert len(runs) == 1 or isinstance(make(torch.tensor(0.5)), dist.Beta)
    assert draws.shape == (2, 1000, 3)
    flat = draws.double().reshape(2000, 3).numpy()
    ranks = stats.rankdata(flat, axis=0)
    assert np.abs(np.corrcoef(ranks.T) - np.eye(3)).max() < 5 / math.sqrt(2000)
    return flat.reshape(-1)


@pytest.mark.parametrize("name", CONTINUOUS)
def test_continuous_predictions_have_the_distribution_of_the_model(name: str) -> None:
    make, expected = CONTINUOUS[name]
    assert stats.kstest(predictions(make, 0.1), expected.cdf).pvalue > LEVEL


@pytest.mark.parametrize("name", DISCRETE)
def test_discrete_predictions_have_the_distribution_of_the_model(name: str) -> None:
    make, mass = DISCRETE[name]
    counts = np.bincount(predictions(make, 1.0).astype(int), minlength=len(mass)).astype(float)
    assert len(counts) == len(mass)
    often = 6000 * mass >= 5  # where a chi-square is one
    observed, wanted = counts[often].tolist(), (6000 * mass[often]).tolist()
    if not often.all():
        observed, wanted = [*observed, 6000 - sum(observed)], [*wanted, 6000 - sum(wanted)]
    assert stats.chisquare(observed, wanted).pvalue > LEVEL


def test_predictions_follow_their_draws_in_order() -> None:
    posterior = Posterior({"mu": torch.arange(6.0, dtype=torch.float64).reshape(2, 3) * 1000})
    y = Problem(mean_of, EFFECT).predictive(posterior)["y"]
    assert ((y / 1000).round() == torch.arange(6.0).reshape(2, 3, 1)).all()


def test_predictions_of_events_and_of_several_sites() -> None:
    def model(y: Tensor, w: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        covariance = torch.tensor([[2.0, 1.0], [1.0, 1.0]]).to(y)
        with pyro.plate("row", len(y)):
            pyro.sample("y", dist.MultivariateNormal(mu, covariance), obs=y)
        pyro.sample("w", dist.Dirichlet(torch.tensor([2.0, 3.0, 5.0]).to(y)), obs=w)

    problem = Problem(model, torch.zeros(4, 2), torch.tensor([0.2, 0.3, 0.5]))
    found = problem.predictive(posterior_of(mu=[1.0, -1.0]))
    assert {key: tuple(value.shape) for key, value in found.items()} == {
        "y": (2, 500, 4, 2),
        "w": (2, 500, 3),
    }
    y = found["y"].reshape(-1, 2).numpy()
    error = np.array([math.sqrt(2 / len(y)), math.sqrt(1 / len(y))])
    assert (np.abs(y.mean(0) - [1, -1]) < 5 * error).all()
    assert abs(np.cov(y.T)[0, 1] - 1) < 5 * math.sqrt((2 * 1 + 1) / len(y))
    w = found["w"].reshape(-1, 3).numpy()
    np.testing.assert_allclose(w.sum(1), 1, rtol=1e-12)
    assert stats.kstest(w[:, 0], stats.beta(2, 8).cdf).pvalue > LEVEL


def test_data_without_a_plate_are_drawn_one_by_one() -> None:
    def model(y: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y)

    y = Problem(model, EFFECT).predictive(posterior_of(mu=0.0))["y"].reshape(-1, 3).numpy()
    assert np.abs(np.corrcoef(y.T) - np.eye(3)).max() < 5 / math.sqrt(len(y))
    assert stats.kstest(y.reshape(-1), stats.norm.cdf).pvalue > LEVEL


def test_predictions_of_a_model_with_discrete_sites_draw_these_too() -> None:
    def model(y: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("row", len(y)):
            k = pyro.sample("k", dist.Bernoulli(0.25))
            pyro.sample("y", dist.Normal(mu + 100 * k, 1.0), obs=y)

    y = Problem(model, EFFECT).predictive(posterior_of(mu=0.0))["y"]
    share = float((y > 50).double().mean())
    assert abs(share - 0.25) < 5 * math.sqrt(0.25 * 0.75 / y.numel())


def test_predictions_depend_on_the_seed_and_on_nothing_else() -> None:
    problem, posterior = Problem(mean_of, EFFECT), posterior_of(mu=0.0, num_draws=4)
    before = torch.get_rng_state()
    one, two, other = (problem.predictive(posterior, seed=seed)["y"].tolist() for seed in (3, 3, 4))
    assert one == two != other
    assert torch.equal(torch.get_rng_state(), before)


# --- log likelihoods -----------------------------------------------------------------------------------


def test_log_likelihood_of_every_row_is_that_of_scipy() -> None:
    def model(y: Tensor, counts: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        with pyro.plate("row", len(y)):
            pyro.sample("y", dist.Normal(mu, 2.0).to_event(1), obs=y)
            pyro.sample("counts", dist.Poisson(mu[0].exp()), obs=counts)

    y, counts = torch.randn(3, 2, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 2, 5])
    mu = torch.randn(2, 4, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = Problem(model, y, counts).log_likelihood(Posterior({"mu": mu, "unused": mu}))
    assert {key: tuple(value.shape) for key, value in found.items()} == {"y": (2, 4, 3), "counts": (2, 4, 3)}
    expected = stats.norm(mu.numpy()[:, :, None], 2).logpdf(y.double().numpy()).sum(-1)
    np.testing.assert_allclose(found["y"], expected, rtol=1e-12)
    rate = np.exp(mu[..., 0].numpy())[:, :, None]
    np.testing.assert_allclose(found["counts"], stats.poisson(rate).logpmf(counts.numpy()), rtol=1e-12)


def test_masked_rows_say_nothing() -> None:
    def model(y: Tensor, kept: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("row", len(y)), poutine.mask(mask=kept):
            pyro.sample("y", dist.Normal(mu, 1.0), obs=y)

    problem = Problem(model, EFFECT, torch.tensor([True, False, True]))
    (row,) = problem.log_likelihood(posterior_of(mu=0.5, num_chains=1, num_draws=1))["y"][0].tolist()
    assert row == pytest.approx([stats.norm(0.5).logpdf(28), 0, stats.norm(0.5).logpdf(-3)], rel=1e-12)


# --- models that vmap refuses --------------------------------------------------------------------------


def looking(y: Tensor) -> None:
    """The same model as ``mean_of``, with a look at the value."""
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    runs.append(None)
    loc = mu if mu > 0 else 1.0 * mu
    with pyro.plate("row", len(y)):
        pyro.deterministic("double", torch.full((len(y),), 2 * float(loc)))
        pyro.sample("y", dist.Normal(loc, 1.0), obs=y)


def test_one_by_one_gives_what_vectorized_gives() -> None:
    posterior = Posterior({"mu": torch.randn(2, 300, generator=torch.Generator().manual_seed(0), dtype=torch.float64)})
    one, all_at_once = Problem(looking, EFFECT), Problem(mean_of, EFFECT)
    with pytest.warns(LabWarning, match=r"model looking cannot be run for many draws at once .*it is run 600 times"):
        values = one.log_likelihood(posterior)["y"]
    torch.testing.assert_close(values, all_at_once.log_likelihood(posterior)["y"], rtol=1e-12, atol=0)
    runs.clear()
    with pytest.warns(LabWarning, match="which takes about"):
        y = one.predictive(posterior)["y"]
    assert len(runs) >= 600
    assert y.shape == (2, 300, 3)
    residuals = (y - posterior.draws["mu"][..., None]).reshape(-1, 3).numpy()
    assert stats.kstest(residuals.reshape(-1), stats.norm.cdf).pvalue > LEVEL
    assert np.abs(np.corrcoef(residuals.T) - np.eye(3)).max() < 5 / math.sqrt(600)
    with pytest.warns(LabWarning, match=f"{__file__}:"):  # the line that looks into its values
        prior = one.prior(500).flat()
    assert stats.kstest(prior["mu"].numpy(), stats.norm.cdf).pvalue > LEVEL
    torch.testing.assert_close(prior["double"], 2 * prior["mu"][:, None].expand(500, 3))


def test_vectorized_is_one_run_of_the_model() -> None:
    def counted(y: Tensor) -> None:
        runs.append(None)
        mean_of(y)

    problem = Problem(counted, EFFECT)
    runs.clear()
    problem.predictive(posterior_of(mu=0.0))
    problem.log_likelihood(posterior_of(mu=0.0))
    problem.prior(100)
    assert len(runs) == 3


@pytest.mark.parametrize("what", ["predictive", "log_likelihood"])
def test_a_posterior_of_other_sites_or_shapes_is_refused(what: str) -> None:
    problem = Problem(schools, SIGMA, EFFECT)
    with pytest.raises(ArgumentError, match="no draws of the latent site 'eta'; it has mu, tau"):
        getattr(problem, what)(posterior_of(mu=0.0, tau=1.0))
    with pytest.raises(ArgumentError, match=r"draws of site 'eta' have shape \(2,\); this problem's site has \(3,\)"):
        getattr(problem, what)(posterior_of(mu=0.0, tau=1.0, eta=[0.0, 0.0]))


# --- other data ----------------------------------------------------------------------------------------


def test_other_data_keep_the_names_and_the_model() -> None:
    problem = Problem(
        regression,
        X,
        pd.Series(Y, index=["p", "q", "r"]),
        dims={"beta": ["feature"]},
        coords={"feature": ["a", "b"]},
        name="patients",
    )
    other = problem.with_data(2 * X, 3 * Y)
    assert (other.name, other.dims("beta")) == ("patients", ("feature",))
    assert other.coords == {"feature": ["a", "b"], "row": ["p", "q", "r"]}
    assert other.observed["y"].tolist() == (3 * Y).tolist()
    assert problem.observed["y"].tolist() == Y.tolist()
    beta = torch.tensor([0.3, -0.2], dtype=torch.float64)
    expected = stats.norm.logpdf(beta).sum() + stats.norm(2 * X @ beta.numpy(), 1).logpdf(3 * Y).sum()
    assert float(other.density().log_prob(beta)) == pytest.approx(expected, rel=1e-12)


def test_labels_of_other_data_are_their_own() -> None:
    problem = Problem(mean_of, pd.Series(Y, index=["p", "q", "r"]))
    assert problem.with_data(pd.Series(Y, index=["s", "t", "u"])).coords == {"row": ["s", "t", "u"]}
    assert problem.with_data(pd.Series(Y[:2], index=["s", "t"])).coords == {"row": ["s", "t"]}
    assert problem.with_data(Y[:2]).coords == {}
    given = Problem(mean_of, Y, coords={"row": [1, 2, 3]})
    assert given.with_data(pd.Series(Y, index=["s", "t", "u"])).coords == {"row": [1, 2, 3]}


def test_other_data_are_checked_as_well() -> None:
    problem = Problem(mean_of, Y)
    with pytest.raises(DataError, match="observed site 'y'"):
        problem.with_data(np.array([1.0, np.nan, 2.0]))
    with pytest.raises(ModelError, match="cannot take these arguments"):
        problem.with_data(Y, Y)


# --- bad input -----------------------------------------------------------------------------------------


def nothing(y: Tensor) -> None:
    pyro.sample("y", dist.Normal(0.0, 1.0).expand([3]).to_event(1), obs=y)


def only_discrete(y: Tensor) -> None:
    k = pyro.sample("k", dist.Bernoulli(0.5))
    pyro.sample("y", dist.Normal(k, 1.0).expand([3]).to_event(1), obs=y)


def without_bijection(y: Tensor) -> None:
    pyro.sample("direction", dist.ProjectedNormal(torch.ones(3)))


def sequential(y: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    for i in pyro.plate("row", len(y)):
        pyro.sample(f"y_{i}", dist.Normal(mu, 1.0), obs=y[i])


def comes_and_goes(y: Tensor) -> None:
    if pyro.sample("mu", dist.Normal(0.0, 1.0)) > 0:
        pyro.sample("extra", dist.Normal(0.0, 1.0))


def grows(y: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    pyro.sample("other", dist.Normal(torch.zeros(2 if mu > 0 else 3), 1.0).to_event(1))


def unbounded(y: Tensor) -> None:
    pyro.sample("rate", dist.Gamma(1.0, 1.0))
    pyro.sample("hidden", dist.Poisson(2.0))


def coin(y: Tensor) -> None:
    p = pyro.sample("p", dist.Beta(1.0, 1.0))
    with pyro.plate("toss", len(y)):
        pyro.sample("y", dist.Bernoulli(p), obs=y)


def vectors(y: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    with pyro.plate("row", len(y)):
        pyro.sample("y", dist.Normal(mu, 1.0).to_event(1), obs=y)


def twice(y: Tensor) -> None:
    pyro.sample("x", dist.Normal(0.0, 1.0))
    pyro.sample("x", dist.Normal(0.0, 1.0))


def outdated(y: Tensor) -> None:
    pyro.sample("x", torch.distributions.Normal(0.0, 1.0))


NAN, INF = float("nan"), float("inf")
BAD: dict[str, tuple[Callable[[], Any], type[LabError], list[str]]] = {
    "NaN": (
        lambda: Problem(mean_of, torch.tensor([1.0, 2.0, NAN, NAN])),
        DataError,
        ["observed site 'y'", "2 missing or infinite value(s) of 4", "(nan) at index (2,)"],
    ),
    "infinity": (
        lambda: Problem(mean_of, torch.tensor([-INF, 2.0])),
        DataError,
        ["site 'y'", "(-inf) at index (0,)"],
    ),
    "NaN in a matrix": (
        lambda: Problem(vectors, np.array([[1.0, 2.0], [3.0, NAN]])),
        DataError,
        ["site 'y'", "1 missing", "at index (1, 1)"],
    ),
    "pandas' missing value": (
        lambda: Problem(mean_of, pd.Series([1.0, None])),
        DataError,
        ["'y'", "index (1,)"],
    ),
    "NaN in a masked row": (
        lambda: Problem(poutine.mask(mean_of, mask=torch.tensor([True, False])), torch.tensor([1.0, NAN])),
        DataError,
        ["site 'y'", "index (1,)", "put any value of the support there"],
    ),
    "NaN in a covariate": (
        lambda: Problem(regression, torch.tensor([[1.0], [NAN]]), torch.zeros(2)),
        ModelError,
        ["model regression", "argument 0 (2, 1) with NaN, argument 1 (2,)"],
    ),
    "outside the support": (
        lambda: Problem(coin, torch.tensor([0.0, 1.0, 2.0])),
        DataError,
        ["observed site 'y' (Bernoulli)", "1 value(s) outside its support Boolean()", "(2.0) at index (2,)"],
    ),
    "no latent sites": (
        lambda: Problem(nothing, EFFECT),
        ModelError,
        ["model nothing", "no continuous latent sites"],
    ),
    "only discrete sites": (lambda: Problem(only_discrete, EFFECT), ModelError, ["only discrete ones (k)"]),
    "no bijection": (
        lambda: Problem(without_bijection, EFFECT),
        ModelError,
        ["site 'direction' (ProjectedNormal)", "Sphere", "biject_to"],
    ),
    "sequential plate": (
        lambda: Problem(sequential, EFFECT),
        ModelError,
        ["site 'y_0'", "sequential plate 'row'", "with pyro.plate('row', 3)"],
    ),
    "sites that come and go": (
        lambda: Problem(comes_and_goes, EFFECT),
        ModelError,
        ["structure of model comes_and_goes changes", "site 'extra'"],
    ),
    "shapes that change": (
        lambda: Problem(grows, EFFECT),
        ModelError,
        ["structure of model grows changes", "site 'other'", "(3,)", "(2,)"],
    ),
    "a discrete site without an end": (
        lambda: Problem(unbounded, EFFECT),
        ModelError,
        ["site 'hidden' (Poisson)", "cannot be summed over"],
    ),
    "subsampled plate": (
        lambda: Problem(lambda y: subsampled(y), EFFECT).density(),
        ModelError,
        ["plate 'row'", "subsample_size"],
    ),
    "lengths that disagree": (
        lambda: Problem(regression, torch.ones(4, 2), torch.zeros(3)),
        LabError,
        ["regression", "(4, 2)", "(3,)"],
    ),
    "a column of text": (
        lambda: Problem(regression, pd.DataFrame({"age": [1.0, 2.0], "sex": ["f", "m"]}), torch.zeros(2)),
        DataError,
        ["column 'sex' of argument 'X' is not numeric"],
    ),
    "an array of text": (
        lambda: Problem(mean_of, np.array(["a", "b"])),
        DataError,
        ["argument 'y' is not numeric"],
    ),
    "an array of objects": (
        lambda: Problem(mean_of, np.array([1.0, None], dtype=object)),
        DataError,
        ["argument 'y' is not numeric (dtype object)"],
    ),
    "a series of dates": (
        lambda: Problem(mean_of, pd.Series(pd.to_datetime(["2020-01-01"]))),
        DataError,
        ["argument 'y' is not numeric"],
    ),
    "no model": (lambda: Problem(torch.zeros(3)), ArgumentError, ["must be a Pyro model", "Tensor"]),
    "too many arguments": (
        lambda: Problem(mean_of, EFFECT, EFFECT),
        ModelError,
        ["model mean_of cannot take these arguments", "too many"],
    ),
    "an unknown argument": (
        lambda: Problem(mean_of, EFFECT, z=EFFECT),
        ModelError,
        ["unexpected keyword", "'z'"],
    ),
    "dims of an unknown site": (
        lambda: Problem(mean_of, EFFECT, dims={"nu": ["row"]}),
        ArgumentError,
        ["site 'nu'", "its sites: mu, y"],
    ),
    "too many dims": (
        lambda: Problem(mean_of, EFFECT, dims={"y": ["row", "column"]}),
        ArgumentError,
        ["dims of site 'y' are ['row', 'column']", "1 axes of sizes (3,)"],
    ),
    "too few coords": (
        lambda: Problem(mean_of, EFFECT, coords={"row": ["a", "b"]}),
        ArgumentError,
        ["coords of 'row' have 2 labels; that dimension has size 3"],
    ),
    "the same name twice": (lambda: Problem(twice, EFFECT), ModelError, ["model twice", "'x'"]),
    "torch's own distribution": (lambda: Problem(outdated, EFFECT), LabError, ["outdated"]),
}


def subsampled(y: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("row", len(y), subsample_size=2) as index:
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y[index])


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named(name: str) -> None:
    make, kind, parts = BAD[name]
    with pytest.raises(kind) as caught:
        make()
    for part in parts:
        assert part in str(caught.value)


def test_an_error_of_the_model_has_its_line() -> None:
    def model(y: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(mu, -1.0), obs=y)

    line = inspect.getsourcelines(model)[1] + 2
    with pytest.raises(ModelError) as caught:
        Problem(model, EFFECT)
    assert str(caught.value).startswith(f"model model cannot be run at {__file__}:{line}: ValueError: ")


@given(
    values=st.lists(st.floats(-100, 100), min_size=1, max_size=6),
    bad=st.sampled_from([NAN, INF, -INF]),
    place=st.integers(0, 5),
)
def test_the_first_bad_value_is_found_wherever_it_is(values: list[float], bad: float, place: int) -> None:
    values.insert(place % (len(values) + 1), bad)
    with pytest.raises(DataError) as caught:
        Problem(mean_of, np.array(values))
    assert f"1 missing or infinite value(s) of {len(values)}" in str(caught.value)
    assert f"at index ({values.index(bad) if not math.isnan(bad) else place % len(values)},)" in str(caught.value)


def test_a_good_problem_warns_of_nothing() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        problem = Problem(schools, SIGMA, EFFECT)
        problem.density().value_and_grad(torch.zeros(2, 5))
        problem.predictive(problem.prior(10))
    assert caught == []
