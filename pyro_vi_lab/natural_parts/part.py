"""What a part of a guide is whose parameters take one joint natural step."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Settings(NamedTuple):
    """How far a part may step.

    Args:
        lr: Step size ρ.
        max_kl: Largest KL divergence between successive guides, in nats.
        momentum: Weight β of the past in the average of natural gradients, in [0, 1).
        damping: λ, by which the metric is enlarged.
        curvature_momentum: Weight β₂ of the past in the average of curvatures, of the online Newton form alone.
    """

    lr: float
    max_kl: float
    momentum: float = 0.0
    damping: float = 0.0
    curvature_momentum: float | None = None


class NaturalPart(ABC):
    """Parameters of a guide that take one joint natural step, from the gradients that a loss left in them."""

    @property
    @abstractmethod
    def tensors(self) -> list[Tensor]:
        """The unconstrained leaf tensors that it moves."""

    @abstractmethod
    def step(self, settings: Settings, state: dict[str, Any]) -> None:
        """Move the parameters.

        Args:
            settings: How far.
            state: What the part keeps from step to step, tensors and numbers by name; empty at first.
        """

    def direction_is_finite(self) -> bool:
        """Whether every parameter has a finite gradient."""
        return all(tensor.grad is not None and bool(torch.isfinite(tensor.grad).all()) for tensor in self.tensors)


def averaged(state: dict[str, Any], name: str, value: Tensor, momentum: float) -> Tensor:
    """The exponential average of a tensor over the steps so far, its start corrected for (Kingma & Ba 2015, eq. 3)."""
    if momentum == 0.0:
        return value
    weight = state.get(f"{name}_weight", 0.0)
    old = state.get(name)
    new = value * (1 - momentum) if old is None else old * momentum + value * (1 - momentum)
    state[name], state[f"{name}_weight"] = new, momentum * weight + 1 - momentum
    return new / state[f"{name}_weight"]
