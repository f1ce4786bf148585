from __future__ import annotations

from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given
from torch import nn

from pyro_vi_lab.cli.binding import bind, spelled
from pyro_vi_lab.cli.data_files import DataFile, read_data
from pyro_vi_lab.errors import LabError


def table(directory: Path, header: str, *rows: str) -> DataFile:
    (directory / "d.csv").write_text("\n".join([header, *rows]), encoding="utf-8")
    return read_data(directory / "d.csv")


def model(x: Any, y: Any, scale: float = 2.0, *, weight: Any = None) -> None: ...


def test_arguments_are_found_by_name(tmp_path: Path) -> None:
    found = bind(model, table(tmp_path, "id,y,x,weight", "1,10,0.5,3", "2,20,1.5,4"), where="model")
    assert found.args == ()
    values = {name: value.tolist() for name, value in found.kwargs.items()}
    assert values == {"x": [0.5, 1.5], "y": [10, 20], "weight": [3, 4]}
    assert found.unused == ("id",)


def test_names_that_python_cannot_have(tmp_path: Path) -> None:
    def births(birth_weight: Any, age_years: Any, größe: Any) -> None: ...

    found = bind(births, table(tmp_path, ' birth weight ,"age (years)",größe', "3,4,5"), where="births")
    assert [value.tolist() for value in found.kwargs.values()] == [[3], [4], [5]]
    with pytest.raises(LabError, match=r"'birth weight' and 'birth-weight', which both stand for .* 'birth_weight'"):
        bind(births, table(tmp_path, "birth weight,birth-weight", "1,2"), where="births")
    # the exact name goes before the others
    found = bind(births, table(tmp_path, "birth weight,birth_weight,age_years,größe", "1,2,3,4"), where="births")
    assert found.kwargs["birth_weight"].tolist() == [2]


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        ("x,z", r"d\.csv has no column 'y', which model needs for its argument: it has x, z"),
        ("X,y", "no column 'x', .* did you mean 'X'"),
        ("x1,y", "no column 'x', .* did you mean 'x1'"),
        (",y", "no column 'x', .* it has y$"),
    ],
)
def test_a_missing_column_is_named(header: str, expected: str, tmp_path: Path) -> None:
    with pytest.raises(LabError, match=expected):
        bind(model, table(tmp_path, header, "1,2"), where="model")


def test_only_the_columns_that_are_asked_for_have_to_be_numbers(tmp_path: Path) -> None:
    data = table(tmp_path, "x,y,remark", "1,2,good", "3,4,")
    assert bind(model, data, where="model").unused == ("remark",)
    with pytest.raises(LabError, match=r"column 'remark' of .* has no value in row 2"):
        bind(lambda remark: None, data, where="model")


def test_one_argument_for_all_columns(tmp_path: Path) -> None:
    data = table(tmp_path, "x,y,remark", "1,2,good", "3,4,bad")

    def of_data(data: Any) -> None: ...

    def annotated(columns: dict[str, Any], scale: float = 1.0) -> None: ...

    for function in (of_data, annotated):
        (columns,) = bind(function, data, where="model").args
        assert {name: value.tolist() for name, value in columns.items()} == {"x": [1, 3], "y": [2, 4]}
    column = bind(of_data, table(tmp_path, "data", "7"), where="model").kwargs["data"]
    assert column.tolist() == [7]


def test_other_callables(tmp_path: Path) -> None:
    class Network(nn.Module):
        def forward(self, x: Any, y: Any = None) -> None: ...

    data = table(tmp_path, "x,y", "1,2")
    assert bind(Network(), data, where="model").kwargs.keys() == {"x", "y"}
    with pytest.raises(LabError, match=r"takes no arguments, so there is nothing to do with .*d.csv"):
        bind(lambda: None, data, where="model")
    with pytest.raises(LabError, match=r"argument 'rows' of model has the name of an option of pyro_vi_lab\.Problem"):
        bind(lambda x, *, rows: None, table(tmp_path, "x,rows", "1,2"), where="model")
    # by position it is no trouble
    assert len(bind(lambda x, rows: None, table(tmp_path, "x,rows", "1,2"), where="model").args) == 2


@given(st.text())
def test_spelled_names_are_words(name: str) -> None:
    assert spelled(spelled(name)) == spelled(name)
    assert all(character.isalnum() or character == "_" for character in spelled(name))


def test_numbers_stay_numbers(tmp_path: Path) -> None:
    (tmp_path / "d.json").write_text('{"x": 3, "y": [1.0, 2.0], "weight": true}')
    found = bind(model, read_data(tmp_path / "d.json"), where="model")
    assert found.kwargs["x"] == 3
    assert isinstance(found.kwargs["x"], int)
    assert isinstance(found.kwargs["y"], np.ndarray)
    assert found.kwargs["weight"] is True
