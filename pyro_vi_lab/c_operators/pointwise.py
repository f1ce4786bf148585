"""Operators that work element by element."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from pyro_vi_lab.c_builder import Builder
from pyro_vi_lab.c_expressions import COSTS, Expr, Lazy, Pieces
from pyro_vi_lab.c_operators.arguments import Operator, Result, operand, promoted
from pyro_vi_lab.errors import CompileError

Formula = Callable[..., Expr]
Number = float


def _in_result_type(formula: Formula, count: int) -> Operator:
    """An operator of ``count`` operands that computes in the type of its result; more arguments are the formula's."""

    def operator(b: Builder, result: Result, *args: Any, **options: Any) -> Lazy:
        operands = [operand(b, value, result.dtype) for value in args[:count]]
        rest = args[count:]
        return b.elementwise(lambda *values: formula(*values, *rest, **options), *operands, shape=result.shape)

    return operator


def _in_promoted_type(formula: Formula, count: int) -> Operator:
    """An operator that computes in the common type of its operands, such as a comparison."""

    def operator(b: Builder, result: Result, *args: Any) -> Lazy:
        dtype = promoted(*args[:count])
        operands = [operand(b, value, dtype) for value in args[:count]]
        return b.elementwise(lambda *values: formula(*values).to(result.dtype), *operands, shape=result.shape)

    return operator


def _function(name: str) -> Formula:
    return lambda x: x.call(name)


def _slow(name: str) -> Formula:
    """A function of ours, in double precision."""
    return lambda x: x.owner.apply(f"{name}({{0}})", x.to(torch.float64), cost=COSTS["slow"]).to(x.dtype)


def _binary_call(name: str) -> Formula:
    def formula(x: Expr, y: Expr) -> Expr:
        suffix = "f" if x.dtype is torch.float32 else ""
        return x.owner.apply(f"{name}{suffix}({{0}}, {{1}})", x, y, cost=2 * COSTS["call"])

    return formula


def _is_nan(x: Expr) -> Expr:
    return x.owner.apply("{0} != {0}", x, dtype=torch.bool)


def _not(x: Expr) -> Expr:
    return x.owner.apply("!{0}", x, dtype=torch.bool)


def _and(x: Expr, y: Expr) -> Expr:
    return x.owner.apply("{0} & {1}", x, y)


def _or(x: Expr, y: Expr) -> Expr:
    return x.owner.apply("{0} | {1}", x, y)


def minimum(x: Expr, y: Expr) -> Expr:
    """The smaller, or NaN if one is."""
    return _or(x < y, _is_nan(x)).where(x, y)


def maximum(x: Expr, y: Expr) -> Expr:
    """The larger, or NaN if one is."""
    return _or(x > y, _is_nan(x)).where(x, y)


def _fmin(x: Expr, y: Expr) -> Expr:
    return _or(x < y, _is_nan(y)).where(x, y)


def _fmax(x: Expr, y: Expr) -> Expr:
    return _or(x > y, _is_nan(y)).where(x, y)


def _square(x: Expr) -> Expr:
    return x * x


def _abs(x: Expr) -> Expr:
    if x.dtype.is_floating_point:
        return x.call("fabs", 1)
    return x if x.dtype is torch.bool else (x < 0).where(-x, x)


def _sqrt(x: Expr) -> Expr:
    return x.call("sqrt", COSTS["sqrt"])


def _reciprocal(x: Expr) -> Expr:
    return x.owner.number(1, x.dtype) / x


def _rsqrt(x: Expr) -> Expr:
    return _reciprocal(_sqrt(x))


def sigmoid(x: Expr) -> Expr:
    """The logistic function, by the exponential that the log of it needs too."""
    z = (-_abs(x)).call("exp")
    return (x < 0).where(z, 1) / (z + 1)


def _sign(x: Expr) -> Expr:
    if x.dtype is torch.bool:
        return x
    result = (x > 0).to(x.dtype) - (x < 0).to(x.dtype)
    return result


