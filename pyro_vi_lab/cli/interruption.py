"""Ctrl-C and the time budget: a fit ends after the step it is in, with what it has."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Mapping
from types import FrameType
from typing import Any

from pyro_vi_lab.callbacks import Callback
from pyro_vi_lab.fitted import Fit


class Interruption(Callback):
    """Ends a fit at the first Ctrl-C, and everything at the second, or where no fit is running.

    As a context it takes the signal; outside of the main thread, which alone is sent signals, it does nothing.

    Args:
        say: Told what is going to happen.

    Attributes:
        asked: Whether Ctrl-C was pressed.
    """

    def __init__(self, say: Callable[[str], None]) -> None:
        self.say, self.asked = say, False
        self._stepping = False
        self._before: Any = None

    def __enter__(self) -> Interruption:
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGINT, self._on_signal)
        return self

    def __exit__(self, *error: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)
            self._before = None

    def on_step(self, step: int, record: Mapping[str, float]) -> bool:
        """End the fit if that was asked for."""
        self._stepping = True
        return self.asked

    def on_end(self, fit: Fit) -> None:
        """No fit is running any more."""
        self._stepping = False

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.asked or not self._stepping:
            self.asked = True
            raise KeyboardInterrupt
        self.asked = True
        self.say("Ctrl-C: the fit ends after this step; once more to leave it")


class TimeBudget(Callback):
    """Ends a fit when its time is over.

    Args:
        seconds: From now on.
    """

    def __init__(self, seconds: float) -> None:
        self.end = time.perf_counter() + seconds

    def on_step(self, step: int, record: Mapping[str, float]) -> bool:
        """Whether the time is over."""
        return time.perf_counter() >= self.end
