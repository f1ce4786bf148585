from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import arviz
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pyro.infer import MCMC, NUTS
from torch import Tensor

import pyro_vi_lab as vl
from pyro_vi_lab import Posterior, Problem, to_arviz
from pyro_vi_lab.errors import ArgumentError, FileError, FitError
from pyro_vi_lab.export import check_writable, data_hash, plain, save_arviz, staged, versions
from tests import comparisons

SCHOOLS = ["A", "B", "C", "D", "E", "F", "G", "H"]


def schools(y: Tensor, sigma: Tensor, scale: float = 5.0) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 10.0))
    with pyro.plate("school", len(y)):
        effect = pyro.sample("effect", dist.Normal(0.0, 1.0))
        theta = pyro.deterministic("theta", mu + scale * effect)
        pyro.sample("y", dist.Normal(theta, sigma), obs=y)


@cache
def problem() -> Problem:
    y = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
    sigma = torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])
    return Problem(schools, y, sigma, coords={"school": SCHOOLS})


@cache
def from_fit() -> Any:
    return to_arviz(vl.fit(problem(), progress=False), num_draws=400, seed=5, prior=True)


@cache
def from_nuts() -> Any:
    posterior = vl.nuts(problem(), num_chains=2, num_warmup=200, num_draws=200, progress=False)
    return to_arviz(posterior, problem=problem())


@cache
def from_pyro() -> Any:
    mcmc = MCMC(NUTS(schools), num_samples=100, warmup_steps=50, disable_progbar=True)
    mcmc.run(*problem().args)
    return to_arviz(mcmc, problem=problem())


TREES: dict[str, Callable[[], Any]] = {"fit": from_fit, "nuts": from_nuts, "pyro": from_pyro}
EVERY = pytest.mark.parametrize("tree", TREES.values(), ids=TREES)


@EVERY
def test_the_groups_have_the_dimensions_of_the_problem(tree: Callable[[], Any]) -> None:
    found = tree()
    for group in ("posterior", "posterior_predictive", "log_likelihood"):
        for name, value in found[group].data_vars.items():
            expected = ("chain", "draw") if name == "mu" else ("chain", "draw", "school")
            assert value.dims == expected, (group, name)
    assert found["observed_data"]["y"].dims == ("school",)
    assert found["constant_data"]["sigma"].dims == ("school",)
    assert set(found["constant_data"].data_vars) == {"sigma"}  # y is observed, and scale is no tensor
    assert found["posterior"]["effect"].coords["school"].values.tolist() == SCHOOLS


@EVERY
def test_the_file_opens_with_plain_arviz(tree: Callable[[], Any], tmp_path: Path) -> None:
    save_arviz(tree(), tmp_path / "x.nc")
    found = arviz.from_netcdf(str(tmp_path / "x.nc"))
    for group in ("posterior", "sample_stats", "posterior_predictive", "log_likelihood", "observed_data"):
        assert dict(found[group].sizes) == dict(tree()[group].sizes)
    np.testing.assert_array_equal(found["posterior"]["mu"].values, tree()["posterior"]["mu"].values)


def test_a_fit_keeps_its_log_densities_and_smoothed_weights() -> None:
    fit = vl.fit(problem(), progress=False)
    found = to_arviz(fit, num_draws=400, seed=5)
    posterior = fit.posterior(num_draws=400, seed=5)
    stats = found["sample_stats"]
    np.testing.assert_array_equal(stats["log_p"].values, posterior.stats["log_p"].numpy())
    np.testing.assert_array_equal(stats["log_q"].values, posterior.stats["log_q"].numpy())
    np.testing.assert_allclose(np.exp(stats["log_weights"].values).sum(), 1, rtol=1e-12)
    assert posterior.unconstrained is not None
    np.testing.assert_array_equal(found["unconstrained_posterior"]["z"].values, posterior.unconstrained.numpy())
    assert found["unconstrained_posterior"].coords["coordinate"].values.tolist() == problem().density().labels


def test_nuts_keeps_the_statistics_under_arviz_names() -> None:
    stats = from_nuts()["sample_stats"]
    expected = {"diverging", "energy", "lp", "step_size", "tree_depth", "acceptance_rate", "n_steps"}
    assert expected <= set(stats.data_vars)
    assert stats["diverging"].dtype == bool


def test_the_likelihood_is_that_of_the_model() -> None:
    found = from_fit()
    theta, y, sigma = found["posterior"]["theta"], found["observed_data"]["y"], found["constant_data"]["sigma"]
    expected = -0.5 * ((y - theta) / sigma) ** 2 - np.log(sigma) - 0.5 * np.log(2 * np.pi)
    np.testing.assert_allclose(
        found["log_likelihood"]["y"].values, expected.transpose("chain", "draw", "school").values
    )


def test_the_prior_comes_on_request_only() -> None:
    assert from_fit()["prior"]["mu"].sizes["draw"] == 400
    assert "prior" not in from_nuts()


def test_the_origin_is_kept() -> None:
    attrs = from_fit().attrs
    assert attrs["created_by"] == "pyro-vi-lab"
    assert attrs["method"] == "full_rank"
    assert attrs["problem"] == "schools"
    assert attrs["status"] == "converged"
    assert attrs["seed"] == 0
    assert attrs["seconds"] > 0
    assert json.loads(attrs["versions"]) == versions()


def test_a_pyro_mcmc_that_diverged_says_where() -> None:
    mcmc = MCMC(NUTS(schools), num_samples=20, warmup_steps=5, disable_progbar=True)
    mcmc.run(*problem().args)
    mcmc._diagnostics[0]["divergences"] = [3, 7]
    diverging = to_arviz(mcmc)["sample_stats"]["diverging"].values
    assert np.flatnonzero(diverging[0]).tolist() == [3, 7]
    assert to_arviz(mcmc).attrs["method"] == "nuts"


