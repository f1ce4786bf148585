from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Callable, Mapping
from functools import cache
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import pyro
import pyro.distributions as dist
import pyro.distributions.constraints as pyro_constraints
import pytest
import torch
from pyro import poutine
from pyro.infer import config_enumerate
from pyro.infer.mcmc.util import initialize_model
from pyro.infer.reparam import LocScaleReparam
from pyro.nn import PyroModule, PyroParam, PyroSample
from scipy import stats
from torch import Tensor
from torch.distributions import biject_to, constraints, transforms

from pyro_vi_lab import capture as capture_module
from pyro_vi_lab import density as density_module
from pyro_vi_lab.density import LogDensity
from pyro_vi_lab.errors import ArgumentError, LabWarning, ModelError
from pyro_vi_lab.problem import Problem

Values = dict[str, np.ndarray]
Free = Callable[[Tensor], Tensor]


def below_diagonal(matrix: Tensor) -> Tensor:
    rows, columns = torch.tril_indices(*matrix.shape[-2:], offset=-1)
    return matrix[..., rows, columns]


def all_but_last(vector: Tensor) -> Tensor:
    return vector[..., :-1]


class Program(NamedTuple):
    """A model, its data, and an independent formula for the log density of its values.

    ``free`` picks the entries of a site's value in which its density is taken (all of them by default), ``tier`` is
    how the density runs, ``potential`` whether Pyro's own ``initialize_model`` handles the model.
    """

    model: Callable[..., Any]
    args: tuple[Any, ...] = ()
    log_prob: Callable[[Values], float] | None = None
    free: Mapping[str, Free] = MappingProxyType({})
    tier: str = "graph"
    potential: bool = True
    kwargs: Mapping[str, Any] = MappingProxyType({})


# --- every support that has a bijection from the real numbers ------------------------------------------

SUPPORTS: dict[str, tuple[constraints.Constraint, tuple[int, ...], Free]] = {
    "real": (constraints.real, (), torch.flatten),
    "real vector": (constraints.real_vector, (2,), torch.flatten),
    "independent": (constraints.independent(constraints.positive, 1), (2,), torch.flatten),
    "positive": (constraints.positive, (), torch.flatten),
    "nonnegative": (constraints.nonnegative, (), torch.flatten),
    "unit interval": (constraints.unit_interval, (), torch.flatten),
    "interval": (constraints.interval(-2.0, 5.0), (), torch.flatten),
    "half-open interval": (constraints.half_open_interval(-1.0, 0.5), (), torch.flatten),
    "greater than": (constraints.greater_than(3.0), (), torch.flatten),
    "greater than, by entry": (constraints.greater_than(torch.tensor([3.0, -1.0])), (2,), torch.flatten),
    "greater than or equal": (constraints.greater_than_eq(-3.0), (), torch.flatten),
    "less than": (constraints.less_than(-2.0), (), torch.flatten),
    "simplex": (constraints.simplex, (4,), all_but_last),
    "cat": (
        constraints.cat([constraints.positive, constraints.interval(0.0, 2.0)], dim=-1, lengths=[2, 1]),
        (3,),
        torch.flatten,
    ),
    "stack": (
        constraints.stack([constraints.positive, constraints.less_than(1.0)], dim=-1),
        (2,),
        torch.flatten,
    ),
    "correlation, Cholesky factor": (constraints.corr_cholesky, (3, 3), below_diagonal),
    "correlation": (pyro_constraints.corr_matrix, (3, 3), below_diagonal),
    "ordered": (pyro_constraints.ordered_vector, (3,), torch.flatten),
    "positive ordered": (pyro_constraints.positive_ordered_vector, (3,), torch.flatten),
    "softplus positive": (pyro_constraints.softplus_positive, (), torch.flatten),
}


def flat_prior(support: constraints.Constraint, shape: tuple[int, ...]) -> Callable[[], None]:
    def model() -> None:
        pyro.sample("x", dist.ImproperUniform(support, (), shape))

    return model


def test_every_support_with_a_bijection_is_in_the_table() -> None:
    assert {type(support) for support, _, _ in SUPPORTS.values()} >= set(biject_to._registry)


# --- models --------------------------------------------------------------------------------------------

rng = np.random.default_rng(0)
X = rng.normal(size=(7, 3))
COUNTS = np.array([0.0, 3.0, 1.0, 4.0, 2.0, 0.0, 1.0])
BINARY = np.array([0.0, 1.0, 1.0, 0.0, 1.0, 1.0, 0.0])
GROUP = np.array([0, 1, 2, 0, 1, 2, 2])
Y = rng.normal(size=7) * 2
SIGMA = np.array([15.0, 10.0, 16.0])
EFFECT = np.array([28.0, 8.0, -3.0])
GRID = rng.normal(size=(2, 3))
ROWS_KEPT = np.array([True, True, False, True, True, False, True])


