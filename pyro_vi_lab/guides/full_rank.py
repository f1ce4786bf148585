"""One multivariate normal or Student-t distribution on the unconstrained scale."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import pyro.distributions as dist
import torch
from pyro.distributions.transforms import LowerCholeskyAffine
from torch import Tensor
from torch.distributions import constraints

from pyro_vi_lab.families import FAMILIES, Dense, LocationScale, MultivariateStudentT
from pyro_vi_lab.guides.family_guide import FamilyGuide
from pyro_vi_lab.guides.initialization import init_to_origin
from pyro_vi_lab.guides.mean_field import check_df


class FullRankNormal(FamilyGuide):
    r"""Full-rank normal guide, :math:`q(z) = N(z \mid \mu, LL^\top)`.

    As Pyro's ``AutoMultivariateNormal``; made for :class:`~pyro_vi_lab.NaturalGradient`, and it takes improper priors.

    Args:
        model: A Pyro model.
        init_loc_fn: Where to start each site; at zero on the unconstrained scale by default.
        init_scale: Standard deviation of every coordinate of z at the start.

    A latent site in a plate of which a call sees some rows only (``subsample_size``, minibatches) is refused: its rows
    depend on all others. Use :class:`~pyro_vi_lab.guides.MeanFieldNormal`.

    References:
        Kucukelbir et al. 2017, "Automatic differentiation variational inference", JMLR 18, Section 2.4.
    """

    family = FAMILIES["full_rank"]
    scale_constraints: ClassVar = {"scale_tril": constraints.lower_cholesky}
    scale_tril: Tensor

    def get_posterior(self, *args: Any, **kwargs: Any) -> Any:
        """The normal distribution over z."""
        return dist.MultivariateNormal(self.loc, scale_tril=self.scale_tril)

    def get_transform(self, *args: Any, **kwargs: Any) -> Any:
        """From standard noise to z."""
        return LowerCholeskyAffine(self.loc, self.scale_tril)


class FullRankStudentT(FamilyGuide):
    r"""Full-rank Student-t guide, :math:`q(z) = t_\nu(z \mid \mu, LL^\top)`, with one heavy tail for all coordinates.

    Its covariance is :math:`LL^\top \nu / (\nu - 2)`.

    Args:
        model: A Pyro model.
        init_loc_fn: Where to start each site; at zero on the unconstrained scale by default.
        init_scale: Standard deviation of every coordinate of z at the start.
        df: Degrees of freedom ν > 2, not fitted.
        create_plates: As in Pyro's guides, plates that guide and model share; not needed in general.

    A latent site in a plate of which a call sees some rows only is refused, as by :class:`FullRankNormal`.

    Raises:
        ArgumentError: ``df`` is not a number above 2.
    """

    scale_constraints: ClassVar = {"scale_tril": constraints.lower_cholesky}
    scale_tril: Tensor

    def __init__(
        self,
        model: Callable[..., Any],
        init_loc_fn: Callable[..., Any] = init_to_origin,
        init_scale: float = 0.1,
        *,
        df: float = 5.0,
        create_plates: Callable[..., Any] | None = None,
    ) -> None:
        super().__init__(model, init_loc_fn, init_scale, create_plates=create_plates)
        self.df = check_df(df)
        self.family = LocationScale(Dense(), MultivariateStudentT(self.df))

    def get_posterior(self, *args: Any, **kwargs: Any) -> Any:
        """The Student-t distribution over z."""
        return dist.MultivariateStudentT(self.df, self.loc, self.scale_tril)

    def get_base_dist(self) -> Any:
        """The distribution of the noise."""
        identity = torch.eye(len(self.loc), dtype=self.loc.dtype, device=self.loc.device)
        return dist.MultivariateStudentT(self.df, torch.zeros_like(self.loc), identity)

    def get_transform(self, *args: Any, **kwargs: Any) -> Any:
        """From standard noise to z."""
        return LowerCholeskyAffine(self.loc, self.scale_tril)
