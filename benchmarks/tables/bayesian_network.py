"""Networks with a normal on every weight, against a plain network of the same size and its Laplace approximation.

scikit-learn's digits (64–50–10, 1297 rows to fit and 500 to predict) and diabetes (10–50–1, 309 and 133 rows). *Ours* is
`fit(problem, NetworkNormal(model, estimator=...))` on minibatches, which ends by itself, with online Newton (the default) or Adam;
the scale of the prior is, of five, the one of the highest ELBO of the rows that are fitted. *Plain network* is Adam with weight
decay; *Laplace* is laplace-torch around it: all weights, Kronecker-factored, prior precision and noise by marginal likelihood.

*Score* is the mean log density of a new row under the predictive distribution; *calibration* the expected calibration error of
classes (ten bins), or the mean difference of coverage and level of intervals; *error* the part of wrong classes, or the root of the
mean squared error in standard deviations. *Seconds* are the processor's, on one thread, of one fit with its capture and compiling;
for Laplace with the training of the network. Means over the seeds, and ± half their range.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from benchmarks import machine
from benchmarks.channel import Worker
from benchmarks.tables import bbb

SEEDS = range(3)
GAINS = (0.5, 1.0, 2.0, 4.0, 8.0)
EPOCHS = {"digits": 60, "diabetes": 200}
"""Of the plain network."""
MAX_STEPS = 20_000
ESTIMATORS = ("weights", "flipout", "local_reparameterization")
HOWS = ("online Newton", "Adam")
HERE = Path(__file__).parent.parent
QUANTITIES = {"score": 3, "calibration": 3, "error": 3, "seconds": 1}


def measure(quick: bool) -> Iterator[dict[str, Any]]:
    """One row per data set, contender and gain."""
    for name in list(EPOCHS)[:1] if quick else EPOCHS:
        arrays = bbb.data(name)
        sizes = [arrays["x"].shape[1], bbb.HIDDEN, 10 if name == "digits" else 1]
        task = {"arrays": arrays, "sizes": sizes, "batch": bbb.BATCH[name]}
        seeds = SEEDS[:1] if quick else SEEDS
        with Worker("bayesian_network") as worker:
            found = [worker.ask("peers", seed=seed, epochs=1 if quick else EPOCHS[name], **task) for seed in seeds]
            for contender in found[0]:
                yield {"data": name, "contender": contender, "runs": [one[contender] for one in found]}
            for how in HOWS:
                for estimator in ESTIMATORS[-1:] if quick else ESTIMATORS:
                    for gain in GAINS[-1:] if quick else GAINS:
                        chosen = {"how": how, "estimator": estimator, "gain": gain}
                        steps = 20 if quick else MAX_STEPS
                        runs = [worker.ask("ours", seed=seed, max_steps=steps, **chosen, **task) for seed in seeds]
                        contender = f"{how}, {estimator.replace('_', ' ')}"
                        yield {"data": name, "contender": contender, "gain": gain, "runs": runs}


def mean(row: Mapping[str, Any], quantity: str) -> float:
    return statistics.mean(run[quantity] for run in row["runs"])


def half_range(row: Mapping[str, Any], quantity: str) -> float:
    values = [run[quantity] for run in row["runs"]]
    return (max(values) - min(values)) / 2


def best(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of each contender the row of the highest ELBO; those without a choice as they are."""
    chosen: dict[str, dict[str, Any]] = {}
    for row in rows:
        known = chosen.get(row["contender"])
        if known is None or mean(row, "elbo") > mean(known, "elbo"):
            chosen[row["contender"]] = row
    return list(chosen.values())


def render(rows: list[dict[str, Any]]) -> list[str]:
    """One table per data set."""
    lines: list[str] = []
    for name in dict.fromkeys(row["data"] for row in rows):
        of_data = [row for row in rows if row["data"] == name]
        header = [
            "",
            f"## {name.capitalize()}",
            "",
            "| contender | prior | score | calibration | error | seconds | ELBO |",
        ]
        lines += [*header, "|---" * 7 + "|"]
        for row in best(of_data):
            cells = [row["contender"], f"{row['gain']:g}/√fan-in" if "gain" in row else "–"]
            cells += [_cell(row, quantity, digits) for quantity, digits in QUANTITIES.items()]
            cells.append(_cell(row, "elbo", 1) if "gain" in row else "–")
            lines.append("| " + " | ".join(cells) + " |")
        ours = [row for row in best(of_data) if "gain" in row]
        peers = [row for row in best(of_data) if "gain" not in row]
        if ours and peers:
            ahead, goal = max(mean(row, "score") for row in ours), max(mean(row, "score") for row in peers)
            lines += [
                "",
                f"Best score of ours {ahead:.3f}, of the others {goal:.3f}: goal {'met' if ahead >= goal else 'not met'}.",
            ]
        lines += ["", "Every prior:", "", "| contender | prior | ELBO | score | steps |", "|---" * 5 + "|"]
        for row in of_data:
            if "gain" in row:
                cells = [row["contender"], f"{row['gain']:g}/√fan-in", _cell(row, "elbo", 1), _cell(row, "score", 3)]
                lines.append("| " + " | ".join([*cells, _cell(row, "steps", 0)]) + " |")
    return lines


def _cell(row: Mapping[str, Any], quantity: str, digits: int) -> str:
    return f"{mean(row, quantity):.{digits}f} ± {half_range(row, quantity):.{digits}f}"


def main(directory: Path = HERE, *, quick: bool = False) -> None:
    """Run all and write ``bayesian_network.json`` and ``bayesian_network.md``."""
    began, rows = time.perf_counter(), []
    for row in measure(quick):
        rows.append(row)
        shown = f"{row['data']}, {row['contender']}, {row.get('gain', '')}: {mean(row, 'score'):.3f}"
        print(f"bayesian_network: {shown} ({time.perf_counter() - began:.0f} s)", file=sys.stderr, flush=True)
    made = {"quick": quick, "versions": machine.versions(), **machine.processor()}
    (directory / "bayesian_network.json").write_text(json.dumps({**made, "rows": rows}, indent=1) + "\n")
    versions = ", ".join(f"{key} {value}" for key, value in machine.versions().items())
    lines = ["# Bayesian networks", "", *(__doc__ or "").strip().splitlines(), *render(rows), ""]
    if quick:
        lines += ["**A smoke run: one data set, hardly any steps. Not a measurement.**", ""]
    lines.append(
        f"Measured with {made['processor']}, one thread; {versions}. Made by `python -m benchmarks bayesian_network`."
    )
    (directory / "bayesian_network.md").write_text("\n".join(lines) + "\n")
