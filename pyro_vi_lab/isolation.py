"""Global state of Pyro and torch, entered and left: nothing here outlives its ``with`` block."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pyro
import torch
from pyro.util import get_rng_state, set_rng_state


@contextmanager
def seeded(seed: int | None) -> Iterator[None]:
    """Seed torch, NumPy and random inside the block, and put their states back after it; ``None`` only restores."""
    state = get_rng_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    try:
        if seed is not None:
            _seed(seed)
        yield
    finally:
        set_rng_state(state)
        if cuda:
            torch.cuda.set_rng_state_all(cuda)


def _seed(seed: int) -> None:
    """As ``pyro.set_rng_seed``, for the devices that are there.

    ``torch.manual_seed`` keeps a traceback for every kind of device that is not, which takes milliseconds, and imports
    Dynamo, which takes a second.
    """
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_available():
        torch.cuda.manual_seed_all(seed)
    if torch.backends.mps.is_available():
        torch.mps.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002  # models may use it


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Make ``dtype`` torch's default inside the block; nested blocks of one type change nothing, in any thread."""
    before = torch.get_default_dtype()
    if before == dtype:
        yield
        return
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def threads(num_threads: int) -> Iterator[None]:
    """Use ``num_threads`` intra-op threads inside the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def own_params() -> Iterator[None]:
    """A param store with the present parameters, in which new ones do not outlive the block."""
    store = pyro.get_param_store()
    with store.scope(store.get_state()):
        yield


@contextmanager
def model_run(*, seed: int | None, dtype: torch.dtype, validate: bool) -> Iterator[None]:
    """Everything a run of a user's model may touch, isolated."""
    with seeded(seed), default_dtype(dtype), own_params(), pyro.validation_enabled(validate):
        yield
