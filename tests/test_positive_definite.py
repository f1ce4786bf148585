from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_vi_lab as vl
from pyro_vi_lab.positive_definite import ToPositiveDefinite


@pytest.mark.parametrize("dim", [1, 2, 4])
def test_round_trip_and_determinant(dim: int) -> None:
    transform = ToPositiveDefinite()
    x = torch.randn(3, dim * (dim + 1) // 2, dtype=torch.float64)
    y = transform(x)
    assert y.shape == transform.forward_shape(x.shape) == (3, dim, dim)
    assert transform.inverse_shape(y.shape) == x.shape
    assert transform.codomain.check(y).all()
    torch.testing.assert_close(transform.inv(y), x)
    row, column = torch.tril_indices(dim, dim)
    for one, log_det in zip(x, transform.log_abs_det_jacobian(x, y), strict=True):
        jacobian = torch.autograd.functional.jacobian(lambda z: transform(z)[row, column], one)
        torch.testing.assert_close(torch.linalg.slogdet(jacobian).logabsdet, log_det)


def test_a_wishart_site_has_a_density() -> None:
    """log p(z) is log p(Λ) and the change of variables."""
    torch.set_default_dtype(torch.float64)

    def model() -> None:
        with pyro.plate("k", 2):
            precision = pyro.sample("precision", dist.Wishart(torch.tensor(4.0), torch.eye(3)))
            pyro.sample("y", dist.MultivariateNormal(torch.zeros(3), precision_matrix=precision), obs=torch.ones(2, 3))

    problem = vl.Problem(model)
    density = problem.density()
    assert density.dim == 12
    z = torch.randn(12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    value = density.constrain(z)["precision"]
    expected = dist.Wishart(torch.tensor(4.0), torch.eye(3)).log_prob(value).sum()
    y = torch.ones(2, 3, dtype=torch.float64)
    expected = expected + dist.MultivariateNormal(torch.zeros_like(y), precision_matrix=value).log_prob(y).sum()
    transform = ToPositiveDefinite()
    expected = expected + transform.log_abs_det_jacobian(z.reshape(2, 6), value).sum()
    torch.testing.assert_close(density.log_prob(z), expected)
    torch.testing.assert_close(density.unconstrain({"precision": value}), z)
