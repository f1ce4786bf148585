from __future__ import annotations

import math
from typing import Any

import torch

import pyro_vi_lab as vl
from benchmarks.contenders.autoencoder import ByHand, train
from benchmarks.tables.autoencoder import Result, difference, page
from pyro_vi_lab.models import VariationalAutoencoder

X = (torch.rand(30, 6, generator=torch.Generator().manual_seed(0)) > 0.5).double()


def pair() -> tuple[VariationalAutoencoder, ByHand]:
    """Ours and by hand, with the same weights."""
    model = VariationalAutoencoder(shape=(6,), num_latents=2, hidden=[5])
    model.problem(X)
    hand = ByHand(6, 2, 5).double()
    for mine, theirs in ((model.encoder.network, hand.encoder), (model.decoder, hand.decoder)):
        linear: list[Any] = [part for part in mine if isinstance(part, torch.nn.Linear)]
        for source, target in zip(linear, theirs[::2], strict=True):
            target.load_state_dict(source.state_dict())
    return model, hand


def test_by_hand_is_the_same_model() -> None:
    model, hand = pair()
    own = model.log_likelihood(X, num_particles=2000).rows
    other = hand.bound(X, 2000)
    # weights of this model vary by far less than 1, so that the bound has an error below 1/sqrt(2000)
    assert float((own - other).abs().max()) < 5 / math.sqrt(2000)
    objective = vl.ELBO(2000, analytic_kl=True, vectorize_particles=True, max_plate_nesting=1)
    expected = objective.loss(model, model.guide, X)
    with torch.no_grad():
        losses = torch.stack([hand.loss(X) for _ in range(200)])
    assert abs(float(losses.mean()) - expected) < 5 * float(losses.std()) * math.sqrt(1 / 200 + 1 / 2000)


def test_by_hand_is_trained() -> None:
    _, hand = pair()
    torch.manual_seed(0)
    before = float(hand.bound(X, 100).mean())
    train(hand, X, epochs=30, batch=10, lr=0.01)
    assert float(hand.bound(X, 100).mean()) > before


def test_page_has_a_row_for_each_seed() -> None:
    mine = [Result(torch.tensor([-17.0, -18.0]), 2.0), Result(torch.tensor([-17.0, -19.0]), 3.0)]
    theirs = [Result(torch.tensor([-17.5, -18.0]), 4.0), Result(torch.tensor([-17.0, -18.5]), 5.0)]
    text = page(mine, theirs, 7)
    assert "| 0 | -17.500 ± 0.500 | -17.750 ± 0.250 | 2.0 | 4.0 |" in text
    assert difference(mine, theirs) == (0.0, 0.25)
    assert "Difference: +0.000 ± 0.250 nats a digit; goal met." in text
