from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyro_vi_lab.report.figures.scales import Scale, decades, round_values

ENDS = st.floats(-1e200, 1e200)


@given(ENDS, ENDS)
def test_the_ends_of_a_scale_are_its_ends_and_the_order_is_kept(a: float, b: float) -> None:
    low, high = sorted((a, b))
    scale = Scale(low, high, 10.0, 110.0)
    places = scale([low, low / 2 + high / 2, high])
    assert np.isfinite(places).all()
    assert (np.diff(places) >= 0).all()
    if high - low > 1e-9 * max(abs(low), abs(high)) and high - low > 1e-300:
        np.testing.assert_allclose(places, [10, 60, 110], atol=1e-4)


@given(ENDS, ENDS, st.integers(1, 10))
def test_ticks_are_few_inside_and_told_apart(a: float, b: float, most: int) -> None:
    low, high = sorted((a, b))
    ticks = round_values(low, high, most)
    if high - low <= 1e-6 * max(abs(low), abs(high)):
        return  # the digits of the ends are the same: what lies between cannot be named shortly
    width = high - low
    assert len(ticks) <= 2 * most + 2
    assert all(low - 1e-6 * width <= value <= high + 1e-6 * width for value, _ in ticks)
    assert len({text for _, text in ticks}) == len(ticks)


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0.0, 1.0, ["0.0", "0.5", "1.0"]), (-300.0, 200.0, ["−200", "0", "200"]), (0.0, 5e-5, ["0", "2e−5", "4e−5"])],
)
def test_ticks_read_well(low: float, high: float, expected: list[str]) -> None:
    assert [text for _, text in round_values(low, high, 3)] == expected


def test_a_scale_without_width_puts_all_in_the_middle() -> None:
    scale = Scale(3.0, 3.0, 0.0, 100.0)
    assert scale([3.0]).tolist() == [50.0]
    assert scale.ticks(4) == [(3.0, "3")]


@pytest.mark.parametrize(("low", "high"), [(1e-4, 1.0), (-0.3, 1e15), (0.5, 3.0), (-1.0, 0.5)])
def test_decades_lie_between_the_ends(low: float, high: float) -> None:
    values = [value for value, _ in decades(low, high, 4)]
    assert all(low <= value <= high * (1 + 1e-9) for value in values)
    assert len(values) <= 5
    assert all(value == 0 or math.log10(value) == round(math.log10(value)) for value in values)


def test_symlog_is_linear_near_zero_and_logarithmic_beyond() -> None:
    scale = Scale(-1.0, 100.0, 0.0, 4.0, "symlog")
    np.testing.assert_allclose(scale([-1, 0, 1, 10, 100]), [0, 1, 2, 3, 4])


def test_what_is_not_finite_has_no_place() -> None:
    places = Scale(0.0, 1.0, 0.0, 1.0)([np.nan, 0.5])
    assert np.isnan(places[0])
    assert places[1] == 0.5
