"""Tensors as formulas of their indices: what a graph of operators is before it is C.

An operator makes a :class:`Lazy` tensor: it has a shape, and gives the expression of its element at an index. Nothing
is computed until a tensor is stored in a :class:`Buffer`; views only change the index.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

C_TYPES: Mapping[torch.dtype, str] = {
    torch.float64: "double",
    torch.float32: "float",
    torch.int64: "int64_t",
    torch.int32: "int32_t",
    torch.bool: "_Bool",
}
COSTS: Mapping[str, int] = {"div": 4, "sqrt": 4, "call": 16, "slow": 60}
"""Of an operation, in multiplications, roughly: what is cheap is repeated rather than stored."""


class Result(NamedTuple):
    """Shape and type of what an operator returns."""

    shape: tuple[int, ...]
    dtype: torch.dtype


# --- indices -------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Affine:
    """An index or an offset: a constant, multiples of loop variables (by number), multiples of expressions."""

    const: int = 0
    loops: tuple[tuple[int, int], ...] = ()
    exprs: tuple[tuple[Expr, int], ...] = ()

    @staticmethod
    def loop(number: int) -> Affine:
        """The variable of a loop."""
        return Affine(0, ((number, 1),))

    def plus(self, other: Affine) -> Affine:
        """Sum."""
        loops = _collected(self.loops + other.loops) if self.loops and other.loops else self.loops or other.loops
        return Affine(self.const + other.const, loops, self.exprs + other.exprs)

    def times(self, factor: int) -> Affine:
        """Multiple."""
        if factor == 1:
            return self
        if factor == 0:
            return ZERO
        return Affine(
            self.const * factor,
            tuple((variable, factor * coefficient) for variable, coefficient in self.loops),
            tuple((expr, factor * coefficient) for expr, coefficient in self.exprs),
        )

    def coefficient(self, loop: int) -> int:
        """Of one loop's variable."""
        return next((coefficient for variable, coefficient in self.loops if variable == loop), 0)

    @property
    def is_const(self) -> bool:
        """Whether it is one number."""
        return not self.loops and not self.exprs


def _collected(terms: tuple[tuple[int, int], ...]) -> tuple[tuple[int, int], ...]:
    sums: dict[int, int] = {}
    for variable, coefficient in terms:
        sums[variable] = sums.get(variable, 0) + coefficient
    return tuple(sorted(term for term in sums.items() if term[1] != 0))


ZERO = Affine()
Index = tuple[Affine, ...]


def constant_index(*numbers: int) -> Index:
    """An index without loops."""
    return tuple(Affine(number) if number else ZERO for number in numbers)


# --- expressions ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class Expr:
    """A number computed from numbers in memory; equal ones of one :class:`Expressions` are one object.

    Attributes:
        dtype: Its type.
        varying: Whether it differs from row to row.
        cost: What it costs to compute, in multiplications.
        text: C, with its arguments' places as ``{0}``, ``{1}``, ...; of a load nothing.
        args: Arguments.
        buffer: What a load reads.
        offset: Where a load reads, in elements; or the index that is the value.
    """

    owner: Expressions = field(repr=False)
    dtype: torch.dtype
    varying: bool
    cost: int
    text: str = ""
    args: tuple[Expr, ...] = ()
    buffer: Buffer | None = None
    offset: Affine = ZERO

    def __add__(self, other: Expr | float) -> Expr:
        return self._binary("{0} + {1}", other)

    def __sub__(self, other: Expr | float) -> Expr:
        return self._binary("{0} - {1}", other)

    def __mul__(self, other: Expr | float) -> Expr:
        return self._binary("{0} * {1}", other)

    def __truediv__(self, other: Expr | float) -> Expr:
        return self._binary("{0} / {1}", other, cost=COSTS["div"])

    def __neg__(self) -> Expr:
        return self.owner.apply("-{0}", self)

    def __lt__(self, other: Expr | float) -> Expr:
        return self._binary("{0} < {1}", other, torch.bool)

    def __le__(self, other: Expr | float) -> Expr:
        return self._binary("{0} <= {1}", other, torch.bool)

    def __gt__(self, other: Expr | float) -> Expr:
        return self._binary("{0} > {1}", other, torch.bool)

    def __ge__(self, other: Expr | float) -> Expr:
        return self._binary("{0} >= {1}", other, torch.bool)

    def equals(self, other: Expr | float) -> Expr:
        """Whether two numbers are equal."""
        return self._binary("{0} == {1}", other, torch.bool)

    def where(self, yes: Expr | float, no: Expr | float) -> Expr:
        """One of two numbers, of which at least one is an expression, by this truth value."""
        like = yes if isinstance(yes, Expr) else no
        assert isinstance(like, Expr)
        choices = (
            self.owner.number(value, like.dtype) if not isinstance(value, Expr) else value for value in (yes, no)
        )
        return self.owner.apply("{0} ? {1} : {2}", self, *choices, dtype=like.dtype)

    def call(self, name: str, cost: int = COSTS["call"]) -> Expr:
        """A function of C's library: ``exp`` is ``expf`` in single precision."""
        suffix = "f" if self.dtype is torch.float32 else ""
        return self.owner.apply(f"{name}{suffix}({{0}})", self, cost=cost)

    def to(self, dtype: torch.dtype) -> Expr:
        """The number converted."""
        if dtype is self.dtype:
            return self
        return self.owner.apply(f"({C_TYPES[dtype]}){{0}}", self, dtype=dtype, cost=0)

    def _binary(self, text: str, other: Expr | float, dtype: torch.dtype | None = None, *, cost: int = 1) -> Expr:
        second = other if isinstance(other, Expr) else self.owner.number(other, self.dtype)
        return self.owner.apply(text, self, second, dtype=dtype, cost=cost)


