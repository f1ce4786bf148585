"""What a fit is judged by: its draws, their weights, chains that start at them, and maxima elsewhere."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyro_vi_lab import arviz_bridge
from pyro_vi_lab.checks import Ensemble, OtherModes, other_modes, run_ensemble
from pyro_vi_lab.checks.moments import Moments
from pyro_vi_lab.density import LogDensity
from pyro_vi_lab.errors import ArgumentError, DataError, ModelError
from pyro_vi_lab.families import MAX_DENSE, Family, Params
from pyro_vi_lab.fitted import Fit, draw
from pyro_vi_lab.guides import FamilyGuide
from pyro_vi_lab.posterior import Posterior, element_name
from pyro_vi_lab.program_draws import program_draws

Quantities = Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]] | Sequence[str] | None

CALLS = 150
"""About as many evaluations of all chains at once as a fast run of them takes."""
MAX_DRAW_NUMBERS = 2**26
"""Numbers that the draws of the guide may hold (512 MiB in float64)."""
MIN_CHAINS = 24
BATCHES = 40
"""Batches of a reference's draws, each long beside their autocorrelation."""
FAR = (3.0, 30.0)
"""How far starts lie from the guide, in its standard deviations."""
FAR_RADIUS = 10.0
"""Standard deviation of starts on the unconstrained scale where the prior is flat."""
START_RADIUS = 2.0
"""Half-width of the uniform starts of the search for other maxima, as Stan's initial values."""


@dataclass(frozen=True)
class Budget:
    """How much work the checks may do.

    Args:
        numbers: Numbers in intermediate results of all evaluations of the chains: what a large data set costs.
        chains: Most chains.
        adapt: Iterations of each round in which the chains adapt.
        num_draws: Draws of each chain, at first.
        doublings: How often the chains go on, each time for as long as before, while they are undecided.
        importance: Most draws for importance weights.
        starts: Starts of the search for other maxima.
        compile: Whether the gradient of the chains is to be machine code.
    """

    numbers: float
    chains: int
    adapt: tuple[int, ...]
    num_draws: int
    doublings: int
    importance: int
    starts: int
    compile: bool = False


BUDGETS: Mapping[str, Budget] = {
    "fast": Budget(2.5e8, 64, (6, 6, 8), 30, 2, 10_000, 24),
    "thorough": Budget(1e9, 128, (10, 10, 10), 60, 2, 20_000, 63, compile=True),
}


@dataclass(frozen=True, eq=False)
class GuideDraws:
    """Independent draws of a guide with both log densities.

    Args:
        values: Draws of every site, ``(S, *site shape)``.
        z: The same on the unconstrained scale, ``(S, D)``; ``None`` where there is no density of all rows.
        log_p: Log density of the model, ``(S,)``; ``None`` where it is not known draw by draw.
        log_q: Log density of the guide, ``(S,)``.
    """

    values: Mapping[str, Tensor]
    z: Tensor | None
    log_p: Tensor | None
    log_q: Tensor | None


def guide_draws(fit: Fit, density: LogDensity | None, num_draws: int, seed: int) -> GuideDraws:
    """Draws of the best restart."""
    found = member(fit)
    if found is not None and density is not None and found[1].loc.shape[-1] == density.dim:
        family, params = found
        z, log_p, log_q = draw(density, family, Params(*(value[None] for value in params)), num_draws, seed)
        return GuideDraws(density.constrain(z[:, 0]), z[:, 0], log_p[:, 0], log_q[:, 0])
    drawn = program_draws(fit.problem, fit.guide, num_draws, seed, weigh=True)
    unconstrained = None
    if density is not None:
        unconstrained = density.unconstrain({name: drawn.values[name] for name in density.sites})
    return GuideDraws(drawn.values, unconstrained, drawn.stats.get("log_p"), drawn.stats.get("log_q"))


def member(fit: Fit) -> tuple[Family, Params] | None:
    """The family and the member of it that a guide is, also of one that was trained in place; else ``None``."""
    if fit.params is not None:
        return fit.family, Params(*(value[0] for value in fit.params))
    if isinstance(fit.guide, FamilyGuide) and fit.guide.has_params:
        return fit.guide.family, fit.guide.params
    return None


