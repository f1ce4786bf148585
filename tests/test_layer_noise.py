"""Noise in layers gives every row the pre-activations of a weight of its own, and knows where it does not hold."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from pyro_vi_lab.layer_noise import ESTIMATORS, Estimator, Spread, mark, spread_of, with_layer_noise

STANDARD_ERRORS = 5
DRAWS = 20_000


def drawn(net: nn.Module, estimator: Estimator, *, log_scale: float = -1.0) -> dict[str, Tensor]:
    """Draws of all weights around those of the network, marked."""
    weights = {}
    for name, loc in net.named_parameters():
        scale = torch.full_like(loc, log_scale).exp()
        weights[name] = (loc + scale * torch.randn_like(loc)).detach()
        mark(weights[name], Spread(loc.detach(), scale, estimator))
    return weights


def outputs(net: nn.Module, x: Tensor, estimator: Estimator) -> Tensor:
    weights = drawn(net, estimator)
    result: Tensor = with_layer_noise(lambda: functional_call(net, weights, (x,)), weights, len(x)).detach()
    return result


class Sequence(nn.Module):
    """A linear layer along a sequence, then the mean over it."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x).tanh().mean(1)


class Twice(nn.Module):
    """One layer that every row meets twice."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        once: Tensor = self.layer(x).tanh()
        return self.layer(once)


class Product(nn.Module):
    """A weight that is looked into, and used otherwise than in a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        assert self.layer.weight.shape == (2, 2)
        return self.layer(x) * (x @ self.layer.weight)


class SharedBias(nn.Module):
    """Two layers with one bias."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(2, 2), nn.Linear(2, 2)
        self.two.bias = self.one.bias

    def forward(self, x: Tensor) -> Tensor:
        hidden: Tensor = self.one(x)
        return self.two(hidden)


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(2, 2), (2,)),
    "no bias": (lambda: nn.Linear(2, 2, bias=False), (2,)),
    "hidden": (lambda: nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.LayerNorm(3), nn.Linear(3, 2)), (2,)),
    "convolution": (lambda: nn.Sequential(nn.Conv1d(1, 2, 2), nn.Tanh(), nn.Flatten(), nn.Linear(4, 2)), (1, 3)),
    "grouped": (lambda: nn.Sequential(nn.Conv1d(2, 2, 2, groups=2), nn.Flatten(), nn.Linear(4, 2)), (2, 3)),
    "sequence": (Sequence, (3, 2)),
    "twice": (Twice, (2,)),
    "product": (Product, (2,)),
    "shared bias": (SharedBias, (2,)),
}


@pytest.mark.parametrize("estimator", ESTIMATORS[1:])
@pytest.mark.parametrize("name", NETWORKS)
def test_a_row_has_the_moments_of_a_draw_of_the_weights(name: str, estimator: Estimator) -> None:
    """Means and products of a row's outputs, within standard errors of both sides."""
    make, shape = NETWORKS[name]
    torch.manual_seed(1)
    net, row = make().double(), torch.randn(*shape, dtype=torch.float64)
    num_calls = 40
    # many rows that are the same, in few calls: rows of one call share what an estimator leaves them to share
    x = row.expand(DRAWS // num_calls, *shape)

    def moments(one: Tensor) -> Tensor:
        return torch.stack([one[:, 0], one[:, 1], one[:, 0] * one[:, 1], one[:, 0] ** 2], 1)

    with torch.no_grad():
        per_call = torch.stack([moments(outputs(net, x, estimator)).mean(0) for _ in range(num_calls)])
        draws = [drawn(net, "weights") for _ in range(2000)]
        stacked = {key: torch.stack([one[key] for one in draws]) for key in draws[0]}
        plain = moments(torch.vmap(lambda w: functional_call(net, w, (row[None],)))(stacked)[:, 0])
    error = (per_call.var(0) / num_calls + plain.var(0) / len(plain)).sqrt()
    assert ((per_call.mean(0) - plain.mean(0)).abs() < STANDARD_ERRORS * error).all()


@pytest.mark.parametrize(
    ("name", "estimator", "independent"),
    [
        ("linear", "local_reparameterization", True),
        ("linear", "flipout", True),
        ("sequence", "local_reparameterization", True),
        ("convolution", "local_reparameterization", True),
        ("linear", "weights", False),
    ],
)
def test_rows_differ_where_their_weights_do(name: str, estimator: Estimator, independent: bool) -> None:
    make, shape = NETWORKS[name]
    net, x = make(), torch.randn(shape).expand(5, *shape)
    first = outputs(net, x, estimator)  # equal rows
    assert bool((first[0] != first).any()) is independent


def test_a_weight_that_is_used_otherwise_keeps_its_draw() -> None:
    net, x = Product(), torch.randn(1, 2).expand(4, 2)
    weights = drawn(net, "flipout")
    result = with_layer_noise(lambda: functional_call(net, weights, (x,)), weights, 4)
    weight, bias = weights["layer.weight"], weights["layer.bias"]
    torch.testing.assert_close(result, functional.linear(x, weight, bias) * (x @ weight))


def test_inputs_without_rows_keep_the_draw() -> None:
    layer = nn.Linear(2, 3)
    weights = drawn(layer, "local_reparameterization")
    x = torch.randn(2)  # whose first dimension is not that of the four rows
    result = with_layer_noise(lambda: functional_call(layer, weights, (x,)), weights, 4)
    torch.testing.assert_close(result, functional.linear(x, weights["weight"], weights["bias"]))


def test_the_gradient_is_finite_where_all_inputs_are_zero() -> None:
    layer = nn.Linear(3, 2, bias=False)
    weights = drawn(layer, "local_reparameterization")
    x = torch.zeros(4, 3, requires_grad=True)
    with_layer_noise(lambda: functional_call(layer, weights, (x,)), weights, 4).sum().backward()
    assert x.grad is not None
    assert bool(torch.isfinite(x.grad).all())


def test_unmarked_weights_are_used_as_they_are() -> None:
    layer, x = nn.Linear(2, 3), torch.randn(4, 2)
    weights = {name: value.detach() for name, value in layer.named_parameters()}
    assert spread_of(weights["weight"]) is None
    result = with_layer_noise(lambda: functional_call(layer, weights, (x,)), weights, 4)
    torch.testing.assert_close(result, layer(x))
