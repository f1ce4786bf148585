"""Linear regression with known and with unknown noise: two models whose exact posterior is known."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule
from torch import Tensor

from pyro_vi_lab.errors import ArgumentError
from pyro_vi_lab.isolation import seeded
from pyro_vi_lab.models.design import (
    Simulation,
    check_shapes,
    design,
    linear_predictor,
    positive,
    scikit_learn_data,
    simulated,
    standardized,
)
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


class LinearRegression(PyroModule):
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
        prior_scale: s, prior standard deviation of every coefficient.
        intercept_scale: s₀, prior standard deviation of the intercept.
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
        prior_scale: float = 1.0,
        intercept_scale: float = 10.0,
        precision_shape: float = 1.0,
        precision_rate: float = 1.0,
    ) -> None:
        super().__init__()
        if noise_scale is not None:
            positive(noise_scale=noise_scale)
        positive(
            prior_scale=prior_scale,
            intercept_scale=intercept_scale,
            precision_shape=precision_shape,
            precision_rate=precision_rate,
        )
        self.noise_scale = noise_scale
        self.prior_scale = prior_scale
        self.intercept_scale = intercept_scale
        self.precision_shape = precision_shape
        self.precision_rate = precision_rate

    def forward(self, X: Tensor, y: Tensor | None = None) -> Tensor:
        """Run the model; returns the expected outcome of every row."""
        check_shapes(X, y)
        zero = X.new_zeros(())
        if self.noise_scale is None:
            shape = zero + self.precision_shape
            precision = pyro.sample("precision", dist.Gamma(shape, self.precision_rate))
            sigma = pyro.deterministic("sigma", precision.rsqrt())
            unit = sigma
        else:
            sigma, unit = zero + self.noise_scale, zero + 1.0
        intercept = pyro.sample("intercept", dist.Normal(zero, self.intercept_scale * unit))
        with pyro.plate("feature", X.shape[1]):
            beta = pyro.sample("beta", dist.Normal(zero, self.prior_scale * unit))
        mean = linear_predictor(X, intercept, beta)
        with pyro.plate("row", X.shape[0]):
            pyro.sample("y", dist.Normal(mean, sigma), obs=y)
        return mean

    def problem(self, X: Any, y: Any, *, features: Sequence[str] | None = None, name: str | None = None) -> Problem:
        """The model with checked data; see :func:`pyro_vi_lab.models.design.design` for what is checked."""
        data = design(X, y, features)
        return Problem(self, data.X, data.y, coords={"feature": data.features}, name=name)

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
        """
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
        self, X: Any, y: Any, *, num_chains: int = 1, num_draws: int = 1000, seed: int = 0
    ) -> Posterior:
        """Independent draws from the exact posterior.

        Args:
            X: Covariates.
            y: Outcome.
            num_chains: C.
            num_draws: S, per chain.
            seed: Seed of the draws.

        Raises:
            DataError: As in :func:`pyro_vi_lab.models.design.design`.
            ArgumentError: No chains or no draws.
        """
        if num_chains < 1 or num_draws < 1:
            raise ArgumentError(f"num_chains and num_draws must be at least 1, got {num_chains} and {num_draws}")
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

    def simulate(self, num_rows: int, num_features: int, *, seed: int = 0, correlation: float = 0.5) -> Simulation:
        """Covariates, outcome, and the parameters that made them, which are drawn from the prior.

        Args:
            num_rows: N.
            num_features: D.
            seed: Seed of everything drawn.
            correlation: Of neighboring covariates.

        Raises:
            ArgumentError: No rows or features, or a correlation outside (-1, 1).
        """
        return simulated(self, num_rows, num_features, correlation=correlation, seed=seed)


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
