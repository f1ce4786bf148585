from __future__ import annotations

from typing import Any

import numpy as np
import pyro
import pytest
import torch
from scipy import stats

import pyro_vi_lab as vl
from pyro_vi_lab.errors import ArgumentError, DataError
from pyro_vi_lab.models import HierarchicalRegression
from pyro_vi_lab.models.outcomes import StudentT
from tests.models.test_regression import log_joint, same_as_single_runs


def simulated(**options: Any) -> tuple[HierarchicalRegression, Any]:
    model = HierarchicalRegression(**options)
    return model, model.simulate(30, 2, 4, num_slopes=1, seed=0)


SCALE, RHO, SIGMA, INTERCEPT = np.array([0.8, 0.5]), 0.3, 0.9, 0.4
BETA = np.array([0.2, -0.5])
EFFECT = np.array([[0.5, -0.2], [0.1, 0.4], [-0.7, 0.3], [0.2, -0.6]])
ROOT = np.array([[1.0, 0.0], [RHO, np.sqrt(1 - RHO**2)]])


@pytest.mark.parametrize("centered", [False, True])
@pytest.mark.parametrize("correlation", ["lkj", "independent"])
def test_the_density_is_that_of_the_formula(centered: bool, correlation: str) -> None:
    model, (X, y, group, _) = simulated(centered=centered, correlation=correlation)
    problem = model.problem(X, y, group=group, slopes=["x0"])
    factor = np.diag(SCALE) @ (ROOT if correlation == "lkj" else np.eye(2))
    b = EFFECT[group.numpy()]
    eta = INTERCEPT + X.numpy() @ BETA + b[:, 0] + b[:, 1] * X.numpy()[:, 0]
    expected = stats.norm(eta, SIGMA).logpdf(y.numpy()).sum() + stats.halfnorm(0, 1).logpdf([SIGMA, *SCALE]).sum()
    expected += stats.norm(0, 10).logpdf(INTERCEPT) + stats.norm(0, 1).logpdf(BETA).sum()
    values: dict[str, Any] = {"sigma": SIGMA, "intercept": INTERCEPT, "beta": BETA, "group_scale": SCALE}
    if correlation == "lkj":
        values["group_correlation_cholesky"] = ROOT
        # of a matrix of order two, the density of the correlation is 3 / 4 (1 - rho^2) at a concentration of 2
        expected += np.log(0.75 * (1 - RHO**2))
    if centered:
        values["group_effect"] = EFFECT
        expected += stats.multivariate_normal(np.zeros(2), factor @ factor.T).logpdf(EFFECT).sum()
    else:
        values["group_raw"] = raw = np.linalg.solve(factor, EFFECT.T).T
        expected += stats.norm.logpdf(raw).sum()
    assert log_joint(problem, values) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("centered", [False, True])
@pytest.mark.parametrize("correlation", ["lkj", "independent"])
def test_effects_of_standardized_data_are_of_the_data_as_they_are(centered: bool, correlation: str) -> None:
    model, (X, y, group, _) = simulated(centered=centered, correlation=correlation)
    X, y = X * torch.tensor([5.0, 0.3]).double() + 4.0, 3 * y - 20.0
    problem = model.problem(X, y, group=group, slopes=["x0"], standardize=True)
    prior = problem.prior(200, seed=0)
    scaling = problem.model.binding.scaling
    Z = scaling.covariates(X)
    d = {key: value[0] for key, value in prior.draws.items()}
    if centered:
        effect = d["group_effect_standardized"]
    else:
        root = torch.diag_embed(d["group_scale_standardized"])
        if correlation == "lkj":
            root = root @ d["group_correlation_cholesky_standardized"]
        effect = d["group_raw"] @ root.mT
    b = effect[:, group]
    inner = d["intercept_standardized"][:, None] + d["beta_standardized"] @ Z.T + b[..., 0] + b[..., 1] * Z[:, 0]
    expected = scaling.y_center + scaling.y_scale * inner
    torch.testing.assert_close(problem.model.expected(prior, X, group=group)[0], expected)
    # the scales are the standard deviations of the effects given them
    ratio = d["group_effect"] / d["group_scale"][:, None]
    error = 5 * (2 / 800) ** 0.5  # of the variance of normal draws, 200 of 4 groups
    assert bool(((ratio.square().mean((0, 1)) - 1).abs() < error).all())


