from __future__ import annotations

import math
import pickle
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoDiagonalNormal, AutoGuideList, init_to_value
from torch import Tensor
from torch.distributions import constraints

import pyro_vi_lab as vl
from pyro_vi_lab.errors import ModelError
from pyro_vi_lab.families import Params
from pyro_vi_lab.guides import GUIDES, MeanFieldNormal


def model() -> None:
    pyro.sample("x", dist.Normal(torch.zeros(2, dtype=torch.float64), 1.0).to_event(1))
    pyro.sample("y", dist.LogNormal(torch.zeros(2, dtype=torch.float64), 1.0).to_event(1))


def made() -> MeanFieldNormal:
    guide = MeanFieldNormal(model)
    guide()
    loc = torch.tensor([1.0, -2.0, 0.5, 3.0], dtype=torch.float64)
    guide.params = Params(loc, torch.tensor([0.1, 2.0, 0.7, 1.5], dtype=torch.float64))
    return guide


def test_name() -> None:
    assert GUIDES["mean_field"] is MeanFieldNormal


def test_posterior_is_a_product_of_normals() -> None:
    posterior = made().get_posterior()
    assert posterior.event_shape == (4,)
    torch.testing.assert_close(posterior.mean, torch.tensor([1.0, -2.0, 0.5, 3.0], dtype=torch.float64))
    torch.testing.assert_close(posterior.variance.sqrt(), torch.tensor([0.1, 2.0, 0.7, 1.5], dtype=torch.float64))
    assert type(posterior.base_dist) is dist.Normal


def test_scale_is_positive_by_construction() -> None:
    guide = made()
    assert MeanFieldNormal.scale_constraints == {"scale": constraints.positive}
    with torch.no_grad():
        for leaf in guide.parameters():
            leaf.sub_(100)
    assert (guide.scale > 0).all()


def test_draws_and_quantiles_are_those_of_the_guide_of_pyro() -> None:
    """With the same parameters and the same seed."""
    ours, theirs = made(), AutoDiagonalNormal(model)
    theirs()
    theirs.loc.data.copy_(ours.params.loc)
    theirs.scale = ours.params.scale
    draws = []
    for guide in (ours, theirs):
        pyro.set_rng_seed(0)
        draws.append({name: value.detach() for name, value in guide().items()})
    assert draws[0].keys() == draws[1].keys()
    for name, value in draws[0].items():
        torch.testing.assert_close(value, draws[1][name])
        torch.testing.assert_close(ours.quantiles([0.1, 0.9])[name], theirs.quantiles([0.1, 0.9])[name])


# Some of the rows, in plain SVI

N = 8


@pytest.fixture
def double() -> None:
    torch.set_default_dtype(torch.float64)


def drawing(y: Tensor, size: int | None = 3) -> None:
    """The model's plate draws the rows."""
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("row", N, subsample_size=size) as index:
        p = pyro.sample("p", dist.Dirichlet(torch.ones(3)))
        z = pyro.sample("z", dist.LogNormal(mu, 1.0))
        pyro.sample("y", dist.Normal(z + p[..., 0], 1.0), obs=y[index])


def told(y: Tensor, index: Tensor) -> None:
    """The model is told the rows."""
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("row", N, subsample=index):
        p = pyro.sample("p", dist.Dirichlet(torch.ones(3)))
        z = pyro.sample("z", dist.LogNormal(mu, 1.0))
        pyro.sample("y", dist.Normal(z + p[..., 0], 1.0), obs=y[index])


def bounded(y: Tensor, index: Tensor) -> None:
    """Each row has a support of its own."""
    upper = pyro.sample("upper", dist.LogNormal(0.0, 1.0))
    with pyro.plate("row", N, subsample=index):
        lower = -1.0 - torch.arange(float(N))[index]
        pyro.sample("z", dist.Uniform(lower, upper))


def entries(guide: Any, name: str) -> Tensor:
    """Gradient of the locations of one site, by row."""
    position = 0
    for site, shape in guide._unconstrained_shapes.items():
        if site == name:
            gradient: Tensor = guide.loc.grad[position : position + shape.numel()].reshape(shape)
            return gradient
        position += shape.numel()
    raise KeyError(name)


DATA = torch.linspace(-1.0, 2.0, N, dtype=torch.float64)


