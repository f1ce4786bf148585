"""Data that a posterior predicts, and the data that were seen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pyro_vi_lab.report.figures.drawing import Drawing, look, text_width
from pyro_vi_lab.report.figures.scales import Scale
from pyro_vi_lab.report.words import number

Array = NDArray[Any]

BANDS = (0.05, 0.25, 0.75, 0.95)
"""The light band holds 90% of the replicated data sets at every value, the dark one 50%."""
GRID = 121
REACH = (0.002, 0.998)
"""Quantiles of all values between which a panel is drawn."""


def cumulative(name: str, observed: Array, replicated: Array, *, place: int | None) -> str:
    """Distribution functions of replicated data sets as bands, that of the observed data as steps over them.

    Args:
        name: Whose predictions they are.
        observed: The data.
        replicated: As many values in each of several data sets.
        place: Of the candidate among all; ``None`` for the reference.

    Shape:
        observed ``(N,)``, replicated ``(S, N)``.
    """
    data = np.sort(observed)
    ends = [*np.quantile(replicated, REACH), data[0], data[-1]]
    low, high = min(ends), max(ends)
    margin = 0.03 * (high - low) or 1.0
    grid = np.linspace(low - margin, high + margin, GRID)
    ordered = np.sort(replicated, axis=1)
    shares = np.stack([np.searchsorted(row, grid, side="right") for row in ordered]) / data.size
    outer, inner, inner_top, outer_top = np.quantile(shares, BANDS, axis=0)
    drawing = Drawing(240, 150, font_size=11.5)
    x, y = Scale(grid[0], grid[-1], 30, 234), Scale(0.0, 1.0, 124, 6)
    css = "ref" if place is None else look(place).split()[0]
    drawing.area(x(grid), y(outer), y(outer_top), f"band {css}")
    drawing.area(x(grid), y(inner), y(inner_top), f"band {css}")
    steps = np.repeat(np.clip(data, grid[0], grid[-1]), 2)
    heights = np.r_[0.0, np.repeat(np.arange(1, data.size + 1) / data.size, 2)[:-1]]
    most = max(1, steps.size // 400)
    drawing.line(x(np.r_[grid[0], steps[::most], grid[-1]]), y(np.r_[0.0, heights[::most], 1.0]), "seen")
    drawing.x_axis(x, 124, most=4)
    drawing.y_axis(y, 30, most=2)
    outside = float(np.mean((_share(data, grid) < outer) | (_share(data, grid) > outer_top)))
    return drawing.svg(
        f"Distribution function of the data and 90% band of data sets that {name} predicts; the data are outside the "
        f"band over {number(100 * outside, 0)}% of the range"
    )


def bars(
    values: Sequence[float],
    observed: Array,
    intervals: Mapping[str, Array],
    *,
    order: Sequence[str],
) -> str:
    """Shares of the values of discrete data, with 90% intervals of the replicated ones.

    Args:
        values: The values.
        observed: Share of each in the data.
        intervals: Who predicts, to lower end, median and upper end of each share.
        order: All candidates; the place in it gives the look. Others are the reference.

    Shape:
        observed ``(V,)``, intervals ``(3, V)`` each.
    """
    width = min(700.0, max(240.0, 40 + len(values) * (14 + 9 * len(intervals))))
    drawing = Drawing(width, 170, font_size=11.5)
    top = max(float(observed.max()), *(float(ends.max()) for ends in intervals.values()))
    y = Scale(0.0, top * 1.05, 140, 8)
    slot = (width - 40) / len(values)
    texts = [number(value, 0 if float(value).is_integer() else 2) for value in values]
    every = max(1, int(np.ceil(text_width(texts, 11.5) / slot)))
    for i, text in enumerate(texts):
        left = 34 + slot * i
        drawing.box(left + 0.08 * slot, float(y(observed[i])), 0.84 * slot, 140 - float(y(observed[i])), "fill ref")
        for k, (key, ends) in enumerate(intervals.items()):
            x = left + slot * (k + 1) / (len(intervals) + 1)
            css = look(order.index(key)).split()[0] if key in order else "ref"
            drawing.line([x, x], y(ends[[0, 2], i]), f"thick {css}")
            if key in order:
                drawing.marker(x, float(y(ends[1, i])), order.index(key))
            else:
                drawing.line([x - 3, x + 3], [float(y(ends[1, i]))] * 2, "thick ref")
        if i % every == 0:
            drawing.text(left + slot / 2, 157, text, "tick", anchor="middle")
    drawing.line([34, width - 6], [140, 140], "axis")
    drawing.y_axis(y, 34, most=3)
    missed = ", ".join(
        f"{key} {int(((observed < ends[0]) | (observed > ends[2])).sum())}" for key, ends in intervals.items()
    )
    return drawing.svg(
        f"Shares of {len(values)} values in the data and 90% intervals of the predicted ones; values outside: {missed}"
    )


def _share(ordered: Array, grid: Array) -> Array:
    return np.searchsorted(ordered, grid, side="right") / ordered.size
