from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.distributions import MultivariateNormal, kl_divergence

from pyro_vi_lab.families import FAMILIES, Dense, Params, Tangent
from pyro_vi_lab.families.family import Step
from pyro_vi_lab.families.particles import antithetic
from tests.families.members import KINDS, from_vector, member, tangent, to_vector

EACH = pytest.mark.parametrize("name", FAMILIES)
EPS = torch.finfo(torch.float64).eps


def assert_close(actual: Tensor, expected: Tensor, *, operations: float = 1e3) -> None:
    """Equal up to the rounding of so many operations on the largest of the numbers."""
    largest = max(1.0, float(expected.abs().max()))
    torch.testing.assert_close(actual, expected, rtol=0, atol=operations * EPS * largest)


def torch_normal(name: str, params: Params) -> MultivariateNormal:
    """The same member as torch's own distribution."""
    tril = params.scale if isinstance(FAMILIES[name].scale, Dense) else torch.diag_embed(params.scale)
    return MultivariateNormal(params.loc, scale_tril=tril)


def draws(num_draws: int, *shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num_draws, *shape, generator=generator, dtype=torch.float64)


# --- the distribution ----------------------------------------------------------------------------------


@EACH
@pytest.mark.parametrize("batch", [(), (4,), (2, 3)])
def test_density_entropy_and_divergence_are_those_of_torch(name: str, batch: tuple[int, ...]) -> None:
    family, params, other = FAMILIES[name], member(name, batch=batch), member(name, batch=batch, seed=1)
    ours, theirs = torch_normal(name, params), torch_normal(name, other)
    z = draws(7, *batch, 3, seed=2)
    assert_close(family.log_prob(params, z), ours.log_prob(z))
    assert_close(family.entropy(params), ours.entropy())
    assert_close(family.kl(params, other), kl_divergence(ours, theirs))
    assert_close(family.kl(params, params), torch.zeros(batch, dtype=torch.float64))


@EACH
def test_sample_and_whiten_are_inverse(name: str) -> None:
    family, params, eps = FAMILIES[name], member(name, batch=(4,)), draws(6, 4, 3)
    assert_close(family.whiten(params, family.sample(params, eps)), eps)
    shift = family.sample(params, torch.zeros_like(eps))
    assert_close(shift, params.loc.expand(6, 4, 3))


@EACH
def test_draws_have_the_mean_and_the_covariance(name: str) -> None:
    family, params = FAMILIES[name], member(name)
    z = family.sample(params, draws(20_000, 3))
    covariance = family.scale.covariance(params.scale)
    sd = covariance.diagonal().sqrt()
    error = (z.mean(0) - params.loc) / (sd / math.sqrt(len(z)))
    assert float(error.abs().max()) < 5
    # Var of a sample covariance of normals: (S_ii S_jj + S_ij^2) / n
    spread = ((sd[:, None] * sd).square() + covariance.square()).sqrt() / math.sqrt(len(z))
    assert float(((z.T.cov() - covariance) / spread).abs().max()) < 5


@EACH
def test_the_density_integrates_to_one(name: str) -> None:
    family, params, proposal = FAMILIES[name], member(name), member(name)._replace()
    wide = Params(proposal.loc, proposal.scale * 1.5)
    z = family.sample(wide, draws(20_000, 3))
    weights = (family.log_prob(params, z) - family.log_prob(wide, z)).exp()
    assert abs(float(weights.mean()) - 1) < 5 * float(weights.std()) / math.sqrt(len(z))


@EACH
def test_initial_members_are_round(name: str) -> None:
    family = FAMILIES[name]
    params = family.initial(torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=torch.float64), 0.3)
    assert params.loc.tolist() == [[1, 2], [3, 4]]
    assert_close(family.scale.covariance(params.scale), 0.09 * torch.eye(2).double().expand(2, 2, 2))


# --- the Fisher matrix, four ways ----------------------------------------------------------------------


