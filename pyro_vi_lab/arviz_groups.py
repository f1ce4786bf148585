"""The groups of an ArviZ tree: what they hold, with names for all axes."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import Any

from torch import Tensor

from pyro_vi_lab import arviz_bridge
from pyro_vi_lab.arviz_bridge import SAMPLE_DIMS, Variable
from pyro_vi_lab.checks import importance
from pyro_vi_lab.errors import ArgumentError, DataError, LabWarning, ModelError
from pyro_vi_lab.fitted import Fit
from pyro_vi_lab.posterior import Posterior
from pyro_vi_lab.problem import Problem
from pyro_vi_lab.provenance import data_hash, versions
from pyro_vi_lab.pyro_results import params_of_guide, unconstrained

Group = dict[str, Variable]

POTENTIAL = {
    "description": "potential energy, minus the log density on the unconstrained scale: these draws have no momentum, "
    "or it was not kept"
}
"""What the statistic ``energy`` of draws that are not of our NUTS is."""


@dataclass(frozen=True)
class Options:
    """What a tree is to hold besides the draws.

    Args:
        num_draws: Draws of the prior.
        seed: Seed of the draws taken here.
        prior: Add ``prior`` and ``prior_predictive``.
        predictive: Add ``posterior_predictive``.
        log_likelihood: Add ``log_likelihood``.
        log_prior: Add ``log_prior``.
    """

    num_draws: int = 1000
    seed: int = 0
    prior: bool = False
    predictive: bool = True
    log_likelihood: bool = True
    log_prior: bool = True


def tree_of(
    posterior: Posterior,
    problem: Problem | None,
    options: Options,
    *,
    fit: Fit | None = None,
    guide: Callable[..., Any] | None = None,
) -> Any:
    """The tree of draws, of the problem that they are of, and of the fit or the guide that they were drawn from."""
    if posterior.info.get("point"):
        raise ArgumentError(
            f"the draws of {posterior.method} are all one point and no posterior: take the point from fit.point(), or "
            "fit 'laplace', the normal at the mode"
        )
    attrs = _attrs(posterior, problem)
    groups: dict[str, Group] = {"posterior": _drawn(posterior.draws, problem)}
    posterior = _completed(posterior, problem)
    if posterior.stats:
        groups["sample_stats"] = _stats(posterior)
    coords: dict[str, Any] = {}
    if problem is not None:
        coords |= problem.coords
        groups |= _groups_of_problem(posterior, problem, options, attrs)
    if posterior.unconstrained is not None:
        values = posterior.unconstrained.numpy(force=True)
        groups["unconstrained_posterior"] = {"z": (values, (*SAMPLE_DIMS, "coordinate"))}
        if problem is not None:
            coords["coordinate"] = problem.density().labels
    group_attrs: dict[str, Mapping[str, Any]] = {}
    if fit is not None:
        groups["fit"], group_attrs["fit"] = _of_fit(fit), _attrs_of_fit(fit)
    elif guide is not None and problem is not None:
        groups["fit"] = _params(params_of_guide(problem, guide))
        group_attrs["fit"] = {"method": posterior.method, "versions": attrs["versions"]}
    filled = {name: group for name, group in groups.items() if group}
    return arviz_bridge.tree(filled, coords, attrs, group_attrs)


def _groups_of_problem(
    posterior: Posterior, problem: Problem, options: Options, attrs: dict[str, Any]
) -> dict[str, Group]:
    groups: dict[str, Group] = {}
    if options.predictive:
        draws = problem.predictive(posterior, seed=options.seed)
        groups["posterior_predictive"] = _drawn(draws, problem)
    wanted = [kind for kind, asked in (("observed", options.log_likelihood), ("latent", options.log_prior)) if asked]
    try:
        values = problem.log_densities(posterior, wanted) if wanted else {}
    except ModelError as error:
        warnings.warn(f"log_likelihood and log_prior are left out: {error}", LabWarning, stacklevel=5)
        attrs["left_out"] = f"log_likelihood, log_prior: {error}"
        values = {}
    for kind, group in (("observed", "log_likelihood"), ("latent", "log_prior")):
        chosen = {name: value for name, value in values.items() if problem.sites[name].kind == kind}
        groups[group] = _drawn(chosen, problem)
    if options.prior:
        prior = problem.prior(num_draws=options.num_draws, seed=options.seed)
        groups["prior"] = _drawn(prior.draws, problem)
        groups["prior_predictive"] = _drawn(problem.predictive(prior, seed=options.seed), problem)
    groups["observed_data"] = {
        name: (value.numpy(force=True), _dims(problem, name, value.dim())) for name, value in problem.observed.items()
    }
    groups["constant_data"] = _constant_data(problem)
    return groups


def _completed(posterior: Posterior, problem: Problem | None) -> Posterior:
    """The same with draws and log densities on the unconstrained scale, where they can be had."""
    if posterior.unconstrained is not None or problem is None:
        return posterior
    found = unconstrained(posterior, problem)
    if found is None:
        return posterior
    z, log_p = found
    return replace(posterior, unconstrained=z, stats={"lp": log_p, **posterior.stats})


def _drawn(values: Mapping[str, Tensor], problem: Problem | None) -> Group:
    return {
        name: (value.numpy(force=True), (*SAMPLE_DIMS, *_dims(problem, name, value.dim() - len(SAMPLE_DIMS))))
        for name, value in values.items()
    }


def _stats(posterior: Posterior) -> Group:
    stats = {name: value.numpy(force=True) for name, value in posterior.stats.items()}
    if "diverging" in stats:
        stats["diverging"] = stats["diverging"].astype(bool)
    if "log_p" in stats and "log_q" in stats:
        if posterior.unconstrained is not None:
            stats.setdefault("lp", stats["log_p"])
        with suppress(DataError):  # log weights that are not finite, or too few, have no smooth form
            check = importance(posterior.stats["log_p"], posterior.stats["log_q"])
            stats["log_weights"] = check.smoothed_log_weights.numpy(force=True)
    group: Group = {name: (value, SAMPLE_DIMS) for name, value in stats.items()}
    if "energy" not in stats and "lp" in stats:
        group["energy"] = (-stats["lp"], SAMPLE_DIMS, POTENTIAL)
    return group


def _dims(problem: Problem | None, site: str, num_axes: int) -> tuple[str, ...]:
    """Names of the first ``num_axes`` axes of a site; a log likelihood has no event axes."""
    if problem is not None and site in problem.sites and num_axes <= len(problem.sites[site].shape):
        return problem.dims(site)[:num_axes]
    return tuple(f"{site}_dim_{i}" for i in range(num_axes))


def _constant_data(problem: Problem) -> Group:
    """The model's tensor arguments but for the observed ones, with the dimensions of the rows that they go with."""
    group: Group = {}
    for name, value in problem.inputs.items():
        if any(value.shape == data.shape and bool((value == data).all()) for data in problem.observed.values()):
            continue
        rows: tuple[str, ...] = ()
        for site in problem.observed:
            pairs = zip(value.shape, problem.sites[site].batch_shape, problem.dims(site), strict=False)
            shared = takewhile(lambda pair: pair[0] == pair[1], pairs)
            rows = max(rows, tuple(dim for *_, dim in shared), key=len)
        own = tuple(f"{name}_dim_{i}" for i in range(len(rows), value.dim()))
        group[name] = (value.numpy(force=True), rows + own)
    return group


