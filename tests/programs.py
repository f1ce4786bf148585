"""Small model/guide programs, one for everything that a Pyro program can do, and the objectives that fit each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions import constraints
from pyro.infer import (
    RenyiELBO,
    Trace_ELBO,
    TraceEnum_ELBO,
    TraceGraph_ELBO,
    TraceMeanField_ELBO,
    config_enumerate,
)
from pyro.infer.autoguide import (
    AutoDelta,
    AutoDiagonalNormal,
    AutoGuideList,
    AutoIAFNormal,
    AutoLowRankMultivariateNormal,
    AutoMultivariateNormal,
    AutoNormal,
    AutoNormalMessenger,
    init_to_median,
)
from pyro.nn import PyroModule, PyroParam, PyroSample
from torch import Tensor, nn

from pyro_vi_lab.objectives import ELBO, IWAE, PerSiteELBO

OBJECTIVES: Mapping[str, Callable[..., Any]] = {
    "trace": Trace_ELBO,
    "mean_field": TraceMeanField_ELBO,
    "graph": TraceGraph_ELBO,
    "enum": partial(TraceEnum_ELBO, strict_enumeration_warning=False),
    "renyi": partial(RenyiELBO, alpha=0.5),
    "stl": partial(ELBO, gradient="stl"),
    "reparam": partial(ELBO, gradient="reparam"),
    "closed": partial(ELBO, gradient="reparam", analytic_kl=True, analytic_entropy=True),
    "score": partial(ELBO, gradient="score", num_particles=2),
    "per_site": partial(PerSiteELBO, num_particles=2),
    "iwae": IWAE,
}
SMOOTH = ("trace", "mean_field", "graph", "renyi", "stl", "reparam")
SCORE = ("trace", "graph", "score", "per_site")

Pair = tuple[Callable[..., Any], Callable[..., Any]]


@dataclass(frozen=True)
class Program:
    """A model and a guide, made anew by each call of ``make``; the first objective is the one of the fast tests."""

    make: Callable[[], Pair]
    data: Callable[[], tuple[Any, ...]] = tuple
    objectives: tuple[str, ...] = SMOOTH
    kwargs: Callable[[], dict[str, Any]] = dict
    max_plate_nesting: int | None = None
    modules: Callable[[Any, Any], list[nn.Module]] = field(
        default=lambda model, guide: [part for part in (model, guide) if isinstance(part, nn.Module)]
    )


def numbers(*shape: int, seed: int = 5) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# --- supports and autoguides ------------------------------------------------------------------------------------------


def schools(y: Tensor, sigma: float) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("school", len(y)):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("y", dist.Normal(theta, sigma), obs=y)


def positive(y: Tensor) -> None:
    rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
    shape = pyro.sample("shape", dist.LogNormal(0.0, 1.0))
    with pyro.plate("row", len(y)):
        pyro.sample("y", dist.Gamma(shape, rate), obs=y.abs() + 0.1)


def interval(y: Tensor) -> None:
    p = pyro.sample("p", dist.Beta(2.0, 3.0))
    bound = pyro.sample("bound", dist.Uniform(-1.0, 4.0))
    with pyro.plate("row", len(y)):
        pyro.sample("y", dist.Bernoulli(p), obs=(y > 0).to(y.dtype))
        pyro.sample("x", dist.StudentT(3.0, bound, 1.0), obs=y)


def simplex(y: Tensor) -> None:
    weights = pyro.sample("weights", dist.Dirichlet(torch.ones(3)))
    with pyro.plate("row", len(y)):
        pyro.sample("y", dist.Categorical(weights), obs=torch.arange(len(y)) % 3)


def correlation(y: Tensor) -> None:
    factor = pyro.sample("factor", dist.LKJCholesky(3, 2.0))
    scale = pyro.sample("scale", dist.LogNormal(torch.zeros(3), 1.0).to_event(1))
    with pyro.plate("row", len(y)):
        pyro.sample("y", dist.MultivariateNormal(torch.zeros(3), scale_tril=scale.unsqueeze(-1) * factor), obs=y)


def ordered(y: Tensor) -> None:
    base = dist.Normal(torch.zeros(3), 1.0).to_event(1)
    cut = pyro.sample("cut", dist.TransformedDistribution(base, [dist.transforms.OrderedTransform()]))
    with pyro.plate("row", len(y)):
        pyro.sample("y", dist.OrderedLogistic(torch.zeros(len(y)), cut), obs=torch.arange(len(y)) % 4)


def process(x: Tensor, y: Tensor) -> None:
    length = pyro.sample("length", dist.LogNormal(0.0, 1.0))
    noise = pyro.sample("noise", dist.LogNormal(-1.0, 1.0))
    kernel = (-0.5 * ((x[:, None] - x) / length) ** 2).exp() + noise * torch.eye(len(x))
    pyro.sample("y", dist.MultivariateNormal(torch.zeros(len(x)), kernel), obs=y)


# --- structure --------------------------------------------------------------------------------------------------------


def nested(y: Tensor) -> None:
    a = pyro.plate("a", y.shape[0], dim=-2)
    b = pyro.plate("b", y.shape[1], dim=-1)
    with a:
        row = pyro.sample("row", dist.Normal(0.0, 1.0))
    with b:
        column = pyro.sample("column", dist.Normal(0.0, 1.0))
    with a, b:
        pyro.sample("y", dist.Normal(row + column, 1.0), obs=y)


def subsampled(y: Tensor) -> None:
    mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
    with pyro.plate("row", len(y), subsample_size=4) as index:
        pyro.sample("y", dist.Normal(mean, 1.0), obs=y[index])


def local(y: Tensor) -> None:
    mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
    with pyro.plate("row", len(y), subsample_size=4) as index:
        z = pyro.sample("z", dist.Normal(mean, 1.0))
        pyro.sample("y", dist.Normal(z, 0.5), obs=y[index])


def local_guide(y: Tensor) -> None:
    loc = pyro.param("mean_loc", torch.tensor(0.1))
    pyro.sample("mean", dist.Normal(loc, 0.3))
    with pyro.plate("row", len(y), subsample_size=4) as index:
        locs = pyro.param("locs", lambda: torch.zeros(len(y)))
        scales = pyro.param("scales", lambda: torch.ones(len(y)), constraint=constraints.positive)
        pyro.sample("z", dist.Normal(locs[index], scales[index]))


def by_row_guide(y: Tensor) -> None:
    pyro.sample("mean", dist.Normal(pyro.param("mean_loc", torch.tensor(0.1)), 0.3))
    with pyro.plate("row", len(y), subsample_size=4):
        locs = pyro.param("locs", lambda: torch.zeros(len(y)), event_dim=0)  # Pyro takes the rows of the subsample
        pyro.sample("z", dist.Normal(locs, 1.0))


def scaled(y: Tensor) -> None:
    with poutine.scale(scale=2.5):
        schools(y, 1.0)


def masked(y: Tensor, seen: Tensor) -> None:
    mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
    with pyro.plate("row", len(y)), poutine.mask(mask=seen):
        pyro.sample("y", dist.Normal(mean, 1.0), obs=y)


def partly_observed(y: Tensor, seen: Tensor) -> None:
    mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
    with pyro.plate("row", len(y)):
        pyro.sample("y", dist.Normal(mean, 1.0), obs=y, obs_mask=seen)


def factored(y: Tensor) -> None:
    x = pyro.sample("x", dist.Normal(0.0, 1.0))
    twice = pyro.deterministic("twice", 2 * x)
    pyro.factor("potential", -((twice - y.mean()) ** 2) - 0.1 * x**4)


def by_name(batch: dict[str, Tensor], *, scale: float = 1.0, extra: Tensor | None = None) -> None:
    slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
    with pyro.plate("row", len(batch["x"])):
        loc = slope * batch["x"] if extra is None else slope * batch["x"] + extra
        pyro.sample("y", dist.Normal(loc, scale), obs=batch["y"])


# --- discrete latents -------------------------------------------------------------------------------------------------


def mixture(y: Tensor) -> None:
    weights = pyro.sample("weights", dist.Dirichlet(torch.ones(2)))
    with pyro.plate("component", 2):
        locs = pyro.sample("locs", dist.Normal(0.0, 3.0))
    with pyro.plate("row", len(y)):
        kind = pyro.sample("kind", dist.Categorical(weights), infer={"enumerate": "parallel"})
        pyro.sample("y", dist.Normal(locs[kind], 1.0), obs=y)


def chain(y: Tensor) -> None:
    stay = pyro.sample("stay", dist.Beta(4.0, 2.0))
    state: Any = 0
    for t in pyro.markov(range(len(y))):
        move = torch.stack([torch.stack([stay, 1 - stay]), torch.stack([1 - stay, stay])])
        state = pyro.sample(f"state_{t}", dist.Categorical(move[state]), infer={"enumerate": "parallel"})
        pyro.sample(f"y_{t}", dist.Normal(2.0 * state, 1.0), obs=y[t])


def coins(y: Tensor) -> None:
    with pyro.plate("row", len(y)):
        z = pyro.sample("z", dist.Bernoulli(0.3))
        pyro.sample("y", dist.Normal(2 * z - 1, 1.0), obs=y)


def coins_guide(y: Tensor) -> None:
    p = pyro.param("p", lambda: torch.full((len(y),), 0.4), constraint=constraints.unit_interval)
    with pyro.plate("row", len(y)):
        pyro.sample("z", dist.Bernoulli(p))


def counts(y: Tensor) -> None:
    n = pyro.sample("n", dist.Poisson(3.0))
    rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
    with pyro.plate("row", len(y)):
        pyro.sample("y", dist.Normal(n, 1.0 / (0.1 + rate)), obs=y)


def counts_guide(y: Tensor, baseline: Mapping[str, Any] | None = None) -> None:
    rate = pyro.param("n_rate", torch.tensor(2.0), constraint=constraints.positive)
    infer = {"baseline": dict(baseline)} if baseline else {}
    pyro.sample("n", dist.Poisson(rate), infer=infer)
    shape = pyro.param("shape", torch.tensor(2.0), constraint=constraints.positive)
    pyro.sample("rate", dist.Gamma(shape, pyro.param("r_rate", torch.tensor(1.0), constraint=constraints.positive)))


def with_network_baseline() -> Pair:
    network = nn.Linear(8, 1)

    def guide(y: Tensor) -> None:
        pyro.module("baseline", network)
        baseline = {"nn_baseline": lambda x: network(x).squeeze(-1), "nn_baseline_input": y}
        counts_guide(y, baseline)

    return counts, guide


# --- parameters and modules -------------------------------------------------------------------------------------------


def constrained_guide(y: Tensor) -> None:
    loc = pyro.param("loc", torch.zeros(3))
    factor = pyro.param("factor", torch.eye(3), constraint=constraints.lower_cholesky)
    pyro.sample(
        "scale",
        dist.LogNormal(loc, pyro.param("s", torch.full((3,), 0.5), constraint=constraints.interval(0.1, 2.0))).to_event(
            1
        ),
    )
    pyro.param("unused", torch.ones(2), constraint=constraints.simplex)
    pyro.sample("shift", dist.MultivariateNormal(loc, scale_tril=factor))


def constrained(y: Tensor) -> None:
    scale = pyro.sample("scale", dist.LogNormal(torch.zeros(3), 1.0).to_event(1))
    shift = pyro.sample(
        "shift",
        dist.Normal(torch.zeros(3), pyro.param("prior", torch.tensor(1.0), constraint=constraints.positive)).to_event(
            1
        ),
    )
    with pyro.plate("row", len(y)):
        pyro.sample("y", dist.Normal(shift, scale).to_event(1), obs=y)


class Regression(PyroModule):
    """A Bayesian network: PyroSample weights, a PyroParam noise and a plain layer."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = PyroModule[nn.Linear](2, 3)
        self.layer.weight = PyroSample(dist.Normal(0.0, 1.0).expand([3, 2]).to_event(2))
        self.layer.bias = PyroSample(lambda self: dist.Normal(0.0, 1.0).expand([3]).to_event(1))
        self.head = nn.Linear(3, 1)
        self.noise = PyroParam(torch.tensor(0.7), constraint=constraints.positive)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        mean = self.head(torch.tanh(self.layer(x))).squeeze(-1)
        with pyro.plate("row", len(x)):
            pyro.sample("y", dist.Normal(mean, self.noise), obs=y)
        return mean


