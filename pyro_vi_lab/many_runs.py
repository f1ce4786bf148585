"""Many runs of a model with some of its sites given, vectorized where its operators allow it."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any, Protocol, cast

import torch
from pyro import poutine
from pyro.distributions.torch_distribution import TorchDistributionMixin
from pyro.infer import config_enumerate
from pyro.poutine.enum_messenger import EnumMessenger
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.distributions import dirichlet
from torch.overrides import TorchFunctionMode

from pyro_vi_lab.errors import LabError, LabWarning
from pyro_vi_lab.isolation import model_run
from pyro_vi_lab.pointwise import pointwise
from pyro_vi_lab.sites import Site
from pyro_vi_lab.user_errors import user_errors, user_line

CHUNK_NUMBERS = 2**24
"""Numbers that one vectorized run of the model may return, or hold (128 MiB in float64)."""
LEAST_CHUNK, NUM_CHUNKS = 2**19, 32
"""Larger results are made in at least so many parts, unless these had fewer numbers: what a part needs besides is then
small beside the result."""


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
    enumerated: int | None = None,
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
        enumerated: Of log densities: the number of batch dimensions that plates use, for a model whose discrete latent
            sites are to be summed out. Latent sites that depend on these are then left out.
        around: Makes what each run is wrapped in.
        numbers: Numbers that a run holds, if they are more than it returns.
        name: What to call the model in messages.
        dtype: Default type of the runs.
        seed: Seed of the draws.

    Shape:
        given ``(n, *site shape)``, results ``(n, *site shape)`` or, of log densities, ``(n, *batch shape)``.

    Raises:
        ModelError: The model cannot be run, or its rows have no log densities of their own.
    """
    if not wanted:
        return {}
    names, values = list(given), list(given.values())
    redrawn = {site.name: site.batch_shape for site in redraw}

    def once(zero: Tensor, *latent: Tensor) -> dict[str, Tensor]:
        substitute = _Substitute(dict(zip(names, latent, strict=True)), redrawn)
        run = model if enumerated is None else config_enumerate(model)
        with ExitStack() as stack:
            stack.enter_context(_OwnMemory(zero))
            stack.enter_context(poutine.block())
            tracer = stack.enter_context(poutine.trace())
            stack.enter_context(around())
            if enumerated is not None:
                stack.enter_context(_EnumerateRows(first_available_dim=-1 - enumerated))
            stack.enter_context(substitute)
            run(*args, **kwargs)
            nodes: dict[str, Any] = tracer.trace.nodes
            if not log_prob:
                return {site.name: nodes[site.name]["value"].expand(site.shape) for site in wanted}
            found = pointwise(tracer.trace, [site.name for site in wanted], enumerated)
        return {
            site.name: found[site.name].expand(site.shape[: len(site.shape) - nodes[site.name]["fn"].event_dim])
            for site in wanted
            if site.name in found
        }

    size = sum(site.shape.numel() for site in wanted) + 1
    part = max(LEAST_CHUNK, num_runs * size // NUM_CHUNKS) // size
    chunk = max(1, min(part, CHUNK_NUMBERS // max(size, numbers)))
    inputs = (torch.zeros(num_runs), *values)
    with user_errors(name), model_run(seed=seed, dtype=dtype, validate=False), torch.no_grad():
        return _of_all_rows(once, inputs, chunk, name)


def _of_all_rows(
    once: Callable[..., dict[str, Tensor]], inputs: tuple[Tensor, ...], chunk: int, name: str
) -> dict[str, Tensor]:
    """The results for every row of ``inputs``, some rows at a time, so that they are never there twice."""
    num_rows = len(inputs[0])
    results: dict[str, Tensor] = {}
    for start in range(0, num_rows, chunk):
        rows = tuple(value[start : start + chunk] for value in inputs)
        try:
            with warnings.catch_warnings():
                # torch says that an operator has no batching rule and is run row by row: right, only slower; and
                # that its own rule for binomial draws resizes their memory
                warnings.filterwarnings("ignore", message="There is a performance drop")
                warnings.filterwarnings("ignore", message="An output with one or more elements was resized")
                with _dirichlet_by_row():
                    part = torch.vmap(once, randomness="different")(*rows)
        except LabError:
            raise
        except (RuntimeError, NotImplementedError, ValueError, TypeError) as error:
            # the model looks into its values, or shapes them by hand: the same runs, one after another
            return _one_by_one(once, inputs, name, error)
        for key, value in part.items():
            _put(results, key, value, start, num_rows)
    return results


def _one_by_one(
    once: Callable[..., dict[str, Tensor]], inputs: tuple[Tensor, ...], name: str, error: Exception
) -> dict[str, Tensor]:
    """The results for every row, a run of the model each; says what it costs once a run has shown that."""
    num_rows = len(inputs[0])
    results: dict[str, Tensor] = {}
    for i in range(num_rows):
        began = time.perf_counter()
        for key, value in once(*(value[i] for value in inputs)).items():
            _put(results, key, value[None], i, num_rows)
        if i == 0 and num_rows > 1:
            place = user_line(error)
            warnings.warn(
                f"model {name} cannot be run for many draws at once{f' ({place})' if place else ''}: "
                f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}; it is run {num_rows} "
                f"times instead, which takes about {num_rows * (time.perf_counter() - began):.2g} s",
                LabWarning,
                stacklevel=6,
            )
    return results


def _put(results: dict[str, Tensor], key: str, value: Tensor, start: int, num_rows: int) -> None:
    if len(value) == num_rows:
        results[key] = value
        return
    if key not in results:
        results[key] = value.new_empty((num_rows, *value.shape[1:]))
    results[key][start : start + len(value)] = value


class _EnumerateRows(EnumMessenger):
    """Pyro's enumeration, whose look at ``value.data`` vmap refuses."""

    def _pyro_post_sample(self, msg: Any) -> None:
        value = msg["value"]
        if not isinstance(msg["fn"], TorchDistributionMixin) or value is None:
            return
        shape = value.shape[: value.dim() - msg["fn"].event_dim]
        dim_to_id = msg["infer"].setdefault("_dim_to_id", {})
        dim_to_id.update(self._param_dims.get(msg["name"], {}))
        self._value_dims[msg["name"]] = {
            dim: key for dim, key in dim_to_id.items() if len(shape) >= -dim and shape[dim] > 1
        }


@contextmanager
def _dirichlet_by_row() -> Iterator[None]:
    """Lets vmap draw from beta and Dirichlet distributions.

    torch draws them with an autograd function that vmap refuses, from an operator that vmap knows.
    """
    names = vars(dirichlet)
    before = names["_Dirichlet"]

    class ByRow:
        @staticmethod
        def apply(concentration: Tensor) -> Tensor:
            if torch._C._functorch.peek_interpreter_stack() is None:  # not of our vmap: another thread's
                return cast(Tensor, before.apply(concentration))
            return torch._sample_dirichlet(concentration)

    names["_Dirichlet"] = ByRow
    try:
        yield
    finally:
        names["_Dirichlet"] = before


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
        if func is Tensor.requires_grad_:
            return args[0]  # of a parameter that is new to Pyro's store: vmap refuses it, and no gradients are taken
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
