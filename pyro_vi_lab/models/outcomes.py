"""What the outcome of a regression is, given its linear predictor."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_vi_lab.errors import ArgumentError, DataError
from pyro_vi_lab.models.design import positive
from pyro_vi_lab.models.separation import separating

NU_SHAPE, NU_RATE = 2.0, 0.1
"""Gamma prior of unknown degrees of freedom (Juárez & Steel 2010, Section 3)."""


class Outcome(ABC):
    """The distribution of an outcome given the linear predictor η, and the sites that it needs besides.

    Attributes:
        measured: Whether the outcome is measured on a scale, so that it can be standardized.
    """

    measured: ClassVar[bool] = False

    @abstractmethod
    def distribution(self, eta: Tensor, values: Mapping[str, Tensor]) -> Any:
        """Distribution of the rows, given η and the values of `names`."""

    def mean(self, eta: Tensor) -> Tensor:
        """Expected outcome, given η."""
        return eta

    def check(self, y: Tensor) -> None:
        """Raise a DataError that names the first row whose outcome is impossible."""
        assert bool(torch.isfinite(y).all())  # any finite number is possible

    def no_maximum(self, X: Tensor, y: Tensor, features: Sequence[str]) -> str:
        """Why the likelihood of these rows has no maximum, in a sentence that names the columns; empty if unknown."""
        return ""

    def sites(self, zero: Tensor, y_scale: Tensor | None) -> tuple[dict[str, Tensor], Tensor]:
        """Sample the sites that `distribution` needs, on the scale of the data, and the unit of the coefficients.

        Args:
            zero: A zero of the type and on the device of the data.
            y_scale: Standard deviation by which the outcome was divided; ``None`` if it is used as it is.
        """
        return {}, zero + 1

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the sites that `distribution` needs."""
        return ()


def _refuse(wrong: Tensor, y: Tensor, what: str, advice: str) -> None:
    """Raise a DataError that counts the wrong outcomes and names the first, if there are any."""
    if bool(wrong.any()):
        row = int(wrong.nonzero()[0])
        raise DataError(f"y has {int(wrong.sum())} {what}, the first ({float(y[row]):g}) in row {row}; {advice}")


def _separated(X: Tensor, y: Tensor, features: Sequence[str]) -> str:
    columns = [repr(features[i]) for i in separating(X, y)]
    if not columns:
        return ""
    several = len(columns) > 1
    return (
        f"column{'s' if several else ''} {', '.join(columns)} of X separate{'' if several else 's'} the classes of y "
        "without an error, so that the likelihood has no maximum"
    )


def scale_site(name: str, prior: Any, y_scale: Tensor | None) -> Tensor:
    """A scale of the outcome: sampled as it is, or in units of the outcome's own and then multiplied by it."""
    if y_scale is None:
        return torch.as_tensor(pyro.sample(name, prior))
    value = y_scale * pyro.sample(f"{name}_standardized", prior)
    return torch.as_tensor(pyro.deterministic(name, value, event_dim=0))


def _refuse_constant(y: Tensor) -> None:
    """Raise a DataError where all rows have one outcome: a scale that may be zero then is, and has no posterior."""
    if len(y) > 1 and bool((y == y[0]).all()):
        raise DataError(
            f"y is constant ({float(y[0]):g} in every row), so that the noise may be zero and its posterior density "
            "has no bound: use LinearRegression, whose prior keeps it away from zero"
        )


