"""The table of posteriors against its files: sites, coordinates, densities, constants and reference draws."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import partial
from math import log
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from numpy import ndarray
from pyro import poutine
from pyro.infer import TraceEnum_ELBO
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from scipy import special, stats
from torch import Tensor
from torch.distributions import biject_to

from tests import posteriordb
from tests.posteriordb import POSTERIORS, Case, Loaded

NUM_ROWS = 5  # draws at which densities are compared
STANDARD_ERRORS = 5  # fails a right answer once in two million
CHUNK = 500  # draws in one vectorized run: bounds memory

each_posterior = pytest.mark.parametrize("name", POSTERIORS)


@pytest.fixture
def loaded(name: str) -> Loaded:
    posteriordb.require()
    return posteriordb.load(name)


# The model's log density at many points at once, by Pyro alone.


class Substitute(Messenger):
    """Give the latent sites their values, one row per point, on either scale; collect the other scale."""

    def __init__(self, values: Mapping[str, Tensor], unconstrained: bool) -> None:
        super().__init__()
        self.values = values
        self.unconstrained = unconstrained
        self.other: dict[str, Tensor] = {}
        self.log_det: list[Tensor] = []

    def _pyro_sample(self, msg: dict[str, Any]) -> None:
        if msg["name"] not in self.values:
            return
        fn, given = msg["fn"], self.values[msg["name"]]
        transform = biject_to(fn.support)
        if self.unconstrained:
            z = given.reshape(transform.inverse_shape(fn.batch_shape + fn.event_shape))
            value = transform(z)
            self.log_det.append(transform.log_abs_det_jacobian(z, value))
            self.other[msg["name"]] = value
        else:
            value = given.reshape(fn.batch_shape + fn.event_shape)
            self.other[msg["name"]] = transform.inv(value).flatten(1)
        msg["value"] = value


def run_at(loaded: Loaded, values: Mapping[str, Tensor], *, unconstrained: bool) -> tuple[Substitute, poutine.Trace]:
    """Run the model once for all rows of ``values``, under a plate left of its own."""
    (num_rows,) = {len(value) for value in values.values()}
    substitute = Substitute(values, unconstrained)
    with substitute, poutine.trace() as tracer, pyro.plate("row", num_rows, dim=-3):
        loaded.case.model(**loaded.data)
    tracer.trace.compute_log_prob()
    return substitute, tracer.trace


def sample_sites(trace: poutine.Trace) -> dict[str, dict[str, Any]]:
    """The nodes of latent, observed and deterministic sites and factors, without the plates."""
    return {
        name: node for name, node in trace.nodes.items() if node["type"] == "sample" and not site_is_subsample(node)
    }


def unconstrain(loaded: Loaded, latents: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Values of the latent sites by ``biject_to`` of their supports, ``(rows, coordinates)`` each."""
    return run_at(loaded, latents, unconstrained=False)[0].other


def log_density(loaded: Loaded, z: Mapping[str, Tensor]) -> Tensor:
    """Log density on the unconstrained scale, ``(rows,)``."""
    substitute, trace = run_at(loaded, z, unconstrained=True)
    terms = [site["log_prob"] for site in sample_sites(trace).values()]
    return sum(term.flatten(1).sum(-1) for term in terms + substitute.log_det)


