"""A multivariate normal whose covariance is a diagonal plus a matrix of low rank."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.distributions import constraints

from pyro_vi_lab.errors import ArgumentError
from pyro_vi_lab.families import Family, LowRank, Params
from pyro_vi_lab.guides.family_distribution import FamilyDistribution, FamilyTransform
from pyro_vi_lab.guides.family_guide import FamilyGuide
from pyro_vi_lab.guides.initialization import init_to_origin

MAX_DEFAULT_RANK = 10


class LowRankNormal(FamilyGuide):
    r"""Low-rank normal guide, :math:`q(z) = N(z \mid \mu, \operatorname{diag}(s^2) + UU^\top)`.

    For models with too many latents for :class:`FullRankNormal`: all costs are linear in D.

    Args:
        model: A Pyro model.
        init_loc_fn: Where to start each site; at zero on the unconstrained scale by default.
        init_scale: Standard deviation of every coordinate of z at the start.
        rank: Number of columns of U; √D by default, at most 10, and no more than s and U can be told apart with.
        create_plates: As in Pyro's guides, plates that guide and model share; not needed in general.

    Raises:
        ArgumentError: ``rank`` is not a whole number of at least 1.

    References:
        Ong, Nott & Smith 2018, "Gaussian variational approximation with a factor covariance structure", Journal of
        Computational and Graphical Statistics 27.
    """

    scale_constraints: ClassVar = {"scale": constraints.positive, "cov_factor": constraints.real}
    scale: Tensor
    cov_factor: Tensor

    def __init__(
        self,
        model: Callable[..., Any],
        init_loc_fn: Callable[..., Any] = init_to_origin,
        init_scale: float = 0.1,
        *,
        rank: int | None = None,
        create_plates: Callable[..., Any] | None = None,
    ) -> None:
        if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int) or rank < 1):
            raise ArgumentError(f"rank must be a whole number of at least 1, got {rank!r}")
        super().__init__(model, init_loc_fn, init_scale, create_plates=create_plates)
        self.rank = rank

    def _family(self) -> Family:
        dim = self.latent_dim
        # with more columns, several pairs of s and U are the same covariance (Ledermann 1937)
        identified = int((2 * dim + 1 - (8 * dim + 1) ** 0.5) / 2)
        default = max(1, min(MAX_DEFAULT_RANK, round(dim**0.5), identified))
        return LowRank(min(self.rank or default, dim))

    @staticmethod
    def join_scale(values: Sequence[Tensor]) -> Tensor:
        """The columns s and U, side by side."""
        return torch.cat([values[0].unsqueeze(-1), values[1]], -1)

    @staticmethod
    def split_scale(scale: Tensor) -> list[Tensor]:
        """The columns s and U."""
        return [scale[..., 0], scale[..., 1:]]

    def get_posterior(self, *args: Any, **kwargs: Any) -> FamilyDistribution:
        """The normal distribution over z."""
        return FamilyDistribution(self.family, Params(self.loc, self.join_scale([self.scale, self.cov_factor])))

    def get_transform(self, *args: Any, **kwargs: Any) -> FamilyTransform:
        """From standard normal u to z."""
        return FamilyTransform(self.family, Params(self.loc, self.join_scale([self.scale, self.cov_factor])))