def _exact(name: str) -> Formula:
    """Rounding, which changes no integer."""
    return lambda x: x.call(name, 2) if x.dtype.is_floating_point else x


def _softplus(x: Expr, beta: Number = 1, threshold: Number = 20) -> Expr:
    scaled = x if beta == 1 else x * beta
    value = scaled.call("exp").call("log1p")
    return (scaled > threshold).where(x, value if beta == 1 else value / beta)


def _softplus_backward(grad: Expr, x: Expr, beta: Number, threshold: Number) -> Expr:
    scaled = x if beta == 1 else x * beta
    z = scaled.call("exp")
    return (scaled > threshold).where(grad, grad * z / (z + 1))


def _log_sigmoid(x: Expr) -> Expr:
    return minimum(x, x.owner.number(0, x.dtype)) - (-_abs(x)).call("exp").call("log1p")


def _log_sigmoid_backward(grad: Expr, x: Expr, _: Expr) -> Expr:
    negative, one = x < 0, x.owner.number(1, x.dtype)
    z = (-_abs(x)).call("exp")
    return grad * (negative.where(one, 0) - negative.where(one, -1) * (z / (z + 1)))


def _xlogy(x: Expr, y: Expr) -> Expr:
    product = x.equals(0).where(0, x * y.call("log"))
    return _is_nan(y).where(y, product)


def _xlog1py(x: Expr, y: Expr) -> Expr:
    product = x.equals(0).where(0, x * y.call("log1p"))
    return _is_nan(y).where(y, product)


def _logaddexp(x: Expr, y: Expr) -> Expr:
    arguments = x.to(torch.float64), y.to(torch.float64)
    return x.owner.apply("vl_logaddexp({0}, {1})", *arguments, cost=2 * COSTS["call"]).to(x.dtype)


def _power(x: Expr, y: Expr) -> Expr:
    if not x.dtype.is_floating_point:
        return x.owner.apply("vl_power({0}, {1})", x.to(torch.int64), y.to(torch.int64), cost=16).to(x.dtype)
    return _binary_call("pow")(x, y)


_POWERS: dict[float, Formula] = {
    0.0: lambda x: x.owner.number(1, x.dtype),
    1.0: lambda x: x,
    2.0: _square,
    3.0: lambda x: x * x * x,
    0.5: _sqrt,
    -0.5: _rsqrt,
    -1.0: _reciprocal,
    -2.0: lambda x: _reciprocal(x * x),
}


def _power_of_number(b: Builder, result: Result, x: Lazy, exponent: Number) -> Lazy:
    if not isinstance(exponent, (int, float)):
        raise CompileError("a complex power")
    known = _POWERS.get(float(exponent))
    if known is not None and (result.dtype.is_floating_point or exponent >= 0):
        return b.elementwise(known, b.cast(x, result.dtype))
    return b.elementwise(_power, b.cast(x, result.dtype), b.full((), exponent, result.dtype))


def _add(sign: int) -> Operator:
    def operator(b: Builder, result: Result, x: Any, y: Any, alpha: Number = 1) -> Lazy:
        operands = [operand(b, value, result.dtype) for value in (x, y)]
        if sign > 0 and alpha == 1 and all(one.shape == result.shape for one in operands):
            pieces = [one for one in operands if isinstance(one, Pieces)]
            if pieces:
                parts = [
                    part
                    for one in sorted(operands, key=lambda one: isinstance(one, Pieces))
                    for part in (one.parts if isinstance(one, Pieces) else ((one, lambda whole: whole),))
                ]
                return Pieces(result.shape, result.dtype, parts)

        def formula(first: Expr, second: Expr) -> Expr:
            scaled = second if alpha == 1 else second * alpha
            return first + scaled if sign > 0 else first - scaled

        return b.elementwise(formula, *operands, shape=result.shape)

    return operator


def _rsub(b: Builder, result: Result, x: Any, y: Any, alpha: Number = 1) -> Lazy:
    formula = (lambda u, v: v - u) if alpha == 1 else (lambda u, v: v - u * alpha)
    return b.elementwise(formula, *(operand(b, value, result.dtype) for value in (x, y)), shape=result.shape)


