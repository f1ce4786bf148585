from __future__ import annotations

import numpy as np
import pytest

from pyro_vi_lab.report.figures.predictive import bars, cumulative

RNG = np.random.default_rng(0)


def outside(svg: str) -> float:
    return float(svg.split("outside the band over ")[1].split("%")[0])


def test_data_like_the_replicated_ones_are_inside() -> None:
    data, replicated = RNG.normal(size=100), RNG.normal(size=(200, 100))
    # pointwise 90% bands: a tenth of the range is outside on average
    assert outside(cumulative("a", data, replicated, place=0)) < 30


def test_data_that_are_moved_are_outside() -> None:
    data, replicated = RNG.normal(size=100) + 3, RNG.normal(size=(200, 100))
    assert outside(cumulative("a", data, replicated, place=None)) > 50


@pytest.mark.parametrize("data", [np.array([2.0]), np.zeros(10), np.array([1e300, -1e300])])
def test_odd_data_are_drawn(data: np.ndarray) -> None:
    svg = cumulative("a", data, np.tile(data, (30, 1)), place=0)
    assert "nan" not in svg


def test_bars_say_how_many_values_are_outside() -> None:
    shares = np.array([0.2, 0.8])
    inside, beside = (
        np.array([shares - 0.1, shares, shares + 0.1]),
        np.array([shares + 0.1, shares + 0.2, shares + 0.3]),
    )
    svg = bars([0.0, 1.5], shares, {"nuts": inside, "a": beside}, order=["a"])
    assert "values outside: nuts 0, a 2" in svg
    assert ">0</text>" in svg
    assert ">1.50</text>" in svg
