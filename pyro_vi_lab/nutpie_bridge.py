"""nutpie on a density: a compiled one by the address of its C function, any other by a Python callback.

A Python callback needs the interpreter lock for every gradient, so chains take turns; a C function does not, and its
chains run on all cores. nutpie offers that to PyMC alone, so whether it still fits is tried before it is used.
"""

from __future__ import annotations

import ctypes
import functools
import os
import sys
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from importlib.machinery import ExtensionFileLoader, PathFinder
from importlib.util import module_from_spec
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pyro_vi_lab.errors import LabWarning
from pyro_vi_lab.native import DensityPointers, NativeFunction

Start = Callable[[int], NDArray[Any]]
Draws = tuple[NDArray[Any], dict[str, Tensor], int]

STATS: Mapping[str, str] = {
    "diverging": "diverging",
    "energy": "energy",
    "lp": "logp",
    "step_size": "step_size",
    "tree_depth": "depth",
    "acceptance_rate": "mean_tree_accept",
    "n_steps": "n_steps",
}
"""Our names of sampler statistics, and nutpie's."""
PROGRESS_MILLISECONDS = 100
"""Between two updates of the progress bar."""


@dataclass(frozen=True)
class Settings:
    """What nutpie is asked for.

    Args:
        num_chains: Chains.
        num_warmup: Adaptation steps per chain, not kept.
        num_draws: Draws kept per chain.
        seed: Seed of all randomness.
        target_accept: Acceptance rate that the step size adapts to.
        progress: Show nutpie's progress bar.
        cores: Threads; all cores if ``None``.
    """

    num_chains: int
    num_warmup: int
    num_draws: int
    seed: int
    target_accept: float
    progress: bool
    cores: int | None = None


def sample_native(function: NativeFunction, dim: int, new_start: Start, settings: Settings) -> Draws | None:
    """Draw from a compiled density without Python; ``None``, and one warning, if this nutpie cannot.

    Args:
        function: A density and its gradient.
        dim: D.
        new_start: A starting point ``(D,)`` of a seed.
        settings: What to draw.

    Returns:
        Draws ``(C, S, D)``, statistics ``(C, S)``, and the number of gradients.
    """
    pointers = function.density_pointers()
    try:
        model = _NativeModel(pointers, dim, new_start)
    except (AttributeError, ImportError, TypeError, ValueError) as error:
        warnings.warn(
            f"this version of nutpie takes no C functions ({type(error).__name__}: {error}); chains share Python's "
            "interpreter lock, which is slower",
            LabWarning,
            stacklevel=4,
        )
        return None
    draws, stats = _sample(model, settings)
    return draws, stats, int(pointers.state.calls)


def sample_callback(
    value_and_grad: Callable[[Tensor], tuple[Tensor, Tensor]],
    dim: int,
    new_start: Start,
    settings: Settings,
    *,
    like: Tensor,
) -> Draws:
    """Draw from a density that is a Python function of a point ``(D,)`` of the type and device of ``like``."""
    from_pyfunc = _nutpie("nutpie.compiled_pyfunc").from_pyfunc
    counters: list[list[int]] = []

    def make_log_prob() -> Callable[[NDArray[Any]], tuple[float, NDArray[Any]]]:
        counter = [0]
        counters.append(counter)

        def log_prob(x: NDArray[Any]) -> tuple[float, NDArray[Any]]:
            counter[0] += 1
            value, grad = value_and_grad(torch.from_numpy(np.array(x)).to(like))
            return value.item(), grad.double().numpy(force=True)

        return log_prob

    def make_expand(*_: Any) -> Callable[[NDArray[Any]], dict[str, NDArray[Any]]]:
        return lambda x: {"z": np.array(x)}

    model = from_pyfunc(
        ndim=dim,
        make_logp_fn=make_log_prob,
        make_expand_fn=make_expand,
        expanded_dtypes=[np.dtype("float64")],
        expanded_shapes=[(dim,)],
        expanded_names=["z"],
        make_initial_point_fn=new_start,
    )
    draws, stats = _sample(model, settings)
    return draws, stats, sum(counter[0] for counter in counters)