class Expressions:
    """Maker of expressions, each once."""

    def __init__(self) -> None:
        self._known: dict[Any, Expr] = {}

    def apply(self, text: str, *args: Expr, dtype: torch.dtype | None = None, cost: int = 1) -> Expr:
        """An operation, of its first argument's type if not told."""
        dtype = dtype or args[0].dtype
        key = (text, dtype, *args)
        known = self._known.get(key)
        if known is None:
            total = cost + sum(arg.cost for arg in args)
            known = Expr(self, dtype, any(arg.varying for arg in args), total, text, args)
            self._known[key] = known
        return known

    def number(self, value: float, dtype: torch.dtype) -> Expr:
        """A literal."""
        return self.apply(_literal(value, dtype), dtype=dtype, cost=0)

    def load(self, buffer: Buffer, offset: Affine) -> Expr:
        """An element of a buffer."""
        key = (buffer, offset)
        known = self._known.get(key)
        if known is None:
            varying = buffer.varying or any(expr.varying for expr, _ in offset.exprs)
            cost = sum(expr.cost for expr, _ in offset.exprs)
            known = Expr(self, buffer.dtype, varying, cost, buffer=buffer, offset=offset)
            self._known[key] = known
        return known

    def position(self, index: Affine) -> Expr:
        """An index as a number."""
        if index.is_const:
            return self.number(index.const, torch.int64)
        key = ("index", index)
        known = self._known.get(key)
        if known is None:
            varying = any(expr.varying for expr, _ in index.exprs)
            known = Expr(self, torch.int64, varying, 0, offset=index)
            self._known[key] = known
        return known


def _literal(value: float, dtype: torch.dtype) -> str:
    if dtype is torch.bool:
        return "1" if value else "0"
    if not dtype.is_floating_point:
        whole = int(value)
        return "(-INT64_C(9223372036854775807) - 1)" if whole == -(2**63) else f"INT64_C({whole})"
    value = float(value)
    if math.isnan(value):
        text = '__builtin_nan("")'
    elif math.isinf(value):
        text = "__builtin_inf()" if value > 0 else "(-__builtin_inf())"
    else:
        text = value.hex()
    return f"((float){text})" if dtype is torch.float32 else f"({text})"


# --- memory --------------------------------------------------------------------------------------------


@dataclass(eq=False, slots=True)
class Buffer:
    """Memory of one tensor.

    Attributes:
        number: Counts the buffers, or those of its kind.
        kind: Who owns it: an ``input``, a ``constant``, the ``work`` space of one call, an ``output``.
        size: Number of elements, of one row.
        varying: Whether there is one of it for each row.
        value: Of a constant.
    """

    number: int
    kind: str
    dtype: torch.dtype
    size: int
    varying: bool
    value: torch.Tensor | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Statement:
    """A loop nest that stores one number in each turn, or adds numbers up and stores their sum.

    Attributes:
        extents: Of the loops, outermost first.
        target: Where results are stored.
        offset: At which element.
        value: What.
        fold: What turns of the loops from number ``kept`` on are combined with: C text of ``{0}``, the result so far,
            and ``{1}``.
        start: What folding starts with.
        running: Store every intermediate result of folding.
        ordered: Turns may write to one element: they cannot be computed side by side.
        final: The element has its last value once it is stored.
    """

    extents: tuple[int, ...]
    target: Buffer
    offset: Affine
    value: Expr
    fold: str = ""
    start: Expr | None = None
    kept: int = 0
    running: bool = False
    ordered: bool = False
    final: bool = True


