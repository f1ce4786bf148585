"""Batches that come from a data loader of the user's."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from pyro_vi_lab.batches import Batch, as_tensor, checked_size, is_array
from pyro_vi_lab.errors import ArgumentError, DataError, LabWarning
from pyro_vi_lab.isolation import seeded


class LoaderBatches(Iterator[Batch]):
    """Batches of a data loader without end, for which it is gone through again and again.

    A batch that is a tuple or a list holds the model's positional arguments, a dict its keyword arguments, anything
    else its only argument. Which rows a batch has, and that all have their turn, is the loader's business; its scale is
    N/B with the batch's own B. What the loader draws with torch's global generator, such as the order of the rows,
    comes from a state of its own that begins with ``seed``.

    Args:
        loader: A ``torch.utils.data.DataLoader``, or anything that can be iterated more than once.
        kwargs: Further keyword arguments of the model, the same for each batch.
        num_rows: Rows of the data, N.
        by_row: Which leaves of ``(args, kwargs)`` have one row for each row of the batch; all arrays by default.
        by_index: Which leaves, if any, say which rows these are.
        dtype: Type of floating-point data in a batch; others stay as they are.
        device: Where a batch lives.
        seed: Seed of what the loader draws.
        example: A batch of this loader: the others have to be like it.

    Raises:
        ArgumentError: The loader can be gone through only once.
        DataError: When the next batch is made: it is of another structure than the first one, or there is none.

    Example:
        >>> from torch.utils.data import DataLoader, TensorDataset
        >>> loader = DataLoader(TensorDataset(torch.arange(5.0), torch.ones(5)), batch_size=2)
        >>> batches = LoaderBatches(loader, {}, num_rows=5, dtype=torch.float64, device=torch.device("cpu"))
        >>> [(batch.args[0].tolist(), batch.scale) for batch in batches.epoch()]
        [([0.0, 1.0], 2.5), ([2.0, 3.0], 2.5), ([4.0], 5.0)]
    """

    def __init__(
        self,
        loader: Iterable[Any],
        kwargs: Mapping[str, Any],
        *,
        num_rows: int,
        by_row: Iterable[int] | None = None,
        by_index: Sequence[int] = (),
        dtype: torch.dtype,
        device: torch.device,
        seed: int = 0,
        example: Batch | None = None,
    ) -> None:
        _check_again(loader)
        self.loader, self.kwargs, self.num_rows = loader, dict(kwargs), num_rows
        self.dtype, self.device = dtype, device
        self._by_row, self._by_index = None if by_row is None else frozenset(by_row), by_index
        self._like = None if example is None else _signature(example.args, example.kwargs)
        self._random = torch.Generator().manual_seed(seed).get_state()
        self._epoch, self._warned = -1, False
        self._batches: Iterator[Any] = iter(())
        self._begin_epoch()

    def __next__(self) -> Batch:
        try:
            raw = self._drawn(lambda: next(self._batches))
        except StopIteration:
            raw = self._first_of_next_epoch()
        self._position += 1
        args, kwargs = _arguments(raw, self.kwargs, self.dtype, self.device)
        signature = _signature(args, kwargs)
        if self._like is None:
            self._like = signature
        if signature != self._like:
            raise DataError(
                f"batch {self._position - 1} of the loader is {_shown(signature)}; the first one was "
                f"{_shown(self._like)}"
            )
        leaves = _leaves(args, kwargs)
        size = self._size(leaves)
        self._rows += size
        index = leaves[self._by_index[0]] if self._by_index else None
        return Batch(args, kwargs, index, size, self.num_rows, self._epoch)

    def epoch(self) -> Iterator[Batch]:
        """Batches to the end of the present epoch, or of the next one if it has just ended."""
        first = next(self)
        yield first
        while True:
            # an epoch's end shows only when its next batch is asked for
            try:
                following = self._drawn(lambda: next(self._batches))
            except StopIteration:
                self._batches = iter(())
                return
            self._batches = itertools.chain([following], self._batches)
            yield next(self)

    def state(self) -> dict[str, Any]:
        """Where the iteration stands, for :meth:`restore`."""
        return {"num_rows": self.num_rows, "epoch": self._epoch, "position": self._position, "random": self._before}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on where ``state`` was taken, by reading the epoch's batches up to there once more.

        The same batches follow if all that the loader draws comes from torch's global generator.
        """
        if state["num_rows"] != self.num_rows:
            raise ArgumentError(f"the state is of {state['num_rows']} rows, this loader has {self.num_rows}")
        self._random, self._epoch = state["random"], state["epoch"] - 1
        self._begin_epoch()
        for _ in range(state["position"]):
            next(self)

    def _first_of_next_epoch(self) -> Any:
        if self._position:
            self._check_rows()
            self._begin_epoch()
            try:
                return self._drawn(lambda: next(self._batches))
            except StopIteration:
                pass
        raise DataError(
            f"the loader has no batches{' when it is gone through again' if self._epoch else ''}; give a DataLoader, a "
            "list of batches, or an object whose __iter__ starts anew each time"
        )

    def _begin_epoch(self) -> None:
        self._before = self._random
        self._batches = self._drawn(lambda: iter(self.loader))
        self._epoch += 1
        self._position = self._rows = 0

    def _drawn(self, make: Callable[[], Any]) -> Any:
        """What the loader gives when torch draws from a random state of the loader's own."""
        others = torch.get_rng_state()
        torch.set_rng_state(self._random)
        try:
            return make()
        finally:
            self._random = torch.get_rng_state()
            torch.set_rng_state(others)

    def _size(self, leaves: list[Any]) -> int:
        sizes = {
            len(leaf)
            for i, leaf in enumerate(leaves)
            if isinstance(leaf, Tensor) and leaf.dim() and (self._by_row is None or i in self._by_row)
        }
        if len(sizes) != 1:
            shapes = ", ".join(str(tuple(leaf.shape)) for leaf in leaves if isinstance(leaf, Tensor))
            raise DataError(
                f"batch {self._position - 1} of the loader has arguments of shapes {shapes}, whose first axes are not "
                "of one length: say with rows=[...] which of the model's arguments have one row for each row of a batch"
            )
        (size,) = sizes
        return size

    def _check_rows(self) -> None:
        if self._rows > self.num_rows:
            raise DataError(
                f"the loader gave {self._rows} rows in one epoch, but the data have {self.num_rows}, by which batches "
                "are scaled: say how many there are with num_rows="
            )
        if self._rows < self.num_rows / 2 and not self._warned:
            self._warned = True
            warnings.warn(
                f"the loader gave {self._rows} rows in one epoch, but the data have {self.num_rows}, by which batches "
                "are scaled; if that is not meant, say how many there are with num_rows=",
                LabWarning,
                stacklevel=3,
            )


