from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from pyro_vi_lab.checks import (
    against_reference,
    classifier_test,
    compare_predictions,
    correlation_error,
    interval_coverage,
    leave_one_out,
    sliced_wasserstein,
)
from pyro_vi_lab.errors import ArgumentError, DataError
from pyro_vi_lab.posterior import Posterior

STANDARD_ERRORS = 5
TRIL = torch.tensor([[1.0, 0.0, 0.0], [0.9, 0.4, 0.0], [-0.5, 0.0, 2.0]], dtype=torch.float64)
SDS = TRIL.square().sum(-1).sqrt()
RHO = (TRIL @ TRIL.T) / (SDS[:, None] * SDS)


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def posterior(draws: Tensor) -> Posterior:
    return Posterior({"x": draws})


REFERENCE = posterior(normal(4, 1000, 3, seed=0) @ TRIL.T)
RIGHT = posterior(normal(1, 2000, 3, seed=1) @ TRIL.T)
MEAN_FIELD = posterior(normal(1, 2000, 3, seed=1) * SDS)
"""The same marginals, without the correlations."""


# --- correlations -----------------------------------------------------------------------------------


def test_correlations_that_are_missing_are_found() -> None:
    result = correlation_error(REFERENCE, MEAN_FIELD)
    assert result.largest_pair == ("x[0]", "x[1]")
    assert abs(result.largest - float(RHO[0, 1])) < STANDARD_ERRORS * result.largest_se
    assert result.largest > 5 * result.noise
    np.testing.assert_allclose(result.difference, torch.eye(3) - RHO, atol=STANDARD_ERRORS / math.sqrt(2000))


def test_the_noise_of_correlations_is_that_of_a_right_approximation() -> None:
    """Both are the largest of three noisy numbers, from as many draws: means of 40 repeats agree."""
    pairs = []
    for seed in range(40):
        result = correlation_error(
            posterior(normal(4, 100, 3, seed=100 + seed)), posterior(normal(1, 200, 3, seed=seed))
        )
        pairs.append((result.root_mean_square, result.root_mean_square_noise))
    apart = np.array(pairs) @ [1, -1]
    assert abs(apart.mean()) < STANDARD_ERRORS * apart.std(ddof=1) / math.sqrt(40)


def test_the_error_of_a_correlation_is_that_of_the_textbook() -> None:
    """Of independent normal draws the standard error is (1 - rho²) / sqrt(n), of each of the two sets."""
    errors = [
        correlation_error(
            posterior(normal(2, 500, 2, seed=seed)), posterior(normal(1, 1000, 2, seed=50 + seed))
        ).largest_se
        for seed in range(40)
    ]
    expected = math.sqrt(1 / 1000 + 1 / 500)  # a half of the reference has 500 draws, and so has what is beside it
    assert 0.7 * expected < np.mean(errors) < 1.3 * expected


# --- joint distributions ------------------------------------------------------------------------------


def test_sliced_distance_of_a_shift_is_the_mean_of_its_projections() -> None:
    """White draws moved by a vector d are |u·d| apart along u; of uniform directions in three dimensions |d|/2."""
    x = normal(4, 1000, 3, seed=2)
    result = sliced_wasserstein(posterior(x), posterior(x + torch.tensor([2.0, 0.0, 0.0])), num_directions=400)
    assert abs(result.value - 1.0) < STANDARD_ERRORS * (result.se + 2 / math.sqrt(12 * 400))


def test_sliced_distance_sees_correlations_and_not_units() -> None:
    wrong, right = sliced_wasserstein(REFERENCE, MEAN_FIELD), sliced_wasserstein(REFERENCE, RIGHT)
    assert wrong.value > wrong.noise + STANDARD_ERRORS * wrong.se
    assert right.value < right.noise + STANDARD_ERRORS * right.se
    scaled = [posterior(one.draws["x"] * torch.tensor([1e6, 1.0, 1e-6])) for one in (REFERENCE, MEAN_FIELD)]
    assert sliced_wasserstein(scaled[0], scaled[1]).value == pytest.approx(wrong.value, rel=0.2)


def test_scalars_that_depend_on_each_other() -> None:
    def simplex(draws: Tensor) -> Posterior:
        return posterior(torch.softmax(draws, -1))

    x, y = simplex(normal(2, 500, 3, seed=3)), simplex(normal(1, 500, 3, seed=4))
    assert sliced_wasserstein(x, y).value < 0.3
    assert classifier_test(x, y).p_value > 1e-6


def test_a_classifier_tells_what_bayes_rule_tells() -> None:
    """Two normals two sds apart are told with probability Φ(1)."""
    x, y = normal(4, 500, 2, seed=5), normal(1, 1000, 2, seed=6) + torch.tensor([2.0, 0.0])
    result = classifier_test(posterior(x), posterior(y))
    assert abs(result.accuracy - 0.8413) < STANDARD_ERRORS * result.se
    assert result.p_value < 1e-6


