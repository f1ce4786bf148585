from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

import pyro_vi_lab as vl
from pyro_vi_lab.errors import ArgumentError, FitError, LabWarning
from pyro_vi_lab.models import build
from pyro_vi_lab.simulated_fits import _fresh

Y = torch.zeros(4, dtype=torch.float64)
X = torch.tensor([1.0, 1.1, 0.9, 1.05], dtype=torch.float64)


def conjugate(y: Tensor) -> None:
    mean = pyro.sample("mean", dist.Normal(0.0, 2.0))
    with pyro.plate("row", len(y)):
        pyro.sample("y", dist.Normal(mean, 1.0), obs=y)


def collinear(x: Tensor, y: Tensor) -> None:
    """Intercept and slope of covariates far from zero: their posterior correlation is near -1."""
    a = pyro.sample("a", dist.Normal(0.0, 5.0))
    b = pyro.sample("b", dist.Normal(0.0, 5.0))
    with pyro.plate("row", len(y)):
        pyro.sample("y", dist.Normal(a + b * x, 0.5), obs=y)


def calibrate(model: Any, *data: Tensor, **options: Any) -> vl.Calibration:
    problem = model if isinstance(model, vl.Problem) else vl.Problem(model, *data)
    return vl.calibrate(problem, **{"num_simulations": 100, "num_draws": 99, "progress": False, **options})


@pytest.fixture(scope="module")
def right() -> vl.Calibration:
    return calibrate(conjugate, Y)


@pytest.fixture(scope="module")
def wrong() -> vl.Calibration:
    return calibrate(collinear, X, Y, guide="mean_field")


def test_exact_fits_raise_no_alarm(right: vl.Calibration) -> None:
    assert not right.alarm
    assert right.check.parameters == ("mean", "log density")
    assert right.statuses == {"converged": 100}
    assert right.ranks.shape == (100, 2)
    assert right.ranks.min() >= 0
    assert right.ranks.max() <= 99
    assert "nothing speaks against it in 2 parameters" in repr(right)


def test_mean_field_on_a_correlated_posterior_is_too_narrow(wrong: vl.Calibration) -> None:
    assert wrong.alarm
    table = wrong.table().set_index("parameter")
    for name in ("a", "b"):
        assert table.loc[name, "direction"] == "too narrow"
        assert table.loc[name, "coverage_95_upper"] < 0.95
        assert table.loc[name, "adjusted_p_value"] >= table.loc[name, "p_value"]
    assert "not calibrated in" in repr(wrong)
    assert "too narrow" in wrong._repr_html_()


def test_full_rank_on_the_same_posterior_is_exact() -> None:
    assert not calibrate(collinear, X, Y, seed=1).alarm


def test_false_alarms_are_as_rare_as_alpha_says() -> None:
    """Ten calibrations of exact fits at alpha = 0.05: more than three alarms come once in a thousand times."""
    problem = vl.Problem(conjugate, Y)
    alarms = [calibrate(problem, num_simulations=20, num_draws=39, seed=seed).alarm for seed in range(10)]
    assert sum(alarms) <= 3


@pytest.mark.slow
def test_false_alarms_and_alarms_of_full_size() -> None:
    """5 % ± 3 % of 200 calibrations of a right posterior alarm; all of mean-field on a correlated one do."""
    problem = vl.Problem(conjugate, Y)
    alarms = [vl.calibrate(problem, seed=seed, progress=False).alarm for seed in range(200)]
    assert 0.02 <= np.mean(alarms) <= 0.08
    problem = vl.Problem(collinear, X, Y)
    assert all(vl.calibrate(problem, "mean_field", seed=seed, progress=False).alarm for seed in range(50))


def test_same_seed_same_ranks(right: vl.Calibration) -> None:
    again, other = calibrate(conjugate, Y), calibrate(conjugate, Y, seed=1)
    np.testing.assert_array_equal(again.ranks, right.ranks)
    assert (other.ranks != right.ranks).any()


def test_eight_schools_in_one_batch() -> None:
    result = calibrate(build("eight_schools"), num_simulations=40)
    assert len(result.check.parameters) == 2 + 8 + 8 + 1
    assert result.statuses == {"converged": 40}


