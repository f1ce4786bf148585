"""Fits and NUTS against real posteriors, end to end; ``test_claims.py`` has the promises, here are more seeds and oracles."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

import pyro_vi_lab as vl
from pyro_vi_lab import arviz_bridge
from pyro_vi_lab.families import Params
from pyro_vi_lab.natural_step import tolerance
from tests import posteriordb
from tests.posteriordb import POSTERIORS, Case, Loaded

STANDARD_ERRORS = 5  # fails a right answer once in two million
SLOW_FITS = {  # a second or more each
    "GLMM_Poisson_data-GLMM_Poisson_model",
    "garch-garch11",
    "hmm_example-hmm_example",
    "normal_2-normal_mixture",
    "radon_mn-radon_hierarchical_intercept_centered",
    "radon_mn-radon_hierarchical_intercept_noncentered",
}
FLAT_REGRESSIONS = [name for name, case in POSTERIORS.items() if case.model is posteriordb.flat_linear_regression]


def problem_of(name: str) -> tuple[vl.Problem, Loaded]:
    posteriordb.require()
    loaded = posteriordb.load(name)
    return vl.Problem(loaded.case.model, **loaded.data, name=name), loaded


def names(*cases: str, slow: set[str] | frozenset[str] = frozenset()) -> list[Any]:
    return [pytest.param(name, marks=pytest.mark.slow) if name in slow else name for name in cases]


def seeds(quick: int, slow: int) -> list[Any]:
    return [*range(1, 1 + quick), *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1 + quick, 1 + slow))]


# Fits


@pytest.mark.parametrize("seed", seeds(quick=1, slow=4))
@pytest.mark.parametrize("guide", ["mean_field", "full_rank"])
@pytest.mark.parametrize("name", names(*POSTERIORS, slow=SLOW_FITS))
def test_fit_reaches_the_best_of_its_family(name: str, guide: Any, seed: int) -> None:
    """Within 0.1 nat, and never above the evidence."""
    problem, loaded = problem_of(name)
    fit = vl.fit(problem, guide, seed=seed, progress=False)
    assert fit.status is vl.Status.CONVERGED, fit.message
    value, error = fit.elbo(4000, seed=seed)
    assert value >= loaded.baseline(guide) - 0.1 - 3 * error
    assert value <= loaded.log_evidence + loaded.info["log_evidence"]["half_spread"] + STANDARD_ERRORS * error


@pytest.mark.parametrize("seed", seeds(quick=2, slow=10))
@pytest.mark.parametrize(
    "name", names(*(name for name, case in POSTERIORS.items() if case.near_normal), slow=SLOW_FITS)
)
def test_moments_where_the_posterior_is_near_normal(name: str, seed: int) -> None:
    """On the scale of z, where the family lives, and from the default start, however the data are scaled."""
    problem, loaded = problem_of(name)
    fit = vl.fit(problem, seed=seed, progress=False)
    assert fit.status is vl.Status.CONVERGED, fit.message
    assert fit.num_steps <= 100
    order = [i for site in problem.density().sites for i in loaded.coordinates(site)]
    sd = np.sqrt(np.diag(loaded.moments["unconstrained_cov"]))[order]
    shift = (fit.loc.numpy() - loaded.moments["unconstrained_mean"][order]) / sd
    ratio = np.sqrt(np.diag(fit.covariance().numpy())) / sd
    assert np.abs(shift).max() < 0.1
    assert np.abs(ratio - 1).max() < 0.1


@pytest.mark.parametrize("seed", seeds(quick=2, slow=5))
@pytest.mark.parametrize("name", FLAT_REGRESSIONS)
def test_best_normal_of_a_flat_regression_in_closed_form(name: str, seed: int) -> None:
    r"""With N rows, k coefficients, estimate b and residual sum of squares R, the best full-rank normal has

    .. math:: \beta \sim N(b, (X^\top X)^{-1} R / \nu), \quad
              \log\sigma \sim N(\tfrac12 \log(R / \nu) + s^2, s^2), \quad \nu = N - k - 1, \quad s^2 = 1 / 2(N - 1),

    independent of each other: set the derivatives of E log p(z) + entropy to zero.
    """
    problem, loaded = problem_of(name)
    X, y = loaded.data["X"], loaded.data["y"]
    num_rows, k = X.shape
    q, r = torch.linalg.qr(X)  # X is badly conditioned: no normal equations
    estimate = torch.linalg.solve_triangular(r, (q.T @ y).unsqueeze(-1), upper=True).squeeze(-1)
    residual = float((y - X @ estimate).square().sum())
    variance, free = 1 / (2 * (num_rows - 1)), num_rows - k - 1
    covariance = torch.zeros(k + 1, k + 1, dtype=torch.float64)
    inverse = torch.linalg.inv(r)
    covariance[:k, :k] = inverse @ inverse.T * residual / free
    covariance[k, k] = variance
    loc = torch.cat([estimate, torch.tensor([0.5 * math.log(residual / free) + variance], dtype=torch.float64)])
    fit = vl.fit(problem, seed=seed, progress=False)
    assert fit.status is vl.Status.CONVERGED
    assert problem.density().labels[-1] == "sigma"
    reached = Params(fit.params.loc[0], fit.params.scale[0])
    # a gap of g nats is a KL divergence of g to the best, to second order
    assert float(fit.family.kl(reached, Params(loc, torch.linalg.cholesky(covariance)))) <= 2 * tolerance(k + 1)


def test_either_mode_of_the_two_is_as_good() -> None:
    """Restarts find both; the model does not know one from the other."""
    problem, loaded = problem_of("normal_2-normal_mixture")
    fit = vl.fit(problem, num_restarts=8, seed=0, progress=False)
    assert set(fit.statuses) == {vl.Status.CONVERGED}
    density, values = problem.density(), []
    for restart in range(8):
        params = Params(fit.params.loc[restart], fit.params.scale[restart])
        eps = torch.randn(2000, density.dim, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        z = fit.family.sample(params, eps)
        log_weights = density.log_prob(z) - fit.family.log_prob(params, z)
        values.append(float(log_weights.mean()))
        assert log_weights.mean() >= loaded.baseline("full_rank") - 0.1 - 3 * log_weights.std() / 2000**0.5
    order = [density.labels.index(label) for label in ("mu[0]", "mu[1]")]
    signs = (fit.params.loc[:, order[0]] > fit.params.loc[:, order[1]]).tolist()
    assert {True, False} == set(signs)
    assert max(values) - min(values) <= 2 * tolerance(3)


def test_enumerated_mixture_is_fitted_as_the_marginalized_one() -> None:
    problem, loaded = problem_of("low_dim_gauss_mix-low_dim_gauss_mix")
    enumerated = vl.Problem(posteriordb.low_dim_gauss_mix_enumerated, **loaded.data)
    one, other = (vl.fit(target, progress=False) for target in (problem, enumerated))
    assert one.status is other.status is vl.Status.CONVERGED
    kl = one.family.kl(*(Params(fit.params.loc[0], fit.params.scale[0]) for fit in (one, other)))
    assert float(kl) <= 4 * tolerance(5)  # each within the tolerance of the optimum


# NUTS


def solved(case: Case) -> bool:
    """Whether NUTS is known to solve it: no funnel, one mode."""
    return not (case.funnel or case.multimodal)


def standard_errors(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Monte Carlo standard errors of the means and of the standard deviations of draws ``(C, S, *shape)``."""
    sd = values.reshape(-1, *values.shape[2:]).std(0)
    squares = (values - values.mean((0, 1))) ** 2
    return arviz_bridge.mcse(values), arviz_bridge.mcse(squares) / (2 * sd)


