"""Pyro as it is: SVI with its autoguides and Adam, and its own NUTS."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress

import numpy as np
import pyro
import torch
from pyro.infer import MCMC, NUTS, SVI, Trace_ELBO
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal
from pyro.infer.autoguide.initialization import init_to_value
from torch import Tensor
from torch.distributions import biject_to

import pyro_vi_lab as vl
from benchmarks.channel import Channel
from pyro_vi_lab.guides import init_to_origin  # works where the prior is flat, which Pyro's strategies do not
from tests.posteriordb import POSTERIORS

Arrays = dict[str, np.ndarray]
Point = tuple[np.ndarray, np.ndarray]


def tensors(data: Arrays) -> dict[str, Tensor]:
    return {key: torch.from_numpy(value) for key, value in data.items()}


class Race:
    """One SVI run."""

    def __init__(self, problem: str, data: Arrays, family: str, lr: float, num_particles: int, seed: int) -> None:
        torch.set_default_dtype(torch.float64)
        pyro.clear_param_store()
        pyro.set_rng_seed(seed)
        pyro.enable_validation(False)  # its fastest form
        self.family, self.data = family, tensors(data)
        model = POSTERIORS[problem].model
        guide_class = {"full_rank": AutoMultivariateNormal, "mean_field": AutoNormal}[family]
        self.guide = guide_class(model, init_loc_fn=init_to_origin, init_scale=0.1)
        vectorized = num_particles > 1
        loss = Trace_ELBO(num_particles=num_particles, vectorize_particles=vectorized)
        self.svi = SVI(model, self.guide, pyro.optim.Adam({"lr": lr}), loss)
        self.guide(**self.data)
        self.order = self._order()

    def _order(self) -> list[tuple[str, int]]:
        nodes = self.guide.prototype_trace.iter_stochastic_nodes()
        return [(name, int(biject_to(node["fn"].support).inv(node["value"]).numel())) for name, node in nodes]

    def run(self, num_steps: int) -> list[Point]:
        """Take steps; last and mean iterate."""
        total = [torch.zeros_like(value) for value in self.guide.parameters()]
        for _ in range(num_steps):
            self.svi.step(**self.data)
            with torch.no_grad():
                for sum_, value in zip(total, self.guide.parameters(), strict=True):
                    sum_ += value
        last = self._point()
        with torch.no_grad():
            kept = [value.clone() for value in self.guide.parameters()]
            for value, sum_ in zip(self.guide.parameters(), total, strict=True):
                value.copy_(sum_ / num_steps)
            mean = self._point()
            for value, old in zip(self.guide.parameters(), kept, strict=True):
                value.copy_(old)
        return [last, mean]

    def _point(self) -> Point:
        with torch.no_grad():
            if self.family == "full_rank":
                return self.guide.loc.numpy().copy(), (self.guide.scale[:, None] * self.guide.scale_tril).numpy()
            names = [name for name, _ in self.order]
            locs = [getattr(self.guide.locs, name).reshape(-1) for name in names]
            scales = [getattr(self.guide.scales, name).reshape(-1) for name in names]
            return torch.cat(locs).numpy(), torch.cat(scales).numpy()


def fit(
    channel: Channel,
    *,
    problem: str,
    model: str,
    data: Arrays,
    family: str,
    lr: float,
    num_particles: int,
    seed: int,
) -> None:
    """Run Adam; every message from the driver is the number of further steps, 0 to end."""
    race = Race(problem, data, family, lr, num_particles, seed)
    seconds, steps = 0.0, 0
    channel.send(race.order)
    while num_steps := channel.receive():
        began = time.perf_counter()
        points = race.run(num_steps)
        seconds += time.perf_counter() - began
        steps += num_steps
        channel.send((steps, seconds, points))


class _TimeIsUp(Exception):
    """Ends Pyro's sampler from its hook."""


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
    max_seconds: float,
) -> None:
    """A part of a chain: the seconds of its draws, the draws on the unconstrained scale, and how far it came."""
    torch.set_default_dtype(torch.float64)
    pyro.clear_param_store()
    pyro.set_rng_seed(seed)
    pyro.enable_validation(False)
    arrays = tensors(data)
    density = vl.Problem(POSTERIORS[problem].model, **arrays).density()  # for a start only
    start = density.constrain(torch.rand(density.dim) * 4 - 2)
    kernel = NUTS(
        POSTERIORS[problem].model,
        target_accept_prob=target_accept,
        init_strategy=init_to_value(values={name: start[name] for name in density.sites}),
    )
    draws: list[dict[str, np.ndarray]] = []
    began = time.perf_counter()
    first_draw = began

    def keep(_: NUTS, values: dict[str, Tensor], stage: str, __: int) -> None:
        nonlocal first_draw
        now = time.perf_counter()
        if stage.startswith("Warm"):
            first_draw = now
        else:
            draws.append({name: value.numpy().copy() for name, value in values.items()})
        if now - began > max_seconds:
            raise _TimeIsUp

    sampler = MCMC(kernel, num_samples=num_draws, warmup_steps=num_warmup, hook_fn=keep, disable_progbar=True)
    with suppress(_TimeIsUp):
        sampler.run(**arrays)
    seconds = time.perf_counter() - first_draw
    stacked = {name: np.stack([draw[name] for draw in draws])[None] for name in density.sites} if draws else {}
    channel.send((seconds, stacked))


COMMANDS: dict[str, Callable[..., None]] = {"fit": fit, "nuts": nuts}
