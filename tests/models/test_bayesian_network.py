from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from scipy import stats
from torch import Tensor, nn
from torch.nn import functional

from pyro_vi_lab import Posterior, fit
from pyro_vi_lab.errors import ArgumentError, DataError
from pyro_vi_lab.guides import MAP, MeanFieldNormal, NetworkNormal
from pyro_vi_lab.isolation import seeded
from pyro_vi_lab.models import BayesianNeuralNetwork, LinearRegression

STANDARD_ERRORS = 5


def network(*, inputs: int = 2, outputs: int = 1) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(inputs, 3), nn.Tanh(), nn.Linear(3, outputs)).double()


def data(num_rows: int = 12) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(num_rows, 2, generator=generator, dtype=torch.float64)
    return X, X[:, 0] + 0.3 * torch.randn(num_rows, generator=generator, dtype=torch.float64)


def by_hand(values: dict[str, np.ndarray[Any, Any]], X: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    hidden = np.tanh(X @ values["0.weight"].T + values["0.bias"])
    return np.asarray(hidden @ values["2.weight"].T + values["2.bias"])


@pytest.mark.parametrize("likelihood", ["normal", "categorical", "bernoulli"])
def test_the_density_is_that_of_the_formula(likelihood: Any) -> None:
    outputs = 4 if likelihood == "categorical" else 1
    X, y = data()
    labels = {"normal": y, "categorical": torch.arange(12) % 4, "bernoulli": (y > 0).double()}[likelihood]
    noise: dict[str, float] = {"noise_scale": 0.3} if likelihood == "normal" else {}
    options: dict[str, Any] = {"prior_scale": {"0": 0.7}, "bias_scale": 1.5, "gain": 2.0, **noise}
    model = BayesianNeuralNetwork(network(outputs=outputs), likelihood=likelihood, **options)
    density = model.problem(X, labels).density()
    z = torch.randn(density.dim, dtype=torch.float64)
    values = {key: value.numpy() for key, value in density.constrain(z).items()}
    scales = {"0.weight": 0.7, "0.bias": 0.7, "2.weight": 2 / math.sqrt(3), "2.bias": 1.5}
    expected = sum(stats.norm(0, scales[key]).logpdf(values[key]).sum() for key in scales)
    f = by_hand(values, X.numpy())
    if likelihood == "normal":
        expected += stats.norm(f[:, 0], 0.3).logpdf(y.numpy()).sum()
    elif likelihood == "categorical":
        shares = np.exp(f - np.logaddexp.reduce(f, 1, keepdims=True))
        expected += np.log(shares[np.arange(12), labels.numpy()]).sum()
    else:
        expected += stats.bernoulli(1 / (1 + np.exp(-f[:, 0]))).logpmf(labels.numpy().astype(int)).sum()
    assert float(density.log_prob(z)) == pytest.approx(expected, rel=1e-10)


def test_one_linear_layer_is_a_linear_regression() -> None:
    X, y = data()
    layer = BayesianNeuralNetwork(nn.Linear(2, 1).double(), prior_scale=1.0, bias_scale=10.0, noise_scale=0.3)
    regression = LinearRegression(0.3).problem(X, y).density()
    density = layer.problem(X, y).density()
    z = torch.randn(5, 3, dtype=torch.float64)  # (weight, bias) here, (intercept, beta) there
    torch.testing.assert_close(density.log_prob(z), regression.log_prob(z[:, [2, 0, 1]]))


def test_the_loss_that_is_often_written_is_twice_the_negative_elbo() -> None:
    r"""Loss = −Σ[1 + log σ² − μ² − σ²] + Σ(y − ŷ)²: the KL carries a half, the squared error 1/(2·noise²)."""
    X, y = data()
    model = BayesianNeuralNetwork(network(), prior_scale=1.0, bias_scale=1.0, noise_scale=1.0)
    guide = NetworkNormal(model, init_scale=0.3, estimator="weights")
    drawn = pyro.poutine.trace(guide).get_trace(X, y)
    with torch.no_grad():
        mu, sigma = guide.loc, guide.scale
        w = {name: drawn.nodes[name]["value"].numpy(force=True) for name in model.priors}
        squared = float(((y.numpy() - by_hand(w, X.numpy())[:, 0]) ** 2).sum())
        written = float(-(1 + (sigma**2).log() - mu**2 - sigma**2).sum()) + squared
    joint = pyro.poutine.trace(pyro.poutine.replay(model, trace=drawn)).get_trace(X, y)
    negative_elbo = float((drawn.log_prob_sum() - joint.log_prob_sum()).detach())
    constant = len(y) / 2 * math.log(2 * math.pi)
    assert negative_elbo == pytest.approx(written / 2 + constant, rel=1e-12)

    # another noise: the squared error alone changes its weight
    other = BayesianNeuralNetwork(network(), prior_scale=1.0, bias_scale=1.0, noise_scale=0.5)
    joint = pyro.poutine.trace(pyro.poutine.replay(other, trace=drawn)).get_trace(X, y)
    divergence = (written - squared) / 2
    constant = len(y) / 2 * math.log(2 * math.pi * 0.5**2)
    value = float((drawn.log_prob_sum() - joint.log_prob_sum()).detach())
    assert value == pytest.approx(divergence + squared / (2 * 0.5**2) + constant, rel=1e-12)


def test_minibatches_scale_the_rows_and_not_the_prior() -> None:
    """The mean over an epoch of N/B times the squared error of a batch, and one KL, is the loss of all rows."""
    X, y = data()
    model = BayesianNeuralNetwork(network(), noise_scale=0.3)
    problem = model.problem(X, y, minibatch=4)
    guide = NetworkNormal(model, estimator="weights")
    values = pyro.poutine.trace(guide).get_trace(X, y)

    def log_joint(program: Callable[..., Any], *args: Tensor) -> float:
        trace = pyro.poutine.trace(pyro.poutine.replay(program, trace=values)).get_trace(*args)
        return float(trace.log_prob_sum().detach())

    of_batches = []
    for batch in problem.batches().epoch():
        with problem.rows(batch.index, batch.size):
            of_batches.append(log_joint(problem.model, *batch.args))
    assert len(of_batches) == 3
    assert np.mean(of_batches) == pytest.approx(log_joint(model, X, y), rel=1e-10)


def test_data_that_come_twice_double_the_likelihood_alone() -> None:
    X, y = data()
    model = BayesianNeuralNetwork(network(), noise_scale=0.3)
    once, twice = model.problem(X, y).density(), model.problem(X.repeat(2, 1), y.repeat(2)).density()
    z = torch.randn(4, once.dim, dtype=torch.float64)
    prior = sum(
        dist.Normal(0.0, model.priors[name].scale).log_prob(value).flatten(1).sum(1)
        for name, value in once.constrain(z).items()
    )
    torch.testing.assert_close(twice.log_prob(z) - prior, 2 * (once.log_prob(z) - prior))


def test_a_temperature_is_a_power_of_the_likelihood_alone() -> None:
    X, y = data()
    warm, cold = (BayesianNeuralNetwork(network(), noise_scale=0.3, temperature=T) for T in (1.0, 0.25))
    plain, tempered = warm.problem(X, y).density(), cold.problem(X, y).density()
    repeated = warm.problem(X.repeat(4, 1), y.repeat(4)).density()  # a power of four is every row four times
    z = torch.randn(4, plain.dim, dtype=torch.float64)
    torch.testing.assert_close(tempered.log_prob(z), repeated.log_prob(z))
    # the score of a row is that of the model
    draws = warm.problem(X, y).prior(5, seed=0)
    scores = [model.problem(X, y).log_likelihood(draws)["y"] for model in (warm, cold)]
    torch.testing.assert_close(scores[0], scores[1])


def test_a_cold_linear_posterior_is_narrower_by_the_root_of_the_temperature() -> None:
    """Under a wide prior: covariance T σ² (AᵀA)⁻¹, also in the closed divergence of the network's guide."""
    X, y = data(40)
    A = torch.cat([X, torch.ones(40, 1)], 1)
    precision = A.T @ A / 0.3**2
    wide: dict[str, Any] = {"noise_scale": 0.3, "prior_scale": 100.0, "bias_scale": 100.0}
    cold = BayesianNeuralNetwork(nn.Linear(2, 1).double(), **wide, temperature=0.25)
    result = fit(cold.problem(X, y), "mean_field", progress=False)
    sds = torch.cat([result.posterior(4000).sd()[name].reshape(-1) for name in ("weight", "bias")])
    expected = (0.25 / precision.diagonal()).sqrt()  # independent normals have the conditional deviations
    torch.testing.assert_close(sds, expected, rtol=STANDARD_ERRORS / (2 * 4000) ** 0.5, atol=0.0)
    losses, divergences = [], []
    for model in (cold, BayesianNeuralNetwork(nn.Linear(2, 1).double(), **wide)):
        guide = NetworkNormal(model, lambda site: torch.full(site["fn"].shape(), 0.5, dtype=X.dtype), init_scale=0.1)
        with seeded(0):
            losses.append(Trace_ELBO().loss(model, guide, X, y))
        divergences.append(Trace_ELBO().loss(pyro.poutine.block(model, hide=["y"]), guide, X, y))
    assert divergences[0] == pytest.approx(divergences[1], rel=1e-12)
    assert losses[0] - divergences[0] == pytest.approx(4 * (losses[1] - divergences[1]), rel=1e-12)


def test_maximum_a_posteriori_is_training_with_weight_decay() -> None:
    """Gradient of the MAP loss per row = that of half the mean squared error over σ², plus w / (N s²)."""
    X, y = data()
    model = BayesianNeuralNetwork(network(), prior_scale=0.5, bias_scale=0.5, noise_scale=0.3)
    guide = MAP(model)
    guide(X, y)
    Trace_ELBO().loss_and_grads(model, guide, X, y)
    net = model.network(guide.median())
    loss = (net(X)[:, 0] - y).square().mean() / (2 * 0.3**2)
    loss.backward()  # type: ignore[no-untyped-call]
    decayed = [value.grad + value.detach() / (len(y) * 0.5**2) for value in net.parameters() if value.grad is not None]
    expected = torch.cat([value.reshape(-1) for value in decayed])
    assert guide.loc.grad is not None
    torch.testing.assert_close(guide.loc.grad / len(y), expected)


@pytest.mark.parametrize("guide", ["map", "mle"])
def test_modes_of_a_network(guide: str) -> None:
    """Of a network without hidden units the mode is that of a regression; hidden ones start at the net's own weights."""
    X, y = data(40)
    model = BayesianNeuralNetwork(nn.Linear(2, 1).double(), noise_scale=0.3, prior_scale=0.2, bias_scale=0.2)
    point = fit(model.problem(X, y), guide, progress=False).point()
    A = torch.cat([X, torch.ones(40, 1)], 1)
    precision = A.T @ A / 0.3**2 + (torch.eye(3, dtype=torch.float64) / 0.2**2 if guide == "map" else 0.0)
    expected = torch.linalg.solve(precision, A.T @ y / 0.3**2)
    torch.testing.assert_close(torch.cat([point["weight"][0], point["bias"]]), expected)
    torch.testing.assert_close(model.network(point)(X)[:, 0], A @ expected)


def test_a_network_does_not_start_at_the_saddle_point() -> None:
    X, y = data()
    model = BayesianNeuralNetwork(network(), noise_scale=0.3)
    for kind in (MAP, MeanFieldNormal):
        guide = kind(model)
        guide(X, y)
        torch.testing.assert_close(guide.median()["0.weight"], model.net[0].weight)


def test_guides_of_pyro_and_plain_svi() -> None:
    X, y = data()
    model = BayesianNeuralNetwork(network())
    for guide in (AutoNormal(model, init_scale=0.01), MeanFieldNormal(model, init_scale=0.01)):
        svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
        losses = [svi.step(X, y) for _ in range(120)]
        assert np.mean(losses[-20:]) < np.mean(losses[:20])


class Tied(nn.Module):
    """An autoencoder whose decoder is the transpose of its encoder."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)
        self.decoder.weight = self.encoder.weight
        self.register_buffer("offset", torch.ones(2))

    def forward(self, x: Tensor) -> Tensor:
        offset = self.offset
        assert isinstance(offset, Tensor)
        result: Tensor = self.decoder(self.encoder(x)) + offset
        return result


def test_tied_weights_are_one_site_and_buffers_stay() -> None:
    X, _ = data()
    model = BayesianNeuralNetwork(Tied().double(), noise_scale=1.0)
    problem = model.problem(X, X)
    assert [name for name, site in problem.sites.items() if site.kind == "latent"] == ["encoder.weight"]
    weight = torch.tensor([[1.0, 2.0], [0.0, 1.0]], dtype=torch.float64)
    posterior = Posterior({"encoder.weight": weight[None, None]})
    torch.testing.assert_close(model.predict(posterior, X), X @ weight.T @ weight.T + 1)
    log_likelihood = problem.log_likelihood(posterior)["y"]
    expected = stats.norm(X @ weight.T @ weight.T + 1, 1).logpdf(X).sum(-1)
    np.testing.assert_allclose(log_likelihood[0, 0], expected, rtol=1e-12)


@pytest.mark.parametrize(
    ("net", "shape"),
    [
        (nn.Sequential(nn.Conv2d(1, 2, 2), nn.ReLU(), nn.Flatten(), nn.LayerNorm(8), nn.Linear(8, 3)), (1, 3, 3)),
        (nn.Sequential(nn.Unflatten(1, (2, 2)), nn.MultiheadAttention(2, 1)), None),
        (nn.Sequential(nn.Embedding(5, 3), nn.Flatten(), nn.Linear(6, 3)), "tokens"),
    ],
)
def test_any_module(net: nn.Module, shape: Any) -> None:
    """Draws of a guide give finite bounds with every kind of layer; what gives no tensor is refused."""
    y = torch.arange(6) % 3
    model = BayesianNeuralNetwork(net, likelihood="categorical")
    if shape is None:
        with pytest.raises(DataError, match="net cannot take X of shape"):
            model.problem(torch.randn(6, 4), y)
        return
    X = torch.arange(12).reshape(6, 2) % 5 if shape == "tokens" else torch.randn(6, *shape)
    problem = model.problem(X, y)
    assert problem.dtype == torch.float32 or shape == "tokens"
    guide = NetworkNormal(model)
    assert math.isfinite(Trace_ELBO().loss(model, guide, X, y))
    if "3.weight" in model.priors:
        assert model.priors["3.weight"].loc == 1.0


def test_prior_scales() -> None:
    net = network()
    assert BayesianNeuralNetwork(net).priors["2.weight"].scale == 3**-0.5
    assert BayesianNeuralNetwork(net, prior_scale=0.3).priors["2.weight"].scale == 0.3
    assert BayesianNeuralNetwork(net, prior_scale=0.3).priors["2.bias"].scale == 1.0
    named = BayesianNeuralNetwork(net, prior_scale={"2": 0.3, "2.bias": 0.1}).priors
    assert [named[name].scale for name in named] == [2**-0.5, 1.0, 0.3, 0.1]


def test_one_row_is_enough() -> None:
    X, y = data(1)
    model = BayesianNeuralNetwork(network(), noise_scale=0.3)
    assert math.isfinite(float(model.problem(X, y).density().log_prob(torch.zeros(13, dtype=torch.float64))))


def test_the_user_keeps_the_network() -> None:
    net = network()
    before = [value.clone() for value in net.parameters()]
    model = BayesianNeuralNetwork(net, noise_scale=0.3)
    X, y = data()
    svi = SVI(model, NetworkNormal(model), pyro.optim.Adam({"lr": 0.1}), Trace_ELBO())
    svi.step(X, y)
    assert net.training
    assert all(torch.equal(one, two) for one, two in zip(before, net.parameters(), strict=True))
    assert all(value.requires_grad for value in net.parameters())


# --- predictions ------------------------------------------------------------------------------------------------------


def test_predictions_of_draws_are_those_of_the_network() -> None:
    X, _ = data()
    model = BayesianNeuralNetwork(network())
    prior = model.problem(*data()).prior(50, seed=1)
    prediction = model.predictive(prior, X)
    flat = prior.flat()
    for s in (0, 49):
        values = {name: flat[name][s].numpy() for name in model.priors}
        np.testing.assert_allclose(prediction.outputs[s], by_hand(values, X.numpy())[:, 0], rtol=1e-10)  # type: ignore[union-attr]
    torch.testing.assert_close(prediction.aleatoric[0], flat["noise_scale"].square().mean())
    torch.testing.assert_close(model.predict(prior, X), prediction.mean)
    assert len(model.predictive(prior, X, num_draws=7).outputs) == 7  # type: ignore[union-attr]


def test_binary_predictions_have_both_classes() -> None:
    X, y = data()
    model = BayesianNeuralNetwork(network(), likelihood="bernoulli")
    problem = model.problem(X, (y > 0).long())
    prior = problem.prior(20, seed=0)
    prediction = model.predictive(prior, X)
    torch.testing.assert_close(prediction.mean.sum(-1), torch.ones(12, dtype=torch.float64))
    log_likelihood = problem.log_likelihood(prior)["y"].flatten(0, 1)
    expected = log_likelihood.logsumexp(0) - math.log(20)
    torch.testing.assert_close(prediction.log_density((y > 0).long()), expected)


@pytest.mark.slow
def test_a_fit_on_minibatches_predicts_new_rows() -> None:
    """Rows around a smooth function: the fit ends by itself, finds the noise, and its intervals hold."""
    generator = torch.Generator().manual_seed(0)
    X = torch.rand(600, 1, generator=generator) * 4 - 2
    y = (2 * X[:, 0]).sin() + 0.2 * torch.randn(600, generator=generator)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(1, 10), nn.Tanh(), nn.Linear(10, 1))
    model = BayesianNeuralNetwork(net, gain=2.0)
    result = fit(model.problem(X[:200], y[:200], minibatch=100), NetworkNormal, progress=False)
    assert result.status.value == "converged"
    prediction = model.predictive(result, X[200:])
    # the rows' own standard errors, and as much again for what two hundred rows leave open
    assert float(prediction.aleatoric[0]) ** 0.5 == pytest.approx(0.2, abs=2 * STANDARD_ERRORS * 0.2 / 400**0.5)
    (covered,) = prediction.coverage(y[200:], [0.9]).tolist()  # type: ignore[union-attr]
    assert abs(covered - 0.9) < 2 * STANDARD_ERRORS * (0.9 * 0.1 / 400) ** 0.5


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda: BayesianNeuralNetwork(nn.ReLU()), r"net \(ReLU\) has no parameters"),
        (lambda: BayesianNeuralNetwork(torch.tanh), "net must be a torch.nn.Module, got builtin_function_or_method"),  # type: ignore[arg-type]
        (
            lambda: BayesianNeuralNetwork(nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))),
            r"layer '1' of net \(BatchNorm1d\) normalizes over the rows of a batch",
        ),
        (
            lambda: BayesianNeuralNetwork(nn.Sequential(nn.Linear(2, 3), nn.Dropout(0.3))),
            r"layer '1' of net \(Dropout\) draws noise of its own \(p=0.3\)",
        ),
        (
            lambda: BayesianNeuralNetwork(nn.LSTM(2, 3, num_layers=2, dropout=0.1)),
            r"net \(LSTM\) draws noise of its own \(dropout=0.1\)",
        ),
        (lambda: BayesianNeuralNetwork(nn.LazyLinear(3)), "parameter 'weight' of net has no shape yet"),
        (
            lambda: BayesianNeuralNetwork(nn.Linear(2, 1), likelihood="gaussian"),  # type: ignore[arg-type]
            "unknown likelihood 'gaussian'",
        ),
        (lambda: BayesianNeuralNetwork(nn.Linear(2, 1), noise_scale=-1.0), "noise_scale must be a positive number"),
        (
            lambda: BayesianNeuralNetwork(nn.Linear(2, 1), likelihood="bernoulli", noise_scale=1.0),
            "noise_scale is for likelihood='normal'",
        ),
        (lambda: BayesianNeuralNetwork(nn.Linear(2, 1), temperature=0.0), "temperature must be a positive number"),
        (lambda: BayesianNeuralNetwork(nn.Linear(2, 1), prior_scale="he"), "prior_scale must be a number, 'fan_in'"),
        (
            lambda: BayesianNeuralNetwork(nn.Linear(2, 1), prior_scale={"head": 1.0}),
            "prior_scale names 'head', which is no layer and no parameter of the network; its parameters: weight, bias",
        ),
        (
            lambda: BayesianNeuralNetwork(nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1).double())),
            "the weights of net have different types: '0.weight' is torch.float32, '1.weight' is torch.float64",
        ),
        (
            lambda: BayesianNeuralNetwork(nn.ParameterDict({"y": nn.Parameter(torch.ones(1))})),
            "net has a parameter 'y', which is the name of a site",
        ),
    ],
)
def test_networks_that_cannot_be_used_are_refused(make: Callable[[], Any], expected: str) -> None:
    with pytest.raises(ArgumentError, match=expected):
        make()


class Mixing(nn.Module):
    """Subtracts the mean over the rows of the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 1)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.layer(x - x.mean(0))
        return result


