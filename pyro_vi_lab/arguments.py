"""The arguments of a model: their names, and data in whatever form they come."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from pyro_vi_lab.batches import as_tensor, is_array
from pyro_vi_lab.errors import DataError, ModelError


def argument_names(model: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments by the model's own names, positions where it has none."""
    try:
        signature = inspect.signature(getattr(model, "forward", model))
        bound = signature.bind(*args, **kwargs)
    except (TypeError, ValueError) as error:
        if isinstance(error, TypeError):
            raise ModelError(
                f"model {getattr(model, '__name__', type(model).__name__)} cannot take these arguments: {error}"
            ) from error
        return {**{f"argument {i}": value for i, value in enumerate(args)}, **kwargs}
    names: dict[str, Any] = {}
    for key, value in bound.arguments.items():
        kind = signature.parameters[key].kind
        if kind is inspect.Parameter.VAR_POSITIONAL:
            names.update({f"{key}[{i}]": item for i, item in enumerate(value)})
        elif kind is inspect.Parameter.VAR_KEYWORD:
            names.update(value)
        else:
            names[key] = value
    return names


def as_array(name: str, value: Any, index_coords: dict[int, list[Any]]) -> Any:
    """Pandas data as NumPy arrays, all else as it is; remembers the index of pandas data by its length.

    Raises:
        DataError: The data are not numeric.
    """
    module = type(value).__module__.partition(".")[0]
    if module == "pandas" and hasattr(value, "to_numpy"):
        columns = {str(key): value[key] for key in value.columns} if hasattr(value, "columns") else {name: value}
        for key, column in columns.items():
            if column.dtype.kind not in "biuf":
                raise DataError(
                    f"column {key!r} of argument {name!r} is not numeric (dtype {column.dtype}); encode it as numbers"
                )
        if type(value.index).__name__ != "RangeIndex":
            index_coords[len(value)] = value.index.tolist()
        return value.to_numpy()
    if isinstance(value, np.ndarray) and value.ndim > 0 and value.dtype.kind not in "biuf":
        raise DataError(f"argument {name!r} is not numeric (dtype {value.dtype}); encode it as numbers")
    return value


def labelled(model: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[str]:
    """A label for every leaf of ``(args, kwargs)``: the argument's name and, inside of it, the place."""
    names = {
        id(leaf): key + pytree.keystr(path)
        for key, value in argument_names(model, args, kwargs).items()
        for path, leaf in pytree.tree_flatten_with_path(value)[0]
    }
    return [names.get(id(leaf), f"argument {i}") for i, leaf in enumerate(pytree.tree_leaves((args, dict(kwargs))))]


def to_tensors(args: tuple[Any, ...], kwargs: Mapping[str, Any], dtype: torch.dtype) -> Any:
    """The arguments with arrays as tensors, floating-point data in ``dtype``."""
    return pytree.tree_map(
        lambda leaf: as_tensor(leaf, dtype) if isinstance(leaf, Tensor) or is_array(leaf) else leaf,
        (args, dict(kwargs)),
    )


def mixes_types(error: ModelError) -> bool:
    """Whether torch refused to mix float32 with float64."""
    text = str(error).lower()
    return "dtype" in text or "scalar type" in text
