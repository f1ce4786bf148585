"""Pareto k-hat and effective sample size of an approximation, used as an importance sampling proposal."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyro_vi_lab import arviz_bridge
from pyro_vi_lab.checks.log_weights import LogWeights, log_weights, tail_size
from pyro_vi_lab.errors import ArgumentError

MAX_KHAT = 0.7
"""Pareto k-hat from which importance sampling is not practical, with however many draws (Vehtari et al. 2024)."""
SHRINKAGE, CENTER = 10, 0.5
"""ArviZ's k-hat is drawn towards 0.5 as if by ten more draws (Vehtari et al. 2024, Appendix G)."""
FIXED_POINT_STEPS = 200
"""Of a contraction by 1.96 standard errors of k = 0: by 0.2 for 10,000 draws, 0.9 for the fewest that are taken."""
MANY_DRAWS = 10**6
"""The interval is for the k-hat of so many draws."""


@dataclass(frozen=True, eq=False)
class ImportanceCheck:
    r"""What the importance weights of an approximation say about it.

    Args:
        khat: Shape of the generalized Pareto distribution fitted to the largest weights. The weights have
            :math:`\lfloor 1/k \rfloor` finite moments; below 0.7 importance sampling from the approximation
            is practical. Minus infinity where all weights are equal, ``inf`` where too few weights count for
            a fit.
        khat_se: Standard error of ``khat``, :math:`(1 + k) / \sqrt M` with M the size of the tail that was
            fitted; zero where k-hat is infinite.
        khat_interval: Where the k-hat of a million draws would lie with probability 0.95.
        draws_needed: Draws from which on estimates by these weights are reliable, :math:`10^{1/(1-\max(0, k))}`;
            infinite from k = 1 on.
        convergence_rate: How the variance of estimates falls with more draws, as a power of their number: 1 is as fast
            as with a finite variance, 0 not at all.
        ess: Effective number of draws after reweighting.
        ess_fraction: ``ess`` divided by the number of draws, in (0, 1].
        log_mean_weight: Log of the mean smoothed weight, an estimate of the log evidence.
        support_mismatch: Fraction of the draws at which the model's density is zero: mass of the approximation outside
            of the support of the posterior.
        smoothed_log_weights: Pareto-smoothed log weights, whose exponentials sum to one; minus infinity where the
            model's density is zero.

    Shape:
        smoothed_log_weights: that of the log densities.
    """

    khat: float
    khat_se: float
    khat_interval: tuple[float, float]
    draws_needed: float
    convergence_rate: float
    ess: float
    ess_fraction: float
    log_mean_weight: float
    support_mismatch: float
    smoothed_log_weights: Tensor

    @property
    def num_draws(self) -> int:
        """Number of draws, S."""
        return self.smoothed_log_weights.numel()

    @property
    def khat_threshold(self) -> float:
        r"""k-hat up to which so many draws are enough, :math:`\min(1 - 1/\log_{10} S, 0.7)`.

        References:
            Vehtari, Simpson, Gelman, Yao, Gabry 2024, "Pareto smoothed importance sampling", JMLR 25(72), eq. 13.
        """
        return min(1 - 1 / math.log10(self.num_draws), MAX_KHAT)

    def resample(self, num_draws: int, seed: int = 0) -> Tensor:
        r"""Indices of draws from the posterior: systematic resampling with the smoothed weights.

        The draw s is taken :math:`\lfloor n \tilde w_s \rfloor` times or once more, on average
        :math:`n \tilde w_s` times; their order is random. Indices are those of the draws of all chains, one after the
        other.

        Args:
            num_draws: n.
            seed: Seed.

        Shape:
            ``(n,)``.

        Raises:
            ArgumentError: ``num_draws`` is not positive.

        References:
            Kitagawa 1996, "Monte Carlo filter and smoother for non-Gaussian nonlinear state space models", Journal of
            Computational and Graphical Statistics 5(1), Appendix.

        Example:
            >>> z = torch.linspace(-3, 3, 1000, dtype=torch.float64)
            >>> index = importance(-2 * (z - 1).square(), torch.zeros_like(z)).resample(500)
            >>> round(z[index].mean().item(), 1)
            1.0
        """
        if isinstance(num_draws, bool) or not isinstance(num_draws, int) or num_draws < 1:
            raise ArgumentError(f"num_draws must be a positive whole number, got {num_draws!r}")
        generator = torch.Generator().manual_seed(seed)
        weights = self.smoothed_log_weights.detach().flatten().double().cpu().exp()
        ends = weights.cumsum(0)
        places = (torch.arange(num_draws) + torch.rand((), generator=generator, dtype=torch.float64)) / num_draws
        index = torch.searchsorted(ends, places * ends[-1], right=True).clamp_max(int(weights.nonzero()[-1]))
        return index[torch.randperm(num_draws, generator=generator)]

    def __repr__(self) -> str:
        outside = f", {self.support_mismatch:.2%} outside of the support" if self.support_mismatch else ""
        return (
            f"ImportanceCheck(khat={self.khat:.2f} ± {self.khat_se:.2f}, ess={self.ess:.0f} of "
            f"{self.num_draws} draws{outside})"
        )

    def to_dict(self) -> dict[str, Any]:
        """The numbers by name, without the weights."""
        return {key: value for key, value in vars(self).items() if key != "smoothed_log_weights"}


