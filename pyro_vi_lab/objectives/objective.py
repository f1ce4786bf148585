"""What the objectives of this folder have in common: runs, and a loss with a surrogate for its gradient."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Iterator
from typing import Any, ClassVar, NamedTuple

import pyro
from pyro.infer.util import torch_item
from pyro.util import warn_if_nan
from torch import Tensor

from pyro_vi_lab.errors import ArgumentError
from pyro_vi_lab.objectives.runs import Program, Run, run
from pyro_vi_lab.rows import SameRows


class Part(NamedTuple):
    """A part of the loss, and what has the gradient of it."""

    loss: Tensor | float
    surrogate: Tensor | float


class Objective(pyro.infer.ELBO):
    """A negative bound on the log evidence, for :class:`pyro.infer.SVI`.

    Args:
        num_particles: Draws per step, K.
        gradient: Name of the estimator.
        **kwargs: As of :class:`pyro.infer.ELBO` (``max_plate_nesting``, ``vectorize_particles``, ...).

    Raises:
        ArgumentError: ``num_particles`` is no positive whole number, or there is no such estimator.
    """

    gradients: ClassVar[tuple[str, ...]]
    """Names of the estimators."""
    averages_particles: bool = False
    """Whether loss and gradient are means over particles, each of which is a run of its own."""
    same_rows: ClassVar[bool] = False
    """Whether all particles have to see the same rows of a subsampled plate."""

    def __init__(self, num_particles: int, gradient: str, **kwargs: Any) -> None:
        if isinstance(num_particles, bool) or not isinstance(num_particles, int) or num_particles < 1:
            raise ArgumentError(f"num_particles must be a whole number of at least 1, got {num_particles!r}")
        if gradient not in self.gradients:
            *most, last = map(repr, self.gradients)
            raise ArgumentError(f"gradient must be {', '.join(most)} or {last}, got {gradient!r}")
        super().__init__(num_particles=num_particles, **kwargs)
        self.gradient = gradient

    @property
    def cuts(self) -> bool:
        """Whether the gradient needs the draws as leaves."""
        return self.gradient != "reparam"

    @abstractmethod
    def _parts(self, runs: Iterable[Run], *, differentiate: bool) -> Iterator[Part]:
        """Parts of the loss, whose graphs do not depend on each other; surrogates only if asked for."""

    def loss(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> Any:
        """The loss, a number: minus the estimate of the bound."""
        loss: Any = 0.0
        for part in self._parts(self._runs(model, guide, args, kwargs, cut=False), differentiate=False):
            loss = loss + torch_item(part.loss)
        warn_if_nan(loss, "loss")
        return loss

    def loss_and_grads(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> Any:
        """The loss, a number; its gradient is added to ``.grad`` of the parameters."""
        loss: Any = 0.0
        for part in self._parts(self._runs(model, guide, args, kwargs, cut=self.cuts), differentiate=True):
            if isinstance(part.surrogate, Tensor) and part.surrogate.requires_grad:
                part.surrogate.backward(retain_graph=self.retain_graph)
            loss = loss + torch_item(part.loss)
        warn_if_nan(loss, "loss")
        return loss

    def differentiable_loss(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> Any:
        """The loss as a tensor whose ``backward`` gives the gradient of :meth:`loss_and_grads`."""
        loss: Any = 0.0
        for part in self._parts(self._runs(model, guide, args, kwargs, cut=self.cuts), differentiate=True):
            loss = loss + _detached(part.loss) + (part.surrogate - _detached(part.surrogate))
        warn_if_nan(loss, "loss")
        return loss

    def _get_trace(self, model: Program, guide: Program, args: Any, kwargs: Any) -> Any:
        return self._run(model, guide, args, kwargs, cut=False).traces

    def _run(self, model: Program, guide: Program, args: Any, kwargs: Any, *, cut: bool) -> Run:
        return run(model, guide, args, kwargs, max_plate_nesting=self.max_plate_nesting, cut=cut)

    def _runs(
        self, model: Program, guide: Program, args: Any, kwargs: Any, *, cut: bool, same_rows: bool | None = None
    ) -> Iterator[Run]:
        if self.vectorize_particles:
            if self.max_plate_nesting == float("inf"):
                self._guess_max_plate_nesting(model, guide, args, kwargs)
            model, guide = self._vectorized_num_particles(model), self._vectorized_num_particles(guide)
            yield self._run(model, guide, args, kwargs, cut=cut)
            return
        rows: dict[str, Tensor] = {}
        for _ in range(self.num_particles):
            if not (self.same_rows if same_rows is None else same_rows):
                yield self._run(model, guide, args, kwargs, cut=cut)
                continue
            with SameRows(rows):
                result = self._run(model, guide, args, kwargs, cut=cut)
            rows.update(result.rows)
            yield result


def _detached(value: Tensor | float) -> Tensor | float:
    return value.detach() if isinstance(value, Tensor) else value
