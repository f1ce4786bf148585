"""The Wishart distribution of Pyro with a sampler that keeps the good draws."""

from __future__ import annotations

from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_vi_lab.families.exponential.family import bartlett


class Wishart(dist.Wishart):
    """Wishart(ν, V) over precision matrices, drawn by the Bartlett decomposition.

    The sampler of ``torch.distributions`` draws again what is positive definite, and keeps what is singular.
    """

    def rsample(self, sample_shape: Any = (), max_try_correction: Any = None) -> Tensor:
        """Draws, reparameterized."""
        shape = torch.Size(sample_shape) + self.batch_shape
        return bartlett(self.df.expand(shape), self.scale_tril.expand(shape + self.event_shape))
