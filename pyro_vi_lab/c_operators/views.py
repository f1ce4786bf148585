"""Operators that give the same elements in another arrangement, and tensors made of nothing or of pieces."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from pyro_vi_lab.c_builder import Builder
from pyro_vi_lab.c_expressions import Affine, Expr, Lazy, Pieces, Stored
from pyro_vi_lab.c_operators.arguments import Operator, Result, dimension, operand
from pyro_vi_lab.errors import CompileError


def _view(b: Builder, result: Result, x: Lazy, *_: Any, **__: Any) -> Lazy:
    return b.reshape(x, result.shape)


def _expand(b: Builder, result: Result, x: Lazy, *_: Any, **__: Any) -> Lazy:
    return b.expand(x, result.shape)


def _permute(b: Builder, result: Result, x: Lazy, dims: Sequence[int]) -> Lazy:
    return b.permute(x, [dimension(len(x.shape), dim) for dim in dims])


def _transpose(b: Builder, result: Result, x: Lazy, one: int, other: int) -> Lazy:
    rank = len(x.shape)
    order = list(range(rank))
    if rank:
        one, other = dimension(rank, one), dimension(rank, other)
        order[one], order[other] = order[other], order[one]
    return b.permute(x, order)


def _t(b: Builder, result: Result, x: Lazy) -> Lazy:
    return b.permute(x, list(reversed(range(len(x.shape)))))


def _select(b: Builder, result: Result, x: Lazy, dim: int, position: int) -> Lazy:
    dim = dimension(len(x.shape), dim)
    return b.select(x, dim, position + x.shape[dim] if position < 0 else position)


def _start(size: int, start: int | None) -> int:
    start = 0 if start is None else start
    return max(0, min(size, start + size if start < 0 else start))


def _slice(
    b: Builder, result: Result, x: Lazy, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1
) -> Lazy:
    dim = dimension(len(x.shape), dim)
    return b.slice(x, dim, _start(x.shape[dim], start), result.shape[dim], step)


def _unsqueeze(b: Builder, result: Result, x: Lazy, dim: int) -> Lazy:
    return b.unsqueeze(x, dimension(len(x.shape) + 1, dim))


def _diagonal_of(b: Builder, x: Lazy, offset: int, one: int, other: int) -> Lazy:
    rank = len(x.shape)
    one, other = dimension(rank, one), dimension(rank, other)
    length = max(0, min(x.shape[one] + min(offset, 0), x.shape[other] - max(offset, 0)))
    rest = [dim for dim in range(rank) if dim not in (one, other)]
    along = Affine.loop(len(rest))
    index = [Affine.loop(rest.index(dim)) if dim in rest else along for dim in range(rank)]
    index[one] = along.plus(Affine(max(-offset, 0)))
    index[other] = along.plus(Affine(max(offset, 0)))
    return b.view(x, [*(x.shape[dim] for dim in rest), length], index)


def _diagonal(b: Builder, result: Result, x: Lazy, offset: int = 0, dim1: int = 0, dim2: int = 1) -> Lazy:
    return _diagonal_of(b, x, offset, dim1, dim2)


def _flip(b: Builder, result: Result, x: Lazy, dims: Sequence[int]) -> Lazy:
    index = [Affine.loop(dim) for dim in range(len(x.shape))]
    for dim in (dimension(len(x.shape), dim) for dim in dims):
        index[dim] = index[dim].times(-1).plus(Affine(x.shape[dim] - 1))
    return b.view(x, x.shape, index)


def _unbind(b: Builder, results: Sequence[Result], x: Lazy, dim: int = 0) -> tuple[Lazy, ...]:
    x, dim = b.readable(x), dimension(len(x.shape), dim)
    return tuple(b.select(x, dim, number) for number in range(x.shape[dim]))


def _split(b: Builder, results: Sequence[Result], x: Lazy, _: Any, dim: int = 0) -> tuple[Lazy, ...]:
    x, dim = b.readable(x), dimension(len(x.shape), dim)
    parts, start = [], 0
    for result in results:
        parts.append(b.slice(x, dim, start, result.shape[dim]))
        start += result.shape[dim]
    return tuple(parts)


def _unfold(b: Builder, result: Result, x: Lazy, dim: int, size: int, step: int) -> Lazy:
    dim = dimension(len(x.shape), dim) if x.shape else 0
    index = [Affine.loop(number) for number in range(len(x.shape))]
    if index:
        index[dim] = index[dim].times(step).plus(Affine.loop(len(x.shape)))
    return b.view(b.readable(x), result.shape, index)


def _as_strided(
    b: Builder, result: Result, x: Lazy, size: Sequence[int], strides: Sequence[int], offset: int | None = None
) -> Lazy:
    if not isinstance(x, Stored) or not x.is_contiguous or x.offset or x.size != x.buffer.size:
        raise CompileError("aten.as_strided of a view")
    return x.viewed(size, strides, offset or 0)


def _repeat(b: Builder, result: Result, x: Lazy, repeats: Sequence[int]) -> Lazy:
    old = [1] * (len(repeats) - len(x.shape)) + list(x.shape)
    x = b.reshape(b.readable(x), [size for pair in zip([1] * len(old), old, strict=True) for size in pair])
    wide = b.expand(x, [size for pair in zip(repeats, old, strict=True) for size in pair])
    return b.reshape(wide, result.shape)


def _roll(b: Builder, result: Result, x: Lazy, shifts: Sequence[int], dims: Sequence[int] = ()) -> Lazy:
    shape = x.shape
    if not dims:
        x, dims = b.reshape(x, (x.size,)), (0,)
    for shift, dim in zip(shifts, dims, strict=True):
        size = x.shape[dim]
        if size:
            cut = (-shift) % size
            x = b.readable(x)
            x = _joined(b, x.shape, x.dtype, [b.slice(x, dim, cut, size - cut), b.slice(x, dim, 0, cut)], dim)
    return b.reshape(x, shape)


# --- made of nothing


def _full(b: Builder, result: Result, _: Any, value: float, **__: Any) -> Lazy:
    return b.full(result.shape, value, result.dtype)


def _filled(value: float) -> Operator:
    return lambda b, result, *_, **__: b.full(result.shape, value, result.dtype)


def _scalar_tensor(b: Builder, result: Result, value: float, **_: Any) -> Lazy:
    return b.full(result.shape, value, result.dtype)


def _fill(b: Builder, result: Result, x: Lazy, value: Any) -> Lazy:
    return b.expand(operand(b, value, result.dtype), result.shape)


def _copy(b: Builder, result: Result, x: Lazy, source: Lazy, *_: Any) -> Lazy:
    return b.expand(b.cast(source, result.dtype), result.shape)


def _arange(b: Builder, result: Result, start: float, step: float) -> Lazy:
    work = result.dtype

    def formula(index: Sequence[Expr]) -> Expr:
        return index[0].to(work) * step + start

    return b.positions(result.shape, formula)


def _eye(b: Builder, result: Result, *_: Any, **__: Any) -> Lazy:
    return b.positions(result.shape, lambda index: index[0].equals(index[1]).to(result.dtype))


# --- made of pieces


def _joined(b: Builder, shape: Sequence[int], dtype: torch.dtype, parts: Sequence[Lazy], dim: int) -> Stored:
    target = b.allocate(shape, dtype, varying=any(part.varying for part in parts))
    start = 0
    for part in parts:
        view = b.slice(target, dim, start, part.shape[dim])
        assert isinstance(view, Stored)
        b.store(view, part)
        start += part.shape[dim]
    return target


def _cat(b: Builder, result: Result, tensors: Sequence[Lazy], dim: int = 0) -> Lazy:
    parts = [b.cast(x, result.dtype) for x in tensors if x.shape != (0,) or len(result.shape) == 1]
    return _joined(b, result.shape, result.dtype, parts, dimension(len(result.shape), dim))


def _stack(b: Builder, result: Result, tensors: Sequence[Lazy], dim: int = 0) -> Lazy:
    dim = dimension(len(result.shape), dim)
    return _joined(b, result.shape, result.dtype, [b.unsqueeze(b.cast(x, result.dtype), dim) for x in tensors], dim)


def _slice_backward(
    b: Builder, result: Result, grad: Lazy, sizes: Sequence[int], dim: int, start: int, end: int, step: int
) -> Lazy:
    dim = dimension(len(result.shape), dim)
    first, length = _start(result.shape[dim], start), grad.shape[dim]
    return Pieces(result.shape, result.dtype, [(grad, lambda whole: b.slice(whole, dim, first, length, step))])


def _select_backward(b: Builder, result: Result, grad: Lazy, sizes: Sequence[int], dim: int, position: int) -> Lazy:
    dim = dimension(len(result.shape), dim)
    place = position + result.shape[dim] if position < 0 else position
    return Pieces(result.shape, result.dtype, [(grad, lambda whole: b.select(whole, dim, place))])


def _diagonal_backward(
    b: Builder, result: Result, grad: Lazy, sizes: Sequence[int], offset: int, dim1: int, dim2: int
) -> Lazy:
    return Pieces(result.shape, result.dtype, [(grad, lambda whole: _diagonal_of(b, whole, offset, dim1, dim2))])


def _diag_embed(b: Builder, result: Result, x: Lazy, offset: int = 0, dim1: int = -2, dim2: int = -1) -> Lazy:
    return Pieces(result.shape, result.dtype, [(x, lambda whole: _diagonal_of(b, whole, offset, dim1, dim2))])


def _pad(b: Builder, result: Result, x: Lazy, pad: Sequence[int], value: float = 0) -> Lazy:
    rank = len(x.shape)
    for number in range(len(pad) // 2):
        before, after, dim = pad[2 * number], pad[2 * number + 1], rank - 1 - number
        start, cut = max(0, -before), max(0, -before) + max(0, -after)
        if cut:
            x = b.slice(x, dim, start, x.shape[dim] - cut)

    def inside(whole: Stored) -> Lazy:
        for number in range(len(pad) // 2):
            dim = rank - 1 - number
            whole = b.slice(whole, dim, max(0, pad[2 * number]), x.shape[dim])  # type: ignore[assignment]
        return whole

    if value == 0:
        return Pieces(result.shape, result.dtype, [(x, inside)])
    target = b.allocate(result.shape, result.dtype, varying=x.varying)
    b.store(target, b.full(result.shape, value, result.dtype))
    part = inside(target)
    assert isinstance(part, Stored)
    b.store(part, x)
    return target


def _replaced(b: Builder, x: Lazy, source: Lazy, part: Any) -> Lazy:
    """A copy of ``x``, of which a part is written over."""
    target = b.allocate(x.shape, x.dtype, varying=x.varying or source.varying)
    source = b.readable(source)
    b.store(target, x)
    b.store(part(target), b.cast(source, x.dtype))
    return target


def _slice_scatter(
    b: Builder,
    result: Result,
    x: Lazy,
    source: Lazy,
    dim: int = 0,
    start: int | None = None,
    end: int | None = None,
    step: int = 1,
) -> Lazy:
    dim = dimension(len(x.shape), dim)
    first = _start(x.shape[dim], start)
    return _replaced(b, x, source, lambda whole: b.slice(whole, dim, first, source.shape[dim], step))


def _select_scatter(b: Builder, result: Result, x: Lazy, source: Lazy, dim: int, position: int) -> Lazy:
    dim = dimension(len(x.shape), dim)
    place = position + x.shape[dim] if position < 0 else position
    return _replaced(b, x, source, lambda whole: b.select(whole, dim, place))


def _diagonal_scatter(
    b: Builder, result: Result, x: Lazy, source: Lazy, offset: int = 0, dim1: int = 0, dim2: int = 1
) -> Lazy:
    return _replaced(b, x, source, lambda whole: _diagonal_of(b, whole, offset, dim1, dim2))


def _triangle(lower: bool) -> Operator:
    def operator(b: Builder, result: Result, x: Lazy, diagonal: int = 0) -> Lazy:
        def inside(index: Sequence[Expr]) -> Expr:
            limit = index[-2] + diagonal
            return index[-1] <= limit if lower else index[-1] >= limit

        mask = b.positions(x.shape, inside)
        return b.elementwise(lambda value, kept: kept.where(value, 0), x, mask)

    return operator


_ARANGES: dict[str, Operator] = {
    "aten.arange.default": lambda b, result, end, **_: _arange(b, result, 0, 1),
    "aten.arange.start": lambda b, result, start, end, **_: _arange(b, result, start, 1),
    "aten.arange.start_step": lambda b, result, start, end, step=1, **_: _arange(b, result, start, step),
    "prims.iota.default": lambda b, result, length, *, start, step, **_: _arange(b, result, start, step),
}

VIEWS: dict[str, Operator] = {
    **{f"aten.{name}.default": _view for name in ("view", "_unsafe_view", "squeeze", "_reshape_alias")},
    **{f"aten.squeeze.{kind}": _view for kind in ("dim", "dims")},
    "aten.expand.default": _expand,
    "aten.permute.default": _permute,
    "aten.transpose.int": _transpose,
    "aten.t.default": _t,
    "aten.select.int": _select,
    "aten.slice.Tensor": _slice,
    "aten.unsqueeze.default": _unsqueeze,
    "aten.diagonal.default": _diagonal,
    "aten.unfold.default": _unfold,
    "aten.as_strided.default": _as_strided,
    "aten.unbind.int": _unbind,
    "aten.split.Tensor": _split,
    "aten.split_with_sizes.default": _split,
}
"""Those whose results lie in the memory of their input: who uses them, uses it."""

OPERATORS: dict[str, Operator] = {
    **VIEWS,
    **_ARANGES,
    "aten.flip.default": _flip,
    "aten.repeat.default": _repeat,
    "aten.roll.default": _roll,
    "aten.full.default": _full,
    "aten.full_like.default": _full,
    "aten.new_full.default": lambda b, result, x, size, value, **_: b.full(result.shape, value, result.dtype),
    **{f"aten.{name}.default": _filled(0) for name in ("zeros", "zeros_like", "new_zeros")},
    **{f"aten.{name}.default": _filled(1) for name in ("ones", "ones_like", "new_ones")},
    **{
        f"aten.{name}.default": _filled(0) for name in ("empty_like", "new_empty", "new_empty_strided", "empty_strided")
    },
    "aten.empty.memory_format": _filled(0),
    "aten.scalar_tensor.default": _scalar_tensor,
    "aten.fill.Scalar": _fill,
    "aten.fill.Tensor": _fill,
    "aten.copy.default": _copy,
    "aten.eye.default": _eye,
    "aten.eye.m": _eye,
    "aten.cat.default": _cat,
    "aten.stack.default": _stack,
    "aten.slice_backward.default": _slice_backward,
    "aten.select_backward.default": _select_backward,
    "aten.diagonal_backward.default": _diagonal_backward,
    "aten.diag_embed.default": _diag_embed,
    "aten.constant_pad_nd.default": _pad,
    "aten.slice_scatter.default": _slice_scatter,
    "aten.select_scatter.default": _select_scatter,
    "aten.diagonal_scatter.default": _diagonal_scatter,
    "aten.tril.default": _triangle(True),
    "aten.triu.default": _triangle(False),
}
