"""nutpie on a density: a compiled one by the address of its C function, any other by a Python callback.

A Python callback needs the interpreter lock for every gradient, so chains take turns; a C function does not, and its
chains run on all cores. nutpie offers that to PyMC alone, so whether it still fits is tried before it is used.
"""

from __future__ import annotations

import ctypes
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

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
        model = _native_model(pointers, dim, new_start)
        model._make_model(None)
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
    from nutpie.compiled_pyfunc import from_pyfunc

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
    import nutpie

    trace = nutpie.sample(
        model,
        draws=settings.num_draws,
        tune=settings.num_warmup,
        chains=settings.num_chains,
        cores=settings.cores,
        seed=settings.seed,
        progress_bar=settings.progress,
        save_warmup=False,
        target_accept=settings.target_accept,
    )
    stats = {ours: torch.from_numpy(np.array(trace.sample_stats[theirs].values)) for ours, theirs in STATS.items()}
    return np.array(trace.posterior["z"].values), stats


def _native_model(pointers: DensityPointers, dim: int, new_start: Start) -> Any:
    """What nutpie samples from, in the way of its models of PyMC."""
    from nutpie import _lib
    from nutpie.sample import CompiledModel

    user_data = ctypes.addressof(pointers.state)

    class NativeModel(CompiledModel):
        @property
        def n_dim(self) -> int:
            return dim

        @property
        def shapes(self) -> dict[str, tuple[int, ...]]:
            return {"z": (dim,)}

        @property
        def coords(self) -> dict[str, Any]:
            return {}

        def _make_model(self, init_mean: Any) -> Any:
            return _lib.PyMcModel(
                _lib.LogpFunc(pointers.density, user_data, pointers),
                _lib.ExpandFunc(dim, dim, pointers.expand, user_data, pointers),
                _lib.PyVariable.new_variables(["z"], ["float64"], [(dim,)], {}, {}),
                dim,
                {"z_dim_0": dim},
                {},
                new_start,
                None,
            )

        def _make_sampler(self, settings: Any, init_mean: Any, cores: Any, progress_type: Any, store: Any) -> Any:
            return _lib.PySampler.from_pymc(settings, cores, self._make_model(init_mean), progress_type, store)

    return NativeModel(dims={})
