"""Guides: families as Pyro autoguides, usable in plain ``pyro.infer.SVI``."""

from typing import Any

from pyro.infer.autoguide import AutoGuide

from pyro_vi_lab import plugins
from pyro_vi_lab.guides.amortized import Amortized
from pyro_vi_lab.guides.block import BlockNormal
from pyro_vi_lab.guides.conjugate import Conjugate, init_to_prior
from pyro_vi_lab.guides.continuous_guide import ContinuousGuide
from pyro_vi_lab.guides.family_guide import FamilyGuide
from pyro_vi_lab.guides.flow import FLOWS, Flow
from pyro_vi_lab.guides.full_rank import FullRankNormal, FullRankStudentT
from pyro_vi_lab.guides.initialization import init_to_origin
from pyro_vi_lab.guides.laplace import LaplaceApproximation
from pyro_vi_lab.guides.low_rank import LowRankNormal
from pyro_vi_lab.guides.mean_field import MeanFieldLaplace, MeanFieldNormal, MeanFieldStudentT
from pyro_vi_lab.guides.mixture import Mixture
from pyro_vi_lab.guides.network import NetworkNormal
from pyro_vi_lab.guides.point import MAP, MLE, PointGuide
from pyro_vi_lab.guides.unconstrained_guide import UnconstrainedGuide

FAMILY_GUIDES: dict[str, type[FamilyGuide]] = {
    "mean_field": MeanFieldNormal,
    "full_rank": FullRankNormal,
    "block": BlockNormal,
    "low_rank": LowRankNormal,
    "mean_field_student_t": MeanFieldStudentT,
    "full_rank_student_t": FullRankStudentT,
    "mean_field_laplace": MeanFieldLaplace,
    "mixture": Mixture,
}
"""Guides over a family of distributions, by name."""

POINT_GUIDES: dict[str, type[PointGuide]] = {"laplace": LaplaceApproximation, "map": MAP, "mle": MLE}
"""Guides that are fitted by looking for a mode, by name."""

GUIDES: dict[str, type[AutoGuide]] = {**FAMILY_GUIDES, **POINT_GUIDES, "flow": Flow, "conjugate": Conjugate}
"""Guides by the name that :func:`pyro_vi_lab.fit` and the command line take."""


def guide_named(name: str) -> Any:
    """The guide that :func:`pyro_vi_lab.fit` takes for ``name``.

    Args:
        name: A name of ``GUIDES``, or one that an installed package offers under the entry points
            ``pyro_vi_lab.guides``: a guide class, or any Pyro guide.

    Raises:
        ArgumentError: There is no such guide; the message suggests the nearest.
        PluginError: The package that offers it is broken.

    Example:
        >>> guide_named("full_rank").__name__
        'FullRankNormal'
    """
    if name in GUIDES:
        return GUIDES[name]
    found = plugins.load("guide", name, GUIDES)
    if not callable(found):
        raise plugins.refused("guide", name, f"it is {type(found).__name__}, not a guide class or a Pyro guide")
    return found


__all__ = [
    "FAMILY_GUIDES",
    "FLOWS",
    "GUIDES",
    "MAP",
    "MLE",
    "POINT_GUIDES",
    "Amortized",
    "BlockNormal",
    "Conjugate",
    "ContinuousGuide",
    "FamilyGuide",
    "Flow",
    "FullRankNormal",
    "FullRankStudentT",
    "LaplaceApproximation",
    "LowRankNormal",
    "MeanFieldLaplace",
    "MeanFieldNormal",
    "MeanFieldStudentT",
    "Mixture",
    "NetworkNormal",
    "PointGuide",
    "UnconstrainedGuide",
    "guide_named",
    "init_to_origin",
    "init_to_prior",
]
