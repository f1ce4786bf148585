"""Importance-weighted bounds: weights of every data point, gradients whose signal grows, agreement with Pyro."""

from __future__ import annotations

import math
from functools import partial
from itertools import pairwise
from typing import Any

import pyro
import pyro.distributions as dist
import pyro.infer
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI
from pyro.infer.autoguide import AutoNormal
from pyro.poutine.messenger import Messenger
from torch import Tensor

import pyro_vi_lab as vl
from pyro_vi_lab.errors import ArgumentError, ModelError
from pyro_vi_lab.guides import MeanFieldNormal
from tests.objectives.programs import (
    NORMAL,
    PROGRAMS,
    STANDARD_ERRORS,
    Autoencoder,
    Y,
    global_model,
    gradient,
    positive,
)


@pytest.fixture(autouse=True)
def double() -> None:
    torch.set_default_dtype(torch.float64)


# A linear Gaussian model with local latent sites: z ~ N(0, 1), y ~ N(z, 1), so z | y ~ N(y/2, 1/2), y ~ N(0, 2)


def linear(y: Tensor) -> None:
    with pyro.plate("row", len(y)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(z, 1.0), obs=y)


def log_evidence(y: Tensor) -> Tensor:
    return dist.Normal(0.0, 2**0.5).log_prob(y)


def posterior(y: Tensor, shift: float = 0.0, width: float = 1.0) -> None:
    loc = pyro.param("loc", lambda: 0.5 * y + shift)
    scale = pyro.param("scale", lambda: torch.full_like(y, width * 0.5**0.5), constraint=dist.constraints.positive)
    with pyro.plate("row", len(y)):
        pyro.sample("z", dist.Normal(loc, scale))


def at_once(objective: Any, *args: Any, **options: Any) -> Any:
    return objective(*args, vectorize_particles=True, max_plate_nesting=1, **options)


def weights(y: Tensor, num_particles: int, **options: float) -> Tensor:
    """Log weights of new draws, ``(K, N)``, by hand."""
    loc, scale = 0.5 * y + options.get("shift", 0.0), options.get("width", 1.0) * 0.5**0.5
    z = loc + scale * torch.randn(num_particles, len(y))
    return dist.Normal(0.0, 1.0).log_prob(z) + dist.Normal(z, 1.0).log_prob(y) - dist.Normal(loc, scale).log_prob(z)


@pytest.mark.parametrize("num_particles", [1, 2, 7])
@pytest.mark.parametrize("make", [vl.IWAE, lambda num, **options: vl.RenyiELBO(0.3, num, **options)])
def test_where_the_guide_is_the_posterior_the_bound_is_the_evidence(num_particles: int, make: Any) -> None:
    for objective in (make(num_particles), at_once(make, num_particles)):
        for _ in range(3):
            assert objective.loss(linear, posterior, Y) == pytest.approx(-log_evidence(Y).sum().item(), rel=1e-12)


def test_the_bound_grows_from_the_elbo_to_the_evidence_for_every_point() -> None:
    """Rows are alike, so that their mean is over as many independent bounds."""
    y = torch.full((4000,), 0.8)
    guide = lambda y: posterior(y, shift=0.8, width=0.7)  # noqa: E731
    found = [-at_once(vl.ELBO, 1).loss(linear, guide, y) / len(y)]
    found += [-at_once(vl.IWAE, num).loss(linear, guide, y) / len(y) for num in (2, 8, 64, 256)]
    evidence = log_evidence(y)[0].item()
    errors = [
        (torch.logsumexp(weights(y, num, shift=0.8, width=0.7), 0) - math.log(num)).std().item() / len(y) ** 0.5
        for num in (1, 2, 8, 64, 256)
    ]
    for (lower, upper), error in zip(pairwise(found), errors, strict=False):
        assert upper - lower > STANDARD_ERRORS * error
    assert all(value < evidence + STANDARD_ERRORS * error for value, error in zip(found, errors, strict=True))
    variance = weights(y, 1, shift=0.8, width=0.7).exp().var() / evidence**2  # the gap is about var(w) / (2 K)
    assert evidence - found[-1] < STANDARD_ERRORS * errors[-1] + variance.item() * math.exp(-2 * evidence) / 256


def test_weights_are_those_of_each_point_and_not_joint() -> None:
    """The bound of jointly weighted draws is far below with many points."""
    y = torch.linspace(-2, 2, 200)
    guide = lambda y: posterior(y, shift=0.8)  # noqa: E731
    found = -at_once(vl.IWAE, 16).loss(linear, guide, y)
    log_w = torch.stack([weights(y, 16, shift=0.8) for _ in range(100)])
    by_point = (torch.logsumexp(log_w, 1) - math.log(16)).sum(-1)
    joint = torch.logsumexp(log_w.sum(-1), 1) - math.log(16)
    assert abs(found - by_point.mean()) < STANDARD_ERRORS * by_point.std()
    assert found - joint.mean() > 2 * STANDARD_ERRORS * by_point.std()


