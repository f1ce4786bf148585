from __future__ import annotations

import importlib
import itertools
import math
import random
import subprocess
import sys
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy import stats
from torch import Tensor
from torch.distributions import constraints

import pyro_vi_lab as vl
from pyro_vi_lab import arviz_bridge, nutpie_bridge
from pyro_vi_lab.errors import ArgumentError, CompileError, ModelError
from pyro_vi_lab.models import build
from pyro_vi_lab.models.eight_schools import EFFECTS
from pyro_vi_lab.models.eight_schools import STANDARD_ERRORS as SIGMA
from pyro_vi_lab.native import NativeFunction, compiler, say_no_compiler

nuts_module = importlib.import_module("pyro_vi_lab.nuts")  # the package has a function of that name
STANDARD_ERRORS = 5  # fails a right answer once in two million
BACKENDS = ("nutpie", "pyro")
each_backend = pytest.mark.parametrize("backend", BACKENDS)

LOC = torch.tensor([1.0, -2.0, 300.0], dtype=torch.float64)
COVARIANCE = torch.tensor([[1.0, 0.8, 0.0], [0.8, 2.0, -1.0], [0.0, -1.0, 50.0]], dtype=torch.float64)


def normal() -> None:
    pyro.sample("x", dist.MultivariateNormal(LOC, COVARIANCE))


def positive() -> None:
    x = pyro.sample("x", dist.Gamma(3.0, 2.0))
    pyro.deterministic("twice", 2 * x)


def two_islands() -> None:
    """Two modes with nothing between them."""
    x = pyro.sample("x", dist.ImproperUniform(constraints.real, (), ()))
    pyro.factor("islands", torch.stack([-((x + 500) ** 2) / 2, -((x - 500) ** 2) / 2]).logsumexp(0))


def draw(problem: vl.Problem | Callable[[], None], **options: Any) -> vl.Posterior:
    settings = {"num_chains": 2, "num_warmup": 300, "num_draws": 500, "progress": False, **options}
    return vl.nuts(problem if isinstance(problem, vl.Problem) else vl.Problem(problem), **settings)


def assert_mean(values: Tensor, expected: Any) -> None:
    """The mean of draws ``(C, S, *shape)`` is the expected one, within its Monte Carlo standard errors."""
    error = arviz_bridge.mcse(values.numpy())
    assert (np.abs(values.mean((0, 1)).numpy() - np.asarray(expected)) <= STANDARD_ERRORS * error).all()


# Right answers


@each_backend
def test_normal(backend: Any) -> None:
    posterior = draw(normal, backend=backend, num_draws=400)
    x = posterior.draws["x"]
    assert x.shape == (2, 400, 3)
    assert_mean(x, LOC)
    centered = x - LOC
    assert_mean(centered.unsqueeze(-1) * centered.unsqueeze(-2), COVARIANCE)


def eight_schools_moments() -> dict[str, tuple[float, float]]:
    """Mean and mean square of mu and log tau, on a grid: given both, each y is N(mu, sigma² + tau²)."""
    mu, log_tau = np.linspace(-30, 40, 701)[:, None], np.linspace(-9, 5, 1401)[None, :]
    tau = np.exp(log_tau)
    log_p = stats.norm(0, 5).logpdf(mu) + stats.halfcauchy(scale=5).logpdf(tau) + log_tau
    for y, sigma in zip(EFFECTS, SIGMA, strict=True):
        log_p = log_p + stats.norm(mu, np.hypot(sigma, tau)).logpdf(y)
    p = np.exp(log_p - log_p.max())
    p /= p.sum()
    return {
        "mu": (float((p * mu).sum()), float((p * mu**2).sum())),
        "log_tau": (float((p * log_tau).sum()), float((p * log_tau**2).sum())),
    }


@pytest.mark.parametrize(
    ("backend", "num_draws"), [("nutpie", 1000), pytest.param("pyro", 1000, marks=pytest.mark.slow)]
)
def test_eight_schools(backend: Any, num_draws: int) -> None:
    posterior = draw(build("eight_schools"), backend=backend, num_warmup=500, num_draws=num_draws, seed=2)
    values = {"mu": posterior.draws["mu"], "log_tau": posterior.draws["tau"].log()}
    for name, (mean, mean_square) in eight_schools_moments().items():
        assert_mean(values[name], mean)
        assert_mean(values[name].square(), mean_square)
    theta = posterior.draws["mu"].unsqueeze(-1) + posterior.draws["tau"].unsqueeze(-1) * posterior.draws["theta_trans"]
    torch.testing.assert_close(posterior.draws["theta"], theta)


