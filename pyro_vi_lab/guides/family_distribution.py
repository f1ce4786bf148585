"""A member of a family as a Pyro distribution."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import constraints

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

    def __init__(self, family: Family, params: Params, batch_shape: torch.Size = torch.Size()) -> None:
        self.family, self.params = family, params
        super().__init__(batch_shape, params.loc.shape[-1:], validate_args=False)

    def expand(self, batch_shape: Any, _instance: Any = None) -> FamilyDistribution:
        """Independent copies."""
        return FamilyDistribution(self.family, self.params, torch.Size(batch_shape))

    def rsample(self, sample_shape: Any = torch.Size()) -> Tensor:
        """Reparameterized draws."""
        shape, loc = (*sample_shape, *self.batch_shape), self.params.loc
        eps = self.family.draw((math.prod(shape),), len(loc), generator=None, dtype=loc.dtype, device=loc.device)
        return self.family.sample(self.params, eps).reshape(*shape, len(loc))

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density."""
        flat = self.family.log_prob(self.params, value.reshape(-1, value.shape[-1]))
        return flat.reshape(value.shape[:-1]).expand(torch.broadcast_shapes(value.shape[:-1], self.batch_shape))

    @property
    def mean(self) -> Tensor:
        """The location."""
        return self.params.loc.expand(*self.batch_shape, -1)

    @property
    def variance(self) -> Tensor:
        """Variance of every coordinate."""
        return self.family.variance(self.params).expand(*self.batch_shape, -1)
