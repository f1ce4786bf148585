from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn

from benchmarks.contenders.fisher_cg import ConjugateGradientPart
from benchmarks.encoder import Curve, at, page
from pyro_vi_lab.guides import Amortized
from pyro_vi_lab.natural_parts import Settings


def model(x: Tensor) -> None:
    with pyro.plate("row", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x[:, 0])


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.loc, self.log_scale = nn.Linear(2, 1), nn.Linear(2, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.loc(x), self.log_scale(x).exp()


def test_conjugate_gradients_go_uphill_within_the_trust_region() -> None:
    torch.manual_seed(0)
    x = torch.randn(8, 2)
    guide = Amortized(model, Encoder())
    guide(x)
    part = ConjugateGradientPart(guide)
    for tensor in part.tensors:
        tensor.grad = torch.randn(tensor.shape)
    before = {name: value.detach().clone() for name, value in part.scores.named.items()}
    part.step(Settings(lr=0.5, max_kl=1e-3), {})
    moves = {name: value.detach() - before[name] for name, value in part.scores.named.items()}
    assert sum(float((moves[name] * -value.grad).sum()) for name, value in part.scores.named.items()) > 0
    for name, value in part.scores.named.items():
        value.data.copy_(before[name])
    assert part.scores.squared_length(moves) / 2 <= 1e-3 * (1 + 1e-5)


def test_page_has_a_row_for_each_optimizer() -> None:
    curve = Curve([-30.0, -25.0], [1.0, 3.0])
    text = page({"one": [curve], "two": [curve, curve, curve]})
    assert "| one | 1 | -30.00 | -30.00 | -25.00 | 1.50 |" in text
    assert "| two | 3 |" in text
    assert at(curve, 2.0) == -30.0
    assert at(curve, 0.5) != pytest.approx(-30.0)
