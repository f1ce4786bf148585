"""When has a fit arrived? One evaluator of the ELBO for all contenders, and the best known optimum."""

from __future__ import annotations

import math
from functools import cached_property
from typing import Literal

import numpy as np
import torch
from scipy.stats import qmc

import pyro_vi_lab as vl
from benchmarks.problems import Entry

FamilyName = Literal["mean_field", "full_rank"]

NUM_DRAWS = 4096
COARSE_DRAWS = 256
"""Enough to see that a fit is nats away; only what comes near is evaluated with all draws."""
COARSE_MARGIN = 2.0
CHUNK_NUMBERS = 2**22
WITHIN = 0.1
"""Nats below the optimum that count as arrived."""
LONG_PARTICLES = 1024
BASELINE_DRAWS = 2**16


class Target:
    """The optimum of one family for one posterior, and the distance of a point from it.

    The optimum is the better of a long run of ours and the near-optimal Gaussian that comes with the posterior. All points
    are evaluated with one set of scrambled Sobol draws, and so is the long run: most of the noise of a difference cancels.

    Args:
        entry: The posterior.
        family: Name of the family.
    """

    def __init__(self, entry: Entry, family: FamilyName) -> None:
        self.entry, self.family = entry, family
        self._density = entry.problem.density()
        self._eps = torch.from_numpy(_normal_draws(entry.dim, NUM_DRAWS))

    def elbo(self, loc: np.ndarray, scale: np.ndarray, num_draws: int = NUM_DRAWS) -> float:
        """ELBO of a Gaussian in our coordinates; ``scale`` a factor of the covariance or standard deviations."""
        return self._elbo(torch.from_numpy(loc), torch.from_numpy(scale), self._eps[:num_draws])

    def _elbo(self, loc: torch.Tensor, scale: torch.Tensor, eps: torch.Tensor) -> float:
        dim = len(loc)
        if not bool(torch.isfinite(loc).all() & torch.isfinite(scale).all()):
            return -math.inf
        if scale.dim() == 1:
            log_det, shifts = scale.log().sum(), eps * scale
        else:
            factor = torch.linalg.cholesky(scale @ scale.mT)  # of our order of coordinates, whatever theirs
            log_det, shifts = factor.diagonal().log().sum(), eps @ factor.mT
        rows = max(64, CHUNK_NUMBERS // self._density.work)
        value = torch.cat([self._density.log_prob(part) for part in (loc + shifts).split(rows)]).mean()
        return float(value + log_det) + 0.5 * dim * math.log(2 * math.pi * math.e)

    @cached_property
    def optimum(self) -> float:
        """ELBO, by the common draws, of the best known member of the family."""
        long = vl.fit(self.entry.problem, self.family, num_particles=LONG_PARTICLES, seed=12345, progress=False)
        loc, scale = long.params.loc[0], long.params.scale[0]
        own = self._elbo(loc, scale, self._eps)
        # the baseline is known by its value alone: the long run is brought on its scale by many draws
        exact = self._elbo(loc, scale, torch.from_numpy(_normal_draws(self.entry.dim, BASELINE_DRAWS)))
        return own + max(0.0, self.entry.loaded.baseline(self.family) - exact)

    def gap(self, loc: np.ndarray, scale: np.ndarray) -> float:
        """Nats below the optimum; far from it only roughly."""
        coarse = self.optimum - self.elbo(loc, scale, COARSE_DRAWS)
        if not coarse < COARSE_MARGIN:  # NaN too
            return coarse if coarse == coarse else math.inf
        return self.optimum - self.elbo(loc, scale)


def _normal_draws(dim: int, num_draws: int) -> np.ndarray:
    return np.asarray(qmc.MultivariateNormalQMC(np.zeros(dim), rng=np.random.default_rng(2024)).random(num_draws))
