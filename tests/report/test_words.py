from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyro_vi_lab import Comparison
from pyro_vi_lab.report.words import CLOSE_SHIFT, judge, number, on_scale, reference_line, summary
from tests import comparisons


def read(text: str) -> float:
    return float(text.replace("−", "-").replace(",", "").replace("∞", "inf").replace("–", "nan"))


# the largest doubles, with three digits, are none
@given(st.floats(-1e300, 1e300) | st.sampled_from([math.inf, -math.inf, math.nan]), st.integers(0, 6))
def test_a_number_reads_back_to_its_digits(value: float, digits: int) -> None:
    text = number(value, digits)
    if math.isnan(value):
        assert text == "–"
    elif math.isinf(value) or abs(value) >= 1e6:
        assert read(text) == pytest.approx(value, rel=0.005)
    else:
        assert abs(read(text) - value) <= 0.5 * 10.0**-digits * (1 + 1e-9)
    assert "-" not in text
    assert not text.startswith("−0.00") or read(text) < 0


@given(
    st.floats(allow_nan=False, allow_infinity=False, min_value=-1e12, max_value=1e12),
    st.floats(min_value=1e-12, max_value=1e12),
)
def test_a_value_on_a_scale_is_within_a_twentieth_of_its_sd_or_half_a_percent(value: float, sd: float) -> None:
    # Two digits of the sd are kept, up to eight decimals; large and tiny values have three significant digits.
    assert abs(read(on_scale(value, sd)) - value) <= max(0.05 * sd, 0.005 * abs(value), 1e-8)


@pytest.mark.parametrize(("value", "sd"), [(1.5, 0.0), (1.5, math.nan), (math.nan, 1.0), (math.inf, 1.0), (1.5, -1.0)])
def test_a_value_without_a_scale_is_a_plain_number(value: float, sd: float) -> None:
    assert on_scale(value, sd) == number(value)


def grades(comparison: Comparison) -> dict[str, str]:
    return {item.name: item.grade for item in judge(comparison)}


def test_the_exact_family_agrees_and_the_narrow_one_is_not_trusted() -> None:
    assert grades(comparisons.regression()) == {"mean_field": "untrusted", "full_rank": "agrees"}


@pytest.mark.parametrize(
    ("khat", "error", "grade"), [(0.95, 0.1, "untrusted"), (0.8, 0.1, "unjudged"), (0.3, 0.1, "unjudged")]
)
def test_without_a_fit_reference_only_khat_is_judged(khat: float, error: float, grade: str) -> None:
    comparison = comparisons.unfit()
    check = dataclasses.replace(comparison.importance["mean_field"], khat=khat, khat_se=error)
    weights = {**comparison.importance, "mean_field": check}
    changed = dataclasses.replace(comparison, importance=weights, verdicts={})
    assert grades(changed) == {"mean_field": grade, "full_rank": "unjudged"}
    doubted = any("cannot be told from the limit" in reason for item in judge(changed) for reason in item.reasons)
    assert doubted == (khat == 0.8)


def test_a_diverged_fit_failed() -> None:
    assert grades(comparisons.diverged()) == {"mean_field": "failed", "full_rank": "failed"}


def test_a_small_difference_counts_only_beyond_its_noise() -> None:
    comparison = comparisons.regression()
    found = comparison.discrepancies["full_rank"]
    shift = np.full_like(found.mean_shift, 2 * CLOSE_SHIFT)
    for error, grade in ((CLOSE_SHIFT / 4, "differs"), (CLOSE_SHIFT, "agrees")):
        moved = dataclasses.replace(found, mean_shift=shift, mean_shift_mcse=np.full_like(shift, error))
        changed = dataclasses.replace(comparison, discrepancies={**comparison.discrepancies, "full_rank": moved})
        assert grades(changed)["full_rank"] == grade


def test_the_summary_says_who_matches_best_and_who_is_not_to_be_trusted() -> None:
    first, second, third = summary(comparisons.regression())
    assert first.startswith("full_rank matches the reference best: no mean is off by more than 0.0")
    assert second.startswith("It also has the lowest negative ELBO, ")
    assert third.startswith("mean_field must not be trusted: 3 of 4 parameters are off by more than")


def test_who_matches_best_is_who_has_the_best_worst_number() -> None:
    """Of what the sentence and the table say, so that nobody has to wonder."""
    comparison = comparisons.regression()
    found = comparison.discrepancies["full_rank"]
    moved = dataclasses.replace(found, sd_ratio=np.full_like(found.sd_ratio, 20.0))
    changed = dataclasses.replace(comparison, discrepancies={**comparison.discrepancies, "full_rank": moved})
    assert summary(comparison)[0].startswith("full_rank matches")
    assert summary(changed)[0].startswith("mean_field matches")


def test_the_summary_begins_with_an_unfit_reference_and_names_no_match() -> None:
    first, *rest = summary(comparisons.unfit())
    assert first.startswith("The reference is unfit: ")
    assert not any("matches" in sentence for sentence in rest)


def test_the_best_of_bad_ones_is_not_called_good() -> None:
    sentences = summary(comparisons.hostile())
    assert "beside the reference" in sentences[0]
    assert any(sentence.startswith("full_rank must be reweighted: ") for sentence in sentences)


def test_a_candidate_without_posterior_is_said_so() -> None:
    sentences = summary(comparisons.diverged())
    assert [sentence.split(":")[0] for sentence in sentences] == [
        "mean_field has no posterior",
        "full_rank has no posterior",
    ]


def test_the_reference_is_described() -> None:
    assert reference_line(comparisons.regression()) == "the exact posterior, 4 chains of 1,000 draws"
    assert reference_line(comparisons.hostile()).endswith("1 chain of 2,000 draws")
