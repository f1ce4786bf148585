"""A fit as numbers and plain values: what a file of it holds."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyro
import torch
from torch import Tensor, nn

from pyro_vi_lab.archive import write_archive
from pyro_vi_lab.guides import GUIDES
from pyro_vi_lab.problem import Problem
from pyro_vi_lab.provenance import data_hash, versions

if TYPE_CHECKING:
    from pyro_vi_lab.fitted import Fit

OPTIONS = ("rank", "blocks", "df", "num_components", "covariance")
"""Arguments of guides over a family that change what their parameters are."""


def save_fit(fit: Fit, path: Path) -> None:
    """See :meth:`pyro_vi_lab.Fit.save`."""
    arrays = {f"history/{name}": torch.as_tensor(values) for name, values in fit.history.items()}
    if fit.params is not None:
        arrays |= {"params/loc": fit.params.loc, "params/scale": fit.params.scale}
    for name, value in (fit.mode or {}).items():
        arrays[f"mode/{name}"] = value
    arrays |= {f"state/{name}": value for name, value in guide_state(fit.guide).items()}
    sampled = None
    if fit.sampled is not None:
        sampled, drawn = fit.sampled.parts()
        arrays |= {f"sampled/{name}": value for name, value in drawn.items()}
    header = {
        "sampled": sampled,
        "kind": "fit",
        "problem": describe(fit.problem),
        "method": fit.method,
        "guide": next((name for name, kind in GUIDES.items() if type(fit.guide) is kind), None),
        "options": guide_options(fit.guide),
        "statuses": [status.value for status in fit.statuses],
        "message": fit.message,
        "num_steps": fit.num_steps,
        "num_gradients": fit.num_gradients,
        "seconds": fit.seconds,
        "seed": fit.seed,
        "versions": versions(),
    }
    write_archive(path, header, {name: value.detach() for name, value in arrays.items()})


def describe(problem: Problem) -> dict[str, Any]:
    """What a problem is known by: its data, and its sites with their shapes and distributions."""
    sites = {name: [site.kind, list(site.shape), site.distribution] for name, site in problem.sites.items()}
    return {"name": problem.name, "data_hash": data_hash(problem), "sites": sites}


def guide_state(guide: Any) -> Mapping[str, Tensor]:
    """Parameters and buffers of a guide that is a module; else what is in Pyro's param store."""
    if guide is None:
        return {}
    if isinstance(guide, nn.Module):
        return guide.state_dict()
    return {name: value.detach() for name, value in pyro.get_param_store().items()}


def guide_options(guide: Any) -> dict[str, Any]:
    """Arguments that a guide of ours was made with, where they change what its parameters are."""
    options = {name: value for name in OPTIONS if (value := getattr(guide, name, None)) is not None}
    components = getattr(getattr(guide, "family", None), "num_components", None)
    if components is not None:
        diagonal = "scale" in guide.scale_constraints
        options |= {"num_components": components, "covariance": "diagonal" if diagonal else "dense"}
    return options