class Autoencoder(nn.Module):
    """An amortized guide and a decoder, registered with pyro.module; model and guide are methods."""

    def __init__(self, *layers: Callable[[], nn.Module], hidden: int = 4) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Linear(3, hidden), *(make() for make in layers), nn.Tanh(), nn.Linear(hidden, 4)
        )
        self.decoder = nn.Sequential(
            nn.Linear(2, hidden), *(make() for make in layers), nn.Tanh(), nn.Linear(hidden, 3)
        )

    def model(self, x: Tensor) -> None:
        pyro.module("decoder", self.decoder)
        with pyro.plate("row", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(x), 2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.decoder(z), 1.0).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        pyro.module("encoder", self.encoder)
        with pyro.plate("row", len(x)):
            loc, scale = self.encoder(x).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, scale.exp()).to_event(1))


def autoencoder(*layers: Callable[[], nn.Module], training: bool = True) -> Pair:
    vae = Autoencoder(*layers)
    vae.train(training)
    return vae.model, vae.guide


def owner_modules(model: Any, guide: Any) -> list[nn.Module]:
    return [model.__self__]


def flow_prior() -> Pair:
    prior = dist.transforms.affine_autoregressive(2, hidden_dims=[4])
    posterior = dist.transforms.affine_autoregressive(2, hidden_dims=[4])

    def latent(name: str, transform: Any) -> Tensor:
        pyro.module(name, transform)
        base = dist.Normal(torch.zeros(2), 1.0).to_event(1)
        z: Tensor = pyro.sample("z", dist.TransformedDistribution(base, [transform]))
        return z

    def model(y: Tensor) -> None:
        pyro.sample("y", dist.Normal(latent("prior", prior), 0.5).to_event(1), obs=y)

    return model, lambda y: latent("posterior", posterior)


