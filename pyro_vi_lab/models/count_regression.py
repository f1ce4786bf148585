"""What regressions of counts share: the exposure of every row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pyro_vi_lab.errors import ArgumentError, DataError
from pyro_vi_lab.models.design import checked_rows
from pyro_vi_lab.models.regression import Regression
from pyro_vi_lab.posterior import Posterior
from pyro_vi_lab.problem import Problem


class CountRegression(Regression):
    """A regression of counts on the log scale; see :class:`PoissonRegression` and its neighbors."""

    def problem(
        self,
        X: Any,
        y: Any,
        *,
        exposure: Any = None,
        offset: Any = None,
        standardize: bool = False,
        features: Sequence[str] | None = None,
        name: str | None = None,
    ) -> Problem:
        """The model with checked data; see :meth:`pyro_vi_lab.models.regression.Regression.problem`.

        Args:
            X: Covariates, without a column for the intercept.
            y: Counts.
            exposure: Time, area or number at risk of every row, with which the mean grows in proportion.
            offset: The same as a logarithm; one of the two at most.
            standardize: Whether the priors are those of standardized covariates.
            features: Names of the columns.
            name: What to call the problem.

        Raises:
            DataError: The data do not fit: a count that is negative or not whole, an exposure that is not positive;
                the message names the row.
            ArgumentError: Both exposure and offset.
        """
        added = log_exposure(exposure, offset)
        return super().problem(X, y, offset=added, standardize=standardize, features=features, name=name)

    def predict(
        self, posterior: Posterior | Mapping[str, Tensor], X: Any, *, exposure: Any = None, offset: Any = None
    ) -> Tensor:
        """Expected count of every row, averaged over the draws, ``(N,)``.

        Args:
            posterior: Draws, or the values of a point by site.
            X: Covariates as they are, ``(N, D)``.
            exposure: As of :meth:`problem`; one by default.
            offset: The same as a logarithm.
        """
        return super().predict(posterior, X, offset=log_exposure(exposure, offset))

    def expected(
        self, posterior: Posterior | Mapping[str, Tensor], X: Any, *, exposure: Any = None, offset: Any = None
    ) -> Tensor:
        """Expected count of every row given each draw, ``(C, S, N)``; see :meth:`predict`."""
        return super().expected(posterior, X, offset=log_exposure(exposure, offset))

    def predictive(
        self,
        posterior: Posterior | Mapping[str, Tensor],
        X: Any,
        *,
        exposure: Any = None,
        offset: Any = None,
        seed: int = 0,
    ) -> Tensor:
        """A new count of every row for each draw, ``(C, S, N)``; see :meth:`predict`."""
        return super().predictive(posterior, X, offset=log_exposure(exposure, offset), seed=seed)


def log_exposure(exposure: Any, offset: Any) -> Any:
    """The offset, or the logarithm of the exposure.

    Raises:
        ArgumentError: Both are given.
        DataError: An exposure that is not positive.
    """
    if exposure is None:
        return offset
    if offset is not None:
        raise ArgumentError("exposure and offset are the same, once as it is and once as a logarithm: give one")
    values = checked_rows("exposure", exposure)
    wrong = values <= 0
    if bool(wrong.any()):
        row = int(wrong.nonzero()[0])
        raise DataError(
            f"exposure has {int(wrong.sum())} value(s) that are not positive, the first ({float(values[row]):g}) in "
            f"row {row}; without exposure nothing is counted: remove such rows"
        )
    return torch.log(values)
