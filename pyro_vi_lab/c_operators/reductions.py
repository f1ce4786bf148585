"""Operators that combine elements along dimensions."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from pyro_vi_lab.c_builder import PRODUCT, SUM, Builder
from pyro_vi_lab.c_expressions import Affine, Expr, Lazy
from pyro_vi_lab.c_operators.arguments import Operator, Result, dimension, dimensions
from pyro_vi_lab.errors import CompileError

LARGEST = "({1} > {0}) | ({1} != {1}) ? {1} : {0}"
SMALLEST = "({1} < {0}) | ({1} != {1}) ? {1} : {0}"
"""With NaN if there is one: it is neither larger nor smaller than what follows."""
ANY, ALL = "{0} | {1}", "{0} & {1}"


def _lowest(dtype: torch.dtype) -> float:
    return -math.inf if dtype.is_floating_point else 0 if dtype is torch.bool else torch.iinfo(dtype).min


def _highest(dtype: torch.dtype) -> float:
    return math.inf if dtype.is_floating_point else 1 if dtype is torch.bool else torch.iinfo(dtype).max


def _kept(b: Builder, x: Lazy, dims: Sequence[int], rank: int) -> Lazy:
    """With the dimensions that were folded put back, of size one."""
    shape, sizes = [], iter(x.shape)
    for dim in range(rank):
        shape.append(1 if dim in dims else next(sizes))
    return b.reshape(x, shape)


def total(b: Builder, x: Lazy, dims: Sequence[int]) -> Lazy:
    """Sum along dimensions, which are kept."""
    return _kept(b, b.fold(x, dims, SUM, 0, x.dtype), dims, len(x.shape))


def largest(b: Builder, x: Lazy, dims: Sequence[int]) -> Lazy:
    """Largest element along dimensions, which are kept."""
    return _kept(b, b.fold(x, dims, LARGEST, _lowest(x.dtype), x.dtype), dims, len(x.shape))


def _folding(fold: str, start: Callable[[torch.dtype], float], work: torch.dtype | None = None) -> Operator:
    def operator(b: Builder, result: Result, x: Lazy, dims: Any = None, keepdim: bool = False, **_: Any) -> Lazy:
        dtype = work or result.dtype
        folded = b.fold(b.cast(x, dtype), dimensions(len(x.shape), dims), fold, start(dtype), dtype)
        return b.cast(b.reshape(folded, result.shape), result.dtype)

    return operator


def _mean(b: Builder, result: Result, x: Lazy, dims: Any = None, keepdim: bool = False, **_: Any) -> Lazy:
    folded_dims = dimensions(len(x.shape), dims)
    count = math.prod(x.shape[dim] for dim in folded_dims) if x.shape else 1
    folded = b.fold(b.cast(x, result.dtype), folded_dims, SUM, 0, result.dtype)
    return b.reshape(b.elementwise(lambda value: value / count, folded), result.shape)


def _prod_dim(b: Builder, result: Result, x: Lazy, dim: int, keepdim: bool = False, **_: Any) -> Lazy:
    return _folding(PRODUCT, lambda _: 1)(b, result, x, [dim])


def _deviation(power: float) -> Operator:
    def operator(
        b: Builder, result: Result, x: Lazy, dims: Any = None, *, correction: float | None = None, keepdim: bool = False
    ) -> Lazy:
        folded = dimensions(len(x.shape), dims)
        count = math.prod(x.shape[dim] for dim in folded) if x.shape else 1
        divisor = max(0.0, count - (1 if correction is None else correction))
        x = b.readable(x)
        mean = b.elementwise(lambda value: value / max(count, 1), total(b, x, folded))
        squares = b.elementwise(lambda value, center: (value - center) * (value - center), x, mean)
        variance = b.elementwise(lambda value: value / divisor, b.fold(squares, folded, SUM, 0, x.dtype))
        root = variance if power == 1 else b.elementwise(lambda value: value.call("sqrt", 4), variance)
        return b.reshape(root, result.shape)

    return operator


def _extreme_place(b: Builder, x: Lazy, dim: int, most: Lazy) -> Lazy:
    """The first place along a dimension where the extreme value stands."""
    length = x.shape[dim]
    places = b.positions(x.shape, lambda index: index[dim])

    def formula(value: Expr, extreme: Expr, place: Expr) -> Expr:
        is_nan = value.owner.apply("{0} != {0}", value, dtype=torch.bool)
        here = value.owner.apply("{0} | {1}", value.equals(extreme), is_nan)
        return here.where(place, length)

    found = b.elementwise(formula, x, most, places)
    return _kept(b, b.fold(found, [dim], SMALLEST, length, torch.int64), [dim], len(x.shape))


def _extremes(b: Builder, x: Lazy, dim: int, fold: str) -> tuple[Lazy, Lazy]:
    x = b.readable(x)
    start = _lowest(x.dtype) if fold == LARGEST else _highest(x.dtype)
    most = b.readable(_kept(b, b.fold(x, [dim], fold, start, x.dtype), [dim], len(x.shape)))
    return most, _extreme_place(b, x, dim, most)


def _with_places(fold: str) -> Operator:
    def operator(b: Builder, results: Sequence[Result], x: Lazy, dim: int, keepdim: bool = False) -> tuple[Lazy, ...]:
        if not x.shape:
            return x, b.full((), 0, torch.int64)
        pair = _extremes(b, x, dimension(len(x.shape), dim), fold)
        return tuple(b.reshape(one, result.shape) for one, result in zip(pair, results, strict=True))

    return operator


def _places(fold: str) -> Operator:
    def operator(b: Builder, result: Result, x: Lazy, dim: int | None = None, keepdim: bool = False) -> Lazy:
        if not x.shape:
            return b.full((), 0, torch.int64)
        if dim is None:
            x, dim = b.reshape(x, (x.size,)), 0
        return b.reshape(_extremes(b, x, dimension(len(x.shape), dim), fold)[1], result.shape)

    return operator


def _logsumexp(b: Builder, result: Result, x: Lazy, dims: Any, keepdim: bool = False) -> Lazy:
    folded = dimensions(len(x.shape), dims)
    x = b.readable(b.cast(x, result.dtype))
    infinite = (math.inf, -math.inf)

    def finite(value: Expr) -> Expr:
        return value.equals(infinite[0]).where(0, value.equals(infinite[1]).where(0, value))

    most = b.readable(b.elementwise(finite, largest(b, x, folded)))
    sums = total(b, b.elementwise(lambda value, shift: (value - shift).call("exp"), x, most), folded)
    return b.reshape(b.elementwise(lambda value, shift: value.call("log") + shift, sums, most), result.shape)


def _softmax(b: Builder, result: Result, x: Lazy, dim: int, _: bool = False) -> Lazy:
    dims = [dimension(len(x.shape), dim)] if x.shape else []
    x = b.readable(b.cast(x, result.dtype))
    most = b.readable(largest(b, x, dims))
    powers = b.stored(b.elementwise(lambda value, shift: (value - shift).call("exp"), x, most))
    return b.elementwise(lambda value, whole: value / whole, powers, total(b, powers, dims))


def _log_softmax(b: Builder, result: Result, x: Lazy, dim: int, _: bool = False) -> Lazy:
    dims = [dimension(len(x.shape), dim)] if x.shape else []
    x = b.readable(b.cast(x, result.dtype))
    most = b.readable(largest(b, x, dims))
    sums = total(b, b.elementwise(lambda value, shift: (value - shift).call("exp"), x, most), dims)
    logs = b.elementwise(lambda value: value.call("log"), sums)
    return b.elementwise(lambda value, shift, log: value - shift - log, x, most, logs)


def _softmax_backward(b: Builder, result: Result, grad: Lazy, y: Lazy, dim: int, _: torch.dtype) -> Lazy:
    dims = [dimension(len(y.shape), dim)] if y.shape else []
    grad, y = b.readable(grad), b.readable(y)
    inner = total(b, b.elementwise(lambda g, v: g * v, grad, y), dims)
    return b.elementwise(lambda g, v, s: v * (g - s), grad, y, inner)


def _log_softmax_backward(b: Builder, result: Result, grad: Lazy, y: Lazy, dim: int, _: torch.dtype) -> Lazy:
    dims = [dimension(len(y.shape), dim)] if y.shape else []
    grad = b.readable(grad)
    return b.elementwise(lambda g, v, s: g - v.call("exp") * s, grad, y, total(b, grad, dims))


def _cross_entropy_with_logits(
    b: Builder,
    result: Result,
    x: Lazy,
    target: Lazy,
    weight: Lazy | None = None,
    pos_weight: Lazy | None = None,
    reduction: int = 1,
) -> Lazy:
    if pos_weight is not None:
        raise CompileError("aten.binary_cross_entropy_with_logits with pos_weight")

    def formula(value: Expr, wanted: Expr) -> Expr:
        negative = (value < 0).where(value, 0)
        softened = (-value.call("fabs", 1)).call("exp").call("log1p")
        return (-wanted + 1) * value - (negative - softened)

    loss = b.elementwise(formula, b.cast(x, result.dtype), b.cast(target, result.dtype))
    if weight is not None:
        loss = b.elementwise(lambda value, one: value * one, loss, b.cast(weight, result.dtype))
    if reduction == 0:
        return loss
    return _mean(b, result, loss) if reduction == 1 else _folding(SUM, lambda _: 0)(b, result, loss)


def _scan(fold: str, start: float) -> Operator:
    def operator(b: Builder, result: Result, x: Lazy, dim: int, **_: Any) -> Lazy:
        x = b.cast(x, result.dtype)
        return b.scan(x, dimension(len(x.shape), dim), fold, start) if x.shape else x

    return operator


def _rank_sort(b: Builder, results: Sequence[Result], x: Lazy, dim: int, descending: bool) -> tuple[Lazy, Lazy]:
    """Sorted by counting, for every element, those that come before it: as many comparisons as pairs."""
    if not x.shape:
        return x, b.full((), 0, torch.int64)
    dim = dimension(len(x.shape), dim)
    length, rank = x.shape[dim], len(x.shape)
    if length > LONGEST_SORT:
        raise CompileError(f"aten.sort of more than {LONGEST_SORT} numbers")
    x = b.readable(x)
    last = b.permute(x, [*(other for other in range(rank) if other != dim), dim])
    pairs = (*last.shape, length)
    place = b.positions(pairs, lambda index: index[-1] < index[-2])

    def before(value: Expr, other: Expr, first: Expr) -> Expr:
        apply = value.owner.apply
        this_nan, other_nan = (apply("{0} != {0}", one, dtype=torch.bool) for one in (value, other))
        less = (other > value) if descending else (other < value)
        nan_first, nan_last = (other_nan, this_nan) if descending else (this_nan, other_nan)
        less = apply("{0} | ({1} & !{2})", less, nan_first, nan_last)
        equal = apply("({0} | ({1} & {2})) & {3}", value.equals(other), this_nan, other_nan, first)
        return apply("{0} | {1}", less, equal).to(torch.int64)

    ranks = b.fold(
        b.elementwise(before, b.unsqueeze(last, rank), b.unsqueeze(last, rank - 1), place), [rank], SUM, 0, torch.int64
    )
    ranks = b.stored(ranks)
    values = b.allocate(last.shape, x.dtype, varying=x.varying)
    order = b.allocate(last.shape, torch.int64, varying=x.varying)

    def where(index: tuple[Affine, ...]) -> tuple[Affine, ...]:
        return (*index[:-1], Affine(0, (), ((ranks.at(index), 1),)))

    b.write_at(values, where, last, None)
    b.write_at(order, where, b.positions(last.shape, lambda index: index[-1]), None)
    back = [*range(dim), rank - 1, *range(dim, rank - 1)]
    return b.permute(values, back), b.permute(order, back)


LONGEST_SORT = 512
"""Numbers that are sorted by comparing all pairs."""


def _sort(b: Builder, results: Sequence[Result], x: Lazy, dim: int = -1, descending: bool = False) -> tuple[Lazy, Lazy]:
    return _rank_sort(b, results, x, dim, descending)


def _stable_sort(
    b: Builder, results: Sequence[Result], x: Lazy, *, stable: bool = False, dim: int = -1, descending: bool = False
) -> tuple[Lazy, Lazy]:
    return _rank_sort(b, results, x, dim, descending)


_SUM = _folding(SUM, lambda _: 0)
_ANY, _ALL = _folding(ANY, lambda _: 0, torch.bool), _folding(ALL, lambda _: 1, torch.bool)

OPERATORS: dict[str, Operator] = {
    "aten.sum.default": _SUM,
    "aten.sum.dim_IntList": _SUM,
    "aten.mean.default": _mean,
    "aten.mean.dim": _mean,
    "aten.prod.default": _folding(PRODUCT, lambda _: 1),
    "aten.prod.dim_int": _prod_dim,
    "aten.amax.default": _folding(LARGEST, _lowest),
    "aten.amin.default": _folding(SMALLEST, _highest),
    "aten.max.default": _folding(LARGEST, _lowest),
    "aten.min.default": _folding(SMALLEST, _highest),
    "aten.max.dim": _with_places(LARGEST),
    "aten.min.dim": _with_places(SMALLEST),
    "aten.argmax.default": _places(LARGEST),
    "aten.argmin.default": _places(SMALLEST),
    **{f"aten.any.{kind}": _ANY for kind in ("default", "dim", "dims")},
    **{f"aten.all.{kind}": _ALL for kind in ("default", "dim", "dims")},
    "aten.var.correction": _deviation(1),
    "aten.std.correction": _deviation(0.5),
    "aten.logsumexp.default": _logsumexp,
    "aten._softmax.default": _softmax,
    "aten._log_softmax.default": _log_softmax,
    "aten._softmax_backward_data.default": _softmax_backward,
    "aten._log_softmax_backward_data.default": _log_softmax_backward,
    "aten.binary_cross_entropy_with_logits.default": _cross_entropy_with_logits,
    "aten.cumsum.default": _scan(SUM, 0),
    "aten.cumprod.default": _scan(PRODUCT, 1),
    "aten.logcumsumexp.default": _scan("vl_logaddexp({0}, {1})", -math.inf),
    "aten.sort.default": _sort,
    "aten.sort.stable": _stable_sort,
}