@pytest.mark.parametrize(
    ("net", "likelihood", "y", "expected"),
    [
        (nn.Linear(3, 1), "normal", torch.zeros(4), r"net cannot take X of shape \(4, 2\), of which a row has \(2,\)"),
        (
            nn.Linear(2, 3),
            "normal",
            torch.zeros(4),
            r"net gives \(2, 3\) for 2 rows; y has shape \(4,\), so it needs 1",
        ),
        (nn.Linear(2, 1), "categorical", torch.zeros(4), r"net gives \(2, 1\) for 2 rows; likelihood='categorical'"),
        (nn.Linear(2, 2), "bernoulli", torch.zeros(4), "likelihood='bernoulli' needs one logit each"),
        (nn.Linear(2, 3), "categorical", torch.tensor([0, 1, 3, 0]), "y has the label 3 in row 2; net has 3 outputs"),
        (nn.Linear(2, 3), "categorical", torch.tensor([0, -1, 3, 0]), "y has the label -1 in row 1"),
        (
            nn.Linear(2, 3),
            "categorical",
            torch.tensor([0, 0.5, 3, 0]),
            "y has the label 0.5 in row 1; expected classes",
        ),
        (nn.Linear(2, 1), "bernoulli", torch.tensor([0, 1, 1, 2]), "y has the label 2 in row 3; expected 0 and 1"),
        (nn.Linear(2, 1), "normal", torch.tensor([0, 1, math.nan, 2]), "y has missing or infinite values in 1 row"),
        (nn.Linear(2, 1), "normal", torch.zeros(3), r"X has 4 rows and y has shape \(3,\)"),
        (
            nn.Linear(2, 1),
            "normal",
            torch.zeros(4, 1),
            r"y has shape \(4, 1\); expected \(4,\), one value per row: y\[:, 0\]",
        ),
        (nn.Linear(2, 1), "normal", ["a", "b", "c", "d"], "y is not numeric"),
        (Mixing(), "normal", torch.zeros(4), "another output for the first row of X alone than beside the second"),
    ],
)
def test_data_that_do_not_fit_are_named(net: nn.Module, likelihood: Any, y: Any, expected: str) -> None:
    X = torch.tensor([[0.0, 1.0], [2.0, -1.0], [1.0, 1.0], [3.0, 0.0]])
    with pytest.raises((DataError, ArgumentError), match=expected):
        BayesianNeuralNetwork(net, likelihood=likelihood).problem(X, y)


