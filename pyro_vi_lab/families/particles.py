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
    """Pairs ±ε of independent draws, :func:`paired`.

    Shape:
        result ``(K, *R, D)`` with K even.
    """
    return paired(noise.sample((num_particles // 2, *batch, dim), generator=generator, dtype=dtype))


def matches_moments(pairs: int, dim: int) -> bool:
    """Whether there are enough pairs of draws for exact second moments."""
    return pairs >= ROOM * dim + 1


def paired(half: Tensor) -> Tensor:
    r"""Pairs ±ε, whitened where there are enough of them so that their second moment is exactly the identity.

    With first, second and third moments exact, the estimate of a natural gradient has no variance at all where the
    target is Gaussian, wherever q is: one full natural step is then exact.

    Shape:
        half ``(K / 2, *R, D)``, result ``(K, *R, D)``.
    """
    pairs, dim = half.shape[0], half.shape[-1]
    if matches_moments(pairs, dim):
        columns = half.movedim(0, -1)
        factor = torch.linalg.cholesky(columns @ columns.mT / pairs)
        identity = torch.eye(dim, dtype=half.dtype, device=half.device)
        inverse = torch.linalg.solve_triangular(factor, identity.expand(factor.shape), upper=False)
        half = (inverse @ columns).movedim(-1, 0)
    return torch.cat([half, -half])