def test_own_quantities_are_ranked_and_see_the_data() -> None:
    def above(draws: Mapping[str, Tensor], data: Mapping[str, Tensor]) -> Tensor:
        return (draws["mean"] > data["y"].mean()).double()  # discrete: ties are broken at random

    result = calibrate(conjugate, Y, quantities={"above": above})
    assert result.check.parameters == ("mean", "log density", "above")
    assert not result.alarm
    with pytest.raises(ArgumentError, match=r"quantity 'flat' must give one number for each draw, a tensor \(1,\)"):
        calibrate(conjugate, Y, quantities={"flat": lambda draws, data: draws["mean"].mean()})


def test_constant_scalars_are_left_out() -> None:
    def model(y: Tensor) -> None:
        mean = pyro.sample("mean", dist.Normal(0.0, 2.0))
        pyro.deterministic("pair", torch.stack([mean, torch.ones_like(mean)]))
        pyro.sample("y", dist.Normal(mean, 1.0).expand([4]).to_event(1), obs=y)

    result = calibrate(model, Y, num_simulations=20)
    assert result.constant == ("pair[1]",)
    assert result.check.parameters == ("mean", "pair[0]", "log density")


def test_guides_of_other_kinds_one_by_one() -> None:
    with pytest.warns(LabWarning, match="the guide laplace is fitted to 20 data sets of conjugate one by one"):
        result = calibrate(conjugate, Y, guide="laplace", num_simulations=20)
    assert result.method == "laplace"
    assert not result.alarm


@pytest.mark.slow
def test_a_guide_of_ones_own_starts_anew_and_stays_untrained() -> None:
    guide = pyro.infer.autoguide.AutoNormal(conjugate)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", LabWarning)
        result = calibrate(conjugate, Y, guide=guide, num_simulations=10, num_draws=39)
    assert sum(result.statuses.values()) == 10
    assert guide.prototype_trace is None
    assert not list(pyro.get_param_store().keys())


def test_copies_of_an_autoguide_have_its_model_and_leave_it() -> None:
    guide = pyro.infer.autoguide.AutoGuideList(conjugate)
    guide.append(pyro.infer.autoguide.AutoNormal(conjugate))
    made = _fresh(guide)
    for one in (guide, made):
        for _ in range(2):
            assert set(one(Y)) == {"mean"}
    assert made[0] is not guide[0]
    names = [name for name, _ in made.named_parameters()]
    assert names == [name for name, _ in guide.named_parameters()]
    assert _fresh(conjugate) is conjugate
    assert _fresh("laplace") == "laplace"


def test_too_few_usable_simulations() -> None:
    def broken(draws: Mapping[str, Tensor], data: Mapping[str, Tensor]) -> Tensor:
        return torch.where(data["y"].mean() > 0, draws["mean"], torch.nan)

    result = calibrate(conjugate, Y, quantities={"broken": broken})
    missing = result.failures["a quantity is not a number"]
    assert 20 < missing < 80
    assert len(result.ranks) == 100 - missing
    assert f"{missing} of 100 missing: a quantity is not a number" in repr(result)
    with pytest.raises(
        FitError, match=r"of 12 simulations of conjugate can be used \(\d: a quantity is not a number\)"
    ):
        calibrate(conjugate, Y, num_simulations=12, num_draws=39, quantities={"broken": broken})


def test_plain_values_and_a_plot(wrong: vl.Calibration) -> None:
    found = json.loads(json.dumps(wrong.to_dict(), allow_nan=False))
    assert found["alarm"] is True
    assert [row["parameter"] for row in found["parameters"]] == ["a", "b", "log density"]
    axes = wrong.plot()
    assert len(axes.lines) == 3
    assert any("too narrow" in text.get_text() for text in axes.get_legend().get_texts())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_simulations": 9}, "num_simulations must be a whole number of at least 10, got 9"),
        ({"num_draws": 10}, "num_draws must be a whole number of at least 39, got 10"),
        ({"guide": "map"}, "the guide 'map' is a point: a fit of it has no draws to rank among"),
        ({"alpha": 2.0}, r"alpha is a probability between 0 and 1, got 2\.0"),
        ({"guide": "fullrank"}, "did you mean 'full_rank'"),
    ],
)
def test_arguments_that_make_no_sense(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        calibrate(conjugate, Y, **options)
