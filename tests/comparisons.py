"""Comparisons that the tests of compare and of the report share; each is made once."""

from __future__ import annotations

from functools import cache

import pyro
import pyro.distributions as dist
import torch

import pyro_vi_lab as vl
from pyro_vi_lab import Comparison, Posterior, Problem, compare
from pyro_vi_lab.models import LinearRegression

REGRESSION = LinearRegression(noise_scale=0.5)


def regression_problem(num_rows: int = 40, num_features: int = 3) -> Problem:
    """A regression with correlated covariates: a full-rank normal is its exact posterior, a mean-field one is not."""
    X, y, _ = REGRESSION.simulate(num_rows, num_features, seed=0, correlation=0.9)
    names = [f"covariate {i}" for i in range(num_features)]
    return REGRESSION.problem(X, y, features=names, name="regression")


def regression_reference(problem: Problem, *, num_chains: int = 4, num_draws: int = 1000) -> Posterior:
    return REGRESSION.exact_posterior(*problem.args, num_chains=num_chains, num_draws=num_draws, seed=1)


@cache
def regression() -> Comparison:
    problem = regression_problem()
    return compare(problem, reference=regression_reference(problem), progress=False)


@cache
def unfit() -> Comparison:
    """The same, judged by too few draws."""
    problem = regression_problem()
    reference = regression_reference(problem, num_chains=2, num_draws=50)
    return compare(problem, reference=reference, progress=False)


@cache
def large() -> Comparison:
    """A hundred parameters."""
    problem = regression_problem(num_rows=150, num_features=99)
    return compare(problem, reference=regression_reference(problem), progress=False)


def unbounded() -> None:
    """No posterior: its density grows faster than any normal one falls."""
    x = pyro.sample("x", dist.Normal(0.0, 1.0))
    pyro.factor("growth", x.exp())


def unbounded_reference() -> Posterior:
    draws = torch.randn(4, 500, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return Posterior({"x": draws}, method="given")


@cache
def diverged() -> Comparison:
    """Both candidates diverge."""
    return compare(Problem(unbounded), reference=unbounded_reference(), progress=False)


@cache
def hostile() -> Comparison:
    """Names that would break a page that did not escape them, and one site that differs by far."""

    def model(y: torch.Tensor) -> None:
        with pyro.plate("<b>row</b>", 2):
            x = pyro.sample("<script>alert('$x^2$')</script>", dist.Normal(torch.zeros(()), 1.0))
        pyro.sample("y & z", dist.Normal(x.sum(), 1.0), obs=y)

    problem = Problem(
        model, torch.tensor(1.0), name="</title><img src=//x>", coords={"<b>row</b>": ["<i>", "naïve 模型 \"'"]}
    )
    fitted = vl.fit(problem, progress=False).posterior(num_draws=2000, seed=3)
    far = {name: 3 * value + 4 for name, value in fitted.draws.items()}
    return compare(problem, ["full_rank"], reference=Posterior(far, method="</p>"), progress=False)


ALL = {
    "regression": regression,
    "unfit": unfit,
    "large": large,
    "diverged": diverged,
    "hostile": hostile,
}