@each_backend
def test_both_backends_of_a_constrained_site(backend: Any) -> None:
    posterior = draw(positive, backend=backend)
    x = posterior.draws["x"]
    assert (x > 0).all()
    assert_mean(x, 1.5)
    assert_mean(x.square(), 3.0)  # a (a + 1) / b²
    torch.testing.assert_close(posterior.draws["twice"], 2 * x)


def test_flat_priors_a_raw_scale_and_summed_out_sites() -> None:
    """Least squares: the posterior of flat priors is N(estimate, covariance); a coin that does nothing is summed out."""
    x = torch.linspace(0, 100, 20, dtype=torch.float64)
    y = 7 + 3 * x + 10 * torch.sin(5 * x)

    def model(x: Tensor, y: Tensor) -> None:
        pyro.sample("coin", dist.Bernoulli(0.3))
        beta = pyro.sample("beta", dist.ImproperUniform(constraints.real_vector, (), (2,)))
        with pyro.plate("row", len(y)):
            pyro.sample("y", dist.Normal(beta[0] + beta[1] * x, 10.0), obs=y)

    beta = draw(vl.Problem(model, x, y), num_draws=1000).draws["beta"]
    X = torch.stack([torch.ones_like(x), x], -1)
    covariance = 100 * torch.linalg.inv(X.T @ X)
    expected = covariance @ X.T @ y / 100
    assert_mean(beta, expected)
    assert_mean((beta - expected).square(), covariance.diagonal())


def test_dependent_support() -> None:
    """a ~ Beta(1, 2), b uniform below 1 - a: with what is left a Dirichlet(1, 1, 1)."""

    def model() -> None:
        a = pyro.sample("a", dist.Beta(1.0, 2.0))
        pyro.sample("b", dist.Uniform(0.0, 1.0 - a))

    draws = draw(model, num_draws=1000).draws
    assert (draws["a"] + draws["b"] < 1).all()
    for name in ("a", "b"):
        assert_mean(draws[name], 1 / 3)
        assert_mean(draws[name].square(), 1 / 6)


@pytest.mark.filterwarnings("ignore:.*eager tier.*:pyro_vi_lab.errors.LabWarning")
def test_model_that_cannot_be_captured() -> None:
    def model() -> None:
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        pyro.factor("branch", -torch.nn.functional.softplus(x) if float(x.detach()) > -1e9 else x)

    posterior = draw(model, num_warmup=20, num_draws=20)
    assert posterior.draws["x"].shape == (2, 20)


def test_single_precision_model() -> None:
    layer = torch.nn.Linear(1, 1)  # float32

    def model(y: Tensor) -> None:
        x = pyro.sample("x", dist.Normal(torch.zeros(1), 1.0).to_event(1))
        pyro.sample("y", dist.Normal(layer(x), 1.0).to_event(1), obs=y)

    with pytest.warns(vl.LabWarning, match=r"torch\.float32"):
        problem = vl.Problem(model, torch.tensor([1.0]))
    for backend in BACKENDS:
        posterior = draw(problem, backend=backend, num_warmup=50, num_draws=20)
        assert posterior.draws["x"].dtype == torch.float32


# What it gives


@each_backend
def test_stats_and_info(backend: Any) -> None:
    problem = vl.Problem(normal)
    posterior = draw(problem, backend=backend, num_warmup=100, num_draws=40, seed=3, target_accept=0.85)
    names = {"diverging", "step_size", "lp"}
    if backend == "nutpie":
        names |= {"energy", "tree_depth", "acceptance_rate", "n_steps"}
    assert set(posterior.stats) == names
    assert {value.shape for value in posterior.stats.values()} == {(2, 40)}
    assert posterior.stats["diverging"].dtype == torch.bool
    assert (posterior.stats["step_size"] > 0).all()
    z = posterior.unconstrained
    assert z is not None
    assert z.shape == (2, 40, 3)
    torch.testing.assert_close(posterior.stats["lp"].double(), problem.density().log_prob(z), rtol=1e-5, atol=1e-4)
    for name, value in problem.density().constrain(z).items():
        torch.testing.assert_close(posterior.draws[name], value)
    assert posterior.method == "nuts"
    info = dict(posterior.info)
    assert info.pop("seconds") > 0
    total, warmup = info.pop("num_gradients"), info.pop("warmup_gradients")
    assert total > 2 * 140
    assert 2 * 100 <= warmup < total - 2 * 40 + 1
    assert info == {
        "seed": 3,
        "backend": backend,
        "tier": "graph",
        "start": "uniform",
        "num_warmup": 100,
        "target_accept": 0.85,
    }


