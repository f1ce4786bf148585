"""A model's arguments, found by name in a data file."""

from __future__ import annotations

import difflib
import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass
from inspect import Parameter
from typing import Any

from pyro_vi_lab.cli.data_files import DataFile
from pyro_vi_lab.errors import ArgumentError, DataError

WHOLE = ("data", "df", "frame", "batch")
"""Names of a single argument that stands for all columns."""
OF_PROBLEM = ("dims", "coords", "name", "minibatch", "rows", "loader", "num_rows", "dtype")
"""What a Problem would take for options of its own."""


@dataclass(frozen=True)
class Bound:
    """Arguments for a model.

    Args:
        args: Positional ones, where the names of the arguments are in the way.
        kwargs: Those by name.
        unused: Parts of the file that no argument asks for.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    unused: tuple[str, ...]


def parameters_of(model: Callable[..., Any]) -> list[Parameter]:
    """The arguments that a model can be given by name; none of a callable that does not tell."""
    try:
        found = inspect.signature(getattr(model, "forward", model)).parameters.values()
    except (TypeError, ValueError):
        return []
    return [one for one in found if one.kind not in (Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD)]


def needed(model: Callable[..., Any]) -> list[str]:
    """Names of the arguments without a default."""
    return [one.name for one in parameters_of(model) if one.default is Parameter.empty]


def bind(model: Callable[..., Any], data: DataFile, *, where: str) -> Bound:
    """The arguments of a model from the parts of a file with their names.

    Characters that a name in Python cannot have count as underscores: the column ``birth weight`` is the argument
    ``birth_weight``. A single argument called ``data`` or ``df``, or annotated as a dict, is given all numeric columns.

    Args:
        model: The model, or a function that makes a problem of data.
        data: The file.
        where: What to call the model.

    Raises:
        DataError: An argument has no column, or more than one; or a value in it is no finite number.
        ArgumentError: The model takes no data.
    """
    parameters = parameters_of(model)
    if not parameters:
        raise ArgumentError(f"{where} takes no arguments, so there is nothing to do with {data.path}: leave --data out")
    if (whole := _whole(parameters, data)) is not None:
        return Bound((whole,), {}, ())
    by_position = any(one.kind is Parameter.POSITIONAL_ONLY or one.name in OF_PROBLEM for one in parameters)
    args: list[Any] = []
    kwargs: dict[str, Any] = {}
    used: set[str] = set()
    for parameter in parameters:
        part = _part(parameter.name, data)
        if part is None:
            if parameter.default is Parameter.empty:
                raise DataError(_lacking(parameter.name, data, where))
            continue
        used.add(part)
        last = len(args) == parameters.index(parameter)
        if by_position and last and parameter.kind is not Parameter.KEYWORD_ONLY:
            args.append(data.get(part))
        elif parameter.name in OF_PROBLEM:
            raise ArgumentError(
                f"argument {parameter.name!r} of {where} has the name of an option of pyro_vi_lab.Problem: rename it"
            )
        else:
            kwargs[parameter.name] = data.get(part)
    return Bound(tuple(args), kwargs, tuple(name for name in data.parts if name not in used and name))


def _part(argument: str, data: DataFile) -> str | None:
    """Name of the part that is meant by an argument."""
    if argument in data.parts:
        return argument
    alike = [name for name in data.parts if spelled(name) == argument]
    if len(alike) > 1:
        names = " and ".join(map(repr, alike))
        raise DataError(f"{data.path} has the {data.noun}s {names}, which both stand for the argument {argument!r}")
    return alike[0] if alike else None


def spelled(name: str) -> str:
    """A name as Python has to spell it.

    Example:
        >>> spelled(" birth weight (kg)")
        'birth_weight_kg'
    """
    return re.sub(r"\W+", "_", name.strip()).strip("_")


def _whole(parameters: list[Parameter], data: DataFile) -> dict[str, Any] | None:
    """All numeric parts, for a model with one argument that stands for them."""
    required = [one for one in parameters if one.default is Parameter.empty]
    if len(required) != 1 or _part(required[0].name, data) is not None:
        return None
    kind = str(required[0].annotation).lower()
    if required[0].name not in WHOLE and "dict" not in kind and "mapping" not in kind:
        return None
    if data.noun == "column":
        return {name: data.get(name) for name, column in data.parts.items() if name and column.dtype.kind in "biuf"}
    return {name: data.get(name) for name in data.parts}


def _lacking(argument: str, data: DataFile, where: str) -> str:
    names = [name for name in data.parts if name]
    near = difflib.get_close_matches(argument, [*names], n=1) or [
        name for name in names if spelled(name).lower() == argument.lower()
    ]
    hint = f"did you mean {near[0]!r}? " if near else ""
    shown = ", ".join(names[:20]) + (", …" if len(names) > 20 else "")
    return (
        f"{data.path} has no {data.noun} {argument!r}, which {where} needs for its argument: {hint}it has "
        f"{shown or 'none'}"
    )
