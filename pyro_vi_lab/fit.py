"""Fit a guide to a problem until it has converged."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from pyro.infer import ELBO
from pyro.optim.optim import PyroOptim

from pyro_vi_lab.callbacks import Callback, Watch, checked
from pyro_vi_lab.conjugate_fit import fit_conjugate
from pyro_vi_lab.conjugate_mixture import fit_mixture
from pyro_vi_lab.density_fit import MAX_KL, fit_density
from pyro_vi_lab.errors import ArgumentError, unknown_name
from pyro_vi_lab.escalation import TIME_BUDGET, climb
from pyro_vi_lab.fit_guide import is_a, is_over_family
from pyro_vi_lab.fit_progress import fit_progress
from pyro_vi_lab.fitted import Fit
from pyro_vi_lab.flow_fit import fit_flow
from pyro_vi_lab.guides import Conjugate, Flow, PointGuide
from pyro_vi_lab.mixture_stream import fit_stream
from pyro_vi_lab.mode_fit import fit_mode, fit_mode_of_batches
from pyro_vi_lab.models import GaussianMixture
from pyro_vi_lab.problem import Problem
from pyro_vi_lab.program_fit import fit_program, name_of
from pyro_vi_lab.second_order_fit import fit_batch_and_match, fit_fixed_draws
from pyro_vi_lab.tiers import Compile, check_compile

__all__ = ["Fit", "fit"]

DENSITY_STEPS, MODE_STEPS, PROGRAM_STEPS = 500, 200, 50_000
"""Most steps by default: of natural gradients of a density, of Newton's towards a mode, of stochastic gradients."""

CONJUGATE: dict[type, tuple[Callable[..., Fit], Callable[..., Fit]]] = {GaussianMixture: (fit_mixture, fit_stream)}
"""Models whose guide "conjugate" has fits of its own: to all rows at once, and batch by batch."""
OTHERS: dict[str, Callable[..., Fit]] = {"fixed_draws": fit_fixed_draws, "batch_and_match": fit_batch_and_match}
"""Other ways to fit a guide over a family than the natural gradient."""
AUTO = "auto"
"""The name that stands for all guides, one after the other."""
OTHER_STEPS = {"fixed_draws": 200, "batch_and_match": 2000}
OPTIMS = ("natural_gradient", *OTHERS)


