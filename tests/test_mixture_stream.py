from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import pyro_vi_lab as vl
from pyro_vi_lab.errors import ArgumentError
from pyro_vi_lab.mixture_bayes import MixtureUpdates
from pyro_vi_lab.mixture_fit import rows_of
from pyro_vi_lab.mixture_stream import _orders, fit_stream
from pyro_vi_lab.models import GaussianMixture
from tests.mixtures import groups


def test_a_pass_visits_every_row_once() -> None:
    orders = _orders(1003, 100, torch.Generator().manual_seed(0))
    for _ in range(2):
        seen: list[int] = []
        while len(seen) < 1003:
            seen += [row for start, end in next(orders) for row in range(start, end)]
        assert sorted(seen) == list(range(1003))


def test_one_pass_from_disk_is_at_the_bound_of_all_rows(tmp_path: Path) -> None:
    X = groups(6_000, dim=3, apart=4.0)
    X = X[torch.arange(6_000).remainder(3).argsort()]  # sorted by group, as files often are
    np.save(tmp_path / "rows.npy", X.numpy())
    problem = GaussianMixture(3).problem(np.load(tmp_path / "rows.npy", mmap_mode="r"), minibatch=300)
    fit = vl.fit(problem, "conjugate", max_steps=20, progress=False)
    assert fit.num_steps == 20
    whole = GaussianMixture(3, marginal=True).problem(X)
    rows = rows_of(whole)
    torch.testing.assert_close(problem.model.covariance_prior, whole.model.covariance_prior)
    best = vl.fit(whole, "conjugate", max_steps=100, progress=False)
    updates = MixtureUpdates(whole.model.prior.centered(rows.center))
    factors = {}
    for name in updates.families:
        standard = fit.guide.standard(name)
        factors[name] = standard | ({"loc": standard["loc"] - rows.center} if name == "loc" else {})
    normals, divergence = updates.expected(factors)
    bound = float(rows.moments(normals).log_likelihood - divergence)
    top = -best.history["negative_elbo"][-1]
    assert top - 1e-3 * abs(top) < bound <= top + 1e-6 * abs(top)
    assert fit.posterior(10).draws["loc"].shape == (1, 10, 3, 3)


def test_options_out_of_range_are_named() -> None:
    problem = GaussianMixture(2).problem(groups(100), minibatch=20)
    with pytest.raises(ArgumentError, match="forgetting is κ"):
        fit_stream(problem, forgetting=0.5)
    with pytest.raises(ArgumentError, match="delay is τ"):
        fit_stream(problem, delay=0.0)
    with pytest.raises(ArgumentError, match="sees all of its rows at once"):
        fit_stream(GaussianMixture(2).problem(groups(100)))
    with pytest.raises(ArgumentError, match="has one start"):
        vl.fit(problem, "conjugate", num_restarts=2)