def schools(sigma: Tensor, y: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("school", len(y)):
        eta = pyro.sample("eta", dist.Normal(0.0, 1.0))
        theta = pyro.deterministic("theta", mu + tau * eta)
        pyro.sample("y", dist.Normal(theta, sigma), obs=y)


def schools_log_prob(v: Values) -> float:
    prior = stats.norm(0, 5).logpdf(v["mu"]) + stats.halfcauchy(0, 5).logpdf(v["tau"])
    theta = v["mu"] + v["tau"] * v["eta"]
    return float(prior + stats.norm.logpdf(v["eta"]).sum() + stats.norm(theta, SIGMA).logpdf(EFFECT).sum())


def logistic(x: Tensor, y: Tensor) -> None:
    beta = pyro.sample("beta", dist.StudentT(4.0, 0.0, 2.5).expand([3]).to_event(1))
    with pyro.plate("row", len(y)):
        pyro.sample("y", dist.Bernoulli(logits=x @ beta), obs=y)


def logistic_log_prob(v: Values) -> float:
    likelihood = -np.logaddexp(0, -(2 * BINARY - 1) * (X @ v["beta"])).sum()
    return float(stats.t(4, scale=2.5).logpdf(v["beta"]).sum() + likelihood)


def nested_plates(y: Tensor) -> None:
    rows, columns = pyro.plate("row", 2, dim=-2), pyro.plate("column", 3, dim=-1)
    with rows:
        a = pyro.sample("a", dist.Normal(1.0, 2.0))
    with columns:
        b = pyro.sample("b", dist.Exponential(1.5))
    with rows, columns:
        c = pyro.sample("c", dist.Laplace(a, b))
        pyro.sample("y", dist.Normal(c, 0.7), obs=y)


def nested_plates_log_prob(v: Values) -> float:
    prior = stats.norm(1, 2).logpdf(v["a"]).sum() + stats.expon(scale=1 / 1.5).logpdf(v["b"]).sum()
    return float(prior + (stats.laplace(v["a"], v["b"]).logpdf(v["c"]) + stats.norm(v["c"], 0.7).logpdf(GRID)).sum())


def mixture(y: Tensor) -> None:
    weights = pyro.sample("weights", dist.Dirichlet(torch.tensor([1.0, 2.0, 3.0]).to(y)))
    with pyro.plate("component", 3):
        locs = pyro.sample("locs", dist.Normal(0.0, 3.0))
    with pyro.plate("row", len(y)):
        component = pyro.sample("component_of_row", dist.Categorical(weights))
        pyro.deterministic("loc_of_row", locs[component])
        pyro.sample("y", dist.Normal(locs[component], 0.8), obs=y)


def mixture_log_prob(v: Values) -> float:
    prior = stats.dirichlet([1, 2, 3]).logpdf(v["weights"]) + stats.norm(0, 3).logpdf(v["locs"]).sum()
    rows = (v["weights"] * stats.norm(v["locs"], 0.8).pdf(Y[:, None])).sum(1)
    return float(prior + np.log(rows).sum())


def two_discrete(y: Tensor) -> None:
    """A discrete site for all rows and one for each, which depends on it."""
    p = pyro.sample("p", dist.Beta(2.0, 3.0))
    regime = pyro.sample("regime", dist.Bernoulli(p))
    with pyro.plate("row", len(y)):
        hit = pyro.sample("hit", dist.Bernoulli(0.2 + 0.5 * regime))
        pyro.sample("y", dist.Normal(2.0 * hit - regime, 1.0), obs=y)


def two_discrete_log_prob(v: Values) -> float:
    total = 0.0
    for regime in (0, 1):
        hit = 0.2 + 0.5 * regime
        rows = (1 - hit) * stats.norm(-regime, 1).pdf(Y) + hit * stats.norm(2 - regime, 1).pdf(Y)
        total += (v["p"] if regime else 1 - v["p"]) * rows.prod()
    return float(stats.beta(2, 3).logpdf(v["p"]) + np.log(total))


def hidden_markov(y: Tensor) -> None:
    with pyro.plate("state", 2):
        stay = pyro.sample("stay", dist.Beta(3.0, 2.0))
    scale = pyro.sample("scale", dist.Gamma(2.0, 1.0))
    state = torch.tensor(0)
    for t in pyro.markov(range(len(y))):
        to_one = torch.where(state == 1, stay[1], 1 - stay[0])
        state = pyro.sample(f"state_{t}", dist.Bernoulli(to_one)).long()
        pyro.sample(f"y_{t}", dist.Normal(2.0 * state, scale), obs=y[t])


def hidden_markov_log_prob(v: Values) -> float:
    prior = stats.beta(3, 2).logpdf(v["stay"]).sum() + stats.gamma(2).logpdf(v["scale"])
    (a, b), forward = v["stay"], np.array([1.0, 0.0])
    for value in Y[:2]:
        forward = forward @ np.array([[a, 1 - a], [1 - b, b]]) * stats.norm([0, 2], v["scale"]).pdf(value)
    return float(prior + np.log(forward.sum()))


def factors(y: Tensor) -> None:
    x = pyro.sample("x", dist.Normal(0.0, 1.0))
    pyro.factor("quartic", -0.1 * x**4)
    with pyro.plate("row", len(y)):
        pyro.factor("rows", torch.cos(x * y))


def scaled(y: Tensor) -> None:
    mu = pyro.sample("mu", dist.Cauchy(0.0, 1.0))
    with poutine.scale(scale=2.5), pyro.plate("row", len(y)):
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y)


