from __future__ import annotations

import functools
import shutil
from typing import Any
from xml.etree import ElementTree

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_vi_lab import Problem
from pyro_vi_lab.models import build
from pyro_vi_lab.report import model
from pyro_vi_lab.report.model import graph, relations, site_rows, source
from tests import comparisons

DOT = pytest.mark.skipif(
    shutil.which("dot") is None, reason="needs dot of Graphviz (on Debian: apt-get install graphviz)"
)


def coin(y: torch.Tensor) -> None:
    p = pyro.sample("p", dist.Beta(1.0, 1.0))
    pyro.sample("y", dist.Bernoulli(p), obs=y)


def test_the_source_of_a_function_and_of_a_part_of_it() -> None:
    text, why = source(functools.partial(coin, y=torch.tensor(1.0)))
    assert text.startswith("def coin(y: torch.Tensor) -> None:\n    p = ")
    assert why == ""


def test_the_source_of_an_object_is_that_of_its_class() -> None:
    class Coin:
        def __call__(self) -> None:
            coin(torch.tensor(1.0))

    assert source(Coin())[0].startswith("class Coin:\n    def __call__")


@pytest.mark.parametrize("builtin", [print, eval("lambda: None")])
def test_what_has_no_source_says_so(builtin: Any) -> None:
    assert source(builtin) == ("", "Python has no source of it: it was not read from a file.")


def test_a_long_source_is_cut_off_and_that_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model, "MAX_SOURCE", 2)
    text, why = source(coin)
    assert len(text.splitlines()) == 2
    assert why == "The first 2 of 3 lines."


def test_sites_have_their_shapes_and_plates() -> None:
    rows = {row["name"]: row for row in site_rows(build("eight_schools"))}
    assert rows["mu"]["shape"] == "scalar"
    assert rows["theta"] == {
        "name": "theta", "kind": "deterministic", "distribution": "Delta", "shape": "8", "dims": "school", "support": ""
    }  # fmt: skip
    assert rows["y"]["kind"] == "observed"


def test_relations_are_those_of_the_model() -> None:
    found = relations(build("eight_schools"))
    assert set(found["edge_list"]) == {("mu", "theta"), ("tau", "theta"), ("theta_trans", "theta"), ("theta", "y")}
    assert found["plate_groups"]["school"] == ["theta_trans", "theta", "y"]


@DOT
@pytest.mark.parametrize("name", ["eight_schools", "gaussian_mixture", "linear_regression_simulated"])
def test_the_graph_has_every_site_inside_its_frame(name: str) -> None:
    problem = build(name)
    svg, why = graph(problem)
    assert why == ""
    root = ElementTree.fromstring(svg)
    text = [element.text for element in root.iter("text")]
    assert set(problem.sites) <= set(text)
    width = float(root.get("width", "0"))
    for ellipse in root.iter("ellipse"):
        x, a = float(ellipse.get("cx", "0")), float(ellipse.get("rx", "0"))
        assert 0 <= x - a <= x + a <= width


@DOT
def test_names_that_dot_would_read_as_its_own_are_drawn_as_they_are() -> None:
    svg, why = graph(comparisons.hostile().problem)
    assert why == ""
    text = [element.text for element in ElementTree.fromstring(svg).iter("text")]
    assert "y & z" in text
    assert any(str(one).startswith("<script>alert") for one in text)


def overlapping() -> None:
    a, b = pyro.plate("a", 2, dim=-1), pyro.plate("b", 3, dim=-2)
    with a:
        pyro.sample("x", dist.Normal(0.0, 1.0))
    with b:
        pyro.sample("y", dist.Normal(0.0, 1.0))
    with a, b:
        pyro.sample("z", dist.Normal(0.0, 1.0))


@DOT
def test_plates_that_overlap_are_drawn_or_the_reason_is_given() -> None:
    svg, why = graph(Problem(overlapping))
    assert bool(svg) != bool(why)


def test_a_graph_that_is_too_large_or_has_no_dot_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = Problem(coin, torch.tensor(1.0))
    monkeypatch.setattr(model.shutil, "which", lambda _: None)
    assert graph(problem) == ("", "It is not drawn: the program dot of Graphviz is not installed.")
    monkeypatch.setattr(model, "MAX_NODES", 1)
    assert graph(problem) == ("", "It is not drawn: 2 sites are too many for a picture.")


def test_a_model_that_cannot_be_traced_has_a_reason() -> None:
    problem = Problem(coin, torch.tensor(1.0))

    def broken(y: torch.Tensor) -> None:
        raise RuntimeError("not now")

    problem.model = broken
    svg, why = graph(problem)
    assert svg == ""
    assert "not now" in why or "dot of Graphviz is not installed" in why