@dataclass(frozen=True)
class ConjugateNormal(Outcome):
    """Normal around η; of unknown noise, the precision is Gamma and the coefficients are in units of the noise.

    Args:
        noise_scale: σ where it is known; None where it is not.
        precision_shape: Shape of the prior of 1/σ².
        precision_rate: Its rate.
    """

    noise_scale: float | None = None
    precision_shape: float = 1.0
    precision_rate: float = 1.0
    measured: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.noise_scale is not None:
            positive(noise_scale=self.noise_scale)
        positive(precision_shape=self.precision_shape, precision_rate=self.precision_rate)

    def sites(self, zero: Tensor, y_scale: Tensor | None) -> tuple[dict[str, Tensor], Tensor]:
        """Sample what the distribution needs, and the unit of the coefficients; see :class:`Outcome`."""
        if self.noise_scale is not None:
            return {"sigma": zero + self.noise_scale}, zero + 1
        prior = dist.Gamma(zero + self.precision_shape, self.precision_rate)
        if y_scale is None:
            sigma = pyro.deterministic("sigma", pyro.sample("precision", prior).rsqrt())
            return {"sigma": sigma}, sigma
        precision = pyro.sample("precision_standardized", prior)
        pyro.deterministic("precision", precision / y_scale.square(), event_dim=0)
        sigma = pyro.deterministic("sigma", y_scale * precision.rsqrt(), event_dim=0)
        return {"sigma": sigma}, precision.rsqrt()

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the sites that `distribution` needs."""
        return () if self.noise_scale is not None else ("sigma",)

    def distribution(self, eta: Tensor, values: Mapping[str, Tensor]) -> Any:
        """Distribution of the rows."""
        return dist.Normal(eta, values["sigma"] if "sigma" in values else eta.new_tensor(self.noise_scale))


@dataclass(frozen=True)
class Normal(Outcome):
    """Normal around η with σ ~ HalfNormal(``sigma_scale``), the coefficients in units of the outcome."""

    sigma_scale: float = 1.0
    measured: ClassVar[bool] = True

    def __post_init__(self) -> None:
        positive(sigma_scale=self.sigma_scale)

    def check(self, y: Tensor) -> None:
        """Raise a DataError if all outcomes are equal."""
        _refuse_constant(y)

    def sites(self, zero: Tensor, y_scale: Tensor | None) -> tuple[dict[str, Tensor], Tensor]:
        """Sample what the distribution needs, and the unit of the coefficients; see :class:`Outcome`."""
        return {"sigma": scale_site("sigma", dist.HalfNormal(zero + self.sigma_scale), y_scale)}, zero + 1

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the sites that `distribution` needs."""
        return ("sigma",)

    def distribution(self, eta: Tensor, values: Mapping[str, Tensor]) -> Any:
        """Distribution of the rows."""
        return dist.Normal(eta, values["sigma"])


