"""How a graph is run: interpreted at first, compiled once it has run long enough for that to pay."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.fx import GraphModule

from pyro_vi_lab.agreement import agrees
from pyro_vi_lab.capture import script
from pyro_vi_lab.errors import ArgumentError, CompileError, LabError, LabWarning
from pyro_vi_lab.isolation import seeded
from pyro_vi_lab.native import compile_native, compiler, say_no_compiler

Compile = bool | Literal["auto"]
Function = Callable[..., Sequence[Tensor]]

NATIVE_SECONDS = 0.4
NATIVE_SECONDS_PER_NODE = 2e-3
"""What the C compiler takes for a graph, about."""
INDUCTOR_SECONDS = 40.0
"""What Inductor takes on a machine that has not used it before, about."""
SCRIPT_CALLS = 60
"""Calls after which TorchScript's interpreter pays."""
WARM_CALLS, TIMED_CALLS = 3, 5


def check_compile(compile: object) -> Compile:
    """``compile`` if it is one of its three values.

    Raises:
        ArgumentError: It is not.
    """
    if compile in (True, False, "auto"):
        return compile
    raise ArgumentError(f"compile must be True, False or 'auto', got {compile!r}")


class Runner:
    """A graph and the fastest way to run it that has paid so far.

    A compilation is begun when the time spent so far is what it would cost, so that in the end no more than about
    twice the best time is spent, however many calls there are. A compiled graph is compared with the interpreted one
    at the inputs of that call before it is used, and used only if it is faster.

    Results may be overwritten by the next call.

    Args:
        module: The graph.
        compile: ``"auto"`` as above, ``True`` at the first call, ``False`` never.
        pure: Whether the graph neither draws random numbers nor writes into its inputs.

    Attributes:
        tier: ``"graph"`` (interpreted by Python), ``"script"`` (by TorchScript), ``"native"`` (C), ``"inductor"``.
        seconds: Time spent in calls, in the present tier.
        calls: Number of calls, in the present tier.
        compile_seconds: Time spent in compilers.
        notes: Why other tiers are not used.

    Raises:
        CompileError: At a call: ``compile`` is ``True`` and nothing can compile the graph.
    """

    def __init__(self, module: GraphModule, *, compile: Compile = "auto", pure: bool = True) -> None:
        self.module, self.compile, self.pure = module, compile, pure
        self.tier = "graph"
        self.seconds, self.compile_seconds, self.calls = 0.0, 0.0, 0
        self.notes: list[str] = []
        self._run: Function = module
        self._candidates = self._plan()

    def __call__(self, *inputs: Tensor) -> Sequence[Tensor]:
        """Run the graph."""
        while self._candidates and self._candidates[0].is_due(self):
            self._promote(self._candidates.pop(0), inputs)
        began = time.perf_counter()
        results = self._run(*inputs)
        self.seconds += time.perf_counter() - began
        self.calls += 1
        return results

    @property
    def microseconds(self) -> float:
        """Mean time of a call so far, in 1e-6 s."""
        return 1e6 * self.seconds / max(self.calls, 1)

    def _plan(self) -> list[Candidate]:
        """Tiers to try, in this order."""
        size = sum(node.op == "call_function" for node in self.module.graph.nodes)
        at_once = self.compile is True
        tiers = [
            Candidate("script", script, calls=SCRIPT_CALLS),
            Candidate("native", _native, seconds=0.0 if at_once else NATIVE_SECONDS + NATIVE_SECONDS_PER_NODE * size),
            Candidate("inductor", _inductor, seconds=0.0 if at_once else INDUCTOR_SECONDS),
        ]
        if not self.pure:
            self.notes.append("no compiler: the graph draws numbers by values of others, or writes in place")
            return tiers[:1]
        return tiers[1:] if at_once else tiers if self.compile else tiers[:1]

    def _promote(self, candidate: Candidate, inputs: Sequence[Tensor]) -> None:
        began = time.perf_counter()
        try:
            with seeded(None):
                made = candidate.make(self.module, _copies(inputs))
            same = self._is_same(made, inputs)
        except (LabError, RuntimeError, OSError) as error:
            self.notes.append(f"{candidate.name}: {(str(error).splitlines() or [''])[0]}")
            if self.compile is True and self.tier == "graph" and not self._candidates and self.pure:
                reasons = "; ".join(self.notes)
                raise CompileError(f"compile=True, but the graph cannot be compiled: {reasons}") from error
            if candidate.name == "native" and compiler() is None:
                say_no_compiler()
            return
        finally:
            self.compile_seconds += time.perf_counter() - began
        if not same:
            self.notes.append(f"{candidate.name}: disagrees with the interpreted graph")
            warnings.warn(
                f"the {candidate.name} tier disagrees with the captured graph and is not used", LabWarning, stacklevel=3
            )
            return
        old, new = _time(self._run, inputs), _time(made, inputs)
        if new >= old:
            self.notes.append(f"{candidate.name}: {new * 1e6:.0f} µs a call, {self.tier}: {old * 1e6:.0f} µs")
            return
        self.tier, self._run = candidate.name, made
        if self.compile is True:
            self._candidates = []
        # what the next tier could save is measured by the time spent in this one
        self.seconds, self.calls = 0.0, 0

    def _is_same(self, made: Function, inputs: Sequence[Tensor]) -> bool:
        """Whether another way to run the graph gives its results, twice; and writes the same into its inputs."""
        for _ in range(2):
            here, there = _copies(inputs), _copies(inputs)
            with torch.no_grad():
                with seeded(0):
                    expected = [*self.module(*here), *here]
                with seeded(0):
                    got = [*made(*there), *there]
            if not all(map(agrees, expected, got)):
                return False
        return True


