"""Laws of exponential families, over all of them."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.distributions import kl_divergence

from pyro_vi_lab.families.exponential import (
    Bernoulli,
    Beta,
    Categorical,
    Dirichlet,
    ExponentialFamily,
    Gamma,
    InverseGamma,
    MultivariateNormal,
    Normal,
    NormalGamma,
    NormalWishart,
    Values,
    Wishart,
    sign_design,
)
from pyro_vi_lab.families.exponential.family import bartlett

EPS = torch.finfo(torch.float64).eps
STANDARD_ERRORS = 5
BATCH = (2, 3)

FAMILIES: dict[str, Callable[[], ExponentialFamily]] = {
    "normal": Normal,
    "multivariate_normal": lambda: MultivariateNormal(3),
    "gamma": Gamma,
    "inverse_gamma": InverseGamma,
    "beta": Beta,
    "dirichlet": lambda: Dirichlet(4),
    "wishart": lambda: Wishart(3),
    "normal_gamma": NormalGamma,
    "normal_wishart": lambda: NormalWishart(2),
    "categorical": lambda: Categorical(4),
    "bernoulli": Bernoulli,
}
each = pytest.mark.parametrize("family", [make() for make in FAMILIES.values()], ids=FAMILIES)
CONTINUOUS = {name: make() for name, make in FAMILIES.items() if not make().is_discrete}
each_continuous = pytest.mark.parametrize("family", CONTINUOUS.values(), ids=CONTINUOUS)
ORACLES = ("normal", "multivariate_normal", "gamma", "beta", "dirichlet", "wishart", "categorical", "bernoulli")
each_of_torch = pytest.mark.parametrize("family", [FAMILIES[name]() for name in ORACLES], ids=ORACLES)


@pytest.fixture(autouse=True)
def double() -> None:
    torch.set_default_dtype(torch.float64)


def members(family: ExponentialFamily, seed: int = 0, size: float = 1.0, center: float = 0.5) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return family.constrain(size * torch.randn(*BATCH, family.num_parameters, generator=generator) + center)


def of_torch(family: ExponentialFamily, eta: Tensor) -> torch.distributions.Distribution:
    name, parameters = family.conditional(eta)
    if name == "Wishart":  # its degrees of freedom need not exceed D
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("warnings.warn", lambda *args, **kwargs: None)
            return torch.distributions.Wishart(**parameters)
    distribution: torch.distributions.Distribution = getattr(torch.distributions, name)(**parameters)
    return distribution


def close(got: Tensor, expected: Tensor, epsilons: float = 1e4) -> None:
    size = expected.abs().max().clamp_min(1)
    torch.testing.assert_close(got / size, expected / size, rtol=0, atol=epsilons * EPS)


@each
def test_mean_parameters_are_the_gradient_of_the_log_normalizer(family: ExponentialFamily) -> None:
    eta = members(family).requires_grad_(True)
    (gradient,) = torch.autograd.grad(family.log_normalizer(eta).sum(), eta)
    close(family.mean(eta.detach()), gradient)


@each
def test_mean_parameters_are_the_means_of_the_statistics_and_fisher_their_covariance(family: ExponentialFamily) -> None:
    eta, number = members(family, size=0.5), 20_000
    draws = family.statistics(family.sample(eta, (number,)))
    expected, covariance = family.mean(eta), family.fisher(eta)
    error = draws.std(0) / math.sqrt(number)
    assert ((draws.mean(0) - expected).abs() <= STANDARD_ERRORS * error + EPS).all()
    apart = draws - expected
    products = apart.unsqueeze(-1) * apart.unsqueeze(-2)
    error = products.std(0) / math.sqrt(number)
    assert ((products.mean(0) - covariance).abs() <= STANDARD_ERRORS * error + 1e3 * EPS).all()


@each
def test_fisher_is_the_hessian_of_the_log_normalizer(family: ExponentialFamily) -> None:
    eta = members(family)
    for one, fisher in zip(eta.flatten(0, 1), family.fisher(eta).flatten(0, 1), strict=True):
        close(fisher, torch.autograd.functional.hessian(family.log_normalizer, one))


@each
def test_round_trips(family: ExponentialFamily) -> None:
    for size in (0.5, 2.0):
        eta = members(family, size=size)
        # what rounding of the mean parameters does to the natural ones
        lost = torch.linalg.cond(family.fisher(eta)).max().item() * 100
        close(family.natural(family.mean(eta)), eta, lost)
        close(family.constrain(family.unconstrain(eta)), eta)
        close(family.from_standard(family.standard(eta)), eta)
        assert list(family.standard(eta)) == list(family.parameter_dims)
        for name, value in family.standard(eta).items():
            assert value.dim() == len(BATCH) + family.parameter_dims[name]


@each
def test_solving_with_fisher(family: ExponentialFamily) -> None:
    eta = members(family)
    grad = torch.randn(eta.shape, generator=torch.Generator().manual_seed(2))
    solved = family.solve_fisher(eta, grad)
    fisher = family.fisher(eta)
    close((fisher @ solved.unsqueeze(-1)).squeeze(-1), grad, torch.linalg.cond(fisher).max().item() * 100)


@each
def test_natural_gradient_from_the_gradient_in_unconstrained_parameters(family: ExponentialFamily) -> None:
    """Of a function that is linear in the mean parameters, it is the coefficients, whatever the parameterization."""
    u = family.unconstrain(members(family, size=0.5)).requires_grad_(True)
    coefficients = torch.randn(u.shape, generator=torch.Generator().manual_seed(2))
    (grad,) = torch.autograd.grad((family.mean(family.constrain(u)) * coefficients).sum(), u)
    lost = torch.linalg.cond(family.fisher(family.constrain(u.detach()))).max().item() * 100
    close(family.natural_gradient(u.detach(), grad), coefficients, lost)


@each_of_torch
def test_density_entropy_and_divergence_are_those_of_torch(family: ExponentialFamily) -> None:
    eta, other = members(family, size=0.5), members(family, seed=1)
    (draw,) = values = family.sample(eta, (5,))
    theirs = of_torch(family, eta)
    close(family.log_prob(eta, values), theirs.log_prob(draw), 1e6)
    close(family.entropy(eta), theirs.entropy())
    if not isinstance(family, Wishart):
        close(family.kl(eta, other), kl_divergence(theirs, of_torch(family, other)))


@each
def test_entropy_and_divergence(family: ExponentialFamily) -> None:
    """Closed forms against the definition, and Bregman's divergence."""
    eta, other, number = members(family, size=0.3), members(family, seed=1, size=0.3), 20_000
    values = family.sample(eta, (number,))
    for got, draws in (
        (family.entropy(eta), -family.log_prob(eta, values)),
        (family.kl(eta, other), family.log_prob(eta, values) - family.log_prob(other, values)),
    ):
        error = draws.std(0) / math.sqrt(number)
        assert ((draws.mean(0) - got).abs() <= STANDARD_ERRORS * error + 1e3 * EPS).all()
    close(family.kl(eta, other), ExponentialFamily.kl(family, eta, other))
    close(family.entropy(eta), ExponentialFamily.entropy(family, eta))
    assert (family.kl(eta, other) > 0).all()
    assert (family.kl(eta, eta).abs() < 1e4 * EPS).all()


