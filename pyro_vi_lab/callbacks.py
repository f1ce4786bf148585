"""Callbacks of a fit: told of every step, and able to end it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from pyro_vi_lab.density_engine import Status
from pyro_vi_lab.errors import ArgumentError

if TYPE_CHECKING:
    from pyro_vi_lab.fitted import Fit


@runtime_checkable
class Callback(Protocol):
    """Told of every step of a fit, whichever way it goes; derive from it and write what is needed.

    Example:
        >>> import pyro, pyro.distributions as dist, torch
        >>> import pyro_vi_lab as vl
        >>> class StopBelow(vl.Callback):
        ...     def __init__(self, bound):
        ...         self.bound = bound
        ...
        ...     def on_step(self, step, record):
        ...         return record["negative_elbo"] < self.bound
        >>> def model():
        ...     pyro.sample("x", dist.Normal(torch.zeros(3), 1e-3).to_event(1))
        >>> fit = vl.fit(vl.Problem(model), callbacks=[StopBelow(1e4)], progress=False)
        >>> fit.status.value, fit.history["negative_elbo"][-1] < 1e4
        ('out of steps', np.True_)
    """

    def on_step(self, step: int, record: Mapping[str, float]) -> bool | None:
        """Called after every step.

        Args:
            step: Its number; 0 is the start, of fits that know their bound there.
            record: One row of :attr:`Fit.history`, by the same names (``negative_elbo``, or ``negative_log_density``
                of a point, and ``seconds`` are always there); of several restarts that of the best. Restarts that go
                one after the other number their steps anew, and have ``restart``.

        Returns:
            ``True`` to end the fit here: its status is then ``OUT_OF_STEPS``, and its guide is where it was.
        """
        return None

    def on_end(self, fit: Fit) -> None:
        """Called once with the result, unless the fit ends with an error."""
        return None


class Watch:
    """Tells callbacks of the steps of a fit.

    Args:
        callbacks: Who is told.

    Attributes:
        stopped_by: Name of the callback that has ended the fit; empty as long as none has.
    """

    def __init__(self, callbacks: Sequence[Callback] = ()) -> None:
        self.callbacks = tuple(callbacks)
        self.stopped_by = ""

    def __call__(self, step: int, row: Callable[[], Mapping[str, float]]) -> bool:
        """Tell of a step; whether the fit is to end.

        Args:
            step: Its number.
            row: Makes the record, if somebody is there to be told.
        """
        if self.callbacks and not self.stopped_by:
            record = row()
            for callback in self.callbacks:
                if callback.on_step(step, record):
                    self.stopped_by = self.stopped_by or type(callback).__name__
        return bool(self.stopped_by)

    def ended(self, fit: Fit) -> Fit:
        """The result, which says who has ended it; the callbacks are told of it."""
        if self.stopped_by and fit.status is Status.OUT_OF_STEPS:
            steps = f"{fit.num_steps:,} step{'s' * (fit.num_steps != 1)}"
            fit = replace(fit, message=f"stopped by {self.stopped_by} after {steps}, not converged")
        for callback in self.callbacks:
            callback.on_end(fit)
        return fit


def checked(callbacks: Any) -> tuple[Callback, ...]:
    """The callbacks that a user gave.

    Raises:
        ArgumentError: Something among them is none.
    """
    if isinstance(callbacks, Callback):
        raise ArgumentError(f"callbacks is a list: callbacks=[{type(callbacks).__name__}(...)]")
    for one in callbacks:
        if isinstance(one, type) or not isinstance(one, Callback):
            what = f"the class {one.__name__}" if isinstance(one, type) else repr(one)
            raise ArgumentError(
                f"callbacks has {what}, which is no callback: give an object with on_step(step, record) and on_end(fit)"
                ", such as one of a class derived from pyro_vi_lab.Callback"
            )
    return tuple(callbacks)
