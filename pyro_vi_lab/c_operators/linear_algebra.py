"""Products of matrices, factors, triangular and general systems."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from pyro_vi_lab.c_builder import PRODUCT, SUM, Builder
from pyro_vi_lab.c_expressions import Affine, Expr, Lazy, Stored
from pyro_vi_lab.c_operators.arguments import Operator, Result
from pyro_vi_lab.errors import CompileError

LARGE_PRODUCT = 2**18
"""Multiplications from which on a product of matrices is left to BLAS."""
LARGE_SIDE = 4

DOUBLE, WHOLE = torch.float64, torch.int32


# --- products ------------------------------------------------------------------------------------------


def product(b: Builder, x: Lazy, y: Lazy) -> Lazy:
    """Products of matrices ``(*batch, n, k)`` and ``(*batch, k, m)``."""
    n, k, m = x.shape[-2], x.shape[-1], y.shape[-1]
    rank = len(x.shape)
    uniform = b.lanes == 1 or not (x.varying or y.varying)
    if rank == 2 and uniform and x.dtype is DOUBLE and n * k * m >= LARGE_PRODUCT and min(n, k, m) >= LARGE_SIDE:
        x, y = b.contiguous(x), b.contiguous(y)
        result = b.allocate((n, m), DOUBLE, varying=x.varying or y.varying)
        b.call(f"vl_product(lapack, {n}, {k}, {m}, {{0}}, {{1}}, {{2}})", (), [x, y], [result])
        return result
    terms = b.elementwise(lambda u, v: u * v, b.unsqueeze(x, rank), b.unsqueeze(y, rank - 2))
    return b.fold(terms, [rank - 1], SUM, 0, x.dtype)


def _mm(b: Builder, result: Result, x: Lazy, y: Lazy) -> Lazy:
    return product(b, x, y)


def _mv(b: Builder, result: Result, x: Lazy, y: Lazy) -> Lazy:
    return b.fold(b.elementwise(lambda u, v: u * v, x, y), [1], SUM, 0, result.dtype)


def _dot(b: Builder, result: Result, x: Lazy, y: Lazy) -> Lazy:
    return b.fold(b.elementwise(lambda u, v: u * v, x, y), [0], SUM, 0, result.dtype)


def _plus_product(matrix: Operator) -> Operator:
    def operator(
        b: Builder, result: Result, base: Lazy, x: Lazy, y: Lazy, *, beta: float = 1, alpha: float = 1
    ) -> Lazy:
        def formula(start: Expr, added: Expr) -> Expr:
            scaled = added if alpha == 1 else added * alpha
            return scaled if beta == 0 else (start if beta == 1 else start * beta) + scaled

        return b.elementwise(formula, base, matrix(b, result, x, y), shape=result.shape)

    return operator


# --- matrices in memory --------------------------------------------------------------------------------


def _matrix(b: Builder, x: Lazy, batch: Sequence[int], dtype: torch.dtype = DOUBLE) -> Stored:
    """In memory, in double precision, one for every member of the batch."""
    count = len(x.shape) - len(batch)
    own = x.shape[len(x.shape) - 2 :] if count >= 0 else x.shape
    return b.contiguous(b.expand(b.cast(x, dtype), (*batch, *own)))


def _steps(b: Builder, x: Stored, *, transposed: bool = False) -> str:
    """Distances between rows and between columns, as they are passed to the functions of the library."""
    lanes = b.lanes if x.varying else 1
    rows, columns = x.strides[-2] * lanes, x.strides[-1] * lanes
    return f"{columns}, {rows}" if transposed else f"{rows}, {columns}"


def _step(b: Builder, x: Stored) -> int:
    return x.strides[-1] * (b.lanes if x.varying else 1)


def _cholesky(
    b: Builder, results: Sequence[Result], a: Lazy, *, upper: bool = False, check_errors: bool = False
) -> tuple[Lazy, Lazy]:
    batch, n = a.shape[:-2], a.shape[-1]
    matrix = _matrix(b, a, batch)
    factor = b.allocate(a.shape, DOUBLE, varying=a.varying)
    info = b.allocate(batch, WHOLE, varying=a.varying)
    # the upper factor is the transpose of the lower one of the same matrix, of which it reads the other half
    text = (
        f"*{{2}} = vl_cholesky(lapack, {n}, {{0}}, {_steps(b, matrix, transposed=upper)}, "
        f"{{1}}, {_steps(b, factor, transposed=upper)})"
    )
    b.call(text, batch, [matrix], [factor, info])
    return b.cast(factor, a.dtype), info


def _triangular(b: Builder, a: Lazy, y: Lazy, *, upper: bool, left: bool, unit: bool) -> Lazy:
    """X of A X = Y, or of X A = Y."""
    batch = tuple(torch.broadcast_shapes(a.shape[:-2], y.shape[:-2]))
    dtype = y.dtype
    if not left:  # the same as A' X' = Y'
        a, y, upper = b.transpose(a), b.transpose(y), not upper
    n, m = y.shape[-2:]
    a, y = _matrix(b, a, batch), _matrix(b, y, batch)
    x = b.allocate((*batch, n, m), DOUBLE, varying=a.varying or y.varying)
    text = (
        f"vl_triangular(lapack, {n}, {m}, {{0}}, {_steps(b, a)}, {{1}}, {_steps(b, y)}, {{2}}, {_steps(b, x)}, "
        f"{int(upper)}, {int(unit)})"
    )
    b.call(text, batch, [a, y], [x])
    result = b.cast(x, dtype)
    return result if left else b.transpose(result)


def _solve_triangular(
    b: Builder,
    result: Result,
    a: Lazy,
    y: Lazy,
    *,
    upper: bool,
    left: bool = True,
    unitriangular: bool = False,
) -> Lazy:
    return _triangular(b, a, y, upper=upper, left=left, unit=unitriangular)


def _old_triangular_solve(
    b: Builder,
    results: Sequence[Result],
    y: Lazy,
    a: Lazy,
    upper: bool = True,
    transpose: bool = False,
    unitriangular: bool = False,
) -> tuple[Lazy, Lazy]:
    matrix = b.transpose(a) if transpose else a
    return _triangular(b, matrix, y, upper=upper != transpose, left=True, unit=unitriangular), a


def _cholesky_solve(b: Builder, result: Result, y: Lazy, factor: Lazy, upper: bool = False) -> Lazy:
    lower, y = (b.transpose(factor) if upper else factor), b.readable(y)
    inner = _triangular(b, lower, y, upper=False, left=True, unit=False)
    return _triangular(b, b.transpose(lower), inner, upper=True, left=True, unit=False)


def _cholesky_inverse(b: Builder, result: Result, factor: Lazy, upper: bool = False) -> Lazy:
    identity = b.positions(factor.shape, lambda index: index[-2].equals(index[-1]).to(factor.dtype))
    return _cholesky_solve(b, result, identity, factor, upper)


def _lu(b: Builder, a: Lazy) -> tuple[Stored, Stored, Stored]:
    """Factors in one matrix, exchanged rows, and info."""
    batch, n = a.shape[:-2], a.shape[-1]
    if a.shape[-2] != n:
        raise CompileError("factors of a matrix that is not square")
    matrix = _matrix(b, a, batch)
    factors = b.allocate(a.shape, DOUBLE, varying=a.varying)
    pivots = b.allocate(a.shape[:-1], WHOLE, varying=a.varying)
    info = b.allocate(batch, WHOLE, varying=a.varying)
    text = (
        f"*{{3}} = vl_lu(lapack, {n}, {{0}}, {_steps(b, matrix)}, {{1}}, {_steps(b, factors)}, {{2}}, "
        f"{_step(b, pivots)})"
    )
    b.call(text, batch, [matrix], [factors, pivots, info])
    return factors, pivots, info


def _lu_factor(b: Builder, results: Sequence[Result], a: Lazy, **_: Any) -> tuple[Lazy, Lazy, Lazy]:
    factors, pivots, info = _lu(b, a)
    return b.cast(factors, a.dtype), pivots, info


def _solved(b: Builder, factors: Lazy, pivots: Lazy, y: Lazy, *, transposed: bool = False) -> Lazy:
    batch = tuple(torch.broadcast_shapes(factors.shape[:-2], y.shape[:-2]))
    dtype = y.dtype
    n, m = y.shape[-2:]
    factors, y = _matrix(b, factors, batch), _matrix(b, y, batch)
    order = b.contiguous(b.expand(b.cast(pivots, WHOLE), (*batch, n)))
    x = b.allocate((*batch, n, m), DOUBLE, varying=factors.varying or y.varying)
    text = (
        f"vl_lu_solve({n}, {m}, {{0}}, {_steps(b, factors)}, {{1}}, {_step(b, order)}, {{2}}, {_steps(b, y)}, {{3}}, "
        f"{_steps(b, x)}, {int(transposed)})"
    )
    b.call(text, batch, [factors, order, y], [x])
    return b.cast(x, dtype)


def _lu_solve(
    b: Builder,
    result: Result,
    factors: Lazy,
    pivots: Lazy,
    y: Lazy,
    *,
    left: bool = True,
    adjoint: bool = False,
) -> Lazy:
    if left:
        return _solved(b, factors, pivots, y, transposed=adjoint)
    return b.transpose(_solved(b, factors, pivots, b.transpose(y), transposed=not adjoint))


def _solve(
    b: Builder, results: Sequence[Result], a: Lazy, y: Lazy, *, left: bool = True, check_errors: bool = False
) -> tuple[Lazy, ...]:
    factors, pivots, info = _lu(b, a)
    vector = len(y.shape) == 1 or (len(y.shape) == len(a.shape) - 1 and y.shape == a.shape[:-1])
    right = b.unsqueeze(y, len(y.shape)) if vector else y
    if left:
        x = _solved(b, factors, pivots, right)
    else:
        x = b.transpose(_solved(b, factors, pivots, b.transpose(right), transposed=True))
    return b.reshape(x, results[0].shape), b.cast(factors, a.dtype), pivots, info


def _inverse(b: Builder, results: Sequence[Result], a: Lazy, *, check_errors: bool = False) -> tuple[Lazy, Lazy]:
    factors, pivots, info = _lu(b, a)
    identity = b.positions(a.shape, lambda index: index[-2].equals(index[-1]).to(a.dtype))
    return _solved(b, factors, pivots, identity), info


def _diagonal_and_parity(b: Builder, factors: Stored, pivots: Stored, dtype: torch.dtype) -> tuple[Lazy, Lazy]:
    rank, n = len(factors.shape), factors.shape[-1]
    index = [Affine.loop(number) for number in range(rank - 1)]
    diagonal = b.view(factors, factors.shape[:-1], [*index, index[-1]])
    places = b.positions((n,), lambda index: index[0] + 1)
    parity = b.elementwise(
        lambda pivot, place: pivot.to(torch.int64).equals(place).where(pivot.owner.number(1, DOUBLE), -1.0),
        pivots,
        places,
    )
    return diagonal, b.fold(parity, [rank - 2], PRODUCT, 1, DOUBLE)


def _determinant(b: Builder, results: Sequence[Result], a: Lazy) -> tuple[Lazy, ...]:
    factors, pivots, _ = _lu(b, a)
    diagonal, parity = _diagonal_and_parity(b, factors, pivots, a.dtype)
    value = b.fold(diagonal, [len(diagonal.shape) - 1], PRODUCT, 1, DOUBLE)
    return b.cast(b.elementwise(lambda u, v: u * v, value, parity), a.dtype), b.cast(factors, a.dtype), pivots


def _log_determinant(b: Builder, results: Sequence[Result], a: Lazy) -> tuple[Lazy, ...]:
    factors, pivots, _ = _lu(b, a)
    diagonal, parity = _diagonal_and_parity(b, factors, pivots, a.dtype)
    last = [len(diagonal.shape) - 1]

    def sign(value: Expr) -> Expr:
        return (value > 0).where(1.0, (value < 0).where(-1.0, value * 0))

    signs = b.fold(b.elementwise(sign, diagonal), last, PRODUCT, 1, DOUBLE)
    logs = b.fold(b.elementwise(lambda value: value.call("fabs", 1).call("log"), diagonal), last, SUM, 0, DOUBLE)
    sign_of_all = b.elementwise(lambda u, v: u * v, signs, parity)
    return b.cast(sign_of_all, a.dtype), b.cast(logs, a.dtype), b.cast(factors, a.dtype), pivots


def _eigh(b: Builder, results: Sequence[Result], a: Lazy, UPLO: str = "L", compute_v: bool = True) -> tuple[Lazy, Lazy]:
    batch, n = a.shape[:-2], a.shape[-1]
    matrix = _matrix(b, a, batch)
    values = b.allocate(a.shape[:-1], DOUBLE, varying=a.varying)
    vectors = b.allocate(a.shape if compute_v else (*batch, 0), DOUBLE, varying=a.varying)
    info = b.allocate(batch, WHOLE, varying=a.varying)
    place = f"{{2}}, {_steps(b, vectors)}" if compute_v else "0, 0, 0"
    text = (
        f"*{{{3 if compute_v else 2}}} = vl_eigh(lapack, {n}, {{0}}, {_steps(b, matrix)}, {int(UPLO == 'U')}, "
        f"{{1}}, {_step(b, values)}, {place})"
    )
    b.call(text, batch, [matrix], [values, vectors, info] if compute_v else [values, info])
    return b.cast(values, a.dtype), b.cast(vectors, a.dtype)


def _qr(b: Builder, results: Sequence[Result], a: Lazy, mode: str = "reduced") -> tuple[Lazy, Lazy]:
    if mode != "r":
        raise CompileError(f"QR factors with mode {mode!r}")
    batch, (n, m) = a.shape[:-2], a.shape[-2:]
    matrix = _matrix(b, a, batch)
    factor = b.allocate((*batch, min(n, m), m), DOUBLE, varying=a.varying)
    info = b.allocate(batch, WHOLE, varying=a.varying)
    text = f"*{{2}} = vl_qr(lapack, {n}, {m}, {{0}}, {_steps(b, matrix)}, {{1}}, {_steps(b, factor)})"
    b.call(text, batch, [matrix], [factor, info])
    return b.allocate((0,), a.dtype, varying=False), b.cast(factor, a.dtype)


OPERATORS: dict[str, Operator] = {
    "aten._linalg_eigh.default": _eigh,
    "aten.linalg_qr.default": _qr,
    "aten.mm.default": _mm,
    "aten.bmm.default": _mm,
    "aten.mv.default": _mv,
    "aten.dot.default": _dot,
    "aten.vdot.default": _dot,
    "aten.addmm.default": _plus_product(_mm),
    "aten.baddbmm.default": _plus_product(_mm),
    "aten.addmv.default": _plus_product(_mv),
    "aten.linalg_cholesky_ex.default": _cholesky,
    "aten.linalg_solve_triangular.default": _solve_triangular,
    "aten.triangular_solve.default": _old_triangular_solve,
    "aten.cholesky_solve.default": _cholesky_solve,
    "aten.cholesky_inverse.default": _cholesky_inverse,
    "aten.linalg_lu_factor_ex.default": _lu_factor,
    "aten.linalg_lu_solve.default": _lu_solve,
    "aten._linalg_solve_ex.default": _solve,
    "aten.linalg_inv_ex.default": _inverse,
    "aten._linalg_det.default": _determinant,
    "aten._linalg_slogdet.default": _log_determinant,
}
