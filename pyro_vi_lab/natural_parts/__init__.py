"""Parts of guides that take a joint natural step, and which guide has which."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from pyro_vi_lab.guides import GUIDES, Amortized, Conjugate, FamilyGuide, Flow
from pyro_vi_lab.natural_parts.conjugate_part import ConjugatePart
from pyro_vi_lab.natural_parts.family_part import PYRO_GUIDES, FamilyPart
from pyro_vi_lab.natural_parts.kronecker_part import KroneckerPart
from pyro_vi_lab.natural_parts.member import GuideMember
from pyro_vi_lab.natural_parts.part import NaturalPart, Settings
from pyro_vi_lab.natural_parts.scores import EncoderScores, FlowScores


def _over_family(guide: Any) -> NaturalPart:
    return FamilyPart([GuideMember(guide)])


def _of_pyro(guide: Any) -> NaturalPart:
    return FamilyPart(PYRO_GUIDES[type(guide)](guide))


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


def handles(guide: nn.Module) -> bool:
    """Whether a guide takes natural steps."""
    return _maker(guide) is not None


def part_of(guide: nn.Module) -> NaturalPart | None:
    """The part of a guide; ``None`` where it takes no natural step, or has not been run yet."""
    maker = _maker(guide)
    if maker is None or getattr(guide, "prototype_trace", None) is None:
        return None
    return maker(guide)


def names() -> list[str]:
    """Names of all guides that take natural steps."""
    return [kind.__name__ for kind in dict.fromkeys((*GUIDES.values(), *PARTS)) if kind is not FamilyGuide]


def _maker(guide: nn.Module) -> Callable[[Any], NaturalPart] | None:
    exact = PARTS.get(type(guide))
    if exact is not None:
        return exact
    return next((make for kind, make in PARTS.items() if kind not in PYRO_GUIDES and isinstance(guide, kind)), None)


__all__ = ["PARTS", "NaturalPart", "Settings", "handles", "names", "part_of"]
