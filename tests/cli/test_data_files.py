from __future__ import annotations

import json
import os
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from pyro_vi_lab.cli.data_files import read_data
from pyro_vi_lab.errors import LabError


def get(path: Path, *names: str) -> list[Any]:
    found = read_data(path)
    return [found.get(name) for name in names]


# --- what can be read -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("d.csv", b"x,y,label\n1.5,0,a\n2.5,1,b\n"),
        ("d.csv", b"\xef\xbb\xbfx,y,label\r\n1.5,0,a\r\n2.5,1,b\r\n"),
        ("d.csv", b"x;y;label\n1.5;0;a\n2.5;1;b\n"),
        ("d.csv", b' "x" , y,"la,bel"\n 1.5, 0,a\n\n2.5 ,1,"b\nb"\n'),
        ("d.tsv", b"x\ty\tlabel\n1.5\t0\ta\n2.5\t1\tb\n"),
        ("D.CSV", b",x,y\n0,1.5,0\n1,2.5,1"),
        ("d.json", b'{"x": [1.5, 2.5], "y": [0, 1], "label": ["a", null]}'),
        ("d.json", b'\xef\xbb\xbf{"x": [1.5, 2.5], "y": [0, 1]}'),
    ],
)
def test_text_with_all_that_editors_write(name: str, content: bytes, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    x, y = get(tmp_path / name, "x", "y")
    assert x.dtype.kind == "f"
    assert x.tolist() == [1.5, 2.5]
    assert y.dtype.kind == "i"
    assert y.tolist() == [0, 1]


def as_npz(path: Path, **arrays: Any) -> None:
    np.savez_compressed(path, **arrays)


def as_parquet(path: Path, **arrays: Any) -> None:
    import pandas

    pandas.DataFrame(arrays).to_parquet(path)


def as_netcdf(path: Path, **arrays: Any) -> None:
    import xarray

    xarray.Dataset({name: ("row", value) for name, value in arrays.items()}).to_netcdf(path, engine="h5netcdf")


def as_zipped_json(path: Path, **arrays: Any) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("data.json", json.dumps({name: value.tolist() for name, value in arrays.items()}))


BINARY: dict[str, Callable[..., None]] = {
    "d.npz": as_npz,
    "d.parquet": as_parquet,
    "d.nc": as_netcdf,
    "d.json.zip": as_zipped_json,
}


@pytest.mark.parametrize("name", BINARY)
def test_binary_files(name: str, tmp_path: Path) -> None:
    arrays = {"x": np.array([1.5, 2.5]), "y": np.array([3, 4]), "seen": np.array([True, False])}
    BINARY[name](tmp_path / name, **arrays)
    for expected, found in zip(arrays.values(), get(tmp_path / name, *arrays), strict=True):
        assert found.dtype.kind == expected.dtype.kind
        np.testing.assert_array_equal(found, expected)


def test_matrices_and_numbers(tmp_path: Path) -> None:
    (tmp_path / "d.json").write_text('{"N": 3, "scale": 2.5, "X": [[1, 2], [3, 4], [5, 6.5]], "none": []}')
    count, scale, matrix, none = get(tmp_path / "d.json", "N", "scale", "X", "none")
    assert (count, scale) == (3, 2.5)
    assert isinstance(count, int)
    assert matrix.shape == (3, 2)
    assert none.shape == (0,)
    as_npz(tmp_path / "d.npz", N=np.array(3), X=matrix, counts=np.array([1, 2], dtype=np.uint64))
    count, matrix, counts = get(tmp_path / "d.npz", "N", "X", "counts")
    assert count == 3
    assert matrix.shape == (3, 2)
    assert counts.dtype == np.int64


def test_a_million_rows(tmp_path: Path) -> None:
    rows = 10**6
    with (tmp_path / "d.csv").open("w") as file:
        file.write("x,y\n")
        file.write("0.25,3\n" * (rows - 1) + "0.5,4\n")
    x, y = get(tmp_path / "d.csv", "x", "y")
    assert len(x) == len(y) == rows
    assert (x[-1], y[-1]) == (0.5, 4)
    with (tmp_path / "d.csv").open("a") as file:
        file.write("oops,5\n")
    with pytest.raises(LabError, match=r"column 'x' of .* has 'oops' in row 1000001, where a number is expected"):
        get(tmp_path / "d.csv", "x")
    assert len(get(tmp_path / "d.csv", "y")[0]) == rows + 1


# --- what is refused ------------------------------------------------------------------------------------------------

# The file's name, its content, the part that is asked for, and what the message must hold.
BAD: dict[str, tuple[str, bytes, str, list[str]]] = {
    "empty": ("d.csv", b"", "x", ["d.csv is empty"]),
    "empty but for a mark": ("d.csv", b"\xef\xbb\xbf\n", "x", ["d.csv is empty"]),
    "header only": ("d.csv", b"x,y\n", "x", ["has a header and no rows"]),
    "no header": ("d.csv", b"1.0,2.0\n3.0,4.0\n", "x", ["has no header", "1.0,2.0", "should name the columns"]),
    "a word among numbers": ("d.csv", b"x\n1\n2,5\n", "x", ["1 columns in its header", "line 3"]),
    "a decimal comma": ("d.csv", b"x;y\n1,5;1\n2,5;2\n", "x", ["column 'x'", "'1,5' in row 1", "a number is expected"]),
    "words": ("d.csv", b"x\nred\ngreen\nred\n", "x", ["'red' in row 1", "encode its 2 words as the numbers 0 to 1"]),
    "a typing error": ("d.csv", b"x\n1\n2\n3l\n", "x", ["column 'x'", "'3l' in row 3", "write a number"]),
    "a missing value": ("d.csv", b"x,y\n1,\n2,3\n3,NA\n", "y", ["column 'y'", "no value in row 1 and 1 more"]),
    "infinity": ("d.csv", b"x\n1\ninf\n", "x", ["column 'x'", "has inf in row 2"]),
    "two columns of one name": ("d.csv", b"x,x\n1,2\n", "x", ["more than one column 'x'"]),
    "a line too long": ("d.csv", b"x,y\n1,2\n1,2,3\n", "x", ["2 columns in its header", "line 3"]),
    "all lines too long": ("d.csv", b"x,y\n1,2,3\n1,2,3\n", "x", ["2 columns in its header", "line 2"]),
    "a line too short": ("d.csv", b"x,y\n1,2\n1\n", "y", ["column 'y'", "no value in row 2"]),
    "UTF-16": ("d.csv", "x\n1\n".encode("utf-16"), "x", ["not UTF-8 text", "save it as UTF-8"]),
    "Latin-1": ("d.csv", b"x,caf\xe9\n1,2\n", "x", ["not UTF-8 text", "0xe9"]),
    "binary": ("d.csv", b"PK\x03\x04\x00\x00", "x", ["not UTF-8 text"]),
    "JSON that is no object": ("d.json", b"[1, 2]", "x", ["holds a list, expected an object", '{"x": [1.0, 2.0]']),
    "JSON that is a number": ("d.json", b"3", "x", ["holds a number, expected an object"]),
    "JSON that is cut off": ("d.json", b'{"x": [1,\n2', "x", ["not JSON", "line 2"]),
    "JSON of blanks": ("d.json", b" \n", "x", ["is empty"]),
    "JSON with a key twice": ("d.json", b'{"x": 1, "x": 2}', "x", ["the key 'x' more than once"]),
    "JSON nested too deeply": ("d.json", b'{"x": ' + b"[" * 200_000, "x", ["d.json"]),
    "null": ("d.json", b'{"x": [[1, 2], [3, null]]}', "x", ["key 'x'", "null in [1, 1]"]),
    "NaN in JSON": ("d.json", b'{"x": [1, NaN]}', "x", ["key 'x'", "nan in [1]"]),
    "NaN as Stan writes it": ("d.json", b'{"x": [1, "NaN"]}', "x", ["key 'x'", "'NaN' in [1]"]),
    "a text in JSON": ("d.json", b'{"x": [1, "two"]}', "x", ["key 'x'", "'two' in [1]", "a number is expected"]),
    "an object in JSON": ("d.json", b'{"x": {"a": 1}}', "x", ["key 'x'", "an object", "a number is expected"]),
    "ragged lists": ("d.json", b'{"x": [[1, 2], [3]]}', "x", ["key 'x'", "1 value in [1], and 2 in [0]"]),
    "lists among numbers": ("d.json", b'{"x": [1, [2, 3]]}', "x", ["key 'x'", "2 values in [1]"]),
    "a number without end": ("d.json", b'{"x": 1e400}', "x", ["key 'x'", "inf"]),
    "a whole number without end": ("d.json", b'{"x": [' + b"9" * 400 + b"]}", "x", ["key 'x'", "too large"]),
    "no npz": ("d.npz", b"not a zip", "x", ["no .npz file, or damaged"]),
    "no parquet": ("d.parquet", b"PAR1 and more", "x", ["no Parquet file, or damaged"]),
    "no NetCDF": ("d.nc", b"\x89HDF\r\n\x1a\n and more", "x", ["no NetCDF file, or damaged"]),
    "no zip": ("d.json.zip", b"not a zip", "x", ["no zip archive, or damaged"]),
    "an ending that nobody knows": ("d.xlsx", b"x", "x", ["cannot tell from its name", ".csv, .tsv, .json"]),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_files_are_refused_in_words(case: str, tmp_path: Path) -> None:
    name, content, part, expected = BAD[case]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(LabError) as caught:
        get(tmp_path / name, part)
    assert name in str(caught.value)
    for words in expected:
        assert words in str(caught.value)


def test_pickled_objects_are_refused_unread(tmp_path: Path) -> None:
    marker = tmp_path / "ran"

    class Bomb:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(marker),)

    np.savez(tmp_path / "d.npz", x=np.array([1.0]), evil=np.array([Bomb()], dtype=object))
    with pytest.raises(LabError, match=r"array 'evil' of .* holds pickled Python objects.*refused"):
        read_data(tmp_path / "d.npz")
    np.save(tmp_path / "one.npy", np.array([1.0]))
    (tmp_path / "one.npy").rename(tmp_path / "one.npz")
    with pytest.raises(LabError, match="a single array without a name"):
        read_data(tmp_path / "one.npz")
    assert not marker.exists()


def test_arrays_of_other_types_and_places(tmp_path: Path) -> None:
    arrays = {"words": np.array(["a"]), "complex": np.array([1j]), "X": np.array([[1.0, 2.0], [np.nan, 1.0]])}
    as_npz(tmp_path / "d.npz", **arrays)
    for name, expected in {
        "words": "<U1",
        "complex": "complex128",
        "X": r"array 'X' of .* has nan in \[1, 0\]",
    }.items():
        with pytest.raises(LabError, match=expected):
            get(tmp_path / "d.npz", name)


def test_places_that_are_no_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(LabError, match=r"there is no data file missing\.csv"):
        read_data(Path("missing.csv"))
    (tmp_path / "d.csv").mkdir()
    with pytest.raises(LabError, match="is no file"):
        read_data(tmp_path / "d.csv")
    (tmp_path / "locked.csv").write_text("x\n1\n")

    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(LabError, match=r"cannot read .*locked.csv: Permission denied"):
        read_data(tmp_path / "locked.csv")


numbers = st.one_of(st.floats(width=64), st.integers(-(2**70), 2**70), st.booleans(), st.none(), st.text(max_size=5))


@settings(max_examples=50)
@given(st.dictionaries(st.text(max_size=5), st.recursive(numbers, lambda inner: st.lists(inner, max_size=3))))
def test_any_json_gives_finite_numbers_or_a_sentence(content: dict[str, Any]) -> None:
    path = Path(os.environ["PYTEST_TMP"], "d.json")
    path.write_text(json.dumps(content), encoding="utf-8")
    found = read_data(path)
    assert list(found.parts) == list(content)
    for name, value in content.items():
        try:
            read = found.get(name)
        except LabError as error:
            assert "\n" not in str(error).replace(repr(name), "")  # noqa: PT017
            continue
        assert np.shape(read) == np.shape(value)
        assert np.isfinite(np.asarray(read, dtype=float)).all()
        np.testing.assert_allclose(np.asarray(read, dtype=float), np.asarray(value, dtype=float))


cells = st.one_of(
    st.integers(-(10**6), 10**6).map(str),
    st.floats(allow_nan=False, allow_infinity=False).map(repr),
    st.sampled_from(["", "NA", "nan", "inf", "x", "1,5", '"', "é", " ", "True", "1e5"]),
)


@given(st.lists(st.lists(cells, min_size=2, max_size=3), min_size=1, max_size=4), st.sampled_from([",", ";", "\t"]))
def test_any_table_gives_finite_numbers_or_a_sentence(rows: list[list[str]], delimiter: str) -> None:
    path = Path(os.environ["PYTEST_TMP"], "d.csv")
    path.write_text("\n".join(delimiter.join(row) for row in [["x", "y"], *rows]), encoding="utf-8")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            read = read_data(path).get("x")
        except LabError as error:
            assert str(path) in str(error)  # noqa: PT017
            return
    assert read.ndim == 1
    assert read.dtype.kind in "bif"
    assert np.isfinite(read.astype(float)).all()


@given(st.binary(max_size=60), st.sampled_from(["d.csv", "d.json", "d.npz", "d.nc", "d.parquet", "d.json.zip"]))
def test_any_bytes_give_a_file_or_a_sentence(content: bytes, name: str) -> None:
    path = Path(os.environ["PYTEST_TMP"], name)
    path.write_bytes(content)
    try:
        read_data(path)
    except LabError as error:
        assert str(path) in str(error)  # noqa: PT017


@pytest.fixture(autouse=True, scope="module")
def _directory(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTEST_TMP", str(tmp_path_factory.mktemp("files")))
        yield
