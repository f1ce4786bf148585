"""The posteriors, and which guides suit which of them."""

from __future__ import annotations

import math
from functools import lru_cache

import torch

from benchmarks.problems import Entry
from pyro_vi_lab.density import LogDensity
from pyro_vi_lab.guides import GUIDES

NOT_BY_BOUND = {
    "laplace": "a Gaussian at a mode, which is not fitted by its bound",
    "map": "a point, which has no bound",
    "mle": "a point, which has no bound",
    "conjugate": "for conjugate models, which these posteriors are not",
    "flow": "trained by Adam for thousands of steps; it is among the special targets",
}
"""Guides that are not fitted by natural gradients of the bound here, and what they are instead."""
FAR = (1e6, 1e7)
"""Standard deviations at which tails are looked at."""
MOST_POWER = 4.5
"""Student-t noise with five degrees of freedom has finite moments below the fifth."""


@lru_cache(maxsize=1)
def entry(posterior: str) -> Entry:
    """A posterior, captured once as long as its rows are measured."""
    return Entry(posterior)


def families() -> list[str]:
    """Names of the guides that are fitted by their bound."""
    return [name for name in GUIDES if name not in NOT_BY_BOUND]


def heavy_tailed(name: str) -> bool:
    """Whether a guide has tails under which an exponential has no mean; such a bound may be minus infinity."""
    return name.endswith("student_t")


@torch.no_grad()
def light_coordinate(density: LogDensity, loc: torch.Tensor, sd: torch.Tensor) -> str | None:
    """A coordinate along which the log density falls too fast for the bound of a Student-t guide to be finite.

    Args:
        density: The target.
        loc: A point in the middle, ``(D)``.
        sd: Scales of the coordinates, ``(D)``.
    """
    here = float(density.log_prob(loc))
    for i, label in enumerate(density.labels):
        for sign in (-1.0, 1.0):
            points = loc.repeat(2, 1)
            points[:, i] += sign * sd[i] * torch.tensor(FAR, dtype=loc.dtype)
            near, far = (here - float(value) for value in density.log_prob(points))
            if not (math.isfinite(near) and math.isfinite(far)):
                return label
            if near > 0 and far > 0 and math.log(far / near) / math.log(FAR[1] / FAR[0]) > MOST_POWER:
                return label
    return None
