"""One captured call of an objective: its graph, where its parameters are, and what must not change."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pyro_vi_lab.agreement import agrees
from pyro_vi_lab.errors import CaptureError
from pyro_vi_lab.guards import Guards
from pyro_vi_lab.isolation import seeded
from pyro_vi_lab.loss_call import LossCall
from pyro_vi_lab.loss_graph import LossGraph, capture_loss
from pyro_vi_lab.loss_trace import LossAndGradients
from pyro_vi_lab.places import Places, drop_provenance, held, unchanged
from pyro_vi_lab.tiers import Compile, Runner

MAX_RESTORED = 2**22
"""Tensors that are no parameters or buffers are put back after a check if they have no more numbers than this."""


class CapturedLoss:
    """The graph of one call of an objective, with the parameters as they are at each run.

    Args:
        call: The call.
        leaves: The tensors among its arguments.
        modules: Modules that Pyro ran in it.
        params: Parameters that Pyro asked for in it: names and unconstrained leaves.
        compile: As of :class:`~pyro_vi_lab.tiers.Runner`.

    Attributes:
        results: Of the last run: losses, gradients, and values of parameters that the run sets.
        runs: Number of runs.
        checks: How many of the next runs are compared with Pyro.

    Raises:
        CaptureError: The call cannot be captured, or its graph disagrees with Pyro.
    """

    def __init__(
        self,
        call: LossCall,
        leaves: Sequence[Tensor],
        modules: Sequence[nn.Module],
        params: dict[str, Tensor],
        compile: Compile,
    ) -> None:
        self.call, self.runs, self.checks = call, 0, 1
        if any(leaf.requires_grad for leaf in leaves):
            raise CaptureError("an argument requires a gradient")
        drop_provenance()
        self._guards = Guards(call.functions, modules)
        graph, example = self._capture(leaves)
        self.num_losses, self._num_gradients = len(example.loss), len(example.gradients)
        self._find_places(graph, example, params)
        self._set_graph(graph, leaves, compile)
        for seed in (0, 1):
            self._check(leaves, seed)

    # --- capturing ----------------------------------------------------------------------------------------------------

    def _capture(self, leaves: Sequence[Tensor]) -> tuple[LossGraph, LossAndGradients]:
        found: list[LossAndGradients] = []
        one = self.call.of_one_particle()

        def function(*inputs: Tensor) -> tuple[Tensor, ...]:
            found[:] = [self.call.run(one, inputs)]
            return (*found[0].loss, *found[0].gradients, *found[0].values)

        modules = self._guards.modules
        small = {key: value for key, value in self._guards.tensors.items() if value.numel() <= MAX_RESTORED}
        with seeded(None), unchanged(modules, small):
            before = held(modules)
            changing = {key: value for key, value in before.items() if value.requires_grad or value.is_floating_point()}
            graph = capture_loss(function, leaves, changing)
            replaced = {id(tensor) for tensor in found[0].replaced}
            if before.keys() - held(modules).keys() - replaced:
                raise CaptureError("running it replaces a parameter or a buffer of a module by another tensor")
        if change := self._guards.changed():
            raise CaptureError(f"running it changes {change}")
        lost = [number for number in graph.written if id(graph.closed_over[number]) not in before.keys() | small.keys()]
        if lost:
            shape = tuple(graph.closed_over[lost[0]].shape)
            raise CaptureError(f"it writes into a tensor of shape {shape} that is no parameter, buffer or argument")
        return graph, found[0]

    def _find_places(self, graph: LossGraph, example: LossAndGradients, params: dict[str, Tensor]) -> None:
        number: dict[int, int] = {}
        tensors: list[Tensor] = []
        constants = [value for value in held(self._guards.modules).values() if not value.is_floating_point()]
        for tensor in (*graph.closed_over, *example.leaves, *example.replaced, *params.values(), *constants):
            if number.setdefault(id(tensor), len(tensors)) == len(tensors):
                tensors.append(tensor)
        self._num_inputs = len(graph.closed_over)
        self._targets = [number[id(leaf)] for leaf in example.leaves]
        self._replaced = [number[id(leaf)] for leaf in example.replaced]
        self._params = {name: number[id(leaf)] for name, leaf in params.items()}
        fixed = {number[id(tensor)] for tensor in constants} - {*range(self._num_inputs)}
        may_change = [tensor for position, tensor in enumerate(tensors) if position not in fixed]
        self._guards.watch_values([*graph.constants, *constants], except_for=may_change)
        self._places = Places(tensors, self._guards.modules, fixed)

    def _set_graph(self, graph: LossGraph, leaves: Sequence[Tensor], compile: Compile) -> None:
        number = self.call.num_particles
        self._one, self._graph, self._repeats, self.notes = graph, graph, number, []
        if number > 1:
            inputs = [*self._places.tensors[: self._num_inputs], *leaves]
            try:
                if self._replaced:
                    raise CaptureError("a run sets parameters")
                with seeded(None):
                    example = [*inputs, *(noise.draw() for noise in graph.noise)]
                    self._graph = graph.particles(number, example)
                self._repeats = 1
            except CaptureError as error:
                self.notes.append(f"{number} particles one after another: {error}")
        pure = not self._graph.draws and not self._graph.written
        self.runner = Runner(self._graph.module, compile=compile, pure=pure)
        self._draw = [noise.draw for noise in self._graph.noise]
        self._take_tensors()

    def _take_tensors(self) -> None:
        tensors = self._places.tensors
        self._inputs = tensors[: self._num_inputs]
        self.targets = [tensors[number] for number in self._targets]
        self.params = {name: tensors[number] for name, number in self._params.items()}
        self.shown = {
            name: {"type": "param", "name": name, "value": _Shown(tensor), "is_observed": False}
            for name, tensor in self.params.items()
        }

    # --- running ------------------------------------------------------------------------------------------------------

    def changed(self) -> str:
        """What has changed since the capture and needs another one; empty if nothing has."""
        if self._places.moved():
            if change := self._places.follow():
                return change
            self._take_tensors()
        return self._guards.changed()

    def run(self, leaves: Sequence[Tensor]) -> Sequence[Tensor]:
        """The losses and the gradients; parameters and buffers that Pyro would set are set."""
        self.runs += 1
        with torch.no_grad():
            if self._repeats == 1:
                results = self.runner(*self._inputs, *leaves, *[draw() for draw in self._draw])
            else:
                results = self._run_repeatedly(leaves)
            if self._replaced:
                self._set_params(results)
        return results

    def _run_repeatedly(self, leaves: Sequence[Tensor]) -> Sequence[Tensor]:
        each = []
        for _ in range(self._repeats):
            results = self.runner(*self._inputs, *leaves, *[draw() for draw in self._draw])
            each.append([value.clone() for value in results])
            if self._replaced:
                self._set_params(results)
        means = [torch.stack(values).mean(0) for values in zip(*each, strict=True)]
        return [*means[: self.num_losses + self._num_gradients], *results[self.num_losses + self._num_gradients :]]

    def _set_params(self, results: Sequence[Tensor]) -> None:
        for number, value in zip(self._replaced, results[self.num_losses + self._num_gradients :], strict=True):
            self._places.tensors[number].copy_(value)

    def gradients(self, results: Sequence[Tensor]) -> Sequence[Tensor]:
        """The part of the results of a run that is for ``targets``."""
        return results[self.num_losses : self.num_losses + self._num_gradients]

    # --- checking -----------------------------------------------------------------------------------------------------

    def check_again(self, leaves: Sequence[Tensor]) -> None:
        """Compare with Pyro at the parameters and the data of a later call.

        Raises:
            CaptureError: They disagree.
        """
        self.checks -= 1
        self._check(leaves, 2)

    def _check(self, leaves: Sequence[Tensor], seed: int) -> None:
        try:
            self._compare(leaves, seed)
        except CaptureError:
            raise
        except (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError) as error:
            raise CaptureError(f"it fails at a check point: {(str(error).splitlines() or [''])[0]}") from error

    def _compare(self, leaves: Sequence[Tensor], seed: int) -> None:
        modules, one = self._guards.modules, self.call.of_one_particle()
        state = [self._inputs[number] for number in sorted(self._one.written)]
        kept = {id(tensor): tensor for tensor in state}
        with seeded(seed), unchanged(modules, kept):
            value = self.call.run(one, leaves)
            expected = [*value.loss, *self._in_order(value), *value.values, *(tensor.clone() for tensor in state)]
        with seeded(seed), unchanged(modules, kept), torch.no_grad():
            got = self._one.module(*self._inputs, *leaves, *(noise.draw() for noise in self._one.noise))
            got = [*got, *(tensor.clone() for tensor in state)]
        if len(expected) != len(got) or not all(map(agrees, expected, got)):
            raise CaptureError(
                "the captured graph disagrees with Pyro at a check point: something that it reads changes"
            )
        if self._graph is not self._one:
            self._check_particles(leaves, seed)

    def _in_order(self, value: LossAndGradients) -> list[Tensor]:
        """The gradients in the order of ``targets``."""
        gradients = {id(leaf): gradient for leaf, gradient in zip(value.leaves, value.gradients, strict=True)}
        if gradients.keys() != {id(tensor) for tensor in self.targets}:
            raise CaptureError("other parameters get gradients in other runs")
        return [gradients[id(tensor)] for tensor in self.targets]

    def _check_particles(self, leaves: Sequence[Tensor], seed: int) -> None:
        with seeded(seed):
            noise = [source.draw() for source in self._graph.noise]
        with torch.no_grad():
            many = self._graph.module(*self._inputs, *leaves, *noise)
            each = [
                self._one.module(*self._inputs, *leaves, *(values[number] for values in noise))
                for number in range(self.call.num_particles)
            ]
        means = [torch.stack(values).mean(0) for values in zip(*each, strict=True)]
        if not all(map(agrees, means, many)):
            raise CaptureError("the graph of several particles disagrees with that of one")

    def describe(self) -> list[str]:
        """Lines of :meth:`pyro_vi_lab.captured.Captured.explain`."""
        runner = self.runner
        lines = [f"{self.call.name}: graph of {self._graph.num_nodes} operators"]
        if runner.calls:
            lines.append(f"  tier {runner.tier}, {runner.microseconds:.0f} µs a call")
        if runner.compile_seconds:
            lines.append(f"  {runner.compile_seconds:.1f} s spent compiling")
        return [*lines, *(f"  {note}" for note in (*self.notes, *runner.notes))]


class _Shown:
    """What SVI.step reads of a parameter."""

    __slots__ = ("unconstrained",)

    def __init__(self, leaf: Tensor) -> None:
        self.unconstrained: Any = lambda: leaf
