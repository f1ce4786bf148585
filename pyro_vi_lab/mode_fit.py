"""Fit a point, or the normal at a mode, by Newton steps of the log density."""

from __future__ import annotations

import math
import time
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from pyro_vi_lab.callbacks import Watch
from pyro_vi_lab.density import LogDensity
from pyro_vi_lab.density_engine import Status
from pyro_vi_lab.density_fit import RESTART_RADIUS, num_threads
from pyro_vi_lab.errors import ArgumentError
from pyro_vi_lab.families import MAX_DENSE, Params
from pyro_vi_lab.fit_guide import is_point_estimate, name_by_content, prepared
from pyro_vi_lab.fitted import Fit
from pyro_vi_lab.guides import MAP, MLE, FullRankNormal, LaplaceApproximation
from pyro_vi_lab.guides.laplace import covariance_root
from pyro_vi_lab.isolation import default_dtype, threads
from pyro_vi_lab.problem import Problem
from pyro_vi_lab.program import Part
from pyro_vi_lab.program_fit import fit_program
from pyro_vi_lab.trust_region import Ascent, End, Local, Mark, maximize

PARTS: dict[type[Any], Part] = {LaplaceApproximation: "joint", MAP: "constrained", MLE: "likelihood"}
"""Which density the mode of each guide is of."""
NAMES: dict[Part, str] = {
    "joint": "log density on the unconstrained scale",
    "constrained": "density of the sites",
    "likelihood": "likelihood",
}
LOST = 1e-6
"""Least loss, in nats, a standard deviation away from a maximum in each direction; a normal loses half a nat."""
SAME_MODE = 1e-3
"""Nats between restarts that have found the same mode."""


class Verdict(NamedTuple):
    """The status of an ascent, with the sites along which its maximum is flat, or a direction in which it rises on."""

    status: Status
    flat: tuple[str, ...] = ()
    along: Tensor | None = None


class DensityTarget:
    """A log density as what is maximized; its Hessian is dense where D allows.

    Attributes:
        num_gradients: Gradients so far; a product of second derivatives with a vector counts as one.
    """

    def __init__(self, density: LogDensity) -> None:
        self.density = density
        self.num_gradients = 0

    def value(self, point: Tensor) -> float:
        """Log density."""
        return float(self.density.log_prob(point))

    def local(self, point: Tensor) -> Local:
        """Log density, gradient and second derivatives."""
        value, grad = self.density.value_and_grad(point)
        self.num_gradients += 1
        hessian: Tensor | None = None
        if self.density.dim <= MAX_DENSE:
            hessian = self.density.hessian(point)
            self.num_gradients += self.density.dim

        def product(vector: Tensor) -> Tensor:
            self.num_gradients += 1
            return self.density.hessian_product(point, vector)

        return Local(float(value), grad, hessian, product)

    def move(self, point: Tensor, step: Tensor) -> Tensor:
        """The sum."""
        return point + step

    def relative(self, point: Tensor, step: Tensor) -> float:
        """Longest coordinate of the step, relative to that of the point where it is above one."""
        return float((step.abs() / point.abs().clamp_min(1.0)).max())


def fit_mode(problem: Problem, guide: Any, *, num_restarts: int, seed: int, max_steps: int, watch: Watch) -> Fit:
    """See :func:`pyro_vi_lab.fit`."""
    began = time.perf_counter()
    name, made = prepared(problem, guide, seed)
    part = next(part for kind, part in PARTS.items() if isinstance(made, kind))
    density, joint = _density(problem, part), problem.density()
    start = made.loc.detach().to(joint.device, joint.dtype)
    generator = torch.Generator().manual_seed(seed)
    target, ascents = DensityTarget(density), []
    with threads(num_threads(joint)):
        for restart in range(num_restarts):
            jitter = (torch.rand(len(start), generator=generator, dtype=start.dtype) * 2 - 1) * RESTART_RADIUS
            ascents.append(
                maximize(
                    target,
                    start if restart == 0 else start + jitter.to(start.device),
                    max_steps=max_steps,
                    on_step=partial(_tell, watch, restart),
                )
            )
    judged = [_judge(density, one, part) for one in ascents]
    rank = [Status.CONVERGED, Status.OUT_OF_STEPS, Status.DIVERGED]
    order = sorted(range(num_restarts), key=lambda i: (rank.index(judged[i].status), -_number(ascents[i].local.value)))
    statuses = tuple(judged[i].status for i in order)
    best = ascents[order[0]]
    message = _sentence(density, best, judged[order[0]], part=part, start=start, max_steps=max_steps)
    message += _of_the_model(problem, statuses[0], part) + _of_others([ascents[i] for i in order], statuses)
    result = Fit(
        problem=problem,
        method=name,
        guide=made,
        params=None,
        statuses=statuses,
        message=message,
        num_steps=max(len(one.marks) - 1 for one in ascents),
        num_gradients=target.num_gradients,
        seconds=time.perf_counter() - began,
        seed=seed,
        history=_history([ascents[i] for i in order]),
    )
    if part != "joint":
        if result.status is not Status.DIVERGED:
            made.loc = nn.Parameter(best.point.clone())
        name_by_content(made)
        return replace(result, mode=joint.constrain(best.point))
    return _with_normal(problem, result, [ascents[i] for i in order])


