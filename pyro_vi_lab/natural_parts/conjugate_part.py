r"""The natural step of a guide of exponential families.

The natural gradient in η is the gradient with respect to the mean parameters, :math:`F^{-1} \nabla_\eta = \nabla_m`, so

.. math:: \eta \leftarrow \eta + \rho \nabla_m \mathcal L ,

which is :math:`(1 - \rho) \eta + \rho\, E[\eta^*]` where the distribution given all others is of the same family.

References:
    Hoffman, Blei, Wang & Paisley 2013, "Stochastic variational inference", JMLR 14, eq. 22-27. Khan & Lin 2017,
    "Conjugate-computation variational inference", AISTATS, eq. 6.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyro_vi_lab.guides import Conjugate
from pyro_vi_lab.natural_parts.part import NaturalPart, Settings, averaged

BISECTIONS = 40
"""Halvings of the interval in which the length of a step is sought that the trust region cuts off."""


class ConjugatePart(NaturalPart):
    """All factors of a guide.

    Rows of which the last call of the guide saw B of N have gradients that are N/B times too large for a site that
    has a member for each row; these take the step of their own.
    """

    def __init__(self, guide: Conjugate) -> None:
        self.guide = guide
        self.families = {name: factor.family for name, factor in guide.factors.items()}

    @property
    def tensors(self) -> list[Tensor]:
        """The unconstrained parameters of all factors."""
        return [self.guide.leaf(name) for name in self.families]

    def step(self, settings: Settings, state: dict[str, Any]) -> None:
        """Take the natural step, short of the boundary of each family and inside one trust region for all."""
        old: dict[str, Tensor] = {}
        moves: dict[str, Tensor] = {}
        for (name, family), leaf in zip(self.families.items(), self.tensors, strict=True):
            assert leaf.grad is not None
            u = leaf.detach()
            eta = family.constrain(u)
            gradient = family.natural_gradient(u, -leaf.grad) / self.guide.row_scales.get(name, 1.0)
            direction = averaged(state, name, gradient, settings.momentum) / (1 + settings.damping)
            size = family.step_size(eta, direction, lr=settings.lr)
            old[name], moves[name] = eta, size.unsqueeze(-1) * direction
        length = self._length(old, moves, settings.max_kl)
        for (name, family), leaf in zip(self.families.items(), self.tensors, strict=True):
            leaf.copy_(family.unconstrain(old[name] + length * moves[name]))

    def _length(self, old: dict[str, Tensor], moves: dict[str, Tensor], max_kl: float) -> float:
        """The part of a step whose KL(new ‖ old) is at most ``max_kl``: it grows along the way."""
        if self._kl(old, moves, 1.0) <= max_kl:
            return 1.0
        low, high = 0.0, 1.0
        for _ in range(BISECTIONS):
            middle = (low + high) / 2
            low, high = (middle, high) if self._kl(old, moves, middle) <= max_kl else (low, middle)
        return low

    def _kl(self, old: dict[str, Tensor], moves: dict[str, Tensor], length: float) -> float:
        total = 0.0
        for name, family in self.families.items():
            total += float(
                torch.nan_to_num(family.kl(old[name] + length * moves[name], old[name]), nan=torch.inf).sum()
            )
        return total
