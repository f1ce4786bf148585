"""Priors of the weights of any network, and which networks may have such."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from pyro_vi_lab.errors import ArgumentError
from pyro_vi_lab.models.design import positive

PriorScale = float | str | Mapping[str, float]
GAINS = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
"""Layers whose weight multiplies what they have normalized, so that one, not zero, leaves it as it is."""


@dataclass(frozen=True, eq=False)
class WeightPrior:
    """Prior of one tensor of weights: independent normals.

    Args:
        loc: Prior mean of every weight, zero or, of a gain, one.
        scale: Prior standard deviation of every weight.
    """

    loc: float
    scale: float


def weight_priors(
    net: nn.Module, prior_scale: PriorScale, bias_scale: float, gain: float = 1.0
) -> dict[str, WeightPrior]:
    r"""A prior for every parameter of a network, by its name in the ``state_dict``; tied ones are one.

    Args:
        net: The network.
        prior_scale: One standard deviation for all weights; ``"fan_in"`` for :math:`g/\sqrt{\text{fan-in}}`, with which
            the pre-activations of a wide layer have g times the scale of its inputs (Neal 1996, Section 2.1); or a
            standard deviation by layer or parameter, ``{"0": 0.5, "2.weight": 1.0}``, all others by fan-in.
        bias_scale: Standard deviation of what has one dimension, biases and gains, unless ``prior_scale`` names it.
        gain: g.

    Raises:
        ArgumentError: A number that is not positive, or a name that no parameter has.

    Example:
        >>> weight_priors(nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3)), "fan_in", 1.0)["0.weight"]
        WeightPrior(loc=0.0, scale=0.5)
    """
    parameters = dict(net.named_parameters())
    named: Mapping[str, float] = {}
    if isinstance(prior_scale, Mapping):
        named = prior_scale
        for key in named:
            if not any(_belongs(name, key) for name in parameters):
                raise ArgumentError(
                    f"prior_scale names {key!r}, which is no layer and no parameter of the network; its parameters: "
                    f"{', '.join(parameters)}"
                )
        positive(**{f"prior_scale[{key!r}]": value for key, value in named.items()})
    elif isinstance(prior_scale, str):
        if prior_scale != "fan_in":
            raise ArgumentError(
                f"prior_scale must be a number, 'fan_in', or a dict by layer or parameter, got {prior_scale!r}"
            )
    else:
        positive(prior_scale=prior_scale)
    positive(bias_scale=bias_scale, gain=gain)
    gains = {
        f"{path}.weight" if path else "weight" for path, module in net.named_modules() if isinstance(module, GAINS)
    }
    priors = {}
    for name, value in parameters.items():
        scale = bias_scale if value.dim() < 2 else gain * value[0].numel() ** -0.5
        if not isinstance(prior_scale, (str, Mapping)) and value.dim() >= 2:
            scale = prior_scale
        nearest = max((key for key in named if _belongs(name, key)), key=len, default=None)
        priors[name] = WeightPrior(float(name in gains), float(scale if nearest is None else named[nearest]))
    return priors


def check_network(net: object) -> nn.Module:
    """A network whose likelihood is a product over rows, given its weights.

    Raises:
        ArgumentError: It is none, has nothing to learn, or a layer that makes rows depend on one another or adds noise
            of its own; the message names the layer.
    """
    if not isinstance(net, nn.Module):
        raise ArgumentError(f"net must be a torch.nn.Module, got {type(net).__name__}")
    parameters = dict(net.named_parameters())
    if not parameters:
        raise ArgumentError(f"net ({type(net).__name__}) has no parameters, so there is nothing to put a prior on")
    for name, value in parameters.items():
        if isinstance(value, nn.UninitializedParameter):
            raise ArgumentError(f"parameter {name!r} of net has no shape yet: run the lazy network on some rows first")
    for path, module in net.named_modules():
        layer = f"layer {path!r} of net ({type(module).__name__})" if path else f"net ({type(module).__name__})"
        if isinstance(module, _BatchNorm):
            raise ArgumentError(
                f"{layer} normalizes over the rows of a batch, so that the output of a row depends on the other rows: "
                "the likelihood is then no product over rows, and that of a minibatch no estimate of it; use "
                "nn.LayerNorm or nn.GroupNorm"
            )
        if isinstance(module, _DropoutNd) and module.p > 0:
            raise ArgumentError(
                f"{layer} draws noise of its own (p={module.p}); the weights are random here, so leave it out, or set "
                "p=0"
            )
        dropout = getattr(module, "dropout", None)  # of recurrent layers and attention
        if isinstance(dropout, float) and dropout > 0:
            raise ArgumentError(
                f"{layer} draws noise of its own (dropout={dropout}); the weights are random here: set it to 0"
            )
    return net


def _belongs(name: str, key: str) -> bool:
    return name == key or name.startswith(f"{key}.")


def dtype_of(net: nn.Module) -> torch.dtype:
    """The floating-point type of a network.

    Raises:
        ArgumentError: It has several.
    """
    found: dict[torch.dtype, str] = {}
    tensors: dict[str, Tensor] = {**dict(net.named_parameters()), **dict(net.named_buffers())}
    for name, value in tensors.items():
        if value.is_floating_point():
            found.setdefault(value.dtype, name)
    if len(found) > 1:
        kinds = ", ".join(f"{name!r} is {dtype}" for dtype, name in found.items())
        raise ArgumentError(f"the weights of net have different types: {kinds}; give it one, net.float()")
    return next(iter(found))
