r"""Training of any model and guide on captured graphs, with a stop rule.

The loss of a program is noisy: draws of the guide, and the rows of a batch. Its optimizer is therefore run at a fixed
step size until the loss no longer falls by more than its noise explains, then at a quarter of that step size, and so
on; at the smallest the parameters are averaged over the steps. A fit has converged when the last of these stages ends.

- *stage*: of windows of steps, epochs or 100 steps if that is more, doubling from stage to stage. A stage ends when the
  mean loss of two windows in a row is not below that of the window before by more than a standard error, *and* the
  parameters have stopped drifting: split-R̂ of their iterates over the second half of the stage is below 1.1 for 95 % of
  them. The noise of a minibatch hides what the parameters show. Parameters that never stop, as weights of a network
  that do not matter, end a stage after eight such windows.
- *average*: of the unconstrained parameters, over all steps of the last stage; kept if its loss is not larger, on draws
  and batches that both share.

References:
    Welandawe, Andersen, Vehtari & Huggins 2024, "A framework for improving the reliability of black-box variational
    inference", JMLR 25 (stages of a fixed step size until stationarity, averages, smaller step sizes). Robbins & Monro
    1951; Polyak & Juditsky 1992.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer import SVI, config_enumerate
from pyro.optim.optim import PyroOptim
from torch import Tensor

from pyro_vi_lab.captured import Captured, tell
from pyro_vi_lab.density_engine import Status
from pyro_vi_lab.isolation import seeded
from pyro_vi_lab.natural_gradient import NaturalGradient
from pyro_vi_lab.problem import Problem
from pyro_vi_lab.rows import set_up

STAGES = 4
"""Step sizes that are tried, each a quarter of the one before."""
SHRINK = 0.25
MIN_WINDOW = 100
STILL_WINDOWS, MAX_STILL_WINDOWS = 2, 8
"""Windows in a row without a fall of the loss, after which a stage ends where nothing drifts, and in any case."""
SNAPSHOT_STEPS = 10
MAX_TRACKED = 2000
"""Parameters whose drift is watched, chosen at random of more."""
MAX_RHAT = 1.1
"""Largest split-R̂ of iterates that have stopped drifting (Welandawe et al. 2024, Section 4.2)."""
COMPARED = 50
"""Losses from which raw and averaged parameters are compared."""
MAX_FAILURES = 20
"""Steps in a row whose loss is no number, after which a fit has diverged."""


@dataclass
class Training:
    """What a training did.

    Args:
        status: How it ended.
        losses: Of every step.
        step_sizes: Of every step.
        seconds: From the start to the end of every step.
        num_gradients: Gradients of one particle.
        averaged: Whether the parameters are the averages of the last stage.
        culprit: Of a fit that diverged, the parameter that is no number, or what else failed.
    """

    status: Status = Status.OUT_OF_STEPS
    losses: list[float] = field(default_factory=list)
    step_sizes: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    num_gradients: int = 0
    averaged: bool = False
    culprit: str = ""


class Rowed:
    """A model or a guide that is given the index and the number of its rows before its own arguments."""

    def __init__(self, problem: Problem, program: Callable[..., Any]) -> None:
        self.problem, self.program = problem, program
        self.__wrapped__ = program
        self.__name__ = getattr(program, "__name__", type(program).__name__)

    def __call__(self, index: Tensor | None, size: int, /, *args: Any, **kwargs: Any) -> Any:
        """Run it on the rows."""
        with self.problem.rows(index, size):
            return self.program(*args, **kwargs)

    def see(self, index: Tensor | None, size: int, /, *args: Any, **kwargs: Any) -> None:
        """Let the program know of a call that a graph has made."""
        tell(self.program, *args, **kwargs)


def train(
    problem: Problem,
    model: Callable[..., Any],
    guide: Callable[..., Any],
    *,
    objective: Captured,
    optim: PyroOptim | None,
    default_optim: Callable[[], PyroOptim],
    max_steps: int,
    seed: int,
    on_step: Callable[[int, Training], bool | None],
    least_fall: float = 0.0,
) -> Training:
    """Minimize the objective over the parameters of the model and the guide, in place, as SVI does.

    Args:
        problem: The data.
        model: The problem's model, marked for enumeration if need be.
        guide: The guide.
        objective: What is minimized.
        optim: The optimizer, used as it is: the fit ends with the first stage.
        default_optim: Makes the optimizer if there is none, once the guide has been set up.
        max_steps: Most steps.
        seed: Of the order of the rows.
        on_step: Called with the number of each step and what was done so far; the training ends where it returns
            ``True``.
        least_fall: A window in which the loss falls by no more is one in which it stands still, however small its
            noise, and whether or not the parameters drift.
    """
    calls, program = calls_of(problem, model, guide, seed)
    stages, names = _Stages(_window(problem), STAGES if optim is None else 1, least_fall), list[str]()
    optim = default_optim() if optim is None else optim
    svi = SVI(*program, optim, loss=objective)
    result, clock = Training(), time.perf_counter()
    average: _Average | None = None
    failures = 0
    for step in range(1, max_steps + 1):
        args, kwargs = next(calls)
        if step == 1:
            with poutine.trace(param_only=True) as tracer:
                loss = float(svi.step(*args, **kwargs))
            names = list(tracer.trace.nodes)
            stages.parameters = trained(names)
        else:
            loss = float(svi.step(*args, **kwargs))
        rate = step_size(optim)
        result.losses.append(loss)
        result.step_sizes.append(rate)
        result.seconds.append(time.perf_counter() - clock)
        result.num_gradients += int(objective.num_particles)
        stopped = on_step(step, result)
        failures = 0 if math.isfinite(loss) else failures + 1
        if failures >= MAX_FAILURES:
            result.status, result.culprit = Status.DIVERGED, _not_a_number(names)
            break
        if average is not None:
            average.add()
        if stopped:
            break
        if not stages.ends(loss):
            continue
        if stages.over:
            result.status = Status.CONVERGED
            break
        scale_step_size(optim, SHRINK)
        if stages.last:
            average = _Average(stages.parameters)
    if average is not None and result.status is not Status.DIVERGED:
        result.averaged = average.if_better(lambda: _compared(svi, problem, guide, seed))
    return result


def enumerated(problem: Problem) -> Callable[..., Any]:
    """The model, its discrete sites marked for enumeration."""
    if any(site.kind == "discrete" for site in problem.sites.values()):
        marked: Callable[..., Any] = config_enumerate(problem.model, default="parallel")
        return marked
    return problem.model


def calls_of(
    problem: Problem, model: Callable[..., Any], guide: Callable[..., Any], seed: int
) -> tuple[Iterator[tuple[tuple[Any, ...], dict[str, Any]]], tuple[Callable[..., Any], Callable[..., Any]]]:
    """The arguments of every step, without end, and the model and guide that take them; sets up the guide."""
    example = problem.example
    if example is None:
        return _same(problem.args, problem.kwargs), (model, guide)
    set_up(guide, problem.rows(example.index, example.size), *example.args, **example.kwargs)
    batches = problem.batches(seed, fixed_size=True)
    calls = (((batch.index, batch.size, *batch.args), batch.kwargs) for batch in batches)
    return calls, (Rowed(problem, model), Rowed(problem, guide))


def _same(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[tuple[tuple[Any, ...], dict[str, Any]]]:
    while True:
        yield args, kwargs


def step_size(optim: PyroOptim) -> float:
    """Present step size of an optimizer; NaN where it has none."""
    if isinstance(optim, NaturalGradient):
        return optim.lr
    groups = [group for one in optim.optim_objs.values() for group in one.param_groups]
    return float(groups[0]["lr"]) if groups and "lr" in groups[0] else math.nan


def scale_step_size(optim: PyroOptim, factor: float) -> None:
    """Multiply the step size of an optimizer, for parameters that come later too."""
    if isinstance(optim, NaturalGradient):
        optim.lr *= factor
        scale_step_size(optim.others, factor)
        return
    for one in optim.optim_objs.values():
        for group in one.param_groups:
            group["lr"] *= factor
    if isinstance(optim.pt_optim_args, dict) and "lr" in optim.pt_optim_args:
        optim.pt_optim_args = {**optim.pt_optim_args, "lr": factor * optim.pt_optim_args["lr"]}


def _window(problem: Problem) -> int:
    if problem.minibatch is None or problem.num_rows is None:
        return MIN_WINDOW
    return max(MIN_WINDOW, math.ceil(problem.num_rows / problem.minibatch))


class _Stages:
    """When the loss has stopped falling and the parameters have stopped drifting."""

    def __init__(self, window: int, number: int, least_fall: float = 0.0) -> None:
        self.window, self.left, self.least_fall = window, number, least_fall
        self._losses: list[float] = []
        self._before: tuple[float, float] | None = None
        self._still = self._steps = 0
        self.parameters: list[Tensor] = []
        self._iterates: list[Tensor] = []
        self._tracked: Tensor | None = None

    @property
    def over(self) -> bool:
        """Whether the last stage has ended."""
        return self.left == 0

    @property
    def last(self) -> bool:
        """Whether this is the last stage."""
        return self.left == 1

    def ends(self, loss: float) -> bool:
        """Take one loss; whether a stage ends with it."""
        self._steps += 1
        if self._steps % SNAPSHOT_STEPS == 0:
            self._snapshot()
        if math.isfinite(loss):
            self._losses.append(loss)
        if len(self._losses) < self.window:
            return False
        values = torch.tensor(self._losses, dtype=torch.float64)
        mean, variance = float(values.mean()), float(values.var()) / len(values)
        self._losses.clear()
        before, self._before = self._before, (mean, variance)
        if before is None:
            return False
        fell = before[0] - mean > max(math.sqrt(before[1] + variance), self.least_fall)
        self._still = 0 if fell else self._still + 1
        watched = not self.least_fall  # as those of flows and networks: not identified
        if self._still < STILL_WINDOWS or (watched and self._drifts() and self._still < MAX_STILL_WINDOWS):
            return False
        self.left, self.window = self.left - 1, 2 * self.window
        self._before, self._still = None, 0
        self._iterates.clear()
        return True

    def _snapshot(self) -> None:
        parameters = torch.cat([value.detach().reshape(-1) for value in self.parameters])
        if self._tracked is None:
            chosen = torch.randperm(len(parameters), generator=torch.Generator().manual_seed(0))[:MAX_TRACKED]
            self._tracked = chosen.to(parameters.device)
        self._iterates.append(parameters[self._tracked])

    def _drifts(self) -> bool:
        """Whether more than 5 % of the parameters have a split-R̂ of 1.1 or more over the second half of the stage."""
        recent = torch.stack(self._iterates[len(self._iterates) // 2 :])
        half = len(recent) // 2
        if half < 2:
            return True
        chains = torch.stack([recent[:half], recent[half : 2 * half]])
        within = chains.var(1).mean(0)
        between = chains.mean(1).var(0)
        moving = within > 0
        if not bool(moving.any()):
            return False
        rhat = ((half - 1) / half + between[moving] / within[moving]).sqrt()
        return bool((rhat >= MAX_RHAT).double().mean() > 0.05)


def trained(names: Sequence[str]) -> list[Tensor]:
    """The unconstrained parameters of these names that are trained."""
    parameters = pyro.get_param_store()._params
    return [parameters[name] for name in names if parameters[name].requires_grad]


class _Average:
    """Running average of all parameters."""

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self.parameters = parameters
        self.mean = [value.detach().clone() for value in self.parameters]
        self.number = 1

    @torch.no_grad()
    def add(self) -> None:
        """Take the present parameters in."""
        self.number += 1
        torch._foreach_lerp_(self.mean, [value.detach() for value in self.parameters], 1 / self.number)

    @torch.no_grad()
    def if_better(self, losses: Callable[[], Tensor]) -> bool:
        """Put the average in the place of the parameters unless its loss is larger."""
        present = losses()
        kept = [value.detach().clone() for value in self.parameters]
        for value, mean in zip(self.parameters, self.mean, strict=True):
            value.copy_(mean)
        gain = present - losses()
        if bool(gain.mean() >= -gain.std() / len(gain) ** 0.5):
            return True
        for value, old in zip(self.parameters, kept, strict=True):
            value.copy_(old)
        return False


def _compared(svi: SVI, problem: Problem, guide: Callable[..., Any], seed: int) -> Tensor:
    """Losses on draws and batches that depend on the seed alone."""
    calls, _ = calls_of(problem, problem.model, guide, seed + 1)
    with seeded(seed):
        pairs = itertools.islice(calls, COMPARED)
        losses = [float(svi.evaluate_loss(*args, **kwargs)) for args, kwargs in pairs]
    return torch.tensor(losses, dtype=torch.float64)


def _not_a_number(names: Sequence[str]) -> str:
    for name in names:
        value = pyro.get_param_store()._params[name]
        if not bool(torch.isfinite(value).all()):
            return f"parameter {name!r} is no finite number"
    return "the loss is no finite number, though all parameters are"
