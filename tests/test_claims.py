"""What the project promises, each promise as one test."""

from __future__ import annotations

import time

import numpy as np
import pyro
import pytest
import torch
from pyro.infer import SVI

import pyro_vi_lab as vl
from pyro_vi_lab import models
from pyro_vi_lab.models import EightSchools, LinearRegression
from tests import posteriordb

NEAR_NORMAL_ON_RAW_SCALES = [
    "mesquite-mesquite",
    "kidiq-kidscore_momiq",
    "kidiq-kidscore_interaction",
    "earnings-earn_height",
    "earnings-logearn_interaction",
    "wells_data-wells_dae_inter_model",
]
SOLVED_BY_NUTS = ["dogs-dogs_2020", "gp_pois_regr-gp_regr", "eight_schools-eight_schools_noncentered"]


@pytest.mark.parametrize(("rows", "columns"), [(30, 2), (200, 10), (300, 40)])
@pytest.mark.parametrize("seed", range(3))
def test_linear_regression_reaches_the_closed_form(rows: int, columns: int, seed: int) -> None:
    model = LinearRegression(noise_scale=0.7)
    X, y = model.simulate(rows, columns, seed=seed)[:2]
    exact = model.exact(X, y)
    fit = vl.fit(model.problem(X, y), "full_rank", seed=seed, progress=False)
    assert fit.status is vl.Status.CONVERGED
    assert fit.num_steps <= 50
    scale = exact.covariance.diagonal().sqrt()
    assert float(((fit.loc - exact.mean) / scale).abs().max()) < 1e-6
    assert float((fit.covariance() - exact.covariance).abs().max() / exact.covariance.abs().max()) < 1e-6


@pytest.mark.parametrize(("guide", "bound"), [("full_rank", -31.65), ("mean_field", -31.68)])
@pytest.mark.parametrize("seed", range(5))
def test_eight_schools_within_sixty_steps(guide: str, bound: float, seed: int) -> None:
    fit = vl.fit(models.build("eight_schools"), guide, seed=seed, progress=False)
    assert fit.status is vl.Status.CONVERGED
    assert fit.num_steps <= 60
    value, error = fit.elbo(20_000, seed=1)
    assert error < 0.02
    assert value >= bound


@pytest.mark.parametrize("name", NEAR_NORMAL_ON_RAW_SCALES)
@pytest.mark.parametrize("seed", range(2))
def test_raw_scale_regressions_need_no_standardizing(name: str, seed: int) -> None:
    posteriordb.require()
    loaded = posteriordb.load(name)
    fit = vl.fit(vl.Problem(loaded.case.model, **loaded.data), "full_rank", seed=seed, progress=False)
    assert fit.status is vl.Status.CONVERGED
    assert fit.num_steps <= 100
    # On the scale of z, where the family lives. (On the scale of sigma itself the best Gaussian of mesquite has 0.90 of the
    # reference's sd: sigma's posterior has a heavier right tail than any log-normal.)
    mean, sd = fit.loc.numpy(), fit.covariance().diagonal().sqrt().numpy()
    order = [i for site in fit.problem.density().sites for i in loaded.coordinates(site)]
    reference_mean = loaded.moments["unconstrained_mean"][order]
    reference_sd = np.sqrt(loaded.moments["unconstrained_cov"].diagonal()[order])
    assert np.abs((mean - reference_mean) / reference_sd).max() < 0.1
    assert np.abs(sd / reference_sd - 1).max() < 0.1


@pytest.mark.parametrize("guide", ["mean_field", "full_rank"])
@pytest.mark.parametrize("name", list(posteriordb.POSTERIORS))
def test_every_real_posterior_is_fitted_to_the_best_of_its_family(name: str, guide: str) -> None:
    posteriordb.require()
    loaded = posteriordb.load(name)
    fit = vl.fit(vl.Problem(loaded.case.model, **loaded.data), guide, seed=0, progress=False)
    value, error = fit.elbo(4000, seed=1)
    assert fit.status is vl.Status.CONVERGED
    assert value > loaded.baseline(guide) - 0.1 - 3 * error


@pytest.mark.parametrize("name", SOLVED_BY_NUTS)
def test_nuts_agrees_with_published_draws(name: str) -> None:
    posteriordb.require()
    loaded = posteriordb.load(name)
    draws = vl.nuts(vl.Problem(loaded.case.model, **loaded.data), seed=1, progress=False)
    assert draws.problems() == []
    published = vl.Posterior(
        {key: torch.as_tensor(loaded.draws[key])[None] for key in loaded.case.parameters}, method="published"
    )
    ours = vl.Posterior({key: draws.draws[key] for key in loaded.case.parameters}, method="nuts")
    found = vl.checks.discrepancy(published, ours)
    assert np.abs(found.mean_shift / found.mean_shift_mcse).max() < 5
    assert np.abs((found.sd_ratio - 1) / found.sd_ratio_mcse).max() < 5


def test_a_loop_that_the_user_already_has() -> None:
    model = EightSchools(centered=False)
    problem = models.build("eight_schools")
    guide = vl.guides.FullRankNormal(model)
    optimizer = vl.NaturalGradient(guide, lr=0.5)
    svi = SVI(model, guide, optimizer, vl.ELBO(num_particles=16, vectorize_particles=True, max_plate_nesting=1))
    pyro.set_rng_seed(0)
    for step in range(200):
        optimizer.lr = 0.5 / (1 + step / 20)
        svi.step(*problem.args, **problem.kwargs)
    fit = vl.fit(problem, "full_rank", seed=0, progress=False)
    reached = fit.family.kl(
        vl.families.Params(*(value.detach() for value in guide.params)),
        vl.families.Params(*(value[0] for value in fit.params)),
    )
    assert float(reached) < 0.1


def test_a_warm_fit_takes_less_than_a_third_of_a_second() -> None:
    vl.fit(models.build("eight_schools"), progress=False)
    seconds = []
    for seed in range(5):
        problem = models.build("eight_schools")
        began = time.process_time()
        vl.fit(problem, seed=seed, progress=False)
        seconds.append(time.process_time() - began)
    assert min(seconds) < 0.3


def test_same_seed_same_numbers() -> None:
    first, again = (vl.fit(models.build("eight_schools"), seed=3, num_restarts=2, progress=False) for _ in range(2))
    assert torch.equal(first.params.loc, again.params.loc)
    assert torch.equal(first.params.scale, again.params.scale)
    assert first.elbo() == again.elbo()
