from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from pyro.distributions import MultivariateStudentT as PyroStudentT
from scipy import integrate, stats
from torch import Tensor

from pyro_vi_lab.families import Laplace, MultivariateStudentT, Noise, Normal, StudentT

NOISES: dict[str, tuple[Noise, Any]] = {
    "normal": (Normal(), stats.norm()),
    "student_t": (StudentT(5.0), stats.t(5)),
    "multivariate_student_t": (MultivariateStudentT(4.0), stats.t(4)),
    "laplace": (Laplace(), stats.laplace()),
}
INDEPENDENT = [name for name in NOISES if name != "multivariate_student_t"]

EACH = pytest.mark.parametrize("name", NOISES)
EACH_INDEPENDENT = pytest.mark.parametrize("name", INDEPENDENT)


@EACH_INDEPENDENT
def test_density_and_entropy_are_those_of_scipy(name: str) -> None:
    noise, expected = NOISES[name]
    eps = torch.linspace(-6, 6, 21, dtype=torch.float64).reshape(7, 3)
    np.testing.assert_allclose(noise.log_prob(eps), expected.logpdf(eps).sum(-1), rtol=1e-13)
    assert noise.entropy(3) == pytest.approx(3 * float(expected.entropy()), rel=1e-12)


@pytest.mark.parametrize("dim", [1, 2, 5])
@pytest.mark.parametrize("df", [2.5, 4.0, 30.0])
def test_multivariate_student_t_is_that_of_pyro(df: float, dim: int) -> None:
    noise = MultivariateStudentT(df)
    eps = torch.linspace(-6, 6, 10 * dim, dtype=torch.float64).reshape(10, dim)
    eye = torch.eye(dim, dtype=torch.float64)
    theirs = PyroStudentT(torch.tensor(df, dtype=torch.float64), torch.zeros(dim, dtype=torch.float64), eye)
    torch.testing.assert_close(noise.log_prob(eps), theirs.log_prob(eps))
    assert noise.entropy(dim) == pytest.approx(
        float(stats.multivariate_t(shape=np.eye(dim), df=df).entropy()), rel=1e-6
    )


@EACH
def test_draws_have_the_distribution(name: str) -> None:
    noise, expected = NOISES[name]
    draws = noise.sample((20_000, 2), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert (draws.shape, draws.dtype) == ((20_000, 2), torch.float64)
    for column in draws.T.numpy():
        # a right answer is below this once in two million, as beyond five standard errors
        assert stats.kstest(column, expected.cdf).pvalue > 5e-7
    signs = draws.sign()  # in independent quadrants also where the tail is common
    assert abs(float((signs[:, 0] * signs[:, 1]).mean())) < 5 / math.sqrt(len(draws))


def test_tails_of_a_multivariate_student_t_come_together() -> None:
    generator = torch.Generator().manual_seed(0)
    together, apart = (
        noise.sample((20_000, 2), generator=generator, dtype=torch.float64).abs().log()
        for noise in (MultivariateStudentT(4.0), StudentT(4.0))
    )
    assert np.corrcoef(together.T)[0, 1] > 5 / math.sqrt(20_000) > abs(np.corrcoef(apart.T)[0, 1])


@EACH
def test_variance_and_quantiles(name: str) -> None:
    noise, expected = NOISES[name]
    assert noise.variance == pytest.approx(float(expected.var()))
    for probability in (0.001, 0.05, 0.5, 0.8, 0.999):
        assert noise.quantile(probability) == pytest.approx(float(expected.ppf(probability)), rel=1e-8, abs=1e-12)
    assert (noise.quantile(0.0), noise.quantile(1.0)) == (-math.inf, math.inf)


@EACH
def test_score_is_minus_the_gradient_of_the_log_density(name: str) -> None:
    noise, _ = NOISES[name]
    eps = torch.randn(5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    (grad,) = torch.autograd.grad(noise.log_prob(eps).sum(), eps)
    torch.testing.assert_close(noise.score(eps.detach()), -grad)


@EACH_INDEPENDENT
def test_fisher_information_of_a_coordinate(name: str) -> None:
    """E[ψ²] and E[(ψε - 1)²], by numerical integration."""
    noise, expected = NOISES[name]

    def mean_of(function: Any) -> float:
        def integrand(x: float) -> float:
            psi = float(noise.score(torch.tensor([x], dtype=torch.float64)))
            return float(function(psi, x) * expected.pdf(x))

        return 2 * integrate.quad(integrand, 0, math.inf)[0]  # even functions, smooth away from zero

    c, a, b = noise.fisher(1)
    assert c == pytest.approx(mean_of(lambda psi, _: psi**2), rel=1e-6)
    assert a == pytest.approx(mean_of(lambda psi, x: (psi * x - 1) ** 2), rel=1e-6)
    assert b == 0


@pytest.mark.parametrize("name", [name for name, (noise, _) in NOISES.items() if noise.rotation_invariant])
def test_fisher_information_of_rotation_invariant_noise(name: str) -> None:
    noise, dim, num = NOISES[name][0], 3, 200_000
    eps = noise.sample((num, dim), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    psi = noise.score(eps)
    c, a, b = noise.fisher(dim)

    def agrees(values: Tensor, expected: float) -> bool:
        return abs(float(values.mean()) - expected) < 5 * float(values.std()) / math.sqrt(num)

    assert agrees(psi.square().mean(-1), c)
    stretch = torch.tensor([[1.0, 0.5, 0.0], [0.5, -0.3, 0.2], [0.0, 0.2, 2.0]], dtype=torch.float64)
    trace = float(stretch.trace())
    expected = a * float(stretch.square().sum()) + b * trace**2
    assert agrees((torch.einsum("ki,ij,kj->k", psi, stretch, eps) - trace).square(), expected)


@EACH
def test_same_seed_same_numbers_and_no_other_source_of_chance(name: str) -> None:
    noise, _ = NOISES[name]
    before = torch.get_rng_state()
    one, two, other = (
        noise.sample((5, 2), generator=torch.Generator().manual_seed(seed), dtype=torch.float32) for seed in (1, 1, 2)
    )
    assert one.tolist() == two.tolist() != other.tolist()
    assert one.dtype == torch.float32
    assert torch.equal(torch.get_rng_state(), before)


@EACH
def test_without_a_generator_the_seed_of_torch_counts(name: str) -> None:
    noise, _ = NOISES[name]
    draws = []
    for _ in range(2):
        torch.manual_seed(3)
        draws.append(noise.sample((4, 2), generator=None, dtype=torch.float64))
    assert torch.equal(*draws)
