"""What a fit shows while it runs."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def fit_progress(show: bool, title: str, max_steps: int) -> Iterator[Callable[[int, float, str], None]]:
    """A line on a terminal that begins only when the work has taken a second."""
    if not (show and sys.stderr.isatty()):
        yield lambda step, loss, note: None
        return
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    bar = Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        TimeElapsedColumn(),
        console=Console(stderr=True),
        transient=True,
    )
    task = bar.add_task(title, total=max_steps)
    began = time.perf_counter()

    def on_step(step: int, loss: float, note: str) -> None:
        if not bar.live.is_started and time.perf_counter() - began > 1:
            bar.start()
        bar.update(task, description=f"{title}: step {step}, negative ELBO {loss:.2f}, {note}")

    try:
        yield on_step
    finally:
        bar.stop()
