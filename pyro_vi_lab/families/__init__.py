"""Distributions over z given by θ = μ + σ·ε: a location, a scale operator and a standard noise. Pure torch, no Pyro."""

from pyro_vi_lab.families.family import Family, Params, Step, Tangent
from pyro_vi_lab.families.noise import Noise, Normal
from pyro_vi_lab.families.scale import Dense, Diagonal, Scale

FAMILIES: dict[str, Family] = {
    "mean_field": Family(Diagonal(), Normal()),
    "full_rank": Family(Dense(), Normal()),
}
"""Families by the name of their guide."""

__all__ = ["FAMILIES", "Dense", "Diagonal", "Family", "Noise", "Normal", "Params", "Scale", "Step", "Tangent"]
