from __future__ import annotations

import itertools

import pytest
import torch
from torch.distributions import MultivariateNormal, kl_divergence

from pyro_vi_lab.errors import ArgumentError
from pyro_vi_lab.labels import matched, normal_divergences, reordered
from pyro_vi_lab.models import GaussianMixture
from pyro_vi_lab.models.mixture_posterior import align
from pyro_vi_lab.posterior import Posterior
from tests.mixtures import KINDS, parameters


def test_the_order_costs_least_of_all() -> None:
    cost = torch.rand(20, 4, 4, generator=torch.Generator().manual_seed(0))
    for one, order in zip(cost, matched(cost), strict=True):
        sums = [sum(float(one[p[k], k]) for k in range(4)) for p in itertools.permutations(range(4))]
        assert sum(float(one[order[k], k]) for k in range(4)) == pytest.approx(min(sums))


def test_divergences_are_those_of_torch() -> None:
    one, other = parameters("full", dim=3), parameters("full", dim=3, seed=5)
    found = normal_divergences(one.loc[None], one.covariance[None], other.loc, other.covariance)[0]
    for j, k in itertools.product(range(3), range(3)):
        p, q = MultivariateNormal(one.loc[j], one.covariance[j]), MultivariateNormal(other.loc[k], other.covariance[k])
        torch.testing.assert_close(found[j, k], kl_divergence(p, q) + kl_divergence(q, p))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("with_reference", [False, True])
def test_shuffled_draws_get_back_into_one_order(kind: str, with_reference: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    one = parameters(kind)
    # the same mixture with noise a hundredth of what is between its components
    noise = 1 + 0.01 * torch.randn(40, 3, generator=generator, dtype=torch.float64)
    order = torch.stack([torch.randperm(3, generator=generator) for _ in range(40)])
    precision = one.precision().expand(40, *one.precision().shape)
    straight = {
        "weights": one.weights.expand(40, 3),
        "loc": one.loc * noise[:, :, None],
        "precision": precision,
        "assignment": torch.randint(3, (40, 7), generator=generator),
    }
    axes = {"weights": 1, "loc": 1, "precision": None if kind == "tied" else 1}
    shuffled = {
        key: straight[key] if axis is None else reordered(straight[key], order, axis) for key, axis in axes.items()
    }
    shuffled["assignment"] = order.argsort(1).gather(1, straight["assignment"])
    draws = {key: value.reshape(4, 10, *value.shape[1:]) for key, value in shuffled.items()}
    reference = Posterior({key: straight[key][None, :5] for key in axes}) if with_reference else None
    aligned = align(Posterior(draws, method="nuts"), kind, reference=reference).flat()
    # without a reference the order is that of the last draw
    whole = torch.arange(3) if with_reference else order[-1]
    for key, axis in axes.items():
        expected = straight[key] if axis is None else reordered(straight[key], whole.expand(40, 3), axis)
        torch.testing.assert_close(aligned[key], expected)
    assert torch.equal(whole[aligned["assignment"]], straight["assignment"])


def test_sticks_follow_the_weights() -> None:
    model = GaussianMixture(3, weights="dirichlet_process", mean_prior=[0.0], covariance_prior=[[1.0]])
    values = [model.simulate(5, seed=s)[1] for s in range(6)]
    draws = {
        key: torch.stack([value[key] for value in values])[None] for key in ("weights", "stick", "loc", "precision")
    }
    aligned = model.align(Posterior(draws)).flat()
    left = torch.cat([torch.ones(6, 1).double(), (1 - aligned["stick"]).cumprod(1)], 1)
    torch.testing.assert_close(torch.cat([aligned["stick"], torch.ones(6, 1).double()], 1) * left, aligned["weights"])


def test_other_sites_and_other_sizes_are_refused() -> None:
    model = GaussianMixture(2, mean_prior=[0.0], covariance_prior=[[1.0]])
    with pytest.raises(ArgumentError, match="no draws of the site 'weights' of a GaussianMixture; it has mu"):
        model.align(Posterior({"mu": torch.zeros(1, 3)}))
    two, three = (
        Posterior(
            {"weights": torch.ones(1, 3, K) / K, "loc": torch.zeros(1, 3, K, 1), "precision": torch.ones(1, 3, K, 1, 1)}
        )
        for K in (2, 3)
    )
    with pytest.raises(ArgumentError, match="the reference has 3 components of 1 columns, the posterior 2 of 1"):
        model.align(two, reference=three)
