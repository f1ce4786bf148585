"""Log densities of the latent sites of every row, given one draw of all else."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import pyro
import torch
from pyro import poutine
from torch import Tensor

from pyro_vi_lab.errors import ArgumentError
from pyro_vi_lab.many_runs import many_runs
from pyro_vi_lab.objectives.cut import is_point
from pyro_vi_lab.objectives.plates import expansion, sum_to
from pyro_vi_lab.problem import Problem
from pyro_vi_lab.program_draws import LOG_P, LOG_Q, Wanted
from pyro_vi_lab.program_traces import Reading, read_guide, sample_sites, traces_of


class RowWeights(NamedTuple):
    """Log densities ``(S, n)`` of model and guide, and the numbers of the rows."""

    log_p: Tensor
    log_q: Tensor
    rows: list[int]


class _Call(NamedTuple):
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    around: Callable[[], AbstractContextManager[Any]]
    row_index: Tensor | None


def row_weights(
    problem: Problem, guide: Callable[..., Any], num_draws: int, seed: int, *, plate: str | None, num_rows: int
) -> RowWeights:
    r"""Log densities :math:`\log p(x_n, z_n \mid \theta)` and :math:`\log q(z_n \mid \theta)` of draws of z.

    θ, the latent sites outside of the plate of the rows, is one draw of the guide; rows must be independent given it.

    Args:
        problem: Model and data.
        guide: A guide whose local sites lie in the plate of the rows.
        num_draws: S.
        seed: Seed of the draws, and of the rows where the model sees some at a time.
        plate: Name of the plate of the rows; found by default.
        num_rows: Rows at least, where the model sees some at a time; else all are taken.

    Raises:
        ArgumentError: There are no local sites, or it is not clear which plate is that of the rows; a local site is a
            point, is discrete and not drawn by the guide, or is drawn together with those of other rows.
    """
    log_p, log_q, rows = [], [], list[int]()
    kept: Any = None
    for call in _calls(problem, seed):
        reading = read_guide(problem, guide, call.args, call.kwargs, call.around, seed=seed)
        if kept is None:
            plate = plate or _plate(problem, reading)
            kept = _outside(problem, guide, reading, plate)
        assert plate is not None
        found = _of_call(problem, guide, kept, call, reading, plate, num_draws, seed + len(rows))
        size = found[0].shape[1]
        log_p.append(found[0])
        log_q.append(found[1])
        rows += call.row_index.tolist() if call.row_index is not None else range(len(rows), len(rows) + size)
        if len(rows) >= num_rows:
            break
    return RowWeights(torch.cat(log_p, 1), torch.cat(log_q, 1), rows)


def _calls(problem: Problem, seed: int) -> Iterator[_Call]:
    """All rows at once, or batches of them in a random order: each row once."""
    if problem.example is None:
        yield _Call(problem.args, problem.kwargs, nullcontext, None)
        return
    assert problem.num_rows is not None
    seen = 0
    for batch in problem.batches(seed):
        yield _Call(batch.args, batch.kwargs, partial(problem.rows, batch.index, batch.size), batch.index)
        seen += batch.size
        if seen + batch.size > problem.num_rows:
            return


def _plate(problem: Problem, reading: Reading) -> str:
    """The one plate that holds latent sites."""
    if problem.row_plates:
        return problem.row_plates[0]
    names: list[str] = []
    for site in sample_sites(reading.traces[0]).values():
        if not site["is_observed"]:
            names += [frame.name for frame in site["cond_indep_stack"] if frame.vectorized]
    found = list(dict.fromkeys(names))
    if not found:
        raise ArgumentError(f"no latent site of {problem.name} lies in a plate, so that there are no rows to judge")
    if len(found) > 1:
        raise ArgumentError(
            f"the latent sites of {problem.name} lie in the plates {', '.join(map(repr, found))}: say which one stands "
            f"for the rows, plate={found[0]!r}"
        )
    return found[0]


def _outside(problem: Problem, guide: Any, reading: Reading, plate: str) -> Any:
    """The guide's trace without the sites of the rows, after a look at what is there."""
    model, drawn = (sample_sites(trace) for trace in reading.traces)
    local = [name for name, site in model.items() if not site["is_observed"] and _frame(site, plate)]
    if not local:
        raise ArgumentError(f"no latent site of {problem.name} lies in plate {plate!r}")
    if any(_frame(drawn[name], plate) for name in (*reading.points, *reading.closed)):
        reading.refuse(problem, guide)
    for name in local:
        if name in reading.missing:
            raise ArgumentError(f"the discrete local site {name!r} is not drawn by the guide: its rows have no weights")
        if name not in drawn or not _frame(drawn[name], plate) or not _own(drawn, name, plate):
            raise ArgumentError(
                f"the guide draws site {name!r} for all rows together, as a part of one vector: rows have weights of "
                f"their own where it is drawn in plate {plate!r}, as by AutoNormal or an amortized guide"
            )
    kept = reading.traces[1].copy()
    for name in [name for name, site in drawn.items() if _frame(site, plate)]:
        kept.remove_node(name)
    return kept


def _own(drawn: dict[str, Any], name: str, plate: str) -> bool:
    """Whether a site has randomness in the plate: its own, or that of an auxiliary site there."""
    if not is_point(drawn[name]["fn"]):
        return True
    return any(_frame(site, plate) and not is_point(site["fn"]) for site in drawn.values())


def _frame(site: Any, plate: str) -> Any | None:
    return next((one for one in site["cond_indep_stack"] if one.name == plate and one.vectorized), None)


def _of_call(
    problem: Problem,
    guide: Callable[..., Any],
    kept: Any,
    call: _Call,
    reading: Reading,
    plate: str,
    num_draws: int,
    seed: int,
) -> tuple[Tensor, Tensor]:
    frames = [_frame(site, plate) for site in sample_sites(reading.traces[0]).values()]
    size = next(frame.size for frame in frames if frame)

    def both(*args: Any, **kwargs: Any) -> None:
        with poutine.block():
            joint, drawn = traces_of(problem.model, poutine.replay(guide, trace=kept), args, kwargs)
        for name, trace in ((LOG_P, joint), (LOG_Q, drawn)):
            trace.compute_log_prob()
            pyro.deterministic(name, _by_row(trace, plate, size))

    values = many_runs(
        both,
        call.args,
        call.kwargs,
        given={},
        wanted=[Wanted(name, torch.Size([size])) for name in (LOG_P, LOG_Q)],
        num_runs=num_draws,
        around=call.around,
        numbers=sum(site["value"].numel() for trace in reading.traces for site in sample_sites(trace).values()),
        name=problem.name,
        dtype=problem.dtype,
        seed=seed,
    )
    return values[LOG_P], values[LOG_Q]


def _by_row(trace: Any, plate: str, size: int) -> Tensor:
    """Log density of what lies in the plate, row by row, without the factor from the rows seen to all rows."""
    total = torch.zeros(size)
    for site in sample_sites(trace).values():
        frame = _frame(site, plate)
        if frame is not None:
            total = total + sum_to(site["log_prob"], frozenset([frame])).flatten() / expansion(frozenset([frame]))
    return total
