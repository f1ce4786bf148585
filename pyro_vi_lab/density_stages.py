"""Natural-gradient ascent by way of a family that is quickly fitted from afar, and for mixtures from several places.

A normal distribution fitted from one place finds one mode. So for a family whose members have several, the precursor is
fitted from the start and from points around it, and then from points around the best of these fits: in its coordinates,
so that it does not matter on which scale the other modes are away.

References:
    Arenz, Dahlinger, Ye, Volpp & Neumann 2023, "A unified perspective on natural gradient variational inference with
    Gaussian mixture models", TMLR (components that start where the others are not).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from pyro_vi_lab.density import LogDensity
from pyro_vi_lab.density_batch import DensityBatch
from pyro_vi_lab.density_engine import Record, Result, ascend
from pyro_vi_lab.families import Family, Params

START_RADII = (2.0, 4.0)
"""Half-widths of the uniform jitter of pairs of points around the start: as Stan's initial values, and wider."""
MODE_RADII = (5.0, 10.0, 10.0, 20.0)
"""The same around the best fit, in its standard deviations."""
SEARCH_STEPS, SEARCH_PARTICLES = 40, 256
"""Most steps and particles of each search: where a mode is shows early, and a fit that is lost must not take all."""


def ascend_in_stages(
    density: LogDensity | DensityBatch,
    family: Family,
    start: Params,
    *,
    max_steps: int,
    generator: torch.Generator,
    on_step: Callable[[int, Record], bool | None],
    **settings: Any,
) -> Result:
    """Maximize the ELBO by way of the family's precursor, from whose optimum this one's is near.

    Args:
        density: The target.
        family: The approximating family.
        start: Where each fit starts.
        max_steps: Most steps, of all stages together.
        generator: Source of all randomness.
        on_step: Called with the number and the record of each step; every stage ends where it returns ``True``.
        **settings: As of :func:`~pyro_vi_lab.density_engine.ascend`.
    """
    settings["generator"] = generator
    precursor = family.precursor(start.loc.shape[-1])
    if precursor is None:
        return ascend(density, family, start, max_steps=max_steps, on_step=on_step, **settings)
    clock = time.perf_counter()
    first_start = family.to_precursor(start)
    if family.has_modes:
        first, second_start = _searched(density, family, precursor, first_start, max_steps, on_step, settings)
    else:
        first = ascend_in_stages(density, precursor, first_start, max_steps=max_steps, on_step=on_step, **settings)
        second_start = family.from_precursor(first.params)
    done, seconds = len(first.records) - 1, time.perf_counter() - clock
    last = ascend(
        density,
        family,
        second_start,
        max_steps=max_steps - done,
        on_step=lambda step, record: on_step(done + step, record),
        **settings,
    )
    # the evaluation before the first step of the second stage is none of a step
    later = [replace(record, seconds=record.seconds + seconds) for record in last.records[1:]]
    return Result(last.params, last.status, last.gap, first.records + later, first.num_gradients + last.num_gradients)


def _searched(
    density: LogDensity | DensityBatch,
    family: Family,
    precursor: Family,
    start: Params,
    max_steps: int,
    on_step: Callable[[int, Record], bool | None],
    settings: dict[str, Any],
) -> tuple[Result, Params]:
    """Fits of the precursor from several places, and the member that they make."""
    generator = settings["generator"]
    # many fits, but few steps: code is compiled for them only where it is asked for
    settings = {**settings, "compile": settings.get("compile") is True}
    found: list[Params] = []
    bounds: list[Tensor] = []
    records: list[Record] = []
    num_gradients = 0
    for radii in (START_RADII, MODE_RADII):
        if not found:
            away = _pairs(radii, start.loc, generator)
            places = torch.cat([torch.zeros_like(away[:1]), away])
        else:
            best = torch.cat(bounds).argmax(0)
            fits = torch.arange(len(best), device=best.device)
            start = Params(*(torch.cat(values)[best, fits] for values in zip(*found, strict=True)))
            places = precursor.spread(start, _pairs(radii, start.loc, generator))
        number, done, clock = len(places), max(len(records) - 1, 0), records[-1].seconds if records else 0.0
        rows = torch.arange(len(start.loc), device=start.loc.device).repeat(number)
        result = ascend_in_stages(
            density.chosen(rows),
            precursor,
            Params((start.loc + places).flatten(0, 1), start.scale[rows]),
            max_steps=min(max_steps - done, SEARCH_STEPS),
            max_particles=SEARCH_PARTICLES,
            on_step=lambda step, record, done=done, number=number: on_step(done + step, _best(record, number)),  # type: ignore[misc]
            **settings,
        )
        seen = [_best(record, number) for record in result.records]
        records += [replace(record, seconds=record.seconds + clock) for record in (seen[1:] if records else seen)]
        num_gradients += result.num_gradients
        found.append(Params(*(value.unflatten(0, (number, -1)) for value in result.params)))
        elbo = torch.nan_to_num(-result.records[-1].negative_elbo, nan=-torch.inf, posinf=-torch.inf)
        bounds.append(elbo.unflatten(0, (number, -1)))
    params = Params(*(torch.cat(values) for values in zip(*found, strict=True)))
    elbo = torch.cat(bounds)
    start = family.from_precursors(params, elbo)
    return Result(start, [], elbo.amax(0), records, num_gradients), start


def _pairs(radii: tuple[float, ...], like: Tensor, generator: torch.Generator) -> Tensor:
    """Pairs of opposite points, uniform in cubes of these half-widths, ``(2 * pairs, R, D)``."""
    points = torch.rand((len(radii), *like.shape), generator=generator, dtype=like.dtype) * 2 - 1
    points = (points * torch.tensor(radii, dtype=like.dtype).reshape(-1, 1, 1)).to(like.device)
    return torch.cat([points, -points])


def _best(record: Record, number: int) -> Record:
    """Of fits from several places, what the best has."""
    bounds = torch.nan_to_num(record.negative_elbo, nan=torch.inf).unflatten(0, (number, -1))
    index = bounds.argmin(0, keepdim=True)
    names = ("negative_elbo", "gap", "step_size", "kl")
    values = {name: getattr(record, name).unflatten(0, (number, -1)).gather(0, index)[0] for name in names}
    return replace(record, **values)
