"""Which rows are held out, what is compared, and what comes back."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas
import pytest
import torch
from torch import Tensor, nn

from pyro_vi_lab import choose_model, fit
from pyro_vi_lab.errors import ArgumentError, DataError, FitError
from pyro_vi_lab.models import BayesianNeuralNetwork, NormalPrediction

X = torch.arange(20, dtype=torch.float64)[:, None]
Y = 2.0 * torch.arange(20, dtype=torch.float64)


class Mean:
    """Predicts the mean of the outcomes, with a noise that it is given; keeps what it saw."""

    def __init__(self, noise: float) -> None:
        self.noise = noise
        self.seen: list[Any] = []
        self.minibatches: list[int | None] = []

    def problem(self, X: Any, y: Any, *, minibatch: int | None = None) -> Any:
        self.seen.append(X)
        self.minibatches.append(minibatch)
        return torch.tensor(np.asarray(y), dtype=torch.float64).mean()

    def predictive(self, posterior: Any, X: Any) -> NormalPrediction:
        self.seen.append(X)
        return NormalPrediction(posterior.expand(1, len(X)), torch.tensor([self.noise], dtype=torch.float64))


def same(problem: Any) -> Any:
    return problem


def test_the_model_of_the_highest_score_is_fitted_to_all_rows() -> None:
    """Outcomes have a standard deviation of 11.5, which of three noises is the right one."""
    models = {noise: Mean(noise) for noise in (1.0, 11.5, 300.0)}
    choice = choose_model(models, X, Y, fit=same, num_splits=5, minibatch=4)
    assert choice.name == 11.5
    assert choice.model is models[11.5]
    assert float(choice.fit) == float(Y.mean())
    assert set(models[1.0].minibatches) == {4}
    table = choice.table()
    assert table.loc[11.5, "below"] == 0.0
    assert table["score"].idxmax() == 11.5
    below = choice.scores[11.5] - choice.scores[1.0]
    assert table.loc[1.0, "below_error"] == pytest.approx(float(below.std()) / math.sqrt(20))


def test_the_score_is_the_density_of_rows_that_the_fit_has_not_seen() -> None:
    model = Mean(3.0)
    choice = choose_model({"one": model}, X, Y, fit=same)
    kept, out = (set(rows[:, 0].tolist()) for rows in model.seen[:2])
    assert len(out) == 4
    assert kept | out == set(range(20))
    assert not kept & out
    mean = 2 * np.mean(list(kept))
    expected = [-0.5 * ((2 * n - mean) / 3) ** 2 - math.log(3 * math.sqrt(2 * math.pi)) for n in sorted(out)]
    assert sorted(choice.scores["one"].tolist()) == pytest.approx(sorted(expected))


def test_splits_hold_out_every_row_once() -> None:
    model = Mean(3.0)
    choose_model({"one": model}, X, Y, fit=same, num_splits=5, seed=3)
    out = torch.cat(model.seen[1:10:2])[:, 0]
    assert sorted(out.tolist()) == list(range(20))
    another = Mean(3.0)
    choose_model({"one": another}, X, Y, fit=same, num_splits=5, seed=4)
    assert not torch.equal(model.seen[1], another.seen[1])


@pytest.mark.parametrize("form", [np.asarray, pandas.DataFrame, lambda values: values.tolist()])
def test_rows_of_any_kind(form: Callable[[Tensor], Any]) -> None:
    y = pandas.Series(Y.numpy()) if form is pandas.DataFrame else form(Y)
    found, plain = (choose_model({"one": Mean(3.0)}, *data, fit=same) for data in ((form(X), y), (X, Y)))
    torch.testing.assert_close(found.scores["one"], plain.scores["one"])


def test_a_model_that_predicts_no_number_is_not_chosen() -> None:
    models = {"bad": Mean(math.inf), "good": Mean(3.0)}
    assert choose_model(models, X, Y, fit=same).name == "good"
    with pytest.raises(FitError, match="no model predicts the rows that were held out with a finite density"):
        choose_model({"bad": models["bad"]}, X, Y, fit=same)


def test_networks_by_temperature() -> None:
    """Of a linear regression with the right noise Bayes' rule predicts better than a posterior a thousand times as wide."""
    torch.manual_seed(0)
    x = torch.randn(40, 2, dtype=torch.float64)
    y = x[:, 0] + 0.3 * torch.randn(40, dtype=torch.float64)
    layer = nn.Linear(2, 1).double()
    models = {T: BayesianNeuralNetwork(layer, noise_scale=0.3, temperature=T) for T in (1.0, 1e3)}
    choice = choose_model(models, x, y, fit=lambda problem: fit(problem, "full_rank", progress=False))
    assert choice.name == 1.0
    assert choice.model.predictive(choice.fit, x).log_density(y).isfinite().all()


@pytest.mark.parametrize(
    ("options", "error", "expected"),
    [
        ({"models": {}}, ArgumentError, "models is empty"),
        ({"held_out": 1.0}, ArgumentError, "held_out is a part of the rows, between 0 and 1, got 1.0"),
        ({"num_splits": 0}, ArgumentError, "num_splits must be a positive whole number, got 0"),
        ({"held_out": 0.01}, DataError, r"20 rows cannot be split into 1 part\(s\) of 0.01 of them, 0 rows each"),
        ({"num_splits": 6}, DataError, r"20 rows cannot be split into 6 part\(s\) of 0.2 of them, 4 rows each"),
        ({"y": Y[1:]}, DataError, "X has 20 rows and y has 19; each row needs its outcome"),
    ],
)
def test_bad_arguments(options: dict[str, Any], error: type[Exception], expected: str) -> None:
    given = {"models": {"one": Mean(1.0)}, "X": X, "y": Y, **options}
    with pytest.raises(error, match=expected):
        choose_model(given.pop("models"), given.pop("X"), given.pop("y"), fit=same, **given)
