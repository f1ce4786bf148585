from __future__ import annotations

from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn

import pyro_vi_lab as vl
from pyro_vi_lab.errors import ArgumentError
from pyro_vi_lab.isolation import seeded
from pyro_vi_lab.models import VariationalAutoencoder

X = torch.tensor(np.random.default_rng(0).normal(size=(20, 3)))


def autoencoder(*, idle: bool = False, seed: int = 0) -> VariationalAutoencoder:
    """A linear autoencoder; an idle decoder does not look at z."""
    with seeded(seed):
        encoder, decoder = nn.Linear(3, 4).double(), nn.Linear(2, 3).double()
    if idle:
        nn.init.zeros_(decoder.weight)
    return VariationalAutoencoder(encoder, decoder, shape=(3,), num_latents=2, likelihood="normal")


def standing() -> pyro.optim.PyroOptim:
    return pyro.optim.SGD({"lr": 0.0})


def amortized(model: VariationalAutoencoder) -> vl.guides.Amortized:
    return vl.guides.Amortized(model, model.encoder)


def parts(model: VariationalAutoencoder, data: Tensor = X) -> tuple[float, float]:
    """Minus log p(x | z) and the KL divergence, both without noise where the decoder is idle."""
    decoder: Any = model.decoder
    with torch.no_grad():
        log_likelihood = dist.Normal(decoder.bias, model.log_noise.exp()).log_prob(data).sum()
        kl = torch.distributions.kl_divergence(dist.Normal(*model.encoder(data)), dist.Normal(0.0, 1.0)).sum()
    return -float(log_likelihood), float(kl)


@pytest.mark.parametrize("compile", ["auto", True], ids=["graph", "compiled"])
def test_the_weight_of_the_latents_rises_in_a_line(compile: Any) -> None:
    model = autoencoder(idle=True)
    problem = model.problem(X)
    options: dict[str, Any] = {"num_epochs": 6, "warm_up": 4, "optim": standing(), "progress": False}
    fit = vl.fit_epochs(problem, model.guide, compile=compile, **options)
    log_loss, kl = parts(model)
    assert fit.history["beta"].tolist() == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    expected = log_loss + fit.history["beta"] * kl
    np.testing.assert_allclose(fit.history["negative_elbo"], expected, rtol=1e-12)


def test_another_weight_stays_out_of_what_is_reported() -> None:
    model = autoencoder(idle=True)
    fit = vl.fit_epochs(
        model.problem(X), model.guide, num_epochs=3, beta=2.5, warm_up=1, optim=standing(), progress=False
    )
    log_loss, kl = parts(model)
    np.testing.assert_allclose(fit.history["negative_elbo"], log_loss + 2.5 * kl, rtol=1e-12)
    assert fit.elbo(2)[0] == pytest.approx(-(log_loss + kl), rel=1e-12)


def test_the_gradient_has_the_weight_too() -> None:
    """With an idle decoder only the divergence moves the encoder: by a plain step, twice as far for twice the weight."""
    moves = []
    for beta in (0.5, 1.0):
        model = autoencoder(idle=True)
        encoder: Any = model.encoder.network
        before = encoder.weight.detach().clone()
        optim = pyro.optim.SGD({"lr": 1e-4})
        vl.fit_epochs(model.problem(X), model.guide, num_epochs=1, beta=beta, optim=optim, progress=False)
        moves.append(encoder.weight.detach() - before)
    torch.testing.assert_close(2 * moves[0], moves[1], rtol=1e-9, atol=1e-12)


def test_a_weight_for_an_amortized_guide() -> None:
    model = autoencoder(idle=True)
    objective = vl.ELBO(200, vectorize_particles=True, max_plate_nesting=1)
    fit = vl.fit_epochs(
        model.problem(X),
        amortized(model),
        num_epochs=20,
        beta=0.5,
        optim=standing(),
        objective=objective,
        progress=False,
    )
    log_loss, kl = parts(model)
    losses = fit.history["negative_elbo"]
    error = losses.std(ddof=1) / np.sqrt(len(losses))
    assert abs(losses.mean() - (log_loss + kl / 2)) < 5 * error


def test_minibatches_see_every_row_once_an_epoch() -> None:
    model = autoencoder(idle=True)
    seen: list[tuple[int, float]] = []
    fit = vl.fit_epochs(
        model.problem(X, minibatch=6),
        model.guide,
        num_epochs=3,
        optim=standing(),
        progress=False,
        on_epoch=lambda epoch, loss: seen.append((epoch, loss)),
    )
    assert fit.num_steps == 10  # 3 × 20 rows in batches of 6
    assert [epoch for epoch, _ in seen] == [1, 2, 3]
    assert np.isfinite([loss for _, loss in seen]).all()
    ten = vl.fit_epochs(
        model.problem(X, minibatch=5), model.guide, num_epochs=1, optim=standing(), progress=False
    ).history["negative_elbo"]
    # each is scaled to all rows, so that the mean of an epoch is the loss of all
    assert ten.mean() == pytest.approx(sum(parts(model)), rel=1e-12)


