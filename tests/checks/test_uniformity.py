from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from pyro_vi_lab.checks.uniformity import ecdf, ecdf_band, evaluation_points, tail_p_values, uniformity_p_values
from pyro_vi_lab.errors import ArgumentError, DataError

STANDARD_ERRORS = 5


@pytest.mark.parametrize("num_values", [20, 200])
@pytest.mark.parametrize("alpha", [0.05, 0.5])
def test_p_values_of_uniform_numbers_are_below_alpha_as_often_as_they_say(num_values: int, alpha: float) -> None:
    p = uniformity_p_values(np.random.default_rng(0).random((num_values, 4000)))
    share = (p <= alpha).mean()
    error = math.sqrt(alpha * (1 - alpha) / 4000)
    assert share <= alpha + STANDARD_ERRORS * error
    if num_values == 200:  # counts are whole numbers: the statistic of few of them has few values
        assert share >= 0.8 * alpha - STANDARD_ERRORS * error


def test_two_points_are_the_multinomial() -> None:
    """Counts of N = 10 at nine points; against all ways to put ten numbers into ten cells, by simulation of the cells."""
    rng = np.random.default_rng(1)
    counts = np.cumsum(rng.multinomial(10, np.full(10, 0.1), size=100_000), axis=1)[:, :9]
    points = evaluation_points(10)
    tails = np.minimum(
        2 * np.minimum(stats.binom.cdf(counts, 10, points), stats.binom.sf(counts - 1, 10, points)), 1
    ).min(1)
    gamma = np.array([0.02, 0.1, 0.3])
    expected = (tails[:, None] <= gamma).mean(0)
    error = np.sqrt(expected * (1 - expected) / len(counts))
    assert (np.abs(tail_p_values(gamma, 10) - expected) < STANDARD_ERRORS * error).all()


def test_leaving_the_band_is_a_small_p_value() -> None:
    values = np.random.default_rng(2).beta(1.0, 1.25, (150, 400))
    band = ecdf_band(150, 0.9)
    share = ecdf(values, band.points)
    outside = ((share < band.lower[:, None] - 1e-12) | (share > band.upper[:, None] + 1e-12)).any(0)
    assert 20 < outside.sum() < 380
    np.testing.assert_array_equal(outside, uniformity_p_values(values) <= 0.1)


def test_the_band_lies_between_that_of_one_point_and_that_of_bonferroni() -> None:
    band = ecdf_band(100)
    assert band.lower.shape == band.upper.shape == band.points.shape == (99,)
    middle = int(np.abs(band.points - 0.5).argmin())
    # wider than a band for a single point, narrower than one of Bonferroni
    single = stats.binom.ppf(0.975, 100, 0.5) / 100
    bonferroni = stats.binom.ppf(1 - 0.025 / 99, 100, 0.5) / 100
    assert single < band.upper[middle] <= bonferroni
    np.testing.assert_allclose(band.upper + band.lower[::-1], 1, atol=1e-12)  # symmetric


def test_gross_deviations_have_p_values_between_bounds() -> None:
    p = uniformity_p_values(np.full((300, 1), 0.5))
    assert 0 < p[0] < 1e-80


@pytest.mark.parametrize("bad", [np.nan, -0.1, 1.1])
def test_numbers_that_are_no_probabilities(bad: float) -> None:
    values = np.full((20, 2), 0.5)
    values[3, 1] = bad
    with pytest.raises(DataError, match="lie outside of it, or are not finite"):
        uniformity_p_values(values)


def test_too_few_numbers_and_levels() -> None:
    with pytest.raises(DataError, match="at least 10 numbers, got 9"):
        uniformity_p_values(np.full((9, 1), 0.5))
    with pytest.raises(ArgumentError, match=r"level is a probability between 0 and 1, got 1\.0"):
        ecdf_band(100, 1.0)
