"""A model as a graph: ellipses for its sites, boxes for its plates, arrows for what depends on what."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from pyro_vi_lab.report.figures.drawing import Drawing, short, shortened, text_width

FONT, SMALL = 12.0, 10.0
MAX_NAME = 30
ARROW = 7.0
MARGIN = 4.0


class NodeText(NamedTuple):
    """What stands in a node.

    Args:
        name: Of the site.
        distribution: Empty if it has none.
        look: ``"latent"``, ``"observed"`` or ``"deterministic"``.
    """

    name: str
    distribution: str
    look: str


def node_size(text: NodeText) -> tuple[float, float]:
    """Width and height of an ellipse around the text."""
    name = text_width([shortened(text.name, MAX_NAME)], FONT)
    return max(name, text_width([text.distribution], SMALL)) * 1.15 + 22, 44.0 if text.distribution else 32.0


def graph_picture(layout: Mapping[str, Any], texts: Sequence[NodeText], plates: Sequence[str], *, name: str) -> str:
    """The graph where ``dot -Tjson`` places it.

    Args:
        layout: What dot gave; its nodes are ``n0``, ``n1``, ..., its clusters ``cluster_0``, ....
        texts: What stands in each node.
        plates: Label of each cluster.
        name: Of the model.
    """
    _, _, width, height = map(float, layout["bb"].split(","))
    drawing = Drawing(width + 2 * MARGIN, height + 2 * MARGIN, font_size=FONT)

    def place(point: str) -> tuple[float, float]:
        x, y = map(float, point.split(","))
        return x + MARGIN, height - y + MARGIN

    objects = layout.get("objects", [])
    for item in sorted((o for o in objects if o["name"].startswith("cluster_")), key=_area, reverse=True):
        x0, y0, x1, y1 = map(float, item["bb"].split(","))
        drawing.box(x0 + MARGIN, height - y1 + MARGIN, x1 - x0, y1 - y0, "plate", round=8)
        label = shortened(plates[int(item["name"].removeprefix("cluster_"))], max(14, int((x1 - x0) / 6)))
        drawing.text(x1 + MARGIN - 8, height - y0 + MARGIN - 7, label, "tick", anchor="end")
    for edge in layout.get("edges", []):
        end, *points = edge["pos"].split(" ")
        tip, start, *rest = place(end.removeprefix("e,")), *map(place, points)
        curve = " ".join(f"{short(x)} {short(y)}" for x, y in rest)
        to_arrow = f"L{short(tip[0])} {short(tip[1])}"
        drawing.shape(f"M{short(start[0])} {short(start[1])}C{curve}{to_arrow}", "edge")
        drawing.shape(_arrow(rest[-1], tip), "arrow")
    for item in objects:
        if item["name"].startswith("cluster_"):
            continue
        text, (x, y) = texts[int(item["name"].removeprefix("n"))], place(item["pos"])
        a, b = node_size(text)
        drawing.ellipse(x, y, a / 2, b / 2, f"node {text.look}")
        drawing.text(x, y + (-1 if text.distribution else 4), shortened(text.name, MAX_NAME), anchor="middle")
        if text.distribution:
            drawing.text(x, y + 12, text.distribution, "small tick", anchor="middle")
    seen = [text.name for text in texts if text.look == "observed"]
    return drawing.svg(
        f"Graph of the model {name}: {len(texts)} sites, {len(layout.get('edges', []))} dependences"
        + (f"; observed: {', '.join(seen)}" if seen else ""),
        css="graph",
    )


def _area(item: Mapping[str, Any]) -> float:
    x0, y0, x1, y1 = map(float, item["bb"].split(","))
    return (x1 - x0) * (y1 - y0)


def _arrow(start: tuple[float, float], tip: tuple[float, float]) -> str:
    """A triangle at the end of a line."""
    dx, dy = tip[0] - start[0], tip[1] - start[1]
    length = math.hypot(dx, dy) or 1.0
    ux, uy = dx / length, dy / length
    base = (tip[0] - ARROW * ux, tip[1] - ARROW * uy)
    side = 0.4 * ARROW
    points = [tip, (base[0] - side * uy, base[1] + side * ux), (base[0] + side * uy, base[1] - side * ux)]
    return "M" + "L".join(f"{short(x)} {short(y)}" for x, y in points) + "z"
