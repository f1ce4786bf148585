"""Fit a guide to a problem by natural gradient until it has converged."""

from __future__ import annotations

import hashlib
import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pyro import poutine
from torch import Tensor

from pyro_vi_lab.checks import ImportanceCheck, importance
from pyro_vi_lab.density import LogDensity
from pyro_vi_lab.density_engine import Record, Status, ascend, tolerance
from pyro_vi_lab.errors import ArgumentError, FitError, unknown_name
from pyro_vi_lab.families import Family, Params
from pyro_vi_lab.guides import GUIDES, FamilyGuide
from pyro_vi_lab.isolation import model_run, seeded, threads
from pyro_vi_lab.posterior import Posterior
from pyro_vi_lab.problem import Problem

RESTART_RADIUS = 2.0
"""Half-width of the uniform jitter of the restarts' locations, as Stan's initial values."""
PARALLEL_WORK = 2**22
"""Numbers per evaluation from which a second intra-op thread pays."""


@dataclass(frozen=True, eq=False)
class Fit:
    """The result of :func:`fit`; of several restarts, ``guide``, ``status`` and ``elbo`` are those of the best.

    Args:
        problem: What was fitted.
        method: Name of the guide.
        params: Location and scale of every restart, best first, ``(R, ...)``.
        statuses: How each restart ended.
        message: What the status means here and what to do.
        num_steps: Steps taken, rejected ones included.
        num_gradients: Gradients of the log density, over particles and restarts.
        seconds: Wall-clock time, capturing the model included.
        seed: Seed of the run.
        history: One row per evaluation and, where there are restarts, one column per restart: ``negative_elbo``,
        ``gap`` (estimated nats
            below the optimum), ``step_size``, ``kl`` of the step, and ``num_particles``, ``seconds`` per row.
    """

    problem: Problem
    method: str
    guide: FamilyGuide
    params: Params
    statuses: tuple[Status, ...]
    message: str
    num_steps: int
    num_gradients: int
    seconds: float
    seed: int
    history: dict[str, NDArray[Any]] = field(repr=False)

    @property
    def status(self) -> Status:
        """How the best restart ended."""
        return self.statuses[0]

    @property
    def num_restarts(self) -> int:
        """Number of restarts, R."""
        return len(self.statuses)

    @property
    def family(self) -> Family:
        """The family of the guide."""
        return self.guide.family

    @property
    def loc(self) -> Tensor:
        """Mean on the unconstrained scale of the best restart, ``(D,)``."""
        return self.params.loc[0]

    def covariance(self) -> Tensor:
        """Covariance on the unconstrained scale of the best restart, ``(D, D)``."""
        return self.family.scale.covariance(self.params.scale[0])

    def elbo(self, num_draws: int = 1000, seed: int = 0) -> tuple[float, float]:
        """ELBO in nats and its Monte Carlo standard error, from fresh draws of the best restart.

        Raises:
            ArgumentError: Fewer than two draws.
        """
        if num_draws < 2:
            raise ArgumentError(f"num_draws must be at least 2 for a standard error, got {num_draws}")
        density = self.problem.density()
        params = Params(*(value[:1] for value in self.params))
        _, log_p, log_q = _draw(density, self.family, params, num_draws, seed)
        values = (log_p - log_q)[:, 0]
        return float(values.mean()), float(values.std() / math.sqrt(num_draws))

    def importance(self, num_draws: int = 10_000, seed: int = 0) -> ImportanceCheck:
        """Pareto k-hat and importance sampling effective sample size of the best restart, from fresh draws.

        Args:
            num_draws: Draws; the standard error of k-hat falls with their fourth root.
            seed: Seed of the draws.

        Raises:
            FitError: Every restart diverged.
            DataError: Too few draws, or the density is not finite at some of them.
        """
        if self.status is Status.DIVERGED:
            raise FitError(f"the {self.method} fit of {self.problem.name} has no posterior: {self.message}")
        params = Params(*(value[:1] for value in self.params))
        _, log_p, log_q = _draw(self.problem.density(), self.family, params, num_draws, seed)
        return importance(log_p[:, 0], log_q[:, 0])

    def __repr__(self) -> str:
        return (
            f"Fit({self.method} of {self.problem.name}: {self.status.value} after {self.num_steps} steps, "
            f"{self.num_gradients:,} gradients, {self.seconds:.2g} s)"
        )

    def posterior(self, num_draws: int = 1000, seed: int = 0) -> Posterior:
        """Independent draws of the fitted guide, one chain per restart that did not diverge.

        Raises:
            FitError: Every restart diverged.
        """
        usable = [i for i, status in enumerate(self.statuses) if status is not Status.DIVERGED]
        if not usable:
            raise FitError(f"the {self.method} fit of {self.problem.name} has no posterior: {self.message}")
        if num_draws < 1:
            raise ArgumentError(f"num_draws must be positive, got {num_draws}")
        density = self.problem.density()
        params = Params(*(value[usable] for value in self.params))
        z, log_p, log_q = _draw(density, self.family, params, num_draws, seed)
        z = z.transpose(0, 1)
        return Posterior(
            draws=density.constrain(z),
            stats={"log_p": log_p.T, "log_q": log_q.T},
            method=self.method,
            unconstrained=z,
            info={
                "status": self.status.value,
                "seconds": self.seconds,
                "num_steps": self.num_steps,
                "num_gradients": self.num_gradients,
                "seed": self.seed,
                "draws_seed": seed,
            },
        )

    def plot(self) -> Any:
        """Axes with the negative ELBO against the steps."""
        from matplotlib import pyplot

        _, axes = pyplot.subplots()
        values = self.history["negative_elbo"].reshape(len(self.history["seconds"]), -1)
        # far starts are millions of nats above the optimum; near it the estimates of the bound scatter around zero
        last = values[-1].min() if self.status is Status.DIVERGED else -self.elbo()[0]
        axes.plot(values - last)
        axes.set_yscale("symlog", linthresh=0.1)
        axes.set(xlabel="step", ylabel="negative ELBO above that of the fit (nats)", title=self.problem.name)
        return axes


