from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

from pyro_vi_lab import c_emitter as emitter_module
from pyro_vi_lab import c_source as source_module
from pyro_vi_lab.c_source import c_source
from pyro_vi_lab.errors import CompileError
from pyro_vi_lab.native import compile_native, compiler

needs_compiler = pytest.mark.skipif(compiler() is None, reason="no C compiler")
DOUBLE = torch.float64


def graph(function: Callable[..., Any], *example: Tensor) -> GraphModule:
    return make_fx(function)(*example)


def body(text: str) -> str:
    return text[text.index("static void part0") :]


# --- what the text is like


def test_constants_are_not_printed() -> None:
    def of(constant: Tensor) -> str:
        return c_source(graph(lambda x: (x * constant).sum(), torch.ones(3)), (torch.ones(3),)).text

    one, other = of(torch.tensor([1.0, 2.0, 3.0])), of(torch.tensor([4.0, 0.5, -3.0]))
    assert one == other


def test_views_cost_nothing() -> None:
    x = torch.ones(4, 6, dtype=DOUBLE)

    def function(x: Tensor) -> Tensor:
        return x.t().unsqueeze(0).expand(3, 6, 4)[1, 2:].reshape(4, 2, 2).permute(1, 0, 2).flip(0).sum()

    source = c_source(graph(function, x), (x,))
    assert source.num_statements == 1


def test_neighbors_share_a_loop_and_what_only_they_use_is_not_stored() -> None:
    x = torch.ones(100, dtype=DOUBLE)

    def function(x: Tensor) -> tuple[Tensor, Tensor]:
        shifted = (x - 1.5).exp()
        return (shifted * shifted).sum(), (shifted + 1).log().sum()

    text = body(c_source(graph(function, x), (x,)).text)
    part = text[: text.index("vl_call")]
    assert len(re.findall(r"for \(long", part)) == 1
    assert len(re.findall(r"\bexp\(", part)) == 1
    assert "[i0] =" not in part


def test_what_is_broadcast_is_computed_once() -> None:
    """As torch's log_prob does it: the logarithm of an expanded scale."""
    x = torch.ones(101, dtype=DOUBLE)

    def function(x: Tensor) -> Tensor:
        scale = x[0].expand(100)
        return (x[1:] / scale - scale.log()).sum()

    text = body(c_source(graph(function, x), (x,)).text)
    assert text.index("log(") < text.index("for (long")


def test_what_is_the_same_for_all_rows_is_computed_before_them() -> None:
    x, data = torch.ones(3, dtype=DOUBLE), torch.ones(100, dtype=DOUBLE)
    text = c_source(graph(lambda x, data: (x.sum() * data.exp().sum(),), x, data), (x, data), lanes=4).text
    rows = text[text.index("vl_rows") :]
    (uniform,) = re.findall(r"(part\d)\(in.*\n(?=for \(int64_t row)", rows)
    definition = text[text.index(f"void {uniform}") :]
    assert "exp(" in definition[: definition.index("\n}\n")]
    assert body(text).count("exp(") == 1


def test_dead_code_is_dropped() -> None:
    x = torch.ones(3, dtype=DOUBLE)
    module = graph(lambda x: (x.exp().cumsum(0), x * 2)[1], x)
    assert "exp" not in body(c_source(module, (x,)).text)


def test_a_sum_of_slice_gradients_is_linear_in_their_number() -> None:
    """As a recursion over time gives: T pieces of a vector of length T."""

    def work(length: int) -> int:
        x = torch.ones(length, dtype=DOUBLE)

        def function(x: Tensor) -> Tensor:
            total = torch.zeros(length, dtype=DOUBLE)
            for t in range(length):
                total = total + torch.ops.aten.slice_backward(x[t : t + 1].sin(), [length], 0, t, t + 1, 1)
            return total

        source = c_source(graph(function, x), (x,))
        text = body(source.text)
        return text.count(";") + sum(int(extent) for extent in re.findall(r"< (\d+); \+\+i", text))

    assert work(40) < 2.5 * work(20)


# --- what is refused


def test_large_graphs_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.ones(3, dtype=DOUBLE)
    module = graph(lambda x: (x.exp().sin().cos().sum(), x.cumsum(0)), x)
    monkeypatch.setattr(source_module, "LARGEST_GRAPH", 3)
    with pytest.raises(CompileError, match="too large: 5 operators, and 3 are the most"):
        c_source(module, (x,))
    monkeypatch.undo()
    monkeypatch.setattr(emitter_module, "LARGEST_STATEMENTS", 1)
    with pytest.raises(CompileError, match="too large: 2 statements, and 1 are the most"):
        c_source(module, (x,))