def num_importance_draws(density: LogDensity | None, budget: Budget) -> int:
    """As many draws as the budget allows for a density of this size."""
    if density is None:
        return min(budget.importance, 2_000)
    affordable = min(budget.numbers / density.work, MAX_DRAW_NUMBERS / density.dim)
    return int(min(budget.importance, max(1_000, affordable)))


def chains_from(density: LogDensity, draws: GuideDraws, budget: Budget, seed: int) -> Ensemble:
    """Chains that start at the first draws of the guide inside the support."""
    assert draws.z is not None
    number = int(min(budget.chains, max(MIN_CHAINS, budget.numbers / (CALLS * density.work))))
    z = draws.z if draws.log_p is None else draws.z[torch.isfinite(draws.log_p)]
    if len(z) < MIN_CHAINS:
        raise DataError(
            f"only {len(z)} of {len(draws.z)} draws of the guide lie where the model's density is positive, and the "
            f"chains need {MIN_CHAINS} starts: a mismatch of support"
        )
    return run_ensemble(
        density.value_and_grad, z[:number], root_of(z), adapt=budget.adapt, num_draws=budget.num_draws, seed=seed
    )


def maxima_elsewhere(fit: Fit, density: LogDensity, draws: GuideDraws, budget: Budget, seed: int) -> OtherModes | None:
    """Maxima that the guide does not cover; ``None`` where D is too large for second derivatives."""
    assert draws.z is not None
    if density.dim > MAX_DENSE:
        return None
    z = draws.z[:1000]
    root = root_of(draws.z)
    found = member(fit)
    if found is not None:
        family, params = found

        def log_q(at: Tensor) -> Tensor:
            return family.log_prob(params, at)
    else:
        center = z.mean(0)

        def log_q(at: Tensor) -> Tensor:
            white = torch.linalg.solve_triangular(root, (at - center).T, upper=False)
            return -0.5 * white.square().sum(0)

    starts = _scattered(fit, density, z, root, budget.starts, seed)
    return other_modes(
        density.value_and_grad,
        density.hessian,
        log_q,
        starts=starts,
        draws=z,
        root=root,
    )


def _scattered(fit: Fit, density: LogDensity, z: Tensor, root: Tensor, number: int, seed: int) -> Tensor:
    """Starts for the search: near the origin, far from the guide in its own units, and draws of the prior."""
    generator = torch.Generator().manual_seed(seed)
    third, dim = number // 3, density.dim

    def normal(rows: int) -> Tensor:
        return torch.randn(rows, dim, generator=generator, dtype=z.dtype).to(z.device)

    near = START_RADIUS * (2 * torch.rand(third, dim, generator=generator, dtype=z.dtype).to(z.device) - 1)
    low, high = (math.log(one) for one in FAR)
    radius = (low + (high - low) * torch.rand(third, 1, generator=generator, dtype=z.dtype)).exp().to(z.device)
    u = radius * normal(third)
    far = z.mean(0) + (u * root if root.dim() == 1 else u @ root.T)
    try:
        drawn = fit.problem.prior(num_draws=third, seed=seed)
        prior = density.unconstrain({name: value[0] for name, value in drawn.draws.items()})
    except ModelError:  # a flat prior has no draws: starts from far away in its place
        prior = FAR_RADIUS * normal(third)
    starts = torch.cat([near, far, prior.to(z)])
    return starts[torch.isfinite(starts).all(-1)]


def root_of(z: Tensor) -> Tensor:
    """A factor of the covariance of draws: a triangle, or standard deviations where D is large."""
    if z.shape[-1] > MAX_DENSE or len(z) < 2 * z.shape[-1]:
        return z.std(0).clamp_min(1e-300)
    covariance = torch.cov(z.T).reshape(z.shape[-1], z.shape[-1])
    factor, info = torch.linalg.cholesky_ex(covariance)
    return factor if int(info) == 0 else z.std(0).clamp_min(1e-300)


