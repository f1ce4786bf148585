"""Coordinate ascent on moments of a mixture against the generic one, against scikit-learn and against exact posteriors."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from torch import Tensor

import pyro_vi_lab as vl
from pyro_vi_lab.conjugate_mixture import mixture_ascent, put
from pyro_vi_lab.coordinate_ascent import coordinate_ascent
from pyro_vi_lab.guides import Conjugate
from pyro_vi_lab.mixture_bayes import MixtureUpdates
from pyro_vi_lab.mixture_fit import rows_of, starts
from pyro_vi_lab.mixture_moments import Covariance, hard_moments
from pyro_vi_lab.models import GaussianMixture
from tests import mixtures
from tests.mixtures import KINDS, expected_log_density, groups

EACH = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(autouse=True)
def double() -> None:
    torch.set_default_dtype(torch.float64)


@EACH
@pytest.mark.parametrize("weights", ["dirichlet", "dirichlet_process"])
def test_sweeps_are_those_of_the_generic_coordinate_ascent(kind: Covariance, weights: str) -> None:
    X = groups(30)
    problem = GaussianMixture(3, covariance=kind, weights=weights, concentration=0.7).problem(X)
    rows, model = rows_of(problem), problem.model
    updates = MixtureUpdates(model.prior.centered(rows.center))
    start = updates.started(starts(rows, model, init="kmeans", num_restarts=1, seed=0)[0])
    guide = Conjugate(model)
    guide._setup_prototype(X)
    put(guide, start, rows.center)
    theirs = coordinate_ascent(problem, guide, max_sweeps=3)
    # the bound after each sweep there is that of the responsibilities of the factors before
    factors, elbo = start, []
    normals, _ = updates.expected(factors)
    for _ in range(3):
        found = rows.moments(normals)
        before, factors = normals, updates.updated(found, factors)
        normals, divergence = updates.expected(factors)
        gained = expected_log_density(found, normals) - expected_log_density(found, before)
        elbo.append(float(found.log_likelihood + gained - divergence))
    np.testing.assert_allclose(elbo, theirs.elbo[1:], rtol=1e-10)
    ours = mixture_ascent(rows, updates, start, max_sweeps=3)
    assert (np.array(ours.elbo[1:]) > elbo).all()
    for name, family in updates.families.items():
        for key, value in family.standard(guide.natural(name)).items():
            shift: Tensor | float = rows.center if key == "loc" else 0.0
            torch.testing.assert_close(ours.factors[name][key] + shift, value, rtol=1e-8, atol=1e-8)


@EACH
@pytest.mark.parametrize("what", ["all", "missing", "weighted"])
def test_the_bound_never_falls(kind: Covariance, what: str) -> None:
    X = groups(60)
    options = {}
    if what == "missing":
        holes = torch.rand(X.shape, generator=torch.Generator().manual_seed(0)) < 0.2
        X, options = torch.where(holes & ~holes.all(1, keepdim=True), torch.nan, X), {"missing": "marginalize"}
    if what == "weighted":
        options = {"sample_weight": torch.rand(60, generator=torch.Generator().manual_seed(0)) + 0.1}
    problem = GaussianMixture(3, covariance=kind, weights="dirichlet_process").problem(X, **options)
    rows = rows_of(problem)
    updates = MixtureUpdates(problem.model.prior.centered(rows.center))
    start = updates.started(starts(rows, problem.model, init="kmeans", num_restarts=1, seed=0)[0])
    elbo = np.array(mixture_ascent(rows, updates, start, max_sweeps=25).elbo)
    assert (np.diff(elbo) >= -1e-10 * abs(elbo[0])).all()
    assert elbo[-1] > elbo[0]


def test_one_component_is_the_exact_evidence() -> None:
    """With one component of one column q is p: the bound is that of the normal-gamma model."""
    x = groups(25, dim=1, num_groups=1)
    options = {"mean_prior": [1.0], "mean_precision": 0.5, "degrees_of_freedom": 5.0}
    exact = vl.models.UnivariateNormal(
        prior_loc=1.0, relative_precision=0.5, precision_shape=2.5, precision_rate=0.8
    ).exact(x[:, 0])
    for kind, scatter in {"full": [[1.6]], "diag": [1.6]}.items():
        problem = GaussianMixture(1, covariance=kind, covariance_prior=scatter, **options).problem(x)
        fit = vl.fit(problem, "conjugate", progress=False)
        assert -fit.history["negative_elbo"][-1] == pytest.approx(exact.log_evidence, rel=1e-10)


@EACH
def test_nothing_is_learned_from_nothing(kind: Covariance) -> None:
    prior = GaussianMixture(3, covariance=kind).problem(groups(30)).model.prior
    updates = MixtureUpdates(prior)
    value = float(updates.expected(updates.at_prior()).divergence)
    # of tied and spherical covariances the means are independent of the precision, which the prior's are not
    assert value == pytest.approx(0.0, abs=1e-10) if kind in ("full", "diag") else value > 0


@EACH
def test_the_fit_has_a_guide_and_a_posterior(kind: Covariance) -> None:
    X = groups(60, apart=15.0)
    problem = GaussianMixture(3, covariance=kind).problem(X)
    fit = vl.fit(problem, "conjugate", num_restarts=2, progress=False)
    assert fit.status is vl.Status.CONVERGED
    assert fit.method == "conjugate"
    assert len(fit.statuses) == 2
    posterior = fit.posterior(20)
    labels = problem.model.predict(problem.model.align(posterior), X)
    assert len(set(zip(labels.tolist(), [i % 3 for i in range(60)], strict=True))) == 3
    assert fit.guide.standard("weights")["concentration"].sum() == pytest.approx(63.0)


@EACH
def test_scikit_learn_with_the_same_priors_and_start(kind: Covariance) -> None:
    """Its E log |Λ| of diagonal and spherical precisions is mended; see :func:`tests.mixtures.scikit_learn`."""
    pytest.importorskip("sklearn.mixture")
    X, labels = groups(400, dim=3, num_groups=4, apart=4.0), np.arange(400) % 4
    df = 5.0 * mixtures.parts(kind, 4, 3)
    options = {"concentration": 0.3, "mean_precision": 0.6, "degrees_of_freedom": df}
    problem = GaussianMixture(4, covariance=kind, **options).problem(X)
    rows = rows_of(problem)
    updates = MixtureUpdates(problem.model.prior.centered(rows.center))
    start = updates.started(hard_moments(rows.X, torch.tensor(labels), 4, kind, None))
    ours = mixture_ascent(rows, updates, start, max_sweeps=500, tolerance=0.0)
    peer = mixtures.scikit_learn(problem.model, labels, mended=True, max_iter=500)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it has not converged: its tolerance is zero
        peer.fit(X.numpy())
    for name, value in mixtures.as_scikit_learn(ours.factors, updates, rows.center).items():
        np.testing.assert_allclose(value, getattr(peer, name), rtol=1e-5, atol=1e-5 * abs(value).max())
