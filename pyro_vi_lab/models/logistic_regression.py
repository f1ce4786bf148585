"""Logistic regression with normal priors."""

from __future__ import annotations

from pyro_vi_lab.models.design import scikit_learn_data, standardized
from pyro_vi_lab.models.outcomes import Bernoulli
from pyro_vi_lab.models.regression import Regression
from pyro_vi_lab.problem import Problem


class LogisticRegression(Regression):
    r"""Probability of one of two outcomes, linear on the logit scale.

    .. math::
        \alpha \sim \mathrm{Normal}(0, s_0), \quad \beta_i \sim \mathrm{Normal}(0, s), \quad
        y_n \sim \mathrm{Bernoulli}(\operatorname{logit}^{-1}(\alpha + x_n \cdot \beta))

    Sites ``intercept`` and ``beta``. The intercept is a site of its own, so ``X`` must not have a column of
    ones. The priors are meant for covariates on a common scale, such as standardized ones.

    Args:
        prior: Prior of the coefficients: ``"normal"`` as above, ``"ridge"``, or ``"horseshoe"``; see
            :class:`pyro_vi_lab.models.priors.CoefficientPrior`.
        prior_scale: s, prior standard deviation of every coefficient.
        intercept_scale: s₀, prior standard deviation of the intercept.
        num_relevant: Number of coefficients expected away from zero; of the horseshoe only.

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

    def __init__(
        self,
        *,
        prior: str = "normal",
        prior_scale: float = 1.0,
        intercept_scale: float = 2.5,
        num_relevant: float | None = None,
    ) -> None:
        super().__init__(
            Bernoulli(),
            prior=prior,
            prior_scale=prior_scale,
            intercept_scale=intercept_scale,
            num_relevant=num_relevant,
        )


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
