"""Data files of a user: what is in them by name, or one sentence about what is wrong with them."""

from __future__ import annotations

import csv
import json
import re
import warnings
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pyro_vi_lab.cli.numbers import array_of, array_of_list, column_of
from pyro_vi_lab.errors import ArgumentError, DataError, ExtraError, FileError

MAX_HEADER = 2**20
"""Bytes in which the first line of a table has to end."""


@dataclass(frozen=True)
class DataFile:
    """What a data file holds.

    Args:
        path: The file.
        noun: What its parts are called: column, key, array or variable.
        parts: Name to what is there, not looked at yet.
        numbers: Makes numbers of one part, or says which of its values is none.
    """

    path: Path
    noun: str
    parts: Mapping[str, Any]
    numbers: Callable[[Any, str], Any]

    def get(self, name: str) -> Any:
        """The numbers of one part: an array, or a number.

        Raises:
            DataError: A value is missing, infinite or no number; the message names its place.
        """
        return self.numbers(self.parts[name], f"{self.noun} {name!r} of {self.path}")


def read_data(path: Path) -> DataFile:
    """Open a data file; its ending says what it is.

    Raises:
        ArgumentError: An ending that is not known.
        FileError: It is not there, or cannot be read.
        DataError: It is empty, damaged, or something else than its ending says.
        ExtraError: A package is missing that reads it.
    """
    endings = ", ".join(READERS)
    reader = READERS.get("".join(path.suffixes[-2:]).lower()) or READERS.get(path.suffix.lower())
    if reader is None:
        raise ArgumentError(f"cannot tell from its name what data file {path} is; known endings: {endings}")
    try:
        if not path.exists():
            raise FileError(f"there is no data file {path} (looked in {Path.cwd()})")
        if not path.is_file():
            raise FileError(f"{path} is no file; --data takes one file, of {endings}")
        if path.stat().st_size == 0:
            raise DataError(f"data file {path} is empty")
        return reader(path)
    except (FileError, ExtraError):  # which are OSError and ImportError, too
        raise
    except OSError as error:
        raise FileError(f"cannot read {path}: {error.strerror or error}") from error


# --- tables ---------------------------------------------------------------------------------------------------------


def _read_csv(path: Path) -> DataFile:
    import pandas

    delimiter, header = _header(path)
    with _as_text(path), warnings.catch_warnings():
        warnings.simplefilter("error", pandas.errors.ParserWarning)
        try:
            table = pandas.read_csv(
                path,
                sep=delimiter,
                encoding="utf-8-sig",
                index_col=False,
                low_memory=False,
                skipinitialspace=True,
                header=0,
                names=range(len(header)),
            )
        except (pandas.errors.ParserError, pandas.errors.ParserWarning) as error:
            raise DataError(_ragged(path, str(error), delimiter, len(header))) from error
    if not len(table):
        raise DataError(f"data file {path} has a header and no rows")
    return _of_table(path, {name: table[i] for i, name in enumerate(header)}, header)


def _header(path: Path) -> tuple[str, list[str]]:
    """The delimiter and the names of the columns."""
    with path.open("rb") as file:
        start = file.read(MAX_HEADER)
    if start.startswith((b"\xff\xfe", b"\xfe\xff")) or b"\0" in start[:1000]:
        raise DataError(f"data file {path} is not UTF-8 text (it looks like UTF-16 or binary): save it as UTF-8")
    lines = start.decode("utf-8-sig", errors="replace").splitlines()
    first = next((line for line in lines if line.strip()), "")
    unquoted = re.sub(r'"[^"]*"', "", first)
    delimiter = "\t" if path.suffix.lower() == ".tsv" else max(",;\t", key=unquoted.count)
    header = [name.strip() for name in next(csv.reader([first], delimiter=delimiter, skipinitialspace=True), [])]
    if not any(header):
        raise DataError(f"data file {path} is empty")
    if all(_is_number(name) for name in header):
        raise DataError(f"data file {path} has no header: its first line is {first!r}, and should name the columns")
    return delimiter, header


def _of_table(path: Path, columns: Mapping[str, Any], names: list[str]) -> DataFile:
    twice = [name for name, count in Counter(names).items() if count > 1 and name]
    if twice:
        raise DataError(f"data file {path} has more than one column {twice[0]!r}: give each a name of its own")
    return DataFile(path, "column", columns, column_of)


def _ragged(path: Path, error: str, delimiter: str, columns: int) -> str:
    found = re.search(r"Expected \d+ fields in line (\d+), saw (\d+)", error)
    if found is None:
        with path.open(encoding="utf-8-sig", errors="replace", newline="") as file:
            reader = csv.reader(file, delimiter=delimiter, skipinitialspace=True)
            longer = next((reader.line_num for row in reader if len(row) > columns), None)
        where = f"line {longer} has more" if longer else f"its lines cannot be read ({error.strip()})"
        return f"data file {path} has {columns} columns in its header, but {where}: give every line the same number"
    line, fields = found.groups()
    return (
        f"data file {path} has {columns} columns in its header, but {fields} in line {line}: give every line the "
        "same number"
    )


