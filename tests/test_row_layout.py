"""Which arguments, plates and sites have the rows, and whether batches of them say what all rows say."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from pyro_vi_lab.errors import ArgumentError, DataError, LabError, ModelError
from pyro_vi_lab.problem import Problem

N = 20
GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(N, 3, generator=GENERATOR, dtype=torch.float64)
SQUARE = torch.randn(N, N, generator=GENERATOR, dtype=torch.float64)
Y = torch.randn(N, generator=GENERATOR, dtype=torch.float64)
GROUP = torch.arange(N) % 4


def regression(x: Tensor, y: Tensor) -> None:
    beta = pyro.sample("beta", dist.Normal(torch.zeros(x.shape[1]), 1.0).to_event(1))
    pyro.deterministic("mean", x @ beta)
    with pyro.plate("row", len(x)) as index:
        pyro.sample("y", dist.Normal(x[index] @ beta, 1.0), obs=y[index])


def with_prior(x: Tensor, y: Tensor, prior: Tensor) -> None:
    beta = pyro.sample("beta", dist.Normal(prior, 1.0).to_event(1))
    with pyro.plate("row", len(x)):
        pyro.sample("y", dist.Normal(x @ beta, 1.0), obs=y)


def hierarchical(y: Tensor, group: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("group", 4):
        theta = pyro.sample("theta", dist.Normal(mu, 1.0))
    with pyro.plate("row", len(y)):
        w = pyro.sample("w", dist.Dirichlet(torch.ones(3)))
        k = pyro.sample("k", dist.Bernoulli(0.5))
        pyro.factor("bonus", w[..., 0])
        pyro.sample("y", dist.Normal(theta[group] + k, 1.0), obs=y)


def two_way(y: Tensor) -> None:
    columns = pyro.plate("column", y.shape[1], dim=-1)
    with columns:
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
    with pyro.plate("row", len(y), dim=-2):
        b = pyro.sample("b", dist.Normal(0.0, 1.0))
        with columns:
            pyro.sample("y", dist.Normal(a + b, 1.0), obs=y)


def nested(data: dict[str, Any], others: list[Tensor]) -> None:
    beta = pyro.sample("beta", dist.Normal(others[0], 1.0).to_event(1))
    with pyro.plate("row", len(data["y"])):
        pyro.sample("y", dist.Normal(data["x"] @ beta, 1.0), obs=data["y"])


def drawing(x: Tensor, y: Tensor, size: int = 6) -> None:
    beta = pyro.sample("beta", dist.Normal(torch.zeros(x.shape[1]), 1.0).to_event(1))
    with pyro.plate("row", len(x), subsample_size=size) as index:
        pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(x[index] @ beta, 1.0), obs=y[index])


def told(y: Tensor, index: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("row", len(y), subsample=index):
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y[index])


FOUND: dict[str, tuple[Callable[[], Problem], dict[str, int], tuple[str, ...]]] = {
    # sites along the rows, plates
    "regression": (lambda: Problem(regression, X, Y, minibatch=6), {"mean": 0, "y": 0}, ("row",)),
    "wide": (lambda: Problem(regression, SQUARE[:, :18], Y, minibatch=6), {"mean": 0, "y": 0}, ("row",)),
    "as many features as rows": (lambda: Problem(regression, SQUARE, Y, minibatch=6), {"mean": 0, "y": 0}, ("row",)),
    "batches of as many rows as features": (
        lambda: Problem(regression, X, Y, minibatch=3),
        {"mean": 0, "y": 0},
        ("row",),
    ),
    "batches of one row": (lambda: Problem(regression, X, Y, minibatch=1), {"mean": 0, "y": 0}, ("row",)),
    "a prior by feature": (lambda: Problem(with_prior, X, Y, torch.zeros(3), minibatch=6), {"y": 0}, ("row",)),
    "a prior as long as the data": (
        lambda: Problem(with_prior, SQUARE, Y, torch.zeros(N), minibatch=6, rows=["x", "y"]),
        {"y": 0},
        ("row",),
    ),
    "rows by axis": (
        lambda: Problem(with_prior, SQUARE, Y, torch.zeros(N), minibatch=6, rows={"x": 0, "y": 0}),
        {"y": 0},
        ("row",),
    ),
    "sites of every kind": (
        lambda: Problem(hierarchical, Y, GROUP, minibatch=6),
        {"w": 0, "k": 0, "bonus": 0, "y": 0},
        ("row",),
    ),
    "two axes": (lambda: Problem(two_way, X, minibatch=6), {"b": 0, "y": 0}, ("row",)),
    "nested arguments": (
        lambda: Problem(nested, {"x": X.numpy(), "y": Y}, [torch.zeros(3)], minibatch=6),
        {"y": 0},
        ("row",),
    ),
    "part of a nested argument": (
        lambda: Problem(nested, {"x": SQUARE, "y": Y}, [torch.zeros(N)], minibatch=6, rows=["data"]),
        {"y": 0},
        ("row",),
    ),
    "two rows": (lambda: Problem(regression, X[:2], Y[:2], minibatch=1), {"mean": 0, "y": 0}, ("row",)),
    "subsample_size": (lambda: Problem(drawing, X, Y), {"z": 0, "y": 0}, ("row",)),
    "subsample": (lambda: Problem(told, Y, torch.arange(6)), {"y": 0}, ("row",)),
}


@pytest.mark.parametrize("name", FOUND)
def test_the_sites_and_plates_along_the_rows(name: str) -> None:
    make, axes, plates = FOUND[name]
    problem = make()
    layout = problem._data.rows_of_batches
    num_rows = problem.num_rows
    assert problem.row_plates == plates
    assert layout.axes == axes
    assert num_rows in (2, N)
    for key, site in problem.sites.items():
        if key in axes:
            assert site.shape[axes[key]] == num_rows
            assert site.dims[axes[key]] in ("row", "mean_dim_0")
    epoch = list(problem.batches().epoch())
    if name not in ("subsample_size",):
        assert sum(batch.size for batch in epoch) == num_rows


def test_the_structure_is_that_of_all_rows() -> None:
    whole, cut = Problem(hierarchical, Y, GROUP), Problem(hierarchical, Y, GROUP, minibatch=6)
    large = cut._data.rows_of_batches.structure(cut._data.structure)
    for key, site in whole.sites.items():
        for other in (cut.sites[key], large.sites[key]):
            assert (other.shape, other.unconstrained_shape, other.plates) == (
                site.shape,
                site.unconstrained_shape,
                site.plates,
            )


def test_the_index_of_the_rows_is_put_where_the_model_takes_it() -> None:
    problem = Problem(told, Y, torch.arange(6))
    for batch in problem.batches().epoch():
        assert batch.index is not None
        assert batch.args[1].tolist() == batch.index.tolist()
        assert len(batch.args[0]) == N


def test_batches_of_a_plate_with_a_size_all_have_it() -> None:
    problem = Problem(drawing, X, Y)
    batches = problem.batches()
    assert {next(batches).size for _ in range(20)} == {6}


# --- what cannot be cut ------------------------------------------------------------------------------------------


def without_plate(x: Tensor, y: Tensor) -> None:
    beta = pyro.sample("beta", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    pyro.sample("y", dist.Normal(x @ beta, 1.0), obs=y)


def gaussian_process(x: Tensor, y: Tensor) -> None:
    f = pyro.sample("f", dist.MultivariateNormal(torch.zeros(len(x)).to(x), torch.eye(len(x)).to(x)))
    with pyro.plate("row", len(x)):
        pyro.sample("y", dist.Normal(f, 1.0), obs=y)


def fixed_plate(x: Tensor, y: Tensor) -> None:
    beta = pyro.sample("beta", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    with pyro.plate("row", N):
        pyro.sample("y", dist.Normal(x @ beta, 1.0), obs=y)


def sum_in_a_factor(x: Tensor, y: Tensor) -> None:
    beta = pyro.sample("beta", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    pyro.factor("likelihood", dist.Normal(x @ beta, 1.0).log_prob(y).sum())


def half_in_a_factor(x: Tensor, y: Tensor) -> None:
    beta = pyro.sample("beta", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    pyro.factor("penalty", (x @ beta).square().sum())
    with pyro.plate("row", len(x)):
        pyro.sample("y", dist.Normal(x @ beta, 1.0), obs=y)


def pairs(x: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("one", len(x), dim=-2), pyro.plate("other", len(x), dim=-1):
        pyro.sample("y", dist.Normal(mu, 1.0), obs=x @ x.T)


def two_each(x: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("row", 2 * len(x)):
        pyro.sample("y", dist.Normal(mu, 1.0), obs=x[:, :2].reshape(-1))


def number_in_the_prior(x: Tensor, y: Tensor) -> None:
    beta = pyro.sample("beta", dist.Normal(torch.zeros(3), 1.0 / len(x)).to_event(1))
    with pyro.plate("row", len(x)):
        pyro.sample("y", dist.Normal(x @ beta, 1.0), obs=y)


def standardizing(x: Tensor, y: Tensor) -> None:
    regression((x - x.mean(0)) / x.std(0), y)


def scaling_itself(x: Tensor, y: Tensor) -> None:
    beta = pyro.sample("beta", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    with pyro.plate("row", len(x)), pyro.poutine.scale(scale=N / len(x)):
        pyro.sample("y", dist.Normal(x @ beta, 1.0), obs=y)


def changing(x: Tensor, y: Tensor) -> None:
    regression(x, y)
    if len(x) > 6:
        pyro.sample("extra", dist.Normal(0.0, 1.0))


def two_tables(x: Tensor, y: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("first", len(x)):
        pyro.sample("x", dist.Normal(mu, 1.0), obs=x)
    with pyro.plate("second", len(y)):
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y)


def two_plates(y: Tensor, *, crossed: bool) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    one = pyro.plate("one", len(y), subsample_size=3, dim=-1)
    two = pyro.plate("two", y.shape[1], subsample_size=3 if crossed else 2, dim=-2)
    if crossed:
        with one as i, two as j:
            pyro.sample("y", dist.Normal(mu, 1.0), obs=y[i][:, j].T)
    else:
        with one as i:
            pyro.sample("rows", dist.Normal(mu, 1.0), obs=y[i, 0])
        with two as j:
            pyro.sample("columns", dist.Normal(mu, 1.0), obs=y[:1, j].T)


def own_rows(y: Tensor) -> None:
    told(y, torch.randperm(len(y))[:5])


def nothing_by_row(scale: float) -> None:
    pyro.sample("mu", dist.Normal(0.0, scale))


BAD: dict[str, tuple[Callable[[], Any], type[LabError], list[str]]] = {
    "no plate": (
        lambda: Problem(without_plate, X, Y, minibatch=6),
        ModelError,
        ["observed site 'y'", "stands in no plate", 'pyro.plate("row", len(...))'],
    ),
    "a latent site that couples the rows": (
        lambda: Problem(gaussian_process, X, Y, minibatch=6),
        ModelError,
        ["latent site 'f'", "stands in no plate"],
    ),
    "a plate of a fixed size": (
        lambda: Problem(fixed_plate, X, Y, minibatch=6),
        ModelError,
        ["cannot be run on some of the rows of x, y", "len(...)", "plate('row')", "20 vs 6"],
    ),
    "a sum over the rows in a factor": (
        lambda: Problem(sum_in_a_factor, X, Y, minibatch=6),
        ModelError,
        ["no observed site of model sum_in_a_factor follows the rows"],
    ),
    "half of the rows' terms in a factor": (
        lambda: Problem(half_in_a_factor, X, Y, minibatch=6),
        ModelError,
        ["site 'penalty'", "on all 20 rows"],
    ),
    "pairs of rows": (
        lambda: Problem(pairs, X, minibatch=6),
        ModelError,
        ["site 'y'", "two axes (one and other)", "pairs of rows"],
    ),
    "two entries for each row": (
        lambda: Problem(two_each, X, minibatch=6),
        ModelError,
        ["site 'y'", "length 12 for 6 rows and 14 for 7"],
    ),
    "the number of rows in a prior": (
        lambda: Problem(number_in_the_prior, X, Y, minibatch=6),
        ModelError,
        ["site 'beta'", "such as their number or mean"],
    ),
    "standardizing inside": (lambda: Problem(standardizing, X, Y, minibatch=6), ModelError, ["site 'y'", "on all 20"]),
    "scaling inside": (lambda: Problem(scaling_itself, X, Y, minibatch=6), ModelError, ["site 'y'", "on all 20"]),
    "a structure that changes": (
        lambda: Problem(changing, X, Y, minibatch=6),
        ModelError,
        ["structure of model changing changes with the number of rows", "'extra'"],
    ),
    "two tables": (
        lambda: Problem(two_tables, Y, Y[:7], minibatch=3),
        ArgumentError,
        ["could be those of", "x (20 rows)", "y (7 rows)", "rows=["],
    ),
    "a prior as long as the data": (
        lambda: Problem(with_prior, SQUARE, Y, torch.zeros(N), minibatch=6),
        ModelError,
        ["x, y, prior", "rows=['x', ...]"],
    ),
    "an unknown name": (
        lambda: Problem(regression, X, Y, minibatch=6, rows=["x", "z"]),
        ArgumentError,
        ["rows names 'z'", "are x, y"],
    ),
    "another axis": (
        lambda: Problem(regression, X, Y, minibatch=6, rows={"x": 1, "y": 0}),
        ArgumentError,
        ["rows of argument 'x' lie along axis 1", "torch.movedim"],
    ),
    "lengths that disagree": (
        lambda: Problem(with_prior, SQUARE, Y, torch.zeros(N), minibatch=6, rows=["x"]),
        ModelError,
        ["cannot be run on some of the rows of x "],
    ),
    "rows without a minibatch": (lambda: Problem(regression, X, Y, rows=["x"]), ArgumentError, ["minibatch=256"]),
    "no data": (
        lambda: Problem(nothing_by_row, 1.0, minibatch=6),
        ArgumentError,
        ["minibatch needs arguments of model nothing_by_row"],
    ),
    "one row": (lambda: Problem(regression, X[:1], Y[:1], minibatch=1), ArgumentError, ["two or more rows"]),
    "another minibatch than the model's": (
        lambda: Problem(drawing, X, Y, minibatch=7),
        ArgumentError,
        ["minibatch is 7, but plate 'row'", "6 of its rows"],
    ),
    "rows of a plate that draws its own": (
        lambda: Problem(drawing, X, Y, minibatch=6, rows=["x"]),
        ArgumentError,
        ["rows says", "plate 'row'"],
    ),
    "rows that the model draws itself": (
        lambda: Problem(own_rows, Y).batches(),
        ModelError,
        ["draws the rows of plate 'row' itself", "pass them as an argument"],
    ),
    "plates of different sizes": (
        lambda: Problem(two_plates, X, crossed=False).batches(),
        ModelError,
        ["see different numbers of rows", "'one' 3 of 20", "'two' 2 of 3"],
    ),
    "crossed plates": (
        lambda: Problem(two_plates, SQUARE, crossed=True).batches(),
        ModelError,
        ["site 'y' lies along the rows of two subsampled plates"],
    ),
    "no batches": (lambda: Problem(regression, X, Y).batches(), ArgumentError, ["has no minibatch", "minibatch=256"]),
    "NaN": (
        lambda: Problem(regression, X, torch.where(torch.arange(N) == 17, torch.nan, Y), minibatch=6),
        DataError,
        ["observed site 'y'", "at index (17,)"],
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_cut_is_named(name: str) -> None:
    make, kind, parts = BAD[name]
    with pytest.raises(kind) as caught:
        make()
    assert type(caught.value) is kind
    for part in parts:
        assert part in str(caught.value)


# --- noise and normalization ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", [nn.Dropout(), nn.BatchNorm1d(3, dtype=torch.float64)], ids=["dropout", "batch norm"])
def test_networks_with_noise_or_batch_normalization_are_not_checked(layer: nn.Module) -> None:
    def model(x: Tensor, y: Tensor) -> None:
        regression(layer(x), y)

    assert Problem(model, X, Y, minibatch=6).num_rows == N
    layer.eval()
    assert Problem(model, X, Y, minibatch=6).num_rows == N


# --- any size ----------------------------------------------------------------------------------------------------------


@settings(max_examples=30)
@given(st.integers(2, 12), st.integers(1, 15), st.integers(1, 4), st.booleans())
def test_the_log_density_is_the_mean_over_an_epoch(num_rows: int, minibatch: int, width: int, as_arrays: bool) -> None:
    """At a random point, by hand: the check at construction is not asked."""
    x, y = SQUARE[:num_rows, :width], Y[:num_rows]
    data = (x.numpy(), y.numpy()) if as_arrays else (x, y)
    problem = Problem(regression, *data, minibatch=minibatch)
    beta = torch.linspace(-1.0, 1.0, width, dtype=torch.float64)
    mean = torch.tensor(0.0, dtype=torch.float64)
    for batch in problem.batches(seed=num_rows).epoch():
        with pyro.poutine.condition(data={"beta": beta}), problem.rows(batch.index):
            trace = pyro.poutine.trace(problem.model).get_trace(*batch.args)
        mean += batch.size / num_rows * trace.log_prob_sum()
    with pyro.poutine.condition(data={"beta": beta}):
        whole = pyro.poutine.trace(problem.model).get_trace(x, y)
    torch.testing.assert_close(mean, whole.log_prob_sum(), rtol=1e-12, atol=1e-12)
    assert problem.minibatch == min(minibatch, num_rows)
    np.testing.assert_array_equal(problem.observed["y"], y)
