"""The one place that imports ArviZ: 0.2x and 1.x give the same diagnostics and the same groups through it.

ArviZ takes seconds to import, so it is imported inside the functions. What differs between the two series is in
``_stats``, ``psis`` and ``tree``, and nowhere else.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Variable = tuple[Array, tuple[str, ...]]
"""Values, and a dimension name for each of their axes."""

SAMPLE_DIMS = ("chain", "draw")
"""ArviZ's names for the first two axes of everything that was drawn."""
TAIL_PROBABILITIES = (0.05, 0.95)
"""Quantiles whose smaller ESS is the tail ESS (Vehtari et al. 2021, Section 4.3)."""


def is_old() -> bool:
    """Whether the 0.2x series is installed; ``hasattr(arviz, "InferenceData")`` would warn under 1.x, and say yes."""
    return int(metadata.version("arviz").split(".")[0]) < 1


def convergence(draws: Array) -> dict[str, Array]:
    """Rank-normalised R-hat, bulk ESS and tail ESS of every scalar of one site.

    Shape:
        draws ``(C, S, *shape)``, each result ``shape``. Scalars whose draws are all equal give NaN.
    """
    shape = draws.shape[2:]
    scalars = draws.reshape(*draws.shape[:2], -1)
    constant = np.ptp(scalars, axis=(0, 1)) == 0
    functions = _diagnostics()
    result = {}
    for key in ("rhat", "ess_bulk", "ess_tail"):
        values = np.full(scalars.shape[-1], np.nan)
        if key != "rhat" or len(draws) > 1:  # ArviZ prints a message for every scalar of a single chain
            with np.errstate(divide="ignore"):  # chains that are stuck, each in its own place: R-hat is infinite
                for i in np.flatnonzero(~constant):
                    values[i] = functions[key](scalars[..., i])
        result[key] = values.reshape(shape)
    return result


def mcse(draws: Array) -> Array:
    """Monte Carlo standard error of the mean of every scalar of one site: sd / sqrt(ESS of the mean).

    Shape:
        draws ``(C, S, *shape)`` with S at least 4, result ``shape``. Scalars whose draws are all equal give zero.

    References:
        Vehtari, Gelman, Simpson, Carpenter, Bürkner 2021, "Rank-normalization, folding, and localization", Section 3.
    """
    stats = _stats()
    scalars = draws.reshape(*draws.shape[:2], -1)
    errors = np.zeros(scalars.shape[-1])
    for i in np.flatnonzero(np.ptp(scalars, axis=(0, 1)) != 0):  # NaN counts: its error is NaN and not zero
        errors[i] = scalars[..., i].std(ddof=1) / np.sqrt(float(stats.ess(scalars[..., i], method="mean")))
    return errors.reshape(draws.shape[2:])


def psis(log_weights: Array) -> tuple[Array, float]:
    """Pareto-smoothed log weights, normalised to sum to one, and the shape k-hat of the fitted tail.

    Args:
        log_weights: Unnormalised log importance weights ``(S,)``.

    References:
        Vehtari, Simpson, Gelman, Yao, Gabry 2024, "Pareto smoothed importance sampling", JMLR 25.
    """
    with np.errstate(
        over="ignore"
    ):  # ArviZ divides by the exponential of what may be too large, which gives the 0 meant
        # 1.x takes log likelihoods, whose inverses are the weights
        smoothed, khat = _stats().psislw(log_weights if is_old() else -log_weights)
    return np.asarray(smoothed), float(khat)


def tree(
    groups: Mapping[str, Mapping[str, Variable]],
    coords: Mapping[str, Sequence[Any]] | None = None,
    attrs: Mapping[str, Any] | None = None,
) -> Any:
    """The groups as ArviZ's own object: ``InferenceData`` in 0.2x, an xarray ``DataTree`` in 1.x.

    Dimensions are given for every axis; nothing is inferred. A name that NetCDF or xarray cannot hold is changed: a
    slash becomes a dot, a dimension that repeats within a variable, or is also the name of a variable, gets the
    ending ``_bis``, and variables called ``chain`` or ``draw`` get an underscore.

    Args:
        groups: Group to variable to values and dimensions; ``chain`` and ``draw`` come first where there are draws.
        coords: Labels along a dimension; others are numbered from zero.
        attrs: Plain values to keep with the whole tree and with its first group.

    Shape:
        each variable as many axes as it has dimensions.
    """
    import xarray

    names = {variable_name(name) for variables in groups.values() for name in variables}
    labels = {_clean(key): _labels(value) for key, value in (coords or {}).items()}
    datasets: dict[str, Any] = {}
    for group, variables in groups.items():
        arrays = {}
        for name, (values, dims) in variables.items():
            unique = _unique_dims(dims, names)
            axes = {new: labels.get(_clean(old)) for new, old in zip(unique, dims, strict=True)}
            arrays[variable_name(name)] = xarray.DataArray(
                values,
                dims=unique,
                coords={
                    dim: found if found is not None and len(found) == size else np.arange(size)
                    for (dim, found), size in zip(axes.items(), values.shape, strict=True)
                },
            )
        datasets[group] = xarray.Dataset(arrays, attrs={} if datasets else dict(attrs or {}))
    if is_old():
        import arviz

        return arviz.InferenceData(attrs=dict(attrs or {}), **datasets)
    result = xarray.DataTree.from_dict(datasets)
    result.attrs.update(attrs or {})
    return result


def save(tree: Any, path: Path) -> None:
    """Write a tree as NetCDF, with the engine that plain ``arviz.from_netcdf(path)`` opens it with."""
    tree.to_netcdf(str(path), engine="h5netcdf")


def variable_name(site: str) -> str:
    """What a site is called in a tree.

    Example:
        >>> variable_name("encoder/weight"), variable_name("chain")
        ('encoder.weight', 'chain_')
    """
    return f"{site}_" if site in SAMPLE_DIMS else _clean(site)


def _stats() -> Any:
    """ArviZ's functions of arrays."""
    return import_module("arviz") if is_old() else import_module("arviz_stats.base").array_stats


def _diagnostics() -> dict[str, Any]:
    stats = _stats()
    return {
        "rhat": lambda x: stats.rhat(x, method="rank"),
        "ess_bulk": lambda x: stats.ess(x, method="bulk"),
        "ess_tail": lambda x: stats.ess(x, method="tail", prob=TAIL_PROBABILITIES),
    }


def _clean(name: str) -> str:
    return name.replace("/", ".")


def _unique_dims(dims: Sequence[str], taken: set[str]) -> list[str]:
    result: list[str] = []
    for i, dim in enumerate(dims):
        name = _clean(dim)
        sample = i < len(SAMPLE_DIMS) and name == SAMPLE_DIMS[i]
        while name in result or (not sample and name in taken.union(SAMPLE_DIMS)):
            name += "_bis"
        result.append(name)
    return result


def _labels(values: Sequence[Any]) -> Array:
    """Labels as numbers or strings, which is what NetCDF holds."""
    array = np.asarray(values) if not any(isinstance(value, tuple | list) for value in values) else np.empty(0, object)
    return array if array.dtype.kind in "biufU" and array.ndim == 1 else np.asarray([str(value) for value in values])
