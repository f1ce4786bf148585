from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pyro_vi_lab.errors import ArgumentError, DataError
from pyro_vi_lab.posterior import Posterior, element_name


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def autoregression(num_chains: int, num_draws: int, correlation: float, seed: int = 0) -> Tensor:
    """Draws of N(0, 1) with a lag-one autocorrelation: their ESS is n (1 - r) / (1 + r)."""
    noise, x = (
        normal(num_chains, num_draws, seed=seed),
        torch.empty(num_chains, num_draws, dtype=torch.float64),
    )
    x[:, 0] = noise[:, 0]
    for t in range(1, num_draws):
        x[:, t] = correlation * x[:, t - 1] + (1 - correlation**2) ** 0.5 * noise[:, t]
    return x


# --- what it is made of --------------------------------------------------------------------------------


def test_counts_and_flat_draws() -> None:
    theta = normal(2, 5, 3)
    posterior = Posterior({"mu": theta[..., 0], "theta": theta}, method="exact", unconstrained=normal(2, 5, 4))
    assert (posterior.num_chains, posterior.num_draws) == (2, 5)
    flat = posterior.flat()
    assert (flat["mu"].shape, flat["theta"].shape) == ((10,), (10, 3))
    assert torch.equal(flat["theta"][5:], theta[1])


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"draws": {}}, "at least one site"),
        ({"draws": {"mu": torch.zeros(4)}}, r"draws of 'mu' have shape \(4,\)"),
        (
            {"draws": {"mu": torch.zeros(4, 5), "tau": torch.zeros(5, 4)}},
            r"draws of 'tau' have shape \(5, 4\).*'mu'",
        ),
        ({"draws": {"mu": torch.zeros(4, 5), "tau": torch.zeros(20)}}, r"draws of 'tau' have shape \(20,\)"),
        ({"draws": {"mu": torch.zeros(0, 5)}}, r"at least one chain and one draw, .* \(0, 5\)"),
        ({"draws": {"mu": torch.zeros(2, 0, 3)}}, r"at least one chain and one draw, .* \(2, 0\)"),
        (
            {"draws": {"mu": torch.zeros(2, 5)}, "stats": {"lp": torch.zeros(2, 4)}},
            r"'stats\[lp\]' .* \(2, 4\)",
        ),
        (
            {"draws": {"mu": torch.zeros(2, 5)}, "unconstrained": torch.zeros(10, 1)},
            r"'unconstrained' .* \(10, 1\)",
        ),
    ],
)
def test_parts_that_do_not_fit_together_are_named(parts: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        Posterior(**parts)


@pytest.mark.parametrize(("index", "name"), [((), "x"), ((3,), "x[3]"), ((0, 12), "x[0, 12]")])
def test_names_of_scalars(index: tuple[int, ...], name: str) -> None:
    assert element_name("x", index) == name


# --- summaries -----------------------------------------------------------------------------------------


def test_summaries_are_those_of_numpy() -> None:
    draws = {"mu": normal(3, 7), "theta": normal(3, 7, 2, 4, seed=1), "count": torch.arange(21).reshape(3, 7)}
    posterior = Posterior(draws)
    for name, value in draws.items():
        flat = value.double().numpy().reshape(21, *value.shape[2:])
        np.testing.assert_allclose(posterior.mean()[name], flat.mean(0), rtol=1e-14, atol=1e-14)
        np.testing.assert_allclose(posterior.sd()[name], flat.std(0, ddof=1), rtol=1e-13)
        for q in (0, 0.05, 0.5, 0.9, 1):
            np.testing.assert_allclose(posterior.quantile(q)[name], np.quantile(flat, q, axis=0), rtol=1e-14)
        assert posterior.mean()[name].shape == posterior.quantile(0.5)[name].shape == value.shape[2:]


@pytest.mark.parametrize("q", [-0.1, 1.1, float("nan")])
def test_a_quantile_is_a_probability(q: float) -> None:
    with pytest.raises(ArgumentError, match="q is a probability"):
        Posterior({"mu": normal(2, 5)}).quantile(q)


def test_single_precision_keeps_its_type() -> None:
    posterior = Posterior({"mu": normal(2, 5).float()})
    assert {posterior.mean()["mu"].dtype, posterior.sd()["mu"].dtype} == {torch.float32}


# --- fit as a reference, or not ------------------------------------------------------------------------


def good_draws() -> dict[str, Tensor]:
    return {"mu": normal(4, 1000), "theta": normal(4, 1000, 2, seed=1), "constant": torch.ones(4, 1000)}


def good_stats() -> dict[str, Tensor]:
    return {"diverging": torch.zeros(4, 1000, dtype=torch.bool), "energy": normal(4, 1000, seed=2)}


def test_independent_draws_have_no_problems() -> None:
    assert Posterior(good_draws(), good_stats()).problems() == []
    assert Posterior({"mu": normal(1, 1000)}).problems() == []


def changed(name: str, value: Tensor) -> Posterior:
    return Posterior({**good_draws(), name: value}, good_stats())


def test_a_chain_in_another_place_is_named() -> None:
    theta = good_draws()["theta"].clone()
    theta[2, :, 1] += 4
    first, *others = changed("theta", theta).problems()
    assert first.startswith("R-hat of theta[1] is ")
    assert all("ESS of theta[1]" in other for other in others)


def test_chains_that_are_stuck_each_in_its_own_place_are_named() -> None:
    stuck = torch.arange(4.0).reshape(4, 1).expand(4, 1000)
    assert any("R-hat of mu" in problem for problem in changed("mu", stuck).problems())


def test_a_sticky_chain_has_too_few_effective_draws() -> None:
    # n (1 - r) / (1 + r) = 4000 / 39 effective draws
    problems = changed("mu", autoregression(4, 1000, 0.95)).problems()
    (bulk,) = (problem for problem in problems if problem.startswith("bulk ESS of mu is "))
    # the relative standard error of a variance of 4000 / 39 draws is sqrt(2 / 103)
    size = int(bulk.split()[5])
    assert abs(size / (4000 / 39) - 1) < 5 * (2 * 39 / 4000) ** 0.5
    assert "must be at least 400" in bulk
    assert any(problem.startswith("tail ESS of mu is ") for problem in problems)


def test_too_few_draws_are_too_few() -> None:
    problems = Posterior({"mu": normal(4, 50)}).problems()
    assert {problem.split(" of ")[0] for problem in problems} >= {"bulk ESS", "tail ESS"}


def test_divergences_are_counted() -> None:
    stats = good_stats()
    stats["diverging"][1, 3] = stats["diverging"][2, 5] = True
    assert Posterior(good_draws(), stats).problems() == ["2 divergent transitions after warm-up (must be 0)"]


def test_energies_that_move_too_slowly_are_named_with_their_chain() -> None:
    # E-BFMI of an autoregression is 2 (1 - r)
    stats = good_stats()
    stats["energy"][2] = autoregression(1, 1000, 0.95)[0]
    posterior = Posterior(good_draws(), stats)
    (problem,) = posterior.problems()
    assert problem.startswith("E-BFMI of chain 2 is 0.1")
    energy = stats["energy"].numpy()
    expected = [np.square(np.diff(e)).mean() / e.var() for e in energy]
    np.testing.assert_allclose(posterior.ebfmi(), expected, rtol=1e-12)
    stats["energy"][2] = autoregression(1, 1000, 0.8)[0]
    assert Posterior(good_draws(), stats).problems() == []
    assert Posterior(good_draws()).ebfmi() is None


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_draws_that_are_not_finite_are_named(bad: float) -> None:
    theta = good_draws()["theta"].clone()
    theta[1, 7, 0] = theta[1, 8, 0] = theta[1, 8, 1] = bad
    assert "2 draws of theta are not finite" in changed("theta", theta).problems()


def test_draws_that_never_move_are_no_reference() -> None:
    assert any("R-hat of mu is nan" in problem for problem in Posterior({"mu": torch.ones(4, 1000)}).problems())


def test_convergence_has_the_shapes_of_the_sites() -> None:
    found = Posterior(good_draws()).convergence()
    assert set(found) == {"rhat", "ess_bulk", "ess_tail"}
    for values in found.values():
        assert set(values) == {"mu", "theta", "constant"}
        assert (values["mu"].shape, values["theta"].shape) == ((), (2,))
        assert bool(torch.isnan(values["constant"]))


def test_tree_depth_is_named_where_chains_have_not_converged() -> None:
    depth = torch.full((4, 1000), 5)
    depth[0, :7] = 10
    fine = Posterior(good_draws(), stats={"tree_depth": depth})
    assert fine.saturated() == 7
    assert fine.problems() == []
    assert Posterior(good_draws()).saturated() is None
    apart = Posterior({"x": normal(4, 1000) + torch.arange(4.0)[:, None]}, stats={"tree_depth": depth})
    assert any("7 of 4000 trajectories reached the largest tree depth (10)" in problem for problem in apart.problems())
