"""The benchmarks measure what they say: models agree, the clock stops where it should, results survive partial runs."""

from __future__ import annotations

import ast
import importlib.util
import json
import math
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_vi_lab as vl
from benchmarks import agreement, channel, goals, report
from benchmarks.problems import NAMES, SHORT, Entry
from benchmarks.tables import growth, race, sampling, svi, vae
from benchmarks.target import WITHIN, Target
from tests import posteriordb

ROOT = Path(__file__).parent.parent
LOC, SD, Y = 1.0, 2.0, torch.tensor([1.0, 3.0], dtype=torch.float64)


def conjugate(y: torch.Tensor) -> None:
    """Two independent normal means: the posterior is a Gaussian with independent coordinates."""
    with pyro.plate("row", len(y)):
        x = pyro.sample("x", dist.Normal(torch.full_like(y, LOC), SD))
        pyro.sample("y", dist.Normal(x, 1.0), obs=y)


EXACT_SD = np.full(2, (1 / SD**2 + 1) ** -0.5)
EXACT_LOC = EXACT_SD**2 * (LOC / SD**2 + Y.numpy())
EVIDENCE = float(torch.distributions.Normal(LOC, math.hypot(SD, 1)).log_prob(Y).sum())


@pytest.fixture
def target() -> Target:
    """A target that needs no files; its baseline is the truth."""
    entry = SimpleNamespace(
        problem=vl.Problem(conjugate, Y), dim=2, loaded=SimpleNamespace(baseline=lambda family: EVIDENCE)
    )
    return Target(entry, "full_rank")  # type: ignore[arg-type]


# The evaluator


@pytest.mark.parametrize("scale", [EXACT_SD, np.diag(EXACT_SD)], ids=["standard deviations", "factor"])
def test_the_elbo_of_the_exact_posterior_is_the_log_evidence(target: Target, scale: np.ndarray) -> None:
    # log p - log q is the same at every draw; its mean with the entropy in closed form is off by the draws' second moment
    assert target.elbo(EXACT_LOC, scale) == pytest.approx(EVIDENCE, abs=1e-3)
    assert target.optimum == pytest.approx(EVIDENCE, abs=1e-3)


def test_any_square_root_of_a_covariance_gives_the_same_elbo(target: Target) -> None:
    factor = np.array([[1.0, 0.0], [0.8, 0.5]])
    rotation = np.array([[0.6, -0.8], [0.8, 0.6]])
    assert target.elbo(EXACT_LOC, factor @ rotation) == pytest.approx(target.elbo(EXACT_LOC, factor), abs=1e-12)


def test_the_gap_is_the_kl_divergence(target: Target) -> None:
    shift = 0.3
    kl = 0.5 * 2 * shift**2  # of a shift by 0.3 standard deviations in both coordinates
    assert target.gap(EXACT_LOC + shift * EXACT_SD, EXACT_SD) == pytest.approx(kl, abs=0.01)
    assert target.gap(np.full(2, np.nan), EXACT_SD) == math.inf


def test_a_baseline_above_our_own_fit_is_the_optimum(target: Target) -> None:
    target.entry.loaded.baseline = lambda family: EVIDENCE + 0.5  # type: ignore[method-assign]
    assert target.optimum == pytest.approx(EVIDENCE + 0.5, abs=2e-3)


# The race


class ScriptedPeer:
    """A worker whose checkpoints are at given distances from the optimum, in nats."""

    def __init__(self, gaps: list[float], *, seconds_per_step: float = 0.001) -> None:
        self.gaps, self.seconds_per_step = iter(gaps), seconds_per_step
        self.steps, self.replies, self.tasks = 0, [[("x", 2)]], []  # type: ignore[var-annotated]

    def send(self, message: Any) -> None:
        if isinstance(message, dict):
            self.tasks.append(message)
        elif message:
            self.steps += message
            point = (EXACT_LOC, next(self.gaps))
            self.replies.append((self.steps, self.steps * self.seconds_per_step, [point]))  # type: ignore[arg-type]

    def receive(self) -> Any:
        return self.replies.pop(0)


def run_race(gaps: list[float], cap: float = 1.0) -> race.Run:
    entry = SimpleNamespace(task={}, permutation=lambda order: np.arange(2))
    # the scripted "scale" is the gap itself
    target = SimpleNamespace(family="full_rank", gap=lambda loc, scale: float(scale[0]))
    peer = ScriptedPeer([np.full(2, gap) for gap in gaps])  # type: ignore[misc]
    configuration = race.Configuration("in_numpyro", 0.1, 1)
    return race.race(peer, entry, target, configuration, seed=0, cap=cap)  # type: ignore[arg-type]


