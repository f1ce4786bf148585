"""What batches of rows say, compared with what all rows say."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from pyro import poutine
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

from pyro_vi_lab.batches import Table
from pyro_vi_lab.change_of_variables import FromUnconstrained
from pyro_vi_lab.errors import ModelError
from pyro_vi_lab.isolation import model_run
from pyro_vi_lab.row_layout import RowLayout, structure_changes
from pyro_vi_lab.rows import Rows
from pyro_vi_lab.user_errors import user_errors

CHECK_RADIUS = 1.0
"""Half-width of the uniform distribution of the unconstrained point at which sums over the rows are compared."""
CHECK_POWER = 0.5
"""Sums may differ by the square root of the dtype's epsilon, relative to the sum of their terms' sizes."""


def check_sum(model: Callable[..., Any], table: Table, layout: RowLayout, *, name: str) -> None:
    r"""Check that the log density of all rows is the mean of those of batches, each scaled by N/B.

    The rows are parted in two at random, :math:`B_1 + B_2 = N`, and the latent sites have random values. For each site

    .. math:: \sum_b \frac{B_b}{N} \log p_b = \log p

    has to hold to rounding. It does not if the model computes something from the rows that it sees: their number, their
    mean. Models with noise of their own (dropout) or batch normalization in training are not checked.

    Raises:
        ModelError: The sums of a site differ; the message names it.
    """
    everything = torch.arange(table.num_rows)
    generator = torch.Generator().manual_seed(2)
    order = torch.randperm(table.num_rows, generator=generator)
    cut = min(layout.batch_size, table.num_rows - 1)
    parts = [part.sort().values for part in (order[:cut], order[cut:])]

    def uniform(_: str, shape: torch.Size) -> Tensor:
        return (torch.rand(shape, generator=generator, dtype=table.dtype) * 2 - 1).to(table.device) * CHECK_RADIUS

    def run(around: Sequence[Any], index: Tensor, seed: int) -> Any:
        args, kwargs = table.take(index)
        with ExitStack() as stack:
            stack.enter_context(user_errors(name))
            stack.enter_context(model_run(seed=seed, dtype=table.dtype, validate=False))
            stack.enter_context(torch.no_grad())
            stack.enter_context(poutine.block())
            tracer = stack.enter_context(poutine.trace())
            for messenger in around:
                stack.enter_context(messenger)
            model(*args, **kwargs)
            tracer.trace.compute_log_prob()
        return tracer.trace

    with _training_norms() as norms:
        whole = run([FromUnconstrained(uniform)], everything, 0)
    if norms:
        return
    values = {key: whole.nodes[key]["value"] for key in _sites(whole) if not whole.nodes[key]["is_observed"]}
    again = run([poutine.condition(data=values)], everything, 1)
    sums = dict.fromkeys(_sites(whole), 0.0)
    for part in parts:
        index = part.to(table.device)
        rows = Rows(index, layout.num_rows, layout.plates)
        here = {
            key: value.index_select(layout.axes[key], index) if key in layout.axes else value
            for key, value in values.items()
        }
        trace = run([rows, poutine.condition(data=here)], part, 0)
        for key in sorted(set(sums) ^ set(_sites(trace))):
            raise structure_changes(key, name)
        for key in sums:
            sums[key] += float(trace.nodes[key]["log_prob_sum"]) * len(part) / layout.num_rows
    for key, total in sums.items():
        node = whole.nodes[key]
        expected, repeated = float(node["log_prob_sum"]), float(again.nodes[key]["log_prob_sum"])
        size = float(node["log_prob"].abs().sum()) + 1
        tolerance = torch.finfo(table.dtype).eps ** CHECK_POWER * size
        if not abs(expected) < torch.inf or abs(expected - repeated) > tolerance:
            continue  # nothing to compare, or noise
        if not abs(total - expected) <= tolerance:
            raise ModelError(
                f"site {key!r} of model {name} has log density {expected:.6g} on all {layout.num_rows} rows, but "
                f"batches of them, scaled, say {total:.6g}: it depends on more than its own rows, such as their number "
                "or mean; compute that outside of the model, and pass it as an argument"
            )


def _sites(trace: Any) -> list[str]:
    return [
        key
        for key, node in trace.nodes.items()
        if node["type"] == "sample"
        and type(node["fn"]).__name__ != "_Subsample"
        and not node["infer"].get("_deterministic")
    ]


@contextmanager
def _training_norms() -> Iterator[list[nn.Module]]:
    """Layers run inside the block that normalize by the statistics of their batch."""
    seen: list[nn.Module] = []

    def note(module: nn.Module, _: Any) -> None:
        if module.training and isinstance(module, nn.modules.batchnorm._BatchNorm):
            seen.append(module)

    handle = register_module_forward_pre_hook(note)
    try:
        yield seen
    finally:
        handle.remove()
