"""What posteriors predict of data left out, by Pareto-smoothed importance sampling, and how far two of them differ."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from pyro_vi_lab import arviz_bridge
from pyro_vi_lab.checks.scalars import MIN_HALF
from pyro_vi_lab.errors import DataError

Array = NDArray[Any]

MAX_KHAT = 0.7
"""Shape of the tail of the weights up to which the estimate for a row is good (Vehtari et al. 2024)."""


@dataclass(frozen=True, eq=False)
class LeaveOneOut:
    """Expected log predictive density by leave-one-out cross-validation.

    Args:
        elpd: Its sum over the rows, in nats.
        se: Standard error of the sum, as an estimate for new data.
        pointwise: The log predictive density of every row, ``(N,)``.
        khat: Shape of the tail of every row's weights, ``(N,)``; estimates of rows above 0.7 are not reliable.
        effective_parameters: How much more likely the data are together with themselves, in nats.
    """

    elpd: float
    se: float
    pointwise: Array
    khat: Array
    effective_parameters: float


@dataclass(frozen=True, eq=False)
class PredictiveComparison:
    """What an approximation predicts of rows left out, beside a reference.

    Args:
        reference: Of the reference.
        approximation: Of the approximation.
        difference: elpd of the approximation minus that of the reference, in nats; negative where it predicts worse.
        se: Standard error of the difference.
        noise: Absolute difference between the two halves of the reference.
        num_unreliable: Rows whose k-hat is above 0.7 in one of the two.
    """

    reference: LeaveOneOut
    approximation: LeaveOneOut
    difference: float
    se: float
    noise: float
    num_unreliable: int


def leave_one_out(log_likelihood: Mapping[str, Tensor]) -> LeaveOneOut:
    r"""PSIS-LOO from the log likelihood of every row at every draw.

    .. math:: \mathrm{elpd} = \sum_i \log \frac{\sum_s w_{is}\, p(y_i \mid \theta_s)}{\sum_s w_{is}}, \qquad
              w_{is} \propto 1 / p(y_i \mid \theta_s) \text{, Pareto-smoothed}

    The draws are taken for those of the posterior, whoever made them: of an approximation, the result is how well it
    predicts.

    Args:
        log_likelihood: Observed site to the log likelihood of its rows, as
            :meth:`Problem.log_likelihood <pyro_vi_lab.Problem.log_likelihood>` gives.

    Shape:
        each value ``(C, S, *batch shape)``.

    Raises:
        DataError: Fewer than 50 draws, no rows, or values that are not finite.

    References:
        Vehtari, Gelman & Gabry 2017, "Practical Bayesian model evaluation using leave-one-out cross-validation and
        WAIC", Statistics and Computing 27, eq. 10 and 23.

    Example:
        >>> import torch
        >>> mu = torch.randn(1, 500, 1, generator=torch.Generator().manual_seed(0)) / 3**0.5
        >>> y = torch.tensor([-1.0, 0.0, 1.0])
        >>> result = leave_one_out({"y": torch.distributions.Normal(mu, 1.0).log_prob(y)})
        >>> result.pointwise.shape, result.elpd < -3
        ((3,), True)
    """
    return _leave_one_out(_rows(log_likelihood, "posterior"))


def compare_predictions(reference: Mapping[str, Tensor], approximation: Mapping[str, Tensor]) -> PredictiveComparison:
    """Difference of the expected log predictive densities of an approximation and a reference.

    Args:
        reference: Log likelihood at the draws of the reference, by observed site.
        approximation: The same at the draws of the approximation.

    Shape:
        each value ``(C, S, *batch shape)``.

    Raises:
        DataError: Sites or shapes that differ; fewer than 100 draws of the reference or 50 of the approximation; values
            that are not finite.

    References:
        Vehtari, Gelman & Gabry 2017, Section 5.2 (standard error of a difference).
    """
    if set(reference) != set(approximation):
        raise DataError(
            f"the log likelihoods are of different sites: the reference's of {', '.join(sorted(reference))}, the "
            f"approximation's of {', '.join(sorted(approximation))}"
        )
    for key, value in reference.items():
        if value.shape[2:] != approximation[key].shape[2:]:
            raise DataError(
                f"the log likelihood of site {key!r} has rows {tuple(value.shape[2:])} in the reference and "
                f"{tuple(approximation[key].shape[2:])} in the approximation"
            )
    if not reference:
        raise DataError("a predictive density needs the log likelihood of at least one observed site")
    middle = next(iter(reference.values())).shape[1] // 2
    parts = [
        {key: value[:, piece] for key, value in reference.items()} for piece in (slice(middle), slice(middle, None))
    ]
    first, second = (_leave_one_out(_rows(part, "half of the reference")) for part in parts)
    whole = _leave_one_out(_rows(reference, "reference"))
    other = _leave_one_out(_rows({key: approximation[key] for key in reference}, "approximation"))
    apart = other.pointwise - whole.pointwise
    return PredictiveComparison(
        reference=whole,
        approximation=other,
        difference=float(apart.sum()),
        se=_sum_error(apart),
        noise=abs(first.elpd - second.elpd),
        num_unreliable=int((np.maximum(whole.khat, other.khat) > MAX_KHAT).sum()),
    )


def _leave_one_out(rows: Array) -> LeaveOneOut:
    from scipy.special import logsumexp

    pointwise, khat = np.empty(rows.shape[1]), np.empty(rows.shape[1])
    for i, values in enumerate(rows.T):
        if np.ptp(values) == 0:  # a row that no parameter has a say in
            pointwise[i], khat[i] = values[0], -math.inf
            continue
        weights, khat[i] = arviz_bridge.psis(-values)
        pointwise[i] = logsumexp(weights + values)
    together = logsumexp(rows, axis=0) - math.log(len(rows))
    return LeaveOneOut(
        elpd=float(pointwise.sum()),
        se=_sum_error(pointwise),
        pointwise=pointwise,
        khat=khat,
        effective_parameters=float((together - pointwise).sum()),
    )


def _sum_error(pointwise: Array) -> float:
    """Standard error of a sum over rows, NaN of a single one."""
    return float(np.sqrt(len(pointwise)) * pointwise.std(ddof=1)) if len(pointwise) > 1 else math.nan


def _rows(log_likelihood: Mapping[str, Tensor], role: str) -> Array:
    """Log likelihoods as ``(C·S, N)`` in float64, all sites after one another."""
    columns = []
    for key, value in log_likelihood.items():
        array = value.flatten(0, 1).reshape(value.shape[0] * value.shape[1], -1).numpy(force=True).astype(np.float64)
        bad = ~np.isfinite(array)
        if bad.any():
            draw, row = (int(i) for i in np.argwhere(bad)[0])
            raise DataError(
                f"{int(bad.sum())} log likelihoods of site {key!r} at draws of the {role} are not finite, the first "
                f"({array[draw, row]}) of row {row} at draw {draw}"
            )
        columns.append(array)
    if not columns or not sum(column.shape[1] for column in columns):
        raise DataError("a predictive density needs the log likelihood of at least one row")
    if len(columns[0]) < MIN_HALF:
        raise DataError(
            f"too few draws: {len(columns[0])} of the {role}; at least {MIN_HALF} are needed for the weights of a row"
        )
    return np.concatenate(columns, 1)
