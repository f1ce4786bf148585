from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from pyro_vi_lab.checks import Whitening, stein
from pyro_vi_lab.checks.stein import stein_kernel
from pyro_vi_lab.errors import ArgumentError, DataError


def normal(num_draws: int, dim: int, seed: int = 0) -> Tensor:
    return torch.randn(num_draws, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def chain(num_draws: int, correlation: float, seed: int) -> Tensor:
    """A stationary autoregression whose marginal is standard normal, ``(S, 1)``."""
    noise = normal(num_draws, 1, seed)
    values = [noise[0]]
    for i in range(1, num_draws):
        values.append(correlation * values[-1] + math.sqrt(1 - correlation**2) * noise[i])
    return torch.stack(values)


def test_the_kernel_is_its_definition() -> None:
    z, length = normal(5, 3), 1.7

    def score(x: Tensor) -> Tensor:
        return -x.pow(3) + 0.3 * x.flip(-1)

    def k(x: Tensor, y: Tensor) -> Tensor:
        return (1 + (x - y).square().sum() / length**2) ** -0.5

    kernel = stein_kernel(z, score(z), length)
    for i, j in [(0, 0), (0, 1), (3, 2)]:
        x, y = z[i].clone().requires_grad_(), z[j].clone().requires_grad_()
        by_x, by_y = torch.autograd.grad(k(x, y), (x, y), create_graph=True)
        both = sum(torch.autograd.grad(by_x[d], y, retain_graph=True)[0][d] for d in range(3))
        expected = score(x) @ score(y) * k(x, y) + score(x) @ by_y + score(y) @ by_x + both
        torch.testing.assert_close(kernel[i, j], expected.detach(), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dim", [1, 10])
def test_draws_of_the_density_itself_are_rejected_as_often_as_the_level_says(dim: int) -> None:
    repeats, level = 200, 0.05
    p_values = []
    for seed in range(repeats):
        z = normal(100, dim, seed)
        p_values.append(stein(z, -z, num_bootstraps=200, seed=seed).p_value)
    rejected = sum(p <= level for p in p_values)
    assert abs(rejected - repeats * level) < 4 * math.sqrt(repeats * level * (1 - level))
    # and at all levels
    below = sum(p <= 0.5 for p in p_values)
    assert abs(below - repeats / 2) < 4 * math.sqrt(repeats / 4)


def test_a_heavy_tailed_density_too() -> None:
    repeats, level, df = 200, 0.05, 3.0
    rejected = 0
    for seed in range(repeats):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            z = torch.distributions.StudentT(torch.tensor(df, dtype=torch.float64)).sample((100, 1))
        rejected += stein(z, -(df + 1) * z / (df + z**2), num_bootstraps=200, seed=seed).p_value <= level
    assert abs(rejected - repeats * level) < 4 * math.sqrt(repeats * level * (1 - level))


@pytest.mark.parametrize("wrong", ["mean", "narrow", "wide", "correlation"])
def test_draws_of_another_density_are_seen(wrong: str) -> None:
    z = normal(500, 2)
    if wrong == "mean":
        scores = -(z - 0.4)
    elif wrong == "narrow":
        scores = -z / 0.7**2
    elif wrong == "wide":
        scores = -z / 1.4**2
    else:
        scores = -z @ torch.linalg.inv(torch.tensor([[1.0, 0.6], [0.6, 1.0]], dtype=torch.float64))
    check = stein(z, scores)
    assert check.p_value < 0.01
    assert check.ksd2 > 3 * check.ksd2_se


def test_of_the_density_itself_the_discrepancy_is_zero_within_its_error() -> None:
    found = [stein(normal(200, 3, seed), -normal(200, 3, seed), seed=seed) for seed in range(100)]
    scores = torch.tensor([check.ksd2 / check.ksd2_se for check in found])
    assert abs(float(scores.mean())) < 5 / math.sqrt(len(found))


def test_the_standard_error_is_that_of_repeats_where_draws_are_wrong() -> None:
    found = [stein(z := normal(200, 1, seed), -(z - 0.7), num_bootstraps=20) for seed in range(100)]
    values = torch.tensor([check.ksd2 for check in found])
    stated = torch.tensor([check.ksd2_se for check in found]).mean()
    # the standard deviation of 100 values is known to 7 %; the median distance adds a little
    assert float(stated) == pytest.approx(float(values.std()), rel=0.3)


def test_in_the_coordinates_of_the_guide_units_do_not_matter() -> None:
    z = normal(300, 2)
    scores = -(z - 0.2)
    plain = stein(z, scores)
    loc, scale = (
        torch.tensor([5.0, -1.0], dtype=torch.float64),
        torch.tensor([[1e3, 0.0], [2.0, 1e-3]], dtype=torch.float64),
    )
    moved = loc + z @ scale.T
    whitened = stein(moved, scores @ torch.linalg.inv(scale), whitening=Whitening(loc, scale))
    assert whitened.ksd2 == pytest.approx(plain.ksd2, rel=1e-6)
    assert whitened.p_value == plain.p_value
    units = torch.tensor([1e3, 1e-3], dtype=torch.float64)
    diagonal = stein(loc + z * units, scores / units, whitening=Whitening(loc, units))
    assert diagonal.ksd2 == pytest.approx(plain.ksd2, rel=1e-6)


def test_draws_of_a_chain_are_not_rejected_when_their_correlation_is_told() -> None:
    repeats, level = 100, 0.05
    told = plain = 0
    for seed in range(repeats):
        z = chain(200, 0.7, seed)
        told += stein(z, -z, flip_probability=0.1, num_bootstraps=200, seed=seed).p_value <= level
        plain += stein(z, -z, num_bootstraps=200, seed=seed).p_value <= level
    assert told <= repeats * level + 4 * math.sqrt(repeats * level * (1 - level))
    assert plain > told


def test_many_draws_are_thinned() -> None:
    z = normal(5000, 1)
    assert stein(z, -z).num_draws == 1667


def test_bad_input_is_told() -> None:
    z = normal(50, 2)
    with pytest.raises(ArgumentError, match=r"draws have shape \(50, 2\) and scores \(50,\)"):
        stein(z, z[:, 0])
    with pytest.raises(DataError, match="at least 4 draws, got 3"):
        stein(z[:3], z[:3])
    scores = -z
    scores[7, 1] = -math.inf
    with pytest.raises(DataError, match="1 of 50 scores are not finite, the first is number 7"):
        stein(z, scores)
    with pytest.raises(DataError, match="more than half of the draws are equal"):
        stein(torch.zeros(50, 2), torch.zeros(50, 2))
    with pytest.raises(ArgumentError, match="flip_probability"):
        stein(z, -z, flip_probability=0.9)
    with pytest.raises(ArgumentError, match="num_bootstraps"):
        stein(z, -z, num_bootstraps=3)


def test_the_numbers_are_plain() -> None:
    z = normal(50, 2)
    assert stein(z, -z).to_dict().keys() == {"ksd2", "ksd2_se", "p_value", "num_draws", "length_scale"}
