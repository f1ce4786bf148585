"""Batches: every row once an epoch, each batch a uniformly random set, memory that stays flat."""

from __future__ import annotations

import io
import itertools
import math
import os
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from pyro_vi_lab.batches import Batch, Batches, Table, as_tensor, checked_size, memory_map
from pyro_vi_lab.errors import ArgumentError

LEVEL = 5e-7
"""A right answer has a smaller p-value once in two million tests, as it has an error of five standard errors."""
CPU = torch.device("cpu")


def table(num_rows: int) -> Table:
    return Table((torch.arange(num_rows),), {}, by_row=[0], num_rows=num_rows, dtype=torch.float64, device=CPU)


def rows(batches: list[Batch]) -> list[int]:
    return [int(row) for batch in batches for row in batch.index]  # type: ignore[union-attr]


sizes = st.tuples(st.integers(1, 40), st.integers(1, 50), st.integers(0, 5))


# --- epochs --------------------------------------------------------------------------------------------------


@given(sizes)
def test_an_epoch_visits_every_row_once(size: tuple[int, int, int]) -> None:
    num_rows, batch_size, seed = size
    batches = Batches(table(num_rows), batch_size, seed=seed)
    for number in range(3):
        epoch = list(batches.epoch())
        assert sorted(rows(epoch)) == list(range(num_rows))
        assert len(epoch) == batches.batches_per_epoch == math.ceil(num_rows / batch_size)
        assert [batch.size for batch in epoch[:-1]] == [min(batch_size, num_rows)] * (len(epoch) - 1)
        assert {batch.epoch for batch in epoch} == {number}
        for batch in epoch:
            assert batch.index is not None
            assert batch.index.tolist() == batch.args[0].tolist() == sorted(batch.index.tolist())
            assert batch.scale == num_rows / batch.size


@given(sizes)
def test_batches_of_a_fixed_size_visit_every_row_once_in_every_num_rows(size: tuple[int, int, int]) -> None:
    """A batch has no row twice, and the rows that batches begin with, N at a time, are all rows."""
    num_rows, batch_size, seed = size
    batches = Batches(table(num_rows), batch_size, seed=seed, fixed_size=True)
    taken = list(itertools.islice(batches, 3 * num_rows))
    assert {batch.size for batch in taken} == {min(batch_size, num_rows)}
    assert all(len(set(rows([batch]))) == batch.size for batch in taken)
    # after k batches every row has been visited k B / N times, rounded down or up
    counts: Counter[int] = Counter()
    for k, batch in enumerate(taken, 1):
        counts.update(rows([batch]))
        visits = k * batch.size / num_rows
        assert {counts[row] for row in range(num_rows)} <= {math.floor(visits), math.ceil(visits)}
        assert batch.epoch == math.floor((k - 1) * batch.size / num_rows)


@given(sizes)
def test_epochs_of_a_fixed_size_end_where_their_rows_end(size: tuple[int, int, int]) -> None:
    num_rows, batch_size, seed = size
    batches = Batches(table(num_rows), batch_size, seed=seed, fixed_size=True)
    for number in range(4):
        assert {batch.epoch for batch in batches.epoch()} <= {number}
    assert next(batches).epoch == 4 or batch_size > 1


@given(sizes, st.integers(0, 30))
def test_the_sum_over_an_epoch_is_exact(size: tuple[int, int, int], seed: int) -> None:
    """Scaled by N/B and weighted by B/N, with whole numbers as what each row says."""
    num_rows, batch_size, _ = size
    says = torch.randint(-1000, 1000, (num_rows,), generator=torch.Generator().manual_seed(seed))
    batches = Batches(table(num_rows), batch_size, seed=seed)
    total = sum(batch.size / num_rows * (batch.scale * float(says[batch.index].sum())) for batch in batches.epoch())
    assert total == pytest.approx(float(says.sum()), rel=1e-12, abs=1e-9)


