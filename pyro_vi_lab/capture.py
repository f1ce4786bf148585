"""A Pyro computation run once and kept as a graph of ATen operators.

Pyro's effect handlers run in Python at every step; the arithmetic of a small model is a small part of that. A graph
holds the arithmetic alone. It is run row by row, or vectorized over a batch by ``torch.vmap``; one that is called often
is handed to TorchScript's interpreter (C++, no compiler needed, no interpreter lock).
"""

from __future__ import annotations

import copy
import operator
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import cache, cached_property
from typing import Any

import torch
from torch import Tensor
from torch._decomp import get_decompositions
from torch.fx import GraphModule, Node
from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing, make_fx
from torch.fx.passes.dialect.common.cse_pass import CSEPass
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary

from pyro_vi_lab.errors import CaptureError
from pyro_vi_lab.isolation import default_dtype
from pyro_vi_lab.user_errors import is_indefinite, user_line

Function = Callable[..., tuple[Tensor, ...]]

HOT_CALLS = 60
"""Calls of one batch shape after which the batch gets a graph of its own: what that graph costs to make (0.1 s for a
small model) is what it then saves in about as many calls more."""
CHUNK_NUMBERS = 2**25
"""Numbers that one vectorized call may hold in intermediate results (256 MiB in float64)."""
FOLD_NUMBERS = 2**22
"""Largest constant that folding may make."""

_NO_OPS = (
    torch.ops.aten.detach.default,
    torch.ops.aten.alias.default,
    torch.ops.aten.lift_fresh_copy.default,
    torch.ops.aten.lift_fresh.default,
)

_SHAPE_ONLY = (
    torch.ops.aten.zeros_like.default,
    torch.ops.aten.ones_like.default,
    torch.ops.aten.full_like.default,
)
"""Operators whose result depends on the shape and type of their input alone."""