# --- against Pyro, whose weights are the same without subsampling -----------------------------------------------------


@pytest.mark.parametrize("name", ["global", "local", "masked", "nested"])
@pytest.mark.parametrize("alpha", [-0.5, 0.0, 0.4, 2.0])
@pytest.mark.parametrize("vectorize", [False, True])
def test_loss_and_plain_gradient_are_those_of_pyro(name: str, alpha: float, vectorize: bool) -> None:
    program = PROGRAMS[name]
    guide = program.guide(NORMAL)
    program.model(), guide()
    options = {"num_particles": 4, "vectorize_particles": vectorize, "max_plate_nesting": 2}
    ours, theirs = vl.RenyiELBO(alpha, gradient="reparam", **options), pyro.infer.RenyiELBO(alpha, **options)
    for seed in range(3):
        losses = []
        for objective in (ours, theirs):
            pyro.set_rng_seed(seed)
            losses.append(objective.loss(program.model, guide))
        assert losses[0] == pytest.approx(losses[1], rel=1e-10)
        torch.testing.assert_close(
            gradient(ours, program.model, guide, seed=seed), gradient(theirs, program.model, guide, seed=seed)
        )


def test_one_particle_is_the_elbo() -> None:
    guide = PROGRAMS["nested"].guide(NORMAL)
    model = PROGRAMS["nested"].model
    model(), guide()
    for alpha in (0.0, 0.5):
        one, two = (gradient(o, model, guide, seed=1) for o in (vl.RenyiELBO(alpha, 1), vl.ELBO()))
        torch.testing.assert_close(one, two)


# --- orders -----------------------------------------------------------------------------------------------------------


def test_orders_zero_and_one_are_iwae_and_elbo() -> None:
    program = PROGRAMS["local"]
    guide = program.guide(NORMAL)
    program.model(), guide()

    def outcome(objective: Any) -> tuple[float, Tensor]:
        found = gradient(objective, program.model, guide, seed=3)
        pyro.set_rng_seed(3)
        return objective.loss(program.model, guide), found

    for vectorize in (False, True):
        options = {"vectorize_particles": vectorize, "max_plate_nesting": 1}
        for kind in ("dreg", "reparam"):
            zero = outcome(vl.RenyiELBO(0.0, 6, gradient=kind, **options))
            torch.testing.assert_close(zero, outcome(vl.IWAE(6, gradient=kind, **options)))
            elbo = outcome(vl.ELBO(6, gradient="stl" if kind == "dreg" else kind, **options))
            torch.testing.assert_close(outcome(vl.RenyiELBO(1.0, 6, gradient=kind, **options)), elbo)
            for alpha in (1 - 1e-6, 1 + 1e-6):
                near = outcome(vl.RenyiELBO(alpha, 6, gradient=kind, **options))
                torch.testing.assert_close(near, elbo, rtol=1e-4, atol=1e-4)


def test_the_bound_falls_with_the_order() -> None:
    losses = []
    for alpha in (-1.0, 0.0, 0.5, 1.0, 2.0):
        pyro.set_rng_seed(0)
        losses.append(vl.RenyiELBO(alpha, 8).loss(linear, lambda y: posterior(y, shift=0.4), Y))
    assert losses == sorted(losses)


# --- (b) signal and noise ---------------------------------------------------------------------------------------------


def signal_to_noise(kind: str, num_particles: int) -> Tensor:
    """|mean| / sd of the gradient for the location and the log scale of one row, from as many independent rows."""
    num_rows = 20_000
    y = torch.full((num_rows,), 0.8)
    pyro.clear_param_store()
    guide = lambda y: posterior(y, shift=0.3, width=1.2)  # noqa: E731
    guide(y)
    found = gradient(at_once(vl.IWAE, num_particles, gradient=kind), linear, guide, y, seed=0).reshape(2, num_rows)
    return found.mean(-1).abs() / found.std(-1)


def test_the_signal_of_dreg_grows_with_the_particles_and_that_of_the_plain_gradient_falls() -> None:
    """As √K and as 1/√K (Tucker et al. 2019, Section 5; Rainforth et al. 2018, Theorem 1)."""
    numbers = (1, 4, 16, 64)
    dreg, plain = (torch.stack([signal_to_noise(kind, num) for num in numbers]) for kind in ("dreg", "reparam"))
    error = STANDARD_ERRORS / 20_000**0.5
    assert (dreg[1:] > dreg[:-1] + error).all()
    assert (plain[1:] < plain[:-1]).all()
    assert (dreg > plain - error).all()
    assert (dreg[-1] > 4 * dreg[0]).all()
    assert (plain[-1] < plain[0] / 4).all()


