from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats

from pyro_vi_lab.checks import check_ranks, holm, ranks_of
from pyro_vi_lab.checks.calibration import coverage_of, direction_of, symmetry_p_values
from pyro_vi_lab.errors import ArgumentError, DataError

STANDARD_ERRORS = 5
S = 99
Array = NDArray[np.float64]


def ranks(*, shift: float = 0.0, scale: float = 1.0, num_simulations: int = 300, num_parameters: int = 1) -> Array:
    """Ranks of standard normal parameters among draws of N(shift, scale²)."""
    rng = np.random.default_rng(0)
    truth = rng.normal(size=(num_simulations, num_parameters))
    return ranks_of(truth, shift + scale * rng.normal(size=(num_simulations, S, num_parameters)))


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"scale": 0.6}, "too narrow"),
        ({"scale": 1.6}, "too wide"),
        ({"shift": 0.5}, "shifted up"),
        ({"shift": -0.5}, "shifted down"),
        ({"shift": 0.8, "scale": 0.5}, "too narrow, shifted up"),
    ],
    ids=str,
)
def test_what_is_wrong_is_found_and_named(wrong: dict[str, float], words: str) -> None:
    check = check_ranks(ranks(**wrong), S, parameters=["x"])
    assert check.alarm
    assert check.direction == (words,)


def test_right_fits_raise_no_alarm_more_often_than_alpha() -> None:
    """200 checks of five parameters each: Holm's adjustment holds for all together."""
    rng = np.random.default_rng(3)
    alarms = [
        check_ranks(rng.integers(0, S + 1, (30, 5)), S, parameters=list("abcde"), alpha=0.1, seed=i).alarm
        for i in range(200)
    ]
    assert np.mean(alarms) < 0.1 + STANDARD_ERRORS * math.sqrt(0.1 * 0.9 / 200)
    assert np.mean(alarms) > 0.01


def test_ranks_count_and_ties_are_broken_evenly() -> None:
    truth, draws = np.array([[1.0, 2.0]]), np.array([[[0.0, 2.0], [2.0, 2.0], [0.5, 2.0]]])
    assert ranks_of(truth, draws)[0, 0] == 2
    found = np.array([ranks_of(truth, draws, seed=seed)[0, 1] for seed in range(4000)])
    counts = np.bincount(found, minlength=4)
    assert len(counts) == 4
    assert stats.chisquare(counts).pvalue > 1e-6


def test_a_discrete_parameter_with_right_fits_is_uniform() -> None:
    rng = np.random.default_rng(4)
    found = ranks_of(rng.integers(0, 3, (4000, 1)).astype(float), rng.integers(0, 3, (4000, 7, 1)).astype(float))
    assert stats.chisquare(np.bincount(found[:, 0], minlength=8)).pvalue > 1e-6


def test_coverage_is_the_share_inside_and_its_interval_wilsons() -> None:
    fractions = (np.arange(1000) + 0.5)[:, None] / 1000
    for level in (0.5, 0.8, 0.95):
        found = coverage_of(fractions, level)
        assert found.value[0] == pytest.approx(level, abs=1e-3)
        inside = round(float(found.value[0]) * 1000)
        exact = stats.binomtest(inside, 1000).proportion_ci(method="wilson")
        assert (found.lower[0], found.upper[0]) == pytest.approx((exact.low, exact.high), abs=1e-12)


def test_symmetry_is_the_count_of_all_signs() -> None:
    """The p-value, against all 2^10 ways to reflect ten numbers."""
    values = np.array([0.9, 0.83, 0.74, 0.41, 0.66, 0.95, 0.58, 0.7, 0.3, 0.88])
    order = np.argsort(-np.abs(values - 0.5))

    def distance(signs: Array) -> float:
        return float(np.abs(np.cumsum(signs[order])).max())

    observed = distance(np.sign(values - 0.5))
    every = [distance(np.array(signs)) for signs in itertools.product([-1, 1], repeat=10)]
    assert symmetry_p_values(values[:, None])[0] == pytest.approx(np.mean(np.array(every) >= observed), abs=1e-12)


def test_symmetry_sees_a_shift_and_no_spread() -> None:
    narrow, shifted = (check_ranks(ranks(**wrong), S, parameters=["x"]) for wrong in ({"scale": 0.5}, {"shift": 0.5}))
    assert narrow.symmetry_p_value[0] > 0.01
    assert shifted.symmetry_p_value[0] < 1e-6


def test_holm_of_the_textbook() -> None:
    np.testing.assert_allclose(holm(np.array([0.01, 0.04, 0.03, 0.005])), [0.03, 0.06, 0.06, 0.02])
    assert holm(np.array([0.9, 0.8])).max() == 1


def test_a_distribution_with_right_mean_and_spread_has_another_shape() -> None:
    fractions = np.concatenate([np.full(100, stats.norm.cdf(-1)), np.full(100, stats.norm.cdf(1))])
    assert direction_of(fractions) == "of another shape"


def test_bad_input() -> None:
    good = np.zeros((20, 2), int)
    with pytest.raises(ArgumentError, match=r"ranks have shape \(20, 2\); expected \(simulations, 1\)"):
        check_ranks(good, S, parameters=["x"])
    with pytest.raises(DataError, match=r"ranks among 99 draws lie in 0, ..., 99; got 0 to 100"):
        check_ranks(good + np.array([0, 100]), S, parameters=["x", "y"])
    with pytest.raises(ArgumentError, match="alpha is a probability between 0 and 1, got 0"):
        check_ranks(good, S, parameters=["x", "y"], alpha=0)
