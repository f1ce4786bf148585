from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO, TraceEnum_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import (
    AutoDelta,
    AutoDiagonalNormal,
    AutoGuideList,
    AutoMultivariateNormal,
    AutoNormal,
    init_to_value,
)
from pyro.util import get_rng_state, set_rng_state
from torch import Tensor
from torch.distributions import constraints

import pyro_vi_lab as vl
from pyro_vi_lab.errors import ArgumentError
from pyro_vi_lab.families import FAMILIES, Dense, Estimate, Family, Params, Tangent
from pyro_vi_lab.families.particles import antithetic
from pyro_vi_lab.guides import FullRankNormal, MeanFieldNormal
from pyro_vi_lab.models import LinearRegression
from pyro_vi_lab.natural_step import tolerance

STANDARD_ERRORS = 5  # fails a right answer once in two million
EPS = torch.finfo(torch.float64).eps


@pytest.fixture(autouse=True)
def double() -> None:
    torch.set_default_dtype(torch.float64)


# The estimate


def members(family: Family, dim: int, num_fits: int, seed: int = 0) -> Params:
    """A batch of members of a family, none of them special."""
    generator = torch.Generator().manual_seed(seed)
    loc = torch.randn(num_fits, dim, generator=generator)
    scale = family.initial(loc, 0.6).scale
    noise = torch.randn(scale.shape, generator=generator) * 0.3
    return Params(loc, scale + noise.tril() * scale.bool() if isinstance(family.scale, Dense) else scale * noise.exp())


class Gaussian:
    """log density −½ (z − m)ᵀ Λ (z − m) + c."""

    def __init__(self, dim: int, seed: int = 1, log_constant: float = 0.7) -> None:
        generator = torch.Generator().manual_seed(seed)
        root = torch.randn(dim, dim, generator=generator) / dim**0.5
        self.precision = root @ root.T + torch.diag(torch.linspace(0.5, 2.0, dim))
        self.loc = torch.randn(dim, generator=generator)
        self.log_constant = log_constant

    def __call__(self, z: Tensor) -> tuple[Tensor, Tensor]:
        grad = -(z - self.loc) @ self.precision
        return (grad * (z - self.loc)).sum(-1) / 2 + self.log_constant, grad

    @property
    def log_evidence(self) -> float:
        dim = len(self.loc)
        return float(self.log_constant + dim / 2 * math.log(2 * math.pi) - torch.logdet(self.precision) / 2)

    def member(self, family: Family) -> Params:
        """The best member: Λ⁻¹ for a dense scale, 1 / Λᵢᵢ for a diagonal one."""
        if isinstance(family.scale, Dense):
            return Params(self.loc, torch.linalg.cholesky(torch.linalg.inv(self.precision)))
        return Params(self.loc, self.precision.diagonal().rsqrt())


def skewed(z: Tensor) -> tuple[Tensor, Tensor]:
    """Not Gaussian, correlated; smooth, with light tails."""
    left, right = z[..., :-1], z[..., 1:]
    value = -(z.cosh() - z).sum(-1) - 0.25 * (left - right).square().sum(-1)
    grad = -(z.sinh() - 1)
    difference = 0.5 * (left - right)
    grad = grad - torch.nn.functional.pad(difference, (0, 1)) + torch.nn.functional.pad(difference, (1, 0))
    return value, grad


def estimated(
    family: Family,
    params: Params,
    target: Callable[[Tensor], tuple[Tensor, Tensor]],
    *,
    num_particles: int,
    seed: int,
    newton: bool = False,
) -> Estimate:
    generator = torch.Generator().manual_seed(seed)
    num_fits, dim = params.loc.shape
    eps = antithetic(family.noise, num_particles, (num_fits,), dim, generator=generator, dtype=params.loc.dtype)
    return family.estimate(params, eps, *target(family.sample(params, eps)), newton=newton)


each_family = pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)


@each_family
@pytest.mark.parametrize("dim", [1, 2, 7])
def test_natural_gradient_of_a_gaussian_target_has_no_variance(family: Family, dim: int) -> None:
    """In whitened coordinates: δ = σᵀΛ(m* - m) and M = I - σᵀΛσ, whichever particles are drawn."""
    target, params = Gaussian(dim), members(family, dim, num_fits=3)
    root = params.scale if isinstance(family.scale, Dense) else torch.diag_embed(params.scale)
    shift = torch.einsum("rij,ik,rk->rj", root, target.precision, target.loc - params.loc)
    full = torch.eye(dim) - root.mT @ target.precision @ root
    stretch = full if isinstance(family.scale, Dense) else full.diagonal(dim1=-2, dim2=-1)
    for seed in range(3):
        found = estimated(family, params, target, num_particles=64, seed=seed, newton=True)
        torch.testing.assert_close(found.tangent.shift, shift, rtol=0, atol=1e4 * EPS)
        torch.testing.assert_close(found.tangent.stretch, stretch, rtol=0, atol=1e4 * EPS)
        if found.tangent.curvature is not None:
            torch.testing.assert_close(found.tangent.curvature, full, rtol=0, atol=1e4 * EPS)
        assert (found.noise < 1e4 * EPS).all()


