"""Points as guides: the contract of Pyro's autoguides, and what the bound is."""

from __future__ import annotations

import copy
import io
import math
import pickle
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Predictive, Trace_ELBO, TraceEnum_ELBO, TraceMeanField_ELBO, config_enumerate
from pyro.infer.autoguide import AutoDelta, AutoGuideList, AutoLaplaceApproximation, AutoNormal, init_to_value
from pyro.nn import PyroModule
from torch import Tensor
from torch.distributions import constraints

import pyro_vi_lab as vl
from pyro_vi_lab.errors import FitError, ModelError
from pyro_vi_lab.guides import MAP, MLE, POINT_GUIDES, LaplaceApproximation, PointGuide
from pyro_vi_lab.guides.laplace import covariance_root
from tests.guides.test_family_guide import MODELS, dependent, schools

each_point = pytest.mark.parametrize("kind", POINT_GUIDES.values(), ids=POINT_GUIDES)
each_model = pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
PARTS: dict[type[PointGuide], Any] = {LaplaceApproximation: "joint", MAP: "constrained", MLE: "likelihood"}


@pytest.fixture(autouse=True)
def double() -> None:
    torch.set_default_dtype(torch.float64)


def made(kind: type[PointGuide], model: Callable[..., Any], seed: int = 0) -> Any:
    pyro.clear_param_store()  # which goes by names
    guide = kind(model)
    guide()
    with torch.no_grad():
        guide.loc.add_(0.4 * torch.randn(guide.loc.shape, generator=torch.Generator().manual_seed(seed)))
    return guide


