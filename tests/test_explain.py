from __future__ import annotations

import io

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoNormal
from torch import Tensor

import pyro_vi_lab as vl
from pyro_vi_lab.errors import ArgumentError
from pyro_vi_lab.models import build


def explained(*args: object) -> str:
    file = io.StringIO()
    vl.explain(*args, file=file)
    return file.getvalue()


def test_what_is_said_of_a_density(capsys: pytest.CaptureFixture[str]) -> None:
    vl.explain(build("eight_schools"))
    text = capsys.readouterr().out
    density = build("eight_schools").density()
    assert "eight_schools: log density on R^10 with 2 tensors of data" in text
    assert f"{density.bound.num_nodes} operators" in text
    for tier in ("interpreted", "TorchScript", "machine code (C)"):
        assert tier in text
    assert text.count("µs") >= 3


def looks(y: Tensor) -> None:
    x = pyro.sample("x", dist.Normal(0.0, 1.0))
    sign = 1.0 if x > 0 else -1.0
    pyro.sample("y", dist.Normal(sign * x, 1.0), obs=y)


@pytest.mark.filterwarnings("ignore::pyro_vi_lab.LabWarning")
def test_why_a_density_is_eager() -> None:
    text = explained(vl.Problem(looks, torch.tensor(1.0)))
    assert "gradient: eager Pyro" in text
    assert "test_explain.py:" in text


def test_what_is_said_of_a_program() -> None:
    def model(y: Tensor) -> None:
        mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        with pyro.plate("row", len(y)):
            pyro.sample("y", dist.Normal(mean, 1.0), obs=y)

    text = explained(vl.Problem(model, torch.arange(50.0), minibatch=10), AutoNormal)
    assert "batches of 10 of 50 rows" in text
    assert "model with AutoNormal: graph of" in text
    assert list(pyro.get_param_store().keys()) == []


def test_not_a_problem() -> None:
    with pytest.raises(ArgumentError, match=r"problem must be a pyro_vi_lab\.Problem, got int"):
        vl.explain(3)
