"""Laws of the normals with a covariance of low rank plus a diagonal."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.distributions import MultivariateNormal, kl_divergence

from pyro_vi_lab.families import Estimate, LowRank, Params, Tangent, low_rank
from pyro_vi_lab.families.low_rank import SOLVER_TOLERANCE, _Fisher

DIM, RANK = 6, 2
FAMILY = LowRank(RANK)
BATCHES = pytest.mark.parametrize("batch", [(), (3,), (2, 3)])


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def member(*batch: int, dim: int = DIM, rank: int = RANK, seed: int = 0) -> Params:
    size = (0.5 * normal(*batch, dim, 1, seed=seed + 1)).exp()
    return Params(normal(*batch, dim, seed=seed), torch.cat([size, normal(*batch, dim, rank, seed=seed + 2)], -1))


def dense(params: Params) -> MultivariateNormal:
    return MultivariateNormal(params.loc, FAMILY.covariance(params))


@BATCHES
def test_density_entropy_and_divergence_are_those_of_torch(batch: tuple[int, ...]) -> None:
    params, other, z = member(*batch), member(*batch, seed=5), normal(7, *batch, DIM)
    torch.testing.assert_close(FAMILY.log_prob(params, z), dense(params).log_prob(z))
    torch.testing.assert_close(FAMILY.entropy(params), dense(params).entropy())
    torch.testing.assert_close(FAMILY.kl(params, other), kl_divergence(dense(params), dense(other)))
    torch.testing.assert_close(FAMILY.variance(params), dense(params).variance)


@BATCHES
def test_draws_are_linear_in_the_noise_with_the_covariance(batch: tuple[int, ...]) -> None:
    params = member(*batch)
    basis = torch.eye(DIM + RANK, dtype=torch.float64).reshape(-1, *(1,) * len(batch), DIM + RANK)
    columns = (FAMILY.sample(params, basis.expand(-1, *batch, -1)) - params.loc).movedim(0, -1)
    torch.testing.assert_close(columns @ columns.mT, FAMILY.covariance(params))
    draws = FAMILY.draw((4, *batch), DIM, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert draws.shape == (4, *batch, DIM + RANK)


@BATCHES
def test_spread_is_a_root_of_the_covariance_and_unspread_its_inverse(batch: tuple[int, ...]) -> None:
    params = member(*batch)
    basis = torch.eye(DIM, dtype=torch.float64).reshape(DIM, *(1,) * len(batch), DIM).expand(DIM, *batch, DIM)
    root = FAMILY.spread(params, basis).movedim(0, -1)
    torch.testing.assert_close(root @ root.mT, FAMILY.covariance(params))
    torch.testing.assert_close(FAMILY.spread_transposed(params, basis).movedim(0, -1), root.mT)
    torch.testing.assert_close(FAMILY.unspread(params, FAMILY.spread(params, basis)), basis)


def test_the_fisher_matrix_is_that_of_a_normal() -> None:
    """Minus the mean Hessian of the log density is the Hessian of the divergence at its minimum."""
    params = member()
    flat = torch.cat([params.loc, params.scale.flatten()])

    def divergence(vector: Tensor) -> Tensor:
        return FAMILY.kl(params, Params(vector[:DIM], vector[DIM:].reshape(DIM, 1 + RANK)))

    hessian = torch.autograd.functional.hessian(divergence, flat)
    torch.testing.assert_close(FAMILY.fisher(params), hessian, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("batch", [(), (3,)])
def test_fisher_vector_products_and_the_natural_gradient(batch: tuple[int, ...]) -> None:
    params, change = member(*batch), normal(*batch, DIM, 1 + RANK, seed=9)
    fisher = FAMILY.fisher(params)[..., DIM:, DIM:]
    relative = torch.cat([params.scale[..., :1], torch.ones_like(params.scale[..., 1:])], -1).flatten(-2)
    matrix = relative.unsqueeze(-1) * fisher * relative.unsqueeze(-2)
    product = (matrix @ change.flatten(-2).unsqueeze(-1)).squeeze(-1).unflatten(-1, (DIM, 1 + RANK))
    ours = _Fisher(params.scale)
    torch.testing.assert_close(ours(change), product)
    solved = ours.solve(product)
    # what is turned only is not in the gradient; the rest comes back, up to the damping
    error = (ours(solved) - product).flatten(-2).norm(dim=-1) / product.flatten(-2).norm(dim=-1)
    assert float(error.max()) < 0.05


def gaussian(
    params: Params, target: MultivariateNormal, num_particles: int, *, newton: bool, seed: int = 0
) -> Estimate:
    half = FAMILY.draw(
        (num_particles // 2, *params.loc.shape[:-1]),
        params.loc.shape[-1],
        generator=torch.Generator().manual_seed(seed),
        dtype=torch.float64,
    )
    eps = FAMILY.particles(half)
    z = FAMILY.sample(params, eps).requires_grad_()
    log_p = target.log_prob(z)
    (grad,) = torch.autograd.grad(log_p.sum(), z)
    return FAMILY.estimate(params, eps, log_p.detach(), grad, newton=newton)


@pytest.mark.parametrize("newton", [False, True])
def test_the_estimate_is_exact_on_a_gaussian_target(newton: bool) -> None:
    """Exact second moments leave nothing to chance: the same as the closed form of the bound, from 64 particles."""
    params, target = member(1), dense(member(seed=7))
    leaves = [value.clone().requires_grad_() for value in params]
    bound = -kl_divergence(dense(Params(*leaves)), target)
    gradients = torch.autograd.grad(bound.sum(), leaves)
    expected = FAMILY.tangent(params, *gradients)
    for seed in range(3):
        found = gaussian(params, target, 64, newton=newton, seed=seed)
        torch.testing.assert_close(found.tangent.shift, expected.shift, rtol=1e-8, atol=1e-8)
        torch.testing.assert_close(found.tangent.stretch, expected.stretch, rtol=1e-3, atol=1e-3 * SOLVER_TOLERANCE)
        torch.testing.assert_close(found.elbo, bound.detach(), rtol=1e-8, atol=1e-8)


def test_no_variance_where_q_is_p() -> None:
    params = member(1)
    found = gaussian(params, dense(Params(*(value[0] for value in params))), 32, newton=False)
    assert float(found.gap) < 1e-20
    assert float(found.noise) < 1e-20
    assert float(found.error) < 1e-12


def test_a_small_step_is_the_first_order_step() -> None:
    params, size = member(), 1e-6
    tangent = Tangent(normal(DIM, seed=3), normal(DIM, 1 + RANK, seed=4))
    step = FAMILY.step(params, tangent, lr=size, max_kl=1.0)
    s, factor = params.scale[:, 0], params.scale[:, 1:]
    change = tangent.stretch[:, 1:] @ factor.T
    expected = change + change.T + torch.diag(2 * s.square() * tangent.stretch[:, 0])
    moved = (FAMILY.covariance(step.params) - FAMILY.covariance(params)) / size
    torch.testing.assert_close(moved, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close((step.params.loc - params.loc) / size, tangent.shift, rtol=1e-6, atol=1e-6)
    speed = float(FAMILY.squared_norm(params, tangent))
    assert float(step.kl) == pytest.approx(size**2 / 2 * speed, rel=1e-3)


@pytest.mark.parametrize("length", [1.0, 1e3, 1e9])
@pytest.mark.parametrize("max_kl", [1e-3, 8.0])
def test_no_step_leaves_the_family_or_the_trust_region(length: float, max_kl: float) -> None:
    params = member(5)
    tangent = Tangent(length * normal(5, DIM, seed=3), length * normal(5, DIM, 1 + RANK, seed=4))
    step = FAMILY.step(params, tangent, lr=1.0, max_kl=max_kl)
    assert bool((step.params.scale[..., 0] > 0).all())
    assert bool(torch.isfinite(step.params.scale).all())
    assert float(step.kl.max()) <= max_kl * (1 + 1e-9)


def target_of(condition: float) -> MultivariateNormal:
    size = torch.logspace(0, math.log10(condition), DIM, dtype=torch.float64).sqrt()
    factor = normal(DIM, RANK, seed=11) * size.unsqueeze(-1) * 3
    return dense(Params(normal(DIM), torch.cat([size.unsqueeze(-1), factor], -1)))


@pytest.mark.parametrize("condition", [1.0, 1e2, 1e4])
def test_ascent_finds_a_target_of_the_family(condition: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the conditional standard deviations, which is where fits of high dimension start."""
    monkeypatch.setattr(low_rank, "MAX_FULL_RANK", DIM - 1)
    target = target_of(condition)
    start = target.precision_matrix.diagonal().rsqrt()
    params = FAMILY.from_precursor(Params(target.loc.unsqueeze(0), start.unsqueeze(0)))
    for seed in range(80):
        found = gaussian(params, target, 64, newton=True, seed=seed)
        params = FAMILY.step(params, found.tangent, lr=FAMILY.max_lr, max_kl=8.0).params
    assert float(kl_divergence(dense(Params(*(value[0] for value in params))), target)) < 1e-3


@pytest.mark.parametrize("condition", [1.0, 1e2, 1e4])
def test_start_from_a_full_rank_normal_that_is_of_the_family(condition: float) -> None:
    target = target_of(condition)
    params = FAMILY.from_precursor(Params(target.loc.expand(2, DIM), target.scale_tril.expand(2, DIM, DIM)))
    assert params.scale.shape == (2, DIM, 1 + RANK)
    assert float(kl_divergence(dense(params), target).max()) < 1e-3
    back = FAMILY.to_precursor(params)
    torch.testing.assert_close(back.scale @ back.scale.mT, FAMILY.covariance(params))


def test_initial_members_have_the_standard_deviation() -> None:
    params = FAMILY.initial(normal(2, DIM), 0.3)
    torch.testing.assert_close(FAMILY.variance(params), torch.full((2, DIM), 0.09, dtype=torch.float64))
    assert float(params.scale[..., 1:].abs().max()) > 0.01


@pytest.mark.parametrize("rank", [0, -1])
def test_rank_must_be_positive(rank: int) -> None:
    with pytest.raises(ValueError, match="rank must be at least 1"):
        LowRank(rank)
