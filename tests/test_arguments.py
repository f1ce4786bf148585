from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor

from pyro_vi_lab.arguments import argument_names, as_array, labelled, mixes_types, to_tensors
from pyro_vi_lab.errors import DataError, ModelError


def model(x: Tensor, *others: Tensor, scale: float = 1.0, **named: Any) -> None: ...


def test_names_are_those_of_the_signature() -> None:
    assert argument_names(model, (1, 2, 3), {"scale": 4, "z": 5}) == {
        "x": 1,
        "others[0]": 2,
        "others[1]": 3,
        "scale": 4,
        "z": 5,
    }
    with pytest.raises(ModelError, match="model model cannot take these arguments: missing a required argument: 'x'"):
        argument_names(model, (), {})
    assert argument_names(max, (1,), {}).keys() == {"argument 0"}  # no signature


def test_every_leaf_has_a_label() -> None:
    args = ({"a": torch.ones(2), "b": [torch.zeros(3)]}, torch.ones(1))
    assert labelled(model, args, {"z": torch.ones(4)}) == ["x['a']", "x['b'][0]", "others[0]", "z"]


def test_pandas_become_arrays_and_leave_their_index() -> None:
    index: dict[int, list[Any]] = {}
    frame = pd.DataFrame({"a": [1, 2], "b": [0.5, 1.5]}, index=["p", "q"])
    np.testing.assert_array_equal(as_array("x", frame, index), [[1, 0.5], [2, 1.5]])
    assert index == {2: ["p", "q"]}
    array = np.arange(3)
    assert as_array("x", array, index) is array  # not read, let alone copied
    with pytest.raises(DataError, match="argument 'x' is not numeric"):
        as_array("x", np.array(["a"]), index)


def test_only_floating_point_data_change_their_type() -> None:
    args, kwargs = to_tensors(
        (np.ones(2, np.float32), torch.tensor([1, 2])), {"s": 2.0, "n": np.float64(1)}, torch.float64
    )
    assert [value.dtype for value in args] == [torch.float64, torch.int64]
    assert kwargs == {"s": 2.0, "n": 1.0}


def test_what_torch_says_of_types_that_do_not_mix() -> None:
    for call in (lambda: torch.ones(2) @ torch.ones(2).double(), lambda: torch.ones(1, 2) @ torch.ones(2).double()):
        with pytest.raises(RuntimeError) as caught:
            call()
        assert mixes_types(ModelError(str(caught.value)))
    assert not mixes_types(ModelError("size mismatch"))
