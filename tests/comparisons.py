"""Comparisons that the tests of compare and of the report share; each is made once."""

from __future__ import annotations

import dataclasses
from functools import cache

import pyro
import pyro.distributions as dist
import torch

import pyro_vi_lab as vl
from pyro_vi_lab import Comparison, Posterior, Problem, compare
from pyro_vi_lab.checks import discrepancy
from pyro_vi_lab.models import LinearRegression, build

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
        quoted = pyro.sample('a/b "c" \\n <d>', dist.Normal(0.0, 1.0))
        pyro.sample("none of it", dist.Normal(torch.zeros(0), 1.0).to_event(1))
        pyro.sample("y & z", dist.Normal(x.sum() + quoted, 1.0), obs=y)

    problem = Problem(
        model, torch.tensor(1.0), name="</title><img src=//x>", coords={"<b>row</b>": ["<i>", "naïve 模型 \"'"]}
    )
    fitted = vl.fit(problem, progress=False).posterior(num_draws=2000, seed=3)
    far = {name: 3 * value + 4 for name, value in fitted.draws.items()}
    return compare(problem, ["full_rank"], reference=Posterior(far, method="</p>"), progress=False)


@cache
def eight_schools() -> Comparison:
    """Beside a short run of NUTS."""
    problem = build("eight_schools")
    reference = vl.nuts(problem, num_chains=2, num_warmup=200, num_draws=200, progress=False)
    return compare(problem, reference=reference, progress=False)


@cache
def gaussian_mixture() -> Comparison:
    """Beside draws of one of the fits: NUTS takes a minute."""
    problem = build("gaussian_mixture")
    fitted = vl.fit(problem, "mean_field", progress=False)
    reference = Posterior(fitted.posterior(num_draws=1000, seed=7).draws, method="given")
    return compare(problem, [fitted], reference=reference, progress=False)


@cache
def crowd() -> Comparison:
    """A thousand sites; their fits are those of another problem, since only the draws matter here."""

    def model(y: torch.Tensor) -> None:
        total = sum(pyro.sample(f"site {i}", dist.Normal(0.0, 1.0)) for i in range(1000))
        pyro.sample("y", dist.Normal(total, 1.0), obs=y)

    generator = torch.Generator().manual_seed(0)
    draws = torch.randn(3, 4, 50, 1000, generator=generator, dtype=torch.float64)
    reference, *others = (Posterior({f"site {i}": one[..., i] for i in range(1000)}) for one in draws)
    posteriors = dict(zip(("mean_field", "full_rank"), others, strict=True))
    return dataclasses.replace(
        regression(),
        problem=Problem(model, torch.tensor(1.0)),
        reference=reference,
        reference_problems=["few draws"],
        posteriors=posteriors,
        discrepancies={name: discrepancy(reference, posterior) for name, posterior in posteriors.items()},
    )


EXAMPLES = {"eight_schools": eight_schools, "gaussian_mixture": gaussian_mixture, "crowd": crowd}
"""More of them, which take longer."""

ALL = {
    "regression": regression,
    "unfit": unfit,
    "large": large,
    "diverged": diverged,
    "hostile": hostile,
}