# --- subsampling ------------------------------------------------------------------------------------------------------


class FixedNoise(Messenger):
    """Draws of the local site from noise that belongs to its rows, ``(K, N)``."""

    def __init__(self, eps: Tensor) -> None:
        super().__init__()
        self.eps = eps

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] == "z" and msg["value"] is None:
            msg["value"] = msg["fn"].loc + msg["fn"].scale * self.eps


def by_rows(y: Tensor, index: Tensor) -> None:
    with pyro.plate("row", len(y), subsample=index):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(z, positive("noise", 0.8)), obs=y[index])


def by_rows_guide(y: Tensor, index: Tensor) -> None:
    with pyro.plate("row", len(y), subsample=index):
        locs = pyro.param("locs", lambda: 0.4 * y)
        pyro.sample("z", dist.Normal(locs[index], 0.6))


@pytest.mark.parametrize("kind", ["dreg", "reparam"])
@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_minibatches_are_unbiased_over_a_pass(kind: str, alpha: float) -> None:
    """With the same noise of every row: the mean over minibatches is the whole, to rounding."""
    eps = torch.randn(5, len(Y))
    objective = at_once(vl.RenyiELBO, alpha, 5, gradient=kind)

    def outcome(index: Tensor) -> tuple[Tensor, Tensor]:
        with FixedNoise(eps[:, index]):
            found = gradient(objective, by_rows, by_rows_guide, Y, index, seed=0)
            return torch.tensor(objective.loss(by_rows, by_rows_guide, Y, index)), found

    by_rows(Y, torch.arange(6)), by_rows_guide(Y, torch.arange(6))
    losses, found = zip(*(outcome(index) for index in torch.tensor([[4, 0], [1, 3], [2, 5]])), strict=True)
    loss, whole = outcome(torch.arange(6))
    torch.testing.assert_close(torch.stack(losses).mean(), loss)
    torch.testing.assert_close(torch.stack(found).mean(0), whole)


def test_looped_particles_see_the_same_rows() -> None:
    rows = []

    def model(y: Tensor) -> None:
        with pyro.plate("row", len(y), subsample_size=2) as index:
            rows.append(index.tolist())
            pyro.sample("y", dist.Normal(pyro.sample("z", dist.Normal(0.0, 1.0)), 1.0), obs=y[index])

    def guide(y: Tensor) -> None:
        with pyro.plate("row", len(y), subsample_size=2) as index:
            rows.append(index.tolist())
            pyro.sample("z", dist.Normal(0.5 * y[index], 0.5**0.5))

    loss = vl.IWAE(4).loss(model, guide, Y)
    assert len(rows) == 8
    assert all(row == rows[0] for row in rows)
    assert loss == pytest.approx(-3 * log_evidence(Y[rows[0]]).sum().item())  # N/B outside of the logarithm


# --- structure --------------------------------------------------------------------------------------------------------


def test_global_and_local_sites_are_weighed_jointly() -> None:
    def model() -> None:
        mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        with pyro.plate("row", 3):
            pyro.sample("y", dist.Normal(pyro.sample("z", dist.Normal(mean, 1.0)), 1.0), obs=Y[:3])

    def guide() -> None:
        pyro.sample("mean", dist.Normal(0.2, 0.8))
        with pyro.plate("row", 3):
            pyro.sample("z", dist.Normal(0.3 * Y[:3], 1.0))

    pyro.set_rng_seed(1)
    log_w = []
    for _ in range(5):
        trace = poutine.trace(guide).get_trace()
        other = poutine.trace(poutine.replay(model, trace=trace)).get_trace()
        log_w.append(other.log_prob_sum() - trace.log_prob_sum())
    expected = torch.logsumexp(torch.stack(log_w), 0) - math.log(5)
    pyro.set_rng_seed(1)
    assert vl.IWAE(5).loss(model, guide) == pytest.approx(-expected.item())


def test_what_comes_before_the_latent_sites_is_outside_of_the_logarithm() -> None:
    """A term of the parameters alone, outside of the plate, does not make the weights joint."""

    def model(y: Tensor) -> None:
        pyro.factor("penalty", -positive("width", 2.0).log())
        linear(y)

    losses = [vl.IWAE(3, vectorize_particles=vectorize).loss(model, posterior, Y) for vectorize in (False, True)]
    assert losses == pytest.approx([math.log(2.0) - log_evidence(Y).sum().item()] * 2)
    slope = gradient(vl.IWAE(3), model, posterior, Y, seed=0)[-1]
    assert slope.item() == pytest.approx(1.0)  # of log width, in its unconstrained value


