"""Fits to simulated data, beside the parameters that made these data."""

from __future__ import annotations

import copy
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from pyro.infer.autoguide import AutoGuide
from torch import Tensor, nn

from pyro_vi_lab.density_batch import DensityBatch
from pyro_vi_lab.density_engine import Status
from pyro_vi_lab.density_fit import fit_each
from pyro_vi_lab.errors import ArgumentError, LabWarning
from pyro_vi_lab.families import Params
from pyro_vi_lab.fit import Fit, fit
from pyro_vi_lab.fit_guide import is_over_family
from pyro_vi_lab.fit_progress import fit_progress
from pyro_vi_lab.isolation import own_params
from pyro_vi_lab.posterior import element_name
from pyro_vi_lab.problem import Problem
from pyro_vi_lab.simulation import Simulation

Array = NDArray[Any]
Draws = Mapping[str, Tensor]
Quantity = Callable[[Draws, Draws], Tensor]
"""Draws of the sites ``(S, *site shape)`` and the data of the observed sites, to one number per draw ``(S,)``."""

LOG_DENSITY = "log density"
"""What the log joint density of parameters and data is called among the quantities."""
MAX_NUMBERS = 2**24
"""Numbers in the intermediate results of the draws that are evaluated at a time (128 MiB in float64)."""


class Compared(NamedTuple):
    """What is known of the simulations whose fits can be used.

    Args:
        names: Of the quantities.
        truth: Their values at the parameters that made the data, ``(R, P)``.
        draws: Their values at draws of the fits to these data, ``(R, S, P)``.
        method: Name of the guide.
        statuses: How many fits ended in each way.
        failures: Why simulations are missing, and how many for each reason.
    """

    names: list[str]
    truth: Array
    draws: Array
    method: str
    statuses: dict[str, int]
    failures: dict[str, int]


def compare_quantities(
    problem: Problem,
    simulation: Simulation,
    guide: Any,
    *,
    num_draws: int,
    seed: int,
    quantities: Mapping[str, Quantity],
    progress: bool,
) -> Compared:
    """Fit the guide to every data set, and give all scalars, the log joint density and the quantities at its draws.

    Args:
        problem: The model.
        simulation: Parameters and data.
        guide: What :func:`~pyro_vi_lab.fit` takes.
        num_draws: S.
        seed: Seed of fits and draws.
        quantities: More to compute, by name.
        progress: Show a progress line.

    Raises:
        ArgumentError: A quantity that does not give one number per draw.
    """
    problems = problem.each(simulation.data)
    density = problem.density()
    true_draws = {key: value[0] for key, value in simulation.parameters.draws.items()}
    true_z = density.unconstrain(true_draws)
    true_density = DensityBatch([one.density() for one in problems]).value_and_grad(true_z[None])[0][0]
    fits = _in_batch if is_over_family(guide) else _one_by_one
    names: list[str] = []
    truth, draws, method = [], [], ""
    statuses, failures = Counter[str](), Counter[str]()
    for r, (result, drawn) in enumerate(fits(problem, simulation, guide, num_draws, seed, progress)):
        method = result.method
        statuses[result.status.value] += 1
        if drawn is None:
            failures["the fit diverged"] += 1
            continue
        data = {key: value[r] for key, value in simulation.observed.items()}
        own = {key: value[r : r + 1] for key, value in true_draws.items()}
        names, true = _values(own, true_density[r : r + 1], data, quantities)
        _, others = _values({key: drawn.values[key] for key in own}, drawn.log_density, data, quantities)
        if np.isnan(true).any() or np.isnan(others).any():
            failures["a quantity is not a number"] += 1
            continue
        truth.append(true[0])
        draws.append(others)
    return Compared(
        names,
        np.stack(truth) if truth else np.empty((0, 0)),
        np.stack(draws) if draws else np.empty((0, 0, 0)),
        method,
        dict(statuses),
        dict(failures),
    )


class _Drawn(NamedTuple):
    """Draws of one fit, ``(S, *site shape)``, and the log joint density at them, ``(S,)``."""

    values: Draws
    log_density: Tensor