def auto(guide: Callable[..., Any], model: Callable[..., Any], **options: Any) -> Callable[[], Pair]:
    return lambda: (model, guide(model, **options))


def mixture_pair() -> Pair:
    return mixture, AutoNormal(poutine.block(mixture, hide=["kind"]))


def chain_pair() -> Pair:
    return chain, AutoDelta(poutine.block(chain, expose=["stay"]))


def listed() -> Pair:
    guide = AutoGuideList(constrained)
    guide.append(AutoDelta(poutine.block(constrained, expose=["scale"])))
    guide.append(AutoMultivariateNormal(poutine.block(constrained, expose=["shift"])))
    return constrained, guide


def regression() -> Pair:
    model = Regression()
    return model, AutoNormal(model)


def rows() -> tuple[Tensor, ...]:
    return (numbers(8),)


PROGRAMS: Mapping[str, Program] = {
    "schools": Program(auto(AutoNormal, schools), lambda: (numbers(8), 1.5)),
    "schools_full_rank": Program(auto(AutoMultivariateNormal, schools), lambda: (numbers(8), 1.5)),
    "positive": Program(auto(AutoNormal, positive), rows),
    "interval": Program(auto(AutoDiagonalNormal, interval), rows),
    "simplex": Program(auto(AutoMultivariateNormal, simplex), rows),
    "correlation": Program(auto(AutoNormal, correlation), lambda: (numbers(6, 3),)),
    "ordered": Program(auto(AutoLowRankMultivariateNormal, ordered, init_loc_fn=init_to_median), rows),
    "flow_guide": Program(auto(AutoIAFNormal, interval, hidden_dim=[4]), rows),
    "map": Program(auto(AutoDelta, correlation), lambda: (numbers(6, 3),), ("trace", "graph")),
    "process": Program(auto(AutoNormal, process), lambda: (torch.linspace(0, 1, 6), numbers(6))),
    "nested": Program(auto(AutoNormal, nested), lambda: (numbers(3, 4),)),
    "subsampled": Program(auto(AutoNormal, subsampled), lambda: (numbers(10),)),
    "local": Program(lambda: (local, local_guide), lambda: (numbers(10),), (*SMOOTH, "closed")),
    "by_row": Program(lambda: (local, by_row_guide), lambda: (numbers(10),)),
    "scaled": Program(auto(AutoNormal, scaled), rows),
    "scaled_from_outside": Program(
        lambda: (poutine.scale(schools, 0.5), poutine.scale(AutoNormal(schools), 0.5)), lambda: (numbers(8), 1.5)
    ),
    "masked": Program(auto(AutoNormal, masked), lambda: (numbers(8), numbers(8, seed=6) > 0)),
    "partly_observed": Program(auto(AutoNormal, partly_observed), lambda: (numbers(8), numbers(8, seed=6) > 0)),
    "factored": Program(auto(AutoNormal, factored), rows),
    "by_name": Program(
        auto(AutoNormal, by_name),
        lambda: ({"x": numbers(8), "y": numbers(8, seed=6)},),
        kwargs=lambda: {"scale": 0.5, "extra": numbers(8, seed=7)},
    ),
    "mixture": Program(mixture_pair, rows, ("enum",), max_plate_nesting=1),
    "chain": Program(chain_pair, rows, ("enum",), max_plate_nesting=0),
    "enumerated_guide": Program(lambda: (coins, config_enumerate(coins_guide)), rows, ("enum",), max_plate_nesting=1),
    "sequential": Program(
        lambda: (coins, config_enumerate(coins_guide, default="sequential")),
        lambda: (numbers(3),),
        ("enum",),
        max_plate_nesting=1,
    ),
    "coins": Program(lambda: (coins, coins_guide), rows, SCORE),
    "counts": Program(lambda: (counts, counts_guide), rows, SCORE),
    "decaying_baseline": Program(
        lambda: (counts, partial(counts_guide, baseline={"use_decaying_avg_baseline": True, "baseline_beta": 0.8})),
        rows,
        ("graph",),
    ),
    "network_baseline": Program(with_network_baseline, rows, ("graph",)),
    "constrained": Program(
        lambda: (constrained, constrained_guide), lambda: (numbers(6, 3),), ("trace", "graph", "renyi", "stl")
    ),
    "listed": Program(listed, lambda: (numbers(6, 3),), ("trace", "graph")),
    "messenger": Program(auto(AutoNormalMessenger, nested), lambda: (numbers(3, 4),), ("trace",)),
    "regression": Program(regression, lambda: (numbers(8, 2), numbers(8))),
    "flow_prior": Program(flow_prior, lambda: (numbers(2),), ("trace", "graph", "renyi")),
    "autoencoder": Program(
        autoencoder, lambda: (numbers(5, 3),), (*SMOOTH, "closed", "per_site", "iwae"), modules=owner_modules
    ),
    "batch_norm": Program(
        partial(autoencoder, partial(nn.BatchNorm1d, 4)),
        lambda: (numbers(5, 3),),
        ("trace", "mean_field"),
        modules=owner_modules,
    ),
    "batch_norm_eval": Program(
        partial(autoencoder, partial(nn.BatchNorm1d, 4), training=False),
        lambda: (numbers(5, 3),),
        ("trace",),
        modules=owner_modules,
    ),
    "dropout": Program(
        partial(autoencoder, partial(nn.Dropout, 0.3)),
        lambda: (numbers(5, 3),),
        ("trace", "mean_field"),
        modules=owner_modules,
    ),
}
