"""Batches of rows: every row once an epoch, from data that need not fit in memory."""

from __future__ import annotations

import math
import mmap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils import _pytree as pytree

from pyro_vi_lab.errors import ArgumentError


@dataclass(frozen=True, eq=False)
class Batch:
    """Some of the rows, as arguments of the model.

    Args:
        args: Positional arguments of the model.
        kwargs: Its keyword arguments.
        index: Which rows these are, ascending; ``None`` for a data loader, which does not say.
        size: How many they are, B.
        num_rows: Rows of the data, N.
        epoch: Times that all rows had been visited before, counted from 0.

    Shape:
        index ``(B,)``, int64; arguments by row ``(B, ...)``.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    index: Tensor | None
    size: int
    num_rows: int
    epoch: int

    @property
    def scale(self) -> float:
        """N/B, by which what the batch says is multiplied."""
        return self.num_rows / self.size


class Table:
    """The arguments of a model, some of which have a row for each row of the data.

    These are read in part and never converted as a whole: of a memory-mapped file only the rows that are asked for are
    brought into memory, in ascending order, and its pages are given back afterwards.

    Args:
        args: Positional arguments: tensors, NumPy arrays (memory-mapped ones too), and anything that is no data.
        kwargs: Keyword arguments.
        by_row: Which leaves of ``(args, kwargs)`` have one row for each row of the data.
        by_index: Which leaves are the index of the batch's rows itself.
        num_rows: Number of rows, N.
        dtype: Type of floating-point data in a batch; others stay as they are.
        device: Where a batch lives.
    """

    def __init__(
        self,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        *,
        by_row: Sequence[int],
        by_index: Sequence[int] = (),
        num_rows: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.num_rows, self.dtype, self.device = num_rows, dtype, device
        self.by_row, self.by_index = frozenset(by_row), frozenset(by_index)
        leaves, self._spec = pytree.tree_flatten((args, dict(kwargs)))
        self._num_args, self._names = len(args), tuple(kwargs)
        values = (*args, *kwargs.values())
        self._flat = len(leaves) == len(values) and all(
            leaf is value for leaf, value in zip(leaves, values, strict=True)
        )
        self._leaves = [
            leaf if i in self.by_row else self._converted(leaf) if is_array(leaf) else leaf
            for i, leaf in enumerate(leaves)
        ]

    def take(self, index: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Arguments of the model for the rows ``index``, ascending, ``(B,)``."""
        leaves = []
        for i, leaf in enumerate(self._leaves):
            if i in self.by_row:
                leaf = self._converted(_rows_of(leaf, index))
            elif i in self.by_index:
                leaf = index.to(self.device)
            leaves.append(leaf)
        if self._flat:  # most are, and a batch takes less time than pytree
            return tuple(leaves[: self._num_args]), dict(zip(self._names, leaves[self._num_args :], strict=True))
        args, kwargs = pytree.tree_unflatten(leaves, self._spec)
        return tuple(args), kwargs

    def _converted(self, leaf: Any) -> Tensor:
        return as_tensor(leaf, self.dtype, self.device)


