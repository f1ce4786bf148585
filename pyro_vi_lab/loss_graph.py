"""A captured loss with its gradients: what it closes over and the noise that it draws made inputs."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from pyro_vi_lab.capture import evaluating_constants, traced_module
from pyro_vi_lab.errors import CaptureError
from pyro_vi_lab.simplification import draws, is_view, mutates, simplified, writes

_EMPTY = ("empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided", "zeros", "zeros_like", "new_zeros")
_FILLS: dict[Any, Any] = {
    torch.ops.aten.randn.default: torch.ops.aten.normal_.default,
    torch.ops.aten.randn_like.default: torch.ops.aten.normal_.default,
    torch.ops.aten.rand.default: torch.ops.aten.uniform_.default,
    torch.ops.aten.rand_like.default: torch.ops.aten.uniform_.default,
}
"""Functional draws as fills of empty memory, which give the same numbers."""


class Noise:
    """Draws that depend on nothing but their shape.

    Args:
        draw: Gives one draw.
        fill: Draws into memory of any shape instead, if there is a way.
        like: Shape, type and device of the draws, as an empty tensor that is expanded from nothing.
    """

    def __init__(
        self, draw: Callable[[], Tensor] | None, fill: Callable[[Tensor], Tensor] | None, like: Tensor
    ) -> None:
        self.like, self.fill = like, fill
        if fill is not None:
            # nothing keeps a draw beyond the run that it is for
            self.draw: Callable[[], Tensor] = partial(fill, self._memory(like.shape))
        elif draw is not None:
            self.draw = draw

    def many(self, number: int) -> Noise:
        """The same for ``number`` independent draws at once, ``(number, *shape)``."""
        like = self.like.unsqueeze(0).expand(number, *self.like.shape)
        if self.fill is not None:
            return Noise(None, self.fill, like)
        return Noise(lambda: torch.stack([self.draw() for _ in range(number)]), None, like)

    def _memory(self, shape: torch.Size) -> Tensor:
        return torch.empty(shape, dtype=self.like.dtype, device=self.like.device)


@dataclass(frozen=True, eq=False)
class LossGraph:
    """A graph of ``(*closed_over, *inputs, *noise)`` whose results are the loss and the gradients.

    Args:
        module: The graph.
        closed_over: Tensors that the run closed over and that may change: leaves that require a gradient, and what is
            written in place. They come first among the inputs.
        constants: Tensors that the run closed over and that are kept with their values.
        noise: Draws, in the order of the run; empty where a draw depends on a value, and then the graph draws itself.
        draws: Whether the graph itself draws random numbers.
        written: Which of ``closed_over`` the graph writes in place.
    """

    module: GraphModule
    closed_over: list[Tensor]
    constants: list[Tensor]
    noise: list[Noise]
    draws: bool
    written: frozenset[int]

    @property
    def num_nodes(self) -> int:
        """Number of operators."""
        return sum(node.op == "call_function" for node in self.module.graph.nodes)

    def particles(self, number: int, example: Sequence[Tensor]) -> LossGraph:
        """The mean over independent particles, in one graph by ``torch.vmap``.

        Args:
            number: Number of particles.
            example: Inputs of this graph: what it closed over, its inputs and one draw of its noise.

        Raises:
            CaptureError: An operator has no batching rule, or the graph writes into a tensor or draws by a value.
        """
        if self.written:
            raise CaptureError("it writes into a tensor in place")
        if self.draws:
            raise CaptureError("it draws random numbers that depend on a value")
        shared = len(example) - len(self.noise)

        def mean(*inputs: Tensor) -> tuple[Tensor, ...]:
            vectorized = torch.vmap(self.module, in_dims=(None,) * shared + (0,) * len(self.noise))
            return tuple(result.mean(0) for result in vectorized(*inputs))

        if not self.noise:  # all particles are the same
            return self
        noise = [source.many(number) for source in self.noise]
        many = [*example[:shared], *(source.draw() for source in noise)]
        with torch.no_grad():
            module = simplified(traced_module(mean, many), many[-1].device)
        return LossGraph(module, self.closed_over, self.constants, noise, False, frozenset())


def capture_loss(
    function: Callable[..., tuple[Tensor, ...]], inputs: Sequence[Tensor], changing: Mapping[int, Tensor]
) -> LossGraph:
    """Run ``function`` once and keep its graph; the run draws from torch's global generator.

    Args:
        function: Of ``inputs``, gives the loss and the gradients.
        inputs: What to run it with; they become inputs of the graph.
        changing: Tensors, by id, that become inputs even if they require no gradient.

    Raises:
        CaptureError: The function looks into a tensor or uses what the tracer refuses.
    """
    try:
        module = traced_module(function, inputs)
    except CaptureError as first:
        # again, with what depends on no input computed outside of the graph, where it may be looked into
        try:
            module = traced_module(evaluating_constants(function, changing.values()), inputs)
        except CaptureError:
            raise first from None
    closed_over, constants = _lift(module, changing)
    placeholders = _placeholders(module)
    written = frozenset(number for number in range(len(closed_over)) if _is_written(placeholders[number]))
    if any(_is_written(node) for node in placeholders[len(closed_over) :]):
        raise CaptureError("it writes into its data in place")
    noise = _hoist(module)
    device = next((tensor.device for tensor in (*closed_over, *inputs)), torch.device("cpu"))
    module = simplified(module, device)
    _own_results(module)
    still_draws = any(draws(node) for node in module.graph.nodes)
    return LossGraph(module, closed_over, constants, noise, still_draws, written)


def _placeholders(module: GraphModule) -> list[Node]:
    return [node for node in module.graph.nodes if node.op == "placeholder"]


def _is_written(node: Node) -> bool:
    return any(
        node in writes(user) or (is_view(user) and user.args[:1] == (node,) and _is_written(user))
        for user in node.users
    )


def _lift(module: GraphModule, changing: Mapping[int, Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Make inputs of the tensors that may change; gives these, and those that are kept as constants."""
    nodes: dict[int, list[Node]] = {}
    tensors: dict[int, Tensor] = {}
    for node in module.graph.nodes:
        value = getattr(module, node.target) if node.op == "get_attr" else None
        if isinstance(value, Tensor):
            nodes.setdefault(id(value), []).append(node)
            tensors[id(value)] = value
    lifted = [
        key for key in nodes if tensors[key].requires_grad or key in changing or any(map(_is_written, nodes[key]))
    ]
    previous: Node | None = None
    for number, key in enumerate(lifted):
        graph = module.graph
        first = graph.inserting_before(next(iter(graph.nodes))) if previous is None else graph.inserting_after(previous)
        with first:
            placeholder = previous = graph.placeholder(f"closed_over_{number}")
        placeholder.meta = dict(nodes[key][0].meta)
        for node in nodes[key]:
            node.replace_all_uses_with(placeholder)
            module.graph.erase_node(node)
    module.recompile()
    kept = [tensors[key] for key in nodes if key not in lifted]
    return [tensors[key] for key in lifted], kept


