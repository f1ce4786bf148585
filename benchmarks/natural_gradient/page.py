"""natural_gradient.md, made of natural_gradient.json."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.natural_gradient.verdicts import Line, Rows, Stops, cost, goals, lines, stops

INTRODUCTION = """\
Every guide that is fitted by its bound, with the defaults and from the default start, on every posterior of
posteriordb's files that suits it. *Below*: nats by which our bound is lower; negative where it is higher. Bounds are
compared by draws that all methods of a row share, so that most of the noise of a difference cancels: checkpoints by 4096
draws, ends by 8192 others, since the best of many checkpoints owes something to the luck of its draws. The bound itself
and the distance to `gaussian_vi_baseline` are from fresh draws (± is a standard error). *10 ×*: the fit goes on from
where it stopped, with 2048 particles and the stop rule off, for ten times the steps in all, or as many as 3 s allow.

*Adam* maximizes the same captured density over the same family, in the parameters that Pyro's SVI would have, from the
same start, with as many particles as our first step and sticking-the-landing gradients. Best of the learning rates
0.1, 0.01, 0.001 and 1. Its steps are those to the first checkpoint within 0.1 nat of the best bound of any method whose next one
is too, and its last or its mean iterate counts; ours are all steps up to our own stop. Nobody tells Adam when to stop. A
learning rate is cut off when it has taken 1.2 times the steps of the best so far, or after 2.5 s if it has by then taken
40 times our steps, or after 8 s; *≥*: cut off before it arrived. The best one goes on with a tenth of the learning rate (1.5 s),
which says whether Adam ends above ours. NumPyro (12 posteriors have a model there): its autoguide and Adam with 10
particles, best of the same learning rates, 2.5 s each; Pyro: its autoguide and Adam with 10 particles and NumPyro's best
learning rate, or else that of Adam above, 4 s."""

STOPS = """\
Seeds 100 to 119 of every posterior, or as many as 40 s allow. *False*: the status is CONVERGED and the bound is more than 0.1 nat and
three standard errors below the best that any method or seed reached; in brackets without the errors. *Wasted*: steps
after the bound had come within 0.1 nat of where it ended, for good."""

GAUSSIANS = """\
Eigenvalues of the covariance from 1 down to 1 / condition in random directions, a location three standard normals away.
Nats above the least KL(q ‖ p) of the family, which is known exactly; three seeds, the worst in brackets, and from 100
dimensions on one."""

SPECIAL = """\
The targets are normalized: KL(q ‖ p) is minus the bound."""

LARGE = """\
A hierarchy of 9,999 normal means and their scale, D = 10,000. A step with the most particles that it has in its first 20,
beside as many gradients alone, each in a process of its own. Memory is what the process's peak grew by."""


def render(path: Path) -> list[str]:
    """The page."""
    kept = json.loads(path.read_text())
    rows: Rows = kept["rows"]
    found = lines(rows)
    page = ["# Natural gradients with the defaults", "", *INTRODUCTION.splitlines(), "", "## Goals", ""]
    page += _table(["what", "goal", "found", ""], [[g.what, g.goal, g.found, g.verdict] for g in goals(rows)])
    page += ["", "## By guide", "", *_guides(found), "", "## Every guide on every posterior", ""]
    for family in dict.fromkeys(line.family for line in found):
        page += [f"### {family}", "", *_family([line for line in found if line.family == family]), ""]
    page += ["## Stops", "", *STOPS.splitlines(), "", *_stops(stops(rows)), ""]
    page += ["## Special targets", "", *SPECIAL.splitlines(), "", *_special(rows), ""]
    page += ["## Gaussian targets", "", *GAUSSIANS.splitlines(), "", *_gaussians(rows), ""]
    page += ["## Ten thousand dimensions", "", *LARGE.splitlines(), "", *_large(rows), ""]
    page += _failures(rows)
    versions = ", ".join(f"{key} {value}" for key, value in kept["versions"].items())
    page += [f"Measured with {kept['processor']}, {kept['cores']} cores, two rows at a time; {versions}."]
    page += ["Made by `make bench`; a row that is in `natural_gradient.json` is not measured again: delete it to."]
    if any(row.get("quick") for part in rows.values() for row in part.values()):
        page += ["", "**Some rows are of a smoke run: not a measurement.**"]
    return page


def _table(head: Sequence[str], body: Sequence[Sequence[str]]) -> list[str]:
    return ["| " + " | ".join(head) + " |", "|---" * len(head) + "|", *("| " + " | ".join(row) + " |" for row in body)]