def test_draws_alone_get_generic_dimensions_and_no_groups_of_a_problem() -> None:
    draws = torch.zeros(2, 10, 3, dtype=torch.float64)
    found = to_arviz(Posterior({"x": draws}, method="exact"))
    assert found["posterior"]["x"].dims == ("chain", "draw", "x_dim_0")
    assert "observed_data" not in found
    assert "sample_stats" not in found


def test_groups_can_be_left_out() -> None:
    posterior = vl.fit(problem(), progress=False).posterior(num_draws=30)
    found = to_arviz(posterior, problem=problem(), predictive=False, log_likelihood=False)
    assert "posterior_predictive" not in found
    assert "log_likelihood" not in found
    assert "observed_data" in found


def test_covariates_share_the_rows_of_the_data_and_nothing_else() -> None:
    def regression(X: Tensor, other: Tensor, y: Tensor) -> None:
        beta = pyro.sample("beta", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        with pyro.plate("row", len(y)):
            pyro.sample("y", dist.Normal(X @ beta + other.sum(), 1.0), obs=y)

    made = Problem(regression, torch.ones(4, 3), torch.ones(3), torch.zeros(4))
    draws = torch.zeros(1, 5, 3, dtype=torch.float64)
    constant = to_arviz(Posterior({"beta": draws}), problem=made)["constant_data"]
    assert constant["X"].dims == ("row", "X_dim_1")
    assert constant["other"].dims == ("other_dim_0",)


def test_a_comparison_gives_a_tree_for_each_posterior() -> None:
    trees = to_arviz(comparisons.regression(), log_likelihood=False)
    assert list(trees) == ["reference", "mean_field", "full_rank"]
    assert trees["full_rank"].attrs["method"] == "full_rank"
    assert "log_likelihood" not in trees["reference"]
    assert trees["reference"]["posterior"]["beta"].dims == ("chain", "draw", "feature")


@pytest.mark.parametrize("wrong", [3, None, {"mu": torch.zeros(1, 2)}])
def test_other_things_are_refused_by_name(wrong: object) -> None:
    with pytest.raises(ArgumentError, match=type(wrong).__name__):
        to_arviz(wrong)


def test_an_mcmc_has_to_be_run_first() -> None:
    with pytest.raises(ArgumentError, match=r"run\(\.\.\.\) first"):
        to_arviz(MCMC(NUTS(schools), num_samples=5, disable_progbar=True))


def test_a_fit_that_diverged_has_nothing_to_export() -> None:
    with pytest.raises(FitError, match="unbounded"):
        to_arviz(comparisons.diverged().fits["full_rank"])


# --- provenance -----------------------------------------------------------------------------------------------------


def test_the_hash_is_of_the_data_and_nothing_else() -> None:
    y, sigma = problem().args
    same = Problem(schools, y.clone(), sigma.clone(), name="another name")
    assert data_hash(same) == data_hash(problem())
    for changed in ((y + 1, sigma), (y, sigma * 2), (y[:7], sigma[:7]), (sigma, y.abs() + 1)):
        assert data_hash(Problem(schools, *changed)) != data_hash(problem())


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.floats().map(np.float64),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner) | st.tuples(inner, inner),
    max_leaves=20,
)


@given(values)
def test_plain_values_are_strict_json_and_come_back(value: object) -> None:
    text = json.dumps(plain(value), allow_nan=False)
    assert json.loads(text) == plain(value)


def test_what_is_not_finite_becomes_none() -> None:
    assert plain({"a": [float("nan"), np.float64("inf"), np.int64(3)], 1: (True, -0.5)}) == {
        "a": [None, None, 3],
        "1": [True, -0.5],
    }


# --- files ----------------------------------------------------------------------------------------------------------


def test_staged_files_arrive_together(tmp_path: Path) -> None:
    out = tmp_path / "new" / "deeper"
    with staged(out) as folder:
        (folder / "a").write_text("1")
        assert not out.exists()
    assert [path.name for path in out.iterdir()] == ["a"]
    with staged(out) as folder:
        (folder / "a").write_text("2")
        assert (out / "a").read_text() == "1"
    assert (out / "a").read_text() == "2"
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a", "deeper", "new"]


def write_and_fail(out: Path) -> None:
    with staged(out) as folder:
        (folder / "a").write_text("new")
        raise RuntimeError("mine")


@pytest.mark.parametrize("exists", [True, False])
def test_an_error_leaves_nothing_behind(tmp_path: Path, exists: bool) -> None:
    out = tmp_path / "out"
    if exists:
        out.mkdir()
        (out / "a").write_text("old")
    before = sorted(str(path) for path in tmp_path.rglob("*"))
    with pytest.raises(RuntimeError, match="mine"):
        write_and_fail(out)
    assert sorted(str(path) for path in tmp_path.rglob("*")) == before
    if exists:
        assert (out / "a").read_text() == "old"


def test_a_writable_directory_is_not_made_by_asking(tmp_path: Path) -> None:
    check_writable(tmp_path / "x" / "y")
    check_writable(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("below", ["", "deeper"])
def test_a_file_in_the_way_is_named(tmp_path: Path, below: str) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(FileError, match="file is a file"):
        check_writable(tmp_path / "file" / below)
    with pytest.raises(FileError, match="choose another directory"), staged(tmp_path / "file" / below):
        pass


def test_a_directory_that_the_system_protects_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse(**_: object) -> str:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr("tempfile.mkdtemp", refuse)  # root, as whom containers run, may write everywhere
    with pytest.raises(FileError, match=f"cannot write to {tmp_path}: Permission denied"):
        check_writable(tmp_path)
