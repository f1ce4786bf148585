"""The climb from the mean-field normal to NUTS."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_vi_lab as vl
from pyro_vi_lab import Problem
from tests import posteriordb
from tests.comparisons import regression_problem


def test_stops_at_the_first_guide_that_is_right() -> None:
    fit = vl.fit(regression_problem(), "auto", progress=False)
    assert [(stage.guide, stage.decision) for stage in fit.path][-1] == ("full_rank", "trust")
    assert fit.path[0].guide == "mean_field"
    assert fit.path[0].decision != "trust"
    assert fit.method == "full_rank"
    assert fit.verdict.decision == "trust"
    assert fit.status is vl.Status.CONVERGED
    assert fit.posterior(100).num_draws == 100


def far_modes() -> None:
    x = pyro.sample("x", dist.Normal(0.0, 8.0))
    pyro.factor("two", torch.logaddexp(-0.5 * (x - 8) ** 2 / 0.25, -0.5 * (x + 8) ** 2 / 0.25))


def test_two_modes_end_with_a_mixture() -> None:
    fit = vl.fit(Problem(far_modes), "auto", progress=False)
    assert fit.method == "mixture"
    x = fit.posterior(4000).draws["x"]
    assert abs(float((x > 0).double().mean()) - 0.5) < 0.05


def test_hierarchy_is_written_non_centered_and_keeps_its_names() -> None:
    """Eight schools, centered."""
    sigma = torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])
    y = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])

    def schools(sigma: torch.Tensor, y: torch.Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
        tau = pyro.sample("tau", dist.HalfCauchy(5.0))
        with pyro.plate("school", 8):
            theta = pyro.sample("theta", dist.Normal(mu, tau))
            pyro.sample("y", dist.Normal(theta, sigma), obs=y)

    problem = Problem(schools, sigma, y)
    fit = vl.fit(problem, "auto", progress=False)
    assert fit.path[-1].changes == ("non-center theta",)
    assert fit.path[-1].decision == "trust"
    posterior = fit.posterior(2000)
    assert posterior.draws["theta"].shape == (1, 2000, 8)
    assert fit.problem.dims("theta") == ("school",)
    # published: tau has mean 3.6 and sd 3.2, mu 4.4 and 3.3
    assert float(posterior.mean()["tau"]) == pytest.approx(3.6, abs=0.3 * 3.2)
    assert float(posterior.mean()["mu"]) == pytest.approx(4.4, abs=0.3 * 3.3)


def curved() -> None:
    """No guide of the ladder holds it within its budget."""
    x = pyro.sample("x", dist.Normal(torch.zeros(40), 1.0).to_event(1))
    pyro.sample("y", dist.Normal(3 * x.square(), 0.1).to_event(1))


@pytest.mark.slow
def test_ends_with_nuts_where_no_guide_is_right() -> None:
    fit = vl.fit(Problem(curved), "auto", progress=False)
    assert fit.path[-1].guide == "nuts"
    assert fit.method == "nuts"
    assert fit.verdict is None
    posterior = fit.posterior(1000)
    assert posterior.method == "nuts"
    assert posterior.num_chains * posterior.num_draws >= 1000
    assert float((posterior.sd()["x"] - 1).abs().max()) < 0.2
    with pytest.raises(vl.LabError, match="ended with NUTS and has no ELBO"):
        fit.elbo()
    assert vl.trust(fit).decision == "sample"


def test_no_time_left_ends_with_the_best_so_far() -> None:
    fit = vl.fit(regression_problem(), "auto", time_budget=1e-6, progress=False)
    assert [stage.guide for stage in fit.path] == ["mean_field"]
    assert fit.method == "mean_field"
    assert fit.verdict.decision != "trust"


def test_arguments_that_auto_does_not_take() -> None:
    problem = regression_problem()
    for given in ({"lr": 0.5}, {"max_steps": 3}, {"optim": "fixed_draws"}, {"num_particles": 8}):
        with pytest.raises(vl.LabError):
            vl.fit(problem, "auto", **given)
    with pytest.raises(vl.LabError, match="time_budget is for 'auto'"):
        vl.fit(problem, "full_rank", time_budget=3.0)
    with pytest.raises(vl.LabError, match="time_budget is in seconds"):
        vl.fit(problem, "auto", time_budget=-1.0)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["normal_2-normal_mixture", "GLMM_Poisson_data-GLMM_Poisson_model"])
def test_right_on_hard_posteriors(name: str) -> None:
    """Two far modes, and a funnel; benchmarks/trust.md has all posteriors."""
    posteriordb.require()
    loaded = posteriordb.load(name)
    fit = vl.fit(Problem(loaded.case.model, **loaded.data, name=name), "auto", progress=False)
    posterior = fit.posterior(4000)
    mean, sd = posterior.mean(), posterior.sd()
    for parameter in loaded.case.parameters:
        assert (abs(mean[parameter].numpy() - loaded.mean[parameter]) <= 0.3 * loaded.sd[parameter]).all()
        ratio = sd[parameter].numpy() / loaded.sd[parameter]
        assert ((ratio >= 1 / 1.5) & (ratio <= 1.5)).all()
