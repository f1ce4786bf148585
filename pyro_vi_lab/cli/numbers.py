"""Numbers of a column, an array or nested lists; or the place of the first value that is none."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pyro_vi_lab.errors import DataError

SPELLED = {"nan", "inf", "-inf", "+inf", "infinity", "-infinity", "+infinity"}
"""How Stan's JSON spells what is no finite number."""


def column_of(column: Any, where: str) -> NDArray[Any]:
    """The numbers of a data frame's column.

    Args:
        column: A column of pandas.
        where: What to call it.

    Raises:
        DataError: A value is missing, infinite or no number; the message says in which row, counted from 1.
    """
    missing = column.isna().to_numpy()
    if missing.any():
        raise DataError(f"{where} has no value {_rows(missing)}: fill it in, or leave these rows out")
    if column.dtype.kind not in "biuf":
        bad = np.array([not _is_number(value) for value in column])
        row = int(bad.argmax())
        value = column.iloc[row]
        words = column.nunique() if bad.all() and isinstance(value, str) else 0
        advice = f"encode its {words} words as the numbers 0 to {words - 1}" if 1 < words < 20 else "write a number"
        raise DataError(f"{where} has {value!r} in row {row + 1}, where a number is expected: {advice}")
    return _finite(column.to_numpy(), where, rows=True)


def array_of(values: NDArray[Any], where: str) -> Any:
    """The numbers of an array; of one without axes, the number.

    Raises:
        DataError: It does not hold numbers, or one of them is not finite; the message names the index.
    """
    if values.dtype.kind not in "biuf":
        raise DataError(f"{where} holds values of type {values.dtype}, where numbers are expected: encode them")
    return _finite(values, where).item() if values.ndim == 0 else _finite(values, where)


def array_of_list(value: Any, where: str) -> Any:
    """The numbers of nested lists as an array; a number as it is.

    Raises:
        DataError: A value is no number, missing or infinite, or lists are of different lengths; the message names the
            index.

    Example:
        >>> array_of_list([[1, 2], [3, 4]], "key 'x'").shape
        (2, 2)
        >>> array_of_list([[1, 2], [3]], "key 'x'")
        Traceback (most recent call last):
        pyro_vi_lab.errors.DataError: key 'x' has 1 value in [1], and 2 in [0]: give them the same number
    """
    if isinstance(value, list):
        try:
            array = np.array(value)
        except ValueError:
            array = np.array(None)
        if array.dtype.kind in "biuf":
            return _finite(array, where)
    _check_list(value, where, ())
    if isinstance(value, list):
        return np.array(value, dtype=float)
    return float(value) if abs(value) >= 2**63 else value


def _check_list(value: Any, where: str, index: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of nested lists of numbers."""
    place = f" in {list(index)}" if index else ""
    if isinstance(value, list):
        shapes = [_check_list(item, where, (*index, i)) for i, item in enumerate(value)]
        for i, shape in enumerate(shapes):
            if shape != shapes[0]:
                first, other = (
                    f"{one[0]} value{'s' * (one[0] != 1)}" if one else "a number" for one in (shapes[0], shape)
                )
                raise DataError(
                    f"{where} has {other} in {[*index, i]}, and {first.removesuffix(' values')} in {[*index, 0]}: "
                    "give them the same number"
                )
        return (len(shapes), *(shapes[0] if shapes else ()))
    if value is None or (isinstance(value, str) and value.strip().lower() in SPELLED):
        shown = "null" if value is None else repr(value)
        raise DataError(f"{where} has {shown}{place}: fill it in, or leave it out")
    if not isinstance(value, (bool, int, float)):
        kind = "an object" if isinstance(value, dict) else repr(value)
        raise DataError(f"{where} has {kind}{place}, where a number is expected")
    try:
        finite = math.isfinite(value)
    except OverflowError:
        finite, value = False, "too large a number"
    if not finite:
        raise DataError(f"{where} has {value}{place}: fill it in, or leave it out")
    return ()


def _finite(values: NDArray[Any], where: str, *, rows: bool = False) -> NDArray[Any]:
    if values.dtype.kind == "u" and values.dtype.itemsize > 1:  # torch has hardly any operation for these
        return values.astype(np.int64 if values.size == 0 or values.max() < 2**63 else float)
    if values.dtype.kind != "f":
        return values
    bad = ~np.isfinite(values)
    if bad.any():
        index = tuple(int(i) for i in np.argwhere(bad)[0]) if values.ndim else ()
        place = f" {_rows(bad)}" if rows else f" in {list(index)}" if index else ""
        raise DataError(f"{where} has {values[index]}{place}: fill it in, or leave it out")
    return values


def _rows(chosen: NDArray[np.bool_]) -> str:
    first, count = int(chosen.argmax()) + 1, int(chosen.sum())
    return f"in row {first}" + (f" and {count - 1:,} more" if count > 1 else "")


def _is_number(value: Any) -> bool:
    if isinstance(value, str):
        try:
            float(value)
        except ValueError:
            return False
        return True
    return isinstance(value, (bool, int, float, np.bool_, np.number))
