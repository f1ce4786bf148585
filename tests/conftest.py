"""What every test and doctest shares: one thread, a fixed seed, and global state put back afterwards."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator

os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # for the processes that tests start

import hypothesis
import pyro
import pytest
import torch

collect_ignore = ["typed_user.py"]  # what mypy reads, and nobody runs

hypothesis.settings.register_profile("reproducible", derandomize=True, deadline=None)
hypothesis.settings.load_profile("reproducible")


class Isolation:
    """A plugin rather than fixtures of this file, so that the doctests of the package are isolated too."""

    @pytest.fixture(autouse=True)
    def isolated(self) -> Iterator[None]:
        """An empty param store and a fixed seed before; Pyro's settings, dtype and threads put back after."""
        settings = pyro.settings.get()
        dtype = torch.get_default_dtype()
        num_threads = torch.get_num_threads()
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        yield
        pyro.clear_param_store()
        pyro.settings.set(**settings)
        torch.set_default_dtype(dtype)
        torch.set_num_threads(num_threads)
        if "matplotlib.pyplot" in sys.modules:
            sys.modules["matplotlib.pyplot"].close("all")


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(1)  # small tensors: a second thread costs more than it brings
    config.pluginmanager.register(Isolation(), "isolation")
