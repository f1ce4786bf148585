"""Many runs of a model with some of its sites given, vectorized where its operators allow it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.overrides import TorchFunctionMode

from pyro_vi_lab.isolation import model_run
from pyro_vi_lab.sites import Site
from pyro_vi_lab.user_errors import user_errors

CHUNK_NUMBERS = 2**24
"""Numbers that one vectorized run of the model may return, or hold (128 MiB in float64)."""


class Wanted(Protocol):
    """A site whose values are asked for, and their shape."""

    @property
    def name(self) -> str:
        """Name of the site."""

    @property
    def shape(self) -> torch.Size:
        """Shape of its value."""


def many_runs(
    model: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    *,
    given: Mapping[str, Tensor],
    wanted: Sequence[Wanted],
    num_runs: int,
    redraw: Sequence[Site] = (),
    log_prob: bool = False,
    around: Callable[[], AbstractContextManager[Any]] = nullcontext,
    numbers: int = 0,
    name: str,
    dtype: torch.dtype,
    seed: int,
) -> dict[str, Tensor]:
    """Run a model once for every draw of the sites ``given``, and draw all others.

    Args:
        model: The Pyro model.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        given: Draws of latent sites.
        wanted: Sites whose values are asked for.
        num_runs: Number of runs, n.
        redraw: Observed sites that are drawn too.
        log_prob: Give the log densities of the wanted sites instead of their values; zero where masked.
        around: Makes what each run is wrapped in.
        numbers: Numbers that a run holds, if they are more than it returns.
        name: What to call the model in messages.
        dtype: Default type of the runs.
        seed: Seed of the draws.

    Shape:
        given ``(n, *site shape)``, results ``(n, *site shape)`` or, of log densities, ``(n, *batch shape)``.
    """
    if not wanted:
        return {}
    names, values = list(given), list(given.values())
    redrawn = {site.name: site.batch_shape for site in redraw}

    def once(zero: Tensor, *latent: Tensor) -> tuple[Tensor, ...]:
        substitute = _Substitute(dict(zip(names, latent, strict=True)), redrawn)
        with _OwnMemory(zero), poutine.block(), poutine.trace() as tracer, around(), substitute:
            model(*args, **kwargs)
            nodes: dict[str, Any] = tracer.trace.nodes
            if not log_prob:
                return tuple(nodes[site.name]["value"].expand(site.shape) for site in wanted)
            # rows that are masked are not observed: they say nothing
            return tuple(
                scale_and_mask(node["fn"].log_prob(node["value"]).expand(shape), mask=node["mask"])
                for shape, node in (
                    (site.shape[: len(site.shape) - nodes[site.name]["fn"].event_dim], nodes[site.name])
                    for site in wanted
                )
            )

    size = sum(site.shape.numel() for site in wanted) + 1
    inputs = (torch.zeros(num_runs), *values)
    with user_errors(name), model_run(seed=seed, dtype=dtype, validate=False), torch.no_grad():
        try:
            with warnings.catch_warnings():
                # torch says that an operator has no batching rule and is run row by row: right, only slower; and
                # that its own rule for binomial draws resizes their memory
                warnings.filterwarnings("ignore", message="There is a performance drop")
                warnings.filterwarnings("ignore", message="An output with one or more elements was resized")
                chunk = max(1, CHUNK_NUMBERS // max(size, numbers))
                parts = torch.vmap(once, randomness="different", chunk_size=chunk)(*inputs)
        except (RuntimeError, NotImplementedError, ValueError, TypeError):
            # the model looks into its values, or shapes them by hand: the same runs, one after another
            each = [once(*(value[i] for value in inputs)) for i in range(num_runs)]
            parts = tuple(torch.stack(columns) for columns in zip(*each, strict=True))
    return {site.name: part for site, part in zip(wanted, parts, strict=True)}


class _OwnMemory(TorchFunctionMode):
    """Gives every row of a vmap memory of its own where new memory is asked for.

    torch's distributions draw with ``torch.empty(shape).normal_()``; vmap refuses to write draws that differ by row
    into
    memory that all rows share.

    Args:
        zero: A zero for each row.
    """

    def __init__(self, zero: Tensor) -> None:
        super().__init__()
        self.zero = zero

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in _NEW_MEMORY and isinstance(result, Tensor):
            return torch.zeros_like(result) + self.zero.to(result)
        return result


_NEW_MEMORY = (torch.empty, torch.empty_like, Tensor.new, Tensor.new_empty)


class _Substitute(Messenger):
    """Gives latent sites their values; draws observed ones anew, in the batch shape that is given."""

    def __init__(self, values: Mapping[str, Tensor], redraw: Mapping[str, torch.Size]) -> None:
        super().__init__()
        self.values, self.redraw = values, redraw

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] in self.redraw:
            msg["is_observed"], msg["value"], msg["done"] = False, None, False
            if msg["fn"].batch_shape != self.redraw[msg["name"]]:
                # data without a plate are broadcast over: each value is a draw of its own
                msg["fn"] = msg["fn"].expand(self.redraw[msg["name"]])
        elif msg["name"] in self.values and not msg["is_observed"]:
            msg["value"], msg["done"] = self.values[msg["name"]], True
