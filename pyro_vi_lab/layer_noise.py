r"""Noise of a layer's pre-activations in place of the noise of its weights, with the same mean of any loss over rows.

A guide draws a weight :math:`w = m + s \varepsilon` that all rows of a batch share, so that the gradients of the rows
vary together. The loss is a sum over rows, whose mean needs the distribution of the weight *of each row* alone. It does
not change if every row x has a weight of its own from the same distribution:

- *local reparameterization* (Kingma, Salimans & Welling 2015, eq. 6): what a linear layer makes of a row is normal,

  .. math:: a_o \sim N\Big(\sum_i x_i m_{oi} + b_o,\ \sum_i x_i^2 s_{oi}^2 + s_{b_o}^2\Big).

- *flipout* (Wen, Vicol, Ba, Tran & Grosse 2018, eq. 4): one draw :math:`\Delta = w - m`, whose signs each row flips by
  random vectors t and r,

  .. math:: a = m x + t \circ \Delta (r \circ x) + b_m + t \circ \Delta_b.

The first holds where a row meets the weight once. In a convolution, or a linear layer along a sequence, the
pre-activations of one row share the weight and are dependent, so there the second is used: the row flips the signs of
one weight, wherever it meets it. A weight that is used in another way keeps its draw, which all rows share.

A guide marks its draws by :func:`mark`; the value is a draw like any other, so whoever does not know the mark is right
too, with more noise. Which row is which is seen by the first dimension of a layer's input.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

Estimator = Literal["weights", "flipout", "local_reparameterization"]
ESTIMATORS: tuple[Estimator, ...] = ("weights", "flipout", "local_reparameterization")
"""From the most noise to the least."""

_MARK = "_pyro_vi_lab_spread"
_CONVOLUTIONS: Mapping[Any, int] = {functional.conv1d: 1, functional.conv2d: 2, functional.conv3d: 3}
_PROPERTIES = ("shape", "dtype", "device", "ndim", "requires_grad", "layout", "is_cuda")
_LOOKS = frozenset(
    [getattr(Tensor, name).__get__ for name in _PROPERTIES]
    + [Tensor.size, Tensor.dim, Tensor.numel, Tensor.is_floating_point]
)
"""What looks at a tensor and not at its values."""


@dataclass(frozen=True, eq=False)
class Spread:
    """The independent normals that a weight was drawn from, and how its noise may be put into a layer."""

    loc: Tensor
    scale: Tensor
    estimator: Estimator


def mark(value: Tensor, spread: Spread) -> None:
    """Say of a draw what it was drawn from."""
    setattr(value, _MARK, spread)


def spread_of(value: Tensor) -> Spread | None:
    """What a draw was drawn from; ``None`` of a value that nobody has marked."""
    return getattr(value, _MARK, None)


def with_layer_noise(run: Callable[[], Any], weights: Mapping[str, Tensor], num_rows: int) -> Any:
    """Run a network, with noise of its layers where its weights are marked.

    A weight that turns out to be used in a way that an estimator does not hold for gets the next simpler one, and the
    network is run again.

    Args:
        run: Runs the network with the weights; every time with the same tensors.
        weights: The weights.
        num_rows: Rows that the network sees, N.
    """
    found = {id(value): spread_of(value) for value in weights.values()}
    spreads = {key: value for key, value in found.items() if value is not None and value.estimator != "weights"}
    values = {id(value): value for value in weights.values()}
    while spreads:
        layers = _Layers(spreads, values, num_rows)
        with layers:
            result = run()
        changes = layers.changes()
        if not changes:
            return result
        for key, estimator in changes.items():
            spreads[key] = replace(spreads[key], estimator=estimator)
        spreads = {key: value for key, value in spreads.items() if value.estimator != "weights"}
    return run()


class _Layers(TorchFunctionMode):
    """Puts noise into linear layers and convolutions, and keeps account of how every weight is used."""

    def __init__(self, spreads: Mapping[int, Spread], values: Mapping[int, Tensor], num_rows: int) -> None:
        super().__init__()
        self.spreads, self.values, self.num_rows = spreads, values, num_rows
        self.uses = dict.fromkeys(spreads, 0)
        self.weakest: dict[int, Estimator] = {}
        self.signs: dict[int, tuple[Tensor, Tensor]] = {}
        self.partner: dict[int, int] = {}

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _LOOKS:
            return func(*args, **kwargs)
        dims = 0 if func is functional.linear else _CONVOLUTIONS.get(func)
        if dims is not None:
            named = dict(zip(("input", "weight", "bias"), args, strict=False))
            named |= {key: value for key, value in kwargs.items() if key in ("input", "weight", "bias")}
            options = {key: value for key, value in kwargs.items() if key not in named}
            x, weight, bias = named["input"], named["weight"], named.get("bias")
            if id(weight) in self.spreads and id(x) not in self.spreads:
                rest = args[3:]
                return self._layer(lambda x, w, b: func(x, w, b, *rest, **options), x, weight, bias, dims)
        for leaf in pytree.tree_leaves((args, kwargs)):
            if id(leaf) in self.spreads:
                self._weaken(id(leaf), "weights")
        return func(*args, **kwargs)

    def changes(self) -> dict[int, Estimator]:
        """Weights whose estimator does not hold for how they were used, with one that does."""
        return self.weakest

    def _weaken(self, key: int, estimator: Estimator) -> None:
        before = self.weakest.get(key, self.spreads[key].estimator)
        if ESTIMATORS.index(estimator) < ESTIMATORS.index(before):
            self.weakest[key] = estimator

    def _layer(self, layer: Callable[..., Tensor], x: Tensor, weight: Tensor, bias: Tensor | None, dims: int) -> Tensor:
        key, spread = id(weight), self.spreads[id(weight)]
        self.uses[key] += 1
        if x.dim() == 0 or x.shape[0] != self.num_rows or (dims and x.dim() != dims + 2):
            self._weaken(key, "weights")
            return layer(x, weight, bias)
        offset = self._bias_of(key, bias)
        if spread.estimator == "local_reparameterization":
            if dims or x.dim() != 2 or self.uses[key] > 1:
                self._weaken(key, "flipout")
                return layer(x, weight, bias)
            variance = layer(x.square(), spread.scale.square(), None if offset is None else offset.scale.square())
            mean = layer(x, spread.loc, bias if offset is None else offset.loc)
            return mean + _root(variance) * torch.randn_like(mean)
        mean = layer(x, spread.loc, bias if offset is None else offset.loc)
        of_inputs, of_outputs = self._signs_of(key, x, mean, dims)
        drawn = None if bias is None or offset is None else self.values[id(bias)] - offset.loc
        return mean + of_outputs * layer(x * of_inputs, weight - spread.loc, drawn)

    def _bias_of(self, key: int, bias: Tensor | None) -> Spread | None:
        """Where the bias was drawn from, if it belongs to this layer alone; its draw is used otherwise."""
        if bias is None or id(bias) not in self.spreads:
            return None
        self.uses[id(bias)] += 1
        if self.uses[id(bias)] > 1 and (
            self.partner[id(bias)] != key or self.spreads[key].estimator == "local_reparameterization"
        ):
            self._weaken(id(bias), "weights")
        self.partner[id(bias)] = key
        return self.spreads[id(bias)]

    def _signs_of(self, key: int, x: Tensor, mean: Tensor, dims: int) -> tuple[Tensor, Tensor]:
        """Signs of every row's inputs and outputs, the same wherever the row meets the weight."""
        if key not in self.signs:
            channels = (1, 1) if dims else (-1, -1)
            sizes = (x.shape[channels[0]], mean.shape[channels[1]])
            ones = [torch.rand(self.num_rows, size, dtype=x.dtype, device=x.device) for size in sizes]
            self.signs[key] = (torch.where(ones[0] < 0.5, -1.0, 1.0), torch.where(ones[1] < 0.5, -1.0, 1.0))

        def along(signs: Tensor, like: Tensor) -> Tensor:
            between = (1,) * (like.dim() - 2)
            signs = signs.to(like.dtype)
            return signs.reshape(*signs.shape, *between) if dims else signs.reshape(len(signs), *between, -1)

        of_inputs, of_outputs = self.signs[key]
        return along(of_inputs, x), along(of_outputs, mean)


def _root(variance: Tensor) -> Tensor:
    """The square root, with a derivative of zero where the variance is zero: there it has no noise to scale."""
    positive = variance > 0
    return torch.where(positive, torch.where(positive, variance, 1.0).sqrt(), 0.0)