def expectation(function: Callable[[Tensor], Tensor], dim: int) -> Tensor:
    """E[function(ε)] for standard normal ε, exact for polynomials up to the ninth degree in each coordinate."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(5)
    grid = torch.tensor(np.array(np.meshgrid(*[nodes] * dim)).reshape(dim, -1).T)
    mass = torch.tensor(np.array(np.meshgrid(*[weights] * dim)).reshape(dim, -1).prod(0)) / (2 * math.pi) ** (dim / 2)
    return torch.einsum("k,k...->...", mass, torch.vmap(function)(grid))


def hessian(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return torch.func.jacrev(torch.func.grad(function))


@EACH
@pytest.mark.parametrize("seed", range(3))
def test_the_fisher_matrix_four_ways(name: str, seed: int) -> None:
    family, params, dim = FAMILIES[name], member(name, seed=seed), 3
    w = to_vector(name, params)
    closed = family.fisher(params)
    assert closed.shape == (len(w), len(w))

    def log_q(vector: Tensor, z: Tensor) -> Tensor:
        return family.log_prob(from_vector(name, vector, dim), z)

    def outer_score(eps: Tensor) -> Tensor:
        score = torch.func.grad(log_q)(w, family.sample(params, eps))
        return torch.outer(score, score)

    def minus_hessian(eps: Tensor) -> Tensor:
        return -hessian(log_q)(w, family.sample(params, eps))

    def divergence(vector: Tensor) -> Tensor:
        return family.kl(params, from_vector(name, vector, dim))

    assert_close(expectation(outer_score, dim), closed, operations=1e4)
    assert_close(expectation(minus_hessian, dim), closed, operations=1e4)
    assert_close(hessian(divergence)(w), closed, operations=1e4)


@EACH
def test_the_divergence_of_a_small_step_is_half_its_square_in_the_fisher_metric(name: str) -> None:
    family, params = FAMILIES[name], member(name)
    w, metric = to_vector(name, params), family.fisher(params)
    direction = draws(1, len(w), seed=3)[0]

    def remainder(size: float) -> float:
        step = size * direction
        return float(family.kl(params, from_vector(name, w + step, 3)) - step @ metric @ step / 2)

    # of third order: an eighth at half the step, up to terms of the next order
    ratios = [remainder(size) / remainder(size / 2) for size in (1e-2, 5e-3, 2.5e-3)]
    assert [abs(ratio - 8) for ratio in ratios] == sorted((abs(ratio - 8) for ratio in ratios), reverse=True)
    assert ratios[-1] == pytest.approx(8, abs=0.1)


@EACH
def test_the_fisher_matrix_of_a_batch(name: str) -> None:
    family, params = FAMILIES[name], member(name, batch=(4,))
    each = torch.stack([family.fisher(Params(params.loc[i], params.scale[i])) for i in range(4)])
    assert_close(family.fisher(params), each)


@EACH
def test_the_squared_norm_is_that_of_the_fisher_metric(name: str) -> None:
    """A step of size t, taken as a curve of parameters, has speed² = squared norm."""
    family, params, move = FAMILIES[name], member(name), tangent(name)
    size = 1e-5
    ahead, behind = (family.step(params, move_by(move, sign), lr=size, max_kl=1.0).params for sign in (1, -1))
    velocity = (to_vector(name, ahead) - to_vector(name, behind)) / (2 * size)
    squared = float(velocity @ family.fisher(params) @ velocity)
    assert float(family.squared_norm(params, move)) == pytest.approx(
        squared, rel=1e-8
    )  # (1e-5)² of a central difference


def move_by(move: Tangent, factor: float) -> Tangent:
    return Tangent(*(None if part is None else factor * part for part in move))


# --- the natural step ----------------------------------------------------------------------------------


class Gaussian:
    """A normal target."""

    def __init__(self, dim: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        root = torch.randn(dim, dim, generator=generator, dtype=torch.float64) / dim**0.5
        self.covariance = root @ root.T + 0.1 * torch.eye(dim, dtype=torch.float64)
        self.mean = 3 * torch.randn(dim, generator=generator, dtype=torch.float64)

    def tangent(self, name: str, params: Params, *, seed: int = 0, newton: bool = False) -> Tangent:
        """The natural gradient from draws whose moments are exact: itself exact."""
        family, dim = FAMILIES[name], len(self.mean)
        generator = torch.Generator().manual_seed(seed)
        eps = antithetic(family.noise, 8 * dim, (), dim, generator=generator, dtype=torch.float64)
        grad = -torch.linalg.solve(self.covariance, (family.sample(params, eps) - self.mean).T).T
        h = family.scale.multiply_transposed(params.scale, grad) + eps
        full = torch.einsum("kd,ke->de", h, eps) / len(eps)
        full = (full + full.T) / 2
        stretch = KINDS[name].part_of(full)
        return Tangent(h.mean(0), stretch, full if newton and stretch.dim() < full.dim() else None)


@EACH
@pytest.mark.parametrize("dim", [1, 2, 7])
def test_one_full_step_with_exact_expectations_is_exact(name: str, dim: int) -> None:
    family, target = FAMILIES[name], Gaussian(dim, seed=dim)
    start = member(name, dim=dim)
    # wide enough for the whitened precision of the target to be above one half, where the step is the exact one
    ratio = torch.linalg.eigvalsh(torch.linalg.solve(family.scale.covariance(start.scale), target.covariance)[None])
    start = Params(start.loc, start.scale * max(1.0, 2 * float(ratio.abs().max())) ** 0.5 * 2)
    step = family.step(start, target.tangent(name, start, newton=True), lr=1.0, max_kl=1e6)
    assert float(step.size) == 1
    np.testing.assert_allclose(step.params.loc, target.mean, rtol=0, atol=1e-10)
    np.testing.assert_allclose(step.params.scale, KINDS[name].optimal_scale(target.covariance), rtol=0, atol=1e-10)


@EACH
@pytest.mark.parametrize("size", [1e-4, 1.0, 1e4])
def test_full_steps_reach_the_optimum_from_everywhere(name: str, size: float) -> None:
    family, target = FAMILIES[name], Gaussian(4, seed=0)
    params = family.initial(torch.full((4,), -50.0, dtype=torch.float64), size)
    for seed in range(60):
        params = family.step(params, target.tangent(name, params, seed=seed, newton=True), lr=1.0, max_kl=1e7).params
    np.testing.assert_allclose(params.loc, target.mean, rtol=0, atol=1e-10)
    np.testing.assert_allclose(params.scale, KINDS[name].optimal_scale(target.covariance), rtol=0, atol=1e-10)


@EACH
def test_at_the_optimum_no_step_moves(name: str) -> None:
    family, target = FAMILIES[name], Gaussian(3, seed=1)
    params = Params(target.mean, KINDS[name].optimal_scale(target.covariance))
    move = target.tangent(name, params)
    step = family.step(params, move, lr=1.0, max_kl=1.0)
    assert_close(step.params.loc, params.loc)
    assert_close(step.params.scale, params.scale)
    assert float(step.kl) == pytest.approx(0, abs=1e3 * EPS)


@EACH
@pytest.mark.parametrize("curved", [False, True])
def test_the_divergence_of_a_step_is_what_it_says(name: str, curved: bool) -> None:
    family, params = FAMILIES[name], member(name, batch=(50,))
    move = tangent(name, batch=(50,), curved=curved)
    step = family.step(params, move, lr=1.0, max_kl=0.7)
    assert bool((step.kl <= 0.7).all())
    assert_close(family.kl(step.params, params), step.kl)
    # the longest of the candidates: the next, longer by the square root of two, would leave the region
    shortened = step.size < 1
    assert 10 < int(shortened.sum()) < 50
    longer = family.step(params, move, lr=step.size * 2**0.5, max_kl=1e9)
    assert bool((longer.kl[shortened] > 0.7).all())


@EACH
def test_a_step_gains_what_the_norm_says(name: str) -> None:
    """KL(new ‖ old) ≈ t²/2 · squared norm: the ratio goes to one with t."""
    family, params, move = FAMILIES[name], member(name), tangent(name)
    errors = []
    for size in (1e-2, 1e-3):
        kl = float(family.step(params, move, lr=size, max_kl=1.0).kl)
        errors.append(abs(kl / (size**2 / 2 * float(family.squared_norm(params, move))) - 1))
    assert errors[1] < errors[0] / 5
    assert errors[1] < 0.01


wild_numbers = st.floats(-1e12, 1e12, allow_nan=False) | st.floats(-3, 3)


@EACH
@pytest.mark.parametrize("curved", [False, True])
@given(
    shift=st.lists(wild_numbers, min_size=3, max_size=3),
    matrix=st.lists(wild_numbers, min_size=9, max_size=9),
    lr=st.floats(1e-3, 1.0),
    max_kl=st.floats(1e-4, 10.0),
)
def test_no_step_leaves_the_family_or_the_trust_region(
    name: str, curved: bool, shift: list[float], matrix: list[float], lr: float, max_kl: float
) -> None:
    family, params = FAMILIES[name], member(name)
    full = torch.tensor(matrix, dtype=torch.float64).reshape(3, 3)
    full = (full + full.T) / 2
    stretch = KINDS[name].part_of(full)
    move = Tangent(torch.tensor(shift, dtype=torch.float64), stretch, full if curved and stretch.dim() < 2 else None)
    step = family.step(params, move, lr=lr, max_kl=max_kl)
    assert 0 < float(step.size) <= lr
    assert bool(torch.isfinite(to_vector(name, step.params)).all())
    diagonal = step.params.scale.diagonal() if isinstance(family.scale, Dense) else step.params.scale
    assert bool((diagonal > 0).all())
    if isinstance(family.scale, Dense):
        assert bool((step.params.scale.triu(1) == 0).all())
    # the largest rounding errors come from standard deviations that differ by exp(max_kl)
    slack = 1e3 * EPS * math.exp(max_kl)
    actual = float(family.kl(step.params, params))
    assert actual <= max_kl + slack
    assert actual == pytest.approx(float(step.kl), abs=slack)


@EACH
@pytest.mark.parametrize("curved", [False, True])
def test_a_batch_is_its_members(name: str, curved: bool) -> None:
    family, params, other = FAMILIES[name], member(name, batch=(4,)), member(name, batch=(4,), seed=1)
    move = tangent(name, batch=(4,), curved=curved)
    lr, max_kl = torch.tensor([1.0, 0.5, 0.1, 1.0]).double(), torch.tensor([8.0, 1e-3, 8.0, 0.1]).double()
    z = draws(5, 4, 3)
    step = family.step(params, move, lr=lr, max_kl=max_kl)
    for i in range(4):
        one, two = Params(*(part[i] for part in params)), Params(*(part[i] for part in other))
        assert_close(family.log_prob(params, z)[:, i], family.log_prob(one, z[:, i]))
        assert_close(family.entropy(params)[i], family.entropy(one))
        assert_close(family.kl(params, other)[i], family.kl(one, two))
        assert_close(family.sample(params, z)[:, i], family.sample(one, z[:, i]))
        move_i = Tangent(*(None if part is None else part[i] for part in move))
        assert_close(family.squared_norm(params, move)[i], family.squared_norm(one, move_i))
        single: Step = family.step(one, move_i, lr=float(lr[i]), max_kl=float(max_kl[i]))
        assert_close(step.params.loc[i], single.params.loc)
        assert_close(step.params.scale[i], single.params.scale)
        assert_close(step.size[i], single.size)
        assert_close(step.kl[i], single.kl)
