"""Mixtures of normals: EM and variational Bayes against scikit-learn, a stream against all rows, posteriors against NUTS.

**Against scikit-learn**: the same priors, the same start, twenty steps that take turns with scikit-learn's; medians over the
turns, in seconds of one processor. *Difference* is relative: of EM that of the log likelihood that both end at; of variational
Bayes the largest of weights, means and covariances (relative to the largest of each) after both have run to their end on 20,000
rows. scikit-learn takes the expected log determinant of diagonal and spherical precisions from a full Wishart distribution, which
they do not have, and so has another fixed point: *mended* is the difference with that one term set right. Of tied covariances its
prior is for the rows of one component, of spherical ones for one coordinate: the numbers are ours by K and by D.

**Stream**: one pass over a memory-mapped file of rows that are all different, from a fit to 20,000 of them; and coordinate ascent
on all rows from that same place, until it is within a nat of its end, or fifty sweeps. Both bounds are then computed on all rows.
*Memory* is what the fit adds to the process beside the mapped file itself, whose pages belong to the system.

**Posteriors**: fits and NUTS, components aligned, against published draws with priors near theirs (see `tests/mixtures.py`): the
largest shift of a mean in standard deviations, and the largest relative change of one of these. Of `normal_2` the published model
knows that both variances are one.
"""

from __future__ import annotations

import math
import multiprocessing
import statistics
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

import pyro_vi_lab as vl
from pyro_vi_lab.conjugate_mixture import mixture_ascent
from pyro_vi_lab.mixture_bayes import Factors, MixtureUpdates
from pyro_vi_lab.mixture_fit import MixtureRows, rows_of
from pyro_vi_lab.mixture_moments import COVARIANCES, hard_moments
from pyro_vi_lab.mixture_stream import stream_start
from pyro_vi_lab.models import GaussianMixture
from tests import mixtures, posteriordb

NUM_ROWS, DIM, NUM_COMPONENTS = 10**5, 10, 10
END_ROWS, END_SWEEPS = 20_000, 100
STREAM_ROWS, BATCH = 10**7, 2**14
BATCH_SWEEPS = 50
STEPS, REPEATS = 20, 3
GUIDES = ("conjugate", "full_rank", "mean_field", "laplace")
DRAWS = 20_000
Row = dict[str, Any]


