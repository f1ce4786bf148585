"""Moments and their errors, against closed forms and repeats."""

from __future__ import annotations

import math

import pytest
import torch

from pyro_vi_lab.checks.moments import (
    chain_coverage,
    chain_moments,
    closeness,
    independent_moments,
    weighted_closeness,
    weighted_coverage,
    weighted_moments,
)

REPEATS = 400


def normal(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def share_within_two(errors: torch.Tensor) -> float:
    """Share of standardized errors below two; 95.4 % if they are standard normal."""
    return float((errors.abs() < 2).double().mean())


BAND = 4 * math.sqrt(0.954 * 0.046 / REPEATS)


def test_errors_of_independent_draws() -> None:
    found = independent_moments(normal(1000, REPEATS, seed=0))
    assert share_within_two(found.mean / found.mean_se) == pytest.approx(0.954, abs=BAND)
    assert share_within_two(found.sd.log() / found.log_sd_se) == pytest.approx(0.954, abs=BAND)


def test_errors_of_weighted_draws() -> None:
    """Of a normal with standard deviation 1, from draws of one with 1.3."""
    x = 1.3 * normal(2000, REPEATS, seed=1)
    log_w = -0.5 * x.square() + 0.5 * (x / 1.3).square()
    each = [weighted_moments(x[:, [i]], log_w[:, i].softmax(0)) for i in range(REPEATS)]
    mean = torch.cat([one.mean / one.mean_se for one in each])
    sd = torch.cat([one.sd.log() / one.log_sd_se for one in each])
    assert share_within_two(mean) == pytest.approx(0.954, abs=BAND)
    assert share_within_two(sd) == pytest.approx(0.954, abs=BAND)


def test_errors_of_a_guide_against_its_own_weights() -> None:
    """They know that both come from the same draws."""
    x = 1.3 * normal(2000, REPEATS, seed=2)
    log_w = -0.5 * x.square() + 0.5 * (x / 1.3).square()
    each = [weighted_closeness(x[:, [i]], log_w[:, i].softmax(0)) for i in range(REPEATS)]
    ratio = torch.cat([(one.log_ratio - math.log(1.3)) / one.log_ratio_se for one in each])
    shift = torch.cat([one.shift / one.shift_se for one in each])
    assert share_within_two(ratio) == pytest.approx(0.954, abs=BAND)
    assert share_within_two(shift) == pytest.approx(0.954, abs=BAND)


def test_errors_of_chains_know_their_autocorrelation() -> None:
    """Autoregression with coefficient 0.8, started in its stationary distribution."""
    steps, noise = 40, normal(40, 64, REPEATS, seed=3)
    x = [noise[0]]
    for t in range(1, steps):
        x.append(0.8 * x[-1] + 0.6 * noise[t])
    found = chain_moments(torch.stack(x, 1))
    # 64 chains: the error itself is known to 1/sqrt(128), 9 %
    assert share_within_two(found.mean / found.mean_se) == pytest.approx(0.95, abs=BAND + 0.01)
    assert share_within_two(found.sd.log() / found.log_sd_se) == pytest.approx(0.95, abs=BAND + 0.02)


def test_closeness_is_in_units_of_the_truth() -> None:
    truth, guide = (
        independent_moments(normal(10_000, 1, seed=4)),
        independent_moments(2 * normal(10_000, 1, seed=5) + 3),
    )
    near = closeness(guide, truth)
    assert abs(float(near.shift) - 3) <= 5 * float(near.shift_se)
    assert abs(float(near.log_ratio) - math.log(2)) <= 5 * float(near.log_ratio_se)


def test_a_constant_has_no_error() -> None:
    found = independent_moments(torch.full((10, 1), 3.0).double())
    assert float(found.sd) == 0.0
    assert float(found.mean_se) < 1e-14
    assert float(found.log_sd_se) == 0.0


def test_coverage_of_a_narrow_guide() -> None:
    guide, truth = 0.5 * normal(20_000, 1, seed=6), normal(200, 100, 1, seed=7)
    for probability, quantile in ((0.9, 1.6449), (0.5, 0.6745)):
        found = chain_coverage(guide, truth, probability)
        expected = math.erf(0.5 * quantile / math.sqrt(2))
        assert abs(float(found.share) - expected) <= 5 * float(found.share_se) + 0.01
        assert float(found.share_se) == pytest.approx(math.sqrt(expected * (1 - expected) / 20_000), rel=0.3)


def test_coverage_by_weights() -> None:
    x = 1.3 * normal(20_000, 1, seed=8)
    weights = (-0.5 * x.square() + 0.5 * (x / 1.3).square())[:, 0].softmax(0)
    found = weighted_coverage(x, weights, 0.5)
    assert abs(float(found.share) - math.erf(1.3 * 0.6745 / math.sqrt(2))) <= 5 * float(found.share_se) + 0.01
    assert float(weighted_coverage(x, torch.full_like(weights, 1 / len(x)), 0.9).share) == pytest.approx(0.9, abs=1e-3)