def fit_mode_of_batches(problem: Problem, guide: Any, **options: Any) -> Fit:
    """The mode of a problem that sees some of its rows at a time, by stochastic gradients.

    Args:
        problem: What to fit.
        guide: A guide that is a point.
        **options: As of :func:`pyro_vi_lab.program_fit.fit_program`.

    Raises:
        ArgumentError: The Laplace approximation, which needs the second derivatives of all rows.
    """
    if not is_point_estimate(guide):
        raise ArgumentError(
            f"a Laplace approximation needs the second derivatives at all rows, and problem {problem.name} sees some "
            "of its rows at a time: fit 'map' or 'mean_field', or give the problem no minibatch"
        )
    result = fit_program(problem, guide, **options)
    example = problem.example
    assert example is not None
    with default_dtype(problem.dtype), problem.rows(example.index, example.size):
        values = result.guide.median(*example.args, **example.kwargs)
    history = {key.replace("negative_elbo", "negative_log_density"): value for key, value in result.history.items()}
    return replace(result, mode=dict(values), history=history)


def _tell(watch: Watch, restart: int, step: int, mark: Mark) -> bool:
    def row() -> dict[str, float]:
        known = {"negative_log_density": -mark.value, "gain": mark.gain, "radius": mark.radius, "seconds": mark.seconds}
        return {**known, "restart": restart}

    return watch(step, row)


def _density(problem: Problem, part: Part) -> LogDensity:
    if part == "joint":
        return problem.density()
    key = ("density", part)
    if key not in problem.kept:
        problem.kept[key] = problem.density().of_part(part)
    kept: LogDensity = problem.kept[key]
    return kept


def _with_normal(problem: Problem, result: Fit, ascents: list[Ascent]) -> Fit:
    """A Laplace fit: the normal of every restart."""
    normal: FullRankNormal
    _, normal = prepared(problem, FullRankNormal, result.seed)
    roots = [covariance_root(-_hessian(problem.density(), one)) for one in ascents]
    dim = problem.density().dim
    nothing = torch.full((dim, dim), math.nan, dtype=ascents[0].point.dtype, device=ascents[0].point.device)
    params = Params(
        torch.stack([one.point for one in ascents]),
        torch.stack([nothing if root is None else root for root in roots]),
    )
    if result.status is not Status.DIVERGED:
        normal.params = Params(params.loc[0], params.scale[0])
    name_by_content(normal)
    return replace(result, guide=normal, params=params)


def _hessian(density: LogDensity, ascent: Ascent) -> Tensor:
    return density.hessian(ascent.point) if ascent.local.hessian is None else ascent.local.hessian


def _judge(density: LogDensity, ascent: Ascent, part: Part) -> Verdict:
    if ascent.end is End.OUT_OF_STEPS:
        # of what is not concave there is no normal
        usable = part != "joint" or covariance_root(-_hessian(density, ascent)) is not None
        return Verdict(Status.OUT_OF_STEPS if usable else Status.DIVERGED)
    if ascent.end not in (End.MAXIMUM, End.FLAT):
        return Verdict(Status.DIVERGED)
    hessian = _hessian(density, ascent)
    size = hessian.diagonal().abs()
    unit = torch.where(size > 0, size, 1.0).rsqrt()
    values, vectors = torch.linalg.eigh(unit.unsqueeze(-1) * (hessian + hessian.mT) / 2 * unit)
    axes = (unit.unsqueeze(-1) * vectors).mT
    flat = values > -10 * len(values) * torch.finfo(values.dtype).eps
    if ascent.end is End.FLAT:
        flat |= values == values.max()
    if bool(flat.any()):
        # in the coordinates of unit curvature, and of those without any as they are
        share = vectors[:, flat].square().sum(-1).tolist()
        sites = [_site(label) for label, part in zip(density.labels, share, strict=True) if part > 1e-3]
        return Verdict(Status.DIVERGED, flat=tuple(dict.fromkeys(sites)))
    # at a supremum at infinity the curvature too falls to nothing, and where it says half a nat is none lost
    far = axes / (-values).sqrt().unsqueeze(-1)
    lost = ascent.local.value - density.log_prob(torch.cat([ascent.point + far, ascent.point - far]))
    least = LOST + 100 * torch.finfo(values.dtype).eps * abs(ascent.local.value)
    rising = (lost < least).nonzero().flatten().tolist()
    return Verdict(Status.DIVERGED, along=far[rising[0] % len(far)]) if rising else Verdict(Status.CONVERGED)


