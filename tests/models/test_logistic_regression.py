from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats

from pyro_vi_lab.errors import DataError
from pyro_vi_lab.models import LogisticRegression


@pytest.mark.parametrize("seed", range(3))
def test_the_density_is_that_of_the_formula(seed: int) -> None:
    model = LogisticRegression(prior_scale=0.7, intercept_scale=1.3)
    X, y, _ = model.simulate(40, 3, seed=seed)
    z = np.random.default_rng(seed).normal(size=4)
    p = 1 / (1 + np.exp(-(z[0] + X.numpy() @ z[1:])))
    priors = stats.norm(0, 1.3).logpdf(z[0]) + stats.norm(0, 0.7).logpdf(z[1:]).sum()
    expected = priors + stats.bernoulli(p).logpmf(y.numpy().astype(int)).sum()
    assert float(model.problem(X, y).density().log_prob(torch.tensor(z))) == pytest.approx(expected, rel=1e-12)


def test_the_density_holds_far_from_zero() -> None:
    # log(1 - p) of a logit of 1000 is -1000, not -inf
    problem = LogisticRegression().problem([[1.0], [-1.0]], [0, 1])
    value = problem.density().log_prob(torch.tensor([0.0, 1000.0]).double())
    priors = stats.norm(0, 2.5).logpdf(0) + stats.norm(0, 1).logpdf(1000)
    assert float(value) == pytest.approx(priors - 2000, rel=1e-12)


@pytest.mark.parametrize(("label", "shown"), [(2, "2"), (-1, "-1"), (0.5, "0.5")])
def test_labels_other_than_zero_and_one_are_named(label: float, shown: str) -> None:
    X, y = torch.arange(10.0).reshape(5, 2), [0, 1, 0, label, label]
    with pytest.raises(DataError, match=rf"y has 2 label\(s\) other than 0 and 1, the first \({shown}\) in row 3"):
        LogisticRegression().problem(X, y)


def test_the_evidence_of_one_covariate_by_quadrature() -> None:
    """The density of the problem integrates to p(y), which adds up to one over all outcomes."""
    model, X = LogisticRegression(), torch.tensor([[-1.0], [0.3], [2.0]])
    axis = torch.linspace(-20, 20, 401, dtype=torch.float64)
    grid = torch.cartesian_prod(axis, axis / 2)  # 8 prior sds of the intercept, 10 of the coefficient
    weight = float((axis[1] - axis[0]) ** 2 / 2)
    total = 0.0
    for outcome in range(8):
        y = [outcome >> i & 1 for i in range(3)]
        total += float(model.problem(X, y).density().log_prob(grid).exp().sum()) * weight
    assert total == pytest.approx(1.0, rel=1e-10)


def test_rows_without_information_leave_the_prior() -> None:
    # the same row with both labels: the posterior of its logit is symmetric
    problem = LogisticRegression().problem([[1.0], [1.0], [0.0], [0.0]], [0, 1, 0, 1])
    z = torch.randn(10, 2, dtype=torch.float64)
    torch.testing.assert_close(problem.density().log_prob(z), problem.density().log_prob(-z))


def test_the_simulated_example_has_both_outcomes() -> None:
    from pyro_vi_lab.models.logistic_regression import example_simulated

    problem = example_simulated()
    y = problem.observed["y"]
    assert y.shape == (1000,)
    assert 0 < float(y.mean()) < 1
    assert problem.dims("beta") == ("feature",)
    assert not math.isnan(float(problem.density().log_prob(torch.zeros(21).double())))