@each
def test_log_density_of_a_joint_family_is_that_of_its_conditionals(family: ExponentialFamily) -> None:
    eta = members(family, size=0.5)
    values = family.sample(eta)
    total = torch.zeros(BATCH)
    for k, value in enumerate(values):
        name, parameters = family.conditional(eta, values[:k])
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("warnings.warn", lambda *args, **kwargs: None)
            total = total + getattr(torch.distributions, name)(**parameters).log_prob(value)
    close(family.log_prob(eta, values), total, 1e6)


@each
def test_a_step_stays_in_the_cone_whatever_the_gradient(family: ExponentialFamily) -> None:
    for seed in range(5):
        eta = members(family, seed=seed, size=2.0)
        generator = torch.Generator().manual_seed(seed)
        for size in (0.1, 10.0, 1e6):
            direction = size * torch.randn(eta.shape, generator=generator)
            step = family.step_size(eta, direction, lr=1.0)
            assert ((step > 0) & (step <= 1)).all()
            assert family.contains(eta + step.unsqueeze(-1) * direction).all()


@each_continuous
def test_the_boundary_is_where_the_cone_ends(family: ExponentialFamily) -> None:
    eta = members(family)
    direction = torch.randn(eta.shape, generator=torch.Generator().manual_seed(4))
    away = family.boundary(eta, direction)
    assert torch.isfinite(away).any()
    there = torch.where(torch.isfinite(away), away, torch.ones(()))
    assert family.contains(eta + (1 - 1e-6) * there.unsqueeze(-1) * direction).all()
    outside = ~family.contains(eta + (1 + 1e-6) * there.unsqueeze(-1) * direction)
    assert (outside == torch.isfinite(away)).all()


@each_continuous
def test_a_moved_member_has_the_mean_that_was_asked_for(family: ExponentialFamily) -> None:
    eta = members(family, size=0.2, center=1.5)  # far from those without a mean or a variance
    target = family.sample(members(family, seed=3, size=0.2))
    moved = family.moved(eta, target)
    assert family.contains(moved).all()
    for draws, expected in zip(family.sample(moved, (4000,)), target, strict=True):
        if isinstance(family, InverseGamma):  # the harmonic mean
            draws, expected = 1 / draws, 1 / expected
        assert ((draws.mean(0) - expected).abs() <= 6 * draws.std(0) / math.sqrt(4000) + 1e-9).all()


# Points with exact expectations


def all_points(family: ExponentialFamily, eta: Tensor) -> tuple[Tensor, Values]:
    signs = sign_design(family.num_signs, 3).reshape(-1, 1, 1, family.num_signs)
    points = [family.point(eta, row) for row in signs]
    return signs, tuple(torch.stack(values) for values in zip(*points, strict=True))


