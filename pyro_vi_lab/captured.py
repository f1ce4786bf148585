"""Any Pyro objective as captured graphs: the successor of Pyro's ``Jit*_ELBO``."""

from __future__ import annotations

import sys
import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary, WeakMethod

import pyro
import torch
from pyro import poutine
from pyro.infer import ELBO, SVI
from pyro.poutine.runtime import _PYRO_STACK
from pyro.poutine.trace_messenger import TraceMessenger
from pyro.util import warn_if_nan
from torch import Tensor, nn

from pyro_vi_lab.captured_loss import CapturedLoss
from pyro_vi_lab.errors import ArgumentError, CaptureError, LabWarning
from pyro_vi_lab.guards import Guards, modules_run
from pyro_vi_lab.isolation import seeded
from pyro_vi_lab.loss_call import LossCall, describe
from pyro_vi_lab.loss_trace import Kind
from pyro_vi_lab.places import drop_provenance, unchanged
from pyro_vi_lab.tiers import Compile, check_compile

Program = Callable[..., Any]

MAX_UNUSED = 16
"""Graphs of one model and guide that have not paid for their capture, after which no more are captured."""
PAYING_RUNS = 20
"""Runs after which a graph has paid for its capture, about: it takes as long as some tens of runs of Pyro."""
MAX_FAILURES = 4
"""Calls of one model and guide that could not be captured, after which no others are tried."""
MAX_GRAPHS = 64
"""Calls whose graphs are kept; those used longest ago are let go."""


