"""Means and standard deviations with their standard errors: of independent, weighted and chained draws."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor


class Moments(NamedTuple):
    """Estimates for P scalars, and what they are known to.

    Args:
        mean: Means.
        sd: Standard deviations.
        mean_se: Standard errors of the means.
        log_sd_se: Standard errors of the logarithms of the standard deviations.

    Shape:
        each ``(P,)``.
    """

    mean: Tensor
    sd: Tensor
    mean_se: Tensor
    log_sd_se: Tensor


class Closeness(NamedTuple):
    r"""How far an approximation is from an estimate of the truth, in standard deviations of the latter.

    Args:
        shift: :math:`(m_q - m) / s`.
        shift_se: Its standard error.
        log_ratio: :math:`\log(s_q / s)`.
        log_ratio_se: Its standard error.

    Shape:
        each ``(P,)``.
    """

    shift: Tensor
    shift_se: Tensor
    log_ratio: Tensor
    log_ratio_se: Tensor


def independent_moments(x: Tensor) -> Moments:
    """Of independent draws ``(S, P)``."""
    return weighted_moments(x, x.new_full((len(x),), 1 / len(x)))


def weighted_moments(x: Tensor, weights: Tensor) -> Moments:
    r"""Of independent draws with weights that sum to one, self-normalized.

    .. math:: \mathrm{se}^2(m) = \sum_s w_s^2 (x_s - m)^2

    Shape:
        x ``(S, P)``, weights ``(S,)``.

    References:
        Owen 2013, "Monte Carlo theory, methods and examples", eq. 9.9.
    """
    w = weights[:, None]
    mean = (w * x).sum(0)
    square = (x - mean).square()
    variance = _moving((w * square).sum(0), mean)
    mean_se = (w.square() * square).sum(0).sqrt()
    variance_se = (w.square() * (square - variance).square()).sum(0).sqrt()
    return Moments(mean, variance.sqrt(), mean_se, _half_ratio(variance_se, variance))


def chain_moments(x: Tensor) -> Moments:
    """Of M chains that are independent of each other: the errors come from how the chains' own means differ.

    Shape:
        x ``(M, T, P)``.
    """
    mean = x.mean((0, 1))
    square = (x - mean).square()
    variance = _moving(square.mean((0, 1)), mean)
    root = math.sqrt(len(x))
    mean_se = x.mean(1).std(0) / root
    variance_se = square.mean(1).std(0) / root
    return Moments(mean, variance.sqrt(), mean_se, _half_ratio(variance_se, variance))


def closeness(approximation: Moments, truth: Moments) -> Closeness:
    """Differences of an approximation from an independent estimate of the truth, with errors of both.

    Example:
        >>> x = torch.linspace(-1, 1, 101).double()[:, None]
        >>> near = closeness(independent_moments(x + 0.1), independent_moments(x))
        >>> round(float(near.shift), 2), round(float(near.log_ratio), 2)
        (0.17, 0.0)
    """
    shift = (approximation.mean - truth.mean) / truth.sd
    error = torch.hypot(approximation.mean_se, truth.mean_se) / truth.sd
    ratio = approximation.sd.log() - truth.sd.log()
    return Closeness(
        shift,
        torch.hypot(error, shift * truth.log_sd_se),
        ratio,
        torch.hypot(approximation.log_sd_se, truth.log_sd_se),
    )


def weighted_closeness(x: Tensor, weights: Tensor) -> Closeness:
    r"""Of draws from what the same draws say with weights: their difference is known better than either.

    .. math:: \mathrm{se}^2(m_w - m) = \sum_s \big[w_s (x_s - m_w) - (x_s - m) / S\big]^2

    Shape:
        x ``(S, P)``, weights ``(S,)`` that sum to one.
    """
    truth, plain = weighted_moments(x, weights), independent_moments(x)
    w, each = weights[:, None], 1 / len(x)
    true_score, own_score = (x - truth.mean) / truth.sd, (x - plain.mean) / plain.sd
    ratio = plain.sd.log() - truth.sd.log()
    shift = (plain.mean - truth.mean) / truth.sd
    shift_part = w * true_score - each * own_score * ratio.exp()
    ratio_part = (w * (true_score.square() - 1) - each * (own_score.square() - 1)) / 2
    return Closeness(
        shift,
        torch.hypot(shift_part.square().sum(0).sqrt(), shift * truth.log_sd_se),
        ratio,
        ratio_part.square().sum(0).sqrt(),
    )


class Coverage(NamedTuple):
    """Share of the true draws in a central interval of the approximation, and its standard error, ``(P,)`` each."""

    share: Tensor
    share_se: Tensor


def chain_coverage(approximation: Tensor, truth: Tensor, probability: float) -> Coverage:
    """Of the draws of chains that are independent of each other.

    Shape:
        approximation ``(S, P)``, truth ``(M, T, P)``.
    """
    each = _inside(approximation, truth, probability).mean(1)
    return Coverage(each.mean(0), each.std(0) / math.sqrt(len(each)))


def weighted_coverage(approximation: Tensor, weights: Tensor, probability: float) -> Coverage:
    """Of the same draws with weights.

    Shape:
        approximation ``(S, P)``, weights ``(S,)`` that sum to one.
    """
    inside = _inside(approximation, approximation, probability)
    w = weights[:, None]
    share = (w * inside).sum(0)
    return Coverage(share, (w.square() * (inside - share).square()).sum(0).sqrt())


def _inside(approximation: Tensor, truth: Tensor, probability: float) -> Tensor:
    tail = (1 - probability) / 2
    ordered = approximation.sort(0).values
    last = len(ordered) - 1
    low, high = ordered[round(tail * last)], ordered[round((1 - tail) * last)]
    return ((truth >= low) & (truth <= high)).to(truth)


def chi_squared(log_weights: Tensor) -> float:
    r"""Sample :math:`\chi^2(p \| q) = E_q[w^2] / E_q[w]^2 - 1` of the weights, not smoothed."""
    log_weights = log_weights.double().flatten()
    second = torch.logsumexp(2 * log_weights, 0) + math.log(len(log_weights))
    return float((second - 2 * torch.logsumexp(log_weights, 0)).exp()) - 1


def _moving(variance: Tensor, mean: Tensor) -> Tensor:
    """The variance, or zero where it is that of rounding."""
    rounding = 64 * torch.finfo(mean.dtype).eps * mean.abs()
    return torch.where(variance.sqrt() <= rounding, torch.zeros_like(variance), variance)


def _half_ratio(variance_se: Tensor, variance: Tensor) -> Tensor:
    """The standard error of log sd from that of the variance; zero for a constant."""
    return torch.where(variance > 0, variance_se / (2 * variance).clamp_min(1e-300), torch.zeros_like(variance))
