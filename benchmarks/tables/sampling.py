"""NUTS, 4 × (1000 + 1000): the smallest bulk effective sample size per second, over all coordinates of the latent sites.

The effective sample size is rank-normalized, so that the scale on which a site is drawn does not matter. All start
uniformly in (-2, 2) on the unconstrained scale and adapt to an acceptance rate of 0.8; ours is also shown at its default of
0.9. NumPyro gets the best of its three ways to run chains; everyone has two cores. Pyro runs a part of one chain: its rate
is that of the draws alone, since two cores double what a warm-up of the same length halves. Cold runs start with empty compiler
caches; *again* is a new process of ours that finds the cache of an earlier one.
"""

from __future__ import annotations

import statistics
import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from typing import Any

import numpy as np

import pyro_vi_lab as vl
from benchmarks.agreement import check_model
from benchmarks.channel import Failure, Worker
from benchmarks.problems import Entry

NAMES = (
    "eight_schools-eight_schools_noncentered",
    "wells_data-wells_dae_inter_model",
    "arK-arK",
    "sblrc-blr",
    "GLM_Poisson_Data-GLM_Poisson_model",
    "GLMM_Poisson_data-GLMM_Poisson_model",
    "radon_mn-radon_hierarchical_intercept_noncentered",
    "kidiq-kidscore_interaction",
)
"""Those of the race that NUTS samples without divergences, one of every kind."""
CHAIN_METHODS = ("parallel", "sequential", "vectorized")
TARGET_ACCEPT = 0.8
OWN_TARGET_ACCEPT = 0.9
SIZE = {"num_warmup": 1000, "num_draws": 1000}
REPEATS = 3
PYRO = {"num_warmup": 150, "num_draws": 500, "max_seconds": 20.0}
FEWEST_DRAWS = 50
"""Draws of Pyro's part below which its effective sample size says nothing."""
SLOW_WAY = 1.5
"""A way to run NumPyro's chains that is slower than another by this factor in its first warm run is not repeated."""


def smallest_ess(draws: Mapping[str, np.ndarray]) -> float:
    """Smallest bulk effective sample size of draws ``(chains, draws, *shape)``."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        import arviz
    values = arviz.ess(arviz.convert_to_dataset(dict(draws)), method="bulk")
    return min(float(values[name].min()) for name in draws)


def measure(quick: bool) -> Iterator[dict[str, Any]]:
    """One row per posterior."""
    for name in NAMES[:1] if quick else NAMES:
        try:
            yield _row(Entry(name), quick=quick)
        except (Failure, vl.LabError) as error:
            yield {"problem": Entry(name).short, "skipped": str(error)}


def _row(entry: Entry, *, quick: bool) -> dict[str, Any]:
    repeats = 1 if quick else REPEATS
    tasks: dict[str, tuple[str, dict[str, Any]]] = {
        "ours": ("ours", {"target_accept": TARGET_ACCEPT}),
        "ours, 0.9": ("ours", {"target_accept": OWN_TARGET_ACCEPT}),
    }
    for method in CHAIN_METHODS:
        tasks[f"NumPyro, {method}"] = ("in_numpyro", {"target_accept": TARGET_ACCEPT, "chain_method": method})
    contenders: dict[str, dict[str, Any]] = {label: {"warm": [], "cold": []} for label in tasks}
    with ExitStack() as stack:
        workers: dict[str, Worker] = {}
        for label, (module, options) in tasks.items():
            # the first run of a process is the cold one
            workers[label] = stack.enter_context(Worker(module))
            _, draws = workers[label].ask("nuts", **entry.task, **SIZE, **options, seed=0)
            contenders[label]["cold"].append({"seconds": workers[label].age, "ess": smallest_ess(draws)})
        for seed in range(1, repeats + 1):
            for label, (_, options) in tasks.items():
                if seed > 1 and _hopeless(label, contenders):
                    continue
                seconds, draws = workers[label].ask("nuts", **entry.task, **SIZE, **options, seed=seed)
                contenders[label]["warm"].append({"seconds": seconds, "ess": smallest_ess(draws)})
        check_model(workers[f"NumPyro, {CHAIN_METHODS[0]}"], entry)
        with Worker("ours", caches=workers["ours"].caches) as worker:
            _, draws = worker.ask("nuts", **entry.task, **SIZE, **tasks["ours"][1], seed=0)
            contenders["ours"]["again"] = [{"seconds": worker.age, "ess": smallest_ess(draws)}]
    contenders["Pyro"] = _pyro(entry, quick=quick)
    return {"problem": entry.short, "posterior": entry.name, "dim": entry.dim, "contenders": contenders}


def _hopeless(label: str, contenders: Mapping[str, Any]) -> bool:
    """Whether another way of NumPyro was clearly better in the first warm run."""
    if not label.startswith("NumPyro"):
        return False
    firsts = {key: rate(value["warm"][0]) for key, value in contenders.items() if key.startswith("NumPyro")}
    return firsts[label] * SLOW_WAY < max(firsts.values())


def _pyro(entry: Entry, *, quick: bool) -> dict[str, Any]:
    options = {**PYRO, "max_seconds": 10.0} if quick else PYRO
    with Worker("in_pyro") as worker:
        try:
            seconds, draws = worker.ask("nuts", **entry.task, **options, target_accept=TARGET_ACCEPT, seed=1)
        except Failure as failure:
            return {"skipped": str(failure)}
    count = len(next(iter(draws.values()))[0]) if draws else 0
    if count < FEWEST_DRAWS:
        return {"skipped": f"{count} draws in {options['max_seconds']:.0f} s"}
    return {"warm": [{"seconds": seconds, "ess": smallest_ess(draws)}], "num_draws": count}


# What the table says


def rate(run: Mapping[str, float]) -> float:
    """Effective draws per second."""
    return run["ess"] / run["seconds"]


def median_rate(contender: Mapping[str, Any], kind: str) -> float | None:
    runs = contender.get(kind)
    return statistics.median(map(rate, runs)) if runs else None


def best_numpyro(row: Mapping[str, Any], kind: str) -> tuple[str, float]:
    """NumPyro's best way to run chains, and its rate."""
    rates = {
        label.partition(", ")[2]: median_rate(contender, kind)
        for label, contender in row["contenders"].items()
        if label.startswith("NumPyro")
    }
    method, value = max(rates.items(), key=lambda one: one[1] or 0.0)
    assert value is not None
    return method, value


def ratio(row: Mapping[str, Any], peer: str, kind: str, ours: str = "ours") -> float | None:
    """Our effective draws per second over the peer's."""
    own = median_rate(row["contenders"][ours], kind)
    theirs = best_numpyro(row, kind)[1] if peer == "NumPyro" else median_rate(row["contenders"][peer], kind)
    return None if own is None or theirs is None else own / theirs