def scores(loaded: Loaded, z: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Gradient of the log density at every row."""
    gradients: dict[str, list[Tensor]] = {site: [] for site in z}
    (num_rows,) = {len(value) for value in z.values()}
    for start in range(0, num_rows, CHUNK):
        leaves = {site: value[start : start + CHUNK].clone().requires_grad_() for site, value in z.items()}
        for site, gradient in zip(
            z, torch.autograd.grad(log_density(loaded, leaves).sum(), leaves.values()), strict=True
        ):
            gradients[site].append(gradient)
    return {site: torch.cat(parts) for site, parts in gradients.items()}


def trace_at(loaded: Loaded, row: int) -> poutine.Trace:
    """A plain Pyro trace at one reference draw."""
    values = {site: value[row] for site, value in loaded.latents.items()}
    trace = poutine.trace(poutine.condition(loaded.case.model, values)).get_trace(**loaded.data)
    trace.compute_log_prob()
    return trace


def rows(loaded: Loaded) -> list[int]:
    """A few reference draws, evenly spread."""
    num_draws = len(next(iter(loaded.draws.values())))
    return np.linspace(0, num_draws - 1, NUM_ROWS).astype(int).tolist()


# The table


def test_table_has_every_folder() -> None:
    root = posteriordb.require()
    assert {path.parent.name for path in root.glob("*/info.json")} == set(POSTERIORS)


def test_absent_files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(posteriordb.VARIABLE, str(tmp_path / "nowhere"))
    assert posteriordb.directory() is None
    with pytest.raises(pytest.skip.Exception, match="nowhere: set POSTERIORDB"):
        posteriordb.require()
    with pytest.raises(FileNotFoundError, match="nowhere: set POSTERIORDB"):
        posteriordb.load("arK-arK")


def test_directory_of_the_environment_comes_first(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(posteriordb.VARIABLE, str(tmp_path))
    assert posteriordb.directory() == tmp_path == posteriordb.require()


@each_posterior
def test_flags_agree_with_info(loaded: Loaded) -> None:
    case, info = loaded.case, loaded.info
    best = info["gaussian_vi_baseline"]["full_rank"]
    multimodal = info["log_evidence"]["per_mode"] is not None
    close = best["max_bias_in_sd"] < 0.1 and best["sd_ratio_min"] > 0.9 and best["sd_ratio_max"] < 1.1
    assert case.multimodal == multimodal
    assert case.near_normal == (close and not multimodal)
    assert case.funnel == ("funnel" in info["difficulty_for_gaussian_vi"]["comment"])


@each_posterior
def test_sites_are_the_reference_parameters(loaded: Loaded) -> None:
    described = {p["name"]: tuple(p["shape"]) for p in loaded.info["model"]["parameters"]}
    assert loaded.case.parameters == tuple(described)
    nodes = sample_sites(trace_at(loaded, 0))
    for parameter, shape in described.items():
        assert nodes[parameter]["value"].shape == loaded.mean[parameter].shape == shape
        assert loaded.draws[parameter].shape[1:] == loaded.sd[parameter].shape == shape
    for site, node in nodes.items():
        assert node["value"].dtype == torch.float64, site
    assert loaded.case.improper == any(isinstance(n["fn"], dist.ImproperUniform) for n in nodes.values())


@each_posterior
def test_deterministic_sites_are_the_published_ones(loaded: Loaded) -> None:
    """The large ones are stored in single precision; each is a + b c, of numbers up to ``largest``."""
    with np.load(posteriordb.require() / loaded.case.name / "reference.npz") as stored:
        eps = max(np.finfo(stored[key].dtype).eps for key in stored)
    for row in rows(loaded):
        nodes = trace_at(loaded, row).nodes
        for parameter in loaded.draws.keys() - loaded.latents.keys():
            computed, published = nodes[parameter]["value"].numpy(), loaded.draws[parameter][row]
            largest = max(np.abs(draws[row]).max() for draws in loaded.draws.values())
            np.testing.assert_allclose(computed, published, rtol=0, atol=2 * eps * (1 + largest) ** 2)


# Coordinates


def documented_map(support: str, x: ndarray, draws: Mapping[str, ndarray]) -> ndarray:
    """``unconstrained_map`` of info.json, word by word: ``(draws, *shape)`` to ``(draws, coordinates)``."""
    if support == "real":
        z = x
    elif support == "positive":
        z = np.log(x)
    elif support == "simplex of size 2":
        z = np.log(x[:, 0] / x[:, 1])
    elif support == "ordered: x0 < x1":
        z = np.stack([x[:, 0], np.log(x[:, 1] - x[:, 0])], -1)
    elif support == "positive ordered: 0 < x0 < x1":
        z = np.log(np.stack([x[:, 0], x[:, 1] - x[:, 0]], -1))
    elif support == "(0, 1 - alpha1)":
        z = special.logit(x / (1 - draws["alpha1"]))
    else:
        low, high = map(float, support.strip("()").split(","))
        z = special.logit((x - low) / (high - low))
    return z.reshape(len(z), -1)


@each_posterior
def test_coordinates_are_those_of_the_moments(loaded: Loaded) -> None:
    """Ours are the documented ones, and have the documented mean and covariance."""
    parameters = loaded.info["model"]["parameters"]
    documented = np.concatenate(
        [documented_map(p["support"], loaded.draws[p["name"]], loaded.draws) for p in parameters], -1
    )
    num_draws, dim = documented.shape
    ours = np.full_like(documented, np.nan)
    for site, value in unconstrain(loaded, loaded.latents).items():
        ours[:, loaded.coordinates(site)] = value.numpy()
    assert dim == loaded.info["dimension_unconstrained"] == len(loaded.moments["unconstrained_names"])
    # The logit of p loses digits by 1 / (1 - p), which comes to 2,300 in these draws.
    rounding = 1e4 * np.finfo(np.float64).eps
    np.testing.assert_allclose(ours, documented, rtol=rounding, atol=rounding)

    centered = ours - loaded.moments["unconstrained_mean"]
    products = centered[:, :, None] * centered[:, None, :]
    for samples, published in ((centered, 0), (products, loaded.moments["unconstrained_cov"])):
        standard_error = samples.std(0) / np.sqrt(num_draws)
        assert (np.abs(samples.mean(0) - published) < STANDARD_ERRORS * standard_error).all()


# Densities, written a second time: scipy, the raw data, indices from 1.

Values = Mapping[str, Any]  # data by the names of data.json, or a draw by the names of the parameters
LogJoint = Callable[[Values, Values], float]


def linear(*, X: Callable[[Values], list[Any]], y: Callable[[Values], Any], scale: float | None) -> LogJoint:
    def log_joint(data: Values, draw: Values) -> float:
        rows = np.broadcast_arrays(*(np.asarray(column, float) for column in X(data)))
        mean = sum(beta * column for beta, column in zip(draw["beta"], rows, strict=True))
        prior = 0.0 if scale is None else stats.halfcauchy.logpdf(draw["sigma"], scale=scale)
        return prior + stats.norm.logpdf(y(data), mean, draw["sigma"]).sum()

    return log_joint


def mesquite_columns(data: Values, transform: Callable) -> list[Any]:
    lengths = ("diam1", "diam2", "canopy_height", "total_height", "density")
    return [1, *(transform(data[name]) for name in lengths), data["group"]]


def blr(data: Values, draw: Values) -> float:
    prior = stats.norm.logpdf(draw["beta"], 0, 10).sum() + stats.halfnorm.logpdf(draw["sigma"], scale=10)
    return prior + stats.norm.logpdf(data["y"], np.array(data["X"]) @ draw["beta"], draw["sigma"]).sum()


def bernoulli(y: ndarray, logits: ndarray) -> float:
    return stats.bernoulli.logpmf(y, special.expit(logits)).sum()


def wells(data: Values, draw: Values) -> float:
    total = 0.0
    dist_mean, ars_mean, educ_mean = (np.mean(data[key]) for key in ("dist", "arsenic", "educ"))
    for n in range(data["N"]):
        d = (data["dist"][n] - dist_mean) / 100
        a, e = data["arsenic"][n] - ars_mean, (data["educ"][n] - educ_mean) / 4
        logit = draw["alpha"] + np.dot(draw["beta"], [d, a, e, d * a, d * e, a * e])
        total -= np.logaddexp(0, logit) - data["switched"][n] * logit
    return total


def dogs(data: Values, draw: Values) -> float:
    total = stats.norm.logpdf(draw["beta"], 0, 100).sum()
    for shocks in data["y"]:
        for t, shocked in enumerate(shocks):
            past = sum(shocks[:t])
            total += bernoulli(shocked, np.dot(draw["beta"], [1, t - past, past]))
    return total


def poisson(data: Values, draw: Values, mixed: bool) -> float:
    total = stats.uniform.logpdf(draw["alpha"], -20, 40)
    total += sum(stats.uniform.logpdf(draw[f"beta{k}"], -10, 20) for k in (1, 2, 3))
    eps = np.zeros(data["n"])
    if mixed:
        eps = draw["eps"]
        total += stats.uniform.logpdf(draw["sigma"], 0, 5) + stats.norm.logpdf(eps, 0, draw["sigma"]).sum()
    for t, (year, count) in enumerate(zip(data["year"], data["C"], strict=True)):
        eta = np.polyval([draw["beta3"], draw["beta2"], draw["beta1"], draw["alpha"]], year) + eps[t]
        total += count * eta - np.exp(eta) - special.gammaln(count + 1)
    return total


def eight_schools(data: Values, draw: Values, centered: bool) -> float:
    mu, tau = draw["mu"], draw["tau"]
    total = stats.norm.logpdf(mu, 0, 5) + stats.halfcauchy.logpdf(tau, scale=5)
    theta = draw["theta"] if centered else mu + tau * draw["theta_trans"]
    total += (stats.norm.logpdf(theta, mu, tau) if centered else stats.norm.logpdf(draw["theta_trans"])).sum()
    return total + stats.norm.logpdf(data["y"], theta, data["sigma"]).sum()


def radon(data: Values, draw: Values, centered: bool) -> float:
    mu, tau, sigma, beta = (draw[key] for key in ("mu_alpha", "sigma_alpha", "sigma_y", "beta"))
    total = stats.halfnorm.logpdf([tau, sigma]).sum() + stats.norm.logpdf([mu, *beta], 0, 10).sum()
    alpha = draw["alpha"] if centered else mu + tau * draw["alpha_raw"]
    total += (stats.norm.logpdf(alpha, mu, tau) if centered else stats.norm.logpdf(draw["alpha_raw"])).sum()
    columns = (data[key] for key in ("county_idx", "log_uppm", "floor_measure", "log_radon"))
    for county, uranium, floor, radon in zip(*columns, strict=True):
        residual = radon - (alpha[county - 1] + beta[0] * uranium + beta[1] * floor)
        total += -0.5 * (residual / sigma) ** 2 - np.log(sigma) - 0.5 * log(2 * np.pi)
    return total


def autoregression(data: Values, draw: Values) -> float:
    total = stats.norm.logpdf([draw["alpha"], *draw["beta"]], 0, 10).sum()
    total += stats.halfcauchy.logpdf(draw["sigma"], scale=2.5)
    for t in range(data["K"], data["T"]):
        mean = draw["alpha"] + sum(draw["beta"][k] * data["y"][t - 1 - k] for k in range(data["K"]))
        total += stats.norm.logpdf(data["y"][t], mean, draw["sigma"])
    return total


def garch(data: Values, draw: Values) -> float:
    total, variance = 0.0, data["sigma1"] ** 2
    for t in range(data["T"]):
        if t > 0:
            shock = (data["y"][t - 1] - draw["mu"]) ** 2
            variance = draw["alpha0"] + draw["alpha1"] * shock + draw["beta1"] * variance
        total += stats.norm.logpdf(data["y"][t], draw["mu"], np.sqrt(variance))
    return total


def gaussian_process(data: Values, draw: Values) -> float:
    rho, alpha, sigma = draw["rho"], draw["alpha"], draw["sigma"]
    prior = stats.gamma.logpdf(rho, 25, scale=1 / 4) + stats.halfnorm.logpdf(alpha, scale=2)
    prior += stats.halfnorm.logpdf(sigma, scale=1)
    x, y = np.array(data["x"], float), np.array(data["y"])
    squared_distance = np.subtract.outer(x, x) ** 2
    covariance = alpha**2 * np.exp(-squared_distance / (2 * rho**2)) + sigma * np.eye(len(x))
    log_det = np.linalg.slogdet(2 * np.pi * covariance).logabsdet
    return prior - 0.5 * log_det - 0.5 * y @ np.linalg.solve(covariance, y)


def hidden_markov(data: Values, draw: Values) -> float:
    """The forward recursion on probabilities, rescaled at every step."""
    total = stats.norm.logpdf(draw["mu"], [3, 10], 1).sum()
    transition, weights = np.stack([draw["theta1"], draw["theta2"]]), np.ones(2)
    for t, y in enumerate(data["y"]):
        weights = (weights if t == 0 else weights @ transition) * stats.norm.pdf(y, draw["mu"], 1)
        total += np.log(weights.sum())
        weights = weights / weights.sum()
    return total


def mixture(y: list[float], theta: float, mu: ndarray, sigma: ndarray) -> float:
    density = theta * stats.norm.pdf(y, mu[0], sigma[0]) + (1 - theta) * stats.norm.pdf(y, mu[1], sigma[1])
    return np.log(density).sum()


def low_dim_gauss_mix(data: Values, draw: Values) -> float:
    in_order = log(2) + stats.norm.logpdf(draw["mu"], 0, 2).sum()
    prior = stats.halfnorm.logpdf(draw["sigma"], scale=2).sum() + stats.beta.logpdf(draw["theta"], 5, 5)
    return in_order + prior + mixture(data["y"], draw["theta"], draw["mu"], draw["sigma"])


def normal_mixture(data: Values, draw: Values) -> float:
    prior = stats.norm.logpdf(draw["mu"], 0, 10).sum()
    return prior + mixture(data["y"], draw["theta"], draw["mu"], np.ones(2))


LOG_JOINTS: dict[str, LogJoint] = {
    "GLMM_Poisson_data-GLMM_Poisson_model": partial(poisson, mixed=True),
    "GLM_Poisson_Data-GLM_Poisson_model": partial(poisson, mixed=False),
    "arK-arK": autoregression,
    "dogs-dogs_2020": dogs,
    "earnings-earn_height": linear(X=lambda d: [1, d["height"]], y=lambda d: d["earn"], scale=None),
    "earnings-logearn_interaction": linear(
        X=lambda d: [1, d["height"], d["male"], np.multiply(d["height"], d["male"])],
        y=lambda d: np.log(d["earn"]),
        scale=None,
    ),
    "eight_schools-eight_schools_centered": partial(eight_schools, centered=True),
    "eight_schools-eight_schools_noncentered": partial(eight_schools, centered=False),
    "garch-garch11": garch,
    "gp_pois_regr-gp_regr": gaussian_process,
    "hmm_example-hmm_example": hidden_markov,
    "kidiq-kidscore_interaction": linear(
        X=lambda d: [1, d["mom_hs"], d["mom_iq"], np.multiply(d["mom_hs"], d["mom_iq"])],
        y=lambda d: d["kid_score"],
        scale=2.5,
    ),
    "kidiq-kidscore_momiq": linear(X=lambda d: [1, d["mom_iq"]], y=lambda d: d["kid_score"], scale=2.5),
    "low_dim_gauss_mix-low_dim_gauss_mix": low_dim_gauss_mix,
    "mesquite-logmesquite": linear(
        X=lambda d: mesquite_columns(d, np.log), y=lambda d: np.log(d["weight"]), scale=None
    ),
    "mesquite-mesquite": linear(X=lambda d: mesquite_columns(d, np.array), y=lambda d: d["weight"], scale=None),
    "normal_2-normal_mixture": normal_mixture,
    "radon_mn-radon_hierarchical_intercept_centered": partial(radon, centered=True),
    "radon_mn-radon_hierarchical_intercept_noncentered": partial(radon, centered=False),
    "sblrc-blr": blr,
    "wells_data-wells_dae_inter_model": wells,
}


@each_posterior
def test_density_is_the_described_one(loaded: Loaded) -> None:
    """With every constant, and also vectorized over draws."""
    data = json.loads((posteriordb.require() / loaded.case.name / "data.json").read_text())
    chosen = rows(loaded)
    plain = np.array([float(trace_at(loaded, row).log_prob_sum()) for row in chosen])
    log_joint = LOG_JOINTS[loaded.case.name]
    described = [log_joint(data, {key: draws[row] for key, draws in loaded.draws.items()}) for row in chosen]
    np.testing.assert_allclose(plain, described, rtol=1e-9)

    latents = {site: value[chosen] for site, value in loaded.latents.items()}
    substitute, _ = run_at(loaded, unconstrain(loaded, latents), unconstrained=True)
    log_det = sum(term.flatten(1).sum(-1) for term in substitute.log_det).numpy()
    vectorized = log_density(loaded, unconstrain(loaded, latents)).numpy() - log_det
    np.testing.assert_allclose(vectorized, plain, rtol=1e-9)


def test_enumerated_mixture_has_the_density_of_the_marginalized_one() -> None:
    posteriordb.require()
    loaded = posteriordb.load("low_dim_gauss_mix-low_dim_gauss_mix")
    row = {site: value[0] for site, value in loaded.latents.items()}

    def point(y: Tensor) -> None:
        for site, value in row.items():
            pyro.sample(site, dist.Delta(value, event_dim=value.dim()))

    elbo = TraceEnum_ELBO(max_plate_nesting=1)
    enumerated = elbo.loss(posteriordb.low_dim_gauss_mix_enumerated, point, **loaded.data)
    marginalized = trace_at(loaded, 0).log_prob_sum()
    assert -enumerated == pytest.approx(float(marginalized), rel=1e-12)


# Constants and evidence


def normalization(case: Case, trace: poutine.Trace) -> float:
    """What normalizing the restricted priors adds to the unnormalized evidence, read from the sites."""
    # The ordered pair is restricted by hand; its factor has the constant.
    total = log(2) if case.model is posteriordb.low_dim_gauss_mix else 0.0
    for node in sample_sites(trace).values():
        fn = node["fn"]
        while isinstance(fn, dist.Independent):
            fn = fn.base_dist
        if isinstance(fn, dist.HalfNormal | dist.HalfCauchy):
            total += log(2) * fn.batch_shape.numel()
        elif isinstance(fn, dist.Uniform):
            total -= float((fn.high - fn.low).log())
    return total


@each_posterior
def test_priors_are_normalized_as_the_evidence_says(loaded: Loaded) -> None:
    expected = loaded.info["log_evidence"]["log_evidence"] + normalization(loaded.case, trace_at(loaded, 0))
    assert loaded.log_evidence == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("family", ["mean_field", "full_rank"])
@each_posterior
def test_baseline_is_the_published_elbo_with_our_constants(loaded: Loaded, family: str) -> None:
    constant = loaded.log_evidence - loaded.info["log_evidence"]["log_evidence"]
    published = loaded.info["gaussian_vi_baseline"][family]["elbo"]
    assert loaded.baseline(family) == pytest.approx(published + constant, rel=1e-12)


NUM_PROPOSALS = 4000
SAMPLEABLE = [
    name
    for name, case in POSTERIORS.items()
    if not (case.funnel or case.multimodal) and case.model is not posteriordb.radon_noncentered
]


@pytest.mark.parametrize("name", SAMPLEABLE)
def test_evidence_by_importance_sampling(loaded: Loaded) -> None:
    """From a Student t of the reference's mean and covariance: few dimensions, no far tails."""
    mean, covariance = loaded.moments["unconstrained_mean"], loaded.moments["unconstrained_cov"]
    # Standardized, as the scales differ by six orders of magnitude in some.
    scale = np.sqrt(np.diag(covariance))
    proposal = stats.multivariate_t(np.zeros_like(mean), covariance / np.outer(scale, scale), df=5)
    noise = proposal.rvs(NUM_PROPOSALS, random_state=0)
    z = torch.from_numpy(mean + scale * noise)
    log_proposal = proposal.logpdf(noise) - np.log(scale).sum()

    sites = {site: z[:, loaded.coordinates(site)] for site in loaded.latents}
    log_weights = np.concatenate(
        [
            log_density(loaded, {site: value[start : start + CHUNK] for site, value in sites.items()}).numpy()
            for start in range(0, NUM_PROPOSALS, CHUNK)
        ]
    )
    log_weights -= log_proposal
    weights = np.exp(log_weights - log_weights.max())
    estimate = np.log(weights.mean()) + log_weights.max()
    standard_error = weights.std() / weights.mean() / np.sqrt(NUM_PROPOSALS)
    published_error = loaded.info["log_evidence"]["half_spread"]
    assert abs(estimate - loaded.log_evidence) < STANDARD_ERRORS * np.hypot(standard_error, published_error)


# Reference draws


@each_posterior
def test_reference_draws_pass_stein_identities(loaded: Loaded) -> None:
    r"""E ∂log p/∂z_i = 0 and E (z_i − E z_i) ∂log p/∂z_i = −1 on the unconstrained scale."""
    z = unconstrain(loaded, loaded.latents)
    gradients = scores(loaded, z)
    for site, gradient in gradients.items():
        mean = torch.from_numpy(loaded.moments["unconstrained_mean"][loaded.coordinates(site)])
        for identity in (gradient, (z[site] - mean) * gradient + 1):
            standard_error = identity.std(0) / len(identity) ** 0.5
            assert (identity.mean(0).abs() < STANDARD_ERRORS * standard_error).all(), site