class Graph:
    """A captured function of tensors, ``f(x, *data) -> (tensor, ...)``.

    Args:
        module: The graph.
        example: The inputs that it was captured with: their shapes and types are those it works for.
    """

    def __init__(self, module: GraphModule, example: Sequence[Tensor]) -> None:
        self.module = module
        self.example = tuple(example)
        # operators that make a floating-point number of whole ones, or of nothing, make one of the default type
        self.dtype = self.example[0].dtype
        self._calls: dict[tuple[torch.Size, ...], int] = {}
        self._hot: dict[tuple[torch.Size, ...], Function] = {}

    @property
    def num_nodes(self) -> int:
        """Number of operators."""
        return sum(node.op == "call_function" for node in self.module.graph.nodes)

    @cached_property
    def numbers_per_row(self) -> int:
        """Numbers in all intermediate results of one call: the size of its work."""
        metas = (node.meta.get("tensor_meta") for node in self.module.graph.nodes if node.op == "call_function")
        return max(1, sum(meta.shape.numel() for meta in metas if hasattr(meta, "shape")))

    @cached_property
    def scripted(self) -> Function:
        """The graph of one row for TorchScript's interpreter.

        A third of the time per call, but TorchScript keeps every program it was ever given (about a megabyte each),
        so it
        is made for graphs that are called often and for no others.
        """
        return _script(self.module, self.example)

    def bind(self, *data: Tensor) -> Graph:
        """The same graph with its data as constants, folded: fewer operators, for many calls with the same data."""
        module = copy.deepcopy(self.module)
        inputs = [node for node in module.graph.nodes if node.op == "placeholder"]
        for number, (node, value) in enumerate(zip(inputs[1:], data, strict=True)):
            name = f"_data_{number}"
            module.register_buffer(name, value.detach())
            with module.graph.inserting_before(node):
                constant = module.graph.get_attr(name)
            constant.meta = dict(node.meta)
            node.replace_all_uses_with(constant)
            module.graph.erase_node(node)
        with default_dtype(self.dtype):
            return Graph(_simplified(module, self.example[0].device), self.example[:1])

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Run the graph on one row."""
        with torch.no_grad(), default_dtype(self.dtype):
            if self._calls.get((), 0) >= HOT_CALLS:
                return tuple(self.scripted(*inputs))
            self._calls[()] = self._calls.get((), 0) + 1
            return tuple(self.module(*inputs))

    def batched(self, x: Tensor, *data: Tensor) -> tuple[Tensor, ...]:
        """Run the graph on every row of ``x``; ``data`` is the same for all rows.

        Shape:
            x ``(K, ...)``; each result ``(K, ...)``.
        """
        rows = max(1, CHUNK_NUMBERS // self.numbers_per_row)
        with torch.no_grad(), default_dtype(self.dtype):
            if len(x) <= rows:
                return self._batched(x, *data)
            parts = [self._batched(part, *data) for part in x.split(rows)]
            return tuple(torch.cat(results) for results in zip(*parts, strict=True))

    def _batched(self, x: Tensor, *data: Tensor) -> tuple[Tensor, ...]:
        shapes = (x.shape, *(value.shape for value in data))
        if shapes in self._hot:
            return tuple(self._hot[shapes](x, *data))
        self._calls[shapes] = self._calls.get(shapes, 0) + 1
        vectorized = torch.vmap(self.module, in_dims=(0, *(None for _ in data)))
        try:
            if self._calls[shapes] > HOT_CALLS:
                self._hot[shapes] = _script(_simplified(make_fx(vectorized)(x, *data), x.device), (x, *data))
            return tuple(vectorized(x, *data))
        except (RuntimeError, NotImplementedError) as error:
            if is_indefinite(error):
                raise
            self._hot[shapes] = self._row_by_row
            return self._row_by_row(x, *data)

    def _row_by_row(self, x: Tensor, *data: Tensor) -> tuple[Tensor, ...]:
        """What torch.vmap refuses: masks as indices, or constants that are written in place."""
        return tuple(torch.stack(results) for results in zip(*(self(row, *data) for row in x), strict=True))


def capture(function: Function, example: Sequence[Tensor], *, evaluate_constants: bool = False) -> Graph:
    """Run ``function`` once and keep its ATen graph, with constants folded and dead code removed.

    Tensors that ``function`` closes over, parameters among them, are kept with the values they have now.

    Args:
        function: What to capture.
        example: Inputs to run it with.
        evaluate_constants: Compute what does not depend on the inputs outside the graph, so that ``function`` may look
            into it. What is written in place into such a constant is lost: check the graph against ``function``.

    Raises:
        CaptureError: The function looks into a tensor (``if``, ``.item()``, ...) or uses what the tracer refuses; the
            message names the user's line. Or it draws random numbers.
    """
    traced = _evaluating_constants(function) if evaluate_constants else function
    try:
        with default_dtype(example[0].dtype):
            module = make_fx(traced, decomposition_table=_decompositions())(*example)
    except Exception as error:
        place = user_line(error)
        where = f" at {place}" if place else ""
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise CaptureError(f"{reason[0]}{where}") from error
    with default_dtype(example[0].dtype):
        module = _simplified(module, example[0].device)
    if random := [node for node in module.graph.nodes if _draws(node)]:
        raise CaptureError(f"it draws random numbers ({random[0].target})")
    return Graph(module, example)


class _EvaluateConstants(TorchDispatchMode):
    """Hides from the tracer every operator none of whose tensors depends on the inputs."""

    def __init__(self, inputs: Sequence[Tensor]) -> None:
        super().__init__()
        self.dependent = WeakIdKeyDictionary(dict.fromkeys(inputs, True))

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if tensors and not any(value in self.dependent for value in tensors):
            with disable_proxy_modes_tracing():
                return func(*args, **(kwargs or {}))
        result = func(*args, **(kwargs or {}))
        for leaf in pytree.tree_leaves(result):
            if isinstance(leaf, Tensor):
                self.dependent[leaf] = True
        return result


def _evaluating_constants(function: Function) -> Function:
    def run(*inputs: Tensor) -> tuple[Tensor, ...]:
        with _EvaluateConstants(inputs):
            return function(*inputs)

    return run


@cache
def _decompositions() -> dict[Any, Callable[..., Any]]:
    """Operators written out as simpler ones, because torch warns each time it runs them on a batch.

    The log sigmoid resizes its output there; ``scatter_``, of which gradients of cumulative products are made, has no
    batching rule.
    """
    aten = torch.ops.aten
    table = dict(get_decompositions([aten.log_sigmoid_forward, aten.log_sigmoid_backward]))
    return {**table, aten.scatter_.value: lambda out, *args: out.copy_(aten.scatter.value(out, *args))}


def _script(module: GraphModule, example: Sequence[Tensor]) -> Function:
    with warnings.catch_warnings(), torch.no_grad():
        # TorchScript is in maintenance, and says so at every use; it also warns of constants, which are meant here.
        warnings.simplefilter("ignore")
        traced: Function = torch.jit.freeze(torch.jit.trace(module.eval(), tuple(example), check_trace=False))
    return traced


def _simplified(module: GraphModule, device: torch.device) -> GraphModule:
    """The same graph without no-ops, with constants folded and equal operators merged."""
    _mark_failures(module)
    _drop_no_ops(module)
    _fold_constants(module, device)
    _drop_no_ops(module)
    result = CSEPass()(module)
    module = result.graph_module if result is not None else module
    module.graph.eliminate_dead_code()
    module.graph.lint()
    module.recompile()
    return module


def _mark_failures(module: GraphModule) -> None:
    """Make a matrix without a Cholesky factor or an inverse give NaN instead of an error.

    The error of one row would stop a whole batch, and TorchScript drops the check, as nothing depends on it.
    """
    aten = torch.ops.aten
    for check in [node for node in module.graph.nodes if node.target is aten._linalg_check_errors.default]:
        info = check.args[0]
        if info.target is not operator.getitem:
            continue
        for result in [user for user in info.args[0].users if user is not info]:
            meta = result.meta["tensor_meta"]
            if not meta.dtype.is_floating_point:
                continue
            with module.graph.inserting_before(check):
                failed = module.graph.call_function(aten.ne.Scalar, (info, 0))
                for _ in range(len(meta.shape) - len(info.meta["tensor_meta"].shape)):
                    failed = module.graph.call_function(aten.unsqueeze.default, (failed, -1))
                marked = module.graph.call_function(aten.masked_fill.Scalar, (result, failed, torch.nan))
            marked.meta = dict(result.meta)
            result.replace_all_uses_with(marked, delete_user_cb=lambda user, kept=marked: user is not kept)
        module.graph.erase_node(check)


def _mutates(node: Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return bool(schema is not None and schema.is_mutable)


def _written(node: Node) -> bool:
    """Whether the value of a node is written in place, itself or through a view."""
    return any(_mutates(user) or (_is_view(user) and _written(user)) for user in node.users)


def _is_view(node: Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return bool(schema is not None and any(result.alias_info is not None for result in schema.returns))


def _draws(node: Node) -> bool:
    return torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())


def _drop_no_ops(module: GraphModule) -> None:
    for node in list(module.graph.nodes):
        if node.op != "call_function" or _written(node):
            continue
        source = node.args[0] if node.args and isinstance(node.args[0], Node) else None
        if source is None or _mutates(source) or _written(source):
            continue
        if node.target in _NO_OPS or (_same_meta(node, source) and _keeps_value(node)):
            node.replace_all_uses_with(source)
            module.graph.erase_node(node)


def _same_meta(node: Node, source: Node) -> bool:
    before: Any = source.meta.get("tensor_meta")
    after: Any = node.meta.get("tensor_meta")
    if not (hasattr(before, "shape") and hasattr(after, "shape")):
        return False
    return bool(before.shape == after.shape and before.dtype == after.dtype)


def _keeps_value(node: Node) -> bool:
    """Whether an operator whose result has its input's shape and type returns that input."""
    aten = torch.ops.aten
    number = node.args[1] if len(node.args) > 1 else None
    plain = isinstance(number, (int, float)) and not node.kwargs
    if node.target in (aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor, aten.pow.Tensor_Scalar):
        return bool(plain and number == 1)
    if node.target in (aten.add.Tensor, aten.sub.Tensor, aten.add.Scalar, aten.sub.Scalar):
        return bool(plain and number == 0)
    if node.target is aten.sum.default:
        return node.meta["tensor_meta"].shape == torch.Size() and not node.kwargs
    return node.target in (aten.expand.default, aten.view.default, aten._unsafe_view.default)


