from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats

from pyro_vi_lab.families import Noise, Normal

NOISES: dict[str, tuple[Noise, stats.rv_continuous]] = {"normal": (Normal(), stats.norm())}

EACH = pytest.mark.parametrize("name", NOISES)


@EACH
def test_density_and_entropy_are_those_of_scipy(name: str) -> None:
    noise, expected = NOISES[name]
    eps = torch.linspace(-6, 6, 21, dtype=torch.float64).reshape(7, 3)
    np.testing.assert_allclose(noise.log_prob(eps), expected.logpdf(eps).sum(-1), rtol=1e-14)
    assert noise.entropy(3) == pytest.approx(3 * float(expected.entropy()), rel=1e-14)


@EACH
def test_draws_are_standard_and_have_the_distribution(name: str) -> None:
    noise, expected = NOISES[name]
    draws = noise.sample((20_000, 2), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert (draws.shape, draws.dtype) == ((20_000, 2), torch.float64)
    for column in draws.T.numpy():
        # a right answer is below this once in two million, as beyond five standard errors
        assert stats.kstest(column, expected.cdf).pvalue > 5e-7
        assert abs(column.mean()) < 5 / math.sqrt(len(column))
    assert abs(np.corrcoef(draws.T)[0, 1]) < 5 / math.sqrt(len(draws))


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
