"""Mixtures of normals against scikit-learn: the same start, the same number of steps, the same log likelihood.

EM and variational Bayes with full covariances take turns with scikit-learn's; the median over the turns. *Difference* is
relative, of the log likelihood that both end at. *Streaming* is one pass over a memory-mapped file, one thread; *memory*
is what the fit added to the process's peak.
"""

from __future__ import annotations

import resource
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

import pyro_vi_lab as vl
from pyro_vi_lab.conjugate_mixture import mixture_ascent
from pyro_vi_lab.mixture_bayes import started
from pyro_vi_lab.mixture_fit import rows_of, starts
from pyro_vi_lab.mixture_moments import COVARIANCES
from pyro_vi_lab.models import GaussianMixture

NUM_ROWS, DIM, NUM_COMPONENTS = 10**5, 10, 10
STREAM_ROWS = 10**7
STEPS, REPEATS = 20, 5


def rows(number: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    centers = 2.0 * rng.normal(size=(NUM_COMPONENTS, DIM))
    X = rng.normal(size=(number, DIM))
    X += centers[rng.integers(NUM_COMPONENTS, size=number)]
    return X


def measure(quick: bool) -> Iterator[dict[str, Any]]:
    """One row per kind of covariances, one for variational Bayes, one for the stream."""
    number, repeats = (NUM_ROWS // 10, 2) if quick else (NUM_ROWS, REPEATS)
    X = rows(number)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scikit-learn's, that it has not converged
        for kind in COVARIANCES:
            yield _em(X, kind, repeats)
        yield _bayes(X, repeats)
        yield _stream(STREAM_ROWS // 50 if quick else STREAM_ROWS)


def _em(X: np.ndarray, kind: Any, repeats: int) -> dict[str, Any]:
    from sklearn.mixture import GaussianMixture as Peer

    problem = GaussianMixture(NUM_COMPONENTS, covariance=kind).problem(X)
    start = vl.em(problem, max_steps=1).point()
    ours, theirs = [], []
    for _ in range(repeats):
        began = time.perf_counter()
        fit = vl.em(problem, start=start, max_steps=STEPS, tolerance=0.0)
        ours.append(time.perf_counter() - began)
        peer = Peer(
            NUM_COMPONENTS,
            covariance_type=kind,
            tol=0.0,
            max_iter=STEPS,
            weights_init=start["weights"].numpy(),
            means_init=start["loc"].numpy(),
            precisions_init=start["precision"].numpy(),
        )
        began = time.perf_counter()
        peer.fit(X)
        theirs.append(time.perf_counter() - began)
    value, expected = float(fit.history["free_energy"][-1]), len(X) * float(peer.score(X))
    return _row(f"EM, {kind}", len(X), ours, theirs, abs(value / expected - 1))


def _bayes(X: np.ndarray, repeats: int) -> dict[str, Any]:
    from sklearn.mixture import BayesianGaussianMixture as Peer

    problem = GaussianMixture(NUM_COMPONENTS).problem(X)
    table, prior, ours, theirs = rows_of(problem), problem.model.prior, [], []
    prior = prior.centered(table.center)
    for _ in range(repeats):
        began = time.perf_counter()
        found = starts(table, problem.model, init="kmeans", num_restarts=1, seed=0)[0]
        mixture_ascent(table, started(found, prior), prior, max_sweeps=STEPS)
        ours.append(time.perf_counter() - began)
        peer = Peer(
            n_components=NUM_COMPONENTS,
            weight_concentration_prior_type="dirichlet_distribution",
            weight_concentration_prior=1.0,
            degrees_of_freedom_prior=DIM + 2,
            tol=0.0,
            max_iter=STEPS,
            random_state=0,
        )
        began = time.perf_counter()
        peer.fit(X)
        theirs.append(time.perf_counter() - began)
    return _row("variational Bayes, full, starts included", len(X), ours, theirs, None)


def _stream(number: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.npy"
        out = np.lib.format.open_memmap(path, mode="w+", dtype=np.float64, shape=(number, DIM))
        whole = rows(min(number, 10**5))
        for start in range(0, number, len(whole)):
            out[start : start + len(whole)] = whole[: number - start]
        out.flush()
        del out
        problem = GaussianMixture(NUM_COMPONENTS).problem(np.load(path, mmap_mode="r"), minibatch=2**14)
        before, began = _peak(), time.perf_counter()
        fit = vl.fit(problem, "conjugate", max_steps=-(-number // 2**14), progress=False)
        seconds = time.perf_counter() - began
        late = fit.history["negative_elbo"][-max(1, fit.num_steps // 4) :]
        best = vl.fit(GaussianMixture(NUM_COMPONENTS, marginal=True).problem(whole), "conjugate", max_steps=100)
    per_row = float(late.mean()) / number
    expected = float(best.history["negative_elbo"][-1]) / len(whole)
    row = _row("streaming, full", number, [seconds], [], abs(per_row / expected - 1))
    return {**row, "memory_mb": (_peak() - before) / 1024}


def _row(what: str, number: int, ours: list[float], theirs: list[float], difference: float | None) -> dict[str, Any]:
    ratio = statistics.median(theirs) / statistics.median(ours) if theirs else None
    return {"what": what, "rows": number, "ours": ours, "theirs": theirs, "ratio": ratio, "difference": difference}


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


if __name__ == "__main__":
    torch.set_num_threads(1)
    for one in measure("--quick" in sys.argv):
        print(one, flush=True)
