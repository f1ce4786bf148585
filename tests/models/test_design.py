from __future__ import annotations

import math
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import pyro
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from pyro.nn import PyroModule

from pyro_vi_lab.errors import ArgumentError, DataError, ExtraError, LabError
from pyro_vi_lab.models import EightSchools, LinearRegression, LogisticRegression
from pyro_vi_lab.models.design import design, scikit_learn_data, standardized

X = np.arange(12.0).reshape(6, 2) ** 2
y = np.array([0.0, 1.0, 0.0, 1.0, 1.0, 0.0])

REGRESSIONS: dict[str, Callable[[], LinearRegression | LogisticRegression]] = {
    "linear, known noise": lambda: LinearRegression(noise_scale=0.5),
    "linear, unknown noise": LinearRegression,
    "logistic": LogisticRegression,
}


def changed(array: np.ndarray, index: Any, value: float) -> np.ndarray:
    result = array.copy()
    result[index] = value
    return result


# --- what comes in ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("covariates", "outcome"),
    [
        (X, y),
        (X.tolist(), y.tolist()),
        (torch.tensor(X, dtype=torch.float32), torch.tensor(y, dtype=torch.bool)),
        (X.astype(int), y.astype(np.int8)),
        (pd.DataFrame(X), pd.Series(y)),
    ],
    ids=["arrays", "lists", "tensors", "whole numbers", "pandas"],
)
def test_all_tables_become_float64_tensors(covariates: Any, outcome: Any) -> None:
    data = design(covariates, outcome)
    assert (data.X.dtype, data.y.dtype) == (torch.float64, torch.float64)
    assert data.X.tolist() == X.tolist()
    assert data.y.tolist() == y.tolist()


def test_read_only_arrays_are_copied() -> None:
    frozen = X.copy()
    frozen.flags.writeable = False
    assert design(frozen, y).X.tolist() == X.tolist()


def test_names_come_from_the_user_the_data_frame_or_the_position() -> None:
    frame = pd.DataFrame(X, columns=["age", "dose"])
    assert design(frame, y).features == ("age", "dose")
    assert design(frame, y, ["a", "b"]).features == ("a", "b")
    assert design(X, y).features == ("x0", "x1")


@pytest.mark.parametrize(
    ("covariates", "outcome", "message"),
    [
        (
            changed(X, (3, 1), math.nan),
            y,
            r"X has 1 missing or infinite value.* first \(nan\) in row 3, column 'x1'",
        ),
        (
            changed(X, (slice(2, 4), 0), math.inf),
            y,
            r"X has 2 missing .* first \(inf\) in row 2, column 'x0'",
        ),
        (X, changed(y, 5, math.nan), r"y has 1 missing or infinite value.* first \(nan\) in row 5"),
        (changed(X, (slice(None), 1), 3.0), y, r"column 'x1' of X is constant \(3 in every row\)"),
        (X, y[:5], "X has 6 rows and y has 5"),
        (X, y[:, None], r"y has shape \(6, 1\); expected \(6,\)"),
        (X[:, 0], y, r"X has shape \(6,\); expected \(rows, features\)"),
        (X[:0], y[:0], r"X has shape \(0, 2\): at least one row and one feature"),
        (X[:, :0], y, r"X has shape \(6, 0\): at least one row and one feature"),
        (X.astype(str), y, r"X is not numeric \(dtype <U32\)"),
        (X, ["yes", "no", "no", "no", "yes", "no"], "y is not numeric"),
        ([[1.0, 2.0], [3.0]], y[:2], "X cannot be read as an array"),
        (pd.DataFrame({"age": X[:, 0], "sex": list("mfmfmf")}), y, "column 'sex' of X is not numeric"),
    ],
)
def test_bad_tables_are_named(covariates: Any, outcome: Any, message: str) -> None:
    for make in REGRESSIONS.values():
        with pytest.raises(DataError, match=message):
            make().problem(covariates, outcome)
    with pytest.raises(DataError, match=message):
        LinearRegression().exact(covariates, outcome)


def test_as_many_names_as_columns() -> None:
    with pytest.raises(ArgumentError, match="features has 3 names; X has 2 columns"):
        LogisticRegression().problem(X, y, features=["a", "b", "c"])


@given(shape_x=st.lists(st.integers(0, 4), max_size=3), shape_y=st.lists(st.integers(0, 4), max_size=2))
def test_shapes_are_accepted_or_refused_by_name(shape_x: list[int], shape_y: list[int]) -> None:
    covariates = torch.arange(math.prod(shape_x)).reshape(shape_x)
    fits = len(shape_x) == 2 and 0 not in shape_x and shape_y == shape_x[:1] and shape_x[0] > 1
    if fits:
        assert design(covariates, torch.zeros(shape_y)).X.shape == tuple(shape_x)
    else:
        with pytest.raises(DataError, match=r"^(X|y|column 'x0' of X) (has|is)"):
            design(covariates, torch.zeros(shape_y))


@pytest.mark.parametrize("name", REGRESSIONS)
def test_shapes_are_checked_in_a_plain_pyro_run_too(name: str) -> None:
    with pytest.raises(DataError, match=r"y has shape \(6, 1\); expected \(6,\)"):
        REGRESSIONS[name]()(torch.tensor(X), torch.tensor(y)[:, None])


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf])
@pytest.mark.parametrize(
    ("model", "argument"),
    [
        (LinearRegression, "noise_scale"),
        (LinearRegression, "prior_scale"),
        (LinearRegression, "intercept_scale"),
        (LinearRegression, "precision_shape"),
        (LinearRegression, "precision_rate"),
        (LogisticRegression, "prior_scale"),
        (LogisticRegression, "intercept_scale"),
    ],
)
def test_scales_must_be_positive(model: Callable[..., Any], argument: str, value: float) -> None:
    with pytest.raises(ArgumentError, match=f"{argument} must be a positive number, got {value}"):
        model(**{argument: value})