def fit(
    problem: Problem,
    guide: str | type[Any] | Callable[..., Any] = "full_rank",
    *,
    optim: PyroOptim | str | None = None,
    objective: ELBO | None = None,
    lr: float | None = None,
    max_kl: float | None = None,
    num_particles: int | None = None,
    num_restarts: int = 1,
    seed: int = 0,
    max_steps: int | None = None,
    progress: bool = True,
    compile: Compile = "auto",
    time_budget: float | None = None,
    callbacks: Sequence[Callback] = (),
) -> Fit:
    r"""Fit a guide by natural gradient ascent of the ELBO; stops by itself.

    A guide over a family (a name, class or instance of ``GUIDES``) of a problem whose rows are all seen at once goes by
    natural gradients of the log density (:mod:`pyro_vi_lab.density_engine`). When the status is ``CONVERGED``, the
    natural gradient promises less than ``min(0.01, 5e-4·D)`` nats more of the bound: the guide is near a (local)
    optimum of its family.

    The guides ``"map"``, ``"mle"`` and ``"laplace"`` go by Newton steps to a mode (:mod:`pyro_vi_lab.mode_fit`): of the
    density of the constrained sites as Pyro's ``AutoDelta``, of the likelihood, and of the density on the
    unconstrained scale. The first two give a point (:meth:`Fit.point`), the last a full-rank normal. ``CONVERGED`` then
    means a strict local maximum; one that lies at the edge of a support, or is flat, is said to be none.

    The guide ``"conjugate"`` goes by coordinate ascent with exact expectations
    (:mod:`pyro_vi_lab.coordinate_ascent`), whose bound never falls; ``CONVERGED`` means that a sweep changes nothing
    more. That of a mixture of normals starts at clusters of its rows, of which ``num_restarts`` may ask for several.
    ``"flow"`` starts from a fit of the full-rank normal (of the mean-field one for more than 512 dimensions),
    in whose coordinates it goes by stochastic gradients.

    ``"auto"`` climbs: from the mean-field normal to what :func:`pyro_vi_lab.trust` suggests (correlations, heavy tails,
    several modes, hierarchical sites written non-centered), until a verdict is ``"trust"``, and else to NUTS, started
    from the best fit. ``Fit.path`` tells the way, ``Fit.problem`` is the one that was fitted in the end, in which sites
    that were rewritten are deterministic, and :meth:`Fit.posterior` has all sites.

    Any other Pyro guide, and any guide of a problem with minibatches, goes by stochastic gradients of the captured
    objective (:mod:`pyro_vi_lab.program_engine`), and is trained in place with its parameters in Pyro's param store, as
    :class:`pyro.infer.SVI` does. ``CONVERGED`` then means that the loss no longer falls by more than its noise.

    The same seed gives the same numbers.

    Args:
        problem: Model and data.
        guide: A name of ``GUIDES``, ``"auto"``, a guide class of ours or of ``pyro.infer.autoguide``, an instance (of
            ours: its present location and scale are the start), or any Pyro guide.
        optim: Of guides over a family a name: ``"natural_gradient"`` (the default); ``"fixed_draws"``, Newton's method
            on the bound over fixed draws, for ``"mean_field"`` and ``"full_rank"``, which also gives
            :meth:`Fit.linear_response` and :meth:`Fit.monte_carlo_error` (:mod:`pyro_vi_lab.fixed_draws`);
            ``"batch_and_match"``, for ``"full_rank"``, whose optimum is that of a divergence between scores and not
            of the bound (:mod:`pyro_vi_lab.batch_and_match`). Of the second kind of fit an optimizer, used as it is;
            by default Adam, and the natural gradient for guides over a family without local sites (in its online Newton
            form for :class:`~pyro_vi_lab.guides.NetworkNormal`), with step sizes that fall when the loss stands still.
        objective: Objective of the second kind of fit; by default ``Trace_ELBO``, ``TraceEnum_ELBO`` where the model
            has discrete sites, and :class:`~pyro_vi_lab.ELBO` for guides over a family.
        lr: Largest natural-gradient step size, in (0, 1], by default 1, a full Newton-like step; of the second kind of
            fit the first step size, by default 0.01 for Adam and 0.1 for the natural gradient.
        max_kl: First radius of the trust region in KL(new ‖ old), in nats; by default 8.
        num_particles: Particles per step at the start (rounded up to even); it grows with the noise. Chosen from D
        if ``None``.
        num_restarts: Fits in one batch: the first from the guide's start, the others jittered uniformly by ±2.
        seed: Seed of all randomness.
        max_steps: Most steps; by default 500, 200 of a mode and of fixed draws, 2000 of batch and match, and 50,000 of
            the second kind of fit.
        progress: Show a progress line on a terminal or in a notebook when the work takes long.
        compile: Whether graphs are compiled. ``True``: all, and of a fit by natural gradients the whole step, kept for
            later fits of the problem; ``False``: none. ``"auto"``: where it pays, which is with many restarts, and in
            the second kind of fit after some time; there the same seed gives the same numbers up to rounding only.
        time_budget: Of ``"auto"`` alone: seconds after which it begins nothing new, by default 120.
        callbacks: Told of every step and of the result; any of them may end the fit (:class:`~pyro_vi_lab.Callback`).

    Raises:
        ArgumentError: An unknown guide name, something that is no guide, an argument that this kind of fit does not
            take, or a number out of range.
        ModelError: The log density cannot be evaluated.

    References:
        Khan & Rue 2023, "The Bayesian learning rule", JMLR 24, Section 4.

    Example:
        >>> import pyro, pyro.distributions as dist, torch
        >>> def model(y):
        ...     mean = pyro.sample("mean", dist.Normal(0.0, 10.0))
        ...     with pyro.plate("row", len(y)):
        ...         pyro.sample("y", dist.Normal(mean, 1.0), obs=y)
        >>> result = fit(Problem(model, torch.tensor([1.0, 2.0, 3.0])), progress=False)
        >>> result.status, round(result.posterior().mean()["mean"].item(), 1)
        (<Status.CONVERGED: 'converged'>, 2.0)
    """
    if not isinstance(problem, Problem):
        raise ArgumentError(
            f"problem must be a pyro_vi_lab.Problem, got {type(problem).__name__}; wrap it: Problem(model, *args)"
        )
    if time_budget is not None and not 0 < time_budget < math.inf:
        raise ArgumentError(f"time_budget is in seconds and must be positive, got {time_budget!r}")
    _check_numbers(lr=lr, max_kl=max_kl, num_particles=num_particles, num_restarts=num_restarts, max_steps=max_steps)
    check_compile(compile)
    if isinstance(optim, str):
        if optim not in OPTIMS:
            raise unknown_name("optim", optim, OPTIMS)
        if not is_over_family(guide) or (problem.subsamples and optim != "natural_gradient"):
            raise ArgumentError(
                f"optim={optim!r} is for guides over a family and problems that see all rows at once; give a Pyro "
                "optimizer, or none"
            )
    told = checked(callbacks)
    if guide == AUTO:
        given = {"optim": optim, "objective": objective, "lr": lr, "max_kl": max_kl, "num_particles": num_particles}
        _refuse(guide, "chooses its own way", max_steps=max_steps, callbacks=callbacks or None, **given)
        if problem.subsamples:
            raise ArgumentError("'auto' needs a problem that sees all rows at once: leave minibatch out")
        return climb(problem, fit, time_budget=time_budget or TIME_BUDGET, seed=seed, progress=progress)
    if time_budget is not None:
        raise ArgumentError(f"time_budget is for 'auto'; the guide {name_of(guide)!r} stops by itself or at max_steps")
    with fit_progress(progress, f"{name_of(guide)} fit of {problem.name}") as line:
        watch = Watch((*told, *line))
        result = _fitted(
            problem,
            guide,
            watch,
            optim=optim,
            objective=objective,
            lr=lr,
            max_kl=max_kl,
            num_particles=num_particles,
            num_restarts=num_restarts,
            seed=seed,
            max_steps=max_steps,
            compile=compile,
        )
    return watch.ended(result)


