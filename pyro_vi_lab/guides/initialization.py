"""Where a guide starts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyro_vi_lab.change_of_variables import to_support


def init_to_origin(site: Any = None) -> Any:
    """Start at zero on the unconstrained scale, whatever the prior: works for improper priors, which cannot be sampled.

    A site that says where to start, ``pyro.sample(..., infer={"start": value})``, starts there: the origin is a saddle
    point for the weights of a network. An ``init_loc_fn`` for Pyro's autoguides.
    """
    if site is None:
        return init_to_origin
    start: Tensor | None = site.get("infer", {}).get("start")
    if start is not None:
        return start.detach().clone()
    fn = site["fn"]
    transform = to_support(fn)
    like = next((value for value in _tensors(fn) if value.is_floating_point()), torch.empty(0))
    value: Tensor = transform(torch.zeros(transform.inverse_shape(fn.shape()), dtype=like.dtype, device=like.device))
    value._pyro_custom_init = False  # type: ignore[attr-defined]  # Pyro's mark of a default start
    return value


def _tensors(fn: Any) -> list[Tensor]:
    """Parameters of a distribution, whatever wraps it."""
    while hasattr(fn, "base_dist"):
        fn = fn.base_dist
    return [value for value in vars(fn).values() if isinstance(value, Tensor)]