def rows(number: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    centers = 2.0 * rng.normal(size=(NUM_COMPONENTS, DIM))
    X = rng.normal(size=(number, DIM))
    X += centers[rng.integers(NUM_COMPONENTS, size=number)]
    return X


# --- against scikit-learn ---------------------------------------------------------------------------------------------


def against_scikit_learn(quick: bool) -> Iterator[Row]:
    """One row per kind of covariances, of EM and of variational Bayes."""
    from threadpoolctl import threadpool_limits

    number, repeats = (NUM_ROWS // 10, 1) if quick else (NUM_ROWS, REPEATS)
    X = rows(number)
    with warnings.catch_warnings(), threadpool_limits(1):
        warnings.simplefilter("ignore")  # scikit-learn's, that it has not converged
        for kind in COVARIANCES:
            yield _em(X, kind, repeats)
        for kind in COVARIANCES:
            yield _bayes(X, kind, repeats)


def _em(X: np.ndarray, kind: Any, repeats: int) -> Row:
    from sklearn.mixture import GaussianMixture as Peer

    problem = GaussianMixture(NUM_COMPONENTS, covariance=kind).problem(X)
    start = vl.em(problem, max_steps=1).point()
    ours, theirs = [], []
    for _ in range(repeats):
        fit, seconds = _timed(lambda: vl.em(problem, start=start, max_steps=STEPS, tolerance=0.0))
        ours.append(seconds)
        peer = Peer(
            NUM_COMPONENTS,
            covariance_type=kind,
            tol=0.0,
            max_iter=STEPS,
            weights_init=start["weights"].numpy(),
            means_init=start["loc"].numpy(),
            precisions_init=start["precision"].numpy(),
        )
        theirs.append(_timed(lambda peer=peer: peer.fit(X))[1])  # type: ignore[misc]
    value, expected = float(fit.history["free_energy"][-1]), len(X) * float(peer.score(X))
    return _row(f"EM, {kind}", ours, theirs, abs(value / expected - 1))


def _bayes(X: np.ndarray, kind: Any, repeats: int) -> Row:
    labels = rows_labels(X)
    problem, table, updates, start = _started(X, kind, labels)
    ours, theirs = [], []
    for _ in range(repeats):
        ours.append(_timed(lambda: mixture_ascent(table, updates, start, max_sweeps=STEPS, tolerance=-1.0))[1])
        peer = mixtures.scikit_learn(problem.model, labels, mended=False, max_iter=STEPS)
        theirs.append(_timed(lambda peer=peer: peer.fit(X))[1])  # type: ignore[misc]
    X, labels = X[:END_ROWS], labels[:END_ROWS]
    problem, table, updates, start = _started(X, kind, labels)
    ended = mixture_ascent(table, updates, start, max_sweeps=END_SWEEPS, tolerance=0.0)
    own = mixtures.as_scikit_learn(ended.factors, updates, table.center)
    differences = []
    for mended in (False, True) if kind in ("diag", "spherical") else (False,):
        peer = mixtures.scikit_learn(problem.model, labels, mended=mended, max_iter=END_SWEEPS).fit(X)
        each = [np.abs(value - getattr(peer, key)).max() / np.abs(value).max() for key, value in own.items()]
        differences.append(float(max(each)))
    return _row(f"variational Bayes, {kind}", ours, theirs, *differences)


def rows_labels(X: np.ndarray) -> np.ndarray:
    """The first rows far from each other as centers, and the rows nearest to each: any start will do."""
    centers = 2.0 * np.random.default_rng(0).normal(size=(NUM_COMPONENTS, DIM)) + 0.5
    return ((centers**2).sum(1) / 2 - X @ centers.T).argmin(1)


def _started(X: np.ndarray, kind: Any, labels: np.ndarray) -> tuple[Any, MixtureRows, MixtureUpdates, Factors]:
    df = (DIM + 2.0) * mixtures.parts(kind, NUM_COMPONENTS, DIM)
    problem = GaussianMixture(NUM_COMPONENTS, covariance=kind, degrees_of_freedom=df).problem(X)
    table = rows_of(problem)
    updates = MixtureUpdates(problem.model.prior.centered(table.center))
    found = hard_moments(table.X, torch.from_numpy(labels), NUM_COMPONENTS, kind, None)
    return problem, table, updates, updates.started(found)


def _timed(run: Callable[[], Any]) -> tuple[Any, float]:
    began = time.process_time()
    result = run()
    return result, time.process_time() - began


def _row(what: str, ours: list[float], theirs: list[float], difference: float, mended: float | None = None) -> Row:
    pair = statistics.median(ours), statistics.median(theirs)
    return {"what": what, "ours": pair[0], "theirs": pair[1], "difference": difference, "mended": mended}


# --- the stream -------------------------------------------------------------------------------------------------------


def stream(number: int) -> Row:
    """One pass from disk, and coordinate ascent on all rows from the same start."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.npy"
        out = np.lib.format.open_memmap(path, mode="w+", dtype=np.float64, shape=(number, DIM))
        centers = 2.0 * np.random.default_rng(0).normal(size=(NUM_COMPONENTS, DIM))
        for piece, start in enumerate(range(0, number, 10**6)):
            rng = np.random.default_rng([1, piece])
            size = min(10**6, number - start)
            out[start : start + size] = rng.normal(size=(size, DIM)) + centers[rng.integers(NUM_COMPONENTS, size=size)]
        out.flush()
        del out
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            found: Row = pool.apply(_one_pass, (str(path),))
        problem = GaussianMixture(NUM_COMPONENTS).problem(np.load(path, mmap_mode="r"), minibatch=BATCH)
        whole = MixtureRows(torch.from_numpy(np.load(path, mmap_mode="c")), None, None, torch.zeros(DIM).double())
        updates = MixtureUpdates(problem.model.prior)
        bound = _bound(whole, updates, {site: _tensors(values) for site, values in found["factors"].items()})
        start = stream_start(problem, seed=0)
        factors = {**start.factors, "loc": {**start.factors["loc"]}}
        factors["loc"]["loc"] = factors["loc"]["loc"] + start.rows.center
        began = time.process_time()
        best = mixture_ascent(whole, updates, factors, max_sweeps=BATCH_SWEEPS, tolerance=1.0)
        seconds = time.process_time() - began
    return {
        **{key: found[key] for key in ("seconds", "memory_mb")},
        "rows": number,
        "batch_seconds": seconds,
        "sweeps": len(best.elbo) - 1,
        "start": (best.elbo[-1] - best.elbo[0]) / abs(best.elbo[-1]),
        "difference": (best.elbo[-1] - bound) / abs(best.elbo[-1]),
    }


def _one_pass(path: str) -> Row:
    """In a process of its own, whose memory is watched."""
    torch.set_num_threads(1)
    problem = GaussianMixture(NUM_COMPONENTS).problem(np.load(path, mmap_mode="r"), minibatch=BATCH)
    sizes, ended = [_anonymous_memory()], threading.Event()

    def watch() -> None:
        while not ended.wait(0.02):
            sizes.append(_anonymous_memory())

    watcher = threading.Thread(target=watch)
    watcher.start()
    number = problem.num_rows
    assert number is not None
    fit, seconds = _timed(lambda: vl.fit(problem, "conjugate", max_steps=math.ceil(number / BATCH), progress=False))
    ended.set()
    watcher.join()
    factors = {
        site: {key: value.numpy() for key, value in fit.guide.standard(site).items()} for site in ("weights", "loc")
    }
    return {"factors": factors, "seconds": seconds, "memory_mb": (max(sizes) - sizes[0]) / 1024}


def _anonymous_memory() -> int:
    """KiB of this process that are no pages of files (Linux)."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon:"))


