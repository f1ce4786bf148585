"""What ``trust`` says about the candidates, first of all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pyro_vi_lab.compare import Comparison
    from pyro_vi_lab.verdict import Verdict

LOOK = {"trust": "good", "reweight": "fair", "refine": "poor", "sample": "poor"}
"""Decision to the class of its badge."""


def lead(verdicts: Mapping[str, Verdict]) -> list[str]:
    """What to do, in a sentence or two; empty without verdicts.

    Args:
        verdicts: Candidate to its verdict.
    """
    by = {decision: [name for name, one in verdicts.items() if one.decision == decision] for decision in LOOK}
    if not verdicts:
        return []
    if by["trust"]:
        return [
            f"{_and(by['trust'])} may be trusted: means and standard deviations are right to within the tolerances."
        ]
    if by["reweight"]:
        return [
            f"No fit may be trusted as it is. Draws of {_and(by['reweight'])} may be used after reweighting: the "
            "verdict has them."
        ]
    suggestions = dict.fromkeys(text for name in by["refine"] for text in verdicts[name].suggestions)
    if suggestions:
        return [f"No fit may be trusted. What to try next: {', '.join(suggestions)}."]
    return ["No fit may be trusted. Use NUTS."]


def card(verdict: Verdict | None, notes: Sequence[str] = ()) -> dict[str, Any] | None:
    """Badge, reasons and suggestions of one candidate; first what could not be computed."""
    if verdict is None:
        return None
    return {
        "decision": verdict.decision,
        "look": LOOK[verdict.decision],
        "reasons": [*notes, *verdict.reasons],
        "suggestions": list(verdict.suggestions),
        "budget": verdict.budget,
        "seconds": verdict.seconds,
    }


def by_parameter(comparison: Comparison) -> dict[tuple[str, str], str]:
    """Candidate and parameter to ``"right"``, ``"wrong"`` or ``"unclear"``."""
    return {
        (name, str(row["parameter"])): str(row["verdict"])
        for name, verdict in comparison.verdicts.items()
        for row in verdict.parameters.to_dict("records")
    }


def _and(names: list[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
