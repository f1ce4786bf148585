"""Negative binomial regression: counts that vary more than Poisson's."""

from __future__ import annotations

from pyro_vi_lab.models.count_regression import CountRegression
from pyro_vi_lab.models.outcomes import NegativeBinomial
from pyro_vi_lab.problem import Problem


class NegativeBinomialRegression(CountRegression):
    r"""Counts whose mean μ is log-linear, and whose variance is :math:`\mu + a \mu^2`.

    .. math::
        a \sim \mathrm{HalfNormal}(s_a), \quad
        \alpha \sim \mathrm{Normal}(0, s_0), \quad \beta_i \sim \mathrm{Normal}(0, s)

    .. math::
        \mu_n = e_n \exp(\alpha + x_n \cdot \beta), \quad
        p(y_n) = \frac{\Gamma(y_n + 1/a)}{y_n!\, \Gamma(1/a)}
                 \Big(\frac{1}{1 + a \mu_n}\Big)^{1/a} \Big(\frac{a \mu_n}{1 + a \mu_n}\Big)^{y_n}

    with the exposure e, 1 where none is given. Sites ``dispersion`` (a), ``intercept`` and ``beta``. As a falls to zero
    this becomes :class:`PoissonRegression`.

    Args:
        prior: Prior of the coefficients: ``"normal"`` as above, ``"ridge"``, or ``"horseshoe"``; see
            :class:`pyro_vi_lab.models.priors.CoefficientPrior`.
        prior_scale: s, prior standard deviation of every coefficient.
        intercept_scale: s₀, prior standard deviation of the intercept.
        num_relevant: Number of coefficients expected away from zero; of the horseshoe only.
        dispersion_scale: s_a, scale of the prior of the dispersion.

    Shape:
        X ``(N, D)``, y and exposure ``(N,)``; plates ``feature`` and ``row``.

    Raises:
        ArgumentError: A scale that is not positive.

    References:
        Cameron & Trivedi 2013, "Regression Analysis of Count Data", 2nd edition, Section 3.3 (NB2).

    Example:
        >>> model = NegativeBinomialRegression()
        >>> X, y, _ = model.simulate(100, 2, seed=0)
        >>> model.problem(X, y)
        Problem(NegativeBinomialRegression: latent dispersion, intercept, beta (feature); observed y (row))
    """

    def __init__(
        self,
        *,
        prior: str = "normal",
        prior_scale: float = 1.0,
        intercept_scale: float = 2.5,
        num_relevant: float | None = None,
        dispersion_scale: float = 1.0,
    ) -> None:
        super().__init__(
            NegativeBinomial(dispersion_scale),
            prior=prior,
            prior_scale=prior_scale,
            intercept_scale=intercept_scale,
            num_relevant=num_relevant,
        )


def example_simulated() -> Problem:
    """Simulated: 300 rows, four correlated covariates."""
    model = NegativeBinomialRegression(prior_scale=0.5, intercept_scale=1.0)
    X, y, _ = model.simulate(300, 4, seed=0)
    return model.problem(X, y, name="negative_binomial_regression_simulated")
