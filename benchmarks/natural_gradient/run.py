"""Measure what is not in natural_gradient.json yet, two things at a time, each in a process of its own."""

from __future__ import annotations

import pickle
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, Queue
from threading import Lock, Thread, Timer
from typing import Any

import numpy as np
import torch

import pyro_vi_lab as vl
from benchmarks import fits
from benchmarks.agreement import check_model
from benchmarks.channel import Failure, Worker
from benchmarks.natural_gradient import adam, gaussians, large, special
from benchmarks.natural_gradient.evaluation import Peer
from benchmarks.natural_gradient.page import render
from benchmarks.natural_gradient.suited import families
from benchmarks.problems import NAMES, Entry
from benchmarks.store import Row, Store
from benchmarks.tables import race
from tests import posteriordb

LANES = 2
NUM_SEEDS, SEEDS_SECONDS = 20, 40.0
PEER_PARTICLES = 10
NUMPYRO_CAP, PYRO_CAP = 2.5, 4.0
"""Seconds after which a run of a peer is given up."""
LIMIT = 90.0
"""Seconds after which a row is given up and its process ended."""
LONG_LIMIT = 180.0
"""The same where several runs make a row."""
_printing, _capturing = Lock(), Lock()


class Lane:
    """A process for each contender, started when it is needed and anew when it was ended."""

    def __init__(self) -> None:
        self._workers: dict[str, Worker] = {}

    @contextmanager
    def worker(self, contender: str, limit: float) -> Iterator[Worker]:
        """A contender's process, which is ended when it takes longer than ``limit`` seconds."""
        if contender not in self._workers:
            self._workers[contender] = Worker(contender)
        worker = self._workers[contender]
        late: list[bool] = []

        def stop() -> None:
            late.append(True)
            worker.kill()

        timer = Timer(limit, stop)
        timer.start()
        try:
            yield worker
        except (Failure, OSError, EOFError, pickle.UnpicklingError) as failure:
            self._workers.pop(contender).close()
            raise Failure(f"took longer than {limit:.0f} s" if late else str(failure)) from None
        except BaseException:
            self._workers.pop(contender).close()  # in the middle of a conversation
            raise
        finally:
            timer.cancel()

    def close(self) -> None:
        """End all processes."""
        with ExitStack() as stack:
            for worker in self._workers.values():
                stack.callback(worker.close)
            self._workers.clear()


@dataclass(frozen=True)
class Task:
    """What makes one row.

    Args:
        part: Of the study.
        key: Of the row.
        measure: Makes the row.
    """

    part: str
    key: str
    measure: Callable[[Lane], Row]


def tasks(store: Store, *, quick: bool) -> list[list[Task]]:
    """Groups of tasks; those of a group go one after the other."""
    names = sorted(posteriordb.POSTERIORS, key=lambda name: not _slow(name))
    chosen = ["GLM_Poisson_Data-GLM_Poisson_model"] if quick else names
    dims = gaussians.DIMENSIONS[:2] if quick else gaussians.DIMENSIONS
    cases = [
        (dim, condition, family)
        for dim in reversed(dims)
        for condition in gaussians.CONDITIONS[: 1 if dim == 1 else None]
        for family in gaussians.FAMILIES
    ]
    without_data = [Task("special", case.key, _ask("special", key=case.key)) for case in special.CASES] + [
        Task(
            "gaussians",
            f"{dim}|{condition:g}|{family}",
            _ask("gaussian", limit=LONG_LIMIT, dim=dim, condition=condition, family=family),
        )
        for dim, condition, family in cases
    ]
    return [without_data, *(_of_posterior(store, name, quick=quick) for name in chosen)]


def _slow(name: str) -> bool:
    case = posteriordb.POSTERIORS[name]
    return case.unrolled or case.funnel or name.startswith(("radon", "gp"))


def _ask(do: str, *, limit: float = LIMIT, **task: Any) -> Callable[[Lane], Row]:
    def measure(lane: Lane) -> Row:
        with lane.worker("natural_gradient", limit) as worker:
            row: Row = worker.ask(do, **task)
        return row

    return measure


def _of_posterior(store: Store, name: str, *, quick: bool) -> list[Task]:
    """Ours, many seeds, Adam, then the peers, who are told what has been found before."""
    found = [
        Task("ours", f"{name}|{family}", _ask("ours", posterior=name, family=family, quick=quick))
        for family in families()
    ]
    for family in fits.FAMILIES:
        number, seconds = (3, 3.0) if quick else (NUM_SEEDS, SEEDS_SECONDS)
        measure = _ask("seeds", posterior=name, family=family, num_seeds=number, seconds=seconds)
        found.append(Task("seeds", f"{name}|{family}", measure))
    for family in families():
        found.append(Task("adam", f"{name}|{family}", _adam(store, name, family, quick=quick)))
    for family in fits.FAMILIES:
        if name in NAMES:
            found.append(Task("numpyro", f"{name}|{family}", _numpyro(store, name, family, quick=quick)))
        found.append(Task("pyro", f"{name}|{family}", _pyro(store, name, family)))
    return found


def reference(store: Store, key: str) -> float:
    """The best bound of a row so far, by the common draws.

    Raises:
        Failure: There is no fit of ours to compare with.
    """
    ours, theirs = store.get("ours", key) or {}, store.get("adam", key) or {}
    values = [ours.get("common"), ours.get("long", {}).get("common"), theirs.get("common")]
    found = [value for value in values if value is not None]
    if ours.get("common") is None:
        raise Failure(ours.get("skipped") or ours.get("failed") or "there is no fit of ours to compare with")
    return max(found)


