"""One step of `pyro.infer.SVI` on eight schools (non-centered, D = 10), by objective; everything else is the same.

The model, the guide, the optimizer (`pyro.optim.Adam`) and one particle. The objectives take turns in blocks of steps, each in a
process of its own; the median over the blocks. *Optimizer alone* is what `pyro.optim.Adam` takes for these
parameters: it is in every step, so no objective can go below it; our `FusedAdam` does the same sums in one call.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from typing import Any

from benchmarks.channel import Failure, Worker
from benchmarks.problems import Entry

PROBLEM = "eight_schools-eight_schools_noncentered"
GUIDES = ("AutoNormal", "AutoMultivariateNormal")
OBJECTIVES = (
    "Trace_ELBO",
    "JitTrace_ELBO",
    "Captured",
    "Captured, compiled",
    "Captured, FusedAdam",
    "optimizer alone",
    "FusedAdam alone",
)
WARMUP = 2000
"""Steps before the clock starts; enough for ``compile="auto"`` to have made up its mind."""
BLOCK = 200
BLOCKS = 15


def measure(quick: bool) -> Iterator[dict[str, Any]]:
    """One row per guide."""
    for guide in GUIDES[:1] if quick else GUIDES:
        yield _row(guide, warmup=50 if quick else WARMUP, blocks=2 if quick else BLOCKS)


def _row(guide: str, *, warmup: int, blocks: int) -> dict[str, Any]:
    entry = Entry(PROBLEM)
    contenders: dict[str, dict[str, Any]] = {}
    with ExitStack() as stack:
        workers = {}
        for objective in OBJECTIVES:
            worker = stack.enter_context(Worker("svi_steps"))
            try:
                worker.ask("prepare", **entry.task, guide=guide, objective=objective, warmup=warmup)
            except Failure as failure:
                contenders[objective] = {"skipped": str(failure)}
                continue
            contenders[objective] = {"microseconds": []}
            workers[objective] = worker
        for _ in range(blocks):
            for objective, worker in workers.items():
                seconds = worker.ask("steps", num_steps=BLOCK)
                contenders[objective]["microseconds"].append(1e6 * seconds / BLOCK)
    return {"guide": guide, "contenders": contenders}


# What the table says


def median(row: Mapping[str, Any], objective: str) -> float | None:
    values = row["contenders"].get(objective, {}).get("microseconds")
    return statistics.median(values) if values else None


def ratio(row: Mapping[str, Any], peer: str, ours: str) -> float | None:
    """How many times faster a step is than with the peer."""
    own, theirs = median(row, ours), median(row, peer)
    return None if own is None or theirs is None else theirs / own
