from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Predictive, Trace_ELBO
from torch import Tensor
from torch.distributions import constraints

import pyro_vi_lab as vl
from pyro_vi_lab.errors import ArgumentError, ModelError
from pyro_vi_lab.families import Params
from pyro_vi_lab.guides import GUIDES, Mixture


@pytest.fixture(autouse=True)
def double() -> None:
    torch.set_default_dtype(torch.float64)


Model = Callable[[], None]


def modes(dim: int, *, apart: float, weight: float, seed: int = 0, center: float = 0.0) -> tuple[Model, Tensor]:
    """Two unit normals along a random direction, of total mass one; and where they are."""
    direction = torch.randn(dim, generator=torch.Generator().manual_seed(seed))
    places = torch.stack([-direction, direction]) * (apart / 2 / direction.norm()) + center

    def model() -> None:
        x = pyro.sample("x", dist.ImproperUniform(constraints.real_vector, (), (dim,)))
        log_normals = -(x - places).square().sum(-1) / 2 - dim / 2 * math.log(2 * math.pi)
        pyro.factor("modes", (log_normals + torch.tensor([weight, 1 - weight]).log()).logsumexp(-1))

    return model, places


def student_t(dim: int = 3, df: float = 5.0) -> Model:
    def model() -> None:
        pyro.sample("x", dist.MultivariateStudentT(df, torch.zeros(dim), torch.eye(dim)))

    return model


def banana() -> None:
    x = pyro.sample("x", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Normal(x**2 - 1, 0.5))


def fitted(model: Model, guide: Any = "mixture", **options: Any) -> vl.Fit:
    return vl.fit(vl.Problem(model), guide, progress=False, **options)


def weights_near(fit: vl.Fit, places: Tensor, radius: float = 2.0) -> list[float]:
    log_weights, components = fit.guide.family.split(fit.guide.params)
    near = (components.loc - places.unsqueeze(1)).norm(dim=-1) < radius
    return [float(weight) for weight in (near * log_weights.exp()).sum(-1)]


# Fits


@pytest.mark.parametrize("dim", [1, 2, 10])
@pytest.mark.parametrize(("apart", "weight"), [(6.0, 0.5), (10.0, 0.3)])
def test_both_modes_are_found(dim: int, apart: float, weight: float) -> None:
    """The evidence is one: the bound is zero where q is the target, and log 0.5 or less where it lacks a mode."""
    model, places = modes(dim, apart=apart, weight=weight, seed=dim)
    fit = fitted(model)
    assert fit.status is vl.Status.CONVERGED
    value, error = fit.elbo()
    assert value == pytest.approx(0.0, abs=0.01 + 5 * error)
    assert weights_near(fit, places) == pytest.approx([weight, 1 - weight], abs=0.02)
    expected = torch.eye(dim) + weight * (1 - weight) * torch.outer(places[1] - places[0], places[1] - places[0])
    assert float((fit.covariance() - expected).abs().max()) < 0.05 * float(expected.abs().max())
    assert float((fit.loc - (weight * places[0] + (1 - weight) * places[1])).abs().max()) < 0.2


def test_modes_are_found_away_from_the_start() -> None:
    """A hundred standard deviations: there is nothing between the start and the nearer of them."""
    model, places = modes(2, apart=8.0, weight=0.4, center=100.0)
    fit = fitted(model)
    assert fit.status is vl.Status.CONVERGED
    assert weights_near(fit, places) == pytest.approx([0.4, 0.6], abs=0.02)


@pytest.mark.parametrize("dim", [1, 5, 20])
def test_one_normal_is_one_normal(dim: int) -> None:
    """As good as the full-rank fit, which is exact, though three components share the work."""
    root = torch.randn(dim, dim, generator=torch.Generator().manual_seed(dim)) / dim**0.5 + 0.3 * torch.eye(dim)
    target = dist.MultivariateNormal(torch.linspace(-3, 3, dim), root @ root.T)

    def model() -> None:
        pyro.sample("x", target)

    fit = fitted(model)
    assert fit.status is vl.Status.CONVERGED
    value, error = fit.elbo(5000)
    assert value > -0.01 - 5 * error
    sd = target.variance.sqrt()
    assert float(((fit.loc - target.loc) / sd).abs().max()) < 0.05
    assert (
        float((fit.covariance() / torch.outer(sd, sd) - target.covariance_matrix / torch.outer(sd, sd)).abs().max())
        < 0.1
    )


