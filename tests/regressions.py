"""The regressions of posteriordb as ready models, and their sites under the published names.

Where a published model has flat priors, ours are so wide that they say nothing beside the data.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from pyro_vi_lab.models import HierarchicalRegression, LogisticRegression, PoissonRegression, RobustRegression
from pyro_vi_lab.problem import Problem
from tests.posteriordb import Loaded

WIDE = {"prior_scale": 1e4, "intercept_scale": 1e4}
Draws = dict[str, Tensor]


def linear(loaded: Loaded) -> Problem:
    # not LinearRegression: the scale of its coefficients is in units of the noise, so that no prior of it is flat in all;
    # a Student-t with this many degrees of freedom is a normal
    model = RobustRegression(1e6, sigma_scale=1e4, **WIDE)
    return model.problem(loaded.data["X"][:, 1:], loaded.data["y"], standardize=True)


def linear_draws(draws: Draws) -> Draws:
    return {"beta": torch.cat([draws["intercept"][..., None], draws["beta"]], -1), "sigma": draws["sigma"]}


def wells(loaded: Loaded) -> Problem:
    return LogisticRegression(**WIDE).problem(loaded.data["X"], loaded.data["switched"], standardize=True)


def trend(loaded: Loaded) -> Problem:
    year = loaded.data["year"]
    X = torch.stack([year, year**2, year**3], 1)
    return PoissonRegression(prior_scale=10.0, intercept_scale=20.0).problem(X, loaded.data["C"])


def trend_draws(draws: Draws) -> Draws:
    return {"alpha": draws["intercept"], **{f"beta{i + 1}": draws["beta"][..., i] for i in range(3)}}


def radon(loaded: Loaded) -> Problem:
    # these priors are the published ones
    data = loaded.data
    X = torch.stack([data["log_uppm"], data["floor"]], 1)
    return HierarchicalRegression(prior_scale=10.0).problem(X, data["log_radon"], group={"county": data["county"]})


def radon_draws(draws: Draws) -> Draws:
    alpha = draws["intercept"][..., None] + draws["county_effect"][..., 0]
    scale = draws["county_scale"][..., 0]
    return {
        "alpha": alpha,
        "beta": draws["beta"],
        "mu_alpha": draws["intercept"],
        "sigma_alpha": scale,
        "sigma_y": draws["sigma"],
    }


CASES: dict[str, tuple[Callable[[Loaded], Problem], Callable[[Draws], Draws]]] = {
    "kidiq-kidscore_interaction": (linear, linear_draws),
    "earnings-earn_height": (linear, linear_draws),
    "earnings-logearn_interaction": (linear, linear_draws),
    "mesquite-logmesquite": (linear, linear_draws),
    "wells_data-wells_dae_inter_model": (wells, lambda draws: {"alpha": draws["intercept"], "beta": draws["beta"]}),
    "GLM_Poisson_Data-GLM_Poisson_model": (trend, trend_draws),
    "radon_mn-radon_hierarchical_intercept_centered": (radon, radon_draws),
}


def deviations(loaded: Loaded, draws: Draws, log_weight: Tensor | None = None) -> tuple[float, float]:
    """Largest shift of a mean in published standard deviations, and largest relative change of one of these.

    Args:
        loaded: What was published.
        draws: Draws ``(C, S, *shape)``.
        log_weight: Of each draw, ``(C, S)``; all alike if ``None``.
    """
    shift, change = 0.0, 0.0
    for name, value in draws.items():
        mean, sd = torch.as_tensor(loaded.mean[name]), torch.as_tensor(loaded.sd[name])
        flat = value.flatten(0, 1)
        weight = torch.ones(len(flat)).to(flat) if log_weight is None else log_weight.flatten()
        weight = weight.softmax(0).reshape(-1, *([1] * (flat.dim() - 1)))
        center = (weight * flat).sum(0)
        spread = (weight * (flat - center).square()).sum(0).sqrt()
        shift = max(shift, float(((center - mean) / sd).abs().max()))
        change = max(change, float((spread / sd - 1).abs().max()))
    return shift, change
