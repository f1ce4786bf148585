"""Verdicts on fits whose truth is known."""

from __future__ import annotations

import json
import math
from functools import cache
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoNormal
from torch import Tensor

import pyro_vi_lab as vl
from pyro_vi_lab import Problem, Verdict
from tests import posteriordb
from tests.comparisons import REGRESSION, regression_problem, unbounded


@cache
def verdict(guide: str) -> Verdict:
    """Of a regression with correlated covariates: full-rank is exact, mean-field far too narrow."""
    return vl.trust(vl.fit(regression_problem(), guide, progress=False))


def far_modes() -> None:
    x = pyro.sample("x", dist.Normal(0.0, 8.0))
    pyro.factor("two", torch.logaddexp(-0.5 * (x - 8) ** 2 / 0.25, -0.5 * (x + 8) ** 2 / 0.25))


def funnel() -> None:
    tau = pyro.sample("tau", dist.LogNormal(0.0, 1.5))
    with pyro.plate("group", 5):
        pyro.sample("theta", dist.Normal(0.0, tau))


def test_exact_fit_is_trusted() -> None:
    found = verdict("full_rank")
    assert found.decision == "trust"
    assert found.suggestions == []
    assert set(found.parameters["verdict"]) == {"right"}
    assert found.posterior is None
    assert (found.parameters["mean_shift"].abs() <= 5 * found.parameters["mean_shift_se"] + 1e-6).all()
    assert found.parameters["coverage_90"].between(0.85, 0.95).all()


def test_narrow_fit_is_not_and_its_parameters_are_named() -> None:
    found = verdict("mean_field")
    assert found.decision in ("reweight", "refine")
    assert "full_rank" in found.suggestions
    problem = regression_problem()
    exact = REGRESSION.exact_posterior(*problem.args, num_chains=4, num_draws=1000, seed=1)
    draws = vl.fit(problem, "mean_field", progress=False).posterior(4000, seed=5)
    truth = {
        f"{name}[{i}]" if sd.dim() else name: float(value)
        for name, sd in exact.sd().items()
        for i, value in enumerate((draws.sd()[name] / sd).reshape(-1).tolist())
    }
    for row in found.parameters.to_dict("records"):
        assert row["sd_ratio"] == pytest.approx(truth[row["parameter"]], abs=5 * row["sd_ratio_se"] + 0.03)
    wrong = set(found.parameters.query("verdict == 'wrong'")["parameter"])
    assert wrong == {name for name, ratio in truth.items() if ratio < 1 / 1.5}
    assert any(next(iter(wrong)) in reason or "parameters" in reason for reason in found.reasons)


def test_reweighted_draws_have_the_right_moments() -> None:
    """Attached where the weights allow it: a correlation of 0.5 in two dimensions, where k is 0.5 too."""
    covariance = torch.tensor([[1.0, 0.5], [0.5, 1.0]])

    def model() -> None:
        pyro.sample("x", dist.MultivariateNormal(torch.zeros(2), covariance))

    found = vl.trust(vl.fit(Problem(model), "mean_field", progress=False), max_sd_ratio=1.1)
    assert found.decision == "reweight"
    assert found.posterior is not None
    x = found.posterior.draws["x"][0]
    assert torch.allclose(torch.cov(x.T), covariance.to(x), atol=5 * math.sqrt(2 / len(x)))


def test_funnel_is_refined_by_another_parameterization() -> None:
    found = vl.trust(vl.fit(Problem(funnel), "full_rank", progress=False))
    assert found.decision == "refine"
    assert found.suggestions[0] == "non-center theta"
    assert any("poutine.reparam" in reason for reason in found.reasons)


def test_mode_that_is_left_out_is_found() -> None:
    found = vl.trust(vl.fit(Problem(far_modes), "full_rank", progress=False))
    assert found.decision == "refine"
    assert found.suggestions == ["mixture"]
    assert found.checks["other_modes"].mass.tolist() == pytest.approx([0.5], abs=0.05)
    assert vl.trust(vl.fit(Problem(far_modes), "mixture", progress=False)).decision == "trust"


