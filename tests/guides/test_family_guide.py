"""Laws of every guide over a family, and the contract of Pyro's autoguides."""

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
from pyro.infer.autoguide import (
    AutoDelta,
    AutoDiagonalNormal,
    AutoGuideList,
    init_to_feasible,
    init_to_mean,
    init_to_median,
    init_to_sample,
    init_to_uniform,
    init_to_value,
)
from pyro.infer.reparam import NeuTraReparam
from pyro.nn import PyroModule
from scipy import optimize, stats
from torch import Tensor
from torch.distributions import constraints, kl_divergence

import pyro_vi_lab as vl
from pyro_vi_lab.errors import ArgumentError, ModelError
from pyro_vi_lab.families import BlockDiagonal, Params
from pyro_vi_lab.guides import (
    FAMILY_GUIDES,
    FamilyGuide,
    FullRankStudentT,
    MeanFieldLaplace,
    MeanFieldStudentT,
    Mixture,
)
from pyro_vi_lab.guides.unconstrained_guide import DensityDelta

EPS = torch.finfo(torch.float64).eps
STANDARD_ERRORS = 5

MARGINALS = {MeanFieldStudentT: stats.t(5), FullRankStudentT: stats.t(5), MeanFieldLaplace: stats.laplace()}
each_guide = pytest.mark.parametrize("kind", FAMILY_GUIDES.values(), ids=FAMILY_GUIDES)


@pytest.fixture(autouse=True)
def double() -> None:
    torch.set_default_dtype(torch.float64)


# Models


def schools() -> None:
    """Hierarchical, with a plate and a constrained site."""
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("school", 4):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("y", dist.Normal(theta, 10.0), obs=torch.tensor([28.0, 8.0, -3.0, 7.0]))


def many_supports() -> None:
    pyro.sample("positive", dist.Gamma(2.0, 1.0))
    pyro.sample("unit", dist.Beta(2.0, 3.0))
    pyro.sample("interval", dist.Uniform(-1.0, 4.0))
    pyro.sample("simplex", dist.Dirichlet(torch.tensor([1.0, 2.0, 3.0])))
    pyro.sample("tril", dist.LKJCholesky(3, 1.5))
    pyro.sample("flat", dist.ImproperUniform(constraints.positive, (), ()))
    pyro.sample("ordered", dist.ImproperUniform(pyro.distributions.constraints.ordered_vector, (), (3,)))
    with pyro.plate("outer", 2, dim=-2), pyro.plate("inner", 3, dim=-1):
        pyro.sample("matrix", dist.Dirichlet(torch.ones(2)))


def improper() -> None:
    slope = pyro.sample("slope", dist.ImproperUniform(constraints.real, (), ()))
    sigma = pyro.sample("sigma", dist.ImproperUniform(constraints.positive, (), ()))
    with pyro.plate("row", 5):
        pyro.sample("y", dist.Normal(slope * torch.arange(5.0), sigma), obs=torch.tensor([0.1, 2.2, 3.7, 6.1, 8.3]))


def dependent() -> None:
    """As in a GARCH model: the second support ends where the first value leaves off."""
    a = pyro.sample("a", dist.Beta(1.0, 2.0))
    pyro.sample("b", dist.Uniform(0.0, 1.0 - a))


MODELS: dict[str, Callable[[], None]] = {
    "schools": schools,
    "many supports": many_supports,
    "improper": improper,
    "dependent": dependent,
}
each_model = pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)


def made(kind: type[FamilyGuide], model: Callable[..., None], seed: int = 0, size: float = 0.4) -> Any:
    """A guide with parameters that are not those of a fresh one; alone in the param store, which goes by names."""
    pyro.clear_param_store()
    guide = kind(model)
    guide()
    generator = torch.Generator().manual_seed(seed)
    params = guide.params
    loc = params.loc + size * torch.randn(params.loc.shape, generator=generator)
    parts = []
    for name, value in zip(guide.scale_constraints, guide.split_scale(params.scale), strict=True):
        noise = torch.randn(value.shape, generator=generator)
        if guide.scale_constraints[name] is constraints.positive:
            parts.append(value * (0.5 * noise).exp())
        elif name == "scale_tril":
            parts.append(value + 0.1 * noise.tril(-1) * inside(guide, value))
        else:
            parts.append(value + 0.1 * noise)
    guide.params = Params(loc, guide.join_scale(parts))
    return guide


