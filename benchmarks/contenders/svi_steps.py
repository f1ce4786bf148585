"""Steps of Pyro's SVI under one objective; each objective in a process of its own."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import pyro
import torch
from pyro.infer import SVI, JitTrace_ELBO, Trace_ELBO
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal

from benchmarks.channel import Channel
from tests.posteriordb import POSTERIORS

LR = 0.01
RUNS: dict[str, Callable[[], float]] = {}


def _objective(name: str) -> pyro.infer.ELBO:
    if name == "Trace_ELBO":
        return Trace_ELBO()
    if name == "JitTrace_ELBO":
        return JitTrace_ELBO(ignore_jit_warnings=True)
    from pyro_vi_lab import Captured

    return Captured(Trace_ELBO(), compile=True if name.endswith("compiled") else "auto")


def _optimizer(objective: str) -> pyro.optim.PyroOptim:
    if "FusedAdam" not in objective:
        return pyro.optim.Adam({"lr": LR})
    from pyro_vi_lab import FusedAdam

    return FusedAdam({"lr": LR})


def prepare(
    channel: Channel, *, problem: str, model: str, data: dict[str, np.ndarray], guide: str, objective: str, warmup: int
) -> None:
    """Make a run of SVI, and take its first steps."""
    torch.set_default_dtype(torch.float64)
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    pyro.enable_validation(False)
    guide_class = {"AutoNormal": AutoNormal, "AutoMultivariateNormal": AutoMultivariateNormal}[guide]
    program = POSTERIORS[problem].model
    tensors = {key: torch.from_numpy(value) for key, value in data.items()}
    optim = _optimizer(objective)
    made = guide_class(program)
    if objective.endswith("alone"):
        Trace_ELBO().loss_and_grads(program, made, **tensors)
        params = {value for _, value in pyro.get_param_store().named_parameters()}
        RUNS["run"] = lambda: optim(params)
    else:
        svi = SVI(program, made, optim, _objective(objective))
        RUNS["run"] = lambda: svi.step(**tensors)
    for _ in range(warmup):
        RUNS["run"]()
    channel.send(True)


def steps(channel: Channel, *, num_steps: int) -> None:
    """Seconds of a number of steps."""
    run = RUNS["run"]
    began = time.perf_counter()
    for _ in range(num_steps):
        run()
    channel.send(time.perf_counter() - began)


COMMANDS: dict[str, Callable[..., None]] = {"prepare": prepare, "steps": steps}