def _nats(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


# Every guide on every posterior


def _guides(found: list[Line]) -> list[str]:
    body = []
    for family in dict.fromkeys(line.family for line in found):
        suited = [line for line in found if line.family == family and line.suited]
        if not suited:
            continue
        below = {line: line.below_best for line in suited if line.below_best is not None}
        ratios = {line: line.adam_ratio for line in suited if line.adam_ratio is not None}
        cells = [family, f"{sum(line.ours['status'] == 'converged' for line in suited)} of {len(suited)}"]
        worst = max(below, key=lambda line: below[line] or 0.0, default=None)
        cells.append("–" if worst is None else f"{below[worst]:.3f} ({worst.posterior})")
        cells.append(f"{statistics.median(line.ours['steps'] for line in suited):.0f}")
        cells += [_median_ratio(list(ratios.values()), [line.adam_arrival is None for line in ratios])]
        for peer in ("numpyro", "pyro"):
            known = [line for line in suited if "steps" in getattr(line, peer)]
            values = [getattr(line, peer)["steps"] / line.ours["steps"] for line in known]
            cells.append(_median_ratio(values, [not getattr(line, peer)["arrived"] for line in known]))
        body.append(cells)
    head = ["guide", "converged", "most nats below the best", "our steps, median"]
    return _table(head + [f"{peer}'s steps over ours, median" for peer in ("Adam", "NumPyro", "Pyro")], body)


def _median_ratio(values: Sequence[float | None], late: Sequence[bool]) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return "–"
    return f"{'≥ ' * any(late)}{statistics.median(known):.1f} ({sum(late)} of {len(known)} cut off)"


def _family(found: list[Line]) -> list[str]:
    peers = any(line.pyro or line.numpyro for line in found)
    based = any(line.ours.get("baseline") is not None for line in found)
    head = ["posterior", "D", "status", "bound ±", "below best", "below 10 × (steps)"]
    head += ["below baseline"] * based
    head += [
        "steps",
        "gradients",
        "seconds",
        "Adam: steps to 0.1 nat",
        "rate",
        "× ours",
        "s",
        "Adam ends below ours by",
    ]
    head += ["NumPyro: steps", "Pyro: steps"] * peers
    body = []
    for line in sorted(found, key=lambda one: one.posterior):
        if line.suited:
            body.append(_line(line, peers=peers, based=based))
    skipped = [
        f"- Not {line.posterior}: {line.ours.get('skipped') or line.ours.get('failed')}."
        for line in found
        if not line.suited
    ]
    return [*_table(head, body), *([""] if skipped else []), *skipped]


def _line(line: Line, *, peers: bool, based: bool) -> list[str]:
    ours, adam = line.ours, line.adam
    long = ours.get("long") or {}
    longer = _nats(line.below_longer)
    if line.below_longer is not None:
        done = long["steps"] + ours["steps"]
        longer += f" ({done}{'' if long['steps'] >= long['wanted'] else ', cut'})"
    elbo = "–" if ours.get("elbo") is None else f"{ours['elbo']:.3f} ± {ours['error']:.3f}"
    cells = [line.posterior, str(ours["dim"]), ours["status"], elbo, _nats(line.below_best), longer]
    cells += [_nats(line.below_baseline)] * based
    cells += [str(ours["steps"]), f"{ours['gradients']:,}", f"{ours['seconds']:.2f}"]
    if "path" in adam:
        late = line.adam_arrival is None
        steps = line.adam_arrival or adam["steps"]
        cells += [f"{'≥ ' * late}{steps:.0f}", f"{adam['lr']:g}", f"{'≥ ' * late}{line.adam_ratio or 0:.1f}"]
        cells += [f"{adam['seconds']:.1f}", _nats(line.adam_below)]
    else:
        cells += [adam.get("skipped") or adam.get("failed") or "–", *["–"] * 4]
    return cells + ([_peer(line.numpyro), _peer(line.pyro)] if peers else [])


def _peer(row: Any) -> str:
    if "steps" not in row:
        return "failed" if "failed" in row else "–"
    if row["arrived"]:
        return f"{row['steps']:,} ({row['lr']:g})"
    gap = f"{row['gap']:.2g} below" if row["gap"] < 1e6 else "far below"
    return f"≥ {row['steps']:,} ({row['lr']:g}, {gap})"


# The other tables


def _stops(found: list[Stops]) -> list[str]:
    if not found:
        return ["Not measured."]
    wasted = [steps for one in found for steps in one.wasted]
    shares = [fit["wasted"] / max(fit["steps"], 1) for one in found for fit in one.converged]
    total, said = sum(len(one.fits) for one in found), sum(len(one.converged) for one in found)
    body = []
    for one in sorted(found, key=lambda one: one.name):
        steps = [fit["steps"] for fit in one.fits]
        gaps = f"{statistics.median(one.gaps):.3f} ({max(one.gaps):.3f})" if one.gaps else "–"
        false = f"{one.false()} ({one.false(0.0)})"
        spent = f"{statistics.median(one.wasted):.0f} ({_high(one.wasted):.0f})" if one.wasted else "–"
        counts = [f"{len(one.converged)}/{len(one.fits)}", false, gaps]
        body.append([one.name, *counts, f"{statistics.median(steps):.0f} ({max(steps)})", spent])
    headline = f"{said} of {total} fits converged ({100 * said / total:.1f} %), {sum(one.false() for one in found)} false stops "
    headline += f"({sum(one.false(0.0) for one in found)} without allowance for errors)"
    if wasted:
        headline += f"; wasted steps: median {statistics.median(wasted):.0f}, 90 % below {_high(wasted):.0f}, "
        headline += f"median {100 * statistics.median(shares):.0f} % of the steps"
    head = ["posterior, family", "converged", "false", "gap, median (largest)", "steps (most)", "wasted, median (90 %)"]
    return [f"{headline}.", "", *_table(head, body)]


def _high(values: Sequence[float]) -> float:
    """What nine in ten are not above."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(0.9 * len(ordered)))]


def _special(rows: Rows) -> list[str]:
    body = []
    for _, row in sorted(rows.get("special", {}).items(), reverse=True):
        if "kl" in row:
            weights = ", ".join(f"{value:.2f}" for value in row.get("weights", ()))
            exact = "–" if row["exact"] is None else f"{row['exact']:.3f}"
            numbers = [f"{row['kl']:.4f} ± {row['error']:.4f}", exact]
            body.append([row["target"], row["guide"], row["status"], *numbers, weights, str(row["steps"])])
        elif "skipped" in row:
            body.append([row["target"], row["guide"], row["skipped"], *[""] * 4])
    head = ["target", "guide", "status", "KL(q ‖ p)", "the family's least", "mass of the modes", "steps"]
    return _table(head, body)


def _gaussians(rows: Rows) -> list[str]:
    known = [row for row in rows.get("gaussians", {}).values() if "kl" in row]
    conditions = sorted({row["condition"] for row in known})
    body = []
    for family in dict.fromkeys(row["family"] for row in known):
        for dim in sorted({row["dim"] for row in known}):
            cells = [family, str(dim)]
            for condition in conditions:
                found = [r for r in known if (r["family"], r["dim"], r["condition"]) == (family, dim, condition)]
                cells.append(_gaussian(found[0]) if found else "")
            body.append(cells)
    return _table(["family", "D", *(f"condition {value:.0e}: KL, steps" for value in conditions)], body)


def _gaussian(row: Any) -> str:
    failed = [status for status in row["statuses"] if status != "converged"]
    said = f" {failed[0]}" if failed else ""
    middle, most = statistics.median(row["kl"]), max(row["kl"])
    return f"{middle:.1e} ({most:.1e}), {statistics.median(row['steps']):.0f}{said}"


def _large(rows: Rows) -> list[str]:
    body = []
    for family, row in rows.get("large", {}).items():
        if "fit" in row:
            fit, gradient, (seconds, memory) = row["fit"], row["gradient"], cost(row)
            times = [f"{1e3 * fit['seconds']:.1f}", f"{1e3 * gradient['seconds']:.1f}", f"{seconds:.2f}"]
            sizes = [f"{one['peak'] - one['before']:.0f}" for one in (fit, gradient)]
            body.append([family, str(fit["particles"]), *times, *sizes, f"{memory:.2f}"])
    head = [
        "guide",
        "particles",
        "ms per step",
        "ms of the gradients",
        "×",
        "MiB of the fit",
        "MiB of the gradients",
        "×",
    ]
    return _table(head, body)


def _failures(rows: Rows) -> list[str]:
    found = [
        f"- {part}, {key.replace('|', ', ')}: {row['failed']}"
        for part, kept in rows.items()
        for key, row in kept.items()
        if "failed" in row
    ]
    return ["## Not measured", "", *found, ""] if found else []
