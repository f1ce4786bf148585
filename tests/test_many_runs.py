from __future__ import annotations

from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import Tensor

from pyro_vi_lab.errors import ModelError
from pyro_vi_lab.many_runs import many_runs
from pyro_vi_lab.sites import read_structure

Y = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64)
HOW: dict[str, Any] = {"name": "model", "dtype": torch.float64, "seed": 0}


def model(y: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("row", len(y)):
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y)


SITES = read_structure(model, (Y,), {}, name="model", dtype=torch.float64).sites


def test_given_sites_have_their_values_and_data_stay() -> None:
    mu = torch.linspace(-1, 1, 4, dtype=torch.float64)
    found = many_runs(model, (Y,), {}, given={"mu": mu}, wanted=list(SITES.values()), num_runs=4, **HOW)
    assert torch.equal(found["mu"], mu)
    assert torch.equal(found["y"], Y.expand(4, 3))


def test_log_densities_are_not_scaled() -> None:
    mu = torch.linspace(-1, 1, 4, dtype=torch.float64)
    found = many_runs(
        model,
        (Y,),
        {},
        given={"mu": mu},
        wanted=[SITES["y"]],
        num_runs=4,
        log_prob=True,
        around=lambda: poutine.scale(scale=10.0),
        **HOW,
    )
    torch.testing.assert_close(found["y"], dist.Normal(mu[:, None], 1.0).log_prob(Y))


def test_what_is_drawn_anew_differs_from_run_to_run() -> None:
    found = many_runs(model, (Y,), {}, given={}, wanted=[SITES["y"]], redraw=[SITES["y"]], num_runs=50, **HOW)
    assert len(found["y"].unique()) == 150
    again = many_runs(model, (Y,), {}, given={}, wanted=[SITES["y"]], redraw=[SITES["y"]], num_runs=50, **HOW)
    assert torch.equal(found["y"], again["y"])


def test_nothing_wanted() -> None:
    assert many_runs(model, (Y,), {}, given={}, wanted=[], num_runs=3, **HOW) == {}


def test_errors_of_the_model_have_its_line() -> None:
    def wrong(y: Tensor) -> None:
        model(y[:, 0])

    with pytest.raises(ModelError, match=f"model model cannot be run at {__file__}"):
        many_runs(wrong, (Y,), {}, given={}, wanted=[SITES["mu"]], num_runs=2, **HOW)
