"""What is minimised, as Pyro objectives."""

from pyro_vi_lab.objectives.elbo import ELBO
from pyro_vi_lab.objectives.importance import IWAE, RenyiELBO
from pyro_vi_lab.objectives.per_site import PerSiteELBO

__all__ = ["ELBO", "IWAE", "PerSiteELBO", "RenyiELBO"]
