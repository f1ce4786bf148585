"""Whether two ways to compute the same thing agree."""

from __future__ import annotations

import torch
from torch import Tensor

CHECK_POWER = 0.5
"""A compiled graph may differ by the square root of the dtype's epsilon, relative to the largest value: other orders of
summation differ by far less, a wrong program by far more."""


def agrees(expected: Tensor, got: Tensor) -> bool:
    """Whether two results are the same number up to rounding."""
    if expected.shape != got.shape or expected.dtype != got.dtype:
        return False
    if not expected.is_floating_point():
        return bool((expected == got).all())
    finite = expected[torch.isfinite(expected)]
    scale = max(float(finite.abs().max()), 1.0) if finite.numel() else 1.0
    atol = torch.finfo(expected.dtype).eps ** CHECK_POWER * scale
    return torch.allclose(got, expected, rtol=0, atol=atol, equal_nan=True)
