"""What a number was measured with: versions, the processor's name and the number of cores; nothing else."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from pathlib import Path

PACKAGES = (
    "torch",
    "pyro-ppl",
    "nutpie",
    "numpyro",
    "jax",
    "pymc",
    "pytensor",
    "scikit-learn",
    "laplace-torch",
    "numpy",
    "arviz",
)


def versions() -> dict[str, str]:
    """Versions by package, of those that are installed."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def processor() -> dict[str, str | int]:
    """Name of the processor, and the cores that this process may use."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return {"processor": names[0] if names else platform.processor() or platform.machine(), "cores": cores}
