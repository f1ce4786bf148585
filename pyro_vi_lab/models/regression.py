"""What all regressions share: intercept and coefficients, problems, simulations and predictions."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Protocol, Self

import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule
from torch import Tensor

from pyro_vi_lab.errors import ArgumentError, DataError
from pyro_vi_lab.isolation import seeded
from pyro_vi_lab.models.design import (
    Simulation,
    check_shapes,
    checked_covariates,
    checked_rows,
    design,
    linear_predictor,
    positive,
    simulated,
)
from pyro_vi_lab.models.groups import Factor, Grouped
from pyro_vi_lab.models.outcomes import Outcome
from pyro_vi_lab.models.priors import CoefficientPrior
from pyro_vi_lab.models.scaling import Scaling
from pyro_vi_lab.posterior import Posterior
from pyro_vi_lab.problem import Problem


@dataclass(frozen=True, eq=False)
class Rows:
    """Rows of a table as a regression takes them.

    Args:
        X: Covariates.
        features: Their names.
        offset: What is added to the linear predictor; ``None`` for nothing.
        groups: What each grouping factor says about the rows.
        factors: The grouping factors.

    Shape:
        X ``(N, D)``, offset ``(N,)``.
    """

    X: Tensor
    features: tuple[str, ...]
    offset: Tensor | None = None
    groups: Mapping[str, Grouped] = field(default_factory=dict)
    factors: tuple[Factor, ...] = ()


class NewRows(Protocol):
    """A formula that has seen data: makes rows of new ones in the same way."""

    def rows(self, data: Any) -> Rows:
        """Rows of a data frame."""


@dataclass(frozen=True, eq=False)
class Binding:
    """What the model of a problem knows of the data that it was made with.

    Args:
        features: Names of the covariates; ``None`` of a model that has seen no data.
        scaling: How the data are standardized; ``None`` if they are not.
        factors: The grouping factors.
        classes: Names of the classes of the outcome.
        formula: Where the covariates come from, if from a formula.
    """

    features: tuple[str, ...] | None = None
    scaling: Scaling | None = None
    factors: tuple[Factor, ...] = ()
    classes: tuple[Any, ...] = ()
    formula: NewRows | None = None


class Regression(PyroModule):
    """A regression; see its subclasses, one for each kind of outcome.

    Args:
        outcome: The distribution of the outcome given the linear predictor.
        prior: Prior of the coefficients, a name of :data:`pyro_vi_lab.models.priors.PRIORS`.
        prior_scale: Its scale.
        intercept_scale: Prior standard deviation of the intercept.
        num_relevant: Number of coefficients expected away from zero; of the horseshoe only.
    """

    fewest_features: ClassVar[int] = 1
    has_classes: ClassVar[bool] = False

    def __init__(
        self,
        outcome: Outcome,
        *,
        prior: str,
        prior_scale: float,
        intercept_scale: float,
        num_relevant: float | None,
    ) -> None:
        super().__init__()
        positive(prior_scale=prior_scale, intercept_scale=intercept_scale)
        self.outcome = outcome
        self.prior = CoefficientPrior(prior, prior_scale, num_relevant)
        self.prior_scale = prior_scale
        self.intercept_scale = intercept_scale
        self.binding = Binding()

    # --- the model --------------------------------------------------------------------------------------------------

    def forward(self, X: Tensor, y: Tensor | None = None, offset: Tensor | None = None) -> Tensor:
        """Run the model; returns the linear predictor of every row."""
        return self.run(X, y, offset, {})

    def run(self, X: Tensor, y: Tensor | None, offset: Tensor | None, groups: Mapping[str, Grouped]) -> Tensor:
        """Sample all sites; returns the linear predictor of every row."""
        check_shapes(X, y, fewest_features=self.fewest_features)
        zero, scaling = X.new_zeros(()), self.binding.scaling
        values, unit = self.outcome.sites(zero, scaling.y_scale if scaling and self.outcome.measured else None)
        intercept, beta = self.coefficients(X, zero, unit)
        eta = self.predictor(X, intercept, beta)
        for term in self.group_terms(groups, zero):
            eta = eta + term
        if offset is not None:
            eta = eta + offset
        with pyro.plate("row", X.shape[0]):
            pyro.sample("y", self.outcome.distribution(eta, values), obs=y)
        return eta

    def coefficients(self, X: Tensor, zero: Tensor, unit: Tensor) -> tuple[Tensor, Tensor | None]:
        """Sample intercept and coefficients, on the scale of the data; the latter are ``None`` if D is zero."""
        scaling = self.binding.scaling
        suffix = "" if scaling is None else "_standardized"
        prior = dist.Normal(zero, self.intercept_scale * unit)
        intercept = pyro.sample(f"intercept{suffix}", prior)
        if X.shape[1] == 0:
            if scaling is not None:
                shifted = scaling.y_center + scaling.y_scale * intercept
                intercept = pyro.deterministic("intercept", shifted, event_dim=0)
            return intercept, None
        num_rows, num_features = X.shape
        beta = self.prior.sample(f"beta{suffix}", zero=zero, unit=unit, num_rows=num_rows, num_features=num_features)
        if scaling is not None:
            intercept, beta = scaling.original(intercept, beta)
            intercept = pyro.deterministic("intercept", intercept, event_dim=0)
            beta = pyro.deterministic("beta", beta, event_dim=1)
        return intercept, beta

    def predictor(self, X: Tensor, intercept: Tensor, beta: Tensor | None) -> Tensor:
        """The linear predictor without offset and groups.

        Shape:
            intercept ``()`` and beta ``(D,)``, result ``(N,)``; with other dimensions to the left ``(*, 1)``,
            ``(*, D)`` and ``(*, N)``.
        """
        if beta is None:
            return intercept + X.new_zeros(X.shape[0])
        return linear_predictor(X, intercept, beta)

    def group_terms(self, groups: Mapping[str, Grouped], zero: Tensor) -> list[Tensor]:
        """Sample what each grouping factor adds to the linear predictor."""
        return []

    # --- with data --------------------------------------------------------------------------------------------------

    def problem(
        self,
        X: Any,
        y: Any,
        *,
        offset: Any = None,
        standardize: bool = False,
        features: Sequence[str] | None = None,
        name: str | None = None,
    ) -> Problem:
        """The model with checked data; see :func:`pyro_vi_lab.models.design.design` for what is checked.

        Args:
            X: Covariates, without a column for the intercept.
            y: Outcome.
            offset: What is added to the linear predictor of every row, if anything.
            standardize: Whether the priors are those of standardized covariates and, of outcomes measured on a scale,
                of a standardized outcome. The latent sites then have names that end in ``_standardized``; the
                deterministic sites ``intercept``, ``beta``, ... are of the data as they are, as without.
            features: Names of the columns; by default those of the data frame, or ``x0``, ``x1``, ...
            name: What to call the problem.

        Raises:
            DataError: The data do not fit; the message names the row or the column.
            ArgumentError: As many names as columns are needed.
        """
        data = design(X, y, features)
        added = None if offset is None else checked_rows("offset", offset, len(data.X))
        rows = Rows(data.X, data.features, added)
        return self.problem_of_rows(rows, data.y, Binding(data.features), standardize=standardize, name=name)

    def problem_of_rows(
        self, rows: Rows, y: Tensor, binding: Binding, *, standardize: bool, name: str | None
    ) -> Problem:
        """The model with rows that have been checked; its own model is a copy that remembers the binding."""
        self.outcome.check(y)
        if standardize:
            binding = self._standardized(rows, y, binding)
        bound = self.bound(binding)
        return Problem(
            bound, *bound.arguments(rows, y), dims=bound.site_dims(rows), coords=bound.site_coords(rows), name=name
        )

    def why_no_maximum(self, problem: Problem) -> str:
        """Why the likelihood of a problem has no maximum, where its rows say so."""
        X, y = problem.args[:2]
        return self.outcome.no_maximum(X, y, self.binding.features or ())

    def bound(self, binding: Binding) -> Self:
        """A copy that knows the data."""
        other = copy.deepcopy(self)
        other.binding = binding
        return other

    def arguments(self, rows: Rows, y: Tensor | None) -> tuple[Any, ...]:
        """Arguments of ``forward``."""
        return (rows.X, y) if rows.offset is None else (rows.X, y, rows.offset)

    def site_dims(self, rows: Rows) -> dict[str, tuple[str, ...]]:
        """Names of axes that are not those of plates."""
        scaled = self.binding.scaling is not None and rows.X.shape[1] > 0
        return {"beta": ("feature",)} if scaled else {}

    def site_coords(self, rows: Rows) -> dict[str, Sequence[Any]]:
        """Labels of axes."""
        return {"feature": rows.features}

    def _standardized(self, rows: Rows, y: Tensor, binding: Binding) -> Binding:
        outcome = None
        if self.outcome.measured:
            outcome = y if rows.offset is None else y - rows.offset
            if not float(outcome.std(correction=0)) > 0:
                raise DataError(
                    f"y is constant ({float(y[0]):g} in every row) and cannot be standardized: leave out standardize"
                )
        scaling = Scaling.of(rows.X, outcome)
        factors = tuple(factor.standardized(rows.groups[factor.name].Z, scaling.y_scale) for factor in binding.factors)
        return replace(binding, scaling=scaling, factors=factors)

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

    # --- predictions ------------------------------------------------------------------------------------------------

    def predict(self, posterior: Posterior | Mapping[str, Tensor], X: Any, *, offset: Any = None) -> Tensor:
        """Expected outcome of every row, averaged over the draws.

        Args:
            posterior: Draws of the regression's sites by whatever method, those of a fit of a point included, or the
                values of a point by site.
            X: Covariates as they are, not standardized, of any rows; a data frame where a formula was given.
            offset: What is added to the linear predictor of every row.

        Shape:
            X ``(N, D)``, result ``(N,)``; of K classes their probabilities, ``(N, K)``.

        Raises:
            ArgumentError: The posterior is of other sites or of another number of covariates.
            DataError: The rows do not fit; the message names the row or the column.
        """
        return self.expected(posterior, X, offset=offset).mean((0, 1))

    def expected(self, posterior: Posterior | Mapping[str, Tensor], X: Any, *, offset: Any = None) -> Tensor:
        """Expected outcome of every row given each draw; see :meth:`predict`.

        Shape:
            result ``(C, S, N)``; of K classes ``(C, S, N, K)``.
        """
        return self.outcome.mean(self.linear_predictor(posterior, self.new_rows(X, offset)))

    def predictive(
        self, posterior: Posterior | Mapping[str, Tensor], X: Any, *, offset: Any = None, seed: int = 0
    ) -> Tensor:
        """A new outcome of every row for each draw; see :meth:`predict`.

        Shape:
            result ``(C, S, N)``.
        """
        return self.draw_outcome(posterior, self.linear_predictor(posterior, self.new_rows(X, offset)), seed)

    def draw_outcome(self, posterior: Posterior | Mapping[str, Tensor], eta: Tensor, seed: int) -> Tensor:
        """A new outcome for each draw and row of a linear predictor."""
        draws = sites_of(posterior, self.outcome.names)
        with seeded(seed), torch.no_grad():
            values = {name: draws[name].unsqueeze(-1) for name in self.outcome.names}
            return torch.as_tensor(self.outcome.distribution(eta, values).sample()).to(eta)

    def linear_predictor(self, posterior: Posterior | Mapping[str, Tensor], rows: Rows) -> Tensor:
        """The linear predictor of checked rows given each draw, ``(C, S, N)``."""
        names = ("intercept", "beta") if rows.X.shape[1] else ("intercept",)
        draws = sites_of(posterior, names)
        beta, axis = draws.get("beta"), 1 + self.has_classes
        if beta is not None and beta.shape[-axis] != rows.X.shape[1]:
            raise ArgumentError(
                f"X has {rows.X.shape[1]} columns; the posterior has {beta.shape[-axis]} coefficients beta"
            )
        intercept = draws["intercept"].unsqueeze(-axis)
        eta = self.predictor(rows.X.to(intercept), intercept, beta)
        return eta if rows.offset is None else eta + rows.offset.to(eta)

    def new_rows(self, X: Any, offset: Any) -> Rows:
        """Rows to predict, checked against what the model was made with."""
        if self.binding.formula is not None and hasattr(X, "columns"):
            rows = self.binding.formula.rows(X)
            if offset is not None:
                raise ArgumentError("the offset is a term of the formula, offset(...), and comes with the data frame")
            return rows
        known = self.binding.features
        if hasattr(X, "columns") and known is not None:
            missing = [column for column in known if column not in map(str, X.columns)]
            if missing:
                raise DataError(
                    f"X lacks the column {missing[0]!r}; the model was made with the columns {', '.join(known)}"
                )
            X = X[[column for name in known for column in X.columns if str(column) == name]]
        covariates, names = checked_covariates(X)
        if known is not None and len(known) != len(names):
            raise DataError(f"X has {len(names)} columns; the model was made with {len(known)}: {', '.join(known)}")
        added = None if offset is None else checked_rows("offset", offset, len(covariates))
        return Rows(covariates, known or names, added)


def sites_of(posterior: Posterior | Mapping[str, Tensor], names: Sequence[str]) -> dict[str, Tensor]:
    """Draws ``(C, S, *shape)`` of some sites; those of a point as one chain of one draw.

    Raises:
        ArgumentError: No posterior, or one without a site that is asked for.
    """
    if not isinstance(posterior, Posterior | Mapping):
        raise ArgumentError(
            f"posterior must be a Posterior, or a point by site, got {type(posterior).__name__}; of a fit give "
            "fit.posterior()"
        )
    draws = posterior.draws if isinstance(posterior, Posterior) else {k: v[None, None] for k, v in posterior.items()}
    for name in names:
        if name not in draws:
            raise ArgumentError(f"the posterior has no draws of the site {name!r}; it has {', '.join(draws)}")
    return {name: draws[name] for name in names}
