"""Results as ArviZ trees, in memory and in files."""

from __future__ import annotations

from functools import singledispatch
from pathlib import Path
from typing import Any

from pyro.infer import MCMC

from pyro_vi_lab import arviz_bridge
from pyro_vi_lab.arviz_groups import Options, tree_of
from pyro_vi_lab.errors import ArgumentError, FileError
from pyro_vi_lab.fitted import Fit
from pyro_vi_lab.posterior import Posterior
from pyro_vi_lab.problem import Problem
from pyro_vi_lab.provenance import data_hash, plain, versions
from pyro_vi_lab.pyro_results import draws_of_guide, from_mcmc, from_triple, problem_of
from pyro_vi_lab.whole_files import check_room, check_writable, staged, whole

__all__ = [
    "check_writable",
    "data_hash",
    "from_mcmc",
    "load_arviz",
    "plain",
    "save_arviz",
    "staged",
    "to_arviz",
    "versions",
    "whole",
]


@singledispatch
def to_arviz(
    result: Any,
    *,
    problem: Problem | None = None,
    num_draws: int = 1000,
    seed: int = 0,
    prior: bool = False,
    predictive: bool = True,
    log_likelihood: bool = True,
    log_prior: bool = True,
) -> Any:
    """A result as ArviZ's own object: ``InferenceData`` with ArviZ 0.2x, a ``DataTree`` with 1.x.

    The groups are ``posterior``, ``sample_stats`` and ``unconstrained_posterior``; where the problem is known also
    ``posterior_predictive``, ``log_likelihood``, ``log_prior``, ``observed_data`` and ``constant_data`` (arguments of
    the model that are not observed), and on request ``prior`` and ``prior_predictive``; of a fit also ``fit``, with its
    history, the parameters of its guide, and how it ended. Dimensions and labels come from the problem.

    Statistics have ArviZ's names: ``lp``, ``energy``, ``step_size``, ``tree_depth``, ``acceptance_rate``,
    ``n_steps`` and ``diverging`` of our NUTS; ``log_p``, ``log_q`` and the smoothed ``log_weights`` of a fit, whose
    ``energy`` is the potential energy, as it is of Pyro's own sampler, which keeps ``diverging`` alone.

    Args:
        result: A ``Fit``; a ``Posterior``; a ``pyro.infer.MCMC`` that was run; ``(model, guide, args)`` or ``(model,
            guide, args, kwargs)`` after an SVI loop of your own, with the guide's parameters as they are now; or a
            ``Comparison``, which gives a dict: a tree for the reference and one for every candidate with a posterior.
        problem: What the draws are of; needed for a ``Posterior``, and for other dimensions than those that the model
            names.
        num_draws: Draws taken from a fit or a guide, and of the prior.
        seed: Seed of the draws taken here.
        prior: Add the groups ``prior`` and ``prior_predictive``, of ``num_draws`` draws.
        predictive: Add the group ``posterior_predictive``.
        log_likelihood: Add the group ``log_likelihood``, with one value per observed row; discrete latent sites are
            summed out.
        log_prior: Add the group ``log_prior``, with one value per latent site and index of its plates.

    Raises:
        ArgumentError: ``result`` is something else, an ``MCMC`` that was not run, or a point (a fit of ``"map"`` or
            ``"mle"``), whose intervals of no width would pass for those of a posterior.
        FitError: The fit diverged, so that it has no posterior.

    Example:
        >>> import torch
        >>> draws = torch.randn(4, 500, generator=torch.Generator().manual_seed(0))
        >>> tree = to_arviz(Posterior({"mu": draws}, method="exact"))
        >>> tree["posterior"]["mu"].dims
        ('chain', 'draw')
    """
    raise ArgumentError(
        "to_arviz takes a Fit, a Posterior, a Comparison, a pyro.infer.MCMC or (model, guide, args), got "
        f"{type(result).__name__}"
    )


@to_arviz.register
def _(posterior: Posterior, *, problem: Problem | None = None, **options: Any) -> Any:
    return tree_of(posterior, problem, Options(**options))


@to_arviz.register
def _(fit: Fit, *, problem: Problem | None = None, num_draws: int = 1000, seed: int = 0, **options: Any) -> Any:
    posterior = fit.posterior(num_draws=num_draws, seed=seed)
    return tree_of(posterior, problem or fit.problem, Options(num_draws=num_draws, seed=seed, **options), fit=fit)


@to_arviz.register
def _(mcmc: MCMC, *, problem: Problem | None = None, **options: Any) -> Any:
    posterior = from_mcmc(mcmc)
    return tree_of(posterior, problem or problem_of(mcmc), Options(**options))


@to_arviz.register
def _(triple: tuple, *, problem: Problem | None = None, num_draws: int = 1000, seed: int = 0, **options: Any) -> Any:  # type: ignore[type-arg]
    problem, guide = from_triple(triple, problem)
    posterior = draws_of_guide(problem, guide, num_draws, seed)
    return tree_of(posterior, problem, Options(num_draws=num_draws, seed=seed, **options), guide=guide)


def save_arviz(tree: Any, path: str | Path) -> None:
    """Write one tree, whole or not at all, as NetCDF, or as Zarr if the name ends in ``.zarr``.

    Raises:
        FileError: It cannot be written there, or the disk is full.
    """
    path = Path(path)
    try:
        with whole(path) as place:
            # HDF5 leaves the process in a state in which it may crash where it runs out of space while it writes
            check_room(place.parent, arviz_bridge.num_bytes(tree))
            arviz_bridge.save(tree, place)
    except FileError:
        raise
    except (OSError, RuntimeError) as error:  # HDF5 has errors of its own where the system refuses to write
        raise FileError(f"cannot write {path}: {error}") from error


def load_arviz(path: str | Path) -> Any:
    """Read a tree that :func:`save_arviz` wrote, as the object of the ArviZ that is installed.

    Raises:
        FileError: There is no such file, or it is something else.
    """
    path = Path(path)
    try:
        return arviz_bridge.load(path)
    except (OSError, ValueError, KeyError) as error:
        raise FileError(f"cannot read {path} as a tree of ArviZ: {error}") from error
