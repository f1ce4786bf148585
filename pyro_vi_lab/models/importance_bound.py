"""The log likelihood of rows with a latent vector each, by importance sampling from an encoder."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_vi_lab.errors import ArgumentError

MAX_NUMBERS = 2**21
"""Numbers of the data times particles that are held at a time (16 MiB in float64); a network needs some times that."""


@dataclass(frozen=True, eq=False)
class RowScores:
    """A score of every row in nats, and their mean.

    Args:
        rows: ``(N,)``.
        num_particles: K, with which each was estimated.
    """

    rows: Tensor
    num_particles: int

    @property
    def mean(self) -> float:
        """Mean over the rows, in nats."""
        return float(self.rows.mean())

    @property
    def standard_error(self) -> float:
        """Standard error of the mean as that of the population that the rows are a sample of.

        Raises:
            ArgumentError: There is one row, which does not tell.
        """
        if len(self.rows) < 2:
            raise ArgumentError("the standard error needs at least two rows")
        return float(self.rows.std() / math.sqrt(len(self.rows)))

    def __repr__(self) -> str:
        error = f" ± {self.standard_error:.3g}" if len(self.rows) > 1 else ""
        return f"RowScores({self.mean:.5g}{error} nats a row; {len(self.rows)} rows, {self.num_particles} particles)"


def importance_bound(
    rows: Tensor,
    encode: Callable[[Tensor], tuple[Tensor, Tensor]],
    log_joint: Callable[[Tensor, Tensor], Tensor],
    *,
    num_particles: int,
    seed: int = 0,
    max_numbers: int = MAX_NUMBERS,
) -> RowScores:
    r"""Bound on the log likelihood of every row that rises to it with the number of draws.

    .. math:: \log p(x) \ge E \Big[\log \frac1K \sum_k \frac{p(x, z_k)}{q(z_k \mid x)}\Big],
        \qquad z_k \sim q(\cdot \mid x) = \mathrm{Normal}(\mu(x), \operatorname{diag} s(x)^2)

    Rows and draws are taken in chunks, without gradients.

    Args:
        rows: The data.
        encode: From rows to location and scale of q.
        log_joint: From rows ``(B, ...)`` and draws ``(k, B, L)`` to log p(x, z), ``(k, B)``.
        num_particles: K.
        seed: Seed of the draws.
        max_numbers: Most numbers of the data times draws in a chunk.

    Shape:
        rows ``(N, ...)``; scores ``(N,)``.

    Raises:
        ArgumentError: ``num_particles`` is no positive whole number.

    References:
        Burda, Grosse & Salakhutdinov 2016, "Importance weighted autoencoders", ICLR, eq. 8 and Theorem 1.

    Example:
        >>> from torch.distributions import Normal
        >>> x = torch.tensor([[0.5], [-1.0], [2.0]])  # x ~ Normal(z, 1), z ~ Normal(0, 1); q is the posterior
        >>> found = importance_bound(
        ...     x,
        ...     lambda x: (x / 2, torch.full_like(x, 0.5**0.5)),
        ...     lambda x, z: (Normal(0.0, 1.0).log_prob(z) + Normal(z, 1.0).log_prob(x)).sum(-1),
        ...     num_particles=3,
        ... )
        >>> bool((found.rows - Normal(0.0, 2**0.5).log_prob(x[:, 0])).abs().max() < 1e-6)
        True
    """
    if isinstance(num_particles, bool) or not isinstance(num_particles, int) or num_particles < 1:
        raise ArgumentError(f"num_particles must be a positive whole number, got {num_particles!r}")
    generator = torch.Generator().manual_seed(seed)
    per_row = max(1, math.prod(rows.shape[1:]))
    found = []
    with torch.no_grad():
        for block in rows.split(max(1, max_numbers // (per_row * min(num_particles, 64)))):
            loc, scale = encode(block)
            q = torch.distributions.Normal(loc, scale)
            total = loc.new_full((len(block),), -math.inf)
            for k in _parts(num_particles, max(1, max_numbers // (per_row * len(block)))):
                eps = torch.randn(k, *loc.shape, generator=generator, dtype=loc.dtype).to(loc.device)
                z = loc + scale * eps
                log_w = log_joint(block, z) - q.log_prob(z).sum(-1)
                total = torch.logaddexp(total, log_w.logsumexp(0))
            found.append(total - math.log(num_particles))
    return RowScores(torch.cat(found), num_particles)


def _parts(number: int, size: int) -> Iterator[int]:
    for start in range(0, number, size):
        yield min(size, number - start)
