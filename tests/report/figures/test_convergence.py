from __future__ import annotations

import re

import numpy as np

from pyro_vi_lab.report.figures.convergence import convergence


def test_histories_that_are_not_finite_are_drawn_as_far_as_they_go() -> None:
    histories = {
        "down": (np.arange(3), np.array([10.0, -1e30, -np.inf])),
        "up": (np.arange(3), np.array([np.nan, 1e300, np.inf])),
        "restarts": (np.arange(2), np.array([[5.0, 6.0], [1.0, 2.0]])),
    }
    svg = convergence(histories, 1.0, order=list(histories), unit="step")
    assert "restarts from 5.00 to 1.00 in 1 steps" in svg
    assert len(re.findall(r'class="line c2', svg)) == 2
    assert not re.search(r"nan|inf", svg)


def test_fits_of_very_different_length_share_a_logarithmic_clock() -> None:
    curve = np.array([3.0, 1.0])
    short_and_long = {"a": (np.array([0.01, 0.1]), curve), "b": (np.array([1.0, 100.0]), curve)}
    assert ">100</text>" in convergence(short_and_long, 1.0, order=["a", "b"], unit="seconds")
    alike = {"a": (np.array([0.0, 2.0]), curve), "b": (np.array([0.0, 4.0]), curve)}
    svg = convergence(alike, 1.0, order=["a", "b"], unit="seconds")
    assert ">0</text>" in svg
    assert "in 4.00 seconds" in svg


def test_a_fit_without_a_step_is_a_point() -> None:
    svg = convergence({"a": (np.zeros(1), np.array([2.0]))}, 2.0, order=["a"], unit="seconds")
    assert "a from 2.00 to 2.00" in svg