def published_standard_errors(loaded: Loaded, parameter: str) -> tuple[np.ndarray, np.ndarray]:
    """The same of the published means and standard deviations, which are of all the draws.

    Their effective numbers are in the files; the fourth moment comes from the draws that are.
    """
    diagnostics, sd = loaded.info["diagnostics"], loaded.sd[parameter]
    bulk, tail = (np.asarray(diagnostics[f"ess_{kind}"][parameter]) for kind in ("bulk", "tail"))
    squares = (loaded.draws[parameter] - loaded.mean[parameter]) ** 2
    return sd / np.sqrt(bulk), squares.std(0) / np.sqrt(np.minimum(bulk, tail)) / (2 * sd)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, case in POSTERIORS.items() if solved(case)])
def test_nuts_agrees_with_the_published_draws(name: str) -> None:
    problem, loaded = problem_of(name)
    posterior = vl.nuts(problem, seed=0, progress=False)
    assert posterior.problems() == []
    mean, sd = posterior.mean(), posterior.sd()
    for parameter in loaded.case.parameters:
        ours = standard_errors(posterior.draws[parameter].numpy())
        theirs = published_standard_errors(loaded, parameter)
        for found, expected, one, other in (
            (mean, loaded.mean, ours[0], theirs[0]),
            (sd, loaded.sd, ours[1], theirs[1]),
        ):
            difference = np.abs(found[parameter].numpy() - expected[parameter])
            assert (difference <= STANDARD_ERRORS * np.hypot(one, other)).all(), parameter


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, case in POSTERIORS.items() if not solved(case)])
def test_reference_that_nuts_cannot_make_is_reported(name: str) -> None:
    problem, _ = problem_of(name)
    assert vl.nuts(problem, seed=0, progress=False).problems() != []
