"""A variational autoencoder of the digits, trained to the end, against the same by hand in PyTorch.

scikit-learn's digits, black where a pixel is above 7 of 16: 1,408 to train on and 389 held out. 64–200–8–200–64, Adam at 0.001,
batches of 128, float32, no warm-up. By hand: the loss with its KL divergence in closed form, `torch.optim.Adam`, and a loop, which is
all that a user of PyTorch would write. Ours: `models.VariationalAutoencoder` and `fit_epochs` with their defaults.

*Bound* is that of importance weighting with 500 draws per held-out digit, in nats, each evaluated by its own code; ± its standard
error over the digits. *Difference*: ours minus by hand on the same digits, with its standard error over the seeds; the goal is that
it lies within two of these. Seconds are the processor's, on one thread, of the training alone; ours have the capture of the model
in them.
"""

from __future__ import annotations

import json
import math
import statistics
import sys
import time
from pathlib import Path
from typing import NamedTuple

import pyro
import torch
from torch import Tensor

import pyro_vi_lab as vl
from benchmarks import machine
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
    began = time.process_time()
    train(network, seen, epochs=epochs, batch=BATCH, lr=LR)
    seconds = time.process_time() - began
    return Result(network.bound(held_out, PARTICLES), seconds)


def ours(seed: int, epochs: int) -> Result:
    seen, held_out = digits()
    pyro.clear_param_store()
    began = time.process_time()
    model = vl.models.VariationalAutoencoder(shape=(64,), num_latents=NUM_LATENTS, hidden=[HIDDEN], seed=seed)
    problem = model.problem(seen, minibatch=BATCH)
    vl.fit_epochs(problem, model.guide, num_epochs=epochs, lr=LR, seed=seed, progress=False)
    seconds = time.process_time() - began
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
    verdict = "met" if abs(gap) <= 2 * error else "not met"
    made, versions = machine.processor(), ", ".join(f"{key} {value}" for key, value in machine.versions().items())
    lines += ["", f"Difference: {gap:+.3f} ± {error:.3f} nats a digit; goal {verdict}.", ""]
    return "\n".join([*lines, f"Measured with {made['processor']}, one thread; {versions}.", ""])


def main(out: Path, *, quick: bool = False) -> None:
    """Run both in turn and write autoencoder.md and autoencoder.json."""
    torch.set_num_threads(1)
    epochs, seeds = (2, 1) if quick else (EPOCHS, SEEDS)
    mine, theirs = [], []
    for seed in range(seeds):
        mine.append(ours(seed, epochs))
        theirs.append(by_hand(seed, epochs))
        bounds = [float(found[-1].bounds.mean()) for found in (mine, theirs)]
        print(f"autoencoder: seed {seed}, {bounds[0]:.3f}, by hand {bounds[1]:.3f}", file=sys.stderr, flush=True)
    (out / "autoencoder.md").write_text(page(mine, theirs, epochs), encoding="utf-8")
    rows = [
        {"seed": seed, "contender": name, "bound": float(found.bounds.mean()), "seconds": found.seconds}
        for seed, pair in enumerate(zip(mine, theirs, strict=True))
        for name, found in zip(("ours", "by hand"), pair, strict=True)
    ]
    kept = {"quick": quick, "versions": machine.versions(), **machine.processor(), "epochs": epochs, "rows": rows}
    (out / "autoencoder.json").write_text(json.dumps(kept, indent=1) + "\n")
