"""NumPyro: Adam in jitted blocks of steps, and NUTS."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
from numpyro.infer import MCMC, NUTS, SVI, Trace_ELBO, init_to_uniform
from numpyro.infer.autoguide import AutoMultivariateNormal, AutoNormal
from numpyro.infer.util import initialize_model

from benchmarks.channel import CORES, Channel
from benchmarks.models.in_numpyro import MODELS

Arrays = dict[str, np.ndarray]
Point = tuple[np.ndarray, np.ndarray]

NUM_CHAINS = 4
START = init_to_uniform(radius=0.0)
"""The origin of the unconstrained scale."""


class Race:
    """One model, family and number of particles, compiled once for all learning rates and numbers of steps."""

    def __init__(self, model: str, data: Arrays, family: str, num_particles: int) -> None:
        arrays = {key: jnp.asarray(value) for key, value in data.items()}
        guide_class = {"full_rank": AutoMultivariateNormal, "mean_field": AutoNormal}[family]
        self.guide = guide_class(MODELS[model], init_loc_fn=START, init_scale=0.1)
        # a schedule that reads the argument of the traced function: one compilation for all learning rates
        self._lr: Any = 0.0
        self.optim = numpyro.optim.Adam(lambda _: self._lr)
        self.svi = SVI(MODELS[model], self.guide, self.optim, Trace_ELBO(num_particles=num_particles))
        self.family, self.arrays = family, arrays

        def block(state: Any, num_steps: Any, lr: Any) -> tuple[Any, Any, Any]:
            self._lr = lr

            def step(_: Any, carry: Any) -> Any:
                state, total = carry
                state, _ = self.svi.update(state, **arrays)
                return state, jax.tree.map(jnp.add, total, self.optim.get_params(state.optim_state))

            zeros = jax.tree.map(jnp.zeros_like, self.optim.get_params(state.optim_state))
            state, total = jax.lax.fori_loop(0, num_steps, step, (state, zeros))
            mean = jax.tree.map(lambda x: x / num_steps, total)
            return state, self.optim.get_params(state.optim_state), mean

        self.block: Callable[..., tuple[Any, Any, Any]] = jax.jit(block)

    def start(self, seed: int) -> Any:
        return self.svi.init(jax.random.PRNGKey(seed), **self.arrays)

    @property
    def order(self) -> list[tuple[str, int]]:
        """Sites and their sizes in the order of this library's coordinates."""
        locs = self.guide._init_locs
        return [(name, int(np.size(locs[name]))) for name in sorted(locs)]

    def point(self, params: Any) -> Point:
        """Location and scale (a factor or standard deviations) on the unconstrained scale."""
        values = {key: np.asarray(value) for key, value in self.svi.constrain_fn(params).items()}
        if self.family == "full_rank":
            return values["auto_loc"], values["auto_scale_tril"]
        names = [name for name, _ in self.order]
        loc = np.concatenate([values[f"{name}_auto_loc"].ravel() for name in names])
        return loc, np.concatenate([values[f"{name}_auto_scale"].ravel() for name in names])


@cache
def _race(model: str, family: str, num_particles: int, problem: str) -> Race:
    race = Race(model, DATA[problem], family, num_particles)
    jax.block_until_ready(race.block(race.start(0), 2, 0.001))
    return race


DATA: dict[str, Arrays] = {}


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
    DATA[problem] = data
    race = _race(model, family, num_particles, problem)
    state, seconds, steps = race.start(seed), 0.0, 0
    channel.send(race.order)
    while num_steps := channel.receive():
        began = time.perf_counter()
        state, last, mean = jax.block_until_ready(race.block(state, num_steps, lr))
        seconds += time.perf_counter() - began
        steps += num_steps
        channel.send((steps, seconds, [race.point(last), race.point(mean)]))


def cold_fit(
    channel: Channel,
    *,
    problem: str,
    model: str,
    data: Arrays,
    family: str,
    lr: float,
    num_particles: int,
    seed: int,
    num_steps: int,
) -> None:
    """The same in one block, in a new process."""
    race = Race(model, data, family, num_particles)
    _, last, _ = jax.block_until_ready(race.block(race.start(seed), num_steps, lr))
    channel.send(race.point(last))


def log_prob(channel: Channel, *, model: str, data: Arrays, points: np.ndarray) -> None:
    """Log density at points ``(S, D)`` on the unconstrained scale, in this library's order of the sites."""
    arrays = {key: jnp.asarray(value) for key, value in data.items()}
    info = initialize_model(jax.random.PRNGKey(0), MODELS[model], init_strategy=START, model_kwargs=arrays)
    _, unravel = jax.flatten_util.ravel_pytree(info.param_info.z)
    values = jax.jit(jax.vmap(lambda z: -info.potential_fn(unravel(z))))(points)
    channel.send(
        ([(key, int(np.size(info.param_info.z[key]))) for key in sorted(info.param_info.z)], np.asarray(values))
    )


CHAINS: dict[str, Callable[[Callable[[Any], Any]], Callable[[Any], Any]]] = {
    "sequential": lambda one_chain: jax.jit(lambda keys: jax.lax.map(one_chain, keys)),
    "vectorized": lambda one_chain: jax.jit(jax.vmap(one_chain)),
    "parallel": lambda one_chain: _split(jax.pmap(lambda keys: jax.lax.map(one_chain, keys))),
}
"""Ways to run chains, compiled once and called many times: `MCMC.run` compiles anew at every call in some of its own."""


def _split(run: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """As many chains on each device as there are for it."""

    def on_devices(keys: Any) -> Any:
        draws = run(keys.reshape(CORES, -1, *keys.shape[1:]))
        return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), draws)

    return on_devices


@cache
def _sampler(
    problem: str, model: str, chain_method: str, num_warmup: int, num_draws: int, accept: float
) -> Callable[[Any], Any]:
    arrays = {key: jnp.asarray(value) for key, value in DATA[problem].items()}

    def one_chain(key: Any) -> Any:
        kernel = NUTS(MODELS[model], init_strategy=init_to_uniform(radius=2.0), target_accept_prob=accept)
        sampler = MCMC(kernel, num_warmup=num_warmup, num_samples=num_draws, progress_bar=False)
        sampler.run(key, **arrays)
        return sampler.get_samples()

    return CHAINS[chain_method](one_chain)


def nuts(
    channel: Channel,
    *,
    problem: str,
    model: str,
    data: Arrays,
    chain_method: str,
    num_warmup: int,
    num_draws: int,
    target_accept: float,
    seed: int,
) -> None:
    """Seconds, and draws of the latent sites ``(chains, draws, *shape)``; the first call compiles."""
    DATA[problem] = data
    began = time.perf_counter()
    run = _sampler(problem, model, chain_method, num_warmup, num_draws, target_accept)
    draws = jax.block_until_ready(run(jax.random.split(jax.random.PRNGKey(seed), NUM_CHAINS)))
    seconds = time.perf_counter() - began
    channel.send((seconds, {key: np.asarray(value) for key, value in draws.items()}))


COMMANDS: dict[str, Callable[..., None]] = {"fit": fit, "cold_fit": cold_fit, "log_prob": log_prob, "nuts": nuts}
