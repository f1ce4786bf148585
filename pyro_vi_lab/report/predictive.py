"""Posterior predictive checks: data sets that each posterior predicts, beside the one that was seen."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from pyro_vi_lab.errors import LabError
from pyro_vi_lab.posterior import Posterior, element_name
from pyro_vi_lab.report import figures

if TYPE_CHECKING:
    from pyro_vi_lab.compare import Comparison

Array = NDArray[Any]

NUM_REPLICATED = 200
MIN_REPLICATED = 20
"""Fewest replicated data sets from which a 90% band can be read."""
MAX_NUMBERS = 2**21
"""Replicated values of one posterior (16 MiB in float64), which limits the number of data sets."""
MAX_SITES = 4
MAX_COLUMNS = 4
"""Columns of an observed site that are shown one by one; of more, all values are shown together."""
MAX_BARS = 24
"""Distinct values up to which data are shown as bars."""
EXTREME = 0.01
"""A tail probability below this, or above one minus it, is a major failure of the model (Gelman et al. 2013, "Bayesian
data analysis", Section 6.3)."""
STATISTICS: Mapping[str, Callable[[Array], Array]] = {
    "mean": lambda values: values.mean(-1),
    "sd": lambda values: values.std(-1),
    "smallest": lambda values: values.min(-1),
    "largest": lambda values: values.max(-1),
}


def predictive_checks(comparison: Comparison) -> tuple[list[dict[str, Any]], str]:
    """Pictures and tail probabilities for every observed quantity.

    Returns:
        for each its name, pictures and rows; and why there are none, or what is left out, if so.
    """
    problem, observed = comparison.problem, comparison.problem.observed
    size = sum(value.numel() for value in observed.values())
    if not size:
        return [], "There is none: the observed values are not held as a whole."
    number = min(NUM_REPLICATED, MAX_NUMBERS // size)
    if number < MIN_REPLICATED:
        return [], f"It is left out: {size:,} observed values are too many to draw again for every posterior."
    replicated: dict[str, dict[str, Array]] = {}
    notes = []
    for who, posterior in {comparison.reference_name: comparison.reference, **comparison.posteriors}.items():
        try:
            found = problem.predictive(thinned(posterior, number), seed=comparison.seed)
        except LabError as error:
            notes.append(f"{who} is left out: {error}.")
            continue
        replicated[who] = {name: value[0].numpy(force=True).astype(float) for name, value in found.items()}
    quantities: list[dict[str, Any]] = []
    for site in list(observed)[:MAX_SITES] if replicated else []:
        data = observed[site].numpy(force=True).astype(float)
        for name, index in _columns(site, data, problem.sites[site].event_dim):
            here = {
                who: values[site][(..., *index)].reshape(len(values[site]), -1) for who, values in replicated.items()
            }
            quantities.append(_quantity(comparison, name, data[(..., *index)].ravel(), here))
    if len(observed) > MAX_SITES:
        notes.append(f"Shown are {MAX_SITES} of {len(observed)} observed sites.")
    return [quantity for quantity in quantities if quantity], " ".join(notes)


def thinned(posterior: Posterior, number: int) -> Posterior:
    """Evenly spaced draws of all chains, in one chain."""
    flat = posterior.flat()
    total = posterior.num_chains * posterior.num_draws
    kept = torch.linspace(0, total - 1, min(number, total)).long()
    return Posterior(
        {name: value[kept.to(value.device)][None] for name, value in flat.items()}, method=posterior.method
    )


def _columns(site: str, data: Array, event_dim: int) -> list[tuple[str, tuple[Any, ...]]]:
    """Parts of a site that are quantities of their own: the columns of vectors, if they are few."""
    if event_dim == 1 and data.ndim >= 2 and data.shape[-1] <= MAX_COLUMNS:
        return [(element_name(site, (i,)), (i,)) for i in range(data.shape[-1])]
    return [(site, ())]


def _quantity(comparison: Comparison, name: str, data: Array, replicated: Mapping[str, Array]) -> dict[str, Any]:
    replicated = {who: values for who, values in replicated.items() if bool(np.isfinite(values).all())}
    if data.size == 0 or not replicated:
        return {}
    order = list(comparison.fits)
    distinct = _distinct(data, replicated)
    panels: list[dict[str, Any]]
    if distinct is not None:
        shares = np.array([(data == value).mean() for value in distinct])
        intervals = {
            who: np.quantile(np.stack([(values == value).mean(1) for value in distinct], 1), (0.05, 0.5, 0.95), axis=0)
            for who, values in replicated.items()
        }
        picture = figures.bars(distinct.tolist(), shares, intervals, order=order)
        panels = [{"who": "", "swatch": "", "svg": picture}]
    else:
        panels = [
            {
                "who": who,
                "svg": figures.cumulative(who, data, values, place=order.index(who) if who in order else None),
                "swatch": figures.swatch(order.index(who)) if who in order else "",
            }
            for who, values in replicated.items()
        ]
    return {
        "name": name,
        "bars": distinct is not None,
        "panels": panels,
        "number": next(iter(replicated.values())).shape[0],
        "who": list(replicated),
        "rows": [_row(statistic, of, data, replicated) for statistic, of in STATISTICS.items()],
    }


def _distinct(data: Array, replicated: Mapping[str, Array]) -> Array | None:
    """All values there are, if they are few."""
    found = np.unique(data)
    for values in replicated.values():
        if len(found) > MAX_BARS:
            return None
        found = np.union1d(found, values[0])  # of data that are not discrete, the first data set has many already
        found = np.union1d(found, np.unique(values)) if len(found) <= MAX_BARS else found
    return found if len(found) <= MAX_BARS else None


def _row(statistic: str, of: Callable[[Array], Array], data: Array, replicated: Mapping[str, Array]) -> dict[str, Any]:
    seen = float(of(data[None])[0])
    scale = float(of(next(iter(replicated.values()))).std())
    cells: list[dict[str, Any]] = []
    for values in replicated.values():
        found = of(values)
        tail = float((found > seen).mean() + 0.5 * (found == seen).mean())
        low, high = np.quantile(found, (0.05, 0.95)).tolist()
        extreme = not EXTREME <= tail <= 1 - EXTREME
        cells.append({"low": low, "high": high, "tail": tail, "extreme": extreme})
    return {"statistic": statistic, "seen": seen, "scale": scale, "cells": cells}
