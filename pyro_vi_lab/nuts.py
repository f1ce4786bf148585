"""NUTS on the captured density: the reference that fits are compared with."""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from numpy.typing import NDArray
from torch import Tensor

from pyro_vi_lab.agreement import agrees
from pyro_vi_lab.density import LogDensity
from pyro_vi_lab.errors import ArgumentError, CompileError, LabWarning, ModelError, unknown_name
from pyro_vi_lab.families import FAMILIES, Params
from pyro_vi_lab.fitted import Fit
from pyro_vi_lab.isolation import default_dtype, seeded, threads
from pyro_vi_lab.native import NativeFunction, compiler, say_no_compiler
from pyro_vi_lab.nutpie_bridge import Settings, sample_callback, sample_native
from pyro_vi_lab.posterior import Posterior
from pyro_vi_lab.problem import Problem
from pyro_vi_lab.tiers import Compile, check_compile
from pyro_vi_lab.whitened import Whitened

Backend = Literal["nutpie", "pyro"]
Tier = Literal["native", "graph", "eager"]

TARGET_ACCEPT = 0.9
"""Acceptance rate for a reference: above the usual 0.8, which leaves a few divergences even in eight schools."""
START_RADIUS = 2.0
"""Half-width of the uniform start on the unconstrained scale, as Stan's."""
START_ATTEMPTS = 100
"""Random starts tried for a chain, as Stan."""
NUM_WARMUP, WARM_NUM_WARMUP = 1000, 300
"""Adaptation steps by default, as Stan's, and where a fit has found location and covariance before."""
GRADIENTS_PER_DRAW = 8
"""A short trajectory: three doublings."""
COMPILE_SECONDS, COMPILE_SECONDS_PER_NODE = 0.4, 2e-3
"""What the C compiler takes, about."""
PARALLEL_SECONDS = 1e-3
"""Gradients that take less are mostly Python, for whose lock chains at once would wait: twice as long, as measured."""
GRAPH_SECONDS_PER_NODE = 2e-6
"""What TorchScript's interpreter takes for an operator on a small tensor, about."""