@pytest.mark.parametrize("kind", ["correlation", "skewness", "funnel"])
def test_a_classifier_sees(kind: str) -> None:
    x, y = normal(4, 500, 2, seed=7), normal(1, 1000, 2, seed=8)
    if kind == "correlation":
        x = torch.stack([x[..., 0], 0.9 * x[..., 0] + 0.436 * x[..., 1]], -1)
    elif kind == "skewness":
        x = -torch.special.log_ndtr(x) - 1  # exponential, with the mean and the variance of y
    else:
        x = torch.stack([x[..., 0], x[..., 1] * (x[..., 0] - 1).exp()], -1)
        y = y * x.flatten(0, 1).std(0)
    assert classifier_test(posterior(x), posterior(y)).p_value < 1e-6


def test_a_classifier_does_not_see_what_is_not_there() -> None:
    """P-values of right approximations are not small more often than they say."""
    p = [
        classifier_test(posterior(normal(2, 200, 3, seed=seed)), posterior(normal(1, 200, 3, seed=60 + seed))).p_value
        for seed in range(30)
    ]
    share = np.mean(np.array(p) < 0.1)
    assert share <= 0.1 + STANDARD_ERRORS * math.sqrt(0.1 * 0.9 / 30)


# --- intervals ------------------------------------------------------------------------------------------


def test_coverage_of_a_narrow_normal_is_known() -> None:
    result = interval_coverage(REFERENCE, posterior(RIGHT.draws["x"] / 2))
    covered = result.levels[0.95]
    expected = math.erf(1.96 / 2 / math.sqrt(2))
    # the error of the quantiles grows with the density of the reference there, which is twice as wide
    assert (np.abs(covered.value - expected) < 2 * STANDARD_ERRORS * covered.se).all()
    right = interval_coverage(REFERENCE, RIGHT)
    for level, one in right.levels.items():
        assert (np.abs(one.value - level) < STANDARD_ERRORS * one.se).all()
        assert (one.noise < STANDARD_ERRORS * 0.02).all()


def test_levels_and_draws_that_do_not_suffice() -> None:
    with pytest.raises(ArgumentError, match="levels are probabilities between 0 and 1, got 95"):
        interval_coverage(REFERENCE, RIGHT, levels=(95,))
    with pytest.raises(DataError, match=r"intervals of 99.9 % need at least 1999"):
        interval_coverage(REFERENCE, posterior(normal(1, 500, 3, seed=0)), levels=(0.999,))


# --- predictions ------------------------------------------------------------------------------------------


Y = torch.linspace(-2, 2, 12, dtype=torch.float64)


def log_likelihood(mean: Tensor) -> dict[str, Tensor]:
    return {"y": torch.distributions.Normal(mean.unsqueeze(-1), 1.0).log_prob(Y)}


def posterior_of_mean(num_chains: int, num_draws: int, seed: int) -> Tensor:
    """Of the mean of unit normals with a flat prior."""
    return Y.mean() + normal(num_chains, num_draws, seed=seed) / math.sqrt(len(Y))


def exact_elpd() -> Tensor:
    """Log density of each row given the others: normal around their mean."""
    others = (Y.sum() - Y) / (len(Y) - 1)
    return torch.distributions.Normal(others, math.sqrt(1 + 1 / (len(Y) - 1))).log_prob(Y)


def test_leave_one_out_is_the_closed_form() -> None:
    found = [leave_one_out(log_likelihood(posterior_of_mean(1, 2000, seed))).pointwise for seed in range(10)]
    mean, error = np.mean(found, 0), np.std(found, 0, ddof=1) / math.sqrt(10)
    assert (np.abs(mean - exact_elpd().numpy()) < STANDARD_ERRORS * error + 1e-4).all()


def test_leave_one_out_is_arvizs() -> None:
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        arviz = pytest.importorskip("arviz")
    if not hasattr(arviz, "from_dict") or arviz.__version__.startswith("1"):
        pytest.skip("ArviZ 1 has another interface")
    values = log_likelihood(posterior_of_mean(4, 250, 0))
    data = arviz.from_dict(posterior={"x": np.zeros((4, 250))}, log_likelihood={"y": values["y"].numpy()})
    expected = arviz.loo(data, pointwise=True, reff=1.0)
    result = leave_one_out(values)
    np.testing.assert_allclose(result.pointwise, expected.loo_i.values, rtol=1e-9)
    assert result.elpd == pytest.approx(expected.elpd_loo)
    assert result.se == pytest.approx(math.sqrt(len(Y)) * result.pointwise.std(ddof=1))
    assert result.effective_parameters == pytest.approx(expected.p_loo)