def inside(guide: Any, tril: Tensor) -> Tensor:
    """One where a triangle holds coordinates of z, zero where a small block is filled up."""
    ones, scale = torch.ones(guide.latent_dim), guide.family.scale
    there = scale._split(ones) if isinstance(scale, BlockDiagonal) else ones
    return there.unsqueeze(-1) * there.unsqueeze(-2)


def latent_site(trace: Any) -> Any:
    (name,) = [name for name in trace.nodes if name.startswith("_") and name.endswith("_latent")]
    return trace.nodes[name]


# Draws and densities


@each_guide
@each_model
def test_a_draw_has_the_density_of_the_unconstrained_normal(kind: type[FamilyGuide], model: Callable[[], None]) -> None:
    """log p - log q of Pyro's traces is log p(z) - log q(z) on the unconstrained scale, and so are the values."""
    guide, density = made(kind, model), vl.Problem(model).density()
    for seed in range(3):
        pyro.set_rng_seed(seed)
        guide_trace = poutine.trace(guide).get_trace()
        model_trace = poutine.trace(poutine.replay(model, trace=guide_trace)).get_trace()
        latent = latent_site(guide_trace)
        z = latent["value"].detach()
        expected = density.log_prob(z) - guide.get_posterior().log_prob(z)
        found = model_trace.log_prob_sum() - guide_trace.log_prob_sum()
        torch.testing.assert_close(found.detach(), expected.detach(), rtol=1e-11, atol=1e-11)
        for name, value in density.constrain(z).items():
            torch.testing.assert_close(guide_trace.nodes[name]["value"].detach(), value, rtol=1e-12, atol=1e-12)


@each_guide
def test_dependent_support_has_the_density_of_its_formula(kind: type[FamilyGuide]) -> None:
    """a = s(u), b = (1 - a) s(v) with the logistic function s; Beta(1, 2) and the uniform make the density 2."""
    guide, density = made(kind, dependent), vl.Problem(dependent).density()
    for seed in range(5):
        pyro.set_rng_seed(seed)
        trace = poutine.trace(guide).get_trace()
        z = latent_site(trace)["value"].detach()
        a, b = (float(trace.nodes[name]["value"].detach()) for name in "ab")
        first, second = (float(x) for x in z.sigmoid())
        assert (a, b) == pytest.approx((first, (1 - first) * second), rel=1e-12)
        log_det = math.log(first * (1 - first)) + math.log((1 - first) * second * (1 - second))
        log_q = float(guide.get_posterior().log_prob(z).detach())
        assert float(trace.log_prob_sum().detach()) == pytest.approx(log_q - log_det, rel=1e-10)
        assert float(density.log_prob(z)) == pytest.approx(math.log(2) + log_det, rel=1e-10)


@each_guide
@each_model
def test_mean_field_elbo_keeps_the_change_of_variables(kind: type[FamilyGuide], model: Callable[[], None]) -> None:
    """KL(point ‖ prior) is what a draw of it says: both bounds agree on every draw."""
    guide, losses = made(kind, model), []
    for elbo in (Trace_ELBO(), TraceMeanField_ELBO()):
        pyro.set_rng_seed(3)
        losses.append(elbo.loss(model, guide))
    assert losses[0] == pytest.approx(losses[1], rel=1e-12)


