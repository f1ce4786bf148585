"""Every operator of the table, in double and single precision, alone and eight rows at once, against torch."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

from pyro_vi_lab.c_operators import OPERATORS
from pyro_vi_lab.c_source import _name
from pyro_vi_lab.errors import CompileError
from pyro_vi_lab.isolation import default_dtype
from pyro_vi_lab.native import compile_native, compiler

pytestmark = pytest.mark.skipif(compiler() is None, reason="no C compiler")

aten = torch.ops.aten
Function = Callable[..., Any]

# x (2, 3) differs from row to row; of what is the same for all rows: y (2, 3), m (3, 3), v (3), whole numbers k (2, 3),
# places p (2) and truth values t (2, 3).
UNARY_NAMES = [
    "abs",
    "neg",
    "exp",
    "exp2",
    "expm1",
    "sin",
    "cos",
    "tan",
    "atan",
    "sinh",
    "cosh",
    "tanh",
    "asinh",
    "erf",
    "erfc",
    "sigmoid",
    "floor",
    "ceil",
    "round",
    "trunc",
    "frac",
    "sign",
    "sgn",
    "relu",
    "square",
    "positive",
    "digamma",
    "lgamma",
    "log",
    "log2",
    "log10",
    "log1p",
    "sqrt",
    "rsqrt",
    "reciprocal",
    "asin",
    "acos",
    "acosh",
    "atanh",
    "erfinv",
    "isnan",
    "isinf",
    "isfinite",
    "logical_not",
    "nan_to_num",
    "bitwise_not",
    "deg2rad",
]

UNARY: dict[str, Function] = {
    **{name: getattr(torch, name) for name in UNARY_NAMES if name not in ("bitwise_not", "relu")},
    "relu": torch.relu,
    "polygamma 0": lambda x: aten.polygamma(0, x),
    "polygamma 3": lambda x: torch.polygamma(3, x.abs()),
    "logit": torch.logit,
    "logit eps": lambda x: torch.logit(x, 0.1),
    "softplus": torch.nn.functional.softplus,
    "softplus beta": lambda x: torch.nn.functional.softplus(x, 2.0, 1.0),
    "logsigmoid": torch.nn.functional.logsigmoid,
    "log_sigmoid_forward": lambda x: aten.log_sigmoid_forward(x),
    "clamp": lambda x: x.clamp(-0.5, 0.5),
    "clamp below": lambda x: x.clamp(min=0.1),
    "clamp above": lambda x: x.clamp(max=0.1),
    "clamp_min": lambda x: aten.clamp_min(x, 0.1),
    "clamp_max": lambda x: aten.clamp_max(x, 0.1),
    **{f"power {power}": lambda x, power=power: x**power for power in (0, 1, 2, 3, 4, -1, -2, 0.5, -0.5, 1.7)},
    "power of a number": lambda x: 1.5**x,
    "int power": lambda x: x.long() ** 3,
    "add": lambda x: torch.add(x, 2.0, alpha=3.0),
    "sub": lambda x: x - 2.0,
    "rsub": lambda x: 2.0 - x,
    "rsub alpha": lambda x: aten.rsub(x, 2.0, 3.0),
    "mul": lambda x: x * 2.0,
    "scalar overloads": lambda x: aten.add.Scalar(x, 1.5) * aten.sub.Scalar(x, 0.5) + aten.mul.Scalar(x, 3.0),
    "div scalar": lambda x: aten.div.Scalar(x, 3.0),
    "div": lambda x: x / 3.0,
    "div floor": lambda x: torch.div(x, 0.3, rounding_mode="floor"),
    "div trunc": lambda x: torch.div(x, 0.3, rounding_mode="trunc"),
    "div of int": lambda x: x.long() / 3,
    "div floor of int": lambda x: torch.div((7 * x).long(), -3, rounding_mode="floor"),
    "floor_divide": lambda x: torch.floor_divide(x, 0.7),
    "remainder": lambda x: torch.remainder(x, -0.3),
    "remainder of int": lambda x: torch.remainder((7 * x).long(), -3),
    "fmod": lambda x: torch.fmod(x, 0.3),
    "fmod of int": lambda x: torch.fmod((7 * x).long(), 3),
    **{name: lambda x, name=name: getattr(x, name)(0.25) for name in ("lt", "le", "gt", "ge", "eq", "ne")},
    "compare with nan": lambda x: x == x,
    "where": lambda x: torch.where(x > 0, x, 0.1),
    "where numbers": lambda x: torch.where(x > 0, 0.1, 2.0),
    "masked_fill": lambda x: x.masked_fill(x > 0, -1.0),
    "casts": lambda x: x.float().double() + x.long() + x.bool() + (x > 0).float() + x.int(),
    "long": lambda x: x.long(),
    "bitwise": lambda x: (((3 * x).long() & 3) | 2) | ((3 * x).long() ^ 1) | ~(3 * x).long(),
    "bool algebra": lambda x: ((x > 0) & (x < 1)) ^ ((x < -1) | ~(x > 0)),
    "in place": lambda x: x.clone().add_(1.0).mul_(2.0).clamp_(0.0, 3.0),
    "xlogy of number": lambda x: torch.xlogy(2.0, x) + torch.xlogy(x.clamp(0), 2.0),
    "xlog1py of number": lambda x: torch.special.xlog1py(2.0, x) + torch.special.xlog1py(x, 2.0),
    "fill": lambda x: aten.fill.Scalar(x, 3.0) + aten.fill.Tensor(x, torch.tensor(2.0)),
    "lerp": lambda x: torch.lerp(x, 2 * x, 0.3) + torch.lerp(x, 2 * x, 0.7),
    "clone": lambda x: x.clone(),
    "alias": lambda x: aten.alias(x) + aten.detach(x) + aten.lift_fresh_copy(x),
    "convert_element_type": lambda x: torch.ops.prims.convert_element_type(x > 0, torch.float64),
}

BINARY: dict[str, Function] = {
    **{
        name: lambda x, y, name=name: getattr(torch, name)(x, y)
        for name in ("add", "sub", "mul", "div", "minimum", "maximum", "fmin", "fmax", "atan2", "hypot", "fmod", "pow")
    },
    **{
        name: lambda x, y, name=name: getattr(torch, name)(x, y)
        for name in ("remainder", "xlogy", "logaddexp", "lt", "le", "gt", "ge", "eq", "ne", "floor_divide", "rsub")
    },
    **{
        name: lambda x, y, name=name: getattr(torch, name)(x > 0, y)
        for name in ("logical_and", "logical_or", "logical_xor")
    },
    "xlog1py": torch.special.xlog1py,
    "broadcast": lambda x, y: x[:, None] * y[0] + x[0] - y[:, :1],
    "addcmul": lambda x, y: torch.addcmul(x, y, y) + torch.addcmul(x, x, y, value=0.5),
    "addcdiv": lambda x, y: torch.addcdiv(x, x, y) + torch.addcdiv(x, x, y, value=0.5),
    "lerp": lambda x, y: torch.lerp(x, y, y.sigmoid()),
    "clamp": lambda x, y: torch.clamp(x, y - 1, y + 1),
    "clamp below": lambda x, y: torch.clamp(x, min=y) + torch.clamp(x, max=y) + aten.clamp_min.Tensor(x, y),
    "clamp_max": lambda x, y: aten.clamp_max.Tensor(x, y),
    "masked_fill": lambda x, y: x.masked_fill(y > 0, y.sum()),
    "mixed types": lambda x, y: (x > 0) * y + y.long() * x + y.int() + (y > 0),
    "sigmoid_backward": lambda x, y: aten.sigmoid_backward(x, y),
    "tanh_backward": lambda x, y: aten.tanh_backward(x, y),
    "softplus_backward": lambda x, y: aten.softplus_backward(x, y, 1.0, 20.0) + aten.softplus_backward(x, y, 2.0, 1.0),
    "threshold_backward": lambda x, y: aten.threshold_backward(x, y, 0.1),
    "log_sigmoid_backward": lambda x, y: aten.log_sigmoid_backward(y, x, (-x.abs()).exp()),
    "where": lambda x, y: torch.where(x > y, x, y) + torch.where(y > 0, x, 0.5),
    "copy": lambda x, y: aten.copy(x, y[:1]),
    "floor": lambda x, y: torch.div(x, y, rounding_mode="floor") + torch.div(x, y, rounding_mode="trunc"),
}

REDUCTIONS: dict[str, Function] = {
    **{
        f"{name}{dims}": lambda x, name=name, dims=dims: getattr(x, name)(*dims)
        for name in ("sum", "mean", "amax", "amin", "logsumexp", "any", "all", "var", "std")
        for dims in (((0,), (1,), ((0, 1),)) if name == "logsumexp" else ((), (0,), (-1,), ((0, 1),)))
    },
    **{f"{name} keepdim": lambda x, name=name: getattr(x, name)(1, keepdim=True) for name in ("sum", "mean", "amax")},
    **{f"{name}": lambda x, name=name: getattr(x, name)() for name in ("max", "min", "argmax", "argmin", "prod")},
    **{f"{name} dim": lambda x, name=name: getattr(x, name)(0) for name in ("argmax", "argmin", "prod")},
    **{f"{name} with place": lambda x, name=name: tuple(getattr(x, name)(1)) for name in ("max", "min")},
    "sum of bool": lambda x: (x > 0).sum(),
    "any dim": lambda x: (x > 1).any(0),
    "all dim": lambda x: (x > -1).all(1),
    "any of dims": lambda x: aten.any.dims(x > 1, [0, 1]) | aten.all.dims(x > 1, [0, 1]),
    "long sum": lambda x: (x.reshape(-1)[:, None] * torch.arange(40, dtype=x.dtype)).sum(),
    "sums across": lambda x: (x.reshape(-1)[:, None] * torch.arange(40, dtype=x.dtype)).sum(0),
    "sums of a transpose": lambda x: (x.reshape(-1)[:, None] * torch.arange(40, dtype=x.dtype)).t().contiguous().sum(0),
    "two sums in a loop": lambda x: (x.sum() - (x * x).sum(), x.exp().sum(1), x.exp().sum()),
    "softmax": lambda x: torch.softmax(x, 1),
    "log_softmax": lambda x: torch.log_softmax(x, 0),
    "wide softmax": lambda x: torch.log_softmax(x[:, :, None].expand(2, 3, 7) * 2.0, -1),
    "cumsum": lambda x: x.cumsum(1) + x.cumsum(0),
    "cumprod": lambda x: x.cumprod(1),
    "logcumsumexp": lambda x: x.logcumsumexp(1),
    "cumsum of one": lambda x: x[:1].cumsum(0),
    "sort": lambda x: tuple(x.sort(1)),
    "sort down": lambda x: tuple(x.sort(0, descending=True)),
    "sort stable": lambda x: tuple(torch.sort(x.round(), dim=1, stable=True)),
    "scalar": lambda x: (x[0, 0].sum(), x[0, 0].amax(), x[0, 0].max(), x[0, 0].logsumexp(0), x[0, 0].cumsum(0)),
    "scalar places": lambda x: (x[0, 0].argmax(), *x[0, 0].max(0), *x[0, 0].sort()),
    "empty": lambda x: (x[:0].sum(), x[:0].sum(0), x[:, :0].prod(1), x[:0].exp(), x[:0].cumsum(0)),
}
REDUCTIONS = {
    name: (lambda x, function=function: function(x > 0)) if name.startswith(("any(", "all(")) else function
    for name, function in REDUCTIONS.items()
}
TWO_OPERAND_REDUCTIONS: dict[str, Function] = {
    "softmax backward": lambda x, y: aten._softmax_backward_data(x, y.softmax(1), 1, x.dtype),
    "log_softmax backward": lambda x, y: aten._log_softmax_backward_data(x, y.log_softmax(0), 0, x.dtype),
    "cross entropy": lambda x, y: torch.nn.functional.binary_cross_entropy_with_logits(x, y.sigmoid()),
    "cross entropy, sum": lambda x, y: torch.nn.functional.binary_cross_entropy_with_logits(
        x, y.sigmoid(), weight=y.abs(), reduction="sum"
    ),
    "cross entropies": lambda x, y: torch.nn.functional.binary_cross_entropy_with_logits(
        x, y.sigmoid(), reduction="none"
    ),
    "mm": lambda x, y: x @ y.t(),
    "long mm": lambda x, y: x.repeat(1, 4) @ y.repeat(1, 4).t(),
    "wide mm": lambda x, y: y.repeat(3, 4).t() @ x.repeat(3, 4),
    "one column": lambda x, y: y.repeat(3, 4) @ x.repeat(1, 4)[:1].t(),
    "one row": lambda x, y: x.repeat(3, 1)[:, 0][None] @ y.repeat(3, 4),
    "mv": lambda x, y: x @ y[0],
    "dot": lambda x, y: x[0] @ y[0] + aten.vdot(x[0], y[1]),
    "bmm": lambda x, y: x.expand(2, 2, 3) @ y.t().expand(2, 3, 2),
    "addmm": lambda x, y: torch.addmm(x[:, :2], x, y.t(), beta=0.5, alpha=2.0) + torch.addmm(y[0, 0], x, y.t()),
    "baddbmm": lambda x, y: torch.baddbmm(x[None, :, :2], x[None], y.t()[None]),
    "addmv": lambda x, y: torch.addmv(x[:, 0], x, y[0]),
    "empty mm": lambda x, y: x[:, :0] @ y[:, :0].t(),
}

VIEWS: dict[str, Function] = {
    "reshape": lambda x: x.reshape(3, 2).exp().reshape(6).sin().reshape(1, 2, 3, 1),
    "reshape of a transpose": lambda x: x.t().reshape(-1) + x.exp().t().reshape(6),
    "_reshape_alias": lambda x: aten._unsafe_view(x, [3, 2]) + aten._reshape_alias(x, [3, 2], [2, 1]),
    "expand": lambda x: x.exp()[:, None].expand(2, 4, 3) + x[0].expand(2, 4, 3),
    "permute": lambda x: x[None].permute(2, 0, 1) * 2.0,
    "transpose": lambda x: x.transpose(0, 1) + aten.t(x),
    "select": lambda x: x[1] + x[:, -1].sum() + x[-1],
    "slice": lambda x: x[:, 1:] + x[:, :-1] + x[:, -2:5],
    "slice with step": lambda x: x.reshape(-1)[1::2],
    "unsqueeze": lambda x: x.unsqueeze(0) + x.unsqueeze(-1).squeeze(-1)[None],
    "squeeze": lambda x: x[:1].squeeze() + aten.squeeze.dims(x[:1, :1], [0, 1]) + aten.squeeze.dim(x[:1], 0),
    "diagonal": lambda x: x.diagonal() + x.diagonal(1),
    "diagonal backward": lambda x: aten.diagonal_backward(x[0], [3, 4], 0, 0, 1),
    "diag_embed": lambda x: torch.diag_embed(x) + torch.diag_embed(x, 0) + aten.diag_embed(x[:, :2], -1),
    "diagonal_scatter": lambda x: torch.diagonal_scatter(x, x[:, 0]),
    "unfold": lambda x: x.reshape(-1).unfold(0, 3, 2).exp(),
    "as_strided": lambda x: x.as_strided([2, 2], [1, 2], 1),
    "unbind": lambda x: x.unbind(1)[2] - x.exp().unbind(0)[0].sum(),
    "split": lambda x: x.split(2, 1)[1] * aten.split_with_sizes(x, [1, 2], 1)[0],
    "flip": lambda x: x.flip(0, 1) + x.exp().flip(1),
    "roll": lambda x: x.roll(1, 1) + x.roll(4),
    "repeat": lambda x: x.repeat(2, 1, 3),
    "cat": lambda x: torch.cat([x, x.exp(), x[:1]], 0),
    "stack": lambda x: torch.stack([x, x.exp()], 1),
    "cat of types": lambda x: torch.cat([x, x > 0, torch.tensor([[1, 2, 3]])]),
    "slice_backward": lambda x: aten.slice_backward(x, [2, 7], 1, 1, 7, 2),
    "sum of pieces": lambda x: (
        aten.slice_backward(x, [2, 5], 1, 0, 3, 1)
        + aten.slice_backward(x.exp(), [2, 5], 1, 2, 5, 1)
        + aten.select_backward(x[:, 0], [2, 5], 1, 2)
        + aten.slice_backward(x, [2, 5], 1, 0, 3, 1)
    ),
    "piece and whole": lambda x: x.sin() + aten.select_backward(x[0], [2, 3], 0, -1),
    "piece in a product": lambda x: aten.select_backward(x[0], [2, 3], 0, -1) * 2.0,
    "pad": lambda x: torch.nn.functional.pad(x, (1, 2, 0, 1)) + torch.nn.functional.pad(x, (1, 2, 0, 1), value=3.0),
    "negative pad": lambda x: torch.nn.functional.pad(x, (-1, 2)),
    "slice_scatter": lambda x: torch.slice_scatter(x, x[:, :1] * 2, 1, 2, 3),
    "select_scatter": lambda x: torch.select_scatter(x, x[:, 0].exp(), 1, -1),
    "tril": lambda x: x.tril() + x.exp().triu(1) + x.tril(-1),
    "zeros": lambda x: torch.zeros_like(x) + torch.zeros(3, dtype=x.dtype) + x.new_zeros(3),
    "ones": lambda x: torch.ones_like(x) * torch.ones(3, dtype=x.dtype) * x.new_ones(3),
    "full": lambda x: torch.full_like(x, 2.0) + torch.full((3,), 0.5, dtype=x.dtype) + x.new_full((3,), 3.0),
    "empty of all kinds": lambda x: (
        aten.empty_like(x).fill_(1.0)
        + aten.new_empty(x, [3]).fill_(1.0)
        + aten.new_empty_strided(x, [3], [1]).fill_(1.0)
        + aten.empty_strided([3], [1]).fill_(1.0)
        + aten.empty.memory_format([3]).fill_(1.0)
    ),
    "iota": lambda x: (
        torch.ops.prims.iota(3, start=1, step=2, dtype=torch.int64, device="cpu", requires_grad=False) * x
    ),
    "arange": lambda x: torch.arange(3) * x + torch.arange(1, 4) + torch.arange(0.5, 2.0, 0.5, dtype=x.dtype),
    "eye": lambda x: torch.eye(3, dtype=x.dtype) * x[0] + torch.eye(2, 3, dtype=x.dtype)[0],
    "scalar_tensor": lambda x: x * aten.scalar_tensor(2.0, dtype=x.dtype),
    "constant": lambda x: x * torch.tensor([1.0, 2.0, 3.0], dtype=x.dtype).exp(),
    "input": lambda x: (x, x, x.t()),
    "empty": lambda x: torch.cat([x[:0], x]) + torch.zeros(0, 2, 3, dtype=x.dtype).sum(0),
    "written in place": lambda x: _written(x),
    "view in place": lambda x: x.clone().unsqueeze_(0).squeeze_(0).t_(),
}


def _written(x: Tensor) -> Tensor:
    y = torch.zeros(4, dtype=x.dtype)
    y[0] = x[0, 0]
    y[1:] += x[1] * x[0]
    return y.exp()


K = torch.tensor([[2, 0, 1], [0, 0, -1]])
P = torch.tensor([1, 0])
T = torch.tensor([[True, False, True], [False, True, True]])

INDEXING: dict[str, Function] = {
    "index": lambda x, k, p, t: x[p] + x[:, [2, 0, 0]] + x[p][:, p[:1]],
    "two indices": lambda x, k, p, t: x[p, p] * x[[0, 1], p],
    "apart": lambda x, k, p, t: x[None].expand(2, 2, 3)[p, :, p],
    "negative": lambda x, k, p, t: x[0][k] + x[:, torch.tensor([-1, -2])].sum(),
    "of an expression": lambda x, k, p, t: x.exp()[p].sin(),
    "mask": lambda x, k, p, t: x[torch.tensor([True, False])] * 2.0,
    "computed index": lambda x, k, p, t: x[0][(x > 0).long()] + x[0].exp()[x.argmax(1)].sum(),
    "gather": lambda x, k, p, t: x.gather(1, k % 3) + x.gather(0, k % 2),
    "gather of a scalar": lambda x, k, p, t: x[0, 0].gather(0, p[1:].reshape(())),
    "index_select": lambda x, k, p, t: x.index_select(1, p),
    "embedding": lambda x, k, p, t: torch.nn.functional.embedding(p, x),
    "_unsafe_index": lambda x, k, p, t: aten._unsafe_index(x, [p]),
    "index_put": lambda x, k, p, t: x.index_put((p,), x.exp()),
    "index_put, added": lambda x, k, p, t: x.index_put((torch.tensor([0, 0, 1]),), x[[0, 1, 1]], accumulate=True),
    "index_put, many": lambda x, k, p, t: x.new_zeros(3).index_put((k.reshape(-1),), x.reshape(-1), accumulate=True),
    "index_put, a number": lambda x, k, p, t: x.index_put((t,), torch.tensor(7.0, dtype=x.dtype)),
    "index_put of a computed mask": lambda x, k, p, t: x.index_put((x > 0,), torch.tensor(7.0, dtype=x.dtype)),
    "index_put behind": lambda x, k, p, t: aten.index_put(x, [None, torch.tensor([0, 0])], x[:, 1:], True),
    "_unsafe_index_put": lambda x, k, p, t: aten._unsafe_index_put(x, [p], x.exp(), True),
    "index_add": lambda x, k, p, t: x.index_add(0, p, x.exp(), alpha=2.0),
    "scatter": lambda x, k, p, t: x.scatter(1, k % 3, x.exp()),
    "scatter of a number": lambda x, k, p, t: x.scatter(1, p[:, None], 5.0),
    "scatter_add": lambda x, k, p, t: x.scatter_add(1, k % 3, x.exp()),
}


def positive_definite(x: Tensor, size: int = 3) -> Tensor:
    a = x.reshape(-1)[:size, None] * torch.linspace(0.1, 1.0, size, dtype=x.dtype)
    return a @ a.t() + torch.eye(size, dtype=x.dtype)


def general(x: Tensor, size: int = 3) -> Tensor:
    a = x.reshape(-1)[:size, None] * torch.linspace(0.1, 1.0, size, dtype=x.dtype).cos()
    return a + torch.eye(size, dtype=x.dtype).flip(0) * 2


def spectral(a: Tensor) -> Tensor:
    """The matrix of its eigenvectors, whose signs are free."""
    values, vectors = torch.linalg.eigh(a)
    return (vectors * values) @ vectors.mT


def gram(r: Tensor) -> Tensor:
    """Free of the signs of the rows of a triangular factor."""
    return r.mT @ r


LINEAR_ALGEBRA: dict[str, Function] = {
    "cholesky": lambda x, m: torch.linalg.cholesky_ex(positive_definite(x))[0],
    "cholesky upper": lambda x, m: torch.linalg.cholesky_ex(positive_definite(x), upper=True)[0],
    "cholesky of a batch": lambda x, m: torch.linalg.cholesky_ex(
        torch.stack([positive_definite(x), positive_definite(2 * x)])
    ),
    "failing cholesky": lambda x, m: torch.linalg.cholesky_ex(torch.stack([-positive_definite(x), m @ m.t()]))[1],
    "solve_triangular": lambda x, m: torch.linalg.solve_triangular(positive_definite(x).tril(), m, upper=False),
    "solve_triangular upper": lambda x, m: torch.linalg.solve_triangular(positive_definite(x).triu(), m, upper=True),
    "solve_triangular unit": lambda x, m: torch.linalg.solve_triangular(
        m.triu(), x.t(), upper=True, unitriangular=True
    ),
    "solve_triangular right": lambda x, m: torch.linalg.solve_triangular(
        positive_definite(x).tril(), m, upper=False, left=False
    ),
    "solve_triangular of a batch": lambda x, m: torch.linalg.solve_triangular(
        positive_definite(x).tril().expand(2, 3, 3), x.t()[None], upper=False
    ),
    "triangular_solve": lambda x, m: torch.triangular_solve(m, positive_definite(x).triu(), transpose=True)[0],
    "cholesky_solve": lambda x, m: torch.cholesky_solve(m, positive_definite(x).tril()),
    "cholesky_inverse": lambda x, m: (
        torch.cholesky_inverse(positive_definite(x).tril())
        + torch.cholesky_inverse(positive_definite(x).triu(), upper=True)
    ),
    "lu_factor": lambda x, m: tuple(torch.linalg.lu_factor_ex(general(x))),
    "lu_solve": lambda x, m: torch.linalg.lu_solve(*torch.linalg.lu_factor_ex(general(x))[:2], m),
    "lu_solve adjoint": lambda x, m: torch.linalg.lu_solve(*torch.linalg.lu_factor_ex(general(x))[:2], m, adjoint=True),
    "lu_solve right": lambda x, m: torch.linalg.lu_solve(*torch.linalg.lu_factor_ex(general(x))[:2], m, left=False),
    "solve": lambda x, m: torch.linalg.solve_ex(general(x), m)[0],
    "solve a vector": lambda x, m: torch.linalg.solve_ex(general(x), m[0])[0],
    "solve right": lambda x, m: torch.linalg.solve_ex(general(x), m, left=False)[0],
    "inverse": lambda x, m: torch.linalg.inv_ex(general(x)),
    "singular": lambda x, m: torch.linalg.inv_ex(general(x) * 0)[1],
    "determinant": lambda x, m: torch.linalg.det(general(x)),
    "log determinant": lambda x, m: tuple(torch.linalg.slogdet(general(x))),
    "eigenvalues": lambda x, m: torch.linalg.eigvalsh(positive_definite(x) + torch.diag(x[0])),
    "eigenvalues of the upper half": lambda x, m: torch.linalg.eigvalsh(general(x), UPLO="U"),
    "eigenvectors": lambda x, m: spectral(positive_definite(x) + torch.diag(x[0])),
    "QR": lambda x, m: gram(torch.linalg.qr(general(x), mode="r")[1]),
    "QR of a wide matrix": lambda x, m: gram(torch.linalg.qr(x, mode="r")[1]),
    "QR of a batch": lambda x, m: gram(torch.linalg.qr(torch.stack([x.t(), 2 * x.t()]), mode="r")[1]),
    "large cholesky": lambda x, m: torch.linalg.cholesky_ex(positive_definite(x.repeat(10, 2), 40))[0],
    "large triangular": lambda x, m: torch.linalg.solve_triangular(
        positive_definite(x.repeat(10, 2), 40).tril(), x.repeat(20, 1), upper=False
    ),
    "large triangular transposed": lambda x, m: torch.linalg.solve_triangular(
        positive_definite(x.repeat(10, 2), 40).tril().t(), x.repeat(20, 1), upper=True
    ),
    "large solve": lambda x, m: torch.linalg.solve_ex(general(x.repeat(10, 2), 40), x.repeat(20, 1))[0],
    "large product": lambda x, m: x.repeat(40, 30) @ x.repeat(40, 30).t(),
}

CATEGORIES: dict[str, tuple[dict[str, Function], tuple[str, ...]]] = {
    "unary": (UNARY, ()),
    "binary": (BINARY, ("y",)),
    "reductions": (REDUCTIONS, ()),
    "reductions of two": (TWO_OPERAND_REDUCTIONS, ("y",)),
    "views": (VIEWS, ()),
    "indexing": (INDEXING, ("k", "p", "t")),
    "linear algebra": (LINEAR_ALGEBRA, ("m",)),
}


def inputs_of(names: tuple[str, ...], dtype: torch.dtype) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(1)
    known = {
        "y": torch.randn(2, 3, generator=generator, dtype=torch.float64).to(dtype),
        "m": torch.randn(3, 3, generator=generator, dtype=torch.float64).to(dtype),
        "k": K,
        "p": P,
        "t": T,
    }
    return tuple(known[name] for name in names)


def rows(dtype: torch.dtype) -> Tensor:
    return (1.3 * torch.randn(11, 2, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)).to(dtype)


SPECIAL = torch.tensor(
    [
        [[math.nan, math.inf, -math.inf], [0.0, -0.0, 1.0]],
        [[math.inf, math.inf, 1.0], [-1.0, 1e300, -1e300]],
        [[-math.inf, -math.inf, -math.inf], [5e-324, -1e-310, 2.0]],
        [[0.0, 0.0, 0.0], [math.nan, 0.5, -0.5]],
        [[710.0, -746.0, 30.0], [-3.0, -2.5, 1e17]],
    ],
    dtype=torch.float64,
)


def graph_of(table: dict[str, Function], x: Tensor, data: tuple[Tensor, ...]) -> GraphModule:
    def everything(x: Tensor, *data: Tensor) -> tuple[Any, ...]:
        results: list[Tensor] = []
        for function in table.values():
            value = function(x, *data)
            results += value if isinstance(value, (tuple, list)) else [value]
        return tuple(results)

    with default_dtype(x.dtype):
        return make_fx(everything)(x, *data)


def names_of(table: dict[str, Function], x: Tensor, data: tuple[Tensor, ...]) -> list[str]:
    names = []
    for name, function in table.items():
        value = function(x, *data)
        names += [name] * (len(value) if isinstance(value, (tuple, list)) else 1)
    return names


def assert_same(name: str, got: Tensor, wanted: Tensor, *, epsilons: float = 200) -> None:
    assert got.shape == wanted.shape, name
    assert got.dtype == wanted.dtype, name
    if not wanted.is_floating_point():
        assert torch.equal(got, wanted), (name, got, wanted)
        return
    eps = torch.finfo(wanted.dtype).eps
    finite = wanted[torch.isfinite(wanted)]
    scale = float(finite.abs().max()) if finite.numel() else 0.0
    torch.testing.assert_close(
        got,
        wanted,
        rtol=epsilons * eps,
        atol=epsilons * eps * scale / 20,
        equal_nan=True,
        msg=lambda text: f"{name}: {text}",
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["double", "single"])
@pytest.mark.parametrize("category", CATEGORIES)
@pytest.mark.filterwarnings("ignore:torch.triangular_solve is deprecated:UserWarning")
def test_operators(category: str, dtype: torch.dtype) -> None:
    table, data_names = CATEGORIES[category]
    x, data = rows(dtype), inputs_of(data_names, dtype)
    module, names = graph_of(table, x[0], data), names_of(table, x[0], data)
    function = compile_native(module, (x[0], *data))
    batch = function.batched(x, *data)
    with default_dtype(dtype):
        for number, row in enumerate(map(Tensor.clone, x)):
            wanted, got = module(row, *data), function(row, *data)
            for name, one, two, expected in zip(names, got, (part[number] for part in batch), wanted, strict=True):
                # matrices of 40 rows have condition numbers of some thousands
                epsilons = 1e4 if category == "linear algebra" else 200
                assert_same(f"{name} of row {number}", one, expected, epsilons=epsilons)
                assert_same(f"{name} of row {number}, side by side", two, expected, epsilons=epsilons)


@pytest.mark.parametrize("category", ["unary", "binary", "reductions", "views"])
def test_infinities_and_nan(category: str) -> None:
    table, data_names = CATEGORIES[category]
    # C leaves open what whole number NaN or infinity is
    undefined = ("long", "casts", "bitwise", "int power", "mixed types")
    table = {name: function for name, function in table.items() if name not in undefined and "of int" not in name}
    data = inputs_of(data_names, torch.float64)
    module, names = graph_of(table, SPECIAL[0], data), names_of(table, SPECIAL[0], data)
    function = compile_native(module, (SPECIAL[0], *data))
    batch = function.batched(SPECIAL, *data)
    with default_dtype(torch.float64):
        for number, row in enumerate(map(Tensor.clone, SPECIAL)):
            wanted, got = module(row, *data), function(row, *data)
            for name, one, two, expected in zip(names, got, (part[number] for part in batch), wanted, strict=True):
                assert_same(f"{name} of row {number}", one, expected)
                assert_same(f"{name} of row {number}, side by side", two, expected)


@pytest.mark.filterwarnings("ignore:torch.triangular_solve is deprecated:UserWarning")
def test_every_operator_of_the_table_is_tested() -> None:
    used: set[str] = set()
    for table, data_names in CATEGORIES.values():
        x, data = rows(torch.float64), inputs_of(data_names, torch.float64)
        used |= {_name(node) for node in graph_of(table, x[0], data).graph.nodes if node.op == "call_function"}
    untested = sorted(set(OPERATORS) - used)
    # other spellings of operators that are tested
    assert untested == sorted(OTHER_SPELLINGS)


OTHER_SPELLINGS = ["aten.lift_fresh.default"]  # of a constant, before capture drops it


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (lambda x: (torch.linalg.svdvals(x),), "_linalg_svd"),
        (lambda x: (x[x > 0].sum(),), "mask that is computed"),
        (lambda x: (x.to(torch.complex128).real,), "view_as_real|complex"),
        (lambda x: (x.half().sum(),), "float16"),
        (lambda x: (torch.rand(2) * x[0, 0],), "rand"),
    ],
)
def test_what_is_not_in_the_table_is_refused_by_name(function: Function, words: str) -> None:
    x = torch.ones(2, 3, dtype=torch.float64)
    with pytest.raises(CompileError, match=words):
        compile_native(make_fx(function)(x), (x,))
