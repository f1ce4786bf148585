from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from pyro_vi_lab.checks import restarts
from pyro_vi_lab.errors import ArgumentError, DataError


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_restarts_at_one_optimum_agree() -> None:
    check = restarts(normal(4, 500, 6), normal(4, 500, seed=1), labels=list("abcdef"))
    assert [optimum.restarts for optimum in check.optima] == [(0, 1, 2, 3)]
    assert check.rhat < 1.02
    assert check.elbo_spread < 5 * check.elbo_spread_se
    assert not check.optima[0].is_worse
    assert "1 optima of 4 restarts" in repr(check)


def test_two_modes_are_told_apart_with_their_parameter() -> None:
    draws = normal(5, 400, 2)
    draws[1, :, 1] += 6
    draws[3, :, 1] += 6
    log_weights = normal(5, 400, seed=1)
    log_weights[[1, 3]] += 2
    check = restarts(draws, log_weights, labels=["mu", "tau"])
    assert [optimum.restarts for optimum in check.optima] == [(1, 3), (0, 2, 4)]
    worse = check.optima[1]
    assert worse.is_worse
    assert worse.farthest == "tau"
    assert worse.distance == pytest.approx(6, abs=0.5)
    assert worse.below_best == pytest.approx(2, abs=0.3)
    assert check.elbo_spread == pytest.approx(2, abs=0.4)
    assert (check.rhat > 1.5, check.rhat_parameter) == (True, "tau")


def test_optima_of_another_width_are_distinct() -> None:
    draws = normal(3, 500, 1)
    draws[2] *= 3
    check = restarts(draws, torch.zeros(3, 500))
    assert sorted(optimum.restarts for optimum in check.optima) == [(0, 1), (2,)]
    assert max(optimum.sd_ratio for optimum in check.optima) == pytest.approx(3, rel=0.2) or min(
        optimum.sd_ratio for optimum in check.optima
    ) == pytest.approx(1 / 3, rel=0.2)


def test_optima_whose_bounds_differ_by_noise_are_not_called_worse() -> None:
    worse = 0
    for seed in range(50):
        draws = normal(2, 100, 1, seed=seed)
        draws[1] += 9
        check = restarts(draws, normal(2, 100, seed=1000 + seed))
        assert len(check.optima) == 2
        worse += check.optima[1].is_worse
    # the better of the two is chosen by the data: twice the level of a test on one side
    assert worse <= 5 + 4 * math.sqrt(50 * 0.1 * 0.9)


def test_few_draws_do_not_make_optima_of_noise() -> None:
    split = sum(len(restarts(normal(4, 20, 10, seed=seed), torch.zeros(4, 20)).optima) > 1 for seed in range(20))
    assert split <= 4  # of probability 0.05 each: more have one of 0.003


def test_a_single_restart_has_nothing_to_agree_with() -> None:
    check = restarts(normal(1, 100, 2), normal(1, 100, seed=1))
    assert math.isnan(check.rhat)
    assert (check.elbo_spread, check.elbo_spread_se) == (0.0, 0.0)
    assert len(check.optima) == 1


def test_restarts_whose_bound_is_minus_infinity_are_worse() -> None:
    draws = normal(2, 100, 1)
    draws[1] += 9
    log_weights = torch.zeros(2, 100, dtype=torch.float64)
    log_weights[1, 4] = -math.inf
    check = restarts(draws, log_weights)
    assert check.optima[1].restarts == (1,)
    assert check.optima[1].is_worse
    assert check.optima[1].below_best == math.inf


def test_bad_input_is_told() -> None:
    with pytest.raises(ArgumentError, match=r"draws have shape \(2, 9\) and log weights \(2, 9\)"):
        restarts(normal(2, 9), normal(2, 9))
    with pytest.raises(DataError, match="at least 4 draws of each, got 3"):
        restarts(normal(2, 3, 1), normal(2, 3))
    with pytest.raises(ArgumentError, match="2 labels for 1 parameters"):
        restarts(normal(2, 9, 1), normal(2, 9), labels=["a", "b"])
    draws = normal(2, 9, 2)
    draws[1, 3, 0] = math.nan
    with pytest.raises(DataError, match="draws of a of restart 1 are not finite"):
        restarts(draws, normal(2, 9), labels=["a", "b"])
    with pytest.raises(DataError, match="log weights are NaN"):
        restarts(normal(2, 9, 1), torch.full((2, 9), math.nan))


def test_the_numbers_are_plain() -> None:
    found = restarts(normal(2, 9, 1), normal(2, 9)).to_dict()
    assert found["optima"][0]["restarts"] == (0, 1)
