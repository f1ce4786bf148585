"""Logistic regression with normal priors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pyro
import pyro.distributions as dist
from pyro.nn import PyroModule
from torch import Tensor

from pyro_vi_lab.errors import DataError
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
from pyro_vi_lab.problem import Problem


class LogisticRegression(PyroModule):
    r"""Probability of one of two outcomes, linear on the logit scale.

    .. math::
        \alpha \sim \mathrm{Normal}(0, s_0), \quad \beta_i \sim \mathrm{Normal}(0, s), \quad
        y_n \sim \mathrm{Bernoulli}(\operatorname{logit}^{-1}(\alpha + x_n \cdot \beta))

    Sites ``intercept`` and ``beta``. The intercept is a site of its own, so ``X`` must not have a column of
    ones. The priors are meant for covariates on a common scale, such as standardized ones.

    Args:
        prior_scale: s, prior standard deviation of every coefficient.
        intercept_scale: s₀, prior standard deviation of the intercept.

    Shape:
        X ``(N, D)``, y ``(N,)`` of zeros and ones; plates ``feature`` and ``row``.

    Raises:
        ArgumentError: A scale that is not positive.

    References:
        Gelman, Jakulin, Pittau, Su 2008, "A weakly informative default prior distribution for logistic and
        other regression models", Annals of Applied Statistics 2(4): priors of this size on standardized
        covariates, there with Cauchy tails.

    Example:
        >>> model = LogisticRegression()
        >>> X, y, _ = model.simulate(100, 2, seed=0)
        >>> model.problem(X, y)
        Problem(LogisticRegression: latent intercept, beta (feature); observed y (row))
    """

    def __init__(self, *, prior_scale: float = 1.0, intercept_scale: float = 2.5) -> None:
        super().__init__()
        positive(prior_scale=prior_scale, intercept_scale=intercept_scale)
        self.prior_scale = prior_scale
        self.intercept_scale = intercept_scale

    def forward(self, X: Tensor, y: Tensor | None = None) -> Tensor:
        """Run the model; returns the logit of every row."""
        check_shapes(X, y)
        zero = X.new_zeros(())
        intercept = pyro.sample("intercept", dist.Normal(zero, self.intercept_scale))
        with pyro.plate("feature", X.shape[1]):
            beta = pyro.sample("beta", dist.Normal(zero, self.prior_scale))
        logits = linear_predictor(X, intercept, beta)
        with pyro.plate("row", X.shape[0]):
            pyro.sample("y", dist.Bernoulli(logits=logits), obs=y)
        return logits

    def problem(self, X: Any, y: Any, *, features: Sequence[str] | None = None, name: str | None = None) -> Problem:
        """The model with checked data; see :func:`pyro_vi_lab.models.design.design` for what else is checked.

        Raises:
            DataError: A label that is neither 0 nor 1; the message names the row.
        """
        data = design(X, y, features)
        wrong = (data.y != 0) & (data.y != 1)
        if bool(wrong.any()):
            row = int(wrong.nonzero()[0])
            raise DataError(
                f"y has {int(wrong.sum())} label(s) other than 0 and 1, the first ({float(data.y[row]):g}) "
                f"in row {row}; recode the two outcomes as 0 and 1"
            )
        return Problem(self, data.X, data.y, coords={"feature": data.features}, name=name)

    def simulate(self, num_rows: int, num_features: int, *, seed: int = 0, correlation: float = 0.5) -> Simulation:
        """Covariates, labels, and the parameters that made them, which are drawn from the prior.

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
    """Breast cancer: 569 tumors, benign (1) or malignant (0), by 30 standardized measurements of cell nuclei.

    Raises:
        ExtraError: scikit-learn is not installed.
    """
    data = scikit_learn_data("breast_cancer")
    return LogisticRegression().problem(
        standardized(data.X), data.y, features=data.features, name="logistic_regression"
    )


def example_simulated() -> Problem:
    """Simulated: 1000 rows, 20 correlated covariates."""
    model = LogisticRegression(prior_scale=0.5, intercept_scale=1.0)
    X, y, _ = model.simulate(1000, 20, seed=0)
    return model.problem(X, y, name="logistic_regression_simulated")
