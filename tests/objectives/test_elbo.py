from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import ELBO, SVI, Trace_ELBO
from pyro.infer.autoguide import AutoDiagonalNormal, AutoMultivariateNormal, AutoNormal
from pyro.nn import PyroModule, PyroParam
from torch import Tensor, nn
from torch.distributions import constraints

import pyro_vi_lab as vl
from pyro_vi_lab.errors import ArgumentError, ModelError
from pyro_vi_lab.families import Params
from pyro_vi_lab.guides import FullRankNormal, MeanFieldNormal
from pyro_vi_lab.models import LinearRegression

STANDARD_ERRORS = 5  # fails a right answer once in two million


@pytest.fixture(autouse=True)
def double() -> None:
    torch.set_default_dtype(torch.float64)


# Models and guides


def model(y: Tensor) -> None:
    """A skewed posterior with a constrained site: no guide here is exact."""
    scale = pyro.sample("scale", dist.HalfNormal(2.0))
    loc = pyro.sample("loc", dist.Normal(0.0, 3.0))
    with pyro.plate("row", len(y)):
        pyro.sample("y", dist.Normal(loc, scale), obs=y)


Y = torch.tensor([0.3, -1.2, 2.5, 0.9, 1.4], dtype=torch.float64)


def by_hand() -> Callable[[Tensor], None]:
    def guide(y: Tensor) -> None:
        loc = pyro.param("q_loc", torch.tensor([0.2, 0.5]))
        scale = pyro.param("q_scale", torch.tensor([0.3, 0.6]), constraint=constraints.positive)
        pyro.sample("scale", dist.LogNormal(loc[0], scale[0]))
        pyro.sample("loc", dist.Normal(loc[1], scale[1]))

    return guide


def amortized() -> Callable[[Tensor], None]:
    encoder = nn.Linear(5, 4)

    def guide(y: Tensor) -> None:
        pyro.module("encoder", encoder)
        loc, log_scale = encoder(y / 5).chunk(2)
        pyro.sample("scale", dist.LogNormal(loc[0], log_scale[0].exp() / 2))
        pyro.sample("loc", dist.Normal(loc[1], log_scale[1].exp() / 2))

    return guide


class Handmade(PyroModule):
    """Parameters of a PyroModule, one of them below a constraint."""

    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.tensor([0.2, 0.5]))
        self.width = PyroParam(torch.tensor([0.3, 0.6]), constraints.positive)

    def forward(self, y: Tensor) -> None:
        pyro.sample("scale", dist.LogNormal(self.shift[0], self.width[0]))
        pyro.sample("loc", dist.Normal(self.shift[1], self.width[1]))


GUIDES: dict[str, Callable[[], Any]] = {
    "MeanFieldNormal": lambda: MeanFieldNormal(model, init_scale=0.4),
    "FullRankNormal": lambda: FullRankNormal(model, init_scale=0.4),
    "AutoNormal": lambda: AutoNormal(model, init_scale=0.4),
    "AutoDiagonalNormal": lambda: AutoDiagonalNormal(model, init_scale=0.4),
    "AutoMultivariateNormal": lambda: AutoMultivariateNormal(model, init_scale=0.4),
    "function": by_hand,
    "function with a network": amortized,
    "module": Handmade,
}


@pytest.fixture(params=GUIDES)
def guide(request: pytest.FixtureRequest) -> Any:
    made = GUIDES[request.param]()
    made(Y)  # the parameters exist from here on
    return made


def leaves(guide: Any) -> list[Tensor]:
    """Unconstrained parameters of a guide that has been run."""
    if isinstance(guide, nn.Module):
        return list(guide.parameters())
    return [value.unconstrained() for _, value in sorted(pyro.get_param_store().items())]


def gradient(elbo: ELBO, model: Callable[..., Any], guide: Any, *args: Any, seed: int) -> Tensor:
    """Gradient of the loss with respect to all parameters of the guide, in one vector."""
    pyro.set_rng_seed(seed)
    for leaf in leaves(guide):
        leaf.grad = None
    elbo.loss_and_grads(model, guide, *args)
    return torch.cat([(torch.zeros_like(leaf) if leaf.grad is None else leaf.grad).flatten() for leaf in leaves(guide)])


