"""Model and guide on the rows of a batch: the same rows, scaled to all, under every ELBO and in a captured graph."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO, TraceEnum_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO, config_enumerate
from pyro.infer.autoguide import AutoDelta, AutoDiagonalNormal, AutoGuideList, AutoMultivariateNormal, AutoNormal
from pyro.nn import PyroModule, PyroParam
from torch import Tensor
from torch.distributions import constraints
from torch.fx.experimental.proxy_tensor import make_fx

import pyro_vi_lab as vl
from pyro_vi_lab.errors import ModelError
from pyro_vi_lab.guides import FullRankNormal, MeanFieldNormal
from pyro_vi_lab.rows import Rows, active_rows, set_up, subsamples

N = 10
INDEX = torch.tensor([2, 5, 7])
DATA = torch.linspace(-1.0, 2.0, N, dtype=torch.float64)


@pytest.fixture(autouse=True)
def double() -> None:
    torch.set_default_dtype(torch.float64)


# One model in the ways to write it


def plain(y: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("row", len(y)) as index:
        z = pyro.sample("z", dist.LogNormal(mu, 1.0))
        pyro.sample("y", dist.Normal(z, 1.0), obs=y[index])


def drawing(y: Tensor, size: int | None = 3) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("row", len(y), subsample_size=size) as index:
        z = pyro.sample("z", dist.LogNormal(mu, 1.0))
        pyro.sample("y", dist.Normal(z, 1.0), obs=y[index])


def told(y: Tensor, index: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("row", len(y), subsample=index):
        z = pyro.sample("z", dist.LogNormal(mu, 1.0))
        pyro.sample("y", dist.Normal(z, 1.0), obs=y[index])


def with_subsample(y: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("row", N, subsample_size=3):
        z = pyro.sample("z", dist.LogNormal(mu, 1.0))
        pyro.sample("y", dist.Normal(z, 1.0), obs=pyro.subsample(y, event_dim=0))


def batch_of(y: Tensor, index: Tensor) -> tuple[Any, ...]:
    return (y[index],)


def all_of(y: Tensor, index: Tensor) -> tuple[Any, ...]:
    return (y,)


def both(y: Tensor, index: Tensor) -> tuple[Any, ...]:
    return (y, index)


FORMS: dict[str, tuple[Callable[..., None], Callable[[Tensor, Tensor], tuple[Any, ...]]]] = {
    "plain": (plain, batch_of),
    "drawing": (drawing, all_of),
    "told": (told, both),
    "pyro.subsample": (with_subsample, all_of),
}
each_form = pytest.mark.parametrize("form", FORMS)


def trace_of(form: str, rows: Rows, **values: Tensor) -> Any:
    model, arguments = FORMS[form]
    assert rows.index is not None
    with rows, poutine.condition(data=values):
        trace = poutine.trace(model).get_trace(*arguments(DATA, rows.index))
    trace.compute_log_prob()
    return trace


# --- models --------------------------------------------------------------------------------------------------


@each_form
def test_every_way_to_write_a_model_is_the_same_on_a_batch(form: str) -> None:
    mu, z = torch.tensor(0.3), torch.arange(1.0, N + 1)
    trace = trace_of(form, Rows(INDEX, N, ["row"]), mu=mu, z=z[INDEX])
    row = dist.LogNormal(mu, 1.0).log_prob(z) + dist.Normal(z, 1.0).log_prob(DATA)
    expected = dist.Normal(0.0, 1.0).log_prob(mu) + N / 3 * row[INDEX].sum()
    torch.testing.assert_close(trace.log_prob_sum(), expected, rtol=1e-13, atol=0)
    for name in ("z", "y"):
        (frame,) = trace.nodes[name]["cond_indep_stack"]
        assert (frame.name, frame.size, frame.full_size) == ("row", 3, N)
        assert trace.nodes[name]["scale"] == pytest.approx(N / 3)


@each_form
@given(st.permutations(range(N)), st.lists(st.integers(1, N - 1), unique=True))
def test_the_log_density_of_all_rows_is_the_mean_over_any_parts(form: str, order: list[int], cuts: list[int]) -> None:
    """Weighted by the sizes of the parts, one of which may have a single row."""
    mu, z = torch.tensor(-0.2), torch.linspace(0.5, 3.0, N)
    parts = [part.sort().values for part in torch.tensor_split(torch.tensor(order), sorted(cuts))]
    if form in ("drawing", "pyro.subsample"):
        parts = list(torch.tensor(order[:9]).reshape(3, 3))
        order = order[:9]
    whole = dist.LogNormal(mu, 1.0).log_prob(z) + dist.Normal(z, 1.0).log_prob(DATA)
    total = torch.tensor(0.0)
    for part in parts:
        trace = trace_of(form, Rows(part, N, ["row"]), mu=mu, z=z[part])
        total += len(part) / N * (trace.log_prob_sum() - trace.nodes["mu"]["log_prob_sum"])
    torch.testing.assert_close(total, whole[torch.tensor(order)].sum(), rtol=1e-12, atol=1e-12)


def test_nested_the_rows_are_scaled_once() -> None:
    rows = Rows(INDEX, N, ["row"])
    with rows, Rows(INDEX, N, ["row"]):
        trace = poutine.trace(plain).get_trace(DATA[INDEX])
    assert trace.nodes["y"]["scale"] == pytest.approx(N / 3)
    with poutine.scale(scale=2.0), rows:
        trace = poutine.trace(Rows(INDEX, N, ["row"])(plain)).get_trace(DATA[INDEX])
    assert trace.nodes["y"]["scale"] == pytest.approx(2 * N / 3)


def test_other_plates_are_left_alone() -> None:
    def model(y: Tensor) -> None:
        with pyro.plate("group", 3):  # of the size of the batch, by chance
            pyro.sample("group_mean", dist.Normal(0.0, 1.0))
        with pyro.plate("column", 2, dim=-2), pyro.plate("row", len(y), dim=-1):
            pyro.sample("y", dist.Normal(0.0, 1.0), obs=y.expand(2, -1))

    with Rows(INDEX, N, ["row"]):
        trace = poutine.trace(model).get_trace(DATA[INDEX])
    assert trace.nodes["group_mean"]["scale"] == 1.0
    assert trace.nodes["y"]["scale"] == pytest.approx(N / 3)
    assert {f.name: f.full_size for f in trace.nodes["y"]["cond_indep_stack"]} == {"row": N, "column": 2}


def test_without_an_index_plates_of_the_batch_are_scaled_and_others_left_alone() -> None:
    with Rows(None, N, ["row"], size=3):
        trace = poutine.trace(plain).get_trace(DATA[INDEX])
        told_trace = poutine.trace(told).get_trace(DATA, INDEX)
    assert trace.nodes["y"]["scale"] == pytest.approx(N / 3)
    assert told_trace.nodes["row"]["value"].tolist() == INDEX.tolist()


def test_all_rows_are_not_scaled() -> None:
    with Rows(torch.arange(N), N, ["row"]):
        trace = poutine.trace(plain).get_trace(DATA)
    assert trace.nodes["y"]["scale"] == 1.0


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: pyro.plate("row", 7), r"plate 'row' has size 7; a plate of the rows has the size of the data \(10\)"),
        (lambda: pyro.plate("row", N, subsample_size=4), "asks for 4 of its 10 rows .subsample_size., the batch has 3"),
    ],
)
def test_a_plate_of_another_size_is_named(model: Callable[[], Any], message: str) -> None:
    with pytest.raises(ModelError, match=message), Rows(INDEX, N, ["row"]):
        model()


# --- parameters by row ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("outside", [False, True])
def test_parameters_by_row_are_those_of_the_batch(outside: bool) -> None:
    """In a guide whose plate counts the rows of the batch, with the optimizer seeing the whole parameter."""

    def guide(y: Tensor) -> None:
        pyro.sample("mu", dist.Delta(pyro.param("at", torch.tensor(0.1))))
        with pyro.plate("row", len(y)):
            loc = pyro.param("loc", lambda: torch.arange(float(N)), event_dim=0)
            scale = pyro.param("scale", lambda: torch.ones(N), constraint=constraints.positive, event_dim=0)
            pyro.sample("z", dist.LogNormal(loc, scale))

    svi = SVI(plain, guide, pyro.optim.Adam({"lr": 0.1}), Trace_ELBO())
    if outside:
        with Rows(INDEX, N, ["row"]):
            svi.step(DATA[INDEX])
    else:
        one, two = Rows(INDEX, N, ["row"])(plain), Rows(INDEX, N, ["row"])(guide)
        SVI(one, two, pyro.optim.Adam({"lr": 0.1}), Trace_ELBO()).step(DATA[INDEX])
    loc = pyro.param("loc").detach()
    assert (loc != torch.arange(float(N))).nonzero()[:, 0].tolist() == INDEX.tolist()
    assert (pyro.param("scale").detach() != 1).nonzero()[:, 0].tolist() == INDEX.tolist()


def test_a_parameter_with_an_entry_for_each_row_of_the_batch_is_refused() -> None:
    def guide(y: Tensor) -> None:
        with pyro.plate("row", len(y)):
            pyro.param("loc", lambda: torch.zeros(len(y)), event_dim=0)

    with pytest.raises(ModelError, match="'loc' has 3 entries along plate 'row'; it needs one for each of the 10 rows"):
        Rows(INDEX, N, ["row"])(guide)(DATA[INDEX])
    with pytest.raises(ModelError, match="data loader does not say which rows"):
        Rows(None, N, ["row"], size=3)(guide)(DATA[INDEX])


def test_parameters_of_a_module_by_row() -> None:
    class Guide(PyroModule):
        def __init__(self) -> None:
            super().__init__()
            self.loc = PyroParam(torch.arange(float(N)), event_dim=0)

        def forward(self, y: Tensor) -> Tensor:
            with pyro.plate("row", len(y)):
                return self.loc  # type: ignore[no-any-return]

    assert Rows(INDEX, N, ["row"])(Guide())(DATA[INDEX]).tolist() == [2.0, 5.0, 7.0]


# --- guides of Pyro and ours -----------------------------------------------------------------------------------------

GUIDES: dict[str, Callable[[Any], Any]] = {
    "MeanFieldNormal": MeanFieldNormal,
    "AutoNormal": AutoNormal,
    "AutoDelta": AutoDelta,
    "AutoGuideList": lambda model: listed(model),
}


def listed(model: Callable[..., None]) -> Any:
    guide = AutoGuideList(model)
    guide.append(AutoNormal(poutine.block(model, expose=["mu"])))
    guide.append(MeanFieldNormal(poutine.block(model, expose=["z"])))
    return guide


def by_row(guide: Any) -> dict[str, Tensor]:
    """Gradients of the parameters that have an entry for each row, these entries last."""
    return {name: parameter.grad[-N:] for name, parameter in guide.named_parameters() if parameter.numel() >= N}


@each_form
@pytest.mark.parametrize("name", GUIDES)
def test_rows_of_the_batch_and_no_others_get_gradients(name: str, form: str) -> None:
    model, arguments = FORMS[form]
    guide = GUIDES[name](model)
    set_up(guide, Rows(INDEX, N, ["row"]), *arguments(DATA, INDEX))
    for index in (torch.tensor([0, 1, 9]), torch.tensor([3, 4, 5])):
        guide.zero_grad(set_to_none=True)
        with Rows(index, N, ["row"]):
            Trace_ELBO().loss_and_grads(model, guide, *arguments(DATA, index))
        gradients = by_row(guide)
        assert gradients
        for gradient in gradients.values():
            assert gradient.nonzero()[:, 0].tolist() == index.tolist()


@pytest.mark.parametrize("form", ["plain", "told"])
@pytest.mark.parametrize("name", GUIDES)
def test_batches_of_any_size(name: str, form: str) -> None:
    """After a set-up with three rows: one, all, and those of a smaller last batch."""
    model, arguments = FORMS[form]
    guide = GUIDES[name](model)
    set_up(guide, Rows(INDEX, N, ["row"]), *arguments(DATA, INDEX))
    for index in (torch.tensor([8]), torch.arange(N), torch.tensor([0, 9])):
        guide.zero_grad(set_to_none=True)
        with Rows(index, N, ["row"]):
            Trace_ELBO().loss_and_grads(model, guide, *arguments(DATA, index))
        for gradient in by_row(guide).values():
            assert gradient.nonzero()[:, 0].tolist() == index.tolist()


ELBOS: dict[str, Callable[[], Any]] = {
    "Trace_ELBO": Trace_ELBO,
    "Trace_ELBO, vectorized": lambda: Trace_ELBO(num_particles=4, vectorize_particles=True, max_plate_nesting=1),
    "TraceGraph_ELBO": TraceGraph_ELBO,
    "TraceMeanField_ELBO": TraceMeanField_ELBO,
    "TraceEnum_ELBO": lambda: TraceEnum_ELBO(max_plate_nesting=1, strict_enumeration_warning=False),
    "ELBO": vl.ELBO,
}


@pytest.mark.parametrize("name", ELBOS)
@pytest.mark.parametrize("one_by_one", [False, True])
def test_every_elbo_is_the_same_for_every_form(name: str, one_by_one: bool) -> None:
    losses = []
    for model, arguments in FORMS.values():
        pyro.clear_param_store()
        guide: Any = MeanFieldNormal(model)
        rows = Rows(INDEX, N, ["row"])
        set_up(guide, rows, *arguments(DATA, INDEX))
        pyro.set_rng_seed(4)
        elbo = ELBOS[name]()
        if one_by_one:
            losses.append(
                elbo.loss(Rows(INDEX, N, ["row"])(model), Rows(INDEX, N, ["row"])(guide), *arguments(DATA, INDEX))
            )
        else:
            with rows:
                losses.append(elbo.loss(model, guide, *arguments(DATA, INDEX)))
    assert losses == pytest.approx([losses[0]] * len(losses), rel=1e-13)


def test_enumerated_sites_by_row() -> None:
    """The discrete site of a row summed out, on a batch, is the marginal model's."""

    @config_enumerate
    def mixture(y: Tensor) -> None:
        weight = pyro.sample("weight", dist.Beta(2.0, 2.0))
        with pyro.plate("row", len(y)):
            component = pyro.sample("component", dist.Bernoulli(weight))
            pyro.sample("y", dist.Normal(3 * component, 1.0), obs=y)

    guide: Any = MeanFieldNormal(poutine.block(mixture, hide=["component"]))
    rows = Rows(INDEX, N, ["row"])
    set_up(guide, rows, DATA[INDEX])
    pyro.set_rng_seed(0)
    with rows:
        loss = TraceEnum_ELBO(max_plate_nesting=1).loss(mixture, guide, DATA[INDEX])
    pyro.set_rng_seed(0)
    trace = poutine.trace(guide).get_trace(DATA[INDEX])
    weight = trace.nodes["weight"]["value"]
    both_ways = torch.stack(
        [
            torch.log1p(-weight) + dist.Normal(0.0, 1.0).log_prob(DATA),
            weight.log() + dist.Normal(3.0, 1.0).log_prob(DATA),
        ]
    )
    likelihood = N / 3 * both_ways.logsumexp(0)[INDEX].sum()
    expected = trace.log_prob_sum() - dist.Beta(2.0, 2.0).log_prob(weight) - likelihood
    assert loss == pytest.approx(float(expected.detach()), rel=1e-12)