@each_continuous
def test_points_average_to_the_mean_parameters(family: ExponentialFamily) -> None:
    for size in (0.5, 2.0):
        eta = members(family, size=size)
        _, values = all_points(family, eta)
        close(family.statistics(values).mean(0), family.mean(eta), 1e6)


@each_continuous
def test_a_message_is_read_off_the_gradients_at_the_points(family: ExponentialFamily) -> None:
    """Also where the gradient comes with an average over others, and is that of a function on the support only."""
    eta, expected = members(family, size=0.5), members(family, seed=1, size=0.5)
    signs, values = all_points(family, eta)
    leaves = tuple(value.detach().requires_grad_(True) for value in values)
    grads = torch.autograd.grad((family.statistics(leaves) * expected).sum(), leaves)
    close(family.message(eta, signs, leaves, grads).detach(), expected, 1e7)


def test_points_of_sharp_members() -> None:
    """Where arithmetic and geometric mean are nearly the same."""
    for family, parameters in (
        (Gamma(), {"concentration": torch.tensor(1e6), "rate": torch.tensor(3.0)}),
        (Dirichlet(3), {"concentration": torch.tensor([1e6, 2e6, 5.0])}),
        (Beta(), {"concentration1": torch.tensor(1e5), "concentration0": torch.tensor(1e4)}),
    ):
        eta = family.from_standard(parameters).expand(1, 1, -1)
        _, values = all_points(family, eta)
        torch.testing.assert_close(family.statistics(values).mean(0), family.mean(eta), rtol=1e-12, atol=1e-13)


def test_a_discrete_family_has_no_points() -> None:
    with pytest.raises(NotImplementedError, match="Categorical"):
        Categorical(3).point(torch.zeros(2), torch.ones(1))


# Signs


@pytest.mark.parametrize(("columns", "strength"), [(1, 1), (3, 3), (7, 2), (8, 3), (12, 4), (9, 5)])
def test_all_combinations_of_signs_occur_equally_often(columns: int, strength: int) -> None:
    from itertools import combinations

    table = sign_design(columns, strength)
    for k in range(1, min(strength, columns) + 1):
        for chosen in combinations(range(columns), k):
            counts = torch.unique(table[:, chosen], dim=0, return_counts=True)[1]
            assert len(counts) == 2**k
            assert (counts == len(table) // 2**k).all()


def test_a_strong_design_is_much_smaller_than_all_combinations() -> None:
    assert len(sign_design(32, 3)) == 64


# Draws


def test_wishart_draws_have_the_right_mean_and_gradient() -> None:
    df, tril = torch.tensor(4.5, requires_grad=True), torch.tensor([[1.0, 0.0], [0.5, 0.8]])
    draws = bartlett(df.expand(20_000), tril.expand(20_000, 2, 2))
    error = draws.detach().std(0) / math.sqrt(20_000)
    assert ((draws.detach().mean(0) - 4.5 * tril @ tril.T).abs() <= STANDARD_ERRORS * error).all()
    # d E[Λ₁₁] / dν = V₁₁
    (slope,) = torch.autograd.grad(draws[:, 0, 0].mean(), df)
    assert abs(slope.item() - 1.0) < 0.05


def test_a_sample_is_reparameterized() -> None:
    for family in CONTINUOUS.values():
        eta = members(family).requires_grad_(True)
        values = family.sample(eta)
        assert all(value.requires_grad for value in values)


def test_independent_of_the_default_type() -> None:
    for family in (make() for make in FAMILIES.values()):
        eta = members(family).float()
        assert family.mean(eta).dtype is torch.float32
        assert family.natural(family.mean(eta)).dtype is torch.float32
        if not family.is_discrete:
            assert family.sample(eta)[0].dtype is torch.float32
            assert family.point(eta, torch.ones(family.num_signs, dtype=torch.float32))[0].dtype is torch.float32


def test_shapes_of_event_dimensions() -> None:
    for family in (make() for make in FAMILIES.values()):
        for value, dims in zip(family.sample(members(family), (7,)), family.event_dims, strict=True):
            assert value.shape[: value.dim() - dims] == (7, *BATCH)


@each_continuous
def test_signs_may_differ_from_member_to_member(family: ExponentialFamily) -> None:
    eta = members(family)
    signs = torch.ones(*BATCH, family.num_signs)
    signs[0, 1] = -1
    mixed, plus, minus = (family.point(eta, s) for s in (signs, signs[:1, :1], signs[:1, 1:2]))
    for got, one, other in zip(mixed, plus, minus, strict=True):
        torch.testing.assert_close(got[0, 0], one[0, 0])
        torch.testing.assert_close(got[0, 1], other[0, 1])


@each
def test_a_full_step_that_ends_inside_is_taken_in_full(family: ExponentialFamily) -> None:
    """However near the boundary."""
    eta, other = members(family, size=0.5, center=2.0), members(family, seed=1, size=0.5, center=-2.0)
    assert (family.step_size(eta, other - eta, lr=1.0) == 1).all()
    assert (family.step_size(eta, other - eta, lr=0.3) == 0.3).all()
