"""Normal data with unknown mean and precision: the smallest model whose mean-field posterior is not the exact one."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.nn import PyroModule
from torch import Tensor

from pyro_vi_lab.errors import ArgumentError, DataError
from pyro_vi_lab.isolation import model_run, seeded
from pyro_vi_lab.models.design import numeric, positive
from pyro_vi_lab.posterior import Posterior
from pyro_vi_lab.problem import Problem


@dataclass(frozen=True)
class NormalGammaPosterior:
    r"""The exact posterior of :class:`UnivariateNormal`, and its best approximation with independent sites.

    .. math:: \tau \sim \mathrm{Gamma}(a_N, b_N), \quad \mu \mid \tau \sim \mathrm{Normal}(m_N, (\kappa_N \tau)^{-1/2})

    Args:
        loc: :math:`m_N`.
        relative_precision: :math:`\kappa_N`.
        precision_shape: :math:`a_N`.
        precision_rate: :math:`b_N`.
        log_evidence: log p(x), with all constants.
    """

    loc: float
    relative_precision: float
    precision_shape: float
    precision_rate: float
    log_evidence: float

    def mean_field(self) -> tuple[float, float, float, float]:
        r"""Standard deviation of μ, shape and rate of τ, and the ELBO of the best q(μ) q(τ); its mean of μ is ``loc``.

        The updates of coordinate ascent, :math:`q(\mu) = \mathrm{Normal}(m_N, (\kappa_N E[\tau])^{-1/2})` and
        :math:`q(\tau) = \mathrm{Gamma}(a_N + \tfrac12, b_N + \tfrac12 \kappa_N \mathrm{Var}[\mu])`, have the fixed
        point

        .. math:: a = a_N + \tfrac12, \quad b = b_N \frac{a}{a - \tfrac12} = b_N \frac{a}{a_N} .

        References:
            Bishop 2006, "Pattern Recognition and Machine Learning", Section 10.1.3.
        """
        shape, a_n, b_n = self.precision_shape + 0.5, self.precision_shape, self.precision_rate
        rate = b_n * shape / a_n
        sd = math.sqrt(rate / (shape * self.relative_precision))
        # KL(q || p): E log q(μ) q(τ) - E log p(τ) p(μ | τ)
        mean_log = float(torch.digamma(torch.tensor(shape, dtype=torch.float64))) - math.log(rate)
        entropy = math.log(sd) + 0.5 * (1 + math.log(2 * math.pi))
        entropy += shape - math.log(rate) + math.lgamma(shape) + (1 - shape) * (mean_log + math.log(rate))
        log_p = a_n * math.log(b_n) - math.lgamma(a_n) + (a_n - 1) * mean_log - b_n * shape / rate
        log_p += 0.5 * (math.log(self.relative_precision / (2 * math.pi)) + mean_log)
        log_p -= 0.5 * self.relative_precision * sd**2 * shape / rate
        return sd, shape, rate, self.log_evidence + log_p + entropy


class UnivariateNormal(PyroModule):
    r"""Normal data with unknown mean and precision, and the conjugate normal-gamma prior.

    .. math::
        \tau \sim \mathrm{Gamma}(a, b), \quad \mu \mid \tau \sim \mathrm{Normal}(m, (\kappa \tau)^{-1/2}), \quad
        x_n \sim \mathrm{Normal}(\mu, \tau^{-1/2})

    Sites ``precision`` (τ), ``loc`` (μ) and the deterministic ``sigma``. The prior weighs as much as κ rows at m do.

    Args:
        prior_loc: m.
        relative_precision: κ, in rows.
        precision_shape: a.
        precision_rate: b, in squared units of x.

    Shape:
        x ``(N,)``; plate ``row``.

    Raises:
        ArgumentError: A parameter that is not finite, or one but m that is not positive.

    References:
        Bishop 2006, "Pattern Recognition and Machine Learning", Section 2.3.6. Murphy 2007, "Conjugate Bayesian
        analysis of the Gaussian distribution", Section 3.

    Example:
        >>> model = UnivariateNormal()
        >>> exact = model.exact([1.0, 2.0, 3.0])
        >>> exact.loc, exact.relative_precision, exact.precision_shape, exact.precision_rate
        (1.5, 4.0, 2.5, 3.5)
    """

    def __init__(
        self,
        *,
        prior_loc: float = 0.0,
        relative_precision: float = 1.0,
        precision_shape: float = 1.0,
        precision_rate: float = 1.0,
    ) -> None:
        super().__init__()
        if not math.isfinite(prior_loc):
            raise ArgumentError(f"prior_loc must be a finite number, got {prior_loc!r}")
        positive(relative_precision=relative_precision, precision_shape=precision_shape, precision_rate=precision_rate)
        self.prior_loc = prior_loc
        self.relative_precision = relative_precision
        self.precision_shape = precision_shape
        self.precision_rate = precision_rate

    def forward(self, x: Tensor) -> Tensor:
        """Run the model on as many rows as ``x`` has; returns the mean."""
        if x.dim() != 1 or len(x) == 0:
            raise DataError(f"x has shape {tuple(x.shape)}; expected (rows,), at least one row")
        zero = x.new_zeros(())
        precision = pyro.sample("precision", dist.Gamma(zero + self.precision_shape, self.precision_rate))
        sigma = pyro.deterministic("sigma", precision.rsqrt())
        loc: Tensor = pyro.sample("loc", dist.Normal(zero + self.prior_loc, sigma * self.relative_precision**-0.5))
        with pyro.plate("row", len(x)):
            pyro.sample("x", dist.Normal(loc, sigma), obs=x)
        return loc

    def problem(self, x: Any, *, name: str | None = None) -> Problem:
        """The model with checked data.

        Raises:
            DataError: No rows, several columns, or a value that is missing, infinite or no number; it names the row.
        """
        return Problem(self, _column(x), name=name)

    def exact(self, x: Any) -> NormalGammaPosterior:
        r"""The posterior in closed form.

        With N rows of mean :math:`\bar x`,

        .. math::
            \kappa_N = \kappa + N, \quad m_N = \frac{\kappa m + N \bar x}{\kappa_N}, \quad a_N = a + \tfrac N2, \quad
            b_N = b + \tfrac12 \sum_n (x_n - \bar x)^2 + \frac{\kappa N (\bar x - m)^2}{2 \kappa_N}

        .. math::
            \log p(x) = \log\Gamma(a_N) - \log\Gamma(a) + a \log b - a_N \log b_N
                        + \tfrac12 \log\frac{\kappa}{\kappa_N} - \tfrac N2 \log 2\pi

        Raises:
            DataError: As in :meth:`problem`.
        """
        values = _column(x)
        number, kappa, a, b = len(values), self.relative_precision, self.precision_shape, self.precision_rate
        mean = float(values.mean())
        kappa_n, a_n = kappa + number, a + number / 2
        # the difference to the prior mean is what is small where both are far from zero
        shift = mean - self.prior_loc
        b_n = b + 0.5 * float((values - mean).square().sum()) + 0.5 * kappa * number / kappa_n * shift**2
        log_evidence = (
            math.lgamma(a_n)
            - math.lgamma(a)
            + a * math.log(b)
            - a_n * math.log(b_n)
            + 0.5 * math.log(kappa / kappa_n)
            - number / 2 * math.log(2 * math.pi)
        )
        return NormalGammaPosterior(self.prior_loc + number / kappa_n * shift, kappa_n, a_n, b_n, log_evidence)

    def exact_posterior(self, x: Any, *, num_chains: int = 1, num_draws: int = 1000, seed: int = 0) -> Posterior:
        """Independent draws from the exact posterior.

        Args:
            x: Data.
            num_chains: C.
            num_draws: S, per chain.
            seed: Seed of the draws.

        Raises:
            DataError: As in :meth:`problem`.
            ArgumentError: No chains or no draws.
        """
        if num_chains < 1 or num_draws < 1:
            raise ArgumentError(f"num_chains and num_draws must be at least 1, got {num_chains} and {num_draws}")
        exact = self.exact(x)
        with seeded(seed):
            noise = torch.randn(num_chains, num_draws, dtype=torch.float64)
            shape = torch.full((num_chains, num_draws), exact.precision_shape, dtype=torch.float64)
            precision = torch.distributions.Gamma(shape, exact.precision_rate).sample()
        sigma = precision.rsqrt()
        draws = {
            "precision": precision,
            "sigma": sigma,
            "loc": exact.loc + noise * sigma * exact.relative_precision**-0.5,
        }
        return Posterior(draws, method="exact", info={"seed": seed, "log_evidence": exact.log_evidence})

    def simulate(self, num_rows: int, *, seed: int = 0) -> tuple[Tensor, dict[str, Tensor]]:
        """Data ``(N,)``, and the values of the other sites that made them, drawn from the prior.

        Raises:
            ArgumentError: No rows.
        """
        if num_rows < 1:
            raise ArgumentError(f"num_rows must be at least 1, got {num_rows}")
        with model_run(seed=seed, dtype=torch.float64, validate=True), torch.no_grad():
            nodes: Any = poutine.trace(poutine.uncondition(self)).get_trace(torch.zeros(num_rows)).nodes
        return nodes["x"]["value"], {key: nodes[key]["value"] for key in ("precision", "sigma", "loc")}


def example() -> Problem:
    """Simulated: 50 rows."""
    model = UnivariateNormal()
    x, _ = model.simulate(50, seed=0)
    return model.problem(x, name="univariate_normal")


def _column(x: Any) -> Tensor:
    values = numeric("x", x)
    if values.dim() == 2 and values.shape[1] == 1:
        values = values[:, 0]
    if values.dim() != 1 or len(values) == 0:
        raise DataError(f"x has shape {tuple(values.shape)}; expected (rows,), at least one row")
    bad = ~torch.isfinite(values)
    if bool(bad.any()):
        row = int(bad.nonzero()[0])
        raise DataError(
            f"x has {int(bad.sum())} missing or infinite value(s), the first ({float(values[row])}) in row {row}; "
            "remove such rows"
        )
    return values
