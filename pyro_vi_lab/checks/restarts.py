"""Whether the restarts of a fit agree: R-hat across them, their bounds, and the distinct optima they found."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pyro_vi_lab import arviz_bridge
from pyro_vi_lab.checks.weight_moments import normal_quantile
from pyro_vi_lab.errors import ArgumentError, DataError

Array = NDArray[Any]

SAME_MEAN = 0.3
"""Distance of means, in standard deviations, below which two normals are hardly told apart by eye: their overlap is
88 %. It is the difference from which this package calls an approximation wrong, as is the next one."""
SAME_SD = 1.5
"""Ratio of standard deviations."""


@dataclass(frozen=True)
class Optimum:
    """One of the distinct optima that restarts ended at.

    Args:
        restarts: Numbers of the restarts that ended there.
        elbo: Largest ELBO of these.
        elbo_se: Its standard error.
        below_best: Nats by which it lies below the best optimum.
        is_worse: Whether that is more than the noise of the two.
        farthest: The parameter that differs most from the best optimum; empty for the best itself.
        distance: By how many standard deviations the mean of that parameter differs.
        sd_ratio: Ratio of its standard deviation to that at the best optimum.
    """

    restarts: tuple[int, ...]
    elbo: float
    elbo_se: float
    below_best: float
    is_worse: bool
    farthest: str
    distance: float
    sd_ratio: float


@dataclass(frozen=True)
class RestartCheck:
    """How far restarts agree.

    Args:
        rhat: Largest rank-normalized R-hat across the restarts, over the parameters; NaN of a single restart.
        rhat_parameter: The parameter that has it.
        elbo_spread: Difference of the largest and the smallest ELBO, in nats.
        elbo_spread_se: Its standard error.
        optima: The distinct optima, best first.
    """

    rhat: float
    rhat_parameter: str
    elbo_spread: float
    elbo_spread_se: float
    optima: tuple[Optimum, ...]

    def __repr__(self) -> str:
        number = sum(len(optimum.restarts) for optimum in self.optima)
        found = "; ".join(
            f"{len(one.restarts)} at {one.elbo:.2f} ± {one.elbo_se:.2g} nats"
            + (f", {one.farthest} {one.distance:.1f} sd away" if one.farthest else "")
            for one in self.optima
        )
        return (
            f"RestartCheck({len(self.optima)} optima of {number} restarts: {found}; R-hat {self.rhat:.3f} of "
            f"{self.rhat_parameter})"
        )

    def to_dict(self) -> dict[str, Any]:
        """The numbers by name."""
        return asdict(self)


def restarts(
    draws: Tensor, log_weights: Tensor, *, labels: Sequence[str] | None = None, confidence: float = 0.95
) -> RestartCheck:
    r"""Agreement of the restarts of a fit, from draws of each and their log weights :math:`\log p - \log q`.

    Restarts a and b are at the same optimum if, for every parameter, their means differ by less than 0.3 standard
    deviations (the root mean square of the two) and their standard deviations by less than a factor 1.5, or by less
    than the noise of the draws explains; restarts that are linked by others are too. The ELBO of a restart is the mean
    of its log weights. An optimum is worse than the best if its ELBO is lower by more than the noise of both.

    Args:
        draws: Independent draws of every restart, on the unconstrained scale.
        log_weights: Log weights at them; minus infinity allowed.
        labels: Names of the parameters.
        confidence: Of the tests of differences of the ELBO and, over all parameters and pairs, of the moments.

    Shape:
        draws ``(R, S, P)``, log_weights ``(R, S)``.

    Raises:
        ArgumentError: Shapes or labels that disagree.
        DataError: Fewer than four draws, draws that are not finite, or log weights that are NaN.

    References:
        Vehtari, Gelman, Simpson, Carpenter, Bürkner 2021, "Rank-normalization, folding, and localization",
        Bayesian Analysis 16(2). Yao, Vehtari, Gelman 2022, "Stacking for non-mixing Bayesian computations: the curse
        and blessing of multimodal posteriors", JMLR 23 (restarts as chains, optima as modes).

    Example:
        >>> draws = torch.randn(4, 500, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        >>> draws[3] += 5
        >>> found = restarts(draws, torch.zeros(4, 500), labels=["mu"])
        >>> [optimum.restarts for optimum in found.optima], round(found.optima[1].distance)
        ([(0, 1, 2), (3,)], 5)
    """
    names = _checked(draws, log_weights, labels)
    number, size, _ = draws.shape
    values = draws.detach().double()
    mean, sd = values.mean(1).numpy(force=True), values.std(1).numpy(force=True)
    rhat, parameter = _worst_rhat(values.numpy(force=True), names)
    elbo, error = _elbos(log_weights.detach().double())
    pairs = max(1, number * (number - 1) // 2 * 2 * len(names))
    groups = _groups(mean, sd, size, normal_quantile(1 - (1 - confidence) / 2 / pairs))
    groups.sort(key=lambda group: -float(np.max(elbo[group])))
    low, high = int(elbo.argmin()), int(elbo.argmax())
    spread = float(elbo[high] - elbo[low]) if math.isfinite(elbo[high]) else math.nan
    best = groups[0][int(np.argmax(elbo[groups[0]]))]
    z = normal_quantile(1 - (1 - confidence) / max(1, len(groups) - 1))
    return RestartCheck(
        rhat=rhat,
        rhat_parameter=parameter,
        elbo_spread=spread,
        elbo_spread_se=float(np.hypot(error[low], error[high])) if low != high else 0.0,
        optima=tuple(_optimum(group, best, elbo, error, mean, sd, names, z) for group in groups),
    )


def _checked(draws: Tensor, log_weights: Tensor, labels: Sequence[str] | None) -> tuple[str, ...]:
    if draws.dim() != 3 or draws.shape[:2] != log_weights.shape:
        raise ArgumentError(
            f"draws have shape {tuple(draws.shape)} and log weights {tuple(log_weights.shape)}; expected (restarts, "
            "draws, parameters) and (restarts, draws)"
        )
    if draws.shape[1] < 4:
        raise DataError(f"the check of restarts needs at least 4 draws of each, got {draws.shape[1]}")
    names = tuple(labels) if labels is not None else tuple(f"[{i}]" for i in range(draws.shape[2]))
    if len(names) != draws.shape[2]:
        raise ArgumentError(f"there are {len(names)} labels for {draws.shape[2]} parameters")
    bad = ~torch.isfinite(draws).all(1)
    if bool(bad.any()):
        restart, i = bad.nonzero()[0].tolist()
        raise DataError(f"draws of {names[i]} of restart {restart} are not finite: leave out restarts that diverged")
    if bool((torch.isnan(log_weights) | (log_weights == math.inf)).any()):
        raise DataError("log weights are NaN or infinite: leave out restarts that diverged")
    return names


def _worst_rhat(draws: Array, names: Sequence[str]) -> tuple[float, str]:
    values = arviz_bridge.convergence(draws)["rhat"]
    if bool(np.isnan(values).all()):
        return math.nan, ""
    worst = int(np.nanargmax(values))
    return float(values[worst]), names[worst]


def _elbos(log_weights: Tensor) -> tuple[Array, Array]:
    """ELBO of every restart and its standard error, minus infinity and infinity where a weight is zero."""
    finite = torch.isfinite(log_weights).all(1)
    kept = torch.where(finite[:, None], log_weights, 0.0)
    elbo = torch.where(finite, kept.mean(1), -math.inf)
    error = torch.where(finite, kept.std(1) / math.sqrt(kept.shape[1]), math.inf)
    return elbo.numpy(force=True), error.numpy(force=True)


def _groups(mean: Array, sd: Array, num_draws: int, z: float) -> list[list[int]]:
    """Restarts that are linked by pairs with the same moments."""
    from scipy.sparse.csgraph import connected_components

    number = len(mean)
    same = np.eye(number, dtype=bool)
    for a in range(number):
        distance, log_ratio = _differences(mean[a], sd[a], mean, sd)
        # of two means of S independent draws each, in their sd, and of two log standard deviations
        noise = z * math.sqrt(2 / num_draws), z / math.sqrt(num_draws)
        near = (distance < max(SAME_MEAN, noise[0])) & (np.abs(log_ratio) < max(math.log(SAME_SD), noise[1]))
        same[a] = near.all(-1)
    count, label = connected_components(same, directed=False)
    return [np.flatnonzero(label == i).tolist() for i in range(count)]


def _differences(mean: Array, sd: Array, means: Array, sds: Array) -> tuple[Array, Array]:
    """Distance of means in standard deviations, and logarithms of the ratio of standard deviations."""
    tiny = np.finfo(float).tiny
    scale = np.sqrt((sd**2 + sds**2) / 2)
    return np.abs(means - mean) / np.maximum(scale, tiny), np.log(np.maximum(sds, tiny) / np.maximum(sd, tiny))


def _optimum(
    group: list[int], best: int, elbo: Array, error: Array, mean: Array, sd: Array, names: Sequence[str], z: float
) -> Optimum:
    here = group[int(np.argmax(elbo[group]))]
    below = float(elbo[best] - elbo[here]) if here != best else 0.0
    farthest, distance, ratio = "", 0.0, 1.0
    if here != best:
        distances, log_ratios = _differences(mean[best], sd[best], mean[here], sd[here])
        worst = int(np.maximum(distances / SAME_MEAN, np.abs(log_ratios) / math.log(SAME_SD)).argmax())
        farthest, distance, ratio = names[worst], float(distances[worst]), float(np.exp(log_ratios[worst]))
    return Optimum(
        restarts=tuple(group),
        elbo=float(elbo[here]),
        elbo_se=float(error[here]),
        below_best=below,
        is_worse=bool(below > z * np.hypot(error[best], error[here])) or below == math.inf,
        farthest=farthest,
        distance=distance,
        sd_ratio=ratio,
    )
