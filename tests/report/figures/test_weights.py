from __future__ import annotations

import math
import re

import numpy as np
import pytest
from scipy import stats

from pyro_vi_lab.report.figures.weights import khats, weight_tails


def test_the_tail_of_a_pareto_distribution_falls_by_k_decades_in_one_of_draws() -> None:
    k, number = 0.5, 10_000
    weights = stats.pareto.ppf((np.arange(number) + 0.5) / number, 1 / k)
    svg = weight_tails({"a": np.log(weights / weights.sum())}, order=["a"])
    (data,) = re.findall(r'class="line c0 d0" d="([^"]*)"', svg)
    points = np.array(re.findall(r"[ML]([\d.]+) ([\d.]+)", data), float)
    places = {text: float(x) for x, text in re.findall(r'<text x="([\d.]+)"[^>]*>([\d.,]+)</text>', svg)}
    decade = places["0.1"] - places["0.01"]
    heights = np.interp([places["0.01"], places["0.1"]], points[:, 0], points[:, 1])
    rows = re.findall(r'y="([\d.]+)" class="tick" text-anchor="end">([\d.]+)<', svg)
    labels = sorted((float(text), float(y)) for y, text in rows)
    (low, y_low), (high, y_high) = labels[0], labels[-1]
    per_decade = (y_low - y_high) / math.log10(high / low)
    assert decade > 0
    # the baseline of the labels and the rounding to tenths of a pixel move the places by less than half a pixel
    assert (heights[1] - heights[0]) / per_decade == pytest.approx(k, abs=0.02)


def test_equal_weights_are_a_level_line() -> None:
    svg = weight_tails({"a": np.full(1000, -math.log(1000))}, order=["a"])
    (data,) = re.findall(r'class="line c0 d0" d="([^"]*)"', svg)
    assert len(set(re.findall(r" ([\d.]+)", data))) == 1


@pytest.mark.parametrize("khat", [-math.inf, math.inf, -3.0, 0.3, 0.9, 50.0])
def test_every_khat_has_a_place(khat: float) -> None:
    svg = khats({"a": (khat, 0.0 if math.isinf(khat) else 0.2)}, order=["a"])
    (x,) = re.findall(r'class="mark c0" transform="translate\((-?[\d.]+) ', svg)
    assert 12 <= float(x) <= 358
