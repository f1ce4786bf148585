"""Data of a few overlapping groups, and textbook forms of what mixtures compute."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from scipy import stats
from torch import Tensor

from pyro_vi_lab.isolation import seeded
from pyro_vi_lab.mixture_bayes import Factors, MixtureUpdates
from pyro_vi_lab.mixture_moments import Covariance, Moments, Normals, covariance_of_factor
from pyro_vi_lab.mixture_prior import Parameters
from pyro_vi_lab.models import GaussianMixture
from pyro_vi_lab.posterior import Posterior
from pyro_vi_lab.problem import Problem

KINDS: tuple[Covariance, ...] = ("full", "tied", "diag", "spherical")


def groups(num_rows: int = 120, *, dim: int = 2, num_groups: int = 3, seed: int = 0, apart: float = 3.0) -> Tensor:
    rng = np.random.default_rng(seed)
    centers = apart * rng.normal(size=(num_groups, dim))
    return torch.tensor(centers[np.arange(num_rows) % num_groups] + rng.normal(size=(num_rows, dim)) + 5.0)


def parameters(kind: Covariance, *, dim: int = 2, num_components: int = 3, seed: int = 1) -> Parameters:
    rng = np.random.default_rng(seed)
    weights, loc = rng.dirichlet(np.full(num_components, 3.0)), 5.0 + 2 * rng.normal(size=(num_components, dim))
    root = rng.normal(size=(num_components, dim, dim + 2))
    matrices = root @ root.swapaxes(1, 2) / 2
    covariance = {
        "full": matrices,
        "tied": matrices[0],
        "diag": matrices.diagonal(axis1=1, axis2=2),
        "spherical": matrices[:, 0, 0],
    }[kind]
    return Parameters(torch.tensor(weights), torch.tensor(loc), torch.tensor(covariance.copy()), kind)


def matrices(one: Parameters) -> np.ndarray:
    """Covariance matrices of all components."""
    K, D = one.loc.shape
    covariance = one.covariance.numpy()
    if one.kind == "full":
        return covariance
    if one.kind == "tied":
        return np.broadcast_to(covariance, (K, D, D))
    return np.stack([np.diag(np.broadcast_to(covariance[k], (D,))) for k in range(K)])


def log_densities(X: Tensor, one: Parameters, observed: Tensor | None = None) -> np.ndarray:
    """log π + log Normal of each row and component, by SciPy."""
    covariances, result = matrices(one), np.empty((len(X), len(one.loc)))
    for n in range(len(X)):
        here = np.ones(X.shape[1], bool) if observed is None else observed[n].numpy()
        for k in range(len(one.loc)):
            normal = stats.multivariate_normal(one.loc[k].numpy()[here], covariances[k][np.ix_(here, here)])
            result[n, k] = np.log(float(one.weights[k])) + normal.logpdf(X[n].numpy()[here])
    return result


def expected_log_density(found: Moments, normals: Normals) -> Tensor:
    r"""What the moments say of other components than those that the responsibilities are of.

    .. math:: \sum_{nk} r_{nk} (s_k + \log \mathrm{Normal}(x_n; \mu_k, \Sigma_k))
    """
    counts, means, covariances, _ = found
    apart, kind = means - normals.loc, normals.kind
    if kind in ("full", "tied"):
        white = (apart.unsqueeze(-2) @ normals.factor).squeeze(-2).square().sum(-1)
        spread = (normals.factor.mT @ covariances @ normals.factor).diagonal(dim1=-2, dim2=-1).sum(-1)
    elif kind == "diag":
        white = (apart * normals.factor).square().sum(-1)
        spread = (covariances * normals.factor.square()).sum(-1)
    else:
        white = apart.square().sum(-1) * normals.factor.square()
        spread = covariances * normals.factor.square() * means.shape[-1]
    # a component without rows has no part, however impossible it is
    offsets = torch.where(counts > 0, normals.offsets(), 0.0)
    return (counts * (offsets - (white + spread) / 2)).sum()


def parts(kind: Covariance, num_components: int, dim: int) -> int:
    """How many of scikit-learn's degrees of freedom are one of ours."""
    return {"tied": num_components, "spherical": dim}.get(kind, 1)


