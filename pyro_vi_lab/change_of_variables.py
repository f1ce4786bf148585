"""Between a site's support and the real numbers, with the support that the site has in the very run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from pyro.poutine.messenger import Messenger
from pyro.poutine.subsample_messenger import _Subsample
from torch import Tensor
from torch.distributions import biject_to, constraints

from pyro_vi_lab.errors import ModelError
from pyro_vi_lab.positive_definite import ToPositiveDefinite


class FromUnconstrained(Messenger):
    """Gives every continuous latent site ``biject_to(support)(u)`` for a ``u`` chosen by site name and shape."""

    def __init__(self, choose: Callable[[str, torch.Size], Tensor]) -> None:
        super().__init__()
        self.choose = choose

    def _pyro_sample(self, msg: Any) -> None:
        if msg["is_observed"] or isinstance(msg["fn"], _Subsample) or is_discrete(msg["name"], msg["fn"]):
            return
        transform = bijection(msg["name"], msg["fn"])
        msg["value"] = transform(self.choose(msg["name"], transform.inverse_shape(msg["fn"].shape())))
        msg["done"] = True


class ChangeOfVariables(Messenger):
    """Maps latent sites from the unconstrained scale with ``biject_to`` of the support that each has in this very run.

    Args:
        unconstrained: Value of each latent site on the unconstrained scale.

    Attributes:
        values: The sites' values.
        log_dets: Log determinants of the map, in the batch shape that the transform gives.
    """

    def __init__(self, unconstrained: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.unconstrained = unconstrained
        self.values: dict[str, Tensor] = {}
        self.log_dets: dict[str, Tensor] = {}
        self.supports: dict[str, constraints.Constraint] = {}

    def _pyro_sample(self, msg: Any) -> None:
        name = msg["name"]
        if name not in self.unconstrained or msg["is_observed"]:
            return
        msg["value"] = self.visit(name, msg["fn"])
        msg["done"] = True

    def visit(self, name: str, fn: Any) -> Tensor:
        """The value of one site whose distribution is ``fn``."""
        transform = bijection(name, fn)
        u = self.unconstrained[name]
        value: Tensor = transform(u)
        self.values[name] = value
        self.log_dets[name] = transform.log_abs_det_jacobian(u, value)
        self.supports[name] = fn.support
        return value


def same_support(one: Any, other: Any) -> bool:
    """Whether two constraints are the same, bounds included."""
    if type(one) is not type(other):
        return False
    if isinstance(one, Tensor):
        return one.shape == other.shape and bool((one == other).all())
    if not isinstance(one, constraints.Constraint):
        return bool(one == other)
    first, second = vars(one), vars(other)
    return first.keys() == second.keys() and all(same_support(first[key], second[key]) for key in first)


def bijection(name: str, fn: Any) -> Any:
    """``biject_to(fn.support)``, with an error that names the site where there is none."""
    try:
        return to_support(fn)
    except NotImplementedError as error:
        raise ModelError(
            f"site {name!r} ({distribution_name(fn)}) has support {fn.support}, for which torch has no bijection "
            "from the real numbers; register one with torch.distributions.biject_to, or write the site with another "
            "distribution"
        ) from error


def to_support(fn: Any) -> Any:
    """``biject_to(fn.support)``, of positive definite matrices too."""
    return ToPositiveDefinite() if fn.support is constraints.positive_definite else biject_to(fn.support)


def distribution_name(fn: Any) -> str:
    """Name of the distribution below ``Independent``, ``expand`` and masks."""
    while hasattr(fn, "base_dist") and type(fn).__name__ in ("Independent", "MaskedDistribution"):
        fn = fn.base_dist
    return type(fn).__name__


def is_discrete(name: str, fn: Any) -> bool:
    """Whether a distribution has a discrete support, with an error that names the site where that is not known."""
    try:
        return bool(fn.support.is_discrete)
    except NotImplementedError:
        bijection(name, fn)  # a support that is not known until run time has no bijection either, and says so
        raise
