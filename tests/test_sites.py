from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import Tensor
from torch.distributions import biject_to, constraints

from pyro_vi_lab.change_of_variables import ChangeOfVariables, bijection, distribution_name, same_support
from pyro_vi_lab.errors import ArgumentError, LabError, ModelError
from pyro_vi_lab.sites import Structure, read_structure
from pyro_vi_lab.user_errors import user_errors, user_line


def structure_of(model: Callable[..., Any], *args: Any, **kwargs: Any) -> Structure:
    return read_structure(model, args, kwargs, name="a model", dtype=torch.float64)


def everything(y: Tensor) -> None:
    """One site of every kind."""
    rows, columns = pyro.plate("row", 3, dim=-2), pyro.plate("column", 4, dim=-1)
    p = pyro.sample("p", dist.Dirichlet(torch.ones(5)))
    with rows:
        scale = pyro.sample("scale", dist.HalfNormal(1.0))
    with columns:
        pyro.sample("matrix", dist.LKJCholesky(2))
        k = pyro.sample("k", dist.Categorical(p))
    with rows, columns:
        x = pyro.sample("x", dist.Normal(0.0, scale))
        pyro.deterministic("twice", 2 * x)
        pyro.sample("y", dist.Normal((x + k).unsqueeze(-1), 1.0).expand([3, 4, 2]).to_event(1), obs=y)
    pyro.deterministic("total", x.sum())
    pyro.deterministic("vector", p[:2], event_dim=1)
    pyro.factor("penalty", -p.square().sum())
    pyro.sample("row_free", dist.Gamma(2.0, 1.0).expand([3, 4]).to_event(1))


EXPECTED: dict[str, tuple[str, tuple[int, ...], int, tuple[int, ...], tuple[str, ...], str]] = {
    # kind, shape, event_dim, unconstrained shape, dims, distribution
    "p": ("latent", (5,), 1, (4,), ("p_dim_0",), "Dirichlet"),
    "scale": ("latent", (3, 1), 0, (3, 1), ("row", "scale_dim_1"), "HalfNormal"),
    "matrix": ("latent", (4, 2, 2), 2, (4, 1), ("column", "matrix_dim_1", "matrix_dim_2"), "LKJCholesky"),
    "k": ("discrete", (4,), 0, (), ("column",), "Categorical"),
    "x": ("latent", (3, 4), 0, (3, 4), ("row", "column"), "Normal"),
    "twice": ("deterministic", (3, 4), 0, (), ("row", "column"), "Delta"),
    "y": ("observed", (3, 4, 2), 1, (), ("row", "column", "y_dim_2"), "Normal"),
    "total": ("deterministic", (), 0, (), (), "Delta"),
    "vector": ("deterministic", (2,), 0, (), ("vector_dim_0",), "Delta"),
    "row_free": ("latent", (3, 4), 1, (3, 4), ("row_free_dim_0", "row_free_dim_1"), "Gamma"),
}


@pytest.mark.parametrize("name", EXPECTED)
def test_what_is_known_of_a_site(name: str) -> None:
    site = structure_of(everything, torch.zeros(3, 4, 2, dtype=torch.float64)).sites[name]
    kind, shape, event_dim, unconstrained, dims, distribution = EXPECTED[name]
    assert (site.name, site.kind, tuple(site.shape), site.event_dim) == (name, kind, shape, event_dim)
    assert (tuple(site.unconstrained_shape), site.dims, site.distribution) == (
        unconstrained,
        dims,
        distribution,
    )
    assert tuple(site.batch_shape) == shape[: len(shape) - event_dim]


def test_what_is_known_of_the_model() -> None:
    y = torch.arange(24.0, dtype=torch.float64).reshape(3, 4, 2)
    structure = structure_of(everything, y)
    assert list(structure.sites) == [*list(EXPECTED)[:-1], "penalty", "row_free"]
    assert structure.sites["penalty"].kind == "factor"
    assert list(structure.observed) == ["y"]
    assert torch.equal(structure.observed["y"], y)
    assert (structure.max_plate_nesting, structure.subsampled) == (2, ())


