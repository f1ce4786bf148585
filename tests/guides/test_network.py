"""The guide of networks: three estimators of one bound and one gradient, with less and less variance."""

from __future__ import annotations

import copy
import math
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Predictive, Trace_ELBO
from torch import Tensor, nn

from pyro_vi_lab import ELBO, IWAE, NaturalGradient, Problem, Status, fit
from pyro_vi_lab.errors import ArgumentError, ModelError
from pyro_vi_lab.guides import MeanFieldNormal, NetworkNormal
from pyro_vi_lab.layer_noise import ESTIMATORS, Estimator, spread_of
from pyro_vi_lab.models import BayesianNeuralNetwork

STANDARD_ERRORS = 5


def regression(*, noise_scale: float | None = 0.3, num_rows: int = 40) -> tuple[BayesianNeuralNetwork, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(num_rows, 2, generator=generator, dtype=torch.float64)
    y = X[:, 0].sin() + 0.3 * torch.randn(num_rows, generator=generator, dtype=torch.float64)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 1)).double()
    return BayesianNeuralNetwork(net, noise_scale=noise_scale), X, y


def images() -> tuple[BayesianNeuralNetwork, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(30, 1, 4, 4, generator=generator, dtype=torch.float64)
    y = (X.mean((1, 2, 3)) > 0).long()
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 2, 2), nn.ReLU(), nn.Flatten(), nn.Linear(18, 3)).double()
    return BayesianNeuralNetwork(net, likelihood="categorical"), X, y


def losses_and_gradients(
    model: Any, guide: Any, args: tuple[Any, ...], number: int, objective: Any
) -> tuple[Tensor, Tensor]:
    """Losses ``(number,)`` and gradients with respect to location and log scale ``(number, 2 D)``."""
    losses, gradients = [], []
    for _ in range(number):
        guide.zero_grad()
        losses.append(objective.loss_and_grads(model, guide, *args))
        gradients.append(torch.cat([value.grad.detach().reshape(-1).clone() for value in guide.parameters()]))
    return torch.tensor(losses, dtype=torch.float64), torch.stack(gradients)


def made(kind: type[MeanFieldNormal], model: Any, args: tuple[Any, ...], **options: Any) -> MeanFieldNormal:
    guide = kind(model, init_scale=0.1, **options)
    with torch.random.fork_rng():
        guide(*args)
    pyro.clear_param_store()
    guide._pyro_name = f"guide_{options.get('estimator', 'plain')}"
    return guide


@pytest.mark.parametrize("data", [regression, images])
def test_all_estimators_have_the_mean_of_the_plain_one(data: Any) -> None:
    """Loss and gradient within five standard errors, and a smaller variance of the gradient in this order."""
    model, *args = data()
    args = tuple(args)
    number = 60
    plain = made(MeanFieldNormal, model, args)
    loss, gradient = losses_and_gradients(model, plain, args, number, ELBO(gradient="reparam"))
    noise = [float(gradient.var(0).sum())]
    for estimator in ESTIMATORS:
        guide = made(NetworkNormal, model, args, estimator=estimator)
        other_loss, other = losses_and_gradients(model, guide, args, number, Trace_ELBO())
        error = ((loss.var() + other_loss.var()) / number).sqrt()
        assert abs(loss.mean() - other_loss.mean()) < STANDARD_ERRORS * error
        errors = ((gradient.var(0) + other.var(0)) / number).sqrt()
        assert ((gradient.mean(0) - other.mean(0)).abs() <= STANDARD_ERRORS * errors + 1e-12).all()
        noise.append(float(other.var(0).sum()))
    _, weights, flipout, local = noise
    assert flipout < 0.5 * weights
    assert local < 0.5 * weights


@pytest.mark.parametrize("gradient", ["stl", "reparam"])
def test_gradients_do_not_depend_on_the_objective(gradient: Any) -> None:
    """The guide has no score, so that sticking the landing leaves nothing out."""
    model, *args = regression()
    guide = made(NetworkNormal, model, tuple(args))
    found = []
    for objective in (ELBO(gradient=gradient), Trace_ELBO()):
        torch.manual_seed(3)
        found.append(losses_and_gradients(model, guide, tuple(args), 1, objective))
    torch.testing.assert_close(found[0][0], found[1][0])
    torch.testing.assert_close(found[0][1], found[1][1])


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_the_divergence_is_exact(estimator: Estimator) -> None:
    """Without rows to explain, which is a mask, the loss is the KL divergence, whatever is drawn."""
    model, X, y = regression()
    guide = made(NetworkNormal, model, (X, y), estimator=estimator)
    expected = 0.0
    for name, (loc, scale) in guide._of_weights().items():  # type: ignore[attr-defined]
        loc, scale = loc.detach(), scale.detach()
        prior = model.priors[name]
        expected += float(
            (scale.square() + (loc - prior.loc).square()).sum() / (2 * prior.scale**2)
            + (math.log(prior.scale) - scale.log() - 0.5).sum()
        )
    silent = pyro.poutine.mask(model, mask=True)
    without = pyro.poutine.block(silent, hide=["y"])
    for _ in range(3):
        assert Trace_ELBO().loss(without, guide, X, y) == pytest.approx(expected, rel=1e-12)


def test_vectorized_particles_have_draws_of_their_own() -> None:
    model, X, y = regression(noise_scale=None)
    guide = made(NetworkNormal, model, (X, y))
    one = torch.tensor([Trace_ELBO().loss(model, guide, X, y) for _ in range(60)])
    objective = Trace_ELBO(10, vectorize_particles=True, max_plate_nesting=1)
    ten = torch.tensor([objective.loss(model, guide, X, y) for _ in range(60)])
    error = ((one.var() + ten.var()) / 60).sqrt()
    assert abs(one.mean() - ten.mean()) < STANDARD_ERRORS * error
    # of plain draws in parallel, whose noise ten of them take down
    plain = made(NetworkNormal, model, (X, y), estimator="weights")
    single = torch.tensor([Trace_ELBO().loss(model, plain, X, y) for _ in range(60)])
    assert ten.var() < 0.3 * single.var()


