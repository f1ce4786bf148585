from __future__ import annotations

import pandas
import pytest

from pyro_vi_lab.report.verdicts import card, lead
from pyro_vi_lab.verdict import DECISIONS, Decision, Verdict


def verdict(decision: Decision, *suggestions: str) -> Verdict:
    return Verdict(
        decision=decision,
        reasons=[f"because of {decision}"],
        suggestions=suggestions,
        parameters=pandas.DataFrame({"parameter": ["mu"], "verdict": ["right"]}),
        posterior=None,
        checks={},
        problem="problem",
        method="guide",
        budget="normal",
        tolerances=(0.1, 1.1),
        seconds=0.0,
        num_gradients=0,
        seed=0,
    )


def test_nothing_is_said_without_verdicts() -> None:
    assert lead({}) == []
    assert card(None) is None


def test_what_may_be_trusted_is_named() -> None:
    (sentence,) = lead({"a": verdict("refine"), "b": verdict("trust"), "c": verdict("trust")})
    assert sentence.startswith("b and c may be trusted")


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        (verdict("reweight"), verdict("refine", "full_rank"), "Draws of a may be used after reweighting"),
        (
            verdict("refine", "full_rank", "non-center x"),
            verdict("refine", "full_rank"),
            "next: full_rank, non-center x.",
        ),
        (verdict("sample"), verdict("refine"), "No fit may be trusted. Use NUTS."),
    ],
)
def test_where_none_may_be_trusted_the_next_step_is_said(first: Verdict, second: Verdict, expected: str) -> None:
    (sentence,) = lead({"a": first, "b": second})
    assert sentence.startswith("No fit may be trusted")
    assert expected in sentence


@pytest.mark.parametrize("decision", DECISIONS)
def test_every_decision_has_a_look(decision: Decision) -> None:
    made = card(verdict(decision, "flow"))
    assert made is not None
    assert made["look"] in {"good", "fair", "poor"}
    assert made["reasons"] == [f"because of {decision}"]
    assert made["suggestions"] == ["flow"]
