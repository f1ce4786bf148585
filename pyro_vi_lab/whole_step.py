"""A step of natural-gradient ascent as one graph: particles, bound, gradient, natural step and its judgment."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, Protocol, Self

import torch
from torch import Tensor

from pyro_vi_lab.capture import CHUNK_NUMBERS, compiled_batches, traced_module
from pyro_vi_lab.density import Traceable
from pyro_vi_lab.families import Estimate, Family, Params, Tangent
from pyro_vi_lab.isolation import default_dtype
from pyro_vi_lab.natural_step import Report, State, ValueAndGrad, advance, first_state
from pyro_vi_lab.simplification import simplified
from pyro_vi_lab.tiers import Compile, Runner

MANY_FITS, COMPILED_NUMBERS = 16, 2**26
"""With so many fits at once, and so many numbers in the intermediate results of all gradients to come (about 0.3 s of
interpretation), ``compile="auto"`` runs the gradient as machine code from the start: which tier runs must not depend on
the clock, as the same seed has to give the same numbers."""
EXPECTED_STEPS = 20


class Target(Protocol):
    """What steps ask of a density."""

    dtype: torch.dtype

    @property
    def work(self) -> int:
        """Numbers in the intermediate results of one gradient."""

    def value_and_grad(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Log density and its gradient."""

    def traceable(self) -> Traceable | None:
        """The same as a graph of its data."""

    def chosen(self, index: Tensor) -> Self:
        """The same for some of the fits."""


class Stepper:
    """Takes steps, by a graph of the whole step where that pays.

    Graphs are kept with the density's own, so that later fits of the same problem, or of the same model with other
    data, find them.

    Args:
        density: The target.
        family: The approximating family.
        lr: Largest step size.
        max_kl: First radius of the trust region.
        compile: ``True`` makes whole steps one graph and machine code of it (of the gradient alone where the step of
            the family is large), ``"auto"`` the gradient of many fits.
    """

    def __init__(self, density: Target, family: Family, *, lr: float, max_kl: float, compile: Compile) -> None:
        self.density, self.family, self.compile = density, family, compile
        self.options: dict[str, float] = {"lr": lr, "max_kl": max_kl}
        self.traceable = density.traceable() if compile is True and family.has_small_step else None

    def choose(self, index: Tensor) -> None:
        """Go on with the fits of ``index`` only: of a batch of data sets, with theirs."""
        self.density = self.density.chosen(index)
        self.traceable = None if self.traceable is None else self.density.traceable()

    def first(self, params: Params, half: Tensor) -> State:
        """Where the fits start."""

        def function(target: ValueAndGrad, loc: Tensor, scale: Tensor, noise: Tensor) -> list[Tensor]:
            return _flat(first_state(target, self.family, Params(loc, scale), noise, **self.options))

        return _state(self._call("first", function, (*params, half)))

    def __call__(self, state: State, half: Tensor, *, can_grow: bool) -> tuple[State, Report]:
        """One step of every fit that is active."""

        def function(target: ValueAndGrad, *inputs: Tensor) -> list[Tensor]:
            moved, report = advance(
                target, self.family, _state(inputs[:-1]), inputs[-1], can_grow=can_grow, **self.options
            )
            return [*_flat(moved), *report]

        results = self._call(can_grow, function, (*_flat(state), half))
        number = len(Report._fields)
        return _state(results[:-number]), Report(*results[-number:])

    def _call(self, what: Any, function: Callable[..., list[Tensor]], inputs: Sequence[Tensor]) -> Sequence[Tensor]:
        """A function of the target and of tensors, as a graph if that is wanted and fits into memory."""
        half = inputs[-1]
        particles = 2 * self.family.num_parts * half.numel() // half.shape[-1]
        work = particles * self.density.work
        if self.traceable is None or work > CHUNK_NUMBERS:
            many = half.shape[1] >= MANY_FITS and work * EXPECTED_STEPS >= COMPILED_NUMBERS
            with compiled_batches() if self.compile is True or (self.compile and many) else nullcontext():
                return function(self.density.value_and_grad, *inputs)
        key = (what, len(inputs), self.family, half.shape, *self.options.values())
        if key not in self.traceable.cache:
            self.traceable.cache[key] = self._captured(function, inputs)
        with torch.no_grad(), default_dtype(self.density.dtype):
            # compiled code gives its results in the same memory at every call
            return [value.clone() for value in self.traceable.cache[key](*inputs, *self.traceable.data)]

    def _captured(self, function: Callable[..., list[Tensor]], inputs: Sequence[Tensor]) -> Runner:
        traceable = self.traceable
        assert traceable is not None
        number = len(inputs)

        def whole(*all_inputs: Tensor) -> tuple[Tensor, ...]:
            data = all_inputs[number:]

            def target(z: Tensor) -> tuple[Tensor, Tensor]:
                value, grad = traceable.function(z, *data)
                return value, grad

            return tuple(function(target, *all_inputs[:number]))

        with torch.no_grad(), default_dtype(self.density.dtype):
            module = simplified(traced_module(whole, (*inputs, *traceable.data)), inputs[-1].device)
        return Runner(module, compile=self.compile)


def _flat(state: State) -> list[Tensor]:
    """The tensors of a state; the full curvature is there or not."""
    params, estimate, *others = state
    elbo, error, tangent, *rest = estimate
    return [*params, elbo, error, *rest, *others, *(value for value in tangent if value is not None)]


def _state(values: Sequence[Tensor]) -> State:
    """The state of such a list."""
    loc, scale, elbo, error, length, gap, noise, radius, lr, averaged, signal, rejected, status, *tangent = values
    estimate = Estimate(elbo, error, Tangent(*tangent), length, gap, noise)
    return State(Params(loc, scale), estimate, radius, lr, averaged, signal, rejected, status)
