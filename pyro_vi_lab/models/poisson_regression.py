"""Poisson regression: counts with an exposure."""

from __future__ import annotations

from pyro_vi_lab.models.count_regression import CountRegression
from pyro_vi_lab.models.outcomes import Poisson
from pyro_vi_lab.problem import Problem


class PoissonRegression(CountRegression):
    r"""Counts whose mean is log-linear, and whose variance is their mean.

    .. math::
        \alpha \sim \mathrm{Normal}(0, s_0), \quad \beta_i \sim \mathrm{Normal}(0, s), \quad
        y_n \sim \mathrm{Poisson}(e_n \exp(\alpha + x_n \cdot \beta))

    with the exposure e, 1 where none is given. Sites ``intercept`` and ``beta``. Where counts vary more than that, see
    :class:`NegativeBinomialRegression`.

    Args:
        prior: Prior of the coefficients: ``"normal"`` as above, ``"ridge"``, or ``"horseshoe"``; see
            :class:`pyro_vi_lab.models.priors.CoefficientPrior`.
        prior_scale: s, prior standard deviation of every coefficient.
        intercept_scale: s₀, prior standard deviation of the intercept.
        num_relevant: Number of coefficients expected away from zero; of the horseshoe only.

    Shape:
        X ``(N, D)``, y and exposure ``(N,)``; plates ``feature`` and ``row``.

    Raises:
        ArgumentError: A scale that is not positive.

    References:
        McCullagh & Nelder 1989, "Generalized Linear Models", 2nd edition, Chapter 6.

    Example:
        >>> model = PoissonRegression()
        >>> X, y, _ = model.simulate(100, 2, seed=0)
        >>> model.problem(X, y)
        Problem(PoissonRegression: latent intercept, beta (feature); observed y (row))
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
            Poisson(),
            prior=prior,
            prior_scale=prior_scale,
            intercept_scale=intercept_scale,
            num_relevant=num_relevant,
        )


def example_simulated() -> Problem:
    """Simulated: 300 rows, four correlated covariates."""
    model = PoissonRegression(prior_scale=0.5, intercept_scale=1.0)
    X, y, _ = model.simulate(300, 4, seed=0)
    return model.problem(X, y, name="poisson_regression_simulated")
