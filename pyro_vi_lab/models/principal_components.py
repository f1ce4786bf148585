"""Probabilistic principal component analysis in closed form: the optimum of a linear Gaussian autoencoder."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyro_vi_lab.errors import ArgumentError, DataError
from pyro_vi_lab.models.row_values import as_rows, refuse_missing, refuse_one_row


@dataclass(frozen=True, eq=False)
class ProbabilisticPCA:
    r"""A normal with low-rank plus spherical covariance, as a latent variable model.

    .. math:: z_n \sim \mathrm{Normal}(0, I_L), \quad x_n \sim \mathrm{Normal}(\mu + W z_n,\; \sigma^2 I_D)

    Args:
        mean: μ.
        loading: W, its columns orthogonal to each other, that of the largest variance first.
        noise_scale: σ, in units of the data.
        log_likelihood: log p(x) of the rows that it was computed from, summed over the rows, in nats.

    Shape:
        mean ``(D,)``, loading ``(D, L)``, log_likelihood ``()``.
    """

    mean: Tensor
    loading: Tensor
    noise_scale: Tensor
    log_likelihood: Tensor

    def covariance(self) -> Tensor:
        """Covariance of a row, WWᵀ + σ²I, ``(D, D)``."""
        return self.loading @ self.loading.T + self.noise_scale.square() * torch.eye(len(self.mean)).to(self.mean)

    def log_prob(self, X: Any) -> Tensor:
        """Log density of every row in nats, ``(N,)``.

        Raises:
            DataError: As of :func:`probabilistic_pca`.
        """
        rows = _rows(X, len(self.mean)).to(self.mean)
        return torch.distributions.MultivariateNormal(self.mean, self.covariance()).log_prob(rows)

    def posterior(self, X: Any) -> tuple[Tensor, Tensor]:
        r"""Mean of z for every row, and its covariance, which all rows share: the encoder that is exact.

        .. math:: M = W^\top W + \sigma^2 I, \quad E[z \mid x] = M^{-1} W^\top (x - \mu), \quad
            \mathrm{Cov}[z \mid x] = \sigma^2 M^{-1}

        Shape:
            ``(N, L)`` and ``(L, L)``.

        Raises:
            DataError: As of :func:`probabilistic_pca`.
        """
        rows = _rows(X, len(self.mean)).to(self.mean)
        identity = torch.eye(self.loading.shape[1]).to(self.mean)
        M = self.loading.T @ self.loading + self.noise_scale.square() * identity
        mean = torch.linalg.solve(M, self.loading.T @ (rows - self.mean).T).T
        return mean, self.noise_scale.square() * torch.linalg.inv(M)


def probabilistic_pca(X: Any, num_latents: int) -> ProbabilisticPCA:
    r"""Maximum-likelihood fit of probabilistic principal components, in closed form.

    With the eigenvectors U and eigenvalues λ of the covariance of the rows (divisor N), largest first,

    .. math::
        \sigma^2 = \frac{1}{D - L} \sum_{i > L} \lambda_i, \qquad W = U_L (\Lambda_L - \sigma^2 I)^{1/2}, \qquad
        \log p(X) = -\tfrac N2 \Big(D \log 2\pi + \sum_{i \le L} \log \lambda_i + (D - L) \log \sigma^2 + D\Big)

    W is determined up to a rotation from the right. scikit-learn's ``PCA`` takes the divisor N - 1 instead, with which
    the likelihood is slightly below its maximum.

    Args:
        X: Rows of numbers.
        num_latents: L, less than D.

    Shape:
        X ``(N, D)``.

    Raises:
        DataError: X is no table of finite numbers, has one row, or lies in L dimensions exactly, where the likelihood
            has no maximum.
        ArgumentError: ``num_latents`` is not a whole number between 1 and D - 1.

    References:
        Tipping & Bishop 1999, "Probabilistic principal component analysis", Journal of the Royal Statistical Society
        B 61(3), eqs. 7, 8 and 12.

    Example:
        >>> X = torch.tensor([[1.0, 0.1], [-1.0, 0.1], [2.0, -0.1], [-2.0, -0.1]])
        >>> found = probabilistic_pca(X, 1)
        >>> found.loading.shape, round(found.noise_scale.item(), 3)
        (torch.Size([2, 1]), 0.1)
    """
    rows = _rows(X)
    refuse_one_row(rows)
    num_rows, dim = rows.shape
    if isinstance(num_latents, bool) or not isinstance(num_latents, int) or not 1 <= num_latents < dim:
        raise ArgumentError(
            f"num_latents must be a whole number from 1 to {dim - 1}, one less than the columns of X, got "
            f"{num_latents!r}"
        )
    mean = rows.mean(0)
    # of the centered rows: half of the digits of the covariance would be lost
    _, singular, axes = torch.linalg.svd((rows - mean) / math.sqrt(num_rows), full_matrices=False)
    variances = singular.square()
    noise = variances[num_latents:].sum() / (dim - num_latents)
    if bool(noise <= dim * torch.finfo(rows.dtype).eps * variances.sum()):
        raise DataError(
            f"X lies in {num_latents} dimensions up to rounding, so that the noise is zero and the likelihood "
            "infinite: take fewer latents"
        )
    kept = variances[:num_latents]
    loading = axes[:num_latents].T * (kept - noise).clamp_min(0).sqrt()
    log_det = kept.log().sum() + (dim - num_latents) * noise.log()
    log_likelihood = -num_rows / 2 * (dim * math.log(2 * math.pi) + log_det + dim)
    return ProbabilisticPCA(mean, loading, noise.sqrt(), log_likelihood)


def _rows(X: Any, dim: int | None = None) -> Tensor:
    rows, labels = as_rows(X)
    if rows.dim() != 2 or 0 in rows.shape or dim not in (None, rows.shape[1]):
        expected = "(rows, columns)" if dim is None else f"(rows, {dim})"
        raise DataError(f"X has shape {tuple(rows.shape)}; expected {expected}")
    refuse_missing(rows, labels)
    return rows if rows.is_floating_point() else rows.to(torch.float64)
