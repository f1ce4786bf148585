"""A log density in the coordinates in which a fit is a standard normal."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property

import torch
from torch import Tensor

from pyro_vi_lab.capture import Graph, capture
from pyro_vi_lab.density import LogDensity, Tier
from pyro_vi_lab.errors import CompileError
from pyro_vi_lab.families import Family, Params
from pyro_vi_lab.isolation import default_dtype
from pyro_vi_lab.native import NativeFunction, compile_native


class Whitened:
    r"""The density of :math:`u = \sigma^{-1}(z - \mu)`, up to its constant.

    .. math:: \log p(\mu + \sigma u), \qquad \nabla_u = \sigma^\top \nabla_z

    A sampler that starts with the identity as its mass matrix starts here with the fit's covariance.

    Args:
        density: Log density of z.
        family: Family of the fit.
        params: One member of it.

    References:
        Hoffman et al. 2019, "NeuTra-lizing bad geometry in Hamiltonian Monte Carlo using neural transport",
        arXiv:1903.03704, for the affine map of a normal guide.
    """

    def __init__(self, density: LogDensity, family: Family, params: Params) -> None:
        self.density, self.family, self.params = density, family, params
        self.name, self.dim, self.dtype, self.device = density.name, density.dim, density.dtype, density.device

    @property
    def tier(self) -> Tier:
        """As of the density of z."""
        return self.density.tier

    def to_z(self, u: Tensor) -> Tensor:
        """μ + σ·u, ``(..., D)``."""
        return self.params.loc + self.family.spread(self.params, u)

    def value_and_grad(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """Log density and its gradient, ``(..., D)`` to ``(...)`` and ``(..., D)``."""
        value, grad = self.density.value_and_grad(self.to_z(u))
        return value, self.family.spread_transposed(self.params, grad)

    @cached_property
    def bound(self) -> Graph | None:
        """The graph of the gradient at one point; ``None`` in the eager tier."""
        inner = self.density.bound
        if inner is None:
            return None

        def function(u: Tensor) -> tuple[Tensor, ...]:
            value, grad = inner.module(self.to_z(u))
            return value, self.family.spread_transposed(self.params, grad)

        with torch.no_grad():
            return capture(function, (torch.zeros(self.dim, dtype=self.dtype, device=self.device),))

    @cached_property
    def native(self) -> NativeFunction:
        """Value and gradient at one point as machine code.

        Raises:
            CompileError: The density runs in the eager tier, or cannot be compiled.
        """
        if self.bound is None:
            raise CompileError(f"model {self.name} runs in the eager tier: there is no graph to compile")
        return compile_native(self.bound.module, self.bound.example)

    def pointwise(self) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
        """Value and gradient at one point ``(D,)``."""
        if self.bound is None:
            return self.value_and_grad
        run = self.bound.scripted

        def value_and_grad(u: Tensor) -> tuple[Tensor, Tensor]:
            with torch.no_grad(), default_dtype(self.dtype):
                value, grad = run(u)
            return value, grad

        return value_and_grad

    def blame(self, u: Tensor) -> str:
        """Name of the site whose log density is not finite at one point."""
        return self.density.blame(self.to_z(u))
