"""Epochs of a variational autoencoder of the digits: by hand in PyTorch, and as a Pyro model."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI, Trace_ELBO
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, softplus

from benchmarks.channel import Channel

NUM_PIXELS = 64
NUM_LATENT = 10
BATCH = 128
LR = 1e-3
LOG_2_PI = float(np.log(2 * np.pi))


class Autoencoder(nn.Module):
    """One hidden layer each way."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(NUM_PIXELS, hidden), nn.ReLU(), nn.Linear(hidden, 2 * NUM_LATENT))
        self.decoder = nn.Sequential(nn.Linear(NUM_LATENT, hidden), nn.ReLU(), nn.Linear(hidden, NUM_PIXELS))

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        loc, raw = self.encoder(x).chunk(2, -1)
        return loc, softplus(raw) + 1e-4

    def model(self, x: Tensor) -> None:
        pyro.module("decoder", self.decoder)
        with pyro.plate("row", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(NUM_LATENT), x.new_ones(NUM_LATENT)).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=self.decoder(z)).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        pyro.module("encoder", self.encoder)
        with pyro.plate("row", len(x)):
            pyro.sample("z", dist.Normal(*self.encode(x)).to_event(1))

    def loss(self, x: Tensor) -> Tensor:
        """By hand, what Pyro's Trace_ELBO computes: every term from the draw."""
        loc, scale = self.encode(x)
        eps = torch.randn_like(loc)
        z = loc + scale * eps
        log_likelihood = -binary_cross_entropy_with_logits(self.decoder(z), x, reduction="sum")
        log_prior = -0.5 * z.square().sum()
        log_q = -0.5 * eps.square().sum() - scale.log().sum()  # 2π cancels
        return log_q - log_prior - log_likelihood


def _by_hand(hidden: int, how: str) -> Callable[[Tensor], float]:
    network = Autoencoder(hidden)
    optim = torch.optim.Adam(network.parameters(), lr=LR)
    loss_of = torch.compile(network.loss) if how == "PyTorch, compiled" else network.loss

    def step(x: Tensor) -> float:
        optim.zero_grad()
        loss = loss_of(x)
        loss.backward()
        optim.step()
        return loss.item()

    return step


def _by_pyro(hidden: int, how: str) -> Callable[[Tensor], float]:
    network, loss, optim = Autoencoder(hidden), Trace_ELBO(), pyro.optim.Adam({"lr": LR})
    if how.startswith("Captured"):
        from pyro_vi_lab import Captured, FusedAdam

        # all parameters in one call, as torch.optim.Adam by hand
        loss = Captured(loss, compile=True if how.endswith("compiled") else "auto")
        optim = FusedAdam({"lr": LR})
    svi = SVI(network.model, network.guide, optim, loss)
    return svi.step


RUNS: dict[str, Callable[[], float]] = {}


def prepare(channel: Channel, *, data: np.ndarray, hidden: int, how: str, warmup: int) -> None:
    """Make a run, and take its first epochs."""
    torch.manual_seed(0)
    pyro.set_rng_seed(0)
    pyro.enable_validation(False)
    rows = torch.from_numpy(data).float()
    step = (_by_hand if how.startswith("PyTorch") else _by_pyro)(hidden, how)

    def batches() -> Iterator[Tensor]:
        for index in torch.randperm(len(rows)).split(BATCH):
            yield rows[index]

    RUNS["run"] = lambda: sum(step(x) for x in batches()) / len(rows)
    for _ in range(warmup):
        RUNS["run"]()
    channel.send(True)


def epoch(channel: Channel) -> None:
    """Seconds and the mean loss of one epoch."""
    began = time.perf_counter()
    loss = RUNS["run"]()
    channel.send((time.perf_counter() - began, loss))


COMMANDS: dict[str, Callable[..., None]] = {"prepare": prepare, "epoch": epoch}