def test_the_clock_stops_at_the_first_checkpoint_that_stays() -> None:
    run = run_race([1.0, 0.05, 0.5, 0.09, 0.08, 0.0])
    assert run.arrived
    assert run.steps == 4 * race.FIRST_BLOCK  # the second checkpoint was near by chance
    assert run.seconds == pytest.approx(run.steps * 0.001)


def test_a_peer_that_does_not_arrive_is_stopped_at_its_cap() -> None:
    run = run_race([2.0] * 100, cap=0.2)
    assert not run.arrived
    assert 0.2 < run.seconds < 0.2 * race.GROWTH + 0.001 * race.FIRST_BLOCK
    assert run.gap == 2.0


def test_an_arrival_in_the_last_moment_is_seen_through() -> None:
    run = run_race([2.0, 0.05, 0.05], cap=0.04)
    assert run.arrived
    assert run.steps == 2 * race.FIRST_BLOCK


def test_checkpoints_grow_apart_by_a_tenth() -> None:
    peer_steps = []
    entry = SimpleNamespace(task={}, permutation=lambda order: np.arange(2))
    target = SimpleNamespace(family="full_rank", gap=lambda loc, scale: peer_steps.append(peer.steps) or 9.0)
    peer = ScriptedPeer([np.ones(2)] * 1000)  # type: ignore[list-item]
    race.race(peer, entry, target, race.Configuration("in_numpyro", 0.1, 1), seed=0, cap=3.0)  # type: ignore[arg-type]
    ratios = np.array(peer_steps[1:]) / np.array(peer_steps[:-1])
    late = np.array(peer_steps[:-1]) > race.FIRST_BLOCK / (race.GROWTH - 1)
    assert ratios[late].max() <= race.GROWTH
    assert ratios[late].min() > race.GROWTH - 0.005


def test_every_peer_has_at_least_four_learning_rates() -> None:
    for grid in (race.numpyro_grid(), race.pymc_grid()):
        assert len({one.lr for one in grid if one.lr is not None}) >= 4
    assert {one.num_particles for one in race.numpyro_grid()} == {1, 10}
    assert None in {one.lr for one in race.pymc_grid()}


# The models


def test_there_are_enough_problems() -> None:
    assert len(set(NAMES)) == len(NAMES) >= 8
    assert set(NAMES) <= set(posteriordb.POSTERIORS)
    assert set(sampling.NAMES) <= set(NAMES)
    assert len(set(sampling.NAMES)) >= 8
    assert set(SHORT) == set(NAMES)


def test_coordinates_of_another_order_are_found() -> None:
    entry = Entry("any")
    entry.__dict__["problem"] = SimpleNamespace(
        density=lambda: SimpleNamespace(
            sites={
                name: SimpleNamespace(unconstrained_shape=torch.Size(shape))
                for name, shape in (("b", (2,)), ("a", ()), ("c", (3,)))
            }
        )
    )
    theirs = [("a", 1), ("b", 2), ("c", 3)]
    assert entry.permutation(theirs).tolist() == [1, 2, 0, 3, 4, 5]
    with pytest.raises(ValueError, match="a contender has the sites"):
        entry.permutation([("a", 1), ("b", 2)])


@pytest.mark.slow
@pytest.mark.parametrize(("contender", "library"), [("in_numpyro", "numpyro"), ("in_pymc", "pymc")])
def test_the_models_of_the_peers_are_ours(contender: str, library: str) -> None:
    if importlib.util.find_spec(library) is None:
        pytest.skip(f"{library} is not installed; `make bench` asks the same before it measures")
    posteriordb.require()
    with channel.Worker(contender) as worker:
        for name in NAMES:
            agreement.check_model(worker, Entry(name))  # raises where they differ


# The processes


def imports_of(module: str, seen: set[str]) -> set[str]:
    """Top-level names that a module of the benchmarks or the tests imports, through others of them too."""
    path = ROOT / Path(*module.split(".")).with_suffix(".py")
    found: set[str] = set()
    if module in seen or not path.exists():
        return found
    seen.add(module)
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        for name in names:
            found.add(name.partition(".")[0])
            if name.startswith(("benchmarks.", "tests.")):
                found |= imports_of(name, seen)
    return found


@pytest.mark.parametrize(
    ("contender", "foreign"),
    [
        ("in_numpyro", {"torch", "pyro", "pyro_vi_lab", "pymc"}),
        ("in_pymc", {"torch", "pyro", "pyro_vi_lab", "numpyro", "jax"}),
        ("in_sklearn", {"torch", "pyro", "pyro_vi_lab", "numpyro", "jax", "pymc"}),
        ("ours", {"numpyro", "jax", "pymc", "sklearn"}),
        ("in_pyro", {"numpyro", "jax", "pymc", "sklearn"}),
    ],
)
def test_a_cold_start_imports_no_other_contender(contender: str, foreign: set[str]) -> None:
    found = imports_of(f"benchmarks.contenders.{contender}", set()) | imports_of("benchmarks.worker", set())
    assert "numpy" in found
    assert not found & foreign


