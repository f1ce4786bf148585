"""How often calibration of a guide raises an alarm: of exact fits, and of mean-field fits of a correlated posterior.

Rows for the page on trust: every calibration has 200 simulated data sets, all fitted in one batch, at the probability 0.05
of a false alarm over all parameters.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

import pyro_vi_lab as vl
from pyro_vi_lab.models import build

HERE = Path(__file__).parent
REPEATS, CORRELATED_REPEATS, TIMED = 200, 50, 3
NUM_SIMULATIONS = 200


def normal_mean(y: Tensor) -> None:
    """Normal data of known variance: the full-rank fit is the posterior."""
    mean = pyro.sample("mean", dist.Normal(0.0, 2.0))
    with pyro.plate("row", len(y)):
        pyro.sample("y", dist.Normal(mean, 1.0), obs=y)


def collinear(x: Tensor, y: Tensor) -> None:
    """Intercept and slope of a covariate far from zero, of known noise: their correlation is near -1."""
    intercept = pyro.sample("intercept", dist.Normal(0.0, 5.0))
    slope = pyro.sample("slope", dist.Normal(0.0, 5.0))
    with pyro.plate("row", len(y)):
        pyro.sample("y", dist.Normal(intercept + slope * x, 0.5), obs=y)


def problems() -> dict[str, vl.Problem]:
    x = torch.tensor([1.0, 1.1, 0.9, 1.05], dtype=torch.float64)
    y = torch.zeros(4, dtype=torch.float64)
    return {"normal_mean": vl.Problem(normal_mean, y), "collinear": vl.Problem(collinear, x, y)}


def rows(*, quick: bool = False) -> Iterator[dict[str, Any]]:
    """One row per problem and guide."""
    found = problems()
    for name, guide, repeats, right in (
        ("normal_mean", "full_rank", REPEATS, True),
        ("collinear", "full_rank", CORRELATED_REPEATS, True),
        ("collinear", "mean_field", CORRELATED_REPEATS, False),
    ):
        number = 3 if quick else repeats
        runs = [
            vl.calibrate(found[name], guide, num_simulations=NUM_SIMULATIONS, seed=1000 * seed, progress=False)
            for seed in range(number)
        ]
        yield {
            "problem": name,
            "guide": guide,
            "right": right,
            "calibrations": number,
            "alarms": sum(run.alarm for run in runs),
            "seconds": statistics.median(run.seconds for run in runs),
            "failures": sum(sum(run.failures.values()) for run in runs),
        }
    schools = build("eight_schools")
    for guide in ("full_rank", "mean_field"):
        runs = [
            vl.calibrate(schools, guide, num_simulations=NUM_SIMULATIONS, seed=1000 * seed, progress=False)
            for seed in range(1 if quick else TIMED)
        ]
        yield {
            "problem": "eight_schools",
            "guide": guide,
            "right": False,  # the fits are normal and the posterior of the scale is not
            "calibrations": len(runs),
            "alarms": sum(run.alarm for run in runs),
            "seconds": statistics.median(run.seconds for run in runs),
            "failures": sum(sum(run.failures.values()) for run in runs),
        }


def page(found: list[dict[str, Any]]) -> str:
    """The rows as Markdown."""
    lines = [
        "# Calibration of guides",
        "",
        *(__doc__ or "").strip().splitlines(),
        "",
        "Seconds are of one calibration, its 200 fits included, on one thread. Made by `python -m benchmarks.trust_calibration`.",
        "",
        "| problem | guide | fits are exact | calibrations | alarms | seconds | simulations missing |",
        "|---|---|---|---|---|---|---|",
        *(
            f"| {row['problem']} | {row['guide']} | {'yes' if row['right'] else 'no'} | {row['calibrations']} | "
            f"{row['alarms']} ({100 * row['alarms'] / row['calibrations']:.1f} %) | {row['seconds']:.2f} | {row['failures']} |"
            for row in found
        ),
    ]
    return "\n".join([*lines, ""])


def main(directory: Path = HERE, *, quick: bool = False) -> None:
    """Measure and write the page and its numbers."""
    found = []
    for row in rows(quick=quick):
        found.append(row)
        print(f"trust_calibration: {row['problem']} {row['guide']} {row['alarms']}", file=sys.stderr, flush=True)
        (directory / "trust_calibration.json").write_text(json.dumps(found, indent=1) + "\n")
        (directory / "trust_calibration.md").write_text(page(found))


if __name__ == "__main__":
    main(quick="--quick" in sys.argv)
