"""The conjugate guide: which family each prior gets, and the contract of Pyro's autoguides."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import (
    SVI,
    Predictive,
    Trace_ELBO,
    TraceEnum_ELBO,
    TraceGraph_ELBO,
    TraceMeanField_ELBO,
    config_enumerate,
)
from pyro.infer.autoguide import AutoGuideList, AutoNormal, init_to_sample, init_to_value
from pyro.nn import PyroModule, PyroSample
from scipy import stats
from torch import Tensor, nn

from pyro_vi_lab.errors import ArgumentError, ModelError
from pyro_vi_lab.guides import Conjugate, init_to_prior


@pytest.fixture(autouse=True)
def double() -> None:
    torch.set_default_dtype(torch.float64)


def all_priors() -> None:
    pyro.sample("normal", dist.Normal(1.0, 2.0))
    pyro.sample("elements", dist.Normal(torch.zeros(2, 3), 1.0).to_event(2))
    pyro.sample("vector", dist.Normal(torch.zeros(3), torch.tensor([1.0, 2.0, 3.0])).to_event(1))
    pyro.sample("correlated", dist.MultivariateNormal(torch.ones(2), torch.tensor([[2.0, 0.5], [0.5, 1.0]])))
    pyro.sample("low_rank", dist.LowRankMultivariateNormal(torch.ones(2), torch.ones(2, 1), torch.ones(2)))
    pyro.sample("gamma", dist.Gamma(2.0, 3.0))
    pyro.sample("exponential", dist.Exponential(3.0))
    pyro.sample("chi2", dist.Chi2(3.0))
    pyro.sample("inverse_gamma", dist.InverseGamma(0.5, 3.0))
    pyro.sample("beta", dist.Beta(2.0, 3.0))
    pyro.sample("dirichlet", dist.Dirichlet(torch.tensor([1.0, 2.0, 3.0])))
    pyro.sample("wishart", dist.Wishart(torch.tensor(4.0), torch.tensor([[2.0, 0.5], [0.5, 1.0]])))
    pyro.sample("categorical", dist.Categorical(torch.tensor([0.2, 0.3, 0.5])))
    pyro.sample("bernoulli", dist.Bernoulli(0.3))
    with pyro.plate("outer", 2, dim=-2):
        precision = pyro.sample("precision", dist.Gamma(2.0, 1.0))
        with pyro.plate("inner", 3, dim=-1):
            pyro.sample("masked", dist.Normal(0.0, 1.0).mask(torch.tensor([True, False, True])))
            pyro.sample("matrices", dist.Dirichlet(torch.ones(2)))
        pyro.sample("mean", dist.Normal(0.0, (0.5 * precision).rsqrt()))


FAMILIES = {
    "normal": "Normal",
    "elements": "Normal",
    "vector": "MultivariateNormal",
    "correlated": "MultivariateNormal",
    "low_rank": "MultivariateNormal",
    "gamma": "Gamma",
    "exponential": "Gamma",
    "chi2": "Gamma",
    "inverse_gamma": "InverseGamma",
    "beta": "Beta",
    "dirichlet": "Dirichlet",
    "wishart": "Wishart",
    "categorical": "Categorical",
    "bernoulli": "Bernoulli",
    "precision": "NormalGamma",
    "mean": "NormalGamma",
    "masked": "Normal",
    "matrices": "Dirichlet",
}


def made(model: Callable[..., Any], *args: Any, **options: Any) -> Conjugate:
    pyro.clear_param_store()
    guide = Conjugate(model, **options)
    guide(*args)
    return guide


# Families and starts


def test_every_prior_has_its_family_and_is_where_the_guide_starts() -> None:
    guide = made(all_priors)
    assert {site: type(guide.factor(site).family).__name__ for site in FAMILIES} == FAMILIES
    trace = poutine.trace(guide).get_trace()
    model = poutine.trace(poutine.replay(all_priors, trace)).get_trace()
    for name in FAMILIES:
        if name not in ("masked",):
            expected = model.nodes[name]["fn"].log_prob(trace.nodes[name]["value"])
            torch.testing.assert_close(trace.nodes[name]["fn"].log_prob(trace.nodes[name]["value"]), expected)
        assert trace.nodes[name]["value"].shape == model.nodes[name]["fn"].shape()
        assert trace.nodes[name]["fn"].event_dim == model.nodes[name]["fn"].event_dim


def test_the_start_of_a_hierarchy_is_the_prior_at_the_means_above_it() -> None:
    def model() -> None:
        rate = pyro.sample("rate", dist.Gamma(2.0, 4.0))
        pyro.sample("x", dist.Normal(10 * rate, 3.0))

    torch.testing.assert_close(made(model).standard("x"), {"loc": torch.tensor(5.0), "scale": torch.tensor(3.0)})


def test_init_loc_fn_moves_the_mean_and_keeps_the_spread() -> None:
    def model() -> None:
        pyro.sample("x", dist.Normal(0.0, 3.0))
        pyro.sample("rate", dist.Gamma(2.0, 4.0))
        pyro.sample("p", dist.Beta(2.0, 2.0))

    values = {"x": torch.tensor(7.0), "rate": torch.tensor(0.25), "p": torch.tensor(0.1)}
    guide = made(model, init_loc_fn=init_to_value(values=values, fallback=init_to_prior))
    torch.testing.assert_close(guide.standard("x"), {"loc": torch.tensor(7.0), "scale": torch.tensor(3.0)})
    torch.testing.assert_close(guide.standard("rate"), {"concentration": torch.tensor(2.0), "rate": torch.tensor(8.0)})
    expected = {"concentration1": torch.tensor(0.4), "concentration0": torch.tensor(3.6)}
    torch.testing.assert_close(guide.standard("p"), expected)
    first = made(model, init_loc_fn=init_to_sample).standard("x")["loc"]
    assert first != made(model, init_loc_fn=init_to_sample).standard("x")["loc"]


def test_families_may_be_chosen() -> None:
    def model() -> None:
        pyro.sample("one", dist.Normal(torch.zeros(3), 2.0).to_event(1))
        pyro.sample("two", dist.MultivariateNormal(torch.zeros(2), torch.tensor([[4.0, 0.5], [0.5, 1.0]])))

    guide = made(model, families={"one": "normal", "two": "normal"})
    torch.testing.assert_close(guide.standard("one")["scale"], torch.full((3,), 2.0))
    torch.testing.assert_close(guide.standard("two")["scale"], torch.tensor([2.0, 1.0]))
    fn = poutine.trace(guide).get_trace().nodes["one"]["fn"]
    assert (fn.batch_shape, fn.event_shape) == ((), (3,))


# Joint families


def normal_gamma(y: Tensor | None = None) -> None:
    tau = pyro.sample("tau", dist.Gamma(2.0, 1.0))
    pyro.sample("other", dist.Gamma(2.0, 1.0))
    mu = pyro.sample("mu", dist.Normal(1.0, (0.5 * tau).rsqrt()))
    pyro.sample("far", dist.Normal(0.0, 1.0))
    pyro.sample("child", dist.Normal(mu, 1.0))


def test_a_mean_whose_precision_is_a_site_is_joined_with_it() -> None:
    guide = made(normal_gamma)
    assert [factor.sites for factor in guide.factors.values()] == [("other",), ("tau", "mu"), ("far",), ("child",)]
    assert guide.standard("tau")["relative_precision"] == pytest.approx(0.5)
    assert [factor.sites for factor in made(normal_gamma, joint={}).factors.values()] == [
        ("tau",),
        ("other",),
        ("mu",),
        ("far",),
        ("child",),
    ]
    for pair in (("mu", "tau"), ("tau", "mu")):
        assert ("tau", "mu") in [f.sites for f in made(normal_gamma, joint={pair: "normal_gamma"}).factors.values()]


def test_one_precision_of_many_means_is_left_alone() -> None:
    def model() -> None:
        tau = pyro.sample("tau", dist.Gamma(2.0, 1.0))
        with pyro.plate("k", 3):
            pyro.sample("mu", dist.Normal(0.0, tau.rsqrt()))

    assert len(made(model).factors) == 2
    with pytest.raises(ModelError, match=r"'tau' and 'mu' cannot be 'normal_gamma'.*batch shapes"):
        made(model, joint={("mu", "tau"): "normal_gamma"})


def test_the_mean_is_drawn_given_the_precision() -> None:
    guide = made(normal_gamma)
    with pyro.plate("draws", 4000):
        trace = poutine.trace(guide).get_trace()
    tau, mu = trace.nodes["tau"]["value"], trace.nodes["mu"]["value"]
    assert stats.kstest(((mu - 1) * (0.5 * tau).sqrt()).detach().numpy(), "norm").pvalue > 1e-6


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"joint": {("mu", "tau"): "normal_gama"}}, ["unknown joint family 'normal_gama'", "normal_gamma"]),
        ({"joint": {("mu", "tua"): "normal_gamma"}}, ["unknown site 'tua'", "'tau'"]),
        ({"joint": {("mu",): "normal_gamma"}}, ["pairs of sites"]),
        ({"joint": {"mu": "normal_gamma"}}, ["pairs of sites"]),
        (
            {"joint": {("mu", "tau"): "normal_gamma", ("far", "tau"): "normal_gamma"}},
            ["'tau' is in two of the pairs"],
        ),
        ({"families": {"nu": "normal"}}, ["unknown site 'nu'"]),
        ({"families": {"mu": "normall"}}, ["unknown family 'normall'", "'normal'"]),
    ],
)
def test_options_that_name_nothing(options: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ArgumentError) as caught:
        made(normal_gamma, **options)
    assert all(word in str(caught.value) for word in words)


def test_priors_that_cannot_be_joined() -> None:
    with pytest.raises(ModelError, match=r"'other' \(Gamma\) and 'tau' \(Gamma\) cannot be 'normal_gamma'.*Normal"):
        made(normal_gamma, joint={("tau", "other"): "normal_gamma"})
    with pytest.raises(ModelError, match="site 'tau' has the prior Gamma, which is not conjugate to 'normal'"):
        made(normal_gamma, families={"tau": "normal"})


@pytest.mark.parametrize(
    "prior", [dist.HalfCauchy(1.0), dist.LogNormal(0.0, 1.0), dist.StudentT(3.0), dist.Poisson(2.0)]
)
def test_a_prior_without_a_conjugate_family_is_named(prior: Any) -> None:
    def model() -> None:
        pyro.sample("x", dist.Normal(0.0, 1.0))
        pyro.sample("odd", prior)

    with pytest.raises(ModelError, match=f"site 'odd' has the prior {type(prior).__name__}.*Gamma.*AutoGuideList"):
        made(model)


# The contract of Pyro's autoguides


def schools(y: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.Gamma(2.0, 2.0))
    with pyro.plate("school", len(y)):
        theta = pyro.sample("theta", dist.Normal(mu, tau.rsqrt()))
        pyro.sample("y", dist.Normal(theta, 1.0), obs=y)


Y = [2.0, -1.0, 0.5, 3.0]


@pytest.mark.parametrize("vectorized", [False, True])
@pytest.mark.parametrize("objective", [Trace_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO])
def test_objectives_and_plain_adam(objective: Any, vectorized: bool) -> None:
    """The ELBO rises, and every parameter stays where it makes a distribution."""
    y = torch.tensor(Y)
    guide = made(schools, y)
    svi = SVI(
        schools,
        guide,
        pyro.optim.Adam({"lr": 0.1}),
        objective(num_particles=4 if vectorized else 2, vectorize_particles=vectorized, max_plate_nesting=1),
    )
    losses = [svi.step(y) for _ in range(30)]
    assert sum(losses[-10:]) < sum(losses[:10])
    assert all(guide.factor(name).family.contains(guide.natural(name)).all() for name in guide.factors)


def test_all_priors_in_svi() -> None:
    guide = made(all_priors)
    svi = SVI(all_priors, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO(max_plate_nesting=2))
    for _ in range(3):
        svi.step()
    assert all(torch.isfinite(value).all() for value in guide.state_dict().values())


def test_predictive_and_draws() -> None:
    y = torch.tensor(Y)
    guide = made(schools, y)
    draws = Predictive(guide, num_samples=50, parallel=True)(y)
    assert {name: tuple(value.shape) for name, value in draws.items()} == {
        "mu": (50, 1),
        "tau": (50, 1),
        "theta": (50, 4),
    }
    predicted = Predictive(schools, guide=guide, num_samples=20)(y)
    assert predicted["theta"].shape == (20, 4)


def test_median_and_quantiles_are_those_of_draws() -> None:
    def model() -> None:
        tau = pyro.sample("tau", dist.Gamma(2.0, 1.0))
        pyro.sample("mu", dist.Normal(1.0, (0.5 * tau).rsqrt()))
        pyro.sample("p", dist.Beta(2.0, 3.0))
        pyro.sample("weights", dist.Dirichlet(torch.tensor([1.0, 2.0, 3.0])))
        pyro.sample("vector", dist.MultivariateNormal(torch.ones(2), torch.tensor([[2.0, 0.5], [0.5, 1.0]])))
        pyro.sample("rate", dist.Gamma(2.0, 3.0))
        pyro.sample("x", dist.Normal(1.0, 2.0))
        pyro.sample("variance", dist.InverseGamma(2.0, 3.0))
        pyro.sample("choice", dist.Categorical(torch.tensor([0.1, 0.2, 0.7])))
        pyro.sample("coin", dist.Bernoulli(0.2))

    guide = made(model)
    number = 10_000
    with pyro.plate("draws", number), torch.no_grad():
        draws = guide()
    quantiles = guide.quantiles([0.1, 0.5, 0.85])
    assert list(quantiles) == list(draws)
    for name, values in quantiles.items():
        for probability, value in zip((0.1, 0.5, 0.85), values, strict=True):
            below, upto = (draws[name] < value).double().mean(0), (draws[name] <= value).double().mean(0)
            error = 5 * (probability * (1 - probability) / number) ** 0.5
            assert (below <= probability + error).all()
            assert (upto >= probability - error).all()
    median = guide.median()
    for name in ("mu", "tau", "p", "vector", "rate", "x"):
        torch.testing.assert_close(median[name], quantiles[name][1])
    torch.testing.assert_close(median["weights"], torch.tensor([1.0, 2.0, 3.0]) / 6)
    assert (median["choice"], median["coin"]) == (2, 0)


def test_a_wishart_site_has_a_center_and_no_quantiles() -> None:
    def model() -> None:
        pyro.sample("precision", dist.Wishart(torch.tensor(4.0), 0.5 * torch.eye(2)))

    guide = made(model)
    torch.testing.assert_close(guide.median()["precision"], 2 * torch.eye(2))
    with pytest.raises(ModelError, match="Wishart site 'precision'"):
        guide.quantiles([0.5])


def test_state_goes_into_a_fresh_instance() -> None:
    guide = made(all_priors)
    with torch.no_grad():
        for value in guide.parameters():
            value.add_(0.1 * torch.randn(value.shape))
    buffer = io.BytesIO()
    torch.save(guide.state_dict(), buffer)
    buffer.seek(0)
    other = Conjugate(all_priors)
    other.load_state_dict(torch.load(buffer, weights_only=True))
    other()
    for name in guide.factors:
        torch.testing.assert_close(other.natural(name), guide.natural(name), rtol=0, atol=0)


def test_state_of_another_model_is_refused() -> None:
    guide = made(schools, torch.tensor(Y))
    other = Conjugate(schools)
    other.load_state_dict(guide.state_dict())
    with pytest.raises(ModelError, match=r"shapes .*'theta': \(4, 2\).* its model .*'theta': \(3, 2\)"):
        other(torch.zeros(3))


def test_copies() -> None:
    y = torch.tensor(Y)
    guide = made(schools, y)
    pickled = pickle.loads(pickle.dumps(guide))
    copied = copy.deepcopy(guide)
    for other in (pickled, copied):
        pyro.set_rng_seed(3)
        one = guide(y)
        pyro.set_rng_seed(3)
        two = other(y)
        assert all(torch.equal(one[name], two[name]) for name in one)
    assert copied.model is schools
    with torch.no_grad():
        next(copied.parameters()).add_(1.0)
    assert not torch.equal(next(copied.parameters()), next(guide.parameters()))


def test_in_a_list_with_other_guides() -> None:
    def model(y: Tensor) -> None:
        scale = pyro.sample("scale", dist.HalfCauchy(1.0))
        rate = pyro.sample("rate", dist.Gamma(2.0, 2.0))
        with pyro.plate("row", len(y)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(z + rate, scale), obs=y)

    y = torch.tensor(Y)
    guide = AutoGuideList(model)
    guide.append(AutoNormal(poutine.block(model, expose=["scale"])))
    guide.append(Conjugate(poutine.block(model, hide=["scale"])))
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.05}), Trace_ELBO())
    for _ in range(5):
        assert torch.isfinite(torch.tensor(svi.step(y)))
    assert set(guide.median(y)) == {"scale", "rate", "z"}
    assert set(guide(y)) == {"scale", "rate", "z"}


class Regression(PyroModule):
    def __init__(self) -> None:
        super().__init__()
        self.linear = PyroModule[nn.Linear](2, 1)
        self.linear.weight = PyroSample(dist.Normal(0.0, 1.0).expand([1, 2]).to_event(2))
        self.linear.bias = PyroSample(dist.Normal(0.0, 10.0).expand([1]).to_event(1))

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        mean = self.linear(x).squeeze(-1)
        with pyro.plate("row", len(x)):
            pyro.sample("y", dist.Normal(mean, 0.5), obs=y)
        return mean


def test_sites_of_nested_modules() -> None:
    x, y = torch.randn(20, 2), torch.randn(20)
    model = Regression()
    guide = made(model, x, y)
    assert set(guide(x)) == {"linear.weight", "linear.bias"}
    assert guide.natural("linear.weight").shape == (1, 2, 2)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.05}), Trace_ELBO())
    first = guide.natural("linear.weight")
    svi.step(x, y)
    assert (guide.natural("linear.weight") != first).any()
    other = Conjugate(model)
    other.load_state_dict(guide.state_dict())
    other(x, y)
    assert torch.equal(other.natural("linear.bias"), guide.natural("linear.bias"))


def local(y: Tensor) -> None:
    mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
    with pyro.plate("row", len(y), subsample_size=4) as index:
        z = pyro.sample("z", dist.Normal(mean, 1.0))
        pyro.sample("y", dist.Normal(z, 0.5), obs=y[index])


def test_rows_of_a_subsample() -> None:
    y = torch.randn(10)
    guide = made(local, y)
    assert guide.natural("z").shape == (10, 2)
    trace = poutine.trace(guide).get_trace(y)
    assert trace.nodes["z"]["value"].shape == (4,)
    before = guide.natural("z")
    svi = SVI(local, guide, pyro.optim.Adam({"lr": 0.1}), Trace_ELBO())
    svi.step(y)
    assert (guide.natural("z") != before).any(-1).sum() == 4
    for _ in range(20):
        svi.step(y)
    assert (guide.natural("z") != before).all()


def test_plates_that_are_given() -> None:
    def model(y: Tensor) -> None:
        mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        with pyro.plate("row", len(y), subsample_size=4) as index:
            z = pyro.sample("z", dist.Normal(mean, 1.0))
            pyro.sample("y", dist.Normal(z, 0.5), obs=y[index])

    def create_plates(y: Tensor) -> Any:
        return pyro.plate("row", len(y), subsample_size=4)

    y = torch.randn(10)
    guide = made(model, y, create_plates=create_plates)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.1}), Trace_ELBO())
    before = guide.natural("z")
    svi.step(y)
    assert (guide.natural("z") != before).any(-1).sum() == 4


# Choices


def mixture(y: Tensor) -> None:
    weights = pyro.sample("weights", dist.Dirichlet(torch.ones(2)))
    with pyro.plate("component", 2):
        locs = pyro.sample("locs", dist.Normal(0.0, 3.0))
    with pyro.plate("row", len(y)):
        kind = pyro.sample("kind", dist.Categorical(weights))
        pyro.sample("y", dist.Normal(locs[kind], 1.0), obs=y)


@pytest.mark.parametrize("hidden", [False, True])
def test_choices_are_enumerated_by_the_guide_or_by_the_model(hidden: bool) -> None:
    y = torch.cat([torch.randn(10) - 4, torch.randn(10) + 4])
    start = init_to_value(values={"locs": torch.tensor([-3.0, 3.0])}, fallback=init_to_prior)
    enumerated = config_enumerate(mixture)
    model = poutine.block(enumerated, hide=["kind"]) if hidden else enumerated
    guide = made(model, y, init_loc_fn=start)
    svi = SVI(enumerated, guide, pyro.optim.Adam({"lr": 0.2}), TraceEnum_ELBO(max_plate_nesting=1))
    for _ in range(80):
        svi.step(y)
    assert (guide.standard("locs")["loc"] - torch.tensor([-4.0, 4.0])).abs().max() < 1.5
    if not hidden:
        assert (guide.standard("kind")["logits"].argmax(-1) == torch.arange(20) // 10).all()


def test_choices_are_drawn_where_nothing_enumerates() -> None:
    y = torch.randn(5)
    guide = made(mixture, y)
    assert guide(y)["kind"].shape == (5,)
    SVI(mixture, guide, pyro.optim.Adam({"lr": 0.1}), Trace_ELBO()).step(y)


# Parameters


def test_natural_parameters_may_be_set() -> None:
    guide = made(schools, torch.tensor(Y))
    eta = guide.factor("tau").family.from_standard({"concentration": torch.tensor(7.0), "rate": torch.tensor(2.0)})
    guide.set_natural("tau", eta)
    torch.testing.assert_close(guide.standard("tau")["concentration"], torch.tensor(7.0))
    with pytest.raises(ArgumentError, match="'tau' that are none of a distribution"):
        guide.set_natural("tau", -eta)
    with pytest.raises(ArgumentError, match=r"'theta' have shape \(4, 2\), got \(2,\)"):
        guide.set_natural("theta", eta)
    with pytest.raises(ArgumentError, match="unknown site 'thet'"):
        guide.standard("thet")
    with pytest.raises(ArgumentError, match="has not been run yet"):
        Conjugate(schools).standard("mu")


def test_single_precision() -> None:
    torch.set_default_dtype(torch.float32)
    y = torch.tensor(Y, dtype=torch.float32)
    guide = made(schools, y)
    assert guide.natural("mu").dtype is torch.float32
    svi = SVI(schools, guide, pyro.optim.Adam({"lr": 0.1}), Trace_ELBO())
    assert torch.isfinite(torch.tensor(svi.step(y)))
