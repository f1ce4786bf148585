from __future__ import annotations

from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import arviz
import numpy as np
import pytest
import xarray

from pyro_vi_lab import arviz_bridge
from pyro_vi_lab.arviz_bridge import Variable

RNG = np.random.default_rng(0)
DRAWS = RNG.normal(size=(3, 40, 2))
OLD = int(metadata.version("arviz").split(".")[0]) < 1


def reopened(groups: Mapping[str, Mapping[str, Variable]], path: Path, coords: Mapping[str, Any] | None = None) -> Any:
    """The groups after a round trip through a file that plain ArviZ opens."""
    arviz_bridge.save(arviz_bridge.tree(groups, coords), path)
    return arviz.from_netcdf(str(path))


def test_values_dimensions_labels_and_attributes_survive_the_file(tmp_path: Path) -> None:
    groups: dict[str, dict[str, Variable]] = {
        "posterior": {"theta": (DRAWS, ("chain", "draw", "school"))},
        "observed_data": {
            "y": (np.array([1, 2]), ("school",)),
            "flag": (np.array([True, False]), ("school",)),
        },
    }
    tree = arviz_bridge.tree(groups, {"school": ["A", "B"]}, {"method": "nuts", "seed": 3})
    arviz_bridge.save(tree, tmp_path / "x.nc")
    found = arviz.from_netcdf(str(tmp_path / "x.nc"))
    theta = found["posterior"]["theta"]
    assert theta.dims == ("chain", "draw", "school")
    assert theta.coords["school"].values.tolist() == ["A", "B"]
    assert theta.coords["draw"].values.tolist() == list(range(40))
    np.testing.assert_array_equal(theta.values, DRAWS)
    assert found["observed_data"]["flag"].values.tolist() == [True, False]
    assert (found.attrs["method"], int(found.attrs["seed"])) == ("nuts", 3)


@pytest.mark.parametrize(
    ("dims", "expected"),
    [
        (("chain", "draw", "k", "k"), ("chain", "draw", "k", "k_bis")),
        (("chain", "draw", "draw", "chain"), ("chain", "draw", "draw_bis", "chain_bis")),
        (("chain", "draw", "scope/k", "L"), ("chain", "draw", "scope_k", "L_bis")),
    ],
)
def test_dimensions_that_a_file_cannot_hold_are_renamed(
    tmp_path: Path, dims: tuple[str, ...], expected: tuple[str, ...]
) -> None:
    values = RNG.normal(size=(3, 40, 2, 2))
    found = reopened({"posterior": {"L": (values, dims)}}, tmp_path / "x.nc", {"k": ["a", "b"]})["posterior"]["L"]
    assert found.dims == expected
    for dim, old in zip(expected, dims, strict=True):
        labels = ["a", "b"] if old == "k" else list(range(found.sizes[dim]))
        assert found.coords[dim].values.tolist() == labels


def test_variables_that_a_file_cannot_hold_are_renamed(tmp_path: Path) -> None:
    groups: dict[str, dict[str, Variable]] = {
        "posterior": {
            "encoder/weight": (DRAWS, ("chain", "draw", "i")),
            "draw": (DRAWS[..., 0], ("chain", "draw")),
        }
    }
    assert set(reopened(groups, tmp_path / "x.nc")["posterior"].data_vars) == {"encoder_weight", "draw_"}


def test_a_dimension_named_like_another_variable_is_no_clash(tmp_path: Path) -> None:
    groups: dict[str, dict[str, Variable]] = {
        "posterior": {"beta": (DRAWS, ("chain", "draw", "age")), "age": (DRAWS[..., 0], ("chain", "draw"))}
    }
    found = reopened(groups, tmp_path / "x.nc")["posterior"]
    assert found["beta"].dims == ("chain", "draw", "age_bis")
    assert found["age"].dims == ("chain", "draw")


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        ([1, 2], [1, 2]),
        (["a", "b"], ["a", "b"]),
        ([("a", 1), ("b", 2)], ["('a', 1)", "('b', 2)"]),
        ([None, "b"], ["None", "b"]),
        ([np.datetime64("2020-01-01"), np.datetime64("2020-01-02")], ["2020-01-01", "2020-01-02"]),
        (["a", "b", "c"], [0, 1]),  # another length: the labels are of something else
    ],
)
def test_labels_are_what_a_file_can_hold(tmp_path: Path, labels: list[Any], expected: list[Any]) -> None:
    groups: dict[str, dict[str, Variable]] = {"posterior": {"x": (DRAWS, ("chain", "draw", "k"))}}
    found = reopened(groups, tmp_path / "x.nc", {"k": labels})
    assert found["posterior"]["x"].coords["k"].values.tolist() == expected


