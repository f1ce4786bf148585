"""Covariates and outcome of a regression: checked, standardized, simulated, and as a linear predictor."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from pyro import poutine
from pyro.nn import PyroModule
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from pyro_vi_lab.errors import ArgumentError, DataError, ExtraError
from pyro_vi_lab.isolation import model_run


@dataclass(frozen=True, eq=False)
class Design:
    """A table that a regression can use; see :func:`design`.

    Args:
        X: Covariates, without a column for the intercept.
        y: Outcome.
        features: Names of the columns of ``X``.

    Shape:
        X ``(N, D)``, y ``(N,)``, both float64.
    """

    X: Tensor
    y: Tensor
    features: tuple[str, ...]


class Simulation(NamedTuple):
    """Simulated data ``X (N, D)`` and ``y (N,)``, and the ``values`` of the other sites that made them."""

    X: Tensor
    y: Tensor
    values: dict[str, Tensor]


def design(X: Any, y: Any, features: Sequence[str] | None = None) -> Design:
    """Check covariates and outcome, and convert them to float64 tensors.

    Args:
        X: Covariates: a tensor, an array or a data frame.
        y: Outcome, one value per row of ``X``.
        features: Names of the columns; by default those of the data frame, or ``x0``, ``x1``, ...

    Shape:
        X ``(N, D)``, y ``(N,)``.

    Raises:
        DataError: Shapes that disagree, no rows or no columns, values that are missing, infinite or not
            numbers, a constant column; the message names the row or the column.
        ArgumentError: As many names as columns are needed.

    Example:
        >>> design([[1.0], [2.0]], [0.0, 1.0], ["dose"]).features
        ('dose',)
    """
    covariates, names = checked_covariates(X, features)
    outcome = numeric("y", y)
    check_shapes(covariates, outcome)
    return Design(covariates, checked_rows("y", outcome), not_constant(covariates, names))


def checked_covariates(X: Any, features: Sequence[str] | None = None) -> tuple[Tensor, tuple[str, ...]]:
    """Covariates as a float64 tensor ``(N, D)``, and their names; see :func:`design`.

    Raises:
        DataError: A shape that is no table, or a value that is missing, infinite or not a number.
        ArgumentError: As many names as columns are needed.
    """
    columns = [str(column) for column in X.columns] if hasattr(X, "columns") else None
    covariates = numeric("X", X)
    check_shapes(covariates, None)
    names = tuple(features or columns or (f"x{i}" for i in range(covariates.shape[1])))
    if len(names) != covariates.shape[1]:
        raise ArgumentError(f"features has {len(names)} names; X has {covariates.shape[1]} columns")
    bad = ~torch.isfinite(covariates)
    if bool(bad.any()):
        row, column = bad.nonzero()[0].tolist()
        raise DataError(
            f"X has {int(bad.sum())} missing or infinite value(s), the first "
            f"({float(covariates[row, column])}) in row {row}, column {names[column]!r}; remove or impute "
            "such rows"
        )
    return covariates, names


def checked_rows(name: str, values: Any, num_rows: int | None = None) -> Tensor:
    """One finite number for each row, as a float64 tensor ``(N,)``.

    Raises:
        DataError: A shape that does not fit, or a value that is missing, infinite or not a number.
    """
    tensor = numeric(name, values)
    if num_rows is not None and tensor.shape != (num_rows,):
        raise DataError(f"{name} has shape {tuple(tensor.shape)}; expected ({num_rows},), one value per row of X")
    bad = ~torch.isfinite(tensor)
    if bool(bad.any()):
        row = int(bad.nonzero()[0])
        raise DataError(
            f"{name} has {int(bad.sum())} missing or infinite value(s), the first ({float(tensor[row])}) in row "
            f"{row}; remove such rows"
        )
    return tensor


def not_constant(covariates: Tensor, names: tuple[str, ...]) -> tuple[str, ...]:
    """The names of columns that vary, all of them.

    Raises:
        DataError: A column has the same value in every row; the message names it.
    """
    constant = (covariates == covariates[0]).all(0)
    if bool(constant.any()):
        column = int(constant.nonzero()[0])
        raise DataError(
            f"column {names[column]!r} of X is constant ({float(covariates[0, column]):g} in every row); "
            "remove it, the model has an intercept of its own"
        )
    return names


def check_shapes(X: Tensor, y: Tensor | None, *, fewest_features: int = 1) -> None:
    """Raise a DataError unless ``X`` is ``(N, D)`` and ``y`` is ``(N,)`` or None, with N, D at least one.

    Args:
        X: Covariates.
        y: Outcome.
        fewest_features: Least D; 0 where the model has other terms.
    """
    if X.dim() != 2:
        raise DataError(f"X has shape {tuple(X.shape)}; expected (rows, features)")
    if X.shape[0] == 0 or X.shape[1] < fewest_features:
        raise DataError(f"X has shape {tuple(X.shape)}: at least one row and one feature are needed")
    if y is not None and y.dim() != 1:
        raise DataError(f"y has shape {tuple(y.shape)}; expected ({X.shape[0]},), one value per row of X")
    if y is not None and len(y) != len(X):
        raise DataError(f"X has {len(X)} rows and y has {len(y)}; each row needs its outcome")


def linear_predictor(X: Tensor, intercept: Tensor, beta: Tensor) -> Tensor:
    """Intercept + X·beta, also where both come with a batch dimension on the left (vectorized particles).

    Shape:
        X ``(N, D)``; intercept ``()``, beta ``(D,)``, result ``(N,)``; or ``(K, 1)``, ``(K, D)``, ``(K, N)``.
    """
    return intercept + beta @ X.T


def standardized(X: Tensor) -> Tensor:
    """Columns with mean zero and standard deviation one (divisor N)."""
    return (X - X.mean(0)) / X.std(0, correction=0)


def simulated(
    model: PyroModule, num_rows: int, num_features: int, *, correlation: float, seed: int, **others: Any
) -> Simulation:
    r"""Draw covariates, parameters and outcome of a regression; the parameters come from the model's prior.

    The covariates are standard normal, neighbors correlated: :math:`\mathrm{corr}(x_i, x_j) = \rho^{|i-j|}`.

    Args:
        model: A regression.
        num_rows: N.
        num_features: D.
        correlation: ρ.
        seed: Seed of everything drawn.
        **others: Further arguments of the model.

    Raises:
        ArgumentError: No rows or features, or a correlation outside (-1, 1).
    """
    for name, value in (("num_rows", num_rows), ("num_features", num_features)):
        if value < 1:
            raise ArgumentError(f"{name} must be at least 1, got {value}")
    if not -1 < correlation < 1:
        raise ArgumentError(f"correlation must lie between -1 and 1, got {correlation}")
    with model_run(seed=seed, dtype=torch.float64, validate=True), torch.no_grad():
        noise = torch.randn(num_rows, num_features)
        columns = [noise[:, 0]]
        for i in range(1, num_features):
            columns.append(correlation * columns[-1] + math.sqrt(1 - correlation**2) * noise[:, i])
        X = torch.stack(columns, 1)
        with poutine.trace() as tracer:
            model(X, **others)
    values: dict[str, Any] = {
        key: node["value"]
        for key, node in tracer.trace.nodes.items()
        if node["type"] == "sample" and not site_is_subsample(node)
    }
    return Simulation(X, values.pop("y").to(X), values)


def scikit_learn_data(name: str) -> Design:
    """The table that ``sklearn.datasets.load_<name>`` gives, as it is.

    Raises:
        ExtraError: scikit-learn is not installed.
    """
    try:
        from sklearn import datasets
    except ImportError as error:
        raise ExtraError(
            f"the {name.replace('_', ' ')} data come with scikit-learn, which is not installed: "
            "pip install 'pyro-vi-lab[examples]'"
        ) from error
    options = {"scaled": False} if name == "diabetes" else {}
    data = getattr(datasets, f"load_{name}")(**options)
    return design(data.data, data.target, [str(feature) for feature in data.feature_names])


def positive(**values: float) -> None:
    """Raise an ArgumentError that names the first value that is not a positive finite number."""
    for name, value in values.items():
        if not (value > 0 and math.isfinite(value)):
            raise ArgumentError(f"{name} must be a positive number, got {value!r}")


def numeric(name: str, values: Any) -> Tensor:
    """Values as a float64 tensor; a DataError that names the column where they are no numbers."""
    for column in getattr(values, "columns", ()):
        if values[column].dtype.kind not in "biuf":
            raise DataError(
                f"column {str(column)!r} of {name} is not numeric (dtype {values[column].dtype}); encode it as numbers"
            )
    if isinstance(values, Tensor):
        return values.detach().to(torch.float64)
    try:
        array = np.asarray(values)
    except ValueError as error:
        raise DataError(f"{name} cannot be read as an array: {error}") from error
    if array.dtype.kind not in "biuf":
        raise DataError(f"{name} is not numeric (dtype {array.dtype}); encode it as numbers")
    return torch.tensor(array, dtype=torch.float64)
