"""A variational autoencoder of the digits by hand: PyTorch alone, with the networks, bound and Adam of the model."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits


class ByHand(nn.Module):
    """One hidden layer each way."""

    def __init__(self, num_pixels: int, num_latents: int, hidden: int) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(num_pixels, hidden), nn.ReLU(), nn.Linear(hidden, 2 * num_latents))
        self.decoder = nn.Sequential(nn.Linear(num_latents, hidden), nn.ReLU(), nn.Linear(hidden, num_pixels))

    def loss(self, x: Tensor) -> Tensor:
        loc, log_scale = self.encoder(x).chunk(2, -1)
        z = loc + log_scale.exp() * torch.randn_like(loc)
        kl = 0.5 * (loc.square() + (2 * log_scale).exp() - 1 - 2 * log_scale).sum()
        return kl + binary_cross_entropy_with_logits(self.decoder(z), x, reduction="sum")

    @torch.no_grad()
    def bound(self, x: Tensor, num_particles: int) -> Tensor:
        """Importance-weighted bound of every row."""
        found = []
        for row in x.split(20):
            loc, log_scale = self.encoder(row).chunk(2, -1)
            eps = torch.randn(num_particles, *loc.shape, dtype=loc.dtype)
            z = loc + log_scale.exp() * eps
            log_w = -binary_cross_entropy_with_logits(
                self.decoder(z), row.expand(num_particles, *row.shape), reduction="none"
            ).sum(-1)
            log_w += (-z.square() / 2 + eps.square() / 2 + log_scale).sum(-1)
            found.append(log_w.logsumexp(0) - math.log(num_particles))
        return torch.cat(found)


def train(network: ByHand, x: Tensor, *, epochs: int, batch: int, lr: float) -> None:
    """Adam over batches of a new order every epoch."""
    optim = torch.optim.Adam(network.parameters(), lr=lr)
    for _ in range(epochs):
        for index in torch.randperm(len(x)).split(batch):
            optim.zero_grad()
            network.loss(x[index]).backward()
            optim.step()
