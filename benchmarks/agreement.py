"""Is a peer's model ours? Asked before anything is measured."""

from __future__ import annotations

import numpy as np
import torch

from benchmarks.channel import Failure, Worker
from benchmarks.problems import Entry

NUM_POINTS = 5
TOLERANCE = 1e-8
"""Difference of log densities, constants included, relative to the larger of 1 and ours."""


def check_model(worker: Worker, entry: Entry) -> None:
    """Compare a peer's model with ours at random points.

    Raises:
        Failure: The log densities differ.
    """
    z = np.random.default_rng(0).normal(size=(NUM_POINTS, entry.dim)) / 4
    theirs, _ = worker.ask("log_prob", model=entry.model, data=dict(entry.arrays), points=z)
    points = np.empty_like(z)
    points[:, entry.permutation(theirs)] = z
    _, values = worker.ask("log_prob", model=entry.model, data=dict(entry.arrays), points=points)
    ours = entry.problem.density().log_prob(torch.from_numpy(z)).numpy()
    difference = float(np.max(np.abs(values - ours) / np.maximum(1, np.abs(ours))))
    if difference > TOLERANCE:
        raise Failure(f"{worker.contender}: the log density of {entry.name} differs from ours by {difference:.2g}")