def _read_parquet(path: Path) -> DataFile:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise ExtraError(
            "a .parquet file is read by pyarrow, which is not installed: pip install 'pyro-vi-lab[parquet]'"
        ) from error
    try:
        table = parquet.read_table(path)
    except pyarrow.ArrowException as error:
        raise DataError(f"data file {path} is no Parquet file, or damaged: {_first_line(error)}") from error
    if not table.num_rows:
        raise DataError(f"data file {path} has no rows")
    names = [str(name) for name in table.column_names]
    return _of_table(path, {name: table.column(i).to_pandas() for i, name in enumerate(names)}, names)


# --- named arrays ---------------------------------------------------------------------------------------------------


def _read_json(path: Path) -> DataFile:
    return _of_json(path, path.read_bytes())


def _read_zipped_json(path: Path) -> DataFile:
    """One JSON file in a zip archive, as posteriordb keeps its data."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            if len(names) != 1:
                raise DataError(f"data file {path} holds {len(names)} files, expected a single .json file")
            return _of_json(path, archive.read(names[0]))
    except (zipfile.BadZipFile, zlib.error, RuntimeError) as error:
        raise DataError(f"data file {path} is no zip archive, or damaged: {_first_line(error)}") from error


def _of_json(path: Path, content: bytes) -> DataFile:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        twice = [name for name, count in Counter(name for name, _ in pairs).items() if count > 1]
        if twice:
            raise DataError(f"data file {path} has the key {twice[0]!r} more than once")
        return dict(pairs)

    with _as_text(path):
        text = content.decode("utf-8-sig")
    if not text.strip():
        raise DataError(f"data file {path} is empty")
    try:
        found = json.loads(text, object_pairs_hook=unique)
    except json.JSONDecodeError as error:
        raise DataError(f"data file {path} is not JSON: {error.msg} in line {error.lineno}, {error.colno}") from error
    except RecursionError as error:
        raise DataError(f"data file {path} is nested too deeply") from error
    except ValueError as error:  # a whole number of more digits than Python converts
        raise DataError(f"data file {path} cannot be read: {_first_line(error)}") from error
    if not isinstance(found, dict):
        kind = {list: "a list", str: "a text", type(None): "null", bool: "a truth value"}.get(type(found), "a number")
        raise DataError(
            f'data file {path} holds {kind}, expected an object that names its arrays: {{"x": [1.0, 2.0], "y": [0, 1]}}'
        )
    return DataFile(path, "key", found, array_of_list)


def _read_npz(path: Path) -> DataFile:
    damaged = f"data file {path} is no .npz file, or damaged"
    try:
        archive = np.load(path, allow_pickle=False)
        if not isinstance(archive, np.lib.npyio.NpzFile):
            raise DataError(f"data file {path} is a single array without a name: save it with numpy.savez(path, x=x)")
        with archive:
            return DataFile(path, "array", {name: _member(archive, name, path) for name in archive.files}, array_of)
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise DataError(f"{damaged}: {_first_line(error)}") from error
    except ValueError as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{damaged}; it should be made by numpy.savez") from error


def _member(archive: Any, name: str, path: Path) -> Any:
    try:
        value = archive[name]
    except ValueError as error:
        if "pickle" not in str(error):
            raise
        raise DataError(
            f"array {name!r} of {path} holds pickled Python objects, which can run any code when they are read: "
            "refused; save arrays of numbers"
        ) from error
    if not isinstance(value, np.ndarray):
        raise DataError(f"data file {path} holds {name!r}, which is no array: make it with numpy.savez")
    return value


def _read_netcdf(path: Path) -> DataFile:
    import xarray

    with path.open("rb") as file:
        classic = file.read(3) == b"CDF"
    try:
        with xarray.open_dataset(path, engine="scipy" if classic else "h5netcdf", decode_times=False) as found:
            parts = {str(name): found[name].to_numpy() for name in found.variables}
    except (ArithmeticError, AttributeError, LookupError, MemoryError, OSError, TypeError, ValueError) as error:
        # the readers check little of what they read
        raise DataError(f"data file {path} is no NetCDF file, or damaged: {_first_line(error)}") from error
    if not parts:
        raise DataError(f"data file {path} has no variables outside its groups")
    return DataFile(path, "variable", parts, array_of)


READERS: Mapping[str, Callable[[Path], DataFile]] = {
    ".csv": _read_csv,
    ".tsv": _read_csv,
    ".json": _read_json,
    ".json.zip": _read_zipped_json,
    ".npz": _read_npz,
    ".parquet": _read_parquet,
    ".nc": _read_netcdf,
}


@contextmanager
def _as_text(path: Path) -> Iterator[None]:
    try:
        yield
    except UnicodeDecodeError as error:
        raise DataError(
            f"data file {path} is not UTF-8 text (byte {error.object[error.start]:#04x} at {error.start}): save it as "
            "UTF-8"
        ) from error


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
