"""Networks with a normal on every weight, against a plain network of the same size and its Laplace approximation.

scikit-learn's digits (64–50–10, 1297 rows to fit and 500 to predict) and diabetes (10–50–1, 309 and 133 rows). *Ours* is
`fit(problem, guides.NetworkNormal)` on minibatches with all defaults, which ends by itself: once by Bayes' rule, and once at the
temperature, of four, that predicts best what is held out of the rows to fit: a fifth of them for digits, three times a fifth for
diabetes (`choose_model` with fits of 2,000 steps, and the network of the first seed). *Plain network* is Adam with a weight decay
that is chosen likewise, on the same rows; *Laplace* is laplace-torch around it: all weights, Kronecker-factored, prior precision
and noise by marginal likelihood. None of the choices sees the rows to predict.

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
TEMPERATURES = (1.0, 0.3, 0.1, 0.03)
WEIGHT_DECAYS = (1e-4, 5e-4, 2e-3, 1e-2, 5e-2)
"""Around 5e-4, that of the examples of laplace-torch."""
EPOCHS = {"digits": 60, "diabetes": 200}
"""Of the plain network."""
SPLITS = {"digits": 1, "diabetes": 3}
"""Parts that are held out in turn: a fifth of three hundred rows says too little."""
MAX_STEPS, CHOICE_STEPS = 20_000, 2_000
"""Of fits, and of those that temperatures are compared by; most end by themselves after some 5,000."""
HERE = Path(__file__).parent.parent
QUANTITIES = {"score": 3, "calibration": 3, "error": 3, "seconds": 1}
BAYES, TEMPERED = "ours, Bayes' rule", "ours, temperature chosen"


def measure(quick: bool) -> Iterator[dict[str, Any]]:
    """One row per data set and contender, and one for what each chose from."""
    names = list(EPOCHS)[:1] if quick else list(EPOCHS)
    seeds = SEEDS[:1] if quick else SEEDS
    most, of_choice = (20, 20) if quick else (MAX_STEPS, CHOICE_STEPS)
    tasks = {name: task_of(name) for name in names}
    with Worker("bayesian_network") as worker:
        for name, task in tasks.items():
            training = {"epochs": 1 if quick else EPOCHS[name], **task}
            decays = worker.ask("decays", weight_decays=list(WEIGHT_DECAYS), num_splits=SPLITS[name], **training)
            yield {"data": name, "choice": "weight decay", **decays}
            found = [worker.ask("peers", seed=seed, weight_decay=decays["chosen"], **training) for seed in seeds]
            for contender in found[0]:
                yield {"data": name, "contender": contender, "runs": [one[contender] for one in found]}
        for name, task in tasks.items():
            options = {"num_splits": SPLITS[name], "max_steps": of_choice, **task}
            choice = worker.ask("choose", temperatures=list(TEMPERATURES), **options)
            yield {"data": name, "choice": "temperature", **choice}
            runs = [
                worker.ask("ours", seed=seed, temperature=choice["chosen"], max_steps=most, **task) for seed in seeds
            ]
            yield {"data": name, "contender": TEMPERED, "runs": runs}
        for name, task in tasks.items():
            runs = [worker.ask("ours", seed=seed, temperature=1.0, max_steps=most, **task) for seed in seeds]
            yield {"data": name, "contender": BAYES, "runs": runs}


def task_of(name: str) -> dict[str, Any]:
    """Data, sizes of the layers and of a batch."""
    arrays = bbb.data(name)
    sizes = [arrays["x"].shape[1], bbb.HIDDEN, 10 if name == "digits" else 1]
    return {"arrays": arrays, "sizes": sizes, "batch": bbb.BATCH[name]}


def mean(row: Mapping[str, Any], quantity: str) -> float:
    return statistics.mean(run[quantity] for run in row["runs"])


def half_range(row: Mapping[str, Any], quantity: str) -> float:
    values = [run[quantity] for run in row["runs"]]
    return (max(values) - min(values)) / 2


def render(rows: list[dict[str, Any]]) -> list[str]:
    """One table per data set, with what was chosen from, and the goal."""
    lines: list[str] = []
    for name in dict.fromkeys(row["data"] for row in rows):
        of_data = [row for row in rows if row["data"] == name]
        runs = {row["contender"]: row for row in of_data if "contender" in row}
        lines += ["", f"## {name.capitalize()}", "", "| contender | score | calibration | error | seconds |"]
        lines += ["|---" * 5 + "|"]
        for contender, row in runs.items():
            cells = [contender, *(_cell(row, quantity, digits) for quantity, digits in QUANTITIES.items())]
            lines.append("| " + " | ".join(cells) + " |")
        scores = {contender: mean(row, "score") for contender, row in runs.items()}
        peers = [score for contender, score in scores.items() if not contender.startswith("ours")]
        if peers and TEMPERED in scores:
            mine, peer = scores[TEMPERED], max(peers)
            met = "met" if mine >= peer else "not met"
            lines += ["", f"At the chosen temperature {mine:.3f}, the better of the others {peer:.3f}: goal {met}."]
        if BAYES not in runs:
            lines += ["", f"Not measured: {BAYES}."]
        for row in of_data:
            if "choice" in row:
                shown = ", ".join(f"{value:g}: {score:.3f}" for value, score in row["scores"].items())
                lines += ["", f"Score of the rows held out, by {row['choice']}: {shown}; chosen {row['chosen']:g}."]
    return lines


def _cell(row: Mapping[str, Any], quantity: str, digits: int) -> str:
    return f"{mean(row, quantity):.{digits}f} ± {half_range(row, quantity):.{digits}f}"


def save(rows: list[dict[str, Any]], *, quick: bool, directory: Path) -> None:
    """Write what there is so far."""
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


def main(directory: Path = HERE, *, quick: bool = False) -> None:
    """Run all, and write ``bayesian_network.json`` and ``bayesian_network.md`` after each part."""
    began, rows = time.perf_counter(), []
    for row in measure(quick):
        rows.append(row)
        save(rows, quick=quick, directory=directory)
        shown = f"{mean(row, 'score'):.3f}" if "runs" in row else str(row["scores"])
        what = f"{row['data']}, {row.get('contender') or row['choice']}: {shown}"
        print(f"bayesian_network: {what} ({time.perf_counter() - began:.0f} s)", file=sys.stderr, flush=True)
