"""Where a result comes from: versions of the packages, and a hash of the data."""

from __future__ import annotations

import hashlib
import math
import platform
from collections.abc import Mapping
from importlib import metadata
from typing import Any

import torch

from pyro_vi_lab.problem import Problem

PACKAGES = ("pyro-vi-lab", "pyro-ppl", "torch", "numpy", "arviz", "nutpie")
"""Packages whose versions are kept with every result."""


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that the numbers depend on."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def data_hash(problem: Problem) -> str:
    """SHA-256 of the observed values and the model's tensor arguments: the same data give the same text."""
    digest = hashlib.sha256()
    for kind, values in (("observed", problem.observed), ("input", problem.inputs)):
        for name, value in sorted(values.items()):
            array = value.detach().cpu().contiguous()
            digest.update(f"{kind} {name} {array.dtype} {tuple(array.shape)}\n".encode())
            digest.update(array.flatten().view(torch.uint8).numpy().tobytes() if array.numel() else b"")
    return digest.hexdigest()


def plain(value: Any) -> Any:
    """Nested dicts and lists of plain Python values, with ``None`` for what JSON has no word for."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
