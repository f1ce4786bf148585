"""Regressions from a formula and a data frame."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from pyro_vi_lab.errors import ArgumentError, DataError, ExtraError, unknown_name
from pyro_vi_lab.models.design import not_constant
from pyro_vi_lab.models.groups import INTERCEPT, Factor, Grouped, factor_of
from pyro_vi_lab.models.hierarchical_regression import HierarchicalRegression
from pyro_vi_lab.models.linear_regression import LinearRegression
from pyro_vi_lab.models.logistic_regression import LogisticRegression
from pyro_vi_lab.models.multinomial_regression import MultinomialRegression
from pyro_vi_lab.models.negative_binomial_regression import NegativeBinomialRegression
from pyro_vi_lab.models.poisson_regression import PoissonRegression
from pyro_vi_lab.models.regression import Binding, Regression, Rows
from pyro_vi_lab.models.robust_regression import RobustRegression
from pyro_vi_lab.problem import Problem

if TYPE_CHECKING:
    import pandas

FAMILIES: dict[str, Callable[[], Regression]] = {
    "gaussian": LinearRegression,
    "student_t": RobustRegression,
    "bernoulli": LogisticRegression,
    "poisson": PoissonRegression,
    "negative_binomial": NegativeBinomialRegression,
}
"""Regressions without groups by family; besides ``"categorical"``, which depends on the number of classes."""


def regression(
    formula: str,
    data: pandas.DataFrame,
    *,
    family: str | Regression = "gaussian",
    standardize: bool = True,
    name: str | None = None,
) -> Problem:
    """A regression as a problem, from a formula and a data frame.

    Categorical columns, interactions ``a * b``, functions ``np.log(a)``, terms by group ``(1 | g)`` and ``(x | g)``,
    and ``offset(a)`` are read as by the library formulae. The names of the terms become the labels of the dimension
    ``feature``. Predictions take a data frame, ``problem.model.predict(posterior, frame)``, whose columns go through
    the same design.

    Args:
        formula: ``"kid_score ~ mom_iq * mom_hs + (1 | school)"``. The models always have an intercept.
        data: One row per observation, without missing values in the columns that the formula names.
        family: Kind of the outcome: ``"gaussian"``, ``"student_t"``, ``"bernoulli"`` (0 and 1, or ``y['yes'] ~ ...``),
            ``"categorical"``, ``"poisson"`` or ``"negative_binomial"``; or a regression with other settings, such as
            ``PoissonRegression(prior="ridge")``. With terms by group a name stands for a
            :class:`HierarchicalRegression` of that family.
        standardize: Whether the priors are those of standardized data; the sites ``intercept``, ``beta``, ... are of
            the data as they are in any case.
        name: What to call the problem.

    Raises:
        ExtraError: formulae is not installed.
        ArgumentError: The formula cannot be read, names a column that is not there, or does not go with the family.
        DataError: The data do not fit; the message names the row or the column.

    Example:
        >>> import pandas
        >>> frame = pandas.DataFrame({"y": [1.0, 2.0, 4.0, 3.0], "dose": [0.0, 1.0, 3.0, 2.0]})
        >>> regression("y ~ dose", frame, standardize=False)
        Problem(LinearRegression: latent precision, intercept, beta (feature); deterministic sigma; observed y (row))
    """
    design = FormulaDesign(formula, data)
    y, classes = design.outcome(categorical=family == "categorical" or isinstance(family, MultinomialRegression))
    rows = design.rows(data)
    not_constant(rows.X, rows.features)
    model = _model(family, has_groups=bool(rows.factors), num_classes=len(classes))
    if rows.factors and not isinstance(model, HierarchicalRegression):
        raise ArgumentError(f"{type(model).__name__} has no terms by group: take HierarchicalRegression as the family")
    if not rows.factors and isinstance(model, HierarchicalRegression):
        raise ArgumentError(f"the formula {formula!r} has no term by group, such as (1 | school)")
    if rows.X.shape[1] < model.fewest_features:
        raise ArgumentError(f"the formula {formula!r} has no covariates; at least one is needed")
    if rows.offset is not None and isinstance(model, MultinomialRegression):
        raise ArgumentError("an offset that is added to the logits of all classes changes nothing: leave it out")
    binding = Binding(rows.features, factors=rows.factors, classes=classes, formula=design)
    return model.problem_of_rows(rows, y, binding, standardize=standardize, name=name)


class FormulaDesign:
    """A formula that has seen data: makes rows of these and of new ones in the same way.

    Args:
        formula: The formula.
        data: The data frame that its categories and transformations are taken from.

    Raises:
        ExtraError: formulae is not installed.
        ArgumentError: The formula cannot be read.
        DataError: A value is missing.
    """

    def __init__(self, formula: str, data: pandas.DataFrame) -> None:
        if not isinstance(formula, str):
            raise ArgumentError(f"formula must be a string such as 'y ~ x', got {type(formula).__name__}")
        import pandas  # which takes a while

        if not isinstance(data, pandas.DataFrame):
            raise ArgumentError(f"data must be a pandas DataFrame, got {type(data).__name__}")
        try:
            from formulae import design_matrices, model_description
            from formulae.parser import ParseError
        except ImportError as error:
            raise ExtraError(
                "formulas are read with the library formulae, which is not installed: "
                "pip install 'pyro-vi-lab[formula]'"
            ) from error
        self.formula = formula
        try:
            description = model_description(formula)
        except (ParseError, ValueError, TypeError, AttributeError) as error:
            raise ArgumentError(f"the formula {formula!r} cannot be read: {error}") from error
        if description.response is None:
            raise ArgumentError(f"the formula {formula!r} has no outcome; write 'y ~ ...'")
        response = set(description.response.var_names)
        names = description.var_names - {""}  # formulae's name for what is computed inside a function
        self._columns = sorted(names - response)
        _check_columns(formula, data, sorted(names))
        try:
            self._design = design_matrices(formula, data, na_action="error", extra_namespace={"np": np})
        except KeyError as error:
            raise ArgumentError(f"the formula {formula!r} uses {error}, which is no function that it knows") from error
        except (ValueError, TypeError, AttributeError, NotImplementedError) as error:
            raise ArgumentError(f"the formula {formula!r} cannot be applied to the data: {error}") from error
        terms = self._design.common.terms if self._design.common is not None else {}
        if "Intercept" not in terms:
            raise ArgumentError(
                f"the formula {formula!r} takes away the intercept, which all models have: write 1 + ..."
            )
        kinds = {key: term.kind for key, term in terms.items()}
        self._offsets = [key for key, kind in kinds.items() if kind == "offset"]
        self._terms = [key for key, kind in kinds.items() if kind not in ("offset", "intercept")]
        self._factors = self._read_factors(data)

    def outcome(self, *, categorical: bool) -> tuple[Tensor, tuple[Any, ...]]:
        """The outcome as numbers, and its classes if it is categorical.

        Raises:
            ArgumentError: The outcome is of names, and not categorical, or several columns.
        """
        response = self._design.response
        values, levels = np.asarray(response.design_matrix), response.levels
        if levels is not None:
            if not categorical:
                shown = ", ".join(map(repr, levels[:5]))
                raise ArgumentError(
                    f"the outcome {response.name!r} is of names ({shown}): write \"{response.name}['{levels[-1]}'] ~ "
                    "...\" for the probability of one of them, or family='categorical'"
                )
            return torch.from_numpy(values.argmax(1)).double(), tuple(levels)
        if values.ndim != 1:
            raise ArgumentError(f"the outcome {response.name!r} has {values.shape[1]} columns; expected one")
        if categorical:
            classes, codes = np.unique(values, return_inverse=True)
            return torch.from_numpy(codes).double(), tuple(classes.tolist())
        y = torch.tensor(values, dtype=torch.float64)
        _check_finite(self.formula, y[:, None], [response.name])
        return y, ()

    def rows(self, data: Any) -> Rows:
        """Rows of a data frame.

        Raises:
            DataError: A column is missing, a value is missing, or a level or a group has not been seen before.
        """
        _check_columns(self.formula, data, self._columns)
        try:
            common = self._design.common.evaluate_new_data(data)
            effects = {
                name: torch.tensor(
                    np.column_stack([term.expr.eval_new_data(data) for term in terms]), dtype=torch.float64
                )
                for name, terms in self._terms_of_factors.items()
            }
        except ValueError as error:
            raise DataError(f"the formula {self.formula!r} cannot be applied to these data: {error}") from error
        features = tuple(str(label) for key in self._terms for label in self._design.common.terms[key].labels)
        parts = [common[key].reshape(len(data), -1) for key in self._terms]
        X = torch.tensor(np.column_stack([np.empty((len(data), 0)), *parts]), dtype=torch.float64)
        _check_finite(self.formula, X, features)
        offset = None
        if self._offsets:
            columns = np.column_stack([common[key] for key in self._offsets])
            offset = torch.tensor(columns.sum(1), dtype=torch.float64)
            _check_finite(self.formula, offset[:, None], self._offsets)
        groups = {}
        for factor in self._factors:
            _check_finite(self.formula, effects[factor.name], factor.columns)
            groups[factor.name] = Grouped(factor.codes(data[factor.name], len(data)), effects[factor.name])
        return Rows(X, features, offset, groups, self._factors)

    def _read_factors(self, data: pandas.DataFrame) -> tuple[Factor, ...]:
        terms = self._design.group.terms.values() if self._design.group is not None else ()
        self._terms_of_factors: dict[str, list[Any]] = {}
        for term in terms:
            if term.factor.name not in data.columns:
                raise ArgumentError(
                    f"the grouping factor {term.factor.name!r} of the formula {self.formula!r} is not a column of the "
                    "data: make it one"
                )
            self._terms_of_factors.setdefault(term.factor.name, []).append(term)
        factors = []
        for name, members in self._terms_of_factors.items():
            labels = [str(label) for term in members for label in term.expr.labels]
            columns = [INTERCEPT if label == "Intercept" else label for label in labels]
            factors.append(factor_of(name, data[name], columns, len(data)))
        return tuple(factors)


def _model(family: Any, *, has_groups: bool, num_classes: int) -> Regression:
    if isinstance(family, Regression):
        return family
    if family == "categorical":
        if has_groups:
            raise ArgumentError("family='categorical' has no terms by group")
        return MultinomialRegression(num_classes)
    if not isinstance(family, str) or family not in FAMILIES:
        raise unknown_name("family", family, [*FAMILIES, "categorical"])
    return HierarchicalRegression(family) if has_groups else FAMILIES[family]()


def _check_columns(formula: str, data: Any, names: list[str]) -> None:
    """Raise an error for a column that is not there, with the nearest one that is, or that has a missing value."""
    known = [str(column) for column in data.columns]
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise ArgumentError(
                f"the formula {formula!r} names {name!r}, which is no column of the data: {hint}Columns: "
                f"{', '.join(known)}"
            )
        missing = np.flatnonzero(data[name].isna())
        if len(missing):
            raise DataError(
                f"column {name!r} has {len(missing)} missing value(s), the first in row {missing[0]}; remove or impute "
                "such rows"
            )
    if len(data) == 0:
        raise DataError("the data frame has no rows")


def _check_finite(formula: str, columns: Tensor, names: Any) -> None:
    bad = ~torch.isfinite(columns)
    if bool(bad.any()):
        row, column = bad.nonzero()[0].tolist()
        raise DataError(
            f"term {names[column]!r} of the formula {formula!r} is {float(columns[row, column])} in row {row}"
        )
