from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats

from pyro_vi_lab.errors import ArgumentError, DataError
from pyro_vi_lab.models import ClassPrediction, NormalPrediction

STANDARD_ERRORS = 5


def normal(num_outputs: int | None = None) -> NormalPrediction:
    shape = (7, 5) if num_outputs is None else (7, 5, num_outputs)
    torch.manual_seed(0)
    return NormalPrediction(torch.randn(shape, dtype=torch.float64), torch.rand(7, dtype=torch.float64) + 0.2)


def classes(num_rows: int = 6) -> ClassPrediction:
    torch.manual_seed(0)
    return ClassPrediction((3 * torch.randn(9, num_rows, 4, dtype=torch.float64)).log_softmax(-1))


def test_the_two_parts_add_up_to_the_variance_of_the_outcome() -> None:
    prediction = normal()
    torch.manual_seed(1)
    draws = prediction.outputs + prediction.noise[:, None] * torch.randn(100_000, 7, 5, dtype=torch.float64)
    per_row = draws.flatten(0, 1)
    error = (per_row - per_row.mean(0)).square().std(0) / len(per_row) ** 0.5
    assert ((per_row.var(0) - prediction.variance).abs() < STANDARD_ERRORS * error).all()
    torch.testing.assert_close(prediction.variance, prediction.epistemic + prediction.aleatoric)
    sure = NormalPrediction(prediction.outputs[:1], prediction.noise[:1])
    assert float(sure.epistemic.abs().max()) == 0.0


@pytest.mark.parametrize("num_outputs", [None, 3])
def test_density_and_distribution_function_are_those_of_the_mixture(num_outputs: int | None) -> None:
    prediction = normal(num_outputs)
    y = torch.linspace(-1, 1, prediction.mean.numel(), dtype=torch.float64).reshape(prediction.mean.shape)
    outputs = prediction.outputs.numpy()
    noise = prediction.noise.numpy().reshape(-1, *[1] * (outputs.ndim - 1))
    each = stats.norm(outputs, noise).logpdf(y.numpy())
    joint = each.sum(-1) if num_outputs else each
    np.testing.assert_allclose(prediction.log_density(y), np.log(np.exp(joint).mean(0)), rtol=1e-12)
    np.testing.assert_allclose(prediction.cdf(y), stats.norm(outputs, noise).cdf(y.numpy()).mean(0), rtol=1e-12)


def test_intervals_have_their_probability() -> None:
    prediction = normal()
    low, high = prediction.interval(0.8)
    torch.testing.assert_close(prediction.cdf(low), torch.full((5,), 0.1, dtype=torch.float64))
    torch.testing.assert_close(prediction.cdf(high), torch.full((5,), 0.9, dtype=torch.float64))
    assert prediction.coverage((low + high) / 2, [0.8]) == 1.0
    assert prediction.coverage(high + 1e-6, [0.8]) == 0.0


def test_the_coverage_of_outcomes_from_the_prediction_is_the_level() -> None:
    torch.manual_seed(0)
    mean = torch.randn(20_000, dtype=torch.float64)
    prediction = NormalPrediction(mean[None], torch.tensor([0.7], dtype=torch.float64))
    y = mean + 0.7 * torch.randn(20_000, dtype=torch.float64)
    levels = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    error = (levels * (1 - levels) / 20_000).sqrt()
    assert ((prediction.coverage(y, levels.tolist()) - levels).abs() < STANDARD_ERRORS * error).all()
    assert prediction.calibration_error(y) < STANDARD_ERRORS * math.sqrt(0.25 / 20_000)
    # half of the noise: an interval of level 0.5 has the normal's probability of 0.337 standard deviations
    proud = NormalPrediction(mean[None], torch.tensor([0.35], dtype=torch.float64))
    expected = 2 * stats.norm.cdf(stats.norm.ppf(0.75) / 2) - 1
    assert abs(float(proud.coverage(y, [0.5])) - expected) < STANDARD_ERRORS * math.sqrt(0.25 / 20_000)


