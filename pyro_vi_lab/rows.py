"""The rows of a batch, seen alike by model and guide."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from copy import copy
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoContinuous, AutoGuide
from pyro.poutine.messenger import Messenger
from pyro.poutine.runtime import effectful
from pyro.poutine.subsample_messenger import _Subsample
from torch import Tensor

from pyro_vi_lab.errors import ModelError


class Rows(Messenger):
    r"""Runs a model or a guide on a batch: every plate that stands for the rows has those of the batch and no others.

    What a plate of the rows covers is scaled by N/B, so that the log density of a batch is an unbiased estimate of the
    log density of all rows,

    .. math:: E\Big[\frac{N}{B} \sum_{i \in \text{batch}} \log p(y_i, z_i \mid \theta)\Big]
        = \sum_{i=1}^{N} \log p(y_i, z_i \mid \theta).

    A plate may count the rows of the data or those of the batch. ``pyro.plate("row", N, subsample_size=B)`` gets
    ``index`` for its subsample, whatever it would have drawn, and scales by itself. ``pyro.plate("row", len(y))`` in
    a model that is run on B rows counts from 0 to B - 1, and is scaled here; parameters in it that are declared by row
    (``pyro.param(..., event_dim=...)`` of N entries) give those of the batch.

    Put it around a whole ELBO, or around model and guide one by one: nested, the inner one counts. Values of ``index``
    are never looked at, so that it may be the input of a graph that is being captured; N and B are constants of the
    graph.

    Args:
        index: Rows of the batch; ``None`` if they are not known, as those of a data loader: then plates that count the
            rows of the data are left as they are.
        num_rows: Number of rows of the data, N.
        plates: Names of the plates that stand for the rows.
        size: Rows in the batch, B; the length of ``index`` by default.

    Shape:
        index ``(B,)``, of whole numbers.

    Raises:
        ModelError: When model or guide are run: a plate of the rows has another size than N or B, draws a subsample of
            another size, or holds a parameter with an entry for each row of the batch.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> def model(y):
        ...     with pyro.plate("row", len(y)):
        ...         pyro.sample("y", dist.Normal(0.0, 1.0), obs=y)
        >>> y, index = torch.zeros(100), torch.tensor([3, 14, 15, 92])
        >>> with pyro.poutine.trace() as tracer, Rows(index, 100, ["row"]):
        ...     model(y[index])
        >>> tracer.trace.nodes["y"]["scale"]
        25.0
    """

    def __init__(
        self, index: Tensor | None, num_rows: int, plates: Collection[str], *, size: int | None = None
    ) -> None:
        super().__init__()
        if index is None and size is None:
            raise TypeError("a batch without an index needs its size")
        self.index, self.num_rows, self.plates = index, num_rows, frozenset(plates)
        self.size = len(index) if size is None and index is not None else int(size or 0)

    @property
    def scale(self) -> float:
        """N/B."""
        return self.num_rows / self.size

    # --- what Pyro asks: nested, the inner one acts first and the outer one finds nothing left to do ------------------

    def _pyro_sample(self, msg: Any) -> None:
        if isinstance(msg["fn"], _Subsample):
            self._give_index(msg)
            return
        frames = []
        for frame in msg["cond_indep_stack"]:
            if self._counts_the_batch(frame):
                msg["scale"] = msg["scale"] * self.scale
                frame = frame._replace(full_size=self.num_rows)
            frames.append(frame)
        msg["cond_indep_stack"] = tuple(frames)

    def _pyro_post_sample(self, msg: Any) -> None:
        # poutine.replay, outside of this, gives a plate of the model the subsample that the guide's plate had: right
        # where both count the same, wrong where the guide counts the data's rows and the model the batch's
        if isinstance(msg["fn"], _Subsample):
            self._give_index(msg)

    def _pyro_post_param(self, msg: Any) -> None:
        event_dim = msg["kwargs"].get("event_dim")
        if event_dim is None:
            return
        for frame in msg["cond_indep_stack"]:
            dim, value = (frame.dim or 0) - event_dim, msg["value"]
            if not self._counts_the_batch(frame) or value.dim() < -dim or value.shape[dim] == 1:
                continue
            if self.index is None:
                raise ModelError(
                    f"parameter {msg['name']!r} has an entry for each row of plate {frame.name!r}, but a data loader "
                    "does not say which rows are in a batch; give the data as arrays with minibatch=, or write a guide "
                    "that computes its parameters from the data"
                )
            if value.shape[dim] != self.num_rows:
                raise ModelError(
                    f"parameter {msg['name']!r} has {value.shape[dim]} entries along plate {frame.name!r}; it needs "
                    f"one for each of the {self.num_rows} rows of the data, of which {self.size} are in the batch"
                )
            msg["value"] = _part_of_param(value, dim, self.index)

    def _pyro_rows(self, msg: Any) -> None:
        msg["value"], msg["done"], msg["stop"] = self, True, True

    def _counts_the_batch(self, frame: Any) -> bool:
        return (
            frame.name in self.plates
            and frame.vectorized
            and self.size != self.num_rows
            and frame.size == self.size
            and frame.full_size in (None, self.size)
        )

    def _give_index(self, msg: Any) -> None:
        fn = msg["fn"]
        if msg["name"] not in self.plates:
            return
        if fn.size == self.num_rows:
            if self.index is None:
                return
            if fn.subsample_size not in (None, self.size):
                raise ModelError(
                    f"plate {msg['name']!r} asks for {fn.subsample_size} of its {fn.size} rows (subsample_size), the "
                    f"batch has {self.size}"
                )
            msg["value"] = self.index
        elif fn.size == self.size:
            msg["value"] = torch.arange(self.size, device=fn.device)
        else:
            raise ModelError(
                f"plate {msg['name']!r} has size {fn.size}; a plate of the rows has the size of the data "
                f"({self.num_rows}) or of the batch ({self.size})"
            )


class SameRows(Messenger):
    """Gives plates that draw a subsample the one that they had in another run.

    Args:
        index: Rows of each plate, by its name.
    """

    def __init__(self, index: dict[str, Tensor]) -> None:
        super().__init__()
        self.index = index

    def _pyro_sample(self, msg: Any) -> None:
        if isinstance(msg["fn"], _Subsample) and msg["name"] in self.index:
            msg["value"] = self.index[msg["name"]]


def active_rows() -> Rows | None:
    """The innermost :class:`Rows` around the present run, or ``None`` if there is none, or a block hides it."""
    rows: Rows | None = _ask(name="_pyro_vi_lab_rows")
    return rows


@effectful(type="rows")
def _ask() -> None:
    return None


def subsamples(
    model: Callable[..., Any], plates: Collection[str], *args: Any, **kwargs: Any
) -> dict[str, tuple[int | None, Any]]:
    """What a model says of the rows of its plates: how many it draws, or which ones it was told to see.

    The model is run as far as it takes to make these plates, and leaves nothing behind.

    Returns:
        For each plate that the model makes ``(subsample_size, None)`` or ``(None, subsample)``.
    """
    watch = _Watch(plates)
    with torch.no_grad(), poutine.block(), suppress(_AllSeen), watch:
        model(*args, **kwargs)
    return watch.seen


class _AllSeen(Exception):
    """Ends the run of a model of which enough is known."""


class _Watch(Messenger):
    def __init__(self, plates: Collection[str]) -> None:
        super().__init__()
        self.plates = frozenset(plates)
        self.seen: dict[str, tuple[int | None, Any]] = {}

    def _pyro_sample(self, msg: Any) -> None:
        if not isinstance(msg["fn"], _Subsample) or msg["name"] not in self.plates:
            return
        given = msg["value"]
        self.seen[msg["name"]] = (msg["fn"].subsample_size, None) if given is None else (None, given)
        if self.seen.keys() == self.plates:
            raise _AllSeen


def set_up(guide: Any, rows: Rows, *args: Any, **kwargs: Any) -> None:
    """Let the autoguides inside ``guide`` see their model for the first time on a batch that they know to be one.

    Pyro hides that first run from all that stands around it, so that an autoguide would take the rows of a batch for
    those of the data. And the plates that it makes have the size of the first batch for good and rows of their own: it
    gets plates that have the rows of each call. Guides that are no autoguides are left as they are.

    Args:
        guide: Any guide.
        rows: The rows of the batch.
        *args: Arguments of the model, for the batch.
        **kwargs: Its keyword arguments.

    Raises:
        ModelError: The guide has one vector for all latent sites and cannot take part of them.
    """
    if not isinstance(guide, AutoGuide):
        return
    for part in [part for part in guide.modules() if isinstance(part, AutoGuide)]:
        if part.prototype_trace is None:
            with model_on(part, rows), copy(rows), torch.no_grad():
                part._setup_prototype(*args, **kwargs)
        ours = hasattr(part, "takes_rows")  # and knows its rows itself
        if isinstance(part, AutoContinuous) and not (ours and part.takes_rows):
            refuse_part_of_rows(part, rows.plates)
        if part.master is None and part.create_plates is None and not ours:
            part.create_plates = PlatesOfCalls(part)


class PlatesOfCalls:
    """The plates of an autoguide with the rows that the model sees in each call; a ``create_plates`` of Pyro's guides.

    Pyro's autoguides draw rows of their own, whatever the model was told to see, and always as many as in their first
    run.

    Args:
        guide: The autoguide, which has been set up.
    """

    def __init__(self, guide: Any) -> None:
        self._guide = weakref.ref(guide)

    def __call__(self, *args: Any, **kwargs: Any) -> list[Any]:
        """Plates for one call of the guide with the arguments of the model."""
        guide: Any = self._guide()
        return plates_of_call(guide._model and guide.model, guide._prototype_frames, *args, **kwargs)

    def __reduce__(self) -> tuple[Any, ...]:
        # a copy of the guide is another guide, and may be one without its model
        return type(None), ()


def plates_of_call(model: Callable[..., Any] | None, frames: Mapping[str, Any], *args: Any, **kwargs: Any) -> list[Any]:
    """Plates for the latent sites of a guide of which this call of the model sees some rows, and which rows these are.

    Args:
        model: The model; ``None`` if the guide has lost it.
        frames: Plates of the guide's latent sites in its first run.
        *args: Arguments of the model.
        **kwargs: Its keyword arguments.

    Returns:
        None for plates whose rows are always seen all.

    Raises:
        ModelError: It is not known which rows these are.
    """
    rows = active_rows()
    given: frozenset[str] = rows.plates if rows else frozenset()
    partial = {name: frame for name, frame in frames.items() if name in given or is_part(frame)}
    known = given if rows and rows.index is not None else frozenset()
    found: dict[str, Any] = dict.fromkeys(known, (None, None))
    if not partial.keys() <= known:
        if model is None:
            raise ModelError(
                "this guide was pickled, which leaves out its model, and it has to know which rows the model sees: "
                "make the guide anew from the model and use load_state_dict"
            )
        found |= subsamples(model, partial.keys() - known, *args, **kwargs)
    plates = []
    for name, frame in sorted(partial.items()):
        size, index = found.get(name, (None, None))
        if name in given - known and index is None:
            raise ModelError(
                f"the guide has parameters for each row of plate {name!r}, but a data loader does not say which rows "
                "are in a batch; give the data as arrays with minibatch=, or write a guide that computes the "
                "parameters of a row from its data"
            )
        full_size = frame.full_size or frame.size
        plates.append(pyro.plate(name, full_size, dim=frame.dim, subsample_size=size, subsample=index))
    return plates


def is_part(frame: Any) -> bool:
    """Whether a plate saw some of its rows."""
    return frame.full_size is not None and frame.full_size != frame.size


@contextmanager
def model_on(guide: Any, rows: Rows | None) -> Iterator[None]:
    """Give an autoguide's own runs of its model, which Pyro hides from what is around them, these rows."""
    if rows is None:
        yield
        return
    model = guide._model
    guide._model = (copy(rows)(model[0]),)
    try:
        yield
    finally:
        guide._model = model


def refuse_part_of_rows(guide: Any, plates: Collection[str]) -> None:
    """Raise a :class:`ModelError` if a guide over one vector of all latent sites has one that lies along the rows."""
    for name, site in guide.prototype_trace.iter_stochastic_nodes():
        for frame in site["cond_indep_stack"]:
            if frame.name in plates:
                raise ModelError(
                    f"{type(guide).__name__} has one vector for all latent sites, so it cannot take some rows of site "
                    f"{name!r} in plate {frame.name!r} and leave out the others; use MeanFieldNormal ('mean_field') or "
                    "pyro.infer.autoguide.AutoNormal, or all rows at once"
                )


def _part_of_param(value: Tensor, dim: int, index: Tensor) -> Tensor:
    """Entries of a parameter, with the link to the whole one that Pyro's optimizers follow."""
    whole = value._pyro_unconstrained_param if hasattr(value, "_pyro_unconstrained_param") else value.unconstrained()  # type: ignore[attr-defined]
    part: Any = value.index_select(dim, index.to(value.device))
    part._pyro_unconstrained_param = whole
    part.unconstrained = lambda: whole
    return part
