"""One run of a guide and of the model on what it drew, and what can be weighed of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample

from pyro_vi_lab.errors import ArgumentError
from pyro_vi_lab.isolation import model_run
from pyro_vi_lab.objectives.cut import is_point
from pyro_vi_lab.problem import Problem
from pyro_vi_lab.user_errors import user_errors

Program = Callable[..., Any]


def traces_of(model: Program, guide: Program, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, Any]:
    """Traces of the model and of the guide, run once, without the rows that plates drew.

    A guide that is an effect handler around the model (``AutoNormalMessenger``) has one run of both, whose observed
    sites are the model's: traced from outside they would count as the guide's.
    """
    if isinstance(unwrapped := poutine.unwrap(guide), Messenger):
        guide(*args, **kwargs)
        model_trace, guide_trace = unwrapped.get_traces()  # type: ignore[attr-defined]
    else:
        guide_trace = poutine.trace(guide).get_trace(*args, **kwargs)
        model_trace = poutine.trace(poutine.replay(model, trace=guide_trace)).get_trace(*args, **kwargs)
    return model_trace, guide_trace


def sample_sites(trace: Any) -> dict[str, Any]:
    """Sites of distributions, without those of the rows that plates drew."""
    return {
        name: site for name, site in trace.nodes.items() if site["type"] == "sample" and not site_is_subsample(site)
    }


@dataclass(frozen=True, eq=False)
class Reading:
    """What a guide draws.

    Args:
        traces: Of the model and of the guide, of one run.
        drawn: Names of the guide's sites.
        points: Those that have the same value in every draw.
        closed: Those whose density is left out, as their divergence is in closed form.
        missing: Discrete latent sites of the model that the guide does not draw.
    """

    traces: tuple[Any, Any]
    drawn: frozenset[str]
    points: tuple[str, ...]
    closed: tuple[str, ...]
    missing: tuple[str, ...]

    @property
    def has_weights(self) -> bool:
        """Whether draws have importance weights, be it after the missing sites are summed out."""
        return not self.points and not self.closed

    def refuse(self, problem: Problem, guide: Any) -> None:
        """Raise an error that names a site without importance weights.

        Raises:
            ArgumentError: A site of the guide is a point, or has no density.
        """
        name = str(getattr(guide, "__name__", type(guide).__name__))
        if self.points:
            raise ArgumentError(
                f"the guide {name} of {problem.name} has no importance weights: its site {self.points[0]!r} is a point "
                "(Delta), the same in every draw; give it a distribution, or fit 'laplace' for a normal at the mode"
            )
        if self.closed:
            raise ArgumentError(
                f"the guide {name} of {problem.name} has no importance weights: its site {self.closed[0]!r} has a "
                "divergence in closed form in place of its density; fit 'mean_field' or 'full_rank'"
            )


def read_guide(
    problem: Problem,
    guide: Program,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    around: Callable[[], AbstractContextManager[Any]],
    *,
    seed: int,
) -> Reading:
    """Run guide and model twice, and see which sites of the guide move."""
    runs = []
    for number in range(2):
        with (
            user_errors(problem.name),
            model_run(seed=seed + number, dtype=problem.dtype, validate=False),
            torch.no_grad(),
            poutine.block(),
            around(),
        ):
            runs.append(traces_of(problem.model, guide, args, kwargs))
    first, second = (sample_sites(guide_trace) for _, guide_trace in runs)
    return Reading(
        traces=runs[0],
        drawn=frozenset(first),
        points=tuple(
            name
            for name, site in first.items()
            if is_point(site["fn"]) and name in second and torch.equal(site["value"], second[name]["value"])
        ),
        closed=tuple(name for name, site in first.items() if site["infer"].get("has_no_log_weight")),
        missing=tuple(name for name, site in problem.sites.items() if site.kind == "discrete" and name not in first),
    )
