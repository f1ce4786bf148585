"""Bounds of guides with heavy tails."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

import pyro_vi_lab as vl
from pyro_vi_lab.heavy_tails import rare_shares, unbounded_coordinate

Y = torch.tensor([0.3, -1.2, 2.5, 0.9], dtype=torch.float64)


def scaled(y: Tensor) -> None:
    loc = pyro.sample("loc", dist.Normal(y.new_zeros(()), 5.0))
    tau = pyro.sample("tau", dist.HalfNormal(y.new_tensor(3.0)))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(loc, tau), obs=y)


def many(y: Tensor) -> None:
    x = pyro.sample("x", dist.Normal(y.new_zeros(300), 1.0).to_event(1))
    scale = pyro.sample("scale", dist.LogNormal(y.new_zeros(()), 0.1))
    pyro.sample("y", dist.Normal(x.sum(), scale), obs=y[0])


def test_the_logarithm_of_a_scale_falls_faster_than_any_power() -> None:
    density, one = vl.Problem(scaled, Y).density(), torch.ones(2, dtype=Y.dtype)
    assert unbounded_coordinate(density, 0 * one, one, 5.0) == density.labels.index("tau")


@pytest.mark.parametrize(("num_moments", "found"), [(1.5, 0), (5.0, None)])
def test_a_normal_prior_falls_as_a_square(num_moments: float, found: int | None) -> None:
    def normal(y: Tensor) -> None:
        loc = pyro.sample("loc", dist.Normal(y.new_zeros(2), 5.0).to_event(1))
        pyro.sample("y", dist.Normal(loc.sum(), 1.0).expand(y.shape).to_event(1), obs=y)

    one = torch.ones(2, dtype=Y.dtype)
    assert unbounded_coordinate(vl.Problem(normal, Y).density(), 0 * one, one, num_moments) == found


def test_a_coordinate_beyond_the_first_block_is_found() -> None:
    density = vl.Problem(many, Y).density()
    one = torch.ones(density.dim, dtype=Y.dtype)
    assert unbounded_coordinate(density, 0 * one, one, 5.0) == density.dim - 1 == 300


def test_a_fit_says_where_its_bound_is_finite_only_without_rare_draws() -> None:
    fit = vl.fit(vl.Problem(scaled, Y.repeat(20)), "mean_field_student_t", seed=0, progress=False)
    assert fit.params is not None
    assert rare_shares(fit.problem.density(), fit.family, fit.params)[0] < 0.1
    assert fit.status is vl.Status.CONVERGED
    assert "along tau the log density falls faster" in fit.message
    assert "falls" not in vl.fit(vl.Problem(scaled, Y.repeat(20)), "mean_field", seed=0, progress=False).message
