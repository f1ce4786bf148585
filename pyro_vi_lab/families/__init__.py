"""Distributions over z given by θ = μ + σ·ε: a location, a scale operator and a standard noise. Pure torch, no Pyro."""

from pyro_vi_lab.families.block_diagonal import BlockDiagonal
from pyro_vi_lab.families.family import MAX_DENSE, Estimate, Family, Params, Step, Tangent
from pyro_vi_lab.families.location_scale import LocationScale
from pyro_vi_lab.families.low_rank import LowRank
from pyro_vi_lab.families.mixture import Mixture
from pyro_vi_lab.families.noise import Laplace, MultivariateStudentT, Noise, Normal, StudentT
from pyro_vi_lab.families.scale import Dense, Diagonal, Scale

FAMILIES: dict[str, Family] = {
    "mean_field": LocationScale(Diagonal(), Normal()),
    "full_rank": LocationScale(Dense(), Normal()),
}
"""The normal families by the name of their guide."""

__all__ = [
    "FAMILIES",
    "MAX_DENSE",
    "BlockDiagonal",
    "Dense",
    "Diagonal",
    "Estimate",
    "Family",
    "Laplace",
    "LocationScale",
    "LowRank",
    "Mixture",
    "MultivariateStudentT",
    "Noise",
    "Normal",
    "Params",
    "Scale",
    "Step",
    "StudentT",
    "Tangent",
]
