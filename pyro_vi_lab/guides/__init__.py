"""Guides: families as Pyro autoguides, usable in plain ``pyro.infer.SVI``."""

from pyro_vi_lab.guides.block import BlockNormal
from pyro_vi_lab.guides.family_guide import FamilyGuide
from pyro_vi_lab.guides.full_rank import FullRankNormal, FullRankStudentT
from pyro_vi_lab.guides.initialization import init_to_origin
from pyro_vi_lab.guides.low_rank import LowRankNormal
from pyro_vi_lab.guides.mean_field import MeanFieldLaplace, MeanFieldNormal, MeanFieldStudentT
from pyro_vi_lab.guides.mixture import Mixture

GUIDES: dict[str, type[FamilyGuide]] = {
    "mean_field": MeanFieldNormal,
    "full_rank": FullRankNormal,
    "block": BlockNormal,
    "low_rank": LowRankNormal,
    "mean_field_student_t": MeanFieldStudentT,
    "full_rank_student_t": FullRankStudentT,
    "mean_field_laplace": MeanFieldLaplace,
    "mixture": Mixture,
}
"""Guides by the name that :func:`pyro_vi_lab.fit` and the command line take."""

__all__ = [
    "GUIDES",
    "BlockNormal",
    "FamilyGuide",
    "FullRankNormal",
    "FullRankStudentT",
    "LowRankNormal",
    "MeanFieldLaplace",
    "MeanFieldNormal",
    "MeanFieldStudentT",
    "Mixture",
    "init_to_origin",
]
