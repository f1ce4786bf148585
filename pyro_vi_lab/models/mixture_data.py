"""A table that a mixture can be fitted to: checked, with its missing values marked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from pyro_vi_lab.errors import ArgumentError, DataError
from pyro_vi_lab.models.design import numeric

Missing = Literal["error", "marginalize"]
PIECE = 2**16
"""Rows of a memory-mapped array that are read at a time."""


@dataclass(frozen=True, eq=False)
class Table:
    """Rows of numbers.

    Args:
        X: The numbers; zero where they are missing.
        observed: Which are not missing; ``None`` if all are there.
        weight: Weight of each row; ``None`` if all are one.
        columns: Names of the columns.

    Shape:
        X and observed ``(N, D)``, weight ``(N,)``.
    """

    X: Tensor
    observed: Tensor | None
    weight: Tensor | None
    columns: tuple[str, ...]


def table(X: Any, *, sample_weight: Any = None, missing: Missing = "error", num_components: int = 1) -> Table:
    """Check rows of numbers, and convert them to float64 tensors.

    Args:
        X: Data: a tensor, an array or a data frame, ``(N, D)``.
        sample_weight: How much each row counts, ``(N,)``.
        missing: What NaN means: ``"error"``, or ``"marginalize"``: a value that is not known.
        num_components: Rows that are needed at least.

    Raises:
        DataError: No rows, fewer than components, an infinite value, NaN with ``missing="error"``, a row without any
            value, a constant column, negative weights; the message names row or column.
        ArgumentError: ``missing`` is neither.

    Example:
        >>> import math
        >>> table([[1.0, math.nan], [2.0, 3.0], [4.0, 5.0]], missing="marginalize").observed.tolist()
        [[True, False], [True, True], [True, True]]
    """
    if missing not in ("error", "marginalize"):
        raise ArgumentError(f"missing must be 'error' or 'marginalize', got {missing!r}")
    names = [str(column) for column in X.columns] if hasattr(X, "columns") else None
    values = numeric("X", X)
    if values.dim() != 2:
        hint = "; one column is X[:, None]" if values.dim() == 1 else ""
        raise DataError(f"X has shape {tuple(values.shape)}; expected (rows, columns){hint}")
    if 0 in values.shape:
        raise DataError(f"X has shape {tuple(values.shape)}: at least one row and one column are needed")
    columns = tuple(names or (f"x{i}" for i in range(values.shape[1])))
    if len(values) < max(2, num_components):
        raise DataError(f"X has {len(values)} row(s), too few for {num_components} components with unknown covariances")
    infinite = values.isinf()
    if bool(infinite.any()):
        row, column = infinite.nonzero()[0].tolist()
        raise DataError(f"X has an infinite value in row {row}, column {columns[column]!r}; remove or mark it as NaN")
    observed = ~values.isnan()
    if not bool(observed.all()):
        _check_missing(values, observed, columns, missing)
    weight = None if sample_weight is None else _weights(sample_weight, len(values))
    counted = observed if weight is None else observed & (weight > 0)[:, None]
    low = torch.where(counted, values, torch.inf).amin(0)
    constant = low >= torch.where(counted, values, -torch.inf).amax(0)
    if bool(constant.any()):
        column = int(constant.nonzero()[0])
        raise DataError(
            f"column {columns[column]!r} of X is constant ({float(low[column]):g} in every row that counts), so that "
            "its variance is zero; remove the column"
        )
    if bool(observed.all()):
        return Table(values, None, weight, columns)
    return Table(torch.where(observed, values, 0.0), observed, weight, columns)


def mean_and_covariance(data: Table) -> tuple[Tensor, Tensor]:
    """Mean and covariance of the rows (divisor: their weight minus one), of observed values alone the diagonal.

    Returns:
        Mean ``(D,)`` and covariance ``(D, D)``; where values are missing, the matrix is diagonal: that of the pairs of
        columns of different rows need not be positive definite.
    """
    X = data.X
    w = torch.ones_like(X[:, 0]) if data.weight is None else data.weight
    if data.observed is None:
        number = w.sum()
        mean = w @ X / number
        centered = X - mean
        divisor = number - 1 if bool(number > 1) else number
        return mean, (centered * w[:, None]).mT @ centered / divisor
    part = w[:, None] * data.observed
    number = part.sum(0)
    mean = (part * X).sum(0) / number
    divisor = torch.where(number > 1, number - 1, number)
    return mean, ((part * (X - mean).square()).sum(0) / divisor).diag()


def _check_missing(values: Tensor, observed: Tensor, columns: tuple[str, ...], missing: Missing) -> None:
    row, column = (~observed).nonzero()[0].tolist()
    if missing == "error":
        raise DataError(
            f"X has {int((~observed).sum())} missing value(s) (NaN), the first in row {row}, column "
            f"{columns[column]!r}; integrate them out with missing='marginalize', or remove such rows"
        )
    empty = ~observed.any(1)
    if bool(empty.any()):
        raise DataError(f"row {int(empty.nonzero()[0])} of X has no value at all; remove such rows")
    empty = ~observed.any(0)
    if bool(empty.any()):
        raise DataError(f"column {columns[int(empty.nonzero()[0])]!r} of X has no value at all; remove it")


def _weights(sample_weight: Any, num_rows: int) -> Tensor:
    weight = numeric("sample_weight", sample_weight)
    if weight.shape != (num_rows,):
        raise DataError(f"sample_weight has shape {tuple(weight.shape)}; expected ({num_rows},), one for each row of X")
    bad = ~(weight.isfinite() & (weight >= 0))
    if bool(bad.any()):
        row = int(bad.nonzero()[0])
        raise DataError(f"sample_weight of row {row} is {float(weight[row])}; weights are numbers from zero up")
    if not bool(weight.sum() > 0):
        raise DataError("sample_weight is zero in every row")
    return weight


def scanned(X: np.memmap, num_components: int) -> tuple[tuple[str, ...], Tensor, Tensor]:
    """Names of the columns, mean and covariance of a memory-mapped array, read in pieces.

    Raises:
        DataError: As in :func:`table`.
    """
    if X.ndim != 2 or X.dtype != np.float64:
        raise DataError(
            f"X has shape {X.shape} and type {X.dtype}; a memory-mapped array has to be (rows, columns) float64"
        )
    first = table(np.array(X[:PIECE]), num_components=num_components)
    number, mean, sums = 0, first.X.new_zeros(X.shape[1]), first.X.new_zeros(X.shape[1], X.shape[1])
    for start in range(0, len(X), PIECE):
        rows = torch.from_numpy(np.array(X[start : start + PIECE]))
        bad = ~rows.isfinite()
        if bool(bad.any()):
            row, column = bad.nonzero()[0].tolist()
            raise DataError(f"X has a missing or infinite value in row {start + row}, column {first.columns[column]!r}")
        own = rows.mean(0)
        centered, apart = rows - own, own - mean
        # Chan, Golub & LeVeque 1983: moments of two parts
        sums += centered.mT @ centered + (number * len(rows) / (number + len(rows))) * apart.outer(apart)
        mean = mean + apart * len(rows) / (number + len(rows))
        number += len(rows)
    return first.columns, mean, sums / (number - 1)
