"""Data of an autoencoder: rows of numbers or images, checked, and named where they are wrong."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from pyro_vi_lab.errors import DataError

Likelihood = Literal["bernoulli", "continuous_bernoulli", "normal", "categorical"]


def as_rows(X: Any, name: str = "X") -> tuple[Tensor, list[Any] | None]:
    """A tensor of the data, in their own type, and the labels of the rows of a data frame.

    Raises:
        DataError: The data are no numbers.

    Example:
        >>> as_rows([[1.0, 2.0]])[0].dtype
        torch.float64
    """
    labels = X.index.tolist() if hasattr(X, "index") and hasattr(X, "columns") else None
    for column in getattr(X, "columns", ()):
        if X[column].dtype.kind not in "biuf":
            raise DataError(
                f"column {str(column)!r} of {name} is not numeric (dtype {X[column].dtype}); encode it as numbers"
            )
    if isinstance(X, Tensor):
        return X.detach(), labels
    try:
        array = np.asarray(X)
    except ValueError as error:
        raise DataError(f"{name} cannot be read as an array: {error}") from error
    if array.dtype.kind not in "biuf":
        raise DataError(f"{name} is not numeric (dtype {array.dtype}); encode it as numbers")
    return torch.tensor(array), labels


def checked_rows(
    X: Any, shape: Sequence[int], likelihood: Likelihood, num_categories: int | None = None
) -> tuple[Tensor, list[Any] | None]:
    """The rows of an autoencoder, in their own type, with their labels.

    Args:
        X: Rows of numbers: a tensor, an array or a data frame.
        shape: Shape of a row.
        likelihood: What the values may be: 0 and 1, numbers from 0 to 1, any, or whole numbers.
        num_categories: Of the likelihood ``"categorical"``, how many.

    Shape:
        X ``(N, *shape)``.

    Raises:
        DataError: Another shape, a value that is missing, infinite or none that the likelihood can have; the message
            names the row and the place in it.

    Example:
        >>> checked_rows([[0, 1], [1, 3]], (2,), "bernoulli")
        Traceback (most recent call last):
            ...
        pyro_vi_lab.errors.DataError: X has 1 value(s) other than 0 and 1, the first (3) in row 1 at (1,): ...
    """
    rows, labels = as_rows(X)
    shape = tuple(shape)
    if rows.dim() != len(shape) + 1 or tuple(rows.shape[1:]) != shape or not len(rows):
        expected = "(rows, " + ", ".join(map(str, shape)) + ")"
        hint = ""
        if rows.dim() > 1 and rows.shape[1:].numel() == torch.Size(shape).numel():
            hint = f"; X.reshape(-1, {', '.join(map(str, shape))}) gives it, if the numbers are in that order"
        raise DataError(f"X has shape {tuple(rows.shape)}; expected {expected}{hint}")
    refuse_missing(rows, labels)
    if likelihood == "bernoulli":
        what = "other than 0 and 1"
        advice = (
            "binarize them, such as by torch.bernoulli(X), or take likelihood='continuous_bernoulli' for gray values "
            "from 0 to 1: the cross-entropy of gray values is no log likelihood"
        )
        _refuse((rows != 0) & (rows != 1), rows, labels, what, advice)
    elif likelihood == "continuous_bernoulli":
        _refuse((rows < 0) | (rows > 1), rows, labels, "outside of 0 to 1", "divide X by its largest possible value")
    elif likelihood == "categorical":
        assert num_categories is not None
        wrong = (rows != rows.round()) | (rows < 0) | (rows >= num_categories)
        what = f"other than the whole numbers 0 to {num_categories - 1}"
        _refuse(wrong, rows, labels, what, f"num_categories is {num_categories}")
        rows = rows.long()
    return rows, labels


def refuse_missing(rows: Tensor, labels: Sequence[Any] | None = None) -> None:
    """Raise a DataError that names the first missing or infinite value."""
    _refuse(~torch.isfinite(rows), rows, labels, None, "remove or impute such rows")


def refuse_one_row(rows: Tensor, labels: Sequence[Any] | None = None) -> None:
    """Raise a DataError unless there are two different rows."""
    if len(rows) == 1:
        raise DataError("X has one row; at least two are needed to learn how rows differ")
    if bool((rows == rows[0]).all()):
        raise DataError(f"all {len(rows)} rows of X are equal: every column is constant, and there is nothing to learn")


def _refuse(wrong: Tensor, rows: Tensor, labels: Sequence[Any] | None, what: str | None, advice: str) -> None:
    if not bool(wrong.any()):
        return
    row, *place = wrong.nonzero()[0].tolist()
    value = float(rows[(row, *place)])
    where = f"row {row}" if labels is None else f"row {labels[row]!r}"
    kind = "missing or infinite value(s)" if what is None else f"value(s) {what}"
    raise DataError(f"X has {int(wrong.sum())} {kind}, the first ({value:g}) in {where} at {tuple(place)}: {advice}")
