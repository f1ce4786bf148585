"""Fits to within 0.1 nat of the optimum: ours against Adam in NumPyro, Pyro and PyMC, on the same posteriors.

Everyone's clock is stopped at the first checkpoint whose ELBO is within 0.1 nat of the best known optimum of the family, given that
the next checkpoint is too. Ours are the steps of `vl.fit(..., compile=True)`, with what the call does before the first and after the
last; *to its own stop* is the whole call, which stops by itself. A peer's checkpoint counts if the last iterate or the mean of
the iterates since the last checkpoint is there. A peer gets for nothing what its user has to find: the learning rate, the number of
particles, and when to stop. Nor does its clock count the making of its first state.

A cold fit is the whole call with the defaults, and starts with empty compiler caches, except PyMC's, which would compile PyTensor's operators for minutes. *Again* is a new process of ours that finds the cache of an earlier one.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

import pyro_vi_lab as vl
from benchmarks.agreement import check_model
from benchmarks.channel import Failure, Worker
from benchmarks.problems import NAMES, Entry
from benchmarks.target import WITHIN, FamilyName, Target

FAMILIES: tuple[FamilyName, ...] = ("full_rank", "mean_field")
LEARNING_RATES = (0.01, 0.03, 0.1, 0.003, 0.001)
"""In the order in which they are tried: likely winners first, so that the others can be cut off."""
PARTICLES = (1, 10)
FIRST_BLOCK = 25
GROWTH = 1.1
"""Checkpoints grow further apart, so that the time of arrival is known to a tenth."""
CAP = {"in_numpyro": 8.0, "in_pymc": 5.0, "in_pyro": 5.0}
"""Seconds after which a run is given up."""
FINALISTS = 2
"""Configurations that are run again with other seeds, so that luck with one seed does not choose the best."""
SLOWER = 1.2
"""A configuration is cut off when it has taken that much longer than the best one so far."""


@dataclass(frozen=True)
class Configuration:
    """How a peer runs: its library, Adam's learning rate (``None``: PyMC's default optimizer), and its particles."""

    contender: str
    lr: float | None
    num_particles: int


@dataclass(frozen=True)
class Run:
    """One run: seconds and steps to arrival or, where it did not arrive, to its end; of ours, also to its own stop."""

    arrived: bool
    seconds: float
    steps: int
    gap: float
    whole: float = 0.0


def race(worker: Worker, entry: Entry, target: Target, configuration: Configuration, *, seed: int, cap: float) -> Run:
    """Run a peer block by block until it has arrived or its time is up; evaluations are off the clock."""
    worker.send(
        {
            "do": "fit",
            **entry.task,
            "family": target.family,
            "lr": configuration.lr,
            "num_particles": configuration.num_particles,
            "seed": seed,
        }
    )
    permutation = entry.permutation(worker.receive())
    seconds, steps, arrived, smallest = 0.0, 0, None, np.inf
    while True:
        worker.send(max(FIRST_BLOCK, int(steps * (GROWTH - 1))))
        steps, seconds, points = worker.receive()
        gap = min(target.gap(loc[permutation], scale[permutation]) for loc, scale in points)
        smallest = min(smallest, gap)
        if gap <= WITHIN and arrived is not None:
            break
        arrived = (seconds, steps) if gap <= WITHIN else None
        if seconds > cap and arrived is None:
            break
    worker.send(0)
    if arrived is None:
        return Run(False, seconds, steps, smallest)
    return Run(True, *arrived, smallest)


def finalists(
    worker: Worker, entry: Entry, target: Target, configurations: list[Configuration]
) -> tuple[list[Configuration], list[dict[str, Any]]]:
    """The fastest configurations to arrive (else the one that came nearest), and what each one did."""
    tried: list[tuple[Configuration, Run]] = []
    for configuration in configurations:
        arrivals = [run.seconds for _, run in tried if run.arrived]
        cap = min([CAP[configuration.contender], *(SLOWER * seconds for seconds in arrivals)])
        tried.append((configuration, race(worker, entry, target, configuration, seed=0, cap=cap)))
    ranked = sorted(tried, key=lambda one: (not one[1].arrived, one[1].seconds if one[1].arrived else one[1].gap))
    chosen = [configuration for configuration, run in ranked[:FINALISTS] if run.arrived] or [ranked[0][0]]
    return chosen, [{**asdict(configuration), **asdict(run)} for configuration, run in tried]


def numpyro_grid() -> list[Configuration]:
    return [Configuration("in_numpyro", lr, particles) for particles in PARTICLES for lr in LEARNING_RATES]


def pymc_grid() -> list[Configuration]:
    """One particle, PyMC's default; each configuration is compiled anew, so the grid is smaller."""
    return [Configuration("in_pymc", lr, 1) for lr in (*LEARNING_RATES[:4], None)]


