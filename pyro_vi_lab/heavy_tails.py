"""Where the tails of a guide are too heavy for the density that it approximates.

A Student-t variable has no moments of order ν and above. Where the log density falls faster than that, as exponentially
in the logarithm of a scale, the bound of such a guide is minus infinity, which no sample shows.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pyro_vi_lab.density import LogDensity
from pyro_vi_lab.families import Family, Params

RARE, MAX_RARE_SHARE = 1e-6, 0.1
"""Draws so rare may decide on no more nats of a bound: no fit sees enough of them."""
COORDINATES = 256
"""Coordinates along which points are evaluated together."""
FAR = (1e6, 1e7)
"""Standard deviations at which the growth of a tail is measured."""
SLACK = 0.5
"""Orders below ν that count as too fast, as powers are measured at a finite distance."""


@torch.no_grad()
def rare_shares(density: LogDensity, family: Family, params: Params) -> list[float]:
    """Nats of the bound of each member that hang on draws rarer than one in a million, along the worst coordinate.

    A coordinate with heavy tails reaches a point that far out once in ``1 / RARE`` draws. Where the log density falls
    exponentially, what it is there outweighs all other draws.
    """
    far, here = family.noise_quantile(1 - RARE / 2), density.log_prob(params.loc)
    falls = [
        here - density.log_prob(family.sample(params, torch.cat([eps, -eps]).mul_(far)))
        for eps in _along_coordinates(params.loc)
    ]
    return (RARE * torch.nan_to_num(torch.cat(falls), nan=math.inf).amax(0)).tolist()


@torch.no_grad()
def unbounded_coordinate(density: LogDensity, loc: Tensor, sd: Tensor, num_moments: float) -> int | None:
    """A coordinate along which the log density falls too fast for a bound under heavy tails to be finite.

    Args:
        density: The target.
        loc: A point in the middle, ``(D)``.
        sd: Scales of the coordinates, ``(D)``.
        num_moments: Order of the moments from which on they are infinite.
    """
    here = density.log_prob(loc)
    for number, eps in enumerate(_along_coordinates(loc.unsqueeze(0))):
        steps = sd * torch.cat([eps, -eps], 1)
        near, far = (here - density.log_prob(loc + distance * steps) for distance in FAR)
        power = (far / near).log() / math.log(FAR[1] / FAR[0])
        fast = ~(near.isfinite() & far.isfinite()) | ((near > 0) & (power > num_moments - SLACK))
        found = fast.any(1).nonzero()
        if len(found):
            return number * COORDINATES + int(found[0])
    return None


def _along_coordinates(loc: Tensor) -> list[Tensor]:
    """Unit vectors for each of R members, ``(C, R, D)``, some coordinates at a time."""
    num_fits, dim = loc.shape
    rows = torch.eye(dim, dtype=loc.dtype, device=loc.device)
    return [some.unsqueeze(1).repeat(1, num_fits, 1) for some in rows.split(COORDINATES)]