def test_data_without_a_plate_have_the_broadcast_shape() -> None:
    def model(y: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(torch.zeros(2, 1), 1.0).to_event(2))
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y)

    site = structure_of(model, torch.zeros(3, dtype=torch.float64)).sites["y"]
    assert (tuple(site.shape), site.dims) == ((2, 3), ("y_dim_0", "y_dim_1"))


def test_a_plate_that_sees_a_part_of_its_rows_is_known() -> None:
    def model(y: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("some", 5, subsample_size=3) as index, pyro.plate("all", 2):
            pyro.sample("y", dist.Normal(mu, 1.0), obs=y[index])

    structure = structure_of(model, torch.zeros(5, dtype=torch.float64))
    assert structure.subsampled == ("some",)
    assert "some" not in structure.sites


def test_runs_are_of_the_dtype_that_is_asked_for_and_seen_by_no_handler_outside() -> None:
    def model() -> None:
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        seen.append((x.dtype, torch.ones(()).dtype))

    seen: list[tuple[torch.dtype, torch.dtype]] = []
    with poutine.trace() as outer:
        structure_of(model)
    assert set(seen) == {(torch.float64, torch.float64)}
    assert "x" not in outer.trace.nodes


def test_a_hidden_site_is_not_a_site() -> None:
    def model() -> None:
        pyro.sample("x", dist.Normal(0.0, 1.0))
        pyro.sample("nuisance", dist.Normal(0.0, 1.0))

    assert list(structure_of(poutine.block(model, hide=["nuisance"])).sites) == ["x"]


def test_a_model_that_fails_in_some_places_is_read_where_it_runs() -> None:
    def model() -> None:
        r = pyro.sample("r", dist.Normal(0.0, 1.0).expand([20]).to_event(1))
        swap = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
        covariance = torch.eye(2) + r[:, None, None] * swap  # positive definite where |r| < 1
        pyro.sample("x", dist.MultivariateNormal(torch.zeros(20, 2), covariance).to_event(1))

    assert list(structure_of(model).sites) == ["r", "x"]

    def factored() -> None:
        r = pyro.sample("r", dist.Normal(0.0, 1.0).expand([20]).to_event(1))
        pyro.factor("f", torch.linalg.cholesky(torch.diag(1 - r.abs())).sum())

    assert list(structure_of(factored).sites) == ["r", "f"]


# --- supports ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        (constraints.real, constraints.real, True),
        (constraints.positive, constraints.real, False),
        (constraints.interval(0.0, 1.0), constraints.interval(0.0, 1.0), True),
        (constraints.interval(0.0, 1.0), constraints.interval(0.0, 2.0), False),
        (constraints.interval(0.0, torch.tensor(1.0)), constraints.interval(0.0, torch.tensor(1.0)), True),
        (constraints.interval(0.0, torch.tensor(1.0)), constraints.interval(0.0, torch.tensor(1.5)), False),
        (constraints.interval(0.0, torch.tensor(1.0)), constraints.interval(0.0, torch.ones(2)), False),
        (
            constraints.independent(constraints.positive, 1),
            constraints.independent(constraints.positive, 1),
            True,
        ),
        (
            constraints.independent(constraints.positive, 1),
            constraints.independent(constraints.positive, 2),
            False,
        ),
        (
            constraints.independent(constraints.positive, 1),
            constraints.independent(constraints.real, 1),
            False,
        ),
        (constraints.greater_than(0.0), constraints.greater_than_eq(0.0), False),
    ],
)
def test_supports_are_compared_with_their_bounds(
    one: constraints.Constraint, other: constraints.Constraint, same: bool
) -> None:
    assert same_support(one, other) is same
    assert same_support(other, one) is same