def _floor_divide(x: Expr, y: Expr) -> Expr:
    if not x.dtype.is_floating_point:
        return x.owner.apply("vl_floor_divide({0}, {1})", x.to(torch.int64), y.to(torch.int64), cost=16).to(x.dtype)
    remainder = _binary_call("fmod")(x, y)
    quotient = (x - remainder) / y
    wrong = _and(_not(remainder.equals(0)), x.owner.apply("{0} != {1}", y < 0, remainder < 0))
    quotient = wrong.where(quotient - 1, quotient)
    below = quotient.call("floor", 2)
    rounded = (quotient - below > 0.5).where(below + 1, below)
    signed_zero = _binary_call("copysign")(x * 0, x / y)
    return y.equals(0).where(x / y, quotient.equals(0).where(signed_zero, rounded))


def _divide(b: Builder, result: Result, x: Any, y: Any, rounding_mode: str | None = None) -> Lazy:
    formulas: dict[str | None, Formula] = {
        None: lambda u, v: u / v,
        "trunc": lambda u, v: (
            (u / v).call("trunc", 2)
            if u.dtype.is_floating_point
            else u.owner.apply("{1} ? {0} / {1} : 0", u, v, cost=COSTS["div"])
        ),
        "floor": _floor_divide,
    }
    operands = (operand(b, value, result.dtype) for value in (x, y))
    return b.elementwise(formulas[rounding_mode], *operands, shape=result.shape)


def _remainder(x: Expr, y: Expr) -> Expr:
    if not x.dtype.is_floating_point:
        return x - _floor_divide(x, y) * y
    return x.owner.apply("vl_remainder({0}, {1})", x.to(torch.float64), y.to(torch.float64), cost=32).to(x.dtype)


def _fmod(x: Expr, y: Expr) -> Expr:
    if not x.dtype.is_floating_point:
        return x.owner.apply("{1} ? {0} % {1} : 0", x, y, cost=COSTS["div"])
    return _binary_call("fmod")(x, y)


def _where(b: Builder, result: Result, condition: Lazy, yes: Any, no: Any) -> Lazy:
    choices = (operand(b, value, result.dtype) for value in (yes, no))
    return b.elementwise(lambda c, u, v: c.where(u, v), b.cast(condition, torch.bool), *choices, shape=result.shape)


def _masked_fill(b: Builder, result: Result, x: Lazy, mask: Lazy, value: Any) -> Lazy:
    return _where(b, result, mask, value, x)


def _clamp(b: Builder, result: Result, x: Lazy, least: Any = None, most: Any = None) -> Lazy:
    x = b.cast(x, result.dtype)
    if least is not None:
        bound = operand(b, least, result.dtype)
        x = b.elementwise(maximum if isinstance(least, Lazy) else lambda v, w: (v < w).where(w, v), x, bound)
    if most is not None:
        bound = operand(b, most, result.dtype)
        x = b.elementwise(minimum if isinstance(most, Lazy) else lambda v, w: (v > w).where(w, v), x, bound)
    return b.elementwise(lambda v: v, x, shape=result.shape)


def _clamp_max(b: Builder, result: Result, x: Lazy, most: Any) -> Lazy:
    return _clamp(b, result, x, None, most)


def _cast(b: Builder, result: Result, x: Lazy, *_: Any, **__: Any) -> Lazy:
    return b.cast(x, result.dtype)


def _polygamma(b: Builder, result: Result, order: int, x: Lazy) -> Lazy:
    def formula(v: Expr) -> Expr:
        wide = v.to(torch.float64)
        text = {0: "vl_digamma({0})", 1: "vl_trigamma({0})"}.get(order, f"vl_polygamma({order}, {{0}})")
        return v.owner.apply(text, wide, cost=COSTS["slow"]).to(v.dtype)

    return b.elementwise(formula, b.cast(x, result.dtype))


