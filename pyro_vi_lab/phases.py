"""What goes on now, for whoever shows progress: a capture, a compilation, the steps themselves."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_LISTENER: ContextVar[Callable[[str], None] | None] = ContextVar("listener", default=None)


@contextmanager
def phase(what: str) -> Iterator[None]:
    """Say what the block does to the listener, if there is one.

    Example:
        >>> said = []
        >>> with listening(said.append), phase("capturing the model"):
        ...     pass
        >>> said
        ['capturing the model', '']
    """
    listener = _LISTENER.get()
    if listener is None:
        yield
        return
    listener(what)
    try:
        yield
    finally:
        listener("")


@contextmanager
def listening(listener: Callable[[str], None]) -> Iterator[None]:
    """Tell ``listener`` what begins inside the block, and ``""`` when it ends."""
    token = _LISTENER.set(listener)
    try:
        yield
    finally:
        _LISTENER.reset(token)
