"""Every object that ``to_arviz`` takes, with every function of the ArviZ that is installed: none is left out."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import arviz
import matplotlib
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import MCMC, NUTS, SVI, Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from torch import Tensor

import pyro_vi_lab as vl
from pyro_vi_lab import Problem, arviz_bridge, to_arviz

Y = torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64)


def model(y: Tensor, scale: float = 2.0) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    with pyro.plate("row", len(y)):
        theta = pyro.sample("theta", dist.Normal(mu, 1.0))
        pyro.sample("y", dist.Normal(theta, scale), obs=y)


def mixture(y: Tensor) -> None:
    with pyro.plate("cluster", 2):
        center = pyro.sample("mu", dist.Normal(0.0, 5.0))
    with pyro.plate("row", len(y)):
        which = pyro.sample("which", dist.Categorical(torch.tensor([0.4, 0.6], dtype=y.dtype)))
        pyro.sample("y", dist.Normal(center[which], 1.0), obs=y)


@cache
def problem() -> Problem:
    return Problem(model, Y, coords={"row": ["a", "b", "c"]})


def of_fit() -> Any:
    return to_arviz(vl.fit(problem(), num_restarts=2, progress=False), num_draws=100, prior=True)


def of_nuts() -> Any:
    posterior = vl.nuts(problem(), num_chains=2, num_warmup=100, num_draws=100, progress=False, compile=False)
    return to_arviz(posterior, problem=problem(), prior=True)


@cache
def sampled() -> MCMC:
    with pyro.get_param_store().scope():
        mcmc = MCMC(NUTS(model), num_samples=60, warmup_steps=40, num_chains=1, disable_progbar=True)
        mcmc.run(Y.float())
    return mcmc


def of_pyro_mcmc() -> Any:
    return to_arviz(sampled(), problem=problem(), prior=True)


def of_pyro_mcmc_alone() -> Any:
    return to_arviz(sampled(), prior=True)


def trained(**kwargs: Any) -> AutoNormal:
    guide = AutoNormal(model)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.05}), Trace_ELBO())
    for _ in range(100):
        svi.step(Y.float(), **kwargs)
    return guide


def of_triple() -> Any:
    return to_arviz((model, trained(), (Y.float(),)), num_draws=100, prior=True)


def of_triple_with_kwargs() -> Any:
    return to_arviz((model, trained(scale=1.0), (Y.float(),), {"scale": 1.0}), num_draws=100, prior=True)


def of_mixture() -> Any:
    # the second center is far from all rows but one
    made = Problem(mixture, Y)
    return to_arviz(vl.fit(made, "mean_field", progress=False), num_draws=100, prior=True)


@cache
def trees() -> dict[str, Any]:
    reference = vl.fit(problem(), seed=9, progress=False).posterior(500, seed=9)
    comparison = vl.compare(problem(), ["full_rank"], reference=reference, num_draws=100, progress=False)
    return dict(to_arviz(comparison, prior=True))


OBJECTS: dict[str, Callable[[], Any]] = {
    "fit": of_fit,
    "nuts": of_nuts,
    "reference of a comparison": lambda: trees()["reference"],
    "candidate of a comparison": lambda: trees()["full_rank"],
    "MCMC of Pyro with a problem": of_pyro_mcmc,
    "MCMC of Pyro": of_pyro_mcmc_alone,
    "guide of an SVI loop": of_triple,
    "guide of an SVI loop with kwargs": of_triple_with_kwargs,
    "fit with discrete sites": of_mixture,
}

OLD: Mapping[str, Callable[[Any], Any]] = {
    "summary": lambda tree: arviz.summary(tree),
    "plot_forest": lambda tree: arviz.plot_forest(tree, combined=True),
    "plot_trace": lambda tree: arviz.plot_trace(tree, var_names=["mu"]),
    "plot_ppc": lambda tree: arviz.plot_ppc(tree, num_pp_samples=10, random_seed=0),
    "plot_ppc of the prior": lambda tree: arviz.plot_ppc(tree, group="prior", num_pp_samples=10, random_seed=0),
    "loo": lambda tree: arviz.loo(tree, pointwise=True),
    "compare": lambda tree: arviz.compare({"this": tree, "that": trees()["full_rank"]}),
    "plot_pair": lambda tree: arviz.plot_pair(tree, divergences="diverging" in tree["sample_stats"]),
    "plot_energy": lambda tree: arviz.plot_energy(tree),
    "plot_dist_comparison": lambda tree: arviz.plot_dist_comparison(tree, var_names=["mu"]),
    "bfmi": lambda tree: arviz.bfmi(tree),
}
NEW: Mapping[str, Callable[[Any], Any]] = {
    "summary": lambda tree: arviz.summary(tree),
    "plot_forest": lambda tree: arviz.plot_forest(tree),
    "plot_trace": lambda tree: arviz.plot_trace(tree, var_names=["mu"]),
    "plot_trace_dist": lambda tree: arviz.plot_trace_dist(tree, var_names=["mu"]),
    "plot_ppc_dist": lambda tree: arviz.plot_ppc_dist(tree, num_samples=10),
    "plot_ppc_dist of the prior": lambda tree: arviz.plot_ppc_dist(tree, group="prior_predictive", num_samples=10),
    "loo": lambda tree: arviz.loo(tree, pointwise=True),
    "compare": lambda tree: arviz.compare({"this": tree, "that": trees()["full_rank"]}),
    "plot_pair": lambda tree: arviz.plot_pair(
        tree, var_names=["mu", "theta"] if "theta" in tree["posterior"] else None
    ),
    "plot_energy": lambda tree: arviz.plot_energy(tree),
    "plot_prior_posterior": lambda tree: arviz.plot_prior_posterior(tree, var_names=["mu"]),
    "bfmi": lambda tree: arviz.bfmi(tree),
    "psense_summary": lambda tree: arviz.psense_summary(tree, var_names=["mu"]),
}
FUNCTIONS = OLD if arviz_bridge.is_old() else NEW
GROUPS = {
    "posterior",
    "posterior_predictive",
    "prior",
    "prior_predictive",
    "log_likelihood",
    "log_prior",
    "sample_stats",
    "observed_data",
    "unconstrained_posterior",
}


@cache
def made(name: str) -> Any:
    return OBJECTS[name]()


@pytest.mark.parametrize("name", OBJECTS)
def test_every_object_has_the_same_groups(name: str) -> None:
    found = made(name)
    sampled = "MCMC" in name or name in ("nuts", "reference of a comparison")
    assert set(arviz_bridge.group_names(found)) == GROUPS | (set() if sampled else {"fit"})


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("name", OBJECTS)
def test_arviz_works_on_every_object(name: str, function: str) -> None:
    tree = made(name)
    with matplotlib.rc_context({"figure.max_open_warning": 0}), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what ArviZ and matplotlib warn each other about is not ours
        found = FUNCTIONS[function](tree)
    if function == "summary":
        assert any("mu" in str(row) for row in found.index)
        assert np.isfinite(found["mean"].astype(float)).all()
    elif function == "loo":
        assert found.n_data_points == len(Y)
        assert np.isfinite(found.elpd_loo if arviz_bridge.is_old() else found.elpd)
    elif function == "compare":
        assert len(found) == 2
