"""Does a fit stop where it should? Every real posterior, both families, five seeds, against the best of the family.

The distance to the optimum is ``baseline - ELBO`` in nats, where the baseline is the ELBO of the near-optimal Gaussian
that comes with each posterior (its own error is a few hundredths, more in 45 and 90 dimensions) and the ELBO is estimated
from fresh draws. A *false stop* is a fit that says CONVERGED and is more than 0.1 nat below the baseline, allowing for three
standard errors.
"""

from __future__ import annotations

import json
import platform
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import torch

import pyro_vi_lab as vl
from tests import posteriordb

SEEDS = range(5)
FAMILIES = ("mean_field", "full_rank")
DRAWS = 4000
HERE = Path(__file__).parent


def rows() -> Iterator[dict[str, Any]]:
    """One row per posterior and family, medians over the seeds."""
    for name in posteriordb.POSTERIORS:
        loaded = posteriordb.load(name)
        problem = vl.Problem(loaded.case.model, **loaded.data)
        problem.density().value_and_grad(torch.zeros(problem.density().dim))  # captured once, before any clock starts
        for family in FAMILIES:
            fits = [vl.fit(problem, family, seed=seed, progress=False) for seed in SEEDS]
            bounds = [fit.elbo(DRAWS, seed=100 + fit.seed) for fit in fits]
            gaps = [loaded.baseline(family) - value for value, _ in bounds]
            shifts, ratios = zip(*(_against(loaded, fit) for fit in fits), strict=True)
            yield {
                "posterior": name,
                "dimension": problem.density().dim,
                "family": family,
                "converged": sum(fit.status is vl.Status.CONVERGED for fit in fits),
                "false_stops": sum(
                    fit.status is vl.Status.CONVERGED and gap - 3 * error > 0.1
                    for fit, gap, (_, error) in zip(fits, gaps, bounds, strict=True)
                ),
                "median_gap": statistics.median(gaps),
                "largest_gap": max(gaps),
                "elbo_error": max(error for _, error in bounds),
                "steps": statistics.median(fit.num_steps for fit in fits),
                "most_steps": max(fit.num_steps for fit in fits),
                "gradients": statistics.median(fit.num_gradients for fit in fits),
                "seconds": statistics.median(fit.seconds for fit in fits),
                "mean_shift": statistics.median(shifts),
                "sd_ratio_min": min(low for low, _ in ratios),
                "sd_ratio_max": max(high for _, high in ratios),
            }


def _against(loaded: posteriordb.Loaded, fit: vl.Fit) -> tuple[float, tuple[float, float]]:
    """Largest mean shift in reference sds, smallest and largest sd ratio, over the published parameters."""
    posterior = fit.posterior(DRAWS)
    mean, sd = posterior.mean(), posterior.sd()
    names = loaded.case.parameters
    shift = max(float(np.max(np.abs((mean[k].numpy() - loaded.mean[k]) / loaded.sd[k]))) for k in names)
    ratios = np.concatenate([np.ravel(sd[k].numpy() / loaded.sd[k]) for k in names])
    return shift, (float(ratios.min()), float(ratios.max()))


def main() -> None:
    """Run all and write ``fits.json`` and ``fits.md`` beside this file."""
    torch.set_num_threads(1)
    table = list(rows())
    versions = {"python": platform.python_version(), "torch": torch.__version__, "pyro": pyro.__version__}
    (HERE / "fits.json").write_text(json.dumps({"versions": versions, "rows": table}, indent=1) + "\n")
    fits = len(SEEDS) * len(table)
    false_stops, converged = (sum(row[key] for row in table) for key in ("false_stops", "converged"))
    lines = [
        "# Fits of real posteriors\n",
        __doc__.split("\n\n", 1)[1].strip() + "\n",
        f"{len(table)} cases × {len(SEEDS)} seeds = {fits} fits with the defaults: {converged} converged, {false_stops} false "
        f"stops ({100 * false_stops / fits:.1f} %). Seconds are of a warm process on one thread, captured before.",
        f"Versions: {', '.join(f'{key} {value}' for key, value in versions.items())}. Made by `make bench`.\n",
        "| posterior | D | family | converged | false stops | gap, median (largest) | ± | steps (most) | gradients | seconds | "
        "mean shift | sd ratio |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {r['posterior']} | {r['dimension']} | {r['family']} | {r['converged']}/{len(SEEDS)} | {r['false_stops']} | "
        f"{r['median_gap']:.3f} ({r['largest_gap']:.3f}) | {r['elbo_error']:.3f} | {r['steps']:.0f} ({r['most_steps']}) | "
        f"{r['gradients']:.0f} | {r['seconds']:.2f} | {r['mean_shift']:.2f} | {r['sd_ratio_min']:.2f}–{r['sd_ratio_max']:.2f} |"
        for r in table
    ]
    (HERE / "fits.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))
