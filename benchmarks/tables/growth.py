"""How the time and the memory of a fit grow: with rows, dimensions, particles and restarts. Ours alone.

Each size in a process of its own, on one thread; the density is captured before the clock starts. *Memory* is what the
fits added to the process's peak. *Growth* is the exponent between a size and the one before,
log(time ratio) / log(size ratio): 1 is linear. scikit-learn's classical counterparts stand beside as context: a maximum, or
a Gaussian in closed form, where ours is a posterior.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from benchmarks.channel import Failure, Worker
from benchmarks.problems import Entry

ROWS = (10**3, 10**4, 10**5, 10**6)
NUM_COVARIATES = 20
DIMENSIONS = (10, 100, 1000, 10_000)
PARTICLES = (1, 10, 100, 1000)
RESTARTS = (1, 10, 50, 200, 500)
SMALL = "eight_schools-eight_schools_noncentered"
PRIOR_SD = 2.5
REPEATS = 3


def regression_data(num_rows: int, *, binary: bool) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(num_rows)
    X = rng.normal(size=(num_rows, NUM_COVARIATES))
    mean = X @ rng.normal(size=NUM_COVARIATES) / 2
    y = rng.random(num_rows) < 1 / (1 + np.exp(-mean)) if binary else mean + rng.normal(size=num_rows)
    return {"X": X, "y": y.astype(np.float64)}


def measure(quick: bool) -> Iterator[dict[str, Any]]:
    """One row per size."""
    repeats = 1 if quick else REPEATS
    small = Entry(SMALL)
    for size in ROWS[:2] if quick else ROWS:
        data = regression_data(size, binary=True)
        for family in ("full_rank", "mean_field"):
            task = {"model": "logistic_regression", "data": data, "family": family, "options": {}, "repeats": repeats}
            yield _row(f"N rows, logistic regression, D = 20, {family}", size, "growth", "fit", task)
        task = {"model": "logistic_regression", "data": data, "prior_sd": PRIOR_SD, "repeats": repeats}
        yield _row("N rows: scikit-learn LogisticRegression (MAP)", size, "in_sklearn", "fit", task)
    for size in ROWS[:1] if quick else ROWS[:3]:
        data = regression_data(size, binary=False)
        task = {"model": "linear_regression", "data": data, "family": "full_rank", "options": {}, "repeats": repeats}
        yield _row("N rows, linear regression, D = 21, full_rank", size, "growth", "fit", task)
        task = {"model": "linear_regression", "data": data, "prior_sd": PRIOR_SD, "repeats": repeats}
        yield _row("N rows: scikit-learn BayesianRidge", size, "in_sklearn", "fit", task)
    for size in DIMENSIONS[:2] if quick else DIMENSIONS:
        data = {"y": np.random.default_rng(size).normal(size=size - 1) * 2}
        task = {"model": "normal_means", "data": data, "family": "mean_field", "options": {}, "repeats": repeats}
        yield _row("D dimensions, normal means, mean_field", size, "growth", "fit", task)
    data = dict(small.arrays)
    for size in PARTICLES[:2] if quick else PARTICLES:
        task = {"model": SMALL, "data": data, "num_particles": size, "repeats": repeats}
        yield _row("K particles, eight schools, one gradient", size, "growth", "gradients", task)
    for size in RESTARTS[:2] if quick else RESTARTS:
        for family in ("full_rank", "mean_field"):
            options = {"num_restarts": size}
            task = {"model": SMALL, "data": data, "family": family, "options": options, "repeats": repeats}
            yield _row(f"R restarts, eight schools, {family}", size, "growth", "fit", task)


def _row(series: str, size: int, module: str, do: str, task: Mapping[str, Any]) -> dict[str, Any]:
    with Worker(module) as worker:
        try:
            return {"series": series, "size": size, **worker.ask(do, **task)}
        except Failure as failure:
            return {"series": series, "size": size, "skipped": str(failure)}


# What the table says


def seconds(row: Mapping[str, Any]) -> float:
    return statistics.median(row["seconds"])


def exponent(before: Mapping[str, Any], row: Mapping[str, Any]) -> float:
    """Local exponent of the time's growth."""
    return math.log(seconds(row) / seconds(before)) / math.log(row["size"] / before["size"])


def series(rows: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Measured rows by what grows."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        if "skipped" not in row:
            groups.setdefault(row["series"], []).append(row)
    return groups
