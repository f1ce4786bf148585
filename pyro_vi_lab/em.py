r"""Expectation maximization for mixtures of normals: a point, the maximum of the likelihood or of the posterior.

With q(z) = p(z | x, θ), step E, the free energy

.. math:: F(q, \theta) = E_q[\log p(x, z \mid \theta)] + H(q) \; [\, + \log p(\theta)]

is the log likelihood [plus the log prior]; step M sets θ to its maximum in closed form. Neither lets F fall.

References:
    Dempster, Laird & Rubin 1977, "Maximum likelihood from incomplete data via the EM algorithm", JRSS B 39(1). Neal &
    Hinton 1998, "A view of the EM algorithm that justifies incremental, sparse, and other variants". Ghahramani &
    Jordan 1994, "Supervised learning from incomplete data via an EM approach", NeurIPS 6, for missing values.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import torch
from pyro import poutine
from torch import Tensor, nn

from pyro_vi_lab.change_of_variables import bijection
from pyro_vi_lab.density_engine import Status
from pyro_vi_lab.em_steps import Run, Steps, ascend
from pyro_vi_lab.errors import ArgumentError, unknown_name
from pyro_vi_lab.fit_guide import name_by_content
from pyro_vi_lab.fitted import Fit
from pyro_vi_lab.guides import MAP, MLE, PointGuide
from pyro_vi_lab.isolation import model_run
from pyro_vi_lab.mixture_fit import INITS, Init, MixtureRows, mixture_of, rows_of, starts
from pyro_vi_lab.mixture_prior import (
    Parameters,
    Prior,
    least_power,
)
from pyro_vi_lab.models import GaussianMixture
from pyro_vi_lab.problem import Problem

Objective = Literal["mle", "map"]
SAME = 1e-3
"""Nats between restarts that have found the same maximum."""


def em(
    problem: Problem,
    *,
    objective: Objective = "mle",
    num_restarts: int = 1,
    init: Init = "kmeans",
    seed: int = 0,
    max_steps: int = 1000,
    tolerance: float = 1e-6,
    reg_covar: float | None = None,
    start: Mapping[str, Any] | None = None,
) -> Fit:
    r"""Fit a mixture of normals by expectation maximization.

    ``CONVERGED`` means that the steps to come would raise the free energy by less than ``tolerance`` nats in all, as
    estimated from the ratio of the last two.

    Args:
        problem: Of a :class:`~pyro_vi_lab.models.GaussianMixture`, with or without missing values and row weights.
        objective: ``"mle"``, the likelihood, in which the priors have no part; or ``"map"``, the joint density of the
            sites, as ``vl.fit(problem, "map")``.
        num_restarts: Starts, of which the best end is kept.
        init: ``"kmeans++"``, rows far from each other as centers; ``"kmeans"``, these moved by steps of k-means.
        seed: Seed of the starts.
        max_steps: Most steps.
        tolerance: In nats.
        reg_covar: Added to all variances in each step M of ``"mle"``, in squared units of X; by default 1e-6. Without
            it the likelihood has no upper bound: it is infinite where a component has a single row. With it the free
            energy may fall, by terms of its size.
        start: Values of the sites ``weights``, ``loc`` and ``precision`` to start from, such as :meth:`Fit.point`.

    Returns:
        A fit of the guide ``MLE`` or ``MAP``, whose history has ``free_energy``.

    Raises:
        ArgumentError: A problem of another model, a number out of range, or a prior whose density has no maximum.
        DataError: There are fewer different rows than components.

    Example:
        >>> from pyro_vi_lab.models import GaussianMixture
        >>> X = torch.cat([torch.linspace(4.0, 6.0, 21), torch.linspace(19.0, 21.0, 21)])[:, None]
        >>> fit = em(GaussianMixture(2).problem(X))
        >>> fit.point()["loc"][:, 0].sort().values.round(decimals=3).tolist()
        [5.0, 20.0]
    """
    model = mixture_of(problem, "em")
    _check(objective, init, num_restarts=num_restarts, max_steps=max_steps, tolerance=tolerance, reg_covar=reg_covar)
    began, rows, prior = time.perf_counter(), rows_of(problem), model.prior.like(problem.inputs["X"])
    prior = prior.centered(rows.center)
    if objective == "map":
        _check_prior(prior)
    step = Steps(rows, prior if objective == "map" else None, model.covariance, reg_covar)
    if start is None:
        found = starts(rows, model, init=init, num_restarts=num_restarts, seed=seed)
        begins = [step.maximum(one) for one in found]
    elif num_restarts != 1:
        raise ArgumentError(f"num_restarts={num_restarts} and start were both given: a start is one")
    else:
        begins = [_given(start, model, rows)]
    runs = [ascend(step, one, began, max_steps=max_steps, tolerance=tolerance) for one in begins]
    rank = [Status.CONVERGED, Status.OUT_OF_STEPS, Status.DIVERGED]
    runs.sort(key=lambda run: (rank.index(run.status), -run.values[-1] if math.isfinite(run.values[-1]) else math.inf))
    best = runs[0]
    parameters = best.parameters._replace(loc=best.parameters.loc + rows.center)
    values: dict[str, Tensor] = {}
    guide = _guide(problem, model, MAP if objective == "map" else MLE, seed)
    if best.status is not Status.DIVERGED:
        values = model.site_values(parameters)
        _put(guide, values)
    name_by_content(guide)
    return Fit(
        problem=problem,
        method="em",
        guide=guide,
        params=None,
        statuses=tuple(run.status for run in runs),
        message=best.message + _of_others(runs),
        num_steps=max(len(run.values) for run in runs) - 1,
        num_gradients=0,
        seconds=time.perf_counter() - began,
        seed=seed,
        history=_history(runs),
        mode=values,
    )


def _of_others(runs: list[Run]) -> str:
    failed = sum(run.status is not Status.CONVERGED for run in runs[1:])
    lower = [
        runs[0].values[-1] - run.values[-1]
        for run in runs[1:]
        if run.status is Status.CONVERGED and runs[0].values[-1] - run.values[-1] > SAME
    ]
    text = f"; {failed} of {len(runs)} restarts did not converge" if failed else ""
    return text + (f"; {len(lower)} found a lower maximum, by {min(lower):.2g} nats or more" if lower else "")


def _history(runs: list[Run]) -> dict[str, Any]:
    """One row per step, one column per restart; one that has ended stays as it is."""
    number = max(len(run.values) for run in runs)

    def column(values: list[float]) -> list[float]:
        return values + values[-1:] * (number - len(values))

    energy = np.array([column(run.values) for run in runs]).T
    seconds = np.array([column(run.seconds) for run in runs]).max(0)
    energy = energy[:, 0] if len(runs) == 1 else energy
    return {"free_energy": energy, "negative_log_density": -energy, "seconds": seconds}


def _given(start: Mapping[str, Any], model: GaussianMixture, rows: MixtureRows) -> Parameters:
    values = {}
    K, D = model.num_components, rows.X.shape[1]
    square = {"full": (K, D, D), "tied": (D, D), "diag": (K, D), "spherical": (K,)}[model.covariance]
    for name, shape in {"weights": (K,), "loc": (K, D), "precision": square}.items():
        if name not in start:
            raise ArgumentError(f"start has no value of site {name!r}; it needs weights, loc and precision")
        value = torch.as_tensor(start[name]).to(rows.X)
        if value.shape != shape or not bool(value.isfinite().all()):
            raise ArgumentError(f"start of site {name!r} has shape {tuple(value.shape)}; expected {shape}, finite")
        values[name] = value
    weights = values["weights"]
    # single precision is precise enough for a start
    if not bool((weights > 0).all()) or abs(float(weights.sum()) - 1) > 1e-6:
        raise ArgumentError("start of site 'weights' must be positive and sum to one")
    precision = values["precision"]
    if model.covariance in ("full", "tied"):
        tril, info = torch.linalg.cholesky_ex(precision)
        right, covariance = bool((info == 0).all()), torch.cholesky_inverse(tril)
    else:
        right, covariance = bool((precision > 0).all()), precision.reciprocal()
    if not right:
        raise ArgumentError("start of site 'precision' must be positive, and matrices positive definite")
    return Parameters(weights / weights.sum(), values["loc"] - rows.center, covariance, model.covariance)


def _guide(problem: Problem, model: GaussianMixture, kind: type[PointGuide], seed: int) -> PointGuide:
    """Set up on two rows: no latent site that is left lies along them."""
    args = {key: value[:2] for key, value in problem.inputs.items()}
    guide = kind(model if model.marginal else poutine.block(model, hide=["assignment"]))
    with model_run(seed=seed, dtype=problem.dtype, validate=False):
        guide._setup_prototype(**args)
    return guide


def _put(guide: PointGuide, values: Mapping[str, Tensor]) -> None:
    trace: Any = guide.prototype_trace
    parts = []
    for name in guide._unconstrained_shapes:
        value = values[name]
        if name in ("weights", "stick"):  # a component without rows is at the edge of the support
            value = value.clamp_min(torch.finfo(value.dtype).tiny)
        parts.append(bijection(name, trace.nodes[name]["fn"]).inv(value).reshape(-1))
    guide.loc = nn.Parameter(torch.cat(parts))


def _check(objective: str, init: str, *, reg_covar: float | None, tolerance: float, **counts: int) -> None:
    if objective not in ("mle", "map"):
        raise unknown_name("objective", objective, ("mle", "map"))
    if init not in INITS:
        raise unknown_name("init", init, INITS)
    for name, value in counts.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ArgumentError(f"{name} must be a positive whole number, got {value!r}")
    if not (0 <= tolerance < math.inf):
        raise ArgumentError(f"tolerance is in nats, from zero up, got {tolerance!r}")
    if reg_covar is not None and objective == "map":
        raise ArgumentError("reg_covar has no meaning with objective='map', where the prior bounds the variances")
    if reg_covar is not None and not 0 <= reg_covar < math.inf:
        raise ArgumentError(f"reg_covar is a variance, from zero up, got {reg_covar!r}")


def _check_prior(prior: Prior) -> None:
    if float(prior.concentration.min()) < 1:
        raise ArgumentError(
            f"objective='map' needs a concentration of at least 1, got {float(prior.concentration.min()):g}: below, "
            "the density of the weights is infinite where a component has none; fit 'conjugate' instead, or 'mle'"
        )
    if least_power(prior) <= 0:
        raise ArgumentError(
            f"objective='map' needs more degrees of freedom than {prior.df:g}: with these the density of the precision "
            "of a component without rows has no maximum"
        )
