from __future__ import annotations

import re
from collections.abc import Callable
from xml.etree import ElementTree

import numpy as np
import pytest

from pyro_vi_lab.report import figures
from pyro_vi_lab.report.figures.drawing import NUM_COLORS, Drawing, look, marker_of, short, text_width
from pyro_vi_lab.report.figures.graph import NodeText

RNG = np.random.default_rng(0)
DRAWS = {"mu": RNG.normal(size=1000), "tau": RNG.exponential(size=1000)}
TWO = RNG.normal(size=(1000, 2))
HOSTILE = """"><script>x</script> $x^2$ 模型 '&"""
LAYOUT = {
    "bb": "0,0,100,120",
    "objects": [
        {"name": "cluster_0", "bb": "0,0,90,50"},
        {"name": "n0", "pos": "40,100"},
        {"name": "n1", "pos": "40,30"},
    ],
    "edges": [{"tail": 1, "head": 2, "pos": "e,40,46 40,84 40,75 40,65 40,56"}],
}

EVERYTHING: dict[str, Callable[[str], str]] = {
    "forest": lambda name: figures.forest(
        {name: DRAWS["mu"]}, {"b": {name: DRAWS["tau"]}}, {name: name}, order=["a", "b"], size=(760, 11), css="wide"
    ),
    "marginal": lambda name: figures.marginal(name, DRAWS["mu"], {name: DRAWS["tau"]}, order=["a", name]),
    "pair": lambda name: figures.pair((name, "y"), TWO, {name: figures.Shape.contours(TWO)}, order=["a", name]),
    "convergence": lambda name: figures.convergence(
        {name: (np.arange(30), np.linspace(100.0, 3.0, 30))}, 3.0, order=["a", name], unit="step"
    ),
    "weights": lambda name: figures.weight_tails({name: np.full(100, -np.log(100))}, order=["a", name]),
    "khats": lambda name: figures.khats({name: (0.5, 0.1)}, order=["a", name]),
    "cumulative": lambda name: figures.cumulative(name, DRAWS["mu"][:20], TWO[:40].reshape(4, 20), place=1),
    "bars": lambda name: figures.bars(
        [0.0, 1.0], np.array([0.4, 0.6]), {name: np.array([[0.2, 0.4], [0.4, 0.5], [0.6, 0.8]])}, order=["a", name]
    ),
    "graph": lambda name: figures.graph_picture(
        LAYOUT, [NodeText(name, "Normal", "latent"), NodeText("y", "Normal", "observed")], [name], name=name
    ),
}
ALL = pytest.mark.parametrize("name", EVERYTHING)


@ALL
def test_a_picture_follows_the_page_and_needs_nothing_else(name: str) -> None:
    svg = EVERYTHING[name]("b")
    root = ElementTree.fromstring(svg)
    assert root.get("role") == "img"
    assert root.get("aria-label")
    for element in root.iter():
        assert not {"id", "style", "href", "fill", "stroke", "font-family"} & set(element.keys())
        assert element.tag in {"svg", "path", "rect", "ellipse", "text"}
    assert not re.search(r"#[0-9a-fA-F]{6}|http|url\(|nan|inf", svg)


@ALL
def test_a_picture_stays_inside_its_frame(name: str) -> None:
    root = ElementTree.fromstring(EVERYTHING[name]("b"))
    width, height = (float(root.get(key, "0")) for key in ("width", "height"))
    for element in root.iter("path"):
        if element.get("transform") is None:
            points = re.findall(r"[MLC]?(-?[\d.]+) (-?[\d.]+)", element.get("d", ""))
            assert all(-1 <= float(x) <= width + 1 and -1 <= float(y) <= height + 1 for x, y in points)


@ALL
def test_names_are_text_and_nothing_else(name: str) -> None:
    root = ElementTree.fromstring(EVERYTHING[name](HOSTILE))
    assert {element.tag for element in root.iter()} <= {"svg", "path", "rect", "ellipse", "text"}
    assert HOSTILE in root.get("aria-label", "") or name in {"forest", "bars"}


@ALL
def test_the_same_numbers_give_the_same_text(name: str) -> None:
    assert EVERYTHING[name]("b") == EVERYTHING[name]("b")


def test_a_swatch_is_no_picture_of_its_own() -> None:
    root = ElementTree.fromstring(figures.swatch(1))
    assert root.get("aria-hidden") == "true"
    assert root.get("role") is None


def test_candidates_differ_without_color_too() -> None:
    seen = {(look(j), marker_of(j)) for j in range(36)}
    assert len(seen) == 36
    by_color: dict[str, set[str]] = {}
    for j in range(36):
        color, dash = look(j).split()
        by_color.setdefault(color, set()).add(dash)
    assert len(by_color) == NUM_COLORS
    assert len({look(j).split()[1] for j in range(6)}) == 6
    assert len({marker_of(j) for j in range(6)}) == 6


def test_lines_are_interrupted_where_there_is_no_value() -> None:
    drawing = Drawing(10, 10)
    drawing.line([0, 1, 2, 3, 4], [0, 1, np.inf, 3, 4], "line")
    assert 'd="M0 0L1 1M3 3L4 4"' in drawing.svg("x")


@pytest.mark.parametrize("value", [0.0, -0.01, 1234.56, -7.25, 1e5])
def test_lengths_are_kept_to_a_tenth(value: float) -> None:
    assert abs(float(short(value)) - value) <= 0.05 + 1e-9


def test_wide_letters_are_given_room() -> None:
    assert text_width(["模型"], 10) == text_width(["mmmm"], 10)
