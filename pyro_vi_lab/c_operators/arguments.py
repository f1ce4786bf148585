"""What operators are told: their result's shape and type, and operands that may be tensors or numbers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from pyro_vi_lab.c_builder import Builder
from pyro_vi_lab.c_expressions import Lazy, Result
from pyro_vi_lab.errors import CompileError

Operator = Callable[..., Any]
"""``operator(builder, result, *args, **kwargs)``: as torch's, with lazy tensors; returns one or a tuple of them.

``result`` is a :class:`Result`, or a tuple of them for several.
"""


def operand(b: Builder, value: Lazy | float, dtype: torch.dtype) -> Lazy:
    """A tensor of the type that an operator computes in."""
    if isinstance(value, Lazy):
        return b.cast(value, dtype)
    if isinstance(value, (bool, int, float)):
        return b.full((), value, dtype)
    raise CompileError(f"a {type(value).__name__} as an operand")


def promoted(*values: Lazy | float) -> torch.dtype:
    """The type in which torch compares or combines operands."""
    tensors: list[Any] = [
        torch.empty((0,) if value.shape else (), dtype=value.dtype) if isinstance(value, Lazy) else value
        for value in values
    ]
    result = tensors[0]
    for other in tensors[1:]:
        dtype = torch.result_type(result, other)
        ranked = any(isinstance(one, torch.Tensor) and one.dim() for one in (result, other))
        result = torch.empty((0,) if ranked else (), dtype=dtype)
    return result.dtype if isinstance(result, torch.Tensor) else torch.tensor(result).dtype


def dimensions(rank: int, dims: int | Sequence[int] | None) -> list[int]:
    """Dimensions counted from the front; all if none are given."""
    if dims is None or (not isinstance(dims, int) and not dims):
        return list(range(rank))
    return sorted((dim + rank) % rank if rank else 0 for dim in ([dims] if isinstance(dims, int) else dims))[
        : rank or 0
    ]


def dimension(rank: int, dim: int) -> int:
    """A dimension counted from the front."""
    return dim + rank if dim < 0 else dim


__all__ = ["Operator", "Result", "dimension", "dimensions", "operand", "promoted"]