def rows_of_loader(loader: Any, num_rows: Any = None) -> int:
    """Rows that a loader goes through: ``num_rows`` if given, else what its data set says.

    Raises:
        ArgumentError: The data set does not say, or the loader's sampler visits another number of rows.
    """
    if num_rows is not None:
        return checked_size(num_rows, "num_rows")
    dataset, sampler = getattr(loader, "dataset", None), getattr(loader, "sampler", None)
    if not isinstance(dataset, Sized):
        raise ArgumentError(
            "the loader does not say how many rows the data have, by which batches are scaled: give num_rows="
        )
    if isinstance(sampler, Sized) and getattr(loader, "batch_size", None) is not None and len(sampler) != len(dataset):
        raise ArgumentError(
            f"the loader's sampler visits {len(sampler)} rows of a data set of {len(dataset)}: say with num_rows= by "
            "which of them batches are scaled"
        )
    return len(dataset)


def peek(
    loader: Iterable[Any], kwargs: Mapping[str, Any], *, dtype: torch.dtype, device: torch.device
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments of the model in a first batch of a loader.

    Raises:
        ArgumentError: The loader cannot be gone through, or only once.
        DataError: The loader has no batches, or one that is not numeric.
    """
    _check_again(loader)
    with seeded(0):
        for batch in loader:
            return _arguments(batch, kwargs, dtype, device)
    raise DataError("the loader has no batches")


def _check_again(loader: Any) -> None:
    if not isinstance(loader, Iterable):
        raise ArgumentError(f"loader must be a DataLoader or another iterable of batches, got {type(loader).__name__}")
    if isinstance(loader, Iterator):
        raise ArgumentError(
            f"the loader is a {type(loader).__name__}, which can be gone through only once; give a DataLoader, a list "
            "of batches, or an object whose __iter__ starts anew each time"
        )


def _arguments(
    batch: Any, kwargs: Mapping[str, Any], dtype: torch.dtype, device: torch.device
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments of the model from what a loader yields."""
    if isinstance(batch, Mapping):
        args, kwargs = (), {**kwargs, **batch}
    else:
        args, kwargs = tuple(batch) if isinstance(batch, (tuple, list)) else (batch,), dict(kwargs)

    def converted(value: Any) -> Any:
        if isinstance(value, Tensor) or is_array(value):
            return as_tensor(value, dtype, device)
        return pytree.tree_map(converted, value) if isinstance(value, (tuple, list, dict)) else value

    return tuple(map(converted, args)), {key: converted(value) for key, value in kwargs.items()}


def _leaves(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Any]:
    """As ``tree_leaves``, which for a few tensors takes longer than they do."""
    values = (*args, *kwargs.values())
    return list(values) if all(isinstance(value, Tensor) for value in values) else pytree.tree_leaves(values)


def _signature(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, ...]:
    """What all batches of a loader have in common."""
    values = (*args, *kwargs.values())
    nested = tuple(pytree.tree_structure(value) for value in values if not isinstance(value, Tensor))
    kinds = tuple(
        (leaf.dtype, leaf.shape[1:]) if isinstance(leaf, Tensor) else type(leaf) for leaf in _leaves(args, kwargs)
    )
    return kinds, len(args), tuple(kwargs), nested


def _shown(signature: tuple[Any, ...]) -> str:
    parts = [
        f"{str(part[0]).removeprefix('torch.')} ({', '.join(['rows', *map(str, part[1])])})"
        if isinstance(part, tuple)
        else part.__name__
        for part in signature[0]
    ]
    return f"{len(parts)} arguments: {', '.join(parts)}"
