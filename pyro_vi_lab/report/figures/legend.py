"""What stands for a candidate in every figure."""

from __future__ import annotations

from pyro_vi_lab.report.figures.drawing import Drawing, look


def swatch(j: int) -> str:
    """The line and the marker of the j-th candidate."""
    drawing = Drawing(40, 14)
    drawing.line([1, 39], [7, 7], f"line {look(j)}")
    drawing.marker(20, 7, j)
    return drawing.svg("", css="swatch")
