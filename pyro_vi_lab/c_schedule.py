"""In which order statements run: neighbors with the same loops share them, and what only they use is never stored."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from pyro_vi_lab.c_expressions import C_TYPES, Affine, Buffer, Call, Expr, Statement, loads

LARGEST_GROUP = 64
"""Statements that share one loop; in straight-line code twice as many."""
ALIGNMENT = 64
"""Bytes: a cache line, and the widest vector register."""


@dataclass(eq=False)
class Group:
    """Statements in one loop nest, or one call.

    Attributes:
        extents: Of the loops.
        varying: Whether it runs for every row.
        ordered: Whether turns must run one after another.
        checked: Whether indices are checked, which is reported in one place for all turns and rows.
        statements: In order.
        call: Instead of statements.
    """

    extents: tuple[int, ...]
    varying: bool
    ordered: bool
    checked: bool = False
    statements: list[Statement] = field(default_factory=list)
    call: Call | None = None

    @property
    def buffers(self) -> dict[Buffer, None]:
        """All memory that is read or written, whether or not in the end it needs a place."""
        if self.call is not None:
            return dict.fromkeys(buffer for buffer, _ in (*self.call.reads, *self.call.writes))
        found: dict[Buffer, None] = {}
        for statement in self.statements:
            found[statement.target] = None
            for load in statement_loads(statement):
                if load.buffer is not None:
                    found[load.buffer] = None
        return found


@dataclass(eq=False)
class Writers:
    """Which groups write a buffer, and at which constant offsets."""

    last: int = -1
    by_offset: dict[int, int] = field(default_factory=dict)
    in_last: list[Statement] = field(default_factory=list)
    only_constant: bool = True


def statement_loads(statement: Statement) -> list[Expr]:
    """Loads of a statement, those in its offset included."""
    found = list(loads(statement.value))
    for expr, _ in statement.offset.exprs:
        found += loads(expr)
    return found


def live(statements: Sequence[Statement | Call], outputs: Sequence[Buffer]) -> list[Statement | Call]:
    """Statements without those whose results nobody reads."""
    needed = set(outputs)
    kept: list[Statement | Call] = []
    for one in reversed(statements):
        if isinstance(one, Call):
            if any(buffer in needed for buffer, _ in one.writes):
                needed.update(buffer for buffer, _ in one.reads)
                kept.append(one)
        elif one.target in needed:
            needed.update(load.buffer for load in statement_loads(one) if load.buffer is not None)
            kept.append(one)
    return kept[::-1]


def grouped(statements: Sequence[Statement | Call], lanes: int) -> list[Group]:
    """Statements in groups, each in the first one that all it needs allows."""
    groups: list[Group] = []
    by_key: dict[Any, list[int]] = {}
    writers: dict[Buffer, Writers] = {}
    for one in statements:
        if isinstance(one, Call):
            groups.append(Group(one.extents, one.varying, True, call=one))
            for buffer, _ in one.writes:
                record = writers.setdefault(buffer, Writers())
                record.last, record.only_constant, record.in_last = len(groups) - 1, False, []
            continue
        found = statement_loads(one)
        first = _first_group(one, found, writers)
        checked = any("bad" in expr.text for expr in _applied(one))
        key = (one.extents, one.target.varying and lanes > 1, one.ordered, checked)
        candidates = by_key.setdefault(key, [])
        number = next(
            (
                candidate
                for candidate in candidates[bisect_left(candidates, first) :]
                if len(groups[candidate].statements) < LARGEST_GROUP * (1 if one.extents else 2)
            ),
            len(groups),
        )
        if number == len(groups):
            groups.append(Group(*key))
            candidates.append(number)
        groups[number].statements.append(one)
        record = writers.setdefault(one.target, Writers())
        if number > record.last:
            record.last, record.in_last = number, []
        record.in_last.append(one)
        if one.offset.is_const and not one.fold:
            record.by_offset[one.offset.const] = number
        else:
            record.only_constant = False
    return groups


def _applied(statement: Statement) -> list[Expr]:
    """Operations in the offsets of a statement and of its loads, where indices may be checked, and in its value."""
    stack = [statement.value, *(expr for expr, _ in statement.offset.exprs)]
    seen: set[Expr] = set()
    while stack:
        one = stack.pop()
        if one not in seen:
            seen.add(one)
            stack += [*one.args, *(expr for expr, _ in one.offset.exprs)]
    return list(seen)


def _first_group(statement: Statement, found: Sequence[Expr], writers: dict[Buffer, Writers]) -> int:
    first = 0
    accumulates = False
    for load in found:
        record = writers.get(load.buffer) if load.buffer is not None else None
        if record is None:
            continue
        if load.buffer is statement.target and load.offset == statement.offset:
            accumulates = True
        if record.only_constant and load.offset.is_const:
            first = max(first, record.by_offset.get(load.offset.const, 0))
        else:
            first = max(first, record.last + (not _same_element(load.offset, record.in_last)))
    record = writers.get(statement.target)
    if record is not None and not accumulates:
        disjoint = statement.offset.is_const and record.only_constant and statement.offset.const not in record.by_offset
        first = max(first, 0 if disjoint else record.last + 1)
    return first


def _same_element(offset: Affine, statements: Sequence[Statement]) -> bool:
    """Whether exactly one statement of the group writes where ``offset`` reads, in the same turn of the loops."""
    if len(statements) != 1:
        # several: they may overlap, unless they are one after another at the very same place
        return bool(statements) and all(_writes(offset, one) for one in statements)
    return _writes(offset, statements[0])


def _writes(offset: Affine, statement: Statement) -> bool:
    return statement.offset == offset and statement.final and (not statement.fold or statement.running)


def loaded(group: Group) -> list[dict[tuple[Buffer, Affine], None]]:
    """Elements that each statement of a group reads from memory, in order: those not just computed in the same turn."""
    written: set[tuple[Buffer, Affine]] = set()
    result: list[dict[tuple[Buffer, Affine], None]] = []
    for statement in group.statements:
        places = ((load.buffer, load.offset) for load in statement_loads(statement) if load.buffer is not None)
        result.append(dict.fromkeys(place for place in places if place not in written))
        if statement.final and (not statement.fold or statement.running):
            written.add((statement.target, statement.offset))
    return result


# --- memory --------------------------------------------------------------------------------------------


def size_in_bytes(buffer: Buffer, lanes: int) -> int:
    """Memory of a buffer, rounded up."""
    item = {"_Bool": 1, "float": 4, "int32_t": 4}.get(C_TYPES[buffer.dtype], 8)
    size = max(1, buffer.size) * item * (lanes if buffer.varying else 1)
    return -(-size // ALIGNMENT) * ALIGNMENT


def placed(lives: dict[Buffer, tuple[int, int]], lanes: int) -> tuple[dict[Buffer, int], int]:
    """Offsets of buffers in one block of memory, and its size; those that do not live together share places."""
    offsets: dict[Buffer, int] = {}
    busy: list[tuple[int, int, int]] = []  # start, end, last group; by start
    total, now = 0, -1
    for buffer, (first, last) in sorted(lives.items(), key=lambda item: item[1]):
        if first > now:
            busy, now = [place for place in busy if place[2] >= first], first
        size, start = size_in_bytes(buffer, lanes), 0
        for begin, end, _ in busy:
            if begin - start >= size:
                break
            start = max(start, end)
        offsets[buffer] = start
        insort(busy, (start, start + size, last))
        total = max(total, start + size)
    return offsets, total