@each_point
@each_model
@pytest.mark.parametrize("elbo", [Trace_ELBO, TraceMeanField_ELBO])
def test_bound_is_the_density_whose_mode_it_looks_for(
    kind: type[PointGuide], model: Callable[[], None], elbo: type[Trace_ELBO]
) -> None:
    guide = made(kind, model)
    density = vl.Problem(model).density().of_part(PARTS[kind])
    value, grad = density.value_and_grad(guide.loc.detach())
    loss = elbo().differentiable_loss(model, guide)
    torch.testing.assert_close(-loss.detach(), value, rtol=1e-11, atol=1e-11)
    (found,) = torch.autograd.grad(loss, guide.loc)
    torch.testing.assert_close(-found, grad, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("model", [schools, MODELS["improper"]])
def test_densities_differ_by_their_terms(model: Callable[[], None]) -> None:
    """joint = constrained + log det, and constrained = likelihood + prior, from a trace of the model."""
    density = vl.Problem(model).density()
    z = torch.randn(density.dim, generator=torch.Generator().manual_seed(1))
    values = density.constrain(z)
    trace = poutine.trace(poutine.condition(model, data=values)).get_trace()
    trace.compute_log_prob()
    likelihood = trace.nodes["y"]["log_prob_sum"]
    torch.testing.assert_close(density.of_part("likelihood").log_prob(z), likelihood)
    torch.testing.assert_close(density.of_part("constrained").log_prob(z), trace.log_prob_sum())
    log_det = z[1]  # of the exponential
    torch.testing.assert_close(density.log_prob(z), trace.log_prob_sum() + log_det)


def test_map_agrees_with_auto_delta() -> None:
    values = {"mu": torch.tensor(3.0), "tau": torch.tensor(2.5), "theta": torch.arange(4.0)}
    losses = [
        Trace_ELBO().loss(schools, kind(schools, init_loc_fn=init_to_value(values=values))) for kind in (MAP, AutoDelta)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-12)


def test_laplace_agrees_with_pyro() -> None:
    def model() -> None:
        pyro.sample("rate", dist.Gamma(5.0, 2.0))
        pyro.sample("x", dist.Normal(torch.zeros(2), torch.tensor([1.0, 3.0])).to_event(1))

    mode = {"rate": torch.tensor(2.5), "x": torch.zeros(2)}
    ours = LaplaceApproximation(model, init_loc_fn=init_to_value(values=mode))
    pyros = AutoLaplaceApproximation(model, init_loc_fn=init_to_value(values=mode))
    ours(), pyros()
    one, two = ours.laplace_approximation(), pyros.laplace_approximation()
    torch.testing.assert_close(one.loc.detach(), two.loc)
    # the logarithm of a Gamma(5, ·) variable has the curvature -5 at its mode
    expected = torch.diag(torch.tensor([0.2, 1.0, 9.0]))
    torch.testing.assert_close(one.get_posterior().covariance_matrix.detach(), expected)


def test_no_normal_where_the_density_is_not_concave() -> None:
    def saddle() -> None:
        x = pyro.sample("x", dist.ImproperUniform(constraints.real_vector, (), (2,)))
        pyro.factor("saddle", x[0] ** 2 - x[1] ** 2)

    guide = LaplaceApproximation(saddle)
    guide()
    with pytest.raises(FitError, match="not concave at the present point"):
        guide.laplace_approximation()
    with pytest.raises(ModelError, match="is the mode alone"):
        guide.quantiles([0.5])


@each_point
def test_svi_reaches_the_mode(kind: type[PointGuide]) -> None:
    y = torch.tensor([0.3, -1.2, 2.5, 0.9, 1.4])

    def model() -> None:
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
        with pyro.plate("row", 5):
            pyro.sample("y", dist.Normal(loc, scale), obs=y)

    guide = kind(model)
    svi = SVI(model, guide, pyro.optim.ClippedAdam({"lr": 0.05, "lrd": 0.99}), Trace_ELBO())
    for _ in range(500):
        svi.step()
    density = vl.Problem(model).density().of_part(PARTS[kind])
    assert density.value_and_grad(guide.loc.detach())[1].abs().max() < 0.02
    if kind is MLE:
        assert float(guide.median()["scale"]) == pytest.approx(float(y.std(correction=0)), abs=0.01)


def test_masked_prior_stays_out_of_the_likelihood_once() -> None:
    def model() -> None:
        with poutine.mask(mask=torch.tensor([True, False])), pyro.plate("two", 2):
            x = pyro.sample("x", dist.Normal(1.0, 2.0))
        pyro.sample("y", dist.Normal(x.sum(), 1.0), obs=torch.tensor(0.5))

    guide = made(MLE, model)
    x = guide.median()["x"]
    expected = dist.Normal(x.sum(), 1.0).log_prob(torch.tensor(0.5))
    assert -Trace_ELBO().loss(model, guide) == pytest.approx(float(expected))


def local(subsample: Tensor | None = None, size: int | None = None) -> None:
    with pyro.plate("row", 10, subsample=subsample, subsample_size=size) as index:
        x = pyro.sample("x", dist.LogNormal(0.0, 1.0))
        pyro.sample("y", dist.Normal(x, 1.0), obs=torch.linspace(1, 3, 10)[index])


@each_point
def test_local_sites_of_a_subsample(kind: type[PointGuide]) -> None:
    """A call sees the values of its rows, scaled, and trains no others."""

    def create_plates(subsample: Tensor) -> Any:
        return pyro.plate("row", 10, subsample=subsample)

    guide = kind(local, create_plates=create_plates)
    subsample = torch.tensor([2, 3, 9])
    guide(torch.tensor([1, 5, 7]))
    assert guide.loc.shape == (10,)
    with torch.no_grad():
        guide.loc.copy_(torch.arange(10.0) / 10)
    trace = poutine.trace(guide).get_trace(subsample)
    torch.testing.assert_close(trace.nodes["x"]["value"], (subsample / 10).exp())
    assert trace.nodes["x"]["scale"] == pytest.approx(10 / 3)
    loss = Trace_ELBO().differentiable_loss(local, guide, subsample)
    (grad,) = torch.autograd.grad(loss, guide.loc)
    assert grad.nonzero().flatten().tolist() == subsample.tolist()
    assert math.isfinite(SVI(local, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO()).step(subsample))
    listed = AutoGuideList(local, create_plates=create_plates)
    listed.append(kind(local))
    assert listed(subsample)["x"].shape == (3,)


@each_point
def test_subsample_that_pyro_draws(kind: type[PointGuide]) -> None:
    guide = kind(local)
    losses = torch.tensor([Trace_ELBO().loss(local, guide, None, 4) for _ in range(300)])
    whole = Trace_ELBO().loss(local, guide)
    assert abs(losses.mean() - whole) <= 5 * losses.std() / 300**0.5


@each_point
def test_guide_list_module_and_predictive(kind: type[PointGuide]) -> None:
    class Outer(PyroModule):
        def __init__(self) -> None:
            super().__init__()
            self.inner = kind(schools)

        def forward(self) -> Any:
            return self.inner()

    outer = Outer()
    outer()
    assert set(pyro.get_param_store().keys()) == {"inner.loc"}
    pyro.clear_param_store()
    guide = AutoGuideList(schools)
    guide.append(kind(poutine.block(schools, expose=["mu", "tau"])))
    guide.append(AutoNormal(poutine.block(schools, expose=["theta"])))
    assert set(guide()) == {"mu", "tau", "theta"} == set(guide.median())
    svi = SVI(schools, guide, pyro.optim.Adam({"lr": 0.02}), Trace_ELBO())
    before = guide[0].loc.detach().clone()
    assert math.isfinite(svi.step())
    assert not torch.equal(guide[0].loc, before)
    point = made(kind, schools)
    for parallel in (False, True):
        draws = Predictive(schools, guide=point, num_samples=6, parallel=parallel, return_sites=["tau", "theta", "y"])()
        assert draws["theta"].shape == (6, 4)
        torch.testing.assert_close(draws["theta"], point.median()["theta"].expand(6, 4))


@each_point
def test_vectorized_particles(kind: type[PointGuide]) -> None:
    for model in (schools, dependent):
        guide = made(kind, model)
        elbo = Trace_ELBO(num_particles=7, vectorize_particles=True, max_plate_nesting=2)
        assert elbo.loss(model, guide) == pytest.approx(Trace_ELBO().loss(model, guide), rel=1e-12)


@each_point
@pytest.mark.parametrize("model", [schools, dependent])
def test_copies_give_the_same(kind: type[PointGuide], model: Callable[[], None]) -> None:
    guide = made(kind, model)
    expected = dict(guide())
    file = io.BytesIO()
    torch.save(guide, file)
    file.seek(0)
    pickled = [pickle.loads(pickle.dumps(guide)), torch.load(file, weights_only=False)]
    for other in (copy.deepcopy(guide), guide.twin(), *pickled):
        pyro.clear_param_store()
        if other in pickled and model is dependent:
            with pytest.raises(ModelError, match="was pickled, which leaves out its model"):
                other()
            continue
        found = other()
        assert all(torch.equal(found[name], expected[name]) for name in expected)
        with torch.no_grad():
            other.loc.add_(1.0)
    assert torch.equal(guide()["mu" if model is schools else "a"], expected["mu" if model is schools else "a"])


def test_likelihood_of_a_pickled_guide() -> None:
    other = pickle.loads(pickle.dumps(made(MLE, schools)))
    for elbo in (Trace_ELBO(), TraceMeanField_ELBO()):
        # Pyro wraps what is raised in a log_prob
        with pytest.raises(ValueError, match="this MLE was pickled, which leaves out its model"):
            elbo.loss(schools, other)


@each_point
def test_state_dict_of_a_fresh_guide(kind: type[PointGuide]) -> None:
    guide, file = made(kind, schools), io.BytesIO()
    torch.save(guide.state_dict(), file)
    file.seek(0)
    holder = torch.nn.Sequential(kind(schools))
    holder.load_state_dict({f"0.{key}": value for key, value in torch.load(file, weights_only=True).items()})
    pyro.clear_param_store()
    found, expected = holder[0](), guide.median()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    other = kind(dependent)
    other.load_state_dict(guide.state_dict())
    with pytest.raises(ModelError, match="was loaded from has 6 latent dimensions, its model has 2"):
        other()


@pytest.mark.parametrize("kind", [MAP, MLE])
def test_quantiles_are_the_point(kind: type[PointGuide]) -> None:
    guide = made(kind, schools)
    quantiles, median = guide.quantiles([0.05, 0.95]), guide.median()
    for name, value in median.items():
        assert torch.equal(quantiles[name], torch.stack([value, value]))


@each_point
def test_discrete_sites_are_enumerated(kind: type[PointGuide]) -> None:
    y = torch.tensor([-1.0, 0.3, 2.5, 2.2])

    @config_enumerate
    def mixture() -> None:
        weight = pyro.sample("weight", dist.Beta(2.0, 2.0))
        with pyro.plate("row", 4):
            component = pyro.sample("component", dist.Bernoulli(weight))
            pyro.sample("y", dist.Normal(3 * component, 1.0), obs=y)

    guide = made(kind, poutine.block(mixture, hide=["component"]))
    density = vl.Problem(mixture).density().of_part(PARTS[kind])
    found = TraceEnum_ELBO(max_plate_nesting=1).loss(mixture, guide)
    assert -found == pytest.approx(float(density.log_prob(guide.loc.detach())), rel=1e-12)


def test_covariance_root() -> None:
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(5, 5, generator=generator)
    scales = torch.tensor([1e-8, 1e-3, 1.0, 1e4, 1e7])
    precision = scales.unsqueeze(-1) * (a @ a.mT + torch.eye(5)) * scales
    root = covariance_root(precision)
    assert root is not None
    unit = scales.unsqueeze(-1) * (root @ root.mT) * scales
    torch.testing.assert_close((a @ a.mT + torch.eye(5)) @ unit, torch.eye(5), rtol=0, atol=1e-12)
    assert (root.triu(1) == 0).all()
    assert (root.diagonal() > 0).all()
    assert covariance_root(torch.tensor([[1.0, 1.0], [1.0, 1.0]])) is None
    assert covariance_root(torch.tensor([[1.0, 2.0], [2.0, 1.0]])) is None
