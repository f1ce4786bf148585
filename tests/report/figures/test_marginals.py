from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from pyro_vi_lab.report.figures.marginals import density, marginal


@pytest.mark.parametrize("sample", ["normal", "exponential", "uniform"])
def test_the_density_is_one_up_to_the_error_of_a_kernel_estimate(sample: str) -> None:
    distribution = {"normal": stats.norm(3, 2), "exponential": stats.expon(0, 2), "uniform": stats.uniform(1, 4)}[
        sample
    ]
    draws = distribution.rvs(size=20_000, random_state=np.random.default_rng(1))
    grid = np.linspace(draws.min(), draws.max(), 400)
    estimate = density(draws, grid)
    # It integrates to one: the trapezoid rule on 400 points is good to a hundredth.
    assert abs(np.trapezoid(estimate, grid) - 1) < 0.01
    # Reflection loses nothing at a bounded end: half the height there would be an error of 0.5.
    inside = (grid > distribution.ppf(0.001)) & (grid < distribution.ppf(0.9))
    assert np.abs(estimate[inside] / distribution.pdf(grid[inside]) - 1).max() < 0.25
    assert density(draws, np.array([draws.min() - 1, draws.max() + 1])).tolist() == [0, 0]


def test_heavy_tails_do_not_hide_the_middle() -> None:
    draws = np.random.default_rng(2).standard_cauchy(5000)
    # The density of a Cauchy at 0 is 1/pi; Silverman's bandwidth at this size blurs it by about a tenth.
    assert density(draws, np.array([0.0]))[0] == pytest.approx(1 / np.pi, rel=0.2)


def test_a_candidate_that_does_not_move_is_an_upright_line() -> None:
    draws = np.random.default_rng(0).normal(size=500)
    svg = marginal("mu", draws, {"a": np.zeros(100)}, order=["a"])
    line = svg.split('class="line c0 d0" d="M')[1].split('"')[0]
    assert line.split(" ")[0] == line.split("L")[1].split(" ")[0]