@each_guide
def test_posterior_latent_and_transform_are_the_same_distribution(kind: type[FamilyGuide]) -> None:
    guide = made(kind, schools)
    z = torch.randn(10, guide.latent_dim)
    posterior = guide.get_posterior()
    transformed = dist.TransformedDistribution(guide.get_base_dist(), guide.get_transform())
    torch.testing.assert_close(transformed.log_prob(z), posterior.log_prob(z), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(guide.family.log_prob(guide.params, z), posterior.log_prob(z), rtol=1e-12, atol=1e-12)
    sample = torch.stack([guide.sample_latent() for _ in range(2000)]).detach()
    error = sample.std(0) / len(sample) ** 0.5
    assert ((sample.mean(0) - guide.loc).abs() <= STANDARD_ERRORS * error).all()
    squares = (sample - guide.loc.detach()).square()
    variance = guide.family.variance(guide.params)
    assert ((squares.mean(0) - variance).abs() <= STANDARD_ERRORS * squares.std(0) / len(sample) ** 0.5).all()


@each_guide
def test_parameters_are_registered_under_the_names_of_pyro(kind: type[FamilyGuide]) -> None:
    kind(schools)()
    name = kind.__name__
    assert set(pyro.get_param_store().keys()) == {f"{name}.{one}" for one in ("loc", *kind.scale_constraints)}


@each_guide
def test_params_are_a_copy(kind: type[FamilyGuide]) -> None:
    guide = made(kind, schools)
    before = guide.params
    before.loc.add_(1.0)
    before.scale.mul_(2.0)
    after = guide.params
    torch.testing.assert_close(after.loc + 1, before.loc)
    torch.testing.assert_close(after.scale * 2, before.scale)
    guide.params = before
    before.loc.zero_()
    torch.testing.assert_close(guide.params.loc, after.loc + 1)
    guide()
    # what Pyro's optimizers and the user's param store see is the new value
    torch.testing.assert_close(pyro.param(f"{kind.__name__}.loc").detach(), guide.params.loc)


@each_guide
def test_params_set_between_steps_of_svi_are_used(kind: type[FamilyGuide]) -> None:
    guide = made(kind, schools)
    svi = SVI(schools, guide, pyro.optim.Adam({"lr": 1e-3}), Trace_ELBO())
    svi.step()
    guide.params = moved = Params(guide.params.loc + 10, guide.params.scale * 2)
    svi.step()
    # Adam moves every number by its learning rate; a logarithm is a relative change
    assert 0 < (guide.params.loc - moved.loc).abs().max() <= 1e-3 * (1 + 1e-6)
    assert 0 < (guide.params.scale - moved.scale).abs().max() <= 1e-3 * max(1.0, float(moved.scale.abs().max())) * 1.01


# Start


@each_guide
def test_starts_at_the_origin(kind: type[FamilyGuide]) -> None:
    guide = kind(many_supports)
    guide()
    assert guide.loc.abs().max() < 10 * EPS
    torch.testing.assert_close(guide.get_posterior().variance.sqrt(), torch.full_like(guide.loc, 0.1))


@each_guide
@pytest.mark.parametrize(
    "init", [init_to_feasible, init_to_mean, init_to_median, init_to_sample, init_to_uniform], ids=lambda f: f.__name__
)
def test_init_functions_of_pyro(kind: type[FamilyGuide], init: Callable[..., Any]) -> None:
    pyro.set_rng_seed(1)
    guide = kind(schools, init_loc_fn=init)
    guide()
    pyro.set_rng_seed(1)
    with torch.no_grad(), poutine.block():
        trace = poutine.trace(pyro.infer.autoguide.initialization.InitMessenger(init)(schools)).get_trace()
    for name, value in guide.median().items():
        torch.testing.assert_close(value, trace.nodes[name]["value"])


@each_guide
def test_starts_where_it_is_told(kind: type[FamilyGuide]) -> None:
    values = {"mu": torch.tensor(3.0), "tau": torch.tensor(2.5), "theta": torch.arange(4.0)}
    guide = kind(schools, init_loc_fn=init_to_value(values=values), init_scale=0.7)
    guide()
    for name, value in guide.median().items():
        torch.testing.assert_close(value, values[name])
    torch.testing.assert_close(guide.get_posterior().variance.sqrt(), torch.full((6,), 0.7))


@each_guide
@pytest.mark.parametrize("size", [0, -1.0, math.nan, "0.1", None])
def test_init_scale_must_be_positive(kind: type[FamilyGuide], size: Any) -> None:
    with pytest.raises(ArgumentError, match="init_scale must be a positive number, got"):
        kind(schools, init_scale=size)


@each_guide
def test_dtype_of_the_model(kind: type[FamilyGuide]) -> None:
    def single() -> None:
        pyro.sample("x", dist.Normal(torch.zeros(2, dtype=torch.float32), 1.0).to_event(1))

    guide = kind(single)
    guide()
    assert {value.dtype for value in guide.parameters()} == {torch.float32}


# Summaries


def marginal_quantile(guide: Any, probability: float) -> Tensor:
    """Quantile of every coordinate of z, by SciPy."""
    params = guide.params
    if isinstance(guide, Mixture):
        weights, (locs, trils) = guide.family.split(params)
        parts = [stats.norm(m, s) for m, s in zip(locs.T.numpy(), trils.square().sum(-1).sqrt().T.numpy(), strict=True)]

        def excess(x: float, part: Any) -> float:
            return float(weights.exp().numpy() @ part.cdf(x)) - probability

        return torch.tensor([optimize.brentq(excess, -100, 100, args=(part,), xtol=1e-12) for part in parts])
    marginal = MARGINALS.get(type(guide), stats.norm())
    sd = guide.get_posterior().variance.sqrt().detach()
    return params.loc + sd * marginal.ppf(probability) / marginal.std()


@each_guide
def test_median_and_quantiles(kind: type[FamilyGuide]) -> None:
    guide = made(kind, schools)
    quantiles, median = guide.quantiles([0.05, 0.5, 0.95]), guide.median()
    for i, q in enumerate((0.05, 0.5, 0.95)):
        z = marginal_quantile(guide, q)
        expected = {"mu": z[0], "tau": z[1].exp(), "theta": z[2:]}
        for name, value in expected.items():
            torch.testing.assert_close(quantiles[name][i], value)
            if q == 0.5:
                torch.testing.assert_close(median[name], value)


@each_guide
def test_no_quantiles_of_a_dependent_support(kind: type[FamilyGuide]) -> None:
    guide = made(kind, dependent)
    with pytest.raises(ModelError, match="has no quantiles where the support of a site depends on other sites"):
        guide.quantiles([0.5])


@each_guide
def test_median_of_a_dependent_support(kind: type[FamilyGuide]) -> None:
    """Of the median of z, with the supports that belong to it."""
    guide = made(kind, dependent, size=2.0)
    first, second = marginal_quantile(guide, 0.5).sigmoid()
    median = guide.median()
    torch.testing.assert_close(median["a"], first)
    torch.testing.assert_close(median["b"], (1 - first) * second)


# Plates


@each_guide
def test_vectorized_particles(kind: type[FamilyGuide]) -> None:
    for model in (schools, many_supports, dependent):
        guide = made(kind, model)
        elbo = Trace_ELBO(num_particles=7, vectorize_particles=True, max_plate_nesting=2)
        traces = list(elbo._get_traces(model, guide, (), {}))
        ((model_trace, guide_trace),) = traces
        for name, node in guide_trace.nodes.items():
            if node["type"] == "sample" and not name.startswith("_"):
                assert node["value"].shape[0] == 7, name
                assert model_trace.nodes[name]["fn"].batch_shape == node["fn"].batch_shape, name
        density = vl.Problem(model).density()
        z = latent_site(guide_trace)["value"].reshape(7, -1)
        with torch.no_grad():
            expected = (density.log_prob(z) - guide.get_posterior().log_prob(z)).sum()
            found = model_trace.log_prob_sum() - guide_trace.log_prob_sum()
        assert float(found) == pytest.approx(float(expected), rel=1e-11)


def rows(y: Tensor, size: int | None = None) -> None:
    """Local latents in a plate that may be subsampled."""
    mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
    scale = pyro.sample("scale", dist.HalfNormal(1.0))
    with pyro.plate("row", 10, subsample_size=size) as index:
        pyro.sample("y", dist.Normal(mean, scale), obs=y[index])


@each_guide
def test_data_in_a_subsampled_plate(kind: type[FamilyGuide]) -> None:
    """The subsampled bound is unbiased for the bound of all rows."""
    y = torch.linspace(-1, 1, 10)
    guide = kind(rows)
    guide(y, 4)
    part = torch.tensor([Trace_ELBO().loss(rows, guide, y, 4) for _ in range(400)])
    whole = torch.tensor([Trace_ELBO().loss(rows, guide, y) for _ in range(400)])
    error = ((part.var() + whole.var()) / 400).sqrt()
    assert (part.mean() - whole.mean()).abs() <= STANDARD_ERRORS * error
    assert part.std() > whole.std()


def local(subsample: Tensor) -> None:
    with pyro.plate("row", 10, subsample=subsample):
        pyro.sample("x", dist.LogNormal(0.0, 1.0))


@each_guide
def test_create_plates(kind: type[FamilyGuide]) -> None:
    """A plate of the user's own, over which guide and model agree, alone or through the list that owns the guides."""

    def create_plates(subsample: Tensor) -> Any:
        return pyro.plate("row", 10, subsample=subsample)

    part = kind(local)
    guides: list[Any] = [AutoGuideList(local, create_plates=create_plates), kind(local, create_plates=create_plates)]
    guides[0].append(part)
    subsample = torch.tensor([1, 5, 7])
    for guide in guides:
        pyro.clear_param_store()
        if not kind.takes_rows:
            for _ in range(2):
                with pytest.raises(
                    ModelError, match=f"{kind.__name__} has one vector.*site 'x' in plate 'row'.*MeanFie"
                ):
                    guide(subsample)
            continue
        guide(subsample)
        trace = poutine.trace(guide).get_trace(torch.tensor([2, 3, 9]))
        assert trace.nodes["row"]["value"].tolist() == [2, 3, 9]
        assert trace.nodes["x"]["value"].shape == (3,)
        assert trace.nodes["x"]["scale"] == pytest.approx(10 / 3)
        assert math.isfinite(SVI(local, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO()).step(subsample))


@each_guide
def test_a_plate_that_is_seen_as_a_whole_may_be_a_part_for_others(kind: type[FamilyGuide]) -> None:
    """All rows of a plate with latent sites, given one by one, are no part of it."""
    guide = kind(local)
    trace = poutine.trace(guide).get_trace(torch.arange(10))
    assert trace.nodes["x"]["value"].shape == (10,)


# Together with the rest of Pyro


@each_guide
def test_guide_list(kind: type[FamilyGuide]) -> None:
    guide = AutoGuideList(schools)
    guide.append(kind(poutine.block(schools, expose=["mu", "tau"])))
    guide.append(AutoDelta(poutine.block(schools, expose=["theta"])))
    draw = guide()
    assert set(draw) == {"mu", "tau", "theta"}
    assert {name: value.shape for name, value in guide.median().items()} == {
        name: value.shape for name, value in draw.items()
    }
    assert guide[0].latent_dim == 2
    svi = SVI(schools, guide, pyro.optim.Adam({"lr": 0.02}), Trace_ELBO())
    before = [value.detach().clone() for value in guide.parameters()]
    assert math.isfinite(svi.step())
    assert not any(torch.equal(value, old) for value, old in zip(guide.parameters(), before, strict=True))


@each_guide
@pytest.mark.parametrize("parallel", [False, True])
def test_predictive(kind: type[FamilyGuide], parallel: bool) -> None:
    """Shapes are those that a guide of Pyro gives."""
    shapes = []
    for guide in (made(kind, schools), AutoDiagonalNormal(schools)):
        sites = ["mu", "tau", "theta", "y"]
        draws = Predictive(schools, guide=guide, num_samples=6, parallel=parallel, return_sites=sites)()
        assert (draws["tau"] > 0).all()
        shapes.append({name: value.shape for name, value in draws.items()})
    assert shapes[0] == shapes[1]
    assert shapes[0]["theta"] == (6, 4)


@each_guide
def test_posterior_predictive_of_the_guide_alone(kind: type[FamilyGuide]) -> None:
    guide = made(kind, dependent)
    draws = Predictive(guide, num_samples=50)()
    assert (draws["a"] + draws["b"] < 1).all()


@each_guide
def test_discrete_sites_are_enumerated(kind: type[FamilyGuide]) -> None:
    """The bound with the discrete site summed out is the marginal model's, draw by draw."""
    y = torch.tensor([-1.0, 0.3, 2.5, 2.2])

    @config_enumerate
    def mixture() -> None:
        weight = pyro.sample("weight", dist.Beta(2.0, 2.0))
        with pyro.plate("row", 4):
            component = pyro.sample("component", dist.Bernoulli(weight))
            pyro.sample("y", dist.Normal(3 * component, 1.0), obs=y)

    def marginal() -> None:
        weight = pyro.sample("weight", dist.Beta(2.0, 2.0))
        logits = torch.stack([torch.log1p(-weight), weight.log()])
        components = dist.Normal(torch.tensor([0.0, 3.0]), 1.0)
        with pyro.plate("row", 4):
            pyro.sample("y", dist.MixtureSameFamily(dist.Categorical(logits=logits), components), obs=y)

    guide = kind(poutine.block(mixture, hide=["component"]))
    guide()
    pyro.set_rng_seed(0)
    enumerated = TraceEnum_ELBO(max_plate_nesting=1).loss(mixture, guide)
    pyro.set_rng_seed(0)
    assert enumerated == pytest.approx(Trace_ELBO().loss(marginal, guide), rel=1e-12)


@each_guide
def test_inside_a_module(kind: type[FamilyGuide]) -> None:
    class Outer(PyroModule):
        def __init__(self) -> None:
            super().__init__()
            self.inner = kind(schools)

        def forward(self) -> Any:
            return self.inner()

    guide = Outer()
    guide()
    assert set(pyro.get_param_store().keys()) == {f"inner.{one}" for one in ("loc", *kind.scale_constraints)}
    svi = SVI(schools, guide, vl.NaturalGradient(guide), vl.ELBO(num_particles=8))
    before = guide.inner.params.loc
    assert math.isfinite(svi.step())
    assert not torch.equal(guide.inner.params.loc, before)


@each_guide
def test_neutra(kind: type[FamilyGuide]) -> None:
    """The model in the guide's coordinates has the density that the change of variables says."""
    guide = made(kind, schools)
    neutra = NeuTraReparam(guide)
    model = neutra.reparam(schools)
    trace = poutine.trace(model).get_trace()
    (shared,) = [name for name in trace.nodes if name.endswith("_shared_latent")]
    eps = trace.nodes[shared]["value"].detach()
    transform = guide.get_transform()
    z = transform(eps)
    expected = vl.Problem(schools).density().log_prob(z) + transform.log_abs_det_jacobian(eps, z)
    torch.testing.assert_close(trace.log_prob_sum().detach(), expected.detach(), rtol=1e-11, atol=1e-11)


@each_guide
def test_masked_run_has_no_density(kind: type[FamilyGuide]) -> None:
    guide = made(kind, schools)
    with poutine.mask(mask=False):
        trace = poutine.trace(guide).get_trace()
    assert float(trace.log_prob_sum()) == 0.0


# Copies


@each_guide
@pytest.mark.parametrize("model", [schools, dependent], ids=["schools", "dependent"])
def test_copies_draw_the_same(kind: type[FamilyGuide], model: Callable[[], None]) -> None:
    guide = made(kind, model)

    def drawn(one: Any) -> dict[str, Tensor]:
        pyro.clear_param_store()
        pyro.set_rng_seed(5)
        return dict(one())

    expected = drawn(guide)
    file = io.BytesIO()
    torch.save(guide, file)
    file.seek(0)
    pickled = [pickle.loads(pickle.dumps(guide)), torch.load(file, weights_only=False)]
    for other in (copy.deepcopy(guide), guide, *pickled):
        if model is dependent and other in pickled:
            with pytest.raises(ModelError, match="was pickled, which leaves out its model"):
                other()
            continue
        found = drawn(other)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)


