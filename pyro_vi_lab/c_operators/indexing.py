"""Operators that read or write at places given by tensors of indices."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from pyro_vi_lab.c_builder import Builder
from pyro_vi_lab.c_expressions import ZERO, Affine, Computed, Expr, Index, Lazy, Stored
from pyro_vi_lab.c_operators.arguments import Operator, Result, dimension, operand
from pyro_vi_lab.errors import CompileError

Combine = Callable[[Expr, Expr], Expr]


def _checked(b: Builder, indices: Lazy, size: int) -> Lazy:
    """Indices that count from the front and are in range; those of a constant are looked at now."""
    indices = b.cast(indices, torch.int64)
    if isinstance(indices, Stored) and indices.buffer.value is not None:
        value = indices.buffer.value
        if not value.numel() or (int(value.min()) >= 0 and int(value.max()) < size):
            return indices
    text = f"vl_index({{0}}, {size}, bad)"
    return b.readable(b.elementwise(lambda index: index.owner.apply(text, index), indices))


def _from_masks(b: Builder, indices: Sequence[Lazy | None]) -> list[Lazy | None]:
    """Masks, which must be constants, as the places where they are true."""
    result: list[Lazy | None] = []
    for one in indices:
        if one is None or one.dtype is not torch.bool:
            result.append(one)
        elif isinstance(one, Stored) and one.buffer.value is not None:
            mask = one.buffer.value.as_strided(one.shape, one.strides, one.offset)
            result.extend(b.constant(places) for places in mask.nonzero().unbind(-1))
        else:
            raise CompileError("aten.index with a mask that is computed")
    return result


class _Places:
    """How ``x[i, j, ...]`` is indexed: index tensors are broadcast, and their shape stands where they stood."""

    def __init__(self, b: Builder, shape: Sequence[int], indices: Sequence[Lazy | None]) -> None:
        given = _from_masks(b, indices)
        given += [None] * (len(shape) - len(given))
        self.tensors = {dim: _checked(b, one, shape[dim]) for dim, one in enumerate(given) if one is not None}
        self.shape = tuple(torch.broadcast_shapes(*(one.shape for one in self.tensors.values())))
        self.sliced = [dim for dim in range(len(shape)) if dim not in self.tensors]
        dims = list(self.tensors)
        adjacent = dims == list(range(dims[0], dims[0] + len(dims)))
        self.before = [dim for dim in self.sliced if dim < dims[0]] if adjacent else []
        after = [dim for dim in self.sliced if dim not in self.before]
        self.result = (*(shape[dim] for dim in self.before), *self.shape, *(shape[dim] for dim in after))
        self._rank = len(shape)

    @property
    def varying(self) -> bool:
        return any(one.varying for one in self.tensors.values())

    def source(self, place: Index) -> Index:
        """Index into ``x`` of an index into the result."""
        lead = len(self.before)
        inner = place[lead : lead + len(self.shape)]
        free = dict(zip(self.sliced, (*place[:lead], *place[lead + len(self.shape) :]), strict=True))
        index = []
        for dim in range(self._rank):
            if dim in free:
                index.append(free[dim])
                continue
            tensor = self.tensors[dim]
            own = inner[len(inner) - len(tensor.shape) :]
            expr = tensor.at(tuple(ZERO if size == 1 else one for size, one in zip(tensor.shape, own, strict=True)))
            index.append(Affine(0, (), ((expr, 1),)))
        return tuple(index)


def _read(b: Builder, x: Lazy, shape: Sequence[int], source: Callable[[Index], Index], varying: bool) -> Lazy:
    x = b.stored(x)
    sample = x.at(source((ZERO,) * len(shape)))
    return Computed(shape, x.dtype, x.varying or varying, max(2, sample.cost), lambda place: x.at(source(place)))


def _index(b: Builder, result: Result, x: Lazy, indices: Sequence[Lazy | None]) -> Lazy:
    places = _Places(b, x.shape, indices)
    return _read(b, x, result.shape, places.source, places.varying)


def _index_put(
    b: Builder, result: Result, x: Lazy, indices: Sequence[Lazy | None], values: Lazy, accumulate: bool = False
) -> Lazy:
    masks = [one for one in indices if one is not None and one.dtype is torch.bool]
    if len(masks) == 1 and len(indices) == 1 and values.size == 1 and not accumulate:
        mask = masks[0]
        mask = b.reshape(mask, (*mask.shape, *(1 for _ in range(len(x.shape) - len(mask.shape)))))
        value = b.reshape(values, ())
        return b.elementwise(lambda m, new, old: m.where(new, old), mask, value, x, shape=x.shape)
    places = _Places(b, x.shape, indices)
    values = b.expand(b.cast(values, x.dtype), places.result)
    return _written(b, x, places.source, values, _adding if accumulate else None, places.varying)


def _adding(old: Expr, new: Expr) -> Expr:
    return old + new


def _written(
    b: Builder, x: Lazy, where: Callable[[Index], Index], values: Lazy, combine: Combine | None, varying: bool
) -> Lazy:
    values = b.readable(values)
    target = b.allocate(x.shape, x.dtype, varying=x.varying or values.varying or varying)
    b.store(target, x)
    if values.size:
        b.write_at(target, where, values, combine)
    return target


def _along(b: Builder, x: Lazy, dim: int, index: Lazy) -> Callable[[Index], Index]:
    """``x`` at an index of ``index`` itself, but along ``dim`` at the index that stands there."""
    checked = _checked(b, index, x.shape[dim] if x.shape else 1)

    def source(place: Index) -> Index:
        expr = Affine(0, (), ((checked.at(place), 1),))
        return (*place[:dim], expr, *place[dim + 1 :])

    return source


def _scalar_as_vector(b: Builder, x: Lazy) -> Lazy:
    return x if x.shape else b.reshape(x, (1,))


def _gather(b: Builder, result: Result, x: Lazy, dim: int, index: Lazy, **_: Any) -> Lazy:
    x, index = _scalar_as_vector(b, x), _scalar_as_vector(b, index)
    dim = dimension(len(x.shape), dim)
    return b.reshape(_read(b, x, index.shape, _along(b, x, dim, index), index.varying), result.shape)


def _index_select(b: Builder, result: Result, x: Lazy, dim: int, index: Lazy) -> Lazy:
    if not x.shape:
        return x
    dim = dimension(len(x.shape), dim)
    indices: list[Lazy | None] = [None] * dim
    return _index(b, result, x, [*indices, b.reshape(index, (index.size,))])


def _embedding(b: Builder, result: Result, weight: Lazy, index: Lazy, *_: Any) -> Lazy:
    return _index(b, result, weight, [index])


def _index_add(b: Builder, result: Result, x: Lazy, dim: int, index: Lazy, source: Lazy, *, alpha: float = 1) -> Lazy:
    dim = dimension(len(x.shape), dim)
    indices: list[Lazy | None] = [None] * dim
    places = _Places(b, x.shape, [*indices, index])
    scaled = b.elementwise(lambda value: value if alpha == 1 else value * alpha, b.cast(source, x.dtype))
    return _written(b, x, places.source, scaled, _adding, places.varying)


def _scatter(combine: Combine | None) -> Operator:
    def operator(b: Builder, result: Result, x: Lazy, dim: int, index: Lazy, source: Any) -> Lazy:
        x, index = _scalar_as_vector(b, x), _scalar_as_vector(b, index)
        dim = dimension(len(x.shape), dim)
        values = operand(b, source, x.dtype)
        if len(values.shape) == len(index.shape) and isinstance(source, Lazy):
            for number, size in enumerate(index.shape):
                values = b.slice(values, number, 0, size)
        values = b.expand(values, index.shape)
        return b.reshape(_written(b, x, _along(b, x, dim, index), values, combine, index.varying), result.shape)

    return operator


OPERATORS: dict[str, Operator] = {
    **{f"aten.{name}.Tensor": _index for name in ("index", "_unsafe_index")},
    **{f"aten.{name}.default": _index_put for name in ("index_put", "_unsafe_index_put")},
    "aten.gather.default": _gather,
    "aten.index_select.default": _index_select,
    "aten.embedding.default": _embedding,
    "aten.index_add.default": _index_add,
    "aten.scatter.src": _scatter(None),
    "aten.scatter.value": _scatter(None),
    "aten.scatter_add.default": _scatter(_adding),
}