def scalars(values: Mapping[str, Tensor], quantities: Quantities) -> tuple[list[str], Tensor]:
    """Names of all scalars, and their draws ``(S, P)`` in float64.

    Raises:
        ArgumentError: ``quantities`` names a site that is not there, or gives something else than tensors by draw.
    """
    chosen: Mapping[str, Any] = values
    number = len(next(iter(values.values())))
    if callable(quantities):
        chosen = quantities(values)
        if not isinstance(chosen, Mapping) or not chosen:
            raise ArgumentError(f"quantities must return a dict of names to tensors, got {type(chosen).__name__}")
        for name, value in chosen.items():
            if not isinstance(value, Tensor) or value.shape[:1] != (number,):
                shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
                raise ArgumentError(f"quantity {name!r} must be a tensor with one entry per draw, got {shape}")
    elif quantities is not None:
        missing = [name for name in quantities if name not in values]
        if missing:
            raise ArgumentError(f"quantities name {missing[0]!r}, which is no site; sites are {', '.join(values)}")
        chosen = {name: values[name] for name in quantities}
    names = [
        element_name(name, tuple(map(int, index)))
        for name, value in chosen.items()
        for index in np.ndindex(tuple(value.shape[1:]))
    ]
    return names, torch.cat([value.reshape(number, -1).double() for value in chosen.values()], -1)


def reference_moments(
    reference: Posterior, names: Sequence[str], values: Mapping[str, Tensor], quantities: Quantities
) -> tuple[Moments, Tensor]:
    """Moments of the reference and its draws in batches ``(B, N, P)``, by the names of the guide's scalars.

    What the reference has no draws of is not a number.

    Raises:
        DataError: A site has another shape, or there is none in common.
    """
    flat = reference.flat()
    common = {name: value.to(values[name]) for name, value in flat.items() if name in values}
    for name, value in common.items():
        if value.shape[1:] != values[name].shape[1:]:
            raise DataError(
                f"draws of site {name!r} have shape {tuple(value.shape[1:])} in the reference and "
                f"{tuple(values[name].shape[1:])} in the fit"
            )
    if not common:
        raise DataError(f"the reference has no site of the fit: it has {', '.join(flat)}; the fit {', '.join(values)}")
    chosen = quantities
    if quantities is not None and not callable(quantities):
        chosen = [name for name in quantities if name in common]
    found, x = scalars(common, chosen)
    chains = x.unflatten(0, (reference.num_chains, reference.num_draws)).numpy(force=True)
    mean, sd = x.mean(0), x.std(0)
    white = (chains - mean.numpy()) / sd.clamp_min(1e-300).numpy()
    errors = torch.as_tensor(arviz_bridge.mcse(chains)), torch.as_tensor(arviz_bridge.mcse((white**2 - 1) / 2))
    place = {name: i for i, name in enumerate(found)}
    index = torch.tensor([place.get(name, len(found)) for name in names])

    def placed(value: Tensor) -> Tensor:
        return torch.cat([value, value.new_full((*value.shape[:-1], 1), torch.nan)], -1)[..., index]

    # the standard errors of coverage come from how batches of draws differ
    length = max(1, len(x) // BATCHES)
    batches = x[: length * (len(x) // length)].unflatten(0, (-1, length))
    return Moments(placed(mean), placed(sd), placed(errors[0]), placed(errors[1])), placed(batches)


def largest_correlation(z: Tensor, labels: Sequence[str], covariance: Tensor | None) -> tuple[str, str, float] | None:
    """The two coordinates whose correlation in draws ``(S, D)`` differs most from the guide's."""
    if z.shape[-1] < 2 or z.shape[-1] > MAX_DENSE:
        return None
    true = torch.corrcoef(z.T)
    own = torch.eye(len(true), dtype=true.dtype)
    if covariance is not None:
        sd = covariance.diagonal().sqrt()
        own = covariance / (sd * sd[:, None])
    gap = (true - own).abs().fill_diagonal_(0)
    i, j = divmod(int(gap.argmax()), len(gap))
    value = float(true[i, j])
    return (labels[i], labels[j], value) if math.isfinite(value) else None