def importance(log_p: Tensor, log_q: Tensor) -> ImportanceCheck:
    r"""Pareto k-hat and importance sampling effective sample size of draws from an approximation.

    .. math:: \log w_s = \log p(z_s, \text{data}) - \log q(z_s), \quad z_s \sim q, \qquad
              \mathrm{ESS} = 1 \Big/ \sum_s \tilde w_s^2

    with :math:`\tilde w` the weights after Pareto smoothing, normalized to sum to one. Where q is the
    posterior, all weights are equal (up to rounding) and there is no tail to fit: k-hat is minus infinity,
    the ESS is the number of draws. The draws of several restarts are pooled: the unnormalized weights of each
    have the same mean, the evidence.

    A draw where the model's density is zero has weight zero. Such draws are counted as mismatch of support and left out
    of the tail.

    Args:
        log_p: Log joint density of the model at draws from q; need not be normalized.
        log_q: Log density of q at the same draws, on the same scale: both unconstrained or both constrained.

    Shape:
        both ``(S,)``, ``(C, S)`` or any other, the same; all values are pooled.

    Raises:
        ArgumentError: The two shapes differ.
        DataError: Fewer than 25 draws, or so few where the model's density is not zero; a log weight that is NaN or
            plus infinity.

    References:
        Vehtari, Simpson, Gelman, Yao, Gabry 2024, "Pareto smoothed importance sampling", JMLR 25(72),
        Sections 2 and 3. Yao, Vehtari, Simpson, Gelman 2018, "Yes, but did it work?: Evaluating variational
        inference", ICML.

    Example:
        >>> z = torch.linspace(-3, 3, 100)
        >>> importance(-0.5 * z**2, -0.5 * z**2).ess_fraction
        1.0
    """
    weights = log_weights(log_p, log_q)
    counted, flat = weights.counted, weights.flat
    if weights.equal:
        khat, inside = -math.inf, torch.full_like(counted, -math.log(counted.numel()))
    else:
        array, khat = arviz_bridge.psis(counted.numpy(force=True))
        inside = torch.as_tensor(array).to(counted)
    smoothed = torch.full_like(flat, -math.inf)
    smoothed[torch.isfinite(flat)] = inside
    return _check_of(weights, khat, smoothed)


def _check_of(weights: LogWeights, khat: float, smoothed: Tensor) -> ImportanceCheck:
    num_draws, num_counted = smoothed.numel(), weights.counted.numel()
    flat = weights.flat
    ess = float(num_counted) if weights.equal else float((-(2 * smoothed).logsumexp(0)).exp())
    least = int(torch.where(torch.isfinite(flat), flat, math.inf).argmin())  # which smoothing leaves as it is
    return ImportanceCheck(
        khat=khat,
        khat_se=_standard_error(khat, num_counted),
        khat_interval=_interval(khat, num_counted),
        draws_needed=draws_needed(khat),
        convergence_rate=convergence_rate(khat, num_draws),
        ess=ess,
        ess_fraction=ess / num_draws,
        log_mean_weight=float(flat[least] - smoothed[least]) - math.log(num_draws),
        support_mismatch=weights.support_mismatch,
        smoothed_log_weights=smoothed.reshape(weights.values.shape),
    )


