"""The bound of everyone's fits: by draws that all of a family share, and of our own by fresh ones too."""

from __future__ import annotations

import math
import time
from typing import Any

import numpy as np
import torch
from torch import Tensor

import pyro_vi_lab as vl
from benchmarks.target import WITHIN
from pyro_vi_lab.density import LogDensity
from pyro_vi_lab.families import FAMILIES, Family, LocationScale, Params

COMMON_SEED, COMMON_DRAWS = 2024, 4096
"""Most of the noise of a difference of two members cancels when they are evaluated with the same draws."""
COARSE_DRAWS, COARSE_MARGIN = 256, 2.0
"""Enough to see that a member is nats away; only what comes near is evaluated with all draws."""
JUDGE_SEED, JUDGE_DRAWS = 2025, 2**13
"""Other draws for the comparison of ends: the best of many checkpoints is the best partly by the luck of its draws."""
FRESH_DRAWS, FRESH_SECONDS = 2**15, 3.0
CHUNK_NUMBERS = 2**22
ABOVE_EVIDENCE = 2.0
"""Nats that the draws may put a bound above the log evidence: of 256 of them in 90 dimensions."""


class Bound:
    """The ELBO of members of one family, all by the same draws.

    Args:
        density: The target.
        family: The family.
        num_draws: How many draws.
        seed: Of the draws.
        evidence: The log evidence, which no bound is above: what is, is rounding error of a degenerate member.
    """

    def __init__(
        self,
        density: LogDensity,
        family: Family,
        num_draws: int = COMMON_DRAWS,
        *,
        seed: int = COMMON_SEED,
        evidence: float = math.inf,
    ) -> None:
        self._most = evidence + ABOVE_EVIDENCE
        generator = torch.Generator().manual_seed(seed)
        self._eps = family.draw((num_draws, 1), density.dim, generator=generator, dtype=density.dtype)
        self._density, self._family = density, family

    @torch.no_grad()
    def values(self, params: Params, num_draws: int | None = None) -> Tensor:
        """Log p - log q of each draw, ``(S)``."""
        member = Params(*(value.unsqueeze(0) for value in params))
        rows = max(64, CHUNK_NUMBERS // self._density.work)
        parts = []
        for eps in self._eps[:num_draws].split(rows):
            z = self._family.sample(member, eps)
            parts.append((self._density.log_prob(z) - self._log_q(member, z, eps))[:, 0])
        return torch.cat(parts)

    def _log_q(self, member: Params, z: Tensor, eps: Tensor) -> Tensor:
        if isinstance(self._family, LocationScale):  # of the noise itself: σ may be too singular to solve with
            return self._family.noise.log_prob(eps) - self._family.scale.log_det(member.scale)
        return self._family.log_prob(member, z)

    def __call__(self, params: Params, num_draws: int | None = None) -> float:
        """The bound; minus infinity where it is not finite, or above what there is to bound."""
        if not all(bool(torch.isfinite(value).all()) for value in params):
            return -math.inf
        value = float(self.values(params, num_draws).mean())
        return value if math.isfinite(value) and value < self._most else -math.inf

    def near(self, params: Params, reference: float) -> float:
        """The bound; roughly where it is far below ``reference``."""
        coarse = self(params, COARSE_DRAWS)
        return self(params) if coarse > reference - COARSE_MARGIN else coarse


class Peer:
    """What `benchmarks.tables.race.race` asks of a target: how far below a bound is a Gaussian in our coordinates?

    Args:
        density: The target.
        family: ``"mean_field"`` or ``"full_rank"``.
        reference: The bound that counts as the optimum, by the common draws.
        evidence: The log evidence.
    """

    def __init__(self, density: LogDensity, family: str, reference: float, *, evidence: float = math.inf) -> None:
        self.family, self._reference = family, reference
        self._bound = Bound(density, FAMILIES[family], evidence=evidence)

    def gap(self, loc: np.ndarray, scale: np.ndarray) -> float:
        """Nats below the reference; roughly where it is far."""
        factor = torch.from_numpy(scale)
        if not (np.isfinite(loc).all() and np.isfinite(scale).all()):
            return math.inf
        if factor.dim() == 2:
            # of our order of coordinates, whatever theirs
            factor, failed = torch.linalg.cholesky_ex(factor @ factor.mT)
            if failed:
                return math.inf
        return self._reference - self._bound.near(Params(torch.from_numpy(loc), factor), self._reference)


def common(fit: vl.Fit, num_draws: int = COMMON_DRAWS, seed: int = COMMON_SEED) -> tuple[float, float]:
    """The bound of a fit by the common draws, and its standard error: the draws of :class:`Bound`, for any guide."""
    if fit.params is None:
        return fit.elbo(num_draws, seed=seed)
    values = Bound(fit.problem.density(), fit.family, num_draws, seed=seed).values(
        Params(*(value[0] for value in fit.params))
    )
    return float(values.mean()), float(values.std() / math.sqrt(len(values)))


def judged(fit: vl.Fit) -> float:
    """The bound of a fit by draws that chose none of the members that are compared."""
    return common(fit, JUDGE_DRAWS, JUDGE_SEED)[0]


def fresh(fit: vl.Fit, num_draws: int = FRESH_DRAWS) -> tuple[float, float]:
    """The bound of a fit by many draws of its own, some at a time, and its standard error."""
    rows = min(num_draws, max(256, CHUNK_NUMBERS // fit.problem.density().work))
    means, variances, began = [], [], time.perf_counter()
    for chunk in range(max(1, num_draws // rows)):
        mean, error = fit.elbo(rows, seed=chunk)
        means.append(mean)
        variances.append(error**2)
        if time.perf_counter() - began > FRESH_SECONDS:
            break
    # of the mean of equal parts; the spread between them is in each one's own
    return float(np.mean(means)), math.sqrt(float(np.mean(variances)) / len(means))


def arrival(path: list[Any], reference: float, within: float = WITHIN) -> list[Any] | None:
    """The first checkpoint ``[steps, seconds, bound]`` near the reference whose next one is too; ``None`` if none is."""
    near = [point[2] is not None and reference - point[2] <= within for point in path]
    return next((path[i] for i in range(len(path)) if all(near[i : i + 2])), None)


def finite(value: float | None) -> float | None:
    """A number that JSON has a word for."""
    return None if value is None or not math.isfinite(value) else value