@pytest.mark.parametrize("kind", [AutoDiagonalNormal, AutoMultivariateNormal, FullRankNormal])
def test_guides_with_one_vector_are_refused(kind: Any) -> None:
    with pytest.raises(
        ModelError, match=f"{kind.__name__} has one vector for all latent sites.*site 'z' in plate 'row'"
    ):
        set_up(kind(plain), Rows(INDEX, N, ["row"]), DATA[INDEX])
    glob: Any = kind(poutine.block(plain, hide=["z"]))
    set_up(glob, Rows(INDEX, N, ["row"]), DATA[INDEX])  # latent sites that are not by row are all there
    assert glob.latent_dim == 1


def test_setting_up_leaves_other_guides_alone() -> None:
    runs = []
    set_up(lambda y: runs.append(y), Rows(INDEX, N, ["row"]), DATA[INDEX])
    assert runs == []


def test_a_guide_of_pyro_sees_the_rows_of_its_model_once_it_is_set_up() -> None:
    """Outside of a batch too, where Pyro's own plates would draw others (issue 3468 of Pyro)."""
    guide = AutoNormal(told)
    set_up(guide, Rows(INDEX, N, ["row"]), DATA, INDEX)
    for index in (torch.tensor([0, 1]), torch.tensor([9, 3, 4, 6])):
        trace = poutine.trace(guide).get_trace(DATA, index)
        assert trace.nodes["row"]["value"].tolist() == index.tolist()
        assert trace.nodes["z"]["value"].shape == index.shape
    for other in (copy.deepcopy(guide), pickle.loads(pickle.dumps(guide))):
        assert other.create_plates is None


