"""What was saved comes back with the same draws, and nothing else is taken for it."""

from __future__ import annotations

import io
import json
import pickle
import zipfile
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoNormal
from torch import Tensor
from torch.distributions import constraints

import pyro_vi_lab as vl
from pyro_vi_lab import Fit, Posterior, Problem
from pyro_vi_lab.errors import ArgumentError, FileError

Y = torch.tensor([1.0, 2.0, 4.0])


def model(y: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    s = pyro.sample("s", dist.HalfNormal(2.0))
    with pyro.plate("row", len(y)):
        pyro.sample("y", dist.Normal(mu, s), obs=y)


@cache
def problem() -> Problem:
    return Problem(model, Y)


def assert_same(found: Fit, fit: Fit) -> None:
    assert (found.status, found.message, found.method, found.seed) == (fit.status, fit.message, fit.method, fit.seed)
    for name, values in fit.history.items():
        np.testing.assert_array_equal(found.history[name], values)
    one, other = found.posterior(50, seed=3), fit.posterior(50, seed=3)
    for name, values in other.draws.items():
        assert torch.equal(one.draws[name], values), name


GUIDES: dict[str, Any] = {
    "mean_field": "mean_field",
    "full_rank": "full_rank",
    "laplace": "laplace",
    "map": "map",
    "low rank": vl.guides.LowRankNormal(model, rank=1),
    "blocks": vl.guides.BlockNormal(model, blocks=[["mu", "s"]]),
    "Student-t": vl.guides.MeanFieldStudentT(model, df=7.0),
    "mixture": vl.guides.Mixture(model, num_components=2, covariance="diagonal"),
}


@pytest.mark.parametrize("name", GUIDES)
def test_a_fit_comes_back_with_the_same_draws(tmp_path: Path, name: str) -> None:
    restarts = 2 if name == "full_rank" else 1
    fit = vl.fit(problem(), GUIDES[name], num_restarts=restarts, seed=1, max_steps=20, progress=False)
    fit.save(tmp_path / "x.fit")
    found = vl.load(tmp_path / "x.fit", Problem(model, Y.clone()))
    assert_same(found, fit)
    assert found.num_restarts == restarts
    if name != "map":
        assert found.elbo(20, seed=1) == fit.elbo(20, seed=1)
        for key, value in fit.guide.state_dict().items():
            torch.testing.assert_close(found.guide.state_dict()[key], value, rtol=1e-12, atol=1e-12)
    else:
        assert found.point().keys() == fit.point().keys()


def hand_written(y: Tensor) -> None:
    loc = pyro.param("loc", torch.zeros((), dtype=torch.float64))
    scale = pyro.param("scale", torch.ones((), dtype=torch.float64), constraint=constraints.positive)
    pyro.sample("mu", dist.Normal(loc, scale))
    pyro.sample("s", dist.LogNormal(loc / 10, scale))


@pytest.mark.parametrize("kind", ["function", "autoguide"])
def test_a_guide_of_ones_own_is_given_again(tmp_path: Path, kind: str) -> None:
    fit = vl.fit(problem(), hand_written if kind == "function" else AutoNormal(model), max_steps=30, progress=False)
    fit.save(tmp_path / "x.fit")
    expected = fit.posterior(20, seed=2)
    pyro.clear_param_store()
    with pytest.raises(ArgumentError, match="not one of ours"):
        vl.load(tmp_path / "x.fit", problem())
    found = vl.load(
        tmp_path / "x.fit", problem(), guide=hand_written if kind == "function" else AutoNormal(model)
    ).posterior(20, seed=2)
    assert torch.equal(found.draws["mu"], expected.draws["mu"])


def test_a_posterior_comes_back(tmp_path: Path) -> None:
    draws = {"a/b": torch.randn(2, 5, 3), "n": torch.arange(10).reshape(2, 5), "none": torch.zeros(2, 5, 0)}
    posterior = Posterior(draws, {"diverging": torch.zeros(2, 5, dtype=torch.bool)}, "exact", torch.randn(2, 5, 4))
    posterior.save(tmp_path / "x")
    found = vl.load(tmp_path / "x")
    assert {name: value.dtype for name, value in found.draws.items()} == {k: v.dtype for k, v in draws.items()}
    assert all(torch.equal(found.draws[name], value) for name, value in draws.items())
    assert torch.equal(found.stats["diverging"], posterior.stats["diverging"])
    assert torch.equal(found.unconstrained, posterior.unconstrained)


def test_a_fit_of_another_problem_is_refused(tmp_path: Path) -> None:
    vl.fit(problem(), "mean_field", progress=False).save(tmp_path / "x")
    with pytest.raises(FileError, match="a fit of model, and model as given here has other data"):
        vl.load(tmp_path / "x", Problem(model, Y + 1))

    def wider(y: Tensor) -> None:
        mu = pyro.sample("mu", dist.StudentT(3.0, 0.0, 5.0))
        s = pyro.sample("s", dist.HalfNormal(2.0))
        with pyro.plate("row", len(y)):
            pyro.sample("y", dist.Normal(mu, s), obs=y)

    with pytest.raises(FileError, match="another model: its sites differ"):
        vl.load(tmp_path / "x", Problem(wider, Y))
    with pytest.raises(ArgumentError, match=r"load\(path, problem\)"):
        vl.load(tmp_path / "x")


def archive(path: Path, header: object, array: bytes = b"") -> None:
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("header.json", json.dumps(header))
        file.writestr("0.npy", array)


def test_other_files_are_refused_and_never_run(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return pytest.fail, ("unpickled",)

    pickled = io.BytesIO()
    np.save(pickled, np.array([Evil()], dtype=object), allow_pickle=True)
    path = tmp_path / "x"
    with pytest.raises(FileError, match="cannot read"):
        vl.load(path)
    for content in (b"", b"nothing", pickle.dumps(Evil())):
        path.write_bytes(content)
        with pytest.raises(FileError, match="cannot read"):
            vl.load(path)
    entry = {"a": {"file": "0.npy", "type": "torch.float32"}}
    for header in ([], {}, {"format": "another"}, {"format": "pyro-vi-lab 1", "arrays": entry}):
        archive(path, header, pickled.getvalue())
        with pytest.raises(FileError, match="cannot read"):
            vl.load(path)
    archive(path, {"format": "pyro-vi-lab 1", "arrays": {}, "kind": "else"})
    with pytest.raises(FileError, match="neither a fit nor a posterior"):
        vl.load(path)
