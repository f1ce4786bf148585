"""Choose among models by what they predict of rows that were held out of their fits."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from pyro_vi_lab.errors import ArgumentError, DataError, FitError
from pyro_vi_lab.problem import Problem

if TYPE_CHECKING:
    import pandas


class Prediction(Protocol):
    """A predictive distribution of the outcomes of some rows."""

    def log_density(self, y: Tensor) -> Tensor:
        """Log density of the outcome of each row, ``(N,)``."""


class Candidate(Protocol):
    """A model such as :class:`~pyro_vi_lab.models.BayesianNeuralNetwork`."""

    def problem(self, X: Any, y: Any, *, minibatch: int | None = ...) -> Problem:
        """The model with data."""

    def predictive(self, posterior: Any, X: Any) -> Prediction:
        """What a fit predicts of new rows."""


Name = TypeVar("Name", bound=Hashable)
Model = TypeVar("Model", bound=Candidate)
Fitted = TypeVar("Fitted")


@dataclass(frozen=True, eq=False)
class ModelChoice(Generic[Name, Model, Fitted]):
    """The model that predicts held-out rows best, and what all of them predicted.

    Args:
        name: What the chosen model is called among the candidates.
        model: The chosen model.
        fit: Its fit to all rows.
        scores: Log predictive density of every row that was held out, in nats, by candidate; on the same rows.
    """

    name: Name
    model: Model
    fit: Fitted
    scores: Mapping[Name, Tensor]

    def table(self) -> pandas.DataFrame:
        """One row per candidate: mean ``score`` of a row, how far it is ``below`` the best one, and errors of both.

        Errors are standard errors of the mean over rows; of the differences, which are of the same rows, they are often
        far smaller than those of the scores.
        """
        import pandas

        rows = []
        for score in self.scores.values():
            below = self.scores[self.name] - score
            means = [float(score.mean()), _error(score), float(below.mean()), _error(below)]
            rows.append(dict(zip(("score", "score_error", "below", "below_error"), means, strict=True)))
        return pandas.DataFrame(rows, index=pandas.Index(list(self.scores), name="model"))


def choose_model(
    models: Mapping[Name, Model],
    X: Any,
    y: Any,
    *,
    fit: Callable[[Problem], Fitted],
    held_out: float = 0.2,
    num_splits: int = 1,
    minibatch: int | None = None,
    seed: int = 0,
) -> ModelChoice[Name, Model, Fitted]:
    r"""Fit every model to a part of the rows, and choose the one that predicts the others best.

    .. math:: \text{score} = \frac{1}{|H|} \sum_{n \in H} \log p(y_n \mid x_n, \text{rows not in } H)

    For what the data do not choose by the bound: the temperature of a network, its prior, its layers. Rows that were
    looked at here are no test of the chosen model: keep those apart.

    Args:
        models: Candidates by name, such as ``{T: BayesianNeuralNetwork(net, temperature=T) for T in (1, 0.3, 0.1)}``.
        X: Inputs, rows first: a tensor, an array or a data frame.
        y: Outcome of each row.
        fit: Makes a fit of a problem, such as ``lambda problem: vl.fit(problem, guides.NetworkNormal)``.
        held_out: Part of the rows that is held out of a fit.
        num_splits: Times that this is done, with other rows each; 5 with ``held_out=0.2`` is cross-validation in five
            parts.
        minibatch: Rows in a batch, as of the model's ``problem``.
        seed: Seed of which rows are held out.

    Returns:
        The choice, with a fit of the chosen model to all rows.

    Raises:
        ArgumentError: No candidates, or a number out of range.
        DataError: Too few rows, or data that a model refuses; the rows that its message names are then those of a part.
        FitError: No candidate predicts the held-out rows with a finite density.

    References:
        Wenzel et al. 2020, "How good is the Bayes posterior in deep neural networks really?", ICML, Section 2.3 (the
        temperature). Vehtari & Ojanen 2012, "A survey of Bayesian predictive methods for model assessment, selection
        and comparison", Statistics Surveys 6.

    Example:
        >>> from torch import nn
        >>> from pyro_vi_lab import fit
        >>> from pyro_vi_lab.models import BayesianNeuralNetwork
        >>> X = torch.linspace(-1, 1, 50, dtype=torch.float64)[:, None]
        >>> y = 3 * X[:, 0] + 0.1 * torch.cos(40 * X[:, 0])
        >>> layer = nn.Linear(1, 1).double()
        >>> models = {scale: BayesianNeuralNetwork(layer, noise_scale=0.1, prior_scale=scale) for scale in (0.01, 1.0)}
        >>> choose_model(models, X, y, fit=lambda problem: fit(problem, "full_rank", progress=False)).name
        1.0
    """
    if not models:
        raise ArgumentError("models is empty: give at least one candidate, {name: model}")
    if not 0 < held_out < 1:
        raise ArgumentError(f"held_out is a part of the rows, between 0 and 1, got {held_out!r}")
    if isinstance(num_splits, bool) or not isinstance(num_splits, int) or num_splits < 1:
        raise ArgumentError(f"num_splits must be a positive whole number, got {num_splits!r}")
    num_rows = len(X)
    if len(y) != num_rows:
        raise DataError(f"X has {num_rows} rows and y has {len(y)}; each row needs its outcome")
    size = round(held_out * num_rows)
    if size < 1 or size >= num_rows or size * num_splits > num_rows:
        raise DataError(
            f"{num_rows} rows cannot be split into {num_splits} part(s) of {held_out:g} of them, {size} rows each: at "
            "least one row must be in a part, one outside of it, and the parts must not overlap"
        )
    order = torch.randperm(num_rows, generator=torch.Generator().manual_seed(seed))
    parts = [(order[i * size : (i + 1) * size], _without(order, i, size)) for i in range(num_splits)]
    scores = {}
    for name, model in models.items():
        rows = []
        for out, kept in parts:
            found = fit(model.problem(_take(X, kept), _take(y, kept), minibatch=minibatch))
            rows.append(model.predictive(found, _take(X, out)).log_density(_tensor(_take(y, out))))
        scores[name] = torch.cat(rows)
    means = {name: float(score.mean()) for name, score in scores.items()}
    finite = {name: mean for name, mean in means.items() if math.isfinite(mean)}
    if not finite:
        raise FitError(f"no model predicts the rows that were held out with a finite density: {means}")
    best = max(finite, key=finite.__getitem__)
    return ModelChoice(best, models[best], fit(models[best].problem(X, y, minibatch=minibatch)), scores)


def _without(order: Tensor, part: int, size: int) -> Tensor:
    return torch.cat([order[: part * size], order[(part + 1) * size :]])


def _take(values: Any, index: Tensor) -> Any:
    """Some rows of a tensor, an array, a data frame, or a list."""
    if isinstance(values, Tensor):
        return values[index.to(values.device)]
    if hasattr(values, "columns"):
        return values.iloc[index.numpy()]
    return np.asarray(values)[index.numpy()]


def _tensor(values: Any) -> Tensor:
    return values if isinstance(values, Tensor) else torch.tensor(np.asarray(values))


def _error(values: Tensor) -> float:
    """Standard error of the mean over rows; NaN of a single one."""
    return float(values.std() / math.sqrt(len(values))) if len(values) > 1 else math.nan
