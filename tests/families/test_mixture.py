"""Laws of the mixtures of normals."""

from __future__ import annotations

import math

import pytest
import torch
from scipy import special, stats
from torch import Tensor
from torch.distributions import Categorical, MixtureSameFamily, MultivariateNormal, Normal

from pyro_vi_lab.families import Dense, Diagonal, Mixture, Params, Tangent
from pyro_vi_lab.families.mixture import MIN_LOG_WEIGHT, NEGLIGIBLE
from pyro_vi_lab.families.rosenblatt import attached, log_ndtr

DIM = 3
STANDARD_ERRORS = 5
FAMILIES = {"dense": Mixture(3, Dense()), "diagonal": Mixture(3, Diagonal()), "one": Mixture(1, Dense())}
EACH = pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
BATCHES = pytest.mark.parametrize("batch", [(), (3,), (2, 3)])


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def scales(family: Mixture, *batch: int, dim: int = DIM, seed: int = 0) -> Tensor:
    size = (0.5 * normal(*batch, dim, seed=seed)).exp()
    if not family.is_dense:
        return size
    return torch.diag_embed(size) + 0.5 * normal(*batch, dim, dim, seed=seed + 1).tril(-1)


def member(family: Mixture, *batch: int, dim: int = DIM, seed: int = 0, away: float = 1.5) -> Params:
    parts = (*batch, family.num_components)
    components = Params(away * normal(*parts, dim, seed=seed), scales(family, *parts, dim=dim, seed=seed + 1))
    return family.join(normal(*parts, seed=seed + 3), components)


def torch_mixture(family: Mixture, params: Params) -> MixtureSameFamily:
    log_weights, components = family.split(params)
    covariance = family.component.covariance(components)
    return MixtureSameFamily(Categorical(logits=log_weights), MultivariateNormal(components.loc, covariance))


def along(family: Mixture, params: Params, direction: Tensor) -> MixtureSameFamily:
    """The distribution of one linear combination of the coordinates."""
    log_weights, components = family.split(params)
    variance = torch.einsum("i,...ij,j->...", direction, family.component.covariance(components), direction)
    return MixtureSameFamily(Categorical(logits=log_weights), Normal(components.loc @ direction, variance.sqrt()))


