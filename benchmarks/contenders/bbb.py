"""Bayes by backprop: independent normals over all weights of a network, fitted by SVI on minibatches."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoNormal, init_to_sample
from torch import Tensor

from benchmarks.channel import Channel

DRAWS = 30


class Network:
    """A multilayer perceptron with normal priors: weights with variance 1 / fan-in, biases with variance 1.

    Classes are drawn from its softmax; one output is a mean, whose noise has the logarithm ``log_noise`` ~ N(0, 1).
    """

    def __init__(self, sizes: list[int]) -> None:
        self.sizes = sizes
        self.classifies = sizes[-1] > 1
        self.priors = {} if self.classifies else {"log_noise": torch.tensor(1.0)}
        for layer, (fan_in, fan_out) in enumerate(pairwise(sizes)):
            self.priors[f"weight{layer}"] = torch.full((fan_in, fan_out), fan_in**-0.5)
            self.priors[f"bias{layer}"] = torch.ones(fan_out)

    @property
    def dim(self) -> int:
        return sum(prior.numel() for prior in self.priors.values())

    def likelihood(self, values: Mapping[str, Tensor], x: Tensor) -> Any:
        """Distribution of the responses ``(*S, N)``, for values ``(*S, *site shape)``."""
        last = len(self.sizes) - 2
        for layer in range(last + 1):
            x = x @ values[f"weight{layer}"] + values[f"bias{layer}"].unsqueeze(-2)
            x = x if layer == last else x.relu()
        if self.classifies:
            return dist.Categorical(logits=x)
        return dist.Normal(x.squeeze(-1), values["log_noise"].exp().unsqueeze(-1))

    def model(self, x: Tensor, y: Tensor, num_rows: int) -> None:
        values = {}
        for name, prior in self.priors.items():
            values[name] = pyro.sample(name, dist.Normal(torch.zeros_like(prior), prior).to_event(prior.dim()))
        with pyro.plate("row", num_rows, subsample=torch.arange(len(x))):
            pyro.sample("y", self.likelihood(values, x), obs=y)

    def judge(self, guide: AutoNormal, data: Mapping[str, Tensor]) -> dict[str, float]:
        """ELBO of the training rows, and the log score and the error of what is predicted for the others."""
        generator = torch.Generator().manual_seed(0)
        values, kl = {}, 0.0
        for name, prior in self.priors.items():
            loc, scale = getattr(guide.locs, name).detach(), getattr(guide.scales, name).detach()
            values[name] = loc + scale * torch.randn(DRAWS, *loc.shape, generator=generator)
            kl += float(torch.distributions.kl_divergence(dist.Normal(loc, scale), dist.Normal(0.0, prior)).sum())
        fitted = self.likelihood(values, data["x"]).log_prob(data["y"])
        predicted = self.likelihood(values, data["x_new"])
        scores = predicted.log_prob(data["y_new"]).logsumexp(0) - math.log(DRAWS)
        if self.classifies:
            wrong = predicted.probs.mean(0).argmax(-1) != data["y_new"]
            error = float(wrong.double().mean())
        else:
            error = float((predicted.mean.mean(0) - data["y_new"]).square().mean().sqrt())
        return {"elbo": float(fitted.sum(-1).mean()) - kl, "score": float(scores.mean()), "error": error}


def _optimizer(how: str, lr: float, guide: AutoNormal) -> Any:
    from pyro_vi_lab import FusedAdam, NaturalGradient

    if how == "FusedAdam":
        return FusedAdam({"lr": lr})
    return NaturalGradient(guide, lr=lr, momentum=0.9, curvature_momentum=0.999)


def _set_rate(optimizer: Any, lr: float) -> None:
    if hasattr(optimizer, "curvature_momentum"):
        optimizer.lr = lr
        return
    for one in optimizer.optim_objs.values():
        for group in one.param_groups:
            group["lr"] = lr


def run(
    channel: Channel,
    *,
    arrays: Mapping[str, Any],
    sizes: list[int],
    how: str,
    lr: float,
    seed: int,
    epochs: int,
    batch: int,
    looks: int,
) -> None:
    """Fit; the rate falls to zero as half a cosine, epoch by epoch. The clock, of the processor, stands still while we look."""
    pyro.clear_param_store()
    pyro.enable_validation(False)
    pyro.set_rng_seed(seed)
    network, data = Network(sizes), {name: torch.from_numpy(value) for name, value in arrays.items()}
    num_rows = len(data["x"])
    guide = AutoNormal(network.model, init_loc_fn=init_to_sample)
    optimizer = _optimizer(how, lr, guide)
    svi = SVI(network.model, guide, optimizer, Trace_ELBO())
    guide(data["x"], data["y"], num_rows)
    seconds, path, shown = 0.0, [], {round(epochs * (look + 1) / looks) for look in range(looks)}
    for epoch in range(epochs):
        began = time.process_time()
        _set_rate(optimizer, lr * (1 + math.cos(math.pi * epoch / epochs)) / 2)
        for index in torch.randperm(num_rows).split(batch):
            svi.step(data["x"][index], data["y"][index], num_rows)
        seconds += time.process_time() - began
        if epoch + 1 in shown:
            path.append({"epoch": epoch + 1, "seconds": seconds, **network.judge(guide, data)})
    channel.send({"dim": network.dim, "path": path})


def cost(channel: Channel, *, dim: int, how: str, repeats: int) -> None:
    """Processor seconds of gradients of as many independent normals under the simplest model, and of the steps after them."""

    def model() -> None:
        pyro.sample("x", dist.Normal(torch.zeros(dim), 1.0).to_event(1))

    pyro.clear_param_store()
    pyro.enable_validation(False)
    guide, objective = AutoNormal(model), Trace_ELBO()
    guide()
    optimizer, leaves = _optimizer(how, 0.01, guide), list(guide.parameters())
    gradient, step = [], []
    for number in range(repeats + 2):
        began = time.process_time()
        guide.zero_grad()
        objective.loss_and_grads(model, guide)
        between = time.process_time()
        optimizer(leaves)
        if number > 1:  # not the first ones, which make states
            gradient.append(between - began)
            step.append(time.process_time() - between)
    channel.send({"gradient": gradient, "step": step})


COMMANDS: dict[str, Callable[..., None]] = {"run": run, "cost": cost}
