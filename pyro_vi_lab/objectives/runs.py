"""Runs of a guide and of the model against it: traces with log probabilities, checked."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any, NamedTuple

from pyro import poutine
from pyro.infer.util import is_validation_enabled
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import prune_subsample_sites, site_is_subsample
from pyro.util import check_model_guide_match, check_site_shape
from torch import Tensor

from pyro_vi_lab.errors import ModelError
from pyro_vi_lab.objectives.cut import Cut

Program = Callable[..., Any]


class Run(NamedTuple):
    """A guide and its model, run once; one particle, or all of them where they are vectorized.

    Args:
        model: Its sites, by name, with ``log_prob``.
        guide: Its sites, by name, with ``log_prob`` and ``score_parts``.
        cut: The draws as leaves, if they are such.
        rows: Rows of subsampled plates, by name.
        traces: The traces, of the model and of the guide.
    """

    model: dict[str, Any]
    guide: dict[str, Any]
    cut: Cut | None
    rows: dict[str, Tensor]
    traces: tuple[Any, Any]


def run(
    model: Program,
    guide: Program,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    *,
    max_plate_nesting: Any,
    cut: bool,
) -> Run:
    """Run the guide, and the model with its draws.

    Args:
        model: The model.
        guide: The guide; Pyro's ``GuideMessenger`` as well.
        args: Arguments of both.
        kwargs: Keyword arguments of both.
        max_plate_nesting: As of Pyro's objectives.
        cut: Whether draws are made leaves of the graph.

    Raises:
        ModelError: A site is to be enumerated, a latent site is missing in the guide, or the density of a draw is only
            known where its transform was just run.
    """
    cutting = Cut() if cut else None
    around = cutting or nullcontext()
    if isinstance(unwrapped := poutine.unwrap(guide), Messenger):
        with around:
            guide(*args, **kwargs)
        model_trace, guide_trace = unwrapped.get_traces()  # type: ignore[attr-defined]
    else:
        with around:
            guide_trace = poutine.trace(guide).get_trace(*args, **kwargs)
        model_trace = poutine.trace(poutine.replay(model, trace=guide_trace)).get_trace(*args, **kwargs)
    _refuse_enumeration(guide_trace, model_trace)
    _refuse_missing(model_trace, guide_trace)
    checked = is_validation_enabled()
    if checked:
        check_model_guide_match(model_trace, guide_trace, max_plate_nesting)
    rows = {
        name: site["value"]
        for trace in (model_trace, guide_trace)
        for name, site in trace.nodes.items()
        if site["type"] == "sample" and site_is_subsample(site)
    }
    model_trace, guide_trace = prune_subsample_sites(model_trace), prune_subsample_sites(guide_trace)
    model_trace.compute_log_prob()
    _compute_score_parts(guide_trace, cut=cut)
    sites = [
        {name: site for name, site in trace.nodes.items() if site["type"] == "sample"}
        for trace in (model_trace, guide_trace)
    ]
    if checked:
        for site in (*sites[0].values(), *sites[1].values()):
            check_site_shape(site, max_plate_nesting)
    return Run(sites[0], sites[1], cutting, rows, (model_trace, guide_trace))


def _compute_score_parts(guide_trace: Any, *, cut: bool) -> None:
    try:
        guide_trace.compute_score_parts()
    except (KeyError, NotImplementedError) as error:
        done = [name for name, site in guide_trace.nodes.items() if "score_parts" in site]
        name = next(name for name, site in guide_trace.nodes.items() if site["type"] == "sample" and name not in done)
        kind = type(guide_trace.nodes[name]["fn"]).__name__
        if not cut:
            raise
        raise ModelError(
            f"guide site {name!r} ({kind}) has no density at a given value, as a transform of it has no inverse; use "
            "gradient='reparam'"
        ) from error


def _refuse_enumeration(*traces: Any) -> None:
    for trace in traces:
        for name, site in trace.nodes.items():
            if site["type"] == "sample" and not site["is_observed"] and site["infer"].get("enumerate"):
                raise ModelError(
                    f"site {name!r} is to be enumerated (infer={{'enumerate': ...}}), which this objective does not; "
                    "use pyro.infer.TraceEnum_ELBO, or draw it: gradient='score' of ELBO without the mark"
                )


def _refuse_missing(model_trace: Any, guide_trace: Any) -> None:
    for name, site in model_trace.nodes.items():
        if site["type"] != "sample" or site["is_observed"] or site_is_subsample(site) or name in guide_trace.nodes:
            continue
        raise ModelError(
            f"latent site {name!r} of the model is missing in the guide; let the guide sample it, or observe it"
        )
