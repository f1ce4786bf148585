"""Intercepts and slopes that vary by a grouping factor."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_vi_lab.errors import ArgumentError, DataError, unknown_name
from pyro_vi_lab.models.design import positive
from pyro_vi_lab.models.scaling import Scaling

CORRELATIONS = ("lkj", "independent")
INTERCEPT = "intercept"
"""Name of the column of ones among the columns whose effects vary."""


class Grouped(NamedTuple):
    """What a grouping factor says about N rows: the number of each row's group, and what its effects multiply.

    Shape:
        number ``(N,)``, Z ``(N, Q)``.
    """

    number: Tensor
    Z: Tensor


@dataclass(frozen=True)
class GroupPrior:
    """The prior of varying effects; the arguments are those of the hierarchical regression."""

    centered: bool = False
    correlation: str = "lkj"
    lkj_concentration: float = 2.0
    group_scale: float = 1.0

    def __post_init__(self) -> None:
        if self.correlation not in CORRELATIONS:
            raise unknown_name("correlation", self.correlation, CORRELATIONS)
        positive(lkj_concentration=self.lkj_concentration, group_scale=self.group_scale)


@dataclass(frozen=True, eq=False)
class Factor:
    r"""A grouping factor: its groups, and the columns whose effects vary by group.

    Args:
        name: Name of the factor, of its plate, and the beginning of the names of its sites.
        labels: Its groups, J of them.
        columns: What varies, ``("intercept", "dose")``; Q of them.
        back: Matrix T that takes the effects of standardized columns to those of the columns as they are, row
            vectors from the left; ``None`` where they are not standardized.
        y_scale: Standard deviation by which the outcome was divided.

    Shape:
        back ``(Q, Q)``.
    """

    name: str
    labels: tuple[Any, ...]
    columns: tuple[str, ...]
    back: Tensor | None = None
    y_scale: Tensor | None = None

    def standardized(self, Z: Tensor, y_scale: Tensor) -> Factor:
        """The same factor with effects of standardized columns; only with a varying intercept are they centered."""
        scaling = Scaling.of(Z, None)
        ones = torch.tensor([column == INTERCEPT for column in self.columns], device=Z.device)
        scale = torch.where(ones, 1.0, scaling.scale)
        if not bool((scale > 0).all()):
            column = self.columns[int((scale <= 0).nonzero()[0])]
            raise DataError(
                f"column {column!r}, whose effect varies by {self.name!r}, is constant; the varying intercept is that"
            )
        back = torch.diag(scale.reciprocal())
        if bool(ones.any()):
            back[:, int(ones.nonzero()[0])] += torch.where(ones, 0.0, -scaling.center / scale)
        return replace(self, back=back, y_scale=y_scale)

    def codes(self, values: Any, num_rows: int) -> Tensor:
        """Number of the group of every row.

        Raises:
            DataError: Another number of rows, a missing label, or one that the factor does not have.
        """
        given = _labels(self.name, values, num_rows)
        numbers = {label: number for number, label in enumerate(self.labels)}
        for row, label in enumerate(given):
            if label not in numbers:
                shown = ", ".join(map(repr, self.labels[:10])) + (", ..." if len(self.labels) > 10 else "")
                raise DataError(
                    f"row {row} is of the group {label!r} of {self.name!r}, of which the model has seen no rows; its "
                    f"groups: {shown}"
                )
        return torch.tensor([numbers[label] for label in given])

    def effects(self, zero: Tensor, prior: GroupPrior) -> Tensor:
        r"""Sample the effects of every group, on the scale of the columns as they are.

        .. math::
            s_q \sim \mathrm{HalfNormal}(s), \quad R \sim \mathrm{LKJ}(\eta), \quad
            b_j \sim \mathrm{Normal}(0,\; \mathrm{diag}(s)\, R\, \mathrm{diag}(s))

        Shape:
            result ``(J, Q)``, with the dimension of vectorized particles left of it.
        """
        name, size = self.name, len(self.columns)
        y_scale = zero + 1 if self.y_scale is None else self.y_scale
        suffix = "" if self.back is None else "_standardized"
        # one that cannot be correlated with another is independent
        correlated = prior.correlation == "lkj" and size > 1
        scales = dist.HalfNormal(zero + prior.group_scale).expand([size]).to_event(1)
        scale = pyro.sample(f"{name}_scale{suffix}", scales)
        if correlated:
            lkj = dist.LKJCholesky(size, zero + prior.lkj_concentration)
            root = scale.unsqueeze(-1) * pyro.sample(f"{name}_correlation_cholesky{suffix}", lkj)
        else:
            root = torch.diag_embed(scale)
        with pyro.plate(name, len(self.labels)):
            if prior.centered:
                spread = (
                    dist.MultivariateNormal(zero.expand(size), scale_tril=root)
                    if correlated
                    else dist.Normal(zero, scale).to_event(1)
                )
                effect = pyro.sample(f"{name}_effect{suffix}", spread)
            else:
                raw = pyro.sample(f"{name}_raw", dist.Normal(zero, zero + 1).expand([size]).to_event(1))
                effect = (root @ raw.unsqueeze(-1)).squeeze(-1)
            if self.back is not None:
                effect = y_scale * (effect @ self.back)
            if not prior.centered or self.back is not None:
                effect = pyro.deterministic(f"{name}_effect", effect, event_dim=1)
        if self.back is not None:
            # the columns of root' T have the lengths sqrt(diag(T' root root' T))
            lengths = y_scale * (root.mT @ self.back).square().sum(-2).sqrt()
            pyro.deterministic(f"{name}_scale", lengths, event_dim=1)
        return torch.as_tensor(effect)

    def dims(self, prior: GroupPrior) -> dict[str, tuple[str, ...]]:
        """Names of the axes of the factor's sites."""
        name, term = self.name, f"{self.name}_term"
        suffixes = ("",) if self.back is None else ("", "_standardized")
        named: dict[str, tuple[str, ...]] = {f"{name}_scale{suffix}": (term,) for suffix in suffixes}
        named[f"{name}_effect"] = (name, term)
        if prior.centered and self.back is not None:
            named[f"{name}_effect_standardized"] = (name, term)
        if not prior.centered:
            named[f"{name}_raw"] = (name, term)
        return named

    @property
    def coords(self) -> dict[str, list[Any]]:
        """Labels of the groups and of the columns."""
        return {self.name: list(self.labels), f"{self.name}_term": list(self.columns)}


