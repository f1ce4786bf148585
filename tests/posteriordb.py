"""The 21 posteriors of the posteriordb files as Pyro models: one table for tests and benchmarks.

The files (data, reference draws, evidence, what the best Gaussian reaches) are not part of the project. They
are looked for where the environment variable ``POSTERIORDB`` points, else in ``../shared/posteriordb`` beside
the repository.

Every model

- has sites with the names and shapes of the reference parameters, so that draws compare by name,
- has on the unconstrained scale of ``biject_to`` the very coordinates of ``moments.npz``, so that what
  ``info.json`` says about the best Gaussian holds for it,
- normalizes its priors as ``log_evidence.with_normalised_priors`` means it (see `Loaded.log_evidence`),
- computes in float64 whatever the default type is, and runs under a vectorizing plate left of its own.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import log
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from pyro.ops.indexing import Vindex
from torch import Tensor

VARIABLE = "POSTERIORDB"
BESIDE = Path(__file__).resolve().parent.parent.parent / "shared" / "posteriordb"

Json = Mapping[str, Any]
Data = dict[str, Tensor]


def directory() -> Path | None:
    """Where the files are, or None where they are absent."""
    path = Path(os.environ.get(VARIABLE) or BESIDE)
    return path if path.is_dir() else None


def require() -> Path:
    """Where the files are; skips the running test where they are absent."""
    path = directory()
    if path is None:
        import pytest  # benchmarks read this table without it

        pytest.skip(absence())
    return path


def absence() -> str:
    """Why there are no files, and what to do."""
    looked = os.environ.get(VARIABLE) or BESIDE
    return f"no posteriordb files at {looked}: set {VARIABLE} to their directory"


def real(value: Any) -> Tensor:
    """A float64 tensor: numbers of the data, and constants of the models."""
    return torch.tensor(value, dtype=torch.float64)


def flat(support: constraints.Constraint, *event_shape: int) -> dist.ImproperUniform:
    """The density 1 on a support."""
    return dist.ImproperUniform(support, (), event_shape)


def columns(data: Json, *names: str, intercept: bool = True) -> Tensor:
    """Design matrix ``(N, K)`` of the named covariates."""
    covariates = [real(data[name]) for name in names]
    return torch.stack([torch.ones_like(covariates[0])] * intercept + covariates, -1)


# Regression


def flat_linear_regression(X: Tensor, y: Tensor) -> None:
    with pyro.plate("coefficient", X.shape[-1]):
        beta = pyro.sample("beta", flat(constraints.real))
    sigma = pyro.sample("sigma", flat(constraints.positive))
    with pyro.plate("observation", len(y)):
        pyro.sample("y", dist.Normal(beta @ X.T, sigma), obs=y)


def cauchy_linear_regression(X: Tensor, y: Tensor) -> None:
    with pyro.plate("coefficient", X.shape[-1]):
        beta = pyro.sample("beta", flat(constraints.real))
    sigma = pyro.sample("sigma", dist.HalfCauchy(real(2.5)))
    with pyro.plate("observation", len(y)):
        pyro.sample("y", dist.Normal(beta @ X.T, sigma), obs=y)


def normal_linear_regression(X: Tensor, y: Tensor) -> None:
    beta = pyro.sample("beta", dist.Normal(0, real(10)).expand([X.shape[-1]]).to_event(1))
    sigma = pyro.sample("sigma", dist.HalfNormal(real(10)))
    with pyro.plate("observation", len(y)):
        pyro.sample("y", dist.Normal((X * beta).sum(-1), sigma), obs=y)


def earn_height_data(data: Json) -> Data:
    return {"X": columns(data, "height"), "y": real(data["earn"])}


def logearn_interaction_data(data: Json) -> Data:
    X = columns(data, "height", "male")
    return {"X": torch.cat([X, X[:, 1:2] * X[:, 2:]], -1), "y": real(data["earn"]).log()}


def kidscore_momiq_data(data: Json) -> Data:
    return {"X": columns(data, "mom_iq"), "y": real(data["kid_score"])}


def kidscore_interaction_data(data: Json) -> Data:
    X = columns(data, "mom_hs", "mom_iq")
    return {"X": torch.cat([X, X[:, 1:2] * X[:, 2:]], -1), "y": real(data["kid_score"])}


MESQUITE_LENGTHS = ("diam1", "diam2", "canopy_height", "total_height", "density")


def mesquite_data(data: Json) -> Data:
    return {"X": columns(data, *MESQUITE_LENGTHS, "group"), "y": real(data["weight"])}


def logmesquite_data(data: Json) -> Data:
    logs = {name: np.log(data[name]) for name in MESQUITE_LENGTHS}
    X = columns({**logs, "group": data["group"]}, *MESQUITE_LENGTHS, "group")
    return {"X": X, "y": real(data["weight"]).log()}


def sblrc_data(data: Json) -> Data:
    return {"X": real(data["X"]), "y": real(data["y"])}


def wells(X: Tensor, switched: Tensor) -> None:
    alpha = pyro.sample("alpha", flat(constraints.real))
    with pyro.plate("coefficient", X.shape[-1]):
        beta = pyro.sample("beta", flat(constraints.real))
    with pyro.plate("household", len(switched)):
        pyro.sample("switched", dist.Bernoulli(logits=alpha + beta @ X.T), obs=switched)


def wells_data(data: Json) -> Data:
    X = columns(data, "dist", "arsenic", "educ", intercept=False)
    distance, arsenic, education = ((X - X.mean(0)) / real([100, 1, 4])).unbind(-1)
    interactions = [distance * arsenic, distance * education, arsenic * education]
    X = torch.stack([distance, arsenic, education, *interactions], -1)
    return {"X": X, "switched": real(data["switched"])}


def dogs(num_avoided: Tensor, num_shocked: Tensor, y: Tensor) -> None:
    beta = pyro.sample("beta", dist.Normal(0, real(100)).expand([3]).to_event(1))
    logits = beta[..., 0] + beta[..., 1] * num_avoided + beta[..., 2] * num_shocked
    with pyro.plate("dog", y.shape[-2], dim=-2), pyro.plate("trial", y.shape[-1], dim=-1):
        pyro.sample("y", dist.Bernoulli(logits=logits), obs=y)


def dogs_data(data: Json) -> Data:
    y = real(data["y"])
    return {"num_avoided": (1 - y).cumsum(-1) - (1 - y), "num_shocked": y.cumsum(-1) - y, "y": y}


def poisson_regression(year: Tensor, C: Tensor) -> None:
    rate = cubic_trend(year).exp()
    with pyro.plate("time", len(year)):
        pyro.sample("C", dist.Poisson(rate), obs=C)


def poisson_mixed_regression(year: Tensor, C: Tensor) -> None:
    trend = cubic_trend(year)
    sigma = pyro.sample("sigma", dist.Uniform(real(0), real(5)))
    with pyro.plate("time", len(year)):
        eps = pyro.sample("eps", dist.Normal(0, sigma))
        pyro.sample("C", dist.Poisson((trend + eps).exp()), obs=C)


def cubic_trend(year: Tensor) -> Tensor:
    alpha = pyro.sample("alpha", dist.Uniform(real(-20), real(20)))
    beta1 = pyro.sample("beta1", dist.Uniform(real(-10), real(10)))
    beta2 = pyro.sample("beta2", dist.Uniform(real(-10), real(10)))
    beta3 = pyro.sample("beta3", dist.Uniform(real(-10), real(10)))
    return alpha + beta1 * year + beta2 * year**2 + beta3 * year**3


def poisson_data(data: Json) -> Data:
    return {"year": real(data["year"]), "C": real(data["C"])}


# Hierarchies


def eight_schools_centered(y: Tensor, sigma: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(0, real(5)))
    tau = pyro.sample("tau", dist.HalfCauchy(real(5)))
    with pyro.plate("school", len(y)):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("y", dist.Normal(theta, sigma), obs=y)


def eight_schools_noncentered(y: Tensor, sigma: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(0, real(5)))
    tau = pyro.sample("tau", dist.HalfCauchy(real(5)))
    with pyro.plate("school", len(y)):
        theta_trans = pyro.sample("theta_trans", dist.Normal(real(0), 1))
        theta = pyro.deterministic("theta", mu + tau * theta_trans, event_dim=0)
        pyro.sample("y", dist.Normal(theta, sigma), obs=y)


def eight_schools_data(data: Json) -> Data:
    return {"y": real(data["y"]), "sigma": real(data["sigma"])}


NUM_COUNTIES = 85


def radon_centered(county: Tensor, log_uppm: Tensor, floor: Tensor, log_radon: Tensor) -> None:
    sigma_alpha, sigma_y, mu_alpha, beta = radon_hyperparameters()
    with pyro.plate("county", NUM_COUNTIES):
        alpha = pyro.sample("alpha", dist.Normal(mu_alpha, sigma_alpha))
    mean = alpha[..., county] + beta[..., 0] * log_uppm + beta[..., 1] * floor
    with pyro.plate("house", len(log_radon)):
        pyro.sample("log_radon", dist.Normal(mean, sigma_y), obs=log_radon)


def radon_noncentered(county: Tensor, log_uppm: Tensor, floor: Tensor, log_radon: Tensor) -> None:
    sigma_alpha, sigma_y, mu_alpha, beta = radon_hyperparameters()
    with pyro.plate("county", NUM_COUNTIES):
        alpha_raw = pyro.sample("alpha_raw", dist.Normal(real(0), 1))
        alpha = pyro.deterministic("alpha", mu_alpha + sigma_alpha * alpha_raw, event_dim=0)
    mean = alpha[..., county] + beta[..., 0] * log_uppm + beta[..., 1] * floor
    with pyro.plate("house", len(log_radon)):
        pyro.sample("log_radon", dist.Normal(mean, sigma_y), obs=log_radon)


def radon_hyperparameters() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    sigma_alpha = pyro.sample("sigma_alpha", dist.HalfNormal(real(1)))
    sigma_y = pyro.sample("sigma_y", dist.HalfNormal(real(1)))
    mu_alpha = pyro.sample("mu_alpha", dist.Normal(0, real(10)))
    beta = pyro.sample("beta", dist.Normal(0, real(10)).expand([2]).to_event(1))
    return sigma_alpha, sigma_y, mu_alpha, beta


def radon_data(data: Json) -> Data:
    return {
        "county": torch.tensor(data["county_idx"]) - 1,
        "log_uppm": real(data["log_uppm"]),
        "floor": real(data["floor_measure"]),
        "log_radon": real(data["log_radon"]),
    }


# Time series and the Gaussian process


def autoregression(lagged: Tensor, y: Tensor) -> None:
    alpha = pyro.sample("alpha", dist.Normal(0, real(10)))
    beta = pyro.sample("beta", dist.Normal(0, real(10)).expand([lagged.shape[-1]]).to_event(1))
    sigma = pyro.sample("sigma", dist.HalfCauchy(real(2.5)))
    with pyro.plate("time", len(y)):
        pyro.sample("y", dist.Normal(alpha + (lagged * beta).sum(-1), sigma), obs=y)


def autoregression_data(data: Json) -> Data:
    order, y = data["K"], real(data["y"])
    windows = y.unfold(0, order + 1, 1)  # (T - K, K + 1), oldest value first
    return {"lagged": windows[:, :order].flip(-1), "y": windows[:, order]}


def garch(y: Tensor, sigma1: Tensor) -> None:
    mu = pyro.sample("mu", flat(constraints.real))
    alpha0 = pyro.sample("alpha0", flat(constraints.positive))
    alpha1 = pyro.sample("alpha1", flat(constraints.unit_interval))
    beta1 = pyro.sample("beta1", flat(constraints.interval(0.0, 1 - alpha1)))
    mu, alpha0, alpha1, beta1 = (x.unsqueeze(-1) for x in (mu, alpha0, alpha1, beta1))  # beside the time
    news = alpha0 + alpha1 * (y[:-1] - mu).square()
    variance = [sigma1.square().expand_as(news[..., :1])]
    for shock in news.split(1, -1):
        variance.append(torch.addcmul(shock, beta1, variance[-1]))
    pyro.sample("y", dist.Normal(mu, torch.cat(variance, -1).sqrt()).to_event(1), obs=y)


def garch_data(data: Json) -> Data:
    return {"y": real(data["y"]), "sigma1": real(data["sigma1"])}


def hidden_markov(y: Tensor) -> None:
    theta1 = pyro.sample("theta1", dist.Dirichlet(real([1, 1])))
    theta2 = pyro.sample("theta2", dist.Dirichlet(real([1, 1])))
    low = pyro.sample("mu_low", flat(constraints.positive))
    gap = pyro.sample("mu_gap", flat(constraints.positive))
    mu = pyro.deterministic("mu", torch.stack([low, low + gap], -1), event_dim=1)
    pyro.factor("mu_prior", dist.Normal(real([3, 10]), 1).log_prob(mu).sum(-1))
    transition = torch.stack([theta1, theta2], -2).log()  # (from, to)
    emission = dist.Normal(mu.unsqueeze(-2), 1).log_prob(y.unsqueeze(-1))  # (time, state)
    forward, *rest = emission.unbind(-2)  # no distribution of the first state
    for observed in rest:
        forward = (forward.unsqueeze(-1) + transition).logsumexp(-2) + observed
    pyro.factor("y", forward.logsumexp(-1))


def hidden_markov_latents(draws: Mapping[str, Tensor]) -> dict[str, Tensor]:
    low, high = draws["mu"].unbind(-1)
    return {"theta1": draws["theta1"], "theta2": draws["theta2"], "mu_low": low, "mu_gap": high - low}


def gaussian_process(x: Tensor, y: Tensor) -> None:
    rho = pyro.sample("rho", dist.Gamma(real(25), real(4)))
    alpha = pyro.sample("alpha", dist.HalfNormal(real(2)))
    sigma = pyro.sample("sigma", dist.HalfNormal(real(1)))  # the variance of the noise
    rho, alpha, sigma = (value[..., None, None] for value in (rho, alpha, sigma))
    kernel = alpha.square() * (-(x.unsqueeze(-1) - x).square() / (2 * rho.square())).exp()
    covariance = kernel + sigma * torch.eye(len(x), dtype=x.dtype)
    pyro.sample("y", dist.MultivariateNormal(torch.zeros_like(y), covariance), obs=y)


def gaussian_process_data(data: Json) -> Data:
    return {"x": real(data["x"]), "y": real(data["y"])}


# Mixtures


def low_dim_gauss_mix(y: Tensor) -> None:
    mu, sigma, logits = ordered_components()
    components = dist.Normal(mu, sigma)
    with pyro.plate("observation", len(y)):
        pyro.sample("y", dist.MixtureSameFamily(dist.Categorical(logits=logits), components), obs=y)


def low_dim_gauss_mix_enumerated(y: Tensor) -> None:
    """The same posterior with the component of every observation as a discrete site, to be enumerated."""
    mu, sigma, logits = ordered_components()
    with pyro.plate("observation", len(y)):
        component = pyro.sample("component", dist.Categorical(logits=logits), infer={"enumerate": "parallel"})
        means, scales = Vindex(mu)[..., component], Vindex(sigma)[..., component]
        pyro.sample("y", dist.Normal(means, scales), obs=y)


def ordered_components() -> tuple[Tensor, Tensor, Tensor]:
    mu = pyro.sample("mu", flat(constraints.ordered_vector, 2))
    # log 2: half of the mass of two independent normals is in order.
    pyro.factor("mu_prior", dist.Normal(real([0, 0]), 2).log_prob(mu).sum(-1) + log(2))
    sigma = pyro.sample("sigma", dist.HalfNormal(real([2, 2])).to_event(1))
    theta = pyro.sample("theta", dist.Beta(real(5), real(5)))
    return mu, sigma, component_logits(theta)


def component_logits(theta: Tensor) -> Tensor:
    return torch.stack([theta.log(), torch.log1p(-theta)], -1)


def normal_mixture(y: Tensor) -> None:
    theta = pyro.sample("theta", dist.Uniform(real(0), real(1)))
    mu = pyro.sample("mu", dist.Normal(real([0, 0]), 10).to_event(1))
    weights, components = dist.Categorical(logits=component_logits(theta)), dist.Normal(mu, 1)
    with pyro.plate("observation", len(y)):
        pyro.sample("y", dist.MixtureSameFamily(weights, components), obs=y)


def mixture_data(data: Json) -> Data:
    return {"y": real(data["y"])}


# The table


@dataclass(frozen=True)
class Case:
    """A posterior: its model, and what tests have to know before they open the files.

    Args:
        name: Name of the folder.
        model: Pyro model of float64 tensors (and int64 indices from 0).
        data: Makes the model's keyword arguments of the contents of ``data.json``.
        parameters: Names of the reference parameters; each is a latent or a deterministic site of the model.
        latents: Makes the values of the latent sites of reference draws.
        coordinates: Names in ``moments.npz`` of a latent site's coordinates, where not the site's own.
        near_normal: The best full-rank Gaussian has all means within 0.1 sd and all sds within 10 % of the
            reference, and there is one mode: a full-rank fit can be asked for the same.
        funnel: The scale of a hierarchy narrows its members: no Gaussian fits.
        multimodal: Several modes; a Gaussian finds one of them. Reference draws are of all.
        improper: A prior is flat or restricted by hand (``ImproperUniform``), so that it cannot be sampled.
        unrolled: A Python loop over time, hundreds of operators.
    """

    name: str
    model: Callable[..., None]
    data: Callable[[Json], Data]
    parameters: tuple[str, ...]
    latents: Callable[[Mapping[str, Tensor]], dict[str, Tensor]] | None = None
    coordinates: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    near_normal: bool = False
    funnel: bool = False
    multimodal: bool = False
    improper: bool = False
    unrolled: bool = False


CASES = (
    Case(
        "GLMM_Poisson_data-GLMM_Poisson_model",
        poisson_mixed_regression,
        poisson_data,
        ("alpha", "beta1", "beta2", "beta3", "eps", "sigma"),
        funnel=True,
    ),
    Case(
        "GLM_Poisson_Data-GLM_Poisson_model",
        poisson_regression,
        poisson_data,
        ("alpha", "beta1", "beta2", "beta3"),
        near_normal=True,
    ),
    Case("arK-arK", autoregression, autoregression_data, ("alpha", "beta", "sigma"), near_normal=True),
    Case("dogs-dogs_2020", dogs, dogs_data, ("beta",), near_normal=True),
    Case(
        "earnings-earn_height",
        flat_linear_regression,
        earn_height_data,
        ("beta", "sigma"),
        near_normal=True,
        improper=True,
    ),
    Case(
        "earnings-logearn_interaction",
        flat_linear_regression,
        logearn_interaction_data,
        ("beta", "sigma"),
        near_normal=True,
        improper=True,
    ),
    Case(
        "eight_schools-eight_schools_centered",
        eight_schools_centered,
        eight_schools_data,
        ("theta", "mu", "tau"),
        funnel=True,
    ),
    Case(
        "eight_schools-eight_schools_noncentered",
        eight_schools_noncentered,
        eight_schools_data,
        ("theta_trans", "mu", "tau"),
    ),
    Case(
        "garch-garch11",
        garch,
        garch_data,
        ("mu", "alpha0", "alpha1", "beta1"),
        improper=True,
        unrolled=True,
    ),
    Case(
        "gp_pois_regr-gp_regr",
        gaussian_process,
        gaussian_process_data,
        ("rho", "alpha", "sigma"),
        near_normal=True,
    ),
    Case(
        "hmm_example-hmm_example",
        hidden_markov,
        mixture_data,
        ("theta1", "theta2", "mu"),
        latents=hidden_markov_latents,
        coordinates={"mu_low": ("mu[0]",), "mu_gap": ("mu[1]",)},
        near_normal=True,
        improper=True,
        unrolled=True,
    ),
    Case(
        "kidiq-kidscore_interaction",
        cauchy_linear_regression,
        kidscore_interaction_data,
        ("beta", "sigma"),
        near_normal=True,
        improper=True,
    ),
    Case(
        "kidiq-kidscore_momiq",
        cauchy_linear_regression,
        kidscore_momiq_data,
        ("beta", "sigma"),
        near_normal=True,
        improper=True,
    ),
    Case(
        "low_dim_gauss_mix-low_dim_gauss_mix",
        low_dim_gauss_mix,
        mixture_data,
        ("mu", "sigma", "theta"),
        near_normal=True,
        improper=True,
    ),
    Case(
        "mesquite-logmesquite",
        flat_linear_regression,
        logmesquite_data,
        ("beta", "sigma"),
        near_normal=True,
        improper=True,
    ),
    Case(
        "mesquite-mesquite",
        flat_linear_regression,
        mesquite_data,
        ("beta", "sigma"),
        near_normal=True,
        improper=True,
    ),
    Case("normal_2-normal_mixture", normal_mixture, mixture_data, ("theta", "mu"), multimodal=True),
    Case(
        "radon_mn-radon_hierarchical_intercept_centered",
        radon_centered,
        radon_data,
        ("alpha", "beta", "mu_alpha", "sigma_alpha", "sigma_y"),
        funnel=True,
    ),
    Case(
        "radon_mn-radon_hierarchical_intercept_noncentered",
        radon_noncentered,
        radon_data,
        ("alpha_raw", "beta", "mu_alpha", "sigma_alpha", "sigma_y"),
    ),
    Case("sblrc-blr", normal_linear_regression, sblrc_data, ("beta", "sigma"), near_normal=True),
    Case(
        "wells_data-wells_dae_inter_model",
        wells,
        wells_data,
        ("alpha", "beta"),
        near_normal=True,
        improper=True,
    ),
)
POSTERIORS: dict[str, Case] = {case.name: case for case in CASES}


@dataclass(frozen=True, eq=False)
class Loaded:
    """A posterior with its files.

    Args:
        case: The line of the table.
        data: Keyword arguments of the model.
        info: Contents of ``info.json``.
        draws: Reference draws ``(draws, *shape)`` in float64, at most 2,000; deterministic sites too.
        mean: Reference means by name, of all 10,000 draws.
        sd: Reference standard deviations by name, of all 10,000 draws.
        moments: Contents of ``moments.npz``: ``unconstrained_mean``, ``unconstrained_cov`` and, of the
            coordinates, ``unconstrained_names``.
    """

    case: Case
    data: Data
    info: Json
    draws: Mapping[str, np.ndarray]
    mean: Mapping[str, np.ndarray]
    sd: Mapping[str, np.ndarray]
    moments: Mapping[str, np.ndarray]

    @property
    def log_evidence(self) -> float:
        """What an ELBO of our model is compared with: the evidence with the constants of our model.

        A half-normal, a half-Cauchy, a uniform and an ordered pair are normalized here, as in
        ``with_normalised_priors``, and a flat prior has the density 1. That figure is null where no prior has
        a constant to add (all are flat, or the HMM's, restricted without one): then ``log_evidence`` is the
        evidence of our model.
        """
        evidence = self.info["log_evidence"]
        normalized = evidence["with_normalised_priors"]
        return float(evidence["log_evidence"] if normalized is None else normalized)

    def baseline(self, family: Literal["mean_field", "full_rank"]) -> float:
        """ELBO of our model that the best Gaussian of a family reaches, to a few hundredths of a nat."""
        return self.log_evidence - float(self.info["gaussian_vi_baseline"][family]["kl_q_p"])

    @property
    def latents(self) -> dict[str, Tensor]:
        """Reference draws of the latent sites, ``(draws, *shape)``."""
        draws = {name: torch.from_numpy(self.draws[name]) for name in self.case.parameters}
        return draws if self.case.latents is None else self.case.latents(draws)

    def coordinates(self, site: str) -> list[int]:
        """Positions in ``moments`` of a latent site's unconstrained value, flattened."""
        own = self.case.coordinates.get(site)
        names = self.moments["unconstrained_names"].tolist()
        return [i for i, name in enumerate(names) if (name in own if own else name.partition("[")[0] == site)]


def load(name: str) -> Loaded:
    """Open the files of a posterior.

    Raises:
        FileNotFoundError: There are no files; tests call `require` before, and are skipped.
    """
    case, root = POSTERIORS[name], directory()
    if root is None:
        raise FileNotFoundError(absence())
    info = json.loads((root / name / "info.json").read_text())
    with np.load(root / name / "reference.npz") as draws, np.load(root / name / "moments.npz") as moments:
        return Loaded(
            case=case,
            data=case.data(json.loads((root / name / "data.json").read_text())),
            info=info,
            draws={key: draws[key].astype(np.float64) for key in draws},
            mean={key: np.asarray(value) for key, value in info["reference"]["mean"].items()},
            sd={key: np.asarray(value) for key, value in info["reference"]["sd"].items()},
            moments={key: moments[key] for key in moments},
        )
