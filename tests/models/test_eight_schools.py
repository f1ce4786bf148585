from __future__ import annotations

import numpy as np
import pytest
import torch
from pyro import poutine
from scipy import stats

from pyro_vi_lab.errors import DataError
from pyro_vi_lab.models import EightSchools, eight_schools

EFFECTS, ERRORS = np.array(eight_schools.EFFECTS), np.array(eight_schools.STANDARD_ERRORS)


def values(seed: int) -> tuple[float, float, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.normal(0, 5), rng.gamma(2.0, 3.0), rng.normal(size=8)


def log_joint(*, centered: bool, **sites: float | np.ndarray) -> float:
    given = {name: torch.as_tensor(value, dtype=torch.float64) for name, value in sites.items()}
    conditioned = poutine.condition(EightSchools(centered=centered), data=given)
    trace = poutine.trace(conditioned).get_trace(torch.tensor(ERRORS), torch.tensor(EFFECTS))
    return float(trace.log_prob_sum())


def priors(mu: float, tau: float) -> float:
    return float(stats.norm(0, 5).logpdf(mu) + stats.halfcauchy(scale=5).logpdf(tau))


@pytest.mark.parametrize("seed", range(3))
def test_the_densities_are_those_of_the_formulas(seed: int) -> None:
    mu, tau, trans = values(seed)
    theta = mu + tau * trans
    likelihood = stats.norm(theta, ERRORS).logpdf(EFFECTS).sum()
    centered = priors(mu, tau) + stats.norm(mu, tau).logpdf(theta).sum() + likelihood
    noncentered = priors(mu, tau) + stats.norm.logpdf(trans).sum() + likelihood
    # the priors are evaluated in torch's default float32
    eps = 100 * torch.finfo(torch.float32).eps
    assert log_joint(centered=True, mu=mu, tau=tau, theta=theta) == pytest.approx(centered, rel=eps)
    assert log_joint(centered=False, mu=mu, tau=tau, theta_trans=trans) == pytest.approx(noncentered, rel=eps)


@pytest.mark.parametrize("seed", range(3))
def test_both_forms_are_one_model(seed: int) -> None:
    torch.set_default_dtype(torch.float64)
    mu, tau, trans = values(seed)
    centered = log_joint(centered=True, mu=mu, tau=tau, theta=mu + tau * trans)
    noncentered = log_joint(centered=False, mu=mu, tau=tau, theta_trans=trans)
    assert noncentered == pytest.approx(centered + 8 * np.log(tau), rel=1e-12)


def test_the_examples_are_the_published_numbers_by_school() -> None:
    problem, centered = eight_schools.example(), eight_schools.example_centered()
    assert problem.observed["y"].tolist() == [28, 8, -3, 7, -1, 1, 18, 12]
    assert problem.inputs["sigma"].tolist() == [15, 10, 16, 11, 9, 11, 10, 18]
    assert {name: site.kind for name, site in problem.sites.items()} == {
        "mu": "latent",
        "tau": "latent",
        "theta_trans": "latent",
        "theta": "deterministic",
        "y": "observed",
    }
    for example in (problem, centered):
        assert example.coords == {"school": list("ABCDEFGH")}
        assert example.dims("theta") == example.dims("y") == ("school",)
    assert (problem.name, centered.name) == ("eight_schools", "eight_schools_centered")


@pytest.mark.parametrize("seed", range(3))
def test_the_problems_have_the_density_of_the_formulas(seed: int) -> None:
    mu, tau, trans = values(seed)
    theta = mu + tau * trans
    likelihood = stats.norm(theta, ERRORS).logpdf(EFFECTS).sum()
    sites = {"mu": mu, "tau": tau, "theta": theta, "theta_trans": trans}
    given = {name: torch.as_tensor(value, dtype=torch.float64) for name, value in sites.items()}
    for problem, effects in (
        (eight_schools.example(), stats.norm.logpdf(trans).sum()),
        (eight_schools.example_centered(), stats.norm(mu, tau).logpdf(theta).sum()),
    ):
        density = problem.density()
        z = density.unconstrain(given)
        torch.testing.assert_close(density.constrain(z)["theta"], given["theta"])
        # tau is exp of its coordinate: the change of variables adds log tau
        expected = priors(mu, tau) + np.log(tau) + effects + likelihood
        assert float(density.log_prob(z)) == pytest.approx(expected, rel=1e-12)


def test_shapes_that_disagree_are_named() -> None:
    with pytest.raises(DataError, match=r"sigma has shape \(8,\) and y \(7,\); both need one value per school"):
        EightSchools(centered=True)(torch.ones(8), torch.zeros(7))