def _sample(model: Any, settings: Settings) -> tuple[NDArray[Any], dict[str, Tensor]]:
    in_notebook = settings.progress and "ipykernel" in sys.modules
    if isinstance(model, _NativeModel) and not in_notebook:
        return _read(_run(model, settings))
    sampler = _nutpie("nutpie").sample(
        model,
        draws=settings.num_draws,
        tune=settings.num_warmup,
        chains=settings.num_chains,
        cores=settings.cores,
        seed=settings.seed,
        progress_bar=settings.progress,
        target_accept=settings.target_accept,
        return_raw_trace=True,
        blocking=False,
    )
    try:
        trace = sampler.wait()
    except BaseException:  # Ctrl-C, of which a blocking call would make a trace of chains of different lengths
        sampler.cancel()
        raise
    return _read(trace)


def _run(model: _NativeModel, settings: Settings) -> Any:
    """What ``nutpie.sample`` does, without its import of ArviZ, which takes longer than most chains."""
    library = _library()
    options = library.PyNutsSettings.Diag(settings.seed)
    options.num_tune, options.num_draws = settings.num_warmup, settings.num_draws
    options.num_chains, options.target_accept = settings.num_chains, settings.target_accept
    shown = library.ProgressType.indicatif(PROGRESS_MILLISECONDS) if settings.progress else library.ProgressType.none()
    cores = settings.cores or min(settings.num_chains, os.cpu_count() or 1)
    sampler = model._make_sampler(options, None, cores, shown, library.PyStorage.arrow())
    try:
        sampler.wait(None)
    except BaseException:  # Ctrl-C too: the chains are threads that would go on
        sampler.abort()
        raise
    return sampler.take_results()


def _read(trace: Any) -> tuple[NDArray[Any], dict[str, Tensor]]:
    """Draws ``(C, S, D)`` and statistics ``(C, S)`` of a trace in Arrow's format, without the warm-up."""
    from arro3.core import list_flatten  # nutpie's own; pyarrow would import pandas for this

    draws, stats = trace.get_arrow_trace()
    kept = [~batch.column("tuning").to_numpy() for batch in stats]
    z = [
        list_flatten(batch.column("z")).to_numpy().reshape(len(rows), -1)[rows]
        for batch, rows in zip(draws, kept, strict=True)
    ]
    chosen = {
        ours: np.stack([batch.column(theirs).to_numpy()[rows] for batch, rows in zip(stats, kept, strict=True)])
        for ours, theirs in STATS.items()
    }
    return np.stack(z), {name: torch.from_numpy(_signed(values)) for name, values in chosen.items()}


def _signed(values: NDArray[Any]) -> NDArray[Any]:
    """The same in a type for which torch has all operations."""
    return values.astype(np.int64) if values.dtype.kind == "u" else values


@functools.cache
def _library() -> Any:
    """The compiled library of nutpie; alone if its package is not imported yet, which would import ArviZ."""
    if "nutpie" not in sys.modules:
        package = PathFinder.find_spec("nutpie")
        spec = package and PathFinder.find_spec("nutpie._lib", package.submodule_search_locations)
        if spec is not None and isinstance(spec.loader, ExtensionFileLoader):
            module = module_from_spec(spec)
            spec.loader.exec_module(module)
            return sys.modules.setdefault(spec.name, module)  # where the package finds it
    return _nutpie("nutpie._lib")


def _nutpie(module: str) -> Any:
    """A module of nutpie, whose annotations ask ArviZ 1.x for the ``InferenceData`` of 0.2x and make it warn."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"arviz\.InferenceData is no longer")
        return import_module(module)


class _NativeModel:
    """What nutpie samples from, in the way of its models of PyMC."""

    dims: ClassVar[dict[str, Any]] = {}
    coords: ClassVar[dict[str, Any]] = {}

    def __init__(self, pointers: DensityPointers, dim: int, new_start: Start) -> None:
        self.n_dim, self.shapes = dim, {"z": (dim,)}
        library, user_data = _library(), ctypes.addressof(pointers.state)
        self._model = library.PyMcModel(
            library.LogpFunc(pointers.density, user_data, pointers),
            library.ExpandFunc(dim, dim, pointers.expand, user_data, pointers),
            library.PyVariable.new_variables(["z"], ["float64"], [(dim,)], {}, {}),
            dim,
            {"z_dim_0": dim},
            {},
            new_start,
            None,
        )

    def _make_sampler(self, settings: Any, init_mean: Any, cores: Any, progress_type: Any, store: Any) -> Any:
        return _library().PySampler.from_pymc(settings, cores, self._model, progress_type, store)
