"""Standard noises ε: symmetric about zero."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor


class Noise(ABC):
    r"""A standard distribution of ε.

    The Fisher information of :math:`z = \mu + \sigma\varepsilon` in whitened coordinates, where a step is a shift
    :math:`\delta` and a symmetric stretch :math:`S` (:math:`\sigma \leftarrow \sigma(I + S)`), is

    .. math:: c \|\delta\|^2 + a \|S\|^2 + b\, (\operatorname{tr} S)^2.
    """

    rotation_invariant: bool = False
    """Whether Uε has the distribution of ε for every orthogonal U, so that a dense σ goes by its covariance alone."""
    matches_moments: bool = False
    """Whether draws may be whitened so that their second moment is exact."""
    num_moments: float = math.inf
    """Order of the moments of ε from which on they are infinite."""

    @abstractmethod
    def sample(
        self,
        shape: tuple[int, ...],
        *,
        generator: torch.Generator | None,
        dtype: torch.dtype,
        device: torch.device | None = None,
    ) -> Tensor:
        """Independent draws of the given shape, vectors along the last axis; on the generator's device if any."""

    @abstractmethod
    def log_prob(self, eps: Tensor) -> Tensor:
        """Log density of the vectors along the last axis: ``(..., D)`` to ``(...)``."""

    @abstractmethod
    def score(self, eps: Tensor) -> Tensor:
        """Minus the gradient of the log density, ``(..., D)``."""

    @abstractmethod
    def entropy(self, dim: int) -> float:
        """Entropy of ``dim`` coordinates, in nats."""

    @property
    @abstractmethod
    def variance(self) -> float:
        """Variance of one coordinate."""

    @abstractmethod
    def fisher(self, dim: int) -> tuple[float, float, float]:
        """The numbers c, a and b above; with a diagonal stretch where the noise is not rotation invariant."""

    @abstractmethod
    def quantile(self, probability: float) -> float:
        """Quantile of one coordinate."""


@dataclass(frozen=True)
class Normal(Noise):
    r"""Standard normal noise, :math:`\varepsilon \sim N(0, I)`.

    Example:
        >>> Normal().log_prob(torch.zeros(2, dtype=torch.float64)).item() == -math.log(2 * math.pi)
        True
    """

    rotation_invariant = True
    matches_moments = True

    def sample(
        self,
        shape: tuple[int, ...],
        *,
        generator: torch.Generator | None,
        dtype: torch.dtype,
        device: torch.device | None = None,
    ) -> Tensor:
        """Independent standard normal draws of the given shape."""
        return torch.randn(shape, generator=generator, dtype=dtype, device=_device(generator, device))

    def log_prob(self, eps: Tensor) -> Tensor:
        """Log density, summed over the last axis."""
        return -0.5 * (eps.square().sum(-1) + eps.shape[-1] * math.log(2 * math.pi))

    def score(self, eps: Tensor) -> Tensor:
        """Ε itself."""
        return eps

    def entropy(self, dim: int) -> float:
        r""":math:`\tfrac{D}{2} \log 2\pi e`."""
        return 0.5 * dim * math.log(2 * math.pi * math.e)

    @property
    def variance(self) -> float:
        """1."""
        return 1.0

    def fisher(self, dim: int) -> tuple[float, float, float]:
        """1, 2 and 0."""
        return 1.0, 2.0, 0.0

    def quantile(self, probability: float) -> float:
        """Quantile of the standard normal distribution."""
        return float(torch.special.ndtri(torch.tensor(probability, dtype=torch.float64)))


@dataclass(frozen=True)
class StudentT(Noise):
    r"""Independent Student-t coordinates.

    .. math:: p(\varepsilon_i) \propto (1 + \varepsilon_i^2/\nu)^{-(\nu + 1)/2}

    Args:
        df: Degrees of freedom ν > 2, so that there is a variance.

    References:
        Lange, Little & Taylor 1989, "Robust statistical modeling using the t distribution", JASA 84, Appendix B (Fisher
        information).
    """

    df: float = 5.0

    def sample(
        self,
        shape: tuple[int, ...],
        *,
        generator: torch.Generator | None,
        dtype: torch.dtype,
        device: torch.device | None = None,
    ) -> Tensor:
        """A normal draw over the root of a chi-squared one, for each coordinate."""
        device = _device(generator, device)
        normal = torch.randn(shape, generator=generator, dtype=dtype, device=device)
        return normal / _root_of_chi2(self.df, shape, generator, dtype, device)

    def log_prob(self, eps: Tensor) -> Tensor:
        """Log density, summed over the last axis."""
        kernel = -(self.df + 1) / 2 * torch.log1p(eps.square() / self.df).sum(-1)
        return kernel - eps.shape[-1] * _log_normalizer(self.df, 1)

    def score(self, eps: Tensor) -> Tensor:
        r""":math:`(\nu + 1)\varepsilon_i / (\nu + \varepsilon_i^2)`."""
        return (self.df + 1) * eps / (self.df + eps.square())

    def entropy(self, dim: int) -> float:
        """That of one coordinate, ``dim`` times."""
        return dim * _entropy(self.df, 1)

    @property
    def num_moments(self) -> float:  # type: ignore[override]
        """ν."""
        return self.df

    @property
    def variance(self) -> float:
        r""":math:`\nu / (\nu - 2)`."""
        return self.df / (self.df - 2)

    def fisher(self, dim: int) -> tuple[float, float, float]:
        r""":math:`(\nu + 1)/(\nu + 3)`, :math:`2\nu/(\nu + 3)` and 0."""
        return (self.df + 1) / (self.df + 3), 2 * self.df / (self.df + 3), 0.0

    def quantile(self, probability: float) -> float:
        """Quantile of the Student-t distribution."""
        return _student_t_quantile(self.df, probability)