def _adam(store: Store, name: str, family: str, *, quick: bool) -> Callable[[Lane], Row]:
    def measure(lane: Lane) -> Row:
        ours = store.get("ours", f"{name}|{family}") or {}
        if "skipped" in ours:
            return {"skipped": ours["skipped"]}
        ask = _ask(
            "adam",
            limit=LONG_LIMIT,
            posterior=name,
            family=family,
            num_particles=(ours.get("particles") or [64])[0],
            reference=reference(store, f"{name}|{family}"),
            our_steps=ours["steps"],
            quick=quick,
        )
        return ask(lane)

    return measure


def _numpyro(store: Store, name: str, family: str, *, quick: bool) -> Callable[[Lane], Row]:
    def measure(lane: Lane) -> Row:
        entry, target = _target(store, name, family)
        runs: list[Row] = []
        with lane.worker("in_numpyro", LONG_LIMIT) as worker:
            check_model(worker, entry)
            for lr in adam.LEARNING_RATES[:2] if quick else adam.LEARNING_RATES:
                arrivals = [run["seconds"] for run in runs if run["arrived"]]
                cap = min([NUMPYRO_CAP, *(race.SLOWER * seconds for seconds in arrivals)])
                runs.append(_raced(worker, entry, target, "in_numpyro", lr, cap))
        return _best(runs)

    return measure


def _pyro(store: Store, name: str, family: str) -> Callable[[Lane], Row]:
    def measure(lane: Lane) -> Row:
        entry, target = _target(store, name, family)
        key = f"{name}|{family}"
        theirs = store.get("numpyro", key) or {}
        lr = theirs.get("lr") or (store.get("adam", key) or {}).get("lr") or adam.LEARNING_RATES[0]
        with lane.worker("in_pyro", LIMIT) as worker:
            return _best([_raced(worker, entry, target, "in_pyro", lr, PYRO_CAP)])

    return measure


def _target(store: Store, name: str, family: str) -> tuple[Entry, Peer]:
    """A posterior, and the evaluator of the peers' points on it, which runs in this process."""
    best = reference(store, f"{name}|{family}")
    with _capturing:  # Pyro's handlers are not made for threads; the captured graph is
        entry = Entry(name)
        target = Peer(entry.problem.density(), family, best, evidence=entry.loaded.log_evidence)
        target.gap(np.zeros(entry.dim), np.ones(entry.dim) if family == "mean_field" else np.eye(entry.dim))
    return entry, target


def _raced(worker: Worker, entry: Entry, target: Peer, contender: str, lr: float, cap: float) -> Row:
    configuration = race.Configuration(contender, lr, PEER_PARTICLES)
    run = race.race(worker, entry, target, configuration, seed=1, cap=cap)  # type: ignore[arg-type]
    return {"lr": lr, "arrived": run.arrived, "steps": run.steps, "seconds": run.seconds, "gap": min(run.gap, 1e300)}


def _best(runs: list[Row]) -> Row:
    """The fastest to arrive, or else the one that came nearest, and all of them."""
    best = min(runs, key=lambda run: (not run["arrived"], run["steps"] if run["arrived"] else run["gap"]))
    return {**best, "num_particles": PEER_PARTICLES, "runs": runs}


def _large(lane: Lane, family: str) -> Row:
    """A fit and the gradients alone, in new processes: their peaks are all that is known of memory."""
    rows: dict[str, Row] = {}
    for what in ("fit", "gradient"):
        lane.close()
        task = {"family": family} if what == "fit" else {"num_particles": rows["fit"]["particles"]}
        rows[what] = _ask(f"large_{what}", **task)(lane)
    lane.close()
    return {"family": family, **rows}


def main(directory: Path, *, quick: bool = False) -> None:
    """Measure and write ``natural_gradient.json`` row by row, then ``natural_gradient.md``."""
    torch.set_num_threads(1)
    store, began = Store(directory, "natural_gradient"), time.perf_counter()
    alone = [Task("large", family, lambda lane, family=family: _large(lane, family)) for family in large.FAMILIES]
    try:
        _work(store, [alone], 1, began, quick=quick)  # nothing beside it: its seconds are of interest
        _work(store, tasks(store, quick=quick), LANES, began, quick=quick)
    finally:
        if store.path.exists():
            store.page.write_text("\n".join(render(store.path)) + "\n")


def _work(store: Store, groups: list[list[Task]], lanes: int, began: float, *, quick: bool) -> None:
    queue: Queue[list[Task]] = Queue()
    for group in groups:
        missing = [task for task in group if not store.has(task.part, task.key, quick=quick)]
        if missing:
            queue.put(missing)

    ours: list[BaseException] = []

    def drain() -> None:
        lane = Lane()
        try:
            while True:
                for task in queue.get_nowait():
                    _measure(store, lane, task, began, quick=quick)
        except Empty:
            return
        except BaseException as mistake:  # noqa: BLE001  # raised again below, when the other lane is through
            ours.append(mistake)
        finally:
            lane.close()

    threads = [Thread(target=drain, daemon=True) for _ in range(lanes)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if ours:
        raise ours[0]


def _measure(store: Store, lane: Lane, task: Task, began: float, *, quick: bool) -> None:
    start = time.perf_counter()
    try:
        row = task.measure(lane)
    except (Failure, vl.LabError) as error:
        row = {"failed": str(error)}
    row["took"] = round(time.perf_counter() - start, 2)
    if quick:
        row["quick"] = True
    store.put(task.part, task.key, row)
    said = row.get("failed") or row.get("skipped") or row.get("status") or ""
    with _printing:
        print(
            f"natural_gradient {task.part} {task.key}: {row['took']:.1f} s {said} "
            f"({time.perf_counter() - began:.0f} s in all)",
            file=sys.stderr,
            flush=True,
        )
