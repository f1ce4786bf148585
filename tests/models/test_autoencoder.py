from __future__ import annotations

import math
import sys
from collections.abc import Callable
from io import BytesIO
from typing import Any

import numpy as np
import pandas as pd
import pyro
import pytest
import torch
from matplotlib import rc_context
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from scipy import special, stats
from torch import Tensor, nn

import pyro_vi_lab as vl
from pyro_vi_lab.errors import ArgumentError, DataError, ExtraError
from pyro_vi_lab.isolation import seeded
from pyro_vi_lab.models import VariationalAutoencoder, autoencoder, probabilistic_pca
from pyro_vi_lab.models.importance_bound import importance_bound

LIKELIHOODS = ("bernoulli", "continuous_bernoulli", "normal", "categorical")


def rows(likelihood: str, num_rows: int = 12, shape: tuple[int, ...] = (5,), seed: int = 0) -> Tensor:
    rng = np.random.default_rng(seed)
    if likelihood == "categorical":
        return torch.tensor(rng.integers(0, 3, (num_rows, *shape)))
    values = rng.normal(size=(num_rows, *shape)) if likelihood == "normal" else rng.random((num_rows, *shape))
    return torch.tensor(np.round(values) if likelihood == "bernoulli" else values)


def make(likelihood: Any, shape: tuple[int, ...] = (5,), **options: Any) -> VariationalAutoencoder:
    categories = 3 if likelihood == "categorical" else None
    options = {"num_latents": 2, "hidden": [7], **options}
    return VariationalAutoencoder(shape=shape, likelihood=likelihood, num_categories=categories, **options)


each_likelihood = pytest.mark.parametrize("likelihood", LIKELIHOODS)


# --- the densities --------------------------------------------------------------------------------------------------


def log_likelihood_by_hand(likelihood: str, values: np.ndarray, x: np.ndarray, log_noise: float) -> np.ndarray:
    """The formulas in SciPy, summed over the numbers of a row."""
    p = special.expit(values)
    if likelihood == "bernoulli":
        found = stats.bernoulli(p).logpmf(x)
    elif likelihood == "continuous_bernoulli":
        # Loaiza-Ganem & Cunningham 2019, eq. 7
        constant = 2 * np.arctanh(1 - 2 * p) / (1 - 2 * p)
        found = np.log(constant) + x * np.log(p) + (1 - x) * np.log1p(-p)
    elif likelihood == "normal":
        found = stats.norm(values, math.exp(log_noise)).logpdf(x)
    else:
        found = np.take_along_axis(special.log_softmax(values, -1), x[..., None], -1)[..., 0]
    return np.asarray(found).sum(-1)


@each_likelihood
def test_the_density_is_that_of_the_formula(likelihood: str) -> None:
    model, X = make(likelihood), rows(likelihood)
    if likelihood == "categorical":
        model.to(torch.float64)
    problem = model.problem(X)
    if likelihood == "normal":
        model.log_noise.data.fill_(-0.3)
        problem = model.problem(X)
    z = torch.tensor(np.random.default_rng(1).normal(size=(12, 2)))
    values = model.decoder(z).detach().numpy()
    noise = float(model.log_noise.detach()) if likelihood == "normal" else 0.0
    expected = stats.norm.logpdf(z.numpy()).sum(-1) + log_likelihood_by_hand(likelihood, values, X.numpy(), noise)
    # torch computes the constant of the continuous Bernoulli by a series near one half
    rtol = 1e-6 if likelihood == "continuous_bernoulli" else 1e-12
    np.testing.assert_allclose(model.log_joint(problem.inputs["X"], z), expected, rtol=rtol)
    density = problem.density()
    assert density.dim == 24
    assert float(density.log_prob(density.unconstrain({"z": z}))) == pytest.approx(expected.sum(), rel=rtol)


