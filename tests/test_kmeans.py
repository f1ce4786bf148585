from __future__ import annotations

import itertools

import pytest
import torch

from pyro_vi_lab.errors import DataError
from pyro_vi_lab.kmeans import lloyd, nearest_center, spread_rows
from tests.mixtures import groups


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def test_every_start_has_a_row_of_each_group() -> None:
    X = groups(90, apart=50.0)
    chosen = spread_rows(X, 3, num_starts=8, generator=generator())
    assert chosen.shape == (8, 3)
    assert (chosen.remainder(3).sort(1).values == torch.arange(3)).all()
    assert not torch.equal(chosen[0], chosen[1])


def test_rows_without_weight_and_copies_are_never_chosen() -> None:
    X = torch.arange(6.0, dtype=torch.float64).repeat(3)[:, None] + 1e6
    weight = torch.ones(18, dtype=torch.float64)
    weight[X[:, 0] == 1e6] = 0.0
    chosen = spread_rows(X, 5, num_starts=4, generator=generator(), weight=weight)
    assert (X[chosen, 0].sort(1).values == 1e6 + torch.arange(1.0, 6.0, dtype=torch.float64)).all()


def test_fewer_different_rows_than_clusters() -> None:
    X = torch.tensor([[0.1, 0.3], [0.7, 0.2]], dtype=torch.float64).repeat(10, 1)
    with pytest.raises(DataError, match=r"X has 2 different row\(s\) \(of 20.*num_components=3"):
        spread_rows(X, 3, num_starts=2, generator=generator())


def test_steps_of_k_means_lower_the_sum_of_squares() -> None:
    X = groups(200, apart=1.0)
    centers = X[spread_rows(X, 4, num_starts=1, generator=generator())[0]]

    def inertia(labels: torch.Tensor) -> float:
        return sum(float((X[labels == k] - X[labels == k].mean(0)).square().sum()) for k in range(4))

    sums = [inertia(nearest_center(X, centers))] + [inertia(lloyd(X, centers, max_steps=t)) for t in range(1, 6)]
    assert all(after <= before + 1e-9 for before, after in itertools.pairwise(sums))
    assert sums[-1] < sums[0]