def test_a_support_without_a_bijection_is_named_with_its_site() -> None:
    with pytest.raises(ModelError, match=r"site 'cov' \(Wishart\) has support PositiveDefinite\(\)"):
        bijection("cov", dist.Wishart(torch.tensor(3.0), torch.eye(2)))
    assert bijection("x", dist.Gamma(1.0, 1.0)) == biject_to(constraints.positive)


def test_names_of_wrapped_distributions() -> None:
    base = dist.Normal(torch.zeros(2), 1.0)
    for wrapped in (
        base,
        base.to_event(1),
        base.expand([3, 2]),
        base.mask(torch.tensor([True, False])).to_event(1),
    ):
        assert distribution_name(wrapped) == "Normal"


# --- the change of variables ---------------------------------------------------------------------------


def test_change_of_variables_takes_the_support_of_the_run() -> None:
    def model() -> None:
        a = pyro.sample("a", dist.Uniform(0.0, 1.0))
        pyro.sample("b", dist.Uniform(0.0, 1.0 - a))
        pyro.sample("other", dist.Normal(0.0, 1.0))

    u = {"a": torch.tensor(0.3), "b": torch.tensor(-1.0)}
    change = ChangeOfVariables(u)
    with poutine.trace() as tracer, change:
        model()
    a = u["a"].sigmoid()
    b = (1 - a) * u["b"].sigmoid()
    torch.testing.assert_close(change.values, {"a": a, "b": b})
    torch.testing.assert_close(tracer.trace.nodes["b"]["value"], b)
    # log of sigmoid' = s (1 - s), times the width of the interval
    expected = {"a": (a * (1 - a)).log(), "b": ((1 - a) * u["b"].sigmoid() * (1 - u["b"].sigmoid())).log()}
    torch.testing.assert_close(change.log_dets, expected)
    assert change.supports["b"].upper_bound == pytest.approx(float(1 - a))


def test_change_of_variables_leaves_observed_sites_alone() -> None:
    change = ChangeOfVariables({"x": torch.tensor(5.0)})
    with poutine.trace() as tracer, change:
        pyro.sample("x", dist.Normal(0.0, 1.0), obs=torch.tensor(1.0))
    assert tracer.trace.nodes["x"]["value"] == 1
    assert change.values == {}


# --- what a user's model raises ------------------------------------------------------------------------


def broken(x: Tensor, y: Tensor) -> None:
    pyro.sample("b", dist.Normal(x @ y, 1.0))


def test_errors_of_a_model_name_the_model_its_line_and_its_data() -> None:
    lines, first = inspect.getsourcelines(broken)
    line = first + next(i for i, text in enumerate(lines) if "x @ y" in text)
    x, y = torch.zeros(3, 2), torch.tensor([1.0, float("nan"), 2.0])
    with pytest.raises(ModelError) as caught, user_errors("my model", (x,), {"y": y}):
        broken(x, y)
    message = str(caught.value)
    assert message.startswith(f"model my model cannot be run at {__file__}:{line}: RuntimeError: ")
    assert message.endswith("; data: argument 0 (3, 2), y (3,) with NaN")
    assert isinstance(caught.value.__cause__, RuntimeError)


@pytest.mark.parametrize("error", [ArgumentError("ours"), KeyboardInterrupt(), SystemExit(1)])
def test_our_errors_and_interrupts_pass_through(error: BaseException) -> None:
    with pytest.raises(type(error)) as caught, user_errors("my model"):
        raise error
    assert caught.value is error
    assert isinstance(error, LabError) or caught.value.__cause__ is None


def test_the_line_is_the_users_even_below_torch_and_pyro() -> None:
    lines, first = inspect.getsourcelines(broken)
    line = first + next(i for i, text in enumerate(lines) if "x @ y" in text)
    with pytest.raises(RuntimeError) as caught:
        poutine.trace(broken).get_trace(torch.zeros(3, 2), torch.zeros(3))
    assert user_line(caught.value) == f"{__file__}:{line}"
    assert user_line(ValueError("never raised")) == ""
