"""Which sites have a latent scale, what the draws say of it, and the same model non-centered."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_vi_lab as vl
from pyro_vi_lab import Problem
from pyro_vi_lab.hierarchy import hierarchies, noncentered


def groups(y: torch.Tensor, noise: float) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    tau = pyro.sample("tau", dist.LogNormal(0.0, 1.0))
    with pyro.plate("group", len(y)):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("y", dist.Normal(theta, noise), obs=y)


def problem(noise: float) -> Problem:
    return Problem(groups, torch.linspace(-2.0, 2.0, 6), noise, coords={"group": list("abcdef")})


def draws(made: Problem) -> torch.Tensor:
    posterior = vl.nuts(made, num_chains=2, num_warmup=500, num_draws=500, seed=0, progress=False)
    assert posterior.unconstrained is not None
    return posterior.unconstrained.flatten(0, 1)


def test_slope_is_one_in_a_funnel_and_zero_where_the_data_say_all() -> None:
    vague, sharp = (hierarchies(made, draws(made))[0] for made in (problem(100.0), problem(0.01)))
    assert vague.site == sharp.site == "theta"
    assert vague.parents == sharp.parents == ("tau",)
    assert vague.slope == pytest.approx(1.0, abs=0.25)
    assert sharp.slope == pytest.approx(0.0, abs=0.25)


def test_sites_without_a_latent_scale_are_none() -> None:
    def flat(y: torch.Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        pyro.sample("rate", dist.Gamma(2.0, mu.exp()))
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y)

    made = Problem(flat, torch.tensor(1.0))
    assert hierarchies(made, torch.zeros(10, 2).double()) == []


def test_noncentered_has_the_same_density_of_data_and_names() -> None:
    """x' = (x - mu) / tau: the densities differ by the log determinant of that, once a group."""
    made = problem(1.0)
    other = noncentered(made, ["theta"])
    assert {name: site.kind for name, site in other.sites.items()}["theta"] == "deterministic"
    assert other.dims("theta") == ("group",)
    assert other.coords == made.coords
    values = {"mu": torch.tensor([0.3]), "tau": torch.tensor([0.7]), "theta": torch.linspace(-1, 1, 6)[None]}
    centered = made.density().log_prob(made.density().unconstrain(values))
    scaled = {**values, "theta_decentered": (values["theta"] - 0.3) / 0.7}
    z = other.density().unconstrain(scaled)
    assert torch.allclose(other.density().log_prob(z), centered + 6 * torch.log(torch.tensor(0.7).double()))
    assert torch.allclose(other.density().constrain(z)["theta"], values["theta"].double())


def test_a_name_that_is_no_latent_site() -> None:
    with pytest.raises(vl.LabError, match="'y' is no latent site of groups; these are mu, tau, theta"):
        noncentered(problem(1.0), ["y"])
