"""The data of a problem: held as a whole, read in batches, or coming from a loader."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.data import DataLoader

from pyro_vi_lab.arguments import as_array, labelled, mixes_types, to_tensors
from pyro_vi_lab.batches import Batch, Batches, Table, is_array, memory_map
from pyro_vi_lab.errors import ArgumentError, LabWarning, ModelError
from pyro_vi_lab.loader import LoaderBatches, peek, rows_of_loader
from pyro_vi_lab.row_layout import RowLayout, layout_by_slices, layout_of_subsamples
from pyro_vi_lab.row_sums import check_sum
from pyro_vi_lab.rows import Rows
from pyro_vi_lab.sites import Structure, read_structure

_T = TypeVar("_T")

WHOLE_NUMBERS = 2**24
"""Numbers in the data (128 MiB in float64) up to which they are also converted and checked as a whole."""


@dataclass(frozen=True, eq=False)
class Data:
    """Arguments of a model, and how to take some of their rows.

    Args:
        name: What to call the model in messages.
        args: Positional arguments; tensors where the data are held as a whole.
        kwargs: Keyword arguments.
        dtype: Type of floating-point data in the model.
        device: Where batches live.
        structure: Sites of the model on all rows.
        whole: Whether the data are held, and were checked, as a whole.
        layout: Where the rows are; ``None`` if the model sees all rows at once.
        loader: Where batches come from, if not from the arguments.
        first: First batch of the loader.
    """

    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    dtype: torch.dtype
    device: torch.device
    structure: Structure
    whole: bool = True
    layout: RowLayout | None = None
    loader: Iterable[Any] | None = None
    first: Batch | None = None

    @property
    def by_part(self) -> bool:
        """Whether the model is run on a part of the rows at a time."""
        return not self.whole or bool(self.structure.subsampled)

    @property
    def rows_of_batches(self) -> RowLayout:
        """Where the rows are.

        Raises:
            ArgumentError: The model sees all rows at once.
            ModelError: The rows that it sees cannot be chosen for it.
        """
        if self.layout is None:
            raise ArgumentError(f"problem {self.name} has no minibatch; say how many rows a batch has: minibatch=256")
        if self.layout.why_not:
            raise ModelError(f"model {self.name} cannot be run in batches: {self.layout.why_not}")
        return self.layout

    @property
    def example(self) -> Batch | None:
        """The first rows, or the first batch of the loader; ``None`` if the model sees all rows at once."""
        if self.layout is None:
            return None
        return self.first or self._batch(torch.arange(self.rows_of_batches.batch_size))

    def all_rows(self) -> tuple[tuple[Any, ...], dict[str, Any], Callable[[], AbstractContextManager[Any]]]:
        """Arguments with which the model sees all rows at once, and what it then has to be run in."""
        if self.layout is None:
            return self.args, self.kwargs, nullcontext
        layout = self.rows_of_batches
        if not self.whole:
            where = "are read batch by batch" if self.loader is None else "come from a data loader"
            raise ModelError(f"model {self.name} cannot be run on all rows of its data at once, which {where}")
        if layout.fixed_size:
            raise ModelError(
                f"model {self.name} cannot be run on all rows at once: its plate {layout.plates[0]!r} takes "
                f"{layout.batch_size} of its {layout.num_rows} rows (subsample_size); give the plate the size of its "
                "data, len(...), and the problem minibatch="
            )
        batch = self._batch(torch.arange(layout.num_rows))
        return batch.args, batch.kwargs, lambda: self.rows(batch.index, batch.size)

    def batches(self, seed: int, *, fixed_size: bool) -> Batches | LoaderBatches:
        """Batches without end."""
        layout = self.rows_of_batches
        if self.loader is None:
            return Batches(self._table, layout.batch_size, seed=seed, fixed_size=fixed_size or layout.fixed_size)
        return LoaderBatches(
            self.loader,
            self.kwargs,
            num_rows=layout.num_rows,
            by_row=(*layout.by_row, *layout.by_index),
            by_index=layout.by_index,
            dtype=self.dtype,
            device=self.device,
            seed=seed,
            example=self.first,
        )

    def pieces(self) -> Iterator[tuple[Batch, int]]:
        """All rows in their order, batch by batch, with the number of those that count.

        A model that takes no smaller batch gets the last rows filled up with others, which do not.
        """
        layout = self.rows_of_batches
        if self.loader is not None:
            raise ModelError(
                f"the rows of model {self.name} come from a data loader, which does not say which ones they are: give "
                "the data as arrays (memory-mapped ones are read batch by batch)"
            )
        for start in range(0, layout.num_rows, layout.batch_size):
            kept = min(layout.batch_size, layout.num_rows - start)
            index = torch.arange(start, start + layout.batch_size)
            yield self._batch(index % layout.num_rows if layout.fixed_size else index[:kept]), kept

    def _batch(self, index: Tensor) -> Batch:
        args, kwargs = self._table.take(index)
        return Batch(args, kwargs, index.to(self.device), len(index), self.rows_of_batches.num_rows, 0)

    def rows(self, index: Tensor | None, size: int | None) -> Rows:
        """What model and guide have to be run in to see the rows of a batch."""
        layout = self.rows_of_batches
        return Rows(index, layout.num_rows, layout.plates, size=size)

    @cached_property
    def _table(self) -> Table:
        layout = self.rows_of_batches
        return Table(
            self.args,
            self.kwargs,
            by_row=layout.by_row,
            by_index=layout.by_index,
            num_rows=layout.num_rows,
            dtype=self.dtype,
            device=self.device,
        )


def read_arrays(
    model: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    *,
    minibatch: int | None,
    rows: Sequence[str] | Mapping[str, int] | None,
    name: str,
    dtype: torch.dtype | None = None,
) -> tuple[Data, dict[int, list[Any]]]:
    """Read the structure of a model from its arguments, and convert these unless they are too large for that.

    Returns:
        The data, and the labels of the rows in pandas data by the number of rows.
    """
    if rows is not None and minibatch is None:
        raise ArgumentError(
            "rows says which arguments are cut into batches; say how many rows these have: minibatch=256"
        )
    leaves = pytree.tree_leaves((args, dict(kwargs)))
    if any(isinstance(leaf, DataLoader) for leaf in leaves):
        raise ArgumentError("a DataLoader takes the place of the model's arguments: Problem(model, loader=...)")
    labels, index_coords = labelled(model, args, kwargs), dict[int, list[Any]]()
    arrays = {id(leaf): as_array(label, leaf, index_coords) for label, leaf in zip(labels, leaves, strict=True)}
    raw: tuple[tuple[Any, ...], dict[str, Any]] = pytree.tree_map(lambda leaf: arrays[id(leaf)], (args, dict(kwargs)))
    leaves = pytree.tree_leaves(raw)
    device = _device(leaves, model)

    def cut(args: tuple[Any, ...], kwargs: Mapping[str, Any], dtype: torch.dtype) -> tuple[RowLayout, Structure]:
        size = minibatch or 1
        how: dict[str, Any] = {"rows": rows, "batch_size": size, "name": name, "dtype": dtype, "device": device}
        return layout_by_slices(model, args, kwargs, labels, **how)

    def read(dtype: torch.dtype) -> Data:
        converted = to_tensors(*raw, dtype)
        structure = read_structure(model, *converted, name=name, dtype=dtype)
        return Data(name, converted[0], converted[1], dtype, device, structure)

    if minibatch is not None and not _is_moderate(leaves):
        own, (layout, structure) = _in_some_dtype(lambda dtype: cut(*raw, dtype), name, dtype)
        return Data(name, *raw, own, device, structure, whole=False, layout=layout), index_coords
    _, data = _in_some_dtype(read, name, dtype)
    if data.structure.subsampled:
        layout = layout_of_subsamples(model, data.args, data.kwargs, data.structure, name=name, dtype=data.dtype)
        _check_asked(minibatch, rows, layout, name)
        data = replace(data, layout=layout, structure=layout.structure(data.structure))
    elif minibatch is not None:
        data = replace(data, layout=cut(data.args, data.kwargs, data.dtype)[0])
        check_sum(model, data._table, data.rows_of_batches, name=name)
    return data, index_coords


def read_loader(
    model: Callable[..., Any],
    loader: Iterable[Any],
    kwargs: Mapping[str, Any],
    *,
    minibatch: int | None,
    rows: Sequence[str] | Mapping[str, int] | None,
    num_rows: int | None,
    name: str,
    dtype: torch.dtype | None = None,
) -> Data:
    """Read the structure of a model from the first batch of a data loader."""
    total, device = rows_of_loader(loader, num_rows), _device((), model)

    def read(dtype: torch.dtype) -> Data:
        batch = peek(loader, kwargs, dtype=dtype, device=device)
        structure = read_structure(model, *batch, name=name, dtype=dtype)
        if structure.subsampled:
            layout = layout_of_subsamples(model, *batch, structure, name=name, dtype=dtype)
            if layout.num_rows != total:
                raise ArgumentError(
                    f"plate {layout.plates[0]!r} of model {name} has {layout.num_rows} rows, the loader {total}; "
                    "if that is meant, give num_rows="
                )
            if layout.fixed_size:
                raise ModelError(
                    f"plate {layout.plates[0]!r} of model {name} draws its rows itself (subsample_size) whereas the "
                    "loader chooses them: give the plate the size of the batch, len(...)"
                )
        else:
            labels = labelled(model, *batch)
            how: dict[str, Any] = {"rows": rows, "batch_size": 2**62, "name": name, "dtype": dtype, "device": device}
            layout, structure = layout_by_slices(model, *batch, labels, **how)
        first = Batch(*batch, None, layout.batch_size, total, 0)
        if minibatch not in (None, first.size):
            raise ArgumentError(
                f"minibatch is {minibatch}, but the loader's batches have {first.size} rows: leave out minibatch"
            )
        layout = replace(layout, num_rows=total)
        structure = layout.structure(structure)
        return Data(name, (), dict(kwargs), dtype, device, structure, False, layout, loader, first)

    return _in_some_dtype(read, name, dtype)[1]


def _check_asked(minibatch: Any, rows: Any, layout: RowLayout, name: str) -> None:
    if minibatch not in (None, layout.batch_size):
        raise ArgumentError(
            f"minibatch is {minibatch}, but plate {layout.plates[0]!r} of model {name} sees {layout.batch_size} of its "
            "rows: leave out one of the two"
        )
    if rows is not None:
        raise ArgumentError(
            f"rows says which arguments are cut into batches, but plate {layout.plates[0]!r} of model {name} takes its "
            "rows itself (subsample_size, subsample): leave out one of the two"
        )


def _in_some_dtype(read: Callable[[torch.dtype], _T], name: str, asked: torch.dtype | None) -> tuple[torch.dtype, _T]:
    """Read in the type asked for, or in float64 if the model's own tensors mix with it, or in the default type."""
    if asked is not None:
        return asked, read(asked)
    own = torch.get_default_dtype()
    dtypes = [torch.float64] if own == torch.float64 else [torch.float64, own]
    for i, dtype in enumerate(dtypes):
        try:
            result = read(dtype)
        except ModelError as error:
            if i + 1 < len(dtypes) and mixes_types(error):
                continue
            raise
        if dtype != torch.float64:
            warnings.warn(
                f"model {name} holds {dtype} tensors of its own, so it runs in {dtype}; pass them as arguments, or "
                "make them float64, for the full precision",
                LabWarning,
                stacklevel=4,
            )
        return dtype, result
    raise AssertionError("unreachable")


def _device(leaves: Iterable[Any], model: Any) -> torch.device:
    """Where the data are, or the model's parameters."""
    parameters = model.parameters() if isinstance(model, nn.Module) else ()
    tensors = [leaf for leaf in (*leaves, *parameters) if isinstance(leaf, Tensor)]
    return tensors[0].device if tensors else torch.device("cpu")


def _is_moderate(leaves: Iterable[Any]) -> bool:
    """Whether the data are in memory and small enough to be converted as a whole."""
    arrays = [leaf for leaf in leaves if is_array(leaf)]
    numbers = sum(int(np.prod(leaf.shape)) for leaf in arrays)
    return numbers <= WHOLE_NUMBERS and not any(memory_map(leaf) is not None for leaf in arrays)