def gradients(elbo: ELBO, model: Callable[..., Any], guide: Any, *args: Any, num: int = 200) -> Tensor:
    """Independent gradients, ``(num, P)``."""
    return torch.stack([gradient(elbo, model, guide, *args, seed=seed) for seed in range(num)])


def assert_mean_zero(sample: Tensor) -> None:
    error = sample.std(0) / len(sample) ** 0.5
    rounding = 1e3 * torch.finfo(sample.dtype).eps * sample.abs().amax()
    assert (sample.mean(0).abs() <= STANDARD_ERRORS * error + rounding).all()


# Values


@pytest.mark.parametrize("kind", ["stl", "reparam"])
def test_the_loss_is_that_of_pyro(guide: Any, kind: Any) -> None:
    losses = []
    for elbo in (vl.ELBO(num_particles=3, gradient=kind), Trace_ELBO(num_particles=3)):
        for method in (elbo.loss, elbo.loss_and_grads):
            pyro.set_rng_seed(1)
            losses.append(method(model, guide, Y))
    assert losses == pytest.approx([losses[0]] * 4, rel=1e-12)


def test_where_the_guide_is_the_posterior_every_draw_of_the_loss_is_the_evidence() -> None:
    regression = LinearRegression(noise_scale=0.6, prior_scale=1.5)
    X, y, _ = regression.simulate(12, 3, seed=0)
    exact = regression.exact(X, y)
    guide = FullRankNormal(regression)
    guide(X, y)
    guide.params = Params(exact.mean, torch.linalg.cholesky(exact.covariance))
    losses = [vl.ELBO().loss(regression, guide, X, y) for _ in range(20)]
    assert losses == pytest.approx([-exact.log_evidence] * 20, rel=1e-12)


# Gradients


def test_the_reparam_gradient_is_that_of_pyro(guide: Any) -> None:
    ours, theirs = vl.ELBO(gradient="reparam"), Trace_ELBO()
    for seed in range(5):
        torch.testing.assert_close(
            gradient(ours, model, guide, Y, seed=seed), gradient(theirs, model, guide, Y, seed=seed)
        )


def test_the_stl_gradient_has_the_mean_of_the_reparam_gradient(guide: Any) -> None:
    """On the same draws, so that their difference is the score alone, whose mean is zero."""
    stl, reparam = (gradients(vl.ELBO(gradient=kind), model, guide, Y) for kind in ("stl", "reparam"))
    assert_mean_zero(stl - reparam)
    # and they do differ, or nothing has been left out
    assert ((stl - reparam).abs().amax(0) > 1e-3).any()


def test_the_difference_is_the_score() -> None:
    """Of a normal in its location and its standard deviation: (z - m) / s² and ((z - m)² / s² - 1) / s."""
    guide = by_hand()
    guide(Y)
    pyro.set_rng_seed(3)
    q_loc, q_scale = pyro.param("q_loc").detach(), pyro.param("q_scale").detach()
    tracer = pyro.poutine.trace(guide)
    tracer(Y)
    z = torch.stack([tracer.trace.nodes["scale"]["value"].log(), tracer.trace.nodes["loc"]["value"]]).detach()
    score_loc = (z - q_loc) / q_scale**2
    score_log_scale = ((z - q_loc) / q_scale) ** 2 - 1  # of log s, the unconstrained parameter
    score = torch.cat([score_loc, score_log_scale])
    stl, reparam = (gradient(vl.ELBO(gradient=kind), model, guide, Y, seed=3) for kind in ("stl", "reparam"))
    torch.testing.assert_close(reparam - stl, score)


