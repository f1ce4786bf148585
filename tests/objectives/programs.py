"""Models with guides for the laws of objectives, and gradients as vectors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions import constraints
from pyro.distributions.testing.fakes import NonreparameterizedNormal
from pyro.nn import PyroModule, PyroParam
from torch import Tensor, nn

STANDARD_ERRORS = 5  # fails a right answer once in two million


class Program(NamedTuple):
    """A model, and a guide with a choice of the normal that it draws from."""

    model: Callable[..., None]
    guide: Callable[..., Callable[..., None]]
    local: bool


Y = torch.tensor([0.3, -1.2, 2.5, 0.9, 1.4, 0.1], dtype=torch.float64)
SEEN = torch.tensor([True, True, False, True, True, False])


def positive(name: str, value: Any) -> Tensor:
    return pyro.param(name, torch.tensor(value), constraint=constraints.positive)


def global_model() -> None:
    mean = pyro.sample("mean", dist.Normal(1.0, 1.5))
    width = pyro.sample("width", dist.Normal(0.0, 0.7))
    with pyro.plate("row", len(Y)):
        pyro.sample("y", dist.Normal(mean, width.exp()), obs=Y)


def global_guide(normal: Any) -> Callable[[], None]:
    def guide() -> None:
        mean = pyro.sample("mean", normal(pyro.param("mean_loc", torch.tensor(0.4)), positive("mean_scale", 0.5)))
        slope = pyro.param("slope", torch.tensor(-0.3))  # the second site depends on the first
        pyro.sample("width", normal(pyro.param("width_loc", torch.tensor(0.2)) + slope * mean, torch.tensor(0.4)))

    return guide


def local_parts(normal: Any, index: Tensor | None = None) -> None:
    locs = pyro.param("locs", lambda: 0.4 * Y)
    scales = pyro.param("scales", lambda: torch.linspace(0.5, 0.9, len(Y)), constraint=constraints.positive)
    if index is not None:
        locs, scales = locs[index], scales[index]
    pyro.sample("z", normal(locs, scales))


def local_model() -> None:
    noise = positive("noise", 0.8)
    with pyro.plate("row", len(Y)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(z, noise), obs=Y)


def local_guide(normal: Any) -> Callable[[], None]:
    def guide() -> None:
        with pyro.plate("row", len(Y)):
            local_parts(normal)

    return guide


def subsampled_model() -> None:
    noise = positive("noise", 0.8)
    with pyro.plate("row", len(Y), subsample_size=2) as index:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(z, noise), obs=Y[index])


def subsampled_guide(normal: Any) -> Callable[[], None]:
    def guide() -> None:
        with pyro.plate("row", len(Y), subsample_size=2) as index:
            local_parts(normal, index)

    return guide


def masked_model() -> None:
    with pyro.plate("row", len(Y)), poutine.mask(mask=SEEN):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(z, positive("noise", 0.8)), obs=Y)


def masked_guide(normal: Any) -> Callable[[], None]:
    def guide() -> None:
        with pyro.plate("row", len(Y)), poutine.mask(mask=SEEN):
            local_parts(normal)

    return guide


def nested_model() -> None:
    with pyro.plate("group", 2, dim=-2):
        mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        with pyro.plate("member", 3, dim=-1):
            z = pyro.sample("z", dist.Normal(mean, 1.0))
            pyro.sample("y", dist.Normal(z, 0.7), obs=Y.reshape(2, 3))


def nested_guide(normal: Any) -> Callable[[], None]:
    def guide() -> None:
        with pyro.plate("group", 2, dim=-2):
            loc = pyro.param("mean_loc", torch.tensor([[0.3], [0.6]]))
            mean = pyro.sample("mean", normal(loc, positive("mean_scale", 0.5)))
            with pyro.plate("member", 3, dim=-1):
                locs = pyro.param("locs", lambda: 0.3 * Y.reshape(2, 3))
                pyro.sample("z", normal(locs + pyro.param("slope", torch.tensor(0.2)) * mean, torch.tensor(0.6)))

    return guide


PROGRAMS: dict[str, Program] = {
    "global": Program(global_model, global_guide, local=False),
    "local": Program(local_model, local_guide, local=True),
    "subsampled": Program(subsampled_model, subsampled_guide, local=True),
    "masked": Program(masked_model, masked_guide, local=True),
    "scaled": Program(
        poutine.scale(local_model, scale=0.3), lambda normal: poutine.scale(local_guide(normal), scale=0.3), local=True
    ),
    "annealed": Program(local_model, lambda normal: poutine.scale(local_guide(normal), scale=0.4), local=True),
    "nested": Program(nested_model, nested_guide, local=True),
}
NORMAL, WITHOUT_PATH = dist.Normal, NonreparameterizedNormal


class Autoencoder(PyroModule):
    """A nested module with an amortized guide."""

    def __init__(self) -> None:
        super().__init__()
        self.decoder = PyroModule[nn.Linear](1, 1)
        self.encoder = PyroModule[nn.Linear](1, 2)
        self.noise = PyroParam(torch.tensor(0.8), constraints.positive)

    def model(self, y: Tensor) -> None:
        pyro.module("decoder", self.decoder)
        with pyro.plate("row", len(y)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(self.decoder(z.unsqueeze(-1)).squeeze(-1), self.noise), obs=y)

    def guide(self, y: Tensor) -> None:
        pyro.module("encoder", self.encoder)
        with pyro.plate("row", len(y)):
            loc, log_scale = self.encoder(y.unsqueeze(-1)).unbind(-1)
            pyro.sample("z", dist.Normal(loc, log_scale.exp()))


def gradient(objective: Any, model: Any, guide: Any, *args: Any, seed: int) -> Tensor:
    """Gradient of the loss with respect to the param store, in one vector in the order of the names."""
    leaves = [value.unconstrained() for _, value in sorted(pyro.get_param_store().items())]
    for leaf in leaves:
        leaf.grad = None
    pyro.set_rng_seed(seed)
    objective.loss_and_grads(model, guide, *args)
    return torch.cat([(torch.zeros_like(leaf) if leaf.grad is None else leaf.grad).flatten() for leaf in leaves])


def gradients(objective: Any, model: Any, guide: Any, *args: Any, num: int) -> Tensor:
    """Independent gradients, ``(num, P)``."""
    objective.loss(model, guide, *args)  # the parameters exist from here on
    return torch.stack([gradient(objective, model, guide, *args, seed=seed) for seed in range(num)])


def assert_same_mean(one: Tensor, two: Tensor) -> None:
    """Means of independent draws along the first axis agree within standard errors."""
    error = (one.var(0) / len(one) + two.var(0) / len(two)).sqrt()
    rounding = 1e3 * torch.finfo(one.dtype).eps * (one.abs().amax() + two.abs().amax())
    assert ((one.mean(0) - two.mean(0)).abs() <= STANDARD_ERRORS * error + rounding).all()
