"""Operations on lazy tensors: element by element, views, sums, stores; they become statements in memory order."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence

import torch

from pyro_vi_lab.c_expressions import (
    ZERO,
    Affine,
    Buffer,
    Call,
    Computed,
    Expr,
    Expressions,
    Index,
    Lazy,
    Pieces,
    Statement,
    Stored,
    constant_index,
    loads,
    strides_of,
)

UNROLL = 4
"""Loops and sums of so few terms are written out."""
LARGEST_COST = 400
"""What costs more is stored rather than made part of a larger expression."""

SUM, PRODUCT = "{0} + {1}", "{0} * {1}"


class Builder:
    """Turns operations on lazy tensors into statements.

    Args:
        lanes: Rows that are computed side by side.
    """

    def __init__(self, lanes: int = 1) -> None:
        self.lanes = lanes
        self.expressions = Expressions()
        self.statements: list[Statement | Call] = []
        self.constants: list[torch.Tensor] = []
        self.outputs: list[Buffer] = []
        self._num_buffers = 0

    # --- memory

    def input(self, number: int, shape: Sequence[int], dtype: torch.dtype, *, varying: bool) -> Stored:
        """An input of the graph."""
        return self._contiguous(Buffer(number, "input", dtype, math.prod(shape), varying), shape)

    def constant(self, value: torch.Tensor) -> Stored:
        """A tensor that is known, and is passed by its address."""
        shape, value = value.shape, _without_repeats(value.detach().cpu()).contiguous()
        if not value.is_floating_point():
            value = value.clone()  # indices are checked now, and must not change
        self.constants.append(value)
        buffer = Buffer(len(self.constants) - 1, "constant", value.dtype, value.numel(), False, value)
        stored = self._contiguous(buffer, value.shape)
        return stored.viewed(
            shape, [0 if one == 1 else step for one, step in zip(value.shape, stored.strides, strict=True)], 0
        )

    def allocate(self, shape: Sequence[int], dtype: torch.dtype, *, varying: bool) -> Stored:
        """Memory of a result."""
        self._num_buffers += 1
        return self._contiguous(Buffer(self._num_buffers, "work", dtype, math.prod(shape), varying), shape)

    def output(self, number: int, x: Lazy) -> None:
        """Make a tensor the next output of the function."""
        fresh = isinstance(x, Stored) and x.is_contiguous and x.buffer.kind == "work" and x.size == x.buffer.size
        if not (fresh and x.buffer not in self.outputs):  # type: ignore[attr-defined]
            x = self.stored(x, copy=True)
        assert isinstance(x, Stored)
        if self.lanes == 1:  # else results are copied, row by row
            x.buffer.kind, x.buffer.number = "output", number
        self.outputs.append(x.buffer)

    def _contiguous(self, buffer: Buffer, shape: Sequence[int]) -> Stored:
        return Stored(self.expressions, buffer, shape, strides_of(shape))

    def stored(self, x: Lazy, *, copy: bool = False) -> Stored:
        """The tensor computed and in memory."""
        if isinstance(x, Stored) and not copy:
            return x
        target = self.allocate(x.shape, x.dtype, varying=x.varying)
        self.store(target, x)
        return target

    def contiguous(self, x: Lazy) -> Stored:
        """The tensor in memory, its elements in order."""
        return self.stored(x, copy=not (isinstance(x, Stored) and x.is_contiguous))

    def store(self, target: Stored, x: Lazy) -> None:
        """Write a tensor to memory."""
        if not isinstance(x, Pieces):
            for extents, index in _loops(x.shape):
                self._append(extents, target, index, x.at(index))
            return
        first, view = x.parts[0]
        rest = x.parts
        if first.shape == x.shape and view(target).shape == x.shape and not isinstance(first, Pieces):
            self.store(self._stored_view(view, target), first)
            rest = x.parts[1:]
        else:
            self.store(target, self.full(x.shape, 0, x.dtype))
        for part, view in rest:
            self.add_to(self._stored_view(view, target), part)

    def add_to(self, target: Stored, x: Lazy) -> None:
        """Add a tensor to what is in memory."""
        x = self.stored(x) if isinstance(x, Pieces) else x
        for extents, index in _loops(x.shape):
            self._append(extents, target, index, target.at(index) + x.at(index))

    def write_at(
        self, target: Stored, where: Callable[[Index], Index], x: Lazy, combine: Callable[[Expr, Expr], Expr] | None
    ) -> None:
        """Write elements of ``x`` to places that depend on their index, in order; combined with what is there."""
        index = _whole_loops(x.shape)
        place, value = where(index), x.at(index)
        if combine is not None:
            value = combine(target.at(place), value)
        self.statements.append(
            Statement(_extents(x.shape), target.buffer, target.position(place), value, ordered=True, final=False)
        )

    def _append(self, extents: tuple[int, ...], target: Stored, index: Index, value: Expr) -> None:
        self.statements.append(Statement(extents, target.buffer, target.position(index), value))

    def call(self, text: str, batch: Sequence[int], reads: Sequence[Stored], writes: Sequence[Stored]) -> None:
        """Call a function of the library of linear algebra for each matrix of a batch."""
        index = _whole_loops(batch)

        def first(x: Stored) -> tuple[Buffer, Affine]:
            return x.buffer, x.position(index + (ZERO,) * (len(x.shape) - len(batch)))

        self.statements.append(
            Call(_extents(batch), text, tuple(first(x) for x in reads), tuple(first(x) for x in writes))
        )

    def _stored_view(self, view: Callable[[Stored], Lazy], target: Stored) -> Stored:
        result = view(target)
        assert isinstance(result, Stored)
        return result

    # --- element by element

    def full(self, shape: Sequence[int], value: float, dtype: torch.dtype) -> Lazy:
        """A tensor of one number."""
        number = self.expressions.number(value, dtype)
        repeated = frozenset(dim for dim, size in enumerate(shape) if size > 1)
        return Computed(shape, dtype, False, 0, lambda _: number, repeated)

    def positions(self, shape: Sequence[int], formula: Callable[[Sequence[Expr]], Expr]) -> Lazy:
        """A tensor whose elements are computed from their own index."""

        def at(index: Index) -> Expr:
            return formula([self.expressions.position(one) for one in index])

        sample = at(constant_index(*(0 for _ in shape)))
        return Computed(shape, sample.dtype, False, max(1, sample.cost), at)

    def readable(self, x: Lazy) -> Lazy:
        """The tensor, stored if reading an element several times would compute it several times."""
        return self.stored(x) if x.cost > 0 or isinstance(x, Pieces) else x

    def elementwise(self, formula: Callable[..., Expr], *args: Lazy, shape: Sequence[int] | None = None) -> Lazy:
        """A formula of the elements of tensors, which are broadcast."""
        shape = tuple(torch.broadcast_shapes(*(x.shape for x in args))) if shape is None else tuple(shape)
        repeated = _repeated_in_all(args, shape)
        if repeated:  # computed once, and repeated
            once = [self._without(x, repeated, len(shape)) for x in args]
            core_shape = [1 if dim in repeated else size for dim, size in enumerate(shape)]
            return self.expand(self.elementwise(formula, *once, shape=core_shape), shape)
        size, varying = math.prod(shape), any(x.varying for x in args)

        def prepared(x: Lazy) -> Lazy:
            often = x.size < size or (self.lanes > 1 and varying and not x.varying)
            return self.stored(x) if isinstance(x, Pieces) or (often and x.cost > 0) else x

        args = tuple(prepared(x) for x in args)
        if sum(x.cost for x in args) > LARGEST_COST:
            args = tuple(self.stored(x) if x.cost > LARGEST_COST // 4 else x for x in args)
        broadcast = [_broadcast(x.shape, shape) for x in args]

        def at(index: Index) -> Expr:
            return formula(*(x.at(place(index)) for x, place in zip(args, broadcast, strict=True)))

        sample = at(constant_index(*(0 for _ in shape)))
        return Computed(shape, sample.dtype, sample.varying, sample.cost, at)

    def _without(self, x: Lazy, repeated: frozenset[int], rank: int) -> Lazy:
        """The tensor with one element along dimensions that repeat it; these are counted in a tensor of that rank."""
        lead = rank - len(x.shape)
        shape = [1 if dim + lead in repeated else size for dim, size in enumerate(x.shape)]
        if tuple(shape) == x.shape:
            return x
        return self.view(x, shape, [ZERO if size == 1 else Affine.loop(dim) for dim, size in enumerate(shape)])

    def cast(self, x: Lazy, dtype: torch.dtype) -> Lazy:
        """The tensor in another type."""
        return x if x.dtype is dtype else self.elementwise(lambda value: value.to(dtype), x)

    # --- views

    def view(self, x: Lazy, shape: Sequence[int], index: Sequence[Affine]) -> Lazy:
        """A view: element j of the result is the element of ``x`` at ``index``, whose loop k stands for j's entry k."""
        if isinstance(x, Pieces):
            x = self.stored(x)
        if isinstance(x, Stored):
            position = x.position(tuple(index))
            strides = [position.coefficient(number) for number in range(len(shape))]
            return x.viewed(shape, strides, position.const)
        source, index = x, tuple(index)

        def at(place: Index) -> Expr:
            return source.at(tuple(_substituted(one, place) for one in index))

        used = {
            loop
            for dim, one in enumerate(index)
            if dim not in x.repeated and x.shape[dim] != 1
            for loop, coefficient in one.loops
            if coefficient
        }
        repeated = frozenset(dim for dim, size in enumerate(shape) if size > 1 and dim not in used)
        return Computed(shape, x.dtype, x.varying, x.cost, at, repeated)

    def reshape(self, x: Lazy, shape: Sequence[int]) -> Lazy:
        """The elements in order, in another shape."""
        shape = tuple(shape)
        if x.shape == shape:
            return x
        if isinstance(x, Stored) and x.is_contiguous:
            return x.viewed(shape, strides_of(shape), x.offset)
        if x.size == 1 and not isinstance(x, Pieces):
            return self.view(x, shape, (ZERO,) * len(x.shape))
        index = _split_index(x.shape, shape) if x.size else None
        if index is not None:
            return self.view(x, shape, index)
        return self.contiguous(x).viewed(shape, strides_of(shape), 0)

    def expand(self, x: Lazy, shape: Sequence[int]) -> Lazy:
        """The tensor broadcast."""
        x = self.readable(x) if math.prod(shape) > x.size else x
        return self.view(x, shape, _broadcast(x.shape, shape)(_numbered(shape)))

    def unsqueeze(self, x: Lazy, dim: int) -> Lazy:
        """With one more dimension, of size one."""
        index = _numbered((*x.shape, 1))
        return self.view(x, (*x.shape[:dim], 1, *x.shape[dim:]), (*index[:dim], *index[dim + 1 :]))

    def permute(self, x: Lazy, dims: Sequence[int]) -> Lazy:
        """With its dimensions in another order."""
        index = [Affine.loop(list(dims).index(dim)) for dim in range(len(dims))]
        return self.view(x, [x.shape[dim] for dim in dims], index)

    def transpose(self, x: Lazy) -> Lazy:
        """Matrices transposed."""
        count = len(x.shape)
        return self.permute(x, [*range(count - 2), count - 1, count - 2])

    def select(self, x: Lazy, dim: int, position: int) -> Lazy:
        """One slice, without its dimension."""
        shape = x.shape[:dim] + x.shape[dim + 1 :]
        index = list(_numbered(shape))
        index.insert(dim, Affine(position))
        return self.view(x, shape, index)

    def slice(self, x: Lazy, dim: int, start: int, size: int, step: int = 1) -> Lazy:
        """Every ``step``-th slice."""
        index = list(_numbered(x.shape))
        index[dim] = index[dim].times(step).plus(Affine(start))
        return self.view(x, (*x.shape[:dim], size, *x.shape[dim + 1 :]), index)

    # --- sums and the like

    def fold(self, x: Lazy, dims: Sequence[int], fold: str, start: float, dtype: torch.dtype) -> Lazy:
        """Elements along some dimensions combined by a C expression of ``{0}``, the result so far, and ``{1}``.

        Computed in ``dtype``, sums of single precision in double.
        """
        if not dims:
            return self.cast(x, dtype)
        if isinstance(x, Pieces):
            x = self.stored(x)
        kept = [dim for dim in range(len(x.shape)) if dim not in dims]
        shape = [x.shape[dim] for dim in kept]
        work = torch.float64 if dtype is torch.float32 and fold in (SUM, PRODUCT) else dtype
        folded = [x.shape[dim] for dim in dims]
        first = self.expressions.number(start, work)

        def index_of(outer: Index, inner: Index) -> Index:
            places = dict(zip((*kept, *dims), (*outer, *inner), strict=True))
            return tuple(places[dim] for dim in range(len(places)))

        if math.prod(folded) <= UNROLL:
            source = x

            def at(outer: Index) -> Expr:
                result = None
                for inner in _places(folded):
                    value = source.at(index_of(outer, inner)).to(work)
                    result = value if result is None else self.expressions.apply(fold, result, value)
                return (first if result is None else result).to(dtype)

            cost = math.prod(folded) * (x.cost + 1)
            return Computed(shape, dtype, x.varying, cost, at)
        target = self.allocate(shape, dtype, varying=x.varying)
        if fold == SUM and work is dtype and self._better_across(x, kept, dims):
            self._sum_across(target, x, kept, dims)
            return target
        for extents, outer in _loops(shape):
            inner = tuple(
                Affine.loop(number) if size > 1 else ZERO
                for number, size in zip(_numbers(folded, len(extents)), folded, strict=True)
            )
            value = x.at(index_of(outer, inner)).to(work)
            loops = (*extents, *_extents(folded))
            statement = Statement(
                loops, target.buffer, target.position(outer), value, fold, first, kept=len(extents), final=False
            )
            self.statements.append(statement)
        return target

    def _better_across(self, x: Lazy, kept: Sequence[int], dims: Sequence[int]) -> bool:
        """Whether neighbors in memory belong to different sums, so that these are better computed side by side."""
        if not kept or x.shape[kept[-1]] <= UNROLL or (x.varying and self.lanes > 1):
            return False
        index = _numbered(x.shape)
        across = along = 0  # loads that jump through memory
        for load in loads(x.at(index)):
            if load.buffer is not None:
                across += load.offset.coefficient(kept[-1]) not in (0, 1)
                along += load.offset.coefficient(dims[-1]) not in (0, 1)
        return across < along

    def _sum_across(self, target: Stored, x: Lazy, kept: Sequence[int], dims: Sequence[int]) -> None:
        self.store(target, self.full(target.shape, 0, x.dtype))
        order = [*kept[:-1], *dims, kept[-1]]
        shape = [x.shape[dim] for dim in order]
        places = dict(zip(order, _whole_loops(shape), strict=True))
        outer = tuple(places[dim] for dim in kept)
        value = x.at(tuple(places[dim] for dim in range(len(order))))
        offset = target.position(outer)
        total = self.expressions.load(target.buffer, offset) + value
        self.statements.append(Statement(_extents(shape), target.buffer, offset, total, final=False))

    def scan(self, x: Lazy, dim: int, fold: str, start: float) -> Stored:
        """Elements along one dimension combined, with all intermediate results."""
        if isinstance(x, Pieces):
            x = self.stored(x)
        if x.shape[dim] == 1 or x.size == 0:
            return self.stored(x)
        work = torch.float64 if x.dtype is torch.float32 else x.dtype
        target = self.allocate(x.shape, x.dtype, varying=x.varying)
        order = [*(other for other in range(len(x.shape)) if other != dim), dim]
        shape = [x.shape[one] for one in order]
        places = dict(zip(order, _whole_loops(shape), strict=True))
        index = tuple(places[one] for one in range(len(order)))
        extents = _extents(shape)
        kept = len(extents) - (x.shape[dim] > 1)
        first = self.expressions.number(start, work)
        value = x.at(index).to(work)
        offset = target.position(index)
        self.statements.append(
            Statement(extents, target.buffer, offset, value, fold, first, kept, running=True, ordered=True)
        )
        return target


