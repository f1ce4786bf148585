from __future__ import annotations

import dataclasses

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_vi_lab import Posterior, Problem
from pyro_vi_lab.report import predictive
from pyro_vi_lab.report.predictive import predictive_checks, thinned
from tests import comparisons


def test_the_right_model_predicts_its_data() -> None:
    (quantity,), why = predictive_checks(comparisons.regression())
    assert why == ""
    assert quantity["name"] == "y"
    assert quantity["who"] == ["reference", "mean_field", "full_rank"]
    mean = quantity["rows"][0]
    assert mean["statistic"] == "mean"
    # the exact posterior of a regression with an intercept predicts the mean of its own data
    assert 0.1 < mean["cells"][0]["tail"] < 0.9
    assert not any(cell["extreme"] for row in quantity["rows"] for cell in row["cells"][:1])


def test_a_posterior_that_is_far_away_is_seen() -> None:
    comparison = comparisons.regression()
    posterior = comparison.posteriors["full_rank"]
    draws = {**posterior.draws, "intercept": posterior.draws["intercept"] + 100.0}
    moved = {**comparison.posteriors, "full_rank": Posterior(draws)}
    (quantity,), _ = predictive_checks(dataclasses.replace(comparison, posteriors=moved))
    cells = dict(zip(quantity["who"], quantity["rows"][0]["cells"], strict=True))
    assert cells["full_rank"]["tail"] == 1.0
    assert cells["full_rank"]["extreme"]
    assert not cells["reference"]["extreme"]


def test_evenly_spaced_draws_of_all_chains() -> None:
    posterior = Posterior({"x": torch.arange(12.0).reshape(3, 4)})
    assert thinned(posterior, 3).draws["x"].tolist() == [[0.0, 5.0, 11.0]]
    assert thinned(posterior, 100).num_draws == 12


def coins(y: torch.Tensor) -> None:
    p = pyro.sample("p", dist.Beta(1.0, 1.0))
    with pyro.plate("toss", len(y)):
        pyro.sample("y", dist.Bernoulli(p), obs=y)


def vectors(y: torch.Tensor) -> None:
    m = pyro.sample("m", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    with pyro.plate("row", len(y)):
        pyro.sample("y", dist.Normal(m, 1.0).to_event(1), obs=y)


def of(problem: Problem, reference: Posterior) -> tuple[list[dict[str, object]], str]:
    """The checks of a reference alone."""
    bare = dataclasses.replace(comparisons.regression(), problem=problem, reference=reference, posteriors={})
    return predictive_checks(bare)


def test_data_of_few_values_are_bars() -> None:
    data = torch.tensor([1.0, 0.0, 1.0, 1.0])
    draws = torch.rand(1, 100, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    (quantity,), _ = of(Problem(coins, data), Posterior({"p": draws}))
    assert quantity["bars"]
    assert "Shares of 2 values" in str(quantity["panels"])


def test_columns_of_vectors_are_quantities_of_their_own() -> None:
    generator = torch.Generator().manual_seed(0)
    data = torch.randn(30, 2, generator=generator, dtype=torch.float64)
    quantities, _ = of(Problem(vectors, data), Posterior({"m": torch.randn(1, 100, 2, generator=generator) / 5}))
    assert [quantity["name"] for quantity in quantities] == ["y[0]", "y[1]"]
    for i, quantity in enumerate(quantities):
        assert quantity["rows"][0]["seen"] == pytest.approx(float(data[:, i].mean()))  # type: ignore[index]


def test_too_many_values_are_left_out_and_that_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(predictive, "MAX_NUMBERS", 100)
    checks, why = predictive_checks(comparisons.regression())
    assert checks == []
    assert "40 observed values are too many" in why


def test_a_posterior_that_cannot_predict_is_left_out_and_that_is_said() -> None:
    comparison = comparisons.regression()
    part = Posterior({"intercept": comparison.reference.draws["intercept"]}, method="exact")
    (quantity,), why = predictive_checks(dataclasses.replace(comparison, reference=part))
    assert quantity["who"] == ["mean_field", "full_rank"]
    assert "reference is left out: the posterior has no draws of the latent site" in why


def test_tail_probabilities_count_ties_by_half() -> None:
    row = predictive._row("largest", predictive.STATISTICS["largest"], np.ones(3), {"a": np.ones((10, 3))})
    assert row["cells"][0]["tail"] == 0.5
