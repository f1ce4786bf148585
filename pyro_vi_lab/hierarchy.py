"""Sites whose scale is a latent site, and the same model with them non-centered."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from pyro import poutine
from pyro.infer.reparam import LocScaleReparam
from torch import Tensor

from pyro_vi_lab.errors import ArgumentError
from pyro_vi_lab.problem import Problem

FUNNEL_SLOPE = 0.5
"""Slope from which on a prior, and not the data, says how far a site spreads: half of a funnel's, which is one."""
EVIDENCE_DRAWS = 100
"""Draws from which the slope is estimated."""


class Hierarchy(NamedTuple):
    r"""One site whose prior has a latent scale.

    Args:
        site: Name of the site.
        parents: Latent sites that its scale depends on.
        slope: Mean slope of :math:`\log|x - \mu|` on :math:`\log\sigma` over draws, between 0 (the data say where x is:
            the centered form is good) and 1 (the prior does: a funnel, which the non-centered form takes away).
    """

    site: str
    parents: tuple[str, ...]
    slope: float


def hierarchies(problem: Problem, z: Tensor) -> list[Hierarchy]:
    """Sites with a location and a latent scale, and what draws of an approximation or a sampler say about them.

    Args:
        problem: Model and data.
        z: Draws on the unconstrained scale.

    Shape:
        z ``(S, D)``.

    References:
        Papaspiliopoulos, Roberts & Sköld 2007, "A general framework for the parametrization of hierarchical models",
        Statistical Science 22. Betancourt & Girolami 2015, "Hamiltonian Monte Carlo for hierarchical models".
    """
    parents = _parents(problem, z[0])
    if not parents:
        return []
    step = max(1, len(z) // EVIDENCE_DRAWS)
    rows = [_spreads(problem, point, list(parents)) for point in z[::step][:EVIDENCE_DRAWS]]
    found = []
    for site, names in parents.items():
        scale, distance = (torch.stack([row[site][i] for row in rows]) for i in (0, 1))
        centered = scale - scale.mean(0)
        variance = centered.square().sum(0)
        slope = (centered * (distance - distance.mean(0))).sum(0) / variance
        usable = torch.isfinite(slope) & (variance > 0)
        if bool(usable.any()):
            found.append(Hierarchy(site, names, float(slope[usable].mean())))
    return found


def noncentered(problem: Problem, sites: Iterable[str]) -> Problem:
    r"""The same problem in which :math:`x = \mu + \sigma x'` with a latent :math:`x'` of its own scale.

    The sites are still there, now as deterministic ones: posteriors have them under their names.

    Raises:
        ArgumentError: A name that is no latent site.

    References:
        Gorinova, Moore & Hoffman 2020, "Automatic reparameterisation of probabilistic programs", ICML, for
        ``pyro.infer.reparam.LocScaleReparam``, which does it.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> def model():
        ...     tau = pyro.sample("tau", dist.HalfNormal(1.0))
        ...     pyro.sample("theta", dist.Normal(0.0, tau))
        >>> noncentered(Problem(model), ["theta"])
        Problem(model: latent tau, theta_decentered; deterministic theta)
    """
    names = list(sites)
    for name in names:
        if name not in problem.sites or problem.sites[name].kind != "latent":
            known = ", ".join(key for key, site in problem.sites.items() if site.kind == "latent")
            raise ArgumentError(f"{name!r} is no latent site of {problem.name}; these are {known}")
    inner = problem.model

    @functools.wraps(inner, updated=())
    def model(*args: Any, **kwargs: Any) -> Any:
        with poutine.reparam(config={name: LocScaleReparam(0.0) for name in names}):
            return inner(*args, **kwargs)

    dims = {name: problem.dims(name) for name in problem.sites}
    return Problem(
        model,
        *problem.args,
        dims=dims,
        coords=problem.coords,
        name=problem.name,
        dtype=problem.dtype,
        **problem.kwargs,
    )


def _parents(problem: Problem, point: Tensor) -> dict[str, tuple[str, ...]]:
    """Latent sites with a location and a scale, to the latent sites that the scale depends on."""
    density = problem.density()
    owners = [key for key, site in density.sites.items() for _ in range(site.unconstrained_shape.numel())]
    z = point.detach().clone().requires_grad_(True)
    with torch.enable_grad():
        nodes = density.trace(z).nodes
        found: dict[str, tuple[str, ...]] = {}
        for name in density.sites:
            scale = getattr(_base(nodes[name]["fn"]), "scale", None)
            if not _has_location(nodes[name]["fn"]) or not isinstance(scale, Tensor) or not scale.requires_grad:
                continue
            (grad,) = torch.autograd.grad(scale.log().sum(), z, retain_graph=True, allow_unused=True)
            if grad is not None and bool((grad != 0).any()):
                parents = {owners[i] for i in grad.nonzero().flatten().tolist()}
                found[name] = tuple(key for key in density.sites if key in parents)
    return found


def _spreads(problem: Problem, point: Tensor, sites: list[str]) -> dict[str, tuple[Tensor, Tensor]]:
    """Logarithms of scale and of distance from the location, flat, of each site at one point."""
    nodes = problem.density().trace(point).nodes
    result = {}
    for name in sites:
        base, value = _base(nodes[name]["fn"]), nodes[name]["value"].detach()
        scale, loc = base.scale.detach().expand(value.shape), base.loc.detach()
        result[name] = (scale.log().flatten(), (value - loc).abs().clamp_min(1e-300).log().flatten())
    return result


def _base(distribution: Any) -> Any:
    while hasattr(distribution, "base_dist"):
        distribution = distribution.base_dist
    return distribution


def _has_location(distribution: Any) -> bool:
    """Whether x = loc + scale·x' for an x' of the same kind: not of positive or transformed ones."""
    if getattr(distribution, "transforms", None):
        return False
    base = _base(distribution)
    return {"loc", "scale"} <= set(getattr(base, "arg_constraints", {})) and base.support.event_dim == 0