def test_guide_written_by_hand_is_judged_by_its_draws() -> None:
    def model() -> None:
        pyro.sample("x", dist.Normal(1.0, 2.0))

    def guide() -> None:
        loc = pyro.param("loc", torch.tensor(0.5))
        scale = pyro.param("scale", torch.tensor(1.0), constraint=dist.constraints.positive)
        pyro.sample("x", dist.Normal(loc, scale))

    problem = Problem(model)
    assert vl.trust(vl.fit(problem, guide, progress=False)).decision == "trust"
    pyro.clear_param_store()
    stopped = vl.fit(problem, guide, max_steps=1, progress=False)
    assert vl.trust(stopped).decision in ("reweight", "refine", "sample")


def test_autoguide_of_pyro() -> None:
    problem = regression_problem()
    found = vl.trust(vl.fit(problem, AutoNormal(problem.model), max_steps=3000, progress=False))
    assert found.decision != "trust"
    assert found.parameters["sd_ratio"].min() < 1 / 1.5


def test_problem_fitted_in_batches_is_judged_on_all_rows() -> None:
    def model(y: Tensor) -> None:
        mean = pyro.sample("mean", dist.Normal(0.0, 10.0))
        with pyro.plate("row", len(y)):
            pyro.sample("y", dist.Normal(mean, 1.0), obs=y)

    y = torch.randn(200, generator=torch.Generator().manual_seed(0))
    found = vl.trust(vl.fit(Problem(model, y, minibatch=100), "full_rank", max_steps=2000, progress=False))
    assert len(found.parameters) == 1
    assert found.parameters["mean_shift_se"].item() > 0


def test_quantities_are_what_is_judged() -> None:
    fit = vl.fit(regression_problem(), "mean_field", progress=False)

    def total(values: Any) -> dict[str, Tensor]:
        return {"sum": values["beta"].sum(-1)}

    found = vl.trust(fit, quantities=total)
    assert found.parameters["parameter"].tolist() == ["sum"]
    only = vl.trust(fit, quantities=["intercept"])
    assert only.parameters["parameter"].tolist() == ["intercept"]
    with pytest.raises(vl.LabError, match="'slope', which is no site; sites are"):
        vl.trust(fit, quantities=["slope"])
    with pytest.raises(vl.LabError, match="'sum' must be a tensor with one entry per draw"):
        vl.trust(fit, quantities=lambda values: {"sum": values["beta"].sum()})


def test_tolerances_are_the_users() -> None:
    fit = vl.fit(regression_problem(), "mean_field", progress=False)
    assert vl.trust(fit, max_mean_shift=1.0, max_sd_ratio=100.0).decision == "trust"
    with pytest.raises(vl.LabError, match=r"max_sd_ratio is a factor and must be above 1, got 0\.5"):
        vl.trust(fit, max_sd_ratio=0.5)
    with pytest.raises(vl.LabError, match=r"max_mean_shift .* must be positive"):
        vl.trust(fit, max_mean_shift=0.0)
    with pytest.raises(vl.LabError, match="unknown budget 'quick'"):
        vl.trust(fit, budget="quick")  # type: ignore[arg-type]


def test_fits_without_a_posterior() -> None:
    with pytest.raises(vl.LabError, match="'map' is a point"):
        vl.trust(vl.fit(regression_problem(), "map", progress=False))
    found = vl.trust(vl.fit(Problem(unbounded), "full_rank", progress=False))
    assert found.decision == "refine"
    assert "diverged" in found.reasons[0]
    assert found.to_dict()["parameters"] == []
    with pytest.raises(vl.LabError, match="trust judges a Fit, got int"):
        vl.trust(3)  # type: ignore[arg-type]


def test_mismatch_of_support_is_said() -> None:
    """The density is zero on half of the real line, where the guide draws."""

    def model() -> None:
        x = pyro.sample("x", dist.ImproperUniform(dist.constraints.real, (), ()))
        pyro.factor("half", torch.where(x > 0, -x.abs(), torch.tensor(-math.inf, dtype=x.dtype)))

    def guide() -> None:
        pyro.param("unused", torch.tensor(0.0))
        pyro.sample("x", dist.Normal(0.5, 1.0))

    fit = vl.fit(Problem(model), guide, max_steps=2, progress=False)
    if fit.status is vl.Status.DIVERGED:
        assert "not finite" in fit.message or "diverged" in fit.message
        return
    found = vl.trust(fit)
    assert found.decision != "trust"
    assert any("mismatch of support" in reason for reason in found.reasons)


def test_same_seed_same_verdict() -> None:
    fit = vl.fit(regression_problem(), "mean_field", progress=False)
    one, other = (vl.trust(fit, seed=3).to_dict() for _ in range(2))
    assert {**one, "seconds": 0} == {**other, "seconds": 0}


