from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from pyro_vi_lab.families import FAMILIES
from pyro_vi_lab.families.scale import retract
from tests.families.members import KINDS, member, normal

EPS = torch.finfo(torch.float64).eps
SCALES = {name: family.scale for name, family in FAMILIES.items()}
EACH = pytest.mark.parametrize("name", SCALES)
BATCHES = pytest.mark.parametrize("batch", [(), (4,), (2, 3)])


def assert_close(actual: Tensor, expected: Tensor) -> None:
    """Equal up to the rounding of a thousand operations on the largest of the numbers."""
    atol = 1e3 * EPS * max(1.0, float(expected.abs().max()))
    torch.testing.assert_close(actual, expected, rtol=0, atol=atol)


def as_matrix(name: str, scale: Tensor) -> Tensor:
    """σ as a matrix, from what it does to unit vectors."""
    dim = scale.shape[-1]
    columns = [SCALES[name].multiply(scale, row) for row in torch.eye(dim, dtype=scale.dtype)]
    return torch.stack(columns, -1)


def symmetric(batch: tuple[int, ...], dim: int = 3) -> Tensor:
    matrix = normal(torch.Generator().manual_seed(7), *batch, dim, dim)
    return matrix + matrix.mT


# --- the retraction ------------------------------------------------------------------------------------


@given(st.floats(-1e300, 300))
def test_retract_is_positive(x: float) -> None:
    assert float(retract(torch.tensor(x, dtype=torch.float64))) > 0


def test_retract_is_the_line_and_then_an_exponential_with_its_value_and_slope() -> None:
    x = torch.linspace(-3, 5, 1601, dtype=torch.float64)
    line = x <= 0.5
    torch.testing.assert_close(retract(x)[line], 1 - x[line], rtol=0, atol=0)
    torch.testing.assert_close(retract(x)[~line], 0.5 * torch.exp(1 - 2 * x[~line]), rtol=1e-15, atol=0)
    values, slopes = [], []
    for point in (0.5 - 1e-9, 0.5, 0.5 + 1e-9):
        at = torch.tensor(point, dtype=torch.float64, requires_grad=True)
        value = retract(at)
        (slope,) = torch.autograd.grad(value, at)
        values.append(value.item())
        slopes.append(slope.item())
    assert values == pytest.approx([0.5] * 3, abs=2e-9)
    assert slopes == pytest.approx([-1] * 3, abs=5e-9)


def test_retract_falls_and_has_a_gradient_everywhere() -> None:
    points = [-1e300, -1e3, -1.0, 0.0, 0.4, 0.5, 0.6, 1.0, 10.0, 300.0]
    x = torch.tensor(points, dtype=torch.float64, requires_grad=True)
    values = retract(x)
    assert bool((values.diff() < 0).all())
    (slopes,) = torch.autograd.grad(values.sum(), x)
    assert bool((torch.isfinite(slopes) & (slopes < 0)).all())


# --- the operators -------------------------------------------------------------------------------------


@EACH
@BATCHES
def test_the_operator_is_one_matrix(name: str, batch: tuple[int, ...]) -> None:
    operator, scale = SCALES[name], member(name, batch=batch).scale
    matrix = as_matrix(name, scale)
    x = normal(torch.Generator().manual_seed(1), 5, *batch, 3)
    assert_close(operator.multiply(scale, x), torch.einsum("...ij,k...j->k...i", matrix, x))
    assert_close(operator.multiply_transposed(scale, x), torch.einsum("...ji,k...j->k...i", matrix, x))
    assert_close(operator.solve(scale, operator.multiply(scale, x)), x)
    assert_close(operator.multiply(scale, operator.solve(scale, x)), x)
    assert_close(operator.covariance(scale), matrix @ matrix.mT)
    assert_close(operator.variance(scale), (matrix @ matrix.mT).diagonal(dim1=-2, dim2=-1))
    assert_close(operator.log_det(scale), torch.linalg.slogdet(matrix).logabsdet)


@EACH
@BATCHES
def test_trace_of_ratio(name: str, batch: tuple[int, ...]) -> None:
    one, other = member(name, batch=batch).scale, member(name, batch=batch, seed=1).scale
    ratio = torch.linalg.solve(as_matrix(name, other), as_matrix(name, one))
    assert_close(SCALES[name].trace_of_ratio(one, other), ratio.square().sum((-2, -1)))


@EACH
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_isotropic(name: str, dtype: torch.dtype) -> None:
    scale = SCALES[name].isotropic(3, 0.25, batch=(2,), dtype=dtype)
    assert scale.dtype == dtype
    assert as_matrix(name, scale).tolist() == (0.25 * torch.eye(3)).expand(2, 3, 3).tolist()
    scale[0] *= 2  # the fits of a batch have parameters of their own
    assert as_matrix(name, scale)[1].tolist() == (0.25 * torch.eye(3)).tolist()


@EACH
@BATCHES
def test_a_symmetric_step_and_its_eigenvalues(name: str, batch: tuple[int, ...]) -> None:
    operator = SCALES[name]
    stretch = KINDS[name].part_of(symmetric(batch))
    full = stretch if stretch.dim() == len(batch) + 2 else torch.diag_embed(stretch)
    values, vectors = operator.decompose(stretch)
    vectors = torch.eye(3, dtype=torch.float64).expand_as(full) if vectors is None else vectors
    assert_close(vectors @ torch.diag_embed(values) @ vectors.mT, full)
    assert_close(vectors.mT @ vectors, torch.eye(3, dtype=torch.float64).expand_as(full))
    assert_close(operator.inner(stretch, stretch), full.square().sum((-2, -1)))


@EACH
@BATCHES
def test_move_gives_the_scale_of_the_whitened_covariance(name: str, batch: tuple[int, ...]) -> None:
    operator, scale = SCALES[name], member(name, batch=batch).scale
    _, vectors = operator.decompose(KINDS[name].part_of(symmetric(batch)))
    values = normal(torch.Generator().manual_seed(2), *batch, 3).exp()
    moved = operator.move(scale, values, vectors)
    turned = torch.eye(3, dtype=torch.float64) if vectors is None else vectors
    whitened = turned @ torch.diag_embed(values) @ turned.mT
    matrix = as_matrix(name, scale)
    assert_close(operator.covariance(moved), matrix @ whitened @ matrix.mT)
    # still parameters of the family: the free entries say all, and the diagonal is positive
    assert torch.equal(KINDS[name].from_free(KINDS[name].to_free(moved), 3), moved)
    assert bool((as_matrix(name, moved).diagonal(dim1=-2, dim2=-1) > 0).all())