def test_the_same_seed_gives_the_same_numbers_and_leaves_no_trace() -> None:
    state, found = torch.get_rng_state(), []
    for seed in (0, 0, 1):
        model = autoencoder()
        fit = vl.fit_epochs(
            model.problem(X, minibatch=5), model.guide, num_epochs=3, warm_up=1, seed=seed, progress=False
        )
        found.append(fit.history["negative_elbo"].tolist())
    assert torch.equal(state, torch.get_rng_state())
    assert found[0] == found[1]
    assert found[0] != found[2]


@pytest.mark.parametrize("optim", ["adam", "natural_gradient"])
def test_training_raises_the_bound(optim: str) -> None:
    model = autoencoder()
    guide: Any = model.guide if optim == "adam" else amortized(model)
    problem = model.problem(X)
    fit = vl.fit_epochs(problem, guide, num_epochs=100, optim=optim, lr=0.1, progress=False)
    losses = fit.history["negative_elbo"]
    assert losses[-10:].mean() < losses[:10].mean()
    assert fit.status is vl.Status.OUT_OF_STEPS
    assert "num_epochs=100" in fit.message
    draws = fit.posterior(50).draws["z"]
    assert draws.shape == (1, 50, 20, 2)


def test_guides_by_name() -> None:
    def model(y: Tensor) -> None:
        mean = pyro.sample("mean", dist.Normal(0.0, 10.0))
        with pyro.plate("row", len(y)):
            pyro.sample("y", dist.Normal(mean, 1.0), obs=y)

    problem = vl.Problem(model, X[:, 0], minibatch=5)
    fit = vl.fit_epochs(problem, "mean_field", num_epochs=20, warm_up=5, optim="adam", lr=0.05, progress=False)
    assert fit.method == "mean_field"
    assert len(list(pyro.get_param_store())) == 0


def test_a_loss_that_is_no_number() -> None:
    model = autoencoder()
    model.problem(X)
    model.log_noise.data.fill_(float("nan"))
    with pytest.warns(UserWarning, match="NaN"), pyro.validation_enabled(False):
        fit = vl.fit_epochs(_unchecked(model), model.guide, num_epochs=30, progress=False)
    assert fit.status is vl.Status.DIVERGED
    assert fit.num_steps == 20


def _unchecked(model: VariationalAutoencoder) -> vl.Problem:
    kept = model.log_noise.detach().clone()
    model.log_noise.data.zero_()
    problem = model.problem(X)
    model.log_noise.data.copy_(kept)
    return problem


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_epochs": 0}, "num_epochs must be a whole number of at least 1, got 0"),
        ({"num_epochs": 2.0}, "num_epochs must be a whole number"),
        ({"warm_up": -1}, "warm_up must be a whole number of at least 0, got -1"),
        ({"num_epochs": 3, "warm_up": 4}, "warm_up=4 epochs are more than num_epochs=3"),
        ({"beta": 0.0}, "beta must be a positive number, got 0.0"),
        ({"lr": 2.0}, r"lr is a step size in \(0, 1\], got 2.0"),
        ({"optim": "adm"}, "unknown optim 'adm': did you mean 'adam'"),
        ({"optim": 3}, "optim must be a name or a Pyro optimizer, got int"),
        ({"optim": pyro.optim.Adam({"lr": 0.1}), "lr": 0.1}, "lr and optim were both given"),
        ({"optim": "natural_gradient"}, "NaturalGradient cannot handle the guide"),
        ({"optim": "natural_gradient", "beta": 2.0}, "which warm_up and beta do not scale"),
        ({"num_particles": 0}, "num_particles must be at least 1, got 0"),
        ({"compile": "yes"}, "compile"),
    ],
)
def test_arguments_that_make_no_sense(options: dict[str, Any], message: str) -> None:
    model = autoencoder()
    with pytest.raises(ArgumentError, match=message):
        vl.fit_epochs(model.problem(X), model.guide, progress=False, **options)


def test_a_problem_is_needed() -> None:
    model = autoencoder()
    with pytest.raises(ArgumentError, match=r"problem must be a pyro_vi_lab\.Problem, got VariationalAutoencoder"):
        vl.fit_epochs(model, model.guide)  # type: ignore[arg-type]