# --- loops over a shape --------------------------------------------------------------------------------


def _extents(shape: Sequence[int]) -> tuple[int, ...]:
    return tuple(size for size in shape if size != 1)


def _numbers(shape: Sequence[int], start: int = 0) -> list[int]:
    """The loop of every dimension; those of size one have none, and share a number with the next."""
    numbers = []
    for size in shape:
        numbers.append(start)
        start += size != 1
    return numbers


def _whole_loops(shape: Sequence[int]) -> Index:
    return tuple(
        ZERO if size == 1 else Affine.loop(number) for number, size in zip(_numbers(shape), shape, strict=True)
    )


def _numbered(shape: Sequence[int]) -> Index:
    return tuple(Affine.loop(number) for number in range(len(shape)))


def _places(shape: Sequence[int]) -> Iterator[Index]:
    for numbers in itertools.product(*(range(size) for size in shape)):
        yield constant_index(*numbers)


def _loops(shape: Sequence[int]) -> Iterator[tuple[tuple[int, ...], Index]]:
    """Extents of loops and the index of each turn; few turns are written out, one by one."""
    if math.prod(shape) <= UNROLL:
        yield from (((), place) for place in _places(shape))
    else:
        yield _extents(shape), _whole_loops(shape)


def _broadcast(source: Sequence[int], shape: Sequence[int]) -> Callable[[Index], Index]:
    lead = len(shape) - len(source)
    if tuple(source) == tuple(shape):
        return lambda index: index
    repeated = [size == 1 and wanted != 1 for size, wanted in zip(source, shape[lead:], strict=True)]
    return lambda index: tuple(ZERO if once else one for once, one in zip(repeated, index[lead:], strict=True))