def noise(family: Mixture, number: int, *batch: int, dim: int = DIM, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return family.draw((number, *batch), dim, generator=generator, dtype=torch.float64)


# --- the distribution ---------------------------------------------------------------------------------------------------


@EACH
@BATCHES
def test_density_and_moments_are_those_of_torch(family: Mixture, batch: tuple[int, ...]) -> None:
    params, z, direction = member(family, *batch), normal(7, *batch, DIM, seed=9), normal(DIM, seed=8)
    theirs = torch_mixture(family, params)
    torch.testing.assert_close(family.log_prob(params, z), theirs.log_prob(z))
    torch.testing.assert_close(params.loc, theirs.mean)
    torch.testing.assert_close(family.variance(params), theirs.variance)
    covariance = family.covariance(params)
    torch.testing.assert_close(covariance.diagonal(dim1=-2, dim2=-1), theirs.variance)
    found = torch.einsum("i,...ij,j->...", direction, covariance, direction)
    torch.testing.assert_close(found, along(family, params, direction).variance)


@EACH
@BATCHES
def test_spread_is_a_root_and_unspread_its_inverse(family: Mixture, batch: tuple[int, ...]) -> None:
    params = member(family, *batch)
    basis = torch.eye(DIM, dtype=torch.float64).reshape(DIM, *(1,) * len(batch), DIM).expand(DIM, *batch, DIM)
    root = family.spread(params, basis).movedim(0, -1)
    expected = family.covariance(params) if family.is_dense else torch.diag_embed(family.variance(params))
    torch.testing.assert_close(root @ root.mT, expected)
    torch.testing.assert_close(family.spread_transposed(params, basis).movedim(0, -1), root.mT)
    torch.testing.assert_close(family.unspread(params, family.spread(params, basis)), basis)


@EACH
def test_logits_and_offsets_are_what_they_are_up_to_a_shift(family: Mixture) -> None:
    """Every packed tensor is a member: what all components share in its first columns says nothing."""
    params, z = member(family), normal(7, DIM, seed=9)
    shifted = params.scale.clone()
    shifted[:, 0] += 3.0
    shifted[:, 1 : 1 + DIM] += normal(DIM, seed=4)
    torch.testing.assert_close(family.log_prob(params._replace(scale=shifted), z), family.log_prob(params, z))


@EACH
def test_quantiles_are_those_of_the_marginals(family: Mixture) -> None:
    params = member(family, 2, away=4.0)
    for probability in (1e-12, 1e-3, 0.3, 0.5, 0.95, 1 - 1e-9):
        z = family.quantile(params, probability)
        for i in range(DIM):
            marginal = along(family, params, torch.eye(DIM, dtype=torch.float64)[i])
            found = marginal.cdf(z[:, i])
            torch.testing.assert_close(found, torch.full_like(found, probability), rtol=1e-8, atol=1e-15)
    assert family.quantile(params, 0.0).tolist() == [[-math.inf] * DIM] * 2
    assert family.quantile(params, 1.0).tolist() == [[math.inf] * DIM] * 2


@EACH
def test_draws_are_of_the_mixture(family: Mixture) -> None:
    """Their conditional distribution functions are uniform and independent."""
    params = member(family)
    z = family.sample(params, noise(family, 4000))
    u = family.to_normal(params, z)
    for i in range(DIM):
        assert stats.kstest(u[:, i].numpy(), "norm").pvalue > 1e-6
    products = u.unsqueeze(-1) * u.unsqueeze(-2) - torch.eye(DIM, dtype=torch.float64)
    assert float((products.mean(0) / products.std(0)).abs().max()) < STANDARD_ERRORS / math.sqrt(len(u))


@EACH
def test_points_are_draws_of_each_component(family: Mixture) -> None:
    params = member(family, 2)
    eps = family.particles(noise(family, 16, 2))
    points = family.points(params, eps).unflatten(0, (len(eps), family.num_components))
    _, components = family.split(params)
    # antithetic, with exact second moments
    torch.testing.assert_close(points.mean(0).movedim(0, 1), components.loc)
    centered = points - points.mean(0)
    covariance = torch.einsum("kcri,kcrj->rcij", centered, centered) / len(eps)
    torch.testing.assert_close(covariance, family.component.covariance(components))


@EACH
def test_the_bound_of_the_divergence_is_above_it(family: Mixture) -> None:
    one, two = member(family), member(family, seed=20)
    z = family.sample(one, noise(family, 4000))
    values = family.log_prob(one, z) - family.log_prob(two, z)
    error = float(values.std()) / math.sqrt(len(z))
    assert float(values.mean()) < float(family.kl_bound(one, two)) + STANDARD_ERRORS * error
    assert float(family.kl_bound(one, one)) == pytest.approx(0, abs=1e-12)


def test_what_has_no_closed_form_says_so() -> None:
    family = FAMILIES["dense"]
    params = member(family)
    for call in (lambda: family.entropy(params), lambda: family.fisher(params), lambda: family.kl(params, params)):
        with pytest.raises(NotImplementedError, match=r"of a mixture|of two mixtures"):
            call()
    with pytest.raises(ValueError, match="num_components must be at least 1"):
        Mixture(0)


# --- the map from normal noise, and its gradients -----------------------------------------------------------------------


@EACH
@BATCHES
def test_to_and_from_normal_are_inverse(family: Mixture, batch: tuple[int, ...]) -> None:
    params, u = member(family, *batch, away=4.0), 2 * normal(20, *batch, DIM, seed=7)
    torch.testing.assert_close(family.to_normal(params, family.from_normal(params, u)), u, rtol=1e-9, atol=1e-9)


@EACH
def test_the_jacobian_is_the_ratio_of_densities(family: Mixture) -> None:
    params = member(family)
    for u in normal(5, DIM, seed=7):
        jacobian = torch.autograd.functional.jacobian(lambda x: family.from_normal(params, x.unsqueeze(0))[0], u)
        z = family.from_normal(params, u.unsqueeze(0))
        expected = Normal(0.0, 1.0).log_prob(u).sum() - family.log_prob(params, z)[0]
        torch.testing.assert_close(jacobian.triu(1), torch.zeros_like(jacobian))
        torch.testing.assert_close(jacobian.logdet(), expected)


@EACH
def test_gradients_of_the_map_are_finite_differences(family: Mixture) -> None:
    params, u, weight = member(family), normal(30, DIM, seed=7), normal(30, DIM, seed=8)
    leaves = Params(*(value.clone().requires_grad_() for value in params))
    found = torch.autograd.grad((weight * family.from_normal(leaves, u)).sum(), list(leaves))
    size = 1e-6
    for which, gradient in enumerate(found):
        for seed in range(5):
            change = normal(*gradient.shape, seed=seed)
            if which == 1 and family.is_dense:
                change[:, 1 + DIM :] = change[:, 1 + DIM :].unflatten(-1, (DIM, DIM)).tril().flatten(-2)
            ends = []
            for sign in (1, -1):
                moved = list(params)
                moved[which] = moved[which] + sign * size * change
                ends.append(float((weight * family.from_normal(Params(*moved), u)).sum()))
            expected = (ends[0] - ends[1]) / (2 * size)
            assert float((change * gradient).sum()) == pytest.approx(expected, rel=1e-6, abs=1e-6)


@EACH
def test_pathwise_gradients_are_unbiased(family: Mixture) -> None:
    """Of E[zᵀAz + bᵀz], which the moments give in closed form."""
    params, matrix, vector = member(family), normal(DIM, DIM, seed=5), normal(DIM, seed=6)
    leaves = Params(*(value.clone().requires_grad_() for value in params))
    second = family.covariance(leaves) + leaves.loc.unsqueeze(-1) * leaves.loc
    exact = torch.autograd.grad((matrix * second).sum() + vector @ leaves.loc, list(leaves))
    found: list[list[Tensor]] = [[], []]
    for seed in range(200):
        z = family.sample(leaves, noise(family, 40, seed=seed))
        value = torch.einsum("ki,ij,kj->k", z, matrix, z) + z @ vector
        for gradients, gradient in zip(found, torch.autograd.grad(value.mean(), list(leaves)), strict=True):
            gradients.append(gradient)
    for gradients, expected in zip(found, exact, strict=True):
        each = torch.stack(gradients)
        mask = torch.ones_like(expected)
        if family.is_dense and expected.dim() == 2:
            lower = torch.ones(DIM, DIM, dtype=torch.float64).tril().flatten()
            mask[:, 1 + DIM :] = lower
        error = each.std(0) / math.sqrt(len(each))
        assert bool((((each.mean(0) - expected).abs() - STANDARD_ERRORS * error) * mask <= 1e-10).all())
        assert bool((error[mask > 0] < 0.2 * (1 + expected[mask > 0].abs())).all())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_log_of_the_normal_distribution_function(dtype: torch.dtype) -> None:
    x = torch.cat([torch.linspace(-40, 40, 801), torch.tensor([-1e4, -1.0, 1e4])]).to(dtype).requires_grad_()
    at = x.detach().double().numpy()
    value, slope = special.log_ndtr(at), math.sqrt(2 / math.pi) / special.erfcx(-at / math.sqrt(2))
    info = torch.finfo(dtype)
    slopes = [torch.autograd.grad(log_ndtr(x).sum(), x)[0], torch.vmap(torch.func.grad(log_ndtr))(x.detach())]
    for found, exact in ((log_ndtr(x).detach(), value), *((one, slope) for one in slopes)):
        # rounding x² changes its exponential by so much
        allowed = 10 * info.eps * (1 + x.detach().double().square()) * torch.from_numpy(exact).abs() + 10 * info.tiny
        close = (found.double() - torch.from_numpy(exact)).abs() <= allowed
        assert bool(close.all())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("far", [1.0, 10.0, 100.0])
def test_gradients_far_out(dtype: torch.dtype, far: float) -> None:
    """A point moves with the location of all components, wherever it is and whichever of them it is from."""
    family = Mixture(2)
    scale = torch.tensor([[0.0, 0.0, 0.0, 1.0, 0.0, 0.5, 1.0], [-3.0, 10.0, 3.0, 0.1, 0.0, 0.2, 0.1]], dtype=dtype)
    params = Params(torch.zeros(2, dtype=dtype, requires_grad=True), scale.requires_grad_())
    z = far * torch.tensor([[1.0, 1.0], [-1.0, 1.0], [1.0, -1.0], [-1.0, -1.0]], dtype=dtype)
    of_loc, of_scale = torch.autograd.grad(attached(family._normals(params), z).sum(), list(params))
    torch.testing.assert_close(of_loc, torch.full_like(of_loc, 4.0), rtol=1e-4, atol=0)
    assert bool(torch.isfinite(of_scale).all())


# --- natural gradients --------------------------------------------------------------------------------------------------


def log_target(z: Tensor) -> Tensor:
    """Two unequal modes and a skew."""
    parts = torch.stack([-(z + 2).square() / 2, -1 - (z - 2).square() / 0.5])
    return parts.logsumexp(0).sum(-1) - 0.05 * z[..., 0].pow(4)


def value_and_grad(z: Tensor) -> tuple[Tensor, Tensor]:
    with torch.enable_grad():
        z = z.detach().requires_grad_()
        value = log_target(z)
        (grad,) = torch.autograd.grad(value.sum(), z)
    return value.detach(), grad


@EACH
def test_the_estimate_is_the_natural_gradient_of_the_bound(family: Mixture) -> None:
    """In one dimension the bound and its gradient are sums over a grid, exact to rounding."""
    params = member(family, dim=1, seed=2)
    leaves = Params(*(value.clone().requires_grad_() for value in params))
    z = torch.linspace(-20, 20, 8001, dtype=torch.float64).unsqueeze(-1)
    log_q = family.log_prob(leaves, z)
    bound = (log_q.exp() * (log_target(z) - log_q)).sum() * float(z[1] - z[0])
    exact = family.tangent(params, *torch.autograd.grad(bound, list(leaves)))
    bound = bound.detach()
    found = []
    for seed in range(200):
        eps = family.particles(noise(family, 32, dim=1, seed=seed))
        found.append(family.estimate(params, eps, *value_and_grad(family.points(params, eps)), newton=False))
    elbos = torch.stack([one.elbo for one in found])
    error = elbos.std() / math.sqrt(len(elbos))
    assert float((elbos.mean() - bound).abs()) < STANDARD_ERRORS * float(error)
    # the standard error that each of them says
    assert float(torch.stack([one.error for one in found]).mean()) == pytest.approx(float(elbos.std()), rel=0.3)
    for which in (0, 1):
        each = torch.stack([one.tangent[which] for one in found])
        error = each.std(0) / math.sqrt(len(each))
        assert bool(((each.mean(0) - exact[which]).abs() <= STANDARD_ERRORS * error + 1e-10).all())


@EACH
def test_no_gradient_and_no_noise_where_q_is_the_target(family: Mixture) -> None:
    params = member(family, 2)
    eps = family.particles(noise(family, 32, 2))
    z = family.points(params, eps).requires_grad_()
    log_p = family.log_prob(params, z)
    (grad,) = torch.autograd.grad(log_p.sum(), z)
    found = family.estimate(params, eps, log_p.detach(), grad, newton=False)
    for value in (found.elbo, found.error, found.length, found.gap, found.noise):
        torch.testing.assert_close(value, torch.zeros_like(value), rtol=0, atol=1e-12)


def test_one_component_is_one_normal() -> None:
    family = FAMILIES["one"]
    params = member(family, 2)
    single = family.component
    one = Params(params.loc, family.split(params)[1].scale.squeeze(1))
    eps = family.particles(noise(family, 32, 2))
    log_p, grad = value_and_grad(family.points(params, eps))
    found = family.estimate(params, eps, log_p, grad, newton=False)
    expected = single.estimate(one, eps[..., :-1], log_p, grad, newton=False)
    torch.testing.assert_close(found.elbo, expected.elbo)
    torch.testing.assert_close(found.length, expected.length)
    torch.testing.assert_close(found.gap, expected.gap)
    moved = family.step(params, found.tangent, lr=1.0, max_kl=0.8)
    alone = single.step(one, expected.tangent, lr=1.0, max_kl=0.4)  # half of the region is for the weights
    torch.testing.assert_close(moved.params.loc, alone.params.loc)
    torch.testing.assert_close(moved.kl, alone.kl)
    torch.testing.assert_close(moved.size, alone.size)


def tangent(family: Mixture, *batch: int, dim: int = DIM, size: float = 1.0, seed: int = 0) -> Tangent:
    parts = (*batch, family.num_components)
    matrix = normal(*parts, dim, dim, seed=seed + 30)
    matrix = matrix + matrix.mT
    stretch = matrix.flatten(-2) if family.is_dense else matrix.diagonal(dim1=-2, dim2=-1)
    gain = normal(*parts, 1, seed=seed + 31)
    return Tangent(size * normal(*parts, dim, seed=seed + 32), size * torch.cat([gain, stretch], -1))


@EACH
@pytest.mark.parametrize("size", [1e-3, 1.0, 1e3, 1e9])
def test_no_step_leaves_the_family_or_the_trust_region(family: Mixture, size: float) -> None:
    params, move = member(family, 20), tangent(family, 20, size=size)
    for max_kl in (1e-3, 0.7, 8.0):
        step = family.step(params, move, lr=1.0, max_kl=max_kl)
        assert bool((step.kl <= max_kl * (1 + 1e-9)).all())
        assert bool((step.size > 0).all() and (step.size <= 1).all())
        bound = family.kl_bound(step.params, params)
        torch.testing.assert_close(bound, step.kl, rtol=1e-6, atol=1e-9)
        log_weights, components = family.split(step.params)
        assert bool(torch.isfinite(log_weights).all() and torch.isfinite(components.loc).all())
        assert bool((family.component.variance(components) > 0).all())


@EACH
def test_a_step_gains_what_the_norm_says(family: Mixture) -> None:
    """KL(new ‖ old) of z and its component is t²/2 times the squared norm, but for terms of third order."""
    params, move = member(family, 3), tangent(family, 3)
    gain = move.stretch[..., 0]
    log_weights, _ = family.split(params)
    move.stretch[..., 0] = gain - (log_weights.exp() * gain).sum(-1, keepdim=True)
    errors = []
    for size in (1e-2, 1e-3):
        kl = family.step(params, move, lr=size, max_kl=10.0).kl
        errors.append(float((kl / (size**2 / 2 * family.squared_norm(params, move)) - 1).abs().max()))
    assert errors[1] < errors[0] / 5
    assert errors[1] < 0.03


def test_a_full_step_of_the_weights_of_modes_apart_is_exact() -> None:
    """Each component has found its mode; the step makes the weights those of the modes."""
    family = Mixture(3)
    components = Params(
        torch.tensor([[-30.0], [0.0], [30.0]]).double(), torch.tensor([1.0, 2.0, 0.5]).double()[:, None, None]
    )
    target = family.join(torch.tensor([0.2, 0.5, 0.3]).double().log(), components)
    params = family.join(torch.tensor([0.6, 0.1, 0.3]).double().log(), components)
    eps = family.particles(noise(family, 32, dim=1))
    z = family.points(params, eps).requires_grad_()
    log_p = family.log_prob(target, z)
    (grad,) = torch.autograd.grad(log_p.sum(), z)
    found = family.estimate(params, eps, log_p.detach(), grad, newton=False)
    step = family.step(params, found.tangent, lr=1.0, max_kl=100.0)
    torch.testing.assert_close(step.params.loc, target.loc)
    torch.testing.assert_close(family.split(step.params)[0].exp(), family.split(target)[0].exp())
    # what is left of the bound is the divergence of the weights
    expected = family.kl_bound(params, target)
    torch.testing.assert_close(found.gap, expected)


def test_a_component_dies_and_comes_back() -> None:
    family = FAMILIES["dense"]
    params, move = member(family), tangent(family)
    for gain in (-1e6, 1e6):
        move.stretch[0, 0], move.shift[:], move.stretch[:, 1:] = gain, 0.0, 0.0
        weights = []
        for _ in range(10):
            params = family.step(params, move, lr=1.0, max_kl=8.0).params
            weights.append(float(family.split(params)[0][0]))
        assert all(math.isfinite(weight) for weight in weights)
        expected = MIN_LOG_WEIGHT if gain < 0 else 0.0
        assert weights[-1] == pytest.approx(expected, abs=1e-6)


# --- where to start -----------------------------------------------------------------------------------------------------


@EACH
@pytest.mark.parametrize("dim", [1, 2, 7])
def test_initial_members_are_symmetric_and_round(family: Mixture, dim: int) -> None:
    loc = normal(2, dim)
    params = family.initial(loc, 0.3)
    torch.testing.assert_close(params.loc, loc)
    torch.testing.assert_close(family.quantile(params, 0.5), loc)
    torch.testing.assert_close(family.variance(params), torch.full_like(loc, 0.09))


@EACH
@BATCHES
def test_from_the_precursor_and_back(family: Mixture, batch: tuple[int, ...]) -> None:
    one = Params(normal(*batch, DIM), scales(family, *batch))
    params = family.from_precursor(one)
    torch.testing.assert_close(params.loc, one.loc)
    torch.testing.assert_close(family.variance(params), family.component.variance(one))
    back = family.to_precursor(params)
    torch.testing.assert_close(back.loc, one.loc)
    torch.testing.assert_close(back.scale, one.scale)


@pytest.mark.parametrize("name", ["dense", "diagonal"])
@pytest.mark.parametrize("batch", [(), (2,)])
def test_modes_are_told_apart_and_weighted_by_their_evidence(name: str, batch: tuple[int, ...]) -> None:
    """Three fits of one mode are one of it, and one far below the others is none; a failed fit neither."""
    family = FAMILIES[name]
    modes = torch.tensor([0.0, 8.0, -8.0]).double()[torch.tensor([0, 0, 1, 0, 2, 2])]
    loc = modes.reshape(-1, *(1,) * len(batch), 1).expand(-1, *batch, DIM) + 1e-3 * normal(6, *batch, DIM)
    scale = scales(family, *batch).expand(6, *batch, *scales(family).shape)
    elbo = torch.tensor([-3.0, -3.001, -4.0, -3.002, -3.0 - 2 * NEGLIGIBLE, math.nan]).double()
    params = family.from_precursors(Params(loc, scale), elbo.reshape(-1, *(1,) * len(batch)).expand(-1, *batch))
    log_weights, components = family.split(params)
    share = 1 / (1 + math.exp(-1))
    near = (components.loc.mean(-1) - 8).abs() < 4
    torch.testing.assert_close((log_weights.exp() * near).sum(-1), torch.full(batch, 1 - share).double())
    assert near.sum(-1).unique().tolist() == [1]  # the component left over is where the weight is
    assert float(components.loc.min()) > -4
