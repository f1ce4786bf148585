"""A mixture of normal distributions on the unconstrained scale."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.distributions import Transform, constraints

from pyro_vi_lab.errors import ArgumentError, ModelError
from pyro_vi_lab.families import FAMILIES, LocationScale, Params
from pyro_vi_lab.families.mixture import Mixture as MixtureFamily
from pyro_vi_lab.guides.family_distribution import FamilyDistribution
from pyro_vi_lab.guides.family_guide import FamilyGuide
from pyro_vi_lab.guides.initialization import init_to_origin

DEFAULT_COMPONENTS = 3
"""Two for the two modes that most posteriors with several have, and one for the skew or the tails of the heavier."""


class Mixture(FamilyGuide):
    r"""Mixture of normals, :math:`q(z) = \sum_c \pi_c\, N(z \mid m_c, L_c L_c^\top)`: for several modes, skew, tails.

    Its parameters are ``loc``, the mean of the mixture, ``logits``, the logarithms of the weights up to a constant,
    ``offsets`` of the components' means from ``loc``, up to a vector that all share, and ``scale_tril``.

    :func:`pyro_vi_lab.fit` looks for modes from several places before it fits the mixture, unless it is given a guide
    that has been run: that is a start of its own. In a plain :class:`pyro.infer.SVI` all components start near
    each other.

    Args:
        model: A Pyro model.
        init_loc_fn: Where to start each site; at zero on the unconstrained scale by default.
        init_scale: Standard deviation of every coordinate of z at the start.
        num_components: Number of components C.
        covariance: Of a component: ``"dense"``, or ``"diagonal"`` with a parameter ``scale`` instead of ``scale_tril``,
            for models with many latents.
        create_plates: As in Pyro's guides, plates that guide and model share; not needed in general.

    Raises:
        ArgumentError: ``num_components`` is not a whole number of at least 1, or ``covariance`` none of the two.

    References:
        Lin, Khan & Schmidt 2019, "Fast and simple natural-gradient variational inference with mixture of
        exponential-family approximations", ICML. Figurnov, Mohamed & Mnih 2018, "Implicit reparameterization
        gradients", NeurIPS.

    Example:
        >>> import math, pyro, pyro.distributions as dist
        >>> import pyro_vi_lab as vl
        >>> def model():
        ...     size = pyro.sample("size", dist.Normal(0.0, 5.0))
        ...     pyro.sample("y", dist.Normal(size.abs(), 0.5), obs=torch.tensor(3.0))
        >>> fit = vl.fit(vl.Problem(model), "mixture", progress=False)
        >>> sorted(round(q.item()) for q in fit.guide.quantiles([0.25, 0.75])["size"])
        [-3, 3]
    """

    scale_constraints: Mapping[str, constraints.Constraint] = {  # type: ignore[misc]
        "logits": constraints.real,
        "offsets": constraints.real,
        "scale_tril": constraints.lower_cholesky,
    }
    logits: Tensor
    offsets: Tensor
    family: MixtureFamily

    def __init__(
        self,
        model: Callable[..., Any],
        init_loc_fn: Callable[..., Any] = init_to_origin,
        init_scale: float = 0.1,
        *,
        num_components: int = DEFAULT_COMPONENTS,
        covariance: Literal["dense", "diagonal"] = "dense",
        create_plates: Callable[..., Any] | None = None,
    ) -> None:
        if isinstance(num_components, bool) or not isinstance(num_components, int) or num_components < 1:
            raise ArgumentError(f"num_components must be a whole number of at least 1, got {num_components!r}")
        if covariance not in ("dense", "diagonal"):
            raise ArgumentError(f"covariance must be 'dense' or 'diagonal', got {covariance!r}")
        super().__init__(model, init_loc_fn, init_scale, create_plates=create_plates)
        # the scales of the families of one normal, so that graphs made for these are found again
        normal = FAMILIES["full_rank" if covariance == "dense" else "mean_field"]
        assert isinstance(normal, LocationScale)
        self.family = MixtureFamily(num_components, normal.scale)
        if covariance == "diagonal":
            self.scale_constraints = {
                "logits": constraints.real,
                "offsets": constraints.real,
                "scale": constraints.positive,
            }

    def _family(self) -> MixtureFamily:
        if self.has_params and len(self.logits) != self.family.num_components:
            raise ModelError(
                f"the state that {type(self).__name__} was loaded from has {len(self.logits)} components, the guide "
                f"{self.family.num_components}: make it with num_components={len(self.logits)}"
            )
        return self.family

    def join_scale(self, values: Sequence[Tensor]) -> Tensor:  # type: ignore[override]
        """The scale as the family has it: a row for each component."""
        logits, offsets, scale = values
        return torch.cat([logits.unsqueeze(-1), offsets, scale.flatten(1)], -1)

    def split_scale(self, scale: Tensor) -> list[Tensor]:  # type: ignore[override]
        """Logits, offsets and scales."""
        columns = scale.shape[-1] - 1
        # D + D² columns, or 2D
        dim = round((columns + 0.25) ** 0.5 - 0.5) if self.family.is_dense else columns // 2
        logits, offsets, rest = scale.split([1, dim, columns - dim], -1)
        return [logits.squeeze(-1), offsets, rest.unflatten(-1, (dim, dim)) if self.family.is_dense else rest]

    def _member(self) -> Params:
        return Params(self.loc, self.join_scale([getattr(self, name) for name in self.scale_constraints]))

    def get_posterior(self, *args: Any, **kwargs: Any) -> FamilyDistribution:
        """The mixture over z."""
        return FamilyDistribution(self.family, self._member())

    def get_transform(self, *args: Any, **kwargs: Any) -> MixtureTransform:
        """From standard normal u to z."""
        return MixtureTransform(self.family, self._member())

    def _loc_scale(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        params = self.params
        return self.family.quantile(params, 0.5), self.family.variance(params).sqrt()


class MixtureTransform(Transform):
    """z from standard normal u by the conditional quantiles of a mixture, coordinate by coordinate.

    References:
        Rosenblatt 1952, "Remarks on a multivariate transformation", Annals of Mathematical Statistics 23.
    """

    domain = constraints.real_vector
    codomain = constraints.real_vector
    bijective = True

    def __init__(self, family: MixtureFamily, params: Params) -> None:
        super().__init__()
        self.family, self.params = family, params

    def _call(self, x: Tensor) -> Tensor:
        return self.family.from_normal(self.params, x)

    def _inverse(self, y: Tensor) -> Tensor:
        return self.family.to_normal(self.params, y)

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """Log density of u less that of z, ``(...)``."""
        dim = x.shape[-1]
        log_normal = -0.5 * (x.square().sum(-1) + dim * math.log(2 * math.pi))
        return log_normal - self.family.log_prob(self.params, y)
