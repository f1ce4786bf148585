from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn

from pyro_vi_lab.guides import Amortized, Flow
from pyro_vi_lab.natural_parts.kronecker_part import KroneckerPart
from pyro_vi_lab.natural_parts.part import Settings
from pyro_vi_lab.natural_parts.scores import EncoderScores, FlowScores, Scores

STANDARD_ERRORS = 5


@pytest.fixture(autouse=True)
def double() -> None:
    torch.set_default_dtype(torch.float64)


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.loc, self.log_scale = nn.Linear(2, 3), nn.Linear(3, 1), nn.Linear(3, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.hidden(x).tanh()
        return self.loc(h), self.log_scale(h).exp()


def model(x: Tensor) -> None:
    with pyro.plate("row", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0).expand([len(x)]), obs=x[:, 0])


def banana() -> None:
    x = pyro.sample("x", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Normal(x * x, 0.5))


def amortized(x: Tensor) -> Amortized:
    torch.manual_seed(0)
    guide = Amortized(model, Encoder())
    with pyro.poutine.scale(scale=2.0):
        guide(x)
    return guide


def flat(values: Any) -> Tensor:
    return torch.cat([value.reshape(-1) for value in values])


def fisher_of_encoder(guide: Amortized, x: Tensor) -> Tensor:
    """Twice Σ Jᵀ diag(1/s², 2) J, row by row."""
    parameters = [*guide.encoder.parameters()]
    total = torch.zeros(())
    for row in x:
        loc, scale = guide.encoder(row.unsqueeze(0))
        by_loc = flat(torch.autograd.grad(loc.sum(), parameters, retain_graph=True, materialize_grads=True))
        by_log_scale = flat(torch.autograd.grad(scale.log().sum(), parameters, materialize_grads=True))
        precision = float(scale.detach()) ** -2
        total = total + precision * torch.outer(by_loc, by_loc) + 2 * torch.outer(by_log_scale, by_log_scale)
    return 2.0 * total


def test_squared_length_is_that_of_the_fisher_matrix() -> None:
    x = torch.randn(6, 2, generator=torch.Generator().manual_seed(1))
    guide = amortized(x)
    scores, fisher = EncoderScores(guide), fisher_of_encoder(guide, x)
    generator = torch.Generator().manual_seed(2)
    moves = {name: torch.randn(value.shape, generator=generator) for name, value in scores.named.items()}
    v = flat(moves.values())
    assert scores.squared_length(moves) == pytest.approx(float(v @ fisher @ v), rel=1e-10)


def outer_products(scores: Scores, number: int, names: Sequence[str] = ()) -> Tensor:
    """Those of independent scores, of the parameters of these names, or of all."""
    parameters = [value for name, value in scores.named.items() if name in names or not names]
    found = []
    for _ in range(number):
        gradient = flat(torch.autograd.grad(scores.draw(), parameters, materialize_grads=True))
        found.append(scores.scale * torch.outer(gradient, gradient))
    return torch.stack(found)


def test_scores_of_an_encoder_have_the_fisher_matrix() -> None:
    x = torch.randn(6, 2, generator=torch.Generator().manual_seed(1))
    guide = amortized(x)
    torch.manual_seed(3)
    found, fisher = outer_products(EncoderScores(guide), 1000), fisher_of_encoder(guide, x)
    error = found.std(0) / len(found) ** 0.5
    assert ((found.mean(0) - fisher).abs() <= STANDARD_ERRORS * error + 1e-9).all()


def test_scores_of_a_flow_have_the_fisher_matrix_of_its_normal() -> None:
    """At the identity the flow is N(0, I): shift and log scale have the Fisher matrix diag(I, 2I)."""
    guide = Flow(banana, init_scale=1.0)
    guide()
    torch.manual_seed(4)
    scores = FlowScores(guide, num_draws=16)
    found = outer_products(scores, 500, ["guide.shift", "guide.log_scale"])
    error = found.std(0) / len(found) ** 0.5
    expected = torch.diag(torch.tensor([1.0, 1.0, 2.0, 2.0]))
    assert ((found.mean(0) - expected).abs() <= STANDARD_ERRORS * error + 1e-9).all()


def test_squared_length_in_a_flow_is_that_of_its_draws() -> None:
    guide = Flow(banana, init_scale=1.0)
    guide()
    torch.manual_seed(5)
    scores = FlowScores(guide, num_draws=4000)
    scores.draw()
    moves = {name: torch.zeros_like(value) for name, value in scores.named.items()}
    moves["guide.shift"] = torch.tensor([0.3, -0.4])
    # (vᵀε)² has mean |v|² and standard deviation √2 |v|²
    assert scores.squared_length(moves) == pytest.approx(0.25, abs=STANDARD_ERRORS * 2**0.5 * 0.25 / 4000**0.5)


def test_step_goes_uphill_within_the_trust_region() -> None:
    x = torch.randn(6, 2, generator=torch.Generator().manual_seed(1))
    guide = amortized(x)
    torch.manual_seed(6)
    part, state = KroneckerPart(EncoderScores(guide)), {}
    for tensor in part.tensors:
        tensor.grad = torch.randn(tensor.shape)
    before = {name: value.detach().clone() for name, value in part.named.items()}
    part.step(Settings(lr=0.5, max_kl=1e-3), state)
    moves = {name: value.detach() - before[name] for name, value in part.named.items()}
    gain = sum(float((moves[name] * -part.named[name].grad).sum()) for name in moves)
    assert gain > 0
    for name, value in part.named.items():
        value.data.copy_(before[name])
    assert part.scores.squared_length(moves) / 2 <= 1e-3 * (1 + 1e-6)