def test_verdict_is_shown_and_written() -> None:
    found = verdict("mean_field")
    assert json.loads(json.dumps(found.to_dict(), allow_nan=False))["decision"] == found.decision
    assert str(found).startswith(f"{found.decision}: mean_field fit of regression")
    assert "sd ratio" in str(found)
    assert found._repr_html_().count("<tr>") == 1 + len(found.parameters)
    assert found.decision in repr(found)


def test_names_are_escaped_in_notebooks() -> None:
    def model() -> None:
        pyro.sample("<script>", dist.Normal(0.0, 1.0))

    found = vl.trust(vl.fit(Problem(model, name="<b>"), "full_rank", progress=False))
    assert "<script>" not in found._repr_html_()
    assert "&lt;script&gt;" in found._repr_html_()
    assert "<b>" not in found._repr_html_()


WRONG_MEAN_FIELD = {
    "kidiq-kidscore_interaction": {"beta[0]", "beta[1]", "beta[2]", "beta[3]"},
    "kidiq-kidscore_momiq": {"beta[0]", "beta[1]"},
    "earnings-earn_height": {"beta[0]", "beta[1]"},
}


@pytest.mark.parametrize("name", [*WRONG_MEAN_FIELD, pytest.param("mesquite-mesquite", marks=pytest.mark.slow)])
def test_under_dispersed_regressions_are_named_without_nuts(name: str) -> None:
    posteriordb.require()
    loaded = posteriordb.load(name)
    fit = vl.fit(Problem(loaded.case.model, **loaded.data, name=name), "mean_field", progress=False)
    found = vl.trust(fit)
    assert found.decision != "trust"
    named = set(found.parameters.query("verdict == 'wrong'")["parameter"])
    assert named >= WRONG_MEAN_FIELD.get(name, {"beta[0]"})
    assert found.parameters["sd_ratio"].min() == pytest.approx(
        loaded.info["gaussian_vi_baseline"]["mean_field"]["sd_ratio_min"], rel=0.2
    )
    assert "sigma" not in named


def test_restarts_at_other_optima_speak_against_a_fit() -> None:
    found = vl.trust(vl.fit(Problem(far_modes), "full_rank", num_restarts=8, seed=1, progress=False))
    assert found.decision == "refine"
    assert len(found.checks["restarts"].optima) >= 2
    assert any("distinct optima" in reason for reason in found.reasons)
    same = vl.trust(vl.fit(regression_problem(), "full_rank", num_restarts=3, progress=False))
    assert same.decision == "trust"
    assert len(same.checks["restarts"].optima) == 1


def test_thorough_verdict_adds_bounds_and_the_stein_discrepancy() -> None:
    found = vl.trust(vl.fit(regression_problem(), "full_rank", progress=False), budget="thorough")
    assert found.decision == "trust"
    assert {"evidence", "stein", "error_bounds"} <= found.checks.keys()
    assert found.checks["stein"].p_value > 1e-3  # the posterior itself
    assert found.checks["evidence"].lower <= found.checks["evidence"].psis <= found.checks["evidence"].upper
    assert any("kernel Stein discrepancy" in reason for reason in found.reasons)
    json.dumps(found.to_dict(), allow_nan=False)


def test_small_mode_far_away_is_found() -> None:
    """Two per cent of the mass, sixty standard deviations away: the sd of all is seven times the guide's."""

    def model() -> None:
        x = pyro.sample("x", dist.Normal(0.0, 50.0))
        parts = torch.stack([-0.5 * (x - 20) ** 2 + math.log(0.98), -0.5 * (x + 40) ** 2 + math.log(0.02)])
        pyro.factor("two", parts.logsumexp(0))

    found = vl.trust(vl.fit(Problem(model), "full_rank", progress=False))
    assert found.decision == "refine"
    assert "mixture" in found.suggestions
    assert float(found.checks["other_modes"].mass) == pytest.approx(0.016, abs=0.004)


def test_long_tail_that_a_guide_lacks_is_not_trusted() -> None:
    """A banana, of which a mixture of normals holds the middle; the chains creep out slowly."""

    def banana() -> None:
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(x * x, 0.5))

    for guide in ("full_rank", "mixture"):
        assert vl.trust(vl.fit(Problem(banana), guide, progress=False)).decision != "trust"
