"""Measure what is not in trust.json yet, and write trust.md."""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import pyro_vi_lab as vl
from benchmarks.store import Row, Store
from benchmarks.trust import page, truth
from tests import posteriordb

GUIDES = ("mean_field", "full_rank", "low_rank", "full_rank_student_t")
NUM_SEEDS = 5


def main(directory: Path, *, quick: bool = False) -> None:
    """Verdicts on every posterior, guide and seed; thorough ones and NUTS once a posterior; and ``"auto"``."""
    torch.set_num_threads(1)
    store = Store(directory, "trust")
    names = list(posteriordb.POSTERIORS)[: 2 if quick else None]
    for name in names:
        loaded = posteriordb.load(name)
        problem = vl.Problem(loaded.case.model, **loaded.data, name=name)
        for guide in GUIDES:
            for seed in range(1 if quick else NUM_SEEDS):
                _measure(
                    store,
                    "fast",
                    f"{name}|{guide}|{seed}",
                    quick,
                    lambda p=problem, at=loaded, g=guide, s=seed: truth.judged(p, at, g, s, "fast"),
                )
        for guide in GUIDES[:2]:
            _measure(
                store,
                "thorough",
                f"{name}|{guide}|0",
                quick,
                lambda p=problem, at=loaded, g=guide: truth.judged(p, at, g, 0, "thorough"),
            )
        # a problem of its own, so that NUTS captures and compiles as it does for a user who begins with it
        fresh = vl.Problem(loaded.case.model, **loaded.data, name=name)
        _measure(store, "nuts", name, quick, lambda p=fresh, at=loaded: _nuts(p, at))
        for seed in range(1 if quick else 2):
            _measure(
                store, "auto", f"{name}|{seed}", quick, lambda p=problem, at=loaded, s=seed: truth.climbed(p, at, s)
            )
    store.page.write_text(page.render(store))


def _measure(store: Store, part: str, key: str, quick: bool, measure: Callable[[], Row]) -> None:
    if store.has(part, key, quick=quick):
        return
    began = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        row = measure()
    store.put(part, key, row | ({"quick": True} if quick else {}))
    said = row.get("decision") or row.get("method") or ""
    print(f"trust: {part} {key} {said} ({time.perf_counter() - began:.1f} s)", file=sys.stderr, flush=True)


def _nuts(problem: vl.Problem, loaded: posteriordb.Loaded) -> dict[str, Any]:
    began = time.perf_counter()
    posterior = vl.nuts(problem, seed=0, progress=False)
    seconds = time.perf_counter() - began
    problems = posterior.problems()
    row = {"seconds": seconds, "gradients": posterior.info["num_gradients"], "problems": problems}
    return row | truth.errors(posterior, loaded)
