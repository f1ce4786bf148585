from __future__ import annotations

import pytest
import torch

from pyro_vi_lab.models.separation import separating


def table(num_rows: int = 40) -> torch.Tensor:
    X = torch.randn(num_rows, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return X * torch.tensor([1.0, 1e3, 1e-3, 1.0]) + torch.tensor([0.0, 5e3, 0.0, -2.0])


def test_one_column_is_named_whatever_its_scale() -> None:
    X = table()
    for column in range(4):
        above = X[:, column] > X[:, column].mean()
        assert separating(X, above) == (column,)
        assert separating(X, ~above) == (column,)


def test_columns_that_separate_together_are_named_and_no_others() -> None:
    X = table()
    assert separating(X, X[:, 0] + X[:, 3] > -2) == (0, 3)


def test_classes_that_overlap_are_not_separated() -> None:
    X = table()
    classes = X[:, 1] > 5e3
    classes[:2] = ~classes[:2]
    assert separating(X, classes) == ()
    assert separating(X, torch.zeros(40)) == ()


def test_rows_on_the_border_may_be_of_either_class() -> None:
    X = torch.tensor([[0.0], [1.0], [2.0], [2.0], [3.0]])
    assert separating(X, torch.tensor([0, 0, 0, 1, 1])) == (0,)
    assert separating(X, torch.tensor([0, 1, 0, 1, 1])) == ()


@pytest.mark.parametrize("several", [False, True])
def test_one_class_of_many(several: bool) -> None:
    X = table()
    value = X[:, 0] + X[:, 3] + 2 if several else X[:, 2]
    outer = value > value.median()
    # the rows of class 2 stand apart, those of 0 and 1 are mixed
    classes = torch.where(outer, 2, torch.arange(40) % 2)
    assert separating(X, classes) == ((0, 3) if several else (2,))
