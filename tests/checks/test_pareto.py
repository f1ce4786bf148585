from __future__ import annotations

import json
import math

import pytest
import torch
from torch import Tensor

from pyro_vi_lab.checks import importance
from pyro_vi_lab.checks.pareto import convergence_rate, draws_needed
from pyro_vi_lab.errors import ArgumentError, DataError


def exponential(rate_p: float, *, num_draws: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """log p = Exponential(rate_p) and log q = Exponential(1) at draws of q: Pareto weights, k = 1 - rate."""
    generator = torch.Generator().manual_seed(seed)
    z = -torch.rand(num_draws, generator=generator, dtype=torch.float64).log()
    return math.log(rate_p) - rate_p * z, -z


def normal(shape: tuple[int, ...], *, scale: float, seed: int = 0) -> tuple[Tensor, Tensor]:
    """log p and log q, without constants, at draws of q = Normal(0, scale), p = Normal(0, 1)."""
    generator = torch.Generator().manual_seed(seed)
    eps = torch.randn(shape, generator=generator, dtype=torch.float64)
    return -0.5 * (scale * eps) ** 2, -0.5 * eps**2 - math.log(scale)


@pytest.mark.parametrize("k", [0.2, 0.5, 0.7, 0.9])
def test_khat_of_pareto_weights_is_their_shape(k: float) -> None:
    num_draws = 100_000
    tail = math.ceil(3 * math.sqrt(num_draws))
    khat = importance(*exponential(1 - k, num_draws=num_draws)).khat
    # ArviZ shrinks towards 0.5 as if by ten draws; (1 + k) / sqrt(tail) is the standard error of the shape
    # (Smith 1987, Annals of Statistics 15(3)).
    expected = (tail * k + 5) / (tail + 10)
    assert abs(khat - expected) < 5 * (1 + k) / math.sqrt(tail)


def test_ess_of_pareto_weights_is_the_closed_form() -> None:
    rate = 0.8  # E_q[w²] = rate² / (2 rate - 1); w has five moments
    fractions = torch.tensor(
        [importance(*exponential(rate, num_draws=10_000, seed=seed)).ess_fraction for seed in range(20)]
    )
    standard_error = fractions.std() / math.sqrt(len(fractions))
    assert abs(fractions.mean() - (2 * rate - 1) / rate**2) < 5 * standard_error


@pytest.mark.parametrize("rate", [1.5, 3.0])
def test_bounded_weights_have_a_negative_khat(rate: float) -> None:
    # p narrower than q: w is largest at z = 0 and falls linearly there, k = -1
    assert importance(*exponential(rate, num_draws=10_000)).khat < 0


def test_ess_is_that_of_the_smoothed_weights_which_sum_to_one() -> None:
    check = importance(*normal((4, 500), scale=0.8))
    weights = check.smoothed_log_weights.exp()
    assert weights.shape == (4, 500)
    assert float(weights.sum()) == pytest.approx(1.0, rel=1e-12)
    assert check.ess == pytest.approx(1 / float(weights.square().sum()), rel=1e-12)
    assert check.ess_fraction == check.ess / 2000


def test_smoothed_weights_average_as_the_target_does() -> None:
    log_p, log_q = normal((4, 5000), scale=0.9)
    check = importance(log_p, log_q)
    second_moment = (check.smoothed_log_weights.exp() * -2 * log_p).sum()
    # E_p[z²] = 1, var_p(z²) = 2; the weights cost the factor that the ESS says
    assert abs(float(second_moment) - 1) < 5 * math.sqrt(2 / check.ess)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("offset", [0.0, -12.5, 3e4])
def test_where_q_is_the_posterior_there_is_no_tail(dtype: torch.dtype, offset: float) -> None:
    log_q = torch.randn(4, 250, dtype=torch.float64).mul(3.0)
    log_p = (log_q + offset).to(dtype)
    check = importance(log_p, (log_p.double() - offset).to(dtype))  # equal up to rounding
    assert check.khat == -math.inf
    assert check.ess == 1000
    assert check.ess_fraction == 1.0
    assert torch.equal(check.smoothed_log_weights, torch.full((4, 250), -math.log(1000), dtype=torch.float64))


def test_a_small_difference_is_not_taken_for_none() -> None:
    log_p, log_q = normal((1000,), scale=1 - 1e-6)
    check = importance(log_p, log_q)
    assert math.isfinite(check.khat)
    assert check.ess_fraction == pytest.approx(1.0, abs=1e-9)


def test_constants_and_the_order_of_draws_do_not_matter() -> None:
    log_p, log_q = normal((4, 500), scale=0.7)
    first = importance(log_p, log_q)
    order = torch.randperm(2000)
    second = importance(log_p.flatten()[order] + 70.0, log_q.flatten()[order])
    assert second.khat == pytest.approx(first.khat, rel=1e-9)
    assert second.ess == pytest.approx(first.ess, rel=1e-9)
    torch.testing.assert_close(
        second.smoothed_log_weights, first.smoothed_log_weights.flatten()[order], rtol=1e-9, atol=0
    )


def test_restarts_are_pooled_as_one_sample() -> None:
    parts = [normal((500,), scale=scale, seed=seed) for seed, scale in enumerate([0.9, 0.8])]
    stacked = importance(torch.stack([p for p, _ in parts]), torch.stack([q for _, q in parts]))
    joined = importance(torch.cat([p for p, _ in parts]), torch.cat([q for _, q in parts]))
    assert (stacked.khat, stacked.ess) == (joined.khat, joined.ess)


def test_inputs_are_left_as_they_are() -> None:
    log_p, log_q = normal((100,), scale=0.7)
    before = log_p.clone(), log_q.clone()
    importance(log_p, log_q)
    assert torch.equal(log_p, before[0])
    assert torch.equal(log_q, before[1])


def test_a_single_draw_with_all_the_weight_is_seen() -> None:
    log_p, log_q = torch.zeros(100, dtype=torch.float64), torch.zeros(100, dtype=torch.float64)
    log_p[17] = 2000.0
    check = importance(log_p, log_q)
    assert check.khat == math.inf
    assert check.ess == pytest.approx(1.0)


def test_fewest_draws() -> None:
    log_p, log_q = normal((25,), scale=0.7)
    assert math.isfinite(importance(log_p, log_q).khat)
    with pytest.raises(DataError, match="at least 25 draws, got 24"):
        importance(log_p[1:], log_q[1:])


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_cannot_be_computed_are_counted(value: float) -> None:
    log_p, log_q = normal((2, 50), scale=0.7)
    log_p[1, 3] = log_p[1, 7] = value
    with pytest.raises(DataError, match=rf"2 of 100 log weights .* first \({value}: log p {value}, .*index \(1, 3\)"):
        importance(log_p, log_q)


def test_a_zero_density_of_the_guide_at_its_own_draw_is_an_error() -> None:
    log_p, log_q = normal((50,), scale=0.7)
    log_q[3] = log_p[3] = -math.inf
    with pytest.raises(DataError, match="1 of 50 log weights"):
        importance(log_p, log_q)


def test_draws_outside_of_the_support_have_weight_zero_and_are_counted() -> None:
    log_p, log_q = normal((4000,), scale=0.8)
    inside = importance(log_p, log_q)
    outside = torch.full((1000,), -math.inf, dtype=torch.float64)
    check = importance(torch.cat([log_p, outside]), torch.cat([log_q, torch.zeros(1000, dtype=torch.float64)]))
    assert check.support_mismatch == pytest.approx(0.2)
    assert "20.00% outside of the support" in repr(check)
    assert (check.khat, check.khat_interval) == (inside.khat, inside.khat_interval)
    assert check.ess == pytest.approx(inside.ess)
    assert check.log_mean_weight == pytest.approx(inside.log_mean_weight + math.log(0.8))
    assert bool((check.smoothed_log_weights[4000:] == -math.inf).all())
    assert int(check.resample(2000).max()) < 4000


def test_half_a_normal_is_a_mismatch_of_half_of_the_draws() -> None:
    log_p, log_q = torch.zeros(400, dtype=torch.float64), torch.zeros(400, dtype=torch.float64)
    log_p[::2] = -math.inf
    check = importance(log_p, log_q)
    assert (check.khat, check.support_mismatch, check.ess) == (-math.inf, 0.5, 200.0)


def test_too_few_draws_in_the_support_are_an_error() -> None:
    log_p, log_q = normal((500,), scale=0.8)
    log_p[20:] = -math.inf
    with pytest.raises(DataError, match="mismatch of support: the model's density is zero at 480 of 500 draws"):
        importance(log_p, log_q)


@pytest.mark.parametrize(("num_draws", "k"), [(1000, 0.2), (1000, 0.9), (10_000, 0.5)])
def test_the_interval_covers_the_shape(num_draws: int, k: float) -> None:
    repeats = 200
    khats = [importance(*exponential(1 - k, num_draws=num_draws, seed=seed)).khat_interval for seed in range(repeats)]
    covered = sum(low <= k <= high for low, high in khats) / repeats
    assert abs(covered - 0.95) < 0.03 + 1.5 * math.sqrt(0.95 * 0.05 / repeats)


def test_the_interval_narrows_with_more_draws() -> None:
    widths = [
        high - low
        for low, high in (importance(*exponential(0.5, num_draws=n)).khat_interval for n in (100, 1000, 10_000))
    ]
    assert widths == sorted(widths, reverse=True)


def test_draws_needed_and_rate_are_those_of_the_paper() -> None:
    check = importance(*exponential(0.5, num_draws=10_000))
    assert check.draws_needed == pytest.approx(10 ** (1 / (1 - check.khat)))  # eq. 11
    assert check.khat_threshold == 0.7  # 1 - 1/log10(10,000) is 0.75
    assert importance(*exponential(0.5, num_draws=100)).khat_threshold == 0.5
    assert convergence_rate(0.5 + 1e-9, 1000) == pytest.approx(convergence_rate(0.5 + 1e-5, 1000), rel=1e-4)
    rates = [convergence_rate(k, 10**8) for k in (-1.0, 0.3, 0.75, 0.999)]
    assert rates == pytest.approx([1.0, 1.0, 0.5, 0.0], abs=0.01)  # the limits, 2 (1 - k) above one half
    assert draws_needed(1.0) == math.inf


def test_the_mean_weight_is_the_evidence() -> None:
    estimates = []
    for seed in range(50):
        log_p, log_q = normal((2000,), scale=0.9, seed=seed)
        check = importance(log_p, log_q)
        estimates.append((check.log_mean_weight, math.sqrt(1 / check.ess - 1 / 2000)))
    errors = torch.tensor(estimates)  # log p lacks the constant of log q: both have none, so Z is 1
    assert float((errors[:, 0] / errors[:, 1]).abs().max()) < 5


def test_resampled_draws_are_from_the_target() -> None:
    generator = torch.Generator().manual_seed(4)
    z = torch.randn(20_000, generator=generator, dtype=torch.float64)
    check = importance(-0.5 * ((z - 0.5) / 0.8) ** 2, -0.5 * z**2)
    values = z[check.resample(20_000, seed=1)]
    assert abs(float(values.mean()) - 0.5) < 5 * 0.8 / math.sqrt(check.ess)
    assert abs(float(values.std()) - 0.8) < 5 * 0.8 / math.sqrt(2 * check.ess)


def test_resampling_takes_each_draw_as_often_as_its_weight_says() -> None:
    check = importance(*normal((500,), scale=0.7))
    index = check.resample(2000, seed=3)
    assert torch.equal(index, check.resample(2000, seed=3))
    counts = torch.bincount(index, minlength=500)
    expected = 2000 * check.smoothed_log_weights.exp()
    assert float((counts - expected).abs().max()) <= 1 + 1e-9  # systematic
    assert not torch.equal(index, index.sort().values)
    with pytest.raises(ArgumentError, match="num_draws must be a positive whole number, got 0"):
        check.resample(0)


def test_the_numbers_are_plain() -> None:
    check = importance(*normal((500,), scale=0.7))
    numbers = check.to_dict()
    assert numbers["khat"] == check.khat
    assert "smoothed_log_weights" not in numbers
    assert json.loads(json.dumps(numbers))["khat_interval"] == list(check.khat_interval)


def test_shapes_must_agree() -> None:
    with pytest.raises(ArgumentError, match=r"log_p has shape \(4, 100\) and log_q \(400,\)"):
        importance(torch.zeros(4, 100), torch.zeros(400))
