"""A call of an objective: what of it may change from call to call, and what a graph depends on."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from pyro.infer import Trace_ELBO, TraceEnum_ELBO, TraceGraph_ELBO
from pyro.poutine.messenger import _context_wrap
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from pyro_vi_lab.loss_trace import Kind, LossAndGradients, run_loss

Callee = Callable[..., Any]

_AVERAGES = (Trace_ELBO.loss_and_grads, TraceEnum_ELBO.loss_and_grads, TraceGraph_ELBO.loss_and_grads)
"""Losses that are the mean of those of single particles."""
_PLAIN = frozenset({bool, int, float, str, bytes, type(None)})


class _Hole(NamedTuple):
    """Stands for a tensor among the arguments."""

    number: int


class _Same:
    """An argument that is compared by identity, and kept alive for that."""

    __slots__ = ("value",)

    def __init__(self, value: Any) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self.value is other.value

    def __hash__(self) -> int:
        return id(self.value)


def describe(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Sequence[Tensor], Any]:
    """The tensors among the arguments, and all else that a graph depends on, as a key of dictionaries."""
    leaves: list[Tensor] = []
    key: list[Any] = []
    for value in args if not kwargs else (*args, *kwargs.values()):
        kind = type(value)
        if kind is Tensor:
            leaves.append(value)
            key.append(_tensor_key(value))
        elif kind in _PLAIN:
            key.append((kind, value))
        else:
            return _describe_tree(args, kwargs)
    return leaves, (*key, *kwargs) if kwargs else tuple(key)


def _describe_tree(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Sequence[Tensor], Any]:
    flat, spec = pytree.tree_flatten((args, dict(kwargs)))
    leaves = [leaf for leaf in flat if isinstance(leaf, Tensor)]
    return leaves, (*map(_key, flat), str(spec))


def _tensor_key(value: Tensor) -> tuple[Any, ...]:
    strides = value.stride() if value.layout is torch.strided else value.layout
    return (value.shape, strides, value.dtype, value.device, value.requires_grad)


def _key(leaf: Any) -> Any:
    if isinstance(leaf, Tensor):
        return _tensor_key(leaf)
    return (type(leaf), leaf) if type(leaf) in _PLAIN else _Same(leaf)


class LossCall:
    """One way of calling an objective; tensors among the arguments are left open.

    Args:
        kind: ``"gradients"`` for ``loss_and_grads``, ``"loss"`` for ``loss``.
        objective: The objective.
        model: The model.
        guide: The guide.
        args: Arguments of both.
        kwargs: Keyword arguments of both.
    """

    def __init__(
        self,
        kind: Kind,
        objective: Any,
        model: Callee,
        guide: Callee,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
    ) -> None:
        self.kind, self.objective, self.model, self.guide = kind, objective, model, guide
        flat, self._spec = pytree.tree_flatten((args, dict(kwargs)))
        numbers = iter(range(len(flat)))
        self._flat = [_Hole(next(numbers)) if isinstance(leaf, Tensor) else leaf for leaf in flat]
        self._parts = _parts(args, kwargs)

    @property
    def program(self) -> str:
        """Model and guide, for messages."""
        return f"{_name(self.model)} with {_name(self.guide)}"

    @property
    def name(self) -> str:
        """Model, guide and what is asked of them, for messages."""
        return f"{self.program}, loss alone" if self.kind == "loss" else self.program

    @property
    def code(self) -> tuple[Any, ...]:
        """The same for functions that are made anew by the same line of code."""
        return (self.kind, _code(self.model), _code(self.guide))

    @property
    def functions(self) -> list[Any]:
        """What is run, and what is passed to it as no tensor."""
        return [self.model, self.guide, *(leaf for leaf in self._flat if not isinstance(leaf, _Hole))]

    def run(self, objective: Any, leaves: Sequence[Tensor]) -> LossAndGradients:
        """Let Pyro run ``objective`` with other tensors as arguments."""
        flat = [leaves[leaf.number] if isinstance(leaf, _Hole) else leaf for leaf in self._flat]
        args, kwargs = pytree.tree_unflatten(flat, self._spec)
        return run_loss(self.kind, objective, self.model, self.guide, tuple(args), kwargs)

    @property
    def num_particles(self) -> int:
        """Number of particles that the graph of one particle has to be run for."""
        is_average = getattr(self.objective, "averages_particles", type(self.objective).loss_and_grads in _AVERAGES)
        return int(self.objective.num_particles) if is_average else 1

    def of_one_particle(self) -> Any:
        """The objective that the graph is of."""
        if self.num_particles == 1:
            return self.objective
        one = copy.copy(self.objective)
        if one.vectorize_particles:
            one.max_plate_nesting -= 1
        one.num_particles, one.vectorize_particles = 1, False
        return one

    def difference(self, other: LossCall) -> str:
        """What of this call is not as in ``other``, for messages; empty if nothing is."""
        for what, now, before in (("model", self.model, other.model), ("guide", self.guide, other.guide)):
            if not _equal(now, before):
                return f"the {what} is another object"
        for name in {**self._parts, **other._parts}:
            here, there = self._parts.get(name), other._parts.get(name)
            if here != there:
                return f"{name} is {_show(here)} after {_show(there)}"
        return ""


def _parts(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """What the key holds, by the name of the argument."""
    named = [(f"argument {number}", value) for number, value in enumerate(args)]
    named += [(f"argument {name!r}", value) for name, value in kwargs.items()]
    parts = {}
    for name, value in named:
        for path, leaf in pytree.tree_flatten_with_path(value)[0]:
            parts[name + pytree.keystr(path)] = _key(leaf)
    return parts


def _show(key: Any) -> str:
    if key is None:
        return "missing"
    if isinstance(key, _Same):
        return f"another {type(key.value).__name__}"
    if len(key) == 2:
        return repr(key[1])
    shape, strides, dtype, *_ = key
    return f"{dtype} of shape {tuple(shape)} and strides {strides}"


def _equal(here: Any, there: Any) -> bool:
    return here is there or (type(here) is type(there) and hasattr(here, "__func__") and bool(here == there))


def _code(function: Any) -> Any:
    function = _innermost(function)
    if isinstance(function, nn.Module):
        return type(function)
    function = getattr(function, "__func__", function)
    return getattr(function, "__code__", type(function))


def _name(function: Any) -> str:
    function = _innermost(function)
    return str(getattr(function, "__name__", type(function).__name__))


def _innermost(function: Any) -> Any:
    """What partials, and the partials that Pyro's handlers make, are around."""
    while isinstance(function, partial):
        function = function.args[1] if function.func is _context_wrap else function.func
    return function