def test_standardized_columns() -> None:
    result = standardized(torch.tensor(X))
    eps = torch.finfo(torch.float64).eps
    torch.testing.assert_close(result.mean(0), torch.zeros(2).double(), rtol=0, atol=10 * eps)
    torch.testing.assert_close(result.square().mean(0), torch.ones(2).double(), rtol=10 * eps, atol=0)


def test_without_scikit_learn_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(ExtraError, match=r"breast cancer data .* pip install 'pyro-vi-lab\[examples\]'") as caught:
        scikit_learn_data("breast_cancer")
    assert isinstance(caught.value, LabError)
    assert isinstance(caught.value, ImportError)


# --- simulation -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", REGRESSIONS)
def test_simulations_repeat_and_leave_the_random_state_alone(name: str) -> None:
    model, state = REGRESSIONS[name](), torch.get_rng_state()
    first, again, other = (model.simulate(50, 3, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(first.X, again.X)
    assert torch.equal(first.y, again.y)
    assert not torch.equal(first.y, other.y)
    assert not torch.equal(first.X, other.X)
    assert first.X.dtype == first.y.dtype == torch.float64
    problem = model.problem(first.X, first.y)
    shapes = {key: site.shape for key, site in problem.sites.items() if key != "y"}
    assert {key: value.shape for key, value in first.values.items()} == shapes


def test_simulated_covariates_have_the_correlation_that_was_asked_for() -> None:
    simulated = LogisticRegression().simulate(20_000, 4, seed=0, correlation=-0.6)
    found = torch.corrcoef(simulated.X.T)
    lags = (torch.arange(4)[:, None] - torch.arange(4)).abs()
    expected = (-0.6) ** lags.double()
    # standard error of a correlation: (1 - rho²) / sqrt(N)
    assert bool(((found - expected).abs() <= 5 * (1 - expected**2) / math.sqrt(20_000) + 1e-12).all())


def test_simulated_outcomes_follow_the_simulated_parameters() -> None:
    simulated = LinearRegression(noise_scale=0.3).simulate(2000, 3, seed=5)
    mean = simulated.values["intercept"] + simulated.X @ simulated.values["beta"]
    z = (simulated.y - mean) / 0.3
    assert abs(float(z.square().sum()) - 2000) < 5 * math.sqrt(2 * 2000)
    labels = LogisticRegression().simulate(2000, 3, seed=5)
    p = torch.sigmoid(labels.values["intercept"] + labels.X @ labels.values["beta"])
    assert abs(float((labels.y - p).sum())) < 5 * math.sqrt(float((p * (1 - p)).sum()))


def test_simulation_arguments_are_checked() -> None:
    with pytest.raises(ArgumentError, match="num_features must be at least 1, got 0"):
        LinearRegression().simulate(10, 0)
    with pytest.raises(ArgumentError, match="num_rows must be at least 1, got 0"):
        LogisticRegression().simulate(0, 1)
    with pytest.raises(ArgumentError, match="correlation must lie between -1 and 1, got 1"):
        LogisticRegression().simulate(10, 2, correlation=1)


# --- in plain Pyro ----------------------------------------------------------------------------------

MODELS: dict[str, tuple[Callable[[], PyroModule], tuple[torch.Tensor, torch.Tensor]]] = {
    **{name: (make, (torch.tensor(X), torch.tensor(y))) for name, make in REGRESSIONS.items()},
    "eight schools": (lambda: EightSchools(centered=False), (torch.tensor(X[1:, 0]), torch.tensor(y[1:]))),
    "eight schools, centered": (
        lambda: EightSchools(centered=True),
        (torch.tensor(X[1:, 0]), torch.tensor(y[1:])),
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_vectorized_particles_have_the_density_of_single_runs(name: str) -> None:
    torch.set_default_dtype(torch.float64)
    make, data = MODELS[name]
    model = make()
    with pyro.plate("particles", 5, dim=-2):
        trace = poutine.trace(model).get_trace(*data)
    trace.compute_log_prob()
    nodes = {key: node for key, node in trace.nodes.items() if "log_prob" in node}
    together = sum(node["log_prob"].sum(-1) for node in nodes.values() if node["log_prob"].dim() == 2)
    for k in range(5):
        rows = {key: node["value"][k] for key, node in nodes.items() if node["value"].dim() == 2}
        given = {key: row if len(row) > 1 else row[0] for key, row in rows.items()}
        single = poutine.trace(poutine.condition(model, data=given)).get_trace(*data)
        torch.testing.assert_close(together[k], single.log_prob_sum())


@pytest.mark.parametrize("name", MODELS)
def test_an_ordinary_pyro_fit_lowers_the_loss(name: str) -> None:
    make, data = MODELS[name]
    model = make()
    loss = Trace_ELBO(num_particles=20, vectorize_particles=True, max_plate_nesting=1)
    svi = SVI(model, AutoNormal(model), pyro.optim.Adam({"lr": 0.05}), loss)
    losses = [svi.step(*data) for _ in range(100)]
    assert np.mean(losses[-10:]) < np.mean(losses[:10])