def measure(quick: bool) -> Iterator[dict[str, Any]]:
    """One row per posterior and family."""
    for name in NAMES[:1] if quick else NAMES:
        entry = Entry(name)
        for family in FAMILIES:
            try:
                yield _row(entry, family, quick=quick)
            except (Failure, vl.LabError) as error:
                yield {"problem": entry.short, "family": family, "skipped": str(error)}


def _row(entry: Entry, family: FamilyName, *, quick: bool) -> dict[str, Any]:
    target = Target(entry, family)
    repeats, cold_repeats = (1, 1) if quick else (3, 1)
    peers = {"in_numpyro": numpyro_grid()} | ({"in_pymc": pymc_grid()} if family == "mean_field" else {})
    row: dict[str, Any] = {
        "problem": entry.short,
        "posterior": entry.name,
        "dim": entry.dim,
        "family": family,
        "optimum": target.optimum,
        "contenders": {},
    }
    with tempfile.TemporaryDirectory(prefix="benchmark-caches-") as kept:
        best, theirs = _warm(row, entry, target, peers, Path(kept), quick=quick, repeats=repeats)
        for _ in range(cold_repeats):
            for who in ("ours", *peers):
                contender = row["contenders"][who]
                steps = int(statistics.median(run["steps"] for run in contender["warm"]))
                contender.setdefault("cold", []).append(_cold_fit(who, entry, family, best.get(who), steps))
        row["contenders"]["ours"]["again"] = _cold_fit("ours", entry, family, None, 0, caches=Path(kept))
    row["contenders"]["in_pyro"] = _pyro(entry, target, best["in_numpyro"], theirs[best["in_numpyro"]])
    return row


def _warm(
    row: dict[str, Any],
    entry: Entry,
    target: Target,
    peers: Mapping[str, list[Configuration]],
    caches: Path,
    *,
    quick: bool,
    repeats: int,
) -> tuple[dict[str, Configuration], dict[Configuration, list[Run]]]:
    """Find each peer's best configuration, taking turns with ours, and write the runs into the row.

    Args:
        caches: Where our compiler keeps what a later process finds again.
    """
    with ExitStack() as stack:
        workers = {who: stack.enter_context(Worker(who)) for who in peers}
        workers["ours"] = stack.enter_context(Worker("ours", caches=caches))
        chosen: dict[str, list[Configuration]] = {}
        for who, grid in peers.items():
            check_model(workers[who], entry)
            chosen[who], tried = finalists(workers[who], entry, target, grid[:3] if quick else grid)
            row["contenders"][who] = {"grid": tried}
        for seed in range(3):  # builds, captures and compiles, as the peers have
            workers["ours"].ask("fit", **entry.task, family=target.family, seed=100 + seed, compile=True)
        ours: list[Run] = []
        theirs: dict[Configuration, list[Run]] = {}
        for seed in range(1, repeats + 1):
            ours.append(_our_fit(workers["ours"], entry, target, seed=seed))
            for configuration in (one for found in chosen.values() for one in found):
                runs, who = theirs.setdefault(configuration, []), configuration.contender
                if len(runs) > 1 and not any(run.arrived for run in runs):
                    continue  # twice in vain: it will not
                runs.append(race(workers[who], entry, target, configuration, seed=seed, cap=CAP[who]))
    best = {who: min(chosen[who], key=lambda one: _median_seconds(theirs[one])) for who in peers}
    row["contenders"]["ours"] = {"warm": [asdict(run) for run in ours]}
    for who, configuration in best.items():
        runs = [asdict(run) for run in theirs[configuration]]
        row["contenders"][who] |= {"best": asdict(configuration), "warm": runs}
    return best, theirs


