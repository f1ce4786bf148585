"""The goals of the project's speed, and what was measured for each."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from benchmarks.tables import growth, race, sampling, svi, vae

Tables = Mapping[str, list[dict[str, Any]]]


@dataclass(frozen=True)
class Goal:
    """A ratio to reach on every case.

    Args:
        work: What is done.
        against: By whom else.
        least: The ratio to reach, larger is better.
        ratios: The measured ratio of each case; ``None`` where it could not be measured.
        open_ended: Cases whose ratio is a lower bound, since the peer never arrived.
    """

    work: str
    against: str
    least: float
    ratios: Mapping[str, float | None]
    open_ended: frozenset[str] = frozenset()

    @property
    def measured(self) -> dict[str, float]:
        return {case: ratio for case, ratio in self.ratios.items() if ratio is not None}

    @property
    def verdict(self) -> str:
        if not self.measured:
            return "not measured"
        missed = [case for case, ratio in self.measured.items() if ratio < self.least]
        return f"missed on {len(missed)} of {len(self.measured)}" if missed else "met"


def goals(tables: Tables) -> list[Goal]:
    """Every goal whose table has been measured."""
    tables = {name: [row for row in rows if "skipped" not in row] for name, rows in tables.items()}
    return [*_fits(tables), *_sampling(tables), *_steps(tables), *_growth(tables)]


def _fits(tables: Tables) -> list[Goal]:
    found = []
    for family, peer, name, kind, least in (
        ("full_rank", "in_numpyro", "NumPyro AutoMultivariateNormal + Adam", "warm", 20.0),
        ("full_rank", "in_numpyro", "NumPyro AutoMultivariateNormal + Adam", "cold", 3.0),
        ("full_rank", "in_pyro", "Pyro AutoMultivariateNormal + Adam", "warm", 200.0),
        ("mean_field", "in_numpyro", "NumPyro AutoNormal + Adam", "warm", 10.0),
        ("mean_field", "in_numpyro", "NumPyro AutoNormal + Adam", "cold", 2.0),
        ("mean_field", "in_pymc", "PyMC ADVI", "warm", 10.0),
        ("mean_field", "in_pymc", "PyMC ADVI", "cold", 2.0),
    ):
        rows = [row for row in tables.get("fits", ()) if row["family"] == family]
        if not rows:
            continue
        ratio = race.warm_ratio if kind == "warm" else race.cold_ratio
        capped = frozenset(
            row["problem"]
            for row in rows
            if "warm" in row["contenders"].get(peer, {}) and not race.arrived(row["contenders"][peer])
        )
        ratios = {row["problem"]: ratio(row, peer) for row in rows}
        work = f"{family.replace('_', '-')} fit to within {race.WITHIN} nat, {kind}"
        found.append(Goal(work, name, least, ratios, capped))
    return found


def _sampling(tables: Tables) -> list[Goal]:
    rows = tables.get("nuts", ())
    if not rows:
        return []
    work = "NUTS 4 × (1000 + 1000), smallest bulk ESS per second"
    cases = (("NumPyro", "warm", 1.0), ("NumPyro", "cold", 1.0), ("Pyro", "warm", 20.0))
    return [
        Goal(f"{work}, {kind}", peer, least, {row["problem"]: sampling.ratio(row, peer, kind) for row in rows})
        for peer, kind, least in cases
    ]


def _steps(tables: Tables) -> list[Goal]:
    found = []
    for ours in ("Captured", "Captured, FusedAdam"):
        for peer, least in (("Trace_ELBO", 30.0), ("JitTrace_ELBO", 10.0)):
            rows = tables.get("svi", ())
            ratios = {row["guide"]: svi.ratio(row, peer, ours) for row in rows}
            found += [Goal(f"one SVI step, eight schools, {ours}", f"Pyro's {peer}", least, ratios)] if rows else []
    rows = tables.get("vae", ())
    ratios = {f"hidden {row['hidden']}": vae.ratio(row, "Captured") for row in rows}
    against = "PyTorch by hand, the faster of eager and compiled"
    return found + ([Goal("one epoch of a VAE, `Captured`", against, 0.9, ratios)] if rows else [])


def _growth(tables: Tables) -> list[Goal]:
    rows = tables.get("growth", [])
    if not rows:
        return []
    # no worse than linear: size ratio over time ratio, from the smallest to the largest size, is at least 1
    slack = {
        name: (group[-1]["size"] / group[0]["size"]) / (growth.seconds(group[-1]) / growth.seconds(group[0]))
        for name, group in growth.series(rows).items()
        if len(group) > 1 and "scikit-learn" not in name
    }
    batch = {
        row["series"]: 3.0 / growth.seconds(row)
        for row in rows
        if row["series"].startswith("R restarts") and row["size"] == 200 and "skipped" not in row
    }
    return [
        Goal("growth from the smallest to the largest size", "linear growth", 1.0, slack),
        Goal("200 fits of eight schools in one batch", "3 seconds", 1.0, batch),
    ]


def render(tables: Tables) -> list[str]:
    """The goals as lines of Markdown."""
    lines = [
        "| work | against | goal | worst | median | |",
        "|---|---|---|---|---|---|",
    ]
    for goal in goals(tables):
        values = goal.measured
        worst = min(values, key=lambda case: values[case], default="")
        shown = f"{_times(values[worst])} ({worst})" if values else "–"
        median = _times(statistics.median(values.values())) if values else "–"
        mark = "≥ " if worst in goal.open_ended else ""
        lines.append(
            f"| {goal.work} | {goal.against} | ≥ {_times(goal.least)} | {mark}{shown} | {median} | {goal.verdict} |"
        )
    return lines


def _times(ratio: float) -> str:
    return f"{ratio:.3g} ×"
