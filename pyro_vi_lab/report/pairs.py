"""Which two coordinates to show together, and the outlines of the candidates in them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from pyro_vi_lab.errors import ArgumentError, LabError
from pyro_vi_lab.families import LocationScale, LowRank
from pyro_vi_lab.posterior import Posterior
from pyro_vi_lab.report import figures

if TYPE_CHECKING:
    from pyro_vi_lab.compare import Comparison

Array = NDArray[Any]

PER_REASON = 2
"""Pairs for each of the reasons."""
MAX_COORDINATES = 300
"""Coordinates among which pairs are looked for, those farthest from the reference: all pairs of them are tried."""
MAX_SITES = 200
"""Sites up to which draws that have no coordinates of the unconstrained space are given some: the model is captured."""
REASONS = {
    "dependent": "strongest dependence in the reference",
    "mismatch": "correlation missed by {score:.2f}",
    "worst": "farthest from the reference one by one",
}


def pair_pictures(comparison: Comparison) -> tuple[list[dict[str, Any]], str]:
    """Pairs of coordinates of the unconstrained space, where a normal guide is an ellipse.

    Returns:
        for each its names, why it is shown, and the picture; and why there are none, if so.
    """
    order = list(comparison.fits)
    try:
        reference = unconstrained(comparison, comparison.reference)
        draws = {name: unconstrained(comparison, p) for name, p in comparison.posteriors.items()}
    except LabError as error:
        return [], f"There are none: {error}."
    names = comparison.problem.density().labels
    moving = np.flatnonzero((reference.std(0) > 0) & np.isfinite(reference).all(0))
    usable = {name: values for name, values in draws.items() if bool(np.isfinite(values).all())}
    if len(moving) < 2 or not usable:
        return [], "There are none: this needs two coordinates that move, and a candidate with finite draws."
    found = []
    sites = [names[i].split("[")[0] for i in moving]
    candidates = {name: values[:, moving] for name, values in usable.items()}
    for i, j, reason, score in chosen(reference[:, moving], candidates, sites=sites):
        columns = moving[[i, j]]
        shapes = {name: _shape(comparison, name, values[:, columns]) for name, values in usable.items()}
        both = (names[columns[0]], names[columns[1]])
        found.append(
            {
                "x": both[0],
                "y": both[1],
                "reason": REASONS[reason].format(score=score),
                "svg": figures.pair(both, reference[:, columns], shapes, order=order),
            }
        )
    return found, ""


def unconstrained(comparison: Comparison, posterior: Posterior) -> Array:
    """Draws on the unconstrained scale, ``(C·S, D)`` in float64.

    Raises:
        LabError: The posterior lacks a latent site, the problem has no density, or it has too many sites for this.
    """
    if posterior.unconstrained is not None:
        z = posterior.unconstrained.flatten(0, 1)
    elif len(comparison.problem.sites) > MAX_SITES:
        raise ArgumentError(
            f"{len(comparison.problem.sites)} sites are too many to be taken to the unconstrained scale"
        )
    else:
        with torch.no_grad():
            z = comparison.problem.density().unconstrain(posterior.flat())
    return np.asarray(z.numpy(force=True), np.float64)


def chosen(
    reference: Array, candidates: dict[str, Array], *, sites: list[str]
) -> Iterator[tuple[int, int, str, float]]:
    """Pairs of columns, the reason for each and its score: the most dependent, the worst matched, the farthest.

    Dependence is the largest of the correlations of two coordinates and of the distances of each from its mean, which
    finds a funnel too. For one reason, no two sites are shown together twice.

    Shape:
        reference ``(S, D)``, candidates ``(S', D)``; no column constant in the reference.
    """
    mean, sd = reference.mean(0), reference.std(0)
    worst = np.zeros(len(mean))
    for draws in candidates.values():
        ratio = np.maximum(draws.std(0) / sd, 1e-300)
        worst = np.maximum(worst, np.maximum(np.abs(draws.mean(0) - mean) / sd, np.abs(np.log(ratio))))
    columns = np.argsort(-worst, kind="stable")[:MAX_COORDINATES]
    z = (reference[:, columns] - mean[columns]) / sd[columns]
    size = np.abs(z) - np.abs(z).mean(0)
    size /= np.maximum(size.std(0), 1e-300)
    here = z.T @ z / len(z)
    across = np.abs(z.T @ size) / len(z)
    dependent = np.maximum(np.abs(here), np.maximum(across, across.T))
    missed = np.zeros_like(here)
    for draws in candidates.values():
        own = draws[:, columns] - draws[:, columns].mean(0)
        own /= np.where(own.std(0) > 0, own.std(0), np.inf)
        missed = np.maximum(missed, np.abs(own.T @ own / len(own) - here))
    bad = worst[columns]
    seen: set[tuple[int, int]] = set()
    for reason, score in (
        ("dependent", dependent),
        ("mismatch", missed),
        ("worst", np.minimum(bad[:, None], bad[None]) + 1e-3 * (bad[:, None] + bad[None])),
    ):
        rows, others = np.triu_indices(len(columns), 1)
        together: set[frozenset[str]] = set()
        for k in np.argsort(-score[rows, others], kind="stable"):
            pair = (int(columns[rows[k]]), int(columns[others[k]]))
            pair = (min(pair), max(pair))
            both = frozenset(sites[i] for i in pair)
            if pair not in seen and both not in together:
                seen.add(pair)
                together.add(both)
                yield *pair, reason, float(score[rows[k], others[k]])
            if len(together) == PER_REASON:
                break


def _shape(comparison: Comparison, name: str, draws: Array) -> figures.Shape:
    """Ellipses of a guide that has them, else lines of equal density."""
    fit = comparison.fits[name]
    if not bool((draws.std(0) > 0).all()):
        return figures.Shape(tuple(draws[:1].repeat(2, 0) for _ in range(2)), float("nan"))
    if fit.params is not None and fit.num_restarts == 1 and isinstance(fit.family, LocationScale | LowRank):
        return figures.Shape.ellipses(draws)
    return figures.Shape.contours(draws)