class Batches(Iterator[Batch]):
    r"""Batches of rows without end: epoch after epoch, each in a new random order that visits every row once.

    The last batch of an epoch is smaller if B does not divide N. Every batch, the last one too, is on its own a
    uniformly random set of its size, so that what it says, multiplied by N/B with its own B, is unbiased for what all
    rows say (of smaller batches with more variance). Over one epoch of batches :math:`b` the sums are exact:

    .. math:: \sum_b \frac{B_b}{N} \Big(\frac{N}{B_b} \sum_{i \in b} f_i\Big) = \sum_{i=1}^{N} f_i

    With ``fixed_size`` the rows that are left at the end of an epoch are filled up to a batch of B with the first rows
    of the next epoch, which are drawn so that no row is in it twice: all batches are of size B, each a uniformly random
    set, and every epoch still visits every row once.

    Args:
        table: The arguments by row.
        batch_size: Rows in a batch, B; more than there are rows mean all rows.
        seed: Seed of the orders.
        fixed_size: Whether all batches have B rows.

    Raises:
        ArgumentError: ``batch_size`` is not a positive whole number.

    Example:
        >>> table = Table(
        ...     (torch.arange(5.0),), {}, by_row=[0], num_rows=5, dtype=torch.float32, device=torch.device("cpu")
        ... )
        >>> batches = Batches(table, 2, seed=0)
        >>> [batch.index.tolist() for batch in batches.epoch()]
        [[0, 4], [1, 3], [2]]
        >>> next(batches).epoch
        1
    """

    def __init__(self, table: Table, batch_size: int, *, seed: int = 0, fixed_size: bool = False) -> None:
        self.table, self.num_rows = table, table.num_rows
        self.batch_size = min(checked_size(batch_size, "batch_size"), table.num_rows)
        self.fixed_size = fixed_size
        self._generator = torch.Generator().manual_seed(seed)
        self._epoch, self._position = -1, 0
        self._begin_epoch(torch.empty(0, dtype=torch.int64))

    @property
    def batches_per_epoch(self) -> int:
        """Batches that an epoch needs, N/B rounded up."""
        return math.ceil(self.num_rows / self.batch_size)

    def __next__(self) -> Batch:
        if self._position == self.num_rows:
            self._begin_epoch(self._order[:0])
        epoch, end = self._epoch, self._position + self.batch_size
        rows = self._order[self._position : end]
        self._position = min(end, self.num_rows)
        if self.fixed_size and len(rows) < self.batch_size:
            self._begin_epoch(rows)
            self._position = self.batch_size - len(rows)
            rows = torch.cat([rows, self._order[: self._position]])
        # a batch is a set of rows; in ascending order a file is read front to back
        index = rows.sort().values.long()
        args, kwargs = self.table.take(index)
        return Batch(args, kwargs, index.to(self.table.device), len(index), self.num_rows, epoch)

    def epoch(self) -> Iterator[Batch]:
        """Batches to the end of the present epoch, or of the next one if it has just ended."""
        if self._position == self.num_rows:
            self._begin_epoch(self._order[:0])
        epoch = self._epoch
        while self._epoch == epoch and self._position < self.num_rows:
            yield next(self)

    def state(self) -> dict[str, Any]:
        """Where the iteration stands, for :meth:`restore`: numbers and tensors, which ``torch.save`` takes."""
        return {
            "num_rows": self.num_rows,
            "batch_size": self.batch_size,
            "epoch": self._epoch,
            "position": self._position,
            "generator": self._before.clone(),
            "carried": self._carried.clone(),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on where ``state`` was taken: the same batches follow.

        Raises:
            ArgumentError: ``state`` is that of other batches.
        """
        for key in ("num_rows", "batch_size"):
            if state[key] != getattr(self, key):
                raise ArgumentError(f"the state is of batches with {key} {state[key]}, these have {getattr(self, key)}")
        self._generator.set_state(state["generator"])
        self._epoch = state["epoch"] - 1
        self._begin_epoch(state["carried"])
        self._position = state["position"]

    def _begin_epoch(self, carried: Tensor) -> None:
        """Draw the order of the next epoch; rows ``carried`` over from the last one may not come at its beginning."""
        self._before, self._carried = self._generator.get_state(), carried
        small = self.num_rows < 2**31
        order = torch.randperm(self.num_rows, generator=self._generator, dtype=torch.int32 if small else torch.int64)
        if len(carried):
            needed = self.batch_size - len(carried)
            clash = torch.isin(order[:needed], carried).nonzero()[:, 0]
            free = (~torch.isin(order[needed:], carried)).nonzero()[: len(clash), 0] + needed
            order[clash], order[free] = order[free], order[clash]
        self._order, self._position = order, 0
        self._epoch += 1


def checked_size(size: Any, name: str) -> int:
    """A number of rows that was asked for under ``name``, or an :class:`ArgumentError`."""
    if isinstance(size, bool) or not isinstance(size, (int, np.integer)) or size < 1:
        raise ArgumentError(f"{name} must be a positive whole number of rows, got {size!r}")
    return int(size)


def is_array(leaf: Any) -> bool:
    """Whether an argument is data: a tensor or an array with at least one axis."""
    return (isinstance(leaf, Tensor) and leaf.dim() > 0) or (isinstance(leaf, np.ndarray) and leaf.ndim > 0)


def memory_map(array: Any) -> np.memmap[Any, Any] | None:
    """The memory-mapped array that ``array`` is a view of, or ``None``."""
    while isinstance(array, np.ndarray):
        if isinstance(array, np.memmap) and getattr(array, "_mmap", None) is not None:
            return array
        array = array.base
    return None


def as_tensor(leaf: Any, dtype: torch.dtype, device: torch.device | None = None) -> Tensor:
    """A tensor of the data, floating-point data in ``dtype``; arrays are copied."""
    if isinstance(leaf, np.ndarray):
        native = leaf if leaf.dtype.isnative else leaf.astype(leaf.dtype.newbyteorder("="))
        leaf = torch.as_tensor(np.array(native))
    tensor: Tensor = leaf if device is None else leaf.to(device)
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


def _rows_of(leaf: Any, index: Tensor) -> Any:
    if isinstance(leaf, Tensor):
        return leaf.index_select(0, index.to(leaf.device))
    rows: NDArray[Any] = np.asarray(leaf)[index.numpy()]
    if (mapped := memory_map(leaf)) is not None:
        _give_back(mapped)
    return rows


def _give_back(array: np.memmap[Any, Any]) -> None:
    """Let go of a file's pages, which the process would keep for as long as the file is mapped.

    They stay in the system's cache, from where the next reading has them. Not of copy-on-write maps, whose changes are
    in the process's own pages.
    """
    if array.mode != "c" and hasattr(mmap, "MADV_DONTNEED"):
        array._mmap.madvise(mmap.MADV_DONTNEED)  # type: ignore[attr-defined]
