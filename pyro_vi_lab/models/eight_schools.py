"""Effects of coaching in eight schools: the smallest hierarchical model, in its two forms."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule
from torch import Tensor

from pyro_vi_lab.errors import DataError
from pyro_vi_lab.problem import Problem

EFFECTS = (28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0)
"""Estimated effect of coaching on the test score, by school (Rubin 1981, Table 1)."""
STANDARD_ERRORS = (15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0)
"""Standard errors of the estimates."""
SCHOOLS = ("A", "B", "C", "D", "E", "F", "G", "H")


class EightSchools(PyroModule):
    r"""Effects of the same treatment in several places, partially pooled.

    .. math::
        \mu \sim \mathrm{Normal}(0, 5), \quad \tau \sim \mathrm{HalfCauchy}(5), \quad
        \theta_j \sim \mathrm{Normal}(\mu, \tau), \quad y_j \sim \mathrm{Normal}(\theta_j, \sigma_j)

    Centered, θ is sampled as it stands; the posterior is a funnel, which no Gaussian fits. Non-centered,
    ``theta_trans`` is Normal(0, 1) and :math:`\theta_j = \mu + \tau \cdot \mathrm{theta\_trans}_j` is a
    deterministic site.

    Args:
        centered: Which of the two forms of the same model.

    Shape:
        sigma and y ``(J,)``, J schools; plate ``school``.

    References:
        Rubin 1981, "Estimation in parallel randomized experiments", Journal of Educational Statistics 6(4).
        Gelman, Carlin, Stern, Dunson, Vehtari, Rubin 2013, "Bayesian Data Analysis", 3rd edition, Section
        5.5; the priors are those of posteriordb.
    """

    def __init__(self, *, centered: bool) -> None:
        super().__init__()
        self.centered = centered

    def forward(self, sigma: Tensor, y: Tensor | None = None) -> Tensor:
        """Run the model for standard errors ``sigma`` and effects ``y``; returns θ."""
        if sigma.dim() != 1 or (y is not None and y.shape != sigma.shape):
            shape = None if y is None else tuple(y.shape)
            raise DataError(f"sigma has shape {tuple(sigma.shape)} and y {shape}; both need one value per school")
        mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
        tau = pyro.sample("tau", dist.HalfCauchy(5.0))
        with pyro.plate("school", len(sigma)):
            if self.centered:
                theta = pyro.sample("theta", dist.Normal(mu, tau))
            else:
                theta_trans = pyro.sample("theta_trans", dist.Normal(0.0, 1.0))
                theta = pyro.deterministic("theta", mu + tau * theta_trans)
            pyro.sample("y", dist.Normal(theta, sigma), obs=y)
        return theta


def example() -> Problem:
    """The eight schools, non-centered."""
    return _problem(centered=False, name="eight_schools")


def example_centered() -> Problem:
    """The eight schools, centered."""
    return _problem(centered=True, name="eight_schools_centered")


def _problem(*, centered: bool, name: str) -> Problem:
    sigma, y = torch.tensor(STANDARD_ERRORS, dtype=torch.float64), torch.tensor(EFFECTS, dtype=torch.float64)
    return Problem(EightSchools(centered=centered), sigma, y, coords={"school": SCHOOLS}, name=name)