@each_guide
def test_deep_copy_is_independent(kind: type[FamilyGuide]) -> None:
    guide = made(kind, schools)
    before, copied = guide.params, copy.deepcopy(guide)
    with torch.no_grad():
        copied.loc.add_(1.0)
    assert torch.equal(guide.params.loc, before.loc)


@each_guide
def test_state_dict_of_a_run_guide(kind: type[FamilyGuide]) -> None:
    guide, other = made(kind, schools), kind(schools)
    other()
    other.load_state_dict(guide.state_dict())
    assert torch.equal(other.params.loc, guide.params.loc)
    assert torch.equal(other.params.scale, guide.params.scale)


@each_guide
def test_state_dict_of_a_fresh_guide(kind: type[FamilyGuide]) -> None:
    """It is loaded before the guide has seen its model, alone or as a part of another module."""
    guide, other = made(kind, schools), kind(schools)
    other.load_state_dict(guide.state_dict())
    other()
    assert torch.equal(other.params.loc, guide.params.loc)
    assert torch.equal(other.params.scale, guide.params.scale)
    holder = torch.nn.Sequential(kind(schools))
    holder.load_state_dict({f"0.{key}": value for key, value in guide.state_dict().items()})
    fit = vl.fit(vl.Problem(schools), holder[0], max_steps=1, progress=False)
    pyro.clear_param_store()
    again = vl.fit(vl.Problem(schools), guide, max_steps=1, progress=False)
    assert fit.history["negative_elbo"].tolist() == again.history["negative_elbo"].tolist()


