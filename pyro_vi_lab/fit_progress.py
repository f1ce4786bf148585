"""What a fit shows while it runs: a line on a terminal or in a notebook."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

from pyro_vi_lab.callbacks import Callback
from pyro_vi_lab.phases import listening

BEGIN_SECONDS = 1.0
"""Work that takes less shows nothing."""
SECONDS = 0.1
"""Between two changes of the line."""


class Screen(Protocol):
    """Where a line is shown."""

    def show(self, text: str) -> None:
        """Replace what is shown."""

    def close(self) -> None:
        """Nothing more is to come."""


class ProgressLine(Callback):
    """A line with the bound, the step, the speed and what happens now.

    Args:
        title: What is fitted.
        screen: Where it is shown.
    """

    def __init__(self, title: str, screen: Screen) -> None:
        self.title, self.screen = title, screen
        self._now, self._steps = "", ""
        self._first: tuple[int, float] | None = None
        self._shown = -SECONDS

    def on_phase(self, what: str) -> None:
        """Show what happens now."""
        self._now = what
        self._show(at_once=True)

    def on_step(self, step: int, record: Mapping[str, float]) -> None:
        """Show a step."""
        now = time.perf_counter()
        if self._first is None or step < self._first[0]:
            self._first = (step, now)
        if now - self._shown < SECONDS:
            return
        self._steps = " · ".join([f"step {step:,}", *words(record)])
        done, seconds = step - self._first[0], now - self._first[1]
        if done and seconds > 0:
            self._steps += f" · {done / seconds:,.0f} steps/s" if done > seconds else f" · {seconds / done:.1f} s/step"
        self._show()

    def _show(self, *, at_once: bool = False) -> None:
        now = time.perf_counter()
        if at_once or now - self._shown >= SECONDS:
            self._shown = now
            parts = [part for part in (self._steps, self._now) if part]
            self.screen.show(f"{self.title}: {' · '.join(parts)}" if parts else self.title)


def words(record: Mapping[str, float]) -> list[str]:
    """What a line says of a step.

    Example:
        >>> words({"negative_elbo": 31.234, "step_size": 1.0, "num_particles": 64, "seconds": 0.1})
        ['negative ELBO 31.23', 'step size 1', '64 particles']
    """
    found = []
    for key, name in (("negative_elbo", "negative ELBO"), ("negative_log_density", "negative log density")):
        if key in record:
            found.append(f"{name} {record[key]:,.2f}")
    if "epoch" in record:
        found.append(f"epoch {record['epoch']:.0f}")
    for key in ("step_size", "radius", "score_divergence"):
        if key in record and record[key] == record[key]:
            found.append(f"{key.replace('_', ' ')} {record[key]:.2g}")
    if "num_particles" in record:
        found.append(f"{record['num_particles']:,.0f} particles")
    return found


@contextmanager
def fit_progress(show: bool, title: str) -> Iterator[tuple[Callback, ...]]:
    """A line that begins when the work has taken a second, as a callback; none where nobody would see it."""
    screen = _screen() if show else None
    if screen is None:
        yield ()
        return
    line = ProgressLine(title, screen)
    try:
        with listening(line.on_phase):
            yield (line,)
    finally:
        screen.close()


def _screen() -> Screen | None:
    if in_notebook():
        return Notebook()
    return Terminal() if sys.stderr.isatty() else None


def in_notebook() -> bool:
    """Whether output goes to the cells of a notebook."""
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    return getattr(shell, "kernel", None) is not None


class Terminal:
    """The last line of a terminal, with a spinner and a clock; it goes when the work is done."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

        self._bar = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),
            TimeElapsedColumn(),
            console=Console(stderr=True),
            transient=True,
        )
        self._task = self._bar.add_task("")
        # a capture may take long, and shows nothing by itself
        self._timer = threading.Timer(BEGIN_SECONDS, self._begin)
        self._timer.daemon = True
        self._lock, self._closed = threading.Lock(), False
        self._timer.start()

    def _begin(self) -> None:
        with self._lock:
            if not self._closed:
                self._bar.start()

    def show(self, text: str) -> None:
        """Replace what is shown."""
        self._bar.update(self._task, description=text)

    def close(self) -> None:
        """Take the line away."""
        self._timer.cancel()
        with self._lock:
            self._closed = True
            self._bar.stop()


class Notebook:
    """A line of output in a cell; it stays, as it was last."""

    def __init__(self) -> None:
        self._began, self._text = time.perf_counter(), ""
        self._handle: Any = None

    def show(self, text: str) -> None:
        """Replace what is shown."""
        self._text = text
        seconds = time.perf_counter() - self._began
        if seconds < BEGIN_SECONDS:
            return
        bundle = {"text/plain": f"{text} · {seconds:.0f} s"}
        if self._handle is None:
            from IPython.display import display

            self._handle = display(bundle, raw=True, display_id=True)
        else:
            self._handle.update(bundle, raw=True)

    def close(self) -> None:
        """Show the last step."""
        if self._handle is not None:
            self.show(self._text)