def _sentence(
    density: LogDensity, ascent: Ascent, verdict: Verdict, *, part: Part, start: Tensor, max_steps: int
) -> str:
    what, status, flat = NAMES[part], verdict.status, verdict.flat
    if status is Status.CONVERGED:
        extra = "; the normal has the inverse of minus the second derivatives as its covariance"
        return f"converged: the {what} has a maximum here{extra if part == 'joint' else ''}"
    if ascent.end is End.NO_START:
        culprit = density.blame(ascent.point)
        where = f"the density of site {culprit!r}" if culprit else f"the {what} or its derivatives"
        return f"diverged: {where} is not finite at the start; start elsewhere with the guide's init_loc_fn"
    moved = ascent.step if ascent.end is End.RUNS_AWAY else ascent.point - start
    moved = (moved if verdict.along is None else verdict.along).abs()
    if flat:
        moved = moved * torch.tensor([_site(label) in flat for label in density.labels], device=moved.device)
    worst = int(moved.argmax())
    label, site, position = density.labels[worst], _site(density.labels[worst]), float(ascent.point[worst])
    went = f"{label} went to {position:.3g} on the unconstrained scale"
    if flat:
        advice = "fit 'map', which has the priors too" if part == "likelihood" else "give them informative priors"
        sites = ", ".join(flat)
        return f"diverged: the {what} is flat along {sites} where {went}, so that no maximum is the only one: {advice}"
    advice = {
        "joint": f"give {site!r} a proper prior",
        "constrained": f"give {site!r} a prior that falls off there, or fit a distribution such as 'full_rank'",
        "likelihood": f"fit 'map' with a prior for {site!r} that falls off there",
    }[part]
    if ascent.end is End.OUT_OF_STEPS:
        more = "raise max_steps, or start nearer with the guide's init_loc_fn"
        bent = "" if status is Status.OUT_OF_STEPS else ", where it is not concave"
        begin = "stopped" if status is Status.OUT_OF_STEPS else "diverged: stopped"
        return (
            f"{begin} after max_steps={max_steps} while the {what} was still rising{bent}: {more}; {went}: if it goes "
            f"on and on there is no maximum, {advice}"
        )
    how = "still rises" if verdict.along is None else "does not fall off"
    return f"diverged: the {what} {how} where {went}, so that it has no maximum inside the support: {advice}"


def _of_the_model(problem: Problem, status: Status, part: Part) -> str:
    """What a ready model knows of its data: such as the column that separates two classes."""
    why = getattr(problem.model, "why_no_maximum", None)
    found = why(problem) if why and part == "likelihood" and status is not Status.CONVERGED else ""
    return f"; {found}" if found else ""


def _of_others(ascents: list[Ascent], statuses: tuple[Status, ...]) -> str:
    """What the other restarts found."""
    if len(ascents) == 1:
        return ""
    failed = sum(status is not Status.CONVERGED for status in statuses)
    values = [one.local.value for one, status in zip(ascents, statuses, strict=True) if status is Status.CONVERGED]
    lower = [values[0] - value for value in values if values[0] - value > SAME_MODE]
    found = f"; {failed} of {len(statuses)} restarts did not converge" if failed else ""
    if lower:
        found += f"; {len(lower)} found a lower maximum, by {min(lower):.2g} nats or more"
    return found


def _history(ascents: list[Ascent]) -> dict[str, NDArray[Any]]:
    """One row per step, one column per restart; one that has ended stays as it is."""
    rows = max(len(one.marks) for one in ascents)

    def column(name: str, marks: list[Mark]) -> list[float]:
        values = [getattr(mark, name) for mark in marks]
        return values + values[-1:] * (rows - len(values))

    columns = {
        key: np.array([column(name, one.marks) for one in ascents]).T
        for key, name in (("negative_log_density", "value"), ("gain", "gain"), ("radius", "radius"))
    }
    columns["negative_log_density"] = -columns["negative_log_density"]
    if len(ascents) == 1:
        columns = {name: values[:, 0] for name, values in columns.items()}
    columns["seconds"] = np.array([column("seconds", one.marks) for one in ascents]).sum(0)
    return columns


def _site(label: str) -> str:
    return label.split("[")[0]


def _number(value: float) -> float:
    return value if math.isfinite(value) else -math.inf