@each_guide
def test_state_of_another_model(kind: type[FamilyGuide]) -> None:
    guide, other = made(kind, schools), kind(dependent)
    other.load_state_dict(guide.state_dict())
    with pytest.raises(ModelError, match=f"{kind.__name__} was loaded from has 6 latent dimensions, its model has 2"):
        other()


# What it cannot take


@each_guide
def test_discrete_site_is_named(kind: type[FamilyGuide]) -> None:
    def model() -> None:
        k = pyro.sample("count", dist.Poisson(2.0))
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(k * x, 1.0), obs=torch.tensor(1.0))

    with pytest.raises((ValueError, NotImplementedError), match="count"):
        kind(model)()


@each_guide
def test_model_without_latents(kind: type[FamilyGuide]) -> None:
    def model() -> None:
        pyro.sample("y", dist.Normal(0.0, 1.0), obs=torch.tensor(1.0))

    with pytest.raises(RuntimeError, match=f"{kind.__name__} found no latent variables"):
        kind(model)()


@each_guide
def test_sequential_plate(kind: type[FamilyGuide]) -> None:
    def model() -> None:
        for i in pyro.plate("row", 3):
            pyro.sample(f"x_{i}", dist.Normal(0.0, 1.0))

    with pytest.raises(NotImplementedError, match=r"sequential pyro\.plate"):
        kind(model)()