@pytest.mark.usefixtures("double")
def test_it_has_parameters_for_all_rows() -> None:
    guide: Any = MeanFieldNormal(drawing)
    guide(DATA)
    assert guide.latent_dim == 1 + 2 * N + N
    assert guide.loc.shape == guide.scale.shape == (1 + 3 * N,)
    assert {name: tuple(value.shape) for name, value in guide.median().items()} == {"mu": (), "p": (N, 3), "z": (N,)}
    assert tuple(guide.quantiles([0.1, 0.9])["z"].shape) == (2, N)


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("elbo", [Trace_ELBO, TraceMeanField_ELBO, vl.ELBO], ids=lambda kind: kind.__name__)
def test_model_and_guide_see_the_rows_that_the_model_was_told(elbo: Callable[[], Any]) -> None:
    """As many as it is told in each call; Pyro's guides draw others (issue 3468 of Pyro)."""
    guide: Any = MeanFieldNormal(told)
    guide(DATA, torch.tensor([0, 1, 2]))
    for index in (torch.tensor([3, 1, 6]), torch.tensor([7]), torch.arange(N), torch.tensor([5, 4])):
        guide.zero_grad(set_to_none=True)
        elbo().loss_and_grads(told, guide, DATA, index)
        for name in ("p", "z"):
            rows = entries(guide, name).reshape(N, -1).abs().sum(1).nonzero()[:, 0]
            assert rows.tolist() == sorted(index.tolist())
        drawn = poutine.trace(guide).get_trace(DATA, index)
        seen = poutine.trace(poutine.replay(told, trace=drawn)).get_trace(DATA, index)
        assert seen.nodes["row"]["value"].tolist() == index.tolist()


@pytest.mark.usefixtures("double")
def test_a_plate_that_draws_its_rows_draws_the_same_for_both() -> None:
    guide: Any = MeanFieldNormal(drawing)
    guide(DATA)
    for size in (3, 5, None, 1):
        guide.zero_grad(set_to_none=True)
        drawn = poutine.trace(guide).get_trace(DATA, size)
        seen = poutine.trace(poutine.replay(drawing, trace=drawn)).get_trace(DATA, size)
        drawn.log_prob_sum().backward()
        rows = drawn.nodes["row"]["value"]
        assert len(rows) == (size or N)
        assert seen.nodes["row"]["value"].tolist() == rows.tolist()
        assert entries(guide, "z").nonzero()[:, 0].tolist() == rows.sort().values.tolist()


@pytest.mark.usefixtures("double")
def test_the_bound_of_some_rows_is_unbiased_for_that_of_all() -> None:
    guide: Any = MeanFieldNormal(told)
    guide(DATA, torch.arange(3))
    generator = torch.Generator().manual_seed(1)
    loc = torch.randn(guide.latent_dim, generator=generator)
    guide.params = Params(loc, torch.rand(guide.latent_dim, generator=generator) + 0.1)
    part = torch.tensor([Trace_ELBO().loss(told, guide, DATA, torch.randperm(N)[:3]) for _ in range(250)])
    whole = torch.tensor([Trace_ELBO().loss(told, guide, DATA, torch.arange(N)) for _ in range(100)])
    error = (part.var() / len(part) + whole.var() / len(whole)).sqrt()
    assert (part.mean() - whole.mean()).abs() <= 5 * error


@pytest.mark.usefixtures("double")
def test_a_draw_of_some_rows_is_that_of_all_at_these_rows() -> None:
    """Moments by row: every row has its own location and scale."""
    guide: Any = MeanFieldNormal(told)
    guide(DATA, torch.arange(3))
    loc, scale = torch.arange(guide.latent_dim) / 10.0, torch.full((guide.latent_dim,), 1e-9)
    guide.params = Params(loc, scale)
    index = torch.tensor([6, 2])
    draw, median = guide(DATA, index), guide.median()
    torch.testing.assert_close(draw["mu"], median["mu"])
    for name in ("p", "z"):
        torch.testing.assert_close(draw[name], median[name][index])


@pytest.mark.usefixtures("double")
def test_rows_with_supports_of_their_own() -> None:
    guide: Any = MeanFieldNormal(bounded)
    guide(DATA, torch.tensor([0, 1]))
    for index in (torch.tensor([7, 3]), torch.tensor([5])):
        trace = poutine.trace(guide).get_trace(DATA, index)
        joint = poutine.trace(poutine.replay(bounded, trace=trace)).get_trace(DATA, index)
        assert math.isfinite(joint.log_prob_sum().detach())
        latent = trace.nodes["z_unconstrained"]
        lower, upper = -1.0 - index.double(), trace.nodes["upper"]["value"]
        expected = lower + (upper - lower) * latent["value"].sigmoid()
        torch.testing.assert_close(trace.nodes["z"]["value"], expected)


