"""NUTS on the captured density: the reference that fits are compared with."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pyro_vi_lab.density import LogDensity
from pyro_vi_lab.errors import ArgumentError, ModelError, unknown_name
from pyro_vi_lab.families import Params
from pyro_vi_lab.fit import Fit
from pyro_vi_lab.isolation import default_dtype, seeded, threads
from pyro_vi_lab.posterior import Posterior
from pyro_vi_lab.problem import Problem

Backend = Literal["nutpie", "pyro"]

TARGET_ACCEPT = 0.9
"""Acceptance rate for a reference: above the usual 0.8, which leaves a few divergences even in eight schools."""
START_RADIUS = 2.0
"""Half-width of the uniform start on the unconstrained scale, as Stan's."""
START_ATTEMPTS = 100
"""Random starts tried for a chain, as Stan."""


def nuts(
    problem: Problem,
    *,
    num_chains: int = 4,
    num_warmup: int = 1000,
    num_draws: int = 1000,
    seed: int = 0,
    backend: Backend = "nutpie",
    start: Fit | None = None,
    target_accept: float = TARGET_ACCEPT,
    progress: bool = True,
) -> Posterior:
    """Draw from the posterior by the No-U-Turn sampler.

    The result may be unfit as a reference: ask :meth:`Posterior.problems`.

    Args:
        problem: Model and data.
        num_chains: Chains; nutpie runs them on all cores.
        num_warmup: Adaptation steps per chain, not kept.
        num_draws: Draws kept per chain.
        seed: Seed of all randomness; the same seed gives the same draws.
        backend: ``"nutpie"`` (Rust) or ``"pyro"`` (Pyro's own kernel), both on the captured density.
        start: A fit from whose guide the chains start; uniformly from (-2, 2) on the unconstrained scale if ``None``.
        target_accept: Acceptance rate that the step size adapts to; nearer to 1 for posteriors with
            divergences. A reference should have none: 0.9 costs about a fifth more gradients than the usual 0.8.
        progress: Show a progress bar on a terminal or in a notebook.

    Raises:
        ArgumentError: A number out of range, an unknown backend, or a fit of another problem.
        ModelError: No finite start was found; the message names the site.

    References:
        Hoffman & Gelman 2014, "The No-U-Turn sampler", JMLR 15.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> def model():
        ...     pyro.sample("x", dist.Normal(3.0, 2.0))
        >>> posterior = nuts(Problem(model), num_chains=2, num_warmup=300, num_draws=500, progress=False)
        >>> posterior.draws["x"].shape
        torch.Size([2, 500])
    """
    for name, value, least in (
        ("num_chains", num_chains, 1),
        ("num_warmup", num_warmup, 1),
        ("num_draws", num_draws, 1),
    ):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ArgumentError(f"{name} must be a whole number of at least {least}, got {value!r}")
    if not 0 < target_accept < 1:
        raise ArgumentError(f"target_accept is a rate between 0 and 1, got {target_accept!r}")
    if backend not in _BACKENDS:
        raise unknown_name("backend", backend, _BACKENDS)
    if not isinstance(problem, Problem):
        raise ArgumentError(
            f"problem must be a pyro_vi_lab.Problem, got {type(problem).__name__}; wrap it: Problem(model, *args)"
        )
    density = problem.density()
    if start is not None and start.loc.shape[-1] != density.dim:
        raise ArgumentError(f"start has {start.loc.shape[-1]} dimensions, problem {problem.name} has {density.dim}")
    began = time.perf_counter()

    def new_start(chain_seed: int) -> Tensor:
        return _start(density, start, chain_seed)

    with threads(1), default_dtype(density.dtype):
        new_start(seed)  # fails here, in the user's words, and not inside a thread of the sampler
        z, stats, num_gradients = _BACKENDS[backend](
            density,
            new_start,
            num_chains,
            num_warmup,
            num_draws,
            seed,
            target_accept,
            progress and _can_show(),
        )
    return Posterior(
        draws=density.constrain(z),
        stats=stats,
        method="nuts",
        unconstrained=z,
        info={
            "seconds": time.perf_counter() - began,
            "num_gradients": num_gradients,
            "seed": seed,
            "backend": backend,
            "num_warmup": num_warmup,
            "target_accept": target_accept,
        },
    )


def _can_show() -> bool:
    return sys.stderr.isatty() or "ipykernel" in sys.modules


def _start(density: LogDensity, fit: Fit | None, seed: int) -> Tensor:
    """A point ``(D,)`` with a finite density and gradient."""
    generator = torch.Generator().manual_seed(seed % 2**63)
    for _ in range(START_ATTEMPTS):
        if fit is None:
            point = (torch.rand(density.dim, generator=generator, dtype=density.dtype) * 2 - 1) * START_RADIUS
        else:
            eps = fit.family.noise.sample((density.dim,), generator=generator, dtype=density.dtype)
            point = fit.family.sample(Params(fit.params.loc[0], fit.params.scale[0]), eps)
        value, grad = density.value_and_grad(point)
        if bool(torch.isfinite(value) & torch.isfinite(grad).all()):
            return point
    site = density.blame(point) or next(iter(density.sites))
    raise ModelError(
        f"NUTS found no start with a finite log density in {START_ATTEMPTS} tries; the last one failed at site "
        f"{site!r}: check its "
        "data and prior, or start from a fit (start=...)"
    )


