"""A user's file under ``mypy --strict``: what it calls has types, and they are the ones that are said.

Not run, only checked, by ``make lint``.
"""

from __future__ import annotations

from typing import assert_type

import numpy as np
import torch
from pyro.infer import SVI, Trace_ELBO

import pyro_vi_lab as vl
from pyro_vi_lab import Fit, Posterior, Problem, Status


def model(y: torch.Tensor) -> None:
    """Stands for a user's model."""


problem = Problem(model, torch.zeros(3), dims={"y": ["row"]}, name="mine")
assert_type(problem.density(), vl.LogDensity)
assert_type(problem.prior(num_draws=10, seed=0), Posterior)

fit = vl.fit(problem, "full_rank", seed=0, num_restarts=2, progress=False)
assert_type(fit, Fit)
assert_type(fit.status, Status)
assert_type(fit.message, str)
assert_type(fit.elbo(num_draws=100, seed=1), tuple[float, float])
assert_type(fit.posterior(num_draws=100, seed=1), Posterior)
vl.fit(problem, vl.guides.MeanFieldNormal)
vl.fit(problem, vl.guides.BlockNormal(model))
assert_type(vl.fit_each(problem, {"y": torch.zeros(4, 3)}), list[Fit])

reference = vl.nuts(problem, num_chains=4, num_warmup=100, num_draws=100, start=fit)
assert_type(reference, Posterior)
assert_type(reference.problems(), list[str])
assert_type(reference.mean(), dict[str, torch.Tensor])
assert_type(reference.draws["mean"], torch.Tensor)

comparison = vl.compare(problem, ["mean_field", fit], reference=reference)
assert_type(comparison, vl.Comparison)
assert_type(comparison.fits["mean_field"], Fit)
assert_type(comparison.report(), str)

verdict = vl.trust(fit, budget="fast")
assert_type(verdict, vl.Verdict)
assert_type(verdict.posterior, Posterior | None)
assert_type(vl.fit(problem, "auto", time_budget=60.0), Fit)
assert_type(vl.calibrate(problem, "mean_field", num_simulations=100), vl.Calibration)

guide = vl.guides.FullRankNormal(model)
optim = vl.NaturalGradient(guide, lr=0.5, momentum=0.9)
objective = vl.ELBO(num_particles=64, gradient="stl", vectorize_particles=True)
SVI(model, guide, optim, objective)  # type: ignore[no-untyped-call] # Pyro's
SVI(model, guide, vl.FusedAdam({"lr": 0.01}), vl.Captured(Trace_ELBO()))  # type: ignore[no-untyped-call] # Pyro's
vl.IWAE(num_particles=8)
vl.RenyiELBO(alpha=0.5, num_particles=8)
vl.PerSiteELBO()

mixture = vl.models.GaussianMixture(3).problem(np.zeros((10, 2)))
assert_type(vl.em(mixture, objective="mle", num_restarts=2, seed=0), Fit)
assert_type(vl.models.build("eight_schools"), Problem)
check = vl.checks.discrepancy(reference, fit.posterior())
assert_type(check, vl.checks.Discrepancy)

try:
    vl.explain(problem)
except vl.LabError as error:
    print(error)
