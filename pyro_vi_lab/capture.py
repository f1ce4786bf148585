"""A Pyro computation run once and kept as a graph of ATen operators.

Pyro's effect handlers run in Python at every step; the arithmetic of a small model is a small part of that. A graph
holds the arithmetic alone. It is run row by row, or vectorized over a batch by ``torch.vmap``; one that is called often
is handed to TorchScript's interpreter (C++, no compiler needed, no interpreter lock).
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache, cached_property
from typing import Any

import torch
from torch import Tensor
from torch._decomp import get_decompositions
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing, make_fx
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary

from pyro_vi_lab.agreement import agrees
from pyro_vi_lab.errors import CaptureError, CompileError
from pyro_vi_lab.isolation import default_dtype
from pyro_vi_lab.native import LANES, NativeFunction, compile_native, compiler, say_no_compiler
from pyro_vi_lab.phases import phase
from pyro_vi_lab.simplification import draws, simplified
from pyro_vi_lab.user_errors import is_indefinite, user_line

Function = Callable[..., tuple[Tensor, ...]]

HOT_CALLS = 60
"""Calls of one batch shape after which the batch gets a graph of its own: what that graph costs to make (0.1 s for a
small model) is what it then saves in about as many calls more."""
CHUNK_NUMBERS = 2**25
"""Numbers that one vectorized call may hold in intermediate results (256 MiB in float64)."""

_COMPILES: ContextVar[bool] = ContextVar("compiles", default=False)


@contextmanager
def compiled_batches() -> Iterator[None]:
    """Inside the block batches are run as machine code, by graphs that can be compiled."""
    token = _COMPILES.set(True)
    try:
        yield
    finally:
        _COMPILES.reset(token)


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
        self.parts: dict[Any, Any] = {}
        self._compiled = False
        self._machine_code: NativeFunction | None = None

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
        return script(self.module, self.example)

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
            return Graph(simplified(module, self.example[0].device), self.example[:1])

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Run the graph on one row."""
        with torch.no_grad(), default_dtype(self.dtype):
            if self._calls.get((), 0) >= HOT_CALLS:
                return tuple(self.scripted(*inputs))
            self._calls[()] = self._calls.get((), 0) + 1
            return tuple(self.module(*inputs))

    def vectorized(self, x: Tensor, *data: Tensor) -> tuple[Tensor, ...]:
        """As :meth:`batched`, in one call and for the tracer.

        Shape:
            x ``(K, R, D)``; each result ``(K, R, ...)``.
        """
        results = torch.vmap(self.module, in_dims=(0, *(None for _ in data)))(x.flatten(0, 1), *data)
        return tuple(value.unflatten(0, x.shape[:2]) for value in results)

    def each(self, x: Tensor, *data: Tensor) -> tuple[Tensor, ...]:
        """Run the graph on every row of ``x``, with data of their own for each of the R.

        Shape:
            x ``(K, R, D)``, data ``(R, ...)``; each result ``(K, R, ...)``.
        """
        native = self._native(x[:, 0], tuple(value[0] for value in data))
        with torch.no_grad(), default_dtype(self.dtype):
            if native is not None:
                parts = [native.batched(x[:, r], *(value[r] for value in data)) for r in range(x.shape[1])]
                return tuple(torch.stack(results, 1) for results in zip(*parts, strict=True))
            fits = max(1, CHUNK_NUMBERS // (self.numbers_per_row * len(x)))
            chunks = [
                self.vectorized_each(x[:, start : start + fits], *(v[start : start + fits] for v in data))
                for start in range(0, x.shape[1], fits)
            ]
            return tuple(torch.cat(results, 1) for results in zip(*chunks, strict=True))

    def vectorized_each(self, x: Tensor, *data: Tensor) -> tuple[Tensor, ...]:
        """As :meth:`vectorized`, with data of their own for each of the R.

        Shape:
            x ``(K, R, D)``, data ``(R, ...)``; each result ``(K, R, ...)``.
        """
        rows = torch.vmap(self.module, in_dims=(0, *(None for _ in data)))
        results = torch.vmap(rows, in_dims=(1, *(0 for _ in data)), out_dims=1)(x, *data)
        return tuple(results)

    def batched(self, x: Tensor, *data: Tensor) -> tuple[Tensor, ...]:
        """Run the graph on every row of ``x``; ``data`` is the same for all rows.

        Shape:
            x ``(K, ...)``; each result ``(K, ...)``.
        """
        native = self._native(x, data)
        rows = max(1, CHUNK_NUMBERS // self.numbers_per_row)
        with torch.no_grad(), default_dtype(self.dtype):
            if native is not None:
                return native.batched(x, *data)
            parts = [self._batched(part, *data) for part in x.split(rows)] if len(x) else [self._batched(x, *data)]
            return parts[0] if len(parts) == 1 else tuple(torch.cat(results) for results in zip(*parts, strict=True))

    def _native(self, x: Tensor, data: Sequence[Tensor]) -> NativeFunction | None:
        """The graph as machine code, where that is wanted and can be had."""
        if not _COMPILES.get() or x.device.type != "cpu" or not len(x):
            return None
        if not self._compiled:
            self._compiled = True
            try:
                native = compile_native(self.module, self.example, lanes=LANES)
                rows = x[: 2 * LANES + 1]
                with torch.no_grad(), default_dtype(self.dtype):
                    pairs = zip(self._batched(rows, *data), native.batched(rows, *data), strict=True)
                    self._machine_code = native if all(agrees(a, b) for a, b in pairs) else None
            except CompileError:  # interpreted, then
                if compiler() is None:
                    say_no_compiler()
        return self._machine_code

    def _batched(self, x: Tensor, *data: Tensor) -> tuple[Tensor, ...]:
        shapes = (x.shape, *(value.shape for value in data))
        if shapes in self._hot:
            return tuple(self._hot[shapes](x, *data))
        self._calls[shapes] = self._calls.get(shapes, 0) + 1
        vectorized = torch.vmap(self.module, in_dims=(0, *(None for _ in data)))
        try:
            if self._calls[shapes] > HOT_CALLS:
                self._hot[shapes] = script(simplified(make_fx(vectorized)(x, *data), x.device), (x, *data))
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
    traced = evaluating_constants(function) if evaluate_constants else function
    with default_dtype(example[0].dtype):
        module = simplified(traced_module(traced, example), example[0].device)
    if random := [node for node in module.graph.nodes if draws(node)]:
        raise CaptureError(f"it draws random numbers ({random[0].target})")
    return Graph(module, example)


def traced_module(function: Function, example: Sequence[Tensor]) -> GraphModule:
    """Run ``function`` once and keep its ATen graph as it is; draws of random numbers are operators of it.

    Raises:
        CaptureError: The function looks into a tensor or uses what the tracer refuses; the message names the user's
            line.
    """
    try:
        with phase("capturing the model"):
            return make_fx(function, decomposition_table=_decompositions())(*example)
    except CaptureError:
        raise
    except Exception as error:
        place = user_line(error)
        where = f" at {place}" if place else ""
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise CaptureError(f"{reason[0]}{where}") from error


class _EvaluateConstants(TorchDispatchMode):
    """Hides from the tracer every operator that draws nothing and none of whose tensors depends on the inputs."""

    def __init__(self, inputs: Iterable[Tensor]) -> None:
        super().__init__()
        self.dependent = WeakIdKeyDictionary(dict.fromkeys(inputs, True))

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        known = tensors and not any(value in self.dependent for value in tensors)
        if known and torch.Tag.nondeterministic_seeded not in func.tags:
            with disable_proxy_modes_tracing():
                return func(*args, **(kwargs or {}))
        result = func(*args, **(kwargs or {}))
        for leaf in pytree.tree_leaves(result):
            if isinstance(leaf, Tensor):
                self.dependent[leaf] = True
        return result


def evaluating_constants(function: Function, changing: Iterable[Tensor] = ()) -> Function:
    """``function`` with what depends neither on its inputs nor on ``changing`` hidden from a tracer."""

    def run(*inputs: Tensor) -> tuple[Tensor, ...]:
        with _EvaluateConstants((*inputs, *changing)):
            return function(*inputs)

    return run


@cache
def _decompositions() -> dict[Any, Callable[..., Any]]:
    """Operators written out as simpler ones, because torch warns each time it runs them on a batch.

    The log sigmoid resizes its output there; ``scatter_``, of which gradients of cumulative products are made, has no
    batching rule. The log likelihood of Bernoulli logits is written out on a batch in any case, there with three
    exponentials.
    """
    aten = torch.ops.aten
    table = dict(get_decompositions([aten.log_sigmoid_forward, aten.log_sigmoid_backward]))
    return {
        **table,
        aten.scatter_.value: lambda out, *args: out.copy_(aten.scatter.value(out, *args)),
        aten.binary_cross_entropy_with_logits.default: _cross_entropy_with_logits,
    }


def _cross_entropy_with_logits(
    x: Tensor, target: Tensor, weight: Tensor | None = None, pos_weight: Tensor | None = None, reduction: int = 1
) -> Tensor:
    softened = (-x.abs()).exp().log1p()
    factor = 1 if pos_weight is None else 1 + (pos_weight - 1) * target
    loss = (1 - target) * x - factor * (x.clamp_max(0) - softened)
    loss = loss if weight is None else loss * weight
    return loss if reduction == 0 else loss.mean() if reduction == 1 else loss.sum()


def script(module: GraphModule, example: Sequence[Tensor]) -> Function:
    """A graph for TorchScript's interpreter; runs it once on ``example``."""
    with warnings.catch_warnings(), torch.no_grad():
        # TorchScript is in maintenance, and says so at every use; it also warns of constants, which are meant here.
        warnings.simplefilter("ignore")
        traced: Function = torch.jit.freeze(torch.jit.trace(module.eval(), tuple(example), check_trace=False))
    return traced
