"""Trees in files: NetCDF and Zarr come back as they were, and are written whole or not at all."""

from __future__ import annotations

import subprocess
import sys
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import arviz
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
import xarray
from torch import Tensor

import pyro_vi_lab as vl
from pyro_vi_lab import Problem, arviz_bridge, to_arviz
from pyro_vi_lab.errors import FileError
from pyro_vi_lab.export import load_arviz, save_arviz

ENDINGS = pytest.mark.parametrize("ending", ["nc", "zarr"])


def model(y: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    with pyro.plate("row", len(y)):
        pyro.sample("y", dist.Poisson(mu.exp()), obs=y)


@cache
def tree() -> Any:
    problem = Problem(model, torch.tensor([1.0, 2.0]), coords={"row": ["first", "第二"]})
    return to_arviz(vl.fit(problem, progress=False), num_draws=50, prior=True)


@ENDINGS
def test_a_tree_comes_back_as_it_was(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"x.{ending}"
    save_arviz(tree(), path)
    found = load_arviz(path)
    assert type(found) is type(tree())
    names = arviz_bridge.group_names(tree())
    assert sorted(arviz_bridge.group_names(found)) == sorted(names)
    assert "fit" in names
    for name in names:
        assert set(found[name].data_vars) == set(tree()[name].data_vars)
        for key, value in tree()[name].data_vars.items():
            assert found[name][key].dims == value.dims
            np.testing.assert_array_equal(found[name][key].values, value.values)
        for key, value in tree()[name].attrs.items():
            assert found[name].attrs[key] == value, key
    assert found["observed_data"].coords["row"].values.tolist() == ["first", "第二"]
    assert found.attrs["method"] == "full_rank"
    assert found.attrs["seconds"] == tree().attrs["seconds"]


@ENDINGS
def test_other_programs_open_it(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"x.{ending}"
    save_arviz(tree(), path)
    expected = tree()["posterior"]["mu"].values
    if ending == "nc":
        np.testing.assert_array_equal(arviz.from_netcdf(str(path))["posterior"]["mu"].values, expected)
    elif not arviz_bridge.is_old():
        np.testing.assert_array_equal(
            arviz.from_zarr(str(path), consolidated=False)["posterior"]["mu"].values, expected
        )
    how = {"engine": "h5netcdf"} if ending == "nc" else {"engine": "zarr", "consolidated": False}
    with xarray.open_datatree(path, **how) as found:
        np.testing.assert_array_equal(found["posterior"]["mu"].values, expected)


@ENDINGS
def test_an_older_file_is_replaced(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"x.{ending}"
    save_arviz(arviz_bridge.tree({"posterior": {"old": (np.zeros((1, 5)), ("chain", "draw"))}}), path)
    save_arviz(tree(), path)
    assert "old" not in load_arviz(path)["posterior"]
    assert [one.name for one in tmp_path.iterdir()] == [path.name]


@ENDINGS
def test_what_is_no_tree_is_refused_by_name(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"x.{ending}"
    with pytest.raises(FileError, match=rf"cannot read .*x\.{ending}"):
        load_arviz(path)
    path.write_text("nothing of the kind")
    with pytest.raises(FileError, match=rf"cannot read .*x\.{ending}"):
        load_arviz(path)


FULL = """
import resource, sys
from pathlib import Path
import numpy as np
from pyro_vi_lab import arviz_bridge
from pyro_vi_lab.errors import FileError
from pyro_vi_lab.export import save_arviz

values = np.random.default_rng(0).normal(size=(1, 100_000))
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
try:
    save_arviz(arviz_bridge.tree({"posterior": {"x": (values, ("chain", "draw"))}}), Path(sys.argv[1]))
except FileError as error:
    print("refused:", error, flush=True)
"""


@ENDINGS
def test_a_system_that_refuses_to_write_leaves_what_was_there(tmp_path: Path, ending: str) -> None:
    pytest.importorskip("resource", reason="the size of files can be limited on POSIX only")
    path = tmp_path / f"x.{ending}"
    save_arviz(arviz_bridge.tree({"posterior": {"x": (np.zeros((1, 10)), ("chain", "draw"))}}), path)
    before = sorted(tmp_path.rglob("*"))
    run = subprocess.run(
        [sys.executable, "-c", FULL, str(path)],
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert "refused: cannot write" in run.stdout, run.stderr
    assert sorted(tmp_path.rglob("*")) == before
    assert load_arviz(path)["posterior"]["x"].shape == (1, 10)


@ENDINGS
def test_a_full_disk_is_said_before_anything_is_written(
    tmp_path: Path, ending: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(FileError, match=r"0 MiB are needed, 0 MiB are free"):
        save_arviz(tree(), tmp_path / f"x.{ending}")
    assert list(tmp_path.iterdir()) == []
