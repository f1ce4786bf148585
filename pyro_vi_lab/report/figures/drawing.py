"""Vector graphics that follow the page: its colors, its fonts, its light or dark scheme.

Everything is drawn with the classes of ``style.css`` and without ids, styles or colors of its own, so that a picture
can stand anywhere and often, under a policy that forbids inline styles.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pyro_vi_lab.report.figures.scales import Scale

Array = NDArray[Any]

NUM_COLORS, NUM_DASHES = 6, 6
MARKERS = (
    "M-3 0a3 3 0 1 0 6 0a3 3 0 1 0-6 0z",
    "M-2.7-2.7h5.4v5.4h-5.4z",
    "M0-3.4L3.3 2.4H-3.3z",
    "M0-3.7L3.7 0L0 3.7L-3.7 0z",
    "M0 3.4L3.3-2.4H-3.3z",
    "M-1.1-3.3h2.2v2.2h2.2v2.2h-2.2v2.2h-2.2v-2.2h-2.2v-2.2h2.2z",
)
"""Circle, square, triangle, diamond, triangle on its head, cross; around the origin."""
LETTER = 0.6
"""Width of a letter as a share of its height, on the wide side, where the browser's font is not known."""

Size = tuple[float, float]
"""Width and font size of a large figure."""
SIZES: dict[str, Size] = {"wide": (760, 11), "narrow": (350, 12)}
"""Large figures come twice, for a desk and for a phone; the page shows one of them."""


def look(j: int) -> str:
    """Classes of the j-th candidate: its color, and a dash that tells it apart without color.

    Example:
        >>> look(1), look(7)
        ('c1 d1', 'c1 d2')
    """
    return f"c{j % NUM_COLORS} d{(j + j // NUM_COLORS) % NUM_DASHES}"