def _own_results(module: GraphModule) -> None:
    """Give every result memory of its own, as gradients are written into: no constant, input, view or second use."""
    (output,) = [node for node in module.graph.nodes if node.op == "output"]
    results: list[Node] = []
    for result in output.args[0]:
        if result.op != "call_function" or is_view(result) or result in results:
            with module.graph.inserting_before(output):
                result = module.graph.call_function(
                    torch.ops.aten.clone.default, (result,), {"memory_format": torch.contiguous_format}
                )
        results.append(result)
    output.args = (tuple(results),)
    module.recompile()


def _hoist(module: GraphModule) -> list[Noise]:
    """Make inputs of the draws that depend on nothing but their shape; of all or of none, to keep their order."""
    found: list[tuple[Node, Noise]] = []
    for node in module.graph.nodes:
        if node.op != "call_function" or not draws(node):
            continue
        source = _noise(node)
        if source is None:
            return []
        found.append((node, source))
    for number, (node, _) in enumerate(found):
        first = next(other for other in module.graph.nodes if other.op != "placeholder")
        with module.graph.inserting_before(first):
            placeholder = module.graph.placeholder(f"noise_{number}")
        placeholder.meta = dict(node.meta)
        memory = node.args[0] if mutates(node) else None
        node.replace_all_uses_with(placeholder)
        module.graph.erase_node(node)
        if isinstance(memory, Node):
            memory.replace_all_uses_with(placeholder)
            module.graph.erase_node(memory)
        if _is_written(placeholder):  # as dropout scales its mask
            with module.graph.inserting_before(first):
                own = module.graph.call_function(torch.ops.aten.clone.default, (placeholder,))
            own.meta = dict(placeholder.meta)
            placeholder.replace_all_uses_with(own, delete_user_cb=partial(operator.is_not, own))
    module.recompile()
    return [source for _, source in found]


def _noise(node: Node) -> Noise | None:
    meta: Any = node.meta.get("tensor_meta")
    if not hasattr(meta, "shape") or meta.stride != torch.empty(meta.shape, device="meta").stride():
        return None
    like = torch.empty((), dtype=meta.dtype, device=_device(node)).expand(meta.shape)
    if mutates(node):
        memory = node.args[0]
        if not isinstance(memory, Node) or not _is_empty(memory) or node.all_input_nodes != [memory]:
            return None
        if any(user is not node for user in memory.users):
            return None
        return Noise(None, _filler(node.target, node.args[1:], node.kwargs), like)
    if node.target in _FILLS:
        return Noise(None, _filler(_FILLS[node.target], (), {}), like)
    make: Any = node.target
    return None if node.all_input_nodes else Noise(partial(make, *node.args, **node.kwargs), None, like)


def _filler(target: Any, args: Any, kwargs: Any) -> Callable[[Tensor], Tensor]:
    if target is torch.ops.aten.normal_.default and not args and not kwargs:
        return Tensor.normal_  # the same, called in half the time
    return lambda memory: target(memory, *args, **kwargs)


def _device(node: Node) -> torch.device:
    value = node.meta.get("val")
    return value.device if isinstance(value, Tensor) else torch.device("cpu")


def _is_empty(node: Node) -> bool:
    name = getattr(node.target, "_opname", "")
    return node.op == "call_function" and name in _EMPTY