def scikit_learn(model: GaussianMixture, labels: np.ndarray, *, mended: bool, **options: Any) -> Any:
    """scikit-learn's variational Bayes with the priors of a model of ours, from given labels of the rows.

    Its prior of a tied covariance is for the rows of one component, of a spherical one for one coordinate: the numbers
    are those of ours by K and by D. Of diagonal and spherical covariances it takes E log |Λ| from a full Wishart
    distribution; ``mended`` takes it from the gamma distributions that its means and covariances are of.
    """
    from scipy.special import digamma
    from sklearn.mixture import BayesianGaussianMixture

    class Peer(BayesianGaussianMixture):  # type: ignore[misc]
        def _initialize_parameters(self, X: np.ndarray, random_state: Any, **more: Any) -> None:
            r = np.zeros((len(X), self.n_components))
            r[np.arange(len(X)), labels] = 1
            self._initialize(X, r)

        def _estimate_log_prob(self, X: np.ndarray, **more: Any) -> np.ndarray:
            found, dim, df = super()._estimate_log_prob(X), X.shape[1], self.degrees_of_freedom_
            if not mended or self.covariance_type in ("full", "tied"):
                return found
            theirs = digamma((df - np.arange(dim)[:, None]) / 2).sum(0) - dim * np.log(df / 2)
            shape = df / 2 if self.covariance_type == "diag" else dim * (df + 1) / 2
            return found + (dim * (digamma(shape) - np.log(shape)) - theirs) / 2

    prior, of = model.prior, parts(model.covariance, model.num_components, model.prior.dim)
    return Peer(
        n_components=model.num_components,
        covariance_type=model.covariance,
        weight_concentration_prior_type="dirichlet_distribution",
        weight_concentration_prior=model.concentration,
        mean_precision_prior=prior.relative_precision,
        mean_prior=prior.loc.numpy(),
        degrees_of_freedom_prior=prior.df / of,
        covariance_prior=prior.scatter.numpy() / of,
        reg_covar=0.0,
        tol=0.0,
        **options,
    )


def as_scikit_learn(factors: Factors, updates: MixtureUpdates, center: Tensor) -> dict[str, np.ndarray]:
    """What scikit-learn keeps of a posterior: expected weights, means, and the inverses of expected precisions."""
    normals, alpha = updates.expected(factors).normals, factors["weights"]["concentration"]
    covariances = covariance_of_factor(normals.factor, normals.kind)
    found = {"weights_": alpha / alpha.sum(), "means_": normals.loc + center, "covariances_": covariances}
    return {key: value.numpy() for key, value in found.items()}


# The mixtures of posteriordb as ready models

POSTERIORS = ("low_dim_gauss_mix-low_dim_gauss_mix", "normal_2-normal_mixture")


def published_problem(name: str, y: Tensor) -> Problem:
    """The ready model with priors near the published ones.

    These have means and, of the first, standard deviations that are independent of each other; of the second both
    variances are known to be one. Ours scale with each other and are unknown.
    """
    options = {"mean_prior": [0.0], "degrees_of_freedom": 3.0, "covariance_prior": [[1.0]], "marginal": True}
    if name == POSTERIORS[0]:  # Beta(5, 5), and Normal(0, 2) where a variance is one
        return GaussianMixture(2, concentration=5.0, mean_precision=0.25, **options).problem(y[:, None])
    return GaussianMixture(2, concentration=1.0, mean_precision=0.01, **options).problem(y[:, None])


def by_mean(draws: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Draws ``(S, ...)`` of ``theta`` and ``mu`` (and ``sigma``), the component of the lower mean first."""
    order = draws["mu"].argsort(1)
    lower = order[:, 0] == 0
    found = {"theta": torch.where(lower, draws["theta"], 1 - draws["theta"]), "mu": draws["mu"].gather(1, order)}
    return found | ({"sigma": draws["sigma"].gather(1, order)} if "sigma" in draws else {})


def conjugate_draws(fit: Any, num_draws: int, *, seed: int = 0) -> Posterior:
    """Draws of a fit of the guide "conjugate", straight from its families: many at once."""
    draws: dict[str, Tensor] = {}
    with seeded(seed), torch.no_grad():
        for factor in fit.guide.factors.values():
            values = factor.family.sample(fit.guide.natural(factor.sites[0]), (1, num_draws))
            draws |= dict(zip(factor.sites, values, strict=True))
    return Posterior(draws, method="conjugate")


def as_published(problem: Problem, posterior: Posterior) -> dict[str, Tensor]:
    """Aligned draws ``(S, ...)`` under the published names, the component of the lower mean first."""
    draws = problem.model.align(posterior).flat()
    order = draws["loc"][..., 0].mean(0).argsort()
    sigma = draws["precision"][:, order, 0, 0].rsqrt()
    return {"theta": draws["weights"][:, order[0]], "mu": draws["loc"][:, order, 0], "sigma": sigma}


def apart(draws: Mapping[str, Tensor], reference: Mapping[str, Tensor]) -> tuple[float, float]:
    """Largest shift of a mean in standard deviations of the reference, and largest relative change of one of these."""
    shift, change = 0.0, 0.0
    for name in draws.keys() & reference.keys():
        mean, sd = reference[name].mean(0), reference[name].std(0)
        shift = max(shift, float(((draws[name].mean(0) - mean) / sd).abs().max()))
        change = max(change, float((draws[name].std(0) / sd - 1).abs().max()))
    return shift, change