@pytest.mark.parametrize("fixed_size", [False, True])
def test_every_batch_is_a_uniformly_random_set(fixed_size: bool) -> None:
    """The last batch of an epoch too, and the one that goes on into the next: all pairs of rows are equally frequent."""
    num_rows, batch_size, number = 7, 3, 3500
    pairs = list(itertools.combinations(range(num_rows), 2))
    counts = [Counter[tuple[int, int]]() for _ in range(3)]
    for seed in range(number):
        batches = Batches(table(num_rows), batch_size, seed=seed, fixed_size=fixed_size)
        for place, batch in enumerate(itertools.islice(batches, 3)):
            counts[place].update(itertools.combinations(batch.index.tolist(), 2))  # type: ignore[union-attr]
    for place, count in enumerate(counts):
        if place == 2 and not fixed_size:
            assert not count  # the last row is on its own
            continue
        # three pairs of a batch exclude each other in part: each pair's count is binomial
        share = math.comb(batch_size, 2) / len(pairs)
        for pair in pairs:
            assert stats.binomtest(count[pair], number, share).pvalue > LEVEL / len(pairs)


def test_the_order_depends_on_the_seed_and_changes_from_epoch_to_epoch() -> None:
    def epochs(seed: int) -> list[list[int]]:
        batches = Batches(table(50), 50 // 5, seed=seed)
        return [rows(list(batches.epoch())) for _ in range(3)]

    before = torch.get_rng_state()
    one, two, other = epochs(3), epochs(3), epochs(4)
    assert one == two != other
    assert one[0] != one[1] != one[2]
    assert torch.equal(torch.get_rng_state(), before)


@given(sizes, st.integers(0, 60), st.booleans())
def test_a_state_that_is_restored_goes_on_with_the_same_batches(
    size: tuple[int, int, int], steps: int, fixed_size: bool
) -> None:
    num_rows, batch_size, seed = size
    batches = Batches(table(num_rows), batch_size, seed=seed, fixed_size=fixed_size)
    for _ in range(steps):
        next(batches)
    file = io.BytesIO()
    torch.save(batches.state(), file)
    file.seek(0)
    other = Batches(table(num_rows), batch_size, seed=seed + 1, fixed_size=fixed_size)
    other.restore(torch.load(file, weights_only=True))
    for one, two in itertools.islice(zip(batches, other, strict=True), 50):
        assert (one.index.tolist(), one.epoch) == (two.index.tolist(), two.epoch)  # type: ignore[union-attr]


def test_a_state_of_other_batches_is_refused() -> None:
    state = Batches(table(10), 3).state()
    with pytest.raises(ArgumentError, match="batch_size 3, these have 4"):
        Batches(table(10), 4).restore(state)
    with pytest.raises(ArgumentError, match="num_rows 10, these have 11"):
        Batches(table(11), 3).restore(state)


@pytest.mark.parametrize("size", [0, -1, 2.0, "3", None, True])
def test_a_size_that_is_no_number_of_rows(size: Any) -> None:
    with pytest.raises(ArgumentError, match="batch_size must be a positive whole number of rows, got"):
        Batches(table(5), size)
    assert checked_size(np.int64(3), "minibatch") == 3


# --- arguments by row -------------------------------------------------------------------------------------------

X = np.arange(12.0).reshape(6, 2)
BY_ROW: dict[str, Any] = {
    "float64 tensor": torch.tensor(X),
    "float32 tensor": torch.tensor(X, dtype=torch.float32),
    "whole numbers": torch.tensor(X, dtype=torch.int32),
    "array": X,
    "float32 array": X.astype(np.float32),
    "big-endian array": X.astype(">f4"),
    "bytes": X.astype(np.uint8),
    "bools": X > 5,
    "columns first": np.asfortranarray(X),
    "backwards": X[::-1].copy()[::-1],
    "not contiguous": np.repeat(X, 2, axis=1)[:, ::2],
}


@pytest.mark.parametrize("name", BY_ROW)
def test_rows_of_data_in_any_form(name: str) -> None:
    data = BY_ROW[name]
    taken = Table(
        (1, {"data": data}), {"scale": torch.ones(2)}, by_row=[1], num_rows=6, dtype=torch.float64, device=CPU
    )
    args, kwargs = taken.take(torch.tensor([1, 4]))
    found = args[1]["data"]
    torch.testing.assert_close(found, torch.tensor(np.asarray(data)[[1, 4]].astype(found.numpy().dtype)))
    assert found.dtype == (torch.float64 if np.asarray(data).dtype.kind == "f" else found.dtype)
    assert args[0] == 1
    assert kwargs["scale"].dtype == torch.float64


def test_the_index_itself_can_be_an_argument() -> None:
    made = Table((torch.zeros(6), torch.tensor([0, 1])), {}, by_row=[], by_index=[1], num_rows=6, dtype=torch.float64, device=CPU)  # fmt: skip
    args, _ = made.take(torch.tensor([2, 5]))
    assert args[0].shape == (6,)
    assert args[1].tolist() == [2, 5]


def test_arrays_are_copied() -> None:
    array = X.copy()
    tensor = as_tensor(array, torch.float64)
    array[:] = 0
    assert torch.equal(tensor, torch.tensor(X))


# --- data on disk -------------------------------------------------------------------------------------------------


def resident() -> int:
    """Bytes of this process's memory, mapped files included."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def on_disk(path: Path, num_rows: int, width: int) -> None:
    """A file whose rows all hold their own number."""
    with path.open("wb") as file:
        for start in range(0, num_rows, 10_000):
            part = np.arange(start, min(start + 10_000, num_rows), dtype=np.float32)
            file.write(np.repeat(part[:, None], width, axis=1).tobytes())


@pytest.mark.parametrize("mode", ["r", "r+", "c"])
def test_memory_mapped_rows(tmp_path: Path, mode: Any) -> None:
    on_disk(tmp_path / "data", 1000, 3)
    data = np.memmap(tmp_path / "data", dtype=np.float32, mode=mode, shape=(1000, 3))
    if mode != "r":
        data[17] = -5.0  # not yet on disk, or never: it must not be lost
    batches = Batches(Table((data[:900],), {}, by_row=[0], num_rows=900, dtype=torch.float64, device=CPU), 64)
    for _ in range(2):
        for batch in batches.epoch():
            assert batch.index is not None
            expected = batch.index.double()
            if mode != "r":
                expected[expected == 17] = -5.0
            assert torch.equal(batch.args[0], expected[:, None].expand(-1, 3))


def test_what_is_memory_mapped(tmp_path: Path) -> None:
    np.save(tmp_path / "data.npy", X)
    data = np.load(tmp_path / "data.npy", mmap_mode="r")
    for view in (data, data[1:], data.T, np.asarray(data), data.view(np.ndarray)[::2]):
        assert memory_map(view) is not None
    for other in (X, data.copy(), np.array(data), data[[0, 1]], torch.zeros(3), 1.0):
        assert memory_map(other) is None


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")
def test_memory_stays_flat(tmp_path: Path) -> None:
    """Two thousand batches of 256 rows go twice through 250,000 rows of 1200 bytes, 300 MB."""
    on_disk(tmp_path / "data", 250_000, 300)
    data = np.memmap(tmp_path / "data", dtype=np.float32, mode="r", shape=(250_000, 300))
    batches = Batches(Table((data,), {}, by_row=[0], num_rows=len(data), dtype=torch.float64, device=CPU), 256)
    next(batches)
    before = largest = resident()
    for batch in itertools.islice(batches, 2000):
        assert torch.equal(batch.args[0][:, -1], batch.index.double())  # type: ignore[union-attr]
        largest = max(largest, resident())
    assert largest - before < 30e6