def marker_of(j: int) -> str:
    """Outline of the j-th candidate's marker."""
    return MARKERS[(j + j // NUM_COLORS) % len(MARKERS)]


class Drawing:
    """A picture that is drawn bottom up, later parts over earlier ones.

    Args:
        width: In units of the page's pixels.
        height: The same.
        font_size: The same.
    """

    def __init__(self, width: float, height: float, *, font_size: float = 11) -> None:
        self.width, self.height, self.font_size = width, height, font_size
        self._parts: list[str] = []

    def line(self, x: ArrayLike, y: ArrayLike, css: str) -> None:
        """A line through points; it is interrupted where one of them is not finite."""
        if data := path(x, y):
            self._parts.append(f'<path class="{css}" d="{data}"/>')

    def area(self, x: Array, low: ArrayLike, high: Array, css: str) -> None:
        """What lies between two lines."""
        bottom = np.broadcast_to(low, x.shape)
        self._parts.append(f'<path class="{css}" d="{path(np.r_[x, x[::-1]], np.r_[high, bottom[::-1]])}z"/>')

    def box(self, x: float, y: float, width: float, height: float, css: str, *, round: float = 0) -> None:
        """A rectangle."""
        corner = f' rx="{short(round)}"' if round else ""
        self._parts.append(
            f'<rect class="{css}" x="{short(x)}" y="{short(y)}" width="{short(max(width, 0))}" '
            f'height="{short(max(height, 0))}"{corner}/>'
        )

    def ellipse(self, x: float, y: float, a: float, b: float, css: str) -> None:
        """An ellipse with half axes ``a`` and ``b``."""
        self._parts.append(f'<ellipse class="{css}" cx="{short(x)}" cy="{short(y)}" rx="{short(a)}" ry="{short(b)}"/>')

    def shape(self, data: str, css: str) -> None:
        """A path as SVG writes it."""
        self._parts.append(f'<path class="{css}" d="{data}"/>')

    def dots(self, x: Array, y: Array, css: str) -> None:
        """Points, as round ends of lines without length."""
        data = "".join(f"M{short(a)} {short(b)}h0" for a, b in zip(x, y, strict=True))
        self._parts.append(f'<path class="{css}" d="{data}"/>')

    def marker(self, x: float, y: float, j: int) -> None:
        """The marker of the j-th candidate."""
        self._parts.append(
            f'<path class="mark c{j % NUM_COLORS}" transform="translate({short(x)} {short(y)})" d="{marker_of(j)}"/>'
        )

    def text(
        self, x: float, y: float, text: str, css: str = "", *, anchor: Literal["start", "middle", "end"] = "start"
    ) -> None:
        """One line of text, its base at ``y``."""
        look = (f' class="{css}"' if css else "") + (f' text-anchor="{anchor}"' if anchor != "start" else "")
        self._parts.append(f'<text x="{short(x)}" y="{short(y)}"{look}>{escape(text, quote=False)}</text>')

    def x_axis(self, scale: Scale, y: float, *, most: int = 6, label: str = "", grid: float | None = None) -> None:
        """An axis below, with its ticks and, up to ``grid``, their lines."""
        self.line([scale.start, scale.end], [y, y], "axis")
        size = self.font_size
        for value, text in scale.ticks(most):
            x = float(scale(value))
            if grid is not None:
                self.line([x, x], [grid, y], "grid")
            self.line([x, x], [y, y + 3], "axis")
            self.text(x, y + size + 5, text, "tick", anchor="middle")
        if label:
            self.text((scale.start + scale.end) / 2, y + 2.3 * size + 7, label, "tick", anchor="middle")

    def y_axis(self, scale: Scale, x: float, *, most: int = 5, label: str = "", grid: float | None = None) -> None:
        """An axis at the left, with its label above it and, up to ``grid``, lines."""
        for value, text in scale.ticks(most):
            y = float(scale(value))
            if grid is not None:
                self.line([x, grid], [y, y], "grid")
            self.text(x - 6, y + 0.35 * self.font_size, text, "tick", anchor="end")
        if label:
            self.text(x, min(scale.start, scale.end) - 0.8 * self.font_size, label, "tick")

    def svg(self, label: str, *, css: str = "") -> str:
        """The picture as an element of the page.

        Args:
            label: What it shows, for readers who do not see it; without one, it is passed over by their readers.
            css: Classes of the element.
        """
        named = f'role="img" aria-label="{escape(label)}"' if label else 'aria-hidden="true"'
        classes = f' class="{css}"' if css else ""
        width, height = short(self.width), short(self.height)
        return (
            f'<svg{classes} {named} viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
            f'font-size="{short(self.font_size)}">{"".join(self._parts)}</svg>'
        )


def path(x: ArrayLike, y: ArrayLike) -> str:
    """Points as the ``d`` of a path, in pieces where one of them is not finite.

    Example:
        >>> path([0, 1, 2, 3], [0, 1, float("nan"), 2])
        'M0 0L1 1M3 2'
    """
    pieces, inside = [], False
    for a, b in zip(np.asarray(x, float).tolist(), np.asarray(y, float).tolist(), strict=True):
        if np.isfinite(a) and np.isfinite(b):
            pieces.append(f"{'L' if inside else 'M'}{short(a)} {short(b)}")
            inside = True
        else:
            inside = False
    return "".join(pieces)


def short(value: float) -> str:
    """A length to a tenth of a pixel, without needless characters.

    Example:
        >>> short(3.0), short(-0.04), short(2.25)
        ('3', '0', '2.2')
    """
    text = f"{value:.1f}"
    text = text.removesuffix(".0")
    return "0" if text in ("-0", "0") else text


def text_width(texts: Sequence[str], font_size: float) -> float:
    """Width that is enough for the longest of some texts; wide letters, such as Chinese ones, count twice."""
    from unicodedata import east_asian_width

    return max(
        (font_size * LETTER * sum(2 if east_asian_width(c) in "WF" else 1 for c in text) for text in texts), default=0.0
    )


def shortened(text: str, most: int) -> str:
    """The beginning and the end of a text that is too long.

    Example:
        >>> shortened("a_very_long_name_of_a_parameter[123]", 26)
        'a_very_long_name…eter[123]'
    """
    return text if len(text) <= most else f"{text[: most - 10]}…{text[-9:]}"