@pytest.mark.parametrize(
    "options", [{}, {"centered": True}, {"correlation": "independent"}, {"family": "negative_binomial"}]
)
@pytest.mark.parametrize("standardize", [False, True])
def test_vectorized_particles_have_the_density_of_single_runs(options: dict[str, Any], standardize: bool) -> None:
    torch.set_default_dtype(torch.float64)
    model, (X, y, group, _) = simulated(**options)
    two = {"group": group, "other": torch.arange(30) % 2}
    same_as_single_runs(model.problem(X, y, group=two, slopes=["x0"], standardize=standardize))


def test_the_posterior_of_known_scales_is_that_of_a_normal_model() -> None:
    """With the scales given, effects and coefficients are jointly normal, which a Laplace fit finds exactly."""
    model, (X, y, group, _) = simulated(correlation="independent")
    problem = model.problem(X, y, group=group)
    given = {"sigma": torch.tensor(0.9).double(), "group_scale": torch.tensor([0.7]).double()}
    fixed = vl.Problem(pyro.condition(problem.model, data=given), *problem.args, **problem.kwargs)
    result = vl.fit(fixed, "map", progress=False).point()
    A = np.column_stack([np.ones(30), X.numpy(), np.eye(4)[group.numpy()] * 0.7]) / 0.9
    penalty = np.diag([1 / 10, 1, 1, 1, 1, 1, 1])
    t = np.concatenate([y.numpy() / 0.9, np.zeros(7)])
    expected = np.linalg.lstsq(np.concatenate([A, penalty]), t)[0]
    found = torch.cat([result["intercept"][None], result["beta"], result["group_raw"][:, 0]])
    torch.testing.assert_close(found, torch.from_numpy(expected), rtol=1e-7, atol=1e-8)


def test_groups_by_name_and_a_group_of_one_row() -> None:
    X, y = np.arange(6.0)[:, None], [1.0, 2.0, 2.5, 4.0, 5.5, 6.0]
    names = ["b", "a", "b", "a", "b", "alone"]
    problem = HierarchicalRegression(StudentT(4.0)).problem(X, y, group=names)
    assert problem.coords["group"] == ["a", "alone", "b"]
    assert problem.dims("group_effect") == ("group", "group_term")
    result = vl.fit(problem, progress=False)
    assert result.status is vl.Status.CONVERGED
    posterior = result.posterior(10)
    model = problem.model
    assert model.predictive(posterior, X[:2], group=["alone", "b"]).shape == (1, 10, 2)
    eta = model.expected(posterior, X[:1], group=["alone"])[..., 0]
    draws = posterior.draws
    torch.testing.assert_close(eta, draws["intercept"] + draws["group_effect"][..., 1, 0])
    with pytest.raises(DataError, match="row 1 is of the group 'c' of 'group', of which the model has seen no rows"):
        model.predict(posterior, X[:2], group=["a", "c"])
    with pytest.raises(ArgumentError, match=r"the group 'group' of every row is missing: give it with group="):
        model.predict(posterior, X[:2])


def test_what_does_not_fit_is_named() -> None:
    model, (X, y, group, _) = simulated()
    with pytest.raises(ArgumentError, match="group is missing"):
        model.problem(X, y)
    with pytest.raises(ArgumentError, match=r"unknown covariate in slopes: 'x9': .*x0, x1"):
        model.problem(X, y, group=group, slopes=["x9"])
    with pytest.raises(DataError, match=r"the groups 'group' have shape \(29,\); expected \(30,\)"):
        model.problem(X, y, group=group[1:])
    with pytest.raises(DataError, match="the group 'group' of row 1 is missing"):
        model.problem(X, y, group=["a", None] * 15)
    with pytest.raises(ArgumentError, match="a grouping factor cannot be called 'beta'"):
        model.problem(X, y, group={"beta": group})
    with pytest.raises(ArgumentError, match="gives sites their names"):
        model.problem(X, y, group={"my group": group})
    with pytest.raises(ArgumentError, match="unknown family 'gausian': did you mean 'gaussian'"):
        HierarchicalRegression("gausian")
    with pytest.raises(ArgumentError, match="unknown correlation 'LKJ'"):
        HierarchicalRegression(correlation="LKJ")
    with pytest.raises(ArgumentError, match="has seen no groups yet"):
        model.predict({}, X, group=group)
    with pytest.raises(ArgumentError, match="num_groups must be at least 1"):
        model.simulate(10, 2, 0)
    assert torch.equal(model.simulate(10, 2, 3, seed=1).y, model.simulate(10, 2, 3, seed=1).y)
