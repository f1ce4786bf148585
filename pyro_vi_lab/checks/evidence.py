"""Bounds on the log evidence from below and from above, from draws of an approximation."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from pyro_vi_lab.checks.log_weights import log_weights
from pyro_vi_lab.checks.pareto import importance
from pyro_vi_lab.checks.weight_moments import log_second_moment, normal_quantile
from pyro_vi_lab.errors import ArgumentError

DEFAULT_PARTICLES = 32
"""Draws of each group of the importance weighted bound, unless there are fewer than 20 such groups."""


@dataclass(frozen=True)
class EvidenceBounds:
    r"""What is known of the log evidence :math:`\log Z = \log p(\text{data})`, in nats.

    Args:
        elbo: Evidence lower bound.
        elbo_se: Its Monte Carlo standard error.
        iwae: Importance weighted bound of ``num_particles`` draws, a lower bound too and never below the ELBO.
        iwae_se: Its standard error.
        num_particles: K.
        psis: Estimate of log Z itself, by Pareto-smoothed weights.
        psis_se: Its standard error; infinite where k-hat is 0.7 or more, from where on it is of no use.
        cubo: χ upper bound of order two.
        cubo_se: Its standard error; infinite where k-hat is 1/4 or more, from where on it has none.
        lower: log Z is above this, with probability ``confidence``.
        upper: log Z is below this; infinite where the weights may have no second moment.
        confidence: Of both limits together.
        khat: Pareto k-hat of the weights.
        support_mismatch: Fraction of the draws at which the model's density is zero; the ELBO is then minus infinity.
    """

    elbo: float
    elbo_se: float
    iwae: float
    iwae_se: float
    num_particles: int
    psis: float
    psis_se: float
    cubo: float
    cubo_se: float
    lower: float
    upper: float
    confidence: float
    khat: float
    support_mismatch: float

    def __repr__(self) -> str:
        return (
            f"EvidenceBounds({self.lower:.2f} to {self.upper:.2f} nats; ELBO {self.elbo:.2f} ± {self.elbo_se:.2g}, "
            f"IWAE({self.num_particles}) {self.iwae:.2f} ± {self.iwae_se:.2g}, PSIS {self.psis:.2f} ± "
            f"{self.psis_se:.2g}, CUBO {self.cubo:.2f} ± {self.cubo_se:.2g})"
        )

    def to_dict(self) -> dict[str, Any]:
        """The numbers by name."""
        return asdict(self)


def evidence(
    log_p: Tensor, log_q: Tensor, *, num_particles: int | None = None, confidence: float = 0.95
) -> EvidenceBounds:
    r"""Lower and upper bounds on the log evidence with their standard errors.

    .. math:: E_q[\log w] \;\le\; E\Big[\log \frac1K \sum_{k=1}^K w_k\Big] \;\le\; \log Z = \log E_q[w]
        \;\le\; \tfrac12 \log E_q[w^2]

    They are the ELBO, the importance weighted bound (IWAE) and CUBO of order two. The draws of each bound are the same:
    for IWAE they are cut into groups of K. CUBO of finitely many draws is below its own value on average; the limit
    ``upper`` makes up for what the tail of the weights may hold.

    Args:
        log_p: Log joint density of the model at draws from q, with all constants.
        log_q: Log density of q at the same draws.
        num_particles: K; by default 32, or fewer for less than 640 draws.
        confidence: Probability with which both limits hold.

    Shape:
        both the same; all values are pooled.

    Raises:
        ArgumentError: Shapes that disagree, or an option out of range.
        DataError: As of :func:`importance`.

    References:
        Burda, Grosse, Salakhutdinov 2016, "Importance weighted autoencoders", ICLR, eq. 8. Dieng, Tran, Ranganath,
        Paisley, Blei 2017, "Variational inference via χ upper bound minimization", NeurIPS, eq. 3. Vehtari, Simpson,
        Gelman, Yao, Gabry 2024, "Pareto smoothed importance sampling", JMLR 25(72).

    Example:
        >>> from torch.distributions import Normal
        >>> z = torch.randn(4000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        >>> found = evidence(Normal(0.3, 1.1).log_prob(z) - 5, Normal(0.0, 1.0).log_prob(z))
        >>> found.lower < -5 < found.upper
        True
    """
    values = log_weights(log_p, log_q).flat
    number = len(values)
    size = min(DEFAULT_PARTICLES, number // 20) if num_particles is None else num_particles
    if isinstance(size, bool) or not isinstance(size, int) or not 1 <= size <= number // 2:
        raise ArgumentError(f"num_particles must be a whole number from 1 to half of the {number} draws, got {size!r}")
    check = importance(log_p, log_q)
    groups = torch.logsumexp(values[: number // size * size].reshape(-1, size), 1) - math.log(size)
    elbo, elbo_se = _mean(values)
    iwae, iwae_se = _mean(groups)
    # three limits share the error probability: two of the lower bounds, one of the upper
    share = 1 - (1 - confidence) / 3
    z = normal_quantile(share)
    second = log_second_moment(values, khat_high=check.khat_interval[1], confidence=share)
    return EvidenceBounds(
        elbo=elbo,
        elbo_se=elbo_se,
        iwae=iwae,
        iwae_se=iwae_se,
        num_particles=size,
        psis=check.log_mean_weight,
        psis_se=math.inf if check.khat >= 0.7 else math.sqrt(max(1 / check.ess - 1 / number, 0.0)),
        cubo=second.value / 2,
        cubo_se=math.inf if check.khat >= 0.25 else second.standard_error / 2,
        lower=max(
            bound - z * error if math.isfinite(bound) else -math.inf
            for bound, error in ((elbo, elbo_se), (iwae, iwae_se))
        ),
        upper=second.upper / 2,
        confidence=confidence,
        khat=check.khat,
        support_mismatch=check.support_mismatch,
    )


def _mean(values: Tensor) -> tuple[float, float]:
    """Mean and standard error; minus infinity and infinity if a value is."""
    if not bool(torch.isfinite(values).all()):
        return -math.inf, math.inf
    return float(values.mean()), float(values.std()) / math.sqrt(len(values))
