"""The scalars that two posteriors have in common, and halves of the reference, whose difference is noise."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from pyro_vi_lab.errors import DataError
from pyro_vi_lab.posterior import Posterior, element_name

Array = NDArray[Any]

MIN_DRAWS = 4
"""Fewest draws per chain from which an autocorrelation, and so a Monte Carlo error, can be estimated."""
MIN_HALF = 50
"""Fewest draws in each half of a reference, and of an approximation beside it."""
CONSTANT_UNITS = 8
"""A scalar is constant where its draws spread over at most this many units in the last place."""
NUM_BLOCKS = 10
"""Blocks of successive draws that the jackknife leaves out one by one."""


class Pair(NamedTuple):
    """Draws of the scalars that reference and approximation have in common, in float64.

    Args:
        labels: Names, ``"theta[3]"``.
        reference: ``(C, S, P)``.
        approximation: ``(C', S', P)``.
        constant: Names of scalars that are the same constant in both, and left out.
        missing: Names of sites that only one of the two has.
    """

    labels: tuple[str, ...]
    reference: Array
    approximation: Array
    constant: tuple[str, ...]
    missing: tuple[str, ...]


class Halves(NamedTuple):
    """Three sets of as many draws ``(n, P)`` each, so that a distance between any two has the same noise.

    Args:
        first: From the first half of every chain of the reference.
        second: From the second half.
        approximation: From the approximation.
    """

    first: Array
    second: Array
    approximation: Array


def common_scalars(reference: Posterior, approximation: Posterior) -> Pair:
    """The scalars of the common sites; see :func:`pyro_vi_lab.checks.discrepancy` for what is refused and left out.

    Raises:
        DataError: No common site; sites whose shapes disagree; values that are not finite; a scalar that is constant in
            the reference and not in the approximation; fewer than four draws per chain.
    """
    names = _common_sites(reference, approximation)
    labels: list[str] = []
    constant: list[str] = []
    parts: list[tuple[Array, Array]] = []
    for name in names:
        x, y = _scalars(reference, name, "reference"), _scalars(approximation, name, "approximation")
        site_labels = [element_name(name, index) for index in np.ndindex(tuple(reference.draws[name].shape[2:]))]
        fixed = _constant(x, reference.draws[name].dtype)
        if fixed.any():
            eps = max(_eps(posterior.draws[name].dtype) for posterior in (reference, approximation))
            _check_same_constant(x[..., fixed], y[..., fixed], eps, [site_labels[i] for i in np.flatnonzero(fixed)])
            constant += [site_labels[i] for i in np.flatnonzero(fixed)]
        labels += [site_labels[i] for i in np.flatnonzero(~fixed)]
        parts.append((x[..., ~fixed], y[..., ~fixed]))
    if not labels:
        raise DataError(f"nothing to compare: every scalar of the common sites ({', '.join(names)}) is a constant")
    return Pair(
        labels=tuple(labels),
        reference=np.concatenate([x for x, _ in parts], -1),
        approximation=np.concatenate([y for _, y in parts], -1),
        constant=tuple(constant),
        missing=tuple(sorted(set(reference.draws) ^ set(approximation.draws))),
    )


def halves(pair: Pair, most: int | None = None) -> Halves:
    """Halves of the reference, and as many draws of the approximation, taken evenly.

    Raises:
        DataError: Fewer than 50 draws in a half of the reference, or of the approximation.
    """
    middle = pair.reference.shape[1] // 2
    width = pair.reference.shape[-1]
    first, second = (
        pair.reference[:, :middle].reshape(-1, width),
        pair.reference[:, middle : 2 * middle].reshape(-1, width),
    )
    approximation = pair.approximation.reshape(-1, width)
    for number, role, least in (
        (2 * len(first), "reference", 2 * MIN_HALF),
        (len(approximation), "approximation", MIN_HALF),
    ):
        if number < least:
            raise DataError(f"too few draws: the {role} has {number}, at least {least} are needed to tell noise apart")
    size = min(len(first), len(approximation), most or len(first))
    return Halves(*(_evenly(draws, size) for draws in (first, second, approximation)))


def left_out_errors(deleted: Array) -> Array:
    """Standard errors by the jackknife, of values that each lack one of G blocks: ``(G, ...)`` to ``(...)``.

    References:
        Efron & Tibshirani 1993, "An introduction to the bootstrap", eq. 11.5; blocks keep the dependence of chains.
    """
    number = len(deleted)
    errors: Array = np.sqrt((number - 1) / number * ((deleted - deleted.mean(0)) ** 2).sum(0))
    return errors


def without_block(draws: Array, block: int) -> Array:
    """Draws ``(n, ...)`` without one of ten blocks of successive ones."""
    edges = np.linspace(0, len(draws), NUM_BLOCKS + 1).astype(int)
    return np.concatenate([draws[: edges[block]], draws[edges[block + 1] :]])


def _evenly(draws: Array, size: int) -> Array:
    return draws[np.linspace(0, len(draws) - 1, size).round().astype(int)]


def _common_sites(reference: Posterior, approximation: Posterior) -> list[str]:
    names = [name for name in reference.draws if name in approximation.draws]
    if not names:
        raise DataError(
            f"the posteriors have no site in common: the reference has {', '.join(reference.draws)}; the "
            f"approximation {', '.join(approximation.draws)}"
        )
    disagreeing = [
        f"{name!r} has {tuple(reference.draws[name].shape[2:])} in the reference and "
        f"{tuple(approximation.draws[name].shape[2:])} in the approximation"
        for name in names
        if reference.draws[name].shape[2:] != approximation.draws[name].shape[2:]
    ]
    if disagreeing:
        raise DataError(f"the shapes of the sites disagree (without chains and draws): {'; '.join(disagreeing)}")
    for posterior, role in ((reference, "reference"), (approximation, "approximation")):
        if posterior.num_draws < MIN_DRAWS:
            raise DataError(
                f"the {role} has {posterior.num_draws} draws per chain; a Monte Carlo error needs at least {MIN_DRAWS}"
            )
    return names


def _scalars(posterior: Posterior, name: str, role: str) -> Array:
    """Draws of one site as ``(C, S, P)`` in float64."""
    draws = posterior.draws[name].numpy(force=True).astype(np.float64)
    bad = ~np.isfinite(draws)
    if bad.any():
        index = tuple(int(i) for i in np.argwhere(bad)[0])
        raise DataError(
            f"{int(bad.sum())} draws of site {name!r} of the {role} are not finite, the first "
            f"({draws[index]}) is of {element_name(name, index[2:])} at chain {index[0]}, draw {index[1]}"
        )
    return draws.reshape(*draws.shape[:2], math.prod(draws.shape[2:]))


def _eps(dtype: torch.dtype) -> float:
    return float(torch.finfo(dtype).eps) if dtype.is_floating_point else 0.0


def _constant(draws: Array, dtype: torch.dtype) -> Array:
    """Which scalars do not move by more than rounding, ``(P,)``."""
    largest: Array = np.abs(draws).max((0, 1))
    return np.asarray(np.ptp(draws, axis=(0, 1)) <= CONSTANT_UNITS * _eps(dtype) * largest)


def _check_same_constant(x: Array, y: Array, eps: float, labels: list[str]) -> None:
    value = x[0, 0]
    distance = np.abs(y - value).max((0, 1))
    differs = distance > CONSTANT_UNITS * eps * np.maximum(np.abs(value), np.abs(y).max((0, 1)))
    if differs.any():
        i = int(differs.argmax())
        raise DataError(
            f"all reference draws of {labels[i]} are {value[i]:g}, while those of the approximation lie "
            f"between {y[..., i].min():g} and {y[..., i].max():g}; a reference that does not move (a stuck "
            "chain?) cannot judge them"
        )
