"""Maxima elsewhere: found, weighed, and none where there are none."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from pyro_vi_lab.checks import OtherModes, other_modes
from pyro_vi_lab.checks.modes import climb


class Mixture:
    """Normals with these centers, scales and log masses."""

    def __init__(self, centers: list[list[float]], scales: list[float], masses: list[float]) -> None:
        self.centers, self.scales = torch.tensor(centers).double(), torch.tensor(scales).double()
        self.log_masses = torch.tensor(masses).double().log()

    def log_prob(self, z: Tensor) -> Tensor:
        white = (z[:, None] - self.centers) / self.scales[:, None]
        dim = z.shape[-1]
        each = -0.5 * white.square().sum(-1) - dim * (self.scales.log() + 0.5 * math.log(2 * math.pi))
        return (each + self.log_masses).logsumexp(-1)

    def value_and_grad(self, z: Tensor) -> tuple[Tensor, Tensor]:
        z = z.detach().requires_grad_(True)
        value = self.log_prob(z)
        (grad,) = torch.autograd.grad(value.sum(), z)
        return value.detach(), grad

    def hessian(self, z: Tensor) -> Tensor:
        return torch.stack([torch.autograd.functional.hessian(lambda x: self.log_prob(x[None])[0], row) for row in z])


def search(target: Mixture, center: list[float], scale: float, num_starts: int = 20) -> OtherModes:
    """From starts in (-12, 12), for a normal guide."""
    generator = torch.Generator().manual_seed(0)
    at, dim = torch.tensor(center).double(), len(center)
    guide = at + scale * torch.randn(500, dim, generator=generator, dtype=torch.float64)
    return other_modes(
        target.value_and_grad,
        target.hessian,
        lambda z: -0.5 * ((z - at) / scale).square().sum(-1),
        starts=24 * torch.rand(num_starts, dim, generator=generator, dtype=torch.float64) - 12,
        draws=guide,
        root=torch.full((dim,), scale).double(),
    )


@pytest.mark.parametrize("mass", [0.05, 0.5, 0.9])
def test_mass_of_another_mode(mass: float) -> None:
    """Laplace's method is exact for normals that are far apart."""
    found = search(Mixture([[8.0, 0.0], [-8.0, 3.0]], [1.0, 0.5], [1 - mass, mass]), [8.0, 0.0], 1.0)
    assert found.points.shape == (1, 2)
    assert torch.allclose(found.points[0], torch.tensor([-8.0, 3.0]).double(), atol=0.05)
    assert float(found.mass) == pytest.approx(mass, rel=0.01)
    assert torch.allclose(found.covariances[0], 0.25 * torch.eye(2).double(), rtol=0.02, atol=1e-3)


def test_several_modes_the_heaviest_first() -> None:
    found = search(Mixture([[0.0], [9.0], [-9.0]], [1.0, 1.0, 1.0], [0.5, 0.2, 0.3]), [0.0], 1.0)
    assert found.points.round().flatten().tolist() == [-9.0, 9.0]
    assert found.mass.tolist() == pytest.approx([0.3, 0.2], rel=0.01)


@pytest.mark.parametrize("scale", [0.05, 1.0, 4.0])
def test_no_other_mode_of_a_single_one(scale: float) -> None:
    """However narrow or wide the guide is."""
    found = search(Mixture([[2.0, 1.0]], [1.0], [1.0]), [2.0, 1.0], scale)
    assert len(found.mass) == 0
    assert found.num_ended == found.num_starts == 20


def test_a_displaced_guide_is_no_other_mode() -> None:
    """Nothing dips on the way to the maximum: it is the guide's own."""
    assert len(search(Mixture([[0.0]], [1.0], [1.0]), [3.0], 0.2).mass) == 0


def test_modes_that_the_guide_covers_are_not_others() -> None:
    target = Mixture([[8.0], [-8.0]], [1.0, 1.0], [0.5, 0.5])
    generator = torch.Generator().manual_seed(0)
    side = torch.where(torch.rand(500, 1, generator=generator) < 0.5, 8.0, -8.0).double()
    guide = side + torch.randn(500, 1, generator=generator, dtype=torch.float64)
    starts = torch.linspace(-12, 12, 10).double()[:, None]
    found = other_modes(
        target.value_and_grad, target.hessian, target.log_prob, starts=starts, draws=guide, root=guide.std(0)
    )
    assert len(found.mass) == 0


def test_climbing_an_ill_conditioned_quadratic() -> None:
    scales = torch.logspace(0, 2, 6).double()
    _, value, ended, calls = climb(
        lambda x: (-0.5 * (x / scales).square().sum(-1), -x / scales.square()),
        torch.randn(8, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 100,
    )
    assert ended.all()
    assert (value > -0.05).all()
    assert calls < 150


def test_climbing_to_infinity_does_not_end() -> None:
    _, _, ended, calls = climb(lambda x: (x.sum(-1), torch.ones_like(x)), torch.zeros(3, 2).double(), max_calls=40)
    assert not ended.any()
    assert calls == 40


def test_mass_where_automatic_second_derivatives_fail() -> None:
    """As those of logaddexp do where one term underflows."""
    target = Mixture([[8.0, 0.0], [-8.0, 3.0]], [1.0, 0.5], [0.7, 0.3])
    target.hessian = lambda z: torch.full((len(z), 2, 2), torch.nan).double()  # type: ignore[method-assign]
    found = search(target, [8.0, 0.0], 1.0)
    assert float(found.mass) == pytest.approx(0.3, rel=0.01)
