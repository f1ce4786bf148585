"""Exponential families in natural parameters: the conjugate families. Pure torch, no Pyro."""

from pyro_vi_lab.families.exponential.categorical import Bernoulli, Categorical
from pyro_vi_lab.families.exponential.dirichlet import Beta, Dirichlet
from pyro_vi_lab.families.exponential.family import Conditional, ExponentialFamily, Values
from pyro_vi_lab.families.exponential.gamma import Gamma
from pyro_vi_lab.families.exponential.inverse_gamma import InverseGamma
from pyro_vi_lab.families.exponential.normal import MultivariateNormal, Normal
from pyro_vi_lab.families.exponential.normal_gamma import NormalGamma
from pyro_vi_lab.families.exponential.normal_wishart import NormalWishart
from pyro_vi_lab.families.exponential.signs import sign_design
from pyro_vi_lab.families.exponential.wishart import Wishart

__all__ = [
    "Bernoulli",
    "Beta",
    "Categorical",
    "Conditional",
    "Dirichlet",
    "ExponentialFamily",
    "Gamma",
    "InverseGamma",
    "MultivariateNormal",
    "Normal",
    "NormalGamma",
    "NormalWishart",
    "Values",
    "Wishart",
    "sign_design",
]
