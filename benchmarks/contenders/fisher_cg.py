"""The natural step of an encoder by conjugate gradients with exact Fisher-vector products: what was tried and lost."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pyro_vi_lab.guides import Amortized
from pyro_vi_lab.natural_parts import NaturalPart, Settings
from pyro_vi_lab.natural_parts.scores import EncoderScores, jvp

Values = dict[str, Tensor]

NUM_PRODUCTS = 10
"""Conjugate-gradient steps per step, started from 0.9 of the last solution (Martens 2010, Section 4.8)."""
DAMPING = 1.0
"""In mean eigenvalues of the Fisher matrix; 0.1 to 10 gave the same bound within 0.2 nats a row."""


class ConjugateGradientPart(NaturalPart):
    """An encoder whose natural gradient is solved for by Fisher-vector products Jᵀ diag(1/s², 2) J v.

    Args:
        guide: The guide, after its first call.
    """

    def __init__(self, guide: Amortized) -> None:
        self.guide, self.scores = guide, EncoderScores(guide)

    @property
    def tensors(self) -> list[Tensor]:
        """All parameters of the encoder."""
        return list(self.scores.named.values())

    def step(self, settings: Settings, state: dict[str, Any]) -> None:
        """Solve (F + λI) v = g, and step along v."""
        seen, encoder, named = self.guide.seen, self.guide.encoder, self.scores.named
        assert seen is not None
        present = {name: value.detach() for name, value in encoder.named_parameters()}
        gradient = {name: -value.grad for name, value in named.items() if value.grad is not None}
        at = {name: present[name] for name in gradient}

        def outputs(values: Values) -> tuple[Tensor, Tensor]:
            return self.guide.joined(torch.func.functional_call(encoder, {**present, **values}, seen.inputs))

        (loc, scale), pull_back = torch.func.vjp(outputs, at)
        precision = seen.scale / scale.square()
        if "damping" not in state:
            score = pull_back((torch.randn_like(loc) / scale, torch.randn_like(loc) * 2**0.5 / scale))[0]
            number = sum(value.numel() for value in score.values())
            state["damping"] = DAMPING * seen.scale * _inner(score, score) / number

        def product(v: Values) -> Values:
            by_loc, by_scale = jvp(outputs, at, v)[1]
            (found,) = pull_back((by_loc * precision, 2 * by_scale * precision))
            return {name: value + state["damping"] * v[name] for name, value in found.items()}

        v = state["v"] = _solve(product, gradient, {name: 0.9 * value for name, value in state.get("v", {}).items()})
        length = max(self.scores.squared_length(v), torch.finfo(torch.float64).tiny)
        size = min(settings.lr * min(1.0, _inner(v, gradient) / length), (2 * settings.max_kl / length) ** 0.5)
        for name, move in v.items():
            named[name].data.add_(move, alpha=size)


def _inner(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> float:
    return sum(float((one[name] * other[name]).sum()) for name in one)


def _solve(product: Any, wanted: Values, start: Values) -> Values:
    """Conjugate gradients (Hestenes & Stiefel 1952)."""
    x = start or {name: torch.zeros_like(value) for name, value in wanted.items()}
    image = product(x)
    residual = {name: wanted[name] - image[name] for name in wanted}
    direction, length = dict(residual), _inner(residual, residual)
    for _ in range(NUM_PRODUCTS):
        if length == 0:
            break
        image = product(direction)
        step = length / _inner(direction, image)
        x = {name: x[name] + step * direction[name] for name in x}
        residual = {name: residual[name] - step * image[name] for name in x}
        before, length = length, _inner(residual, residual)
        direction = {name: residual[name] + length / before * direction[name] for name in x}
    return x
