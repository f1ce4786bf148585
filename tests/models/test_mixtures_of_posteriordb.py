"""The ready mixture against NUTS and against the published draws of posteriordb, components aligned."""

from __future__ import annotations

import math

import pytest
import torch

import pyro_vi_lab as vl
from tests import mixtures, posteriordb

FEWEST_DRAWS = 2000
"""Of the published ones that are at hand: less exact than ours."""
SHIFT, CHANGE = 0.1 + 5 / math.sqrt(FEWEST_DRAWS), 0.1 + 5 / math.sqrt(2 * FEWEST_DRAWS)
"""A tenth, and five standard errors of the published numbers."""


@pytest.mark.slow
@pytest.mark.parametrize("name", mixtures.POSTERIORS)
def test_nuts_and_fits_have_the_published_means_and_deviations(name: str) -> None:
    posteriordb.require()
    loaded = posteriordb.load(name)
    problem = mixtures.published_problem(name, loaded.data["y"])
    published = mixtures.by_mean({key: torch.from_numpy(value) for key, value in loaded.draws.items()})
    sampled = vl.nuts(problem, num_warmup=500, num_draws=1000, progress=False)
    # what is wrong with chains that have found different orders is the order
    assert problem.model.align(sampled).problems() == []
    reference = mixtures.as_published(problem, sampled)
    fits = {"nuts": reference}
    for guide in ("conjugate", "full_rank", "laplace"):
        fit = vl.fit(problem, guide, progress=False)
        assert fit.status is vl.Status.CONVERGED
        drawn = mixtures.conjugate_draws(fit, 20_000) if guide == "conjugate" else fit.posterior(20_000)
        fits[guide] = mixtures.as_published(problem, drawn)
    for draws in fits.values():
        for other in (published, reference):
            shift, change = mixtures.apart(draws, other)
            assert shift < SHIFT
            assert change < CHANGE
