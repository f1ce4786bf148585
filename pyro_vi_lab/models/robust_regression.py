"""Robust regression: Student-t noise, which outliers do not pull."""

from __future__ import annotations

from pyro_vi_lab.models.outcomes import StudentT
from pyro_vi_lab.models.regression import Regression
from pyro_vi_lab.problem import Problem


class RobustRegression(Regression):
    r"""Linear regression with Student-t noise.

    .. math::
        \sigma \sim \mathrm{HalfNormal}(s_\sigma), \quad \nu \sim \mathrm{Gamma}(2, 0.1), \quad
        \alpha \sim \mathrm{Normal}(0, s_0), \quad \beta_i \sim \mathrm{Normal}(0, s)

    .. math:: y_n \sim \mathrm{StudentT}(\nu,\; \alpha + x_n \cdot \beta,\; \sigma)

    Sites ``sigma``, ``nu`` where it is unknown, ``intercept`` and ``beta``. Predictions are of the center of the
    distribution, which is its mean where ν > 1. The priors are meant for standardized data: ``standardize=True`` of
    :meth:`problem`.

    Args:
        degrees_of_freedom: ν where it is known; None where it is not.
        prior: Prior of the coefficients: ``"normal"`` as above, ``"ridge"``, or ``"horseshoe"``; see
            :class:`pyro_vi_lab.models.priors.CoefficientPrior`.
        prior_scale: s, prior standard deviation of every coefficient.
        intercept_scale: s₀, prior standard deviation of the intercept.
        num_relevant: Number of coefficients expected away from zero; of the horseshoe only.
        sigma_scale: Scale of the prior of the noise.

    Shape:
        X ``(N, D)``, y ``(N,)``; plates ``feature`` and ``row``.

    Raises:
        ArgumentError: A scale or degrees of freedom that are not positive.

    References:
        Lange, Little & Taylor 1989, "Robust statistical modeling using the t distribution", JASA 84(408).
        Juárez & Steel 2010, "Model-based clustering of non-Gaussian panel data based on skew-t distributions", Journal
        of Business & Economic Statistics 28(1): the prior of ν.

    Example:
        >>> model = RobustRegression(degrees_of_freedom=4.0)
        >>> X, y, _ = model.simulate(100, 2, seed=0)
        >>> model.problem(X, y)
        Problem(RobustRegression: latent sigma, intercept, beta (feature); observed y (row))
    """

    def __init__(
        self,
        degrees_of_freedom: float | None = None,
        *,
        prior: str = "normal",
        prior_scale: float = 1.0,
        intercept_scale: float = 10.0,
        num_relevant: float | None = None,
        sigma_scale: float = 1.0,
    ) -> None:
        super().__init__(
            StudentT(degrees_of_freedom, sigma_scale),
            prior=prior,
            prior_scale=prior_scale,
            intercept_scale=intercept_scale,
            num_relevant=num_relevant,
        )


def example_simulated() -> Problem:
    """Simulated: 200 rows, four correlated covariates, degrees of freedom unknown."""
    model = RobustRegression()
    X, y, _ = model.simulate(200, 4, seed=0)
    return model.problem(X, y, name="robust_regression_simulated")
