"""How a problem runs: which tier, why, how large its graph is, and what a gradient takes in each tier."""

from __future__ import annotations

import statistics
import sys
import time
import warnings
from collections.abc import Callable
from typing import Any, TextIO

import torch

from pyro_vi_lab.density import LogDensity
from pyro_vi_lab.errors import ArgumentError, CompileError
from pyro_vi_lab.fit import fit
from pyro_vi_lab.fit_guide import is_a, is_over_family
from pyro_vi_lab.guides import PointGuide
from pyro_vi_lab.isolation import default_dtype, own_params, threads
from pyro_vi_lab.native import compiler
from pyro_vi_lab.problem import Problem
from pyro_vi_lab.whole_step import MANY_FITS

ROWS = 64
"""Particles of a fit at its start."""
SECONDS = 0.2
"""Time for the measurement of one tier."""
TRIED_STEPS = 5


def explain(problem: Problem, guide: Any = "full_rank", *, file: TextIO | None = None) -> None:
    """Print which tier a problem runs in, why, the size of its graph and the time per gradient.

    Measures each tier on this machine, and compiles what NUTS would compile, so it takes about a second.

    Args:
        problem: Model and data.
        guide: The guide, as for :func:`pyro_vi_lab.fit`. One that is not over a family is trained for a few steps.
        file: Where to print; standard output by default.

    Raises:
        ArgumentError: ``problem`` is no Problem.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> def model():
        ...     pyro.sample("x", dist.Normal(0.0, 1.0))
        >>> explain(Problem(model))  # doctest: +ELLIPSIS
        model: log density on R^1 with 0 tensors of data
        gradient: captured graph of ...
    """
    if not isinstance(problem, Problem):
        raise ArgumentError(f"problem must be a pyro_vi_lab.Problem, got {type(problem).__name__}")
    of_density = (is_over_family(guide) or is_a(guide, PointGuide)) and not problem.subsamples
    lines = _density(problem.density()) if of_density else _program(problem, guide)
    (file or sys.stdout).write("\n".join(lines) + "\n")


def _density(density: LogDensity) -> list[str]:
    noun = "tensor" if len(density.data) == 1 else "tensors"
    lines = [f"{density.name}: log density on R^{density.dim} with {len(density.data)} {noun} of data"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what it would say is said below
        graph = density.bound
    z = torch.zeros(density.dim, dtype=density.dtype, device=density.device)
    many = z.expand(ROWS, -1)
    with threads(1), torch.no_grad(), default_dtype(density.dtype):
        if graph is None:
            return [
                *lines,
                f"gradient: eager Pyro, {_time(lambda: density.value_and_grad(z))}, because it cannot be captured:",
                f"  {density.reason}",
            ]
        size = f"captured graph of {graph.num_nodes} operators, {density.work:,} numbers in intermediate results"
        lines.append(f"gradient: {size}")
        lines.append(
            f"  interpreted        {_time(lambda: graph.module(z))}, {ROWS} at once "
            f"{_time(lambda: density.value_and_grad(many))}"
        )
        lines.append(f"  TorchScript        {_time(lambda: graph.scripted(z))}")
        lines.append(f"  machine code (C)   {_native(density, z)}")
    lines += [
        "fit: interpreted, as it takes tens of gradients; with compile=True whole steps are machine code, and so "
        f"is the gradient of {MANY_FITS} fits and more",
        f"nuts: {'machine code, as it takes tens of thousands of gradients' if _compiles(density) else 'TorchScript'}",
    ]
    return lines


def _native(density: LogDensity, z: torch.Tensor) -> str:
    if density.device.type != "cpu":
        return "not on a GPU"
    if compiler() is None:
        return "no C compiler was found: install one, or name it in the environment variable CC"
    began = time.perf_counter()
    try:
        native = density.native
    except CompileError as error:
        return f"cannot be compiled: {error}"
    seconds = time.perf_counter() - began
    return f"{_time(lambda: native(z))}, compiled (or found on disk) in {seconds:.1f} s"


def _compiles(density: LogDensity) -> bool:
    try:
        return density.native is not None
    except CompileError:
        return False


def _program(problem: Problem, guide: Any) -> list[str]:
    lines = [f"{problem.name}: stochastic gradients of a captured objective"]
    if problem.minibatch is not None:
        lines.append(f"batches of {problem.minibatch} of {problem.num_rows:,} rows")
    with own_params():
        result = fit(problem, guide, max_steps=TRIED_STEPS, progress=False)
    return [*lines, *result.objective.explain().splitlines()]


def _time(run: Callable[[], Any]) -> str:
    """Median time of a call."""
    run()
    times: list[float] = []
    end = time.perf_counter() + SECONDS
    while len(times) < 3 or time.perf_counter() < end:
        began = time.perf_counter()
        run()
        times.append(time.perf_counter() - began)
    return f"{1e6 * statistics.median(times):,.0f} µs"
