"""The posteriors of the race: our Pyro models of ``tests/posteriordb.py``, and their data as arrays for everyone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np

import pyro_vi_lab as vl
from tests import posteriordb

NAMES = (
    "eight_schools-eight_schools_noncentered",
    "wells_data-wells_dae_inter_model",
    "dogs-dogs_2020",
    "arK-arK",
    "sblrc-blr",
    "kidiq-kidscore_interaction",
    "GLM_Poisson_Data-GLM_Poisson_model",
    "radon_mn-radon_hierarchical_intercept_noncentered",
    "earnings-logearn_interaction",
    "mesquite-logmesquite",
    "GLMM_Poisson_data-GLMM_Poisson_model",
    "eight_schools-eight_schools_centered",
)
"""Regressions, generalized and hierarchical models of 3 to 90 dimensions; kidscore and logearn have covariates far from
zero and not scaled."""


@dataclass(frozen=True, eq=False)
class Entry:
    """One posterior of the race."""

    name: str

    @cached_property
    def loaded(self) -> posteriordb.Loaded:
        return posteriordb.load(self.name)

    @cached_property
    def problem(self) -> vl.Problem:
        return vl.Problem(self.loaded.case.model, **self.loaded.data)

    @property
    def model(self) -> str:
        """Name of the model, the same in every library."""
        return self.loaded.case.model.__name__

    @property
    def arrays(self) -> Mapping[str, np.ndarray]:
        return {key: value.numpy() for key, value in self.loaded.data.items()}

    @property
    def task(self) -> dict[str, object]:
        """What a contender is told of the problem."""
        return {"problem": self.name, "model": self.model, "data": dict(self.arrays)}

    @property
    def short(self) -> str:
        """Name in tables."""
        return SHORT[self.name]

    @property
    def dim(self) -> int:
        return self.problem.density().dim

    @property
    def order(self) -> list[tuple[str, int]]:
        """Sites and sizes in the order of our coordinates."""
        return [(key, site.unconstrained_shape.numel()) for key, site in self.problem.density().sites.items()]

    def permutation(self, theirs: list[tuple[str, int]]) -> np.ndarray:
        """Positions of our coordinates among those of a contender that orders the sites otherwise."""
        starts = dict(zip((name for name, _ in theirs), np.cumsum([0, *(size for _, size in theirs)]), strict=False))
        if dict(theirs) != dict(self.order):
            raise ValueError(f"{self.name}: a contender has the sites {theirs}, we have {self.order}")
        return np.concatenate([starts[name] + np.arange(size) for name, size in self.order])


SHORT = {
    "eight_schools-eight_schools_noncentered": "eight schools, non-centered",
    "eight_schools-eight_schools_centered": "eight schools, centered",
    "wells_data-wells_dae_inter_model": "wells",
    "dogs-dogs_2020": "dogs",
    "arK-arK": "arK",
    "sblrc-blr": "sblrc",
    "mesquite-logmesquite": "logmesquite",
    "GLM_Poisson_Data-GLM_Poisson_model": "GLM Poisson",
    "GLMM_Poisson_data-GLMM_Poisson_model": "GLMM Poisson",
    "radon_mn-radon_hierarchical_intercept_noncentered": "radon, non-centered",
    "earnings-logearn_interaction": "logearn interaction",
    "kidiq-kidscore_interaction": "kidscore interaction",
}
