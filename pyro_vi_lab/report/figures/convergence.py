"""How the bound fell."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from pyro_vi_lab.report.figures.drawing import Drawing, look
from pyro_vi_lab.report.figures.scales import Scale
from pyro_vi_lab.report.words import number

Array = NDArray[Any]

MAX_CURVE_POINTS = 300
MAX_ABOVE = 1e15
"""Nats above the lowest bound at which a fit that diverges leaves the picture."""
LOG_RATIO = 20.0
"""Ratio of the longest to the shortest fit above which the axis of the seconds is logarithmic."""


def convergence(
    histories: Mapping[str, tuple[Array, Array]],
    lowest: float,
    *,
    order: Sequence[str],
    unit: Literal["step", "seconds"],
) -> str:
    """Negative ELBO of every candidate above the lowest one of the comparison.

    Args:
        histories: Candidate to where on the axis, and its negative ELBO there.
        lowest: Negative ELBO of the best candidate.
        order: All candidates; the place in it gives the look.
        unit: What the axis counts.

    Shape:
        each history ``(N,)`` and ``(N,)`` or, with restarts, ``(N, R)``.
    """
    drawing = Drawing(370, 250, font_size=11.5)
    curves, top, bottom = {}, 1.0, -0.3
    for key, (where, values) in histories.items():
        kept = np.unique(np.linspace(0, len(where) - 1, min(len(where), MAX_CURVE_POINTS)).astype(int))
        finite = np.where(np.isfinite(values), values, np.nan).reshape(len(where), -1)[kept]
        above = np.clip(finite - lowest, -1.0, MAX_ABOVE)
        curves[key] = (where[kept], above)
        if bool(np.isfinite(above).any()):
            top, bottom = max(top, float(np.nanmax(above))), min(bottom, float(np.nanmin(above)))
    x = _axis([where for where, _ in curves.values()], unit)
    y = Scale(bottom * 1.15, top * 1.5, 205, 24, "symlog")
    drawing.y_axis(y, 46, label="nats above the lowest negative ELBO", grid=362)
    drawing.x_axis(x, 205, label=unit, most=5)
    for key, (where, above) in curves.items():
        for column in above.T:
            shown = np.where(where >= x.low, column, np.nan)
            drawing.line(x(np.maximum(where, x.low)), y(shown), f"line {look(order.index(key))}")
    steps = [
        f"{key} from {number(np.ravel(values[0]).min())} to {number(np.ravel(values[-1]).min())} in "
        + (f"{len(where) - 1} steps" if unit == "step" else f"{number(where[-1])} seconds")
        for key, (where, values) in histories.items()
    ]
    return drawing.svg(f"Negative ELBO against {'steps' if unit == 'step' else unit}: " + ", ".join(steps))


def _axis(places: Sequence[Array], unit: str) -> Scale:
    last = [float(where[-1]) for where in places if where[-1] > 0]
    end = max(last, default=1.0)
    if unit == "seconds" and last and end > LOG_RATIO * min(last):
        first = min(float(where[where > 0][0]) for where in places if bool((where > 0).any()))
        return Scale(max(first, end * 1e-6), end, 46, 362, "log")
    return Scale(0.0, end, 46, 362)