def _fitted(
    problem: Problem,
    guide: Any,
    watch: Watch,
    *,
    optim: PyroOptim | str | None,
    objective: ELBO | None,
    lr: float | None,
    max_kl: float | None,
    num_particles: int | None,
    num_restarts: int,
    seed: int,
    max_steps: int | None,
    compile: Compile,
) -> Fit:
    """The way that suits problem and guide."""
    compiled = compile if compile is True else None
    if is_a(guide, PointGuide) and not problem.subsamples:
        given = {"optim": optim, "objective": objective, "lr": lr, "max_kl": max_kl, "num_particles": num_particles}
        _refuse(guide, "is fitted by Newton steps of the log density", compile=compiled, **given)
        return fit_mode(
            problem, guide, num_restarts=num_restarts, seed=seed, max_steps=max_steps or MODE_STEPS, watch=watch
        )
    own = None if isinstance(guide, Conjugate) else CONJUGATE.get(type(problem.model))
    by_batch = bool(problem.subsamples)
    if is_a(guide, Conjugate) and optim is None and objective is None and (own or not by_batch):
        given = {"num_particles": num_particles, "max_kl": max_kl, "compile": compiled}
        _refuse(guide, "is fitted by coordinate ascent with exact expectations", **given)
        fit_exactly = own[by_batch] if own else fit_conjugate
        return fit_exactly(
            problem, guide, num_restarts=num_restarts, seed=seed, max_steps=max_steps, lr=lr, watch=watch
        )
    if not is_over_family(guide) or problem.subsamples:
        _refuse(guide, "is fitted by stochastic gradients", max_kl=max_kl)
        # the mode of what is seen batch by batch: by stochastic gradients, like all else of that kind
        fit_one = fit_mode_of_batches if is_a(guide, PointGuide) else fit_program
        if is_a(guide, Flow) and not problem.subsamples:
            fit_one = fit_flow
        optim = None if isinstance(optim, str) else optim
        return fit_one(
            problem,
            guide,
            optim=optim,
            objective=objective,
            lr=lr,
            num_particles=num_particles,
            num_restarts=num_restarts,
            seed=seed,
            max_steps=max_steps or PROGRAM_STEPS,
            watch=watch,
            compile=compile,
        )
    if isinstance(optim, str) and optim != "natural_gradient":
        given = {"objective": objective, "lr": lr, "max_kl": max_kl, "compile": compiled}
        _refuse(guide, f"is fitted with optim={optim!r}", **given)
        return OTHERS[optim](
            problem,
            guide,
            num_particles=num_particles,
            num_restarts=num_restarts,
            seed=seed,
            max_steps=max_steps or OTHER_STEPS[optim],
            watch=watch,
        )
    given = {"optim": None if isinstance(optim, str) else optim, "objective": objective}
    _refuse(guide, "is fitted by natural gradients of the log density", **given)
    return fit_density(
        problem,
        guide,
        lr=lr or 1.0,
        max_kl=max_kl or MAX_KL,
        num_particles=num_particles,
        num_restarts=num_restarts,
        seed=seed,
        max_steps=max_steps or DENSITY_STEPS,
        watch=watch,
        compile=compile,
    )


def _refuse(guide: Any, how: str, **given: Any) -> None:
    for name, value in given.items():
        if value is not None:
            raise ArgumentError(f"the guide {guide!r} {how}, for which {name} has no meaning: leave it out")


def _check_numbers(
    *, lr: float | None, max_kl: float | None, num_particles: int | None, num_restarts: int, max_steps: int | None
) -> None:
    if lr is not None and not 0 < lr <= 1:
        raise ArgumentError(f"lr is a step size in (0, 1], got {lr!r}")
    if max_kl is not None and not 0 < max_kl < math.inf:
        raise ArgumentError(f"max_kl is a KL divergence in nats and must be positive, got {max_kl!r}")
    if num_particles is not None and num_particles < 1:
        raise ArgumentError(f"num_particles must be at least 1, got {num_particles!r}")
    for name, value in (("num_restarts", num_restarts), ("max_steps", max_steps)):
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ArgumentError(f"{name} must be a positive whole number, got {value!r}")