def test_gradients_are_counted() -> None:
    """Every leapfrog step is one, and those of the warm-up come on top."""
    posterior = draw(normal)
    assert posterior.info["num_gradients"] > int(posterior.stats["n_steps"].sum())


@each_backend
def test_same_seed_same_draws(backend: Any) -> None:
    draws = []
    for session, seed in ((1, 5), (2, 5), (3, 6)):
        pyro.set_rng_seed(session)
        draws.append(draw(normal, backend=backend, num_warmup=50, num_draws=20, seed=seed).draws["x"])
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    assert not torch.equal(draws[0][0], draws[0][1])  # and the chains are not one another's copies


# Starts


@each_backend
def test_start_from_a_fit(backend: Any) -> None:
    """Chains stay on the island where the fit is; uniform starts would not even find it."""
    problem = vl.Problem(two_islands)
    guide = vl.guides.FullRankNormal(two_islands, init_loc_fn=lambda site: torch.tensor(510.0, dtype=torch.float64))
    fit = vl.fit(problem, guide, progress=False)
    assert fit.loc.item() == pytest.approx(500, abs=1e-3)
    posterior = draw(problem, backend=backend, start=fit, num_warmup=100, num_draws=300)
    assert posterior.info["start"] == fit.method
    x = posterior.draws["x"]
    assert_mean(x, 500.0)
    assert (x - 500).abs().max() < 6


def test_start_from_any_draws() -> None:
    """Mean and covariance of draws of the sites; where there are few, the variances only."""
    problem, density = vl.Problem(normal), vl.Problem(normal).density()
    exact = LOC + torch.randn(1, 500, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64) @ (
        torch.linalg.cholesky(COVARIANCE).T
    )
    start = vl.Posterior({"x": exact}, method="exact")
    params = nuts_module._moments(density, start)
    torch.testing.assert_close(params.loc, exact[0].mean(0))
    torch.testing.assert_close(params.scale @ params.scale.T, torch.cov(exact[0].T))
    few = nuts_module._moments(density, vl.Posterior({"x": exact[:, :5]}))
    torch.testing.assert_close(few.scale, torch.diag(exact[0, :5].std(0)))
    posterior = draw(problem, start=start, num_warmup=None, num_draws=400)
    assert_mean(posterior.draws["x"], LOC)
    assert posterior.info["start"] == "exact"
    assert posterior.info["num_warmup"] == nuts_module.WARM_NUM_WARMUP
    assert nuts_module.WARM_NUM_WARMUP < nuts_module.NUM_WARMUP


def test_draws_that_are_no_start() -> None:
    still = torch.ones(1, 50, 3, dtype=torch.float64)
    with pytest.raises(ArgumentError, match=r"start does not move along x\[0\]: it needs draws of a distribution"):
        draw(normal, start=vl.Posterior({"x": still}))
    with pytest.raises(ArgumentError, match="no value for latent site 'x'"):
        draw(normal, start=vl.Posterior({"y": still}))


def test_fit_of_another_problem() -> None:
    fit = vl.fit(vl.Problem(positive), progress=False)
    with pytest.raises(ArgumentError, match="start has 1 dimensions, problem normal has 3"):
        draw(normal, start=fit)


@each_backend
def test_no_start_names_the_site(backend: Any) -> None:
    def model() -> None:
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        pyro.factor("impossible", (x.square() - x.square()).log())

    with pytest.raises(ModelError, match=r"no start with a finite log density in 100 tries.*site 'impossible'"):
        draw(model, backend=backend)


def test_starts_are_tried_until_one_is_finite() -> None:
    """A density on a tenth of the starting range."""

    def model() -> None:
        x = pyro.sample("x", dist.Uniform(-2.0, 2.0))
        pyro.factor("piece", torch.where(x > 1.2, -1e3 * (x - 1.5) ** 2, -math.inf))

    x = draw(model).draws["x"]
    assert (x > 1.2).all()
    assert_mean(x, 1.5)