def _nutpie(
    density: LogDensity,
    new_start: Callable[[int], Tensor],
    num_chains: int,
    num_warmup: int,
    num_draws: int,
    seed: int,
    target_accept: float,
    progress: bool,
) -> tuple[Tensor, dict[str, Tensor], int]:
    import nutpie
    from nutpie.compiled_pyfunc import from_pyfunc

    counters: list[list[int]] = []

    value_and_grad = density.pointwise()

    def make_log_prob() -> Callable[[NDArray[Any]], tuple[float, NDArray[Any]]]:
        counter = [0]
        counters.append(counter)

        def log_prob(x: NDArray[Any]) -> tuple[float, NDArray[Any]]:
            counter[0] += 1
            value, grad = value_and_grad(torch.from_numpy(np.array(x)).to(density.device, density.dtype))
            return value.item(), grad.double().numpy(force=True)

        return log_prob

    def make_expand(*_: Any) -> Callable[[NDArray[Any]], dict[str, NDArray[Any]]]:
        return lambda x: {"z": np.array(x)}

    compiled = from_pyfunc(
        ndim=density.dim,
        make_logp_fn=make_log_prob,
        make_expand_fn=make_expand,
        expanded_dtypes=[np.dtype("float64")],
        expanded_shapes=[(density.dim,)],
        expanded_names=["z"],
        make_initial_point_fn=lambda chain_seed: new_start(chain_seed).double().numpy(force=True),
    )
    trace = nutpie.sample(
        compiled,
        draws=num_draws,
        tune=num_warmup,
        chains=num_chains,
        cores=1 if density.tier == "eager" else None,  # Pyro itself cannot run in two threads at once
        seed=seed,
        progress_bar=progress,
        save_warmup=False,
        target_accept=target_accept,
    )
    z = torch.from_numpy(np.array(trace.posterior["z"].values)).to(density.device, density.dtype)
    names = {
        "diverging": "diverging",
        "energy": "energy",
        "lp": "logp",
        "step_size": "step_size",
        "tree_depth": "depth",
        "acceptance_rate": "mean_tree_accept",
        "n_steps": "n_steps",
    }
    stats = {ours: torch.from_numpy(np.array(trace.sample_stats[theirs].values)) for ours, theirs in names.items()}
    return z, stats, sum(counter[0] for counter in counters)


class _Potential(torch.autograd.Function):
    """Minus the log density for Pyro's kernel, whose gradient comes with the value."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, density: LogDensity) -> Tensor:
        value, grad = density.value_and_grad(z)
        ctx.save_for_backward(grad)
        return -value

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:
        (grad,) = ctx.saved_tensors
        return -upstream * grad, None


def _pyro(
    density: LogDensity,
    new_start: Callable[[int], Tensor],
    num_chains: int,
    num_warmup: int,
    num_draws: int,
    seed: int,
    target_accept: float,
    progress: bool,
) -> tuple[Tensor, dict[str, Tensor], int]:
    from pyro.infer import MCMC, NUTS

    count = 0

    def potential(values: dict[str, Tensor]) -> Tensor:
        nonlocal count
        count += 1
        result: Tensor = _Potential.apply(values["z"], density)
        return result

    chains, stats = [], []
    for chain in range(num_chains):
        per_draw: list[tuple[float, float]] = []

        def remember(kernel: Any, _: Any, stage: str, __: int, kept: list[tuple[float, float]] = per_draw) -> None:
            if stage.lower().startswith("sample"):
                kept.append((float(kernel.step_size), float(-kernel._fetch_from_cache()[1])))

        kernel = NUTS(potential_fn=potential, target_accept_prob=target_accept)
        chain_seed = seed + 7919 * chain
        with seeded(chain_seed):
            sampler = MCMC(
                kernel,
                num_samples=num_draws,
                warmup_steps=num_warmup,
                initial_params={"z": new_start(chain_seed)},
                disable_progbar=not progress,
                hook_fn=remember,
            )
            sampler.run()
        chains.append(sampler.get_samples()["z"])
        diverging = torch.zeros(num_draws, dtype=torch.bool)
        diverging[sampler.diagnostics()["divergences"]["chain 0"]] = True
        step_size, lp = (torch.tensor(values) for values in zip(*per_draw, strict=True))
        stats.append({"diverging": diverging, "step_size": step_size, "lp": lp})
    return torch.stack(chains), {key: torch.stack([one[key] for one in stats]) for key in stats[0]}, count


_BACKENDS: dict[str, Callable[..., tuple[Tensor, dict[str, Tensor], int]]] = {
    "nutpie": _nutpie,
    "pyro": _pyro,
}
