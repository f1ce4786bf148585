from __future__ import annotations

import itertools

import pytest

from benchmarks import trust_checks


def test_coverage_is_counted_case_by_case(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trust_checks, "MANY_DRAWS", 4000)
    monkeypatch.setattr(trust_checks, "SIZES", (500,))
    (row,) = itertools.islice(trust_checks.khat_coverage(repeats=20, references=5), 1)
    assert (row["draws"], row["repeats"]) == (500, 20)
    assert 0.7 <= row["coverage"] <= 1.0


def test_bounds_are_set_beside_true_errors() -> None:
    (row,) = itertools.islice(trust_checks.bound_ratios(repeats=3, sizes=(500,)), 2, 3)
    assert row["mean_error"] == pytest.approx(0.3)
    assert row["mean_ratio"] >= 1
    assert (row["mean_violations"], row["sd_violations"]) == (0, 0)
