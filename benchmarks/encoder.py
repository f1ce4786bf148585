"""The natural gradient of an encoder against Adam: bounds of an autoencoder after equal epochs and equal seconds."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI, Trace_ELBO
from torch import Tensor, nn
from torch.nn.functional import softplus

import pyro_vi_lab as vl
from benchmarks.contenders.fisher_cg import ConjugateGradientPart
from pyro_vi_lab import natural_parts
from pyro_vi_lab.guides import Amortized

NUM_LATENT, HIDDEN, BATCH, NUM_TRAINED = 10, 200, 128, 1437
EPOCHS, SHOWN = 40, (1, 5, 10, 20, 40)
SEEDS = 3
DECODER_LR = 3e-3
"""Of Adam, for the decoder in every row."""
SECONDS = (2.0, 5.0)


class Curve(NamedTuple):
    """Held-out bound per row after each epoch, and processor seconds until then, evaluation left out."""

    bounds: list[float]
    seconds: list[float]


class Encoder(nn.Module):
    """One hidden layer."""

    def __init__(self) -> None:
        super().__init__()
        self.network = nn.Sequential(nn.Linear(64, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, 2 * NUM_LATENT))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        loc, raw = self.network(x).chunk(2, -1)
        return loc, softplus(raw) + 1e-4


def digits() -> tuple[Tensor, Tensor]:
    """Images of 8 x 8 pixels, each black or white with its gray as the probability; to train on, and held out."""
    from sklearn.datasets import load_digits  # of the benchmarks' environment alone

    gray = torch.tensor(load_digits().data / 16.0, dtype=torch.float32)
    x = torch.bernoulli(gray, generator=torch.Generator().manual_seed(0))
    return x[:NUM_TRAINED], x[NUM_TRAINED:]


def train(make: Callable[[Amortized], pyro.optim.PyroOptim], seed: int, epochs: int) -> Curve:
    """The curve of one training."""
    seen, held_out = digits()
    pyro.clear_param_store()
    pyro.set_rng_seed(seed)
    decoder = nn.Sequential(nn.Linear(NUM_LATENT, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, 64))

    def model(x: Tensor) -> None:
        pyro.module("decoder", decoder)
        with pyro.plate("row", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(NUM_LATENT), x.new_ones(NUM_LATENT)).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=decoder(z)).to_event(1), obs=x)

    guide = Amortized(model, Encoder())
    guide(seen[:2])
    svi = SVI(model, guide, make(guide), vl.ELBO())
    curve, spent = Curve([], []), 0.0
    with pyro.validation_enabled(False):
        for _ in range(epochs):
            began = time.process_time()
            for index in torch.randperm(len(seen)).split(BATCH):
                svi.step(seen[index])
            spent += time.process_time() - began
            with torch.no_grad():
                curve.bounds.append(-Trace_ELBO(num_particles=20).loss(model, guide, held_out) / len(held_out))
            curve.seconds.append(spent)
    return curve


def adam(lr: float) -> Callable[[Amortized], pyro.optim.PyroOptim]:
    """Adam for the encoder, at its own rate."""

    def make(guide: Amortized) -> pyro.optim.PyroOptim:
        return pyro.optim.Adam(lambda name: {"lr": lr if "encoder" in name else DECODER_LR})

    return make


def natural(guide: Amortized) -> pyro.optim.PyroOptim:
    """The natural gradient with its defaults."""
    return vl.NaturalGradient(guide, others=pyro.optim.Adam({"lr": DECODER_LR}))


def by_conjugate_gradients(guide: Amortized) -> pyro.optim.PyroOptim:
    """The same, solved by Fisher-vector products."""
    optim = vl.NaturalGradient(guide, others=pyro.optim.Adam({"lr": DECODER_LR}))
    natural_parts.PARTS[type(guide)] = ConjugateGradientPart
    return optim


ROWS: dict[str, tuple[Callable[[Amortized], pyro.optim.PyroOptim], int]] = {
    **{f"Adam, {lr:g}": (adam(lr), SEEDS) for lr in (3e-4, 1e-3, 3e-3, 1e-2)},
    "natural gradient, Kronecker factors": (natural, SEEDS),
    "natural gradient, conjugate gradients": (by_conjugate_gradients, 1),
}
"""Optimizers of the encoder, and how many seeds each is run with."""


def at(curve: Curve, seconds: float) -> float:
    """The bound of the last epoch that was over by then; NaN if none was."""
    done = [bound for bound, end in zip(curve.bounds, curve.seconds, strict=True) if end <= seconds]
    return done[-1] if done else float("nan")


def page(curves: dict[str, list[Curve]]) -> str:
    """The table."""
    epochs = [epoch for epoch in SHOWN if epoch <= min(len(one.bounds) for rows in curves.values() for one in rows)]
    head = ["encoder's optimizer", "seeds", *(f"epoch {epoch}" for epoch in epochs)]
    head += [f"after {seconds:g} s" for seconds in SECONDS] + ["seconds an epoch"]
    lines = [
        "# The natural gradient of an encoder",
        "",
        "Written by `python -m benchmarks encoder`. Bound per held-out digit in nats (20 draws), medians over the seeds, of",
        f"an autoencoder (64-{HIDDEN}-{NUM_LATENT}-{HIDDEN}-64, batches of {BATCH}, 1,437 binary digits) whose decoder goes by",
        f"Adam at {DECODER_LR:g} in every row. Seconds are of one processor, evaluation left out, in plain `pyro.infer.SVI`.",
        "`NaturalGradient` has its defaults; Adam has four rates. A dash: no epoch was over by then.",
        "",
        f"| {' | '.join(head)} |",
        f"|{'---|' * len(head)}",
    ]
    for name, rows in curves.items():
        cells = [f"{statistics.median(one.bounds[epoch - 1] for one in rows):.2f}" for epoch in epochs]
        for seconds in SECONDS:
            found = statistics.median(at(one, seconds) for one in rows)
            cells.append(f"{found:.2f}" if found == found else "–")
        each = statistics.median(one.seconds[-1] / len(one.seconds) for one in rows)
        lines.append(f"| {name} | {len(rows)} | {' | '.join(cells)} | {each:.2f} |")
    return "\n".join([*lines, ""])


def main(out: Path, *, quick: bool = False) -> None:
    """Run all and write encoder.md."""
    torch.set_num_threads(1)
    curves: dict[str, list[Curve]] = {}
    for name, (make, seeds) in ROWS.items():
        try:
            curves[name] = [train(make, seed, 2 if quick else EPOCHS) for seed in range(1 if quick else seeds)]
        finally:
            natural_parts.PARTS[Amortized] = natural_parts._of_encoder
    (out / "encoder.md").write_text(page(curves), encoding="utf-8")
