from __future__ import annotations

import re
from xml.etree import ElementTree

import numpy as np

from pyro_vi_lab.report import figures

RNG = np.random.default_rng(0)
DRAWS = {"mu": RNG.normal(size=2000), "tau": RNG.exponential(size=2000)}


def forest(reference: dict[str, np.ndarray], factor: float, labels: dict[str, str] | None = None) -> str:
    candidates = {"a": {name: draws * factor + 1 for name, draws in reference.items()}}
    return figures.forest(reference, candidates, labels or {}, order=["a"], size=(760, 11), css="wide")


def test_every_parameter_is_named_with_its_label() -> None:
    text = "".join(ElementTree.fromstring(forest(DRAWS, 2.0, {"mu": "overall"})).itertext())
    assert "overall  mu" in text
    assert "tau" in text


def test_far_candidates_stay_inside() -> None:
    svg = forest(DRAWS, 1e6)
    numbers = [float(x) for data in re.findall(r' d="([^"]*)"', svg) for x in re.findall(r"-?\d+\.?\d*", data)]
    assert max(numbers) <= 760


def test_long_names_are_shortened() -> None:
    long = "a_very_long_name_of_a_parameter_indeed_[123]"
    svg = figures.forest({long: DRAWS["mu"]}, {}, {}, order=[], size=(350, 12), css="narrow")
    text = "".join(ElementTree.fromstring(svg).itertext())
    assert long not in text
    assert "a_very_l…eed_[123]" in text


def test_the_interval_of_a_candidate_is_where_its_draws_are() -> None:
    draws = np.linspace(-1, 1, 100_001)
    svg = figures.forest({"x": draws}, {"a": {"x": draws}}, {}, order=["a"], size=(760, 11), css="wide")
    (thin,) = re.findall(r'<path class="thin c0" d="M([\d.]+) [\d.]+L([\d.]+)', svg)
    (box,) = re.findall(r'<rect class="fill ref" x="([\d.]+)" y="[\d.]+" width="([\d.]+)"', svg)
    # rounding to a tenth of a pixel, twice
    assert abs(float(thin[0]) - float(box[0])) <= 0.1
    assert abs(float(thin[1]) - float(box[0]) - float(box[1])) <= 0.2