# DensityDelta


def test_kl_of_a_point_with_a_density() -> None:
    point = DensityDelta(torch.tensor([0.5, 2.0]), log_density=torch.tensor([0.3, -1.2]))
    prior = dist.Gamma(2.0, 3.0)
    expected = point.log_density - prior.log_prob(point.v)
    torch.testing.assert_close(kl_divergence(point, prior), expected)
    # a plate expands, a mask wraps
    wide = point.expand([3, 2])
    torch.testing.assert_close(kl_divergence(wide, prior.expand([3, 2])), expected.expand(3, 2))
    mask = torch.tensor([True, False])
    torch.testing.assert_close(kl_divergence(point.mask(mask), prior.mask(mask)), expected * mask)


def test_kl_to_a_distribution_of_vectors() -> None:
    v = torch.tensor([0.2, 0.3, 0.5])
    point = DensityDelta(v, log_density=torch.tensor(0.7), event_dim=1)
    prior = dist.Dirichlet(torch.tensor([1.0, 2.0, 3.0]))
    torch.testing.assert_close(kl_divergence(point, prior), 0.7 - prior.log_prob(v))
    normal = dist.Normal(torch.zeros(3), 1.0).to_event(1)
    torch.testing.assert_close(kl_divergence(point, normal), 0.7 - normal.log_prob(v))


def test_other_points_keep_the_rule_of_pyro() -> None:
    point = dist.Delta(torch.tensor(0.5), log_density=torch.tensor(0.3))
    prior = dist.Gamma(2.0, 3.0)
    torch.testing.assert_close(kl_divergence(point, prior), -prior.log_prob(torch.tensor(0.5)))
