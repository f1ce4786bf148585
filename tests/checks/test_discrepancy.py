from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from pyro_vi_lab import arviz_bridge
from pyro_vi_lab.checks import Discrepancy, discrepancy
from pyro_vi_lab.errors import DataError
from pyro_vi_lab.posterior import Posterior

Sampler = Callable[..., Tensor]
EPS = torch.finfo(torch.float64).eps


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def exponential(*shape: int, seed: int) -> Tensor:
    return -torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).log()


def autoregressive(*shape: int, seed: int) -> Tensor:
    """Stationary standard normal chains with a correlation of 0.7 between neighbors."""
    noise = normal(*shape, seed=seed)
    draws = [noise[:, 0]]
    for s in range(1, shape[1]):
        draws.append(0.7 * draws[-1] + math.sqrt(1 - 0.7**2) * noise[:, s])
    return torch.stack(draws, 1)


def one(reference: Tensor, approximation: Tensor) -> Discrepancy:
    return discrepancy(Posterior({"x": reference}), Posterior({"x": approximation}))


# --- known answers --------------------------------------------------------------------------------


def test_a_shift_is_exact() -> None:
    draws = normal(4, 500, 3, seed=0) * torch.tensor([0.1, 1.0, 50.0]) + 7
    result = one(draws, draws - 0.5 * draws.flatten(0, 1).std(0))
    np.testing.assert_allclose(result.mean_shift, -0.5, rtol=1e4 * EPS)
    np.testing.assert_allclose(result.sd_ratio, 1.0, rtol=1e4 * EPS)
    np.testing.assert_allclose(result.wasserstein, 0.5, rtol=1e4 * EPS)


def test_a_stretch_is_exact() -> None:
    draws = exponential(4, 500, seed=0)
    result = one(draws, draws.mean() + 3 * (draws - draws.mean()))
    np.testing.assert_allclose(result.mean_shift, 0.0, atol=1e4 * EPS)
    np.testing.assert_allclose(result.sd_ratio, 3.0, rtol=1e4 * EPS)
    distance = 2 * (draws - draws.mean()).abs().mean() / draws.std()
    np.testing.assert_allclose(result.wasserstein, distance, rtol=1e4 * EPS)


def test_moments_are_those_of_the_posteriors() -> None:
    reference, approximation = (
        Posterior({"x": normal(2, 50, 3, seed=0)}),
        Posterior({"x": normal(1, 70, 3, seed=1) * 2}),
    )
    result = discrepancy(reference, approximation)
    np.testing.assert_allclose(result.reference_mean, reference.mean()["x"], rtol=1e4 * EPS)
    np.testing.assert_allclose(result.reference_sd, reference.sd()["x"], rtol=1e4 * EPS)
    np.testing.assert_allclose(result.mean, approximation.mean()["x"], rtol=1e4 * EPS)
    np.testing.assert_allclose(result.sd, approximation.sd()["x"], rtol=1e4 * EPS)


def test_two_normals_within_the_monte_carlo_error_of_the_truth() -> None:
    result = one(normal(4, 1000, 50, seed=0), 0.3 + 0.5 * normal(1, 1000, 50, seed=1))
    assert np.all(np.abs(result.mean_shift - 0.3) < 5 * result.mean_shift_mcse)
    assert np.all(np.abs(result.sd_ratio - 0.5) < 5 * result.sd_ratio_mcse)


# --- the errors mean what they say ----------------------------------------------------------------

# Each of the 200 columns is a comparison of its own. Where the errors are right, the sum of the squared
# deviations in standard errors is chi-squared with 200 degrees of freedom, whose standard deviation is 20.
PAIRS: dict[str, tuple[Sampler, float, float]] = {
    "the same normal": (normal, 0.0, 1.0),
    "a normal, far off and narrow": (normal, 2.0, 0.3),
    "the same skewed distribution": (exponential, 0.0, 1.0),
    "skewed, shifted up": (exponential, 1.0, 1.0),
    "skewed, shifted down and wide": (exponential, -1.0, 2.0),
    "the same, correlated chains": (autoregressive, 0.0, 1.0),
    "correlated chains, shifted": (autoregressive, 1.0, 1.0),
}


@pytest.fixture(scope="module", params=PAIRS)
def comparisons(request: pytest.FixtureRequest) -> tuple[Discrepancy, float, float]:
    sampler, shift, ratio = PAIRS[request.param]
    other = normal if sampler is autoregressive else sampler
    reference, draws = sampler(4, 1000, 200, seed=2), other(1, 1000, 200, seed=3)
    center = 1.0 if sampler is exponential else 0.0
    return one(reference, center + shift + ratio * (draws - center)), shift, ratio


def test_deviations_stay_within_five_standard_errors(comparisons: tuple[Discrepancy, float, float]) -> None:
    result, shift, ratio = comparisons
    assert np.all(np.abs(result.mean_shift - shift) < 5 * result.mean_shift_mcse)
    assert np.all(np.abs(result.sd_ratio - ratio) < 5 * result.sd_ratio_mcse)