@dataclass(frozen=True, slots=True, eq=False)
class Call:
    """A function of the library of linear algebra, for every matrix of a batch.

    Attributes:
        extents: Of the batch.
        text: C, with pointers to the first elements of the tensors as ``{0}``, ``{1}``, ... and ``{lanes}``, by
            which distances between elements are to be multiplied.
        reads: Tensors that it reads, with the offset of each batch.
        writes: Tensors that it writes.
    """

    extents: tuple[int, ...]
    text: str
    reads: tuple[tuple[Buffer, Affine], ...]
    writes: tuple[tuple[Buffer, Affine], ...]

    @property
    def varying(self) -> bool:
        """Whether there is one for each row."""
        return any(buffer.varying for buffer, _ in self.writes)


# --- tensors -------------------------------------------------------------------------------------------


class Lazy:
    """A tensor that may not have been computed yet.

    Attributes:
        shape: Its shape.
        dtype: Its type.
        varying: Whether it differs from row to row.
        cost: Of one element.
    """

    def __init__(self, shape: Sequence[int], dtype: torch.dtype, varying: bool, cost: int) -> None:
        self.shape, self.dtype, self.varying, self.cost = tuple(shape), dtype, varying, cost

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def repeated(self) -> frozenset[int]:
        """Dimensions along which all elements are known to be equal."""
        return frozenset()

    def at(self, index: Index) -> Expr:
        """The element at an index."""
        raise NotImplementedError


class Computed(Lazy):
    """A tensor given by a formula."""

    def __init__(
        self,
        shape: Sequence[int],
        dtype: torch.dtype,
        varying: bool,
        cost: int,
        formula: Callable[[Index], Expr],
        repeated: frozenset[int] = frozenset(),
    ) -> None:
        super().__init__(shape, dtype, varying, cost)
        self._formula, self._repeated = formula, repeated
        self._known: dict[Index, Expr] = {}

    @property
    def repeated(self) -> frozenset[int]:
        """Dimensions along which all elements are known to be equal."""
        return self._repeated

    def at(self, index: Index) -> Expr:
        """The element at an index."""
        known = self._known.get(index)
        if known is None:
            known = self._known[index] = self._formula(index)
        return known


class Stored(Lazy):
    """A tensor in memory, or a view of one."""

    def __init__(
        self, expressions: Expressions, buffer: Buffer, shape: Sequence[int], strides: Sequence[int], offset: int = 0
    ) -> None:
        super().__init__(shape, buffer.dtype, buffer.varying, 0)
        self._expressions = expressions
        self.buffer, self.strides, self.offset = buffer, tuple(strides), offset

    def at(self, index: Index) -> Expr:
        """The element at an index."""
        return self._expressions.load(self.buffer, self.position(index))

    def position(self, index: Index) -> Affine:
        """Where the element at an index lies in the buffer."""
        result = Affine(self.offset)
        for one, stride in zip(index, self.strides, strict=True):
            result = result.plus(one.times(stride))
        return result

    def viewed(self, shape: Sequence[int], strides: Sequence[int], offset: int) -> Stored:
        """Another view of the same memory."""
        return Stored(self._expressions, self.buffer, shape, strides, offset)

    @property
    def repeated(self) -> frozenset[int]:
        """Dimensions along which all elements are known to be equal."""
        return frozenset(
            dim
            for dim, (size, stride) in enumerate(zip(self.shape, self.strides, strict=True))
            if size > 1 > stride >= 0
        )

    @property
    def is_contiguous(self) -> bool:
        """Whether the elements lie in order with no gaps."""
        return all(
            size == 1 or stride == wanted
            for size, stride, wanted in zip(self.shape, self.strides, strides_of(self.shape), strict=True)
        )


class Pieces(Lazy):
    """A sum of tensors of which each covers a part of the whole, and is zero elsewhere.

    Gradients of slices are: a sum of T of them costs T rather than T squared.
    """

    def __init__(
        self, shape: Sequence[int], dtype: torch.dtype, parts: Sequence[tuple[Lazy, Callable[[Stored], Lazy]]]
    ) -> None:
        super().__init__(shape, dtype, any(part.varying for part, _ in parts), 1)
        self.parts = tuple(parts)


def strides_of(shape: Sequence[int]) -> tuple[int, ...]:
    """Distances between elements of a contiguous tensor."""
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= max(size, 1)
    return tuple(reversed(strides))


def loads(expr: Expr) -> Iterator[Expr]:
    """All loads and indices in an expression, those inside their offsets included."""
    seen: set[Expr] = set()
    stack = [expr]
    while stack:
        one = stack.pop()
        if one in seen:
            continue
        seen.add(one)
        stack.extend(one.args)
        stack.extend(inner for inner, _ in one.offset.exprs)
        if not one.text:
            yield one
