"""Calibration of the candidates' guides over simulated data, where it was computed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pyro_vi_lab.errors import ArgumentError
from pyro_vi_lab.report import figures

if TYPE_CHECKING:
    from pyro_vi_lab.calibration import Calibration
    from pyro_vi_lab.compare import Comparison

MAX_ROWS = 30
"""Parameters in the table, the least calibrated ones first."""


def calibration_panels(comparison: Comparison, calibrations: Mapping[str, Calibration]) -> list[dict[str, Any]]:
    """Picture, summary and rows for every calibration.

    Args:
        comparison: What is shown.
        calibrations: Candidate to calibration.

    Raises:
        ArgumentError: A calibration of something that is no candidate, or of another problem.
    """
    order = list(comparison.fits)
    for name, found in calibrations.items():
        if name not in order:
            raise ArgumentError(f"there is a calibration of {name!r}; the candidates are {', '.join(order)}")
        if found.problem.name != comparison.problem.name:
            raise ArgumentError(
                f"the calibration of {name!r} is of the problem {found.problem.name}, not of {comparison.problem.name}"
            )
    return [
        {
            "who": name,
            "swatch": figures.swatch(order.index(name)),
            "summary": found.summary(),
            "svg": figures.ranks(name, found.check, place=order.index(name)),
            "rows": found.table().sort_values("p_value", kind="stable").head(MAX_ROWS).to_dict("records"),
            "alpha": found.check.alpha,
        }
        for name, found in calibrations.items()
    ]