@pytest.mark.parametrize("model", [student_t(), banana], ids=["student_t", "banana"])
def test_better_than_one_normal(model: Model) -> None:
    ours, one = fitted(model), fitted(model, "full_rank")
    assert ours.status is vl.Status.CONVERGED
    (value, error), (other, other_error) = ours.elbo(5000), one.elbo(5000)
    # the evidence of a prior is one: less than half of the gap is left
    assert -value + 5 * error < (-other - 5 * other_error) / 2


def test_more_components_are_not_worse() -> None:
    bounds = [fitted(banana, Mixture(banana, num_components=number)).elbo(5000) for number in (1, 2)]
    assert bounds[0][0] == pytest.approx(fitted(banana, "full_rank").elbo(5000)[0], abs=0.1)
    assert bounds[0][0] + 0.2 < bounds[1][0]


def test_diagonal_components() -> None:
    model, places = modes(2, apart=8.0, weight=0.3, seed=1)
    fit = fitted(model, Mixture(model, covariance="diagonal", num_components=2))
    assert fit.status is vl.Status.CONVERGED
    assert fit.guide.scale.shape == (2, 2)
    assert weights_near(fit, places) == pytest.approx([0.3, 0.7], abs=0.02)
    assert fit.elbo()[0] == pytest.approx(0.0, abs=0.01)


def test_restarts_and_draws() -> None:
    model, places = modes(1, apart=8.0, weight=0.3)
    fit = fitted(model, num_restarts=2)
    assert fit.num_restarts == 2
    draws = fit.posterior(4000).draws["x"]
    assert draws.shape == (2, 4000, 1)
    side = ((draws - places[0]).norm(dim=-1) < (draws - places[1]).norm(dim=-1)).double().mean(-1)
    assert side.tolist() == pytest.approx([0.3, 0.3], abs=5 * math.sqrt(0.21 / 4000) + 0.02)
    assert fit.history["negative_elbo"].shape == (fit.num_steps + 1, 2)
    assert fit.importance(2000).ess_fraction > 0.9


def test_a_batch_of_data_sets() -> None:
    """Of a square each fit has two roots, whichever the data."""

    def model(y: Tensor) -> None:
        x = pyro.sample("x", dist.Normal(0.0, 5.0))
        with pyro.plate("row", len(y)):
            pyro.sample("y", dist.Normal(x.abs(), 0.5), obs=y)

    data = torch.tensor([[2.0, 2.5, 1.5], [5.0, 5.5, 4.5]])
    fits = vl.fit_each(vl.Problem(model, data[0]), {"y": data}, "mixture", progress=False)
    for fit, y in zip(fits, data, strict=True):
        assert fit.status is vl.Status.CONVERGED
        places = torch.stack([-y.mean(), y.mean()]).unsqueeze(-1)
        assert weights_near(fit, places, radius=0.5) == pytest.approx([0.5, 0.5], abs=0.03)


def test_a_component_without_weight_does_no_harm() -> None:
    """The user's own start has a component that is far off: its weight goes, and the fit converges."""

    def model() -> None:
        pyro.sample("x", dist.Normal(torch.zeros(2), 1.0).to_event(1))

    guide = Mixture(model, num_components=2)
    guide()
    components = Params(torch.tensor([[0.5, 0.0], [300.0, 0.0]]), torch.stack([torch.eye(2), 0.1 * torch.eye(2)]))
    guide.params = guide.family.join(torch.tensor([0.0, -80.0]), components)
    fit = fitted(model, guide)
    assert fit.status is vl.Status.CONVERGED
    assert fit.elbo()[0] > -0.01


def test_same_seed_same_numbers() -> None:
    model, _ = modes(2, apart=8.0, weight=0.3)
    one, two = (fitted(model, seed=3) for _ in range(2))
    assert torch.equal(one.params.scale, two.params.scale)
    assert one.history["negative_elbo"].tolist() == two.history["negative_elbo"].tolist()