@pytest.mark.parametrize("dim", [1, 2, 7, 20])
def test_one_full_step_is_exact_for_a_gaussian_target(dim: int) -> None:
    """From wide members: I - M has to stay above one half to be the precision itself."""
    family, target = FAMILIES["full_rank"], Gaussian(dim)
    best = target.member(family)
    params = Params(torch.randn(2, dim) * 3, (best.scale * torch.tensor([1.2, 5.0])[:, None, None]))
    found = estimated(family, params, target, num_particles=128, seed=0)
    moved = family.step(params, found.tangent, lr=1.0, max_kl=math.inf).params
    covariance = torch.linalg.inv(target.precision)
    torch.testing.assert_close(moved.loc, target.loc.expand(2, -1), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(
        family.scale.covariance(moved.scale), covariance.expand(2, -1, -1), rtol=1e-10, atol=1e-10
    )


@each_family
def test_where_q_is_p_nothing_is_left_but_the_evidence(family: Family) -> None:
    target = Gaussian(4)
    if not isinstance(family.scale, Dense):
        target.precision = torch.diag(target.precision.diagonal())
    params = Params(*(value.unsqueeze(0) for value in target.member(family)))
    # 12 particles are too few to match second moments: the gradient of each single draw is zero
    found = estimated(family, params, target, num_particles=12, seed=0)
    assert found.elbo.item() == pytest.approx(target.log_evidence, rel=1e-13)
    for left in (found.error, found.length, found.gap, found.noise, found.tangent.shift, found.tangent.stretch):
        assert left.abs().max() < 100 * EPS


@each_family
@pytest.mark.parametrize("newton", [False, True])
def test_estimate_is_unbiased(family: Family, newton: bool) -> None:
    """Pairs of plain draws against single ones."""
    params = members(family, 3, num_fits=1)
    generator = torch.Generator().manual_seed(99)
    half = torch.randn(400, 8, 1, 3, generator=generator)
    eps = torch.cat([half, -half], 1)
    found = [family.estimate(params, one, *skewed(family.sample(params, one)), newton=newton) for one in eps]
    mean = {
        "elbo": torch.stack([one.elbo for one in found]),
        "shift": torch.stack([one.tangent.shift for one in found]),
        "stretch": torch.stack([one.tangent.stretch for one in found]),
    }
    single = plain(family, params, num_draws=200_000)
    for name in mean:
        error = (single[name].var(0) / len(single[name]) + mean[name].var(0) / len(found)).sqrt()
        difference = single[name].mean(0) - mean[name].mean(0)
        assert (difference.abs() <= STANDARD_ERRORS * error).all(), name


def plain(family: Family, params: Params, *, num_draws: int) -> dict[str, Tensor]:
    """What an estimate averages, of single independent draws."""
    eps = torch.randn(num_draws, *params.loc.shape, generator=torch.Generator().manual_seed(98))
    z = family.sample(params, eps)
    log_p, grad = skewed(z)
    h = family.scale.multiply_transposed(params.scale, grad) + eps
    outer = torch.einsum("k...d,k...e->k...de", h, eps)
    return {
        "elbo": log_p - family.log_prob(params, z),
        "shift": h,
        "stretch": (outer + outer.mT) / 2 if isinstance(family.scale, Dense) else h * eps,
    }


@each_family
def test_gap_of_a_gaussian_target(family: Family) -> None:
    """What is missing to the best member, to second order around it: exact in the location."""
    target = Gaussian(3)
    best = Params(*(value.unsqueeze(0) for value in target.member(family)))
    moved = Params(best.loc + torch.tensor([0.3, -0.2, 0.5]), best.scale)
    difference = target.loc - moved.loc[0]
    expected = difference @ target.precision @ difference / 2  # the loss in E[log p]; the entropy is the same
    found = estimated(family, moved, target, num_particles=64, seed=0, newton=True)
    assert found.gap.item() == pytest.approx(float(expected), rel=1e-9)
    for size in (1e-2, 1e-3):
        stretched = Params(best.loc, best.scale * (1 + size))
        found = estimated(family, stretched, target, num_particles=64, seed=0, newton=True)
        assert found.gap.item() == pytest.approx(float(family.kl(best, stretched)), rel=10 * size)


@each_family
@pytest.mark.parametrize("dim", [1, 3, 10])
def test_noise_covers_what_the_gap_is_at_the_optimum(family: Family, dim: int) -> None:
    """There all of the gap is noise. Of log p = 2z - exp z the best normal has s² = 1/2 and m = log 2 - 1/4."""
    best = Params(torch.full((1, dim), math.log(2) - 0.25), family.initial(torch.zeros(1, dim), 0.5**0.5).scale)

    def log_gamma(z: Tensor) -> tuple[Tensor, Tensor]:
        return (2 * z - z.exp()).sum(-1), 2 - z.exp()

    found = [estimated(family, best, log_gamma, num_particles=64, seed=seed) for seed in range(200)]
    gap, noise = (torch.stack([getattr(one, name) for one in found]).squeeze() for name in ("gap", "noise"))
    assert gap.mean() <= noise.mean() + STANDARD_ERRORS * gap.std() / len(found) ** 0.5
    assert noise.mean() <= 10 * gap.mean()  # and it is not out of all proportion


@each_family
def test_error_is_the_standard_error_of_the_elbo(family: Family) -> None:
    """z-scores against the mean of all have variance one."""
    params, repeats = members(family, 3, num_fits=1), 500
    found = [estimated(family, params, skewed, num_particles=256, seed=seed) for seed in range(repeats)]
    elbo, error = (torch.stack([getattr(one, name) for one in found]).squeeze() for name in ("elbo", "error"))
    z_scores = (elbo - elbo.mean()) / error
    fourth = ((z_scores - z_scores.mean()) ** 4).mean() / z_scores.var() ** 2  # of the variance's own standard error
    # matched second moments make the mean of log p - log q more precise than that of its pairs: never less
    assert z_scores.var() < 1 + STANDARD_ERRORS * float(((fourth - 1) / repeats).sqrt())
    assert z_scores.var() > 0.01


def test_batch_of_members_is_the_members_one_by_one() -> None:
    for family in FAMILIES.values():
        params = members(family, 3, num_fits=4)
        eps = torch.randn(32, 4, 3)
        together = family.estimate(params, eps, *skewed(family.sample(params, eps)), newton=True)
        for i in range(4):
            one = Params(params.loc[i : i + 1], params.scale[i : i + 1])
            noise = eps[:, i : i + 1]
            alone = family.estimate(one, noise, *skewed(family.sample(one, noise)), newton=True)
            for name in ("elbo", "error", "length", "gap", "noise"):
                torch.testing.assert_close(getattr(alone, name)[0], getattr(together, name)[i])
            torch.testing.assert_close(alone.tangent.shift[0], together.tangent.shift[i])
            torch.testing.assert_close(alone.tangent.stretch[0], together.tangent.stretch[i])


def test_one_bad_member_leaves_the_others_alone() -> None:
    family = FAMILIES["full_rank"]
    params, eps = members(family, 3, num_fits=2), torch.randn(32, 2, 3)
    log_p, grad = skewed(family.sample(params, eps))
    good = family.estimate(params, eps, log_p, grad, newton=False)
    log_p[0, 1], grad[0, 1] = math.nan, math.nan
    found = family.estimate(params, eps, log_p, grad, newton=False)
    assert found.gap.isfinite().tolist() == [True, False]
    assert found.gap[0] == good.gap[0]
    torch.testing.assert_close(found.tangent.stretch[0], good.tangent.stretch[0])


# NaturalGradient: the guides it knows


def model(x: Tensor, y: Tensor) -> None:
    """Two sites, one below a constraint; near normal with 80 rows, and weakly correlated."""
    scale = pyro.sample("scale", dist.HalfNormal(2.0))
    beta = pyro.sample("beta", dist.Normal(0.0, 5.0).expand([2]).to_event(1))
    with pyro.plate("row", len(y)):
        pyro.sample("y", dist.Normal((x * beta).sum(-1), scale), obs=y)


def data(num_rows: int = 80) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(num_rows, 2, generator=generator, dtype=torch.float64)
    noise = torch.randn(num_rows, generator=generator, dtype=torch.float64)
    return x, x @ torch.tensor([1.0, -2.0], dtype=torch.float64) + 0.8 * noise


GUIDES: dict[str, Callable[..., Any]] = {
    "MeanFieldNormal": MeanFieldNormal,
    "FullRankNormal": FullRankNormal,
    "AutoNormal": AutoNormal,
    "AutoDiagonalNormal": AutoDiagonalNormal,
    "AutoMultivariateNormal": AutoMultivariateNormal,
}
DENSE = ("FullRankNormal", "AutoMultivariateNormal")
each_guide = pytest.mark.parametrize("name", GUIDES)


def family_of(guide: Any) -> Family:
    return FAMILIES["full_rank" if type(guide).__name__ in DENSE else "mean_field"]


def read(guide: Any) -> Params:
    """Location and scale of any of the guides, of all sites together."""
    with torch.no_grad():
        if isinstance(guide, AutoNormal):
            names = [name for name, _ in guide.prototype_trace.iter_stochastic_nodes()]
            locs, scales = (torch.cat([getattr(of, n).reshape(-1) for n in names]) for of in (guide.locs, guide.scales))
            return Params(locs.clone(), scales.clone())
        if isinstance(guide, AutoMultivariateNormal):
            return Params(guide.loc.clone(), guide.scale.unsqueeze(-1) * guide.scale_tril)
        return Params(
            guide.loc.clone(), (guide.scale_tril if isinstance(guide, FullRankNormal) else guide.scale).clone()
        )


def differentiable(guide: Any) -> Params:
    """The same with a graph back to the guide's leaf tensors."""
    if isinstance(guide, AutoNormal):
        names = [name for name, _ in guide.prototype_trace.iter_stochastic_nodes()]
        return Params(*(torch.cat([getattr(of, n).reshape(-1) for n in names]) for of in (guide.locs, guide.scales)))
    if isinstance(guide, AutoMultivariateNormal):
        return Params(guide.loc, guide.scale.unsqueeze(-1) * guide.scale_tril)
    return Params(guide.loc, guide.scale_tril if isinstance(guide, FullRankNormal) else guide.scale)


def natural(family: Family, params: Params, grad: Params) -> Tangent:
    """Natural gradient of minus a loss from its gradient, by solving with the Fisher matrix.

    Whitened, a change dσ of the scale is W = σ⁻¹dσ, and to first order the covariance changes by W + Wᵀ.
    """
    dim = len(params.loc)
    rows, columns = torch.tril_indices(dim, dim)
    dense = isinstance(family.scale, Dense)
    flat = grad.scale[rows, columns] if dense else grad.scale
    direction = torch.linalg.solve(family.fisher(params), -torch.cat([grad.loc, flat]))
    shift = family.scale.solve(params.scale, direction[:dim])
    if not dense:
        return Tangent(shift, 2 * direction[dim:] / params.scale)
    change = torch.zeros(dim, dim)
    change[rows, columns] = direction[dim:]
    whitened = torch.linalg.solve(params.scale, change)
    return Tangent(shift, whitened + whitened.T)


def started(name: str, seed: int = 0) -> Any:
    """A guide with parameters that are not those of a fresh one."""
    guide = GUIDES[name](model)
    guide(*data())
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for leaf in guide.parameters():
            leaf += 0.3 * torch.randn(leaf.shape, generator=generator)
    return guide


@each_guide
@pytest.mark.parametrize(("size", "max_kl"), [(1.0, math.inf), (30.0, 0.05)])
def test_step_is_that_of_the_family(name: str, size: float, max_kl: float) -> None:
    """From the gradient of a linear loss in location and scale, of which autograd makes that of the leaf tensors."""
    guide = started(name)
    family, before = family_of(guide), read(guide)
    generator = torch.Generator().manual_seed(1)
    grad = Params(*(size * torch.randn(value.shape, generator=generator) for value in before))
    present = differentiable(guide)
    ((grad.loc * present.loc).sum() + (grad.scale * present.scale).sum()).backward()

    vl.NaturalGradient(guide, lr=0.3, max_kl=max_kl)(list(guide.parameters()))
    lower = Params(grad.loc, grad.scale.tril() if grad.scale.dim() == 2 else grad.scale)
    expected = family.step(before, natural(family, before, lower), lr=0.3, max_kl=max_kl)
    assert (expected.size < 0.3) == (max_kl < 1)  # the trust region was, or was not, in the way
    after = read(guide)
    torch.testing.assert_close(after.loc, expected.params.loc, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(after.scale, expected.params.scale, rtol=1e-11, atol=1e-11)


@each_guide
def test_guide_keeps_within_the_trust_region(name: str) -> None:
    guide, (x, y) = started(name), data()
    svi = SVI(model, guide, vl.NaturalGradient(guide, lr=1.0, max_kl=0.1), vl.ELBO(num_particles=8))
    for _ in range(5):
        before = read(guide)
        svi.step(x, 1000 * y)  # far away
        kl = float(family_of(guide).kl(read(guide), before))
        assert 0.01 < kl <= 0.1 * (1 + 1e-9)


@each_guide
def test_gradient_that_is_not_finite_changes_nothing(name: str) -> None:
    guide = started(name)
    optimizer = vl.NaturalGradient(guide)
    for bad in (math.nan, math.inf, None):
        before = [leaf.detach().clone() for leaf in guide.parameters()]
        for leaf in guide.parameters():
            leaf.grad = torch.ones_like(leaf)
        leaf.grad = None if bad is None else torch.full_like(leaf, bad)
        optimizer(list(guide.parameters()))
        for leaf, kept in zip(guide.parameters(), before, strict=True):
            assert torch.equal(leaf, kept)
    leaf.grad = torch.ones_like(leaf)
    optimizer(list(guide.parameters()))
    assert not torch.equal(leaf, kept)


# NaturalGradient in SVI


def test_one_step_of_svi_lands_on_a_conjugate_posterior() -> None:
    r"""The new precision Λ and Λμ are linear in the gradients, so they are right in the mean, whatever the particles.

    From a wide guide, so that no eigenvalue of the new whitened precision is below one half.
    """
    regression = LinearRegression(noise_scale=0.6, prior_scale=1.5)
    X, y, _ = regression.simulate(12, 2, seed=0)
    exact = regression.exact(X, y)
    precision = torch.linalg.inv(exact.covariance)
    for name, elbo in (("FullRankNormal", vl.ELBO), ("AutoMultivariateNormal", Trace_ELBO)):
        naturals = []
        for seed in range(30):
            pyro.clear_param_store()
            pyro.set_rng_seed(seed)
            guide = GUIDES[name](regression, init_loc_fn=init_to_value(values=start()), init_scale=0.5)
            objective = elbo(num_particles=2000, vectorize_particles=True, max_plate_nesting=1)
            SVI(regression, guide, vl.NaturalGradient(guide, lr=1.0, max_kl=math.inf), objective).step(X, y)
            loc, root = read(guide)
            new = torch.cholesky_inverse(root)
            naturals.append(torch.cat([new.flatten(), new @ loc]))
        sample, expected = torch.stack(naturals), torch.cat([precision.flatten(), precision @ exact.mean])
        error = sample.std(0) / len(sample) ** 0.5
        assert ((sample.mean(0) - expected).abs() <= STANDARD_ERRORS * error).all(), name
        assert (error < 0.02 * expected.abs().max()).all()  # it did land somewhere


def start() -> dict[str, Tensor]:
    return {"intercept": torch.tensor(0.5), "beta": torch.tensor([-0.5, 0.3])}


ELBOS: dict[str, Callable[..., Any]] = {
    "ELBO": vl.ELBO,
    "Trace_ELBO": Trace_ELBO,
    "TraceMeanField_ELBO": TraceMeanField_ELBO,
    "TraceGraph_ELBO": TraceGraph_ELBO,
    "TraceEnum_ELBO": TraceEnum_ELBO,
}
# Pyro's rule for KL(Delta ‖ prior) drops the change of variables of its own guides' constrained sites
PAIRS = [
    (guide, elbo) for guide in GUIDES for elbo in ELBOS if elbo != "TraceMeanField_ELBO" or not guide.startswith("Auto")
]
PARTICLES, AVERAGED = 100, 60


def with_outliers(x: Tensor, y: Tensor) -> None:
    """The same with a discrete site, to be summed out."""
    scale = pyro.sample("scale", dist.HalfNormal(2.0))
    beta = pyro.sample("beta", dist.Normal(0.0, 5.0).expand([2]).to_event(1))
    with pyro.plate("row", len(y)):
        outlier = pyro.sample("outlier", dist.Bernoulli(0.1), infer={"enumerate": "parallel"})
        pyro.sample("y", dist.Normal((x * beta).sum(-1), scale * (1 + 4 * outlier)), obs=y)


@dataclass(frozen=True)
class Optimum:
    """The fit of a family to a model; ``noise`` is the mean squared length, in the Fisher metric, of one draw's gradient."""

    params: Params
    noise: float


@pytest.fixture(scope="module")
def optimum() -> Callable[[Callable[..., None], str], Optimum]:
    return functools.cache(find_optimum)


def find_optimum(model: Callable[..., None], name: str) -> Optimum:
    fit = vl.fit(vl.Problem(model, *data()), name, progress=False)
    family, params = FAMILIES[name], Params(fit.params.loc[0], fit.params.scale[0])
    inverse, dim = torch.linalg.inv(family.fisher(params)), len(params.loc)
    rows, columns = torch.tril_indices(dim, dim)
    elbo = TraceEnum_ELBO(max_plate_nesting=1) if model is with_outliers else Trace_ELBO()
    squares = []
    for _ in range(300):
        fit.guide.zero_grad()
        elbo.loss_and_grads(model, fit.guide, *data())
        loc, scale = (leaf.grad for leaf in fit.guide.parameters())
        # the leaf tensor holds logarithms, of the diagonal alone if there is more
        if name == "full_rank":
            scale = (scale / torch.where(torch.eye(dim) == 1, params.scale, 1.0))[rows, columns]
        else:
            scale = scale / params.scale
        grad = torch.cat([loc, scale])
        squares.append(float(grad @ inverse @ grad))
    return Optimum(params, float(np.mean(squares)))


@pytest.mark.parametrize(("name", "elbo"), PAIRS)
def test_svi_reaches_the_optimum_of_fit(
    name: str, elbo: str, optimum: Callable[[Callable[..., None], str], Optimum]
) -> None:
    r"""Step sizes 1/t average the natural parameters over N draws, which leaves KL ≈ noise / 2N.

    The KL divergence is a weighted sum of squares, whose standard deviation is at most √2 times its mean.
    """
    target, guided = model, model
    if elbo == "TraceEnum_ELBO":
        target, guided = with_outliers, poutine.block(with_outliers, hide=["outlier"])
    guide = GUIDES[name](guided)
    best = optimum(target, "full_rank" if name in DENSE else "mean_field")
    optimizer = vl.NaturalGradient(guide, lr=0.5)
    objective = ELBOS[elbo](num_particles=PARTICLES, vectorize_particles=True, max_plate_nesting=1)
    svi = SVI(target, guide, optimizer, objective)
    advance(svi, 30)
    for t in range(AVERAGED):
        optimizer.lr = 1 / (t + 2)
        advance(svi, 1)
    reached = float(family_of(guide).kl(read(guide), best.params))
    expected = best.noise / (2 * PARTICLES * AVERAGED)
    assert reached <= (1 + STANDARD_ERRORS * math.sqrt(2)) * expected + 2 * tolerance(3)


def test_other_parameters_go_to_the_other_optimizer() -> None:
    """Adam's first step is its learning rate against the sign of the gradient."""

    def with_param(y: Tensor) -> None:
        offset = pyro.param("offset", torch.tensor([5.0, -5.0]))
        x = pyro.sample("x", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("y", dist.Normal(x + offset, 1.0).to_event(1), obs=y)

    for others, lr in ((None, 0.01), (pyro.optim.Adam({"lr": 0.3}), 0.3)):
        pyro.clear_param_store()
        guide = FullRankNormal(with_param)
        optimizer = vl.NaturalGradient(guide, others=others)
        SVI(with_param, guide, optimizer, vl.ELBO(num_particles=20)).step(torch.zeros(2))
        assert pyro.param("offset").tolist() == pytest.approx([5 - lr, -5 + lr], rel=1e-6)
        assert set(optimizer.others.get_state()) == {"offset"}


def test_empirical_bayes() -> None:
    r"""A prior scale as ``pyro.param``: its maximum-likelihood estimate is mean(y²) - 1, as y ~ N(0, s² + 1).

    Full rank is exact here, so the bound is the likelihood itself.
    """
    y = torch.linspace(-4, 4, 40)

    def with_param() -> None:
        scale = pyro.param("scale", torch.tensor(1.0), constraint=constraints.positive)
        with pyro.plate("row", 40):
            x = pyro.sample("x", dist.Normal(0.0, scale))
            pyro.sample("y", dist.Normal(x, 1.0), obs=y)

    best = float(y.square().mean() - 1) ** 0.5

    def log_likelihood(scale: float) -> float:
        return float(dist.Normal(0.0, (scale**2 + 1) ** 0.5).log_prob(y).sum())

    guide = MeanFieldNormal(with_param)
    optimizer = vl.NaturalGradient(guide, lr=1.0, others=pyro.optim.Adam({"lr": 0.02}))
    svi = SVI(with_param, guide, optimizer, vl.ELBO(num_particles=50, vectorize_particles=True, max_plate_nesting=1))
    for _ in range(150):
        svi.step()
    reached = float(pyro.param("scale").detach())
    # half a squared standard error of the estimate is what the likelihood loses one standard error away from it
    assert log_likelihood(best) - log_likelihood(1.0) > 10
    assert log_likelihood(best) - log_likelihood(reached) < 0.1**2 / 2


def test_guides_mix_in_a_list() -> None:
    """Both normal parts land on their posteriors with one step; the point estimate goes to Adam."""
    posterior = {"a": (1.0, 0.5), "b": (-2.0, 0.25), "c": (4.0, 1.0), "d": (3.0, 0.5)}

    def independent() -> None:
        for name, (loc, scale) in posterior.items():
            pyro.sample(name, dist.Normal(loc, scale))

    def part(*names: str) -> Any:
        return poutine.block(independent, expose=list(names))

    zero = init_to_value(values={name: torch.tensor(0.0) for name in posterior})
    guide = AutoGuideList(independent)
    guide.append(FullRankNormal(part("a"), init_scale=1.0))
    guide.append(AutoNormal(part("b"), init_loc_fn=zero, init_scale=1.0))
    guide.append(AutoMultivariateNormal(part("c"), init_loc_fn=zero, init_scale=1.0))
    guide.append(AutoDelta(part("d"), init_loc_fn=zero))
    optimizer = vl.NaturalGradient(guide, lr=1.0, max_kl=math.inf)
    SVI(independent, guide, optimizer, vl.ELBO(num_particles=2)).step()
    svi = SVI(independent, guide, optimizer, vl.ELBO(num_particles=20))
    assert float(guide.median()["d"]) == pytest.approx(0.01, rel=1e-6)  # Adam's first step
    for _ in range(30):
        svi.step()
    for found, name in zip(guide, "abc", strict=False):
        loc, scale = read(found)
        # the gradient vanishes draw by draw at the posterior: with noise of its own it would not come this near
        assert (float(loc), float(scale)) == pytest.approx(posterior[name], rel=1e-6)


def test_part_of_a_list_whose_gradient_is_missing_waits() -> None:
    """A part that a run does not use keeps its parameters; the others move."""
    guide = started("MeanFieldNormal")
    optimizer = vl.NaturalGradient(guide)
    SVI(model, guide, optimizer, vl.ELBO()).step(*data())
    before = read(guide)
    other = torch.nn.Parameter(torch.tensor(1.0))
    other.grad = torch.tensor(1.0)
    pyro.param("other", other)
    optimizer([other])
    assert torch.equal(read(guide).loc, before.loc)
    assert other.item() == pytest.approx(0.99, rel=1e-6)


def test_parameters_of_another_guide_are_named() -> None:
    one, two = MeanFieldNormal(model), FullRankNormal(model)
    svi = SVI(model, two, vl.NaturalGradient(one), vl.ELBO())
    with pytest.raises(ArgumentError, match=r"made for a MeanFieldNormal none .*FullRankNormal\.loc.*scale_tril"):
        svi.step(*data())


# Momentum, damping, clipping, schedules, bad gradients


def gaussian_model() -> None:
    pyro.sample("x", dist.Normal(torch.tensor([1.0, -2.0]), torch.tensor([0.5, 2.0])).to_event(1))


def moved(**settings: Any) -> tuple[Params, Params]:
    """A member before and after one step with a given gradient."""
    pyro.clear_param_store()
    guide = FullRankNormal(gaussian_model, init_scale=1.0)
    guide()
    before = guide.params
    optimizer = vl.NaturalGradient(guide, max_kl=math.inf, **settings)
    for tensor in guide.parameters():
        tensor.grad = torch.full_like(tensor, 0.1)
    optimizer(list(guide.parameters()))
    return before, guide.params


def test_damping_is_a_shorter_step() -> None:
    _, short = moved(lr=0.25)
    _, damped = moved(lr=0.5, damping=1.0)
    for one, other in zip(short, damped, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_first_step_with_momentum_is_that_without() -> None:
    _, plain = moved(lr=0.5)
    _, heavy = moved(lr=0.5, momentum=0.9)
    for one, other in zip(plain, heavy, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_momentum_averages_natural_gradients() -> None:
    """Near the optimum, where the metric hardly changes, noise of single draws is averaged out."""

    def scatter(momentum: float) -> float:
        pyro.clear_param_store()
        pyro.set_rng_seed(1)
        guide = MeanFieldNormal(gaussian_model, init_scale=1.0)
        optimizer = vl.NaturalGradient(guide, lr=0.1, momentum=momentum)
        svi = SVI(gaussian_model, guide, optimizer, Trace_ELBO(num_particles=4))
        locs = []
        for step in range(200):
            svi.step()
            if step >= 60:
                locs.append(guide.params.loc / torch.tensor([0.5, 2.0]))
        moves = torch.stack(locs).diff(dim=0)
        return float(moves.square().mean())

    assert scatter(0.9) < 0.25 * scatter(0.0)


@pytest.mark.parametrize("clip_args", [{"clip_norm": 0.01}, {"clip_value": 0.001}])
def test_clipped_gradients_move_less(clip_args: dict[str, float]) -> None:
    before, free = moved(lr=0.5)
    _, clipped = moved(lr=0.5, clip_args=clip_args)
    assert (clipped.loc - before.loc).norm() < 0.1 * (free.loc - before.loc).norm()


def test_learning_rate_schedulers_of_pyro() -> None:
    settings = {"optimizer": torch.optim.SGD, "optim_args": {"lr": 0.8}, "gamma": 0.5}
    others = pyro.optim.ExponentialLR({"optimizer": torch.optim.Adam, "optim_args": {"lr": 0.1}, "gamma": 0.5})

    def with_param() -> None:
        pyro.param("offset", torch.tensor(1.0))
        pyro.sample("x", dist.Normal(pyro.param("offset"), 1.0))

    guide = MeanFieldNormal(with_param)
    optimizer = vl.NaturalGradient(guide, lr=pyro.optim.ExponentialLR(dict(settings)), others=others)
    svi = SVI(with_param, guide, optimizer, vl.ELBO())
    rates = []
    for _ in range(3):
        rates.append(optimizer.lr)
        svi.step()
        optimizer.step()
    assert rates == pytest.approx([0.8, 0.4, 0.2])
    (adam,) = others.optim_objs.values()
    assert adam.get_last_lr() == pytest.approx([0.0125])

    restored = vl.NaturalGradient(guide, lr=pyro.optim.ExponentialLR(dict(settings)), others=pyro.optim.Adam({}))
    restored.set_state({**optimizer.get_state(), "others": {}})
    restored.step()
    assert restored.lr == pytest.approx(0.05)


def test_gradients_that_stay_infinite_are_reported_with_the_parameter() -> None:
    guide = started("FullRankNormal")
    optimizer = vl.NaturalGradient(guide)
    before = read(guide)

    def step(value: float) -> None:
        for tensor in guide.parameters():
            tensor.grad = torch.zeros_like(tensor)
        guide.loc.grad[0] = value
        optimizer(list(guide.parameters()))

    for number in range(9):
        step(math.inf)
        assert optimizer.failures == number + 1
    with pytest.warns(vl.LabWarning, match=r"10 steps in a row .* in 'FullRankNormal\.loc'; check the supports"):
        step(math.nan)
    assert torch.equal(read(guide).loc, before.loc)
    # the trust region has shrunk by 4¹⁰, and opens again
    step(1.0)
    first = float(family_of(guide).kl(read(guide), before))
    assert 0 < first <= 8 * 4.0**-10 * (1 + 1e-6)
    assert optimizer.failures == 0


# State


def shifted(x: Tensor, y: Tensor) -> None:
    shift = pyro.param("shift", torch.tensor(0.3))
    model(x, y + shift)


def advance(svi: SVI, num_steps: int) -> None:
    for _ in range(num_steps):
        svi.step(*data())


FORMS = [(name, None) for name in GUIDES] + [(name, 0.9) for name in GUIDES if name not in DENSE]


@pytest.mark.parametrize(("name", "curvature_momentum"), FORMS)
@pytest.mark.parametrize("on_disk", [False, True])
def test_an_interrupted_run_is_the_same_bit_for_bit(
    name: str, curvature_momentum: float | None, on_disk: bool, tmp_path: Path
) -> None:
    def made() -> tuple[Any, vl.NaturalGradient, SVI]:
        guide = GUIDES[name](shifted)
        others = pyro.optim.Adam({"lr": 0.02})
        options: dict[str, Any] = {"momentum": 0.5, "curvature_momentum": curvature_momentum, "damping": 0.1}
        optimizer = vl.NaturalGradient(guide, lr=0.4, max_kl=2.0, others=others, **options)
        return guide, optimizer, SVI(shifted, guide, optimizer, vl.ELBO(num_particles=4))

    pyro.set_rng_seed(7)
    guide, optimizer, svi = made()
    advance(svi, 4)
    optimizer.lr = 0.25  # part of the state
    params = copy.deepcopy(guide.state_dict()), pyro.param("shift").detach().clone()
    state, random = copy.deepcopy(optimizer.get_state()), get_rng_state()
    if on_disk:
        optimizer.save(str(tmp_path / "optimizer"))
    advance(svi, 4)
    expected = [*guide.state_dict().values(), pyro.param("shift")]

    pyro.clear_param_store()
    guide, optimizer, svi = made()
    guide(*data())  # Pyro's guides have no parameters before
    guide.load_state_dict(params[0])
    pyro.param("shift").data.copy_(params[1])
    if on_disk:
        optimizer.load(str(tmp_path / "optimizer"))
    else:
        optimizer.set_state(state)
    set_rng_state(random)
    advance(svi, 4)
    found = [*guide.state_dict().values(), pyro.param("shift")]
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    assert not torch.equal(found[0], next(iter(params[0].values())))


# Arguments


@pytest.mark.parametrize("lr", [0, -0.1, 1.01, math.nan])
def test_lr_out_of_range(lr: float) -> None:
    with pytest.raises(ArgumentError, match=r"lr is a step size in \(0, 1\], got"):
        vl.NaturalGradient(FullRankNormal(model), lr=lr)


@pytest.mark.parametrize("max_kl", [0, -1.0, math.nan])
def test_max_kl_out_of_range(max_kl: float) -> None:
    with pytest.raises(ArgumentError, match="max_kl is a KL divergence in nats and must be positive, got"):
        vl.NaturalGradient(FullRankNormal(model), max_kl=max_kl)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"momentum": 1.0}, r"momentum is a weight in \[0, 1\), got 1.0"),
        ({"momentum": -0.1}, "momentum"),
        ({"damping": -1.0}, "damping must be a number of at least 0, got -1.0"),
        ({"damping": math.inf}, "damping"),
        ({"clip_args": {"norm": 1.0}}, r"clip_args takes clip_norm and clip_value, got \['norm'\]"),
    ],
)
def test_settings_out_of_range(settings: dict[str, Any], match: str) -> None:
    with pytest.raises(ArgumentError, match=match):
        vl.NaturalGradient(FullRankNormal(model), **settings)


@pytest.mark.parametrize(
    ("guide", "name"),
    [
        (AutoDelta(model), "AutoDelta"),
        (AutoGuideList(model), "AutoGuideList"),
        (torch.nn.Linear(1, 1), "Linear"),
        (lambda: None, "function"),
    ],
    ids=["AutoDelta", "AutoGuideList", "Linear", "function"],
)
def test_guide_that_takes_no_natural_step(guide: Any, name: str) -> None:
    with pytest.raises(
        ArgumentError, match=f"cannot handle the guide {name}; it knows MeanFieldNormal, FullRankNormal"
    ):
        vl.NaturalGradient(guide)