def _repeated_in_all(args: Sequence[Lazy], shape: Sequence[int]) -> frozenset[int]:
    """Dimensions of the result along which none of the operands changes."""
    found = {dim for dim, size in enumerate(shape) if size > 1}
    for x in args:
        lead = len(shape) - len(x.shape)
        repeated = x.repeated
        found -= {dim + lead for dim, size in enumerate(x.shape) if size > 1 and dim not in repeated}
    return frozenset(found) if args else frozenset()


def _without_repeats(value: torch.Tensor) -> torch.Tensor:
    """The tensor with one element along dimensions along which all are equal, signs of zeros included."""
    for dim, size in enumerate(value.shape):
        if size > 1:
            first = value.narrow(dim, 0, 1)
            same = (value == first) & (torch.signbit(value) == torch.signbit(first))
            if bool(same.all()):
                value = first
    return value


def _substituted(one: Affine, place: Index) -> Affine:
    result = Affine(one.const, (), one.exprs)
    for number, coefficient in one.loops:
        result = result.plus(place[number].times(coefficient))
    return result


def _split_index(old: Sequence[int], new: Sequence[int]) -> list[Affine] | None:
    """Index into ``old`` of an index into ``new``; ``None`` if dimensions are merged, which takes a division."""
    index = [ZERO] * len(old)
    olds = [dim for dim, size in enumerate(old) if size != 1]
    news = [dim for dim, size in enumerate(new) if size != 1]
    while olds:
        dim = olds.pop(0)
        parts: list[int] = []
        while math.prod(new[part] for part in parts) < old[dim]:
            if not news:
                return None
            parts.append(news.pop(0))
        if math.prod(new[part] for part in parts) != old[dim]:
            return None
        step = 1
        for part in reversed(parts):
            index[dim] = index[dim].plus(Affine(0, ((part, step),)))
            step *= new[part]
    return index if not news else None