def nuts(
    problem: Problem,
    *,
    num_chains: int = 4,
    num_warmup: int | None = None,
    num_draws: int = 1000,
    seed: int = 0,
    backend: Backend = "nutpie",
    start: Fit | Posterior | None = None,
    target_accept: float = TARGET_ACCEPT,
    progress: bool = True,
    compile: Compile = "auto",
) -> Posterior:
    """Draw from the posterior by the No-U-Turn sampler.

    The result may be unfit as a reference: ask :meth:`Posterior.problems`.

    Args:
        problem: Model and data.
        num_chains: Chains; nutpie runs them on all cores.
        num_warmup: Adaptation steps per chain, not kept; 1000 by default, 300 with ``start``, after which step size and
            mass matrix are about as good on most of the posteriors in ``benchmarks/warm_nuts.md``.
        num_draws: Draws kept per chain.
        seed: Seed of all randomness; the same seed gives the same draws.
        backend: ``"nutpie"`` (Rust) or ``"pyro"`` (Pyro's own kernel), both on the captured density.
        start: A fit of a guide over a family, from whose draws the chains start, and whose covariance is where the
            adaptation of the mass matrix starts: the chains run in the coordinates in which the fit is a standard
            normal. Or a posterior of whatever origin, of which mean and covariance on the unconstrained scale are taken
            (of fewer than twice as many draws as dimensions the variances only). If ``None``, uniformly from (-2, 2) on
            the unconstrained scale, with the identity.
        target_accept: Acceptance rate that the step size adapts to; nearer to 1 for posteriors with
            divergences. A reference should have none: 0.9 costs about a fifth more gradients than the usual 0.8.
        progress: Show a progress bar on a terminal or in a notebook.
        compile: Write the captured gradient as C and compile it with the system's compiler: the chains then run
            without Python. ``"auto"`` does where there is a compiler and enough gradients are to come to pay for it;
            ``info["tier"]`` of the result says what was done.

    Raises:
        ArgumentError: A number out of range, an unknown backend, a fit of another problem, or a posterior that lacks a
            site or does not move.
        CompileError: The gradient cannot be compiled, and ``compile=True``.
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
    if num_warmup is None:
        num_warmup = NUM_WARMUP if start is None else WARM_NUM_WARMUP
    for name, value, least in (
        ("num_chains", num_chains, 1),
        ("num_warmup", num_warmup, 1),
        ("num_draws", num_draws, 1),
    ):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ArgumentError(f"{name} must be a whole number of at least {least}, got {value!r}")
    if not 0 < target_accept < 1:
        raise ArgumentError(f"target_accept is a rate between 0 and 1, got {target_accept!r}")
    check_compile(compile)
    if backend not in _BACKENDS:
        raise unknown_name("backend", backend, _BACKENDS)
    if not isinstance(problem, Problem):
        raise ArgumentError(
            f"problem must be a pyro_vi_lab.Problem, got {type(problem).__name__}; wrap it: Problem(model, *args)"
        )
    density = problem.density()
    if isinstance(start, Fit) and start.loc.shape[-1] != density.dim:
        raise ArgumentError(f"start has {start.loc.shape[-1]} dimensions, problem {problem.name} has {density.dim}")
    began = time.perf_counter()
    target = density if start is None else _whitened(density, start)

    def new_start(chain_seed: int) -> Tensor:
        return _start(target, chain_seed)

    with threads(1), default_dtype(density.dtype):
        first = new_start(seed)  # fails here, in the user's words, and not inside a thread of the sampler
        tiered = _in_tier(target, compile, num_chains * (num_warmup + num_draws) * GRADIENTS_PER_DRAW, first)
        draws, stats, gradients = _BACKENDS[backend](
            tiered,
            new_start,
            num_chains,
            num_warmup,
            num_draws,
            seed,
            target_accept,
            progress and _can_show(),
        )
    z = target.to_z(draws) if isinstance(target, Whitened) else draws
    return Posterior(
        draws=density.constrain(z),
        stats=stats,
        method="nuts",
        unconstrained=z,
        info={
            "seconds": time.perf_counter() - began,
            "num_gradients": gradients.total,
            "warmup_gradients": gradients.warmup,
            "seed": seed,
            "backend": backend,
            "tier": tiered.tier,
            "start": "uniform" if start is None else start.method,
            "num_warmup": num_warmup,
            "target_accept": target_accept,
        },
    )


def _can_show() -> bool:
    return sys.stderr.isatty() or "ipykernel" in sys.modules


def _whitened(density: LogDensity, start: Fit | Posterior) -> Whitened:
    if isinstance(start, Posterior):
        return Whitened(density, FAMILIES["full_rank"], _moments(density, start))
    assert start.params is not None
    return Whitened(density, start.family, Params(start.params.loc[0], start.params.scale[0]))


def _moments(density: LogDensity, posterior: Posterior) -> Params:
    """Mean and Cholesky factor of the covariance of draws, on the unconstrained scale."""
    z = posterior.unconstrained
    if z is None or z.shape[-1] != density.dim:
        z = density.unconstrain(posterior.draws)
    z = z.flatten(0, 1).to(density.device, density.dtype)
    if not bool(torch.isfinite(z).all()):
        raise ArgumentError("start has draws that are not finite on the unconstrained scale of the problem")
    sd = z.std(0) if len(z) > 1 else torch.zeros_like(z[0])
    if not bool((sd > 0).all()):
        still = density.labels[int((sd > 0).int().argmin())]
        raise ArgumentError(f"start does not move along {still}: it needs draws of a distribution")
    if len(z) >= 2 * density.dim:
        tril, failed = torch.linalg.cholesky_ex(torch.corrcoef(z.T).reshape(density.dim, density.dim))
        if not bool(failed):
            return Params(z.mean(0), sd.unsqueeze(-1) * tril)
    return Params(z.mean(0), torch.diag(sd))


def _start(density: LogDensity | Whitened, seed: int) -> Tensor:
    """A point ``(D,)`` with a finite density and gradient: a draw of the fit, or uniform."""
    generator = torch.Generator().manual_seed(seed % 2**63)
    for _ in range(START_ATTEMPTS):
        if isinstance(density, Whitened):
            point = torch.randn(density.dim, generator=generator, dtype=density.dtype)
        else:
            point = (torch.rand(density.dim, generator=generator, dtype=density.dtype) * 2 - 1) * START_RADIUS
        value, grad = density.value_and_grad(point)
        if bool(torch.isfinite(value) & torch.isfinite(grad).all()):
            return point
    site = density.blame(point) or "the change of variables"
    raise ModelError(
        f"NUTS found no start with a finite log density in {START_ATTEMPTS} tries; the last one failed at site "
        f"{site!r}: check its data and prior, or start from a fit (start=...)"
    )


class _Gradients(NamedTuple):
    """How many gradients a run took in all chains: in all, and of these in the warm-up."""

    total: int
    warmup: int


class _Density(NamedTuple):
    """A density and how it is run.

    Args:
        density: Log density on R^D.
        value_and_grad: The same and its gradient at one point ``(D,)``, in the fastest tier that pays.
        native: The same as machine code, if that is the tier.
        tier: Name of the tier.
    """

    density: LogDensity | Whitened
    value_and_grad: Callable[[Tensor], tuple[Tensor, Tensor]]
    native: NativeFunction | None
    tier: Tier


def _in_tier(density: LogDensity | Whitened, compile: Compile, num_gradients: int, start: Tensor) -> _Density:
    """The density in the tier that is asked for, or that takes least time in all."""
    if compile is True or (compile == "auto" and _compiling_pays(density, num_gradients)):
        try:
            native = density.native
        except CompileError as error:
            if compile is True:
                raise
            warnings.warn(
                f"NUTS of model {density.name} runs the interpreted graph, which is slower: {error}",
                LabWarning,
                stacklevel=3,
            )
        else:
            if _agrees(density, native, start):

                def value_and_grad(z: Tensor) -> tuple[Tensor, Tensor]:
                    value, grad = native(z)
                    return value, grad

                return _Density(density, value_and_grad, native, "native")
            warnings.warn(
                f"the machine code of model {density.name} disagrees with its captured graph; the graph is used, "
                "which is slower",
                LabWarning,
                stacklevel=3,
            )
    return _Density(density, density.pointwise(), None, density.tier)


def _compiling_pays(density: LogDensity | Whitened, num_gradients: int) -> bool:
    if density.bound is None or density.device.type != "cpu":
        return False
    seconds = COMPILE_SECONDS + COMPILE_SECONDS_PER_NODE * density.bound.num_nodes
    pays = num_gradients * GRAPH_SECONDS_PER_NODE * density.bound.num_nodes > seconds
    if pays and compiler() is None:
        say_no_compiler()
        return False
    return pays


def _agrees(density: LogDensity | Whitened, native: NativeFunction, start: Tensor) -> bool:
    graph = density.bound
    assert graph is not None
    return all(
        agrees(expected, got)
        for point in (start, start / 2)
        for expected, got in zip(graph(point), native(point), strict=True)
    )


def _nutpie(
    tiered: _Density,
    new_start: Callable[[int], Tensor],
    num_chains: int,
    num_warmup: int,
    num_draws: int,
    seed: int,
    target_accept: float,
    progress: bool,
) -> tuple[Tensor, dict[str, Tensor], _Gradients]:
    density = tiered.density
    like = torch.empty(0, dtype=density.dtype, device=density.device)
    settings = Settings(
        num_chains=num_chains,
        num_warmup=num_warmup,
        num_draws=num_draws,
        seed=seed,
        target_accept=target_accept,
        progress=progress,
        cores=1 if tiered.native is None and _one_by_one(tiered, new_start(seed)) else None,
    )

    def start(chain_seed: int) -> NDArray[Any]:
        return new_start(chain_seed).double().numpy(force=True)

    result = None if tiered.native is None else sample_native(tiered.native, density.dim, start, settings)
    if result is None:
        result = sample_callback(tiered.value_and_grad, density.dim, start, settings, like=like)
    z, stats, total = result
    # the start of a chain and the first search for a step size are a part of the warm-up
    return torch.from_numpy(z).to(like), stats, _Gradients(total, total - int(stats["n_steps"].sum()))


def _one_by_one(tiered: _Density, start: Tensor) -> bool:
    """Whether chains that share Python's interpreter lock are faster one after the other."""
    if tiered.tier == "eager":
        return True  # Pyro itself cannot run in two threads at once
    times = []
    for _ in range(5):
        began = time.perf_counter()
        tiered.value_and_grad(start)
        times.append(time.perf_counter() - began)
    return min(times) < PARALLEL_SECONDS


