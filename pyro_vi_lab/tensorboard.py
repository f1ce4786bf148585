"""Steps of a fit as curves of TensorBoard."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pyro_vi_lab.callbacks import Callback
from pyro_vi_lab.errors import ArgumentError, ExtraError, FileError

if TYPE_CHECKING:
    from pyro_vi_lab.fitted import Fit


class TensorBoard(Callback):
    """Writes every row of a fit's history where ``tensorboard --logdir DIRECTORY`` shows it while the fit goes on.

    One curve per column of :attr:`Fit.history`; a restart that goes after another has curves of its own. Needs the
    extra ``tensorboard``, which is imported when the first step is written.

    Args:
        directory: Where the files go; a directory per run lays the runs over each other.
        every: Steps from one point to the next; the first and the last step are there in any case.

    Raises:
        ArgumentError: ``every`` is no positive whole number.
        ExtraError: TensorBoard is not installed.
        FileError: The directory cannot be written to.

    Example:
        >>> import tempfile, pyro, pyro.distributions as dist
        >>> import pyro_vi_lab as vl
        >>> def model():
        ...     pyro.sample("x", dist.Normal(3.0, 2.0))
        >>> directory = tempfile.mkdtemp()
        >>> fit = vl.fit(vl.Problem(model), callbacks=[vl.TensorBoard(directory)], progress=False)
        >>> [path.name.split(".")[0] for path in Path(directory).iterdir()]
        ['events']
    """

    def __init__(self, directory: str | Path, *, every: int = 1) -> None:
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise ArgumentError(f"every must be a positive whole number of steps, got {every!r}")
        self.directory, self.every = Path(directory), every
        self._writer: Any = None
        self._last: tuple[int, Mapping[str, float]] | None = None

    def on_step(self, step: int, record: Mapping[str, float]) -> None:
        """Write a step."""
        self._last = (step, record)
        if step % self.every == 0 or self._writer is None:
            self._write(step, record)

    def on_end(self, fit: Fit) -> None:
        """Write the last step and how the fit ended."""
        if self._last is None:
            return
        step, record = self._last
        if step % self.every:
            self._write(step, record)
        self._writer.add_text("status", fit.message, step)
        self._writer.close()
        self._writer = self._last = None

    def _write(self, step: int, record: Mapping[str, float]) -> None:
        if self._writer is None:
            self._writer = _writer(self.directory)
        restart = f"/restart {record['restart']:.0f}" if record.get("restart") else ""
        for name, value in record.items():
            if name != "restart" and math.isfinite(value):
                self._writer.add_scalar(f"{name}{restart}", value, step)


def _writer(directory: Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ExtraError(
            "TensorBoard is not installed: it comes with the extra, pip install 'pyro-vi-lab[tensorboard]'"
        ) from error
    try:
        return SummaryWriter(str(directory))
    except OSError as error:
        raise FileError(f"cannot write to {directory}: {error.strerror or error}; choose another directory") from error
