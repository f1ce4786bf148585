from __future__ import annotations

import math

import numpy as np
import pyro
import pytest
import torch
from scipy import integrate, stats

import pyro_vi_lab as vl
from pyro_vi_lab.checks import discrepancy
from pyro_vi_lab.errors import ArgumentError, DataError
from pyro_vi_lab.guides import Conjugate
from pyro_vi_lab.models import UnivariateNormal

MODEL = UnivariateNormal(prior_loc=1.0, relative_precision=0.5, precision_shape=2.5, precision_rate=0.8)
X = torch.tensor(np.random.default_rng(0).normal(3.0, 2.0, size=20))


def log_joint(mean: float, precision: float) -> float:
    sd = precision**-0.5
    return float(
        stats.gamma(2.5, scale=1 / 0.8).logpdf(precision)
        + stats.norm(1.0, sd / math.sqrt(0.5)).logpdf(mean)
        + stats.norm(mean, sd).logpdf(X.numpy()).sum()
    )


def test_joint_over_posterior_is_the_evidence_everywhere() -> None:
    exact = MODEL.exact(X)
    density = MODEL.problem(X).density()
    for z in np.random.default_rng(1).normal(size=(5, 2)):
        precision, mean = math.exp(z[0]), z[1]
        log_q = stats.gamma(exact.precision_shape, scale=1 / exact.precision_rate).logpdf(precision)
        log_q += stats.norm(exact.loc, (exact.relative_precision * precision) ** -0.5).logpdf(mean)
        joint = log_joint(mean, precision)
        assert joint - log_q == pytest.approx(exact.log_evidence, rel=1e-11)
        assert float(density.log_prob(torch.tensor(z))) == pytest.approx(joint + z[0], rel=1e-12)


def test_evidence_is_the_multivariate_student_t() -> None:
    shape = 0.8 / 2.5 * (np.eye(20) + 2.0)
    expected = stats.multivariate_t(np.ones(20), shape, df=5.0).logpdf(X.numpy())
    assert MODEL.exact(X).log_evidence == pytest.approx(float(expected), rel=1e-12)


@pytest.mark.parametrize("offset", [0.0, 1e8])
def test_far_from_zero_nothing_cancels(offset: float) -> None:
    x = torch.tensor([0.0, 1.0, 2.0], dtype=torch.float64)
    near, far = UnivariateNormal().exact(x), UnivariateNormal(prior_loc=offset).exact(x + offset)
    assert (far.precision_rate, far.log_evidence) == (near.precision_rate, near.log_evidence)
    assert far.loc - offset == pytest.approx(near.loc, abs=2e-8)


def test_conjugate_is_exact() -> None:
    exact, fit = MODEL.exact(X), vl.fit(MODEL.problem(X), "conjugate", progress=False)
    standard = {key: float(value) for key, value in fit.guide.standard("loc").items()}
    assert standard == pytest.approx(
        {
            "concentration": exact.precision_shape,
            "rate": exact.precision_rate,
            "loc": exact.loc,
            "relative_precision": exact.relative_precision,
        },
        rel=1e-9,
    )
    assert -fit.history["negative_elbo"][-1] == pytest.approx(exact.log_evidence, rel=1e-10)


def test_mean_field_converges_to_its_fixed_point() -> None:
    problem, exact = MODEL.problem(X), MODEL.exact(X)
    fit = vl.fit(problem, Conjugate(problem.model, joint={}), progress=False)
    sd, shape, rate, elbo = exact.mean_field()
    # it stops where a sweep is shorter than 1e-10 nats: 1e-5 standard deviations
    assert float(fit.guide.standard("loc")["scale"]) == pytest.approx(sd, rel=1e-5)
    assert float(fit.guide.standard("loc")["loc"]) == pytest.approx(exact.loc, abs=1e-5 * sd)
    assert float(fit.guide.standard("precision")["concentration"]) == pytest.approx(shape, rel=1e-9)
    assert float(fit.guide.standard("precision")["rate"]) == pytest.approx(rate, rel=1e-5)
    assert -fit.history["negative_elbo"][-1] == pytest.approx(elbo, abs=1e-9)
    assert elbo < exact.log_evidence


def test_the_gap_of_mean_field_is_a_divergence() -> None:
    """By quadrature over the precision, given which both means are normal."""
    exact = MODEL.exact(X)
    sd, shape, rate, elbo = exact.mean_field()
    q, p = stats.gamma(shape, scale=1 / rate), stats.gamma(exact.precision_shape, scale=1 / exact.precision_rate)

    def term(precision: float) -> float:
        ratio = exact.relative_precision * precision * sd**2
        return float(q.pdf(precision) * (q.logpdf(precision) - p.logpdf(precision) + (ratio - 1 - math.log(ratio)) / 2))

    divergence = integrate.quad(term, 1e-6, q.ppf(1 - 1e-15), epsabs=1e-12)[0]
    assert exact.log_evidence - elbo == pytest.approx(divergence, abs=1e-8)


