"""Standard noises ε: mean zero, independent coordinates."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor


class Noise(ABC):
    """A standard distribution of one coordinate of ε; coordinates are independent."""

    @abstractmethod
    def sample(self, shape: tuple[int, ...], *, generator: torch.Generator, dtype: torch.dtype) -> Tensor:
        """Independent draws of the given shape."""

    @abstractmethod
    def log_prob(self, eps: Tensor) -> Tensor:
        """Log density, summed over the last axis: ``(..., D)`` to ``(...)``."""

    @abstractmethod
    def entropy(self, dim: int) -> float:
        """Entropy of ``dim`` coordinates, in nats."""


class Normal(Noise):
    r"""Standard normal noise, :math:`\varepsilon \sim N(0, I)`.

    Example:
        >>> Normal().log_prob(torch.zeros(2, dtype=torch.float64)).item() == -math.log(2 * math.pi)
        True
    """

    def sample(self, shape: tuple[int, ...], *, generator: torch.Generator, dtype: torch.dtype) -> Tensor:
        """Independent standard normal draws of the given shape."""
        return torch.randn(shape, generator=generator, dtype=dtype, device=generator.device)

    def log_prob(self, eps: Tensor) -> Tensor:
        """Log density, summed over the last axis."""
        return -0.5 * (eps.square().sum(-1) + eps.shape[-1] * math.log(2 * math.pi))

    def entropy(self, dim: int) -> float:
        r""":math:`\tfrac{D}{2} \log 2\pi e`."""
        return 0.5 * dim * math.log(2 * math.pi * math.e)