# In Pyro


def elbo(num_particles: int) -> dict[str, Any]:
    return {"num_particles": num_particles, "vectorize_particles": True, "max_plate_nesting": 0}


@pytest.mark.parametrize("kind", ["Trace_ELBO", "stl", "natural"])
def test_svi_finds_the_weights(kind: str) -> None:
    def model() -> None:
        x = pyro.sample("x", dist.Normal(torch.zeros(1, 2), 5.0).to_event(1)).squeeze(-2)
        log_normals = -(x.unsqueeze(-2) - torch.tensor([[-2.0, 0.0], [2.0, 0.0]])).square().sum(-1) / 2
        pyro.factor("modes", (log_normals + torch.tensor([0.3, 0.7]).log()).logsumexp(-1))

    guide = Mixture(model, init_scale=1.5, num_components=2)
    guide()
    optim = vl.NaturalGradient(guide, lr=0.3) if kind == "natural" else pyro.optim.Adam({"lr": 0.05})
    svi = SVI(model, guide, optim, (Trace_ELBO if kind == "Trace_ELBO" else vl.ELBO)(**elbo(64)))
    for _ in range(40 if kind == "natural" else 120):
        svi.step()
    log_weights, components = guide.family.split(guide.params)
    order = components.loc[:, 0].argsort()
    assert components.loc[order, 0].tolist() == pytest.approx([-2.0, 2.0], abs=0.4)
    assert log_weights[order].exp().tolist() == pytest.approx([0.3, 0.7], abs=0.1)


def test_both_gradients_are_those_of_the_bound() -> None:
    """Trace_ELBO's and the sticking-the-landing gradient have the same mean."""
    guide = Mixture(banana, init_scale=0.8, num_components=2)
    guide()
    found = []
    for objective in (Trace_ELBO(**elbo(20)), vl.ELBO(**elbo(20))):
        gradients = []
        for _ in range(100):
            loss = objective.differentiable_loss(banana, guide)
            each = torch.autograd.grad(loss, list(guide.parameters()))
            gradients.append(torch.cat([gradient.flatten() for gradient in each]))
        found.append(torch.stack(gradients))
    mean, error = (found[0].mean(0) - found[1].mean(0)), sum(one.var(0) / len(one) for one in found) ** 0.5
    assert bool((mean.abs() <= 5 * error + 1e-12).all())
    assert float(found[0].mean(0).norm()) > 1.0


def test_predictive_draws_are_of_both_modes() -> None:
    model, places = modes(2, apart=8.0, weight=0.3)
    fit = fitted(model)
    draws = Predictive(fit.guide, num_samples=500)()["x"].reshape(500, 2)
    side = ((draws - places[0]).norm(dim=-1) < (draws - places[1]).norm(dim=-1)).double().mean()
    assert float(side) == pytest.approx(0.3, abs=5 * math.sqrt(0.21 / 500) + 0.02)


def test_svi_in_single_precision() -> None:
    torch.set_default_dtype(torch.float32)
    guide = Mixture(banana, num_components=2)
    svi = SVI(banana, guide, vl.NaturalGradient(guide), vl.ELBO(**elbo(16)))
    losses = [svi.step() for _ in range(10)]
    assert all(math.isfinite(loss) for loss in losses)
    assert {value.dtype for value in guide.params} == {torch.float32}
    assert losses[-1] < losses[0]


# What it cannot take


def test_options() -> None:
    assert GUIDES["mixture"] is Mixture
    for number in (0, -1, 1.5, True, "2"):
        with pytest.raises(ArgumentError, match="num_components must be a whole number of at least 1"):
            Mixture(banana, num_components=number)  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="covariance must be 'dense' or 'diagonal', got 'full'"):
        Mixture(banana, covariance="full")  # type: ignore[arg-type]


def test_state_of_a_guide_with_other_components() -> None:
    guide = Mixture(banana, num_components=2)
    guide()
    other = Mixture(banana, num_components=4)
    other.load_state_dict(guide.state_dict())
    with pytest.raises(ModelError, match="has 2 components, the guide 4: make it with num_components=2"):
        other()
