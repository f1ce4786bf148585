"""The same graph with fewer operators: no-ops dropped, constants folded, equal operators merged."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.utils import _pytree as pytree

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


_BATCH_NORMS = ("aten::native_batch_norm", "aten::cudnn_batch_norm", "aten::miopen_batch_norm")
"""Operators that write the running statistics, although their schemas do not say so."""


def simplified(module: GraphModule, device: torch.device) -> GraphModule:
    """The same graph without no-ops, with constants folded and equal operators merged."""
    _mark_failures(module)
    _drop_no_ops(module)
    _fold_constants(module, device)
    _drop_no_ops(module)
    _merge_equal(module)
    module.graph.eliminate_dead_code()
    module.graph.lint()
    module.recompile()
    return module


def _merge_equal(module: GraphModule) -> None:
    """Compute equal operators of equal inputs once; not those that draw, write or read what is written in place."""
    roots: dict[Node, Node] = {}
    for node in module.graph.nodes:
        source = node.args[0] if node.args and isinstance(node.args[0], Node) else None
        roots[node] = roots[source] if source is not None and (is_view(node) or mutates(node)) else node
    written = {roots[source] for node in module.graph.nodes for source in writes(node)}
    seen: dict[Any, Node] = {}
    for node in list(module.graph.nodes):
        if node.op not in ("call_function", "get_attr") or draws(node) or mutates(node):
            continue
        if roots[node] in written or any(roots[source] in written for source in node.all_input_nodes):
            continue
        key = (node.op, node.target, *_hashable((node.args, dict(node.kwargs))))
        if key in seen:
            node.replace_all_uses_with(seen[key])
            module.graph.erase_node(node)
        else:
            seen[key] = node


def _hashable(arguments: Any) -> tuple[Any, ...]:
    """Leaves and structure of an operator's arguments; a number's type counts, as 1 and 1.0 differ."""
    leaves, spec = pytree.tree_flatten(arguments)
    return (tuple((type(leaf), leaf) for leaf in leaves), str(spec))


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


def writes(node: Node) -> list[Node]:
    """The inputs that an operator writes into."""
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        return []
    named = {argument.name: value for argument, value in zip(schema.arguments, node.args, strict=False)}
    named.update(node.kwargs)
    if schema.name in _BATCH_NORMS:
        names = ["running_mean", "running_var"] if named.get("training", True) else []
    else:
        names = [argument.name for argument in schema.arguments if argument.alias_info and argument.alias_info.is_write]
    return [value for name in names if isinstance(value := named.get(name), Node)]


def mutates(node: Node) -> bool:
    """Whether an operator writes into one of its inputs."""
    schema = getattr(node.target, "_schema", None)
    return bool(schema is not None and schema.is_mutable) or bool(writes(node))


def _written(node: Node) -> bool:
    """Whether the value of a node is written in place, itself or through a view."""
    for user in node.users:
        written = writes(user)
        # an operator that writes in place only reads its indices; of what it writes in a list nothing is known
        if node in written or (mutates(user) and not written) or (is_view(user) and _written(user)):
            return True
    return False


def is_view(node: Node) -> bool:
    """Whether the result of an operator may share memory with an input."""
    schema = getattr(node.target, "_schema", None)
    return bool(schema is not None and any(result.alias_info is not None for result in schema.returns))


def draws(node: Node) -> bool:
    """Whether an operator draws random numbers."""
    return torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())


def _drop_no_ops(module: GraphModule) -> None:
    for node in list(module.graph.nodes):
        if node.op != "call_function" or _written(node):
            continue
        source = node.args[0] if node.args and isinstance(node.args[0], Node) else None
        if source is None or mutates(source) or _written(source):
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
        if node.op != "call_function" or mutates(node) or _written(node) or draws(node):
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
