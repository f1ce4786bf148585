from __future__ import annotations

import numpy as np
import pytest
import torch
from pyro import poutine
from pyro.infer.autoguide import init_to_value
from scipy.special import logsumexp
from torch import Tensor

import pyro_vi_lab as vl
from pyro_vi_lab.errors import ArgumentError, DataError
from pyro_vi_lab.guides import MAP, MLE
from pyro_vi_lab.mixture_moments import Covariance, moments
from pyro_vi_lab.mixture_prior import Parameters, log_prior, maximum_posterior
from pyro_vi_lab.models import GaussianMixture
from tests import mixtures
from tests.mixtures import KINDS, groups

EACH = pytest.mark.parametrize("kind", KINDS)


def parameters_of(fit: vl.Fit, kind: Covariance) -> Parameters:
    point = fit.point()
    precision = point["precision"]
    covariance = precision.inverse() if kind in ("full", "tied") else 1 / precision
    return Parameters(point["weights"], point["loc"], covariance, kind)


def with_holes(X: Tensor) -> Tensor:
    holes = torch.rand(X.shape, generator=torch.Generator().manual_seed(1)) < 0.2
    holes[:, 0] &= ~holes.all(1)
    return torch.where(holes, torch.nan, X)


@EACH
@pytest.mark.parametrize("objective", ["mle", "map"])
@pytest.mark.parametrize("missing", [False, True])
def test_free_energy_never_falls_and_is_the_log_likelihood(kind: Covariance, objective: str, missing: bool) -> None:
    X = with_holes(groups(60)) if missing else groups(60)
    problem = GaussianMixture(2, covariance=kind).problem(X, missing="marginalize" if missing else "error")
    options = {"reg_covar": 0.0} if objective == "mle" else {}
    fit = vl.em(problem, objective=objective, max_steps=15, **options)
    energy = fit.history["free_energy"]
    assert (np.diff(energy) >= -1e-10 * abs(energy[0])).all()
    assert energy[-1] > energy[0]
    assert type(fit.guide) is (MLE if objective == "mle" else MAP)
    one, observed = parameters_of(fit, kind), ~X.isnan()
    expected = float(logsumexp(mixtures.log_densities(X, one, observed), 1).sum())
    if objective == "map":
        expected += float(log_prior(one, problem.model.prior))
    assert energy[-1] == pytest.approx(expected, rel=1e-10)


@pytest.mark.slow
@EACH
@pytest.mark.parametrize("weights", ["dirichlet", "dirichlet_process"])
def test_log_prior_is_that_of_the_model(kind: Covariance, weights: str) -> None:
    """The density of the constrained sites, which is also that of MAP."""
    model = GaussianMixture(3, covariance=kind, weights=weights, concentration=1.7)
    problem = model.problem(groups(30))
    one = mixtures.parameters(kind)
    values = problem.model.site_values(one)
    z = problem.density().unconstrain({key: values[key] for key in problem.density().sites})
    likelihood = problem.density().of_part("likelihood").log_prob(z)
    constrained = problem.density().of_part("constrained").log_prob(z)
    assert float(log_prior(one, problem.model.prior)) == pytest.approx(float(constrained - likelihood), rel=1e-9)


@pytest.mark.slow
@EACH
def test_map_is_the_mode_that_newton_steps_find(kind: Covariance) -> None:
    problem = GaussianMixture(2, covariance=kind, concentration=2.0).problem(groups(40, num_groups=2))
    fit = vl.em(problem, objective="map", tolerance=1e-12)
    point = fit.point()
    near = {key: point[key] * 1.02 if key != "weights" else point[key] for key in point}
    hidden = pyro_blocked(problem.model)
    newton = vl.fit(problem, MAP(hidden, init_to_value(values=near)), progress=False)
    assert (fit.status, newton.status) == (vl.Status.CONVERGED, vl.Status.CONVERGED)
    for key, value in newton.point().items():
        torch.testing.assert_close(point[key], value, rtol=1e-5, atol=1e-5)
    assert -newton.history["negative_log_density"][-1] == pytest.approx(fit.history["free_energy"][-1], rel=1e-9)
    torch.testing.assert_close(fit.guide.median()["loc"], point["loc"])