def _tensors(values: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    return {key: torch.from_numpy(value) for key, value in values.items()}


def _bound(whole: MixtureRows, updates: MixtureUpdates, factors: Factors) -> float:
    normals, divergence = updates.expected(factors)
    return float(whole.moments(normals).log_likelihood - divergence)


# --- posteriors -------------------------------------------------------------------------------------------------------


def posteriors(quick: bool) -> Iterator[Row]:
    """One row per posterior and method."""
    for name in mixtures.POSTERIORS[: 1 if quick else None]:
        loaded = posteriordb.load(name)
        problem = mixtures.published_problem(name, loaded.data["y"])
        published = mixtures.by_mean({key: torch.from_numpy(value) for key, value in loaded.draws.items()})
        began = time.perf_counter()
        sampled = vl.nuts(problem, num_warmup=500, num_draws=250 if quick else 2000, progress=False)
        seconds = time.perf_counter() - began
        reference = mixtures.as_published(problem, sampled)
        yield {
            "name": name,
            "method": "nuts",
            "published": mixtures.apart(reference, published),
            "problems": f"{len(sampled.problems())} → {len(problem.model.align(sampled).problems())}",
            "seconds": seconds,
        }
        for guide in GUIDES:
            fit = vl.fit(problem, guide, progress=False)
            drawn = mixtures.conjugate_draws(fit, DRAWS) if guide == "conjugate" else fit.posterior(DRAWS)
            found = mixtures.as_published(problem, drawn)
            pair = mixtures.apart(found, published), mixtures.apart(found, reference)
            yield {"name": name, "method": guide, "published": pair[0], "nuts": pair[1], "seconds": fit.seconds}


# --- the page ---------------------------------------------------------------------------------------------------------


def page(compared: list[Row], streamed: list[Row], fitted: list[Row]) -> str:
    """The tables."""
    assert __doc__ is not None
    lines = ["# Mixtures of normals", "", "Written by `python -m benchmarks mixture`.", ""]
    lines += [*__doc__.strip().splitlines(), "", "## Against scikit-learn", ""]
    lines += _header("what", "ours, s", "scikit-learn, s", "times faster", "difference", "mended")
    for row in compared:
        mended = "–" if row["mended"] is None else f"{row['mended']:.1e}"
        ratio = row["theirs"] / row["ours"]
        lines.append(
            f"| {row['what']} | {row['ours']:.2f} | {row['theirs']:.2f} | {ratio:.2f} | {row['difference']:.1e} "
            f"| {mended} |"
        )
    lines += ["", f"{NUM_ROWS:,} rows, K = {NUM_COMPONENTS}, D = {DIM}.", "", "## Stream", ""]
    names = ("rows", "one pass, s", "memory, MB", "all rows, s", "sweeps", "start below", "one pass below")
    lines += _header(*names)
    for row in streamed:
        lines.append(
            f"| {row['rows']:,} | {row['seconds']:.1f} | {row['memory_mb']:.0f} | {row['batch_seconds']:.1f} "
            f"| {row['sweeps']} | {row['start']:.1e} | {row['difference']:.1e} |"
        )
    lines += ["", "*Below*: relative to the bound of all rows.", "", "## Posteriors", ""]
    lines += _header("posterior", "method", "shift", "change", "NUTS: shift", "change", "problems", "s")
    for row in fitted:
        cells = [row["name"], row["method"], *(f"{value:.3f}" for value in row["published"])]
        cells += [f"{value:.3f}" for value in row["nuts"]] if "nuts" in row else ["–", "–"]
        cells += [row.get("problems", "–"), f"{row['seconds']:.1f}"]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "*Problems* of the chains as a reference, before and after the components are aligned."]
    return "\n".join([*lines, ""])


def _header(*names: str) -> list[str]:
    return [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]


def main(out: Path, *, quick: bool = False) -> None:
    """Measure and write mixture.md."""
    torch.set_num_threads(1)
    sizes = (STREAM_ROWS // 50,) if quick else (STREAM_ROWS // 10, STREAM_ROWS)
    tables: tuple[list[Row], ...] = ([], [], [])
    for table, found in zip(tables, (posteriors(quick), against_scikit_learn(quick), map(stream, sizes)), strict=True):
        for row in found:
            table.append(row)
            print(f"mixture: {row}", file=sys.stderr, flush=True)
    fitted, compared, streamed = tables
    (out / "mixture.md").write_text(page(compared, streamed, fitted), encoding="utf-8")
