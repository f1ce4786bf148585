"""A member of a family as a Pyro distribution, and the affine map that it is."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import Transform, constraints

from pyro_vi_lab.families import Family, Params


class FamilyDistribution(TorchDistribution):
    """The distribution of z for one member of a family; every draw is reparameterized.

    Args:
        family: The family.
        params: One member, ``loc (D)``.
        batch_shape: Shape of independent copies.
    """

    arg_constraints: ClassVar[dict[str, Any]] = {}
    support = constraints.real_vector
    has_rsample = True

    def __init__(self, family: Family, params: Params, batch_shape: tuple[int, ...] = ()) -> None:
        self.family, self.params = family, params
        super().__init__(torch.Size(batch_shape), params.loc.shape[-1:], validate_args=False)

    def expand(self, batch_shape: Any, _instance: Any = None) -> FamilyDistribution:
        """Independent copies."""
        return FamilyDistribution(self.family, self.params, tuple(batch_shape))

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        """Reparameterized draws."""
        shape, loc = (*sample_shape, *self.batch_shape), self.params.loc
        eps = self.family.draw((math.prod(shape),), len(loc), generator=None, dtype=loc.dtype, device=loc.device)
        return self.family.sample(self.params, eps).reshape(*shape, len(loc))

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density."""
        flat = self.family.log_prob(self.params, value.reshape(-1, value.shape[-1]))
        return flat.reshape(value.shape[:-1]).expand(torch.broadcast_shapes(value.shape[:-1], self.batch_shape))

    def entropy(self) -> Tensor:
        """Entropy in nats."""
        return self.family.entropy(self.params).expand(self.batch_shape)

    @property
    def mean(self) -> Tensor:
        """The location."""
        return self.params.loc.expand(*self.batch_shape, -1)

    @property
    def variance(self) -> Tensor:
        """Variance of every coordinate."""
        return self.family.variance(self.params).expand(*self.batch_shape, -1)


class FamilyTransform(Transform):
    """z = μ + A·u, with A of the shape of a member of a family: standard normal u give its location and shape."""

    domain = constraints.real_vector
    codomain = constraints.real_vector
    bijective = True

    def __init__(self, family: Family, params: Params) -> None:
        super().__init__()
        self.family, self.params = family, params

    def _call(self, x: Tensor) -> Tensor:
        return self.params.loc + self.family.spread(self.params, x)

    def _inverse(self, y: Tensor) -> Tensor:
        return self.family.unspread(self.params, y - self.params.loc)

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """Log of the determinant of A, ``(...)``."""
        origin = torch.zeros_like(self.params.loc)
        dim = len(origin)
        log_det = -self.family.log_prob(Params(origin, self.params.scale), origin) - 0.5 * dim * math.log(2 * math.pi)
        return log_det.expand(x.shape[:-1])
