"""Draws of the noise whose low moments are exact."""

from __future__ import annotations

import torch
from torch import Tensor

from pyro_vi_lab.families.noise import Noise

ROOM = 1.5
"""Pairs of particles per dimension from which the second moment is matched; with fewer the matched draws would be
close to
a rotation of fixed points."""


def antithetic(
    noise: Noise,
    num_particles: int,
    batch: tuple[int, ...],
    dim: int,
    *,
    generator: torch.Generator,
    dtype: torch.dtype,
) -> Tensor:
    r"""Pairs ±ε, whitened where there are enough of them so that their second moment is exactly the identity.

    With first, second and third moments exact, the estimate of a natural gradient has no variance at all where the
    target
    is Gaussian, wherever q is: one full natural step is then exact.

    Shape:
        result ``(K, *R, D)`` with K even.
    """
    half = noise.sample((num_particles // 2, *batch, dim), generator=generator, dtype=dtype)
    if num_particles // 2 >= ROOM * dim + 1:
        second_moment = torch.einsum("k...d,k...e->...de", half, half) / len(half)
        factor = torch.linalg.cholesky(second_moment)
        half = torch.linalg.solve_triangular(factor, half.movedim(0, -1), upper=False).movedim(-1, 0)
    return torch.cat([half, -half])