@pytest.mark.parametrize("scale", [0.01, 3.0])
def test_a_scale_of_all_sites_is_outside_of_the_logarithm(scale: float) -> None:
    program = PROGRAMS["local"]
    guide = program.guide(NORMAL)
    program.model(), guide()
    plain = gradient(vl.IWAE(5), program.model, guide, seed=2)
    scaled = gradient(vl.IWAE(5), poutine.scale(program.model, scale=scale), poutine.scale(guide, scale=scale), seed=2)
    torch.testing.assert_close(scaled, scale * plain)


def test_an_autoguide_with_plates_has_weights_of_each_point() -> None:
    guide = AutoNormal(linear)
    guide(Y)
    guide.locs.z.data.copy_(0.5 * Y)
    guide.scales.z = torch.full_like(Y, 0.5**0.5)
    assert vl.IWAE(4).loss(linear, guide, Y) == pytest.approx(-log_evidence(Y).sum().item())


def test_a_nested_module_trains_and_its_captured_steps_are_the_same() -> None:
    outcomes = []
    for wrap in (lambda objective: objective, partial(vl.Captured, compile=False)):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        vae = Autoencoder()
        loss = wrap(vl.IWAE(4, vectorize_particles=True))
        svi = SVI(vae.model, vae.guide, pyro.optim.Adam({"lr": 0.05}), loss=loss)
        losses = [svi.step(Y) for _ in range(15)]
        params = {name: value.detach().clone() for name, value in pyro.get_param_store().items()}
        outcomes.append((losses, params))
    assert sum(map(len, loss._graphs.values())) == 1
    torch.testing.assert_close(*outcomes, rtol=1e-7, atol=1e-9)
    assert sum(losses[-5:]) < sum(losses[:5])


# --- what it cannot take ----------------------------------------------------------------------------------------------


def test_sites_without_reparameterization_are_named() -> None:
    def model() -> None:
        pyro.sample("count", dist.Poisson(3.0))

    with pytest.raises(ModelError, match=r"guide site 'count' \(Poisson\) is not reparameterized.*IWAE takes none"):
        vl.IWAE(2).loss_and_grads(model, lambda: pyro.sample("count", dist.Poisson(2.0)))


def test_a_part_of_the_rows_with_a_global_site() -> None:
    program = PROGRAMS["global"]

    def model() -> None:
        mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        with pyro.plate("row", 6, subsample_size=2) as index:
            pyro.sample("y", dist.Normal(mean, 1.0), obs=Y[index])

    with pytest.raises(ModelError, match=r"sees 2 of the 6 rows of plate 'row', and site 'mean' lies outside"):
        vl.IWAE(2).loss(model, lambda: pyro.sample("mean", dist.Normal(0.0, 1.0)))

    def loop() -> None:
        for row in pyro.plate("row", 6, subsample_size=2):
            pyro.sample(f"y_{row}", dist.Normal(pyro.sample(f"z_{row}", dist.Normal(0.0, 1.0)), 1.0), obs=Y[row])

    def guide() -> None:
        for row in pyro.plate("row", 6, subsample_size=2):
            pyro.sample(f"z_{row}", dist.Normal(0.0, 1.0))

    with pytest.raises(ModelError, match=r"some of the 6 rows of plate 'row', and it is a loop of Python"):
        vl.RenyiELBO(0.5).loss(loop, guide)
    assert math.isfinite(vl.IWAE(3).loss(program.model, MeanFieldNormal(global_model)))


@pytest.mark.parametrize("alpha", ["half", None, math.nan, math.inf, True])
def test_wrong_orders(alpha: Any) -> None:
    with pytest.raises(ArgumentError, match="alpha must be a finite number, got"):
        vl.RenyiELBO(alpha)


@pytest.mark.parametrize("objective", [vl.ELBO, vl.IWAE, vl.PerSiteELBO])
@pytest.mark.parametrize("num_particles", [0, -1, 2.0, True, None])
def test_wrong_numbers_of_particles(objective: Any, num_particles: Any) -> None:
    with pytest.raises(ArgumentError, match="num_particles must be a whole number of at least 1"):
        objective(num_particles)


def test_an_unknown_gradient() -> None:
    with pytest.raises(ArgumentError, match="gradient must be 'dreg' or 'reparam', got 'stl'"):
        vl.IWAE(2, gradient="stl")  # type: ignore[arg-type]