def pyro_blocked(model: GaussianMixture) -> object:
    return poutine.block(model, hide=["assignment"])


@EACH
def test_scikit_learn_from_the_same_start(kind: Covariance) -> None:
    mixture = pytest.importorskip("sklearn.mixture")
    X, K = groups(300, dim=3, num_groups=4), 4
    problem = GaussianMixture(K, covariance=kind).problem(X)
    start = vl.em(problem, max_steps=1).point()
    fit = vl.em(problem, start=start, tolerance=1e-11, max_steps=5000)
    theirs = mixture.GaussianMixture(
        K,
        covariance_type=kind,
        tol=1e-14,
        max_iter=5000,
        weights_init=start["weights"].numpy(),
        means_init=start["loc"].numpy(),
        precisions_init=start["precision"].numpy(),
    ).fit(X.numpy())
    assert fit.history["free_energy"][-1] == pytest.approx(300 * theirs.score(X.numpy()), rel=1e-9)
    np.testing.assert_allclose(fit.point()["weights"], theirs.weights_, rtol=1e-4)
    np.testing.assert_allclose(fit.point()["loc"], theirs.means_, rtol=1e-4)
    assert problem.model.predict(fit.posterior(), X).tolist() == theirs.predict(X.numpy()).tolist()
    np.testing.assert_allclose(
        problem.model.score_samples(fit.posterior(), X), theirs.score_samples(X.numpy()), rtol=1e-4
    )


def test_one_component_is_the_sample_mean_and_covariance() -> None:
    X = groups(50)
    point = vl.em(GaussianMixture(1).problem(X), reg_covar=0.0).point()
    torch.testing.assert_close(point["loc"][0], X.mean(0))
    torch.testing.assert_close(point["precision"][0].inverse(), torch.cov(X.T, correction=0))


def test_far_from_zero_the_fit_is_the_same() -> None:
    X = groups(80)
    near, far = (vl.em(GaussianMixture(3).problem(x), seed=2).point() for x in (X, X + 2.0**30))
    # the rows are rounded to 2**30 * eps
    torch.testing.assert_close(far["loc"] - 2.0**30, near["loc"], rtol=0, atol=1e-5)
    torch.testing.assert_close(far["precision"], near["precision"], rtol=1e-4, atol=1e-6)


def test_a_weight_of_two_is_the_row_twice() -> None:
    X = groups(60)
    weight = torch.ones(60, dtype=torch.float64)
    weight[::3], weight[1] = 2.0, 0.0
    twice = torch.cat([X[weight > 0], X[::3]])
    start = vl.em(GaussianMixture(2).problem(X), max_steps=1).point()
    one = vl.em(GaussianMixture(2).problem(X, sample_weight=weight), start=start)
    other = vl.em(GaussianMixture(2).problem(twice), start=start)
    assert one.history["free_energy"][-1] == pytest.approx(other.history["free_energy"][-1], rel=1e-12)
    torch.testing.assert_close(one.point()["loc"], other.point()["loc"])


def test_restarts_are_sorted_and_repeat() -> None:
    problem = GaussianMixture(4).problem(groups(80, apart=1.5))
    fit, again = (vl.em(problem, num_restarts=4, init="kmeans++", seed=7, max_steps=40) for _ in range(2))
    ends = fit.history["free_energy"][-1]
    assert len(fit.statuses) == 4
    assert (fit.history["free_energy"] == again.history["free_energy"]).all()
    best = [end for end, status in zip(ends, fit.statuses, strict=True) if status is fit.status]
    assert best[0] == max(best)


def test_an_empty_component_is_moved_to_the_row_that_fits_worst() -> None:
    X = torch.cat([groups(60, num_groups=1), torch.tensor([[40.0, 40.0], [40.5, 40.0], [40.0, 40.7]]).double()])
    start = {
        "weights": torch.tensor([0.5, 0.5]),
        "loc": torch.stack([X[:60].mean(0), torch.tensor([-1e4, 1e4]).double()]),
    }
    fit = vl.em(GaussianMixture(2).problem(X), start={**start, "precision": torch.eye(2).expand(2, 2, 2)})
    assert "component(s) 1 had lost all rows" in fit.message
    assert float(fit.point()["weights"][1]) == pytest.approx(3 / 63, rel=1e-6)