class Candidate(NamedTuple):
    """A tier to be tried.

    Args:
        name: Its name.
        make: Compiles a graph for inputs such as the given ones.
        seconds: Time spent after which it is tried.
        calls: Number of calls after which it is tried.
    """

    name: str
    make: Callable[[GraphModule, Sequence[Tensor]], Function]
    seconds: float = float("inf")
    calls: float = float("inf")

    def is_due(self, runner: Runner) -> bool:
        """Whether it is time."""
        return runner.seconds >= self.seconds or runner.calls >= self.calls


def _native(module: GraphModule, inputs: Sequence[Tensor]) -> Function:
    if any(tensor.device.type != "cpu" for tensor in inputs):
        raise CompileError("C runs on the CPU alone")
    compiled = compile_native(module, inputs).compiled(1)
    results = [torch.empty(shape, dtype=dtype) for shape, dtype in compiled.source.outputs]

    def run(*inputs: Tensor) -> Sequence[Tensor]:
        # shapes and types were compared when the graph was found
        compiled.run([tensor if tensor.is_contiguous() else tensor.contiguous() for tensor in inputs], results)
        return results

    return run


def _inductor(module: GraphModule, inputs: Sequence[Tensor]) -> Function:
    on_gpu = any(tensor.device.type == "cuda" for tensor in inputs)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore", DeprecationWarning)  # torch's own, at its import of the compiler
        compiled: Function = torch.compile(module, dynamic=False, mode="reduce-overhead" if on_gpu else None)
        compiled(*inputs)
    return compiled


def _copies(inputs: Sequence[Tensor]) -> list[Tensor]:
    return [tensor.detach().clone() for tensor in inputs]


def _time(run: Function, inputs: Sequence[Tensor]) -> float:
    inputs, times = _copies(inputs), []
    with torch.no_grad(), seeded(None):
        for _ in range(WARM_CALLS):
            run(*inputs)
        for _ in range(TIMED_CALLS):
            began = time.perf_counter()
            run(*inputs)
            times.append(time.perf_counter() - began)
    return min(times)
