from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

import pyro_vi_lab as vl
from pyro_vi_lab.errors import ArgumentError, ModelError


@pytest.fixture(autouse=True)
def double() -> None:
    torch.set_default_dtype(torch.float64)


def counts(y: Tensor) -> None:
    rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
    with pyro.plate("row", len(y)):
        pyro.sample("y", dist.Poisson(rate), obs=y)


def logistic(y: Tensor) -> None:
    mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
    with pyro.plate("row", len(y)):
        pyro.sample("y", dist.Bernoulli(logits=mean), obs=y)


def test_conjugate_posterior_is_exact() -> None:
    y = torch.tensor([3.0, 1.0, 4.0, 1.0, 5.0])
    before = set(pyro.get_param_store().keys())
    fit = vl.fit(vl.Problem(counts, y), "conjugate", progress=False)
    assert fit.status is vl.Status.CONVERGED
    standard = fit.guide.standard("rate")
    assert float(standard["concentration"]) == pytest.approx(16.0, rel=1e-9)
    assert float(standard["rate"]) == pytest.approx(6.0, rel=1e-9)
    elbo, error = fit.elbo()
    assert error < 1e-9  # q is p: every draw has the same log weight
    assert elbo == pytest.approx(-float(fit.history["negative_elbo"][-1]), rel=1e-9)
    assert fit.posterior(4000).mean()["rate"].item() == pytest.approx(16 / 6, abs=5 * 4 / 6 / 4000**0.5)
    assert (fit.history["seconds"][1:] >= fit.history["seconds"][:-1]).all()
    assert set(pyro.get_param_store().keys()) == before


def test_bound_never_falls() -> None:
    def two_sites(y: Tensor) -> None:
        mean = pyro.sample("mean", dist.Normal(0.0, 10.0))
        precision = pyro.sample("precision", dist.Gamma(1.0, 1.0))
        with pyro.plate("row", len(y)):
            pyro.sample("y", dist.Normal(mean, precision.rsqrt()), obs=y)

    y = 3 + torch.randn(20, generator=torch.Generator().manual_seed(0))
    fit = vl.fit(vl.Problem(two_sites, y), "conjugate", progress=False)
    assert fit.status is vl.Status.CONVERGED
    losses = fit.history["negative_elbo"]
    assert (losses[1:] <= losses[:-1] + 1e-9).all()


def test_site_that_is_not_conjugate_is_named() -> None:
    problem = vl.Problem(logistic, torch.tensor([1.0, 0.0]))
    with pytest.raises(ModelError, match=r"'mean' is not conditionally conjugate.*NaturalGradient.*mean_field"):
        vl.fit(problem, "conjugate", progress=False)


def test_options_that_it_has_no_use_for() -> None:
    problem = vl.Problem(counts, torch.ones(3))
    with pytest.raises(ArgumentError, match="num_particles"):
        vl.fit(problem, "conjugate", num_particles=10, progress=False)
    with pytest.raises(ArgumentError, match="num_restarts"):
        vl.fit(problem, "conjugate", num_restarts=2, progress=False)