def test_arviz_1_gets_a_data_tree_whose_file_xarray_opens(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    # `arviz.from_netcdf` of 1.x is `xarray.open_datatree`.
    monkeypatch.setattr(arviz_bridge, "is_old", lambda: False)
    groups: dict[str, dict[str, Variable]] = {
        "posterior": {"a/b": (DRAWS, ("chain", "draw", "k"))},
        "observed_data": {"y": (np.arange(2.0), ("k",))},
    }
    tree = arviz_bridge.tree(groups, {"k": ["x", "y"]}, {"method": "exact"})
    assert isinstance(tree, xarray.DataTree)
    arviz_bridge.save(tree, tmp_path / "x.nc")
    with xarray.open_datatree(tmp_path / "x.nc", engine="h5netcdf") as found:
        assert set(found.children) == {"posterior", "observed_data"}
        assert found.attrs["method"] == "exact"
        np.testing.assert_array_equal(found["posterior"]["a_b"].values, DRAWS)


def test_the_installed_series_is_recognised() -> None:
    assert arviz_bridge.is_old() is OLD
    tree = arviz_bridge.tree({"posterior": {"x": (DRAWS[..., 0], ("chain", "draw"))}})
    assert type(tree).__name__ == ("InferenceData" if OLD else "DataTree")


def test_convergence_of_independent_draws_of_a_stuck_chain_and_of_a_constant() -> None:
    draws = np.stack([RNG.normal(size=(4, 1000)), RNG.normal(size=(4, 1000)), np.ones((4, 1000))], axis=-1)
    draws[0, :, 1] += 5
    found = arviz_bridge.convergence(draws)
    # Four standard errors of the ESS of independent draws: its relative error is about sqrt(2 / number of draws).
    assert abs(found["ess_bulk"][0] / 4000 - 1) < 4 * np.sqrt(2 / 1000)
    assert found["rhat"][0] < 1.01 < 1.5 < found["rhat"][1]
    for values in found.values():
        assert values.shape == (3,)
        assert np.isnan(values[2])


def test_one_chain_has_an_effective_sample_size_and_no_rhat() -> None:
    found = arviz_bridge.convergence(RNG.normal(size=(1, 500, 2)))
    assert np.isnan(found["rhat"]).all()
    assert np.isfinite(found["ess_bulk"]).all()
    assert np.isfinite(found["ess_tail"]).all()


def test_smoothed_weights_are_normalized_and_keep_their_order() -> None:
    log_weights = RNG.standard_t(3, size=2000)
    smoothed, khat = arviz_bridge.psis(log_weights)
    np.testing.assert_allclose(np.exp(smoothed).sum(), 1, rtol=1e-12)
    assert (np.diff(smoothed[np.argsort(log_weights)]) >= 0).all()
    # exp of a Student-t has no moments at all
    assert khat > 1


def test_khat_of_pareto_weights_is_their_shape() -> None:
    # The ratios 1/u have a Pareto tail of shape 1: k is 1, with the error of a fit to the largest M = 3 sqrt(S) of
    # them, whose standard error is about (1 + k) / sqrt(M) (Vehtari et al. 2024, Section 3).
    num_draws = 100_000
    _, khat = arviz_bridge.psis(-np.log(RNG.uniform(size=num_draws)))
    assert abs(khat - 1) < 5 * 2 / np.sqrt(3 * np.sqrt(num_draws))


def test_convergence_is_that_of_arviz_for_every_scalar() -> None:
    draws = RNG.normal(size=(4, 200, 2, 3)).cumsum(axis=1)
    found = arviz_bridge.convergence(draws)
    stats = arviz_bridge._stats()
    for i, j in np.ndindex(2, 3):
        one = draws[..., i, j]
        assert found["rhat"][i, j] == float(stats.rhat(one, method="rank"))
        assert found["ess_bulk"][i, j] == float(stats.ess(one, method="bulk"))
        assert found["ess_tail"][i, j] == float(stats.ess(one, method="tail", prob=(0.05, 0.95)))


def test_the_error_of_a_mean_that_is_not_a_number_is_none_either() -> None:
    draws = RNG.normal(size=(4, 100, 3))
    draws[1, 3, 0] = np.nan
    draws[..., 1] = 2.0
    found = arviz_bridge.mcse(draws)
    assert np.isnan(found[0])
    assert found[1] == 0 < found[2]