class Captured(ELBO):
    r"""A Pyro objective whose loss and gradients run as captured graphs.

    ``SVI(model, guide, optim, loss=Captured(Trace_ELBO()))`` is a drop-in for ``loss=Trace_ELBO()`` and the successor
    of Pyro's ``JitTrace_ELBO``. The first call runs Pyro, keeps the operators of the run as a graph, and compares the
    graph with Pyro at two points; later calls run the graph. What changes from call to call is an input of it:

    - the parameters, of the param store, of modules and of PyroModules;
    - the tensors among the arguments;
    - the noise, drawn from torch's global generator in Pyro's order: the same seed gives the same numbers as Pyro
      (for one particle; more particles are vectorized by ``torch.vmap`` and draw in another order);
    - what the run writes in place, such as the running statistics of a batch norm.

    Other shapes or types of data, other non-tensor arguments, ``train()`` or ``eval()``, and other values of what
    model and guide refer to (global and closed-over variables, attributes of modules and of the objects that methods
    belong to, lists and dictionaries) get a graph of their own. Numbers that change at every call, such as a
    temperature, should be tensors, and model and guide the same functions at every call, not made anew; else Pyro
    runs them, after some attempts and with a warning.

    A program that looks into a tensor (a Python ``if`` on a sampled value, ``.item()``) or whose graph disagrees with
    Pyro at a check point is run by Pyro, with one warning that names the line. Calls inside other handlers, such as
    ``poutine.scale`` around a step, are run by Pyro as well. Not noticed, once the check points are passed: NumPy
    arrays that model or guide refer to and that are written in place, files, and what C extensions keep. A graph does
    not validate the arguments of distributions; a loss that is NaN gives Pyro's warning.

    Args:
        objective: ``Trace_ELBO``, ``TraceMeanField_ELBO``, ``TraceGraph_ELBO``, ``TraceEnum_ELBO``, ``RenyiELBO``,
            :class:`~pyro_vi_lab.ELBO`, or any other that ends in ``Tensor.backward``.
        compile: ``"auto"`` compiles graphs that have been used so long that it pays, ``True`` all of them at once,
            ``False`` none.

    Raises:
        ArgumentError: ``objective`` is no Pyro objective, or is a jitted one.

    Example:
        >>> import pyro.distributions as dist
        >>> from pyro.infer import Trace_ELBO
        >>> from pyro.infer.autoguide import AutoNormal
        >>> def model(y):
        ...     mean = pyro.sample("mean", dist.Normal(0.0, 10.0))
        ...     with pyro.plate("row", len(y)):
        ...         pyro.sample("y", dist.Normal(mean, 1.0), obs=y)
        >>> loss = Captured(Trace_ELBO())
        >>> svi = SVI(model, AutoNormal(model), pyro.optim.Adam({"lr": 0.01}), loss=loss)
        >>> losses = [svi.step(torch.tensor([1.0, 2.0, 3.0])) for _ in range(5)]
        >>> print(loss.explain().splitlines()[0])  # doctest: +ELLIPSIS
        model with AutoNormal: graph of ... operators
    """

    def __init__(self, objective: ELBO, *, compile: Compile = "auto") -> None:
        name = type(objective).__name__
        if not isinstance(objective, ELBO):
            raise ArgumentError(f"Captured takes a Pyro objective such as pyro.infer.Trace_ELBO(), got {name}")
        if isinstance(objective, Captured) or name.startswith("Jit"):
            plain = name.removeprefix("Jit") if name.startswith("Jit") else "Trace_ELBO"
            raise ArgumentError(
                f"{name} is compiled already: give Captured the plain objective, such as pyro.infer.{plain}()"
            )
        self.objective: Any = objective
        self.compile = check_compile(compile)
        self._graphs: dict[Any, list[CapturedLoss]] = {}  # by key; the one used last comes last
        self._refused: dict[Any, str] = {}  # keys and codes of calls that Pyro runs
        self._refused_calls: dict[str, str] = {}
        self._last: dict[Any, LossCall] = {}
        self._failures: dict[Any, int] = {}
        self._used: dict[Any, int] = {}  # by key, when
        self._clock = 0
        self._foreign = 0

    def __getattr__(self, name: str) -> Any:
        if name == "objective":  # while a copy is made
            raise AttributeError(name)
        return getattr(self.objective, name)

    def loss_and_grads(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> Any:
        """The loss, as the objective gives it; gradients are added to ``.grad`` of the parameters."""
        key, leaves = self._key("gradients", model, guide, args, kwargs)
        graph = self._find(key, leaves)
        if graph is None:
            found = self._run_pyro("gradients", key, leaves, model, guide, args, kwargs)
            tell(guide, *args, **kwargs)
            return found
        results = graph.run(leaves)
        tell(guide, *args, **kwargs)
        if _PYRO_STACK:
            _show_params(graph, to_step=sys._getframe(1).f_code is SVI.step.__code__)
        _add_gradients(graph.targets, graph.gradients(results))
        return _numbers(results, graph.num_losses)

    def loss(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> Any:
        """The loss alone, as the objective gives it."""
        key, leaves = self._key("loss", model, guide, args, kwargs)
        graph = self._find(key, leaves)
        if graph is None:
            return self._run_pyro("loss", key, leaves, model, guide, args, kwargs)
        results = graph.run(leaves)
        if _PYRO_STACK:
            _show_params(graph, to_step=False)
        return _numbers(results, graph.num_losses)

    def differentiable_loss(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> Tensor:
        """The loss as a tensor whose ``backward`` gives the gradients of :meth:`loss_and_grads`; only once."""
        kind: Kind = "gradients" if torch.is_grad_enabled() else "loss"
        key, leaves = self._key(kind, model, guide, args, kwargs)
        graph = self._find(key, leaves)
        if graph is None and not self._runs_pyro(key, model, guide):
            self._run_pyro(kind, key, leaves, model, guide, args, kwargs, quietly=True)
            graph = self._find(key, leaves)
        if graph is None:
            result: Tensor = self.objective.differentiable_loss(model, guide, *args, **kwargs)
            return result
        results = graph.run(leaves)
        if _PYRO_STACK:
            _show_params(graph, to_step=False)
        attached: Tensor = _Attach.apply(results[0], graph.gradients(results), *graph.targets)
        return attached

    def explain(self) -> str:
        """Which graphs there are, which tier runs each, its time per call, and why Pyro runs the others."""
        lines = [line for graphs in self._graphs.values() for graph in graphs for line in graph.describe()]
        lines += [f"{name}: run by Pyro, because {reason}" for name, reason in self._refused_calls.items()]
        if self._foreign:
            lines.append(f"{self._foreign} calls inside other handlers, run by Pyro")
        return "\n".join(lines) or "nothing has been captured: the first call captures"

    def _get_trace(self, model: Program, guide: Program, args: Any, kwargs: Any) -> Any:
        return self.objective._get_trace(model, guide, args, kwargs)

    # --- finding and making graphs ------------------------------------------------------------------------------------

    def _key(
        self, kind: Kind, model: Program, guide: Program, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> tuple[Any, Sequence[Tensor]]:
        """What a graph belongs to, ``None`` if Pyro has to run the call; and the tensors among the arguments."""
        for handler in _PYRO_STACK:
            if not (isinstance(handler, TraceMessenger) and handler.param_only):
                self._foreign += 1
                return None, ()
        leaves, arguments = describe(args, kwargs)
        autocast = torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda")
        key: Any = (kind, model, guide, arguments, torch.get_default_dtype(), autocast)
        try:
            hash(key)
        except TypeError:  # a model or guide without a hash; what its id stands for is kept by its graph
            key = (kind, id(model), id(guide), arguments, torch.get_default_dtype(), autocast)
        return key, leaves

    def _find(self, key: Any, leaves: Sequence[Tensor]) -> CapturedLoss | None:
        """A graph that stands for the call as things are now."""
        graphs = self._graphs.get(key, [])
        for graph in reversed(graphs):
            if not graph.changed():
                break
        else:
            return None
        self._clock += 1
        self._used[key] = self._clock
        if graph is not graphs[-1]:
            graphs.remove(graph)
            graphs.append(graph)
        if graph.checks:
            try:
                graph.check_again(leaves)
            except CaptureError as error:
                del self._graphs[key]
                self._refuse(key, graph.call, _first_line(error))
                return None
        return graph

    def _runs_pyro(self, key: Any, model: Program, guide: Program) -> bool:
        if key is None or key in self._refused:
            return True
        return bool(self._refused) and LossCall(key[0], self.objective, model, guide, (), {}).code in self._refused

    def _run_pyro(
        self,
        kind: Kind,
        key: Any,
        leaves: Sequence[Tensor],
        model: Program,
        guide: Program,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        *,
        quietly: bool = False,
    ) -> Any:
        """Let Pyro run the call, and capture it; ``quietly`` leaves no gradients and no trace of random numbers."""
        method = self.objective.loss_and_grads if kind == "gradients" else self.objective.loss
        if self._runs_pyro(key, model, guide):
            return method(model, guide, *args, **kwargs)
        call = LossCall(kind, self.objective, model, guide, args, kwargs)
        with modules_run() as modules, poutine.trace(param_only=True) as tracer:
            if quietly:
                # parameters that are missing are made, and stay
                with seeded(None), unchanged(Guards(call.functions).modules, {}), torch.no_grad():
                    result: Any = self.objective.loss(model, guide, *args, **kwargs)
            else:
                result = method(model, guide, *args, **kwargs)
        drop_provenance()
        stored = pyro.get_param_store()._params  # where a run may have put another tensor
        traced = {name: _leaf(node["value"]) for name, node in tracer.trace.nodes.items()}
        params = {name: stored.get(name, leaf) for name, leaf in traced.items()}
        graphs = self._graphs.get(key, [])
        if all(graph.changed() for graph in graphs):  # else the run has made the parameters that were missing
            self._capture(key, call, leaves, modules, params)
        return result

    def _capture(self, key: Any, call: LossCall, leaves: Sequence[Tensor], modules: Any, params: Any) -> None:
        change = next((graph.changed() for graph in self._graphs.get(key, ())), "")
        unused = [graph for graphs in self._graphs.values() for graph in graphs if graph.call.code == call.code]
        unused = [graph for graph in unused if graph.runs < PAYING_RUNS]
        if len(unused) >= MAX_UNUSED:
            what = change or call.difference(self._last[call.code])
            self._refuse(
                call.code,
                call,
                f"{MAX_UNUSED} graphs of it were captured and hardly used, as something else than the values of "
                f"tensors changes from call to call ({what}); pass numbers that change as tensors, and keep the "
                "functions, shapes and attributes",
            )
            return
        self._last[call.code] = call
        try:
            graph = CapturedLoss(call, leaves, modules, params, self.compile)
        except CaptureError as error:
            self._refuse(key, call, _first_line(error))
            return
        self._graphs.setdefault(key, []).append(graph)
        self._used[key] = self._clock
        if len(self._graphs) > MAX_GRAPHS:
            oldest = min(self._graphs, key=self._used.__getitem__)
            del self._graphs[oldest], self._used[oldest]

    def _refuse(self, key: Any, call: LossCall, reason: str) -> None:
        """Let Pyro run it from now on, and say so once."""
        self._refused[key] = reason
        self._failures[call.code] = self._failures.get(call.code, 0) + 1
        if self._failures[call.code] >= MAX_FAILURES:
            self._refused[call.code] = reason
        if call.program not in self._refused_calls:
            self._refused_calls[call.program] = reason
            warnings.warn(
                f"{call.program} is run by Pyro, not as a captured graph: {reason}", LabWarning, stacklevel=_depth()
            )


_WATCHERS: WeakKeyDictionary[Any, list[Any]] = WeakKeyDictionary()
"""Parts of guides that take note of their calls."""


def tell(guide: Any, *args: Any, **kwargs: Any) -> None:
    """Let guides that take note of their calls (``see``) know of one that a graph has made in their place."""
    if not isinstance(guide, nn.Module) and not hasattr(guide, "see"):
        return
    watchers = _WATCHERS.get(guide)
    if watchers is None:
        parts: Any = [guide] if hasattr(guide, "see") else guide.modules()
        # a bound method would keep its guide alive
        watchers = _WATCHERS[guide] = [WeakMethod(part.see) for part in parts if hasattr(part, "see")]
    for watcher in watchers:
        see = watcher()
        if see is not None:
            see(*args, **kwargs)


def _depth() -> int:
    """Levels of the stack up to the code that called the objective, or the SVI that called it."""
    frame, depth = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_globals.get("__name__") in (__name__, SVI.__module__):
        frame, depth = frame.f_back, depth + 1
    return depth


def _first_line(error: CaptureError) -> str:
    return str(error).splitlines()[0]  # Pyro adds the shapes of the trace to errors


def _leaf(value: Any) -> Tensor:
    leaf: Tensor = value.unconstrained() if hasattr(value, "unconstrained") else value
    return leaf


def _show_params(graph: CapturedLoss, *, to_step: bool) -> None:
    """Let the tracers around the call see the parameters."""
    if to_step and len(_PYRO_STACK) == 1:
        tracer: Any = _PYRO_STACK[0]
        tracer.trace.nodes.update(graph.shown)  # it wants the unconstrained values and nothing else
        return
    store = pyro.get_param_store()
    for name, leaf in graph.params.items():
        if name in store:
            pyro.param(name)
        else:  # of a module that keeps its parameters to itself
            leaf.unconstrained = weakref.ref(leaf)  # type: ignore[attr-defined]
            tracers: Any = _PYRO_STACK
            for handler in tracers:
                handler.trace.add_node(name, **{**graph.shown[name], "value": leaf})


def _add_gradients(targets: Sequence[Tensor], gradients: Sequence[Tensor]) -> None:
    present: Any = [tensor.grad for tensor in targets]
    if all(gradient is not None for gradient in present):
        if present:
            torch._foreach_add_(present, [*gradients])
        return
    for tensor, gradient in zip(targets, gradients, strict=True):
        # the next run may write over its results
        tensor.grad = gradient.clone() if tensor.grad is None else tensor.grad.add_(gradient)


def _numbers(results: Sequence[Tensor], number: int) -> Any:
    """The loss as the objective gives it."""
    losses: tuple[float, ...] = tuple(float(value) for value in results[:number])
    for value in losses:
        if value != value:
            warn_if_nan(value, "loss")  # type: ignore[call-overload]
    return losses if number > 1 else losses[0]


class _Attach(torch.autograd.Function):
    """Gives a loss the gradients that were computed with it."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, gradients: Sequence[Tensor], *targets: Tensor) -> Tensor:
        ctx.save_for_backward(*(gradient.clone() for gradient in gradients))  # the next run may write over them
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Any, ...]:
        return (None, None, *(upstream * gradient for gradient in ctx.saved_tensors))
