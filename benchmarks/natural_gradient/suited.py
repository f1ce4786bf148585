"""The posteriors, and which guides suit which of them."""

from __future__ import annotations

from functools import lru_cache

from benchmarks.problems import Entry
from pyro_vi_lab.guides import GUIDES

NOT_BY_BOUND = {
    "laplace": "a Gaussian at a mode, which is not fitted by its bound",
    "map": "a point, which has no bound",
    "mle": "a point, which has no bound",
    "conjugate": "for conjugate models, which these posteriors are not",
    "flow": "trained by Adam for thousands of steps; it is among the special targets",
}
"""Guides that are not fitted by natural gradients of the bound here, and what they are instead."""


@lru_cache(maxsize=1)
def entry(posterior: str) -> Entry:
    """A posterior, captured once as long as its rows are measured."""
    return Entry(posterior)


def families() -> list[str]:
    """Names of the guides that are fitted by their bound."""
    return [name for name in GUIDES if name not in NOT_BY_BOUND]