def _logit(x: Expr, eps: Number | None = None) -> Expr:
    if eps is not None:
        x = (x < eps).where(x.owner.number(eps, x.dtype), x)
        x = (x > 1 - eps).where(x.owner.number(1 - eps, x.dtype), x)
    return (x / (-x + 1)).call("log")


def _log_sigmoid_with_buffer(b: Builder, result: tuple[Result, Result], x: Lazy) -> tuple[Lazy, Lazy]:
    buffer = b.elementwise(lambda v: (-_abs(v)).call("exp"), x)  # of which the gradient is made, on the CPU
    return b.elementwise(_log_sigmoid, x), buffer if result[1].shape == x.shape else b.full(result[1].shape, 0, x.dtype)


def _nan_to_num(
    b: Builder, result: Result, x: Lazy, nan: float | None = None, most: float | None = None, least: float | None = None
) -> Lazy:
    if not result.dtype.is_floating_point:
        return x
    limits = torch.finfo(result.dtype)
    high, low = (limits.max if most is None else most), (limits.min if least is None else least)

    def formula(v: Expr) -> Expr:
        bounded = v.equals(math.inf).where(high, v.equals(-math.inf).where(low, v))
        return _is_nan(v).where(nan or 0.0, bounded)

    return b.elementwise(formula, x)


_UNARY: dict[str, Formula] = {
    **{
        name: _function(name) for name in ("exp", "exp2", "expm1", "log", "log2", "log10", "log1p", "sin", "cos", "tan")
    },
    **{name: _function(name) for name in ("asin", "acos", "atan", "sinh", "cosh", "tanh", "asinh", "acosh", "atanh")},
    **{name: _function(name) for name in ("erf", "erfc")},
    **{name: _slow(f"vl_{name}") for name in ("lgamma", "digamma", "erfinv")},
    **{name: _exact(c_name) for name, c_name in (("floor", "floor"), ("ceil", "ceil"), ("trunc", "trunc"))},
    "round": _exact("rint"),
    "frac": lambda x: x - x.call("trunc", 2),
    "neg": lambda x: -x,
    "abs": _abs,
    "sqrt": _sqrt,
    "rsqrt": _rsqrt,
    "reciprocal": _reciprocal,
    "sigmoid": sigmoid,
    "sign": _sign,
    "sgn": _sign,
    "relu": lambda x: (x <= 0).where(0, x),
    "logit": _logit,
    "softplus": _softplus,
    "deg2rad": lambda x: x * (math.pi / 180),
    "bitwise_not": lambda x: _not(x) if x.dtype is torch.bool else x.owner.apply("~{0}", x),
}

_COMPARISONS: dict[str, Formula] = {
    "eq": lambda x, y: x.equals(y),
    "ne": lambda x, y: _not(x.equals(y)),
    "lt": lambda x, y: x < y,
    "le": lambda x, y: x <= y,
    "gt": lambda x, y: x > y,
    "ge": lambda x, y: x >= y,
}

