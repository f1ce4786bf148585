"""Importance weights of the candidates, and what their tails say."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pyro_vi_lab.report.figures.drawing import Drawing, look, shortened
from pyro_vi_lab.report.figures.scales import Scale
from pyro_vi_lab.report.words import MAX_KHAT, number

Array = NDArray[Any]

CURVE_POINTS = 120
SMALLEST = 1e-2
"""Weights below this share of the average one are not shown: they do not matter."""
LOWEST_KHAT = -0.5
MAX_SHOWN_KHAT = 2.0


def weight_tails(log_weights: Mapping[str, Array], *, order: Sequence[str]) -> str:
    """Weights against the share of draws that have larger ones, both on logarithmic scales.

    Where the tail is a Pareto distribution it is a line, which falls by k-hat decades in one decade of draws.

    Args:
        log_weights: Candidate to logarithms of weights that sum to one.
        order: All candidates; the place in it gives the look.

    Shape:
        log_weights ``(S,)`` each.
    """
    drawing = Drawing(370, 250, font_size=11.5)
    curves, top, least, fewest = {}, 10.0, 0.5, 0.1
    for key, values in log_weights.items():
        number_of = len(values)
        rank = np.unique(np.geomspace(1, number_of, CURVE_POINTS).astype(int))
        weights = np.exp(np.sort(values)[::-1][rank - 1] + math.log(number_of))
        curves[key] = (rank / number_of, np.where(weights >= SMALLEST, weights, np.nan))
        top, fewest = max(top, float(weights[0])), min(fewest, 1 / number_of)
        least = min(least, max(float(weights[-1]), SMALLEST))
    x = Scale(fewest, 1.0, 46, 362, "log")
    y = Scale(least / 1.3, top * 1.3, 205, 24, "log")
    drawing.y_axis(y, 46, label="weight, in average weights", grid=362)
    drawing.x_axis(x, 205, label="share of the draws with a larger weight", most=5)
    drawing.line([46, 362], y([1.0, 1.0]), "zero")
    for key, (share, weights) in curves.items():
        drawing.line(x(share), y(weights), f"line {look(order.index(key))}")
    largest = ", ".join(f"{key} {number(float(np.exp(v.max()) * 100))}%" for key, v in log_weights.items())
    return drawing.svg(f"Importance weights, the largest first; share of the largest one: {largest}")


def khats(found: Mapping[str, tuple[float, float]], *, order: Sequence[str]) -> str:
    """k-hat of every candidate, with two standard errors to each side.

    Args:
        found: Candidate to k-hat and its standard error.
        order: All candidates; the place in it gives the look.
    """
    row, top = 34.0, 24.0
    bottom = top + max(row * len(found), 60)
    drawing = Drawing(370, bottom + 45, font_size=11.5)
    known = [(khat - 2 * error, khat + 2 * error) for khat, error in found.values() if math.isfinite(khat)]
    low = max(min([0.0, *(a for a, _ in known)]), LOWEST_KHAT)
    high = min(max([1.0, *(b for _, b in known)]), MAX_SHOWN_KHAT)
    x = Scale(low, high, 12, 358)
    drawing.box(float(x(MAX_KHAT)), top, 358 - float(x(MAX_KHAT)), bottom - top, "warn")
    drawing.line(x([MAX_KHAT] * 2), [top, bottom], "limit")
    drawing.text(float(x(MAX_KHAT)) + 4, top - 8, f"over {MAX_KHAT}: unreliable", "tick")
    for i, (key, (khat, error)) in enumerate(found.items()):
        y = top + row * (i + 0.5) + 6
        middle = float(x(min(max(khat, low), high)))
        drawing.text(12, y - 11, f"{shortened(key, 26)}  {number(khat)}", "small")
        if math.isfinite(khat):
            ends = x(np.clip([khat - 2 * error, khat + 2 * error], low, high))
            drawing.line(ends, [y, y], f"thick {look(order.index(key)).split()[0]}")
        drawing.marker(middle, y, order.index(key))
    drawing.x_axis(x, bottom, label="k-hat, with two standard errors to each side", most=5)
    values = ", ".join(f"{key} {number(khat)} ± {number(error)}" for key, (khat, error) in found.items())
    return drawing.svg(f"k-hat of every candidate, to be at most {MAX_KHAT}: {values}")