def _median_seconds(runs: list[Run]) -> float:
    """Median time to arrival; infinite where most did not arrive."""
    return statistics.median(run.seconds if run.arrived else np.inf for run in runs)


def _our_fit(worker: Worker, entry: Entry, target: Target, *, seed: int) -> Run:
    task = {**entry.task, "family": target.family, "seed": seed}
    seconds, steps, point, clock = worker.ask("fit", **task, compile=True)
    gap = target.gap(*point)
    near = [target.gap(*one) <= WITHIN for one in worker.ask("path", **task, num_steps=steps)]
    first = next((n for n in range(steps) if all(near[n : n + 2])), steps - 1)
    # what a fit does before its first step and after its last counts in full
    return Run(gap <= WITHIN, float(seconds - clock[-1] + clock[first + 1]), steps, gap, float(seconds))


def _cold_fit(
    who: str,
    entry: Entry,
    family: FamilyName,
    configuration: Configuration | None,
    num_steps: int,
    *,
    caches: Path | None = None,
) -> float:
    """Seconds from the start of a new process to the end of its first fit."""
    options: dict[str, Any] = {"seed": 1}
    if configuration is not None:
        options |= {"lr": configuration.lr, "num_particles": configuration.num_particles, "num_steps": num_steps}
    with Worker(who, caches=caches) as worker:
        worker.ask("fit" if configuration is None else "cold_fit", **entry.task, family=family, **options)
        return worker.age


def _pyro(entry: Entry, target: Target, best: Configuration, theirs: list[Run]) -> dict[str, Any]:
    """Pyro with the configuration that is best in NumPyro: the estimator, the optimizer and the guide are the same."""
    configuration = Configuration("in_pyro", best.lr, best.num_particles)
    with Worker("in_pyro") as worker:
        try:
            run = race(worker, entry, target, configuration, seed=1, cap=CAP["in_pyro"])
        except Failure as failure:
            return {"skipped": str(failure)}
    result: dict[str, Any] = {"best": asdict(configuration), "warm": [asdict(run)], "per_step": run.seconds / run.steps}
    if not run.arrived and all(one.arrived for one in theirs):
        result["extrapolated"] = run.seconds / run.steps * statistics.median(one.steps for one in theirs)
    return result


# What the table says


def seconds(contender: Mapping[str, Any]) -> float | None:
    """Median seconds to arrival of the warm runs; a run that did not arrive counts with the time that it was given."""
    if "warm" not in contender:
        return None
    if "extrapolated" in contender:
        return float(contender["extrapolated"])
    return statistics.median(run["seconds"] for run in contender["warm"])


def arrived(contender: Mapping[str, Any]) -> bool:
    """Whether at least half of the warm runs arrived, so that their median is a time of arrival."""
    runs = contender["warm"]
    return "extrapolated" in contender or 2 * sum(run["arrived"] for run in runs) > len(runs)


def warm_ratio(row: Mapping[str, Any], peer: str) -> float | None:
    """How many times faster ours is; where the peer did not arrive, at least that many."""
    theirs = seconds(row["contenders"].get(peer, {}))
    return None if theirs is None else theirs / _our_seconds(row)


def _our_seconds(row: Mapping[str, Any]) -> float:
    ours = seconds(row["contenders"]["ours"])
    assert ours is not None
    return ours


def cold_ratio(row: Mapping[str, Any], peer: str) -> float | None:
    contender = row["contenders"].get(peer, {})
    if "cold" not in contender:
        return None
    return statistics.median(contender["cold"]) / statistics.median(row["contenders"]["ours"]["cold"])
