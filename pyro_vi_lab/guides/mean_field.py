"""Independent normals on the unconstrained scale."""

from __future__ import annotations

from typing import Any, ClassVar

import pyro.distributions as dist
from pyro.distributions.transforms import AffineTransform
from torch import Tensor
from torch.distributions import constraints

from pyro_vi_lab.families import FAMILIES
from pyro_vi_lab.guides.family_guide import FamilyGuide


class MeanFieldNormal(FamilyGuide):
    r"""Mean-field normal guide, :math:`q(z) = \prod_i N(z_i \mid \mu_i, s_i^2)`.

    As Pyro's ``AutoDiagonalNormal``; made for :class:`~pyro_vi_lab.NaturalGradient`, and it takes improper priors.

    Args:
        model: A Pyro model.
        init_loc_fn: Where to start each site; at zero on the unconstrained scale by default.
        init_scale: Standard deviation of every coordinate of z at the start.

    References:
        Kucukelbir et al. 2017, "Automatic differentiation variational inference", JMLR 18, Section 2.4.
    """

    family: ClassVar = FAMILIES["mean_field"]
    scale_name: ClassVar = "scale"
    scale_constraint: ClassVar = constraints.positive
    scale: Tensor

    def get_posterior(self, *args: Any, **kwargs: Any) -> Any:
        """The normal distribution over z."""
        return dist.Normal(self.loc, self.scale).to_event(1)

    def get_transform(self, *args: Any, **kwargs: Any) -> Any:
        """From standard noise to z."""
        return AffineTransform(self.loc, self.scale, event_dim=1)
