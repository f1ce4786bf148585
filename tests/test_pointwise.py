"""Log densities of rows whose discrete sites are summed out, against sums written by hand."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from pyro_vi_lab import Posterior, Problem
from pyro_vi_lab.errors import ModelError

Y = torch.tensor([-3.0, 0.5, 2.5, 60.0], dtype=torch.float64)
WEIGHTS = torch.tensor([0.3, 0.7], dtype=torch.float64)


def posterior(*shape: int) -> Posterior:
    generator = torch.Generator().manual_seed(0)
    return Posterior({"mu": torch.randn(2, 5, *shape, generator=generator, dtype=torch.float64)})


def normal(x: Tensor, mean: Tensor) -> Tensor:
    return -0.5 * (x - mean) ** 2 - 0.5 * math.log(2 * math.pi)


def test_rows_with_a_site_of_their_own_have_the_density_of_a_mixture() -> None:
    def mixture(y: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(torch.zeros(2), 5.0).to_event(1))
        with pyro.plate("row", len(y)):
            which = pyro.sample("which", dist.Categorical(WEIGHTS))
            pyro.sample("y", dist.Normal(mu[..., which], 1.0), obs=y)

    problem, draws = Problem(mixture, Y), posterior(2)
    mu = draws.draws["mu"]
    expected = torch.logsumexp(WEIGHTS.log() + normal(Y[:, None], mu[..., None, :]), -1)
    # the last row is a thousand nats away from one of the centers: no underflow
    torch.testing.assert_close(problem.log_likelihood(draws)["y"], expected, rtol=1e-12, atol=1e-12)
    prior = -0.5 * (mu / 5) ** 2 - math.log(5) - 0.5 * math.log(2 * math.pi)
    torch.testing.assert_close(problem.log_prior(draws)["mu"], prior.sum(-1))


def shared(y: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    which = pyro.sample("which", dist.Bernoulli(0.7))
    with pyro.plate("row", len(y)):
        pyro.sample("y", dist.Normal(mu + which, 1.0), obs=y)


def test_rows_that_share_a_site_have_the_density_given_all_others() -> None:
    draws = posterior()
    found = Problem(shared, Y).log_likelihood(draws)["y"]
    terms = normal(Y[:, None], draws.draws["mu"][..., None, None] + torch.tensor([0.0, 1.0]))  # (C, S, row, state)

    def joint(rows: list[int]) -> Tensor:
        return torch.logsumexp(WEIGHTS.log() + terms[..., rows, :].sum(-2), -1)

    for i in range(len(Y)):
        others = [j for j in range(len(Y)) if j != i]
        torch.testing.assert_close(found[..., i], joint(list(range(len(Y)))) - joint(others), rtol=1e-10, atol=1e-10)


def test_what_else_depends_on_the_site_of_a_row_counts_as_given() -> None:
    def classes(y: Tensor, x: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
        with pyro.plate("row", len(y)):
            which = pyro.sample("which", dist.Bernoulli(0.7))
            theta = pyro.sample("theta", dist.Normal(which, 1.0))
            pyro.sample("y", dist.Normal(mu + 2 * which, 1.0), obs=y)
            pyro.sample("x", dist.Normal(theta + which, 1.0), obs=x)

    generator = torch.Generator().manual_seed(1)
    mu, theta = torch.randn(1, 3, dtype=torch.float64), torch.randn(1, 3, 4, generator=generator, dtype=torch.float64)
    x = Y.flip(0) / 10
    problem, draws = Problem(classes, Y, x), Posterior({"mu": mu, "theta": theta})
    states = torch.tensor([0.0, 1.0])
    parts = {
        "prior": WEIGHTS.log() + normal(theta[..., None], states),
        "y": normal(Y[:, None], mu[..., None, None] + 2 * states),
        "x": normal(x[:, None], theta[..., None] + states),
    }
    joint = torch.logsumexp(parts["prior"] + parts["y"] + parts["x"], -1)
    found = problem.log_likelihood(draws)
    for site in ("y", "x"):
        rest = torch.logsumexp(parts["prior"] + parts["x" if site == "y" else "y"], -1)
        torch.testing.assert_close(found[site], joint - rest, rtol=1e-10, atol=1e-10)
    assert set(problem.log_prior(draws)) == {"mu"}  # the prior of theta is a mixture that was summed out


def test_a_state_that_a_row_makes_impossible_is_possible_without_it() -> None:
    def coins(y: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        fair = pyro.sample("fair", dist.Bernoulli(0.5))
        with pyro.plate("toss", len(y)):
            pyro.sample("y", dist.Bernoulli(1 - 0.5 * fair + 0 * mu), obs=y)

    found = Problem(coins, torch.tensor([1.0, 1.0, 0.0])).log_likelihood(posterior())["y"][0, 0]
    # of a coin with two heads or a fair one: p(y) = 1/2 (0 + 1/8); without the tail 1/2 (1 + 1/4)
    both = math.log(1 / 16)
    expected = [both - math.log(0.5 * 0.25), both - math.log(0.5 * 0.25), both - math.log(0.5 * 1.25)]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64))


def test_rows_that_are_masked_say_nothing() -> None:
    def masked(y: Tensor, mask: Tensor) -> None:
        with pyro.poutine.mask(mask=mask):
            shared(y)

    found = Problem(masked, Y, torch.tensor(True)).log_likelihood(posterior())["y"]
    torch.testing.assert_close(found, Problem(shared, Y).log_likelihood(posterior())["y"])
    assert bool((Problem(masked, Y, torch.tensor(False)).log_likelihood(posterior())["y"] == 0).all())


def chain(y: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    state: Any = 0
    for t in pyro.markov(range(len(y))):
        state = pyro.sample(f"state_{t}", dist.Bernoulli(0.2 + 0.6 * torch.as_tensor(state).double()))
        pyro.sample(f"y_{t}", dist.Normal(mu + state, 1.0), obs=y[t])


def nested(y: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    with pyro.plate("group", 2, dim=-2):
        kind = pyro.sample("kind", dist.Bernoulli(0.5))
        with pyro.plate("row", y.shape[1], dim=-1):
            which = pyro.sample("which", dist.Bernoulli(0.2 + 0.6 * kind))
            pyro.sample("y", dist.Normal(mu + which, 1.0), obs=y)


def many(y: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    bits = [pyro.sample(f"bit_{i}", dist.Bernoulli(0.5)) for i in range(13)]
    pyro.sample("y", dist.Normal(mu + sum(bits), 1.0), obs=y)


@pytest.mark.parametrize(
    ("model", "data", "message"),
    [
        (chain, Y, "are a Markov chain"),
        (nested, Y.reshape(2, 2), "lie in different plates"),
        (many, Y[0], "13 discrete sites with 8,192 states"),
    ],
)
def test_rows_without_a_density_of_their_own_are_refused(
    model: Callable[..., None], data: Tensor, message: str
) -> None:
    with pytest.raises(ModelError, match=message):
        Problem(model, data).log_likelihood(posterior())


def test_several_sites_of_a_row_are_summed_together() -> None:
    def two(y: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
        with pyro.plate("row", len(y)):
            a, b = pyro.sample("a", dist.Bernoulli(0.3)), pyro.sample("b", dist.Categorical(torch.ones(3) / 3))
            pyro.sample("y", dist.Normal(mu + a + 5 * b, 1.0), obs=y)

    draws = posterior()
    mu = draws.draws["mu"][..., None]
    terms = [
        math.log((0.3 if a else 0.7) / 3) + normal(Y, mu + a + 5 * b) for a, b in itertools.product(range(2), range(3))
    ]
    expected = torch.logsumexp(torch.stack(terms), 0)
    torch.testing.assert_close(Problem(two, Y).log_likelihood(draws)["y"], expected, rtol=1e-10, atol=1e-10)
