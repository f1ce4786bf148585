"""Messages between the driver and a contender's process: pickled values over a pair of pipes.

This module imports neither torch nor JAX, so that a contender's cold start counts its own imports only.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, BinaryIO

CORES = 2
"""Cores that each contender may use, for chains and for compilers; operations have one thread each."""
ROOT = Path(__file__).resolve().parent.parent


class Failure(RuntimeError):
    """A contender's process ended without an answer; the text is the end of what it wrote."""


class Channel:
    """Send and receive values; each message is one pickle."""

    def __init__(self, source: BinaryIO, sink: BinaryIO) -> None:
        self._source, self._sink = source, sink

    def send(self, message: Any) -> None:
        pickle.dump(message, self._sink, protocol=pickle.HIGHEST_PROTOCOL)
        self._sink.flush()

    def receive(self) -> Any:
        return pickle.load(self._source)


def inside_worker() -> Channel:
    """The worker's end: the process's own stdout, from which prints are turned away to stderr."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:CORES])
    sink = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    return Channel(sys.stdin.buffer, sink)


def environment(caches: Path) -> dict[str, str]:
    """Environment of a contender, in every library's words.

    One thread per operation, two devices for chains, and a directory for what compilers keep between processes.
    """
    # XLA stops reading its flags at the one without dashes
    flags = f"--xla_force_host_platform_device_count={CORES} --xla_cpu_multi_thread_eigen=false "
    flags += "intra_op_parallelism_threads=1"
    return {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
        "XLA_FLAGS": flags,
        "JAX_PLATFORMS": "cpu",
        "JAX_ENABLE_X64": "1",
        "PYTHONWARNINGS": "ignore",
        "XDG_CACHE_HOME": str(caches),
        "TORCHINDUCTOR_CACHE_DIR": str(caches / "inductor"),
        # compiling PyTensor's operators takes minutes, once: PyMC is spared that even in a cold start
        "PYTENSOR_FLAGS": f"base_compiledir={Path(sys.prefix) / 'pytensor'}",
    }


class Worker:
    """A contender's process; answers `ask`, or holds a conversation through `send` and `receive`.

    Args:
        contender: Module of ``benchmarks.contenders``.
        caches: What compilers kept of earlier processes; nothing if ``None``.
    """

    def __init__(self, contender: str, *, caches: Path | None = None) -> None:
        self._own_caches = tempfile.TemporaryDirectory(prefix="benchmark-caches-")
        self.caches = caches or Path(self._own_caches.name)
        self.contender, self.began = contender, time.perf_counter()
        self._log = tempfile.TemporaryFile()  # noqa: SIM115  # `close` closes it
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.worker", contender],
            cwd=ROOT,
            env=environment(self.caches),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
        )
        assert self._process.stdin
        assert self._process.stdout
        self._channel = Channel(self._process.stdout, self._process.stdin)

    @property
    def age(self) -> float:
        """Seconds since the process was started."""
        return time.perf_counter() - self.began

    def send(self, message: Any) -> None:
        try:
            self._channel.send(message)
        except BrokenPipeError:
            raise self._failure() from None

    def receive(self) -> Any:
        try:
            return self._channel.receive()
        except EOFError:
            raise self._failure() from None

    def ask(self, do: str, **task: Any) -> Any:
        """Give a task and wait for its one answer."""
        self.send({"do": do, **task})
        return self.receive()

    def _failure(self) -> Failure:
        self._log.seek(0)
        lines = self._log.read().decode(errors="replace").strip().splitlines()
        errors = [line for line in lines if line.partition(":")[0].endswith(("Error", "Exception"))] or lines
        return Failure(f"{self.contender}: {errors[-1] if errors else 'ended without a word'}")

    def kill(self) -> None:
        """End the process; whoever waits for its answer has a `Failure`."""
        self._process.kill()

    def close(self) -> None:
        self.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._log):
            if stream:
                stream.close()
        self._own_caches.cleanup()

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
