"""Multinomial (softmax) regression: one of several classes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_vi_lab.errors import ArgumentError, unknown_name
from pyro_vi_lab.models.design import design, scikit_learn_data, standardized
from pyro_vi_lab.models.outcomes import Categorical
from pyro_vi_lab.models.regression import Binding, Regression, Rows
from pyro_vi_lab.problem import Problem

CONTRASTS = ("reference", "sum_to_zero")


class MultinomialRegression(Regression):
    r"""Probabilities of K classes, log-linear up to a constant.

    .. math:: P(y_n = k) = \frac{\exp(\alpha_k + x_n \cdot \beta_k)}{\sum_l \exp(\alpha_l + x_n \cdot \beta_l)}

    A number added to all classes changes nothing, so one class is redundant. ``contrast="reference"``: that is class
    0, whose intercept and coefficients are zero; of the others

    .. math:: \alpha_k \sim \mathrm{Normal}(0, s_0), \quad \beta_{ik} \sim \mathrm{Normal}(0, s)

    ``contrast="sum_to_zero"``: those of all classes add up to zero, and no class is special. With Q an orthonormal
    basis of such vectors, ``(K, K - 1)``, the sites ``intercept_free`` and ``beta_free`` have the priors above, and
    :math:`\alpha = Q \alpha_{\mathrm{free}}`, :math:`\beta_i = Q \beta_{i,\mathrm{free}}`, so that every
    coefficient has the prior standard deviation :math:`s \sqrt{(K - 1) / K}`.

    Sites ``intercept`` and ``beta``, of the K - 1 classes after the reference, or of all K.

    Args:
        num_classes: K.
        contrast: ``"reference"`` or ``"sum_to_zero"``.
        prior: Prior of the coefficients: ``"normal"`` as above, ``"ridge"``, or ``"horseshoe"``; see
            :class:`pyro_vi_lab.models.priors.CoefficientPrior`.
        prior_scale: s.
        intercept_scale: s₀.
        num_relevant: Number of coefficients, out of D (K - 1), expected away from zero; of the horseshoe only.

    Shape:
        X ``(N, D)``, y ``(N,)`` of 0, ..., K - 1; intercept ``(K - 1,)`` or ``(K,)``, beta ``(D, K - 1)`` or
        ``(D, K)``; plates ``feature`` and ``row``.

    Raises:
        ArgumentError: Fewer than two classes, an unknown contrast, or a scale that is not positive.

    References:
        Agresti 2013, "Categorical Data Analysis", 3rd edition, Section 8.1.

    Example:
        >>> model = MultinomialRegression(3)
        >>> X, y, _ = model.simulate(100, 2, seed=0)
        >>> model.problem(X, y, classes=["red", "green", "blue"])
        Problem(MultinomialRegression: latent intercept (class), beta (feature, class); observed y (row))
    """

    has_classes: ClassVar[bool] = True
    outcome: Categorical

    def __init__(
        self,
        num_classes: int,
        *,
        contrast: str = "reference",
        prior: str = "normal",
        prior_scale: float = 1.0,
        intercept_scale: float = 2.5,
        num_relevant: float | None = None,
    ) -> None:
        super().__init__(
            Categorical(num_classes),
            prior=prior,
            prior_scale=prior_scale,
            intercept_scale=intercept_scale,
            num_relevant=num_relevant,
        )
        if contrast not in CONTRASTS:
            raise unknown_name("contrast", contrast, CONTRASTS)
        self.contrast = contrast

    @property
    def num_classes(self) -> int:
        """K."""
        return self.outcome.num_classes

    def coefficients(self, X: Tensor, zero: Tensor, unit: Tensor) -> tuple[Tensor, Tensor | None]:
        """Sample intercepts and coefficients, on the scale of the data."""
        scaling, suffix = self.binding.scaling, self._suffix
        event = (self.num_classes - 1,)
        intercept = pyro.sample(
            f"intercept{suffix}", dist.Normal(zero, zero + self.intercept_scale).expand(event).to_event(1)
        )
        num_rows, num_features = X.shape
        beta = self.prior.sample(
            f"beta{suffix}", zero=zero, unit=unit, num_rows=num_rows, num_features=num_features, event=event
        )
        if not suffix:
            return intercept, beta
        if self.contrast == "sum_to_zero":
            basis = sum_to_zero_basis(self.num_classes).to(zero)
            intercept, beta = intercept @ basis.T, beta @ basis.T
        if scaling is not None:
            intercept, beta = scaling.original(intercept, beta, classes=True)
        intercept = pyro.deterministic("intercept", intercept, event_dim=1)
        return intercept, pyro.deterministic("beta", beta, event_dim=2)

    def predictor(self, X: Tensor, intercept: Tensor, beta: Tensor | None) -> Tensor:
        """The logits of all classes.

        Shape:
            intercept ``(K,)`` and beta ``(D, K)``, or of K - 1 classes; with other dimensions to the left
            ``(*, 1, K)`` and ``(*, D, K)``; result ``(N, K)`` or ``(*, N, K)``.
        """
        assert beta is not None
        eta = intercept + X @ beta
        if self.contrast == "reference":
            eta = torch.cat([torch.zeros_like(eta[..., :1]), eta], -1)
        return eta

    def problem(
        self,
        X: Any,
        y: Any,
        *,
        offset: Any = None,
        classes: Sequence[Any] | None = None,
        standardize: bool = False,
        features: Sequence[str] | None = None,
        name: str | None = None,
    ) -> Problem:
        """The model with checked data; see :meth:`pyro_vi_lab.models.regression.Regression.problem`.

        Args:
            X: Covariates, without a column for the intercept.
            y: Classes, 0, ..., K - 1.
            offset: None: what is added to all classes changes nothing.
            classes: Names of the classes.
            standardize: Whether the priors are those of standardized covariates.
            features: Names of the columns.
            name: What to call the problem.

        Raises:
            DataError: The data do not fit; the message names the row.
            ArgumentError: As many names as classes are needed, or an offset.
        """
        data = design(X, y, features)
        if offset is not None:
            raise ArgumentError("an offset that is added to the logits of all classes changes nothing: leave it out")
        if classes is not None and len(classes) != self.num_classes:
            raise ArgumentError(f"classes has {len(classes)} names; the model has num_classes={self.num_classes}")
        binding = Binding(data.features, classes=tuple(classes or range(self.num_classes)))
        rows = Rows(data.X, data.features)
        return self.problem_of_rows(rows, data.y, binding, standardize=standardize, name=name)

    def site_dims(self, rows: Rows) -> dict[str, tuple[str, ...]]:
        """Names of axes that are not those of plates."""
        dims: dict[str, tuple[str, ...]] = {"intercept": ("class",), "beta": ("feature", "class")}
        if self._suffix:
            dims |= {f"intercept{self._suffix}": ("contrast",), f"beta{self._suffix}": ("feature", "contrast")}
        if self.prior.kind != "normal":
            dims["beta_raw"] = ("feature", "contrast")
        if self.prior.kind == "horseshoe":
            dims["local_scale"] = ("feature", "contrast")
        return dims

    def site_coords(self, rows: Rows) -> dict[str, Sequence[Any]]:
        """Labels of axes."""
        classes = self.binding.classes
        return {"feature": rows.features, "class": classes[1:] if self.contrast == "reference" else classes}

    @property
    def _suffix(self) -> str:
        """Ends the names of what is sampled, where that is not what it is called by."""
        if self.binding.scaling is not None:
            return "_standardized"
        return "_free" if self.contrast == "sum_to_zero" else ""


def sum_to_zero_basis(size: int) -> Tensor:
    """An orthonormal basis of the vectors of this size that add up to zero (Helmert's), ``(K, K - 1)``.

    Example:
        >>> basis = sum_to_zero_basis(3)
        >>> bool(basis.sum(0).abs().max() < 1e-15), (basis.T @ basis).round(decimals=12).tolist()
        (True, [[1.0, 0.0], [0.0, 1.0]])
    """
    columns = []
    for k in range(1, size):
        column = torch.zeros(size, dtype=torch.float64)
        column[:k], column[k] = 1.0, -float(k)
        columns.append(column / math.sqrt(k * (k + 1)))
    return torch.stack(columns, 1)


def example() -> Problem:
    """Iris: the species of 150 flowers by four standardized lengths.

    Raises:
        ExtraError: scikit-learn is not installed.
    """
    data = scikit_learn_data("iris")
    return MultinomialRegression(3).problem(
        standardized(data.X),
        data.y,
        features=data.features,
        classes=("setosa", "versicolor", "virginica"),
        name="multinomial_regression",
    )
