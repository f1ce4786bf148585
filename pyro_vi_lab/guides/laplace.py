"""The Laplace approximation: a normal at the mode, as wide as the curvature there says."""

from __future__ import annotations

from typing import Any

import torch
from pyro import poutine
from pyro.ops.hessian import hessian
from torch import Tensor

from pyro_vi_lab.change_of_variables import ChangeOfVariables
from pyro_vi_lab.errors import FitError, ModelError
from pyro_vi_lab.families import Params
from pyro_vi_lab.guides.full_rank import FullRankNormal
from pyro_vi_lab.guides.point import PointGuide


class LaplaceApproximation(PointGuide):
    r"""Laplace approximation :math:`q(z) = N(z \mid \hat z, (-H)^{-1})` on the unconstrained scale.

    .. math:: \hat z = \arg\max_z\ \log p(y, T(z)) + \log |\det \partial T / \partial z|, \qquad
              H = \nabla^2 \log p(z)\big|_{\hat z}

    As Pyro's ``AutoLaplaceApproximation``: in :class:`pyro.infer.SVI` it is a point that moves to the mode, the
    Jacobian of the change of variables included, and :meth:`laplace_approximation` then makes the normal.
    :func:`pyro_vi_lab.fit` does both.

    Args:
        model: A Pyro model. Discrete sites that the guide is to leave out make its Hessian a random one; fit by name
            to have them summed out.
        init_loc_fn: Where to start each site; at zero on the unconstrained scale by default.
        create_plates: As in Pyro's guides, plates that guide and model share; not needed in general.

    References:
        Tierney & Kadane 1986, "Accurate approximations for posterior moments and marginal densities", JASA 81(393).
    """

    def laplace_approximation(self, *args: Any, **kwargs: Any) -> FullRankNormal:
        """The normal guide at the present point; the same ``*args, **kwargs`` as the model's.

        Raises:
            FitError: The log density is not concave there, so that this is no mode.
        """
        guide_trace = poutine.trace(self).get_trace(*args, **kwargs)
        model = self._model_of("the curvature is that of the model")
        model_trace = poutine.trace(poutine.replay(model, trace=guide_trace)).get_trace(*args, **kwargs)
        loss = guide_trace.log_prob_sum() - model_trace.log_prob_sum()
        precision: Tensor = hessian(loss, self.loc).detach()
        scale = covariance_root(precision)
        if scale is None:
            raise FitError(
                "the log density is not concave at the present point, which is therefore no mode: train the guide on, "
                "or start it elsewhere with init_loc_fn"
            )
        normal = FullRankNormal(model)
        with poutine.block():
            normal._setup_prototype(*args, **kwargs)
        normal.params = Params(self.loc.detach(), scale)
        return normal

    def quantiles(self, quantiles: Any, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Refused: it is a point that has no spread yet.

        Raises:
            ModelError: Always.
        """
        raise ModelError(
            "this LaplaceApproximation is the mode alone; take the quantiles of its normal: "
            "guide.laplace_approximation(*args).quantiles(...)"
        )

    def _log_density(self, change: ChangeOfVariables, name: str) -> Tensor | float:
        return -change.log_dets[name]


def covariance_root(precision: Tensor) -> Tensor | None:
    r"""Lower Cholesky factor of the inverse of a precision; ``None`` if that is not positive definite.

    Shape:
        precision ``(D, D)``, result the same.

    Example:
        >>> covariance_root(torch.tensor([[4.0, 0.0], [0.0, 0.25]]))
        tensor([[0.5000, 0.0000],
                [0.0000, 2.0000]])
    """
    precision = (precision + precision.mT) / 2
    diagonal = precision.diagonal()
    if not bool(torch.isfinite(precision).all() and (diagonal > 0).all()):
        return None
    # to unit diagonal: scales that are far apart are no reason to call it singular
    unit = diagonal.rsqrt()
    # reversed, P = LLᵀ is P = UUᵀ with U upper triangular, and U⁻ᵀ is the factor of the inverse
    flipped = (unit.unsqueeze(-1) * precision * unit).flip(-1, -2)
    lower, info = torch.linalg.cholesky_ex(flipped)
    if int(info) or bool(lower.diagonal().square().min() < 10 * len(lower) * torch.finfo(lower.dtype).eps):
        return None
    identity = torch.eye(len(lower), dtype=lower.dtype, device=lower.device)
    inverse = torch.linalg.solve_triangular(lower.flip(-1, -2), identity, upper=True)
    return unit.unsqueeze(-1) * inverse.mT