# --- the fit --------------------------------------------------------------------------------------------------------


def _of_fit(fit: Fit) -> Group:
    """History and parameters; of a guide over a family those of every restart, on the unconstrained scale."""
    group: Group = {}
    for name, values in fit.history.items():
        restarts = ("restart",) if values.ndim > 1 and values.shape[1] == fit.num_restarts else ()
        rest = tuple(f"{name}_dim_{i}" for i in range(values.ndim - 1 - len(restarts)))
        group[name] = (values, ("evaluation", *restarts, *rest))
    if fit.params is None:
        return group | _params(params_of_guide(fit.problem, fit.guide), taken=group)
    loc, scale = (value.numpy(force=True) for value in fit.params)
    rest = tuple(f"scale_dim_{i}" for i in range(scale.ndim - 2))
    return group | {"loc": (loc, ("restart", "coordinate")), "scale": (scale, ("restart", "coordinate", *rest))}


def _params(params: Mapping[str, Tensor], taken: Collection[str] = ()) -> Group:
    return {
        f"{name}_param" if name in taken else name: (
            value.numpy(force=True),
            tuple(f"{name}_dim_{i}" for i in range(value.dim())),
        )
        for name, value in params.items()
    }


def _attrs_of_fit(fit: Fit) -> dict[str, Any]:
    return {
        "method": fit.method,
        "status": fit.status.value,
        "statuses": json.dumps([status.value for status in fit.statuses]),
        "message": fit.message,
        "num_steps": fit.num_steps,
        "num_gradients": fit.num_gradients,
        "seconds": fit.seconds,
        "seed": fit.seed,
        "versions": json.dumps(versions()),
    }


def _attrs(posterior: Posterior, problem: Problem | None) -> dict[str, Any]:
    """How the draws were made."""
    attrs: dict[str, Any] = {"created_by": "pyro-vi-lab", "inference_library": "pyro", "method": posterior.method}
    kept = {key: value for key, value in posterior.info.items() if isinstance(value, str | int | float | list)}
    attrs |= kept
    found = versions()
    attrs |= {"inference_library_version": found["pyro-ppl"], "versions": json.dumps(found)}
    if problem is not None:
        attrs |= {"problem": problem.name, "data_hash": data_hash(problem)}
    return attrs
