"""Priors of the coefficients of a regression."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pyro
import pyro.distributions as dist
from torch import Tensor

from pyro_vi_lab.errors import ArgumentError, unknown_name
from pyro_vi_lab.models.design import positive

PRIORS = ("normal", "ridge", "horseshoe")
"""Names of the priors of coefficients."""
SLAB_DF = 4.0
"""Degrees of freedom of the slab (Piironen & Vehtari 2017, Section 3.4: a Student-t with few)."""


@dataclass(frozen=True)
class CoefficientPrior:
    r"""A prior of D coefficients, all in units u of the model (the noise of a conjugate linear regression, else 1).

    ``"normal"``: one fixed scale.

    .. math:: \beta_i \sim \mathrm{Normal}(0, s u)

    ``"ridge"``: the scale is learned; sites ``beta_scale`` and ``beta_raw``.

    .. math:: \tau \sim \mathrm{HalfNormal}(s), \quad r_i \sim \mathrm{Normal}(0, 1), \quad \beta_i = u \tau r_i

    ``"horseshoe"``: the regularized horseshoe, few coefficients away from zero and those within a slab of scale s;
    sites ``global_scale`` τ, ``slab_variance`` c², ``local_scale`` λ and ``beta_raw``.

    .. math::
        \tau \sim \mathrm{HalfCauchy}(\tau_0), \quad \tau_0 = \frac{p_0}{(D - p_0) \sqrt N}, \quad
        \lambda_i \sim \mathrm{HalfCauchy}(1), \quad c^2 \sim \mathrm{InverseGamma}(2, 2 s^2)

    .. math::
        r_i \sim \mathrm{Normal}(0, 1), \quad
        \beta_i = u \tau \tilde\lambda_i r_i, \quad
        \tilde\lambda_i^2 = \frac{c^2 \lambda_i^2}{c^2 + \tau^2 \lambda_i^2}

    Args:
        kind: A name of ``PRIORS``.
        scale: s.
        num_relevant: p₀, how many coefficients are expected away from zero; of the horseshoe only.

    Raises:
        ArgumentError: An unknown name, a scale that is not positive, or ``num_relevant`` missing or out of place.

    References:
        Piironen & Vehtari 2017, "Sparsity information and regularization in the horseshoe and other shrinkage priors",
        Electronic Journal of Statistics 11(2), equations 2.8 and 3.12.

    Example:
        >>> CoefficientPrior("horseshoe", 2.0, num_relevant=3)
        CoefficientPrior(kind='horseshoe', scale=2.0, num_relevant=3)
    """

    kind: str
    scale: float
    num_relevant: float | None = None

    def __post_init__(self) -> None:
        if self.kind not in PRIORS:
            raise unknown_name("prior", self.kind, PRIORS)
        positive(prior_scale=self.scale)
        if self.kind == "horseshoe":
            if self.num_relevant is None:
                raise ArgumentError(
                    "prior='horseshoe' needs num_relevant, the number of coefficients that are expected away from "
                    "zero; it sets the global scale"
                )
            positive(num_relevant=self.num_relevant)
        elif self.num_relevant is not None:
            raise ArgumentError(f"num_relevant is for prior='horseshoe', not for prior={self.kind!r}: leave it out")

    def sample(
        self, name: str, *, zero: Tensor, unit: Tensor, num_rows: int, num_features: int, event: tuple[int, ...] = ()
    ) -> Tensor:
        """Sample the coefficients under the plate ``feature``.

        Args:
            name: Name of their site; it is deterministic unless the prior is normal.
            zero: A zero of the type and on the device of the data.
            unit: u.
            num_rows: N.
            num_features: D.
            event: Shape of each coefficient, ``()`` or ``(classes,)``.

        Shape:
            result ``(D, *event)``, with the dimensions of vectorized particles left of it.

        Raises:
            ArgumentError: As many relevant coefficients as there are coefficients, or more.
        """

        def beside(value: Tensor) -> Tensor:
            return value.unsqueeze(-1) if event and value.dim() else value

        def each(of: Any) -> Any:
            return of.expand(event).to_event(1) if event else of

        features = pyro.plate("feature", num_features)
        if self.kind == "normal":
            with features:
                return pyro.sample(name, each(dist.Normal(zero, self.scale * unit)))
        standard = each(dist.Normal(zero, zero + 1))
        if self.kind == "ridge":
            size = beside(pyro.sample("beta_scale", dist.HalfNormal(zero + self.scale)))
        else:
            global_scale = self._global_scale(num_rows, num_features * math.prod(event))
            tau = beside(pyro.sample("global_scale", dist.HalfCauchy(zero + global_scale)))
            slab = dist.InverseGamma(zero + SLAB_DF / 2, zero + SLAB_DF / 2 * self.scale**2)
            c2 = beside(pyro.sample("slab_variance", slab))
        with features:
            raw = pyro.sample("beta_raw", standard)
            if self.kind == "horseshoe":
                local = pyro.sample("local_scale", each(dist.HalfCauchy(zero + 1)))
                # tau * local / sqrt(1 + (tau * local)^2 / c^2), without the squares of large numbers
                size = tau * local / (1 + (tau * local).square() / c2).sqrt()
            return pyro.deterministic(name, beside(unit) * size * raw, event_dim=len(event))

    def _global_scale(self, num_rows: int, num_coefficients: int) -> float:
        assert self.num_relevant is not None
        if self.num_relevant >= num_coefficients:
            raise ArgumentError(
                f"num_relevant is {self.num_relevant:g}; it must be below the number of coefficients, "
                f"{num_coefficients}: with fewer irrelevant ones prior='ridge' is the one that fits"
            )
        return self.num_relevant / (num_coefficients - self.num_relevant) / math.sqrt(num_rows)