@each_likelihood
def test_vectorized_particles_have_the_density_of_single_runs(likelihood: str) -> None:
    model, X = make(likelihood), rows(likelihood)
    X = model.problem(X).inputs["X"]
    with pyro.plate("particles", 4, dim=-2):
        trace = poutine.trace(model).get_trace(X)
    trace.compute_log_prob()
    together = trace.nodes["z"]["log_prob"] + trace.nodes["x"]["log_prob"]
    torch.testing.assert_close(together, model.log_joint(X, trace.nodes["z"]["value"]))
    for k in range(4):
        single = model.log_joint(X, trace.nodes["z"]["value"][k])
        torch.testing.assert_close(together[k], single)


@pytest.mark.parametrize("shape", [(1, 8, 8), (1, 5, 7), (3, 9, 6), (2, 8, 8), (4, 3), (1, 3, 3)])
def test_images_of_any_size_have_networks(shape: tuple[int, ...]) -> None:
    model = make("bernoulli", shape, channels=4)
    X = rows("bernoulli", 6, shape)
    problem = model.problem(X, minibatch=3)
    assert problem.observed["x"].shape == X.shape
    convolutional = any(isinstance(part, nn.Conv2d) for part in model.modules())
    assert convolutional is (len(shape) == 3 and shape[0] in (1, 3) and min(shape[1:]) >= 5)
    assert model.reconstruct(X).shape == model.sample(6).shape == X.shape
    assert model.decode(torch.zeros(3, 4, 2)).shape == (3, 4, *shape)


# --- exact answers of linear ones -------------------------------------------------------------------------------------


def table(num_rows: int = 40, dim: int = 6, rank: int = 2, noise: float = 0.5, seed: int = 0) -> Tensor:
    rng = np.random.default_rng(seed)
    loading = rng.normal(size=(dim, rank)) * np.arange(rank, 0, -1)
    return torch.tensor(rng.normal(size=(num_rows, rank)) @ loading.T + noise * rng.normal(size=(num_rows, dim)) + 1.0)


def linear(dim: int = 6, num_latents: int = 2, seed: int = 0) -> VariationalAutoencoder:
    with seeded(seed):
        encoder, decoder = nn.Linear(dim, 2 * num_latents).double(), nn.Linear(num_latents, dim).double()
    return VariationalAutoencoder(encoder, decoder, shape=(dim,), num_latents=num_latents, likelihood="normal")


def evidence(model: VariationalAutoencoder, X: Tensor) -> Tensor:
    """log p(x) of every row: x is normal with mean b and covariance WWᵀ + σ²I."""
    decoder: Any = model.decoder
    W, noise = decoder.weight, (2 * model.log_noise).exp()
    covariance = W @ W.T + noise * torch.eye(len(W)).to(W)
    return torch.distributions.MultivariateNormal(decoder.bias, covariance).log_prob(X)


def exact_elbo(model: VariationalAutoencoder, X: Tensor) -> Tensor:
    """ELBO of every row without draws: log p(x | z) is quadratic in z, for which 2 L points are exact."""
    loc, scale = model.encoder(X)
    steps = math.sqrt(model.num_latents) * torch.eye(model.num_latents).to(loc)
    points = loc + scale * torch.cat([steps, -steps])[:, None]
    kl = torch.distributions.kl_divergence(torch.distributions.Normal(loc, scale), torch.distributions.Normal(0.0, 1.0))
    value: Tensor = model.likelihood_of(points).log_prob(X).mean(0) - kl.sum(-1)
    return value


