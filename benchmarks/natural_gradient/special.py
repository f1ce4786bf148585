"""Targets of which one guide can do what another cannot; normalized, so that minus the bound is KL(q ‖ p)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from torch import Tensor

import pyro_vi_lab as vl
from benchmarks.natural_gradient.evaluation import fresh
from benchmarks.natural_gradient.ours import described
from pyro_vi_lab.guides import GUIDES, LowRankNormal

DF, DIM, RANK, BIG = 5.0, 10, 3, 50
SEED = 1


def student_t() -> None:
    """Independent Student-t coordinates."""
    zeros = torch.zeros(DIM, dtype=torch.float64)
    pyro.sample("z", dist.StudentT(DF, zeros + 2, torch.linspace(0.5, 2, DIM, dtype=torch.float64)).to_event(1))


def multivariate_student_t() -> None:
    """One Student-t of correlated coordinates."""
    zeros = torch.zeros(DIM, dtype=torch.float64)
    pyro.sample("z", dist.MultivariateStudentT(DF, zeros + 2, torch.linalg.cholesky(_correlated(DIM))))


def _correlated(dim: int) -> Tensor:
    index = torch.arange(dim, dtype=torch.float64)
    return 0.8 ** (index - index[:, None]).abs()


def factors() -> None:
    """A diagonal plus a matrix of rank 3."""
    index = torch.arange(BIG, dtype=torch.float64)
    columns = (index[:, None] * torch.tensor([0.7, 1.3, 2.9], dtype=torch.float64)).cos()
    noise = torch.linspace(0.1, 1, BIG, dtype=torch.float64)
    pyro.sample("z", dist.LowRankMultivariateNormal(torch.ones_like(index), columns, noise))


WEIGHTS, MODES = (0.3, 0.7), (-4.0, 4.0)


def two_modes() -> None:
    """Two normals, eight standard deviations apart, with weights 0.3 and 0.7."""
    z = pyro.sample("z", dist.ImproperUniform(constraints.real_vector, (), (2,)))
    loc = torch.tensor(MODES, dtype=torch.float64)[:, None].expand(2, 2)
    log_probs = dist.Normal(loc, torch.ones_like(loc)).to_event(1).log_prob(z.unsqueeze(-2))
    pyro.factor("modes", (log_probs + torch.tensor(WEIGHTS, dtype=torch.float64).log()).logsumexp(-1))


def banana() -> None:
    """A normal coordinate, and one around its square."""
    x = pyro.sample("x", dist.Normal(torch.zeros((), dtype=torch.float64), 1.0))
    pyro.sample("y", dist.Normal(x.square(), 0.5))


def rank(number: int) -> Callable[[Callable[[], None]], Any]:
    return lambda model: LowRankNormal(model, rank=number)


@dataclass(frozen=True)
class Case:
    """One guide on one target.

    Args:
        target: What is approximated.
        model: Its program.
        guide: Name of the guide.
        made: Makes the guide, where the name does not say it all.
        exact: KL(q ‖ p) of the best member where it is known.
    """

    target: str
    model: Callable[[], None]
    guide: str
    made: Callable[[Callable[[], None]], Any] | None = None
    exact: float | None = None
    note: str = ""

    @property
    def key(self) -> str:
        return f"{self.target}|{self.guide}{self.note}"


_ONE_MODE = -math.log(max(WEIGHTS))
CASES = (
    Case("Student-t (5), independent, D = 10", student_t, "mean_field_student_t", exact=0.0),
    Case("Student-t (5), independent, D = 10", student_t, "mean_field"),
    Case("Student-t (5), correlated, D = 10", multivariate_student_t, "full_rank_student_t", exact=0.0),
    Case("Student-t (5), correlated, D = 10", multivariate_student_t, "full_rank"),
    Case("diagonal + rank 3, D = 50", factors, "low_rank", made=rank(RANK), exact=0.0, note=", rank 3"),
    Case("diagonal + rank 3, D = 50", factors, "low_rank", made=rank(1), note=", rank 1"),
    Case("diagonal + rank 3, D = 50", factors, "full_rank", exact=0.0),
    Case("diagonal + rank 3, D = 50", factors, "mean_field"),
    Case("two modes, weights 0.3 and 0.7", two_modes, "mixture", exact=0.0),
    Case("two modes, weights 0.3 and 0.7", two_modes, "full_rank", exact=_ONE_MODE),
    Case("banana", banana, "flow", exact=0.0),
    Case("banana", banana, "full_rank"),
)


def case(*, key: str) -> dict[str, Any]:
    """KL(q ‖ p) of a fit with the defaults, and the mass of the modes where there are two."""
    (one,) = (one for one in CASES if one.key == key)
    row: dict[str, Any] = {"target": one.target, "guide": one.guide + one.note, "exact": one.exact}
    if one.guide not in GUIDES:
        return {**row, "skipped": f"there is no guide `{one.guide}` in this version", "absent": True}
    problem = vl.Problem(one.model)
    fit = vl.fit(problem, one.made(problem.model) if one.made else one.guide, seed=SEED, progress=False)
    elbo, error = fresh(fit)
    row |= {**described(fit), "kl": -elbo, "error": error}
    if one.model is two_modes:
        draws = fit.posterior(4000, seed=2).draws["z"].numpy()
        row["weights"] = [float(np.mean(draws[..., 0] < 0)), float(np.mean(draws[..., 0] > 0))]
    return row