def test_squared_deviations_are_as_large_as_the_errors_say(
    comparisons: tuple[Discrepancy, float, float],
) -> None:
    result, shift, ratio = comparisons
    for z in (
        (result.mean_shift - shift) / result.mean_shift_mcse,
        (result.sd_ratio - ratio) / result.sd_ratio_mcse,
    ):
        assert abs(np.sum(z**2) - 200) < 5 * 20


@pytest.mark.parametrize("name", [name for name, (_, shift, ratio) in PAIRS.items() if (shift, ratio) == (0.0, 1.0)])
@pytest.mark.parametrize("num_draws", [200, 1000, 8000])
def test_the_noise_is_the_mean_distance_of_equal_distributions(name: str, num_draws: int) -> None:
    sampler = PAIRS[name][0]
    other = normal if sampler is autoregressive else sampler
    result = one(sampler(4, 1000, 200, seed=4), other(1, num_draws, 200, seed=5))
    difference = result.wasserstein - result.wasserstein_noise
    assert abs(difference.mean()) < 5 * difference.std(ddof=1) / math.sqrt(200)


def test_an_approximation_without_spread() -> None:
    result = one(normal(4, 500, seed=0), torch.full((1, 100), 0.25, dtype=torch.float64))
    assert result.sd_ratio == [0.0]
    assert result.sd_ratio_mcse == [0.0]
    assert abs(result.mean_shift[0] - 0.25) < 5 * result.mean_shift_mcse[0]
    assert np.all(np.isfinite(result.wasserstein_noise))


# --- what does not matter -------------------------------------------------------------------------


def test_units_do_not_matter() -> None:
    x, y = exponential(4, 250, seed=0), exponential(1, 300, seed=1) * 1.5
    first, second = one(x, y), one(1e3 * x - 4e3, 1e3 * y - 4e3)
    for key in (
        "mean_shift",
        "mean_shift_mcse",
        "sd_ratio",
        "sd_ratio_mcse",
        "wasserstein",
        "wasserstein_noise",
    ):
        np.testing.assert_allclose(getattr(second, key), getattr(first, key), rtol=1e-9)


def test_the_order_of_chains_and_of_independent_draws_does_not_matter() -> None:
    x, y = normal(4, 250, 2, seed=0), normal(2, 300, 2, seed=1)
    order = torch.randperm(300, generator=torch.Generator().manual_seed(2))
    first, second = one(x, y), one(x[[2, 0, 3, 1]], y[:, order])
    for key in ("mean", "sd", "mean_shift", "sd_ratio", "wasserstein"):
        np.testing.assert_allclose(getattr(second, key), getattr(first, key), rtol=1e-9)


def test_the_order_of_sites_does_not_matter() -> None:
    draws = {name: normal(2, 100, 2, seed=i) for i, name in enumerate("abc")}
    reference = Posterior(draws)
    first = discrepancy(reference, Posterior({name: normal(1, 90, 2, seed=9) for name in "abc"}))
    second = discrepancy(reference, Posterior({name: normal(1, 90, 2, seed=9) for name in "cab"}))
    assert first.parameters == second.parameters == ("a[0]", "a[1]", "b[0]", "b[1]", "c[0]", "c[1]")
    np.testing.assert_array_equal(first.mean_shift, second.mean_shift)


def test_a_posterior_does_not_differ_from_itself() -> None:
    draws = normal(4, 100, 2, seed=0)
    result = one(draws, draws)
    assert not np.any(result.mean_shift)
    assert not np.any(result.wasserstein)
    np.testing.assert_array_equal(result.sd_ratio, 1.0)


# --- names, sites, constants ----------------------------------------------------------------------


def test_the_summary_names_the_worst() -> None:
    scale, shift = torch.tensor([[1.0, 0.2], [1.0, 3.0]]), torch.tensor([[0.0, 0.1], [-4.0, 0.0]])
    x = normal(4, 500, 2, 2, seed=0)
    reference = Posterior({"w": x, "mu": normal(4, 500, seed=1)})
    result = discrepancy(reference, Posterior({"mu": normal(4, 500, seed=2), "w": x * scale + shift}))
    summary = result.summary()
    assert summary.worst_mean_parameter == "w[1, 0]"
    assert summary.max_mean_shift == abs(result.mean_shift[2])
    assert (summary.min_sd_parameter, summary.max_sd_parameter) == ("w[0, 1]", "w[1, 1]")
    assert (summary.min_sd_ratio, summary.max_sd_ratio) == (result.sd_ratio[1], result.sd_ratio[3])
    assert result.parameters == ("w[0, 0]", "w[0, 1]", "w[1, 0]", "w[1, 1]", "mu")


def test_only_common_sites_are_compared() -> None:
    reference = Posterior({"a": normal(2, 50, seed=0), "b": normal(2, 50, seed=1)})
    result = discrepancy(reference, Posterior({"b": normal(1, 50, seed=2), "c": normal(1, 50, seed=3)}))
    assert result.parameters == ("b",)
    assert result.missing == ("a", "c")


