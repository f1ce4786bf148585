r"""The natural step of parameters of networks, with a Kronecker-factored Fisher matrix.

The block of a linear layer, with inputs a and gradients δ of its outputs, is taken as

.. math:: F_l \approx A \otimes G, \qquad A = E[aa^\top], \quad G = \sum \delta\delta^\top,

where δ comes from one pass back of a draw of the score (:mod:`pyro_vi_lab.natural_parts.scores`). All other parameters
have the diagonal of F, from the same pass. The factors are averaged over the steps. What the factors get wrong of the
length of the step is made good by the exact Fisher matrix along it.

References:
    Martens & Grosse 2015, "Optimizing neural networks with Kronecker-factored approximate curvature", ICML, Sections 3,
    6.3 (the damping) and 6.4 (the length). Amari 1998, Neural Computation 10.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pyro_vi_lab.natural_parts.part import NaturalPart, Settings, averaged
from pyro_vi_lab.natural_parts.scores import Scores

DECAY = 0.95
"""Weight of the past in the averages of the factors, as Martens & Grosse 2015, Section 5."""
DAMPING = 0.1
"""Smallest damping, in mean eigenvalues of a block: a batch does not span all directions."""
REFRESHED = 5
"""Steps after which the factors are inverted anew."""


class KroneckerPart(NaturalPart):
    """Parameters of networks that make a guide.

    Args:
        scores: The guide's scores.
    """

    def __init__(self, scores: Scores) -> None:
        self.scores, self.named = scores, scores.named

    @property
    def tensors(self) -> list[Tensor]:
        """All parameters that are trained."""
        return list(self.named.values())

    def step(self, settings: Settings, state: dict[str, Any]) -> None:
        """Average the factors over one more draw, and take the step."""
        factors: dict[str, Tensor] = state.setdefault("factors", {})
        damping = max(settings.damping, self.scores.damping)
        self._observe(factors)
        count = state["count"] = state.get("count", 0) + 1
        if count % REFRESHED == 1:
            state["inverses"] = self._inverses(factors, damping)
        gradients = {
            name: averaged(state, f"momentum.{name}", -value.grad, settings.momentum)
            for name, value in self.named.items()
            if value.grad is not None
        }
        moves = self._solve(factors, state["inverses"], gradients, damping)
        length = max(self.scores.squared_length(moves), torch.finfo(torch.float64).tiny)
        gain = sum(float((moves[name] * gradients[name]).sum()) for name in moves)
        # along the move v: the best step is gᵀv / vᵀFv, and KL ≈ ρ²/2 vᵀFv
        size = min(settings.lr * min(1.0, gain / length), (2 * settings.max_kl / length) ** 0.5)
        for name, move in moves.items():
            self.named[name].data.add_(move, alpha=size)

    def _linear(self) -> dict[str, nn.Linear]:
        """The layers whose blocks are Kronecker products."""
        modules = self.scores.network.named_modules()
        return {name: one for name, one in modules if isinstance(one, nn.Linear) and one.weight.requires_grad}

    def _observe(self, factors: dict[str, Tensor]) -> None:
        """Take a draw of the score into the averages."""
        inputs: dict[str, list[Tensor]] = {}
        outputs: dict[str, list[Tensor]] = {}
        layers, handles = self._linear(), []
        for name, layer in layers.items():

            def note(_: Any, args: Any, output: Tensor, name: str = name) -> None:
                if output.requires_grad:
                    inputs.setdefault(name, []).append(args[0].detach())
                    outputs.setdefault(name, []).append(output)

            handles.append(layer.register_forward_hook(note))
        blocks = {one for name in layers for one in _parameters_of(name)}
        others = {name: value for name, value in self.named.items() if name not in blocks}
        try:
            with torch.enable_grad():
                score = self.scores.draw()
                wanted = [one for values in outputs.values() for one in values]
                found = torch.autograd.grad(score, [*wanted, *others.values()], allow_unused=True)
        finally:
            for handle in handles:
                handle.remove()
        deltas, rest = iter(found[: len(wanted)]), found[len(wanted) :]
        for name, values in outputs.items():
            pairs = [(a, next(deltas)) for a, _ in zip(inputs[name], values, strict=True)]
            used = [(a, delta) for a, delta in pairs if delta is not None]
            if not used:
                continue
            a = torch.cat([a.reshape(-1, a.shape[-1]) for a, _ in used])
            delta = torch.cat([delta.reshape(-1, delta.shape[-1]) for _, delta in used])
            if layers[name].bias is not None:
                a = torch.cat([a, torch.ones_like(a[:, :1])], -1)
            _blend(factors, f"{name}.a", a.mT @ a / len(a))
            _blend(factors, f"{name}.g", delta.mT @ delta * self.scores.scale)
        for name, gradient in zip(others, rest, strict=True):
            if gradient is not None:
                _blend(factors, name, gradient.square() * self.scores.scale)

    def _inverses(self, factors: dict[str, Tensor], damping: float) -> dict[str, tuple[Tensor, Tensor]]:
        """(A + πγI)⁻¹ and (G + γ/π I)⁻¹ of every layer, γ² the damping and π² the ratio of the mean eigenvalues."""
        found = {}
        for name in self._linear():
            if f"{name}.a" not in factors:
                continue
            a, g = factors[f"{name}.a"], factors[f"{name}.g"]
            tiny = torch.finfo(g.dtype).tiny
            mean_a, mean_g = a.diagonal().mean().clamp_min(tiny), g.diagonal().mean().clamp_min(tiny)
            gamma, ratio = (DAMPING * mean_a * mean_g + damping).sqrt(), (mean_a / mean_g).sqrt()
            found[name] = (_inverse(a, gamma * ratio), _inverse(g, gamma / ratio))
        return found

    def _solve(
        self,
        factors: dict[str, Tensor],
        inverses: dict[str, tuple[Tensor, Tensor]],
        gradients: dict[str, Tensor],
        damping: float,
    ) -> dict[str, Tensor]:
        """F⁻¹g; nothing for parameters that no draw has depended on yet."""
        moves = {}
        for name, (inverse_a, inverse_g) in inverses.items():
            weight, bias = (gradients.get(one) for one in _parameters_of(name))
            if weight is None:
                continue
            if bias is None:
                moves[_parameters_of(name)[0]] = inverse_g @ weight @ inverse_a
                continue
            whole = inverse_g @ torch.cat([weight, bias.unsqueeze(-1)], -1) @ inverse_a
            for one, move in zip(_parameters_of(name), (whole[:, :-1], whole[:, -1]), strict=True):
                moves[one] = move
        for name, gradient in gradients.items():
            if name in factors:
                diagonal = factors[name]
                floor = DAMPING * diagonal.mean() + damping
                moves[name] = gradient / (diagonal + floor).clamp_min(torch.finfo(diagonal.dtype).tiny)
        return moves


def _parameters_of(layer: str) -> tuple[str, str]:
    prefix = f"{layer}." if layer else ""
    return f"{prefix}weight", f"{prefix}bias"


def _blend(factors: dict[str, Tensor], name: str, value: Tensor) -> None:
    factors[name] = value if name not in factors else factors[name].lerp(value, 1 - DECAY)


def _inverse(matrix: Tensor, damping: Tensor) -> Tensor:
    identity = torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)
    return torch.cholesky_inverse(torch.linalg.cholesky(matrix + damping * identity))
