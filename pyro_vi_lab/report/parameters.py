"""Scalar parameters: their names, their draws, and the rows of their table."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from pyro_vi_lab.posterior import Posterior, element_name
from pyro_vi_lab.report.words import MAX_MEAN_SHIFT, SD_RATIOS

if TYPE_CHECKING:
    from pyro_vi_lab.compare import Comparison
    from pyro_vi_lab.problem import Problem

Array = NDArray[Any]

MAX_LINES = 3000
"""Most lines of the table: one per parameter and candidate; ``comparison.json`` has all of them."""


def scalars(posterior: Posterior, wanted: Sequence[str]) -> dict[str, Array]:
    """Draws ``(C·S,)`` of the wanted scalars, by their names."""
    left, found = set(wanted), {}
    for site, value in posterior.flat().items():
        array = value.numpy(force=True)
        for index in np.ndindex(array.shape[1:]):
            name = element_name(site, index)
            if name in left:
                found[name] = array[(slice(None), *index)].astype(float)
    return {name: found[name] for name in wanted if name in found}


def labeled(values: Mapping[str, Tensor]) -> dict[str, float]:
    """Every scalar of every site by its name."""
    return {
        element_name(site, index): float(value[index])
        for site, value in values.items()
        for index in np.ndindex(tuple(value.shape))
    }


def coordinate_labels(problem: Problem) -> dict[str, str]:
    """The user's labels of the scalars that have any, ``{"theta[0]": "A"}``."""
    labels = {}
    for name, site in problem.sites.items():
        known = [problem.coords.get(dim) for dim in problem.dims(name)]
        if site.shape and site.kind in ("latent", "deterministic") and any(known):
            for index in np.ndindex(tuple(site.shape)):
                parts = [str(values[i]) for values, i in zip(known, index, strict=True) if values]
                labels[element_name(name, index)] = ", ".join(parts)
    return labels


def model_order(comparison: Comparison) -> list[str]:
    """Parameters that were compared, as the model has them."""
    names: dict[str, None] = {}
    for found in comparison.discrepancies.values():
        names |= dict.fromkeys(found.parameters)
    return list(names)


def worst_first(comparison: Comparison) -> list[str]:
    """Parameters that were compared, by the largest distance of any candidate from the reference."""
    distance: dict[str, float] = {}
    for found in comparison.discrepancies.values():
        for name, value in zip(found.parameters, found.wasserstein.tolist(), strict=True):
            distance[name] = max(distance.get(name, 0.0), value if math.isfinite(value) else math.inf)
    return sorted(distance, key=lambda name: -distance[name])


def most_parameters(comparison: Comparison) -> int:
    """How many parameters the table has room for."""
    return MAX_LINES // max(1, len(comparison.discrepancies))


def parameter_rows(comparison: Comparison, parameters: Sequence[str]) -> list[dict[str, Any]]:
    """One block per parameter, with one line per candidate, in the model's order."""
    kept = set(parameters)
    lines: dict[str, list[dict[str, Any]]] = {name: [] for name in model_order(comparison) if name in kept}
    for row in comparison.parameters().to_dict("records"):
        if row["parameter"] in lines:
            far_mean = abs(row["mean_shift"]) > MAX_MEAN_SHIFT
            far_sd = not SD_RATIOS[0] <= row["sd_ratio"] <= SD_RATIOS[1]
            lines[row["parameter"]].append({**row, "far_mean": far_mean, "far_sd": far_sd})
    labels = coordinate_labels(comparison.problem)
    return [
        {"parameter": name, "label": labels.get(name, ""), "lines": found} for name, found in lines.items() if found
    ]
