from __future__ import annotations

from typing import Any

import pytest
import torch

from pyro_vi_lab.errors import ArgumentError
from pyro_vi_lab.models.row_likelihood import LIKELIHOODS, RowLikelihood


def test_expectations_are_those_of_the_distribution() -> None:
    values = torch.randn(3, 2, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for kind in LIKELIHOODS:
        categories = 4 if kind == "categorical" else None
        likelihood = RowLikelihood(kind, (2,) if categories else (2, 4), categories)
        assert likelihood.per_row == (2, 4)
        found = likelihood.distribution(values, torch.tensor(0.5, dtype=torch.float64))
        assert (found.batch_shape, found.event_shape) == ((3,), tuple(likelihood.shape))
        expected = values.softmax(-1) if categories else found.mean
        torch.testing.assert_close(likelihood.expected(values), expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "poisson"}, "likelihood must be one of 'bernoulli', 'continuous_bernoulli', 'normal', 'categorical'"),
        ({"kind": "categorical"}, "'categorical' needs it"),
        ({"kind": "normal", "num_categories": 3}, "no other takes it"),
        ({"kind": "categorical", "num_categories": 1}, "num_categories must be a whole number of at least 2, got 1"),
    ],
)
def test_what_makes_no_sense(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        RowLikelihood(**{"shape": (2,), **options})
