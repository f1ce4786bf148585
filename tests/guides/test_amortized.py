from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Predictive, Trace_ELBO
from pyro.infer.autoguide import AutoGuideList
from pyro.nn import PyroModule
from torch import Tensor, nn
from torch.nn.functional import softplus

import pyro_vi_lab as vl
from pyro_vi_lab.errors import ArgumentError, ModelError
from pyro_vi_lab.guides import Amortized, FullRankNormal

STANDARD_ERRORS = 5


@pytest.fixture(autouse=True)
def double() -> None:
    torch.set_default_dtype(torch.float64)


class Encoder(nn.Module):
    """Location linear in the inputs, and a scale that differs by row."""

    def __init__(self, num_inputs: int, width: int) -> None:
        super().__init__()
        self.loc = nn.Linear(num_inputs, width)
        self.raw = nn.Linear(num_inputs, width)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.loc(x), softplus(self.raw(x)) + 1e-3


def encoder(num_inputs: int, width: int, seed: int = 0) -> Encoder:
    torch.manual_seed(seed)
    return Encoder(num_inputs, width)


LOADING = torch.tensor([[1.0, 0.0, 0.5], [0.0, 1.0, -0.5]], dtype=torch.float64)


def factor_model(x: Tensor) -> None:
    """Linear Gaussian, so that the posterior of every row is normal with one covariance."""
    with pyro.plate("row", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z @ LOADING, 0.5).to_event(1), obs=x)


def data(num_rows: int = 40) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    z = torch.randn(num_rows, 2, generator=generator)
    return z @ LOADING + 0.5 * torch.randn(num_rows, 3, generator=generator)


def log_density(guide: Callable[..., Any], *args: Any) -> tuple[Any, float]:
    trace = poutine.trace(guide).get_trace(*args)
    trace.compute_log_prob()
    sites = {name: site for name, site in trace.nodes.items() if site["type"] == "sample" and "log_prob" in site}
    return trace, float(sum(site["log_prob"].detach().sum() * site["scale"] for site in sites.values()))


def test_density_is_that_of_the_encoder() -> None:
    x, network = data(), encoder(3, 2)
    guide = Amortized(factor_model, network)
    trace, found = log_density(guide, x)
    loc, scale = network(x)
    expected = dist.Normal(loc, scale).log_prob(trace.nodes["z"]["value"]).sum()
    assert found == pytest.approx(float(expected.detach()), rel=1e-12)


def test_batches_of_other_sizes_need_nothing() -> None:
    guide = Amortized(factor_model, encoder(3, 2))
    for number in (4, 40, 1, 7):
        assert guide(data(number))["z"].shape == (number, 2)
        SVI(factor_model, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO()).step(data(number))


def several(x: Tensor) -> None:
    """Sites of several shapes and supports, one in a plate within that of the rows."""
    with pyro.plate("row", len(x), dim=-2):
        rate = pyro.sample("rate", dist.Gamma(2.0, 1.0).expand([1]).to_event(0))
        with pyro.plate("time", 3, dim=-1):
            share = pyro.sample("share", dist.Dirichlet(torch.ones(3)))
            pyro.sample("x", dist.Normal(rate + share[..., 0], 1.0), obs=x)


def test_sites_of_several_shapes_and_supports() -> None:
    """A row has one value of the rate and three times two of the shares."""
    x, network = torch.randn(5, 3), encoder(3, 7)
    guide = Amortized(several, network, plate="row")
    trace, found = log_density(guide, x)
    assert trace.nodes["rate"]["value"].shape == (5, 1)
    assert trace.nodes["share"]["value"].shape == (5, 3, 3)
    loc, scale = network(x)
    log_rate = trace.nodes["rate"]["value"].log()
    u = torch.distributions.biject_to(dist.Dirichlet(torch.ones(3)).support).inv(trace.nodes["share"]["value"])
    z = torch.cat([log_rate, u.reshape(5, 6)], -1)
    transform = torch.distributions.biject_to(dist.Dirichlet(torch.ones(3)).support)
    log_det = log_rate.sum() + transform.log_abs_det_jacobian(u, transform(u)).sum()
    expected = dist.Normal(loc, scale).log_prob(z).sum() - log_det
    assert found == pytest.approx(float(expected.detach()), rel=1e-10)
    median = guide.median(x)
    torch.testing.assert_close(median["rate"], loc[:, :1].exp())
    torch.testing.assert_close(median["share"], transform(loc[:, 1:].reshape(5, 3, 2)))