def factor_of(name: str, values: Any, columns: Sequence[str], num_rows: int) -> Factor:
    """A factor whose groups are the labels that occur, in their order.

    Raises:
        DataError: Another number of rows, or a missing label.
        ArgumentError: A name that sites or other dimensions of the model have.
    """
    if name in ("row", "feature", "class", "y", "beta", "intercept", "sigma", "nu", "precision", "dispersion"):
        raise ArgumentError(f"a grouping factor cannot be called {name!r}, as a part of the model is: rename it")
    if not name.isidentifier():
        raise ArgumentError(f"the grouping factor {name!r} gives sites their names; give it a name such as 'school'")
    labels = set(_labels(name, values, num_rows))
    try:
        ordered = sorted(labels)
    except TypeError:
        ordered = sorted(labels, key=str)
    return Factor(name, tuple(ordered), tuple(columns))


def group_effects(effects: Tensor, grouped: Grouped) -> Tensor:
    """What varying effects ``(*, J, Q)`` add to the linear predictor of every row, ``(*, N)``."""
    return (effects[..., grouped.number, :] * grouped.Z).sum(-1)


def _labels(name: str, values: Any, num_rows: int) -> list[Any]:
    array = values.numpy(force=True) if isinstance(values, Tensor) else np.asarray(values)
    if array.shape != (num_rows,):
        raise DataError(f"the groups {name!r} have shape {array.shape}; expected ({num_rows},), one label per row of X")
    labels: list[Any] = array.tolist()
    import pandas  # which takes a while

    missing = np.flatnonzero(pandas.isna(array))
    if len(missing):
        raise DataError(f"the group {name!r} of row {missing[0]} is missing; remove such rows")
    return labels
