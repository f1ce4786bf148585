"""One epoch of a variational autoencoder: scikit-learn's digits, binarized, 1797 × 64 in batches of 128 (the last has 5).

By hand means without Pyro: the same network, draws, bound and Adam, its loss eager or under `torch.compile`. That is the limit for
anything that runs on PyTorch. The contenders take turns epoch by epoch, each in a process of its own, in float32.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from typing import Any

import numpy as np

from benchmarks.channel import Failure, Worker

HIDDEN = (200, 1000)
WAYS = ("PyTorch", "PyTorch, compiled", "Captured", "Captured, compiled", "Pyro")
BY_HAND = WAYS[:2]
WARMUP = 10
"""Epochs before the clock starts; enough for every compiler."""
EPOCHS = 15


def digits() -> np.ndarray:
    """Binarized images ``(1797, 64)``."""
    from sklearn.datasets import load_digits

    return (load_digits().data > 7).astype(np.float64)


def measure(quick: bool) -> Iterator[dict[str, Any]]:
    """One row per width of the hidden layers."""
    for hidden in HIDDEN[:1] if quick else HIDDEN:
        yield _row(hidden, warmup=2 if quick else WARMUP, epochs=2 if quick else EPOCHS)


def _row(hidden: int, *, warmup: int, epochs: int) -> dict[str, Any]:
    data = digits()
    contenders: dict[str, dict[str, Any]] = {}
    with ExitStack() as stack:
        workers = {}
        for way in WAYS:
            worker = stack.enter_context(Worker("vae"))
            try:
                worker.ask("prepare", data=data, hidden=hidden, how=way, warmup=warmup)
            except Failure as failure:
                contenders[way] = {"skipped": str(failure)}
                continue
            contenders[way] = {"seconds": [], "loss": 0.0}
            workers[way] = worker
        for _ in range(epochs):
            for way, worker in workers.items():
                seconds, loss = worker.ask("epoch")
                contenders[way]["seconds"].append(seconds)
                contenders[way]["loss"] = loss
    return {"hidden": hidden, "contenders": contenders}


# What the table says


def median(row: Mapping[str, Any], way: str) -> float | None:
    values = row["contenders"].get(way, {}).get("seconds")
    return statistics.median(values) if values else None


def ratio(row: Mapping[str, Any], ours: str) -> float | None:
    """Speed as a part of that of the faster way by hand."""
    by_hand = [value for way in BY_HAND if (value := median(row, way)) is not None]
    own = median(row, ours)
    return None if own is None or not by_hand else min(by_hand) / own