OPERATORS: dict[str, Operator] = {
    **{f"aten.{name}.default": _in_result_type(formula, 1) for name, formula in _UNARY.items()},
    **{
        f"aten.{name}.{kind}": _in_promoted_type(formula, 2)
        for name, formula in _COMPARISONS.items()
        for kind in ("Tensor", "Scalar")
    },
    **{
        f"aten.{name}.{kind}": operator
        for kind in ("Tensor", "Scalar")
        for name, operator in (("add", _add(1)), ("sub", _add(-1)), ("rsub", _rsub))
    },
    **{f"aten.mul.{kind}": _in_result_type(lambda x, y: x * y, 2) for kind in ("Tensor", "Scalar")},
    **{f"aten.div.{kind}": _divide for kind in ("Tensor", "Scalar", "Tensor_mode")},
    **{
        f"aten.{name}.{kind}": _in_result_type(formula, 2)
        for kind in ("Tensor", "Scalar")
        for name, formula in (
            ("remainder", _remainder),
            ("fmod", _fmod),
            ("bitwise_and", _and),
            ("bitwise_or", _or),
            ("bitwise_xor", lambda x, y: x.owner.apply("{0} ^ {1}", x, y)),
        )
    },
    **{f"aten.xlogy.{kind}": _in_result_type(_xlogy, 2) for kind in ("Tensor", "Scalar_Self", "Scalar_Other")},
    **{
        f"aten.special_xlog1py.{kind}": _in_result_type(_xlog1py, 2)
        for kind in ("default", "self_scalar", "other_scalar")
    },
    **{
        f"aten.{name}.default": _in_result_type(formula, 2)
        for name, formula in (
            ("minimum", minimum),
            ("maximum", maximum),
            ("fmin", _fmin),
            ("fmax", _fmax),
            ("atan2", _binary_call("atan2")),
            ("hypot", _binary_call("hypot")),
            ("logaddexp", _logaddexp),
            ("sigmoid_backward", lambda grad, y: grad * ((-y + 1) * y)),
            ("tanh_backward", lambda grad, y: grad * (-(y * y) + 1)),
            ("softplus_backward", _softplus_backward),
            ("threshold_backward", lambda grad, x, threshold: (x <= threshold).where(0, grad)),
        )
    },
    "aten.floor_divide.default": _in_result_type(_floor_divide, 2),
    "aten.pow.Tensor_Scalar": _power_of_number,
    "aten.pow.Tensor_Tensor": _in_result_type(_power, 2),
    "aten.pow.Scalar": _in_result_type(_power, 2),
    "aten.addcmul.default": _in_result_type(
        lambda x, u, v, *, value=1: x + (u * v if value == 1 else u * v * value), 3
    ),
    "aten.addcdiv.default": _in_result_type(
        lambda x, u, v, *, value=1: x + (u / v if value == 1 else u * value / v), 3
    ),
    "aten.lerp.Scalar": _in_result_type(
        lambda x, y, weight: x + (y - x) * weight if abs(weight) < 0.5 else y - (y - x) * (1 - weight), 2
    ),
    "aten.lerp.Tensor": _in_result_type(
        lambda x, y, weight: (_abs(weight) < 0.5).where(x + (y - x) * weight, y - (y - x) * (-weight + 1)), 3
    ),
    "aten.polygamma.default": _polygamma,
    "aten.log_sigmoid_forward.default": _log_sigmoid_with_buffer,
    "aten.log_sigmoid_backward.default": _in_result_type(_log_sigmoid_backward, 3),
    "aten.isnan.default": _in_promoted_type(_is_nan, 1),
    "aten.isinf.default": _in_promoted_type(
        lambda x: _abs(x).equals(math.inf) if x.dtype.is_floating_point else x < x, 1
    ),
    "aten.logical_not.default": _in_promoted_type(lambda x: _not(x.to(torch.bool)), 1),
    "aten.logical_and.default": _in_promoted_type(lambda x, y: _and(x.to(torch.bool), y.to(torch.bool)), 2),
    "aten.logical_or.default": _in_promoted_type(lambda x, y: _or(x.to(torch.bool), y.to(torch.bool)), 2),
    "aten.logical_xor.default": _in_promoted_type(
        lambda x, y: x.owner.apply("{0} ^ {1}", x.to(torch.bool), y.to(torch.bool)), 2
    ),
    "aten.nan_to_num.default": _nan_to_num,
    "aten.where.self": _where,
    **{f"aten.masked_fill.{kind}": _masked_fill for kind in ("Scalar", "Tensor")},
    **{f"aten.clamp.{kind}": _clamp for kind in ("default", "Tensor")},
    **{f"aten.clamp_min.{kind}": _clamp for kind in ("default", "Tensor")},
    **{f"aten.clamp_max.{kind}": _clamp_max for kind in ("default", "Tensor")},
    **{
        f"aten.{name}.default": _cast
        for name in ("_to_copy", "clone", "alias", "detach", "lift_fresh", "lift_fresh_copy")
    },
    "prims.convert_element_type.default": _cast,
}
"""By the name of the overload."""
