"""Matplotlib figures as inline SVG that follows the page: its colors, its fonts and its light or dark scheme."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from html import escape
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

POINTS = 72
"""Figures are drawn at one unit of the SVG per point, so that a size in the code is a size on the page."""

INK, MUTED, LINE, REFERENCE, REFERENCE_FILL, CARD = (f"#0102{i:02x}" for i in range(6))
"""Placeholders, which become the style sheet's variables of the same names."""
VARIABLES = dict(
    zip(
        (INK, MUTED, LINE, REFERENCE, REFERENCE_FILL, CARD),
        ("ink", "muted", "line", "ref", "ref-fill", "card"),
        strict=True,
    )
)
NUM_COLORS = 6
DASHES: tuple[Any, ...] = (
    "-",
    (0, (5, 1.6)),
    (0, (1.2, 1.2)),
    (0, (6, 1.5, 1.2, 1.5)),
    (0, (9, 2)),
    (0, (3, 1, 1, 1, 1, 1)),
)
MARKERS = ("o", "s", "^", "D", "v", "P")


def color(i: int) -> str:
    """Placeholder of the i-th candidate's color."""
    return f"#0103{i % NUM_COLORS:02x}"


@contextmanager
def drawing(width: float, height: float, *, font_size: float = 11) -> Iterator[Figure]:
    """An empty figure of ``width`` by ``height`` units, with the house style while it is drawn on."""
    import matplotlib
    from matplotlib.figure import Figure

    style: dict[Any, Any] = {
        "axes.edgecolor": LINE,
        "axes.facecolor": "none",
        "axes.grid": False,
        "axes.labelcolor": MUTED,
        "axes.labelsize": font_size,
        "axes.linewidth": 1.0,
        "axes.spines.left": False,
        "axes.spines.right": False,
        "axes.spines.top": False,
        "axes.unicode_minus": True,
        "figure.facecolor": "none",
        "font.family": ["DejaVu Sans"],
        "font.size": font_size,
        "lines.solid_capstyle": "round",
        "path.simplify": True,
        "svg.fonttype": "none",
        "svg.hashsalt": "pyro-vi-lab",
        "text.color": INK,
        "text.parse_math": False,
        "xtick.color": LINE,
        "xtick.labelcolor": MUTED,
        "xtick.labelsize": font_size,
        "ytick.color": LINE,
        "ytick.labelcolor": INK,
        "ytick.labelsize": font_size,
    }
    # The names come from the user's model; whatever letters they hold, the browser has a font for them.
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(style)
        yield Figure(figsize=(width / POINTS, height / POINTS), dpi=POINTS)


def to_svg(figure: Figure, name: str, label: str, *, css: str = "") -> str:
    """The figure as an ``<svg>`` element.

    Args:
        figure: Drawn inside :func:`drawing`.
        name: Unique on the page; ids inside the figure begin with it.
        label: What the figure shows, for readers who do not see it.
        css: Class of the element.
    """
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    buffer = io.StringIO()
    with _without_font_warnings():
        FigureCanvasSVG(figure).print_svg(
            buffer, metadata={"Date": None, "Creator": None, "Format": None, "Type": None}
        )
    text = buffer.getvalue()
    width, height = figure.get_size_inches() * POINTS
    body = text[text.index(">", text.index("<svg")) + 1 : text.rindex("</svg>")]
    body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
    body = re.sub(r"<style type=\"text/css\">.*?</style>", "", body, flags=re.DOTALL)
    body = re.sub(r"<!--.*?-->", "", body, flags=re.DOTALL)
    used = set(re.findall(r"(?:href=\"#|url\(#)([\w.-]+)", body))
    body = re.sub(r' id="([\w.-]+)"', lambda m: f' id="{name}-{m[1]}"' if m[1] in used else "", body)
    body = re.sub(r"(href=\"#|url\(#)([\w.-]+)", rf"\1{name}-\2", body)
    body = body.replace("xlink:href", "href")
    body = re.sub(r"font-family: [^;\"]*;? ?", "", body)
    body = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", body)
    body = re.sub(r"(\d\.\d{2})\d+", r"\1", body)
    body = re.sub(r"#010[23]0[0-9]", lambda m: f"var(--{_variable(m[0])})", body)
    body = re.sub(r"\s*\n\s*", "\n", body).strip()
    return (
        f'<svg class="{css}" role="img" aria-label="{escape(label)}" viewBox="0 0 {width:g} {height:g}" '
        f'style="max-width: {width:g}px">{body}</svg>'
    )


def _variable(placeholder: str) -> str:
    return VARIABLES.get(placeholder) or f"c{int(placeholder[-2:], 16)}"


@contextmanager
def _without_font_warnings() -> Iterator[None]:
    """Letters that matplotlib's own font lacks are measured wrongly by a little, which is no reason for a warning."""
    import warnings

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"Glyph .* missing from")
        yield