def test_values_of_the_sites_are_draws_of_the_normals() -> None:
    model, X, y = regression(noise_scale=None)
    guide = made(NetworkNormal, model, (X, y))
    drawn = Predictive(guide, num_samples=4000, parallel=True)(X, y)["0.weight"].reshape(4000, 4, 2)
    loc, scale = guide._of_weights()["0.weight"]  # type: ignore[attr-defined]
    assert ((drawn.mean(0) - loc).abs() < STANDARD_ERRORS * scale / math.sqrt(4000)).all()
    assert ((drawn.std(0) / scale - 1).abs() < STANDARD_ERRORS / math.sqrt(2 * 4000)).all()


def test_weights_start_where_the_network_is() -> None:
    model, X, y = regression(noise_scale=None)
    guide = NetworkNormal(model)
    guide(X, y)
    for name, value in model.net.named_parameters():
        torch.testing.assert_close(guide.median()[name], value.detach())
    assert float(guide.median()["noise_scale"]) == 1.0
    assert spread_of(guide(X, y)["0.weight"]) is not None


def test_without_weights_it_is_the_mean_field_normal() -> None:
    def model() -> None:
        pyro.sample("x", dist.Normal(1.0, 2.0))
        pyro.sample("s", dist.Gamma(2.0, 1.0))

    losses = []
    for kind in (MeanFieldNormal, NetworkNormal):
        guide = kind(model, init_scale=0.1)
        guide()
        pyro.clear_param_store()
        torch.manual_seed(0)
        losses.append(Trace_ELBO().loss(model, guide))
    assert losses[0] == losses[1]


def test_a_wrong_estimator_suggests_the_nearest() -> None:
    with pytest.raises(ArgumentError, match="unknown estimator 'flip_out': did you mean 'flipout'"):
        NetworkNormal(lambda: None, estimator="flip_out")  # type: ignore[arg-type]


def test_sites_by_row_are_refused_beside_weights() -> None:
    model, X, y = regression()

    def with_rows(X: Tensor, y: Tensor) -> None:
        model(X, y)
        with pyro.plate("local", 10, subsample_size=5):
            pyro.sample("z", dist.Normal(0.0, 1.0))

    with pytest.raises(ModelError, match="site 'z' lies along rows"):
        NetworkNormal(with_rows)(X, y)


def test_importance_weights_are_refused() -> None:
    model, X, y = regression()
    with pytest.raises(ModelError, match=r"guide site '0\.weight_noise' has a divergence in closed form"):
        IWAE(2).loss(model, NetworkNormal(model), X, y)


def test_copies_and_states_keep_the_estimator() -> None:
    model, X, y = regression()
    guide = NetworkNormal(model, estimator="flipout")
    guide(X, y)
    assert copy.deepcopy(guide).estimator == guide.twin().estimator == "flipout"
    other = NetworkNormal(model)
    other.load_state_dict(guide.state_dict())
    torch.testing.assert_close(other.loc, guide.loc)


def test_online_newton_in_plain_svi() -> None:
    model, X, y = regression()
    guide = NetworkNormal(model)
    optim = NaturalGradient(guide, lr=0.1, momentum=0.9, curvature_momentum=0.999)
    svi = SVI(model, guide, optim, Trace_ELBO())
    losses = [svi.step(X, y) for _ in range(200)]
    assert sum(losses[-20:]) < 0.5 * sum(losses[:20])


@pytest.mark.slow
def test_a_fit_on_minibatches_finds_the_posterior_of_a_linear_layer() -> None:
    """One linear layer is a linear regression: the mean-field optimum has the exact mean, and the precisions' diagonal."""
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(100, 2, generator=generator, dtype=torch.float64)
    y = X @ torch.tensor([1.0, -0.5], dtype=torch.float64) + 0.5 * torch.randn(100, generator=generator)
    model = BayesianNeuralNetwork(nn.Linear(2, 1).double(), noise_scale=0.5, prior_scale=1.0)
    result = fit(model.problem(X, y, minibatch=50), NetworkNormal, progress=False)
    assert result.status is Status.CONVERGED
    A = torch.cat([X, torch.ones(100, 1)], 1)
    precision = A.T @ A / 0.25 + torch.eye(3, dtype=torch.float64)
    mean, sd = torch.linalg.solve(precision, A.T @ y / 0.25), precision.diagonal().rsqrt()
    loc, scale = result.guide.loc.detach(), result.guide.scale.detach()
    assert ((loc - mean).abs() < 0.2 * sd).all()  # what step sizes and noise leave: a fifth of a standard deviation
    assert ((scale / sd).log().abs() < 0.1).all()


def test_problem_needs_no_marks() -> None:
    """A model that says of a site of its own that it is a weight gets the same treatment."""

    def model(x: Tensor, y: Tensor) -> None:
        start = torch.ones(1, 1)
        w = pyro.sample("w", dist.Normal(torch.zeros(1, 1), 1.0).to_event(2), infer={"is_weight": True, "start": start})
        with pyro.plate("row", len(x)):
            pyro.sample("y", dist.Normal((x @ w.T)[:, 0], 1.0), obs=y)

    x = torch.randn(6, 1)
    problem = Problem(model, x, x[:, 0])
    guide = NetworkNormal(problem.model)
    guide(x, x[:, 0])
    assert float(guide.median()["w"]) == 1.0
    assert math.isfinite(Trace_ELBO().loss(model, guide, x, x[:, 0]))
