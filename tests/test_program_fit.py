from __future__ import annotations

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import constraints
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoDelta, AutoMultivariateNormal, AutoNormal
from torch import Tensor

import pyro_vi_lab as vl
from pyro_vi_lab.errors import ArgumentError

GENERATOR = torch.Generator().manual_seed(1)
X = torch.randn(600, 2, generator=GENERATOR, dtype=torch.float64)
Y = X @ torch.tensor([1.0, -2.0], dtype=torch.float64) + 0.5 * torch.randn(
    600, generator=GENERATOR, dtype=torch.float64
)


def regression(x: Tensor, y: Tensor) -> None:
    weights = pyro.sample("weights", dist.Normal(torch.zeros(2), 3.0).to_event(1))
    with pyro.plate("row", len(x)):
        pyro.sample("y", dist.Normal(x @ weights, 0.5), obs=y)


def exact() -> tuple[Tensor, Tensor]:
    precision = X.T @ X / 0.25 + torch.eye(2, dtype=torch.float64) / 9
    covariance = torch.linalg.inv(precision)
    return covariance @ X.T @ Y / 0.25, covariance.diagonal().sqrt()


def by_hand(x: Tensor, y: Tensor) -> None:
    loc = pyro.param("weights_loc", torch.zeros(2))
    scale = pyro.param("weights_scale", torch.ones(2), constraint=constraints.positive)
    pyro.sample("weights", dist.Normal(loc, scale).to_event(1))


def check(fit: vl.Fit, *, shift: float, ratio: float) -> None:
    mean, sd = exact()
    posterior = fit.posterior(4000)
    assert float(((posterior.mean()["weights"] - mean) / sd).abs().max()) < shift
    assert float((posterior.sd()["weights"] / sd - 1).abs().max()) < ratio


@pytest.mark.parametrize(
    "guide",
    [by_hand, AutoNormal, pytest.param(AutoMultivariateNormal, marks=pytest.mark.slow)],
    ids=["by hand", "AutoNormal", "full"],
)
def test_any_guide_converges_to_the_exact_posterior(guide: object) -> None:
    fit = vl.fit(vl.Problem(regression, X, Y), guide, progress=False)
    assert fit.status is vl.Status.CONVERGED, fit.message
    check(fit, shift=0.2, ratio=0.15)
    value, error = fit.elbo(500)
    best, _ = vl.fit(vl.Problem(regression, X, Y), "full_rank", progress=False).elbo(2000)
    assert best - value < 0.1 + 5 * error
    assert float(fit.importance(2000).khat) < 0.7


@pytest.mark.parametrize("guide", ["mean_field", "full_rank"])
@pytest.mark.slow
def test_natural_gradients_with_minibatches(guide: str) -> None:
    fit = vl.fit(vl.Problem(regression, X, Y, minibatch=100), guide, progress=False)
    assert fit.status is vl.Status.CONVERGED, fit.message
    check(fit, shift=0.3, ratio=0.2)
    assert list(pyro.get_param_store().keys()) == []


@pytest.mark.slow
def test_local_latents_in_batches() -> None:
    """z_i | y_i, mu is normal with mean (4 y + mu) / 5 and variance 1/5, as data and prior have precisions 4 and 1."""

    def local(y: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
        with pyro.plate("row", len(y)):
            z = pyro.sample("z", dist.Normal(mu, 1.0))
            pyro.sample("y", dist.Normal(z, 0.5), obs=y)

    y = 2 + torch.randn(60, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    fit = vl.fit(vl.Problem(local, y, minibatch=20), "mean_field", max_steps=8000, progress=False)
    posterior = fit.posterior(2000)
    assert posterior.draws["z"].shape == (1, 2000, 60)
    expected = (4 * y + y.mean()) / 5
    assert float((posterior.mean()["z"] - expected).abs().max()) < 0.2
    assert float((posterior.sd()["z"] / 0.2**0.5 - 1).abs().max()) < 0.3


def test_options_and_their_errors() -> None:
    problem = vl.Problem(regression, X, Y)
    adam = vl.FusedAdam({"lr": 0.05})
    fit = vl.fit(
        problem, AutoNormal(regression), optim=adam, objective=TraceMeanField_ELBO(), max_steps=300, progress=False
    )
    assert set(fit.history) == {"negative_elbo", "step_size", "seconds"}
    assert np.all(fit.history["step_size"] == 0.05)
    for options, message in (
        ({"num_restarts": 2}, "num_restarts=2: a guide that is trained in place, as AutoDelta is here, has one start"),
        ({"optim": 3}, "optim must be a Pyro optimizer such as pyro.optim.Adam, got int"),
        ({"optim": adam, "lr": 0.1}, "lr and optim were both given"),
        ({"objective": Trace_ELBO(), "num_particles": 3}, "num_particles and objective were both given"),
    ):
        with pytest.raises(ArgumentError, match=message):
            vl.fit(problem, AutoDelta, progress=False, **options)
    with pytest.raises(ArgumentError, match="for which optim has no meaning"):
        vl.fit(problem, "full_rank", optim=adam, progress=False)
    with pytest.raises(ArgumentError, match="a fit of the guide AutoNormal has no covariance"):
        fit.covariance()


def test_a_training_that_diverges_says_where() -> None:
    def guide(x: Tensor, y: Tensor) -> None:
        loc = pyro.param("bad_loc", torch.full((2,), torch.nan))
        pyro.sample("weights", dist.Delta(loc).to_event(1))

    with pyro.validation_enabled(False), pytest.warns(UserWarning, match="NaN"):
        fit = vl.fit(vl.Problem(regression, X, Y), guide, progress=False)
    assert fit.status is vl.Status.DIVERGED
    assert "parameter 'bad_loc' is no finite number" in fit.message


def test_the_stop_waits_for_parameters_that_drift() -> None:
    """The noise of a small batch hides a scale that is far too large: the loss alone would have stopped at once."""
    fit = vl.fit(vl.Problem(regression, X, Y, minibatch=20), AutoNormal, progress=False, max_steps=20_000)
    _, sd = exact()
    assert fit.num_steps > 2000
    assert float((fit.posterior(2000).sd()["weights"] / sd - 1).abs().max()) < 0.5
