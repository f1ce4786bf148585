from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.distributions import Normal, StudentT, kl_divergence

from pyro_vi_lab.checks import evidence
from pyro_vi_lab.errors import ArgumentError

LOG_Z = -12.5


def weights(loc: float, scale: float, *, num_draws: int, seed: int) -> tuple[Tensor, Tensor]:
    """log p = Normal(loc, scale) with evidence e^LOG_Z and log q = Normal(0, 1) at draws of q."""
    z = torch.randn(num_draws, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return Normal(loc, scale).log_prob(z) + LOG_Z, Normal(0.0, 1.0).log_prob(z)


@pytest.mark.parametrize(("loc", "scale"), [(0.0, 0.8), (0.3, 1.0), (0.2, 1.1)])
def test_every_bound_is_its_closed_form(loc: float, scale: float) -> None:
    found = evidence(*weights(loc, scale, num_draws=20_000, seed=1))
    p, q = Normal(loc, scale), Normal(0.0, 1.0)
    assert abs(found.elbo - (LOG_Z - float(kl_divergence(q, p)))) < 5 * found.elbo_se
    v = scale**2
    second = math.log(math.exp(loc**2 / (2 - v)) / (scale * math.sqrt(2 - v)))
    # CUBO is half the logarithm of E[w²]; with k = 1 - 1/1.21 its error has a finite variance, barely
    assert abs(found.cubo - (LOG_Z + second / 2)) < 5 * found.cubo_se
    assert abs(found.psis - LOG_Z) < 5 * found.psis_se


@pytest.mark.parametrize(("loc", "scale"), [(0.0, 1.0), (0.0, 0.8), (0.3, 1.0), (0.2, 1.1), (1.0, 1.0)])
@pytest.mark.parametrize("num_draws", [400, 4000])
def test_the_limits_hold_the_evidence_between_them(loc: float, scale: float, num_draws: int) -> None:
    repeats = 40
    missed = 0
    for seed in range(repeats):
        found = evidence(*weights(loc, scale, num_draws=num_draws, seed=seed))
        assert found.lower <= found.upper
        missed += not found.lower <= LOG_Z + 1e-6 or not found.upper >= LOG_Z - 1e-6
    # six or more misses of probability 0.05 in 40 have a probability of 0.014
    assert missed <= 6


def test_bounds_are_ordered_and_iwae_rises_to_the_evidence() -> None:
    log_p, log_q = weights(0.8, 0.9, num_draws=20_000, seed=0)
    bounds = [evidence(log_p, log_q, num_particles=k) for k in (1, 4, 32)]
    assert bounds[0].iwae == pytest.approx(bounds[0].elbo)
    assert bounds[0].iwae_se == pytest.approx(bounds[0].elbo_se)
    values = [found.iwae for found in bounds]
    assert values == sorted(values)
    assert values[-1] < bounds[0].psis < bounds[0].cubo


def test_the_exact_posterior_knows_its_evidence() -> None:
    log_q = Normal(0.0, 1.0).log_prob(torch.linspace(-3, 3, 100, dtype=torch.float64))
    found = evidence(log_q + LOG_Z, log_q)
    for name in ("elbo", "iwae", "psis", "cubo", "lower", "upper"):
        assert getattr(found, name) == pytest.approx(LOG_Z, abs=1e-6)


def test_where_the_second_moment_is_infinite_there_is_no_upper_limit() -> None:
    z = torch.randn(10_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = evidence(StudentT(torch.tensor(3.0)).log_prob(z), Normal(0.0, 1.0).log_prob(z))
    assert found.upper == math.inf
    assert found.cubo_se == math.inf


def test_draws_outside_of_the_support_make_the_elbo_minus_infinity() -> None:
    log_p, log_q = weights(0.0, 0.8, num_draws=4000, seed=0)
    log_p[:400] = -math.inf
    found = evidence(log_p, log_q)
    assert (found.elbo, found.elbo_se) == (-math.inf, math.inf)
    assert found.support_mismatch == pytest.approx(0.1)
    assert found.psis == pytest.approx(LOG_Z + math.log(0.9), abs=0.1)
    assert found.lower < found.psis < found.upper


def test_bad_input_is_told() -> None:
    log_p, log_q = weights(0.0, 0.8, num_draws=100, seed=0)
    with pytest.raises(ArgumentError, match="num_particles must be a whole number from 1 to half of the 100 draws"):
        evidence(log_p, log_q, num_particles=51)
    assert evidence(log_p, log_q).num_particles == 5
    assert "nats" in repr(evidence(log_p, log_q))
    assert evidence(log_p, log_q).to_dict()["num_particles"] == 5