@pytest.mark.parametrize("seed", range(3))
def test_evidence_is_elbo_plus_divergence_from_the_posterior(seed: int) -> None:
    model, X = linear(seed=seed), table()
    decoder: Any = model.decoder
    loc, scale = model.encoder(X)
    W, noise = decoder.weight, (2 * model.log_noise).exp()
    covariance = torch.linalg.inv(torch.eye(2).double() + W.T @ W / noise)
    mean = (X - decoder.bias) @ W @ covariance / noise
    q = torch.distributions.MultivariateNormal(loc, scale_tril=torch.diag_embed(scale))
    posterior = torch.distributions.MultivariateNormal(mean, covariance)
    divergence = torch.distributions.kl_divergence(q, posterior)
    torch.testing.assert_close(evidence(model, X), exact_elbo(model, X) + divergence, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(
    "objective",
    [
        vl.ELBO(50, analytic_kl=True, gradient="reparam", vectorize_particles=True, max_plate_nesting=1),
        vl.ELBO(50, vectorize_particles=True, max_plate_nesting=1),
        Trace_ELBO(50, vectorize_particles=True, max_plate_nesting=1),
    ],
    ids=["analytic KL", "stl", "Pyro"],
)
def test_objectives_estimate_the_exact_elbo(objective: Any) -> None:
    model, X = linear(), table()
    expected = float(exact_elbo(model, X).detach().sum())
    bounds = -torch.tensor([objective.loss(model, model.guide, X) for _ in range(30)])
    assert abs(float(bounds.mean()) - expected) < 5 * float(bounds.std()) / math.sqrt(30)


def at_optimum(X: Tensor, num_latents: int = 2) -> VariationalAutoencoder:
    """The linear autoencoder whose decoder is the maximum-likelihood one and whose encoder is exact."""
    found, model = probabilistic_pca(X, num_latents), linear(X.shape[1], num_latents)
    decoder: Any = model.decoder
    encoder: Any = model.encoder.network
    mean, covariance = found.posterior(torch.cat([found.mean[None], found.mean + torch.eye(X.shape[1])]))
    with torch.no_grad():
        decoder.weight.copy_(found.loading)
        decoder.bias.copy_(found.mean)
        model.log_noise.copy_(found.noise_scale.log())
        slope = (mean[1:] - mean[0]).T
        encoder.weight.copy_(torch.cat([slope, torch.zeros_like(slope)]))
        encoder.bias.copy_(torch.cat([-slope @ found.mean, covariance.diagonal().log() / 2]))
    return model


@pytest.mark.parametrize("objective", [vl.ELBO(), vl.IWAE(5), Trace_ELBO()], ids=["ELBO", "IWAE", "Pyro"])
def test_with_the_posterior_as_encoder_every_draw_gives_the_evidence(objective: Any) -> None:
    X = table()
    model, found = at_optimum(X), probabilistic_pca(X, 2)
    assert -objective.loss(model, model.guide, X) == pytest.approx(float(found.log_likelihood), rel=1e-12)
    for num_particles in (1, 7):
        scores = model.log_likelihood(X, num_particles=num_particles)
        torch.testing.assert_close(scores.rows, found.log_prob(X), rtol=1e-12, atol=1e-11)


def test_a_linear_autoencoder_has_the_optimum_of_principal_components() -> None:
    """Lucas et al. 2019, "Don't blame the ELBO": no local maxima, and the global one is that of Tipping & Bishop."""
    X = table(60, 5, 2)
    model, found = linear(5, 2, seed=3), probabilistic_pca(X, 2)
    optim = torch.optim.LBFGS(
        model.parameters(),
        max_iter=2000,
        tolerance_grad=1e-7,
        tolerance_change=1e-13,  # of the loss; by default 1e-9
        history_size=30,
        line_search_fn="strong_wolfe",
    )

    def loss() -> Tensor:
        optim.zero_grad()
        value = -exact_elbo(model, X).mean()
        value.backward()
        return value

    optim.step(loss)
    optimum = float(found.log_likelihood) / len(X)
    model.requires_grad_(False)
    assert float(exact_elbo(model, X).mean()) == pytest.approx(optimum, rel=1e-9)
    assert float(evidence(model, X).mean()) == pytest.approx(optimum, rel=1e-9)
    assert float(model.log_noise.exp()) == pytest.approx(float(found.noise_scale), rel=1e-4)
    score = pytest.importorskip("sklearn.decomposition").PCA(2).fit(X.numpy()).score(X.numpy())
    assert float(evidence(model, X).mean()) > score  # which divides by N - 1


def test_training_by_draws_comes_near_that_optimum() -> None:
    X = table(200, 5, 2)
    model, optimum = linear(5, 2, seed=3), float(probabilistic_pca(X, 2).log_likelihood)
    problem = model.problem(X)
    objective = vl.ELBO(4, vectorize_particles=True, max_plate_nesting=1)
    options: dict[str, Any] = {"objective": objective, "lr": 0.02, "max_steps": 700, "compile": False}
    fit = vl.fit(problem, model.guide, progress=False, **options)
    found = float(evidence(model, X).detach().sum())
    elbo, error = fit.elbo(400)
    # the optimum of all rows is known exactly; what noise of the steps leaves is less than a nat for all 200 rows
    assert elbo - 5 * error <= found <= optimum
    assert optimum - found < 1.0


def test_the_importance_weighted_bound_rises_to_the_evidence() -> None:
    X = table(200)
    model = at_optimum(X)
    encoder: Any = model.encoder.network
    with torch.no_grad():
        encoder.bias[2:] += 0.4  # wider than the posterior, so that weights are bounded
        encoder.bias[:2] += 0.2
    exact = evidence(model, X).detach()
    found = {K: model.log_likelihood(X, num_particles=K, seed=K).rows for K in (1, 10, 100, 1000)}
    gaps = {K: exact - value for K, value in found.items()}
    errors = {K: float(gap.std()) / math.sqrt(len(X)) for K, gap in gaps.items()}
    means = {K: float(gap.mean()) for K, gap in gaps.items()}
    for less, more in ((1, 10), (10, 100), (100, 1000)):
        assert means[less] > means[more] - 5 * math.hypot(errors[less], errors[more])
    assert means[1] > means[10] + 5 * math.hypot(errors[1], errors[10])
    assert abs(means[1000]) < 5 * errors[1000]
    assert means[1] == pytest.approx(float((exact - exact_elbo(model, X).detach()).mean()), abs=5 * errors[1])


def test_it_is_the_bound_of_the_objective() -> None:
    X = table()
    model = linear()
    objective = vl.IWAE(10, vectorize_particles=True, max_plate_nesting=1)
    bounds = -torch.tensor([objective.loss(model, model.guide, X) for _ in range(100)]) / len(X)
    own = torch.tensor([model.log_likelihood(X, num_particles=10, seed=seed).mean for seed in range(100)])
    error = math.hypot(float(bounds.std()), float(own.std())) / 10
    assert abs(float(bounds.mean() - own.mean())) < 5 * error


def test_chunks_leave_the_bound_as_it_is() -> None:
    X = table()
    model = at_optimum(X)

    def score(max_numbers: int) -> Tensor:
        return importance_bound(X, model.encoder, model.log_joint, num_particles=9, max_numbers=max_numbers).rows

    torch.testing.assert_close(score(2**20), score(6))
    torch.testing.assert_close(score(2**20), score(200))


def test_scores_have_a_standard_error_over_rows() -> None:
    scores = linear().log_likelihood(table(), num_particles=3)
    assert scores.mean == pytest.approx(float(scores.rows.mean()))
    assert scores.standard_error == pytest.approx(float(scores.rows.std()) / math.sqrt(40))
    assert "40 rows, 3 particles" in repr(scores)
    one = linear().log_likelihood(table()[:1], num_particles=3)
    with pytest.raises(ArgumentError, match="at least two rows"):
        _ = one.standard_error
    with pytest.raises(ArgumentError, match="num_particles must be a positive whole number, got 0"):
        linear().log_likelihood(table(), num_particles=0)


# --- training ---------------------------------------------------------------------------------------------------------


@each_likelihood
def test_an_ordinary_pyro_fit_lowers_the_loss(likelihood: str) -> None:
    model = make(likelihood)
    X = model.problem(rows(likelihood)).inputs["X"]
    loss = Trace_ELBO(num_particles=10, vectorize_particles=True, max_plate_nesting=1)
    svi = SVI(model, model.guide, pyro.optim.Adam({"lr": 0.02}), loss)
    losses = [svi.step(X) for _ in range(100)]
    assert np.mean(losses[-10:]) < np.mean(losses[:10])


def test_an_amortized_guide_of_its_encoder_is_its_guide() -> None:
    model, X = linear(), table()
    guide = vl.guides.Amortized(model, model.encoder)
    loc, scale = guide.encode(X)
    found = model.encode(X)
    assert torch.equal(loc, found.mean)
    assert torch.equal(scale, found.sd)
    optim = vl.NaturalGradient(guide, others=pyro.optim.Adam({"lr": 0.01}))
    svi = SVI(model, guide, optim, vl.ELBO())
    losses = [svi.step(X) for _ in range(60)]
    assert np.mean(losses[-10:]) < np.mean(losses[:10])


def test_two_autoencoders_have_parameters_of_their_own() -> None:
    X = rows("normal")
    first, second = make("normal"), make("normal", seed=1)
    before = {key: value.clone() for key, value in first.state_dict().items()}
    for model in (first, second):
        vl.fit_epochs(model.problem(X), model.guide, num_epochs=2, progress=False)
    after = first.state_dict()
    assert all(not torch.equal(before[key], after[key]) for key in before if "prior" not in key and "like" not in key)
    stored = {id(value) for value in pyro.get_param_store()._params.values()}
    assert stored == {id(value) for model in (first, second) for value in model.parameters()}


def test_seeds_of_weights_and_samples() -> None:
    state = torch.get_rng_state()
    one, same, other = make("bernoulli"), make("bernoulli"), make("bernoulli", seed=1)
    assert torch.equal(one.sample(5, seed=2), same.sample(5, seed=2))
    assert not torch.equal(one.sample(5, seed=2), one.sample(5, seed=3))
    assert torch.equal(state, torch.get_rng_state())
    X = rows("bernoulli")
    assert torch.equal(one.encode(X).mean, same.encode(X).mean)
    assert not torch.equal(one.encode(X).mean, other.encode(X).mean)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_networks_take_the_type_of_the_data(dtype: torch.dtype) -> None:
    model, X = make("normal"), rows("normal").to(dtype)
    problem = model.problem(X)
    assert {value.dtype for value in model.parameters()} == {dtype}
    assert problem.dtype == problem.inputs["X"].dtype == model.encode(X).sd.dtype == dtype
    whole = make("bernoulli")
    assert whole.problem(rows("bernoulli").bool()).dtype == torch.float32


def test_the_other_network_is_of_the_type_of_the_given_one() -> None:
    model = VariationalAutoencoder(decoder=nn.Linear(2, 5).double(), shape=(5,), num_latents=2)
    assert {value.dtype for value in model.parameters()} == {torch.float64}


# --- with trained networks --------------------------------------------------------------------------------------------


def test_encodings_decodings_and_samples() -> None:
    model, X = linear().requires_grad_(False), table()
    loc, scale = model.encoder(X)
    found = model.encode(X)
    assert torch.equal(found.mean, loc)
    assert torch.equal(found.sd, scale)
    assert torch.equal(model.reconstruct(X), model.decoder(loc))
    assert not linear().encode(X).mean.requires_grad
    decoder: Any = model.decoder
    drawn = model.sample(4000, seed=1)
    covariance = decoder.weight @ decoder.weight.T + (2 * model.log_noise).exp() * torch.eye(6)
    standard = (drawn.mean(0) - decoder.bias.detach()) / (covariance.diagonal() / 4000).sqrt()
    assert float(standard.abs().max()) < 5
    ratio = drawn.var(0) / covariance.diagonal()
    assert float((ratio - 1).abs().max()) < 5 * math.sqrt(2 / 4000)


@each_likelihood
def test_expected_rows_are_means_of_the_likelihood(likelihood: str) -> None:
    model = make(likelihood)
    z = torch.tensor([[0.3, -1.0]])
    value = model.decode(z)
    drawn = model.likelihood_of(z.expand(4000, 2)).sample()
    if likelihood == "categorical":
        drawn = nn.functional.one_hot(drawn, 3).float()
        torch.testing.assert_close(value.sum(-1), torch.ones(1, 5))
    error = drawn.std(0).clamp_min(1e-3) / math.sqrt(4000)
    assert float(((drawn.mean(0) - value[0]) / error).abs().max()) < 5


def test_traversals_hold_the_other_latents() -> None:
    model, X = linear(), table()
    found = model.traversal(num_steps=5, span=2.0)
    for latent in range(2):
        for step, value in enumerate((-2.0, -1.0, 0.0, 1.0, 2.0)):
            z = torch.zeros(2).double()
            z[latent] = value
            torch.testing.assert_close(found[latent, step], model.decode(z))
    of_row = model.traversal(X[0], num_steps=3)
    z = model.encode(X[:1]).mean[0]
    z[1] = -2.0
    torch.testing.assert_close(of_row[1, 0], model.decode(z))


@pytest.mark.parametrize(("shape", "image"), [((1, 8, 8), None), ((3, 6, 6), None), ((12,), (3, 4)), ((4, 3), None)])
def test_traversals_are_pictures(shape: tuple[int, ...], image: tuple[int, int] | None) -> None:
    model = make("bernoulli", shape)
    with rc_context({"figure.constrained_layout.use": True}):
        figure = model.plot_traversal(num_steps=4, image=image)
        figure.savefig(BytesIO())  # warnings are errors
    (axes,) = figure.axes
    height, width = (image or shape)[-2:]
    pixels = np.asarray(axes.images[0].get_array())
    assert pixels.shape[:2] == (2 * (height + 1), 4 * (width + 1))  # a line between pictures
    assert [text.get_text().strip() for text in axes.texts] == ["z0", "z1"]
    expected = model.traversal(num_steps=4)[1, 2].reshape(-1, height, width)[0]
    of_first_channel = pixels if pixels.ndim == 2 else pixels[..., 0]
    found = of_first_channel[height + 1 : -1, 2 * (width + 1) : 3 * width + 2]
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_pictures_of_categories_and_of_tables() -> None:
    categorical = make("categorical", (4, 4))
    (axes,) = categorical.plot_traversal().axes
    assert np.asarray(axes.images[0].get_array()).shape == (10, 35)
    with pytest.raises(ArgumentError, match=r"rows of shape \(5,\) are no pictures of shape \(5,\); give image="):
        make("normal").plot_traversal()
    with pytest.raises(ArgumentError, match=r"no pictures of shape \(2, 2\)"):
        make("normal").plot_traversal(image=(2, 2))
    with pytest.raises(ArgumentError, match="1 labels for 2 rows"):
        vl.models.picture_grid(torch.zeros(2, 3, 4, 4), labels=["a"])
    with pytest.raises(ArgumentError, match=r"images have shape \(3, 4, 4\)"):
        vl.models.picture_grid(torch.zeros(3, 4, 4))


def test_dropout_is_for_training() -> None:
    decoder = nn.Sequential(nn.Dropout(0.5), nn.Linear(2, 5))
    model = VariationalAutoencoder(decoder=decoder, shape=(5,), num_latents=2)
    z = torch.ones(1, 2)
    assert torch.equal(model.decode(z), model.decode(z))
    assert torch.equal(model.sample(3), model.sample(3))
    assert decoder.training
    assert not torch.equal(model.likelihood_of(z.expand(50, 2)).mean, model.decode(z.expand(50, 2)))


def test_networks_of_all_allowed_forms() -> None:
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.loc, self.log_scale = nn.Linear(5, 2), nn.Linear(5, 2)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.loc(x), self.log_scale(x).exp()

    class Images(nn.Module):
        def forward(self, z: Tensor) -> Tensor:
            return z.sum(-1)[:, None, None, None].expand(-1, 1, 5, 1)

    model = VariationalAutoencoder(Pair(), Images(), shape=(5,), num_latents=2)
    assert model.reconstruct(rows("bernoulli")).shape == (12, 5)


# --- what is refused --------------------------------------------------------------------------------------------------


class Wrong(nn.Module):
    """Gives what it was told to give."""

    def __init__(self, result: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.result = result

    def forward(self, x: Tensor) -> Any:
        return self.result(x)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shape": ()}, r"shape is the shape of one row, .* got \(\)"),
        ({"shape": (0, 3)}, r"got \(0, 3\)"),
        ({"num_latents": 0}, "num_latents must be a positive whole number, got 0"),
        ({"hidden": [4, 0]}, r"hidden\[1\] must be a positive whole number, got 0"),
        ({"likelihood": "gaussian"}, "likelihood must be one of 'bernoulli', .*'gaussian'"),
        ({"likelihood": "categorical"}, "num_categories is None with likelihood='categorical'"),
        ({"num_categories": 3}, "num_categories is 3 with likelihood='bernoulli'"),
        ({"likelihood": "categorical", "num_categories": 1}, "at least 2, got 1"),
        ({"encoder": lambda x: x}, "encoder must be a torch.nn.Module, got function"),
        (
            {"encoder": nn.Linear(5, 5)},
            r"encoder gives \(2, 5\); for 2 rows .*\(num_latents=2\), or one tensor \(2, 4\)",
        ),
        ({"encoder": nn.Linear(4, 4)}, r"encoder cannot take a tensor of shape \(2, 5\)"),
        ({"encoder": Wrong(lambda x: (x[:, :2], x[:, :3]))}, r"encoder gives \(2, 2\) and \(2, 3\)"),
        ({"encoder": Wrong(lambda x: (x[:, :2], x[:, :2]))}, "encoder gives a scale that is not positive"),
        ({"encoder": Wrong(lambda x: {"z": x})}, "encoder gives a dict"),
        (
            {"decoder": nn.Linear(2, 6)},
            r"decoder gives \(2, 6\) for z of shape \(2, 2\); expected \(2, 5\) or \(2, 5\)",
        ),
        ({"decoder": nn.Linear(3, 5)}, r"decoder cannot take a tensor of shape \(2, 2\)"),
        ({"decoder": Wrong(lambda z: (z, z))}, "decoder gives a tuple; expected one tensor"),
        (
            {"decoder": nn.Linear(2, 5), "likelihood": "categorical", "num_categories": 3},
            r"expected \(2, 5, 3\) or \(2, 15\)",
        ),
    ],
)
def test_models_that_make_no_sense(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        VariationalAutoencoder(**{"shape": (5,), "num_latents": 2, "hidden": [7], **options})


def changed(X: Tensor, place: tuple[int, ...], value: float) -> Tensor:
    result = X.double()
    result[place] = value
    return result


@pytest.mark.parametrize(
    ("likelihood", "X", "message"),
    [
        ("bernoulli", rows("bernoulli", shape=(4,)), r"X has shape \(12, 4\); expected \(rows, 5\)$"),
        ("bernoulli", rows("bernoulli", shape=(5, 1)), r"expected \(rows, 5\); X.reshape\(-1, 5\) gives it"),
        ("bernoulli", rows("bernoulli")[0], r"X has shape \(5,\)"),
        ("bernoulli", rows("bernoulli")[:0], r"X has shape \(0, 5\)"),
        ("bernoulli", rows("bernoulli")[:1], "X has one row; at least two"),
        ("normal", torch.ones(4, 5), "all 4 rows of X are equal: every column is constant"),
        (
            "bernoulli",
            changed(rows("bernoulli"), (3, 1), 0.4),
            r"other than 0 and 1, the first \(0.4\) in row 3 at \(1,\)",
        ),
        ("bernoulli", changed(rows("bernoulli"), (3, 1), math.nan), r"X has 1 missing .*\(nan\) in row 3 at \(1,\)"),
        ("normal", changed(rows("normal"), (11, 4), math.inf), r"\(inf\) in row 11 at \(4,\)"),
        (
            "continuous_bernoulli",
            changed(rows("continuous_bernoulli"), (2, 0), 255.0),
            r"outside of 0 to 1, the first \(255\) in row 2 at \(0,\): divide X by its largest",
        ),
        ("categorical", changed(rows("categorical"), (5, 2), 3), r"whole numbers 0 to 2, the first \(3\) in row 5"),
        ("categorical", changed(rows("categorical"), (5, 2), 0.5), r"the first \(0.5\) in row 5"),
        ("normal", np.array([["a"] * 5] * 2), "X is not numeric"),
    ],
)
def test_bad_data_are_named(likelihood: str, X: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        make(likelihood).problem(X)


def test_images_of_another_size_are_named() -> None:
    model = VariationalAutoencoder(shape=(1, 8, 8), num_latents=2)
    with pytest.raises(DataError, match=r"X has shape \(5, 1, 28, 28\); expected \(rows, 1, 8, 8\)$"):
        model.problem(torch.zeros(5, 1, 28, 28))
    with pytest.raises(DataError, match=r"X has shape \(5, 8, 8\); expected \(rows, 1, 8, 8\)"):
        model.log_likelihood(torch.zeros(5, 8, 8))
    with pytest.raises(DataError, match=r"X has shape \(1, 3, 8, 8\); expected \(rows, 1, 8, 8\)"):
        model.traversal(torch.zeros(3, 8, 8))


def test_rows_and_columns_of_data_frames_are_named() -> None:
    values = rows("normal").numpy()
    frame = pd.DataFrame(values, index=[f"patient {i}" for i in range(12)], columns=list("abcde"))
    problem = make("normal").problem(frame)
    assert problem.coords["feature"] == list("abcde")
    assert problem.coords["row"][3] == "patient 3"
    assert problem.dims("z") == ("row", "latent")
    frame.iloc[3, 2] = math.nan
    with pytest.raises(DataError, match="in row 'patient 3' at"):
        make("normal").encode(frame)
    frame["a"] = "text"
    with pytest.raises(DataError, match="column 'a' of X is not numeric"):
        make("normal").problem(frame)
    with pytest.raises(ArgumentError, match="features has 2 names; X has 5 columns"):
        make("normal").problem(values, features=["a", "b"])
    with pytest.raises(ArgumentError, match=r"rows of shape .* have none"):
        make("normal", (2, 2)).problem(rows("normal", shape=(2, 2)), features=["a"])


def test_constant_columns_are_fine() -> None:
    X = rows("normal")
    X[:, 2] = 4.0
    assert make("normal").problem(X).observed["x"].shape == (12, 5)


def test_wrong_latents_and_numbers() -> None:
    model = make("bernoulli")
    with pytest.raises(ArgumentError, match=r"z has shape \(1, 3\); expected \(..., 2\)"):
        model.decode(torch.zeros(1, 3))
    with pytest.raises(ArgumentError, match="num_rows must be a positive whole number, got 0"):
        model.sample(0)
    with pytest.raises(ArgumentError, match="span must be a positive number, got 0"):
        model.traversal(span=0.0)
    with pytest.raises(DataError, match=r"X has shape \(1, 4\)"):
        model.traversal(torch.zeros(4))


def test_the_example() -> None:
    pytest.importorskip("sklearn")
    problem = autoencoder.example()
    assert problem.name == "autoencoder"
    assert problem.num_rows == 1797
    assert problem.minibatch == 128
    assert problem.coords["feature"][:2] == ["pixel_0_0", "pixel_0_1"]
    assert autoencoder.binary_digits().unique().tolist() == [0.0, 1.0]


def test_without_scikit_learn_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(ExtraError, match=r"pip install 'pyro-vi-lab\[examples\]'"):
        autoencoder.example()