@pytest.mark.parametrize("kind", [FullRankNormal, AutoMultivariateNormal])
def test_the_stl_gradient_vanishes_at_a_correlated_posterior(kind: Any) -> None:
    regression = LinearRegression(noise_scale=0.6, prior_scale=1.5)
    X, y, _ = regression.simulate(12, 3, seed=0)
    exact = regression.exact(X, y)
    tril = torch.linalg.cholesky(exact.covariance)
    guide = kind(regression)
    guide(X, y)
    if kind is FullRankNormal:
        guide.params = Params(exact.mean, tril)
    else:
        guide.loc.data.copy_(exact.mean)
        guide.scale, guide.scale_tril = tril.diagonal().clone(), tril / tril.diagonal().unsqueeze(-1)
    assert_vanishes(regression, guide, X, y)


@pytest.mark.parametrize("kind", [MeanFieldNormal, AutoNormal, AutoDiagonalNormal])
def test_the_stl_gradient_vanishes_at_a_product_posterior(kind: Any) -> None:
    loc, scale = torch.tensor([1.0, -200.0, 0.03]), torch.tensor([2.0, 0.1, 5.0])

    def independent() -> None:
        pyro.sample("x", dist.Normal(loc, scale).to_event(1))

    guide = kind(independent)
    guide()
    if kind is AutoNormal:
        guide.locs.x.data.copy_(loc)
        guide.scales.x = scale
    else:
        guide.loc.data.copy_(loc)
        guide.scale = scale
    assert_vanishes(independent, guide)


def assert_vanishes(model: Callable[..., Any], guide: Any, *args: Any) -> None:
    """For every single draw, up to rounding; the reparam gradient, whose mean is zero too, does not."""
    for seed in range(20):
        stl, reparam = (gradient(vl.ELBO(gradient=kind), model, guide, *args, seed=seed) for kind in ("stl", "reparam"))
        assert stl.norm() <= 1e5 * torch.finfo(torch.float64).eps * reparam.norm()
        assert reparam.norm() > 0.1


def test_differentiable_loss_has_the_same_gradient() -> None:
    guide = MeanFieldNormal(model)
    guide(Y)
    elbo = vl.ELBO(num_particles=4)
    expected = gradient(elbo, model, guide, Y, seed=2)
    pyro.set_rng_seed(2)
    found = torch.autograd.grad(elbo.differentiable_loss(model, guide, Y), leaves(guide))
    torch.testing.assert_close(torch.cat([part.flatten() for part in found]), expected)


# Plates, subsampling, particles


def test_vectorized_particles() -> None:
    """The mean of many particles at once is the mean of single ones."""
    guide = FullRankNormal(model, init_scale=0.4)
    guide(Y)
    for kind in ("stl", "reparam"):
        at_once = vl.ELBO(num_particles=50, gradient=kind, vectorize_particles=True, max_plate_nesting=1)
        many = gradients(at_once, model, guide, Y, num=20)
        single = gradients(vl.ELBO(gradient=kind), model, guide, Y, num=150)
        error = (many.var(0) / len(many) + single.var(0) / len(single)).sqrt()
        assert ((many.mean(0) - single.mean(0)).abs() <= STANDARD_ERRORS * error).all()


def local_model(y: Tensor, size: int | None = None) -> None:
    mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
    with pyro.plate("row", len(y), subsample_size=size) as index:
        local = pyro.sample("local", dist.Normal(mean, 1.0))
        pyro.sample("y", dist.Normal(local, 0.5), obs=y[index])


def local_guide(y: Tensor, size: int | None = None) -> None:
    pyro.sample("mean", dist.Normal(pyro.param("mean_loc", torch.tensor(0.1)), 0.5))
    locs = pyro.param("locs", lambda: torch.linspace(-1, 1, len(y)))
    scales = pyro.param("scales", lambda: torch.full((len(y),), 0.7), constraint=constraints.positive)
    with pyro.plate("row", len(y), subsample_size=size) as index:
        pyro.sample("local", dist.Normal(locs[index], scales[index]))


def test_subsampling_leaves_values_and_gradients_unbiased() -> None:
    local_guide(Y)
    for kind in ("stl", "reparam"):
        elbo = vl.ELBO(gradient=kind)
        part, whole = (
            gradients(elbo, local_model, local_guide, Y, size, num=num) for size, num in ((2, 300), (None, 100))
        )
        error = (part.var(0) / len(part) + whole.var(0) / len(whole)).sqrt()
        assert ((part.mean(0) - whole.mean(0)).abs() <= STANDARD_ERRORS * error).all()
        for seed in range(5):  # the score has the scale and the rows of the minibatch
            pyro.set_rng_seed(seed)
            loss = elbo.loss(local_model, local_guide, Y, 2)
            pyro.set_rng_seed(seed)
            assert loss == pytest.approx(Trace_ELBO().loss(local_model, local_guide, Y, 2), rel=1e-12)