def test_writing_into_an_input_is_refused() -> None:
    x = torch.ones(3, dtype=DOUBLE)
    with pytest.raises(CompileError):
        c_source(graph(lambda x: (x.add_(1.0), x)[1] * 2, x), (x,))


# --- random programs

UNARY: tuple[Callable[[Tensor], Tensor], ...] = (
    lambda x: x.exp().clamp(max=50.0),
    lambda x: x.tanh(),
    lambda x: x.sin() * 3.0,
    lambda x: (x.square() + 1).log(),
    lambda x: -x,
    lambda x: x.sigmoid(),
    lambda x: torch.where(x > 0, x, 0.1),
    lambda x: x.flip(-1),
    lambda x: x.cumsum(-1),
    lambda x: x.softmax(-1),
    lambda x: x.logsumexp(-1, keepdim=True),
    lambda x: x.sum(0, keepdim=True),
    lambda x: x.mean(-1, keepdim=True),
    lambda x: x.amax(-1, keepdim=True),
    lambda x: x.reshape(-1)[: x.shape[-1]],
    lambda x: x[..., :1],
    lambda x: x[..., 1:] if x.shape[-1] > 1 else x,
    lambda x: x[..., torch.arange(x.shape[-1]).flip(0)],
    lambda x: torch.stack([x, x.cos()]).sum(0),
    lambda x: torch.cat([x, x + 1], -1)[..., : x.shape[-1]],
    lambda x: x.expand(2, *x.shape)[1],
    lambda x: x.unsqueeze(-1).expand(*x.shape, 3).log1p().mean(-1) if bool((x.detach() > -1).all()) else x,
    lambda x: torch.zeros(5, dtype=x.dtype).index_add(0, torch.tensor([1, 1, 3]), x.reshape(-1)[:1].expand(3)),
    lambda x: torch.nn.functional.pad(x, (1, 0))[..., : x.shape[-1]],
)
BINARY: tuple[Callable[[Tensor, Tensor], Tensor], ...] = (
    torch.add,
    torch.sub,
    torch.mul,
    lambda x, y: x / (y.square() + 0.5),
    torch.maximum,
    lambda x, y: torch.where(x > y, x, y * 0.5),
)


@st.composite
def programs(draw: st.DrawFn) -> list[tuple[int, int, int]]:
    """Steps of a stack machine: which operation, on which earlier values."""
    length = draw(st.integers(2, 12))
    total = len(UNARY) + len(BINARY)
    return [
        (draw(st.integers(0, total - 1)), draw(st.integers(0, step)), draw(st.integers(0, step)))
        for step in range(length)
    ]


def run(steps: list[tuple[int, int, int]], x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    values = [x]
    for operation, first, second in steps:
        one, two = values[first], values[second]
        if operation < len(UNARY):
            values.append(UNARY[operation](one))
            continue
        try:
            torch.broadcast_shapes(one.shape, two.shape)
        except RuntimeError:
            two = one
        values.append(BINARY[operation - len(UNARY)](one, two))
    return values[-1], values[-2], values[-1].sum() + values[len(values) // 2].sum()


@needs_compiler
@settings(max_examples=25, suppress_health_check=[HealthCheck.too_slow])
@given(steps=programs(), shape=st.sampled_from([(3,), (6,), (2, 5), (9, 2), ()]))
def test_random_programs(steps: list[tuple[int, int, int]], shape: tuple[int, ...]) -> None:
    """Value and gradient of a random program, alone and eight rows at once, are torch's."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, *(shape or (1,)), generator=generator, dtype=DOUBLE)

    def function(x: Tensor) -> tuple[Tensor, ...]:
        with torch.enable_grad():
            x = x.detach().requires_grad_(True)
            last, before, total = run(steps, x)
            (grad,) = torch.autograd.grad(total, x)
        return last.detach(), before.detach(), total.detach(), grad

    try:
        module = graph(function, x[0])
    except RuntimeError:  # a program that looks into its values cannot be captured
        return
    native = compile_native(module, (x[0],))
    batch = native.batched(x)
    for number, row in enumerate(x):
        for wanted, one, rows in zip(module(row), native(row), batch, strict=True):
            scale = max(1.0, float(wanted.abs().max()))
            for got in (one, rows[number]):
                torch.testing.assert_close(got, wanted, rtol=1e-11, atol=1e-13 * scale, equal_nan=True)