def test_no_common_site_is_an_error() -> None:
    with pytest.raises(DataError, match="no site in common: the reference has a; the approximation b, c"):
        discrepancy(
            Posterior({"a": normal(1, 9, seed=0)}),
            Posterior({"b": normal(1, 9, seed=0), "c": normal(1, 9, seed=0)}),
        )


def test_shapes_that_would_broadcast_are_an_error() -> None:
    reference = Posterior({"mu": normal(2, 50, seed=0), "theta": normal(2, 50, 3, seed=0), "b": normal(2, 50, seed=0)})
    approximation = Posterior(
        {"mu": normal(1, 50, 1, seed=0), "theta": normal(1, 50, 1, seed=0), "b": normal(1, 50, seed=0)}
    )
    with pytest.raises(DataError) as caught:
        discrepancy(reference, approximation)
    assert "'mu' has () in the reference and (1,) in the approximation" in str(caught.value)
    assert "'theta' has (3,) in the reference and (1,) in the approximation" in str(caught.value)
    assert "'b'" not in str(caught.value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_fixed_entries_of_a_cholesky_factor_are_left_out(dtype: torch.dtype) -> None:
    def factors(num_chains: int, seed: int) -> Tensor:
        rho = normal(num_chains, 100, seed=seed).tanh().to(dtype)
        corner = 1 + torch.finfo(dtype).eps * torch.randint(-1, 2, rho.shape)  # one, up to rounding
        rows = [
            torch.stack([corner.to(dtype), torch.zeros_like(rho)], -1),
            torch.stack([rho, (1 - rho**2).sqrt()], -1),
        ]
        return torch.stack(rows, -2)

    result = one(factors(4, 0), factors(1, 1))
    assert result.parameters == ("x[1, 0]", "x[1, 1]")
    assert result.constant == ("x[0, 0]", "x[0, 1]")


def test_a_site_of_constants_beside_others() -> None:
    ones = torch.ones(2, 50, 2, dtype=torch.float64)
    reference = Posterior({"ones": ones, "mu": normal(2, 50, seed=0), "none": torch.zeros(2, 50, 0)})
    result = discrepancy(
        reference, Posterior({"ones": ones[:1], "mu": normal(1, 50, seed=1), "none": torch.zeros(1, 50, 0)})
    )
    assert result.parameters == ("mu",)
    assert result.constant == ("ones[0]", "ones[1]")
    with pytest.raises(DataError, match=r"nothing to compare: every scalar of the common sites \(ones\) is a constant"):
        discrepancy(Posterior({"ones": ones}), Posterior({"ones": ones}))


@pytest.mark.parametrize("other", [normal(1, 50, 2, seed=0), torch.full((1, 50, 2), 3.5, dtype=torch.float64)])
def test_a_reference_that_does_not_move_is_an_error(other: Tensor) -> None:
    with pytest.raises(DataError, match=r"all reference draws of x\[0\] are 3, while those of the approximation"):
        one(torch.full((2, 50, 2), 3.0, dtype=torch.float64), other)


def test_whole_numbers_and_single_precision_are_compared_in_float64() -> None:
    counts = torch.randint(0, 10, (4, 500), generator=torch.Generator().manual_seed(0))
    result = one(counts, counts.float() + 1)
    np.testing.assert_allclose(result.mean_shift, 1 / counts.double().std(), rtol=1e4 * EPS)


def test_draws_that_are_not_finite_are_named() -> None:
    bad = normal(2, 50, 3, seed=0)
    bad[1, 7, 2] = bad[1, 8, 2] = math.nan
    with pytest.raises(
        DataError,
        match=r"2 draws of site 'x' of the approximation are not finite, .* x\[2\] at chain 1, draw 7",
    ):
        one(normal(2, 50, 3, seed=1), bad)


def test_too_few_draws() -> None:
    with pytest.raises(
        DataError, match="the approximation has 3 draws per chain; a Monte Carlo error needs at least 4"
    ):
        one(normal(2, 50, seed=0), normal(40, 3, seed=0))


# --- the Monte Carlo error it rests on --------------------------------------------------------------


def test_mcse_of_independent_draws_is_sd_over_root_n() -> None:
    draws = normal(4, 1000, 200, seed=6).numpy()
    z = draws.mean((0, 1)) / arviz_bridge.mcse(draws)
    assert abs(np.sum(z**2) - 200) < 5 * 20


def test_mcse_of_an_autoregression_is_the_closed_form_and_of_a_constant_zero() -> None:
    draws = autoregressive(4, 1000, 200, seed=7).numpy()
    draws[..., 0] = 5.0
    errors = arviz_bridge.mcse(draws)
    assert errors.shape == (200,)
    assert errors[0] == 0
    z = draws[..., 1:].mean((0, 1)) / errors[1:]
    assert abs(np.sum(z**2) - 199) < 5 * math.sqrt(2 * 199)
    exact = math.sqrt((1 + 0.7) / (1 - 0.7) / 4000)
    relative = errors[1:] / exact - 1
    assert abs(relative.mean()) < 5 * relative.std(ddof=1) / math.sqrt(199) + 1 / 1000  # bias of order 1/S
