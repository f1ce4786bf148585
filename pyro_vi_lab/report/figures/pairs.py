"""Two coordinates at a time: outlines of the guides over the draws of the reference."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pyro_vi_lab.report.figures.drawing import Drawing, look, shortened
from pyro_vi_lab.report.figures.scales import Scale
from pyro_vi_lab.report.words import number

Array = NDArray[Any]

MASSES = (0.5, 0.9)
"""Share of a guide's draws inside its inner and its outer outline."""
MAX_POINTS = 400
SHOWN = (0.002, 0.998)
"""Quantiles of the reference that a panel shows at least."""
MAX_REACH = 40.0
"""Reference sds around its mean beyond which a panel does not go."""
OUTLINE_POINTS = 73
GRID = 72
WINDOW = 230.0


@dataclass(frozen=True)
class Shape:
    """Outlines of one candidate, the smaller masses first.

    Args:
        outlines: Points on each line.
        correlation: Of the two coordinates.

    Shape:
        outlines ``(P, 2)`` each.
    """

    outlines: tuple[Array, ...]
    correlation: float

    @classmethod
    def ellipses(cls, draws: Array) -> Shape:
        r"""Ellipses around the mean that hold the given shares of the draws.

        .. math:: \{x : (x - m)^\top C^{-1} (x - m) = r^2\}

        with r the quantile of the draws' own distances, so that a Student-t guide gets its wider ones.

        Shape:
            draws ``(S, 2)``.
        """
        center, spread = draws.mean(0), np.cov(draws.T)
        values, vectors = np.linalg.eigh(spread)
        root = vectors * np.sqrt(np.clip(values, 0, None))
        usable = values > values.max() * 1e-12
        inverse = np.divide(1.0, np.sqrt(values), out=np.zeros(2), where=usable)
        distance = np.linalg.norm((draws - center) @ vectors * inverse, axis=1)
        angle = np.linspace(0, 2 * np.pi, OUTLINE_POINTS)
        circle = np.stack([np.cos(angle), np.sin(angle)], 1)
        outlines = tuple(center + np.quantile(distance, mass) * circle @ root.T for mass in MASSES)
        return cls(outlines, correlation(draws))

    @classmethod
    def contours(cls, draws: Array) -> Shape:
        r"""Lines of equal density, of a kernel estimate, that hold the given shares of the draws.

        The kernel has the covariance of the draws, times :math:`S^{-1/3}`: Silverman's rule for two dimensions.

        Shape:
            draws ``(S, 2)``.
        """
        from contourpy import contour_generator
        from scipy.ndimage import gaussian_filter

        center = draws.mean(0)
        values, vectors = np.linalg.eigh(np.cov(draws.T))
        sd = np.sqrt(np.maximum(values, values.max() * 1e-12))
        z = (draws - center) @ vectors / sd
        ends = np.quantile(z, (0.001, 0.999), axis=0)
        low, high = ends[0] - 1.0, ends[1] + 1.0
        counts, x, y = np.histogram2d(z[:, 0], z[:, 1], bins=GRID, range=[(low[0], high[0]), (low[1], high[1])])
        smooth = gaussian_filter(counts, len(draws) ** (-1 / 6) * GRID / (high - low))
        falling = np.sort(smooth.ravel())[::-1]
        inside = np.cumsum(falling) / falling.sum()
        levels = [float(falling[min(int(np.searchsorted(inside, mass)), len(falling) - 1)]) for mass in MASSES]
        generator = contour_generator((x[1:] + x[:-1]) / 2, (y[1:] + y[:-1]) / 2, smooth.T)
        lines = [np.asarray(line) for level in levels for line in generator.lines(level)]
        return cls(tuple(center + line * sd @ vectors.T for line in lines), correlation(draws))


def correlation(draws: Array) -> float:
    """Correlation of two coordinates; NaN where one does not move."""
    sd = draws.std(0)
    if not bool((sd > 0).all()):
        return float("nan")
    z = (draws - draws.mean(0)) / sd
    return float((z[:, 0] * z[:, 1]).mean())


def pair(names: tuple[str, str], reference: Array, shapes: Mapping[str, Shape], *, order: Sequence[str]) -> str:
    """Draws of the reference as points, candidates as outlines.

    Args:
        names: Of the horizontal and the vertical coordinate.
        reference: Its draws.
        shapes: Candidate to outlines.
        order: All candidates; the place in it gives the look.

    Shape:
        reference ``(S, 2)``.
    """
    left = 34.0
    drawing = Drawing(left + WINDOW + 4, WINDOW + 26, font_size=11)
    scales = []
    for i, (start, end) in enumerate(((left, left + WINDOW), (WINDOW, 4.0))):
        low, high = np.quantile(reference[:, i], SHOWN)
        for shape in shapes.values():
            low, high = (
                min([low, *(o[:, i].min() for o in shape.outlines)]),
                max([high, *(o[:, i].max() for o in shape.outlines)]),
            )
        mean, sd = reference[:, i].mean(), reference[:, i].std()
        low, high = max(low, mean - MAX_REACH * sd), min(high, mean + MAX_REACH * sd)
        margin = 0.04 * (high - low)
        scales.append(Scale(low - margin, high + margin, start, end))
    x, y = scales
    kept = reference[np.unique(np.linspace(0, len(reference) - 1, MAX_POINTS).astype(int))]
    drawing.dots(*_inside(kept, x, y, drop=True), "dots ref")
    outside = []
    for key, shape in shapes.items():
        lines = [_inside(outline, x, y) for outline in shape.outlines]
        for line in lines:
            drawing.line(*line, f"line {look(order.index(key))}")
        if not any(np.isfinite(places).any() for places, _ in lines):
            outside.append(key)
    if outside:
        drawing.text(left + 6, 16, shortened(f"not in the picture: {', '.join(outside)}", 40), "small tick")
    drawing.x_axis(x, WINDOW, most=4)
    drawing.y_axis(y, left, most=4)
    drawing.line([left, left], [4, WINDOW], "axis")
    found = ", ".join(f"{key} {number(shape.correlation)}" for key, shape in shapes.items())
    return drawing.svg(
        f"Draws of the reference and outlines of the candidates in {names[0]} and {names[1]}; correlations: "
        f"reference {number(correlation(reference))}, {found}"
    )


def _inside(points: Array, x: Scale, y: Scale, *, drop: bool = False) -> tuple[Array, Array]:
    """Places of points; those outside the panel are left out, or interrupt a line."""
    a, b = points[:, 0], points[:, 1]
    inside = (a >= x.low) & (a <= x.high) & (b >= y.low) & (b <= y.high)
    if drop:
        return x(a[inside]), y(b[inside])
    return np.where(inside, x(a), np.nan), y(b)
