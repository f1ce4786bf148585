from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from pyro_vi_lab import capture as capture_module
from pyro_vi_lab.capture import Graph, capture
from pyro_vi_lab.errors import CaptureError
from pyro_vi_lab.isolation import default_dtype

WEIGHT = torch.tensor([[1.0, 2.0, -1.0], [0.5, -0.5, 3.0]], dtype=torch.float64)
INDEX = torch.tensor([2, 0, 0])


def with_gradient(f: Callable[..., Tensor]) -> Callable[..., tuple[Tensor, Tensor]]:
    """Value and gradient, as a density is captured."""

    def function(x: Tensor, *data: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            x = x.detach().requires_grad_(True)
            value = f(x, *data)
            (grad,) = torch.autograd.grad(value, x)
        return value.detach(), grad

    return function


def written_in_place(x: Tensor) -> Tensor:
    y = torch.zeros(3, dtype=x.dtype)
    y[0] = x[0]
    y[1:] += x[1:] * x[0]
    return y.square().sum()


def literal_written_in_place(x: Tensor) -> Tensor:
    y = torch.tensor([0.0, 1.0, 2.0], dtype=torch.float64)
    y[1] *= x[1]
    y.add_(x)
    return y.exp().sum()


def constant_counted_up(x: Tensor) -> Tensor:
    y = torch.ones(2, dtype=torch.float64)
    y[0] += 1.0
    return (x * y[0]).sin().sum()


def masked_index(x: Tensor) -> Tensor:
    y = x * 1.0
    return torch.where(y > 0, y, 0.0).sum() + y[y.detach() == y.detach()].square().sum()


def idle_operators(x: Tensor) -> Tensor:
    return ((x * 1 + 0) ** 1 / 1).sum().sum().reshape(()).expand(()) * torch.ones_like(x).sum()


class Case(NamedTuple):
    function: Callable[..., Tensor]
    data: tuple[Tensor, ...] = ()


CASES: dict[str, Case] = {
    "polynomial": Case(lambda x: (x**3 - 2 * x).sum()),
    "closed-over matrix": Case(lambda x: (WEIGHT @ x).square().sum()),
    "constants": Case(lambda x: (x * torch.log(WEIGHT.abs().sum()) / WEIGHT.T.exp().sum()).sum()),
    "whole numbers": Case(lambda x: (x[INDEX] * INDEX * 0.1 + torch.arange(3) / 3 + torch.full((3,), 0.1)).cos().sum()),
    "choice": Case(lambda x: (torch.where(x > 0, 0.1, 0.3) * x).sum()),
    "idle operators": Case(idle_operators),
    "cumulative product": Case(lambda x: x.cumprod(-1).sum()),
    "log sigmoid": Case(lambda x: torch.nn.functional.logsigmoid(x).sum()),
    "written in place": Case(written_in_place),
    "literal written in place": Case(literal_written_in_place),
    "constant counted up": Case(constant_counted_up),
    "mask as index": Case(masked_index),
    "data": Case(lambda x, a, b: (a @ x + b).tanh().sum(), (WEIGHT, torch.tensor([0.1, 0.2], dtype=torch.float64))),
    "whole-number data": Case(lambda x, i: (x[i] * 0.1 * i).exp().sum(), (INDEX,)),
    "Cholesky": Case(lambda x: torch.linalg.cholesky(torch.diag(x.square() + 1) + 0.1).diagonal().log().sum()),
    "inverse": Case(lambda x: torch.linalg.inv(torch.diag(x.square() + 1) + 0.1).sum()),
    "linear system": Case(lambda x: torch.linalg.solve(torch.diag(x.square() + 1) + 0.1, x).sum()),
}

EACH = pytest.mark.parametrize("name", CASES)


def captured(name: str) -> Graph:
    case = CASES[name]
    return capture(with_gradient(case.function), (torch.ones(3, dtype=torch.float64), *case.data))


def expected(name: str, x: Tensor) -> list[tuple[Tensor, Tensor]]:
    with default_dtype(torch.float64):  # the graph's numbers of the default type are of the type of its input
        return [with_gradient(CASES[name].function)(row, *CASES[name].data) for row in x]


def rows(num_rows: int = 5) -> Tensor:
    return torch.randn(num_rows, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def assert_same(actual: tuple[Tensor, ...], wanted: tuple[Tensor, ...]) -> None:
    for one, two in zip(actual, wanted, strict=True):
        # rounding of some tens of operations on numbers of this size
        torch.testing.assert_close(one, two, rtol=1e3 * torch.finfo(two.dtype).eps, atol=1e-13)


@EACH
def test_the_graph_is_the_function(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One row or many, cold or hot, with the data as inputs or bound: always the same numbers."""
    monkeypatch.setattr(capture_module, "HOT_CALLS", 2)
    graph, data, x = captured(name), CASES[name].data, rows()
    wanted = expected(name, x)
    for _ in range(4):
        for row, (value, grad) in zip(x, wanted, strict=True):
            assert_same(graph(row, *data), (value, grad))
        assert_same(graph.batched(x, *data), tuple(torch.stack(parts) for parts in zip(*wanted, strict=True)))
        assert_same(graph.batched(x[:1], *data), tuple(part[None] for part in wanted[0]))
    bound = graph.bind(*data)
    assert_same(bound(x[0]), wanted[0])
    assert_same(tuple(graph.scripted(x[0], *data)), wanted[0])
    assert bound.num_nodes <= graph.num_nodes


@EACH
def test_large_batches_are_cut_into_pieces(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    graph, data, x = captured(name), CASES[name].data, rows(7)
    whole = graph.batched(x, *data)
    monkeypatch.setattr(capture_module, "CHUNK_NUMBERS", 3 * graph.numbers_per_row)
    assert_same(graph.batched(x, *data), whole)
    monkeypatch.setattr(capture_module, "CHUNK_NUMBERS", 1)
    assert_same(graph.batched(x, *data), whole)


@EACH
def test_nothing_is_printed_and_no_state_is_changed(name: str, capfd: pytest.CaptureFixture[str]) -> None:
    before = (
        torch.get_default_dtype(),
        torch.is_grad_enabled(),
        torch.get_rng_state().tolist(),
        WEIGHT.tolist(),
    )
    graph = captured(name)
    graph.batched(rows(), *CASES[name].data)
    graph(rows()[0], *CASES[name].data)
    after = (
        torch.get_default_dtype(),
        torch.is_grad_enabled(),
        torch.get_rng_state().tolist(),
        WEIGHT.tolist(),
    )
    assert after == before
    assert capfd.readouterr() == ("", "")


def test_other_data_give_their_own_answer() -> None:
    graph, case, x = captured("data"), CASES["data"], rows()
    others = (-2 * case.data[0], case.data[1] + 1)
    wanted = [with_gradient(case.function)(row, *others) for row in x]
    assert_same(graph(x[0], *others), wanted[0])
    assert_same(graph.batched(x, *others), tuple(torch.stack(parts) for parts in zip(*wanted, strict=True)))
    assert_same(graph.bind(*others)(x[0]), wanted[0])
    assert_same(graph(x[0], *case.data), expected("data", x)[0])


def test_constants_are_folded_and_what_is_idle_is_dropped() -> None:
    names = [node.target for node in captured("constants").module.graph.nodes if node.op == "call_function"]
    assert torch.ops.aten.exp.default not in names
    assert torch.ops.aten.log.default not in names
    assert captured("idle operators").num_nodes < 8


def test_parameters_keep_the_values_of_the_capture() -> None:
    weight = torch.nn.Parameter(torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64))
    graph = capture(with_gradient(lambda x: (x * weight).sum()), (torch.ones(3, dtype=torch.float64),))
    with torch.no_grad():
        weight.mul_(10)
    assert_same(graph(rows()[0]), (rows()[0] @ (weight / 10).detach(), (weight / 10).detach()))


def test_size_of_the_work() -> None:
    small = capture(lambda x: (x.exp(),), (torch.ones(3),))
    assert (small.num_nodes, small.numbers_per_row) == (1, 3)


# --- a row whose matrix fails --------------------------------------------------------------------------


def symmetric(x: Tensor) -> Tensor:
    one = torch.ones((), dtype=x.dtype)
    return torch.stack([torch.stack([one, x[0]]), torch.stack([x[0], one])])


FAILING: dict[str, tuple[Callable[[Tensor], Tensor], float]] = {
    "Cholesky": (lambda x: torch.linalg.cholesky(symmetric(x)).diagonal().log().sum(), 2.0),
    "several matrices": (
        lambda x: torch.linalg.cholesky(torch.stack([torch.eye(2).to(x), symmetric(x)])).sum(),
        2.0,
    ),
    "inverse": (lambda x: torch.linalg.inv(symmetric(x)).sum(), 1.0),
    "linear system": (lambda x: torch.linalg.solve(symmetric(x), torch.ones(2).to(x)).sum(), 1.0),
    "linear systems": (lambda x: torch.linalg.solve(symmetric(x), torch.ones(2, 3).to(x)).sum(), 1.0),
}


@pytest.mark.parametrize("name", FAILING)
def test_a_matrix_that_fails_gives_nan_in_its_row_alone(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capture_module, "HOT_CALLS", 2)
    function, bad = FAILING[name]
    graph = capture(with_gradient(function), (torch.tensor([0.1], dtype=torch.float64),))
    x = torch.tensor([[0.3], [bad], [-0.5]], dtype=torch.float64)
    good = [with_gradient(function)(x[i]) for i in (0, 2)]
    for _ in range(4):  # TorchScript would drop the check of the hot graph
        values, grads = graph.batched(x)
        assert torch.isnan(values).tolist() == torch.isnan(grads[:, 0]).tolist() == [False, True, False]
        assert_same((values[::2], grads[::2]), tuple(torch.stack(parts) for parts in zip(*good, strict=True)))
        assert math.isnan(graph(x[1])[0])
    assert math.isnan(graph.scripted(x[1])[0])
    assert math.isnan(graph.bind().scripted(x[1])[0])


# --- what cannot be captured ---------------------------------------------------------------------------


def branch(x: Tensor) -> tuple[Tensor]:
    if x[0] > 0:
        return (x.exp(),)
    return (x,)


def item(x: Tensor) -> tuple[Tensor]:
    return (x * x.sum().item(),)


@pytest.mark.parametrize(("function", "text"), [(branch, "if x[0] > 0"), (item, ".item()")])
def test_looking_into_an_input_is_an_error_with_its_line(function: Callable[..., tuple[Tensor]], text: str) -> None:
    lines, first = inspect.getsourcelines(function)
    line = first + next(i for i, source in enumerate(lines) if text in source)
    for evaluate_constants in (False, True):
        with pytest.raises(CaptureError, match="value out of a tracing tensor") as caught:
            capture(function, (torch.ones(3),), evaluate_constants=evaluate_constants)
        assert f"{__file__}:{line}" in str(caught.value)


def test_an_error_of_the_function_is_named() -> None:
    with pytest.raises(CaptureError, match="size of tensor a") as caught:
        capture(lambda x: (x + torch.ones(4),), (torch.ones(3),))
    assert isinstance(caught.value.__cause__, RuntimeError)


def test_random_numbers_are_refused_unless_nothing_depends_on_them() -> None:
    with pytest.raises(CaptureError, match="draws random numbers"):
        capture(lambda x: (x + torch.randn(3),), (torch.ones(3),))


def test_constants_can_be_looked_into_when_asked_for() -> None:
    data = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)

    def function(x: Tensor) -> tuple[Tensor]:
        total = data.cumsum(0)[-1]
        scale = 2.0 if total > 5 else 1.0
        return (scale * float(data.max()) * (x * data[data > 1.5].mean()),)

    x = rows()[0]
    with pytest.raises(CaptureError):
        capture(function, (x,))
    graph = capture(function, (x,), evaluate_constants=True)
    assert_same(graph(2 * x), function(2 * x))
    assert_same(graph.batched(rows()), (torch.stack([function(row)[0] for row in rows()]),))


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("positive", [False, True])
def test_the_likelihood_of_logits_has_one_exponential(reduction: str, weighted: bool, positive: bool) -> None:
    """The same as torch's own, which takes three on a batch; also far out, where the naive form overflows."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 5, dtype=torch.float64, generator=generator) * torch.tensor([1.0, 1, 10, 100, 1000])
    target, size = torch.rand(5, dtype=torch.float64, generator=generator), torch.arange(1.0, 6.0, dtype=torch.float64)
    options = {"weight": size if weighted else None, "pos_weight": size if positive else None, "reduction": reduction}

    def function(x: Tensor) -> tuple[Tensor, ...]:
        x = x.detach().requires_grad_()
        value = torch.nn.functional.binary_cross_entropy_with_logits(x, target, **options)
        (grad,) = torch.autograd.grad(value.sum(), x)
        return value.detach(), grad

    graph = capture(function, (x[0],))
    for row in x:
        for got, expected in zip(graph(row), function(row), strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-13, atol=1e-13)
    for found, one in zip(graph.batched(x), zip(*map(function, x), strict=True), strict=True):
        torch.testing.assert_close(found, torch.stack(one), rtol=1e-13, atol=1e-13)
    assert "binary_cross_entropy_with_logits" not in graph.module.code