@dataclass(frozen=True)
class MultivariateStudentT(Noise):
    r"""The multivariate Student-t distribution: one heavy tail for all coordinates together.

    .. math:: p(\varepsilon) \propto (1 + \|\varepsilon\|^2/\nu)^{-(\nu + D)/2}

    Args:
        df: Degrees of freedom ν > 2, so that there is a variance.

    References:
        Lange, Little & Taylor 1989, "Robust statistical modeling using the t distribution", JASA 84, Appendix B (Fisher
        information).
    """

    df: float = 5.0
    rotation_invariant = True

    def sample(
        self,
        shape: tuple[int, ...],
        *,
        generator: torch.Generator | None,
        dtype: torch.dtype,
        device: torch.device | None = None,
    ) -> Tensor:
        """A vector of normal draws over the root of one chi-squared draw."""
        device = _device(generator, device)
        normal = torch.randn(shape, generator=generator, dtype=dtype, device=device)
        return normal / _root_of_chi2(self.df, (*shape[:-1], 1), generator, dtype, device)

    def log_prob(self, eps: Tensor) -> Tensor:
        """Log density of the vectors along the last axis."""
        dim = eps.shape[-1]
        kernel = -(self.df + dim) / 2 * torch.log1p(eps.square().sum(-1) / self.df)
        return kernel - _log_normalizer(self.df, dim)

    def score(self, eps: Tensor) -> Tensor:
        r""":math:`(\nu + D)\varepsilon / (\nu + \|\varepsilon\|^2)`."""
        return (self.df + eps.shape[-1]) * eps / (self.df + eps.square().sum(-1, keepdim=True))

    def entropy(self, dim: int) -> float:
        """Closed, in digamma functions."""
        return _entropy(self.df, dim)

    @property
    def num_moments(self) -> float:  # type: ignore[override]
        """ν."""
        return self.df

    @property
    def variance(self) -> float:
        r""":math:`\nu / (\nu - 2)`."""
        return self.df / (self.df - 2)

    def fisher(self, dim: int) -> tuple[float, float, float]:
        r"""With :math:`m = \nu + D + 2`: :math:`(\nu + D)/m`, :math:`2(\nu + D)/m` and :math:`-2/m`."""
        size = self.df + dim
        return size / (size + 2), 2 * size / (size + 2), -2 / (size + 2)

    def quantile(self, probability: float) -> float:
        """Quantile of the Student-t distribution."""
        return _student_t_quantile(self.df, probability)


@dataclass(frozen=True)
class Laplace(Noise):
    r"""Independent Laplace coordinates, :math:`p(\varepsilon_i) = \tfrac12 e^{-|\varepsilon_i|}`."""

    def sample(
        self,
        shape: tuple[int, ...],
        *,
        generator: torch.Generator | None,
        dtype: torch.dtype,
        device: torch.device | None = None,
    ) -> Tensor:
        """An exponential draw with a random sign, for each coordinate."""
        device = _device(generator, device)
        size = torch.empty(shape, dtype=dtype, device=device).exponential_(generator=generator)
        return size.where(torch.rand(shape, generator=generator, device=device) < 0.5, -size)

    def log_prob(self, eps: Tensor) -> Tensor:
        """Log density, summed over the last axis."""
        return -(eps.abs().sum(-1) + eps.shape[-1] * math.log(2))

    def score(self, eps: Tensor) -> Tensor:
        """The sign of ε."""
        return eps.sign()

    def entropy(self, dim: int) -> float:
        r""":math:`D (1 + \log 2)`."""
        return dim * (1 + math.log(2))

    @property
    def variance(self) -> float:
        """2."""
        return 2.0

    def fisher(self, dim: int) -> tuple[float, float, float]:
        """1, 1 and 0."""
        return 1.0, 1.0, 0.0

    def quantile(self, probability: float) -> float:
        """Quantile of the Laplace distribution."""
        tail = min(probability, 1 - probability)
        return math.copysign(-math.log(2 * tail) if tail > 0 else math.inf, probability - 0.5)


def _device(generator: torch.Generator | None, device: torch.device | None) -> torch.device | None:
    return device if generator is None else generator.device


def _root_of_chi2(
    df: float,
    shape: tuple[int, ...],
    generator: torch.Generator | None,
    dtype: torch.dtype,
    device: torch.device | None,
) -> Tensor:
    """Draws of √(χ²/ν)."""
    half = torch.full(shape, df / 2, dtype=dtype, device=device)
    return (torch._standard_gamma(half, generator=generator) * (2 / df)).sqrt()


def _student_t_quantile(df: float, probability: float) -> float:
    from scipy.special import stdtrit  # not with the package: SciPy takes longer than all of it

    tail = min(probability, 1 - probability)
    size = -float(stdtrit(df, tail)) if tail > 0 else math.inf
    return math.copysign(size, probability - 0.5)


def _log_normalizer(df: float, dim: int) -> float:
    return math.lgamma(df / 2) - math.lgamma((df + dim) / 2) + dim / 2 * math.log(df * math.pi)


def _entropy(df: float, dim: int) -> float:
    high, low = torch.digamma(torch.tensor([(df + dim) / 2, df / 2], dtype=torch.float64)).tolist()
    return _log_normalizer(df, dim) + (df + dim) / 2 * (high - low)