def test_a_component_on_one_row_is_named() -> None:
    X = torch.cat([groups(60, num_groups=1), torch.tensor([[40.0, 40.0]]).double()])
    loc = torch.stack([X[:60].mean(0), X[60]])
    start = {"weights": torch.tensor([0.9, 0.1]), "loc": loc, "precision": torch.eye(2).expand(2, 2, 2)}
    held = vl.em(GaussianMixture(2).problem(X), start=start)
    assert "covariance of component(s) 1 is held up by reg_covar=1e-06 alone" in held.message
    free = vl.em(GaussianMixture(2).problem(X), start=start, reg_covar=0.0)
    assert free.status is vl.Status.DIVERGED
    assert "the covariance of component 1 is singular" in free.message
    prior = vl.em(GaussianMixture(2).problem(X), start=start, objective="map")
    assert prior.status is vl.Status.CONVERGED


def test_steps_that_run_out_are_said() -> None:
    fit = vl.em(GaussianMixture(3).problem(groups(90, apart=0.5)), max_steps=2)
    assert fit.status is vl.Status.OUT_OF_STEPS
    assert "max_steps=2" in fit.message
    assert fit.num_steps == 2


def test_a_posterior_is_the_point() -> None:
    fit = vl.em(GaussianMixture(2, weights="dirichlet_process").problem(groups(40)), objective="map")
    posterior = fit.posterior(5)
    assert posterior.draws["stick"].shape == (1, 5, 1)
    with pytest.raises(ArgumentError, match="it is a point"):
        fit.elbo()


def test_the_maximum_of_the_posterior_is_one_given_responsibilities() -> None:
    """No neighbor has a higher expected log joint density."""
    X = groups(30)
    for kind in KINDS:
        problem = GaussianMixture(2, covariance=kind, concentration=1.5).problem(X)
        prior = problem.model.prior
        found = mixtures.parameters(kind, num_components=2).normals()
        sums = moments(X, found)
        best = maximum_posterior(sums, prior)

        def value(one: Parameters, sums=sums, prior=prior) -> float:
            return float(mixtures.expected_log_density(sums, one.normals()) + log_prior(one, prior))

        top, rng = value(best), np.random.default_rng(0)
        for _ in range(10):
            scale = 1 + 1e-3 * float(rng.normal())
            moved = best._replace(
                loc=best.loc + 1e-3 * torch.tensor(rng.normal(size=best.loc.shape)), covariance=best.covariance * scale
            )
            assert value(moved) < top


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"objective": "ml"}, "unknown objective 'ml'"),
        ({"init": "random"}, "unknown init 'random'"),
        ({"num_restarts": 0}, "num_restarts must be a positive whole number"),
        ({"tolerance": -1.0}, "tolerance is in nats"),
        ({"reg_covar": -1.0}, "reg_covar is a variance"),
        ({"objective": "map", "reg_covar": 1e-6}, "no meaning with objective='map'"),
        ({"start": {"weights": [0.5, 0.5]}}, "start has no value of site 'loc'"),
    ],
)
def test_bad_options_are_named(options: dict[str, object], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        vl.em(GaussianMixture(2).problem(groups(20)), **options)


def test_priors_without_a_mode_are_named() -> None:
    with pytest.raises(ArgumentError, match=r"concentration of at least 1, got 0\.5"):
        vl.em(GaussianMixture(2, concentration=0.5).problem(groups(20)), objective="map")
    with pytest.raises(ArgumentError, match="more degrees of freedom than 2"):
        vl.em(GaussianMixture(2, degrees_of_freedom=2.0).problem(groups(20)), objective="map")


def test_another_model_and_copies_of_a_row() -> None:
    with pytest.raises(ArgumentError, match=r"em is for problems of models\.GaussianMixture, and eight_schools"):
        vl.em(vl.models.build("eight_schools"))
    with pytest.raises(DataError, match=r"2 different row\(s\)"):
        vl.em(GaussianMixture(3, covariance="diag").problem(groups(2).repeat(5, 1)))
