"""Every candidate on the reference, all parameters on one scale."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pyro_vi_lab.report.figures.drawing import Drawing, Size, look, shortened, text_width
from pyro_vi_lab.report.figures.scales import Scale

Array = NDArray[Any]

INTERVAL = (0.05, 0.25, 0.5, 0.75, 0.95)
"""The thin line holds 90% of the draws, the thick one 50%."""
MAX_REACH = 8.0
"""Reference sds beyond which the plot is cut off: farther is wrong, whatever the distance."""
MAX_LABEL = {"wide": 34, "narrow": 18}


def forest(
    reference: Mapping[str, Array],
    candidates: Mapping[str, Mapping[str, Array]],
    labels: Mapping[str, str],
    *,
    order: Sequence[str],
    size: Size,
    css: str,
) -> str:
    """Central intervals of every parameter in reference standard deviations around the reference mean.

    Args:
        reference: Parameter to draws, which are not all equal.
        candidates: Candidate to parameter to draws.
        labels: Parameter to what the user calls it.
        order: All candidates; the place in it gives the look.
        size: For a desk or for a phone.
        css: ``"wide"`` or ``"narrow"``.

    Shape:
        all draws ``(number of draws,)``.
    """
    width, font_size = size
    row, top = 16 + 9 * len(candidates), 4.0
    names = [f"{labels[name]}  {name}" if labels.get(name) else name for name in reference]
    names = [shortened(name, MAX_LABEL[css]) for name in names]
    left = min(text_width(names, font_size) + 10, 0.45 * width)
    bottom = top + row * len(names)
    drawing = Drawing(width, bottom + 2.3 * font_size + 14, font_size=font_size)
    standard, reach = {}, 2.0
    for parameter, draws in reference.items():
        mean, sd = draws.mean(), draws.std()
        every = {None: draws} | {key: values[parameter] for key, values in candidates.items()}
        standard[parameter] = {key: (np.quantile(values, INTERVAL) - mean) / sd for key, values in every.items()}
        reach = max(reach, *(float(np.abs(values).max()) for values in standard[parameter].values()))
    reach = min(reach, MAX_REACH) * 1.04
    x = Scale(-reach, reach, left, width - 10)
    for i, (parameter, name) in enumerate(zip(reference, names, strict=True)):
        y = top + row * i
        if i % 2:
            drawing.box(left, y, width - 10 - left, row, "stripe")
        low, lower, middle, upper, high = x(np.clip(standard[parameter][None], -reach, reach))
        drawing.box(low, y + 0.1 * row, high - low, 0.8 * row, "fill ref")
        drawing.box(lower, y + 0.1 * row, upper - lower, 0.8 * row, "core ref")
        drawing.line([middle, middle], [y + 0.1 * row, y + 0.9 * row], "thin ref")
        for j, key in enumerate(candidates):
            low, lower, middle, upper, high = x(np.clip(standard[parameter][key], -MAX_REACH, MAX_REACH))
            place = y + row * (0.11 + 0.78 * (j + 1) / (len(candidates) + 1))
            drawing.line([low, high], [place, place], f"thin {look(order.index(key)).split()[0]}")
            drawing.line([lower, upper], [place, place], f"thick {look(order.index(key)).split()[0]}")
            drawing.marker(middle, place, order.index(key))
        drawing.text(left - 8, y + row / 2 + 0.35 * font_size, name, anchor="end")
    drawing.line([x(0), x(0)], [top, bottom], "zero")
    drawing.x_axis(x, bottom, label="reference sd from the reference mean", most=8 if css == "wide" else 4)
    return drawing.svg(
        f"Intervals of {len(names)} parameter{'s' if len(names) != 1 else ''} in reference standard deviations: "
        f"{', '.join(candidates) or 'no candidate'} on the reference",
        css=css,
    )