def fit(
    problem: Problem,
    guide: str | type[FamilyGuide] | FamilyGuide = "full_rank",
    *,
    lr: float = 1.0,
    max_kl: float = 8.0,
    num_particles: int | None = None,
    num_restarts: int = 1,
    seed: int = 0,
    max_steps: int = 500,
    progress: bool = True,
) -> Fit:
    r"""Fit a guide by natural gradient ascent of the ELBO; stops by itself.

    When the status is ``CONVERGED``, the natural gradient promises less than ``min(0.01, 5e-4·D)`` nats more of the
    bound: the guide is near a (local) optimum of its family. The same seed gives the same numbers. The algorithm is
    that of :mod:`pyro_vi_lab.density_engine`.

    Args:
        problem: Model and data.
        guide: A name of ``GUIDES``, a guide class, or an instance, whose present location and scale are the start.
        lr: Largest natural-gradient step size, in (0, 1]; 1 is a full Newton-like step.
        max_kl: First radius of the trust region in KL(new ‖ old), in nats.
        num_particles: Particles per step at the start (rounded up to even); it grows with the noise. Chosen from D
        if ``None``.
        num_restarts: Fits in one batch: the first from the guide's start, the others jittered uniformly by ±2.
        seed: Seed of all randomness.
        max_steps: Most steps.
        progress: Show a progress line on a terminal when the work takes long.

    Raises:
        ArgumentError: An unknown guide name, a guide of another kind, or a number out of range.
        ModelError: The log density cannot be evaluated.

    References:
        Khan & Rue 2023, "The Bayesian learning rule", JMLR 24, Section 4.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> def model(y):
        ...     mean = pyro.sample("mean", dist.Normal(0.0, 10.0))
        ...     with pyro.plate("row", len(y)):
        ...         pyro.sample("y", dist.Normal(mean, 1.0), obs=y)
        >>> result = fit(Problem(model, torch.tensor([1.0, 2.0, 3.0])), progress=False)
        >>> result.status, round(result.posterior().mean()["mean"].item(), 1)
        (<Status.CONVERGED: 'converged'>, 2.0)
    """
    _check_numbers(lr=lr, max_kl=max_kl, num_particles=num_particles, num_restarts=num_restarts, max_steps=max_steps)
    if not isinstance(problem, Problem):
        raise ArgumentError(
            f"problem must be a pyro_vi_lab.Problem, got {type(problem).__name__}; wrap it: Problem(model, *args)"
        )
    began = time.perf_counter()
    density = problem.density()
    name, made = _prepared(problem, guide, seed)
    with seeded(None):
        generator = torch.Generator(device="cpu").manual_seed(seed)
    start = _start(made, num_restarts, generator, density)
    with (
        threads(_num_threads(density)),
        _progress(progress, f"{name} fit of {problem.name}", max_steps) as on_step,
    ):
        result = ascend(
            density,
            made.family,
            start,
            lr=lr,
            max_kl=max_kl,
            num_particles=num_particles,
            max_steps=max_steps,
            generator=generator,
            on_step=on_step,
        )
    order = _best_first(density, made.family, result.params, result.status, seed)
    params = Params(*(value[order] for value in result.params))
    statuses = tuple(result.status[i] for i in order)
    if statuses[0] is not Status.DIVERGED:
        made.params = Params(*(value[0] for value in params))
    if made is not guide:
        _name_by_content(made)
    return Fit(
        problem=problem,
        method=name,
        guide=made,
        params=params,
        statuses=statuses,
        message=_message(statuses, density, made.family, params, float(result.gap[order[0]]), max_steps),
        num_steps=len(result.records) - 1,
        num_gradients=result.num_gradients,
        seconds=time.perf_counter() - began,
        seed=seed,
        history=_history(result.records, order),
    )


