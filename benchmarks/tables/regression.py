"""The ready regressions against published draws: full-rank fits, and our NUTS.

The largest shift of a mean in published standard deviations, and the largest relative change of one of these, over all sites.
Fits by their 100,000 draws, NUTS by 4 times 1,000 after 500 steps of warm-up; seconds with a captured model. The goal for
posteriors that are near normal is 0.1 for both; of the others k-hat should be above 0.7.
"""

from __future__ import annotations

import time
from pathlib import Path

import pyro_vi_lab as vl
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
    fitted = deviations(loaded, named(dict(fit.posterior(DRAWS).draws)))
    began = time.perf_counter()
    sampled = vl.nuts(problem, num_chains=4, num_warmup=500, num_draws=1000, seed=0, progress=False)
    seconds = time.perf_counter() - began
    drawn = deviations(loaded, named(dict(sampled.draws)))
    cells = [
        name,
        "yes" if loaded.case.near_normal else "no",
        *(f"{value:.3f}" for value in fitted),
        f"{fit.importance().khat:.2f}",
        f"{fit.seconds:.2f}",
        *(f"{value:.3f}" for value in drawn),
        f"{seconds:.1f}",
        str(len(sampled.problems())),
    ]
    return f"| {' | '.join(cells)} |"


def main(out: Path, *, quick: bool = False) -> None:
    """Measure and write regression.md."""
    assert __doc__ is not None
    names = ("posterior", "near normal", "shift", "change", "k-hat", "s", "NUTS: shift", "change", "s", "problems")
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
