"""What an autoencoder's decoder gives for a row, as a distribution of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pyro.distributions as dist
from torch import Tensor

from pyro_vi_lab.errors import ArgumentError
from pyro_vi_lab.models.row_values import Likelihood

LIKELIHOODS: tuple[Likelihood, ...] = ("bernoulli", "continuous_bernoulli", "normal", "categorical")


def checked_shape(shape: Any) -> tuple[int, ...]:
    """Shape of a row, from one number or several.

    Raises:
        ArgumentError: They are no positive whole numbers.

    Example:
        >>> checked_shape(64), checked_shape([1, 8, 8])
        ((64,), (1, 8, 8))
    """
    sizes = (shape,) if isinstance(shape, int) else tuple(shape)
    if not sizes or not all(isinstance(size, int) and not isinstance(size, bool) and size > 0 for size in sizes):
        raise ArgumentError(
            f"shape is the shape of one row, positive whole numbers such as (64,) or (1, 8, 8), got {shape!r}"
        )
    return sizes


@dataclass(frozen=True)
class RowLikelihood:
    r"""The distribution of a row whose parameters a network gives: independent numbers of one kind.

    Args:
        kind: One of ``LIKELIHOODS``.
        shape: Of a row.
        num_categories: Of ``"categorical"``.

    Raises:
        ArgumentError: There is no such kind, or ``num_categories`` does not go with it.

    Example:
        >>> import torch
        >>> likelihood = RowLikelihood("bernoulli", (2,))
        >>> likelihood.expected(torch.zeros(3, 2))[0]
        tensor([0.5000, 0.5000])
    """

    kind: Likelihood
    shape: Sequence[int]
    num_categories: int | None = None

    def __post_init__(self) -> None:
        if self.kind not in LIKELIHOODS:
            raise ArgumentError(f"likelihood must be one of {', '.join(map(repr, LIKELIHOODS))}, got {self.kind!r}")
        if (self.kind == "categorical") != (self.num_categories is not None):
            raise ArgumentError(
                f"num_categories is {self.num_categories!r} with likelihood={self.kind!r}; 'categorical' needs it, and "
                "no other takes it"
            )
        if self.num_categories is not None and (not isinstance(self.num_categories, int) or self.num_categories < 2):
            raise ArgumentError(f"num_categories must be a whole number of at least 2, got {self.num_categories!r}")

    @property
    def per_row(self) -> tuple[int, ...]:
        """Shape of the parameters of a row."""
        return (*self.shape, self.num_categories) if self.num_categories else tuple(self.shape)

    def distribution(self, values: Tensor, noise: Tensor | None = None) -> Any:
        """Distribution of rows with these parameters, and this standard deviation if they are normal.

        Shape:
            values ``(..., *per_row)``; batch shape ``(...)``, event shape ``shape``.
        """
        return self._numbers(values, noise).to_event(len(self.shape))

    def expected(self, values: Tensor) -> Tensor:
        """Mean of every number, or the probability of every category."""
        if self.kind == "normal":
            return values
        numbers = self._numbers(values, None)
        found: Tensor = numbers.probs if self.kind == "categorical" else numbers.mean
        return found

    def _numbers(self, values: Tensor, noise: Tensor | None) -> Any:
        if self.kind == "bernoulli":
            return dist.Bernoulli(logits=values)
        if self.kind == "continuous_bernoulli":
            return dist.ContinuousBernoulli(logits=values)
        if self.kind == "categorical":
            return dist.Categorical(logits=values)
        assert noise is not None
        return dist.Normal(values, noise)