def test_svi_of_the_conjugate_guide_agrees() -> None:
    problem, exact = MODEL.problem(X), MODEL.exact(X)
    guide = Conjugate(problem.model)
    objective = pyro.infer.Trace_ELBO(32, vectorize_particles=True, max_plate_nesting=1)
    svi = pyro.infer.SVI(problem.model, guide, vl.NaturalGradient(guide, lr=0.2), objective)
    for _ in range(60):
        svi.step(X)
    standard = guide.standard("loc")
    # at q = p the gradient of Trace_ELBO is noise of the size of a few particles
    sd = math.sqrt(exact.precision_rate / (exact.precision_shape * exact.relative_precision))
    assert abs(float(standard["loc"]) - exact.loc) < sd
    mean = float(standard["concentration"] / standard["rate"])
    expected = exact.precision_shape / exact.precision_rate
    assert abs(mean - expected) < expected / math.sqrt(exact.precision_shape)


@pytest.mark.slow
def test_nuts_agrees() -> None:
    problem = MODEL.problem(X)
    reference = vl.nuts(problem, num_chains=4, num_warmup=500, num_draws=1000, seed=0, progress=False)
    assert reference.problems() == []
    result = discrepancy(reference, MODEL.exact_posterior(X, num_chains=4, num_draws=4000))
    assert np.all(np.abs(result.mean_shift) < 5 * result.mean_shift_mcse)
    assert np.all(np.abs(result.sd_ratio - 1) < 5 * result.sd_ratio_mcse)


def test_draws_have_the_exact_distribution() -> None:
    exact, posterior = MODEL.exact(X), MODEL.exact_posterior(X, num_chains=2, num_draws=5000, seed=3)
    assert posterior.draws["loc"].shape == (2, 5000)
    torch.testing.assert_close(posterior.draws["sigma"], posterior.draws["precision"].rsqrt())
    df = 2 * exact.precision_shape
    scale = math.sqrt(exact.precision_rate / (exact.precision_shape * exact.relative_precision))
    marginals = {"precision": stats.gamma(df / 2, scale=1 / exact.precision_rate), "loc": stats.t(df, exact.loc, scale)}
    for site, marginal in marginals.items():
        draws = posterior.draws[site].flatten().numpy()
        # p-value as far out as five standard errors
        assert stats.kstest(draws, marginal.cdf).pvalue > 2 * stats.norm.sf(5)
    assert MODEL.problem(X).predictive(posterior)["x"].shape == (2, 5000, 20)


def test_simulated_data_repeat_and_come_from_their_parameters() -> None:
    x, values = MODEL.simulate(2000, seed=5)
    assert torch.equal(x, MODEL.simulate(2000, seed=5)[0])
    standardized = ((x - values["loc"]) / values["sigma"]).numpy()
    assert stats.kstest(standardized, stats.norm.cdf).pvalue > 2 * stats.norm.sf(5)


@pytest.mark.parametrize("rows", [[2.0], [2.0, 2.0, 2.0]])
def test_one_row_and_constant_data_have_a_posterior(rows: list[float]) -> None:
    exact = MODEL.exact(rows)
    assert exact.precision_rate > 0.8
    assert math.isfinite(exact.log_evidence)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        ([], r"x has shape \(0,\); expected \(rows,\)"),
        ([[1.0, 2.0]], r"x has shape \(1, 2\)"),
        ([1.0, math.nan, math.inf], r"2 missing or infinite value\(s\), the first \(nan\) in row 1"),
        (["a"], "x is not numeric"),
    ],
)
def test_bad_data_are_named(x: list[float], message: str) -> None:
    with pytest.raises(DataError, match=message):
        MODEL.problem(x)


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ArgumentError, match="relative_precision must be a positive number, got 0"):
        UnivariateNormal(relative_precision=0.0)
    with pytest.raises(ArgumentError, match="prior_loc must be a finite number, got nan"):
        UnivariateNormal(prior_loc=math.nan)
    with pytest.raises(ArgumentError, match="num_rows must be at least 1"):
        MODEL.simulate(0)
    with pytest.raises(ArgumentError, match="at least 1, got 0 and 1000"):
        MODEL.exact_posterior(X, num_chains=0)
