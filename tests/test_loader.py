"""Batches of a data loader: its order, its randomness, and what is wrong with it in the user's words."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset, SubsetRandomSampler, TensorDataset

from pyro_vi_lab.batches import Batch
from pyro_vi_lab.errors import ArgumentError, DataError, LabError, LabWarning
from pyro_vi_lab.loader import LoaderBatches, peek, rows_of_loader

CPU = torch.device("cpu")
X, Y = torch.arange(20.0).reshape(10, 2), torch.arange(10)


def batches_of(loader: Any, num_rows: int = 10, seed: int = 0, **kwargs: Any) -> LoaderBatches:
    return LoaderBatches(loader, kwargs, num_rows=num_rows, dtype=torch.float64, device=CPU, seed=seed)


def shuffled() -> DataLoader[Any]:
    return DataLoader(TensorDataset(X, Y), batch_size=4, shuffle=True)


def rows(batches: list[Batch]) -> list[list[int]]:
    return [batch.args[1].tolist() for batch in batches]


class Dicts:
    """Batches of another library: no length, no data set."""

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for i in range(0, 10, 5):
            yield {"x": X[i : i + 5].numpy(), "y": Y[i : i + 5].numpy()}


# --- what a batch is ----------------------------------------------------------------------------------------


def test_tuples_are_positional_arguments() -> None:
    batches = batches_of(shuffled(), scale=2.0)
    epoch = list(batches.epoch())
    assert [batch.size for batch in epoch] == [4, 4, 2]
    assert [batch.scale for batch in epoch] == [2.5, 2.5, 5.0]
    assert sorted(row for batch in rows(epoch) for row in batch) == list(range(10))
    for batch in epoch:
        assert torch.equal(batch.args[0], X[batch.args[1]].double())
        assert batch.kwargs == {"scale": 2.0}
        assert batch.index is None


def test_dicts_are_keyword_arguments_and_anything_else_is_the_only_one() -> None:
    (first, _) = batches_of(Dicts(), scale=2.0).epoch()
    assert first.args == ()
    assert first.kwargs["scale"] == 2.0
    assert torch.equal(first.kwargs["x"], X[:5].double())
    (only,) = batches_of([Y]).epoch()
    assert torch.equal(only.args[0], Y)


def test_epochs_follow_each_other() -> None:
    batches = batches_of(shuffled())
    taken = list(itertools.islice(batches, 7))
    assert [batch.epoch for batch in taken] == [0, 0, 0, 1, 1, 1, 2]
    rest = list(batches.epoch())
    assert [batch.epoch for batch in rest] == [2, 2]
    assert len(list(batches.epoch())) == 3


def test_the_first_batch_is_one_of_the_loader() -> None:
    args, kwargs = peek(shuffled(), {"scale": 1}, dtype=torch.float64, device=CPU)
    assert torch.equal(args[0], X[args[1]].double())
    assert kwargs == {"scale": 1}


# --- randomness -----------------------------------------------------------------------------------------------


def test_the_order_depends_on_the_seed_and_on_nothing_else() -> None:
    def orders(seed: int) -> list[list[int]]:
        batches = batches_of(shuffled(), seed=seed)
        made = []
        for _ in range(6):
            torch.rand(3)  # what the fit draws in between
            made += rows([next(batches)])
        return made

    torch.manual_seed(1)
    one = orders(3)
    torch.manual_seed(2)
    before = torch.get_rng_state()
    two = orders(3)
    assert one == two != orders(4)
    torch.manual_seed(2)
    assert torch.equal(torch.get_rng_state(), before)
    assert one[:3] != one[3:]


@pytest.mark.parametrize("steps", [0, 1, 2, 3, 4, 5, 7])
def test_a_state_that_is_restored_goes_on_with_the_same_batches(steps: int) -> None:
    batches = batches_of(shuffled(), seed=1)
    for _ in range(steps):
        next(batches)
    other = batches_of(shuffled(), seed=2)
    other.restore(batches.state())
    one, two = (list(itertools.islice(each, 8)) for each in (batches, other))
    assert rows(one) == rows(two)
    assert [batch.epoch for batch in one] == [batch.epoch for batch in two]
    with pytest.raises(ArgumentError, match="of 10 rows, this loader has 11"):
        batches_of(shuffled(), num_rows=11).restore(batches.state())


# --- how many rows ----------------------------------------------------------------------------------------------


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        return iter(X)


def test_the_number_of_rows_is_that_of_the_data_set() -> None:
    assert rows_of_loader(shuffled()) == 10
    assert rows_of_loader(DataLoader(TensorDataset(X), batch_size=4, drop_last=True)) == 10
    assert rows_of_loader([1], 7) == 7
    assert rows_of_loader(DataLoader(TensorDataset(X), sampler=SubsetRandomSampler(range(4))), 4) == 4


BAD_NUMBERS: dict[str, tuple[Any, Any, str]] = {
    "a list": ([X], None, "does not say how many rows"),
    "a stream": (DataLoader(Stream(), batch_size=2), None, "does not say how many rows"),
    "a subset": (
        DataLoader(TensorDataset(X), sampler=SubsetRandomSampler(range(4))),
        None,
        "visits 4 rows of a data set of 10",
    ),
    "half a row": ([X], 2.5, "num_rows must be a positive whole number of rows, got 2.5"),
    "no rows": ([X], 0, "num_rows must be a positive whole number of rows, got 0"),
}


@pytest.mark.parametrize("name", BAD_NUMBERS)
def test_a_number_of_rows_that_is_not_known(name: str) -> None:
    loader, num_rows, message = BAD_NUMBERS[name]
    with pytest.raises(ArgumentError, match=message):
        rows_of_loader(loader, num_rows)


# --- what can be wrong ------------------------------------------------------------------------------------------


class Once:
    """Empty when it is gone through again."""

    def __init__(self) -> None:
        self.left = [X[:5], X[5:]]

    def __iter__(self) -> Iterator[Any]:
        while self.left:
            yield self.left.pop()


BAD: dict[str, tuple[Callable[[], Any], type[LabError], str]] = {
    "a generator": (
        lambda: (X for _ in range(2)),
        ArgumentError,
        "is a generator, which can be gone through only once",
    ),
    "an iterator": (lambda: iter([X]), ArgumentError, "list_iterator, which can be gone through only once"),
    "no loader": (lambda: 3, ArgumentError, "must be a DataLoader or another iterable of batches, got int"),
    "used up": (Once, DataError, "no batches when it is gone through again"),
    "empty": (lambda: [], DataError, "the loader has no batches"),
    "other width": (
        lambda: [X[:5], X[5:, :1]],
        DataError,
        r"batch 1 of the loader is 1 arguments: float64 \(rows, 1\); the first one was 1 arguments: float64 \(rows, 2\)",
    ),
    "other type": (lambda: [X[:5], Y[5:]], DataError, "batch 1 of the loader is"),
    "other number": (lambda: [(X[:5], Y[:5]), (X[5:],)], DataError, "batch 1 of the loader is 1 arguments"),
    "other names": (lambda: [{"x": X[:5]}, {"z": X[5:]}], DataError, "batch 1 of the loader is"),
    "other lengths": (lambda: [(X[:5], Y[:4])], DataError, r"shapes \(5, 2\), \(4,\), whose first axes.*rows=\["),
    "too many rows": (lambda: [X, X], DataError, "gave 20 rows in one epoch, but the data have 10"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_loader_that_is_not_right_is_named(name: str) -> None:
    make, kind, message = BAD[name]
    with pytest.raises(kind, match=message):
        list(itertools.islice(batches_of(make()), 4))


def test_arguments_that_are_not_by_row_may_have_other_lengths() -> None:
    loader = [(X[:5], torch.zeros(3)), (X[5:], torch.ones(3))]
    batches = LoaderBatches(loader, {}, num_rows=10, by_row=[0], dtype=torch.float64, device=CPU)
    assert [batch.size for batch in batches.epoch()] == [5, 5]


def test_far_too_few_rows_are_warned_of_once() -> None:
    batches = batches_of([X[:4]])
    next(batches)
    with pytest.warns(LabWarning, match="gave 4 rows in one epoch, but the data have 10"):
        next(batches)
    next(batches)


def test_arrays_become_tensors() -> None:
    (batch,) = batches_of([(np.ones((10, 2), dtype=np.float32), np.arange(10))]).epoch()
    assert [value.dtype for value in batch.args] == [torch.float64, torch.int64]
