"""Bayes by backprop: a normal for every weight of a network, one draw per step, minibatches.

scikit-learn's digits (64–50–10 network, 1297 rows to fit and 500 to predict) and diabetes (10–50–1, 309 and 133 rows). Every
optimizer minimizes the same Trace_ELBO of the same AutoNormal from the same start, and its rate falls to zero as half a cosine.
Adam (pyro.optim.Adam's numbers, all parameters in one call) has the best of four learning rates, chosen by the ELBO reached;
online Newton has the one rate that its docstring recommends, for which trials with these two networks were looked at too.

*ELBO* of the rows that are fitted, in nats (KL in closed form). *Score* is the mean log density of a new row under the posterior
predictive distribution, of 30 draws; *error* the part of wrong classes, or the root of the mean squared error in standard
deviations. *Seconds* are the processor's, on one thread; *after equal seconds* is at the last look, of ten, within the time of the
fastest contender. Means over the seeds, and ± half their range.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import machine
from benchmarks.channel import Worker

SEEDS = range(3)
RECOMMENDED = 0.1
"""Of online Newton, by the docstring of ``NaturalGradient``."""
RATES = {"online Newton": (RECOMMENDED, 0.05, 0.2), "FusedAdam": (1e-2, 3e-2, 1e-1, 3e-1)}
EPOCHS = {"digits": 40, "diabetes": 80}
BATCH = {"digits": 64, "diabetes": 32}
HIDDEN = 50
LOOKS = 10
DIMENSIONS = (10_000, 100_000, 1_000_000)
HERE = Path(__file__).parent.parent


def data(name: str) -> dict[str, np.ndarray]:
    """Standardized rows in a random order, the first seven in ten to fit."""
    from sklearn import datasets

    loaded = {"digits": datasets.load_digits, "diabetes": datasets.load_diabetes}[name]()
    order = np.random.default_rng(0).permutation(len(loaded.data))
    x = ((loaded.data - loaded.data.mean(0)) / np.maximum(loaded.data.std(0), 1e-9)).astype(np.float32)[order]
    y = loaded.target[order]
    if name == "digits":
        # pixels have one scale: those at the edge hardly vary
        x, cut = ((loaded.data - loaded.data.mean()) / loaded.data.std()).astype(np.float32)[order], 1297
    else:
        y, cut = ((y - y.mean()) / y.std()).astype(np.float32), 309
    return {"x": x[:cut], "y": y[:cut], "x_new": x[cut:], "y_new": y[cut:]}


def measure(quick: bool) -> Iterator[dict[str, Any]]:
    """One row per data set, optimizer and learning rate."""
    for name in list(EPOCHS)[:1] if quick else EPOCHS:
        arrays = data(name)
        sizes = [arrays["x"].shape[1], HIDDEN, 10 if name == "digits" else 1]
        task = {"arrays": arrays, "sizes": sizes, "batch": BATCH[name], "looks": 2 if quick else LOOKS}
        rows = [{"data": name, "how": how, "lr": lr, "runs": []} for how, rates in RATES.items() for lr in rates]
        rows = [row for row in rows if row["lr"] == RECOMMENDED] if quick else rows
        with Worker("bbb") as worker:
            for how in RATES:  # what is imported at a first step is no part of any run
                worker.ask("run", how=how, lr=0.01, seed=0, epochs=1, **{**task, "looks": 1})
            for seed in SEEDS[:1] if quick else SEEDS:
                for row in rows:
                    run = worker.ask(
                        "run", how=row["how"], lr=row["lr"], seed=seed, epochs=2 if quick else EPOCHS[name], **task
                    )
                    row["dim"] = run["dim"]
                    row["runs"].append(run["path"])
        yield from rows


def measure_cost(quick: bool) -> Iterator[dict[str, Any]]:
    """One row per number of weights and optimizer."""
    with Worker("bbb") as worker:
        for dim in DIMENSIONS[:1] if quick else DIMENSIONS:
            for how in RATES:
                yield {"dim": dim, "how": how, **worker.ask("cost", dim=dim, how=how, repeats=3 if quick else 15)}


# What the table says


def best(rows: list[dict[str, Any]], how: str) -> dict[str, Any]:
    """The learning rate of the highest mean ELBO; of online Newton the recommended one."""
    own = [row for row in rows if row["how"] == how and (how == "FusedAdam" or row["lr"] == RECOMMENDED)]
    return max(own, key=lambda row: mean(row, "elbo"))


def looked(row: Mapping[str, Any], within: float | None) -> list[dict[str, Any]]:
    """The last look of each run within a time; the last of all without."""
    return [[look for look in path if within is None or look["seconds"] <= within][-1] for path in row["runs"]]


def mean(row: Mapping[str, Any], quantity: str, within: float | None = None) -> float:
    return statistics.mean(look[quantity] for look in looked(row, within))


def half_range(row: Mapping[str, Any], quantity: str, within: float | None = None) -> float:
    values = [look[quantity] for look in looked(row, within)]
    return (max(values) - min(values)) / 2


def render(rows: list[dict[str, Any]]) -> list[str]:
    """One table per data set."""
    lines: list[str] = []
    for name in dict.fromkeys(row["data"] for row in rows):
        of_data = [row for row in rows if row["data"] == name]
        chosen = [best(of_data, how) for how in RATES if any(row["how"] == how for row in of_data)]
        # so that every run of every contender has a look
        seconds = min(path[-1]["seconds"] for row in chosen for path in row["runs"])
        seconds = max(seconds, *(path[0]["seconds"] for row in chosen for path in row["runs"]))
        epochs = of_data[0]["runs"][0][-1]["epoch"]
        lines += [
            "",
            f"## {name.capitalize()}, D = {of_data[0]['dim']}",
            "",
            f"| optimizer | rate | ELBO after {epochs} epochs | score | error | seconds | ELBO after {seconds:.1f} s | score |",
            "|---" * 8 + "|",
        ]
        for row in chosen:
            cells = [row["how"], f"{row['lr']:g}"]
            cells += [_cell(row, "elbo", 1), _cell(row, "score", 3), _cell(row, "error", 3), _cell(row, "seconds", 1)]
            cells += [_cell(row, "elbo", 1, seconds), _cell(row, "score", 3, seconds)]
            lines.append("| " + " | ".join(cells) + " |")
        lines += ["", "Every rate:", "", "| optimizer | rate | ELBO | score |", "|---" * 4 + "|"]
        for row in of_data:
            lines.append(f"| {row['how']} | {row['lr']:g} | {_cell(row, 'elbo', 1)} | {_cell(row, 'score', 3)} |")
    return lines


def render_cost(rows: list[dict[str, Any]]) -> list[str]:
    """What a step costs beside its gradient."""
    lines = [
        "",
        "## Cost of a step",
        "",
        "Of D independent normals under a standard normal prior, the cheapest gradient there is: medians.",
        "",
        "| D | optimizer | gradient, ms | step, ms | step / gradient |",
        "|---" * 5 + "|",
    ]
    for row in rows:
        gradient, step = (1e3 * statistics.median(row[part]) for part in ("gradient", "step"))
        lines.append(f"| {row['dim']:,} | {row['how']} | {gradient:.2f} | {step:.2f} | {step / gradient:.2f} |")
    return lines


def _cell(row: Mapping[str, Any], quantity: str, digits: int, within: float | None = None) -> str:
    return f"{mean(row, quantity, within):.{digits}f} ± {half_range(row, quantity, within):.{digits}f}"


def main(directory: Path = HERE, *, quick: bool = False) -> None:
    """Run all and write ``bayes_by_backprop.json`` and ``bayes_by_backprop.md``."""
    began, rows = time.perf_counter(), []
    for row in measure(quick):
        rows.append(row)
        print(f"bbb: {row['data']}, {row['how']}, {row['lr']:g} ({time.perf_counter() - began:.0f} s)", file=sys.stderr)
    costs = list(measure_cost(quick))
    made = {"quick": quick, "versions": machine.versions(), **machine.processor()}
    (directory / "bayes_by_backprop.json").write_text(
        json.dumps({**made, "rows": rows, "costs": costs}, indent=1) + "\n"
    )
    versions = ", ".join(f"{key} {value}" for key, value in machine.versions().items())
    lines = ["# Bayes by backprop", "", *(__doc__ or "").strip().splitlines(), *render(rows), *render_cost(costs), ""]
    if quick:
        lines += ["**A smoke run: one data set, hardly any epochs. Not a measurement.**", ""]
    lines.append(f"Measured with {made['processor']}, one thread; {versions}. Made by `python -m benchmarks bbb`.")
    (directory / "bayes_by_backprop.md").write_text("\n".join(lines) + "\n")
