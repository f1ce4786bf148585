"""Encoders and decoders of autoencoders: dense and convolutional ones, and what any other has to give."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot

from pyro_vi_lab.errors import ArgumentError


class NormalHead(nn.Module):
    """An encoder as location and scale, of whatever form its network gives.

    Args:
        network: Gives a pair of tensors, location and (positive) scale, or one tensor with the location in its first
            half and the logarithm of the scale in its second.

    Shape:
        pair ``(B, L)``; one tensor ``(B, 2 L)``.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Location and scale of every row."""
        result: Any = self.network(x)
        if isinstance(result, Tensor):
            loc, log_scale = result.chunk(2, -1)
            return loc, log_scale.exp()
        loc, scale = result
        return loc, scale


class OneHot(nn.Module):
    """Whole numbers as indicators of their categories, ``(B, ...)`` to ``(B, ..., C)``."""

    def __init__(self, num_categories: int) -> None:
        super().__init__()
        self.num_categories = num_categories
        self.register_buffer("like", torch.zeros(()))  # carries the type and the device

    def forward(self, x: Tensor) -> Tensor:
        """Indicators in the type of the networks."""
        like: Any = self.like
        return one_hot(x.long(), self.num_categories).to(like)


def dense_encoder(
    shape: Sequence[int], num_latents: int, *, hidden: Sequence[int], num_categories: int | None
) -> nn.Module:
    """Layers with rectifiers between them, of the widths ``hidden``, to location and log scale.

    Shape:
        ``(B, *shape)`` to ``(B, 2 L)``.
    """
    width = math.prod(shape) * (num_categories or 1)
    first: list[nn.Module] = [] if num_categories is None else [OneHot(num_categories)]
    return nn.Sequential(*first, nn.Flatten(), *_layers([width, *hidden, 2 * num_latents]))


def dense_decoder(
    shape: Sequence[int], num_latents: int, *, hidden: Sequence[int], num_categories: int | None
) -> nn.Module:
    """Layers with rectifiers between them, of the widths ``hidden`` from the last to the first.

    Shape:
        ``(B, L)`` to ``(B, *shape)``, or ``(B, *shape, C)`` with categories.
    """
    per_row = (*shape, num_categories) if num_categories else tuple(shape)
    layers = _layers([num_latents, *reversed(hidden), math.prod(per_row)])
    return nn.Sequential(*layers, nn.Unflatten(-1, per_row))


def convolutional_encoder(shape: Sequence[int], num_latents: int, *, channels: int) -> nn.Module:
    """Two convolutions with stride 2, the second with twice the channels, and a linear layer.

    Shape:
        ``(B, C, H, W)`` to ``(B, 2 L)``.
    """
    (height, width), wide = _halved(shape), 2 * channels
    return nn.Sequential(
        nn.Conv2d(shape[0], channels, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(channels, wide, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(wide * height[-1] * width[-1], 2 * num_latents),
    )


def convolutional_decoder(shape: Sequence[int], num_latents: int, *, channels: int) -> nn.Module:
    """The layers of :func:`convolutional_encoder` the other way round.

    Shape:
        ``(B, L)`` to ``(B, C, H, W)``.
    """
    (height, width), wide = _halved(shape), 2 * channels

    def doubled(inside: int, outside: int, step: int) -> nn.Module:
        # a size n comes from ceil(n / 2), to which both 2m - 1 and 2m belong
        odd = (1 - height[step] % 2, 1 - width[step] % 2)
        return nn.ConvTranspose2d(inside, outside, 3, stride=2, padding=1, output_padding=odd)

    return nn.Sequential(
        nn.Linear(num_latents, wide * height[-1] * width[-1]),
        nn.ReLU(),
        nn.Unflatten(-1, (wide, height[-1], width[-1])),
        doubled(wide, channels, 1),
        nn.ReLU(),
        doubled(channels, shape[0], 0),
    )


def default_encoder(
    shape: Sequence[int], num_latents: int, *, hidden: Sequence[int], channels: int, num_categories: int | None
) -> nn.Module:
    """Convolutions for images whose numbers are no categories, dense layers for all else."""
    if _has_convolutions(shape) and num_categories is None:
        return convolutional_encoder(shape, num_latents, channels=channels)
    return dense_encoder(shape, num_latents, hidden=hidden, num_categories=num_categories)


def default_decoder(
    shape: Sequence[int], num_latents: int, *, hidden: Sequence[int], channels: int, num_categories: int | None
) -> nn.Module:
    """The decoder that goes with :func:`default_encoder`."""
    if _has_convolutions(shape) and num_categories is None:
        return convolutional_decoder(shape, num_latents, channels=channels)
    return dense_decoder(shape, num_latents, hidden=hidden, num_categories=num_categories)


def _has_convolutions(shape: Sequence[int]) -> bool:
    """Whether rows are images ``(C, H, W)`` of one or three channels whose sides are long enough to be halved twice."""
    return len(shape) == 3 and shape[0] in (1, 3) and min(shape[1:]) >= 5


def place_of(network: Any) -> tuple[torch.dtype, torch.device]:
    """Type and device of a network's parameters; torch's own where there are none."""
    parameters = network.parameters() if isinstance(network, nn.Module) else ()
    first = next((value for value in parameters if value.is_floating_point()), torch.zeros(()))
    return first.dtype, first.device


def checked_encoder(encoder: Any, example: Tensor, num_latents: int) -> None:
    """Raise an ArgumentError unless an encoder gives location and positive scale of ``num_latents`` numbers."""
    result = _tried("encoder", encoder, example)
    given = (result,) if isinstance(result, Tensor) else result
    rows, expected = len(example), f"({len(example)}, {num_latents})"
    form = (
        f"for {rows} rows it must give location and positive scale, each {expected} (num_latents={num_latents}), or "
        f"one tensor ({rows}, {2 * num_latents}) with the location and the logarithm of the scale side by side"
    )
    if not (isinstance(given, (tuple, list)) and all(isinstance(value, Tensor) for value in given)):
        raise ArgumentError(f"encoder gives a {type(result).__name__}; {form}")
    wanted = [(rows, 2 * num_latents)] if isinstance(result, Tensor) else [(rows, num_latents)] * 2
    shapes = [tuple(value.shape) for value in given]
    if shapes != wanted:
        raise ArgumentError(f"encoder gives {' and '.join(map(str, shapes))}; {form}")
    if len(given) == 2 and not bool((given[1] > 0).all()):
        raise ArgumentError(f"encoder gives a scale that is not positive; {form}")


def checked_decoder(decoder: Any, example: Tensor, per_row: Sequence[int], likelihood: str) -> None:
    """Raise an ArgumentError unless a decoder gives as many numbers for a row as the likelihood needs."""
    result = _tried("decoder", decoder, example)
    rows, numbers = len(example), math.prod(per_row)
    if not isinstance(result, Tensor):
        raise ArgumentError(f"decoder gives a {type(result).__name__}; expected one tensor")
    if result.shape[0] != rows or result.numel() != rows * numbers or result.dim() < 2:
        expected = ", ".join(map(str, per_row))
        raise ArgumentError(
            f"decoder gives {tuple(result.shape)} for z of shape {tuple(example.shape)}; expected ({rows}, {expected}) "
            f"or ({rows}, {numbers}): the parameters of likelihood={likelihood!r} for every number of a row"
        )


def _tried(name: str, network: Any, example: Tensor) -> Any:
    """What a network makes of an example, without a trace of it."""
    if not isinstance(network, nn.Module):
        raise ArgumentError(f"{name} must be a torch.nn.Module, got {type(network).__name__}")
    modes = [(module, module.training) for module in network.modules()]
    network.eval()
    try:
        with torch.no_grad():
            return network(example)
    except (RuntimeError, ValueError, IndexError) as error:
        raise ArgumentError(
            f"{name} cannot take a tensor of shape {tuple(example.shape)} ({example.dtype}): {error}"
        ) from error
    finally:
        for module, training in modes:
            module.training = training


def _layers(widths: Sequence[int]) -> list[nn.Module]:
    layers: list[nn.Module] = []
    for inside, outside in pairwise(widths):
        layers += [nn.Linear(inside, outside), nn.ReLU()]
    return layers[:-1]


def _halved(shape: Sequence[int]) -> tuple[list[int], list[int]]:
    """Heights and widths of an image, once and twice halved (rounded up)."""
    sizes: list[list[int]] = []
    for size in shape[1:]:
        half = math.ceil(size / 2)
        sizes.append([size, half, math.ceil(half / 2)])
    return sizes[0], sizes[1]