# --- what is asked -------------------------------------------------------------------------------------------------


def test_active_rows_are_the_innermost() -> None:
    one, two = Rows(INDEX, N, ["row"]), Rows(INDEX, N, ["row"])
    assert active_rows() is None
    with one:
        assert active_rows() is one
        with two, poutine.trace(), pyro.plate("other", 3):
            assert active_rows() is two
        with poutine.block():
            assert active_rows() is None


def test_rows_need_a_size() -> None:
    with pytest.raises(TypeError, match="needs its size"):
        Rows(None, N, ["row"])
    assert Rows(None, N, ["row"], size=4).scale == 2.5


def test_what_a_model_says_of_its_rows() -> None:
    runs = []

    def model(index: Tensor) -> None:
        one = pyro.plate("one", 10, subsample_size=2)
        two = pyro.plate("two", 10, subsample=index)
        runs.append(None)
        pyro.plate("three", 10)
        del one, two

    found = subsamples(model, ["one", "two"], INDEX)
    assert found["one"] == (2, None)
    assert found["two"] == (None, INDEX)
    assert not runs  # it was not run farther than that
    assert subsamples(model, ["three", "absent"], INDEX) == {"three": (None, None)}


# --- captured ------------------------------------------------------------------------------------------------------


@each_form
def test_one_graph_serves_all_batches_of_a_size(form: str) -> None:
    """The index of the rows is an input; value and gradients are those of eager Pyro for rows it has not seen."""
    model, arguments = FORMS[form]
    guide: Any = MeanFieldNormal(model)
    set_up(guide, Rows(INDEX, N, ["row"]), *arguments(DATA, INDEX))
    loc, log_scale = (guide.params.loc, guide.params.scale.log())

    def loss(loc: Tensor, log_scale: Tensor, y: Tensor, index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        loc, log_scale = loc.detach().requires_grad_(), log_scale.detach().requires_grad_()
        held = guide.__dict__["_parameters"]
        before = dict(held)
        held["loc"], held["scale_unconstrained"] = loc, log_scale
        try:
            pyro.clear_param_store()
            with Rows(index, N, ["row"]), poutine.seed(rng_seed=0), pyro.validation_enabled(False):
                drawn = poutine.trace(guide).get_trace(*arguments(y, index))
                joint = poutine.trace(poutine.replay(model, trace=drawn)).get_trace(*arguments(y, index))
                value = drawn.log_prob_sum() - joint.log_prob_sum()
            one, two = torch.autograd.grad(value, (loc, log_scale))
        finally:
            held.update(before)
        return value.detach(), one, two

    torch.manual_seed(0)
    graph = make_fx(loss)(loc, log_scale, DATA, INDEX)
    for index in (INDEX, torch.tensor([0, 8, 9])):
        torch.manual_seed(0)
        expected = loss(loc, log_scale, DATA, index)
        torch.manual_seed(0)
        found = graph(loc, log_scale, DATA, index)
        for one, two in zip(found, expected, strict=True):
            torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-12)
        assert found[1][1:].nonzero()[:, 0].tolist() == index.tolist()