def _in_batch(
    problem: Problem, simulation: Simulation, guide: Any, num_draws: int, seed: int, progress: bool
) -> Iterator[tuple[Fit, _Drawn | None]]:
    """A fit of every data set and its draws, ``None`` if it diverged; drawn many fits at a time."""
    results = fit_each(problem, simulation.data, guide, seed=seed, progress=progress)
    generator = torch.Generator().manual_seed(seed + 1)
    size = max(1, MAX_NUMBERS // (num_draws * problem.density().work))
    for first in range(0, len(results), size):
        part = results[first : first + size]
        good = [result for result in part if result.status is not Status.DIVERGED]
        drawn = iter(_draw(problem, good, num_draws, generator) if good else ())
        for result in part:
            yield result, None if result.status is Status.DIVERGED else next(drawn)


def _draw(problem: Problem, results: Sequence[Fit], num_draws: int, generator: torch.Generator) -> list[_Drawn]:
    density, family = problem.density(), results[0].family
    members = [result.params for result in results if result.params is not None]
    params = Params(*(torch.cat(values) for values in zip(*members, strict=True)))
    noise = family.draw((num_draws, len(results)), density.dim, generator=generator, dtype=density.dtype)
    z = family.sample(params, noise.to(density.device))
    log_density = DensityBatch([result.problem.density() for result in results]).value_and_grad(z)[0]
    values = density.constrain(z)  # no latent site depends on the data
    return [_Drawn({key: value[:, i] for key, value in values.items()}, log_density[:, i]) for i in range(len(results))]


def _one_by_one(
    problem: Problem, simulation: Simulation, guide: Any, num_draws: int, seed: int, progress: bool
) -> Iterator[tuple[Fit, _Drawn | None]]:
    problems = problem.each(simulation.data)
    name = guide if isinstance(guide, str) else getattr(guide, "__name__", type(guide).__name__)
    warnings.warn(
        f"the guide {name} is fitted to {len(problems)} data sets of {problem.name} one by one, which is slower: only "
        "guides over a family are fitted in one batch",
        LabWarning,
        stacklevel=4,
    )
    with fit_progress(progress, f"{len(problems)} fits of {problem.name}") as lines:
        for r, one in enumerate(problems):
            for line in lines:
                line.on_step(r, {})
            drawn = None
            with own_params():  # a guide that is trained in place starts anew for every data set
                result = fit(one, _fresh(guide), seed=seed + r, progress=False)
                if result.status is not Status.DIVERGED:
                    values = result.posterior(num_draws, seed=seed + 1 + r).flat()
                    density = one.density()
                    drawn = _Drawn(values, density.log_prob(density.unconstrain(values)))
            yield result, drawn


def _fresh(guide: Any) -> Any:
    """A guide to train that is as the given one is now."""
    if isinstance(guide, str | type) or not isinstance(guide, nn.Module):
        return guide
    parts = {name: part for name, part in guide.named_modules() if isinstance(part, AutoGuide)}
    kept = {name: (part._model, part.master) for name, part in parts.items()}
    made: Any = copy.deepcopy(guide)  # takes the model out of an autoguide, and out of its copy
    for name, (model, master) in kept.items():
        parts[name]._model, parts[name].master = model, master
        made.get_submodule(name)._model = model
    return made


def _values(
    draws: Draws, log_density: Tensor, data: Draws, quantities: Mapping[str, Quantity]
) -> tuple[list[str], Array]:
    """Names and values ``(S, P)`` of all that is ranked."""
    names, columns = [], []
    for key, value in draws.items():
        names += [element_name(key, index) for index in np.ndindex(tuple(value.shape[1:]))]
        columns.append(value.reshape(len(value), -1))
    names.append(LOG_DENSITY)
    columns.append(log_density[:, None])
    for key, quantity in quantities.items():
        result = quantity(draws, data)
        expected = (len(log_density),)
        if not isinstance(result, Tensor) or tuple(result.shape) != expected:
            shape = tuple(result.shape) if isinstance(result, Tensor) else type(result).__name__
            raise ArgumentError(
                f"quantity {key!r} must give one number for each draw, a tensor {expected}; got {shape}"
            )
        names.append(key)
        columns.append(result[:, None])
    return names, np.concatenate([column.numpy(force=True).astype(float) for column in columns], 1)