def test_entropy_is_mutual_information_and_expected_entropy() -> None:
    prediction = classes()
    probabilities = prediction.log_probs.exp().numpy()
    total = stats.entropy(probabilities.mean(0), axis=-1)
    expected = stats.entropy(probabilities, axis=-1).mean(0)
    # the mutual information as a divergence: of each draw from the mean of all
    information = stats.entropy(probabilities, probabilities.mean(0)[None], axis=-1).mean(0)
    np.testing.assert_allclose(prediction.entropy, total, rtol=1e-12)
    np.testing.assert_allclose(prediction.aleatoric, expected, rtol=1e-12)
    np.testing.assert_allclose(prediction.epistemic, information, rtol=1e-10)
    assert float(ClassPrediction(prediction.log_probs[:1]).epistemic.max()) == pytest.approx(0.0, abs=1e-15)


def test_log_probabilities_are_those_of_the_mean() -> None:
    prediction, y = classes(), torch.tensor([0, 1, 2, 3, 0, 1])
    torch.testing.assert_close(prediction.log_density(y), prediction.mean.log()[torch.arange(6), y])
    tiny = ClassPrediction(torch.tensor([[[0.0, -1000.0]], [[0.0, -1001.0]]], dtype=torch.float64))
    expected = -1000 + math.log((1 + math.exp(-1)) / 2)  # where the probability itself is zero
    assert float(tiny.log_density(torch.tensor([1]))) == pytest.approx(expected, rel=1e-14)


def test_calibration_by_hand() -> None:
    confidence = torch.tensor([0.55, 0.95, 0.95, 0.65, 1.0], dtype=torch.float64)
    prediction = ClassPrediction(torch.stack([confidence, 1 - confidence], -1).log()[None])
    y = torch.tensor([1, 0, 0, 0, 1])
    bins = prediction.calibration(y, 10)
    assert bins.count.tolist() == [0, 0, 0, 0, 0, 1, 1, 0, 0, 3]
    torch.testing.assert_close(bins.accuracy[[5, 6, 9]], torch.tensor([0.0, 1.0, 2 / 3], dtype=torch.float64))
    assert bool(bins.accuracy[0].isnan())
    expected = (0.55 + 0.35 + 3 * abs(2 / 3 - 2.9 / 3)) / 5
    assert prediction.calibration_error(y, 10) == pytest.approx(expected, rel=1e-12)


def test_labels_from_the_prediction_are_calibrated() -> None:
    prediction = classes(20_000)
    y = torch.distributions.Categorical(prediction.mean).sample()
    # ten bins, each off by about a standard error of at most a half over its root
    assert prediction.calibration_error(y) < STANDARD_ERRORS * math.sqrt(10 * 0.25 / 20_000)


@pytest.mark.parametrize(
    ("y", "expected"),
    [
        (torch.tensor([0, 1, 2, 3, 4, 0]), "y has the label 4 in row 4; expected 0 to 3"),
        (torch.tensor([0, -1, 2, 3, 4, 0]), "y has the label -1 in row 1"),
        (torch.tensor([0.0, 0.5, 0, 0, 0, 0]), "y has the label 0.5 in row 1"),
        (torch.tensor([0, 1]), r"y has shape \(2,\); expected \(6,\)"),
    ],
)
def test_wrong_labels_are_named(y: torch.Tensor, expected: str) -> None:
    with pytest.raises(DataError, match=expected):
        classes().log_density(y)


def test_wrong_outcomes_and_options_are_named() -> None:
    prediction = normal()
    with pytest.raises(DataError, match=r"y has shape \(5, 1\); expected that of the prediction, \(5,\)"):
        prediction.log_density(torch.zeros(5, 1))
    with pytest.raises(DataError, match="missing or infinite value in row 2"):
        prediction.log_density(torch.tensor([0.0, 0.0, math.nan, 0.0, 0.0]))
    with pytest.raises(ArgumentError, match=r"a level is a probability between 0 and 1, got 1\.5"):
        prediction.interval(1.5)
    with pytest.raises(ArgumentError, match="num_bins must be a positive whole number, got 0"):
        classes().calibration(torch.zeros(6), 0)
    with pytest.raises(DataError, match="outputs have shape"):
        NormalPrediction(torch.zeros(3, 2), torch.zeros(2))
    with pytest.raises(DataError, match="log_probs have shape"):
        ClassPrediction(torch.zeros(3, 2))
