"""The one place that imports ArviZ: 0.2x and 1.x give the same diagnostics and the same groups through it.

ArviZ takes seconds to import, so it is imported inside the functions. What differs between the two series is in
``_stats``, ``psis``, ``_of_datasets`` and ``save``, and nowhere else.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pyro_vi_lab.tree_names import safe_names

Array = NDArray[Any]
Variable = tuple[Array, tuple[str, ...]] | tuple[Array, tuple[str, ...], Mapping[str, Any]]
"""Values, a dimension name for each of their axes, and attributes if there are any."""

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
    scalars = draws.reshape(*draws.shape[:2], math.prod(draws.shape[2:]))
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
    scalars = draws.reshape(*draws.shape[:2], math.prod(draws.shape[2:]))
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
    group_attrs: Mapping[str, Mapping[str, Any]] | None = None,
) -> Any:
    """The groups as ArviZ's own object: ``InferenceData`` in 0.2x, an xarray ``DataTree`` in 1.x.

    Dimensions are given for every axis; nothing is inferred. Names become letters, digits and underscores
    (:func:`~pyro_vi_lab.tree_names.safe_names`), with the old name in the variable's attribute ``long_name``. A
    dimension that repeats within a variable, has another size in the same group, or is also the name of a variable,
    gets the ending ``_bis``. No values are copied.

    Args:
        groups: Group to variable to values, dimensions and, if there are any, attributes; ``chain`` and ``draw`` come
            first where there are draws.
        coords: Labels along a dimension; others are numbered from zero.
        attrs: Plain values to keep with the whole tree and with its first group.
        group_attrs: Plain values to keep with other groups.

    Shape:
        each variable as many axes as it has dimensions.
    """
    import xarray

    names = safe_names((name for variables in groups.values() for name in variables), reserved=SAMPLE_DIMS)
    used = [dim for variables in groups.values() for _, dims, *_ in variables.values() for dim in dims]
    dims = {**safe_names([*used, *(coords or {})]), **{dim: dim for dim in SAMPLE_DIMS}}
    labels = {dims[key]: _labels(value) for key, value in (coords or {}).items()}
    datasets: dict[str, Any] = {}
    for group, variables in groups.items():
        kept = dict((attrs or {}) if not datasets else {}) | dict((group_attrs or {}).get(group, {}))
        arrays: dict[str, Any] = {}
        sizes: dict[str, int] = {}
        axes: dict[str, Any] = {}
        for name, (values, own, *more) in variables.items():
            clean = [dims[dim] for dim in own]
            unique = _unique_dims(clean, values.shape, set(names.values()), sizes)
            for dim, old in zip(unique, clean, strict=True):
                found = labels.get(old)
                axes[dim] = found if found is not None and len(found) == sizes[dim] else np.arange(sizes[dim])
            described = {"long_name": name} if names[name] != name else {}
            arrays[names[name]] = (unique, values, described | dict(*more))
        datasets[group] = xarray.Dataset(arrays, coords=axes, attrs=_storable(kept))
    return _of_datasets(datasets, _storable(attrs or {}))


def _of_datasets(datasets: Mapping[str, Any], attrs: Mapping[str, Any]) -> Any:
    if is_old():
        import arviz

        return arviz.InferenceData(attrs=dict(attrs), **datasets)
    return _data_tree(datasets, attrs)


def _data_tree(datasets: Mapping[str, Any], attrs: Mapping[str, Any]) -> Any:
    import xarray

    result = xarray.DataTree.from_dict(datasets)
    result.attrs.update(attrs)
    return result


def save(tree: Any, path: Path) -> None:
    """Write a tree as NetCDF, or as Zarr where ``path`` ends so.

    NetCDF is written with the engine that plain ``arviz.from_netcdf(path)`` opens it with. Zarr is format 2, which
    holds the labels of dimensions; ``xarray.open_datatree(path)`` opens it, as does ``arviz.from_zarr`` of 1.x. That
    of 0.2x takes no zarr as of 3: :func:`load` does.

    Raises:
        OSError: The place cannot be written to, or the disk is full.
    """
    if path.suffix == ".zarr":
        groups = {name: tree[name] if is_old() else tree[name].to_dataset() for name in group_names(tree)}
        _data_tree(groups, tree.attrs).to_zarr(str(path), mode="w", consolidated=False, zarr_format=2)
    elif is_old():
        tree.to_netcdf(str(path), engine="h5netcdf", compress=False)  # random numbers do not get smaller, only slower
    else:
        tree.to_netcdf(str(path), engine="h5netcdf")


def load(path: Path) -> Any:
    """Read a tree that :func:`save` wrote, all of it into memory."""
    import xarray

    how: dict[str, Any] = {"engine": "h5netcdf"}
    if path.suffix == ".zarr":
        how = {"engine": "zarr", "consolidated": False}
    with xarray.open_datatree(str(path), **how) as found:
        datasets = {name: child.to_dataset().load() for name, child in found.children.items()}
        return _of_datasets(datasets, {str(key): value for key, value in found.attrs.items()})


def num_bytes(tree: Any) -> int:
    """Bytes of all values of a tree."""
    return sum(int(value.nbytes) for name in group_names(tree) for value in tree[name].variables.values())


def group_names(tree: Any) -> list[str]:
    """Names of the groups of a tree of either generation."""
    return list(tree.groups()) if is_old() else list(tree.children)


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


def _unique_dims(dims: Sequence[str], shape: Sequence[int], taken: set[str], sizes: dict[str, int]) -> list[str]:
    """A name for every axis that no other axis, variable or size of the group has; notes the sizes in ``sizes``."""
    result: list[str] = []
    for i, (dim, size) in enumerate(zip(dims, shape, strict=True)):
        name = dim
        sample = i < len(SAMPLE_DIMS) and name == SAMPLE_DIMS[i]
        while name in result or (not sample and name in taken.union(SAMPLE_DIMS)) or sizes.get(name, size) != size:
            name += "_bis"
        sizes[name] = size
        result.append(name)
    return result


def _storable(attrs: Mapping[str, Any]) -> dict[str, Any]:
    """Attributes that NetCDF and Zarr hold: numbers, texts and lists of these."""
    return {key: int(value) if isinstance(value, bool) else value for key, value in attrs.items() if value is not None}


def _labels(values: Sequence[Any]) -> Array:
    """Labels as numbers or strings, which is what NetCDF holds."""
    array = np.asarray(values) if not any(isinstance(value, tuple | list) for value in values) else np.empty(0, object)
    return array if array.dtype.kind in "biufU" and array.ndim == 1 else np.asarray([str(value) for value in values])
