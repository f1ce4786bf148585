"""Guides: families as Pyro autoguides, usable in plain ``pyro.infer.SVI``."""

from pyro_vi_lab.guides.family_guide import FamilyGuide
from pyro_vi_lab.guides.full_rank import FullRankNormal
from pyro_vi_lab.guides.initialization import init_to_origin
from pyro_vi_lab.guides.mean_field import MeanFieldNormal

GUIDES: dict[str, type[FamilyGuide]] = {
    "mean_field": MeanFieldNormal,
    "full_rank": FullRankNormal,
}
"""Guides by the name that :func:`pyro_vi_lab.fit` and the command line take."""

__all__ = ["GUIDES", "FamilyGuide", "FullRankNormal", "MeanFieldNormal", "init_to_origin"]
