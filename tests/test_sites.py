from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import Tensor

from pyro_vi_lab.sites import Structure, read_structure


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
