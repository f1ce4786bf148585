"""Full-rank fits of the ready regressions against the published draws of posteriordb."""

from __future__ import annotations

import math

import pytest

import pyro_vi_lab as vl
from tests import posteriordb
from tests.regressions import CASES, deviations

NUM_DRAWS = 100_000
PUBLISHED_DRAWS = 10_000


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_a_full_rank_fit_has_the_published_means_and_deviations(name: str) -> None:
    posteriordb.require()
    loaded = posteriordb.load(name)
    make, named = CASES[name]
    result = vl.fit(make(loaded), progress=False)
    assert result.status is vl.Status.CONVERGED
    shift, change = deviations(loaded, named(dict(result.posterior(NUM_DRAWS).draws)))
    if loaded.case.near_normal:
        # a tenth, and five standard errors of the published numbers
        assert shift < 0.1 + 5 / math.sqrt(PUBLISHED_DRAWS)
        assert change < 0.1 + 5 / math.sqrt(2 * PUBLISHED_DRAWS)
    else:
        # what the normal misses, the weights of its draws show
        assert result.importance().khat > 0.7
