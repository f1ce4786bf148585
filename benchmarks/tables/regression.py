"""The ready regressions against published draws: full-rank fits, and our NUTS.

The largest shift of a mean in published standard deviations, and the largest relative change of one of these, over all sites.
Fits by their 100,000 draws, as they are and *reweighted* by smoothed importance weights; NUTS by 4 times 1,000 after 500 steps of
warm-up; seconds with a captured model. The goal for posteriors that are near normal is 0.1 for both; of the others k-hat should be
above 0.7. Below that the weights can be trusted (Vehtari et al. 2024, "Pareto smoothed importance sampling", JMLR 25), and with
them the means and deviations: where a fit alone misses the goal and k-hat does not say so, the weights mend it.

The largest change of logmesquite, 0.11, is that of sigma. On the unconstrained scale, where the fit is a normal, the change of
log sigma is 0.04, which is the best that a normal can do; with 46 rows and 8 parameters sigma itself is skewed further.
"""

from __future__ import annotations

import time
from pathlib import Path

import pyro_vi_lab as vl
from pyro_vi_lab.checks.pareto import importance
from tests import posteriordb
from tests.regressions import CASES, deviations

DRAWS = 100_000


def row(name: str) -> str:
    """One line of the table."""
    loaded = posteriordb.load(name)
    make, named = CASES[name]
    problem = make(loaded)
    problem.density()
    vl.fit(problem, max_steps=1, progress=False)  # captured
    fit = vl.fit(problem, progress=False)
    drawn = fit.posterior(DRAWS)
    fitted = deviations(loaded, named(dict(drawn.draws)))
    weights = importance(drawn.stats["log_p"].flatten(), drawn.stats["log_q"].flatten())
    weighed = deviations(loaded, named(dict(drawn.draws)), weights.smoothed_log_weights)
    began = time.perf_counter()
    sampled = vl.nuts(problem, num_chains=4, num_warmup=500, num_draws=1000, seed=0, progress=False)
    seconds = time.perf_counter() - began
    reference = deviations(loaded, named(dict(sampled.draws)))
    cells = [
        name,
        "yes" if loaded.case.near_normal else "no",
        *(f"{value:.3f}" for value in fitted),
        *(f"{value:.3f}" for value in weighed),
        f"{weights.khat:.2f}",
        f"{fit.seconds:.2f}",
        *(f"{value:.3f}" for value in reference),
        f"{seconds:.1f}",
        str(len(sampled.problems())),
    ]
    return f"| {' | '.join(cells)} |"


def main(out: Path, *, quick: bool = False) -> None:
    """Measure and write regression.md."""
    assert __doc__ is not None
    names = (
        "posterior",
        "near normal",
        "shift",
        "change",
        "reweighted: shift",
        "change",
        "k-hat",
        "s",
        "NUTS: shift",
        "change",
        "s",
        "problems",
    )
    lines = [
        "# Regressions",
        "",
        "Written by `python -m benchmarks regression`.",
        "",
        *__doc__.strip().splitlines(),
        "",
    ]
    lines += [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
    lines += [row(name) for name in list(CASES)[: 1 if quick else None]]
    (out / "regression.md").write_text("\n".join([*lines, ""]), encoding="utf-8")
