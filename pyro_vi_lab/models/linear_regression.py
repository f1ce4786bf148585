"""Linear regression with known and with unknown noise: two models whose exact posterior is known."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from pyro_vi_lab.errors import ArgumentError
from pyro_vi_lab.isolation import seeded
from pyro_vi_lab.models.design import design, scikit_learn_data, standardized
from pyro_vi_lab.models.outcomes import ConjugateNormal
from pyro_vi_lab.models.regression import Regression
from pyro_vi_lab.posterior import Posterior
from pyro_vi_lab.problem import Problem


@dataclass(frozen=True, eq=False)
class ExactPosterior:
    r"""The posterior of a conjugate linear regression in closed form.

    With known noise the coefficients are normal with this mean and covariance. With unknown noise the
    precision is Gamma(``precision_shape``, ``precision_rate``), and given it the coefficients are normal with
    covariance ``covariance_factor @ covariance_factor.T / precision``; marginally they are Student-t, with
    the covariance given here.

    Args:
        mean: Mean of (intercept, beta).
        covariance: Covariance of (intercept, beta).
        covariance_factor: Upper triangular, of the covariance at precision one (unknown noise) or as it is
            (known noise).
        log_evidence: log p(y), with all constants.
        precision_shape: Shape of the Gamma posterior of the precision; None if the noise is known.
        precision_rate: Its rate.

    Shape:
        mean ``(1 + D,)``, covariance and factor ``(1 + D, 1 + D)``.
    """

    mean: Tensor
    covariance: Tensor
    covariance_factor: Tensor
    log_evidence: float
    precision_shape: float | None = None
    precision_rate: float | None = None


class LinearRegression(Regression):
    r"""Bayesian linear regression with conjugate priors.

    Known noise σ (``noise_scale`` given):

    .. math::
        \alpha \sim \mathrm{Normal}(0, s_0), \quad \beta_i \sim \mathrm{Normal}(0, s), \quad
        y_n \sim \mathrm{Normal}(\alpha + x_n \cdot \beta,\; \sigma)

    Unknown noise (the default; normal-gamma prior, the scales of the coefficients are in units of σ):

    .. math::
        \sigma^{-2} \sim \mathrm{Gamma}(a, b), \quad \alpha \sim \mathrm{Normal}(0, s_0 \sigma), \quad
        \beta_i \sim \mathrm{Normal}(0, s \sigma), \quad
        y_n \sim \mathrm{Normal}(\alpha + x_n \cdot \beta,\; \sigma)

    Sites ``intercept`` and ``beta``; with unknown noise also ``precision`` and the deterministic ``sigma``.
    The intercept is a site of its own, so ``X`` must not have a column of ones.

    Args:
        noise_scale: σ where it is known, in units of y; None where it is not.
        prior: Prior of the coefficients: ``"normal"`` as above, ``"ridge"``, or ``"horseshoe"``; see
            :class:`pyro_vi_lab.models.priors.CoefficientPrior`. Only the first has an exact posterior.
        prior_scale: s, prior standard deviation of every coefficient.
        intercept_scale: s₀, prior standard deviation of the intercept.
        num_relevant: Number of coefficients expected away from zero; of the horseshoe only.
        precision_shape: a, unknown noise only.
        precision_rate: b, unknown noise only, in squared units of y.

    Shape:
        X ``(N, D)``, y ``(N,)``; plates ``feature`` and ``row``.

    Raises:
        ArgumentError: A scale, shape or rate that is not positive.

    References:
        Gelman, Carlin, Stern, Dunson, Vehtari, Rubin 2013, "Bayesian Data Analysis", 3rd edition, Chapter 14.
        Bishop 2006, "Pattern Recognition and Machine Learning", Section 3.3, exercises 3.12 and 3.23.

    Example:
        >>> model = LinearRegression(noise_scale=0.5)
        >>> X, y, _ = model.simulate(100, 2, seed=0)
        >>> model.problem(X, y)
        Problem(LinearRegression: latent intercept, beta (feature); observed y (row))
    """

    def __init__(
        self,
        noise_scale: float | None = None,
        *,
        prior: str = "normal",
        prior_scale: float = 1.0,
        intercept_scale: float = 10.0,
        num_relevant: float | None = None,
        precision_shape: float = 1.0,
        precision_rate: float = 1.0,
    ) -> None:
        super().__init__(
            ConjugateNormal(noise_scale, precision_shape, precision_rate),
            prior=prior,
            prior_scale=prior_scale,
            intercept_scale=intercept_scale,
            num_relevant=num_relevant,
        )
        self.noise_scale = noise_scale
        self.precision_shape = precision_shape
        self.precision_rate = precision_rate

    def exact(self, X: Any, y: Any) -> ExactPosterior:
        r"""Closed-form posterior of (intercept, beta).

        With the rows of prior and data below one another, :math:`A = [(1, X)/\sigma;\; S^{-1}]`,
        :math:`t = [y/\sigma;\; 0]`, S the diagonal of prior scales (σ = 1 where it is unknown), and A = QR:

        .. math::
            m = R^{-1} Q^\top t, \quad V = (R^\top R)^{-1}, \quad
            \log p(y) = -\tfrac N2 \log 2\pi\sigma^2 - \log\det R S - \tfrac12 \|t - A m\|^2

        and for unknown noise, with :math:`a_N = a + N/2` and :math:`b_N = b + \tfrac12 \|t - A m\|^2`, the
        covariance is :math:`V b_N / (a_N - 1)` and

        .. math::
            \log p(y) = -\tfrac N2 \log 2\pi - \log\det R S + a \log b - a_N \log b_N
                        + \log\Gamma(a_N) - \log\Gamma(a) .

        Args:
            X: Covariates.
            y: Outcome.

        Shape:
            X ``(N, D)``, y ``(N,)``.

        Raises:
            DataError: As in :func:`pyro_vi_lab.models.design.design`.
            ArgumentError: A prior other than ``"normal"``.
        """
        self._check_exact()
        data = design(X, y)
        num_rows, num_features = data.X.shape
        noise = 1.0 if self.noise_scale is None else self.noise_scale
        scales = data.X.new_tensor([self.intercept_scale] + [self.prior_scale] * num_features)
        rows = torch.cat([torch.ones_like(data.y)[:, None], data.X], 1) / noise
        A = torch.cat([rows, scales.reciprocal().diag()])
        t = torch.cat([data.y / noise, torch.zeros_like(scales)])
        Q, R = torch.linalg.qr(A)
        mean = torch.linalg.solve_triangular(R, (Q.T @ t)[:, None], upper=True)[:, 0]
        factor = torch.linalg.solve_triangular(R, torch.eye(len(R)).to(R), upper=True)
        residual = float((t - A @ mean).square().sum())
        log_det = float(R.diagonal().abs().log().sum() + scales.log().sum())
        log_evidence = -num_rows / 2 * math.log(2 * math.pi) - log_det
        if self.noise_scale is not None:
            log_evidence -= num_rows * math.log(noise) + residual / 2
            return ExactPosterior(mean, factor @ factor.T, factor, log_evidence)
        a, b = self.precision_shape, self.precision_rate
        a_n, b_n = a + num_rows / 2, b + residual / 2
        log_evidence += a * math.log(b) - a_n * math.log(b_n) + math.lgamma(a_n) - math.lgamma(a)
        return ExactPosterior(mean, factor @ factor.T * (b_n / (a_n - 1)), factor, log_evidence, a_n, b_n)

    def exact_posterior(
        self,
        X: Any,
        y: Any,
        *,
        num_chains: int = 1,
        num_draws: int = 1000,
        seed: int = 0,
        standardize: bool = False,
    ) -> Posterior:
        """Independent draws from the exact posterior.

        Args:
            X: Covariates.
            y: Outcome.
            num_chains: C.
            num_draws: S, per chain.
            seed: Seed of the draws.
            standardize: Whether the priors are those of standardized data, as in :meth:`problem`; the draws are of the
                data as they are.

        Raises:
            DataError: As in :func:`pyro_vi_lab.models.design.design`.
            ArgumentError: No chains or no draws, or a prior other than ``"normal"``.
        """
        if num_chains < 1 or num_draws < 1:
            raise ArgumentError(f"num_chains and num_draws must be at least 1, got {num_chains} and {num_draws}")
        if standardize:
            return self._exact_of_standardized(X, y, num_chains=num_chains, num_draws=num_draws, seed=seed)
        exact = self.exact(X, y)
        draws = {}
        with seeded(seed):
            noise = torch.randn(num_chains, num_draws, len(exact.mean), dtype=exact.mean.dtype).to(exact.mean)
            offsets = noise @ exact.covariance_factor.T
            if exact.precision_shape is not None and exact.precision_rate is not None:
                shape = exact.mean.new_full((num_chains, num_draws), exact.precision_shape)
                precision = torch.distributions.Gamma(shape, exact.precision_rate).sample()
                sigma = precision.rsqrt()
                offsets = offsets * sigma[..., None]
                draws = {"precision": precision, "sigma": sigma}
        values = exact.mean + offsets
        draws |= {"intercept": values[..., 0], "beta": values[..., 1:]}
        info = {"seed": seed, "log_evidence": exact.log_evidence}
        return Posterior(draws, method="exact", info=info)

    def _exact_of_standardized(self, X: Any, y: Any, *, num_chains: int, num_draws: int, seed: int) -> Posterior:
        bound = cast(LinearRegression, self.problem(X, y, standardize=True).model)
        assert bound.binding.scaling is not None
        scaling, data = bound.binding.scaling, design(X, y)
        unit = float(scaling.y_scale)
        inner = LinearRegression(
            None if self.noise_scale is None else self.noise_scale / unit,
            prior_scale=self.prior_scale,
            intercept_scale=self.intercept_scale,
            precision_shape=self.precision_shape,
            precision_rate=self.precision_rate,
        )
        Z, z = scaling.covariates(data.X), scaling.outcome(data.y)
        found = inner.exact_posterior(Z, z, num_chains=num_chains, num_draws=num_draws, seed=seed)
        draws = {f"{name}_standardized": value for name, value in found.draws.items() if name != "sigma"}
        intercept, beta = scaling.original(found.draws["intercept"].unsqueeze(-1), found.draws["beta"])
        draws |= {"intercept": intercept.squeeze(-1), "beta": beta}
        if self.noise_scale is None:
            draws |= {"precision": found.draws["precision"] / unit**2, "sigma": found.draws["sigma"] * unit}
        log_evidence = float(found.info["log_evidence"]) - len(z) * math.log(unit)
        return Posterior(draws, method="exact", info={"seed": seed, "log_evidence": log_evidence})

    def _check_exact(self) -> None:
        if self.prior.kind != "normal":
            raise ArgumentError(
                f"with prior={self.prior.kind!r} the posterior has no closed form: leave the prior out, or fit"
            )


def example() -> Problem:
    """Disease progression of 442 diabetes patients by ten covariates, all standardized; noise unknown.

    Raises:
        ExtraError: scikit-learn is not installed.
    """
    return _diabetes(LinearRegression(), name="linear_regression")


def example_known_noise() -> Problem:
    """The same with the noise fixed at 0.7, about what least squares leaves (1 - R² = 0.48).

    Raises:
        ExtraError: scikit-learn is not installed.
    """
    return _diabetes(LinearRegression(noise_scale=0.7), name="linear_regression_known_noise")


def example_simulated() -> Problem:
    """Simulated: 200 rows, five correlated covariates, noise unknown."""
    model = LinearRegression()
    X, y, _ = model.simulate(200, 5, seed=0)
    return model.problem(X, y, name="linear_regression_simulated")


def _diabetes(model: LinearRegression, *, name: str) -> Problem:
    data = scikit_learn_data("diabetes")
    return model.problem(standardized(data.X), standardized(data.y), features=data.features, name=name)
