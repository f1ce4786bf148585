"""Parts of guides that take a joint natural step, and which guide has which."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pyro.infer.autoguide import AutoDiagonalNormal, AutoNormal
from torch import nn

from pyro_vi_lab.guides import FAMILY_GUIDES, Amortized, Conjugate, FamilyGuide, Flow, MeanFieldNormal
from pyro_vi_lab.natural_parts.conjugate_part import ConjugatePart
from pyro_vi_lab.natural_parts.family_part import PYRO_GUIDES, FamilyPart
from pyro_vi_lab.natural_parts.kronecker_part import KroneckerPart
from pyro_vi_lab.natural_parts.member import GuideMember
from pyro_vi_lab.natural_parts.online_newton_part import OnlineNewtonPart
from pyro_vi_lab.natural_parts.part import NaturalPart, Settings
from pyro_vi_lab.natural_parts.scores import EncoderScores, FlowScores


def _over_family(guide: Any) -> NaturalPart:
    return FamilyPart([GuideMember(guide)])


def _of_pyro(guide: Any) -> NaturalPart:
    return FamilyPart(PYRO_GUIDES[type(guide)](guide))


def _newton_over_family(guide: Any) -> NaturalPart:
    return OnlineNewtonPart([GuideMember(guide)])


def _newton_of_pyro(guide: Any) -> NaturalPart:
    return OnlineNewtonPart(PYRO_GUIDES[type(guide)](guide))


def _of_encoder(guide: Any) -> NaturalPart:
    return KroneckerPart(EncoderScores(guide))


def _of_flow(guide: Any) -> NaturalPart:
    return KroneckerPart(FlowScores(guide))


PARTS: dict[type, Callable[[Any], NaturalPart]] = {
    FamilyGuide: _over_family,
    Amortized: _of_encoder,
    Flow: _of_flow,
    Conjugate: ConjugatePart,
    **dict.fromkeys(PYRO_GUIDES, _of_pyro),
}
"""How to make the part of each kind of guide; ours take their subclasses in, Pyro's do not."""


ONLINE_NEWTON_PARTS: dict[type, Callable[[Any], NaturalPart]] = {
    MeanFieldNormal: _newton_over_family,
    AutoNormal: _newton_of_pyro,
    AutoDiagonalNormal: _newton_of_pyro,
}
"""The same for the online Newton form: the guides of independent normals."""


def handles(guide: nn.Module, *, online_newton: bool = False) -> bool:
    """Whether a guide takes natural steps, or those of the online Newton form."""
    return _maker(guide, _parts(online_newton)) is not None


def part_of(guide: nn.Module, *, online_newton: bool = False) -> NaturalPart | None:
    """The part of a guide; ``None`` where it takes no natural step, or has not been run yet."""
    maker = _maker(guide, _parts(online_newton))
    if maker is None or getattr(guide, "prototype_trace", None) is None:
        return None
    return maker(guide)


def names(*, online_newton: bool = False) -> list[str]:
    """Names of all guides that take natural steps, or those of the online Newton form."""
    kinds: tuple[type, ...] = tuple(ONLINE_NEWTON_PARTS) if online_newton else (*FAMILY_GUIDES.values(), *PARTS)
    return [kind.__name__ for kind in kinds if kind is not FamilyGuide]


def _parts(online_newton: bool) -> dict[type, Callable[[Any], NaturalPart]]:
    return ONLINE_NEWTON_PARTS if online_newton else PARTS


def _maker(guide: nn.Module, parts: dict[type, Callable[[Any], NaturalPart]]) -> Callable[[Any], NaturalPart] | None:
    exact = parts.get(type(guide))
    if exact is not None:
        return exact
    return next((make for kind, make in parts.items() if kind not in PYRO_GUIDES and isinstance(guide, kind)), None)


__all__ = ["ONLINE_NEWTON_PARTS", "PARTS", "NaturalPart", "Settings", "handles", "names", "part_of"]