def test_scaled_and_masked_sites() -> None:
    """The score has the scale and the mask of its site: at the posterior each draw's gradient is still zero."""

    def rows() -> Any:
        mask = torch.tensor([True, False, True])
        return pyro.poutine.scale(scale=3.0), pyro.plate("row", 3), pyro.poutine.mask(mask=mask)

    def tempered() -> None:
        scale, plate, mask = rows()
        with scale, plate, mask:
            pyro.sample("x", dist.Normal(1.0, 2.0))

    def guide() -> None:
        loc = pyro.param("x_loc", torch.full((3,), 1.0))
        scale, plate, mask = rows()
        with scale, plate, mask:
            pyro.sample("x", dist.Normal(loc, 2.0))

    guide()
    stl, reparam = (gradient(vl.ELBO(gradient=kind), tempered, guide, seed=0) for kind in ("stl", "reparam"))
    torch.testing.assert_close(stl, torch.zeros(3))
    # log q(z) is the same for all locations, so Pyro's gradient is that of log p, (z - 1) / 4 times 3
    assert reparam[1] == 0
    assert (reparam[[0, 2]].abs() > 0.1).all()


def test_it_works_in_svi() -> None:
    guide = MeanFieldNormal(model)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.05}), vl.ELBO(num_particles=4))
    before = svi.evaluate_loss(Y)
    for _ in range(100):
        svi.step(Y)
    assert math.isfinite(before)
    assert svi.evaluate_loss(Y) < before - 1


# What it cannot take


def test_a_site_without_reparameterization_is_named() -> None:
    def discrete() -> None:
        k = pyro.sample("count", dist.Poisson(3.0))
        pyro.sample("y", dist.Normal(k, 1.0), obs=torch.tensor(2.0))

    def guide() -> None:
        pyro.sample("count", dist.Poisson(pyro.param("rate", torch.tensor(2.0), constraint=constraints.positive)))

    with pytest.raises(ModelError, match=r"guide site 'count' \(Poisson\) is not reparameterized.*TraceEnum_ELBO"):
        vl.ELBO().loss_and_grads(discrete, guide)
    losses = []
    for elbo in (vl.ELBO(gradient="reparam"), Trace_ELBO()):  # Pyro's score-function gradient
        pyro.set_rng_seed(0)
        losses.append(elbo.loss_and_grads(discrete, guide))
    assert losses[0] == losses[1]


@pytest.mark.parametrize("kind", ["STL", "", None, "dreg"])
def test_an_unknown_gradient(kind: Any) -> None:
    with pytest.raises(ArgumentError, match="gradient must be 'stl', 'reparam' or 'score'"):
        vl.ELBO(gradient=kind)


# What it leaves behind


def test_requires_grad_is_left_alone(guide: Any) -> None:
    vl.ELBO().loss_and_grads(model, guide, Y)
    assert all(leaf.requires_grad for leaf in leaves(guide))


def test_frozen_parameters_stay_frozen() -> None:
    guide = MeanFieldNormal(model)
    guide(Y)
    guide.loc.requires_grad_(False)
    vl.ELBO().loss_and_grads(model, guide, Y)
    assert [leaf.requires_grad for leaf in leaves(guide)] == [leaf is not guide.loc for leaf in leaves(guide)]
    assert guide.loc.grad is None


def test_the_guide_runs_once() -> None:
    """Its dropout and the statistics of its batch norm are those of one run."""

    class Counting(Handmade):
        runs = 0

        def forward(self, y: Tensor) -> None:
            self.runs += 1
            super().forward(y)

    guide = Counting()
    vl.ELBO().loss_and_grads(model, guide, Y)
    assert guide.runs == 1