def test_a_contender_that_fails_says_why() -> None:
    with (
        channel.Worker("in_sklearn") as worker,
        pytest.raises(channel.Failure, match="in_sklearn: KeyError: 'unheard_of'"),
    ):
        worker.ask("unheard_of")


def test_a_contender_answers_and_its_caches_are_its_own() -> None:
    data = growth.regression_data(200, binary=True)
    with channel.Worker("in_sklearn") as worker:
        answer = worker.ask("fit", model="logistic_regression", data=data, prior_sd=1.0, repeats=2)
        caches = worker.caches
        assert channel.environment(caches)["XDG_CACHE_HOME"] == str(caches)
        assert caches.is_dir()
    assert len(answer["seconds"]) == 2
    assert not caches.exists()


# What the tables say


def our_runs(*seconds: float) -> dict[str, Any]:
    runs = [{"arrived": True, "seconds": value, "steps": 10, "gap": 0.01, "whole": 2 * value} for value in seconds]
    return {"warm": runs, "cold": [4.0], "again": 3.0}


def peer_runs(seconds: float, *, arrived: bool = True, contender: str = "in_numpyro") -> dict[str, Any]:
    best = {"contender": contender, "lr": 0.1, "num_particles": 1}
    run = {"arrived": arrived, "seconds": seconds, "steps": 500, "gap": 0.05 if arrived else 3.0}
    return {"warm": [run] * 3, "cold": [10.0], "best": best, "grid": []}


def fits_row(problem: str, family: str, **peers: dict[str, Any]) -> dict[str, Any]:
    return {"problem": problem, "dim": 3, "family": family, "contenders": {"ours": our_runs(0.1, 0.2, 0.3), **peers}}


def tables() -> dict[str, list[dict[str, Any]]]:
    """Made-up rows of every table."""
    pyro_capped = {**peer_runs(10.0, arrived=False, contender="in_pyro"), "extrapolated": 50.0}
    pyro_capped.pop("cold")
    fits = [
        fits_row("one", "full_rank", in_numpyro=peer_runs(1.0), in_pyro=pyro_capped),
        fits_row("two", "full_rank", in_numpyro=peer_runs(8.0, arrived=False), in_pyro={"skipped": "no"}),
        fits_row("one", "mean_field", in_numpyro=peer_runs(4.0), in_pymc=peer_runs(6.0)),
        {"problem": "three", "family": "full_rank", "skipped": "in_numpyro: MemoryError"},
    ]
    chains = {
        f"NumPyro, {method}": {"warm": [{"seconds": 1.0, "ess": ess}], "cold": [{"seconds": 10.0, "ess": ess}]}
        for method, ess in zip(sampling.CHAIN_METHODS, (900.0, 1000.0, 800.0), strict=True)
    }
    own = {"warm": [{"seconds": 0.5, "ess": 1000.0}], "cold": [{"seconds": 5.0, "ess": 1000.0}]}
    nuts_contenders = {"ours": {**own, "again": own["cold"]}, "ours, 0.9": own, **chains, "Pyro": {"skipped": "slow"}}
    steps = {name: {"microseconds": [1000.0, 1000.0]} for name in svi.OBJECTIVES}
    steps |= {"Captured": {"microseconds": [20.0, 40.0]}, "JitTrace_ELBO": {"skipped": "no"}}
    epochs: dict[str, Any] = {way: {"seconds": [0.1, 0.2], "loss": 27.0} for way in vae.WAYS}
    epochs |= {"PyTorch, compiled": {"seconds": [0.09, 0.09], "loss": 27.0}, "Captured": {"skipped": "not there"}}
    sizes = [{"series": "N rows", "size": 10**k, "seconds": [10.0 ** (k - 3)]} for k in (3, 4)]
    sizes[1] |= {"before": 100.0, "peak": 150.0, "steps": 9, "converged": "1/1"}
    return {
        "fits": fits,
        "nuts": [{"problem": "one", "dim": 3, "contenders": nuts_contenders}],
        "svi": [{"guide": "AutoNormal", "contenders": steps}],
        "vae": [{"hidden": 200, "contenders": epochs}],
        "growth": [
            *sizes,
            {"series": "R restarts, eight schools, full_rank", "size": 200, "seconds": [1.5]},
            {"series": "N rows", "size": 10**6, "skipped": "growth: MemoryError"},
        ],
    }


