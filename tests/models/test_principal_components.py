from __future__ import annotations

import math
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats
from torch import Tensor

from pyro_vi_lab.errors import ArgumentError, DataError
from pyro_vi_lab.models import probabilistic_pca


def table(num_rows: int = 60, dim: int = 7, rank: int = 3, seed: int = 0, noise: float = 0.3) -> Tensor:
    rng = np.random.default_rng(seed)
    loading = rng.normal(size=(dim, rank)) * np.arange(rank, 0, -1)
    return torch.tensor(rng.normal(size=(num_rows, rank)) @ loading.T + noise * rng.normal(size=(num_rows, dim)) + 2.0)


def normal(mean: Any, covariance: Any, X: Any) -> np.ndarray:
    return np.asarray(stats.multivariate_normal(np.asarray(mean), np.asarray(covariance)).logpdf(np.asarray(X)))


@pytest.mark.parametrize("num_latents", [1, 3, 6])
def test_the_likelihood_is_that_of_the_normal(num_latents: int) -> None:
    X = table()
    found = probabilistic_pca(X, num_latents)
    expected = normal(found.mean, found.covariance(), X)
    np.testing.assert_allclose(found.log_prob(X), expected, rtol=1e-11)
    assert float(found.log_likelihood) == pytest.approx(expected.sum(), rel=1e-12)


@pytest.mark.parametrize("num_latents", [1, 3, 6])
def test_with_the_other_divisor_it_is_scikit_learns(num_latents: int) -> None:
    decomposition = pytest.importorskip("sklearn.decomposition")
    X = table()
    found, theirs = probabilistic_pca(X, num_latents), decomposition.PCA(num_latents).fit(X.numpy())
    covariance = found.covariance().numpy() * len(X) / (len(X) - 1)
    np.testing.assert_allclose(covariance, theirs.get_covariance(), rtol=1e-10, atol=1e-12)
    assert normal(found.mean, covariance, X).mean() == pytest.approx(theirs.score(X.numpy()), rel=1e-12)
    assert float(found.log_likelihood) / len(X) > theirs.score(X.numpy())


def test_no_parameters_nearby_are_better() -> None:
    X = table()
    found = probabilistic_pca(X, 2)
    rng = np.random.default_rng(1)
    for size in (1e-3, 1e-2, 1e-1):
        for _ in range(10):
            loading = found.loading.numpy() + size * rng.normal(size=found.loading.shape)
            noise = float(found.noise_scale) * math.exp(size * rng.normal())
            mean = found.mean.numpy() + size * rng.normal(size=found.mean.shape)
            other = normal(mean, loading @ loading.T + noise**2 * np.eye(7), X).sum()
            assert other < float(found.log_likelihood)


def test_the_posterior_is_that_of_bayes() -> None:
    X = table()
    found = probabilistic_pca(X, 3)
    mean, covariance = found.posterior(X[:5])
    joint = torch.linalg.inv(found.covariance())
    torch.testing.assert_close(mean, (X[:5] - found.mean) @ joint @ found.loading)
    torch.testing.assert_close(covariance, torch.eye(3).double() - found.loading.T @ joint @ found.loading)
    # W has orthogonal columns, so the coordinates of z are independent given x
    torch.testing.assert_close(covariance, covariance.diagonal().diag())


def test_more_columns_than_rows_and_constant_columns() -> None:
    X = table(num_rows=5, dim=12)
    X[:, 3] = 1.0
    found = probabilistic_pca(X, 2)
    assert float(found.log_likelihood) == pytest.approx(normal(found.mean, found.covariance(), X).sum(), rel=1e-11)


def test_it_does_not_lose_digits_far_from_zero() -> None:
    X = table()
    near, far = probabilistic_pca(X, 3), probabilistic_pca(X + 1e6, 3)
    assert float(far.log_likelihood) == pytest.approx(float(near.log_likelihood), abs=1e-6)


@pytest.mark.parametrize(
    ("X", "num_latents", "error", "message"),
    [
        (table()[:1], 2, DataError, "X has one row"),
        (table()[:1].repeat(4, 1), 2, DataError, "all 4 rows of X are equal"),
        (table(noise=0.0), 3, DataError, "X lies in 3 dimensions up to rounding"),
        (table()[:, 0], 1, DataError, r"X has shape \(60,\); expected \(rows, columns\)"),
        (table()[:0], 1, DataError, r"X has shape \(0, 7\)"),
        (table(), 7, ArgumentError, "whole number from 1 to 6.* got 7"),
        (table(), 0, ArgumentError, "got 0"),
        (table(), 2.0, ArgumentError, "got 2.0"),
        ([["a"], ["b"]], 1, DataError, "X is not numeric"),
    ],
)
def test_bad_input_is_named(X: Any, num_latents: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        probabilistic_pca(X, num_latents)


def test_missing_values_are_named() -> None:
    X = table()
    X[4, 2] = math.nan
    with pytest.raises(DataError, match=r"X has 1 missing .* first \(nan\) in row 4 at \(2,\)"):
        probabilistic_pca(X, 2)
    frame = pd.DataFrame(X.numpy(), index=[f"patient {i}" for i in range(60)])
    with pytest.raises(DataError, match="in row 'patient 4'"):
        probabilistic_pca(frame, 2)
    with pytest.raises(DataError, match=r"X has shape \(60, 7\); expected \(rows, 6\)"):
        probabilistic_pca(table(dim=6), 2).log_prob(X)
