"""A graph of ATen operators with static shapes as the text of a C function."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._decomp import core_aten_decompositions
from torch.func import functionalize
from torch.fx import GraphModule, Interpreter, Node
from torch.fx.experimental.proxy_tensor import make_fx

from pyro_vi_lab.c_builder import Builder
from pyro_vi_lab.c_emitter import emitted
from pyro_vi_lab.c_expressions import C_TYPES, Lazy, Pieces, Result
from pyro_vi_lab.c_operators import OPERATORS, VIEWS
from pyro_vi_lab.errors import CompileError
from pyro_vi_lab.isolation import default_dtype

LARGEST_GRAPH = 30_000
"""Operators beyond which a graph is refused: a C compiler would take minutes."""
CHEAP = 2
"""Elements of such a cost, in multiplications, are computed again rather than stored."""

_ALIASES = {*VIEWS, *(f"aten.{name}.default" for name in ("alias", "detach", "lift_fresh"))}


@dataclass(frozen=True)
class Source:
    """C text of a graph.

    Attributes:
        text: The C source; it does not depend on the data.
        constants: Tensors whose addresses it is given, in order.
        inputs: Shapes and types of the inputs, of one row.
        outputs: Shapes and types of the outputs, of one row.
        lanes: Rows that are computed side by side.
        num_statements: Size of the function.
    """

    text: str
    constants: tuple[Tensor, ...]
    inputs: tuple[Result, ...]
    outputs: tuple[Result, ...]
    lanes: int
    num_statements: int


def c_source(module: GraphModule, example: Sequence[Tensor], *, lanes: int = 1) -> Source:
    """Write a graph as C.

    Args:
        module: A graph of ATen operators, ``f(x, *data)``.
        example: Inputs of the shapes and types that it is for.
        lanes: Rows that are computed side by side; the function then takes many rows of ``x``, and the same data for
            all of them.

    Raises:
        CompileError: An operator or a type is not supported, or the graph is too large.
    """
    if any(tensor.device.type != "cpu" for tensor in example):
        raise CompileError(f"tensors on {example[0].device}: C code runs on the CPU alone")
    _check_size(module)
    with torch.no_grad(), default_dtype(example[0].dtype if example[0].is_floating_point() else torch.float64):
        unknown = _unknown(module)
        if unknown:
            module = _lowered(module, example)
            _check_size(module)
            if unknown := _unknown(module):
                raise CompileError(f"operator {unknown[0]} cannot be written in C")
        results = _Shapes(module).of(example)
        builder = Builder(lanes)
        outputs = _translated(builder, module, example, results)
    text, num_statements = emitted(builder, [Result(tuple(x.shape), x.dtype) for x in example], outputs)
    return Source(
        text,
        tuple(builder.constants),
        tuple(Result(tuple(x.shape), x.dtype) for x in example),
        tuple(outputs),
        lanes,
        num_statements,
    )


def _check_size(module: GraphModule) -> None:
    count = sum(node.op == "call_function" for node in module.graph.nodes)
    if count > LARGEST_GRAPH:
        raise CompileError(f"the graph is too large: {count} operators, and {LARGEST_GRAPH} are the most")


# --- what is not in the table --------------------------------------------------------------------------


def _name(node: Node) -> str:
    """The operator's name in the table: of one that works in place, that of the same one that does not."""
    name = str(node.target)
    schema = getattr(node.target, "_schema", None)
    if schema is None or not schema.is_mutable:
        return name
    space, own, overload = name.split(".")
    return f"{space}.{own[:-1]}.{overload}" if own.endswith("_") else name


def _works_in_place(node: Node) -> bool:
    return node.op == "call_function" and _name(node) != str(node.target)


def _unknown(module: GraphModule) -> list[str]:
    """Operators that are not in the table, or that write to a tensor which has views or is not the graph's own."""
    found: list[str] = []
    root: dict[Node, Node] = {}
    viewed: set[Node] = set()
    for node in module.graph.nodes:
        root[node] = node
        if node.op != "call_function":
            continue
        source = node.args[0] if node.args and isinstance(node.args[0], Node) else None
        if node.target is operator.getitem and source is not None:
            root[node] = root[source]
            continue
        name = _name(node)
        if name not in OPERATORS:
            found.append(str(node.target))
        elif _works_in_place(node):
            assert source is not None
            root[node] = root[source]
            if root[source] in viewed or root[source].op != "call_function":
                found.append(f"{node.target} on a view")
        elif name in _ALIASES and source is not None:
            root[node] = root[source]
            viewed.add(root[source])
    return found


