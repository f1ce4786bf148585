from __future__ import annotations

import re
from xml.etree import ElementTree

import matplotlib
import numpy as np
import pytest
from scipy import stats

from pyro_vi_lab.report import figures
from pyro_vi_lab.report.svg import drawing, to_svg
from tests import comparisons

RNG = np.random.default_rng(0)
DRAWS = {"mu": RNG.normal(size=2000), "tau": RNG.exponential(size=2000)}


def parsed(svg: str) -> ElementTree.Element:
    """The figure as strict XML."""
    return ElementTree.fromstring(svg)


def forest(labels: dict[str, str] | None = None) -> str:
    candidates = {"b": {name: 2 * draws + 1 for name, draws in DRAWS.items()}}
    return figures.forest(DRAWS, candidates, labels or {}, order=["a", "b"], size=(760, 11), name="forest-wide")


def everything() -> dict[str, str]:
    history = np.linspace(100.0, 3.0, 30)
    return {
        "forest": forest(),
        "marginal": figures.marginal("mu", DRAWS["mu"], {"b": DRAWS["tau"]}, order=["a", "b"], name="marginal-0"),
        "convergence": figures.convergence(
            {"a": history, "b": history}, 3.0, size=(360, 12), name="convergence-narrow"
        ),
        "swatch": figures.swatch(1),
    }


@pytest.mark.parametrize("name", everything())
def test_a_figure_follows_the_page(name: str) -> None:
    svg = everything()[name]
    root = parsed(svg)
    assert root.get("aria-hidden") == "true" or (root.get("role") == "img" and root.get("aria-label"))
    assert root.get("viewBox")
    assert "var(--c1)" in svg
    assert not re.search(r"#[0-9a-fA-F]{6}", svg), "a color of its own, which would not turn dark"
    assert "font-family" not in svg
    assert "http" not in svg
    ids = {element.get("id") for element in root.iter()} - {None}
    wanted = set(re.findall(r"(?:url\(#|href=\"#)([\w.-]+)", svg))
    assert wanted <= ids


def test_the_same_numbers_give_the_same_text() -> None:
    assert everything() == everything()


def test_names_are_text_and_nothing_else() -> None:
    with drawing(100, 20) as figure:
        figure.text(0, 0.5, "$x_1$ <b>&</b> 模型")
        svg = to_svg(figure, "one", 'a "quoted" <label>')
    root = parsed(svg)
    assert root.get("aria-label") == 'a "quoted" <label>'
    assert "$x_1$ <b>&</b> 模型" in "".join(root.itertext())


def test_settings_of_matplotlib_are_left_alone() -> None:
    before = dict(matplotlib.rcParams)
    everything()
    assert dict(matplotlib.rcParams) == before


def test_the_forest_names_every_parameter_with_its_label() -> None:
    text = "".join(parsed(forest({"mu": "overall"})).itertext())
    assert "overall  mu" in text
    assert "tau" in text


def test_far_candidates_stay_inside_the_forest() -> None:
    candidates = {"a": {name: draws * 1e6 + 1e9 for name, draws in DRAWS.items()}}
    svg = figures.forest(DRAWS, candidates, {}, order=["a"], size=(760, 11), name="forest-wide")
    numbers = [float(x) for path in re.findall(r' d="([^"]*)"', svg) for x in re.findall(r"-?\d+\.?\d*", path)]
    assert max(numbers) <= 760


def test_long_names_are_shortened() -> None:
    long = "a_very_long_name_of_a_parameter_indeed[123]"
    svg = figures.forest({long: DRAWS["mu"]}, {}, {}, order=[], size=(360, 12), name="forest-narrow")
    text = "".join(parsed(svg).itertext())
    assert long not in text
    assert "a_very_long_name…deed[123]" in text


@pytest.mark.parametrize("sample", ["normal", "exponential", "uniform"])
def test_the_density_is_one_up_to_the_error_of_a_kernel_estimate(sample: str) -> None:
    distribution = {"normal": stats.norm(3, 2), "exponential": stats.expon(0, 2), "uniform": stats.uniform(1, 4)}[
        sample
    ]
    draws = distribution.rvs(size=20_000, random_state=np.random.default_rng(1))
    grid = np.linspace(draws.min(), draws.max(), 400)
    estimate = figures.density(draws, grid)
    # It integrates to one: the trapezoid rule on 400 points is good to a hundredth.
    assert abs(np.trapezoid(estimate, grid) - 1) < 0.01
    # Reflection loses nothing at a bounded end: half the height there would be an error of 0.5.
    inside = (grid > distribution.ppf(0.001)) & (grid < distribution.ppf(0.9))
    assert np.abs(estimate[inside] / distribution.pdf(grid[inside]) - 1).max() < 0.25
    assert figures.density(draws, np.array([draws.min() - 1, draws.max() + 1])).tolist() == [0, 0]


def test_heavy_tails_do_not_hide_the_middle() -> None:
    draws = np.random.default_rng(2).standard_cauchy(5000)
    # The density of a Cauchy at 0 is 1/pi; Silverman's bandwidth at this size blurs it by about a tenth.
    assert figures.density(draws, np.array([0.0]))[0] == pytest.approx(1 / np.pi, rel=0.2)


def test_a_candidate_that_does_not_move_is_a_line() -> None:
    svg = figures.marginal("mu", DRAWS["mu"], {"a": np.zeros(100)}, order=["a"], name="marginal-0")
    assert "var(--c0)" in svg


def test_histories_that_are_not_finite_are_drawn_as_far_as_they_go() -> None:
    histories = {
        "down": np.array([10.0, -1e30, -np.inf]),
        "up": np.array([np.nan, 1e300, np.inf]),
        "restarts": np.array([[5.0, 6.0], [1.0, 2.0]]),
    }
    root = parsed(figures.convergence(histories, 1.0, size=(760, 11), name="convergence-wide"))
    assert "restarts from 5.00 to 1.00 in 1 steps" in str(root.get("aria-label"))


def test_scalars_are_found_by_name_and_in_order() -> None:
    posterior = comparisons.regression().posteriors["full_rank"]
    found = figures.scalars(posterior, ["beta[2]", "intercept", "not there"])
    assert list(found) == ["beta[2]", "intercept"]
    np.testing.assert_array_equal(found["beta[2]"], posterior.draws["beta"][..., 2].flatten().numpy())
