r"""Variational Bayes for mixtures of normals: exact coordinate ascent of :math:`q(z) q(\pi) q(\mu, \Lambda)`.

The responsibilities are those of normals with the expected precisions,

.. math:: r_{nk} \propto \exp(s_k) \, \mathrm{Normal}(x_n; m_k, E[\Lambda_k]^{-1}), \quad
    s_k = E[\log \pi_k] + \tfrac12 (E \log |\Lambda_k| - \log |E \Lambda_k|)
          - \tfrac12 E[(\mu_k - m_k)^\top \Lambda_k (\mu_k - m_k)],

and the factors are those of :class:`~pyro_vi_lab.guides.Conjugate`: a normal-Wishart for each component (full), a
normal-gamma for each coordinate of each (diag); of tied and spherical covariances, whose precision is that of several
means or coordinates, the precision and the means are independent.

References:
    Bishop 2006, "Pattern Recognition and Machine Learning", Section 10.2. Blei & Jordan 2006, "Variational inference
    for Dirichlet process mixtures", Bayesian Analysis 1(1), for the sticks.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pyro_vi_lab.families.exponential import (
    Beta,
    Dirichlet,
    ExponentialFamily,
    Gamma,
    MultivariateNormal,
    NormalGamma,
    NormalWishart,
    Wishart,
)
from pyro_vi_lab.mixture_moments import Moments, Normals, expected_log_density
from pyro_vi_lab.mixture_prior import Prior, sums_of_squares

Factors = dict[str, Tensor]
"""Natural parameters of each factor, by the site that it is called after: as in a ``Conjugate`` guide."""


class Sweep(NamedTuple):
    """One update of all factors.

    Args:
        factors: After it.
        normals: What the next responsibilities are taken of.
        elbo: The bound of the responsibilities with these factors, in nats.
        length: Squared Fisher length of the steps, in nats.
    """

    factors: Factors
    normals: Normals
    elbo: Tensor
    length: float


def families(prior: Prior) -> dict[str, ExponentialFamily]:
    """The family of each factor, in the order in which the model samples."""
    weights: dict[str, ExponentialFamily] = (
        {"stick": Beta()} if prior.is_process else {"weights": Dirichlet(prior.num_components)}
    )
    components: dict[str, dict[str, ExponentialFamily]] = {
        "full": {"loc": NormalWishart(prior.dim)},
        "diag": {"loc": NormalGamma()},
        "tied": {"precision": Wishart(prior.dim), "loc": MultivariateNormal(prior.dim)},
        "spherical": {"precision": Gamma(), "loc": MultivariateNormal(prior.dim)},
    }
    return weights | components[prior.kind]


def updated(found: Moments, factors: Factors, prior: Prior, *, lr: float = 1.0) -> Factors:
    r"""Each factor set to the best one given the responsibilities and the others, or the part ``lr`` of the way there.

    .. math:: \eta \leftarrow (1 - \rho) \eta + \rho \, E[\eta^*]

    Args:
        found: Moments of the rows.
        factors: The present ones.
        prior: The prior.
        lr: ρ, in (0, 1].
    """
    kinds, result = families(prior), dict(factors)
    counts, beta = found.counts, prior.relative_precision
    loc, squares = sums_of_squares(found, prior)
    kappa = beta + counts

    def move(name: str, target: dict[str, Tensor]) -> None:
        eta = kinds[name].from_standard(target)
        result[name] = eta if lr == 1 else factors[name].lerp(eta, lr)

    if prior.kind == "full":
        move(
            "loc",
            {"df": prior.df + counts, "scale_tril": _root_of_inverse(squares), "loc": loc, "relative_precision": kappa},
        )
    elif prior.kind == "diag":
        shape = ((prior.df + counts) / 2)[:, None].expand_as(loc)
        move(
            "loc",
            {
                "concentration": shape,
                "rate": squares / 2,
                "loc": loc,
                "relative_precision": kappa[:, None].expand_as(loc),
            },
        )
    else:
        variance = _mean_inverse(factors["precision"], kinds, prior)
        move(
            "loc",
            {
                "loc": loc,
                "scale_tril": _root(
                    variance / kappa.reshape(-1, *([1] * (variance.dim() - 1)))
                    if prior.kind == "spherical"
                    else variance / kappa[:, None, None],
                    prior,
                ),
            },
        )
        standard = kinds["loc"].standard(result["loc"])
        where, spread = standard["loc"], standard["scale_tril"] @ standard["scale_tril"].mT
        apart, pull = found.means - where, where - prior.loc
        if prior.kind == "tied":
            scatter = prior.scatter + counts.sum() * found.covariances + (kappa[:, None, None] * spread).sum(0)
            scatter = scatter + (apart * counts[:, None]).mT @ apart + beta * pull.mT @ pull
            df = scatter.new_tensor(prior.df + prior.num_components) + counts.sum()
            move("precision", {"df": df, "scale_tril": _root_of_inverse(scatter)})
        else:
            traces = spread.diagonal(dim1=-2, dim2=-1).sum(-1)
            scatter = prior.scatter + counts * (prior.dim * found.covariances + apart.square().sum(1))
            scatter = scatter + beta * pull.square().sum(1) + kappa * traces
            move("precision", {"concentration": (prior.df + prior.dim * (1 + counts)) / 2, "rate": scatter / 2})
    if prior.is_process:
        rest = counts.flip(0).cumsum(0).flip(0)[1:]
        move("stick", {"concentration1": 1 + counts[:-1], "concentration0": prior.concentration + rest})
    else:
        move("weights", {"concentration": prior.concentration + counts})
    return result


def expected_normals(factors: Factors, prior: Prior) -> Normals:
    """The normals that responsibilities are taken of."""
    kinds, dim = families(prior), prior.dim
    log_weights = expected_log_weights(factors, prior)
    standard = kinds["loc"].standard(factors["loc"])
    loc = standard["loc"]
    if prior.kind == "full":
        log_scale = (_log_det_gap(standard["df"], dim) - dim / standard["relative_precision"]) / 2
        factor = standard["df"].sqrt()[:, None, None] * standard["scale_tril"]
        return Normals(log_weights + log_scale, loc, factor, prior.kind)
    if prior.kind == "diag":
        a, b = standard["concentration"], standard["rate"]
        log_scale = (torch.digamma(a) - a.log() - 1 / standard["relative_precision"]).sum(1) / 2
        return Normals(log_weights + log_scale, loc, (a / b).sqrt(), prior.kind)
    precision, spread = kinds["precision"].standard(factors["precision"]), standard["scale_tril"]
    if prior.kind == "tied":
        factor = precision["df"].sqrt() * precision["scale_tril"]
        trace = (factor.mT @ spread).square().sum((-2, -1))
        return Normals(log_weights + (_log_det_gap(precision["df"], dim) - trace) / 2, loc, factor, prior.kind)
    a, b = precision["concentration"], precision["rate"]
    trace = a / b * spread.square().sum((-2, -1))
    log_scale = (dim * (torch.digamma(a) - a.log()) - trace) / 2
    return Normals(log_weights + log_scale, loc, (a / b).sqrt(), prior.kind)


def expected_log_weights(factors: Factors, prior: Prior) -> Tensor:
    """E[log π], ``(K,)``."""
    if not prior.is_process:
        mean: Tensor = Dirichlet(prior.num_components).mean(factors["weights"])
        return mean
    log_stick, log_rest = Beta().mean(factors["stick"]).unbind(-1)
    zero = log_stick.new_zeros(1)
    return torch.cat([log_stick, zero]) + torch.cat([zero, log_rest.cumsum(0)])


def divergence(factors: Factors, normals: Normals, prior: Prior) -> Tensor:
    """KL(q ‖ p) of all factors but the assignments, in nats; ``normals`` are their expected ones."""
    kinds, dim, K = families(prior), prior.dim, prior.num_components
    start = prior_factors(prior)
    name = "stick" if prior.is_process else "weights"
    total = kinds[name].kl(factors[name], start[name]).sum()
    if prior.kind in ("full", "diag"):
        return total + kinds["loc"].kl(factors["loc"], start["loc"]).sum()
    total = total + kinds["precision"].kl(factors["precision"], start["precision"]).sum()
    # E KL(q(μ) ‖ p(μ | Λ))
    standard, beta = kinds["loc"].standard(factors["loc"]), prior.relative_precision
    spread, apart = standard["scale_tril"], standard["loc"] - prior.loc
    mean = kinds["precision"].mean(factors["precision"])
    if prior.kind == "tied":
        log_det = mean[..., 0]
        traces = (normals.factor.mT @ spread).square().sum((-2, -1)) + (apart @ normals.factor).square().sum(1)
    else:
        precision = kinds["precision"].standard(factors["precision"])
        log_det = dim * (torch.digamma(precision["concentration"]) - precision["rate"].log())
        traces = normals.factor.square() * (spread.square().sum((-2, -1)) + apart.square().sum(1))
    own = 2 * spread.diagonal(dim1=-2, dim2=-1).log().sum()
    log_beta = dim * K * torch.log(torch.as_tensor(beta)).to(total)
    return total + (beta * traces.sum() - dim * K - log_beta - own - (log_det * traces.new_ones(K)).sum()) / 2


def prior_factors(prior: Prior) -> Factors:
    """Factors equal to the prior; of tied and spherical covariances the means have the expected precision."""
    K, loc = prior.num_components, prior.loc.expand(prior.num_components, -1)
    nothing = Moments(loc.new_zeros(K), loc, loc.new_zeros(_shape(prior)), loc.new_zeros(()))
    kinds = families(prior)
    factors: Factors = {}
    if prior.kind == "tied":
        start = {"df": loc.new_tensor(prior.df), "scale_tril": _root_of_inverse(prior.scatter)}
        factors["precision"] = kinds["precision"].from_standard(start)
    elif prior.kind == "spherical":
        start = {"concentration": loc.new_full((K,), prior.df / 2), "rate": (prior.scatter / 2).expand(K)}
        factors["precision"] = kinds["precision"].from_standard(start)
    return updated(nothing, factors, prior) | factors


def started(found: Moments, prior: Prior) -> Factors:
    """Factors after a sweep with given moments, such as those of hard assignments."""
    return updated(found, prior_factors(prior), prior)


def sweep(found: Moments, normals: Normals, factors: Factors, prior: Prior, *, lr: float = 1.0) -> Sweep:
    """Update all factors for the moments that responsibilities with ``normals`` gave, and say what came of it."""
    moved = updated(found, factors, prior, lr=lr)
    after = expected_normals(moved, prior)
    gained = expected_log_density(found, after) - expected_log_density(found, normals)
    length = sum(
        float(((moved[key] - factors[key]) * (family.mean(moved[key]) - family.mean(factors[key]))).sum())
        for key, family in families(prior).items()
    )
    return Sweep(moved, after, found.log_likelihood + gained - divergence(moved, after, prior), length)


def _shape(prior: Prior) -> tuple[int, ...]:
    K, D = prior.num_components, prior.dim
    return {"full": (K, D, D), "tied": (D, D), "diag": (K, D), "spherical": (K,)}[prior.kind]


def _mean_inverse(eta: Tensor, kinds: dict[str, ExponentialFamily], prior: Prior) -> Tensor:
    """Inverse of the expected precision: ``(D, D)`` tied, ``(K,)`` spherical."""
    standard = kinds["precision"].standard(eta)
    if prior.kind == "spherical":
        return standard["rate"] / standard["concentration"]
    inverse = torch.cholesky_inverse(standard["scale_tril"])
    return inverse / standard["df"]


def _root(variance: Tensor, prior: Prior) -> Tensor:
    """Cholesky factors of covariances, which of spherical ones are numbers."""
    if prior.kind == "tied":
        return torch.linalg.cholesky(variance)
    return variance.sqrt()[:, None, None] * torch.eye(prior.dim).to(variance)


def _root_of_inverse(matrix: Tensor) -> Tensor:
    """Lower triangular T with T Tᵀ the inverse."""
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(matrix))
    return torch.linalg.cholesky((inverse + inverse.mT) / 2)


def _log_det_gap(df: Tensor, dim: int) -> Tensor:
    r""":math:`E \log |\Lambda| - \log |E \Lambda|` of a Wishart distribution."""
    steps = torch.arange(dim).to(df)
    return torch.digamma((df.unsqueeze(-1) - steps) / 2).sum(-1) - dim * (df / 2).log()
