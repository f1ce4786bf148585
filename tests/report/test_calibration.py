from __future__ import annotations

import re

import numpy as np
import pytest

from pyro_vi_lab.calibration import Calibration
from pyro_vi_lab.checks.calibration import check_ranks
from pyro_vi_lab.errors import ArgumentError
from pyro_vi_lab.models import build
from pyro_vi_lab.problem import Problem
from pyro_vi_lab.report import figures, render
from tests import comparisons
from tests.report.test_page import words

RNG = np.random.default_rng(0)
EVEN = RNG.integers(0, 100, size=(200, 2))
NARROW = np.stack([EVEN[:, 0], np.where(EVEN[:, 1] < 50, EVEN[:, 1] // 3, 99 - (99 - EVEN[:, 1]) // 3)], 1)


def calibration(problem: Problem, ranks: np.ndarray) -> Calibration:
    check = check_ranks(ranks, 99, parameters=["<b>one</b>", "two"])
    return Calibration(
        problem=problem,
        method="mean_field",
        check=check,
        ranks=ranks,
        num_draws=99,
        num_simulations=200,
        statuses={"converged": 200},
        failures={},
        constant=(),
        seconds=0.0,
        seed=0,
    )


def test_a_calibration_is_shown_with_its_band_and_in_words() -> None:
    comparison = comparisons.regression()
    text = render(comparison, calibrations={"mean_field": calibration(comparison.problem, NARROW)})
    assert 'href="#calibration"' in text
    shown = words(text)
    assert "too narrow" in shown
    assert "<b>one</b>" in shown
    assert "<b>" not in text


def test_what_leaves_the_band_is_colored_and_named() -> None:
    problem = comparisons.regression().problem
    good = figures.ranks("a", calibration(problem, EVEN).check, place=1)
    bad = figures.ranks("a", calibration(problem, NARROW).check, place=1)
    assert len(re.findall('class="thin c1"', good)) == 0
    assert len(re.findall('class="thin c1"', bad)) == 1
    assert ": 0 outside" in good
    assert ": 1 outside (two)" in bad


def test_without_a_calibration_there_is_no_section() -> None:
    assert 'id="calibration"' not in comparisons.regression().report()


def test_a_calibration_of_something_else_is_refused() -> None:
    comparison = comparisons.regression()
    with pytest.raises(ArgumentError, match=r"calibration of 'flow'; the candidates are mean_field, full_rank"):
        render(comparison, calibrations={"flow": calibration(comparison.problem, EVEN)})
    other = calibration(build("eight_schools"), EVEN)
    with pytest.raises(ArgumentError, match="is of the problem eight_schools"):
        render(comparison, calibrations={"mean_field": other})
