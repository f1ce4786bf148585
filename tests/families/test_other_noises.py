"""Laws of the families whose noise is not normal."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from pyro_vi_lab.families import (
    Dense,
    Diagonal,
    Estimate,
    Laplace,
    LocationScale,
    MultivariateStudentT,
    Normal,
    Params,
    StudentT,
    Tangent,
)

DIM = 3
FAMILIES = {
    "mean_field_student_t": LocationScale(Diagonal(), StudentT(5.0)),
    "full_rank_student_t": LocationScale(Dense(), MultivariateStudentT(5.0)),
    "mean_field_laplace": LocationScale(Diagonal(), Laplace()),
}
EACH = pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def member(family: LocationScale, seed: int = 0) -> Params:
    scale = (0.4 * normal(1, DIM, seed=seed + 1)).exp()
    if isinstance(family.scale, Dense):
        scale = torch.diag_embed(scale) + 0.5 * normal(1, DIM, DIM, seed=seed + 2).tril(-1)
    return Params(normal(1, DIM, seed=seed), scale)


def draws(family: LocationScale, number: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return family.particles(family.draw((number // 2, 1), DIM, generator=generator, dtype=torch.float64))


def estimate(
    family: LocationScale, params: Params, target: LocationScale, at: Params, number: int, seed: int = 0
) -> Estimate:
    eps = draws(family, number, seed)
    z = family.sample(params, eps).requires_grad_()
    log_p = target.log_prob(at, z)
    (grad,) = torch.autograd.grad(log_p.sum(), z)
    return family.estimate(params, eps, log_p.detach(), grad, newton=True)


@EACH
def test_the_density_integrates_to_one_and_has_the_moments(family: LocationScale) -> None:
    params, wide = member(family), member(family)
    wide = wide._replace(scale=wide.scale * 1.5)
    z = family.sample(wide, draws(family, 40_000))
    weights = (family.log_prob(params, z) - family.log_prob(wide, z)).exp().squeeze(-1)
    assert abs(float(weights.mean()) - 1) < 5 * float(weights.std()) / math.sqrt(len(z))
    sample = family.sample(params, draws(family, 40_000)).squeeze(1)
    squares = (sample - params.loc).square()
    error = (squares.mean(0) - family.variance(params)[0]).abs()
    assert bool((error < 5 * squares.std(0) / math.sqrt(len(z))).all())


@EACH
def test_the_entropy_is_minus_the_mean_log_density(family: LocationScale) -> None:
    params = member(family)
    values = -family.log_prob(params, family.sample(params, draws(family, 40_000)))
    assert abs(float(values.mean() - family.entropy(params))) < 5 * float(values.std()) / math.sqrt(len(values))


@EACH
def test_no_variance_where_q_is_p(family: LocationScale) -> None:
    params = member(family)
    found = estimate(family, params, family, params, 64)
    assert float(found.gap.abs()) < 1e-18
    assert float(found.noise) < 1e-18
    assert float(found.error) < 1e-12


@EACH
def test_no_variance_on_a_gaussian_target(family: LocationScale) -> None:
    """h is linear in ε and ψ, so the regression leaves nothing."""
    target = LocationScale(Dense(), Normal())
    at = Params(
        normal(1, DIM, seed=4), torch.eye(DIM, dtype=torch.float64).unsqueeze(0) + 0.3 * normal(1, DIM, DIM).tril(-1)
    )
    found = [estimate(family, member(family), target, at, 64, seed) for seed in (0, 1)]
    torch.testing.assert_close(found[0].tangent.stretch, found[1].tangent.stretch, rtol=1e-8, atol=1e-8)


@EACH
def test_the_natural_gradient_is_that_of_the_bound(family: LocationScale) -> None:
    """Against the reparameterized gradient of an average over many draws, within five standard errors."""
    params, target, at = (
        member(family),
        FAMILIES["mean_field_student_t"],
        member(FAMILIES["mean_field_student_t"], seed=9),
    )
    leaves = Params(*(value.clone().requires_grad_() for value in params))
    shifts, stretches = [], []
    for seed in range(20):
        z = family.sample(leaves, draws(family, 4000, seed))
        bound = target.log_prob(at, z).mean() + family.entropy(leaves).sum()
        tangent = family.tangent(params, *torch.autograd.grad(bound, leaves))
        shifts.append(tangent.shift)
        stretches.append(tangent.stretch)
    ours = [estimate(family, params, target, at, 4000, 100 + seed).tangent for seed in range(20)]
    for name, theirs in (("shift", shifts), ("stretch", stretches)):
        mine = torch.stack([getattr(one, name) for one in ours])
        other = torch.stack(theirs)
        error = torch.hypot(mine.std(0), other.std(0)) / math.sqrt(20)
        assert bool(((mine.mean(0) - other.mean(0)).abs() <= 5 * error + 1e-12).all()), name


@EACH
def test_the_inner_product_is_that_of_the_fisher_matrix(family: LocationScale) -> None:
    """E[(score · step)²], the score of a small step by automatic differentiation."""
    params, size = member(family), 1e-5
    matrix = normal(1, DIM, DIM, seed=3)
    stretch = (matrix + matrix.mT) / 2 if isinstance(family.scale, Dense) else normal(1, DIM, seed=3)
    tangent = Tangent(normal(1, DIM, seed=2), stretch)
    ahead = family.step(params, tangent, lr=size, max_kl=1.0).params
    z = family.sample(params, draws(family, 200_000))
    score = ((family.log_prob(ahead, z) - family.log_prob(params, z)) / size).square()
    expected = float(family.squared_norm(params, tangent))
    assert abs(float(score.mean()) - expected) < 5 * float(score.std()) / math.sqrt(len(z)) + 1e-3 * expected


@EACH
@pytest.mark.parametrize("length", [1.0, 1e6])
def test_steps_stay_in_the_family(family: LocationScale, length: float) -> None:
    matrix = length * normal(1, DIM, DIM, seed=3)
    stretch = matrix + matrix.mT if isinstance(family.scale, Dense) else length * normal(1, DIM, seed=3)
    step = family.step(member(family), Tangent(length * normal(1, DIM), stretch), lr=1.0, max_kl=8.0)
    diagonal = step.params.scale.diagonal(dim1=-2, dim2=-1) if isinstance(family.scale, Dense) else step.params.scale
    assert bool((diagonal > 0).all())
    assert float(step.kl) <= 8.0 * (1 + 1e-9)


def test_the_divergence_of_laplace_members_is_that_of_torch() -> None:
    family = FAMILIES["mean_field_laplace"]
    one, two = member(family), member(family, seed=5)
    theirs = torch.distributions.kl_divergence(torch.distributions.Laplace(*one), torch.distributions.Laplace(*two))
    torch.testing.assert_close(family.kl(one, two), theirs.sum(-1))


def test_student_t_members_have_no_closed_divergence() -> None:
    family = FAMILIES["full_rank_student_t"]
    with pytest.raises(NotImplementedError, match="has no closed form"):
        family.kl(member(family), member(family))


@pytest.mark.parametrize("noise", [Laplace(), StudentT()])
def test_a_dense_scale_needs_a_noise_that_does_not_know_directions(noise: Laplace) -> None:
    with pytest.raises(ValueError, match="is not rotation invariant and needs a diagonal scale"):
        LocationScale(Dense(), noise)


@EACH
def test_the_precursor_has_the_same_variance(family: LocationScale) -> None:
    params, first = member(family), family.precursor(DIM)
    assert first is not None
    torch.testing.assert_close(first.covariance(family.to_precursor(params)), family.covariance(params))
    back = family.from_precursor(family.to_precursor(params))
    torch.testing.assert_close(back.scale, params.scale)