def test_dict_of_sites_is_the_same_as_one_pair() -> None:
    x, network = torch.randn(5, 3), encoder(3, 7)

    class ByName(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.whole = network

        def forward(self, x: Tensor) -> dict[str, Any]:
            loc, scale = self.whole(x)
            return {
                "share": (loc[:, 1:].reshape(-1, 3, 2), scale[:, 1:].reshape(-1, 3, 2)),
                "rate": (loc[:, :1], scale[:, :1]),
            }

    one, other = Amortized(several, network, plate="row"), Amortized(several, ByName(), plate="row")
    torch.testing.assert_close(one.median(x), other.median(x))


def test_rows_that_the_model_draws() -> None:
    def subsampling(x: Tensor) -> None:
        with pyro.plate("row", len(x), subsample_size=8) as index:
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z @ LOADING, 0.5).to_event(1), obs=x[index])

    x, network = data(), encoder(3, 2)
    guide = Amortized(subsampling, network)
    trace = poutine.trace(guide).get_trace(x)
    index = trace.nodes["row"]["value"]
    trace.compute_log_prob()
    loc, scale = network(x[index])
    site = trace.nodes["z_unconstrained"]
    torch.testing.assert_close(site["fn"].base_dist.loc, loc)
    torch.testing.assert_close(site["fn"].base_dist.scale, scale)
    assert site["scale"] == pytest.approx(5.0)
    assert guide.seen is not None
    assert guide.seen.scale == pytest.approx(5.0)
    torch.testing.assert_close(guide.seen.inputs[0], x[index])


def exact(x: Tensor) -> tuple[Tensor, Tensor, float]:
    """Mean and covariance of z of each row, and the log evidence."""
    precision = torch.eye(2) + LOADING @ LOADING.T / 0.25
    covariance = torch.linalg.inv(precision)
    marginal = dist.MultivariateNormal(torch.zeros(3), LOADING.T @ LOADING + 0.25 * torch.eye(3))
    return x @ LOADING.T @ covariance / 0.25, covariance, float(marginal.log_prob(x).sum())


@pytest.mark.parametrize("captured", [False, True])
def test_natural_gradient_reaches_the_optimum(captured: bool) -> None:
    """Mean-field optimum of every row: the exact mean, and one over the diagonal of the precision."""
    x = data()
    mean, covariance, _ = exact(x)
    precision = torch.linalg.inv(covariance)
    network = encoder(3, 2)
    guide = Amortized(factor_model, network)
    guide(x)
    loss: Any = vl.ELBO(num_particles=4, vectorize_particles=True, max_plate_nesting=1)
    pyro.set_rng_seed(0)
    optimizer = vl.NaturalGradient(guide, lr=0.5)
    svi = SVI(factor_model, guide, optimizer, vl.Captured(loss) if captured else loss)
    for step in range(150):
        optimizer.lr = 0.5 / (1 + step / 10)
        svi.step(x)
    loc, scale = network(x)
    kl = 0.5 * (precision.diagonal() * (loc - mean).square() + precision.diagonal() * scale.square() - 1).sum()
    kl = kl - (scale * precision.diagonal().sqrt()).log().sum()
    assert float(kl.detach()) < 0.02 * len(x)


def test_minibatches_of_a_problem() -> None:
    x = data(64)
    problem = vl.Problem(factor_model, x, minibatch=16)
    guide = Amortized(factor_model, encoder(3, 2))
    fit = vl.fit(problem, guide, max_steps=300, progress=False)
    assert fit.guide is guide
    assert guide.seen is not None
    assert len(guide.seen.inputs[0]) == 16
    assert guide.seen.scale == pytest.approx(4.0)
    _, _, evidence = exact(x)
    assert fit.history["negative_elbo"][-50:].mean() < -evidence + 0.5 * len(x)


# The contract of Pyro's autoguides


