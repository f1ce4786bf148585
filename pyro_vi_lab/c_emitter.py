"""Statements as the text of C functions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from pyro_vi_lab.c_builder import PRODUCT, SUM, Builder
from pyro_vi_lab.c_expressions import C_TYPES, Affine, Buffer, Call, Expr, Result, Statement
from pyro_vi_lab.c_library import prelude
from pyro_vi_lab.c_schedule import Group, grouped, live, loaded, placed
from pyro_vi_lab.errors import CompileError

LARGEST_STATEMENTS = 60_000
"""Statements beyond which a function is refused: a C compiler would take minutes."""
PART_COST = 2000
"""Cost of the expressions of one C function: compilers take more than twice as long for twice the function."""
STACK = 2**15
"""Bytes of working memory that a call takes from its stack; more is allocated."""
BLOCK = 4096
"""Numbers that are added up at once in a long sum, for accuracy; sums of blocks are added up in turn."""
SCALARS = 16
"""Buffers of at most so many elements, all at known places, are variables of C."""

PARAMETERS = "const void *const *in, void *const *out, vl_state *state, char *w, int *bad"
ARGUMENTS = "in, out, state, w, bad"


def emitted(b: Builder, inputs: Sequence[Result], outputs: Sequence[Result]) -> tuple[str, int]:
    """The C text of what a builder has recorded, and the number of its statements.

    The text defines ``int64_t vl_call(in, out, state)`` for one row or, if there are lanes, ``int64_t vl_rows(rows,
    in, out, state)``; a density also ``vl_density`` and ``vl_expand``, as nutpie calls them.
    """
    return _Emitter(b, inputs, outputs).text()


class _Emitter:
    def __init__(self, b: Builder, inputs: Sequence[Result], outputs: Sequence[Result]) -> None:
        self.lanes, self.inputs, self.outputs = b.lanes, inputs, outputs
        self.output_buffers = b.outputs
        statements = live(b.statements, b.outputs)
        self.num_statements = len(statements)
        if len(statements) > LARGEST_STATEMENTS:
            raise CompileError(
                f"the graph is too large: {len(statements)} statements, and {LARGEST_STATEMENTS} are the most"
            )
        groups = grouped(statements, b.lanes)
        # what is the same for all rows is computed once, before them
        self.groups = [group for group in groups if not self._per_row(group)]
        self.num_uniform = len(self.groups)
        self.groups += [group for group in groups if self._per_row(group)]
        self.parts = list(self._parts())
        self.loaded = [loaded(group) for group in self.groups]
        self._find_memory()
        self.num_names = 0

    def _per_row(self, group: Group) -> bool:
        return self.lanes > 1 and group.varying

    def _parts(self) -> Iterator[range]:
        """Groups of each C function."""
        first, cost = 0, 0
        for number, group in enumerate(self.groups):
            here = sum(statement.value.cost + 2 for statement in group.statements) + 10
            if number > first and (cost + here > PART_COST or number == self.num_uniform):
                yield range(first, number)
                first, cost = number, 0
            cost += here
        if self.groups:
            yield range(first, len(self.groups))

    # --- where buffers are

    def _find_memory(self) -> None:
        """Decide which buffers are stored at all, which are variables, and where in memory the others are."""
        read: dict[Buffer, None] = dict.fromkeys(self.output_buffers)
        addressed: set[Buffer] = set(self.output_buffers)
        parts: dict[Buffer, set[int]] = {}
        lives: dict[Buffer, tuple[int, int]] = {}
        for part, numbers in enumerate(self.parts):
            for number in numbers:
                group = self.groups[number]
                if group.call is not None:
                    members = dict.fromkeys(buffer for buffer, _ in (*group.call.reads, *group.call.writes))
                    read.update(members)
                    addressed.update(members)
                for buffer, offset in (place for places in self.loaded[number] for place in places):
                    read[buffer] = None
                    if not offset.is_const:
                        addressed.add(buffer)
                for statement in group.statements:
                    if not statement.offset.is_const:
                        addressed.add(statement.target)
                for buffer in group.buffers:
                    parts.setdefault(buffer, set()).add(part)
                    first, _ = lives.get(buffer, (number, number))
                    lives[buffer] = (first, number)
        self.stored = read
        self.scalars = {
            buffer
            for buffer in read
            if buffer.kind == "work"
            and buffer not in addressed
            and not (buffer.varying and self.lanes > 1)
            and buffer.size <= SCALARS
            and len(parts.get(buffer, ())) == 1
        }
        last = len(self.groups)
        for buffer in self.output_buffers:
            lives[buffer] = (lives.get(buffer, (0, 0))[0], last)
        if self.lanes > 1:
            for buffer, (first, end) in lives.items():
                if not buffer.varying and end >= self.num_uniform:
                    lives[buffer] = (first, last)
        self.x = Buffer(-1, "input", self.inputs[0].dtype, 0, True) if self.inputs else None
        memory = {
            buffer: span
            for buffer, span in lives.items()
            if buffer in read and buffer.kind == "work" and buffer not in self.scalars
        }
        if self.lanes > 1:
            for buffer in lives:
                if buffer.kind == "input" and buffer.varying:
                    memory[buffer] = (0, last)
                    self.x = buffer
        self.places, self.work = placed(memory, self.lanes)

    def _name(self, kind: str) -> str:
        self.num_names += 1
        return f"{kind}{self.num_names}"

    def _pointer(self, buffer: Buffer) -> str:
        return {"work": "m", "input": "in", "output": "out", "constant": "c"}[buffer.kind] + str(buffer.number)

    def _declaration(self, buffer: Buffer, written: bool) -> str:
        ctype = C_TYPES[buffer.dtype]
        const = "" if written else "const "
        if buffer in self.places:
            base = f"__builtin_assume_aligned(w + {self.places[buffer]}, 64)"
        else:
            base = {
                "input": f"in[{buffer.number}]",
                "output": f"out[{buffer.number}]",
                "constant": f"state->constants[{buffer.number}]",
            }[buffer.kind]
        return f"{const}{ctype} *restrict const {self._pointer(buffer)} = ({const}{ctype} *){base};"

    # --- functions

    def text(self) -> tuple[str, int]:
        parts = []
        for number, groups in enumerate(self.parts):
            # several stay apart: a compiler would make one long function of them again
            alone = "" if len(self.parts) == 1 else "__attribute__((noinline)) "
            lines = [f"{alone}static void part{number}({PARAMETERS}) {{"]
            scalars: dict[Buffer, None] = {}
            body: list[str] = []
            for group in groups:
                body += self._group(group)
                scalars.update(dict.fromkeys(one for one in self.groups[group].buffers if one in self.scalars))
            for buffer in scalars:
                names = ", ".join(f"s{buffer.number}_{place}" for place in range(buffer.size))
                lines.append(f"{C_TYPES[buffer.dtype]} {names};")
            parts.append("\n".join([*lines, *body, "}"]))
        body_text = "\n".join([*parts, *(self._rows() if self.lanes > 1 else self._call())])
        return prelude(body_text) + body_text + "\n", self.num_statements

    def _workspace(self) -> tuple[list[str], list[str]]:
        if self.work > STACK:
            # rounded up by hand: aligned_alloc is not everywhere
            begin = [
                f"char *const block = malloc({self.work + 64});",
                "if (!block) return 2;",
                "char *const w = block + (64 - (uint64_t)block % 64);",
            ]
            return begin, ["free(block);"]
        return [f"char w[{max(self.work, 64)}] __attribute__((aligned(64)));"], []

    def _call(self) -> list[str]:
        begin, end = self._workspace()
        lines = [
            "int64_t vl_call(const void *const *in, void *const *out, vl_state *state) {",
            "int flag = 0, *const bad = &flag;",
            *begin,
            *(f"part{number}({ARGUMENTS});" for number in range(len(self.parts))),
            *end,
            "return flag;",
            "}",
        ]
        return lines + (self._density() if self._is_density() else [])

    def _is_density(self) -> bool:
        if len(self.inputs) != 1 or len(self.outputs) != 2:
            return False
        (x,), (value, grad) = self.inputs, self.outputs
        same = x.dtype in (torch.float64, torch.float32) and value.dtype is x.dtype and grad.dtype is x.dtype
        return same and len(x.shape) == 1 and value.shape == () and grad.shape == x.shape

    def _density(self) -> list[str]:
        (dim,) = self.inputs[0].shape
        ctype = C_TYPES[self.inputs[0].dtype]
        size = max(dim, 1)
        lines = [
            "int64_t vl_density(uint64_t dim, const double *x, double *grad, double *value, void *user) {",
            f"if (dim != {dim}) return -1;",
            "__atomic_fetch_add(&((vl_state *)user)->calls, 1, __ATOMIC_RELAXED);",
        ]
        if ctype == "double":
            lines += ["const void *in[] = {x};", "void *out[] = {value, grad};"]
        else:
            lines += [
                f"float point[{size}], slope[{size}], height;",
                f"for (long i = 0; i < {dim}; ++i) point[i] = (float)x[i];",
                "const void *in[] = {point};",
                "void *out[] = {&height, slope};",
            ]
        lines += ["const int64_t failed = vl_call(in, out, user);", "if (failed) return -1 - failed;"]
        if ctype != "double":
            lines += [f"for (long i = 0; i < {dim}; ++i) grad[i] = slope[i];", "*value = height;"]
        lines += [
            "double wrong = 0; /* not finite if one of them is not */",
            f"for (long i = 0; i < {dim}; ++i) wrong += 0 * grad[i];",
            "if (wrong != wrong) return 3;",
            "return *value - *value == 0 ? 0 : 4;",
            "}",
            "int64_t vl_expand(uint64_t dim, uint64_t expanded, const double *x, double *out, void *user) {",
            f"if (dim != {dim} || expanded != {dim}) return -1;",
            f"for (long i = 0; i < {dim}; ++i) out[i] = x[i];",
            "return 0;",
            "}",
        ]
        return lines

    def _rows(self) -> list[str]:
        begin, end = self._workspace()
        lanes, x = self.lanes, self.inputs[0]
        size, ctype = _size(x), C_TYPES[x.dtype]
        uniform = [n for n, groups in enumerate(self.parts) if groups.start < self.num_uniform]
        varying = [n for n, groups in enumerate(self.parts) if groups.start >= self.num_uniform]
        lines = [
            "int64_t vl_rows(int64_t rows, const void *const *in, void *const *out, vl_state *state) {",
            "int flag = 0, *const bad = &flag;",
            *begin,
            *(f"part{number}({ARGUMENTS});" for number in uniform),
            f"for (int64_t row = 0; row < rows; row += {lanes}) {{",
            f"const long count = rows - row < {lanes} ? rows - row : {lanes};",
        ]
        if self.x in self.places:
            assert self.x is not None
            lines += [
                f"const {ctype} *const x = (const {ctype} *)in[0] + row * {size};",
                f"{ctype} *const side = ({ctype} *)(w + {self.places[self.x]});",
                f"for (long l = 0; l < {lanes}; ++l) for (long i = 0; i < {size}; ++i)",
                f"side[i * {lanes} + l] = x[(l < count ? l : count - 1) * {size} + i];",
            ]
        lines += [f"part{number}({ARGUMENTS});" for number in varying]
        for number, (buffer, result) in enumerate(zip(self.output_buffers, self.outputs, strict=True)):
            ctype, size = C_TYPES[result.dtype], _size(result)
            place = f"i * {lanes} + l" if buffer.varying else "i"
            lines += [
                f"{{ {ctype} *const y = ({ctype} *)out[{number}] + row * {size};",
                f"const {ctype} *const side = (const {ctype} *)(w + {self.places[buffer]});",
                f"for (long l = 0; l < count; ++l) for (long i = 0; i < {size}; ++i) "
                f"y[l * {size} + i] = side[{place}]; }}",
            ]
        return [*lines, "}", *end, "return flag;", "}"]

    # --- one loop nest

    def _group(self, number: int) -> list[str]:
        group = self.groups[number]
        written: set[Buffer] = set()
        used: dict[Buffer, None] = {}
        if group.call is not None:
            used.update(dict.fromkeys(buffer for buffer, _ in group.call.reads))
            written.update(buffer for buffer, _ in group.call.writes)
        for statement, places in zip(group.statements, self.loaded[number], strict=True):
            used.update(dict.fromkeys(buffer for buffer, _ in places if buffer not in self.scalars))
            if statement.target in self.stored and statement.target not in self.scalars:
                written.add(statement.target)
        used.update(dict.fromkeys(sorted(written, key=lambda buffer: buffer.number)))
        lines = ["{", *(self._declaration(buffer, buffer in written) for buffer in used)]
        if group.call is not None:
            lines += self._call_lines(group.call)
        else:
            lines += _Loops(self, group).lines()
        return [*lines, "}"]

    def _call_lines(self, call: Call) -> list[str]:
        pointers = []
        for buffer, offset in (*call.reads, *call.writes):
            lanes = self.lanes if buffer.varying else 1
            place = _affine(offset.times(lanes), [])
            pointers.append(f"&{self._pointer(buffer)}[{place}{' + l' if lanes > 1 else ''}]")
        lines = [_for(f"i{loop}", extent) for loop, extent in enumerate(call.extents)]
        if self.lanes > 1 and call.varying:
            lines.append(_for("l", self.lanes))
        text = call.text.format(*pointers)
        return ["void (*const *const lapack)(void) = state->lapack; (void)lapack;", *lines, f"{text};"]


class _Loops:
    """The loop nest of one group."""

    def __init__(self, emitter: _Emitter, group: Group) -> None:
        self.emitter, self.group = emitter, group
        self.varying = emitter.lanes > 1 and group.varying
        self.known: dict[Expr, str] = {}
        self.forwarded: dict[tuple[Buffer, Affine], str] = {}
        self.sums: dict[Statement, str] = {one: emitter._name("a") for one in group.statements if one.fold}
        self.dropped = self._collapsed()

    def _collapsed(self) -> set[int]:
        """Loops that are run as one with the next: all offsets move on in even steps from one turn to the next."""
        extents = self.group.extents
        steps: set[tuple[int, ...]] = set()
        seen: set[Expr] = set()
        stack = [statement.value for statement in self.group.statements]
        for statement in self.group.statements:
            steps.add(tuple(statement.offset.coefficient(loop) for loop in range(len(extents))))
            stack += [expr for expr, _ in statement.offset.exprs]
        while stack:
            one = stack.pop()
            if one in seen:
                continue
            seen.add(one)
            stack += [*one.args, *(expr for expr, _ in one.offset.exprs)]
            if not one.text:
                steps.add(tuple(one.offset.coefficient(loop) for loop in range(len(extents))))
        kept = {statement.kept for statement in self.sums}
        return {
            loop
            for loop in range(len(extents) - 1)
            if loop + 1 not in kept and all(step[loop] == step[loop + 1] * extents[loop + 1] for step in steps)
        }

    def _loop_extents(self) -> list[tuple[int, int]]:
        """Number and extent of every loop that is left."""
        result, run = [], 1
        for loop, extent in enumerate(self.group.extents):
            run *= extent
            if loop not in self.dropped:
                result.append((loop, run))
                run = 1
        return result

    def lines(self) -> list[str]:
        loops = self._loop_extents()
        body = self._body()
        lanes = self.emitter.lanes
        sums = list(self.sums)
        plain = not self.group.ordered and not self.group.checked
        if self.varying:
            body = ["" if self.group.checked else '_Pragma("omp simd")', _for("l", lanes) + " {", *body, "}"]
            simd = False
        else:
            simd = plain and all(one.fold in (SUM, PRODUCT) for one in sums)
        lines = body
        for position in reversed(range(len(loops))):
            loop, extent = loops[position]
            innermost = position == len(loops) - 1
            if innermost and simd and extent > 1:
                lines = self._vector_loop(loop, extent, lines)
            else:
                lines = [_for(f"i{loop}", extent) + " {", *lines, "}"]
            started = [one for one in sums if one.kept in self._depths(position, loops)]
            lines = [*self._starts(started), *lines, *self._ends(started)]
        if not loops:
            started = sums
            lines = [*self._starts(started), *lines, *self._ends(started)]
        return [line for line in lines if line]

    def _depths(self, position: int, loops: list[tuple[int, int]]) -> set[int]:
        """Numbers of kept loops of sums that start just outside the loop at this position."""
        before = loops[position - 1][0] + 1 if position else 0
        return set(range(before, loops[position][0] + 1))

    def _vector_loop(self, loop: int, extent: int, body: list[str]) -> list[str]:
        inner = [one for one in self.sums if one.kept < len(self.group.extents)]
        clause = "".join(f" reduction({'+' if one.fold == SUM else '*'}:{self.sums[one]})" for one in inner)
        pragma = f'_Pragma("omp simd{clause}")'
        if extent <= 2 * BLOCK or not inner or any(one.fold != SUM for one in inner):
            return [pragma, _for(f"i{loop}", extent) + " {", *body, "}"]
        totals = [(self.sums[one], C_TYPES[one.value.dtype]) for one in inner]
        return [
            f"for (long from = 0; from < {extent}; from += {BLOCK}) {{",
            f"const long to = from + {BLOCK} < {extent} ? from + {BLOCK} : {extent};",
            *(f"{ctype} {name}_whole = {name}; {name} = 0;" for name, ctype in totals),
            pragma,
            f"for (long i{loop} = from; i{loop} < to; ++i{loop}) {{",
            *body,
            "}",
            *(f"{name} += {name}_whole;" for name, _ in totals),
            "}",
        ]

    def _starts(self, sums: Sequence[Statement]) -> list[str]:
        lines = []
        for one in sums:
            assert one.start is not None
            ctype, name = C_TYPES[one.value.dtype], self.sums[one]
            if self.varying:
                lines.append(f"{ctype} {name}[{self.emitter.lanes}];")
                lines.append(f"{_for('l', self.emitter.lanes)} {name}[l] = {one.start.text};")
            else:
                lines.append(f"{ctype} {name} = {one.start.text};")
        return lines

    def _ends(self, sums: Sequence[Statement]) -> list[str]:
        lines = []
        for one in sums:
            if one.running or one.target not in self.emitter.stored:
                continue
            name = self.sums[one]
            if self.varying:
                place = self._place(one.target, one.offset)
                lines.append(f"{_for('l', self.emitter.lanes)} {place} = {name}[l];")
            else:
                lines.append(f"{self._place(one.target, one.offset)} = {name};")
        return lines

    def _body(self) -> list[str]:
        lines: list[str] = []
        for one in self.group.statements:
            value = self._value(one.value, lines)
            if one.fold:
                name = self.sums[one] + ("[l]" if self.varying else "")
                lines.append(f"{name} = {one.fold.format(name, value)};")
                if not one.running:
                    continue
                value = name
            name = value
            if one.fold or not value.isidentifier() or one.value.dtype is not one.target.dtype:
                name = self.emitter._name("v")
                lines.append(f"const {C_TYPES[one.target.dtype]} {name} = {value};")
            place = self._place(one.target, one.offset, lines) if one.target in self.emitter.stored else ""
            if place:
                lines.append(f"{place} = {name};")
            if one.value.args and any(arg.buffer is one.target for arg in one.value.args):
                self.known.pop(one.value, None)  # what was added to has changed
            if one.final:
                self.forwarded[one.target, one.offset] = name
            else:
                self.forwarded.pop((one.target, one.offset), None)
        return lines

    def _value(self, expr: Expr, lines: list[str]) -> str:
        if expr.text and not expr.args:
            return expr.text
        if expr in self.known:
            return self.known[expr]
        if expr.buffer is not None:
            name = self.forwarded.get((expr.buffer, expr.offset))
            return name if name is not None else self._place(expr.buffer, expr.offset, lines)
        if not expr.text:
            place = self._index(expr.offset, 1, lines)
            return f"((int64_t)({place}))"
        text = expr.text.format(*(self._value(arg, lines) for arg in expr.args))
        name = self.emitter._name("t")
        lines.append(f"const {C_TYPES[expr.dtype]} {name} = {text};")
        self.known[expr] = name
        return name

    def _place(self, buffer: Buffer, offset: Affine, lines: list[str] | None = None) -> str:
        if buffer in self.emitter.scalars:
            return f"s{buffer.number}_{offset.const}"
        lanes = self.emitter.lanes if buffer.varying else 1
        index = self._index(offset, lanes, [] if lines is None else lines)
        return f"{self.emitter._pointer(buffer)}[{index}{' + l' if lanes > 1 else ''}]"

    def _index(self, offset: Affine, factor: int, lines: list[str]) -> str:
        terms = [(self._value(expr, lines), coefficient) for expr, coefficient in offset.exprs]
        kept = Affine(offset.const, tuple(term for term in offset.loops if term[0] not in self.dropped))
        scaled = [(name, coefficient * factor) for name, coefficient in terms]
        return _affine(kept.times(factor), scaled)


def _affine(offset: Affine, more: list[tuple[str, int]]) -> str:
    terms = [(f"i{loop}", coefficient) for loop, coefficient in offset.loops] + more
    texts = [one if coefficient == 1 else f"{coefficient} * {one}" for one, coefficient in terms if coefficient]
    if offset.const or not texts:
        texts.append(str(offset.const))
    return " + ".join(texts)


def _for(name: str, extent: int) -> str:
    return f"for (long {name} = 0; {name} < {extent}; ++{name})"


def _size(result: Result) -> int:
    size = 1
    for extent in result.shape:
        size *= extent
    return size
