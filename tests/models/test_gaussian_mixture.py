from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.special import logsumexp

import pyro_vi_lab as vl
from pyro_vi_lab.errors import ArgumentError, DataError, ModelError
from pyro_vi_lab.models import GaussianMixture
from pyro_vi_lab.models.normal_mixture import NormalMixture
from tests import mixtures
from tests.mixtures import KINDS, groups

EACH = pytest.mark.parametrize("kind", KINDS)


@EACH
@pytest.mark.parametrize("missing", [False, True])
def test_the_marginal_density_is_that_of_the_observed_coordinates(kind: str, missing: bool) -> None:
    X, one = groups(12, dim=3), mixtures.parameters(kind, dim=3)
    observed = torch.rand(12, 3, generator=torch.Generator().manual_seed(0)) < 0.6
    observed[:, 0] |= ~observed.any(1)
    observed = observed if missing else None
    fn = NormalMixture(one.weights, one.loc, one.precision(), kind, observed=observed, num_rows=12)
    expected = logsumexp(mixtures.log_densities(X, one, observed), 1)
    np.testing.assert_allclose(fn.log_prob(X), expected, rtol=1e-9)
    assert fn.sample().shape == (12, 3)


@EACH
def test_simulated_rows_come_from_their_components(kind: str) -> None:
    scatter = {"full": torch.eye(2), "tied": torch.eye(2), "diag": torch.ones(2), "spherical": 1.0}[kind]
    for marginal in (False, True):
        model = GaussianMixture(2, covariance=kind, mean_prior=[0.0, 0.0], covariance_prior=scatter, marginal=marginal)
        X, values = model.simulate(2000, seed=3)
        assert torch.equal(X, model.simulate(2000, seed=3)[0])
        precision = values["precision"]
        variance = precision.inverse().diagonal(dim1=-2, dim2=-1) if kind in ("full", "tied") else 1 / precision
        variance = variance[:, None] if kind == "spherical" else variance
        weights, loc = values["weights"], values["loc"]
        mean = weights @ loc
        sd = (weights @ (variance + loc.square()) - mean.square()).sqrt()
        assert bool(((X.mean(0) - mean).abs() < 5 * sd / 2000**0.5).all())
        assert ("assignment" in values) is not marginal


def test_priors_are_those_of_the_data_and_can_be_seen() -> None:
    X = groups(50)
    open_model = GaussianMixture(2)
    model = open_model.problem(X).model
    assert open_model.mean_prior is None
    torch.testing.assert_close(model.prior.loc, X.mean(0))
    torch.testing.assert_close(model.prior.scatter, torch.cov(X.T))
    assert model.prior.df == 4.0
    with pytest.raises(ModelError, match="mean_prior or covariance_prior of GaussianMixture is not set"):
        open_model.simulate(3)


@EACH
def test_what_a_posterior_says_of_rows(kind: str) -> None:
    X = groups(60, apart=15.0)
    problem = GaussianMixture(3, covariance=kind).problem(X)
    posterior, model = vl.em(problem, objective="map").posterior(3), problem.model
    r = model.responsibilities(posterior, X)
    torch.testing.assert_close(r.sum(1), torch.ones(60, dtype=torch.float64))
    torch.testing.assert_close(model.predict(posterior, X), r.argmax(1))
    new, component = model.sample(posterior, 3000, seed=0)
    # the most probable component is the right one as often as its probability says
    right = float(model.responsibilities(posterior, new).amax(1).mean())
    hits = float((model.predict(posterior, new) == component).double().mean())
    assert abs(hits - right) < 5 * math.sqrt(right * (1 - right) / 3000) + 1e-3
    holes = X.clone()
    holes[:, 0] = math.nan
    assert bool(model.score_samples(posterior, holes, missing="marginalize").isfinite().all())
    with pytest.raises(DataError, match="missing or infinite value in row 0, column 0"):
        model.predict(posterior, holes)


