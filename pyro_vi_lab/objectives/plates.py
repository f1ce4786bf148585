"""Which plates a bound factorizes over, and sums over the others."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor

PARTICLES = "num_particles_vectorized"
"""Pyro's name of the plate of vectorized particles."""

Frames = frozenset[Any]


def frames_of(site: Any) -> Frames:
    """Vectorized plates around a site, that of the particles among them."""
    return frozenset(frame for frame in site["cond_indep_stack"] if frame.vectorized)


def sum_to(value: Tensor, frames: Frames) -> Tensor:
    """Sum over all dimensions but those of ``frames``; no ones to the left.

    Shape:
        value: ``(..., *batch)``, result as many dimensions as the outermost plate needs, those in between of size 1.
    """
    kept = {frame.dim for frame in frames}
    summed = [dim for dim in range(-value.dim(), 0) if dim not in kept and value.shape[dim] != 1]
    if summed:
        value = value.sum(summed, keepdim=True)
    num_dims = -min(kept, default=0)
    while value.dim() > num_dims and value.shape[0] == 1:
        value = value.squeeze(0)
    return value


def particle_frame(sites: Iterable[Any]) -> Any | None:
    """The plate of vectorized particles, ``None`` if there is none."""
    for site in sites:
        for frame in site["cond_indep_stack"]:
            if frame.name == PARTICLES:
                return frame
    return None


def common_frames(sites: Sequence[Any]) -> Frames:
    """Plates that all the sites lie in, without that of the particles."""
    stacks = [frames_of(site) for site in sites]
    shared = frozenset.intersection(*stacks) if stacks else frozenset()
    return frozenset(frame for frame in shared if frame.name != PARTICLES)


def is_subsampled(frame: Any) -> bool:
    """Whether a call sees a part of the rows of a plate."""
    return frame.full_size is not None and frame.full_size != frame.size


def expansion(frames: Frames) -> float:
    """Factor N/B from the rows seen to all rows, over all of the plates."""
    return math.prod(frame.full_size / frame.size for frame in frames if is_subsampled(frame))