def test_rows_of_inputs_are_named() -> None:
    model = BayesianNeuralNetwork(nn.Linear(2, 1))
    X = torch.ones(4, 2)
    X[2, 1] = math.inf
    with pytest.raises(DataError, match=r"X has missing or infinite values in 1 row\(s\), the first of them row 2"):
        model.problem(X, torch.zeros(4))
    with pytest.raises(DataError, match=r"X has shape \(0, 2\): expected at least one row"):
        model.problem(torch.ones(0, 2), torch.zeros(0))


def test_posteriors_that_do_not_fit_are_refused() -> None:
    model, X = BayesianNeuralNetwork(nn.Linear(2, 1), noise_scale=1.0), torch.ones(3, 2)
    weight, bias = torch.zeros(1, 5, 1, 2), torch.zeros(1, 5, 1)
    with pytest.raises(ArgumentError, match="the posterior has no draws of 'bias'; it has weight"):
        model.predict(Posterior({"weight": weight}), X)
    with pytest.raises(ArgumentError, match=r"draws of 'weight' have shape \(2, 1\); expected \(1, 2\)"):
        model.predict(Posterior({"weight": weight.mT, "bias": bias}), X)
    with pytest.raises(ArgumentError, match="posterior must be a fit or a Posterior, got dict"):
        model.predict({}, X)  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="num_draws must be at least 1, got 0"):
        model.predict(Posterior({"weight": weight, "bias": bias}), X, num_draws=0)
    with pytest.raises(ArgumentError, match="weight 'bias' is missing"):
        model.network({"weight": weight[0, 0]})
    with pytest.raises(DataError, match="net cannot take X"):
        model.predict(Posterior({"weight": weight, "bias": bias}), torch.ones(3, 4))


def test_the_loss_of_a_classifier_is_the_cross_entropy() -> None:
    """At a narrow guide the bound is minus N times torch's cross entropy, and the KL divergence."""
    X, _ = data()
    y = torch.arange(12) % 3
    model = BayesianNeuralNetwork(network(outputs=3), likelihood="categorical")
    guide = NetworkNormal(model, init_scale=1e-8)
    loss = Trace_ELBO().loss(model, guide, X, y)
    divergence = Trace_ELBO().loss(pyro.poutine.block(model, hide=["y"]), guide, X, y)
    expected = float(functional.cross_entropy(model.net(X).detach(), y, reduction="sum"))
    assert loss - divergence == pytest.approx(expected, rel=1e-6)
