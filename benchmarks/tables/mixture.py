"""Mixtures of normals against scikit-learn: the same start, the same number of steps, the same log likelihood.

Twenty steps, which take turns with scikit-learn's; medians over the turns, one thread. EM starts at the same parameters. Of
variational Bayes the seconds are those of twenty sweeps after the second, as scikit-learn takes no start. *Difference* is
relative, of the log likelihood that both end at; of the stream, of the bound per row from that of a fit of all rows at once.
*Streaming* is one pass over a memory-mapped file of 100,000 rows again and again, in shuffled blocks; *memory* is what the fit
added to the process's peak.
"""

from __future__ import annotations

import resource
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
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
    found = starts(table, problem.model, init="kmeans", num_restarts=1, seed=0)[0]

    def own(steps: int) -> None:
        mixture_ascent(table, started(found, prior), prior, max_sweeps=steps)

    def peer(steps: int) -> None:
        Peer(
            n_components=NUM_COMPONENTS,
            weight_concentration_prior_type="dirichlet_distribution",
            weight_concentration_prior=1.0,
            degrees_of_freedom_prior=DIM + 2,
            tol=0.0,
            max_iter=steps,
            random_state=0,
        ).fit(X)

    for _ in range(repeats):
        ours.append(_seconds(own, STEPS + 2) - _seconds(own, 2))
        theirs.append(_seconds(peer, STEPS + 2) - _seconds(peer, 2))
    return _row("variational Bayes, full", len(X), ours, theirs, None)


def _seconds(run: Callable[[int], None], steps: int) -> float:
    began = time.perf_counter()
    run(steps)
    return time.perf_counter() - began


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
        # a row that counts as often as it is in the file: the same posterior
        weight = np.full(len(whole), number / len(whole))
        best = vl.fit(problem.model.problem(whole, sample_weight=weight), "conjugate", max_steps=100)
    difference = abs(float(late.mean()) / float(best.history["negative_elbo"][-1]) - 1)
    row = _row("streaming, full", number, [seconds], [], difference)
    return {**row, "memory_mb": (_peak() - before) / 1024}


def _row(what: str, number: int, ours: list[float], theirs: list[float], difference: float | None) -> dict[str, Any]:
    ratio = statistics.median(theirs) / statistics.median(ours) if theirs else None
    return {"what": what, "rows": number, "ours": ours, "theirs": theirs, "ratio": ratio, "difference": difference}


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def page(found: list[dict[str, Any]]) -> str:
    """The table."""
    assert __doc__ is not None
    lines = [
        "# Mixtures of normals",
        "",
        "Written by `python -m benchmarks mixture`.",
        "",
        *__doc__.strip().splitlines(),
        "",
    ]
    lines += [
        "| what | rows | ours, s | scikit-learn, s | times faster | difference | memory, MB |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in found:
        seconds = [f"{statistics.median(row[who]):.2f}" if row[who] else "–" for who in ("ours", "theirs")]
        ratio = "–" if row["ratio"] is None else f"{row['ratio']:.2f}"
        difference = "–" if row["difference"] is None else f"{row['difference']:.1e}"
        memory = f"{row['memory_mb']:.0f}" if "memory_mb" in row else "–"
        cells = [row["what"], f"{row['rows']:,}", *seconds, ratio, difference, memory]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", f"K = {NUM_COMPONENTS}, D = {DIM}.", ""])


def main(out: Path, *, quick: bool = False) -> None:
    """Measure and write mixture.md."""
    torch.set_num_threads(1)
    found = []
    for row in measure(quick):
        found.append(row)
        print(f"mixture: {row['what']}", file=sys.stderr, flush=True)
    (out / "mixture.md").write_text(page(found), encoding="utf-8")
