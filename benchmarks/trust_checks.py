"""Coverage of the interval of k-hat, and error bounds beside true errors: cases whose truth is closed.

Written to trust_checks.md, which trust.md links to.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import stats

from pyro_vi_lab.checks import error_bounds, evidence, importance
from pyro_vi_lab.checks.pareto import MANY_DRAWS

Array = NDArray[Any]
LogWeights = Callable[[np.random.Generator, int], Array]
Row = dict[str, Any]

HERE = Path(__file__).parent
REPEATS, BOUND_REPEATS = 200, 20
REFERENCES = 20
"""Runs of a million draws whose mean k-hat is the truth: known to 0.01."""
SIZES = (1_000, 10_000)


def pareto(k: float) -> LogWeights:
    """Weights whose tail is exactly that of a Pareto distribution: one exponential density over another."""
    return lambda rng, size: k * rng.exponential(size=size)


def normals(k: float, dim: int = 1) -> LogWeights:
    """A normal target with a variance of 1 / (1 - k) in every coordinate, and a standard normal guide."""
    return lambda rng, size: k * rng.chisquare(dim, size=size) / 2


def shifted(by: float) -> LogWeights:
    """A normal target next to a standard normal guide: k falls to zero with the number of draws."""
    return lambda rng, size: by * rng.standard_normal(size)


def student(df: float) -> LogWeights:
    """A Student-t target and a standard normal guide: k rises to one with the number of draws."""

    def draw(rng: np.random.Generator, size: int) -> Array:
        square = rng.standard_normal(size) ** 2
        return np.asarray(square / 2 - (df + 1) / 2 * np.log1p(square / df))

    return draw


CASES: dict[str, LogWeights] = {
    **{f"exact Pareto tail, k = {k}": pareto(k) for k in (0.2, 0.5, 0.7, 0.9)},
    **{f"wider normal, k = {k}": normals(k) for k in (0.2, 0.5, 0.7, 0.9)},
    "wider normal in 10 dimensions, k = 0.5": normals(0.5, 10),
    "shifted normal, by 1 sd": shifted(1.0),
    **{f"Student-t with {df} degrees of freedom": student(df) for df in (3, 5, 10, 30)},
}


def khat_coverage(*, repeats: int = REPEATS, references: int = REFERENCES) -> Iterator[Row]:
    """How often the interval of k-hat holds the k-hat of a million draws, case by case."""
    for number, (case, log_weights) in enumerate(CASES.items()):
        rng = np.random.default_rng(number)
        truths = [_khat(log_weights(rng, MANY_DRAWS)).khat for _ in range(references)]
        truth = float(np.mean(truths))
        for size in SIZES:
            checks = [_khat(log_weights(rng, size)) for _ in range(repeats)]
            low, high = np.array([check.khat_interval for check in checks]).T
            yield {
                "case": case,
                "draws": size,
                "khat_of_a_million": truth,
                "khat_mean": float(np.mean([check.khat for check in checks])),
                "width": float(np.mean(high - low)),
                "coverage": float(np.mean((low <= truth) & (truth <= high))),
                "repeats": repeats,
            }


def _khat(log_weights: Array) -> Any:
    values = torch.as_tensor(log_weights)
    return importance(values, torch.zeros_like(values))


BOUNDED = {
    **{f"Normal({loc}, {scale}), guide Normal(0, 1)": (stats.norm(loc, scale), stats.norm()) for loc, scale in (
        (0.01, 1.0), (0.1, 1.0), (0.3, 1.0), (1.0, 1.0), (0.0, 0.95), (0.0, 0.7), (0.0, 1.05), (0.2, 0.8), (0.3, 1.2),
    )},
    **{f"Normal({loc}, {scale}), guide Student-t(6)": (stats.norm(loc, scale), stats.t(6)) for loc, scale in (
        (0.0, 1.0), (0.2, 1.0), (0.0, 1.3),
    )},
    **{f"Student-t({df}), guide Normal(0, 1)": (stats.t(df), stats.norm()) for df in (3, 5, 30)},
}  # fmt: skip
"""Posterior and guide, both known."""


def bound_ratios(*, repeats: int = BOUND_REPEATS, sizes: tuple[int, ...] = SIZES) -> Iterator[Row]:
    """Bounds on the errors of mean and standard deviation divided by the true errors, and how often they fail."""
    for number, (case, (posterior, guide)) in enumerate(BOUNDED.items()):
        mean_error = abs(float(posterior.mean()) - float(guide.mean()))
        sd_error = abs(float(posterior.std()) - float(guide.std()))
        rng = np.random.default_rng(number)
        for size in sizes:
            means, sds, holds = [], [], []
            for _ in range(repeats):
                z = guide.rvs(size, random_state=rng)
                log_p, log_q = torch.as_tensor(posterior.logpdf(z)), torch.as_tensor(guide.logpdf(z))
                moments = 6.0 if guide.dist.name == "t" else math.inf
                bounds = error_bounds(torch.as_tensor(z)[:, None], log_p, log_q, num_moments=moments)
                means.append(bounds.mean_error[0])
                sds.append(bounds.sd_error[0])
                limits = evidence(log_p, log_q)
                holds.append(limits.lower <= 1e-9 and limits.upper >= -1e-9)
            yield {
                "case": case,
                "draws": size,
                "mean_error": mean_error,
                "mean_ratio": float(np.median(means)) / mean_error if mean_error else math.nan,
                "mean_violations": int(np.sum(np.array(means) < mean_error)),
                "sd_error": sd_error,
                "sd_ratio": float(np.median(sds)) / sd_error if sd_error else math.nan,
                "sd_violations": int(np.sum(np.array(sds) < sd_error)),
                "without_bound": int(np.sum(~np.isfinite(sds))),
                "evidence_between_limits": float(np.mean(holds)),
                "repeats": repeats,
            }


def page(khat: list[Row], bounds: list[Row]) -> str:
    """Both tables as Markdown."""
    lines = [
        "# The checks of one fit, where the truth is closed",
        "",
        "## The interval of k-hat",
        "",
        f"How often the 95 % interval of `checks.importance` holds the k-hat of a million draws (mean of {REFERENCES} runs), in {REPEATS} repeats.",
        "Goal: 92 to 98 %. Made by `make bench ARGS=trust_checks`.",
        "",
        "| weights | draws | k-hat of a million | mean k-hat | mean width | coverage |",
        "|---|---|---|---|---|---|",
        *(
            f"| {row['case']} | {row['draws']:,} | {row['khat_of_a_million']:.2f} | {row['khat_mean']:.2f} | {row['width']:.2f} | "
            f"{row['coverage']:.1%} |"
            for row in khat
        ),
        "",
        "## Bounds on errors",
        "",
        f"Bounds of `checks.error_bounds` divided by the true errors, medians of {BOUND_REPEATS} repeats; *too low* counts the repeats whose bound "
        "was below the true error (goal 0), *none* those without a bound, and *evidence* the share whose limits of `checks.evidence` hold it.",
        "",
        "| posterior | draws | mean: bound / error | too low | sd: bound / error | too low | none | evidence |",
        "|---|---|---|---|---|---|---|---|",
        *(
            f"| {row['case']} | {row['draws']:,} | {row['mean_ratio']:.2f} | {row['mean_violations']} | {row['sd_ratio']:.2f} | "
            f"{row['sd_violations']} | {row['without_bound']} | {row['evidence_between_limits']:.0%} |"
            for row in bounds
        ),
    ]
    return "\n".join(lines).replace(" nan ", " – ").replace(" inf ", " ∞ ") + "\n"


def main(directory: Path = HERE, *, quick: bool = False) -> None:
    """Measure and write the page, anew after every row."""
    khat: list[Row] = []
    bounds: list[Row] = []
    size = {"repeats": 2, "references": 1} if quick else {}
    for kept, found in ((khat, khat_coverage(**size)), (bounds, bound_ratios(repeats=2 if quick else BOUND_REPEATS))):
        for row in found:
            kept.append(row)
            print(f"trust_checks: {row['case']} {row['draws']}", file=sys.stderr, flush=True)
            (directory / "trust_checks.md").write_text(page(khat, bounds))


if __name__ == "__main__":
    main(quick="--quick" in sys.argv)