def _lowered(module: GraphModule, example: Sequence[Tensor]) -> GraphModule:
    """The graph without writing in place, and with operators that are not in the table written out."""
    table = {target: rule for target, rule in core_aten_decompositions().items() if str(target) not in OPERATORS}
    function: Callable[..., Any] = functionalize(module, remove="mutations")
    try:
        lowered = make_fx(function, decomposition_table=table)(*example)
    except (RuntimeError, NotImplementedError, TypeError, ValueError) as error:
        raise CompileError(f"the graph cannot be lowered: {str(error).strip().splitlines()[0]}") from error
    lowered.graph.eliminate_dead_code()
    return lowered


class _Shapes(Interpreter):
    """Runs a graph once, for the shapes and types of its results."""

    def of(self, example: Sequence[Tensor]) -> dict[Node, Any]:
        self.results: dict[Node, Any] = {}
        self.run(*(x.detach().clone() for x in example))
        return self.results

    def run_node(self, n: Node) -> Any:
        value = super().run_node(n)
        self.results[n] = _result(value)
        return value


def _result(value: Any) -> Any:
    if isinstance(value, Tensor):
        return Result(tuple(value.shape), value.dtype)
    if isinstance(value, (tuple, list)):
        return tuple(_result(one) for one in value)
    return None


# --- from operators to lazy tensors --------------------------------------------------------------------


def _translated(
    b: Builder, module: GraphModule, example: Sequence[Tensor], results: Mapping[Node, Any]
) -> list[Result]:
    values: dict[Node, Any] = {}
    same: dict[Any, list[Any]] = {}  # nodes that are one tensor
    uses = _uses(module)
    inputs = iter(enumerate(example))
    outputs: list[Result] = []
    for node in module.graph.nodes:
        if node.op == "placeholder":
            number, tensor = next(inputs)
            _check_type(tensor.dtype)
            values[node] = b.input(number, tensor.shape, tensor.dtype, varying=number == 0)
        elif node.op == "get_attr":
            constant = getattr(module, str(node.target))
            _check_type(constant.dtype)
            values[node] = b.constant(constant)
        elif node.op == "call_function":
            value = _called(b, node, values, results[node])
            if isinstance(value, Lazy) and uses[node] > 1 and _is_worth_storing(value):
                value = b.stored(value)
            values[node] = value
            if _works_in_place(node):  # whoever asks for the tensor that was written means the new one
                names = same.setdefault(node.args[0], [node.args[0]])
                names.append(node)
                same[node] = names
                values.update(dict.fromkeys(names, value))
        elif node.op == "output":
            flat = node.args[0] if isinstance(node.args[0], (tuple, list)) else (node.args[0],)
            for number, one in enumerate(flat):
                if not isinstance(one, Node) or not isinstance(values.get(one), Lazy):
                    raise CompileError("an output that is not a tensor")
                result = results[one]
                b.output(number, b.reshape(values[one], result.shape))
                outputs.append(result)
        else:
            raise CompileError(f"a node of kind {node.op}")
    return outputs


def _is_worth_storing(value: Lazy) -> bool:
    return isinstance(value, Pieces) or value.cost > (CHEAP if value.size > 1 else 0)


def _check_type(dtype: torch.dtype) -> None:
    if dtype not in C_TYPES:
        raise CompileError(f"tensors of type {dtype}")


def _called(b: Builder, node: Node, values: Mapping[Node, Any], result: Any) -> Any:
    args: Any
    kwargs: Any
    args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), lambda source: values[source])
    if node.target is operator.getitem:
        return args[0][args[1]]
    for one in result if isinstance(result, tuple) and not isinstance(result, Result) else (result,):
        if isinstance(one, Result):
            _check_type(one.dtype)
    try:
        value = OPERATORS[_name(node)](b, result, *args, **kwargs)
    except (TypeError, ValueError, LookupError) as error:  # arguments that the table does not foresee
        raise CompileError(f"operator {node.target} cannot be written in C with these arguments: {error}") from error
    if isinstance(value, Lazy) and (value.shape, value.dtype) != result:
        raise CompileError(f"operator {node.target} gave {value.shape}, {value.dtype} instead of {result}")
    return value


def _uses(module: GraphModule) -> dict[Node, int]:
    """By how many operators a result is read, itself or through views."""
    uses: dict[Node, int] = {}
    for node in reversed(module.graph.nodes):
        uses[node] = sum(
            uses[user] if user.op == "call_function" and (_name(user) in _ALIASES or _works_in_place(user)) else 1
            for user in node.users
        )
    return uses
