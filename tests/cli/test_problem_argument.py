from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

import pyro_vi_lab as vl
from pyro_vi_lab.cli.problem_argument import read_problem
from pyro_vi_lab.errors import LabError
from tests import posteriordb

SOURCE = """
import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule
import pyro_vi_lab as vl

def model(x, y):
    slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
    with pyro.plate("row", len(y)):
        pyro.sample("y", dist.Normal(slope * x, 1.0), obs=y)

regression = model

def line(X, y):
    weights = pyro.sample("weights", dist.Normal(torch.zeros(2, dtype=X.dtype), 1.0).to_event(1))
    pyro.sample("y", dist.Normal(X @ weights, 1.0).to_event(1), obs=y)

class Module(PyroModule):
    def forward(self, x, y=None):
        return model(x, y)

module = Module()
problem = vl.Problem(model, torch.tensor([1.0, 2.0]), torch.tensor([2.0, 4.0]))

def make(x, y):
    return vl.Problem(model, x, 2 * y, name="made")

def standard():
    return vl.Problem(model, torch.ones(3), torch.ones(3))

def closed():
    pyro.sample("x", dist.Normal(3.0, 2.0))

def sum_of(x, y):
    return (x + y).sum()

def broken(x, y):
    return vl.Problem(model, x, y[100])

def refused(x, y):
    return vl.Problem(model, x, y * float("nan"))
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "models.py").write_text(SOURCE)
    (tmp_path / "d.csv").write_text("x,y,id\n1.0,3,7\n2.0,4,8\n3.0,5,9\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def read(text: str, data: str | None = "d.csv", **options: str) -> vl.Problem:
    return read_problem(text, data=None if data is None else Path(data), say=lambda _: None, **options)


@pytest.mark.parametrize(
    ("text", "name"), [("models.py:model", "models"), ("models.py:module", "Module"), ("models.py:make", "made")]
)
def test_models_and_makers_are_given_the_data(text: str, name: str, here: Path) -> None:
    problem = read(text)
    assert problem.name == name
    assert problem.dtype == torch.float64
    expected = torch.tensor([3.0, 4.0, 5.0]) * (2 if name == "made" else 1)
    torch.testing.assert_close(problem.observed["y"].double(), expected.double())


def test_a_problem_is_given_other_data(here: Path) -> None:
    assert read("models.py:problem", None).observed["y"].tolist() == [2.0, 4.0]
    assert read("models.py:problem").observed["y"].tolist() == [3.0, 4.0, 5.0]


def test_an_example_is_given_other_data(here: Path) -> None:
    (here / "s.json").write_text(json.dumps({"J": 2, "y": [1.0, 2.0], "sigma": [3.0, 4.0]}))
    assert read("eight_schools", "s.json").observed


@pytest.mark.parametrize("text", ["models.py:standard", "models.py:closed"])
def test_functions_without_arguments_need_no_data(text: str, here: Path) -> None:
    assert isinstance(read(text, None), vl.Problem)


def test_a_module_by_its_name(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (here / "my_package").mkdir()
    (here / "my_package" / "__init__.py").write_text("")
    (here / "my_package" / "inner.py").write_text(SOURCE)
    try:
        assert read("my_package.inner:model").name == "inner"
        with pytest.raises(LabError, match=r"unknown object in my_package\.inner 'modl': did you mean 'model'"):
            read("my_package.inner:modl")
    finally:
        for name in ("my_package", "my_package.inner"):
            sys.modules.pop(name, None)
    with pytest.raises(LabError, match="there is no module no_such_module"):
        read("no_such_module:model")
    (here / "fails.py").write_text("import no_such_module\n")
    with pytest.raises(LabError, match=r"fails cannot be used: ModuleNotFoundError.*fails\.py, line 1"):
        read("fails:model")


def test_data_that_are_not_used_are_said(here: Path) -> None:
    said: list[str] = []
    read_problem("models.py:model", data=Path("d.csv"), say=said.append)
    assert said == ["d.csv: columns that models.py:model does not ask for: id"]


def test_types_and_devices(here: Path) -> None:
    assert read("models.py:model", dtype="float32").dtype == torch.float32
    assert read("models.py:problem", None, dtype="float32").dtype == torch.float32
    assert read("models.py:model", device="cpu").observed["y"].device.type == "cpu"
    with pytest.raises(LabError, match="unknown dtype 'float16'"):
        read("models.py:model", dtype="float16")
    for device in ("gpu", "cuda:99"):
        with pytest.raises(LabError, match=f"device '{device}' cannot be used"):
            read("models.py:model", device=device)


@pytest.mark.parametrize(
    ("text", "data", "expected"),
    [
        ("models.py:model", None, r"needs arguments \(x, y\), so it is not a problem yet: give --data FILE"),
        ("models.py:sum_of", "d.csv", "neither a model nor a function that returns a pyro_vi_lab.Problem"),
        ("models.py:broken", "d.csv", r"IndexError.*models\.py, line"),
        ("models.py:refused", "d.csv", "'y'.*missing or infinite"),
        ("models.py:Module", "d.csv", "is the class Module"),
        ("models.py:line", "d.csv", "no column 'X'.*did you mean 'x'"),
        ("models.py:standard", "d.csv", "takes no arguments"),
        ("models.py:model", "other.csv", r"there is no data file other\.csv"),
    ],
)
def test_what_does_not_fit_is_said(text: str, data: str | None, expected: str, here: Path) -> None:
    with pytest.raises(LabError, match=expected):
        read(text, data)


def test_a_shape_that_does_not_fit_names_the_model_and_its_line(here: Path) -> None:
    (here / "d.json").write_text('{"X": [[1, 2, 3], [4, 5, 6.5]], "y": [1.5, 2]}')
    with pytest.raises(LabError, match=r"model line cannot be run at .*models\.py:\d+"):
        read("models.py:line", "d.json")


POSTERIORDB_MODEL = """
import pyro
import pyro.distributions as dist

def model(J, y, sigma):
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("school", J):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("y", dist.Normal(theta, sigma), obs=y)
"""


def test_json_of_posteriordb_works_as_it_is(here: Path) -> None:
    (here / "schools.py").write_text(POSTERIORDB_MODEL)
    files = posteriordb.require()
    (directory,) = files.glob("eight_schools*noncentered*")
    problem = read("schools.py:model", str(directory / "data.json"))
    assert problem.observed["y"].tolist() == [28, 8, -3, 7, -1, 1, 18, 12]
