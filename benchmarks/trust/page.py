"""trust.md from trust.json."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterable

from benchmarks.store import Row, Store

HEAD = """# Verdicts without a reference, against published draws

`vl.trust` on fits of the {posteriors} posteriors of posteriordb, made by `make bench ARGS=trust`. A fit is *wrong* where a mean is off by
more than 0.3 published standard deviations or a standard deviation by more than a factor 1.5, and *right* otherwise; the verdict does not
see the published draws. One thread, on two cores that other work shared. The checks behind it where the truth is closed: [trust_checks.md](trust_checks.md); calibration of
guides: [trust_calibration.md](trust_calibration.md); what a fit saves NUTS: [warm_nuts.md](warm_nuts.md).
"""
DECISIONS = ("trust", "reweight", "refine", "sample")


def render(store: Store) -> str:
    """The page."""
    fast, thorough = store.rows.get("fast", {}), store.rows.get("thorough", {})
    nuts, auto = store.rows.get("nuts", {}), store.rows.get("auto", {})
    posteriors = {key.split("|")[0] for key in fast}
    sections = [HEAD.format(posteriors=len(posteriors))]
    sections += ["## How often the verdict is right\n", *_confusion(fast)]
    sections += ["## Every miss\n", *_misses(fast)]
    sections += ["## Reweighted draws\n", *_reweighted(fast)]
    sections += ["## What a verdict costs\n", *_costs(fast, thorough, nuts)]
    sections += ['## `vl.fit(problem, "auto")`\n', *_auto(auto)]
    sections += ["## By posterior and guide\n", *_all(fast)]
    return "\n".join(sections) + "\n"


def _table(head: Iterable[str], rows: Iterable[Iterable[object]]) -> list[str]:
    head = list(head)
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    return [*lines, *(f"| {' | '.join(str(cell) for cell in row)} |" for row in rows), ""]


def _confusion(fast: dict[str, Row]) -> list[str]:
    counts = Counter((_truth(row), row["decision"]) for row in fast.values())
    rows = [
        [truth, *(counts[truth, decision] for decision in DECISIONS)]
        for truth in ("right", "wrong", "diverged")
        if any(counts[truth, decision] for decision in DECISIONS)
    ]
    right = sum(counts["right", decision] for decision in DECISIONS)
    wrong = sum(counts["wrong", decision] for decision in DECISIONS)
    missed = right - counts["right", "trust"]
    share = f"{missed / right:.1%}" if right else "none"
    return [
        *_table(["fits that are", *DECISIONS], rows),
        f"Wrong fits called `trust`: {counts['wrong', 'trust']} of {wrong} (goal 0). Right fits not called `trust`: {missed} of {right}, "
        f"{share} (goal under 10 %).\n",
    ]


def _truth(row: Row) -> str:
    return "diverged" if "wrong" not in row else "wrong" if row["wrong"] else "right"


def _misses(fast: dict[str, Row]) -> list[str]:
    missed = [
        (key, row)
        for key, row in sorted(fast.items())
        if (_truth(row) == "right" and row["decision"] != "trust")
        or (_truth(row) == "wrong" and row["decision"] == "trust")
    ]
    if not missed:
        return ["None.\n"]
    rows = []
    for key, row in missed:
        name, guide, seed = key.split("|")
        ratios = f"{_number(row['min_ratio'])}–{_number(row['max_ratio'])}"
        rows.append([name, guide, seed, _truth(row), row["decision"], _number(row["shift"]), ratios, row["reasons"][0]])
    return _table(["posterior", "guide", "seed", "is", "verdict", "mean shift", "sd ratios", "why"], rows)


def _reweighted(fast: dict[str, Row]) -> list[str]:
    found = [row["reweighted"] for row in fast.values() if "reweighted" in row]
    if not found:
        return ["No fit was to be reweighted.\n"]
    wrong = sum(row["wrong"] for row in found)
    return [f"{len(found)} fits came with reweighted draws; {wrong} of these draws are still wrong.\n"]


def _costs(fast: dict[str, Row], thorough: dict[str, Row], nuts: dict[str, Row]) -> list[str]:
    over = [row["seconds"] - row["fit_seconds"] for row in fast.values() if "wrong" in row]
    lines = []
    if over:
        late = sum(one > 1 for one in over)
        lines.append(
            f"A fast verdict took {statistics.median(row['seconds'] for row in fast.values()):.2f} s in the median, a fit "
            f"{statistics.median(row['fit_seconds'] for row in fast.values()):.2f} s. It took longer than the fit and one second in {late} of "
            f"{len(over)} (goal 0).\n"
        )
    rows = []
    for key, row in sorted(thorough.items()):
        name, guide, _ = key.split("|")
        if name in nuts:
            peer = nuts[name]
            unfit = "; ".join(peer["problems"]) or "passes its checks"
            ratio = row["seconds"] / peer["seconds"]
            rows.append(
                [name, guide, row["decision"], f"{row['seconds']:.1f}", f"{peer['seconds']:.1f}", f"{ratio:.2f}", unfit]
            )
    if rows:
        below = sum(float(row[5]) < 1 for row in rows)
        lines.append(
            f"A thorough verdict took less than NUTS with its defaults, from its capture on, in {below} of {len(rows)} (goal all):\n"
        )
        lines += _table(["posterior", "guide", "verdict", "seconds", "NUTS", "ratio", "NUTS run"], rows)
    return lines


def _auto(auto: dict[str, Row]) -> list[str]:
    wrong = [key for key, row in auto.items() if row["wrong"]]
    rows = []
    for key, row in sorted(auto.items()):
        name, seed = key.split("|")
        ended = ", ".join([row["method"], *row["changes"]])
        ratios = f"{_number(row['min_ratio'])}–{_number(row['max_ratio'])}"
        rows.append(
            [
                name,
                seed,
                ended,
                "wrong" if row["wrong"] else "right",
                _number(row["shift"]),
                ratios,
                f"{row['seconds']:.1f}",
                " → ".join(row["path"]),
            ]
        )
    return [
        f"Ends that are wrong: {len(wrong)} of {len(auto)} (goal 0).\n",
        *_table(["posterior", "seed", "ended with", "is", "mean shift", "sd ratios", "seconds", "path"], rows),
    ]


def _all(fast: dict[str, Row]) -> list[str]:
    groups: dict[tuple[str, str], list[Row]] = {}
    for key, row in fast.items():
        name, guide, _ = key.split("|")
        groups.setdefault((name, guide), []).append(row)
    rows = []
    for (name, guide), found in sorted(groups.items()):
        truth = ", ".join(f"{count} {kind}" for kind, count in Counter(map(_truth, found)).items())
        said = ", ".join(f"{count} {kind}" for kind, count in Counter(row["decision"] for row in found).items())
        shift = max((row["shift"] for row in found if row.get("shift") is not None), default=None)
        low = min((row["min_ratio"] for row in found if row.get("min_ratio") is not None), default=None)
        high = max((row["max_ratio"] for row in found if row.get("max_ratio") is not None), default=None)
        hints = Counter(hint for row in found for hint in row["suggestions"])
        rows.append([name, guide, truth, said, _number(shift), f"{_number(low)}–{_number(high)}", ", ".join(hints)])
    return _table(["posterior", "guide", "fits", "verdicts", "mean shift", "sd ratios", "suggestions"], rows)


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"