def masked(y: Tensor, kept: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("row", len(y)):
        with poutine.mask(mask=kept):
            pyro.sample("y", dist.Normal(mu, 1.0), obs=y)
        pyro.sample("w", dist.Normal(mu, 2.0).mask(~kept), obs=y)


def observed_in_part(y: Tensor, kept: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("row", len(y)):
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y, obs_mask=kept)


def observed_in_part_log_prob(v: Values) -> float:
    rows = stats.norm(v["mu"], 1).logpdf(np.where(ROWS_KEPT, Y, v["y_unobserved"]))
    return float(stats.norm.logpdf(v["mu"]) + rows.sum())


def free_regression() -> None:
    a = pyro.sample("a", dist.Normal(0.0, 1.0))
    pyro.sample("b", dist.Normal(a, 2.0))
    pyro.sample("c", dist.Normal(a, 3.0))


class Line(PyroModule):
    def __init__(self) -> None:
        super().__init__()
        self.slope = PyroSample(lambda _: dist.Normal(0.0, 2.0))
        self.scale = PyroParam(torch.tensor(1.5, dtype=torch.float64), constraint=constraints.positive)
        self.register_buffer("offset", torch.tensor(0.25, dtype=torch.float64))

    def forward(self, x: Tensor, y: Tensor) -> None:
        loc = self.slope * x + self.offset
        with pyro.plate("row", len(y)):
            pyro.sample("y", dist.Normal(loc, self.scale), obs=y)


def parametric(y: Tensor) -> None:
    loc = pyro.param("loc", torch.tensor(2.5))
    scale = pyro.param("scale", torch.tensor(0.5), constraint=constraints.positive)
    x = pyro.sample("x", dist.Normal(loc, 1.0))
    with pyro.plate("row", len(y)):
        pyro.sample("y", dist.Normal(x, scale), obs=y)


def flat_regression(x: Tensor, y: Tensor) -> None:
    beta = pyro.sample("beta", dist.ImproperUniform(constraints.real_vector, (), (3,)))
    scale = pyro.sample("scale", dist.ImproperUniform(constraints.positive, (), ()))
    with pyro.plate("row", len(y)):
        pyro.sample("y", dist.Normal(x @ beta, scale), obs=y)


def broken_stick(y: Tensor) -> None:
    a = pyro.sample("a", dist.Uniform(0.0, 1.0))
    b = pyro.sample("b", dist.Uniform(0.0, 1 - a))
    with pyro.plate("row", len(y)):
        pyro.sample("y", dist.Normal(a - b, 1.0), obs=y)


def broken_stick_log_prob(v: Values) -> float:
    return float(stats.uniform(0, 1 - v["a"]).logpdf(v["b"]) + stats.norm(v["a"] - v["b"], 1).logpdf(Y).sum())


def transformed(y: Tensor) -> None:
    stretched = [transforms.AffineTransform(1.0, 2.0), transforms.ExpTransform()]
    x = pyro.sample("x", dist.TransformedDistribution(dist.Normal(0.0, 1.0), stretched))
    w = pyro.sample("w", dist.LogNormal(torch.zeros(2), 0.5).to_event(1))
    with pyro.plate("row", len(y)):
        pyro.sample("y", dist.Normal(x * w[0], w[1]), obs=y)


def transformed_log_prob(v: Values) -> float:
    prior = stats.lognorm(2, scale=np.e).logpdf(v["x"]) + stats.lognorm(0.5).logpdf(v["w"]).sum()
    return float(prior + stats.norm(v["x"] * v["w"][0], v["w"][1]).logpdf(Y).sum())


def correlated(y: Tensor) -> None:
    factor = pyro.sample("factor", dist.LKJCholesky(3, 1.0))
    scales = pyro.sample("scales", dist.HalfNormal(2.0).expand([3]).to_event(1))
    with pyro.plate("row", len(y)):
        tril = scales.unsqueeze(-1) * factor
        pyro.sample("y", dist.MultivariateNormal(torch.zeros(3), scale_tril=tril), obs=y)


def correlated_log_prob(v: Values) -> float:
    # LKJ(1) is uniform over the correlation matrices, of which the 3 x 3 ones have the volume pi^2 / 2 (Joe 2006);
    # the factor's density has the Jacobian of L -> LL^T too, L22^2 L33 with L22's power 3 - 2 and L33's 3 - 3.
    prior = math.log(2 / math.pi**2) + math.log(v["factor"][1, 1]) + stats.halfnorm(0, 2).logpdf(v["scales"]).sum()
    tril = v["scales"][:, None] * v["factor"]
    return float(prior + stats.multivariate_normal(np.zeros(3), tril @ tril.T).logpdf(X).sum())


def proportions(counts: Tensor) -> None:
    p = pyro.sample("p", dist.Dirichlet(torch.tensor([1.0, 2.0, 0.5]).to(counts)))
    pyro.sample("counts", dist.Multinomial(8, probs=p), obs=counts)


def proportions_log_prob(v: Values) -> float:
    prior = stats.dirichlet([1, 2, 0.5]).logpdf(v["p"])
    return float(prior + stats.multinomial(8, v["p"]).logpmf([1, 2, 5]))


def gaussian_process(x: Tensor, y: Tensor) -> None:
    length = pyro.sample("length", dist.InverseGamma(3.0, 2.0))
    covariance = torch.exp(-((x.unsqueeze(-1) - x) ** 2) / (2 * length**2)) + 0.1 * torch.eye(len(x)).to(x)
    pyro.sample("y", dist.MultivariateNormal(torch.zeros(len(x)).to(x), covariance), obs=y)


def gaussian_process_log_prob(v: Values) -> float:
    distance = X[:, 0][:, None] - X[:, 0]
    covariance = np.exp(-(distance**2) / (2 * v["length"] ** 2)) + 0.1 * np.eye(7)
    prior = stats.invgamma(3, scale=2).logpdf(v["length"])
    return float(prior + stats.multivariate_normal(np.zeros(7), covariance).logpdf(Y))


def autoregression(y: Tensor) -> None:
    phi = pyro.sample("phi", dist.Uniform(-1.0, 1.0))
    state = torch.zeros(())
    for t in range(len(y)):
        state = pyro.sample(f"state_{t}", dist.Normal(phi * state, 0.5))
        pyro.sample(f"y_{t}", dist.Normal(state, 1.0), obs=y[t])


def autoregression_log_prob(v: Values) -> float:
    states = np.array([0.0] + [float(v[f"state_{t}"]) for t in range(2)])
    rows = stats.norm(v["phi"] * states[:-1], 0.5).logpdf(states[1:]) + stats.norm(states[1:], 1).logpdf(Y[:2])
    return float(stats.uniform(-1, 2).logpdf(v["phi"]) + rows.sum())


def ordinal(x: Tensor, y: Tensor) -> None:
    slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
    cuts = pyro.sample("cuts", dist.ImproperUniform(pyro_constraints.ordered_vector, (), (3,)))
    with pyro.plate("row", len(y)):
        pyro.sample("y", dist.OrderedLogistic(slope * x, cuts), obs=y)


def ordinal_log_prob(v: Values) -> float:
    below = stats.logistic.cdf(v["cuts"] - v["slope"] * X[:, :1])
    cells = np.diff(np.column_stack([np.zeros(7), below, np.ones(7)]), axis=1)
    return float(stats.norm.logpdf(v["slope"]) + np.log(cells[np.arange(7), GROUP]).sum())


def counts_by_group(y: Tensor, *, group: Tensor, options: dict[str, Any]) -> None:
    """Whole-number data, keyword arguments, a nested argument and a plain number."""
    with pyro.plate("group", options["num_groups"]):
        rate = pyro.sample("rate", dist.Gamma(2.0, options["rate"]))
    with pyro.plate("row", len(y)):
        pyro.sample("y", dist.Poisson(rate[group]), obs=y)


def counts_by_group_log_prob(v: Values) -> float:
    return float(stats.gamma(2, scale=2).logpdf(v["rate"]).sum() + stats.poisson(v["rate"][GROUP]).logpmf(COUNTS).sum())


def trials(y: Tensor, total: Tensor) -> None:
    with pyro.plate("row", len(y)):
        p = pyro.sample("p", dist.Beta(2.0, 2.0))
        pyro.sample("y", dist.Binomial(total, p), obs=y)


def inflated(y: Tensor) -> None:
    gate = pyro.sample("gate", dist.Beta(1.0, 3.0))
    rate = pyro.sample("rate", dist.Exponential(1.0))
    with pyro.plate("row", len(y)):
        pyro.sample("y", dist.ZeroInflatedPoisson(rate, gate=gate), obs=y)


def inflated_log_prob(v: Values) -> float:
    prior = stats.beta(1, 3).logpdf(v["gate"]) + stats.expon.logpdf(v["rate"])
    rows = (1 - v["gate"]) * stats.poisson(v["rate"]).pmf(COUNTS) + v["gate"] * (COUNTS == 0)
    return float(prior + np.log(rows).sum())


@poutine.reparam(config={"theta": LocScaleReparam(centered=0.0)})
def decentered(sigma: Tensor, y: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.LogNormal(0.0, 1.0))
    with pyro.plate("school", len(y)):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("y", dist.Normal(theta, sigma), obs=y)


def decentered_log_prob(v: Values) -> float:
    theta = v["mu"] + v["tau"] * v["theta_decentered"]
    prior = stats.norm(0, 5).logpdf(v["mu"]) + stats.lognorm(1).logpdf(v["tau"])
    return float(prior + stats.norm.logpdf(v["theta_decentered"]).sum() + stats.norm(theta, SIGMA).logpdf(EFFECT).sum())


def data_decide(y: Tensor) -> None:
    """Python control flow, but only on data."""
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    scale = 2.0 if y.max() > 1 else 1.0
    large = y[y > 0]
    with pyro.plate("large", len(large)):
        pyro.sample("y", dist.Normal(mu, scale * float(y.abs().max())), obs=large)


def data_decide_log_prob(v: Values) -> float:
    scale = (2.0 if Y.max() > 1 else 1.0) * abs(Y).max()
    return float(stats.norm.logpdf(v["mu"]) + stats.norm(v["mu"], scale).logpdf(Y[Y > 0]).sum())


def values_decide(y: Tensor) -> None:
    """Python control flow on a latent value."""
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    scale = 2.0 if mu > 0 else 1.0
    with pyro.plate("row", len(y)):
        pyro.sample("y", dist.Normal(mu, scale), obs=y)


def values_decide_log_prob(v: Values) -> float:
    return float(stats.norm.logpdf(v["mu"]) + stats.norm(v["mu"], 2 if v["mu"] > 0 else 1).logpdf(Y).sum())


def written_in_place(y: Tensor) -> None:
    a = pyro.sample("a", dist.Normal(0.0, 1.0))
    b = pyro.sample("b", dist.Normal(0.0, 1.0))
    loc = torch.zeros(2)
    loc[0] = a
    loc[1] += a * b
    with pyro.plate("row", 2):
        pyro.sample("y", dist.Normal(loc, 1.0), obs=y)


def written_in_place_log_prob(v: Values) -> float:
    a, b = v["a"], v["b"]
    return float(stats.norm.logpdf([a, b]).sum() + stats.norm([a, a * b], 1).logpdf(Y[:2]).sum())


def own_constants(y: Tensor) -> None:
    """Makes tensors of the default type, which have to be as precise as z."""
    x = pyro.sample("x", dist.Normal(0.0, 1.0))
    loc = torch.full((3,), 0.1) * x + torch.arange(3) * 0.1 + torch.where(x > 0, 0.1, 0.3) + torch.tensor(3) / 7
    with pyro.plate("row", 3):
        pyro.sample("y", dist.Normal(loc, 1.0), obs=y)


def own_constants_log_prob(v: Values) -> float:
    loc = 0.1 * v["x"] + 0.1 * np.arange(3) + np.where(v["x"] > 0, 0.1, 0.3) + 3 / 7
    return float(stats.norm.logpdf(v["x"]) + stats.norm(loc, 1).logpdf(Y[:3]).sum())


WEIGHTS = torch.tensor(X, dtype=torch.float32)


def single_precision(y: Tensor) -> None:
    """Holds a float32 matrix of its own, which float64 values cannot be multiplied with."""
    beta = pyro.sample("beta", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    with pyro.plate("row", len(y)):
        pyro.sample("y", dist.Normal(WEIGHTS @ beta, 1.0), obs=y)


def array(values: np.ndarray) -> Tensor:
    return torch.from_numpy(values.copy())


def normal_rows(v: Values, scale: float = 1.0) -> float:
    return float(stats.norm(v["mu"], scale).logpdf(Y).sum())


PROGRAMS: dict[str, Program] = {
    "schools": Program(schools, (array(SIGMA), array(EFFECT)), schools_log_prob),
    "logistic regression": Program(logistic, (array(X), array(BINARY)), logistic_log_prob),
    "nested plates": Program(nested_plates, (array(GRID),), nested_plates_log_prob),
    "mixture": Program(mixture, (array(Y),), mixture_log_prob, {"weights": all_but_last}),
    "two discrete sites": Program(two_discrete, (array(Y),), two_discrete_log_prob),
    "hidden Markov": Program(hidden_markov, (array(Y[:2]),), hidden_markov_log_prob),
    "factor": Program(
        factors,
        (array(Y),),
        lambda v: float(stats.norm.logpdf(v["x"]) - 0.1 * v["x"] ** 4 + np.cos(v["x"] * Y).sum()),
    ),
    "scale": Program(scaled, (array(Y),), lambda v: float(stats.cauchy.logpdf(v["mu"])) + 2.5 * normal_rows(v)),
    "mask": Program(
        masked,
        (array(Y), array(ROWS_KEPT)),
        lambda v: float(stats.norm.logpdf(v["mu"]) + stats.norm(v["mu"], np.where(ROWS_KEPT, 1, 2)).logpdf(Y).sum()),
    ),
    "obs_mask": Program(observed_in_part, (array(Y), array(ROWS_KEPT)), observed_in_part_log_prob),
    "condition": Program(
        pyro.condition(free_regression, data={"b": torch.tensor(1.5)}),
        (),
        lambda v: float(
            stats.norm.logpdf(v["a"]) + stats.norm(v["a"], 2).logpdf(1.5) + stats.norm(v["a"], 3).logpdf(v["c"])
        ),
    ),
    "PyroModule": Program(
        Line(),
        (array(X[:, 0]), array(Y)),
        lambda v: float(
            stats.norm(0, 2).logpdf(v["slope"]) + stats.norm(v["slope"] * X[:, 0] + 0.25, 1.5).logpdf(Y).sum()
        ),
    ),
    "param": Program(
        parametric,
        (array(Y),),
        lambda v: float(stats.norm(2.5, 1).logpdf(v["x"]) + stats.norm(v["x"], 0.5).logpdf(Y).sum()),
    ),
    "improper": Program(
        flat_regression,
        (array(X), array(Y)),
        lambda v: float(stats.norm(X @ v["beta"], v["scale"]).logpdf(Y).sum()),
        potential=False,  # Pyro draws its start from the prior
    ),
    # Pyro keeps the supports of the first run
    "dependent support": Program(broken_stick, (array(Y),), broken_stick_log_prob, potential=False),
    "transformed": Program(transformed, (array(Y),), transformed_log_prob),
    "LKJ": Program(correlated, (array(X),), correlated_log_prob, {"factor": below_diagonal}),
    "multinomial": Program(proportions, (torch.tensor([1.0, 2.0, 5.0]),), proportions_log_prob, {"p": all_but_last}),
    "Gaussian process": Program(gaussian_process, (array(X[:, 0]), array(Y)), gaussian_process_log_prob),
    "autoregression": Program(autoregression, (array(Y[:2]),), autoregression_log_prob),
    "ordinal": Program(ordinal, (array(X[:, 0]), array(GROUP)), ordinal_log_prob, potential=False),
    "counts": Program(
        counts_by_group,
        (array(COUNTS),),
        counts_by_group_log_prob,
        kwargs={"group": array(GROUP), "options": {"num_groups": 3, "rate": torch.tensor(0.5)}},
    ),
    "binomial": Program(
        trials,
        (array(COUNTS), torch.full((7,), 5.0)),
        lambda v: float((stats.beta(2, 2).logpdf(v["p"]) + stats.binom(5, v["p"]).logpmf(COUNTS)).sum()),
    ),
    "zero inflation": Program(inflated, (array(COUNTS),), inflated_log_prob),
    "reparam": Program(decentered, (array(SIGMA), array(EFFECT)), decentered_log_prob),
    "control flow on data": Program(data_decide, (array(Y),), data_decide_log_prob),
    "control flow on values": Program(values_decide, (array(Y),), values_decide_log_prob, tier="eager"),
    "written in place": Program(written_in_place, (array(Y[:2]),), written_in_place_log_prob),
    "own constants": Program(own_constants, (array(Y[:3]),), own_constants_log_prob),
    "float32": Program(
        single_precision,
        (array(Y),),
        lambda v: float(stats.norm.logpdf(v["beta"]).sum() + stats.norm(X @ v["beta"], 1).logpdf(Y).sum()),
        potential=False,  # its data are converted
    ),
    **{
        f"support: {name}": Program(flat_prior(support, shape), (), lambda v: 0.0, {"x": free}, potential=False)
        for name, (support, shape, free) in SUPPORTS.items()
    },
}

EACH = pytest.mark.parametrize("name", PROGRAMS)


@cache
def problem_of(name: str) -> Problem:
    """The problem of a program, captured once for all tests; what it warns of is tested on fresh ones."""
    program = PROGRAMS[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", LabWarning)
        problem = Problem(program.model, *program.args, name=name, **program.kwargs)
        assert problem.density().tier == program.tier
    return problem


def density_of(name: str) -> LogDensity:
    return problem_of(name).density()


def points(density: LogDensity, num_points: int = 4, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num_points, density.dim, generator=generator, dtype=density.dtype)


def rounding(density: LogDensity, *values: Tensor, operations: float = 1e4) -> float:
    """What rounding in this many operations can make of values of this size."""
    largest = max([1.0, *(float(value.abs().max()) for value in values if value.numel())])
    return operations * torch.finfo(density.dtype).eps * largest


def assert_close(actual: Tensor, expected: Tensor, atol: float) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=atol)


# --- laws ----------------------------------------------------------------------------------------------


@EACH
def test_value_and_gradient_are_those_of_pyro(name: str) -> None:
    density = density_of(name)
    z = points(density)
    values, grads = density.value_and_grad(z)
    expected = [density._program.value_and_grad(row) for row in z]
    assert_close(values, torch.stack([value for value, _ in expected]), rounding(density, values))
    assert_close(grads, torch.stack([grad for _, grad in expected]), rounding(density, grads))
    assert_close(density.log_prob(z), values, rounding(density, values))


@EACH
def test_a_batch_is_its_rows(name: str) -> None:
    density = density_of(name)
    z = points(density, 6).reshape(2, 3, density.dim)
    values, grads = density.value_and_grad(z)
    assert (values.shape, grads.shape) == ((2, 3), (2, 3, density.dim))
    pointwise = density.pointwise()
    for i, j in np.ndindex(2, 3):
        for value, grad in (density.value_and_grad(z[i, j]), pointwise(z[i, j])):
            assert (value.shape, grad.shape) == ((), (density.dim,))
            assert_close(value, values[i, j], rounding(density, value))
            assert_close(grad, grads[i, j], rounding(density, grad))
        assert_close(density.log_prob(z[i, j]), values[i, j], rounding(density, values))


@EACH
def test_gradient_and_hessian_are_finite_differences(name: str) -> None:
    density = density_of(name)
    eps = torch.finfo(density.dtype).eps
    # a central difference of step h has the errors h^2 and eps / h, both of them eps^(2/3) here
    step, order = eps ** (1 / 3), eps ** (2 / 3)
    moves = step * torch.eye(density.dim, dtype=density.dtype)
    z = points(density, 1)[0] / 2
    ahead, behind = density.value_and_grad(z + moves), density.value_and_grad(z - moves)
    slope, curvature = ((a - b) / (2 * step) for a, b in zip(ahead, behind, strict=True))
    value, grad = density.value_and_grad(z)
    hessian, _ = density.hessian(torch.stack([z, -z]))
    size = max(1.0, *(float(x.abs().max()) for x in (value, grad, hessian)))
    assert_close(grad, slope, 100 * order * size)
    assert_close(hessian, curvature, 100 * order * size)
    assert_close(hessian, hessian.mT, rounding(density, hessian))
    assert_close(density.hessian(z), hessian, rounding(density, hessian))


@EACH
def test_constrain_and_unconstrain_are_inverse(name: str) -> None:
    density = density_of(name)
    z = points(density, 6).reshape(2, 3, density.dim)
    values = density.constrain(z)
    for site in density.sites.values():
        assert values[site.name].shape == (2, 3, *site.shape)
        if name != "dependent support":  # the support of a site is that of the first run
            assert bool(site.support.check(values[site.name]).all())
    assert_close(density.unconstrain(values), z, rounding(density, z))
    one = density.constrain(z[1, 2])
    assert {key: value.shape for key, value in one.items()} == {key: v.shape[2:] for key, v in values.items()}
    for key, value in one.items():
        assert_close(value, values[key][1, 2], rounding(density, value))
    assert_close(density.unconstrain(one), z[1, 2], rounding(density, z))


@EACH
def test_value_is_that_of_an_independent_formula(name: str) -> None:
    """log p(T(z)) from SciPy plus log |det dT/dz| from the Jacobian matrix of T."""
    program, density = PROGRAMS[name], density_of(name)
    assert program.log_prob is not None

    def free_values(z: Tensor) -> Tensor:
        values = dict(zip(density.sites, density._program.constrain(z), strict=False))
        return torch.cat([program.free.get(key, torch.flatten)(value).reshape(-1) for key, value in values.items()])

    for z in points(density, 3):
        jacobian = torch.autograd.functional.jacobian(free_values, z)
        values = {key: value.double().numpy() for key, value in density.constrain(z).items()}
        expected = program.log_prob(values) + float(torch.linalg.slogdet(jacobian.double()).logabsdet)
        value = density.log_prob(z)
        assert float(value) == pytest.approx(expected, abs=rounding(density, value))


@pytest.mark.parametrize("name", [name for name, program in PROGRAMS.items() if program.potential])
def test_value_is_minus_the_potential_of_pyro(name: str) -> None:
    program, density = PROGRAMS[name], density_of(name)
    torch.set_default_dtype(torch.float64)
    model = program.model
    if any(site.kind == "discrete" for site in problem_of(name).sites.values()):
        model = config_enumerate(model)
    problem = problem_of(name)
    _, potential, _, _ = initialize_model(
        model, problem.args, problem.kwargs, max_plate_nesting=2, skip_jit_warnings=True
    )
    for z in points(density, 3):
        parts = z.split([site.unconstrained_shape.numel() for site in density.sites.values()])
        values = {
            site.name: part.reshape(site.unconstrained_shape)
            for site, part in zip(density.sites.values(), parts, strict=True)
        }
        value = density.log_prob(z)
        assert_close(value, -potential(values), rounding(density, value))


@pytest.mark.parametrize(
    "name",
    [
        "mixture",
        "param",
        "PyroModule",
        "LKJ",
        "float32",
        "control flow on data",
        "control flow on values",
        "reparam",
    ],
)
def test_capture_and_evaluation_leave_no_trace(name: str, capfd: pytest.CaptureFixture[str]) -> None:
    program = PROGRAMS[name]
    pyro.param("other", torch.tensor(3.0))
    pyro.set_rng_seed(17)
    np.random.seed(17)  # noqa: NPY002 - the global state is what this test is about
    before = global_state()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", LabWarning)
        density = Problem(program.model, *program.args, **program.kwargs).density()
        density.value_and_grad(points(density))
        density.constrain(points(density))
    assert global_state() == before
    assert capfd.readouterr() == ("", "")


def global_state() -> dict[str, Any]:
    return {
        "params": sorted(pyro.get_param_store().keys()),
        "torch": torch.get_rng_state().tolist(),
        "numpy": str(np.random.get_state()),  # noqa: NPY002
        "pyro": pyro.settings.get(),
        "validation": (
            pyro.infer.util.is_validation_enabled(),
            torch.distributions.Distribution._validate_args,
        ),
        "dtype": torch.get_default_dtype(),
        "grad": torch.is_grad_enabled(),
        "handlers": len(pyro.poutine.runtime._PYRO_STACK),
    }


# --- names and arguments -------------------------------------------------------------------------------


def test_labels_name_the_coordinates() -> None:
    density = density_of("mixture")
    assert (density.dim, density.labels) == (5, ["weights[0]", "weights[1]", "locs[0]", "locs[1]", "locs[2]"])
    assert density_of("nested plates").labels[-2:] == ["c[1, 1]", "c[1, 2]"]
    assert density_of("schools").labels[:3] == ["mu", "tau", "eta[0]"]


def test_deterministic_sites_are_constrained_too_unless_they_depend_on_a_discrete_one() -> None:
    z = points(density_of("schools"))
    values = density_of("schools").constrain(z)
    torch.testing.assert_close(values["theta"], values["mu"][:, None] + values["tau"][:, None] * values["eta"])
    assert set(density_of("mixture").constrain(points(density_of("mixture")))) == {"weights", "locs"}


@pytest.mark.parametrize("shape", [(4,), (2, 9), (0,)])
def test_vectors_of_another_length_are_refused(shape: tuple[int, ...]) -> None:
    density = density_of("schools")
    for method in (density.log_prob, density.value_and_grad, density.hessian, density.constrain):
        with pytest.raises(ArgumentError, match=r"length 5 \(schools\), got a tensor of shape"):
            method(torch.zeros(shape))


def test_unconstrain_names_the_site_that_does_not_fit() -> None:
    density = density_of("schools")
    values = density.constrain(points(density))
    with pytest.raises(ArgumentError, match=r"latent site 'tau'.*mu, tau, eta"):
        density.unconstrain({key: value for key, value in values.items() if key != "tau"})
    with pytest.raises(ArgumentError, match=r"site 'eta' have shape \(4, 2\); expected \(\.\.\., 3\)"):
        density.unconstrain({**values, "eta": values["eta"][:, 1:]})
    with pytest.raises(ArgumentError, match=r"site 'tau' come in a batch \(2,\), others \(4,\)"):
        density.unconstrain({**values, "tau": values["tau"][:2]})


def test_a_subsampled_plate_is_refused() -> None:
    def model(y: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("row", len(y), subsample_size=3) as index:
            pyro.sample("y", dist.Normal(mu, 1.0), obs=y[index])

    with pytest.raises(ModelError, match=r"plate 'row' of model model .* \(subsample_size\)"):
        Problem(model, array(Y)).density()


def test_a_density_that_does_not_depend_on_z_has_no_gradient() -> None:
    density = density_of("support: real vector")
    values, grads = density.value_and_grad(points(density))
    assert (values.tolist(), grads.tolist(), density.hessian(points(density)).abs().max()) == (
        [0] * 4,
        [[0, 0]] * 4,
        0,
    )


def test_blame_names_the_site_that_is_not_finite() -> None:
    def model() -> None:
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(0.0, 1.0 - x), obs=torch.tensor(1.0))

    density = Problem(model).density()
    assert density.blame(torch.tensor([0.5], dtype=torch.float64)) == ""
    assert density.blame(torch.tensor([2.0], dtype=torch.float64)) == "y"


# --- tiers ---------------------------------------------------------------------------------------------


def test_control_flow_on_a_value_is_said_once_with_its_line() -> None:
    lines, first = inspect.getsourcelines(values_decide)
    line = first + next(i for i, text in enumerate(lines) if "if mu > 0" in text)
    density = Problem(values_decide, array(Y)).density()
    z = points(density)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for function in (density.log_prob, density.value_and_grad, density.hessian, density.constrain) * 2:
            function(z)
    (warning,) = caught
    assert warning.category is LabWarning
    assert "model values_decide runs in the eager tier" in str(warning.message)
    assert f"{__file__}:{line}" in str(warning.message)
    assert (density.tier, density.num_nodes, density.work) == ("eager", 0, 1)


def test_a_captured_density_knows_its_size() -> None:
    density = density_of("schools")
    assert density.num_nodes > 10
    assert density.work > density.num_nodes


def test_a_model_that_draws_numbers_of_its_own_is_not_captured() -> None:
    def model(y: Tensor) -> None:
        jitter = 0.1 * torch.randn(())
        x = pyro.sample("x", dist.Normal(jitter, 1.0))
        pyro.sample("y", dist.Normal(x, 1.0), obs=y)

    density = Problem(model, torch.tensor(1.0)).density()
    with pytest.warns(LabWarning, match="draws random numbers"):
        assert density.tier == "eager"


# --- parameters ----------------------------------------------------------------------------------------


def test_parameters_keep_the_values_of_the_store() -> None:
    pyro.param("loc", torch.tensor(-1.0, dtype=torch.float64))
    pyro.param("scale", torch.tensor(3.0, dtype=torch.float64), constraint=constraints.positive)
    before = {key: value.clone() for key, value in pyro.get_param_store().items()}
    density = Problem(parametric, array(Y)).density()
    z = points(density)
    expected = stats.norm(-1, 1).logpdf(z[:, 0]) + stats.norm(z.numpy(), 3).logpdf(Y).sum(1)
    np.testing.assert_allclose(density.log_prob(z), expected, rtol=1e-12)
    assert dict(pyro.get_param_store().items()) == before


# --- other data ----------------------------------------------------------------------------------------


def keep_captures(monkeypatch: pytest.MonkeyPatch) -> list[capture_module.Graph]:
    """A list that every graph is put into."""
    graphs: list[capture_module.Graph] = []

    def keeping(*args: Any, **kwargs: Any) -> capture_module.Graph:
        graphs.append(capture_module.capture(*args, **kwargs))
        return graphs[-1]

    monkeypatch.setattr(density_module, "capture", keeping)
    return graphs


def test_the_graph_of_the_hessian_does_not_grow_with_the_dimension(monkeypatch: pytest.MonkeyPatch) -> None:
    def model() -> None:
        x = pyro.sample("x", dist.Normal(torch.zeros(40), 1.0).to_event(1))
        pyro.factor("f", -x.square().sum().square())

    graphs = keep_captures(monkeypatch)
    density = Problem(model).density()
    z = points(density, 2)
    hessian = density.hessian(z)
    squares = z.square().sum(-1)[:, None, None]
    identity = torch.eye(40, dtype=torch.float64)
    expected = -(1 + 4 * squares) * identity - 8 * z[:, :, None] * z[:, None, :]
    assert_close(hessian, expected, rounding(density, expected))
    gradient, second = graphs
    assert second.num_nodes < 4 * gradient.num_nodes


@pytest.mark.parametrize("name", ["schools", "mixture", "counts", "mask", "factor"])
@pytest.mark.parametrize("first", ["old", "new"])
def test_other_data_of_the_same_shape_need_no_new_capture(
    name: str, first: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = PROGRAMS[name]
    problem = Problem(program.model, *program.args, **program.kwargs)
    others = tuple(value.flip(-1) if value.dtype == torch.bool else 2 * value for value in program.args)
    other = problem.with_data(*others, **program.kwargs)
    fresh = Problem(program.model, *others, **program.kwargs).density()
    z = points(fresh)
    expected, expected_grad = fresh.value_and_grad(z)
    old = density_of(name).log_prob(z)

    captures = keep_captures(monkeypatch)
    for one in (problem, other) if first == "old" else (other, problem):
        values, grads = one.density().value_and_grad(z)
        if one is other:
            assert_close(values, expected, rounding(fresh, values))
            assert_close(grads, expected_grad, rounding(fresh, grads))
        else:
            assert_close(values, old, rounding(fresh, values))
    assert len(captures) == 1
    assert float((expected - old).abs().max()) > 0.01


def reads_past_the_tracer(y: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    center = float(np.mean(y.numpy()))
    with pyro.plate("row", len(y)):
        pyro.sample("y", dist.Normal(mu + center, 1.0), obs=y)


def as_many_as_the_data_say(y: Tensor) -> None:
    with pyro.plate("group", int(y.max())):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Normal(mu.sum(), 1.0).expand([len(y)]).to_event(1), obs=y)


OTHER_DATA: dict[str, tuple[Callable[..., Any], Tensor, Tensor]] = {
    "control flow": (data_decide, torch.tensor([0.5, -0.5, 0.2]), torch.tensor([3.0, 1.0, -2.0])),
    "NumPy": (reads_past_the_tracer, torch.tensor([0.5, -0.5]), torch.tensor([1.0, 5.0])),
    "structure": (as_many_as_the_data_say, torch.tensor([1.0, 2.0]), torch.tensor([1.0, 3.0])),
    "longer": (scaled, torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.0, 3.0])),
    "other type": (scaled, torch.tensor([1, 2]), torch.tensor([1.5, 2.5])),
}


@pytest.mark.parametrize(
    ("name", "captured"), [*((name, True) for name in OTHER_DATA), ("control flow", False), ("NumPy", False)]
)
def test_other_data_that_the_graph_does_not_fit_get_their_own(name: str, captured: bool) -> None:
    model, data, others = OTHER_DATA[name]
    problem = Problem(model, data)
    if captured:
        assert problem.density().tier == "graph"
    other = problem.with_data(others)
    fresh = Problem(model, others).density()
    z = points(fresh)
    assert_close(other.density().log_prob(z), fresh.log_prob(z), rounding(fresh, fresh.log_prob(z)))
    again = Problem(model, data).density()
    z = points(again)
    assert_close(problem.density().log_prob(z), again.log_prob(z), rounding(again, again.log_prob(z)))


# --- points where a matrix has no Cholesky factor ------------------------------------------------------


def correlation(y: Tensor) -> None:
    r = pyro.sample("r", dist.Normal(0.0, 1.0))
    one = torch.ones(())
    covariance = torch.stack([torch.stack([one, r]), torch.stack([r, one])])
    pyro.sample("y", dist.MultivariateNormal(torch.zeros(2), covariance_matrix=covariance), obs=y)


def peeking_correlation(y: Tensor) -> None:
    """The same in the eager tier."""
    if pyro.sample("switch", dist.Normal(0.0, 1.0)) > 100:
        y = y + 1
    correlation(y)


@pytest.mark.parametrize("model", [correlation, peeking_correlation])
def test_only_the_points_without_a_cholesky_factor_are_nan(model: Callable[..., Any]) -> None:
    problem = Problem(model, torch.tensor([1.0, 0.5]))
    density = problem.density()
    if model is peeking_correlation:
        with pytest.warns(LabWarning):
            assert density.tier == "eager"
    else:
        assert density.tier == "graph"
    r = torch.tensor([0.2, 1.5, -0.9, -2.0], dtype=torch.float64)
    z = torch.stack([torch.zeros(4, dtype=torch.float64)] * (density.dim - 1) + [r], -1)
    values, grads = density.value_and_grad(z)
    assert torch.isnan(values).tolist() == torch.isnan(grads).all(-1).tolist() == [False, True, False, True]
    for i in (0, 2):
        covariance = [[1, float(r[i])], [float(r[i]), 1]]
        expected = stats.norm.logpdf(z[i]).sum() + stats.multivariate_normal([0, 0], covariance).logpdf([1, 0.5])
        assert float(values[i]) == pytest.approx(expected, rel=1e-12)
        assert_close(density.value_and_grad(z[i])[1], grads[i], rounding(density, grads[i]))
    assert torch.isnan(density.log_prob(z)).tolist() == [False, True, False, True]
    assert torch.isnan(density.hessian(z)).all(-1).all(-1).tolist() == [False, True, False, True]
    for function in (density.value_and_grad, density.pointwise()):
        value, grad = function(z[1])
        assert (value.shape, grad.shape) == ((), (density.dim,))
        assert bool(torch.isnan(value) & torch.isnan(grad).all())
    assert bool(torch.isnan(density.log_prob(z[1::2])).all())
