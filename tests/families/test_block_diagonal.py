"""A block-diagonal scale is the dense one with zeros between the blocks."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pyro_vi_lab.families import BlockDiagonal, Dense, LocationScale, Normal, Params, Tangent

BLOCKS = ((0, 3, 4), (1,), (2, 5))
SCALE, DENSE, DIM = BlockDiagonal(BLOCKS), Dense(), 6
MASK = torch.zeros(DIM, DIM, dtype=torch.bool)
for _block in BLOCKS:
    for _i in _block:
        MASK[_i, list(_block)] = True
BATCHES = pytest.mark.parametrize("batch", [(), (3,), (2, 3)])


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def scale(*batch: int, seed: int = 0) -> Tensor:
    matrix = normal(*batch, DIM, DIM, seed=seed) * MASK
    return blocks_of(matrix.tril(-1) + torch.diag_embed(normal(*batch, DIM, seed=seed + 1).exp()), filled=1.0)


def blocks_of(matrix: Tensor, filled: float = 0.0) -> Tensor:
    result = torch.zeros(*matrix.shape[:-2], len(BLOCKS), 3, 3, dtype=matrix.dtype)
    result[:] = filled * torch.eye(3)
    for number, block in enumerate(BLOCKS):
        index = torch.tensor(block)
        result[..., number, : len(block), : len(block)] = matrix[..., index.unsqueeze(-1), index]
    return result


@BATCHES
def test_the_operator_is_that_of_the_whole_matrix(batch: tuple[int, ...]) -> None:
    blocks, x = scale(*batch), normal(7, *batch, DIM, seed=3)
    tril = SCALE.tril(blocks)
    torch.testing.assert_close(blocks_of(tril, filled=1.0), blocks)
    assert torch.equal(tril, tril.tril() * MASK)
    for name in ("multiply", "multiply_transposed", "solve"):
        torch.testing.assert_close(getattr(SCALE, name)(blocks, x), getattr(DENSE, name)(tril, x))
    for name in ("log_det", "covariance", "variance"):
        torch.testing.assert_close(getattr(SCALE, name)(blocks), getattr(DENSE, name)(tril))
    other = scale(*batch, seed=9)
    torch.testing.assert_close(SCALE.trace_of_ratio(blocks, other), DENSE.trace_of_ratio(tril, SCALE.tril(other)))


@BATCHES
def test_stretches_are_the_blocks_of_the_whole(batch: tuple[int, ...]) -> None:
    matrix, x, y = normal(*batch, DIM, DIM), normal(9, *batch, DIM, seed=1), normal(9, *batch, DIM, seed=2)
    matrix = matrix + matrix.mT
    whole, part = matrix * MASK, SCALE.part(matrix)
    torch.testing.assert_close(part, blocks_of(matrix))
    torch.testing.assert_close(SCALE.mean_outer(x, y), blocks_of(DENSE.mean_outer(x, y)))
    torch.testing.assert_close(SCALE.inner(part, part), DENSE.inner(whole, whole))
    torch.testing.assert_close(SCALE.diagonal(part), DENSE.diagonal(whole))
    torch.testing.assert_close(SCALE.trace(part), DENSE.trace(whole))
    torch.testing.assert_close(SCALE.apply(part, x), DENSE.apply(whole, x))
    number = normal(*batch, seed=4)
    torch.testing.assert_close(SCALE.add_to_diagonal(part, number), blocks_of(DENSE.add_to_diagonal(whole, number)))


@BATCHES
def test_eigenvectors_and_moves(batch: tuple[int, ...]) -> None:
    matrix, blocks, x = normal(*batch, DIM, DIM), scale(*batch), normal(*batch, DIM, seed=1)
    stretch = SCALE.part(matrix + matrix.mT)
    values, vectors = SCALE.decompose(stretch)
    turned = SCALE.rotate(vectors, x)
    torch.testing.assert_close(SCALE.rotate_back(vectors, turned, DIM), x)
    torch.testing.assert_close(SCALE.rotate_back(vectors, values * turned, DIM), SCALE.apply(stretch, x))
    moved = SCALE.move(blocks, values.exp(), vectors)
    whole = torch.linalg.matrix_exp((matrix + matrix.mT) * MASK)
    tril = SCALE.tril(blocks)
    torch.testing.assert_close(SCALE.covariance(moved), tril @ whole @ tril.mT)
    torch.testing.assert_close(blocks_of(SCALE.tril(moved), filled=1.0), moved)


def test_fisher_matrix_and_gradient() -> None:
    blocks = scale()
    family = LocationScale(SCALE, Normal())
    params = Params(normal(DIM), blocks)
    rows, columns = torch.tril_indices(3, 3)
    free = [(n, i, j) for n, block in enumerate(BLOCKS) for i, j in zip(rows, columns, strict=True) if i < len(block)]
    index = tuple(torch.tensor(part) for part in zip(*free, strict=True))

    def divergence(vector: Tensor) -> Tensor:
        return family.kl(params, Params(vector[:DIM], blocks.index_put(index, vector[DIM:])))

    vector = torch.cat([params.loc, blocks[index]])
    hessian = torch.autograd.functional.hessian(divergence, vector)
    torch.testing.assert_close(family.fisher(params), hessian, rtol=1e-8, atol=1e-8)
    # the natural gradient of the parameters is the inverse of this times the gradient
    gradient = normal(len(vector), seed=5)
    tangent = family.tangent(params, gradient[:DIM], torch.zeros_like(blocks).index_put(index, gradient[DIM:]))
    size = 1e-6
    step = family.step(params, tangent, lr=size, max_kl=1.0)
    moved = torch.cat([step.params.loc - params.loc, (step.params.scale - blocks)[index]]) / size
    torch.testing.assert_close(hessian @ moved, gradient, rtol=1e-4, atol=1e-4)


def test_full_steps_reach_a_block_diagonal_target() -> None:
    family, target, loc = LocationScale(SCALE, Normal()), scale(seed=20), normal(DIM, seed=8)
    params = Params(normal(DIM), scale())
    precision = torch.linalg.inv(SCALE.covariance(target))
    for _ in range(20):
        tril = SCALE.tril(params.scale)
        whitened = torch.eye(DIM, dtype=torch.float64) - tril.mT @ precision @ tril
        tangent = Tangent(tril.mT @ precision @ (loc - params.loc), SCALE.part(whitened))
        params = family.step(params, tangent, lr=1.0, max_kl=1e6).params
    torch.testing.assert_close(params.loc, loc)
    torch.testing.assert_close(SCALE.covariance(params.scale), SCALE.covariance(target))


@pytest.mark.parametrize("blocks", [(), ((0, 1), (1, 2)), ((0, 2),)])
def test_every_coordinate_is_in_one_block(blocks: tuple[tuple[int, ...], ...]) -> None:
    with pytest.raises(ValueError, match="exactly one block"):
        BlockDiagonal(blocks)
