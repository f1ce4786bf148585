"""Draws of the score of a guide that is made by networks, and exact lengths in its Fisher metric."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pyro_vi_lab.guides import Amortized, Flow


class Scores(ABC):
    """The Fisher matrix of a guide with respect to parameters of networks, as seen by its scores."""

    network: nn.Module
    """The module that holds the parameters."""
    scale: float
    """What the sum of outer products of the draws' scores is multiplied by."""
    damping: float = 0.0
    """Least damping: what one draw tells of the Fisher matrix may be little."""

    @abstractmethod
    def draw(self) -> Tensor:
        r"""A number whose gradient by the parameters is a sum of independent draws of the score.

        The expectation of :attr:`scale` times the sum of their outer products is the Fisher matrix.
        """

    @abstractmethod
    def squared_length(self, moves: Mapping[str, Tensor]) -> float:
        """VᵀFv of a change of the parameters, by name, for the rows or draws of the last :meth:`draw`."""

    @property
    def named(self) -> dict[str, Tensor]:
        """The parameters that are trained."""
        return {name: value for name, value in self.network.named_parameters() if value.requires_grad}


class EncoderScores(Scores):
    r"""Those of an amortized guide, :math:`F = \sum_n J_n^\top \operatorname{diag}(1/s_n^2, 2)\, J_n`.

    :math:`J_n` is the Jacobian of :math:`(\mu_n, \log s_n)`, and the sum goes over the rows of the last call.

    Args:
        guide: The guide, after its first call.
    """

    def __init__(self, guide: Amortized) -> None:
        self.guide, self.network = guide, guide.encoder

    @property
    def scale(self) -> float:  # type: ignore[override]
        """N/B in a minibatch."""
        assert self.guide.seen is not None
        return self.guide.seen.scale

    def draw(self) -> Tensor:
        """From outputs' gradients that are drawn from N(0, diag(1/s², 2))."""
        assert self.guide.seen is not None
        loc, scale = self.guide.joined(self.guide.encoder(*self.guide.seen.inputs))
        by_loc, by_log_scale = torch.randn_like(loc) / scale.detach(), torch.randn_like(loc) * 2**0.5
        return (loc * by_loc).sum() + (scale.log() * by_log_scale).sum()

    def squared_length(self, moves: Mapping[str, Tensor]) -> float:
        """Exact for the rows of the last call."""
        seen, encoder = self.guide.seen, self.guide.encoder
        assert seen is not None
        present = {name: value.detach() for name, value in encoder.named_parameters()}

        def outputs(values: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
            return self.guide.joined(torch.func.functional_call(encoder, {**present, **values}, seen.inputs))

        at = {name: present[name] for name in moves}
        (_, scale), (loc_change, scale_change) = jvp(outputs, at, moves)
        return seen.scale * float(((loc_change.square() + 2 * scale_change.square()) / scale.square()).sum())


class FlowScores(Scores):
    r"""Those of a flow, :math:`F = E_q[\nabla_\phi \log q\, \nabla_\phi \log q^\top]`, from fresh draws.

    Args:
        guide: The guide, after its first call.
        num_draws: Draws of z.
    """

    damping = 0.1  # parameters are of order one, as the flow starts in whitened coordinates

    def __init__(self, guide: Flow, num_draws: int = 64) -> None:
        self.guide, self.network, self.num_draws = guide, _LogDensity(guide), num_draws
        self.scale = 1 / num_draws
        self.z = torch.empty(0)

    def draw(self) -> Tensor:
        """Log densities of draws."""
        with torch.no_grad():
            self.z = self.guide.get_posterior().rsample((self.num_draws,))
        total: Tensor = self.network(self.z).sum()
        return total

    def squared_length(self, moves: Mapping[str, Tensor]) -> float:
        """The mean square of vᵀ∇ log q over the draws."""
        present = {name: value.detach() for name, value in self.network.named_parameters()}

        def log_q(values: dict[str, Tensor]) -> Tensor:
            value: Tensor = torch.func.functional_call(self.network, {**present, **values}, (self.z,))
            return value

        at = {name: present[name] for name in moves}
        change = jvp(log_q, at, moves)[1]
        return float(change.square().mean())


def jvp(function: Callable[..., Any], at: dict[str, Tensor], moves: Mapping[str, Tensor]) -> tuple[Any, Any]:
    """Value and directional derivative."""
    with warnings.catch_warnings():
        # torch's own decompositions for forward derivatives, when they are first loaded
        warnings.filterwarnings("ignore", category=DeprecationWarning, message=".*torch.jit.script")
        value, change = torch.func.jvp(function, (at,), (dict(moves),))[:2]
    return value, change


class _LogDensity(nn.Module):
    """The log density of a guide at given z."""

    def __init__(self, guide: Flow) -> None:
        super().__init__()
        self.guide: Flow = guide

    def forward(self, z: Tensor) -> Tensor:
        return self.guide.get_posterior().log_prob(z)
