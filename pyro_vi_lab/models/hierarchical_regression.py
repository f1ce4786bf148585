"""Regression with intercepts and slopes that vary by group."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from pyro_vi_lab.errors import ArgumentError, unknown_name
from pyro_vi_lab.isolation import seeded
from pyro_vi_lab.models.design import checked_rows, design, simulated
from pyro_vi_lab.models.groups import INTERCEPT, Factor, Grouped, GroupPrior, factor_of, group_effects
from pyro_vi_lab.models.outcomes import OUTCOMES, Outcome
from pyro_vi_lab.models.regression import Binding, Regression, Rows, sites_of
from pyro_vi_lab.posterior import Posterior
from pyro_vi_lab.problem import Problem


class GroupedSimulation(NamedTuple):
    """Simulated ``X (N, D)``, ``y (N,)`` and ``group (N,)``, and the ``values`` of the other sites that made y."""

    X: Tensor
    y: Tensor
    group: Tensor
    values: dict[str, Tensor]


class HierarchicalRegression(Regression):
    r"""Regression whose intercept, and the slopes of some covariates, vary by group.

    .. math::
        \alpha \sim \mathrm{Normal}(0, s_0), \quad \beta_i \sim \mathrm{Normal}(0, s), \quad
        \tau_q \sim \mathrm{HalfNormal}(s_g), \quad R \sim \mathrm{LKJ}(\eta)

    .. math::
        b_j \sim \mathrm{Normal}(0,\; \mathrm{diag}(\tau)\, R\, \mathrm{diag}(\tau)), \quad
        y_n \sim p(\,\cdot \mid \alpha + x_n \cdot \beta + z_n \cdot b_{j(n)})

    where z is 1 for the varying intercept, followed by the covariates whose slopes vary; R is the identity with
    ``correlation="independent"``. Sites ``intercept``, ``beta``, those of the outcome (``sigma``, ``nu``,
    ``dispersion``), and of each grouping factor, here called ``group``: ``group_scale`` (τ),
    ``group_correlation_cholesky`` (a root of R) and ``group_effect`` (b), what each group deviates by. Non-centered,
    ``group_raw`` is standard normal and the effect is deterministic; centered, it is sampled as it stands. The
    second form samples better where groups have much data, the first where they have little.

    Args:
        family: Kind of the outcome: a name of :data:`pyro_vi_lab.models.outcomes.OUTCOMES`, or an outcome, such as
            ``outcomes.StudentT(4.0)``.
        centered: Which of the two forms of the same model.
        correlation: ``"lkj"`` or ``"independent"``.
        lkj_concentration: η; 1 is uniform over correlations, larger values favor small ones.
        group_scale: s_g.
        prior: Prior of the coefficients: ``"normal"`` as above, ``"ridge"``, or ``"horseshoe"``; see
            :class:`pyro_vi_lab.models.priors.CoefficientPrior`.
        prior_scale: s.
        intercept_scale: s₀.
        num_relevant: Number of coefficients expected away from zero; of the horseshoe only.

    Shape:
        X ``(N, D)``, y and group ``(N,)``; group_effect ``(J, Q)``; plates ``feature``, ``row``, and one of the name of
        every factor.

    Raises:
        ArgumentError: An unknown name, or a scale that is not positive.

    References:
        Gelman & Hill 2007, "Data Analysis Using Regression and Multilevel/Hierarchical Models", Chapters 12 and 13.
        Lewandowski, Kurowicka & Joe 2009, "Generating random correlation matrices based on vines and extended onion
        method", Journal of Multivariate Analysis 100(9).

    Example:
        >>> model = HierarchicalRegression()
        >>> problem = model.problem([[0.0], [1.0], [0.0], [1.0]], [1.0, 2.0, 3.0, 5.0], group=["a", "a", "b", "b"])
        >>> problem.coords["group"], problem.dims("group_effect")
        (['a', 'b'], ('group', 'group_term'))
    """

    fewest_features: ClassVar[int] = 0

    def __init__(
        self,
        family: str | Outcome = "gaussian",
        *,
        centered: bool = False,
        correlation: str = "lkj",
        lkj_concentration: float = 2.0,
        group_scale: float = 1.0,
        prior: str = "normal",
        prior_scale: float = 1.0,
        intercept_scale: float = 10.0,
        num_relevant: float | None = None,
    ) -> None:
        if isinstance(family, str):
            if family not in OUTCOMES:
                raise unknown_name("family", family, OUTCOMES)
            family = OUTCOMES[family]()
        super().__init__(
            family,
            prior=prior,
            prior_scale=prior_scale,
            intercept_scale=intercept_scale,
            num_relevant=num_relevant,
        )
        self.group_prior = GroupPrior(centered, correlation, lkj_concentration, group_scale)

    def forward(  # type: ignore[override]  # the groups are data like X
        self,
        X: Tensor,
        groups: Mapping[str, Grouped],
        y: Tensor | None = None,
        offset: Tensor | None = None,
    ) -> Tensor:
        """Run the model of a problem; returns the linear predictor of every row.

        Raises:
            ArgumentError: The model has not seen the groups: take the ``model`` of the problem.
        """
        return self.run(X, y, offset, groups)

    def group_terms(self, groups: Mapping[str, Grouped], zero: Tensor) -> list[Tensor]:
        """Sample what each grouping factor adds to the linear predictor."""
        self._check_bound()
        return [
            group_effects(factor.effects(zero, self.group_prior), groups[factor.name])
            for factor in self.binding.factors
        ]

    def arguments(self, rows: Rows, y: Tensor | None) -> tuple[Any, ...]:
        """Arguments of ``forward``."""
        first = (rows.X, dict(rows.groups), y)
        return first if rows.offset is None else (*first, rows.offset)

    def problem(
        self,
        X: Any,
        y: Any,
        *,
        group: Any = None,
        slopes: Sequence[str] = (),
        offset: Any = None,
        standardize: bool = False,
        features: Sequence[str] | None = None,
        name: str | None = None,
    ) -> Problem:
        """The model with checked data; see :meth:`pyro_vi_lab.models.regression.Regression.problem`.

        Args:
            X: Covariates, without a column for the intercept.
            y: Outcome.
            group: Group of every row, numbers or names; or a dict of several such factors by name.
            slopes: Names of the covariates whose slopes vary by group.
            offset: What is added to the linear predictor of every row.
            standardize: Whether the priors are those of standardized data.
            features: Names of the columns of ``X``.
            name: What to call the problem.

        Raises:
            DataError: The data do not fit; the message names the row or the column.
            ArgumentError: No group, or slopes of unknown covariates.
        """
        data = design(X, y, features)
        if group is None:
            raise ArgumentError("group is missing: the group of every row, or a dict of several such factors by name")
        for slope in slopes:
            if slope not in data.features:
                raise unknown_name("covariate in slopes:", slope, data.features)
        given = dict(group) if isinstance(group, Mapping) else {"group": group}
        num_rows = len(data.X)
        factors = tuple(factor_of(key, value, (INTERCEPT, *slopes), num_rows) for key, value in given.items())
        rows = Rows(
            data.X,
            data.features,
            None if offset is None else checked_rows("offset", offset, num_rows),
            _grouped(factors, given, data.X, data.features),
        )
        binding = Binding(data.features, factors=factors)
        return self.problem_of_rows(rows, data.y, binding, standardize=standardize, name=name)

    def site_dims(self, rows: Rows) -> dict[str, tuple[str, ...]]:
        """Names of axes that are not those of plates."""
        dims = super().site_dims(rows)
        for factor in self.binding.factors:
            dims |= factor.dims(self.group_prior)
        return dims

    def site_coords(self, rows: Rows) -> dict[str, Sequence[Any]]:
        """Labels of axes."""
        coords = super().site_coords(rows)
        for factor in self.binding.factors:
            coords |= factor.coords
        return coords

    def simulate(  # type: ignore[override]  # with the groups
        self,
        num_rows: int,
        num_features: int,
        num_groups: int = 8,
        *,
        num_slopes: int = 0,
        seed: int = 0,
        correlation: float = 0.5,
    ) -> GroupedSimulation:
        """Covariates, outcome and groups of about the same size, and the parameters, drawn from the prior.

        Args:
            num_rows: N.
            num_features: D.
            num_groups: J.
            num_slopes: How many of the covariates, the first ones, have slopes that vary.
            seed: Seed of everything drawn.
            correlation: Of neighboring covariates.

        Raises:
            ArgumentError: No rows, features or groups, or a correlation outside (-1, 1).
        """
        if num_groups < 1 or not 0 <= num_slopes <= num_features:
            raise ArgumentError(
                "num_groups must be at least 1 and num_slopes from 0 to num_features, got "
                f"{num_groups} and {num_slopes}"
            )
        names = tuple(f"x{i}" for i in range(num_features))
        factor = Factor("group", tuple(range(num_groups)), (INTERCEPT, *names[:num_slopes]))
        with seeded(seed):
            index = torch.randperm(max(num_rows, 1)) % num_groups
        bound = self.bound(Binding(names, factors=(factor,)))
        assert isinstance(bound, HierarchicalRegression)
        # the covariates are drawn first and from the same seed, so that those of a dry run are those of the next
        zeros = Grouped(index, torch.zeros(max(num_rows, 1), 1 + num_slopes, dtype=torch.float64))
        X = simulated(bound, num_rows, num_features, correlation=correlation, seed=seed, groups={"group": zeros}).X
        groups = _grouped((factor,), {"group": index}, X, names)
        found = simulated(bound, num_rows, num_features, correlation=correlation, seed=seed, groups=groups)
        return GroupedSimulation(found.X, found.y, index, found.values)

    # --- predictions ------------------------------------------------------------------------------------------------

    def predict(
        self, posterior: Posterior | Mapping[str, Tensor], X: Any, *, group: Any = None, offset: Any = None
    ) -> Tensor:
        """Expected outcome of every row, averaged over the draws, ``(N,)``; of the ``model`` of a problem.

        Args:
            posterior: Draws of the regression's sites, or the values of a point by site.
            X: Covariates as they are; a data frame where a formula was given, which then has the groups too.
            group: Group of every row, as in :meth:`problem`.
            offset: What is added to the linear predictor of every row.

        Raises:
            ArgumentError: The posterior is of other sites, or no group.
            DataError: The rows do not fit, or one is of a group that the model has not seen.
        """
        return self.expected(posterior, X, group=group, offset=offset).mean((0, 1))

    def expected(
        self, posterior: Posterior | Mapping[str, Tensor], X: Any, *, group: Any = None, offset: Any = None
    ) -> Tensor:
        """Expected outcome of every row given each draw, ``(C, S, N)``; see :meth:`predict`."""
        rows = self.with_groups(self.new_rows(X, offset), group)
        return self.outcome.mean(self.linear_predictor(posterior, rows))

    def predictive(
        self,
        posterior: Posterior | Mapping[str, Tensor],
        X: Any,
        *,
        group: Any = None,
        offset: Any = None,
        seed: int = 0,
    ) -> Tensor:
        """A new outcome of every row for each draw, ``(C, S, N)``; see :meth:`predict`."""
        rows = self.with_groups(self.new_rows(X, offset), group)
        return self.draw_outcome(posterior, self.linear_predictor(posterior, rows), seed)

    def linear_predictor(self, posterior: Posterior | Mapping[str, Tensor], rows: Rows) -> Tensor:
        """The linear predictor of checked rows given each draw, ``(C, S, N)``."""
        eta = super().linear_predictor(posterior, rows)
        for factor in self.binding.factors:
            key = f"{factor.name}_effect"
            eta = eta + group_effects(sites_of(posterior, [key])[key], rows.groups[factor.name])
        return eta

    def with_groups(self, rows: Rows, group: Any) -> Rows:
        """The rows, with their groups as the model knows them."""
        self._check_bound()
        factors, features = self.binding.factors, self.binding.features or ()
        if rows.groups:
            if group is not None:
                raise ArgumentError("the groups are terms of the formula and come with the data frame: leave out group")
            return rows
        given = dict(group) if isinstance(group, Mapping) else {"group": group}
        for factor in factors:
            if given.get(factor.name) is None:
                raise ArgumentError(f"the group {factor.name!r} of every row is missing: give it with group=")
        return Rows(rows.X, rows.features, rows.offset, _grouped(factors, given, rows.X, features))

    def _check_bound(self) -> None:
        if not self.binding.factors:
            raise ArgumentError(
                "this model has seen no groups yet: make a problem of it, model.problem(X, y, group=...), and use "
                "problem.model"
            )


def _grouped(
    factors: Sequence[Factor], labels: Mapping[str, Any], X: Tensor, features: Sequence[str]
) -> dict[str, Grouped]:
    """What every factor says about the rows, whose varying slopes are those of columns of ``X``."""
    groups = {}
    for factor in factors:
        for column in factor.columns:
            if column != INTERCEPT and column not in features:
                raise ArgumentError(
                    f"the slopes of {column!r} vary by {factor.name!r}, and X has no such column: this model was made "
                    "from a formula, give it a data frame"
                )
        columns = (
            [
                torch.ones_like(X[:, 0])
                if column == INTERCEPT and column not in features
                else X[:, features.index(column)]
                for column in factor.columns
            ]
            if X.shape[1]
            else [X.new_ones(len(X))]
        )
        groups[factor.name] = Grouped(factor.codes(labels[factor.name], len(X)).to(X.device), torch.stack(columns, 1))
    return groups


def example_simulated() -> Problem:
    """Simulated: 240 rows in 12 groups, two covariates, intercept and slope of the first vary."""
    model = HierarchicalRegression()
    X, y, group, _ = model.simulate(240, 2, 12, num_slopes=1, seed=0)
    return model.problem(X, y, group=group, slopes=["x0"], name="hierarchical_regression_simulated")
