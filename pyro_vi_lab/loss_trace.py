"""A Pyro objective's loss and gradients as a value, for the tracer: nothing is written into ``.grad``."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable, Mapping
from types import FrameType
from typing import Any, Literal, NamedTuple

import pyro
import torch
from pyro import poutine
from pyro.ops.provenance import detach_provenance
from torch import Tensor
from torch.fx.experimental.proxy_tensor import get_proxy_mode, has_proxy_slot
from torch.overrides import TorchFunctionMode

from pyro_vi_lab.errors import CaptureError
from pyro_vi_lab.user_errors import frame_line

Kind = Literal["gradients", "loss"]

_TORCH = os.path.dirname(torch.__file__) + os.sep
_INFER = os.path.join(os.path.dirname(pyro.__file__), "infer") + os.sep
_INFER_UTIL = os.path.join(_INFER, "util.py")
_DISTRIBUTION = os.path.join(_TORCH, "distributions", "distribution.py")
_UTIL = os.path.join(os.path.dirname(pyro.__file__), "util.py")

_LOOKS = {
    Tensor.item: "calls .item() on",
    Tensor.tolist: "calls .tolist() on",
    Tensor.numpy: "calls .numpy() on",
    Tensor.__array__: "makes a NumPy array of",
    Tensor.__bool__: "asks for the truth of",
    Tensor.__float__: "calls float() on",
    Tensor.__int__: "calls int() on",
    Tensor.__index__: "uses as an index of Python",
}
"""What looks into a tensor, so that the run depends on its value."""


class LossAndGradients(NamedTuple):
    """The loss of one run and the gradients that it would have left in the leaves.

    Args:
        loss: What the objective returns, each number as a tensor without dimensions.
        leaves: The leaf tensors that got a gradient.
        gradients: The gradients, in the order of the leaves.
        replaced: Parameters that the run gave other values in the param store, with the tensors that were there.
        values: The other values, unconstrained.
    """

    loss: tuple[Tensor, ...]
    leaves: list[Tensor]
    gradients: list[Tensor]
    replaced: list[Tensor]
    values: list[Tensor]


def run_loss(
    kind: Kind,
    objective: Any,
    model: Callable[..., Any],
    guide: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
) -> LossAndGradients:
    """Run ``objective.loss_and_grads``, or ``.loss``, with ``Tensor.backward`` and ``.item()`` replaced.

    Works for every objective that ends in ``Tensor.backward``, as all of Pyro's do. What the run does to the param
    store is left as it is, for the caller to put back.

    Raises:
        CaptureError: The model or the guide looks into a tensor, or makes a parameter; the message names the line.
    """
    store = pyro.get_param_store()
    before = dict(store._params)
    mode = _Intercept(objective)
    with warnings.catch_warnings(), poutine.block(), pyro.validation_enabled(False), mode:
        warnings.simplefilter("ignore")  # said by the run that came before
        with torch.set_grad_enabled(kind == "gradients"):
            method = objective.loss_and_grads if kind == "gradients" else objective.loss
            loss = method(model, guide, *args, **kwargs)
    if new := [name for name in store._params if name not in before]:
        raise CaptureError(f"parameter {new[0]!r} is made in some runs and not in others")
    replaced = [name for name, value in store._params.items() if value is not before[name]]
    return LossAndGradients(
        loss=_as_tensors(loss),
        leaves=[leaf for leaf, _ in mode.gradients.values()],
        gradients=[gradient for _, gradient in mode.gradients.values()],
        replaced=[before[name] for name in replaced],
        values=[detach_provenance(store._params[name]).detach() for name in replaced],
    )


def _as_tensors(loss: Any) -> tuple[Tensor, ...]:
    """A loss, or a tuple of them as wake-sleep gives, as tensors without dimensions."""
    values = loss if isinstance(loss, tuple) else (loss,)
    return tuple(
        value.detach().reshape(()) if isinstance(value, Tensor) else torch.tensor(float(value)) for value in values
    )


class _Intercept(TorchFunctionMode):
    """Keeps the gradients of ``backward``, and the loss a tensor where the objective makes it a number."""

    def __init__(self, objective: Any) -> None:
        super().__init__()
        self.objective = objective
        self.gradients: dict[int, tuple[Tensor, Tensor]] = {}

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is Tensor.backward:
            return self._backward(*args, **(kwargs or {}))
        if func is Tensor.register_hook and _caller().f_code.co_filename == _UTIL:
            return None  # looks for NaN in gradients
        if func is Tensor.masked_select and _caller().f_code.co_filename == _INFER_UTIL:
            return torch.where(args[1], args[0], 0)  # of two factors whose products are summed up
        if func in _LOOKS and isinstance(args[0], Tensor):
            return self._look(func, *args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def _look(self, func: Any, tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        frame = _caller()
        if func is Tensor.item and self._is_objectives(frame):
            return tensor.detach()
        if func is Tensor.__bool__ and frame.f_code.co_filename in (_UTIL, _INFER_UTIL):
            return False  # whether the loss is NaN; whether no probability is zero
        if func is Tensor.__bool__ and sys._getframe(2).f_code.co_filename == _DISTRIBUTION:
            return True  # whether arguments are valid, of a distribution that was made with its own validation
        copies = func in (Tensor.tolist, Tensor.numpy, Tensor.__array__)  # behind the tracer's back
        try:
            if not (copies and _is_traced(tensor)):
                return func(tensor, *args, **kwargs)
        except RuntimeError:
            if not _is_traced(tensor):
                raise
        place = frame_line(sys._getframe(1))
        where = f" at {place}" if place else ""
        raise CaptureError(
            f"it {_LOOKS[func]} a tensor that may have another value in another run{where}: "
            "use torch.where or another operator of tensors"
        )

    def _is_objectives(self, frame: FrameType) -> bool:
        """Whether a frame belongs to an objective, which makes a number of the loss, and not to a model."""
        name = frame.f_code.co_filename
        return os.path.dirname(name) + os.sep == _INFER or frame.f_locals.get("self") is self.objective

    def _backward(self, loss: Tensor, gradient: Tensor | None = None, *args: Any, **kwargs: Any) -> None:
        leaves = graph_leaves(loss)
        for leaf, grad in zip(leaves, torch.autograd.grad(loss, leaves, gradient, retain_graph=True), strict=True):
            before = self.gradients.get(id(leaf))
            self.gradients[id(leaf)] = (leaf, grad if before is None else before[1] + grad)


def _is_traced(tensor: Tensor) -> bool:
    mode = get_proxy_mode()
    return mode is not None and (tensor.requires_grad or has_proxy_slot(tensor, mode.tracer))


def _caller() -> FrameType:
    """The innermost frame that belongs neither to torch nor to this module."""
    frame = sys._getframe(1)
    while frame.f_back is not None:
        name = frame.f_code.co_filename
        if name != __file__ and not name.startswith(_TORCH):
            break
        frame = frame.f_back
    return frame


def graph_leaves(*outputs: Tensor) -> list[Tensor]:
    """The leaf tensors that ``backward`` would give a gradient, in the order in which the graph reaches them."""
    found: dict[int, Tensor] = {}
    seen: set[Any] = set()
    stack: list[Any] = [output.grad_fn for output in reversed(outputs)]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found[id(node.variable)] = node.variable
        stack.extend(parent for parent, _ in node.next_functions)
    return list(found.values())
