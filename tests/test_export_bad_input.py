"""Names that break files and pages, a thousand sites, and sites that hold nothing."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from pyro_vi_lab import LabWarning, Posterior, Problem, arviz_bridge, to_arviz
from pyro_vi_lab.export import load_arviz, save_arviz
from pyro_vi_lab.tree_names import SAFE

HOSTILE = ["\"quoted'", "<script>alert(1)</script>", "θ", "模型", "a/b", "a b", "a.b", "..", " ", "chain", "z"]


@pytest.mark.parametrize("ending", ["nc", "zarr"])
def test_names_of_every_kind_come_back_from_a_file(tmp_path: Path, ending: str) -> None:
    def model(y: Tensor) -> None:
        for name in HOSTILE:
            pyro.sample(name, dist.Normal(0.0, 1.0))
        with pyro.plate("<b>row</b> / 1", len(y)):
            pyro.sample("y\n", dist.Normal(0.0, 1.0), obs=y)

    problem = Problem(model, torch.zeros(2), coords={"<b>row</b> / 1": ["<i>", '"']})
    draws = {name: torch.full((1, 5), float(i), dtype=torch.float64) for i, name in enumerate(HOSTILE)}
    save_arviz(to_arviz(Posterior(draws), problem=problem, prior=True), tmp_path / f"x.{ending}")
    found = load_arviz(tmp_path / f"x.{ending}")
    for group in arviz_bridge.group_names(found):
        assert all(SAFE.match(str(name)) for name in found[group].variables), group
    own = {value.attrs.get("long_name", name): float(value[0, 0]) for name, value in found["posterior"].items()}
    assert own == {name: float(i) for i, name in enumerate(HOSTILE)}
    assert found["observed_data"].coords["b_row_b_1"].values.tolist() == ["<i>", '"']


def test_sites_without_axes_and_without_values(tmp_path: Path) -> None:
    def model(y: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        pyro.sample("none", dist.Normal(torch.zeros(0), 1.0).to_event(1))
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y)

    posterior = Posterior({"mu": torch.randn(2, 50, dtype=torch.float64), "none": torch.zeros(2, 50, 0)})
    tree = to_arviz(posterior, problem=Problem(model, torch.tensor(1.0)), prior=True)
    assert tree["posterior"]["none"].shape == (2, 50, 0)
    assert tree["log_likelihood"]["y"].dims == ("chain", "draw")
    save_arviz(tree, tmp_path / "x.nc")
    assert load_arviz(tmp_path / "x.nc")["posterior"]["none"].shape == (2, 50, 0)
    assert posterior.convergence()["rhat"]["none"].shape == (0,)
    assert all("none" not in reason for reason in posterior.problems())


def test_a_thousand_sites() -> None:
    generator = np.random.default_rng(0)
    draws = {f"site {i}": torch.from_numpy(generator.normal(size=(2, 20))) for i in range(1000)}
    tree = to_arviz(Posterior(draws))
    assert len(tree["posterior"].data_vars) == 1000
    np.testing.assert_array_equal(tree["posterior"]["site_999"].values, draws["site 999"].numpy())


def test_dimensions_of_one_name_and_several_sizes_are_told_apart() -> None:
    groups = {
        "posterior": {
            "a": (np.zeros((1, 5, 2)), ("chain", "draw", "k")),
            "b": (np.zeros((1, 5, 3)), ("chain", "draw", "k")),
        }
    }
    found = arviz_bridge.tree(groups)["posterior"]
    assert found["a"].dims[2:] == ("k",)
    assert found["b"].dims[2:] == ("k_bis",)
    assert not np.isnan(found["b"].values).any()


def test_what_cannot_be_had_is_said_and_the_rest_exported() -> None:
    def chain(y: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
        state: Tensor | int = 0
        for t in pyro.markov(range(len(y))):
            state = pyro.sample(f"state_{t}", dist.Bernoulli(0.2 + 0.6 * torch.as_tensor(state).double()))
            pyro.sample(f"y_{t}", dist.Normal(mu + state, 1.0), obs=y[t])

    draws = {"mu": torch.randn(1, 5, dtype=torch.float64)}
    with pytest.warns(LabWarning, match="log_likelihood and log_prior are left out: .* are a Markov chain"):
        tree = to_arviz(Posterior(draws), problem=Problem(chain, torch.zeros(3)))
    assert "log_likelihood" not in arviz_bridge.group_names(tree)
    assert "Markov chain" in tree.attrs["left_out"]
    assert tree["posterior_predictive"]["y_1"].shape == (1, 5)
