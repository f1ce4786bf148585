"""Moments of importance weights on the scale of logarithms, with upper limits that know of their tail."""

from __future__ import annotations

import math
from statistics import NormalDist
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_vi_lab.checks.log_weights import tail_size
from pyro_vi_lab.errors import ArgumentError

MOMENT_LIMIT = 0.5
"""Pareto shape of the weights from which their second moment is infinite."""


class LogMoment(NamedTuple):
    """Logarithm of a mean of weights or of their squares.

    Args:
        value: Of the draws.
        standard_error: Its own, to first order (delta method).
        upper: Limit that the truth is below.
    """

    value: float
    standard_error: float
    upper: float


def log_mean_weight(log_w: Tensor) -> LogMoment:
    """Log of the mean weight, the evidence, with the limit one standard error above it.

    Args:
        log_w: Log weights ``(S,)``, minus infinity allowed.
    """
    value, error = _log_mean(log_w)
    return LogMoment(value, error, value + error)


def log_second_moment(log_w: Tensor, *, khat_high: float, confidence: float) -> LogMoment:
    r"""Log of the mean squared weight, :math:`\log E_q[w^2]`, and an upper limit of it.

    Args:
        log_w: Log weights ``(S,)``, minus infinity allowed.
        khat_high: Upper limit of the shape k of the weights' tail; from 1/2 on there is no limit.
        confidence: Probability with which the limit shall hold.

    Example:
        >>> log_w = -torch.rand(10_000, dtype=torch.float64).log() * 0.25  # Pareto, E[w²] = 2
        >>> log_second_moment(log_w, khat_high=0.3, confidence=0.95).upper > math.log(2)
        True
    """
    value, error = _log_mean(2 * log_w)
    if error == 0:
        return LogMoment(value, 0.0, value)
    shift = float(log_w.max())
    upper = _highest_square(log_w - shift, 0.0, khat_high, normal_quantile(confidence))
    return LogMoment(value, error, max(math.log(upper) + 2 * shift, value))


def chi2_divergence(log_w: Tensor, *, khat_high: float, confidence: float) -> tuple[float, float]:
    r"""The :math:`\chi^2` divergence :math:`E_q[(w/Z - 1)^2]` of the posterior from q, and an upper limit of it.

    With the mean c of the weights, :math:`E_q[(w - c)^2]` is at least the variance of w, and its error is relative to
    itself: where weights are nearly equal both are small. The evidence Z is at least c less its error.

    Args:
        log_w: Log weights ``(S,)``, minus infinity allowed.
        khat_high: Upper limit of the shape k of the weights' tail; from 1/2 on there is no limit.
        confidence: Probability with which the limit shall hold.
    """
    mean = log_mean_weight(log_w)
    if mean.standard_error == 0:
        return 0.0, 0.0
    relative = log_w - mean.value
    chi2 = float((relative.exp() - 1).square().mean())
    # two limits share the error probability
    z = normal_quantile((1 + confidence) / 2)
    least = 1 - z * mean.standard_error
    if least <= 0:
        return chi2, math.inf
    return chi2, _highest_square(relative, 1.0, khat_high, z) / least**2


def _highest_square(log_w: Tensor, center: float, khat_high: float, z: float) -> float:
    r"""Upper limit of the mean of :math:`(w - c)^2`.

    The mean of the draws is almost always too small where weights have a heavy tail: the rare draws that make it are
    missing. The share of the largest M of the S weights is therefore that of a generalized Pareto distribution beyond
    the threshold u, of the largest shape k that the data allow and of a scale σ that gives the median excess m of the
    data,

    .. math:: E[(w - c)^2; w > u] = \frac MS \Big((u - c)^2 + \frac{2 (u - c) \sigma}{1 - k}
              + \frac{2 \sigma^2}{(1 - k)(1 - 2k)}\Big), \qquad \sigma = \frac{k\, m}{2^k - 1},

    if that is more than their mean, and the rest has a normal limit, z standard errors above its mean. It is infinite
    from k = 1/2 on, where the moment is.

    References:
        Pickands 1975, "Statistical inference using extreme order statistics", Annals of Statistics 3(1).
    """
    if khat_high >= MOMENT_LIMIT:
        return math.inf
    weights = log_w.exp().sort().values
    number, size = len(weights), tail_size(len(weights))
    body, start, tail = weights[:-size], weights[-size - 1], weights[-size:]
    excess, u = float((tail - start).median()), float(start) - center
    k = max(khat_high, -1.0)  # a uniform distribution: weights below a bound that many of them reach
    scale = excess / math.log(2) if abs(k) < 1e-9 else k * excess / math.expm1(k * math.log(2))
    beyond = u**2 + 2 * u * scale / (1 - k) + 2 * scale**2 / ((1 - k) * (1 - 2 * k))
    beyond = max(beyond, float((tail - center).square().mean()))
    squares = torch.cat([(body - center).square(), torch.zeros(size, dtype=body.dtype)])
    # the scale is known as well as the median of M excesses of an exponential distribution is
    error = math.hypot(float(squares.std()) / math.sqrt(number), beyond * size / number / (math.log(2) * size**0.5))
    return float(squares.mean()) + beyond * size / number + z * error


def normal_quantile(confidence: float) -> float:
    """Quantile of the standard normal distribution, of a limit on one side.

    Raises:
        ArgumentError: ``confidence`` does not lie in (1/2, 1).
    """
    if not 0.5 < confidence < 1:
        raise ArgumentError(f"confidence must lie between 0.5 and 1, got {confidence!r}")
    return NormalDist().inv_cdf(confidence)


def _log_mean(log_values: Tensor) -> tuple[float, float]:
    number = log_values.numel()
    total = torch.logsumexp(log_values, 0)
    if number < 2 or not bool(torch.isfinite(total)):
        return float(total) - math.log(number), math.inf
    if bool((log_values == log_values[0]).all()):
        return float(log_values[0]), 0.0
    relative = (log_values - total + math.log(number)).exp()
    return float(total) - math.log(number), float(relative.std()) / math.sqrt(number)
