"""Bounds on the errors of means and standard deviations of an approximation, by a divergence from the posterior."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pyro_vi_lab.checks.log_weights import log_weights
from pyro_vi_lab.checks.pareto import importance
from pyro_vi_lab.checks.weight_moments import chi2_divergence, normal_quantile
from pyro_vi_lab.errors import ArgumentError, DataError

Array = NDArray[Any]

NUM_LIMITS = 3
"""Limits that share the error probability: of the variance and the mean of the weights, and of the moments of q."""


@dataclass(frozen=True, eq=False)
class ErrorBounds:
    r"""How far the means and standard deviations of an approximation can be from those of the posterior.

    Args:
        parameters: Names of the parameters.
        mean_error: Bound on the error of each mean, in the units of the parameter.
        sd_error: Bound on the error of each standard deviation.
        sd: Standard deviations of the approximation, to compare the two with.
        chi2: Estimate of the χ² divergence :math:`E_q[w^2] / E_q[w]^2 - 1` of the posterior from q.
        chi2_upper: Its upper limit, on which the bounds rest; infinite where the draws do not bound it.
        wasserstein_1: Bound on the Wasserstein distance of order one of all parameters together.
        wasserstein_2: Of order two.
        khat_high: Upper limit of the Pareto shape of the weights; from 1/2 on there are no bounds.
        confidence: Probability with which the bounds hold, over the draws.
        reason: Why bounds are infinite; empty if they are not.

    Shape:
        arrays ``(P,)``.
    """

    parameters: tuple[str, ...]
    mean_error: Array
    sd_error: Array
    sd: Array
    chi2: float
    chi2_upper: float
    wasserstein_1: float
    wasserstein_2: float
    khat_high: float
    confidence: float
    reason: str

    def __repr__(self) -> str:
        worst = int((self.mean_error / self.sd).argmax()) if len(self.parameters) else 0
        why = f"; {self.reason}" if self.reason else ""
        return (
            f"ErrorBounds(mean within {self.mean_error[worst] / self.sd[worst]:.2g} sd, sd within "
            f"{self.sd_error[worst] / self.sd[worst]:.2g} of itself for {self.parameters[worst]}, the worst of "
            f"{len(self.parameters)}{why})"
        )

    def to_dict(self) -> dict[str, Any]:
        """The numbers by name, those of the parameters as lists."""
        return {
            key: value.tolist() if isinstance(value, np.ndarray) else list(value) if key == "parameters" else value
            for key, value in vars(self).items()
        }


def error_bounds(
    draws: Tensor,
    log_p: Tensor,
    log_q: Tensor,
    *,
    labels: Sequence[str] | None = None,
    confidence: float = 0.95,
    num_moments: float = math.inf,
) -> ErrorBounds:
    r"""Bounds on the errors of the means and standard deviations of q, from its χ² divergence.

    With :math:`1 + \chi^2 = E_q[w^2] / E_q[w]^2 = e^{D_2(p \| q)}`, where
    :math:`D_2 = 2\,(\mathrm{CUBO}_2 - \log Z)` is the Rényi divergence of order two, for a scalar f of mean m and
    standard deviation s under q

    .. math:: |E_p f - m| \le \min\big(s \chi,\; W_2\big), \qquad
        W_r \le 2 \, E_q\big[|f - m|^{2r}\big]^{1/2r} \, \chi^{1/r},

    .. math:: \big|\operatorname{sd}_p f - s\big| \le \min\big(W_2, \; \max(\sqrt{s^2 + b} - s,\;
        s - \sqrt{(s^2 - b - s^2 \chi^2)_+})\big), \quad b = \chi \operatorname{sd}_q\big((f - m)^2\big).

    The bounds by the Wasserstein distance are those of Huggins et al.; the others are the Cauchy–Schwarz inequality for
    :math:`E_p f - E_q f = E_q[(w - 1)(f - m)]`, and better where χ is small. For χ an upper limit is taken that makes
    up for what the tail of the weights may hold beyond the draws
    (:func:`~pyro_vi_lab.checks.weight_moments.chi2_divergence`). Where the weights may have no second moment, as for a
    posterior with heavier tails than q, no bound holds, and they are infinite.

    Args:
        draws: Draws of q.
        log_p: Log joint density of the model at them; need not be normalized.
        log_q: Log density of q.
        labels: Names of the parameters.
        confidence: Probability with which the bounds shall hold.
        num_moments: Moments that q has: the degrees of freedom of a Student-t guide.

    Shape:
        draws ``(S, P)``, log densities ``(S,)``.

    Raises:
        ArgumentError: Shapes that disagree, or an option out of range.
        DataError: As of :func:`importance`; draws that are not finite.

    References:
        Huggins, Kasprzak, Campbell, Broderick 2020, "Validated variational inference via practical posterior error
        bounds", AISTATS, Theorem 3.4, Propositions 4.2 and 4.5. Dieng, Tran, Ranganath, Paisley, Blei 2017,
        "Variational inference via χ upper bound minimization", NeurIPS (CUBO).

    Example:
        >>> from torch.distributions import Normal
        >>> z = torch.randn(5000, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        >>> p, q = Normal(0.1, 1.0), Normal(0.0, 1.0)
        >>> bounds = error_bounds(z, p.log_prob(z[:, 0]), q.log_prob(z[:, 0]), labels=["z"])
        >>> print(f"{bounds.mean_error[0]:.2f}")
        0.11
    """
    names = _checked(draws, log_p, labels)
    z = normal_quantile(1 - (1 - confidence) / NUM_LIMITS)
    weights = log_weights(log_p, log_q)
    khat_high, chi2, upper = -math.inf, 0.0, 0.0
    if not weights.equal or weights.support_mismatch:
        khat_high = importance(log_p, log_q).khat_interval[1]
        share = 1 - (1 - confidence) * (NUM_LIMITS - 1) / NUM_LIMITS
        chi2, upper = chi2_divergence(weights.flat, khat_high=khat_high, confidence=share)
    chi = math.sqrt(upper)
    moments = _Moments(draws.detach().double(), z, num_moments)
    with np.errstate(invalid="ignore"):
        whole = 2 * moments.fourth**0.25 * math.sqrt(chi)
        mean_error = np.minimum(moments.sd_high * chi, whole)
        spread = chi * moments.square_sd
        above = np.sqrt(moments.sd**2 + spread) - moments.sd
        below = moments.sd - np.sqrt(np.maximum(moments.sd**2 - spread - (moments.sd_high * chi) ** 2, 0.0))
        sd_error = np.minimum(np.maximum(above, below), whole)
    if chi == 0:
        mean_error, sd_error = np.zeros(len(names)), np.zeros(len(names))
    norm_2 = math.inf if num_moments <= 2 else 2 * moments.norm_second**0.5
    norm_4 = math.inf if num_moments <= 4 else 2 * moments.norm_fourth**0.25
    return ErrorBounds(
        parameters=names,
        mean_error=_infinite_unless(num_moments > 2, mean_error),
        sd_error=_infinite_unless(num_moments > 4, sd_error),
        sd=moments.sd,
        chi2=chi2,
        chi2_upper=upper,
        wasserstein_1=norm_2 * chi if chi else 0.0,
        wasserstein_2=norm_4 * math.sqrt(chi) if chi else 0.0,
        khat_high=khat_high,
        confidence=confidence,
        reason=_reason(khat_high, upper, num_moments),
    )


def _checked(draws: Tensor, log_p: Tensor, labels: Sequence[str] | None) -> tuple[str, ...]:
    if draws.dim() != 2 or draws.shape[:1] != log_p.shape:
        raise ArgumentError(
            f"draws have shape {tuple(draws.shape)} and log densities {tuple(log_p.shape)}; expected (draws, "
            "parameters) and (draws,)"
        )
    names = tuple(labels) if labels is not None else tuple(f"[{i}]" for i in range(draws.shape[1]))
    if len(names) != draws.shape[1]:
        raise ArgumentError(f"there are {len(names)} labels for {draws.shape[1]} parameters")
    bad = ~torch.isfinite(draws).all(0)
    if bool(bad.any()):
        raise DataError(f"draws of {names[int(bad.nonzero()[0])]} are not finite")
    return names


class _Moments:
    """Moments of q about its means, and upper limits of them."""

    def __init__(self, draws: Tensor, z: float, num_moments: float) -> None:
        number = len(draws)
        centered = draws - draws.mean(0)
        square = centered.square()

        def high(values: Tensor) -> Any:
            return (values.mean(0) + z * values.std(0) / math.sqrt(number)).numpy(force=True)

        self.sd: Array = centered.std(0).numpy(force=True)
        self.sd_high: Array = np.sqrt(high(square))
        self.fourth: Array = high(square.square())
        variance = square.mean(0)
        self.square_sd: Array = np.sqrt(high((square - variance).square()))
        norm = square.sum(1)
        self.norm_second, self.norm_fourth = float(high(norm)), float(high(norm.square()))


def _infinite_unless(finite: bool, values: Array) -> Array:
    return values if finite else np.full_like(values, math.inf)


def _reason(khat_high: float, upper: float, num_moments: float) -> str:
    if khat_high >= 0.5:
        return (
            f"Pareto k-hat may be {khat_high:.2f}: from 0.5 on the weights have no second moment, and no bound follows "
            "from the draws"
        )
    if num_moments <= 4:
        return f"the guide has {num_moments:g} moments, and the bound of the standard deviation needs more than four"
    return "" if math.isfinite(upper) else "the χ² divergence is larger than any number"
