"""What a fit saves NUTS: chains that start from a full-rank fit, in its coordinates, with a short warm-up, against cold ones.

Four chains of 1000 draws each. *Cold*: uniform starts, 1000 steps of warm-up. *Warm*: starts from draws of the fit, in the
coordinates in which it is a standard normal, with fewer steps of warm-up; its seconds and gradients include those of the
fit. The step size after the warm-up is that of the sampled coordinates, so that only its spread over the chains can be
compared. The effective sample size is the smallest of bulk and tail of all scalars. The seconds of warm chains include the capture of the
density in the coordinates of the fit, anew for every fit, which is most of them where gradients are cheap.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

import pyro_vi_lab as vl
from tests import posteriordb

NAMES = (
    "eight_schools-eight_schools_noncentered",
    "wells_data-wells_dae_inter_model",
    "arK-arK",
    "kidiq-kidscore_interaction",
    "mesquite-logmesquite",
    "radon_mn-radon_hierarchical_intercept_noncentered",
)
"""What NUTS samples without divergences, of every kind."""
WARMUPS = (100, 300, 500)
COLD, DEFAULT = 1000, 300
SEEDS = range(1, 2)
HERE = Path(__file__).parent


def smallest_ess(posterior: vl.Posterior) -> float:
    """Smallest bulk or tail effective sample size."""
    found = posterior.convergence()
    return min(float(value.min()) for kind in ("ess_bulk", "ess_tail") for value in found[kind].values())


def rows(names: tuple[str, ...] = NAMES, seeds: range = SEEDS) -> Iterator[dict[str, Any]]:
    """One row per posterior and length of the warm-up, medians over the seeds."""
    for name in names:
        loaded = posteriordb.load(name)
        problem = vl.Problem(loaded.case.model, **loaded.data)
        vl.fit(problem, progress=False)  # captured and compiled once, before any clock starts
        vl.nuts(problem, num_chains=1, num_warmup=20, num_draws=20, progress=False, compile=True)
        runs: dict[int | None, list[dict[str, float]]] = {warmup: [] for warmup in (None, *WARMUPS)}
        for seed in seeds:
            fit = vl.fit(problem, seed=seed, progress=False)
            for warmup in runs:
                start = None if warmup is None else fit
                posterior = vl.nuts(
                    problem, start=start, num_warmup=warmup or COLD, seed=seed, progress=False, compile=True
                )
                runs[warmup].append(_numbers(posterior, fit if start is not None else None))
        for warmup, found in runs.items():
            yield {
                "posterior": name,
                "dimension": problem.density().dim,
                "start": "cold" if warmup is None else "warm",
                "num_warmup": warmup or COLD,
                **{key: statistics.median(run[key] for run in found) for key in found[0]},
            }


def _numbers(posterior: vl.Posterior, fit: vl.Fit | None) -> dict[str, float]:
    info, ess = posterior.info, smallest_ess(posterior)
    seconds = info["seconds"] + (fit.seconds if fit else 0.0)
    gradients = info["num_gradients"] + (fit.num_gradients if fit else 0)
    step = posterior.stats["step_size"][:, -1]
    rhat = max(float(value.max()) for value in posterior.convergence()["rhat"].values())
    return {
        "warmup_gradients": info["warmup_gradients"],
        "fit_gradients": fit.num_gradients if fit else 0,
        "gradients_per_draw": float(posterior.stats["n_steps"].double().mean()),
        "acceptance": float(posterior.stats["acceptance_rate"].mean()),
        "step_size_spread": float(step.max() / step.min()),
        "seconds": seconds,
        "ess": ess,
        "rhat": rhat,
        "divergences": float(posterior.stats["diverging"].sum()),
        "ess_per_second": ess / seconds,
        "ess_per_1000_gradients": 1000 * ess / gradients,
    }


def page(found: list[Mapping[str, Any]]) -> str:
    """The numbers as Markdown."""
    lines = [
        "# NUTS from a fit",
        "",
        *(__doc__ or "").strip().splitlines(),
        "",
        f"Medians of {len(SEEDS)} seed(s), on two busy cores: gradients say more than seconds. torch {torch.__version__}. Made by `python -m benchmarks.warm_nuts`.",
        "",
        *_findings(found),
        "",
        "| posterior | D | start | warm-up | its gradients | of the fit | gradients per draw | acceptance | step sizes, max / min | "
        "seconds | min ESS | R-hat | divergences | ESS / s | ESS / 1000 gradients |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in found:
        lines.append(
            f"| {row['posterior']} | {row['dimension']} | {row['start']} | {row['num_warmup']} | "
            f"{row['warmup_gradients']:,.0f} | {row['fit_gradients']:,.0f} | {row['gradients_per_draw']:.1f} | "
            f"{row['acceptance']:.2f} | {row['step_size_spread']:.2f} | {row['seconds']:.2f} | {row['ess']:.0f} | "
            f"{row['rhat']:.3f} | {row['divergences']:.0f} | {row['ess_per_second']:,.0f} | "
            f"{row['ess_per_1000_gradients']:.1f} |"
        )
    return "\n".join([*lines, ""])


def _findings(found: list[Mapping[str, Any]]) -> list[str]:
    """What the default warm-up of warm chains saves, posterior by posterior."""
    lines = []
    for name in dict.fromkeys(row["posterior"] for row in found):
        runs = {(row["start"], row["num_warmup"]): row for row in found if row["posterior"] == name}
        cold, warm = runs.get(("cold", COLD)), runs.get(("warm", DEFAULT))
        if cold and warm:
            took = warm["warmup_gradients"] + warm["fit_gradients"]
            lines.append(
                f"- {name}: fit and warm-up took {took:,.0f} gradients instead of {cold['warmup_gradients']:,.0f}; a draw "
                f"{warm['gradients_per_draw']:.1f} instead of {cold['gradients_per_draw']:.1f}; in all "
                f"{warm['ess_per_1000_gradients'] / cold['ess_per_1000_gradients']:.2g} times the effective draws per gradient."
            )
    return [f"With {DEFAULT} steps of warm-up, the default of warm chains:", "", *lines]


def main(directory: Path = HERE, *, quick: bool = False) -> None:
    """Measure and write the page and its numbers."""
    found: list[Mapping[str, Any]] = []
    for row in rows(NAMES[:1], range(1, 2)) if quick else rows():
        found.append(row)
        print(f"warm_nuts: {row['posterior']} {row['start']} {row['num_warmup']}", file=sys.stderr, flush=True)
        (directory / "warm_nuts.json").write_text(json.dumps(found, indent=1) + "\n")
        (directory / "warm_nuts.md").write_text(page(found))


if __name__ == "__main__":
    main(quick="--quick" in sys.argv)