def _fold_constants(module: GraphModule, device: torch.device) -> None:
    constants: dict[Node, Any] = {}
    for node in list(module.graph.nodes):
        if node.op == "get_attr":
            value = getattr(module, node.target)
            if isinstance(value, Tensor):
                # an optimizer writes into parameters in place: keep their present values
                value = value.detach().clone() if value.requires_grad else value.detach()
                _set_constant(module, node.target, value)
                constants[node] = value
            continue
        if node.op != "call_function" or _mutates(node) or _written(node) or _draws(node):
            continue
        if node.target in _SHAPE_ONLY and node.all_input_nodes == [node.args[0]]:
            like = node.args[0].meta.get("tensor_meta")
            if not hasattr(like, "shape") or like.shape.numel() > FOLD_NUMBERS:
                continue
            args, kwargs = (
                (torch.empty(like.shape, dtype=like.dtype, device=device), *node.args[1:]),
                node.kwargs,
            )
        elif all(source in constants for source in node.all_input_nodes):
            args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), lambda source: constants[source])
        else:
            continue
        value = node.target(*args, **kwargs)
        if not isinstance(value, Tensor) or value.numel() > FOLD_NUMBERS:
            continue
        constants[node] = value
        name = f"_folded_{node.name}"
        _set_constant(module, name, value)
        with module.graph.inserting_before(node):
            folded = module.graph.get_attr(name)
        folded.meta = dict(node.meta)
        constants[folded] = value
        node.replace_all_uses_with(folded)
        module.graph.erase_node(node)


def _set_constant(module: GraphModule, name: str, value: Tensor) -> None:
    if hasattr(module, name):
        delattr(module, name)
    module.register_buffer(name, value)