def draws_needed(khat: float) -> float:
    r"""Draws from which on estimates by Pareto-smoothed weights are reliable, :math:`10^{1/(1-\max(0, k))}`.

    References:
        Vehtari, Simpson, Gelman, Yao, Gabry 2024, "Pareto smoothed importance sampling", JMLR 25(72), eq. 11.

    Example:
        >>> [round(draws_needed(k)) for k in (-1.0, 0.5, 0.7)]
        [10, 100, 2154]
    """
    if khat >= 1:
        return math.inf
    power = 1 / (1 - max(0.0, khat))
    return math.inf if power > 300 else 10.0**power


def convergence_rate(khat: float, num_draws: int) -> float:
    r"""How the variance of estimates falls when there are more draws than ``num_draws``, as a power of their number.

    With a finite variance it falls as one over the number, which is 1; with k between 1/2 and 1 the rate comes near
    :math:`2 (1 - k)`, and it is 0 from 1 on.

    References:
        Vehtari, Simpson, Gelman, Yao, Gabry 2024, "Pareto smoothed importance sampling", JMLR 25(72), Appendix B.

    Example:
        >>> [round(convergence_rate(k, 10_000), 2) for k in (0.2, 0.5, 0.7, 1.2)]
        [1.0, 0.89, 0.59, 0.0]
    """
    if khat <= 0:
        return 1.0
    if khat >= 1:
        return 0.0
    s, power = float(num_draws), 2 * khat
    if abs(khat - 0.5) < 1e-6:
        return (s * math.log(s) - s + 1) / ((s - 1) * math.log(s))  # the limit of what follows
    above = (power - 2) * s ** (power + 1) + (1 - power) * s**power + s * s
    return max(0.0, above / ((s - 1) * (s - s**power)))


def _standard_error(khat: float, num_draws: int) -> float:
    r"""Asymptotic standard error of the shape of a generalized Pareto distribution fitted to the largest weights.

    The tail has :math:`M = \min(S/5, 3\sqrt S)` of S draws (Vehtari et al. 2024, eq. 14); the variance of the maximum
    likelihood estimate is :math:`(1 + k)^2 / M` for :math:`k > -1/2` (Smith 1987, "Estimating tails of probability
    distributions", Annals of Statistics 15).
    """
    if not math.isfinite(khat):
        return 0.0
    return max(1 + khat, 0.5) / math.sqrt(min(num_draws / 5, 3 * math.sqrt(num_draws)))


def _interval(khat: float, num_draws: int) -> tuple[float, float]:
    r"""Where the k-hat of a million draws lies with probability 0.95, to first order.

    ArviZ's estimate :math:`\hat k = (M \tilde k + 10 \cdot 0.5) / (M + 10)` is drawn towards 0.5, and
    :math:`\tilde k` is not. The interval holds every k from which :math:`\tilde k` is at most 1.96 of *its* standard
    deviations away. To the variance :math:`(1 + k)^2 / M` come that of the k-hat of a million draws,
    :math:`(1 + k)^2 / M'`, and the drift of the shape with the threshold: where the tail is no exact Pareto tail but
    has logarithmic factors, as that of one normal density over another, the shape beyond the quantile of probability
    :math:`1 - e^{-E}` is :math:`k (1 + c / E)`. The drift counts as an error with :math:`|c| = 1/2`, the value of one
    normal over a narrower one. Thresholds are at :math:`E = \log(S / M)`, the mean of what is beyond one more.
    """
    if not math.isfinite(khat):
        return khat, khat
    size, of_many = tail_size(num_draws), tail_size(MANY_DRAWS)
    center = (khat * (size + SHRINKAGE) - SHRINKAGE * CENTER) / size
    noise = math.sqrt(1 / size + 1 / of_many)
    drift = (1 / (1 + math.log(num_draws / size)) - 1 / (1 + math.log(MANY_DRAWS / of_many))) / 2
    low = high = center
    for _ in range(FIXED_POINT_STEPS):
        low = center - 1.96 * math.hypot(max(1 + low, 0.5) * noise, low * drift)
        high = center + 1.96 * math.hypot(max(1 + high, 0.5) * noise, high * drift)
    return low, high