def test_difference_of_predictions() -> None:
    reference = log_likelihood(posterior_of_mean(4, 500, 1))
    same = compare_predictions(reference, log_likelihood(posterior_of_mean(1, 1000, 2)))
    assert abs(same.difference) < 0.1
    assert same.noise < 0.1
    off = compare_predictions(reference, log_likelihood(posterior_of_mean(1, 1000, 2) + 1.0))
    # rows given a mean that is one too high: (y - m)² grows by 1 - 2 (y - m), summed over the rows
    assert off.difference == pytest.approx(-len(Y) / 2, abs=1.0)
    assert off.se > 0.5
    assert off.difference < -off.se - off.noise
    assert off.num_unreliable == 0


def test_log_likelihoods_that_do_not_fit() -> None:
    good = log_likelihood(posterior_of_mean(2, 100, 0))
    with pytest.raises(DataError, match="different sites: the reference's of y, the approximation's of z"):
        compare_predictions(good, {"z": good["y"]})
    with pytest.raises(DataError, match=r"site 'y' has rows \(12,\) in the reference and \(11,\)"):
        compare_predictions(good, {"y": good["y"][..., 1:]})
    with pytest.raises(DataError, match="too few draws: 20 of the approximation; at least 50"):
        compare_predictions(good, {"y": good["y"][:, :10]})
    bad = good["y"].clone()
    bad[1, 3, 5] = -math.inf
    with pytest.raises(DataError, match=r"1 log likelihoods of site 'y' .* \(-inf\) of row 5 at draw 103"):
        leave_one_out({"y": bad})
    with pytest.raises(DataError, match="at least one row"):
        leave_one_out({})


# --- all together -----------------------------------------------------------------------------------------


def test_all_measures_with_their_noise() -> None:
    values = (log_likelihood(posterior_of_mean(4, 500, 1)), log_likelihood(posterior_of_mean(1, 500, 2)))
    comparison = against_reference(REFERENCE, MEAN_FIELD, log_likelihoods=values)
    table = comparison.table().set_index("measure")
    assert list(table.columns) == ["value", "se", "noise", "where"]
    assert set(table.index) == {
        "mean shift",
        "sd ratio",
        "wasserstein",
        "correlation error",
        "coverage of 50 % intervals",
        "coverage of 80 % intervals",
        "coverage of 95 % intervals",
        "sliced wasserstein",
        "classifier accuracy",
        "elpd difference",
    }
    assert table.loc["correlation error", "where"] == "x[0], x[1]"
    for name in ("correlation error", "sliced wasserstein", "classifier accuracy"):
        assert table.loc[name, "value"] > table.loc[name, "noise"] + 3 * table.loc[name, "se"]
    assert json.loads(json.dumps(comparison.to_dict(), allow_nan=False))["mean shift"]["where"].startswith("x[")
    assert "correlation error 0.9" in repr(comparison)


def test_one_scalar_has_no_correlation_and_without_rows_there_are_no_predictions() -> None:
    comparison = against_reference(posterior(normal(2, 200, seed=0)), posterior(normal(1, 200, seed=1)))
    assert comparison.correlation is None
    assert comparison.predictive is None
    with pytest.raises(DataError, match="a correlation needs two scalars; the posteriors have x in common"):
        correlation_error(posterior(normal(2, 200, seed=0)), posterior(normal(1, 200, seed=1)))


@pytest.mark.parametrize("check", [correlation_error, sliced_wasserstein, classifier_test, interval_coverage])
def test_too_few_draws_say_how_many_are_needed(check: object) -> None:
    assert callable(check)
    few = posterior(normal(1, 40, 3, seed=0))
    with pytest.raises(DataError, match="too few draws: the reference has 40, at least 100 are needed"):
        check(few, RIGHT)
    with pytest.raises(DataError, match="too few draws: the approximation has 40, at least 50 are needed"):
        check(REFERENCE, few)


@pytest.mark.parametrize("check", [correlation_error, sliced_wasserstein, classifier_test, interval_coverage])
def test_shapes_that_differ_are_named(check: object) -> None:
    assert callable(check)
    with pytest.raises(DataError, match=r"'x' has \(3,\) in the reference and \(2,\) in the approximation"):
        check(REFERENCE, posterior(normal(1, 100, 2, seed=0)))


def test_a_scalar_that_does_not_move_has_no_correlation() -> None:
    draws = normal(1, 500, 3, seed=0)
    draws[..., 1] = 0.5
    with pytest.raises(DataError, match=r"x\[1\] does not move in a half of the draws of the approximation"):
        correlation_error(REFERENCE, posterior(draws))
    assert sliced_wasserstein(REFERENCE, posterior(draws)).value > 0.1
    assert classifier_test(REFERENCE, posterior(draws)).accuracy > 0.9
