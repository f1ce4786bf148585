"""PyMC: automatic differentiation variational inference (mean field)."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pymc as pm

from benchmarks.channel import Channel
from benchmarks.models.in_pymc import MODELS

Arrays = dict[str, np.ndarray]
START_SIGMA = 0.1


def _model(name: str, data: Arrays) -> pm.Model:
    with pm.Model() as model:
        MODELS[name](**data)
    return model


class Race:
    """ADVI of one model; the step function is compiled by the first step."""

    def __init__(self, model: str, data: Arrays, lr: float | None, num_particles: int, seed: int) -> None:
        self.model = _model(model, data)
        sigmas = {
            self.model.rvs_to_values[rv].name: np.full(rv.shape.eval(), START_SIGMA) for rv in self.model.free_RVs
        }
        self.advi = pm.ADVI(model=self.model, random_seed=seed, start_sigma=sigmas)
        # PyMC's default optimizer, or Adam
        self.options: dict[str, Any] = {"obj_n_mc": num_particles}
        if lr is not None:
            self.options["obj_optimizer"] = pm.adam(learning_rate=lr)
        self.total: list[np.ndarray] = [np.zeros(1), np.zeros(1)]
        self.started = False

    @property
    def order(self) -> list[tuple[str, int]]:
        names = {value.name: rv.name for rv, value in self.model.rvs_to_values.items()}
        slices = self.advi.approx.groups[0].ordering.values()
        return [(names[name], part.stop - part.start) for name, part, *_ in slices]

    def run(self, num_steps: int) -> None:
        """Take steps, and sum the iterates up in `total`."""
        rho, mu = self._params()
        self.total = [np.zeros_like(mu.get_value()), np.zeros_like(mu.get_value())]

        def add(*_: Any) -> None:
            self.total[0] += mu.get_value(borrow=True)
            self.total[1] += rho.get_value(borrow=True)

        if self.started:
            self.advi.refine(num_steps, progressbar=False)
            return
        self.advi.fit(num_steps, score=True, callbacks=[add], progressbar=False, **self.options)
        self.started = True

    def _params(self) -> tuple[Any, Any]:
        params = self.advi.approx.groups[0].params_dict
        return params["rho"], params["mu"]

    def points(self, num_steps: int) -> list[tuple[np.ndarray, np.ndarray]]:
        """Last and mean iterate."""
        rho, mu = (value.get_value() for value in self._params())
        mean_mu, mean_rho = (value / num_steps for value in self.total)
        return [(mu, np.logaddexp(0, rho)), (mean_mu, np.logaddexp(0, mean_rho))]


def fit(
    channel: Channel,
    *,
    problem: str,
    model: str,
    data: Arrays,
    family: str,
    lr: float | None,
    num_particles: int,
    seed: int,
) -> None:
    """Run ADVI; every message from the driver is the number of further steps, 0 to end."""
    race = Race(model, data, lr, num_particles, seed)
    race.run(1)  # compiles
    seconds, steps = 0.0, 1
    channel.send(race.order)
    while num_steps := channel.receive():
        began = time.perf_counter()
        race.run(num_steps)
        seconds += time.perf_counter() - began
        steps += num_steps
        channel.send((steps, seconds, race.points(num_steps)))


def cold_fit(
    channel: Channel,
    *,
    problem: str,
    model: str,
    data: Arrays,
    family: str,
    lr: float | None,
    num_particles: int,
    seed: int,
    num_steps: int,
) -> None:
    """The same in one block, in a new process."""
    race = Race(model, data, lr, num_particles, seed)
    race.run(num_steps)
    channel.send(race.points(num_steps)[0])


def log_prob(channel: Channel, *, model: str, data: Arrays, points: np.ndarray) -> None:
    """Log density at points ``(S, D)`` on the unconstrained scale, in this library's order of the sites."""
    made = _model(model, data)
    function = made.compile_logp()
    start = made.initial_point()
    names = {value.name: rv.name for rv, value in made.rvs_to_values.items()}
    values = []
    for row in points:
        point, used = {}, 0
        for key, like in start.items():
            size = int(np.size(like))
            point[key] = row[used : used + size].reshape(np.shape(like))
            used += size
        values.append(float(function(point)))
    channel.send(([(names[key], int(np.size(like))) for key, like in start.items()], np.asarray(values)))


COMMANDS: dict[str, Callable[..., None]] = {"fit": fit, "cold_fit": cold_fit, "log_prob": log_prob}
