r"""The variational online Newton step of independent normals: a natural gradient for minibatches and many weights.

For :math:`q(z) = \prod_i N(z_i \mid m_i, \sigma_i^2)` the gradient of the ELBO with respect to the scale holds the mean
curvature of the model, :math:`\partial \mathcal L / \partial \sigma = 1/\sigma - \sigma E[h]` with
:math:`h = -\partial^2 \log p / \partial z^2`, whichever estimator it comes from. A natural step of size w in the
precision :math:`P = \sigma^{-2}` is then an exponential average of curvatures,

.. math::
    \hat h = \frac{1/\sigma - \hat g_\sigma}{\sigma}, \qquad
    P \leftarrow (1 - w) P + w \hat h + \tfrac12 w^2 \frac{(\hat h - P)^2}{P}
      = P \, (1 + x + \tfrac12 x^2), \quad x = -w \sigma \hat g_\sigma,

whose last term keeps P positive for any :math:`\hat h`. The step of the mean is Newton's, with an average of gradients,

.. math:: \bar g \leftarrow \beta \bar g + (1 - \beta) \hat g_m, \qquad m \leftarrow m + \rho \, \bar g / P.

Where the mean is :math:`u = |\sigma \bar g| > 1` standard deviations from its optimum, the noise of
:math:`\hat h / P` has a variance of u² in addition, and w is divided by it. That u is of the steps before, so that it
is independent of the noise.

The average of curvatures is the precision of the guide itself; the state has the average of gradients and the number
of steps.

References:
    Khan, Nielsen, Tangkaratt, Lin, Gal & Srivastava 2018, "Fast and scalable Bayesian deep learning by
    weight-perturbation in Adam", ICML (variational online Newton). Lin, Schmidt & Khan 2020, "Handling the
    positive-definite constraint in the Bayesian learning rule", ICML (the term that keeps P positive). Shen et
    al. 2024, "Variational learning is effective for large deep networks", ICML, algorithm 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pyro_vi_lab.natural_parts.member import Member
from pyro_vi_lab.natural_parts.part import NaturalPart, Settings

DECAY, SLOW_START = 4.0, 40.0
"""The first weights of a new curvature are 4 / (t + 40), until 1 - β₂ is larger: a polynomial-decay average (Shamir &
Zhang 2013, "Stochastic gradient descent for non-smooth optimization", ICML), which forgets the initial scale as t⁻⁴."""
MAX_SHIFT = 2.0
"""Largest component of an average gradient in whitened coordinates, where 1 points to a mean one standard deviation
away. That it is more is little else than a sign that the precision is not yet the curvature."""
MAX_STRETCH = 1.0
"""Largest x: a step makes a precision at most 2.5 times larger, and leaves at least half of it."""


class OnlineNewtonPart(NaturalPart):
    """Means and standard deviations of independent normals, each coordinate with a trust region of its own.

    Args:
        members: Of a diagonal normal guide, or of its sites.
    """

    def __init__(self, members: Sequence[Member]) -> None:
        self.members = members

    @property
    def tensors(self) -> list[Tensor]:
        """All of their parameters."""
        return [tensor for member in self.members for tensor in member.tensors]

    def step(self, settings: Settings, state: dict[str, Any]) -> None:
        """Take the step; every coordinate moves by a KL divergence of at most about ``max_kl``."""
        assert settings.curvature_momentum is not None
        beta, old = settings.momentum, state.get("gradient_weight", 0.0)
        state["steps"] = state.get("steps", 0) + 1
        state["gradient_weight"] = new = beta * old + 1 - beta
        gradients = state.setdefault("gradients", [_loss_grad(member).clone().mul_(new) for member in self.members])
        # the metric is enlarged by the factor 1 + λ: the same as steps that are shorter by it
        shrunk = 1 / (1 + settings.damping)
        weight = shrunk * max(1 - settings.curvature_momentum, DECAY / (state["steps"] + SLOW_START))
        lr, farthest = shrunk * settings.lr, (2 * settings.max_kl) ** 0.5
        for member, average in zip(self.members, gradients, strict=True):
            (leaf,) = member.scales
            scale = leaf.value()
            distance = torch.mul(average, scale).div_(old or new)
            x = leaf.log_grad(scale).mul_(-weight).div_(distance.square_().clamp_(1, torch.finfo(scale.dtype).max))
            limit = min(MAX_STRETCH, farthest)
            leaf.write(_stretched(scale, x.clamp_(-limit, limit)))
            if old:
                average.lerp_(_loss_grad(member), 1 - beta)
            limit = min(MAX_SHIFT, farthest / lr)
            shift = torch.mul(average, scale, out=distance).div_(new).clamp_(-limit, limit)
            member.loc.tensor.addcmul_(shift, scale, value=-lr)


def _loss_grad(member: Member) -> Tensor:
    gradient = member.loc.tensor.grad
    assert gradient is not None
    return gradient


def _stretched(scale: Tensor, x: Tensor) -> Tensor:
    """Standard deviations whose precision is (1 + x + x²/2) times that of ``scale``, in its place."""
    smallest = torch.finfo(scale.dtype).tiny ** 0.5  # of which the square, and its inverse, are numbers
    ratio = torch.mul(x, 0.5).add_(1).mul_(x).add_(1)
    return scale.mul_(ratio.rsqrt_()).clamp_(smallest, 1 / smallest)
