from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.distributions import Distribution, Normal, StudentT

from pyro_vi_lab.checks import error_bounds
from pyro_vi_lab.errors import ArgumentError, DataError


def number(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


def normal(loc: float, scale: float) -> Normal:
    return Normal(number(loc), number(scale))


def draws(q: Distribution, shape: tuple[int, ...], seed: int) -> Tensor:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return q.sample(shape)


def chi2_of_normals(loc: float, scale: float) -> float:
    """χ² of Normal(loc, scale) from the standard normal."""
    v = scale**2
    if v >= 2:
        return math.inf
    return math.exp(loc**2 / (2 - v)) / (scale * math.sqrt(2 - v)) - 1


PAIRS = [(0.0, 1.0), (0.01, 1.0), (0.1, 1.0), (0.3, 1.0), (0.0, 0.9), (0.0, 0.7), (0.0, 1.05), (0.2, 0.8), (0.5, 1.1)]


@pytest.mark.parametrize(("loc", "scale"), PAIRS)
@pytest.mark.parametrize("num_draws", [500, 5000])
def test_bounds_are_above_the_true_errors_of_normals(loc: float, scale: float, num_draws: int) -> None:
    p, q = normal(loc, scale), normal(0.0, 1.0)
    for seed in range(10):
        z = draws(q, (num_draws, 1), seed)
        bounds = error_bounds(z, p.log_prob(z[:, 0]) - 7.0, q.log_prob(z[:, 0]))
        assert bounds.mean_error[0] >= abs(loc) - 1e-12
        assert bounds.sd_error[0] >= abs(scale - 1) - 1e-12
        assert bounds.wasserstein_2 >= math.hypot(loc, scale - 1) - 1e-12
        assert bounds.wasserstein_1 >= abs(loc) - 1e-12


@pytest.mark.parametrize(("loc", "scale"), [(0.1, 1.0), (0.0, 0.7), (0.0, 1.1), (0.5, 1.0)])
def test_the_limit_of_the_divergence_is_above_its_closed_form_and_near_to_it(loc: float, scale: float) -> None:
    p, q, truth = normal(loc, scale), normal(0.0, 1.0), chi2_of_normals(loc, scale)
    found = []
    for seed in range(40):
        z = draws(q, (5000,), seed)
        found.append(error_bounds(z[:, None], p.log_prob(z), q.log_prob(z)).chi2_upper)
    # a probability of 0.033 of one below leaves five or more of 40 at one in a hundred
    assert sum(upper < truth for upper in found) <= 5
    assert np.median(found) < 2.5 * truth


def test_a_small_shift_is_bounded_by_little_more_than_itself() -> None:
    p, q = normal(0.1, 1.0), normal(0.0, 1.0)
    z = draws(q, (10_000, 1), 0)
    bounds = error_bounds(z, p.log_prob(z[:, 0]), q.log_prob(z[:, 0]), labels=["mu"])
    assert bounds.mean_error[0] < 0.12
    assert bounds.parameters == ("mu",)
    assert "of itself for mu, the worst of 1" in repr(bounds)


def test_the_exact_posterior_has_no_error() -> None:
    z = draws(normal(0.0, 1.0), (100, 2), 0)
    log_q = normal(0.0, 1.0).log_prob(z).sum(1)
    bounds = error_bounds(z, log_q - 3.0, log_q)
    assert (bounds.chi2_upper, bounds.wasserstein_2) == (0.0, 0.0)
    assert bounds.mean_error.tolist() == [0.0, 0.0]


@pytest.mark.parametrize("df", [3.0, 5.0])
def test_a_posterior_with_heavier_tails_has_no_bound(df: float) -> None:
    p, q = StudentT(number(df)), normal(0.0, 1.0)
    for seed in range(10):
        z = draws(q, (2000, 1), seed)
        bounds = error_bounds(z, p.log_prob(z[:, 0]), q.log_prob(z[:, 0]))
        # the weights have no second moment; a bound that is finite all the same is above the truth
        assert bounds.sd_error[0] >= math.sqrt(df / (df - 2)) - 1
        if not math.isfinite(bounds.chi2_upper):
            assert "k-hat may be" in bounds.reason
            assert bounds.khat_high >= 0.5


@pytest.mark.parametrize(("loc", "scale"), [(0.0, 1.0), (0.2, 1.0), (0.0, 1.3), (-0.4, 0.8)])
def test_bounds_hold_for_a_guide_with_heavy_tails(loc: float, scale: float) -> None:
    p, q = normal(loc, scale), StudentT(number(6.0))
    for seed in range(10):
        z = draws(q, (3000, 1), seed)
        bounds = error_bounds(z, p.log_prob(z[:, 0]), q.log_prob(z[:, 0]), num_moments=6.0)
        assert bounds.mean_error[0] >= abs(loc)
        assert bounds.sd_error[0] >= abs(scale - math.sqrt(6 / 4))


def test_moments_that_the_guide_lacks_have_no_bound() -> None:
    p, q = normal(0.0, 1.0), StudentT(number(3.0))
    z = draws(q, (3000, 1), 0)
    bounds = error_bounds(z, p.log_prob(z[:, 0]), q.log_prob(z[:, 0]), num_moments=3.0)
    assert math.isfinite(bounds.mean_error[0])
    assert bounds.sd_error[0] == math.inf
    assert "3 moments" in bounds.reason


def test_the_bounds_scale_with_the_units() -> None:
    p, q = normal(0.2, 0.9), normal(0.0, 1.0)
    z = draws(q, (2000, 2), 0)
    log_p, log_q = p.log_prob(z).sum(1), q.log_prob(z).sum(1)
    units = torch.tensor([1.0, 1000.0], dtype=torch.float64)
    plain, moved = error_bounds(z, log_p, log_q), error_bounds(3.0 + z * units, log_p, log_q)
    np.testing.assert_allclose(moved.mean_error, plain.mean_error * [1, 1000], rtol=1e-9)
    np.testing.assert_allclose(moved.sd_error, plain.sd_error * [1, 1000], rtol=1e-9)


def test_bad_input_is_told() -> None:
    z = draws(normal(0.0, 1.0), (100, 2), 0)
    log = torch.zeros(100, dtype=torch.float64)
    with pytest.raises(ArgumentError, match=r"draws have shape \(100,\) and log densities \(100,\)"):
        error_bounds(z[:, 0], log, log)
    with pytest.raises(ArgumentError, match="1 labels for 2 parameters"):
        error_bounds(z, log, log, labels=["a"])
    with pytest.raises(ArgumentError, match="confidence must lie"):
        error_bounds(z, log, log, confidence=1.0)
    z[3, 1] = math.nan
    with pytest.raises(DataError, match="draws of b are not finite"):
        error_bounds(z, log, log, labels=["a", "b"])


def test_the_numbers_are_plain() -> None:
    z = draws(normal(0.0, 1.0), (100, 2), 0)
    log_q = normal(0.0, 1.0).log_prob(z).sum(1)
    assert json.loads(json.dumps(error_bounds(z, 0.8 * log_q, log_q).to_dict()))["parameters"] == ["[0]", "[1]"]
