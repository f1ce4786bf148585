from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from pyro_vi_lab.report import pairs
from pyro_vi_lab.report.pairs import chosen, pair_pictures, unconstrained
from tests import comparisons

RNG = np.random.default_rng(0)


def test_a_funnel_is_the_strongest_dependence_though_its_correlation_is_zero() -> None:
    log_scale = RNG.normal(size=4000)
    reference = np.stack([RNG.normal(size=4000), log_scale, log_scale.copy(), RNG.normal(size=4000)], 1)
    reference[:, 2] = RNG.normal(size=4000) * np.exp(2 * log_scale)
    found = list(chosen(reference, {"a": reference}, sites=list("abcd")))
    assert found[0][:3] == (1, 2, "dependent")


def test_a_correlation_that_is_missed_is_shown() -> None:
    root = np.linalg.cholesky(np.array([[1, 0, 0], [0, 1, 0.8], [0, 0.8, 1]]))
    reference = RNG.normal(size=(4000, 3)) @ root.T
    found = list(chosen(reference, {"a": RNG.normal(size=(4000, 3))}, sites=list("abc")))
    assert found[0][:3] == (1, 2, "dependent")
    assert (1, 2) not in [pair[:2] for pair in found[1:]]
    again = list(chosen(RNG.normal(size=(4000, 3)), {"a": reference}, sites=list("abc")))
    (missed,) = [pair for pair in again if pair[:2] == (1, 2)]
    # the standard error of a correlation of 4000 draws is at most 0.016
    assert abs(missed[3] - 0.8) < 0.1 or missed[2] == "dependent"


def test_the_farthest_coordinates_are_shown_and_no_pair_twice() -> None:
    reference = RNG.normal(size=(2000, 6))
    moved = reference + np.array([0, 0, 0, 0, 3.0, 4.0])
    found = list(chosen(reference, {"a": moved}, sites=list("abcdef")))
    assert (4, 5) in [pair[:2] for pair in found]
    assert len({pair[:2] for pair in found}) == len(found) == 6


def test_one_vector_is_not_shown_over_and_over() -> None:
    reference = RNG.normal(size=(2000, 6))
    found = list(chosen(reference, {"a": reference}, sites=["x", "x", "x", "x", "x", "y"]))
    for reason in ("dependent", "mismatch", "worst"):
        both = [frozenset("xy"[i == 5] for i in pair[:2]) for pair in found if pair[2] == reason]
        assert len(set(both)) == len(both)


def test_draws_without_coordinates_are_taken_to_the_unconstrained_scale() -> None:
    comparison = comparisons.regression()
    posterior = comparison.posteriors["full_rank"]
    bare = dataclasses.replace(posterior, unconstrained=None)
    assert posterior.unconstrained is not None
    np.testing.assert_allclose(
        unconstrained(comparison, bare), posterior.unconstrained.flatten(0, 1).numpy(), rtol=1e-10, atol=1e-12
    )


def test_a_candidate_that_is_not_finite_is_left_out() -> None:
    comparison = comparisons.regression()
    posterior = comparison.posteriors["mean_field"]
    assert posterior.unconstrained is not None
    broken = dataclasses.replace(posterior, unconstrained=torch.full_like(posterior.unconstrained, torch.nan))
    pictures, why = pair_pictures(
        dataclasses.replace(comparison, posteriors={**comparison.posteriors, "mean_field": broken})
    )
    assert why == ""
    assert all("mean_field" not in picture["svg"] for picture in pictures)


def test_a_crowd_of_sites_is_not_captured_for_a_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    comparison = comparisons.regression()
    monkeypatch.setattr(pairs, "MAX_SITES", 2)
    assert pair_pictures(comparison)[1] == (
        "There are none: 3 sites are too many to be taken to the unconstrained scale."
    )


def test_one_coordinate_makes_no_pair() -> None:
    pictures, why = pair_pictures(comparisons.diverged())
    assert pictures == []
    assert "two coordinates" in why
