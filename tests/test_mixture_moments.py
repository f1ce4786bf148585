from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.special import logsumexp, softmax

from pyro_vi_lab.missing_moments import observed_log_densities, observed_moments
from pyro_vi_lab.mixture_moments import (
    Covariance,
    covariance_of_factor,
    factor_of_covariance,
    hard_moments,
    log_densities,
    moments,
)
from tests import mixtures
from tests.mixtures import KINDS, groups, parameters

EACH = pytest.mark.parametrize("kind", KINDS)
CLOSE = {"rtol": 1e-10, "atol": 1e-10}


def textbook(kind: Covariance, X: np.ndarray, r: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    counts = r.sum(0)
    means = r.T @ X / counts[:, None]
    apart = X[:, None] - means
    full = np.einsum("nk,nki,nkj->kij", r, apart, apart) / counts[:, None, None]
    variances = full.diagonal(axis1=1, axis2=2)
    tied = (counts[:, None, None] * full).sum(0) / counts.sum()
    return counts, means, {"full": full, "tied": tied, "diag": variances, "spherical": variances.mean(1)}[kind]


@EACH
@pytest.mark.parametrize("weighted", [False, True])
def test_moments_are_those_of_the_textbook(kind: Covariance, weighted: bool) -> None:
    X, one = groups(50), parameters(kind)
    weight = torch.rand(50, dtype=torch.float64) if weighted else None
    w = np.ones(50) if weight is None else weight.numpy()
    each = mixtures.log_densities(X, one)
    counts, means, covariances = textbook(kind, X.numpy(), softmax(each, 1) * w[:, None])
    found = moments(X, one.normals(), weight=weight)
    np.testing.assert_allclose(found.counts, counts, rtol=1e-10)
    np.testing.assert_allclose(found.means, means, rtol=1e-10)
    np.testing.assert_allclose(found.covariances, covariances, rtol=1e-9, atol=1e-10)
    assert float(found.log_likelihood) == pytest.approx(float(w @ logsumexp(each, 1)), rel=1e-12)
    np.testing.assert_allclose(log_densities(X, one.normals()), each, rtol=1e-10)


@EACH
def test_chunks_make_no_difference(kind: Covariance, monkeypatch: pytest.MonkeyPatch) -> None:
    X, normals = groups(50), parameters(kind).normals()
    whole, each = moments(X, normals), log_densities(X, normals)
    monkeypatch.setattr("pyro_vi_lab.mixture_moments.CHUNK", 7)
    for one, other in zip(whole, moments(X, normals), strict=True):
        torch.testing.assert_close(one, other, **CLOSE)
    torch.testing.assert_close(log_densities(X, normals), each, **CLOSE)


def test_full_covariances_do_not_cancel() -> None:
    """A component of width 1e-6 at a distance of 1e3: sums about the origin would keep nothing of its variance."""
    noise = torch.randn(500, 1, dtype=torch.float64)
    X = torch.cat([1e3 + 1e-6 * noise, -1e3 + noise])
    one = parameters("full", dim=1, num_components=2)._replace(
        loc=torch.tensor([[1e3], [-1e3]], dtype=torch.float64),
        covariance=torch.tensor([[[1e-12]], [[1.0]]], dtype=torch.float64),
    )
    found = moments(X, one.normals())
    # the rows themselves are rounded to 1e3 * eps = 1e-13, a tenth of a millionth of the width
    assert float(found.covariances[0, 0, 0]) == pytest.approx(1e-12 * float(noise.var(correction=0)), rel=1e-6)


@EACH
def test_expected_density_of_other_components(kind: Covariance) -> None:
    X, one, other = groups(40), parameters(kind), parameters(kind, seed=9)
    r = softmax(mixtures.log_densities(X, one), 1)
    expected = (r * mixtures.log_densities(X, other)).sum()
    found = moments(X, one.normals())
    assert float(mixtures.expected_log_density(found, other.normals())) == pytest.approx(float(expected), rel=1e-10)


@EACH
def test_factors_of_covariances(kind: Covariance) -> None:
    one = parameters(kind)
    torch.testing.assert_close(covariance_of_factor(factor_of_covariance(one.covariance, kind), kind), one.covariance)


def test_a_singular_covariance_is_nan_and_no_other() -> None:
    matrices = torch.stack([torch.eye(2), torch.ones(2, 2)]).double()
    factor = factor_of_covariance(matrices, "full")
    assert factor[0].isfinite().all()
    assert factor[1].isnan().all()


@EACH
def test_hard_assignments(kind: Covariance) -> None:
    X = groups(40)
    labels = torch.arange(40) % 3
    found = hard_moments(X, labels, 4, kind, None)
    r = np.eye(3)[labels]
    counts, means, covariances = textbook(kind, X.numpy(), r)
    np.testing.assert_allclose(found.counts, [*counts, 0])
    np.testing.assert_allclose(found.means[:3], means)
    np.testing.assert_allclose(found.covariances if kind == "tied" else found.covariances[:3], covariances, atol=1e-12)


# --- missing values -----------------------------------------------------------------------------------------------------


@EACH
def test_nothing_missing_is_the_same(kind: Covariance) -> None:
    X, normals, weight = groups(30, dim=3), parameters(kind, dim=3).normals(), torch.rand(30, dtype=torch.float64)
    everything = torch.ones(30, 3, dtype=torch.bool)
    for one, other in zip(
        moments(X, normals, weight=weight), observed_moments(X, everything, normals, weight=weight), strict=True
    ):
        torch.testing.assert_close(one, other, **CLOSE)


@EACH
def test_rows_count_by_their_conditional_moments(kind: Covariance) -> None:
    """Ghahramani & Jordan 1994, eq. 12-16, row by row."""
    X, one = groups(25, dim=3), parameters(kind, dim=3)
    observed = torch.rand(25, 3) < 0.6
    observed[:, 0] |= ~observed.any(1)
    each = mixtures.log_densities(X, one, observed)
    r, covariances = softmax(each, 1), mixtures.matrices(one)
    first, second = np.zeros((3, 3)), np.zeros((3, 3, 3))
    for n in range(25):
        o, m = observed[n].numpy(), ~observed[n].numpy()
        for k in range(3):
            mu, S = one.loc[k].numpy(), covariances[k]
            gain = S[np.ix_(m, o)] @ np.linalg.inv(S[np.ix_(o, o)])
            x, rest = X[n].numpy().copy(), np.zeros((3, 3))
            x[m] = mu[m] + gain @ (x[o] - mu[o])
            rest[np.ix_(m, m)] = S[np.ix_(m, m)] - gain @ S[np.ix_(o, m)]
            first[k] += r[n, k] * x
            second[k] += r[n, k] * (np.outer(x, x) + rest)
    counts = r.sum(0)
    means = first / counts[:, None]
    full = second / counts[:, None, None] - means[:, :, None] * means[:, None]
    variances = full.diagonal(axis1=1, axis2=2)
    tied = (counts[:, None, None] * full).sum(0) / counts.sum()
    found = observed_moments(torch.where(observed, X, torch.nan).nan_to_num(0.0), observed, one.normals())
    np.testing.assert_allclose(found.counts, counts, rtol=1e-10)
    np.testing.assert_allclose(found.means, means, rtol=1e-10)
    expected = {"full": full, "tied": tied, "diag": variances, "spherical": variances.mean(1)}[kind]
    np.testing.assert_allclose(found.covariances, expected, rtol=1e-8, atol=1e-9)
    assert float(found.log_likelihood) == pytest.approx(float(logsumexp(each, 1).sum()), rel=1e-12)
    np.testing.assert_allclose(observed_log_densities(X, observed, one.normals()), each, rtol=1e-10)
