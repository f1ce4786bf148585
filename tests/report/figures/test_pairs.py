from __future__ import annotations

import numpy as np
import pytest

from pyro_vi_lab.report.figures.pairs import MASSES, Shape, correlation, pair

RNG = np.random.default_rng(0)
ROOT = np.array([[2.0, 0.0], [1.5, 0.5]])
NORMAL = RNG.normal(size=(4000, 2)) @ ROOT.T + [3.0, -1.0]


def share_inside(outline: np.ndarray, points: np.ndarray) -> float:
    """Share of points inside a closed line, by the number of its edges to the right of each."""
    a, b = outline, np.roll(outline, -1, axis=0)
    x, y = points[:, :1], points[:, 1:]
    crosses = (a[:, 1] > y) != (b[:, 1] > y)
    with np.errstate(divide="ignore", invalid="ignore"):
        where = a[:, 0] + (y - a[:, 1]) / (b[:, 1] - a[:, 1]) * (b[:, 0] - a[:, 0])
    return float((np.sum(crosses & (where > x), axis=1) % 2).mean())


@pytest.mark.parametrize("draws", [NORMAL, RNG.standard_t(4, size=(4000, 2)) @ ROOT.T], ids=["normal", "student"])
def test_ellipses_hold_their_share(draws: np.ndarray) -> None:
    for outline, mass in zip(Shape.ellipses(draws).outlines, MASSES, strict=True):
        # 73 corners: the polygon lacks 0.13% of the ellipse's area
        assert share_inside(outline, draws) == pytest.approx(mass, abs=0.005)


def test_contours_of_a_normal_hold_their_share() -> None:
    shape = Shape.contours(NORMAL)
    assert len(shape.outlines) >= 2
    largest = max(shape.outlines, key=len)
    # a kernel estimate is a little wider than what it estimates
    assert share_inside(largest, NORMAL) == pytest.approx(0.9, abs=0.05)


def test_contours_follow_two_modes() -> None:
    far = np.concatenate([NORMAL, NORMAL + 40.0])
    outlines = Shape.contours(far).outlines
    assert len(outlines) >= 4
    assert not any(share_inside(outline, np.array([[23.0, 19.0]])) for outline in outlines)


def test_coordinates_that_are_one_line_have_an_ellipse_without_width() -> None:
    draws = np.stack([NORMAL[:, 0], 2 * NORMAL[:, 0]], 1)
    shape = Shape.ellipses(draws)
    assert shape.correlation == pytest.approx(1.0)
    for outline in shape.outlines:
        np.testing.assert_allclose(outline[:, 1], 2 * outline[:, 0], atol=1e-6)


def test_a_coordinate_that_does_not_move_has_no_correlation() -> None:
    assert np.isnan(correlation(np.stack([np.ones(5), np.arange(5.0)], 1)))


def test_the_correlations_are_told_to_those_who_do_not_see() -> None:
    svg = pair(("x", "y"), NORMAL, {"a": Shape.ellipses(NORMAL)}, order=["a"])
    assert "correlations: reference 0.95, a 0.95" in svg


def test_a_candidate_outside_is_named() -> None:
    near = pair(("x", "y"), NORMAL, {"a": Shape.ellipses(NORMAL + 20.0)}, order=["a"])
    assert "not in the picture" not in near
    far = pair(("x", "y"), NORMAL, {"a": Shape.ellipses(NORMAL + 1e4)}, order=["a"])
    assert "not in the picture: a" in far