def found_goal(word: str, against: str) -> goals.Goal:
    (goal,) = (goal for goal in goals.goals(tables()) if word in goal.work and goal.against.startswith(against))
    return goal


def test_a_goal_is_met_on_every_case_or_missed() -> None:
    full_rank = found_goal("full-rank fit to within 0.1 nat, warm", "NumPyro")
    assert full_rank.ratios == {"one": pytest.approx(5.0), "two": pytest.approx(40.0)}
    assert full_rank.open_ended == {"two"}
    assert full_rank.verdict == "missed on 1 of 2"
    assert found_goal("mean-field fit to within 0.1 nat, warm", "PyMC").verdict == "met"
    assert found_goal("mean-field fit to within 0.1 nat, cold", "NumPyro").ratios == {"one": 2.5}


def test_pyro_is_extrapolated_where_it_was_stopped() -> None:
    goal = found_goal("full-rank fit to within 0.1 nat, warm", "Pyro Auto")
    assert goal.ratios == {"one": pytest.approx(250.0), "two": None}
    assert goal.verdict == "met"


def test_ratios_of_the_other_tables() -> None:
    assert found_goal("second, warm", "NumPyro").ratios == {"one": 2.0}  # against its best way to run chains
    assert found_goal("second, warm", "Pyro").verdict == "not measured"
    assert svi.ratio(tables()["svi"][0], "Trace_ELBO", "Captured") == pytest.approx(1000 / 30)
    assert svi.ratio(tables()["svi"][0], "JitTrace_ELBO", "Captured") is None
    assert vae.ratio(tables()["vae"][0], "Captured, compiled") == pytest.approx(0.09 / 0.15)
    assert found_goal("epoch", "PyTorch").verdict == "not measured"
    assert found_goal("200 fits", "3 seconds").verdict == "met"
    assert growth.exponent(*tables()["growth"][:2]) == pytest.approx(1.0)


def cells(lines: list[str]) -> Iterator[list[int]]:
    """Numbers of cells in the rows of each table."""
    block: list[int] = []
    for line in [*lines, ""]:
        if line.startswith("|"):
            block.append(line.count("|"))
        elif block:
            yield block
            block = []


def test_the_page_has_a_goal_first_and_every_table_whole() -> None:
    page = report.render({"tables": {name: part(rows) for name, rows in tables().items()}})
    headings = [line for line in page if line.startswith("## ")]
    assert headings[0] == "## Goals"
    blocks = list(cells(page))
    assert len(blocks) == 7  # the goals, two families, and four more
    for block in blocks:
        assert len(set(block)) == 1
    text = "\n".join(page)
    assert "≥ 40" in text
    assert "≈ 50.0" in text
    assert "Not measured: three, full_rank: in_numpyro: MemoryError" in text


def part(rows: list[dict[str, Any]]) -> dict[str, Any]:
    return {"quick": False, "versions": {"torch": "2"}, "processor": "a", "cores": 2, "rows": rows}


def test_a_partial_run_changes_its_own_part_alone(tmp_path: Path) -> None:
    assert report.load(tmp_path) == {"tables": {}}
    results = report.load(tmp_path)
    for name in ("svi", "fits"):
        results = report.save(results, name, tables()[name], quick=False, directory=tmp_path)
    again = report.save(report.load(tmp_path), "svi", [], quick=True, directory=tmp_path)
    assert again["tables"]["fits"] == json.loads(json.dumps(results["tables"]["fits"]))
    assert again["tables"]["svi"]["rows"] == []
    assert "smoke run" in (tmp_path / "results.md").read_text(encoding="utf-8")


def test_nothing_is_told_of_the_machine_but_its_processor(tmp_path: Path) -> None:
    results = report.save({"tables": {}}, "svi", [], quick=True, directory=tmp_path)
    assert set(results["tables"]["svi"]) == {"quick", "versions", "processor", "cores", "rows"}


# The environment


def test_peers_are_pinned_beside_us() -> None:
    ours = {line.partition("==")[0].lower() for line in (ROOT / "constraints.txt").read_text().split()}
    pins = (ROOT / "benchmarks" / "constraints-peers.txt").read_text(encoding="utf-8").split()
    names = {name.lower() for name, equals, version in (line.partition("==") for line in pins) if equals and version}
    assert len(names) == len(pins)
    assert {"numpyro", "jax", "jaxlib", "pymc", "pytensor"} <= names
    assert not names & ours  # one place for each pin


def test_digits_are_binary() -> None:
    digits = vae.digits()
    assert digits.shape == (1797, 64)
    assert set(np.unique(digits)) == {0.0, 1.0}


def test_within_is_a_tenth_of_a_nat() -> None:
    assert WITHIN == 0.1
