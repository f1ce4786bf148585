"""pyro_vi_lab: fits and NUTS of one problem, cold and warm."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import torch

import pyro_vi_lab as vl
from benchmarks.channel import Channel
from tests.posteriordb import POSTERIORS

Arrays = dict[str, np.ndarray]
PROBLEMS: dict[str, vl.Problem] = {}


def _problem(name: str, data: Arrays) -> vl.Problem:
    if name not in PROBLEMS:
        PROBLEMS[name] = vl.Problem(POSTERIORS[name].model, **{key: torch.from_numpy(x) for key, x in data.items()})
    return PROBLEMS[name]


def order(channel: Channel, *, problem: str, model: str, data: Arrays) -> None:
    """Sites and sizes in the order of our coordinates; builds the problem."""
    sites = _problem(problem, data).density().sites
    channel.send([(key, site.unconstrained_shape.numel()) for key, site in sites.items()])


def fit(
    channel: Channel, *, problem: str, model: str, data: Arrays, family: str, seed: int, compile: bool = False
) -> None:
    """Seconds of the whole call, which stops by itself, and where it ended."""
    made = _problem(problem, data)
    began = time.perf_counter()
    result = vl.fit(made, family, seed=seed, progress=False, compile=True if compile else "auto")
    seconds = time.perf_counter() - began
    channel.send((seconds, result.num_steps, _point(result), result.history["seconds"]))


def path(channel: Channel, *, problem: str, model: str, data: Arrays, family: str, seed: int, num_steps: int) -> None:
    """Where a fit was after each of its steps: the same seed goes the same way."""
    made = _problem(problem, data)
    fits = (
        vl.fit(made, family, seed=seed, progress=False, compile=True, max_steps=step)
        for step in range(1, num_steps + 1)
    )
    channel.send([_point(fit) for fit in fits])


def _point(fit: vl.Fit) -> tuple[np.ndarray, np.ndarray]:
    assert fit.params is not None
    return fit.params.loc[0].numpy(), fit.params.scale[0].numpy()


def nuts(
    channel: Channel,
    *,
    problem: str,
    model: str,
    data: Arrays,
    num_warmup: int,
    num_draws: int,
    target_accept: float,
    seed: int,
) -> None:
    """Seconds, and draws of the latent sites ``(chains, draws, *shape)``."""
    made = _problem(problem, data)
    began = time.perf_counter()
    posterior = vl.nuts(
        made,
        num_warmup=num_warmup,
        num_draws=num_draws,
        target_accept=target_accept,
        seed=seed,
        progress=False,
    )
    seconds = time.perf_counter() - began
    channel.send((seconds, {key: posterior.draws[key].numpy() for key in made.density().sites}))


COMMANDS: dict[str, Callable[..., None]] = {"order": order, "fit": fit, "path": path, "nuts": nuts}