BAD_DATA = [
    (np.zeros((0, 2)), {}, "at least one row and one column"),
    (np.ones(3), {}, "one column is X"),
    ([[1.0, 2.0]], {}, r"1 row\(s\), too few"),
    ([[math.nan, 1.0], [math.nan, 3.0]], {"missing": "marginalize"}, "column 'x0' of X has no value at all"),
    ([[1.0, 2.0], [2.0, 1.0]], {"num_components": 3}, r"2 row\(s\), too few for 3 components"),
    ([[1.0, 2.0], [1.0, 3.0], [1.0, 5.0]], {}, "column 'x0' of X is constant"),
    ([[1.0, math.nan], [2.0, 3.0]], {}, "the first in row 0, column 'x1'; integrate them out"),
    ([[math.nan, math.nan], [2.0, 3.0]], {"missing": "marginalize"}, "row 0 of X has no value"),
    ([[1.0, math.inf], [2.0, 3.0]], {}, "infinite value in row 0, column 'x1'"),
    ([[1.0, 0.0], [2.0, 3.0]], {"sample_weight": [1.0, -1.0]}, r"sample_weight of row 1 is -1\.0"),
    ([[1.0, 0.0], [2.0, 3.0]], {"sample_weight": [1.0]}, r"sample_weight has shape \(1,\); expected \(2,\)"),
    ([[1.0, 0.0, 1.0], [2.0, 3.0, 1.5]], {}, "singular, so that it makes no prior"),
]


@pytest.mark.parametrize(("X", "options", "message"), BAD_DATA)
def test_bad_data_are_named(X: object, options: dict[str, object], message: str) -> None:
    number = options.pop("num_components", 1) if "num_components" in options else 1
    with pytest.raises(DataError, match=message):
        GaussianMixture(number).problem(X, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_components": 0}, "num_components must be a positive whole number"),
        ({"covariance": "diagonal"}, "unknown covariance 'diagonal': did you mean 'diag'"),
        ({"weights": "process"}, "unknown weights"),
        ({"concentration": 0.0}, "concentration must be a positive number"),
        ({"covariance_prior": [[1.0, 2.0], [2.0, 1.0]]}, "positive definite"),
        ({"covariance_prior": [1.0, 2.0]}, "of 'full' covariances it is a matrix"),
        ({"mean_prior": [0.0, 0.0], "degrees_of_freedom": 1.0}, "degrees_of_freedom must be above D - 1 = 1"),
    ],
)
def test_bad_arguments_are_named(options: dict[str, object], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        GaussianMixture(**{"num_components": 2, **options})


# Where there is an answer it is a number: each is what the fit says of the rows, and of the components without any.
ODD = {
    "copies": (torch.cat([groups(30), groups(30)]), 3),
    "as many rows as components": (groups(6), 6),
    "three different rows": (torch.tensor([[0.0, 0.0], [1.0, 1.0], [1.0, 0.0]], dtype=torch.float64).repeat(10, 1), 3),
    "more components than groups": (groups(40), 10),
    "fewer rows than columns": (groups(5, dim=8), 2),
}


@EACH
@pytest.mark.parametrize("name", ODD)
def test_odd_rows_have_an_answer(kind: str, name: str) -> None:
    X, number = ODD[name]
    prior = torch.cov(X.mT) if len(X) > X.shape[1] else torch.diag(X.var(0))
    prior = {"diag": prior.diagonal(), "spherical": prior.diagonal().mean()}.get(kind, prior)
    problem = GaussianMixture(number, covariance=kind, covariance_prior=prior).problem(X)
    for fit in (vl.fit(problem, "conjugate", progress=False), vl.em(problem, objective="map")):
        assert fit.status is vl.Status.CONVERGED
        posterior = fit.posterior(3)
        for value in posterior.draws.values():
            assert bool(value.isfinite().all())
        torch.testing.assert_close(
            problem.model.responsibilities(posterior, X).sum(1), torch.ones(len(X), dtype=torch.float64)
        )


def test_copies_of_all_rows_are_weights_of_two() -> None:
    X = groups(30)
    prior = {"mean_prior": X.mean(0), "covariance_prior": torch.cov(X.mT)}
    twice = vl.fit(GaussianMixture(3, **prior).problem(torch.cat([X, X])), "conjugate", progress=False)
    weighted = GaussianMixture(3, **prior).problem(X, sample_weight=torch.full((30,), 2.0))
    other = vl.fit(weighted, "conjugate", progress=False)
    assert twice.history["negative_elbo"][-1] == pytest.approx(other.history["negative_elbo"][-1], rel=1e-9)
