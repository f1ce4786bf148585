"""A variational autoencoder of the digits, trained to the end, against the same by hand in PyTorch.

scikit-learn's digits, black where a pixel is above 7 of 16: 1,408 to train on and 389 held out. 64–200–8–200–64, Adam at 0.001,
batches of 128, float32, no warm-up. By hand: the loss with its KL divergence in closed form, `torch.optim.Adam`, and a loop, which is
all that a user of PyTorch would write. Ours: `models.VariationalAutoencoder` and `fit_epochs` with their defaults.

*Bound* is that of importance weighting with 500 draws per held-out digit, in nats, each evaluated by its own code; ± its standard
error over the digits. *Difference*: ours minus by hand on the same digits, with its standard error over the seeds. Seconds are of
one thread, training alone; ours have the capture of the model in them.
"""

from __future__ import annotations

import math
import statistics
import time
from pathlib import Path
from typing import NamedTuple

import pyro
import torch
from torch import Tensor

import pyro_vi_lab as vl
from benchmarks.contenders.autoencoder import ByHand, train

NUM_TRAINED, BATCH, EPOCHS, LR = 11 * 128, 128, 200, 1e-3
"""Rows in whole batches, so that an epoch has as many steps for both."""
NUM_LATENTS, HIDDEN = 8, 200
PARTICLES = 500
SEEDS = 3


class Result(NamedTuple):
    """Bounds of the held-out digits, by digit, and seconds of the training."""

    bounds: Tensor
    seconds: float


def digits() -> tuple[Tensor, Tensor]:
    """To train on, and held out, in a random order."""
    x = vl.models.autoencoder.binary_digits().flatten(1).float()
    x = x[torch.randperm(len(x), generator=torch.Generator().manual_seed(0))]
    return x[:NUM_TRAINED], x[NUM_TRAINED:]


def by_hand(seed: int, epochs: int) -> Result:
    seen, held_out = digits()
    torch.manual_seed(seed)
    network = ByHand(64, NUM_LATENTS, HIDDEN)
    began = time.perf_counter()
    train(network, seen, epochs=epochs, batch=BATCH, lr=LR)
    seconds = time.perf_counter() - began
    return Result(network.bound(held_out, PARTICLES), seconds)


def ours(seed: int, epochs: int) -> Result:
    seen, held_out = digits()
    pyro.clear_param_store()
    began = time.perf_counter()
    model = vl.models.VariationalAutoencoder(shape=(64,), num_latents=NUM_LATENTS, hidden=[HIDDEN], seed=seed)
    problem = model.problem(seen, minibatch=BATCH)
    vl.fit_epochs(problem, model.guide, num_epochs=epochs, lr=LR, seed=seed, progress=False)
    seconds = time.perf_counter() - began
    return Result(model.log_likelihood(held_out, num_particles=PARTICLES, seed=seed).rows, seconds)


def difference(mine: list[Result], theirs: list[Result]) -> tuple[float, float]:
    """Mean difference of the bounds over the seeds, and its standard error."""
    gaps = [float((a.bounds - b.bounds).mean()) for a, b in zip(mine, theirs, strict=True)]
    error = statistics.stdev(gaps) / math.sqrt(len(gaps)) if len(gaps) > 1 else float("nan")
    return statistics.mean(gaps), error


def page(mine: list[Result], theirs: list[Result], epochs: int) -> str:
    """The table."""
    assert __doc__ is not None
    lines = ["# A variational autoencoder, to the end", "", "Written by `python -m benchmarks autoencoder`.", ""]
    lines += [*__doc__.strip().splitlines(), "", f"{epochs} epochs.", ""]
    lines += ["| seed | ours: bound | by hand: bound | ours: s | by hand: s |", "|---|---|---|---|---|"]
    for seed, (a, b) in enumerate(zip(mine, theirs, strict=True)):
        cells = [
            f"{float(one.mean()):.3f} ± {float(one.std()) / math.sqrt(len(one)):.3f}" for one in (a.bounds, b.bounds)
        ]
        lines.append(f"| {seed} | {' | '.join(cells)} | {a.seconds:.1f} | {b.seconds:.1f} |")
    gap, error = difference(mine, theirs)
    return "\n".join([*lines, "", f"Difference: {gap:+.3f} ± {error:.3f} nats a digit.", ""])


def main(out: Path, *, quick: bool = False) -> None:
    """Run both in turn and write autoencoder.md."""
    torch.set_num_threads(1)
    epochs, seeds = (2, 1) if quick else (EPOCHS, SEEDS)
    pairs = [(ours(seed, epochs), by_hand(seed, epochs)) for seed in range(seeds)]
    mine, theirs = ([pair[i] for pair in pairs] for i in range(2))
    (out / "autoencoder.md").write_text(page(mine, theirs, epochs), encoding="utf-8")