def _check_numbers(*, lr: float, max_kl: float, num_particles: int | None, num_restarts: int, max_steps: int) -> None:
    if not 0 < lr <= 1:
        raise ArgumentError(f"lr is a step size in (0, 1], got {lr!r}")
    if not 0 < max_kl < math.inf:
        raise ArgumentError(f"max_kl is a KL divergence in nats and must be positive, got {max_kl!r}")
    if num_particles is not None and num_particles < 4:
        raise ArgumentError(f"num_particles must be at least 4, got {num_particles!r}")
    for name, value in (("num_restarts", num_restarts), ("max_steps", max_steps)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ArgumentError(f"{name} must be a positive whole number, got {value!r}")


def _prepared(problem: Problem, guide: Any, seed: int) -> tuple[str, FamilyGuide]:
    """The guide's name and an instance with parameters."""
    if isinstance(guide, str):
        if guide not in GUIDES:
            raise unknown_name("guide", guide, GUIDES)
        guide = GUIDES[guide]
    if isinstance(guide, type) and issubclass(guide, FamilyGuide):
        discrete = [site.name for site in problem.sites.values() if site.kind == "discrete"]
        guide = guide(poutine.block(problem.model, hide=discrete) if discrete else problem.model)
    if not isinstance(guide, FamilyGuide):
        kind = guide.__name__ if isinstance(guide, type) else type(guide).__name__
        raise ArgumentError(
            f"fit takes guides over a family ({', '.join(GUIDES)}, or an instance of "
            f"{', '.join(g.__name__ for g in GUIDES.values())}), "
            f"got {kind}; fit it with pyro.infer.SVI, where NaturalGradient works for Pyro's normal autoguides too"
        )
    guide = guide.twin()  # the user's guide is where the fit starts, and stays as it is
    name = next((key for key, kind in GUIDES.items() if type(guide) is kind), type(guide).__name__)
    if guide.prototype_trace is None:
        with model_run(seed=seed, dtype=problem.dtype, validate=False):
            guide._setup_prototype(*problem.args, **problem.kwargs)
    expected = problem.density().dim
    if guide.latent_dim != expected:
        raise ArgumentError(
            f"the guide has {guide.latent_dim} latent dimensions, problem {problem.name} has {expected}"
        )
    return name, guide


def _name_by_content(guide: FamilyGuide) -> None:
    """Give a guide a name of its own in Pyro's param store.

    The store goes by names: under the name of its class the guide would, when it is run, take over the scale of
    whatever
    guide of that class is in the store already.
    """
    digest = hashlib.blake2b(digest_size=4)
    for value in guide.params:
        digest.update(value.numpy(force=True).tobytes())
    guide._pyro_name = f"{type(guide).__name__}_{digest.hexdigest()}"


def _start(guide: FamilyGuide, num_restarts: int, generator: torch.Generator, density: LogDensity) -> Params:
    params = Params(*(value.to(density.device, density.dtype).unsqueeze(0) for value in guide.params))
    loc = params.loc.repeat(num_restarts, 1)
    jitter = (torch.rand(loc[1:].shape, generator=generator, dtype=loc.dtype) * 2 - 1) * RESTART_RADIUS
    loc[1:] += jitter.to(loc.device)
    return Params(loc, params.scale.repeat(num_restarts, *(1 for _ in params.scale.shape[1:])))


def _num_threads(density: LogDensity) -> int:
    present = torch.get_num_threads()
    return present if density.work * 64 >= PARALLEL_WORK else 1


def _draw(
    density: LogDensity, family: Family, params: Params, num_draws: int, seed: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Independent draws ``(S, R, D)`` with their log densities under target and guide, ``(S, R)``."""
    generator = torch.Generator().manual_seed(seed)
    num_fits, dim = params.loc.shape
    eps = family.noise.sample((num_draws, num_fits, dim), generator=generator, dtype=density.dtype).to(density.device)
    z = family.sample(params, eps)
    return z, density.log_prob(z), family.log_prob(params, z)


def _best_first(density: LogDensity, family: Family, params: Params, status: list[Status], seed: int) -> list[int]:
    """Restarts by status, then by ELBO from draws that all of them share."""
    if len(status) == 1:
        return [0]
    rank = [Status.CONVERGED, Status.OUT_OF_STEPS, Status.DIVERGED]
    _, log_p, log_q = _draw(density, family, params, 1000, seed)
    elbo = torch.nan_to_num((log_p - log_q).mean(0), nan=-math.inf).tolist()
    return sorted(range(len(status)), key=lambda i: (rank.index(status[i]), -elbo[i]))


def _message(
    statuses: tuple[Status, ...],
    density: LogDensity,
    family: Family,
    params: Params,
    gap: float,
    max_steps: int,
) -> str:
    others = sum(status is not Status.CONVERGED for status in statuses)
    suffix = f"; {others} of {len(statuses)} restarts did not converge" if others and len(statuses) > 1 else ""
    if statuses[0] is Status.CONVERGED:
        return f"converged: the natural gradient promises less than {tolerance(density.dim):.2g} nats more{suffix}"
    loc, sd = params.loc[0], family.scale.variance(params.scale[0]).sqrt()
    size = sd.maximum(loc.abs())
    worst = int(size.argmax())
    farthest = (
        f"{density.labels[worst]} went to {float(loc[worst]):.3g} with standard deviation {float(sd[worst]):.3g} on "
        "the "
        "unconstrained scale"
    )
    if statuses[0] is Status.OUT_OF_STEPS:
        return (
            f"stopped after max_steps={max_steps} with about {gap:.2g} nats still to gain: raise max_steps, or start "
            f"nearer with the guide's init_loc_fn; {farthest}: if it goes on and on, give this site a proper "
            f"prior{suffix}"
        )
    if not bool(torch.isfinite(density.log_prob(loc))):
        return (
            f"diverged: the log density of site {density.blame(loc)!r} is not finite at the guide's location; check "
            f"its data and prior{suffix}"
        )
    if float(size[worst]) > 1e8:
        return f"diverged: {farthest}; the posterior seems to be improper: give this site a proper prior{suffix}"
    z, log_p, _ = _draw(density, family, Params(*(value[:1] for value in params)), 1000, seed=0)
    outside = z[~torch.isfinite(log_p)]
    if len(outside):
        return (
            f"diverged: the log density of site {density.blame(outside[0])!r} is not finite at {len(outside)} of 1000 "
            "draws of the guide: give the sites that it depends on a support where it is (a positive scale, a "
            f"probability){suffix}"
        )
    return (
        "diverged: no step, however small, kept the bound finite; start nearer with the guide's init_loc_fn, or "
        f"reparameterize the sites with large gradients; {farthest}{suffix}"
    )


def _history(records: list[Record], order: list[int]) -> dict[str, NDArray[Any]]:
    columns = {
        name: torch.stack([getattr(record, name) for record in records])[:, order].numpy(force=True)
        for name in ("negative_elbo", "gap", "step_size", "kl")
    }
    if len(order) == 1:
        columns = {name: values[:, 0] for name, values in columns.items()}
    columns["num_particles"] = np.array([record.num_particles for record in records])
    columns["seconds"] = np.array([record.seconds for record in records])
    return columns


@contextmanager
def _progress(show: bool, title: str, max_steps: int) -> Iterator[Callable[[int, Record], None]]:
    """A line on a terminal that begins only when the work has taken a second."""
    if not (show and sys.stderr.isatty()):
        yield lambda step, record: None
        return
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    bar = Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        TimeElapsedColumn(),
        console=Console(stderr=True),
        transient=True,
    )
    task = bar.add_task(title, total=max_steps)
    began = time.perf_counter()

    def on_step(step: int, record: Record) -> None:
        if not bar.live.is_started and time.perf_counter() - began > 1:
            bar.start()
        best = float(record.negative_elbo.min())
        bar.update(
            task,
            description=f"{title}: step {step}, negative ELBO {best:.2f}, {record.num_particles} particles",
        )

    try:
        yield on_step
    finally:
        bar.stop()
