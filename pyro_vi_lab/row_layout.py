"""How the rows of the data run through a model: the arguments, plates and sites that lie along them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from pyro_vi_lab.batches import Table, is_array
from pyro_vi_lab.errors import ArgumentError, DataError, ModelError
from pyro_vi_lab.isolation import model_run
from pyro_vi_lab.rows import subsamples
from pyro_vi_lab.sites import Site, Structure, read_structure
from pyro_vi_lab.user_errors import user_errors


@dataclass(frozen=True, eq=False)
class RowLayout:
    """Where the rows are.

    Args:
        num_rows: Rows of the data, N.
        batch_size: Rows of a batch, B.
        plates: Names of the plates that stand for the rows.
        axes: Axis of each site that lies along the rows, from the left.
        by_row: Leaves of ``(args, kwargs)`` with a row for each row of the data.
        by_index: Leaves that are the index of the batch's rows.
        fixed_size: Whether the model takes batches of no other size.
        why_not: Why no batches can be made, or nothing.
    """

    num_rows: int
    batch_size: int
    plates: tuple[str, ...]
    axes: Mapping[str, int]
    by_row: tuple[int, ...] = ()
    by_index: tuple[int, ...] = ()
    fixed_size: bool = False
    why_not: str = ""

    def site(self, site: Site, size: int | None = None) -> Site:
        """A site as it is when the model is run on ``size`` rows, or on all."""
        size = self.num_rows if size is None else size
        if site.name not in self.axes:
            return site
        axis = self.axes[site.name]

        def resized(shape: torch.Size) -> torch.Size:
            return torch.Size([size if i == axis else length for i, length in enumerate(shape)])

        return replace(
            site,
            shape=resized(site.shape),
            # a latent site lies along the rows with a batch dimension, which the change of variables keeps
            unconstrained_shape=resized(site.unconstrained_shape),
            plates=tuple((p[0], size) if p and p[0] in self.plates else p for p in site.plates),
        )

    def structure(self, structure: Structure) -> Structure:
        """The structure of the model on all rows."""
        return replace(structure, sites={name: self.site(site) for name, site in structure.sites.items()})


# --- plates that follow their data ---------------------------------------------------------------------------------


def layout_by_slices(
    model: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    labels: Sequence[str],
    *,
    rows: Sequence[str] | Mapping[str, int] | None,
    batch_size: int,
    name: str,
    dtype: torch.dtype,
    device: torch.device,
) -> tuple[RowLayout, Structure]:
    """Find out which arguments, plates and sites have the rows, by running the model on two numbers of rows.

    Arguments of one length are cut together. They are by row if the model can be run on a part of them and its observed
    sites follow; the plates that change their sizes with the rows stand for them.

    Args:
        model: The Pyro model.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        labels: Names of the leaves of the arguments.
        rows: Names of the arguments by row, if the user said so.
        batch_size: Rows in a batch.
        name: What to call the model in messages.
        dtype: Type of floating-point data.
        device: Where batches live.

    Returns:
        The layout, and the structure of the model on all rows.

    Raises:
        ArgumentError: ``rows`` names no arguments, or it is not clear which arguments are by row.
        ModelError: The model cannot be run on some of its rows, or a site along the rows stands in no plate.
        DataError: As of :func:`~pyro_vi_lab.sites.read_structure`.
    """
    leaves = pytree.tree_leaves((args, dict(kwargs)))
    groups: dict[int, list[int]] = {}
    for i in _asked(rows, leaves, labels, name) if rows is not None else range(len(leaves)):
        if is_array(leaves[i]):
            groups.setdefault(len(leaves[i]), []).append(i)

    def told(positions: Sequence[int]) -> str:
        return ", ".join(dict.fromkeys(labels[i] for i in positions))

    if rows is not None and len(groups) > 1:
        lengths = ", ".join(f"{told(positions)} of length {length}" for length, positions in groups.items())
        raise DataError(f"arguments by row need one length; model {name} got {lengths}")
    found: list[tuple[RowLayout, Structure]] = []
    failures: list[tuple[list[int], ModelError | DataError]] = []
    for length, positions in sorted(groups.items(), key=lambda group: (-len(group[1]), -group[0])):
        if length < 2:
            continue
        sizes = min(max(batch_size, 2), length)
        try:
            found.append(
                _layout_of(
                    model,
                    Table(args, kwargs, by_row=positions, num_rows=length, dtype=dtype, device=device),
                    (sizes, sizes + 1 if sizes < length else sizes - 1),
                    batch_size=min(batch_size, length),
                    name=name,
                )
            )
        except (ModelError, DataError) as error:
            if isinstance(error, DataError) and error.__cause__ is None:
                raise  # the data themselves are wrong, however they are cut
            failures.append((positions, error))
    if len(found) == 1:
        return found[0]
    if found:
        choices = " or ".join(f"{told(layout.by_row)} ({layout.num_rows} rows)" for layout, _ in found)
        raise ArgumentError(
            f"the rows of model {name} could be those of {choices}: say which, rows=[{told(found[0][0].by_row)!r}]"
        )
    if not failures:
        raise ArgumentError(
            f"minibatch needs arguments of model {name} with one row for each of two or more rows of the data; it has "
            f"{told(range(len(leaves))) or 'no arguments'}"
        )
    positions, failure = next((item for item in failures if not isinstance(item[1], _NoRows)), failures[0])
    if failure.__cause__ is None:
        raise failure if isinstance(failure, DataError) else ModelError(str(failure))
    hint = "a plate of the rows needs the size of the data that it gets, len(...)"
    if rows is None and len(positions) > 1:
        hint += f"; arguments that are not by row have to be left out: rows=[{labels[positions[0]]!r}, ...]"
    raise ModelError(
        f"model {name} cannot be run on some of the rows of {told(positions)} (minibatch; {hint}): {failure}"
    ) from failure.__cause__


class _NoRows(ModelError):
    """No observed site follows the arguments that were cut."""


def _asked(
    rows: Sequence[str] | Mapping[str, int], leaves: Sequence[Any], labels: Sequence[str], name: str
) -> list[int]:
    """Leaves that the user said to be by row."""
    if isinstance(rows, str):
        rows = [rows]
    if isinstance(rows, Mapping):
        for key, axis in rows.items():
            if axis != 0:
                raise ArgumentError(
                    f"rows says that the rows of argument {key!r} lie along axis {axis!r}; they have to lie along axis "
                    "0: move it there (torch.movedim, numpy.moveaxis)"
                )
    chosen: list[int] = []
    for key in rows:
        found = [
            i
            for i, label in enumerate(labels)
            if is_array(leaves[i]) and (label == key or label.startswith((f"{key}[", f"{key}.")))
        ]
        if not found:
            known = ", ".join(label for label, leaf in zip(labels, leaves, strict=True) if is_array(leaf))
            raise ArgumentError(f"rows names {key!r}; the data among the arguments of model {name} are {known}")
        chosen += found
    return chosen


def _layout_of(
    model: Callable[..., Any], table: Table, sizes: tuple[int, int], *, batch_size: int, name: str
) -> tuple[RowLayout, Structure]:
    batches = [table.take(torch.arange(size)) for size in sizes]
    one = read_structure(model, *batches[0], name=name, dtype=table.dtype)
    two = read_structure(model, *batches[1], name=name, dtype=table.dtype, num_runs=1)
    if plate := next(iter((*one.subsampled, *two.subsampled)), None):
        raise ModelError(
            f"plate {plate!r} of model {name} draws some of its rows itself (subsample_size), and minibatch= cuts the "
            "data: give only one of the two"
        )
    axes: dict[str, int] = {}
    plates: list[str] = []
    for key in sorted(set(one.sites) ^ set(two.sites)):
        raise structure_changes(key, name)
    for key, site in one.sites.items():
        axis = _axis(key, site, two.sites[key], sizes, name)
        if axis is None:
            continue
        axes[key] = axis
        plate_of_axis = site.plates[axis] if axis < len(site.plates) else None
        if plate_of_axis is not None:
            plates.append(plate_of_axis[0])
        elif site.kind != "deterministic":
            raise ModelError(
                f"{site.kind} site {key!r} of model {name} has a length that follows the rows, but stands in no plate "
                "for them, so that a batch of them would not be scaled to all rows: put it in a plate, with "
                f'pyro.plate("row", len(...)): ...; a site that couples its rows cannot be fitted in minibatches'
            )
    if not any(one.sites[key].kind in ("observed", "factor") for key in axes):
        raise _NoRows(
            f"no observed site of model {name} follows the rows of its data when it is run on some of them "
            "(minibatch); a plate for the rows needs the size of the data that it gets: pyro.plate('row', len(y))"
        )
    layout = RowLayout(
        num_rows=table.num_rows,
        batch_size=batch_size,
        plates=tuple(dict.fromkeys(plates)),
        axes=axes,
        by_row=tuple(sorted(table.by_row)),
    )
    return layout, layout.structure(one)


def structure_changes(key: str, name: str) -> ModelError:
    """Error for a site that is there for some numbers of rows only, or of another shape."""
    return ModelError(
        f"the structure of model {name} changes with the number of rows: site {key!r} is not the same for all numbers"
    )


def _axis(key: str, site: Site, other: Site, sizes: tuple[int, int], name: str) -> int | None:
    """The axis of a site that follows the rows."""
    if len(other.shape) != len(site.shape):
        raise structure_changes(key, name)
    changed = [i for i, (one, two) in enumerate(zip(site.shape, other.shape, strict=True)) if one != two]
    if not changed:
        return None
    if len(changed) > 1:
        raise ModelError(
            f"site {key!r} of model {name} lies along the rows with two axes ({site.dims[changed[0]]} and "
            f"{site.dims[changed[1]]}): pairs of rows cannot be fitted in minibatches of rows"
        )
    (axis,) = changed
    if (site.shape[axis], other.shape[axis]) != sizes:
        raise ModelError(
            f"site {key!r} of model {name} has length {site.shape[axis]} for {sizes[0]} rows and {other.shape[axis]} "
            f"for {sizes[1]}: a site along the rows needs one entry for each"
        )
    return axis


# --- plates that draw their rows themselves --------------------------------------------------------------------------


def layout_of_subsamples(
    model: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any], structure: Structure, *, name: str,
    dtype: torch.dtype,
) -> RowLayout:  # fmt: skip
    """The rows of a model whose plates see some of them (``subsample_size=`` or ``subsample=``)."""
    plates = structure.subsampled
    why_not, by_index, fixed_size = "", [], False
    (size, num_rows), *others = structure.sizes.values()
    if any(other != (size, num_rows) for other in others):
        seen = ", ".join(f"{plate!r} {size} of {whole}" for plate, (size, whole) in structure.sizes.items())
        why_not = f"its plates see different numbers of rows ({seen}), but a batch has rows of one kind"
    axes: dict[str, int] = {}
    for key, site in structure.sites.items():
        along = [i for i, plate in enumerate(site.plates) if plate and plate[0] in plates]
        if len(along) > 1:
            why_not = f"site {key!r} lies along the rows of two subsampled plates"
        if along:
            axes[key] = along[0]
    with user_errors(name), model_run(seed=0, dtype=dtype, validate=False):
        told = subsamples(model, plates, *args, **kwargs)
    leaves = pytree.tree_leaves((args, dict(kwargs)))
    for plate, (_, index) in told.items():
        if index is None:
            fixed_size = True
            continue
        index = torch.as_tensor(index)
        same = [
            i
            for i, leaf in enumerate(leaves)
            if isinstance(leaf, Tensor) and leaf.shape == index.shape and torch.equal(leaf.to(index), index)
        ]
        by_index += same
        if not same:
            why_not = (
                f"it draws the rows of plate {plate!r} itself (subsample=): pass them as an argument, or let the plate "
                "draw them (subsample_size=)"
            )
    return RowLayout(
        num_rows=num_rows,
        batch_size=size,
        plates=plates,
        axes=axes,
        by_index=tuple(dict.fromkeys(by_index)),
        fixed_size=fixed_size,
        why_not=why_not,
    )
