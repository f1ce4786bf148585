"""What to try where a fit is not right: a richer guide or another parameterization, with the evidence for it."""

from __future__ import annotations

import torch

from pyro_vi_lab.checks import Ensemble, OtherModes
from pyro_vi_lab.families import MAX_DENSE
from pyro_vi_lab.fitted import Fit
from pyro_vi_lab.hierarchy import FUNNEL_SLOPE, hierarchies
from pyro_vi_lab.trust_evidence import GuideDraws, largest_correlation
from pyro_vi_lab.trust_judgement import Judged

STRONG_CORRELATION = 0.3
"""Correlation that a guide leaves out: at 0.3 the narrowest direction is 16 % narrower than each coordinate."""
HEAVY_TAILS = 1.0
"""Excess kurtosis from which a Student-t distribution is nearer than a normal: that of ten degrees of freedom."""
INDEPENDENT = ("mean_field", "mean_field_student_t", "mean_field_laplace", "block")
"""Guides with coordinates, or blocks of them, that are independent."""
RICHEST = ("flow", "mixture")
"""Guides beyond which only sampling is left."""


def advice(
    fit: Fit, draws: GuideDraws | None, chains: Ensemble | None, modes: OtherModes | None, outcome: Judged
) -> tuple[list[str], list[str]]:
    """Suggestions, the best first, and the sentences that give the evidence for each."""
    suggestions: list[str] = []
    why: list[str] = []
    several = modes is not None and (len(modes.mass) > 0 or modes.num_inside > 1) and fit.method != "mixture"
    mixture = "a 'mixture' guide looks for several modes and covers all of them"
    if chains is None or fit.problem.subsamples:
        return (["mixture"], [mixture]) if several else ([], [])
    density, z = fit.problem.density(), chains.z.flatten(0, 1)
    for one in hierarchies(fit.problem, z):
        if one.slope >= FUNNEL_SLOPE:
            suggestions.append(f"non-center {one.site}")
            why.append(
                f"{one.site} spreads as its prior says and not as the data do (slope {one.slope:.2f} of its log "
                f"distance on the log scale given by {', '.join(one.parents)}; a funnel has 1): write it non-centered, "
                f"as pyro.infer.reparam.LocScaleReparam(0) does for poutine.reparam(config={{{one.site!r}: ...}})"
            )
    if several:
        suggestions.append("mixture")
        why.append(mixture)
    covariance = None
    if fit.params is not None and density.dim <= MAX_DENSE:
        covariance = fit.covariance()
    elif draws is not None and draws.z is not None and density.dim <= MAX_DENSE:
        covariance = torch.cov(draws.z.T).reshape(density.dim, density.dim)
    found = largest_correlation(z, density.labels, covariance)
    if fit.method in INDEPENDENT or fit.method == "low_rank":
        if found is not None and abs(found[2]) >= STRONG_CORRELATION:
            suggestions.append("full_rank")
            why.append(
                f"{found[0]} and {found[1]} have a correlation of {found[2]:.2f}, which this guide does not hold"
            )
        elif density.dim > MAX_DENSE and fit.method != "low_rank":
            suggestions.append("low_rank")
            why.append("a 'low_rank' guide holds the strongest correlations of many coordinates")
    if fit.method == "full_rank" and not suggestions:
        name, kurtosis = _largest_kurtosis(z, density.labels)
        if kurtosis > HEAVY_TAILS:
            suggestions.append("full_rank_student_t")
            why.append(f"{name} has an excess kurtosis of {kurtosis:.1f} on the unconstrained scale, and a normal none")
    if fit.method not in RICHEST and not suggestions and outcome.wrong():
        suggestions.append("flow")
        skew = _largest_skewness(z, density.labels)
        why.append(f"{skew[0]} has a skewness of {skew[1]:+.1f} on the unconstrained scale, which a flow can hold")
    return suggestions, why


def _largest_kurtosis(z: torch.Tensor, labels: list[str]) -> tuple[str, float]:
    centered = (z - z.mean(0)) / z.std(0)
    kurtosis = centered.pow(4).mean(0).nan_to_num() - 3
    worst = int(kurtosis.argmax())
    return labels[worst], float(kurtosis[worst])


def _largest_skewness(z: torch.Tensor, labels: list[str]) -> tuple[str, float]:
    centered = (z - z.mean(0)) / z.std(0)
    skewness = centered.pow(3).mean(0).nan_to_num()
    worst = int(skewness.abs().argmax())
    return labels[worst], float(skewness[worst])
