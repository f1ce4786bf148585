"""The natural step of a conjugate guide."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoGuideList, AutoNormal
from torch import Tensor

import pyro_vi_lab as vl
from pyro_vi_lab.families.exponential import sign_design
from pyro_vi_lab.guides import Conjugate
from tests.test_coordinate_ascent import EXACTS, Exact, tosses, unknown_mean_and_precision


@pytest.fixture(autouse=True)
def double() -> None:
    torch.set_default_dtype(torch.float64)


def exact_loss(guide: Conjugate, model: Callable[..., Any], *data: Tensor) -> Tensor:
    """Minus the ELBO, without Monte Carlo error and differentiable: log p averaged over points that depend on u."""
    factors = list(guide.factors.values())
    etas = [factor.family.constrain(guide.leaf(factor.name)) for factor in factors]
    counts = [factor.family.num_signs for factor in factors]
    design = sign_design(sum(counts), min(3, sum(counts)))
    total = torch.zeros(())
    for row in design:
        values = {}
        for factor, eta, signs in zip(factors, etas, row.split(counts), strict=True):
            values |= dict(zip(factor.sites, factor.family.point(eta, signs), strict=True))
        total = total + poutine.trace(poutine.condition(model, values)).get_trace(*data).log_prob_sum()
    entropy = sum(factor.family.entropy(eta).sum() for factor, eta in zip(factors, etas, strict=True))
    return -(total / len(design) + entropy)


def step(guide: Conjugate, loss: Tensor, **options: Any) -> None:
    guide.zero_grad()
    loss.backward()
    vl.NaturalGradient(guide, **options)(list(guide.parameters()))


WELL_SCALED = {name: make for name, make in EXACTS.items() if name != "sparse_choices"}


@pytest.mark.parametrize("lr", [1.0, 0.3])
@pytest.mark.parametrize("make", WELL_SCALED.values(), ids=WELL_SCALED)
def test_one_step_of_size_one_is_the_posterior(make: Callable[[], Exact], lr: float) -> None:
    """Hoffman et al. 2013, eq. 22-27; a smaller step goes a part of the way in natural parameters."""
    exact = make()
    guide = Conjugate(exact.model)
    guide(*exact.data)
    before = {name: guide.natural(name) for name in guide.factors}
    step(guide, exact_loss(guide, exact.model, *exact.data), lr=lr, max_kl=math.inf)
    for site, parameters in exact.posterior.items():
        factor = guide.factor(site)
        target = factor.family.from_standard(parameters)
        expected = before[factor.name] + lr * (target - before[factor.name])
        size = expected.abs().max()
        torch.testing.assert_close(guide.natural(site) / size, expected / size, rtol=0, atol=1e-8)


def test_independent_factors_take_the_steps_of_coordinate_ascent_side_by_side() -> None:
    """Bishop 2006, eq. 10.26-10.30, both from the same present factors."""
    exact = unknown_mean_and_precision()
    (y,) = exact.data
    guide = Conjugate(exact.model, joint={})
    guide(y)
    n, mean, second, precision = len(y), 1.0, 1.0 + 1 / (0.5 * 2 / 3), 2 / 3
    step(guide, exact_loss(guide, exact.model, y), lr=1.0, max_kl=math.inf)
    expected = {"loc": (0.5 + y.sum()) / (0.5 + n), "scale": torch.tensor(((0.5 + n) * precision) ** -0.5)}
    torch.testing.assert_close(guide.standard("mu"), expected, rtol=1e-9, atol=1e-9)
    squares = (y**2).sum() - 2 * mean * y.sum() + n * second + 0.5 * (second - 2 * mean + 1)
    expected = {"concentration": torch.tensor(2.0 + (n + 1) / 2), "rate": 3 + squares / 2}
    torch.testing.assert_close(guide.standard("tau"), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("max_kl", [1e-3, 0.5])
def test_the_trust_region_cuts_a_step_off_at_its_edge(max_kl: float) -> None:
    exact = unknown_mean_and_precision()
    guide = Conjugate(exact.model, joint={})
    guide(*exact.data)
    before = {name: guide.natural(name) for name in guide.factors}
    step(guide, exact_loss(guide, exact.model, *exact.data), lr=1.0, max_kl=max_kl)
    kl = sum(guide.factors[name].family.kl(guide.natural(name), eta) for name, eta in before.items())
    assert abs(float(kl) / max_kl - 1) < 1e-6


def test_any_gradient_leaves_a_distribution() -> None:
    exact = unknown_mean_and_precision()
    guide = Conjugate(exact.model)
    guide(*exact.data)
    optimizer = vl.NaturalGradient(guide, lr=1.0, max_kl=math.inf)
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        for leaf in guide.parameters():
            leaf.grad = 10 * torch.randn(leaf.shape, generator=generator)
        optimizer(list(guide.parameters()))
        assert all(factor.family.contains(guide.natural(name)).all() for name, factor in guide.factors.items())


def test_damping_and_momentum() -> None:
    exact = tosses()
    moved = {}
    for name, options in {"plain": {}, "damped": {"damping": 1.0}, "slow": {"momentum": 0.5}}.items():
        guide = Conjugate(exact.model)
        guide(*exact.data)
        before = guide.natural("p")
        optimizer = vl.NaturalGradient(guide, lr=0.5, max_kl=math.inf, **options)
        for _ in range(2):
            guide.zero_grad()
            exact_loss(guide, exact.model, *exact.data).backward()
            optimizer(list(guide.parameters()))
        target = guide.factor("p").family.from_standard(exact.posterior["p"])
        moved[name] = float(((guide.natural("p") - before) / (target - before)).mean())
    # with momentum ½ the second direction is (½ · 1 + 1 · ½) / (½ + 1), in units of the way there
    assert moved["plain"] == pytest.approx(0.75)
    assert moved["damped"] == pytest.approx(1 - 0.75**2)
    assert moved["slow"] == pytest.approx(0.5 + 0.5 * (0.5 * 0.5 * 1.0 + 0.5 * 0.5) / 0.75)


def test_rows_take_a_step_of_their_own() -> None:
    """A full step is the posterior of the rows that are seen, whatever N/B; the others stay."""
    y = torch.linspace(-2.0, 2.0, 12)

    def model(y: Tensor) -> None:
        with pyro.plate("row", len(y), subsample_size=3) as index:
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(z, 0.5), obs=y[index])

    guide = Conjugate(model)
    index = poutine.trace(guide).get_trace(y).nodes["row"]["value"]
    u = guide.leaf("z")[index]
    loc, variance = u[:, 0], (2 * u[:, 1]).exp()
    elbo = -(loc**2 + variance) / 2 - ((y[index] - loc) ** 2 + variance) / 0.5 + u[:, 1]
    guide.zero_grad()
    (-4.0 * elbo.sum()).backward()
    vl.NaturalGradient(guide, lr=1.0, max_kl=math.inf)(list(guide.parameters()))
    standard = guide.standard("z")
    torch.testing.assert_close(standard["loc"][index], 4 * y[index] / 5)
    torch.testing.assert_close(standard["scale"][index], torch.full((3,), 5**-0.5))
    others = torch.ones(12, dtype=torch.bool).index_fill(0, index, False)
    assert (standard["loc"][others] == 0).all()


def test_minibatches_converge_to_the_exact_posterior() -> None:
    """Robbins-Monro steps on gradients of a plain SVI; each of many replicates sees the rows in an order of its own."""
    replicates, rows = 40, 24
    one = (torch.arange(rows) < 17).double()
    generator = torch.Generator().manual_seed(0)
    y = torch.stack([one[torch.randperm(rows, generator=generator)] for _ in range(replicates)], 1)

    def model(y: Tensor) -> None:
        replicate = pyro.plate("replicate", replicates, dim=-1)
        with replicate:
            p = pyro.sample("p", dist.Beta(1.0, 1.0))
        with replicate, pyro.plate("row", rows, subsample_size=6, dim=-2) as index:
            pyro.sample("y", dist.Bernoulli(p), obs=y[index])

    guide = Conjugate(model)
    guide(y)
    optimizer = vl.NaturalGradient(guide, lr=1.0, max_kl=math.inf)
    svi = SVI(model, guide, optimizer, Trace_ELBO(num_particles=8, vectorize_particles=True, max_plate_nesting=2))
    for t in range(150):
        optimizer.lr = (t + 4) ** -0.8
        svi.step(y)
    standard = guide.standard("p")
    for name, expected in (("concentration1", 18.0), ("concentration0", 8.0)):
        error = standard[name].std() / math.sqrt(replicates)
        assert (standard[name].mean() - expected).abs() < 5 * error
        assert error < 0.05 * expected


def test_a_plain_svi_with_a_joint_family() -> None:
    exact = unknown_mean_and_precision()
    guide = Conjugate(exact.model)
    optimizer = vl.NaturalGradient(guide, lr=0.5)
    svi = SVI(
        exact.model, guide, optimizer, Trace_ELBO(num_particles=20, vectorize_particles=True, max_plate_nesting=1)
    )
    for t in range(80):
        optimizer.lr = min(0.5, 2 / (t + 1))
        svi.step(*exact.data)
    family, target = guide.factor("mu").family, exact.posterior["mu"]
    # nats; a start at the prior is 80 away
    assert family.kl(guide.natural("mu"), family.from_standard(target)) < 0.1


def test_in_a_list_beside_other_guides() -> None:
    def model(y: Tensor) -> None:
        scale = pyro.sample("scale", dist.HalfCauchy(1.0))
        rate = pyro.sample("rate", dist.Gamma(2.0, 2.0))
        with pyro.plate("row", len(y)):
            pyro.sample("y", dist.Normal(rate, scale), obs=y)

    guide = AutoGuideList(model)
    guide.append(AutoNormal(poutine.block(model, expose=["scale"])))
    guide.append(Conjugate(poutine.block(model, hide=["scale"])))
    y = torch.tensor([1.0, 2.0, 1.5])
    guide(y)
    before = [value.detach().clone() for value in guide.parameters()]
    optimizer = vl.NaturalGradient(guide, lr=0.1, momentum=0.9)
    svi = SVI(model, guide, optimizer, Trace_ELBO(num_particles=4))
    svi.step(y)
    assert all((new != old).all() for new, old in zip(guide.parameters(), before, strict=True))
    assert len(optimizer.get_state()["parts"]) == 2


def test_the_error_names_the_guide() -> None:
    with pytest.raises(vl.LabError, match="Conjugate"):
        vl.NaturalGradient(torch.nn.Linear(1, 1))
