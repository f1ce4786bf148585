"""One multivariate normal on the unconstrained scale."""

from __future__ import annotations

from typing import Any, ClassVar

import pyro.distributions as dist
from pyro.distributions.transforms import LowerCholeskyAffine
from torch import Tensor
from torch.distributions import constraints

from pyro_vi_lab.families import FAMILIES
from pyro_vi_lab.guides.family_guide import FamilyGuide


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

    family: ClassVar = FAMILIES["full_rank"]
    scale_constraints: ClassVar = {"scale_tril": constraints.lower_cholesky}
    scale_tril: Tensor

    def get_posterior(self, *args: Any, **kwargs: Any) -> Any:
        """The normal distribution over z."""
        return dist.MultivariateNormal(self.loc, scale_tril=self.scale_tril)

    def get_transform(self, *args: Any, **kwargs: Any) -> Any:
        """From standard noise to z."""
        return LowerCholeskyAffine(self.loc, self.scale_tril)
