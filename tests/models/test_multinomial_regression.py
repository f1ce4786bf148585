from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats
from scipy.special import log_softmax

import pyro_vi_lab as vl
from pyro_vi_lab.errors import ArgumentError, DataError
from pyro_vi_lab.models import LogisticRegression, MultinomialRegression
from pyro_vi_lab.models.multinomial_regression import sum_to_zero_basis
from tests.models.test_regression import log_joint, same_as_single_runs


def simulated(num_rows: int = 80) -> tuple[torch.Tensor, torch.Tensor]:
    X, y, _ = MultinomialRegression(3, intercept_scale=0.5).simulate(num_rows, 2, seed=0)
    assert y.unique().tolist() == [0.0, 1.0, 2.0]  # every class occurs
    return X, y


@pytest.mark.parametrize("contrast", ["reference", "sum_to_zero"])
def test_the_density_is_that_of_the_formula(contrast: str) -> None:
    X, y = simulated()
    rng = np.random.default_rng(0)
    intercept, beta = rng.normal(size=2), rng.normal(size=(2, 2))
    basis = np.eye(3)[:, 1:] if contrast == "reference" else sum_to_zero_basis(3).numpy()
    logits = basis @ intercept + X.numpy() @ beta @ basis.T
    expected = log_softmax(logits, -1)[np.arange(80), y.numpy().astype(int)].sum()
    expected += stats.norm(0, 2.5).logpdf(intercept).sum() + stats.norm(0, 1).logpdf(beta).sum()
    suffix = "" if contrast == "reference" else "_free"
    problem = MultinomialRegression(3, contrast=contrast).problem(X, y)
    found = log_joint(problem, {f"intercept{suffix}": intercept, f"beta{suffix}": beta})
    assert found == pytest.approx(expected, rel=1e-12)


def test_the_map_with_sums_of_zero_is_that_of_scikit_learn() -> None:
    linear_model = pytest.importorskip("sklearn.linear_model")
    X, y = simulated()
    # its intercept has no prior, its penalty of the coefficients is that of normal priors, and it sums to zero
    model = MultinomialRegression(3, contrast="sum_to_zero", prior_scale=0.8, intercept_scale=1e6)
    point = vl.fit(model.problem(X, y), "map", progress=False).point()
    theirs = linear_model.LogisticRegression(C=0.8**2, tol=1e-10, max_iter=1000).fit(X.numpy(), y.numpy())
    torch.testing.assert_close(point["beta"], torch.from_numpy(theirs.coef_.T), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(
        model.predict(point, X), torch.from_numpy(theirs.predict_proba(X.numpy())), atol=1e-6, rtol=0
    )


def test_of_two_classes_it_is_logistic_regression() -> None:
    X, y, _ = LogisticRegression().simulate(30, 2, seed=0)
    z = torch.randn(4, 3, generator=torch.Generator().manual_seed(0)).double()
    two, one = MultinomialRegression(2).problem(X, y).density(), LogisticRegression().problem(X, y).density()
    torch.testing.assert_close(two.log_prob(z), one.log_prob(z))


@pytest.mark.slow
def test_maximum_likelihood_does_not_depend_on_contrast_and_standardization() -> None:
    X, y = simulated()
    X = X * torch.tensor([30.0, 0.2]).double() + 10
    found = []
    for contrast in ("reference", "sum_to_zero"):
        for standardize in (False, True):
            model = MultinomialRegression(3, contrast=contrast)
            point = vl.fit(model.problem(X, y, standardize=standardize), "mle", max_steps=500, progress=False).point()
            found.append(model.predict(point, X))
            if contrast == "sum_to_zero":
                assert float(point["beta"].sum(-1).abs().max()) < 1e-12
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=0, atol=1e-6)


def test_predictions_and_their_names() -> None:
    X, y = simulated()
    problem = MultinomialRegression(3).problem(X, y, classes=["red", "green", "blue"], standardize=True)
    assert problem.coords["class"] == ["green", "blue"]
    assert problem.dims("beta") == ("feature", "class")
    prior = problem.prior(2000)
    p = problem.model.predict(prior, X[:2])
    assert p.shape == (2, 3)
    torch.testing.assert_close(p.sum(-1), torch.ones(2).double())
    labels = problem.model.predictive(prior, X[:2])
    assert labels.shape == (1, 2000, 2)
    for k in range(3):
        share = (labels == k).double().mean((0, 1))
        assert bool(((share - p[:, k]).abs() < 5 * (p[:, k] * (1 - p[:, k]) / 2000).sqrt()).all())


@pytest.mark.parametrize(
    "options", [{}, {"contrast": "sum_to_zero"}, {"prior": "ridge"}, {"prior": "horseshoe", "num_relevant": 1}]
)
@pytest.mark.parametrize("standardize", [False, True])
def test_vectorized_particles_have_the_density_of_single_runs(options: dict[str, object], standardize: bool) -> None:
    torch.set_default_dtype(torch.float64)
    X, y = simulated()
    same_as_single_runs(MultinomialRegression(3, **options).problem(X, y, standardize=standardize))


def test_what_does_not_fit_is_named() -> None:
    X, y = simulated()
    y[4] = 3
    with pytest.raises(DataError, match=r"1 label\(s\) other than 0, ..., 2, the first \(3\) in row 4; .* num_classes"):
        MultinomialRegression(3).problem(X, y)
    with pytest.raises(ArgumentError, match="classes has 2 names; the model has num_classes=3"):
        MultinomialRegression(3).problem(X, y, classes=["a", "b"])
    with pytest.raises(ArgumentError, match="num_classes must be a whole number of at least 2, got 1"):
        MultinomialRegression(1)
    with pytest.raises(ArgumentError, match="unknown contrast 'sum': Known: reference, sum_to_zero"):
        MultinomialRegression(3, contrast="sum")
    with pytest.raises(ArgumentError, match="changes nothing"):
        MultinomialRegression(3).problem(X, y, offset=y)
