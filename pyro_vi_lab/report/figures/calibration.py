"""Ranks of parameters that made the data, among draws of the fits to these data."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from pyro_vi_lab.checks.calibration import CalibrationCheck
from pyro_vi_lab.checks.uniformity import ecdf, ecdf_band
from pyro_vi_lab.report.figures.drawing import Drawing, look
from pyro_vi_lab.report.figures.scales import Scale

Array = NDArray[Any]

MAX_LINES = 40
"""Parameters that are drawn, the least calibrated ones."""


def ranks(name: str, check: CalibrationCheck, *, place: int | None) -> str:
    """Distribution functions of the ranks, minus the uniform one, and the band that holds all of them.

    Args:
        name: The candidate.
        check: What the ranks say.
        place: Of the candidate among all; ``None`` if it is none of them.
    """
    band = ecdf_band(len(check.fractions), 1 - check.alpha / len(check.parameters))
    shown = np.argsort(check.p_value, kind="stable")[:MAX_LINES]
    difference = ecdf(check.fractions[:, shown], band.points) - band.points[:, None]
    low, high = band.lower - band.points, band.upper - band.points
    reach = 1.08 * max(float(np.abs(difference).max()), float(high.max()), float(-low.min()))
    drawing = Drawing(370, 230, font_size=11.5)
    x, y = Scale(0.0, 1.0, 46, 362), Scale(-reach, reach, 185, 24)
    drawing.area(x(band.points), y(low), y(high), "fill ref")
    drawing.line([46, 362], y([0.0, 0.0]), "zero")
    wrong = check.adjusted_p_value < check.alpha
    css = look(place or 0).split()[0]
    for k in reversed(range(len(shown))):  # the worst over the others
        bad = bool(wrong[shown[k]])
        drawing.line(x(band.points), y(difference[:, k]), f"thin {css}" if bad else "faint ref")
    drawing.y_axis(y, 46, label="share of the ranks below, minus uniform", most=4)
    drawing.x_axis(x, 185, label="rank among the draws of the fit", most=5)
    bad_names = [check.parameters[i] for i in np.flatnonzero(wrong)]
    return drawing.svg(
        f"Ranks of {len(check.parameters)} parameters in {len(check.fractions)} simulations with {name}, with their "
        f"band: {len(bad_names)} outside" + (f" ({', '.join(bad_names[:5])})" if bad_names else "")
    )
