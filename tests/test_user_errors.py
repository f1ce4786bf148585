from __future__ import annotations

import inspect
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import Tensor

from pyro_vi_lab.errors import ArgumentError, LabError, ModelError
from pyro_vi_lab.user_errors import is_indefinite, user_errors, user_line


def broken(x: Tensor, y: Tensor) -> None:
    pyro.sample("b", dist.Normal(x @ y, 1.0))


def test_errors_of_a_model_name_the_model_its_line_and_its_data() -> None:
    lines, first = inspect.getsourcelines(broken)
    line = first + next(i for i, text in enumerate(lines) if "x @ y" in text)
    x, y = torch.zeros(3, 2), torch.tensor([1.0, float("nan"), 2.0])
    with pytest.raises(ModelError) as caught, user_errors("my model", (x,), {"y": y}):
        broken(x, y)
    message = str(caught.value)
    assert message.startswith(f"model my model cannot be run at {__file__}:{line}: RuntimeError: ")
    assert message.endswith("; data: argument 0 (3, 2), y (3,) with NaN")
    assert isinstance(caught.value.__cause__, RuntimeError)


@pytest.mark.parametrize("error", [ArgumentError("ours"), KeyboardInterrupt(), SystemExit(1)])
def test_our_errors_and_interrupts_pass_through(error: BaseException) -> None:
    with pytest.raises(type(error)) as caught, user_errors("my model"):
        raise error
    assert caught.value is error
    assert isinstance(error, LabError) or caught.value.__cause__ is None


def test_the_line_is_the_users_even_below_torch_and_pyro() -> None:
    lines, first = inspect.getsourcelines(broken)
    line = first + next(i for i, text in enumerate(lines) if "x @ y" in text)
    with pytest.raises(RuntimeError) as caught:
        poutine.trace(broken).get_trace(torch.zeros(3, 2), torch.zeros(3))
    assert user_line(caught.value) == f"{__file__}:{line}"
    assert user_line(ValueError("never raised")) == ""


def test_a_matrix_that_fails_is_told_from_other_errors() -> None:
    bad = torch.tensor([[1.0, 2.0], [2.0, 1.0]])
    for function in (
        lambda: torch.linalg.cholesky(bad),
        lambda: torch.linalg.inv(torch.ones(2, 2)),
        lambda: torch.linalg.solve(torch.ones(2, 2), torch.ones(2)),
        lambda: torch.distributions.MultivariateNormal(torch.zeros(2), bad),
        lambda: torch.jit.trace(torch.linalg.cholesky, torch.eye(2), check_trace=False)(bad),
    ):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # TorchScript's own
            with pytest.raises((RuntimeError, ValueError)) as caught:
                function()
        assert is_indefinite(caught.value)
    for error in (None, ValueError("scale must be positive"), RuntimeError("The size of tensor a must match")):
        assert not is_indefinite(error)
