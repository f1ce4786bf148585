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

import math
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
from pyro_vi_lab.families.exponential.symmetric import factor_of_inverse, log_det_of_tril
from pyro_vi_lab.mixture_moments import Moments, Normals
from pyro_vi_lab.mixture_prior import Prior, sums_of_squares

Factors = dict[str, dict[str, Tensor]]
"""Standard parameters of each factor, by the site that it is called after: as in a ``Conjugate`` guide."""


class Expected(NamedTuple):
    """What a sweep needs of the factors.

    Args:
        normals: What the responsibilities are taken of.
        divergence: KL(q ‖ p) of all factors but the assignments, in nats.
    """

    normals: Normals
    divergence: Tensor


class _OfPrecision(NamedTuple):
    r"""Expectations of a precision: a matrix, or numbers on the diagonal of one.

    Args:
        gap: :math:`E \log |\Lambda| - \log |E \Lambda|`.
        log_det: :math:`E \log |\Lambda|`.
        divergence: From the prior.
    """

    gap: Tensor
    log_det: Tensor
    divergence: Tensor


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


class MixtureUpdates:
    """The exact updates of all factors, for one prior.

    Args:
        prior: The prior, of the rows as the moments are taken of them.
    """

    def __init__(self, prior: Prior) -> None:
        self.prior = prior
        self.families = families(prior)
        self.concentration = prior.concentration
        if prior.is_process:
            self.concentration = torch.stack([torch.ones_like(prior.concentration), prior.concentration], -1)
        # what of the divergence is the same in every sweep
        self._of_weights = _log_beta(self.concentration).sum()
        if prior.kind in ("full", "tied"):
            self._root = torch.linalg.cholesky(prior.scatter)
            self._halves = torch.arange(prior.dim).to(prior.loc) / 2
            df = prior.loc.new_tensor(prior.df)
            self._of_precision = self._log_normalizer(df, -log_det_of_tril(self._root))
        else:
            self._shape = prior.loc.new_tensor(prior.df / 2)
            self._of_precision = torch.lgamma(self._shape) - self._shape * (prior.scatter / 2).log()

    # --- updates ------------------------------------------------------------------------------------------------------

    def updated(self, found: Moments, factors: Factors, *, lr: float = 1.0) -> Factors:
        r"""Each factor set to the best one given the responsibilities and the others, or ``lr`` of the way there.

        .. math:: \eta \leftarrow (1 - \rho) \eta + \rho \, E[\eta^*]

        Args:
            found: Moments of the rows.
            factors: The present ones.
            lr: ρ, in (0, 1].
        """
        prior, counts = self.prior, found.counts
        loc, squares = sums_of_squares(found, prior)
        kappa = prior.relative_precision + counts
        result = dict(factors)

        def move(name: str, **target: Tensor) -> None:
            if lr < 1:
                family = self.families[name]
                target = family.standard(family.from_standard(factors[name]).lerp(family.from_standard(target), lr))
            result[name] = target

        if prior.kind == "full":
            tril = factor_of_inverse(squares)
            move("loc", df=prior.df + counts, scale_tril=tril, loc=loc, relative_precision=kappa)
        elif prior.kind == "diag":
            shape, each = ((prior.df + counts) / 2)[:, None].expand_as(loc), kappa[:, None].expand_as(loc)
            move("loc", concentration=shape, rate=squares / 2, loc=loc, relative_precision=each)
        else:
            root = self._root_of_mean_inverse(factors["precision"])
            move("loc", loc=loc, scale_tril=root / kappa.sqrt()[:, None, None])
            where, spread = result["loc"]["loc"], result["loc"]["scale_tril"]
            apart, pull = found.means - where, where - prior.loc
            if prior.kind == "tied":
                scatter = prior.scatter + counts.sum() * found.covariances
                scatter = scatter + (kappa[:, None, None] * (spread @ spread.mT)).sum(0)
                scatter = scatter + (apart * counts[:, None]).mT @ apart + prior.relative_precision * pull.mT @ pull
                df = prior.df + prior.num_components + counts.sum()
                move("precision", df=df, scale_tril=factor_of_inverse(scatter))
            else:
                scatter = prior.scatter + counts * (prior.dim * found.covariances + apart.square().sum(1))
                scatter = scatter + prior.relative_precision * pull.square().sum(1)
                scatter = scatter + kappa * spread.square().sum((-2, -1))
                shape = (prior.df + prior.dim * (1 + counts)) / 2
                move("precision", concentration=shape, rate=scatter / 2)
        if prior.is_process:
            rest = counts.flip(0).cumsum(0).flip(0)[1:]
            move("stick", concentration1=1 + counts[:-1], concentration0=prior.concentration + rest)
        else:
            move("weights", concentration=prior.concentration + counts)
        return result

    def at_prior(self) -> Factors:
        """Factors equal to the prior; of tied and spherical covariances the means have the expected precision."""
        prior = self.prior
        K, loc = prior.num_components, prior.loc.expand(prior.num_components, -1)
        shape = {"full": (K, prior.dim, prior.dim), "tied": (prior.dim, prior.dim), "diag": (K, prior.dim)}
        covariances = loc.new_zeros(shape.get(prior.kind, (K,)))
        nothing = Moments(loc.new_zeros(K), loc, covariances, loc.new_zeros(()))
        precision: Factors = {}
        if prior.kind == "tied":
            precision["precision"] = {
                "df": loc.new_tensor(prior.df),
                "scale_tril": factor_of_inverse(prior.scatter),
            }
        elif prior.kind == "spherical":
            precision["precision"] = {
                "concentration": self._shape.expand(K),
                "rate": (prior.scatter / 2).expand(K),
            }
        return self.updated(nothing, precision) | precision

    def started(self, found: Moments) -> Factors:
        """Factors after a sweep with given moments, such as those of hard assignments."""
        return self.updated(found, self.at_prior())

    # --- expectations -------------------------------------------------------------------------------------------------

    def expected(self, factors: Factors) -> Expected:
        """The normals of the next responsibilities, and the divergence from the prior."""
        prior, dim, beta = self.prior, self.prior.dim, self.prior.relative_precision
        log_weights, divergence = self._weights(factors)
        means = factors["loc"]
        loc, apart = means["loc"], means["loc"] - prior.loc
        if prior.kind in ("full", "diag"):
            kappa = means["relative_precision"]
            share = beta / kappa
            if prior.kind == "full":
                each, factor = self._matrix(means), means["df"].sqrt()[:, None, None] * means["scale_tril"]
                white, traces, log_scale = (apart.unsqueeze(-2) @ factor).square().sum((-2, -1)), dim / kappa, each.gap
            else:
                each, precision = self._number(means, self.prior.scatter / 2), means["concentration"] / means["rate"]
                factor = precision.sqrt()
                white, traces, log_scale = precision * apart.square(), (1 / kappa).sum(1), each.gap.sum(1)
            of_means = (beta * white).sum() + (share - 1 - share.log()).sum() * (dim if prior.kind == "full" else 1)
        else:
            spread = means["scale_tril"]
            if prior.kind == "tied":
                each = self._matrix(factors["precision"])
                factor = factors["precision"]["df"].sqrt() * factors["precision"]["scale_tril"]
                traces = (factor.mT @ spread).square().sum((-2, -1))
                white = (apart @ factor).square().sum(1)
            else:
                standard = factors["precision"]
                each = self._number(standard, prior.scatter / 2)
                each = _OfPrecision(dim * each.gap, dim * each.log_det, each.divergence)
                precision = standard["concentration"] / standard["rate"]
                factor, traces = precision.sqrt(), precision * spread.square().sum((-2, -1))
                white = precision * apart.square().sum(1)
            log_scale = each.gap
            constant = prior.num_components * dim * (1 + math.log(beta))
            of_means = beta * (traces + white).sum() - constant - log_det_of_tril(spread).sum()
            of_means = of_means - each.log_det.expand(prior.num_components).sum()
        normals = Normals(log_weights + (log_scale - traces) / 2, loc, factor, prior.kind)
        return Expected(normals, divergence + each.divergence.sum() + of_means / 2)

    def _weights(self, factors: Factors) -> tuple[Tensor, Tensor]:
        """E[log π], ``(K,)``, and the divergence of weights or sticks."""
        if self.prior.is_process:
            stick = factors["stick"]
            alpha = torch.stack([stick["concentration1"], stick["concentration0"]], -1)
        else:
            alpha = factors["weights"]["concentration"]
        log_mean = torch.digamma(alpha) - torch.digamma(alpha.sum(-1, keepdim=True))
        divergence = ((alpha - self.concentration) * log_mean).sum() - _log_beta(alpha).sum() + self._of_weights
        if self.prior.is_process:
            log_stick, log_rest = log_mean.unbind(-1)
            zero = log_stick.new_zeros(1)
            log_mean = torch.cat([log_stick, zero]) + torch.cat([zero, log_rest.cumsum(0)])
        return log_mean, divergence

    def _matrix(self, standard: dict[str, Tensor]) -> _OfPrecision:
        """Of a Wishart distribution."""
        df, tril, dim = standard["df"], standard["scale_tril"], self.prior.dim
        log_det, digammas = log_det_of_tril(tril), torch.digamma(df[..., None] / 2 - self._halves).sum(-1)
        expected = digammas + dim * math.log(2) + log_det
        divergence = ((df - self.prior.df) * expected - dim * df) / 2 - self._log_normalizer(df, log_det)
        trace = (self._root.mT @ tril).square().sum((-2, -1))
        gap = digammas - dim * (df / 2).log()
        return _OfPrecision(gap, expected, divergence + df * trace / 2 + self._of_precision)

    def _log_normalizer(self, df: Tensor, log_det: Tensor) -> Tensor:
        dim = self.prior.dim
        constant = dim * (dim - 1) / 4 * math.log(math.pi)
        return (
            df / 2 * (dim * math.log(2) + log_det) + torch.lgamma(df[..., None] / 2 - self._halves).sum(-1) + constant
        )

    def _number(self, standard: dict[str, Tensor], rate: Tensor) -> _OfPrecision:
        """Of gamma distributions."""
        a, b = standard["concentration"], standard["rate"]
        digamma, log_rate = torch.digamma(a), b.log()
        divergence = (a - self._shape) * digamma - torch.lgamma(a) + self._shape * log_rate + a * (rate / b - 1)
        return _OfPrecision(digamma - a.log(), digamma - log_rate, divergence + self._of_precision)

    def _root_of_mean_inverse(self, standard: dict[str, Tensor]) -> Tensor:
        """Lower triangular L with L Lᵀ the inverse of the expected precision, ``(D, D)`` or ``(K, D, D)``."""
        if self.prior.kind == "spherical":
            sd = (standard["rate"] / standard["concentration"]).sqrt()
            return sd[:, None, None] * torch.eye(self.prior.dim).to(sd)
        return torch.linalg.cholesky(torch.cholesky_inverse(standard["scale_tril"]) / standard["df"])


def _log_beta(alpha: Tensor) -> Tensor:
    """Log normalizer of Dirichlet distributions."""
    return torch.lgamma(alpha).sum(-1) - torch.lgamma(alpha.sum(-1))