# Tiers


needs_compiler = pytest.mark.skipif(compiler() is None, reason="no C compiler")


@needs_compiler
@each_backend
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_machine_code_draws_from_the_same_posterior(backend: Any, dtype: torch.dtype) -> None:
    def model(y: Tensor) -> None:
        x = pyro.sample("x", dist.Normal(torch.zeros(2, dtype=dtype), 1.0).to_event(1))
        pyro.sample("y", dist.Normal(x, 2.0).to_event(1), obs=y)

    y = torch.tensor([5.0, -10.0], dtype=dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", vl.LabWarning)  # single precision
        posterior = draw(vl.Problem(model, y), backend=backend, compile=True, num_draws=400)
    assert posterior.info["tier"] == "native"
    assert posterior.info["num_gradients"] > 2 * 700
    x = posterior.draws["x"].double()
    assert_mean(x, y.double() / 5)
    assert_mean((x - y / 5).square(), [0.8, 0.8])


@needs_compiler
def test_compiled_chains_are_the_same_for_the_same_seed() -> None:
    one, same, other = (draw(normal, compile=True, seed=seed).draws["x"] for seed in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


@needs_compiler
def test_compiling_must_pay() -> None:
    problem = build("eight_schools")
    few = draw(problem, num_chains=1, num_warmup=5, num_draws=5)
    many = draw(problem, num_chains=4, num_warmup=1000, num_draws=1000)
    never = draw(problem, num_chains=1, num_warmup=5, num_draws=5, compile=False)
    assert [one.info["tier"] for one in (few, many, never)] == ["graph", "native", "graph"]
    assert many.problems() == []


def test_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("CC", "CXX"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(nuts_module, "GRAPH_SECONDS_PER_NODE", 1e6)
    say_no_compiler.cache_clear()  # it is said once
    with pytest.warns(vl.LabWarning, match="no C compiler was found"):
        posterior = draw(normal, num_warmup=20, num_draws=20)
    assert posterior.info["tier"] == "graph"
    with pytest.raises(CompileError, match="no C compiler"):
        draw(normal, compile=True)


@needs_compiler
def test_an_operator_that_cannot_be_compiled() -> None:
    def model() -> None:
        x = pyro.sample("x", dist.Normal(torch.zeros(2, 2, dtype=torch.float64), 1.0).to_event(2))
        pyro.factor("norm", -torch.linalg.svdvals(x).sum())

    with pytest.raises(CompileError, match="_linalg_svd"):
        draw(model, compile=True)
    assert draw(model, num_warmup=20, num_draws=20).info["tier"] == "graph"


@pytest.mark.filterwarnings("ignore:.*eager tier.*:pyro_vi_lab.errors.LabWarning")
def test_a_model_without_a_graph_cannot_be_compiled() -> None:
    def model() -> None:
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        pyro.factor("branch", x if float(x.detach()) > 0 else -x)

    with pytest.raises(CompileError, match="eager tier"):
        draw(model, compile=True)
    assert draw(model, num_warmup=20, num_draws=20).info["tier"] == "eager"


@needs_compiler
def test_machine_code_that_disagrees_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(NativeFunction, "__call__", lambda self, z: (z.sum() + 1, z + 1))
    with pytest.warns(vl.LabWarning, match="machine code of model normal disagrees"):
        posterior = draw(normal, compile=True, num_warmup=20, num_draws=20)
    assert posterior.info["tier"] == "graph"


@needs_compiler
def test_a_nutpie_that_takes_no_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise TypeError("LogpFunc.__new__() takes 2 positional arguments")

    monkeypatch.setattr(nutpie_bridge._NativeModel, "__init__", refuse)
    with pytest.warns(vl.LabWarning, match=r"takes no C functions \(TypeError: LogpFunc"):
        posterior = draw(normal, compile=True)
    assert posterior.info["tier"] == "native"
    assert_mean(posterior.draws["x"], LOC)


WITHOUT_ARVIZ = """
import sys
import threading
import pyro, pyro.distributions as dist
import pyro_vi_lab as vl
problem = vl.Problem(lambda: pyro.sample("x", dist.Normal(3.0, 2.0)))
draws = vl.nuts(problem, num_chains=2, num_warmup=200, num_draws=200, compile=True).draws["x"]
assert draws.shape == (2, 200) and "arviz" not in sys.modules
from nutpie import _lib, sample
assert _lib.PyMcModel is sys.modules["nutpie._lib"].PyMcModel
"""


@needs_compiler
def test_machine_code_is_sampled_without_an_import_of_arviz() -> None:
    subprocess.run([sys.executable, "-c", WITHOUT_ARVIZ], check=True, timeout=300)


@pytest.mark.parametrize("value", [2, "always", None])
def test_compile_is_yes_no_or_auto(value: Any) -> None:
    with pytest.raises(ArgumentError, match="compile must be True, False or 'auto'"):
        draw(normal, compile=value)


# Arguments


def test_unknown_backend() -> None:
    with pytest.raises(ArgumentError, match="unknown backend 'nutpi': did you mean 'nutpie'"):
        draw(normal, backend="nutpi")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *itertools.product(["num_chains", "num_warmup", "num_draws"], [0, -1, 2.5, True]),
        *(("num_chains", None), ("num_draws", None)),
    ],
)
def test_counts(name: str, value: Any) -> None:
    with pytest.raises(ArgumentError, match=f"{name} must be a whole number of at least 1, got {value}"):
        draw(normal, **{name: value})


@pytest.mark.parametrize("value", [0.0, 1.0, -0.5, math.nan])
def test_target_accept(value: float) -> None:
    with pytest.raises(ArgumentError, match="target_accept is a rate between 0 and 1, got"):
        draw(normal, target_accept=value)


def test_model_instead_of_a_problem() -> None:
    with pytest.raises(ArgumentError, match=r"problem must be a pyro_vi_lab\.Problem, got function; wrap it"):
        vl.nuts(normal)  # type: ignore[arg-type]


# What it leaves behind


@each_backend
def test_global_state_is_left_as_found(backend: Any, capfd: pytest.CaptureFixture[str]) -> None:
    def with_param() -> None:
        scale = pyro.param("prior_scale", torch.tensor(3.0), constraint=constraints.positive)
        pyro.sample("x", dist.Normal(0.0, scale))

    def state() -> dict[str, Any]:
        return {
            "params": list(pyro.get_param_store().keys()),
            "torch": torch.get_rng_state().tolist(),
            "numpy": np.random.get_state()[1].tolist(),  # noqa: NPY002
            "random": random.getstate(),
            "settings": pyro.settings.get(),
            "dtype": torch.get_default_dtype(),
            "threads": torch.get_num_threads(),
        }

    torch.set_num_threads(2)
    pyro.param("mine", torch.tensor(1.0))
    problem = vl.Problem(with_param)
    before = state()
    vl.nuts(problem, backend=backend, num_chains=1, num_warmup=20, num_draws=10)
    assert state() == before
    output = capfd.readouterr()
    assert output.out == output.err == ""  # no terminal, no progress bar


@pytest.mark.parametrize(
    "compile", [False, pytest.param(True, marks=pytest.mark.skipif(compiler() is None, reason="no C compiler"))]
)
def test_ctrl_c_ends_the_chains(compile: bool) -> None:
    """In a process of its own: a signal that is lost would let these chains run for hours."""
    code = f"""
import signal, threading
import pyro, pyro.distributions as dist
import pyro_vi_lab as vl
def normal():
    pyro.sample("x", dist.Normal(0.0, 1.0))
vl.nuts(vl.Problem(normal), num_draws=10, num_chains=2, compile={compile}, progress=False)
threading.Timer(1.0, signal.raise_signal, [signal.SIGINT]).start()
try:
    vl.nuts(vl.Problem(normal), num_draws=1_000_000, num_chains=2, compile={compile}, progress=False)
except KeyboardInterrupt:
    print("interrupted")
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert result.stdout.strip() == "interrupted", result.stderr


@pytest.mark.parametrize(("limit", "cores"), [(1.0, 1), (0.0, None)])
def test_interpreted_chains_wait_for_each_other_where_gradients_are_quick(
    limit: float, cores: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int | None] = []
    sample = nuts_module.sample_callback

    def spy(*arguments: Any, **more: Any) -> Any:
        seen.append(arguments[3].cores)
        return sample(*arguments, **more)

    monkeypatch.setattr(nuts_module, "sample_callback", spy)
    monkeypatch.setattr(nuts_module, "PARALLEL_SECONDS", limit)
    vl.nuts(vl.Problem(normal), num_chains=2, num_warmup=5, num_draws=5, compile=False, progress=False)
    assert seen == [cores]
