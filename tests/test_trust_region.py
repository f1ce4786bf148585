from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from pyro_vi_lab.trust_region import Ascent, End, Local, maximize, propose


class Function:
    """A function of a vector by automatic differentiation, with its Hessian or with products only."""

    def __init__(self, function: Callable[[Tensor], Tensor], *, dense: bool = True) -> None:
        self.function, self.dense = function, dense

    def value(self, point: Tensor) -> float:
        return float(self.function(point))

    def local(self, point: Tensor) -> Local:
        grad = torch.autograd.functional.jacobian(self.function, point)
        hessian = torch.autograd.functional.hessian(self.function, point)
        return Local(self.value(point), grad, hessian if self.dense else None, lambda v: hessian @ v)

    def move(self, point: Tensor, step: Tensor) -> Tensor:
        return point + step

    def relative(self, point: Tensor, step: Tensor) -> float:
        return float((step.abs() / point.abs().clamp_min(1.0)).max())


def climb(function: Callable[[Tensor], Tensor], start: list[float], *, dense: bool = True, steps: int = 300) -> Ascent:
    return maximize(Function(function, dense=dense), torch.tensor(start, dtype=torch.float64), max_steps=steps)


both = pytest.mark.parametrize("dense", [True, False])
OFFSET = torch.tensor([3.0, -700.0, 1e-3], dtype=torch.float64)
SCALE = torch.tensor([1.0, 200.0, 1e-6], dtype=torch.float64)


@both
def test_parabola_of_distant_scales(dense: bool) -> None:
    ascent = climb(lambda x: -((x - OFFSET) / SCALE).square().sum() / 2, [0.0, 0.0, 0.0], dense=dense)
    assert ascent.end is End.MAXIMUM
    assert ((ascent.point - OFFSET) / SCALE).abs().max() < 1e-6


@both
def test_curved_valley(dense: bool) -> None:
    """Rosenbrock's function, whose minimum is at (1, 1)."""
    ascent = climb(lambda x: -100 * (x[1] - x[0] ** 2) ** 2 - (1 - x[0]) ** 2, [-1.2, 1.0], dense=dense)
    assert ascent.end is End.MAXIMUM
    atol = 1e-7 if dense else 1e-6  # conjugate gradients solve for a step no better than they must
    torch.testing.assert_close(ascent.point, torch.ones(2, dtype=torch.float64), rtol=0, atol=atol)
    assert len(ascent.marks) < 60
    values = [mark.value for mark in ascent.marks]
    assert values == sorted(values)


def test_leaves_a_saddle() -> None:
    """At the start the gradient is zero, and one direction rises: the hard case."""
    ascent = climb(lambda x: x[0] ** 2 - x[0] ** 4 / 2 - x[1] ** 2, [0.0, 0.0])
    assert ascent.end is End.MAXIMUM
    torch.testing.assert_close(ascent.point.abs(), torch.tensor([1.0, 0.0], dtype=torch.float64), rtol=0, atol=1e-7)


def test_slow_maximum() -> None:
    """Of fourth order: Newton's steps shrink by two thirds only, and the second derivatives vanish."""
    ascent = climb(lambda x: -(x**4).sum(), [1.0])
    assert ascent.end in (End.MAXIMUM, End.FLAT)
    assert ascent.point.abs() < 1e-2


@pytest.mark.parametrize(
    ("function", "start"),
    [
        (lambda x: -x.exp().sum(), 0.0),
        (lambda x: -(1 / x).sum(), 1.0),
        (lambda x: torch.nn.functional.logsigmoid(x).sum(), 0.0),
        (lambda x: x.sum(), 0.0),
    ],
    ids=["exponential", "hyperbola", "logistic", "linear"],
)
def test_no_maximum(function: Callable[[Tensor], Tensor], start: float) -> None:
    """A supremum at infinity: the gradient vanishes there too, but it is no maximum."""
    ascent = climb(function, [start])
    assert ascent.end is not End.MAXIMUM


def test_flat() -> None:
    ascent = climb(lambda x: -((x[0] + x[1] - 2) ** 2), [0.0, 0.0])
    assert ascent.end is End.FLAT
    assert float(ascent.point.sum()) == pytest.approx(2.0)


def test_no_start_and_no_steps() -> None:
    assert climb(lambda x: x.log().sum(), [-1.0]).end is End.NO_START
    ascent = climb(lambda x: -100 * (x[1] - x[0] ** 2) ** 2 - (1 - x[0]) ** 2, [-1.2, 1.0], steps=3)
    assert ascent.end is End.OUT_OF_STEPS
    assert len(ascent.marks) == 4


def test_steps_out_of_the_domain_are_taken_back() -> None:
    ascent = climb(lambda x: x.log().sum() - 1000 * x.sum(), [0.9])
    assert ascent.end is End.MAXIMUM
    assert float(ascent.point) == pytest.approx(1e-3)


@both
@pytest.mark.parametrize("seed", range(5))
def test_a_step_stays_inside_and_gains_what_it_promises(seed: int, dense: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(6, 6, generator=generator, dtype=torch.float64)
    hessian, grad = a + a.mT, torch.randn(6, generator=generator, dtype=torch.float64)
    for radius in (1e-3, 0.3, 10.0):
        found = propose(Local(0.0, grad, hessian if dense else None, lambda v: hessian @ v), radius, 1e-12)

        def model(p: Tensor) -> float:
            return float(grad @ p + p @ hessian @ p / 2)

        unit = hessian.diagonal().abs().rsqrt() if dense else torch.ones(6, dtype=torch.float64)
        assert found.length <= radius * (1 + 1e-9)
        assert float((found.step / unit).norm()) == pytest.approx(found.length)
        assert found.gain == pytest.approx(model(found.step), rel=1e-9)
        assert found.gain >= model(grad / (grad / unit).norm() * radius * 1e-3)
        if dense:  # exact: no other point of the sphere or the ball is better
            others = torch.randn(500, 6, generator=generator, dtype=torch.float64)
            others *= (
                radius * torch.rand(500, 1, generator=generator, dtype=torch.float64) / others.norm(dim=1, keepdim=True)
            )
            assert all(model(unit * p) <= found.gain + 1e-12 for p in others)


def test_gain_of_the_history_is_what_is_left() -> None:
    ascent = climb(lambda x: -(x - 1).cosh().sum(), [0.0, 3.0])
    assert math.isnan(ascent.marks[0].gain)
    assert ascent.marks[-1].gain < 1e-2