@dataclass(frozen=True)
class StudentT(Outcome):
    """Student-t around η: σ ~ HalfNormal(``sigma_scale``), and ν known or ~ Gamma(2, 0.1)."""

    degrees_of_freedom: float | None = None
    sigma_scale: float = 1.0
    measured: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.degrees_of_freedom is not None:
            positive(degrees_of_freedom=self.degrees_of_freedom)
        positive(sigma_scale=self.sigma_scale)

    def check(self, y: Tensor) -> None:
        """Raise a DataError if all outcomes are equal."""
        _refuse_constant(y)

    def sites(self, zero: Tensor, y_scale: Tensor | None) -> tuple[dict[str, Tensor], Tensor]:
        """Sample what the distribution needs, and the unit of the coefficients; see :class:`Outcome`."""
        values = {"sigma": scale_site("sigma", dist.HalfNormal(zero + self.sigma_scale), y_scale)}
        if self.degrees_of_freedom is None:
            values["nu"] = pyro.sample("nu", dist.Gamma(zero + NU_SHAPE, zero + NU_RATE))
        return values, zero + 1

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the sites that `distribution` needs."""
        return ("sigma",) if self.degrees_of_freedom is not None else ("sigma", "nu")

    def distribution(self, eta: Tensor, values: Mapping[str, Tensor]) -> Any:
        """Distribution of the rows."""
        known = self.degrees_of_freedom
        return dist.StudentT(values["nu"] if known is None else eta.new_tensor(known), eta, values["sigma"])


@dataclass(frozen=True)
class Bernoulli(Outcome):
    """Zero or one, with η the logit of one."""

    def mean(self, eta: Tensor) -> Tensor:
        """Expected outcome, given η."""
        return torch.sigmoid(eta)

    def check(self, y: Tensor) -> None:
        """Raise a DataError that names the first row whose outcome is impossible."""
        _refuse((y != 0) & (y != 1), y, "label(s) other than 0 and 1", "recode the two outcomes as 0 and 1")

    def no_maximum(self, X: Tensor, y: Tensor, features: Sequence[str]) -> str:
        """Columns that separate zeros and ones."""
        return _separated(X, y, features)

    def distribution(self, eta: Tensor, values: Mapping[str, Tensor]) -> Any:
        """Distribution of the rows."""
        return dist.Bernoulli(logits=eta)


@dataclass(frozen=True)
class Categorical(Outcome):
    """One of K classes, 0 to K - 1, with η their logits up to a constant, ``(*, N, K)``."""

    num_classes: int

    def __post_init__(self) -> None:
        if isinstance(self.num_classes, bool) or not isinstance(self.num_classes, int) or self.num_classes < 2:
            raise ArgumentError(f"num_classes must be a whole number of at least 2, got {self.num_classes!r}")

    def mean(self, eta: Tensor) -> Tensor:
        """Expected outcome, given η."""
        return torch.softmax(eta, -1)

    def check(self, y: Tensor) -> None:
        """Raise a DataError that names the first row whose outcome is impossible."""
        wrong = (y < 0) | (y >= self.num_classes) | (y != y.floor())
        labels = f"label(s) other than 0, ..., {self.num_classes - 1}"
        _refuse(wrong, y, labels, "recode the classes, or raise num_classes")

    def no_maximum(self, X: Tensor, y: Tensor, features: Sequence[str]) -> str:
        """Columns that separate one class from the others."""
        return _separated(X, y, features)

    def distribution(self, eta: Tensor, values: Mapping[str, Tensor]) -> Any:
        """Distribution of the rows."""
        return dist.Categorical(logits=eta)


class Counts(Outcome):
    """0, 1, 2, ..., with η the logarithm of the mean."""

    def mean(self, eta: Tensor) -> Tensor:
        """Expected outcome, given η."""
        return eta.exp()

    def check(self, y: Tensor) -> None:
        """Raise a DataError that names the first row whose outcome is impossible."""
        wrong = (y < 0) | (y != y.floor())
        _refuse(wrong, y, "value(s) that are no counts", "counts are whole numbers from zero up")


@dataclass(frozen=True)
class Poisson(Counts):
    """Counts whose variance is their mean."""

    def distribution(self, eta: Tensor, values: Mapping[str, Tensor]) -> Any:
        """Distribution of the rows."""
        return dist.Poisson(eta.exp())


@dataclass(frozen=True)
class NegativeBinomial(Counts):
    """Counts of mean μ and variance μ + a μ²: a ~ HalfNormal(``dispersion_scale``)."""

    dispersion_scale: float = 1.0

    def __post_init__(self) -> None:
        positive(dispersion_scale=self.dispersion_scale)

    def sites(self, zero: Tensor, y_scale: Tensor | None) -> tuple[dict[str, Tensor], Tensor]:
        """Sample what the distribution needs, and the unit of the coefficients; see :class:`Outcome`."""
        return {"dispersion": pyro.sample("dispersion", dist.HalfNormal(zero + self.dispersion_scale))}, zero + 1

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the sites that `distribution` needs."""
        return ("dispersion",)

    def distribution(self, eta: Tensor, values: Mapping[str, Tensor]) -> Any:
        """Distribution of the rows."""
        dispersion = values["dispersion"]
        return dist.NegativeBinomial(dispersion.reciprocal(), logits=eta + dispersion.log())


OUTCOMES: dict[str, Callable[[], Outcome]] = {
    "gaussian": Normal,
    "student_t": StudentT,
    "bernoulli": Bernoulli,
    "poisson": Poisson,
    "negative_binomial": NegativeBinomial,
}
"""Outcomes of hierarchical regressions by the name of their family."""