def test_median_and_quantiles() -> None:
    x, network = data(6), encoder(3, 2)
    guide = Amortized(factor_model, network)
    loc, scale = network(x)
    torch.testing.assert_close(guide.median(x)["z"], loc.detach())
    found = guide.quantiles([0.5, 0.975], x)["z"]
    assert found.shape == (2, 6, 2)
    torch.testing.assert_close(found[1], (loc + 1.959963984540054 * scale).detach())


def test_predictive() -> None:
    x = data(6)
    guide = Amortized(factor_model, encoder(3, 2))
    drawn = Predictive(factor_model, guide=guide, num_samples=7)(x)
    assert drawn["z"].shape == (7, 6, 2)


def test_list_with_a_guide_of_the_global_sites() -> None:
    def model(x: Tensor) -> None:
        noise = pyro.sample("noise", dist.LogNormal(0.0, 1.0))
        with pyro.plate("row", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z @ LOADING, noise).to_event(1), obs=x)

    guide = AutoGuideList(model)
    guide.append(FullRankNormal(poutine.block(model, expose=["noise"])))
    guide.append(Amortized(poutine.block(model, expose=["z"]), encoder(3, 2)))
    assert set(guide(data())) == {"noise", "z"}
    svi = SVI(model, guide, vl.NaturalGradient(guide, lr=0.1), vl.ELBO())
    losses = [svi.step(data()) for _ in range(60)]
    assert sum(losses[-10:]) < sum(losses[:10])


def test_nested_in_a_module_copied_pickled_and_loaded() -> None:
    x = data(6)

    class Whole(PyroModule):
        def __init__(self) -> None:
            super().__init__()
            self.guide = Amortized(factor_model, encoder(3, 2))

        def forward(self, x: Tensor) -> Any:
            return self.guide(x)

    whole = Whole()
    whole(x)
    expected = whole.guide.median(x)
    torch.testing.assert_close(copy.deepcopy(whole).guide.median(x), expected)
    torch.testing.assert_close(pickle.loads(pickle.dumps(whole.guide)).median(x), expected)
    file = io.BytesIO()
    torch.save(whole.guide.state_dict(), file)
    file.seek(0)
    fresh = Amortized(factor_model, encoder(3, 2, seed=5))
    fresh.load_state_dict(torch.load(file, weights_only=True))
    torch.testing.assert_close(fresh.median(x), expected)


# Errors


def two_plates(x: Tensor) -> None:
    with pyro.plate("a", len(x)):
        pyro.sample("y", dist.Normal(0.0, 1.0))
    with pyro.plate("b", 3):
        pyro.sample("z", dist.Normal(0.0, 1.0))


def outside(x: Tensor) -> None:
    pyro.sample("weight", dist.Normal(0.0, 1.0))
    factor_model(x)


class Bad(nn.Module):
    def __init__(self, result: Any) -> None:
        super().__init__()
        self.result = result

    def forward(self, x: Tensor) -> Any:
        return self.result


@pytest.mark.parametrize(
    ("model", "network", "options", "match"),
    [
        (outside, (3, 2), {}, "'weight' lies in no plate.*AutoGuideList"),
        (two_plates, (3, 2), {}, "'y', 'z' share no plate"),
        (factor_model, (3, 2), {"plate": "column"}, "plate 'column' does not hold all.*row"),
        (factor_model, (3, 3), {}, r"location is \(6, 3\); expected \(rows, 2\).*'z' 2"),
        (factor_model, Bad(torch.zeros(6, 2)), {}, "must give location and scale.*gave a Tensor"),
        (factor_model, Bad((torch.zeros(6, 2), 1.0)), {}, "scale is float"),
        (factor_model, Bad({"w": None}), {}, r"gave sites \['w'\], the model has the latent sites \['z'\]"),
        (factor_model, (3, 2), {"inputs": lambda x: x.tolist()}, "input is a list"),
    ],
)
def test_what_does_not_fit_is_named(model: Any, network: Any, options: Any, match: str) -> None:
    guide = Amortized(model, encoder(*network) if isinstance(network, tuple) else network, **options)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
    with pytest.raises(ModelError, match=match):
        svi.step(data(6))


def test_encoder_that_is_no_module() -> None:
    with pytest.raises(ArgumentError, match=r"encoder must be a torch\.nn\.Module .*got function"):
        Amortized(factor_model, lambda x: x)  # type: ignore[arg-type]