class _Potential(torch.autograd.Function):
    """Minus the log density for Pyro's kernel, whose gradient comes with the value."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, value_and_grad: Callable[[Tensor], tuple[Tensor, Tensor]]) -> Tensor:
        value, grad = value_and_grad(z)
        ctx.save_for_backward(grad)
        return -value

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:
        (grad,) = ctx.saved_tensors
        return -upstream * grad, None


def _pyro(
    tiered: _Density,
    new_start: Callable[[int], Tensor],
    num_chains: int,
    num_warmup: int,
    num_draws: int,
    seed: int,
    target_accept: float,
    progress: bool,
) -> tuple[Tensor, dict[str, Tensor], _Gradients]:
    from pyro.infer import MCMC, NUTS

    count = warmup = 0

    def potential(values: dict[str, Tensor]) -> Tensor:
        nonlocal count
        count += 1
        result: Tensor = _Potential.apply(values["z"], tiered.value_and_grad)
        return result

    chains, stats = [], []
    for chain in range(num_chains):
        before = count
        per_draw: list[tuple[float, float]] = []
        in_warmup: list[int] = []

        def remember(
            kernel: Any,
            _: Any,
            stage: str,
            __: int,
            kept: list[tuple[float, float]] = per_draw,
            in_warmup: list[int] = in_warmup,
        ) -> None:
            if stage.lower().startswith("sample"):
                kept.append((float(kernel.step_size), float(-kernel._fetch_from_cache()[1])))
            else:
                in_warmup.append(count)

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
        warmup += in_warmup[-1] - before
        chains.append(sampler.get_samples()["z"])
        diverging = torch.zeros(num_draws, dtype=torch.bool)
        diverging[sampler.diagnostics()["divergences"]["chain 0"]] = True
        step_size, lp = (torch.tensor(values) for values in zip(*per_draw, strict=True))
        stats.append({"diverging": diverging, "step_size": step_size, "lp": lp})
    return (
        torch.stack(chains),
        {key: torch.stack([one[key] for one in stats]) for key in stats[0]},
        _Gradients(count, warmup),
    )


_BACKENDS: dict[str, Callable[..., tuple[Tensor, dict[str, Tensor], _Gradients]]] = {
    "nutpie": _nutpie,
    "pyro": _pyro,
}