@pytest.mark.usefixtures("double")
def test_several_plates() -> None:
    """One of them seen in part, at the left or at the right, and both."""

    def model(i: Tensor, j: Tensor) -> None:
        rows, columns = pyro.plate("row", 5, dim=-2, subsample=i), pyro.plate("column", 4, dim=-1, subsample=j)
        with rows:
            pyro.sample("a", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        with rows, columns:
            pyro.sample("x", dist.Normal(0.0, 1.0))

    for i, j in (([1, 4], [0, 1, 2, 3]), ([0, 1, 2, 3, 4], [3]), ([0, 2], [1, 2])):
        pyro.clear_param_store()
        guide: Any = MeanFieldNormal(model)
        one, two = torch.tensor(i), torch.tensor(j)
        guide(one, two)
        if len(i) < 5:
            assert guide.latent_dim == 5 * 2 + 5 * 4
        elbo = Trace_ELBO()
        elbo.loss_and_grads(model, guide, one, two)
        assert entries(guide, "x").nonzero().tolist() == [[a, b] for a in i for b in j]
        trace = poutine.trace(guide).get_trace(one, two)
        assert trace.nodes["a"]["value"].shape == (len(i), 1, 2)
        assert trace.nodes["x"]["scale"] == pytest.approx(5 / len(i) * 4 / len(j))


@pytest.mark.usefixtures("double")
def test_only_sites_by_row() -> None:
    def model(index: Tensor) -> None:
        with pyro.plate("row", N, subsample=index):
            pyro.sample("x", dist.Normal(0.0, 1.0))

    guide: Any = MeanFieldNormal(model)
    trace = poutine.trace(guide).get_trace(torch.tensor([1, 2]))
    assert "x_unconstrained" in trace.nodes
    assert guide.latent_dim == N


@pytest.mark.usefixtures("double")
def test_vectorized_particles_of_some_rows() -> None:
    guide: Any = MeanFieldNormal(told)
    index = torch.tensor([6, 2, 3])
    guide(DATA, index)
    elbo = Trace_ELBO(num_particles=5, vectorize_particles=True, max_plate_nesting=1)
    ((joint, drawn),) = elbo._get_traces(told, guide, (DATA, index), {})
    assert drawn.nodes["mu"]["value"].shape == (5, 1)
    assert drawn.nodes["z"]["value"].shape == (5, 3)
    assert drawn.nodes["p"]["value"].shape == (5, 3, 3)
    assert math.isfinite(joint.log_prob_sum().detach())


@pytest.mark.usefixtures("double")
def test_rows_that_the_model_draws_itself_are_refused() -> None:
    def model(y: Tensor) -> None:
        told(y, torch.randperm(N)[:3])

    guide = MeanFieldNormal(model)
    for _ in range(2):
        with pytest.raises(ModelError, match=r"the model draws the rows of plate 'row' itself \(subsample=\)"):
            guide(DATA)


@pytest.mark.usefixtures("double")
def test_a_list_that_draws_other_rows_than_the_model_is_refused() -> None:
    guide = AutoGuideList(told)
    guide.append(MeanFieldNormal(told))
    with pytest.raises(ModelError, match="AutoGuideList draws others; give it create_plates="):
        guide(DATA, torch.tensor([1, 2]))


@pytest.mark.usefixtures("double")
def test_a_pickled_guide_cannot_know_the_rows() -> None:
    guide: Any = MeanFieldNormal(told)
    guide(DATA, torch.tensor([1, 2]))
    other = pickle.loads(pickle.dumps(guide))
    with pytest.raises(ModelError, match="which rows the model sees: make the guide anew"):
        other(DATA, torch.tensor([1, 2]))
    fresh: Any = MeanFieldNormal(told)
    fresh.load_state_dict(guide.state_dict())
    fresh(DATA, torch.tensor([3]))
    assert torch.equal(fresh.loc, guide.loc)


@pytest.mark.usefixtures("double")
def test_starts_where_it_is_told_in_every_row() -> None:
    values = {"mu": torch.tensor(0.5), "z": torch.tensor([2.0, 2.0]), "p": torch.tensor([[0.2, 0.3, 0.5]] * 2)}
    guide: Any = MeanFieldNormal(told, init_loc_fn=init_to_value(values=values))
    guide(DATA, torch.tensor([1, 2]))
    torch.testing.assert_close(guide.median()["z"], torch.full((N,), 2.0))
    torch.testing.assert_close(guide.median()["p"], torch.tensor([[0.2, 0.3, 0.5]] * N))


@pytest.mark.usefixtures("double")
def test_svi_on_batches_finds_the_posterior_of_every_row() -> None:
    """y_i ~ N(z_i, 1), z_i ~ N(0, 1): z_i | y_i ~ N(y_i / 2, 1/2), whatever rows a step sees."""

    def model(y: Tensor, index: Tensor) -> None:
        with pyro.plate("row", N, subsample=index):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(z, 1.0), obs=y[index])

    guide: Any = MeanFieldNormal(model)
    svi = SVI(model, guide, pyro.optim.ClippedAdam({"lr": 0.2, "lrd": 0.97}), vl.ELBO(num_particles=4))
    generator = torch.Generator().manual_seed(0)
    pyro.set_rng_seed(0)
    for _ in range(80):
        for index in torch.randperm(N, generator=generator).split(4):
            svi.step(DATA, index)
    torch.testing.assert_close(guide.loc.detach(), DATA / 2, rtol=0, atol=0.02)
    torch.testing.assert_close(guide.scale.detach(), torch.full((N,), 0.5**0.5), rtol=0, atol=0.02)
