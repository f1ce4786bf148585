"""The study of natural gradients measures what it says, keeps what it has measured, and names what is worse."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_vi_lab as vl
from benchmarks import channel
from benchmarks.natural_gradient import adam, evaluation, gaussians, ours, run, special, suited, verdicts
from benchmarks.natural_gradient.page import render
from benchmarks.store import Store
from pyro_vi_lab.families import FAMILIES, Params
from pyro_vi_lab.guides import GUIDES
from tests import posteriordb

Y = torch.tensor([1.0, 3.0], dtype=torch.float64)


def conjugate(y: torch.Tensor) -> None:
    """Normal means with independent coordinates: the posterior is in every normal family."""
    with pyro.plate("row", len(y)):
        x = pyro.sample("x", dist.Normal(torch.full_like(y, 1.0), 2.0))
        pyro.sample("y", dist.Normal(x, 1.0), obs=y)


def scaled(y: torch.Tensor) -> None:
    """A scale, in whose logarithm the density falls exponentially."""
    tau = pyro.sample("tau", dist.HalfNormal(y.new_tensor(2.0)))
    with pyro.plate("row", len(y)):
        pyro.sample("y", dist.Normal(0.0, tau), obs=y)


EVIDENCE = float(torch.distributions.Normal(torch.ones_like(Y), 5**0.5).log_prob(Y).sum())


@pytest.fixture(scope="module")
def fit() -> vl.Fit:
    return vl.fit(vl.Problem(conjugate, Y), "mean_field", seed=1, progress=False)


# The bound


def test_at_the_posterior_every_draw_is_the_log_evidence(fit: vl.Fit) -> None:
    assert evaluation.common(fit) == pytest.approx((EVIDENCE, 0.0), abs=1e-9)
    assert evaluation.fresh(fit, 1000) == pytest.approx((EVIDENCE, 0.0), abs=1e-9)


@pytest.mark.parametrize("family", suited.families())
def test_the_common_draws_are_those_of_the_fit(family: str) -> None:
    made = vl.fit(vl.Problem(conjugate, Y), family, seed=1, max_steps=2, progress=False)
    mean, error = made.elbo(evaluation.COMMON_DRAWS, seed=evaluation.COMMON_SEED)
    assert evaluation.common(made) == pytest.approx((mean, error), rel=1e-9, abs=1e-9)


def test_a_bound_that_is_not_finite_is_the_worst(fit: vl.Fit) -> None:
    bound = evaluation.Bound(fit.problem.density(), fit.family)
    assert bound(Params(torch.full((2,), torch.nan, dtype=Y.dtype), torch.ones(2, dtype=Y.dtype))) == -math.inf


def test_a_bound_above_the_evidence_is_none(fit: vl.Fit) -> None:
    assert fit.params is not None
    params = Params(*(value[0] for value in fit.params))
    density, family = fit.problem.density(), fit.family
    assert evaluation.Bound(density, family, evidence=EVIDENCE)(params) == pytest.approx(EVIDENCE)
    assert evaluation.Bound(density, family, evidence=EVIDENCE - 3)(params) == -math.inf


def test_a_degenerate_member_has_no_bound_above_the_evidence() -> None:
    density = vl.Problem(conjugate, Y).density()
    scale = torch.tensor([[1e-20, 0.0], [1e20, 1e-20]], dtype=Y.dtype)
    assert evaluation.Bound(density, FAMILIES["full_rank"])(Params(0 * Y, scale)) < EVIDENCE


def test_the_gap_of_a_peer_is_its_kl_divergence(fit: vl.Fit) -> None:
    peer = evaluation.Peer(fit.problem.density(), "full_rank", EVIDENCE)
    loc, sd = fit.loc.numpy(), fit.covariance().diagonal().sqrt().numpy()
    rotation = np.array([[0.6, -0.8], [0.8, 0.6]])  # a factor in the order of another library
    assert peer.gap(loc, np.diag(sd) @ rotation) == pytest.approx(0.0, abs=1e-9)
    assert peer.gap(loc + 0.3 * sd, np.diag(sd)) == pytest.approx(0.09, abs=5 * 0.3 * 2**0.5 / 64)
    assert peer.gap(np.full(2, np.nan), np.diag(sd)) == math.inf
    assert peer.gap(loc, np.zeros((2, 2))) == math.inf


def test_arrival_is_the_first_checkpoint_that_stays() -> None:
    path = [[10, 0.1, -5.0], [20, 0.2, -0.05], [30, 0.3, -0.5], [40, 0.4, -0.09], [50, 0.5, -0.01]]
    assert evaluation.arrival(path, 0.0) == [40, 0.4, -0.09]
    assert evaluation.arrival(path, 1.0) is None
    assert evaluation.arrival([[10, 0.1, None]], 0.0) is None


# Our fits


def test_a_fit_goes_on_without_its_stop(fit: vl.Fit) -> None:
    with ours.no_stop():
        assert vl.fit(vl.Problem(scaled, Y), "mean_field", seed=1, max_steps=60, progress=False).num_steps == 60
    assert fit.status is vl.Status.CONVERGED
    assert ours.longer(fit, seconds=0.5)["common"] == pytest.approx(EVIDENCE, abs=1e-6)


def test_a_posterior_is_fitted_and_climbed() -> None:
    posteriordb.require()
    task = {"posterior": "dogs-dogs_2020", "family": "mean_field", "quick": True}
    row = ours.posterior(**task)  # type: ignore[arg-type]
    assert row["status"] == "converged"
    assert row["baseline"] - row["elbo"] < 0.1 + 5 * row["error"]
    assert row["judged"] == pytest.approx(row["common"], abs=0.5)
    other = adam.posterior(**task, num_particles=64, reference=row["common"], our_steps=row["steps"])  # type: ignore[arg-type]
    assert other["lr"] in adam.LEARNING_RATES
    assert other["common"] < row["common"] + 0.01
    seeds = ours.seeds(posterior="dogs-dogs_2020", family="mean_field", num_seeds=2, seconds=60.0)
    assert [fit["status"] for fit in seeds["fits"]] == ["converged"] * 2
    assert all(0 < fit["wasted"] < fit["steps"] for fit in seeds["fits"])
    json.dumps([row, other, seeds], allow_nan=False)


def test_steps_are_wasted_after_the_bound_has_come_near_for_good(fit: vl.Fit) -> None:
    bound = evaluation.Bound(fit.problem.density(), fit.family, 2000)
    assert fit.params is not None
    loc, scale = (value[0] for value in fit.params)
    shifted = [Params(loc + size * scale, scale) for size in (3.0, 0.1, 1.0, 0.2, 0.1, 0.0)]
    assert ours.wasted(bound, shifted) == 2  # of a shift by d standard deviations d² nats are lost here


def test_a_watched_fit_is_seen_from_its_start_to_its_end() -> None:
    with ours.watched() as path:
        fit = vl.fit(vl.Problem(scaled, Y), "mean_field", seed=1, compile=False, progress=False)
    assert len(path) == fit.num_steps + 1
    torch.testing.assert_close(path[0].loc, torch.zeros(1, dtype=Y.dtype))
    torch.testing.assert_close(path[-1].loc, fit.loc)


def test_every_guide_suits_or_is_said_not_to_be_fitted_by_its_bound() -> None:
    assert set(suited.families()) | set(suited.NOT_BY_BOUND) >= set(GUIDES)


# Adam


@pytest.mark.parametrize("family", ["full_rank", "low_rank"])
def test_adam_climbs_to_the_same_bound(family: str) -> None:
    problem = vl.Problem(conjugate, Y)
    density = problem.density()
    torch.manual_seed(0)
    fit = vl.fit(problem, family, seed=1, progress=False)
    guide = adam.start(problem, family)
    begin = guide.params
    ascent = adam.Ascent(density, guide, lr=0.05, num_particles=64)
    bound, (reference, _) = evaluation.Bound(density, guide.family), evaluation.common(fit)
    found = adam.climb(ascent, bound, reference, 10, math.inf, quick=False)
    assert bound(begin) < reference - 1
    for one, other in zip(begin, adam.start(problem, family).params, strict=True):
        torch.testing.assert_close(one, other)  # a new one starts anew
    assert found["arrived"] is not None
    assert found["arrived"][0] < found["steps"]
    assert adam.polish(ascent, bound, reference, seconds=0.01) == pytest.approx(reference, abs=0.1)


# Targets


def test_the_least_kl_of_a_family_is_reached_by_its_best_member() -> None:
    loc, covariance = gaussians.target(5, 100.0)
    values = torch.linalg.eigvalsh(covariance)
    assert float(values[-1] / values[0]) == pytest.approx(100.0)
    assert gaussians.kl(loc, covariance, loc, covariance) == pytest.approx(0.0, abs=1e-10)
    best = (1 / torch.linalg.inv(covariance).diagonal()).diag()
    assert gaussians.kl(loc, best, loc, covariance) == pytest.approx(gaussians.least_kl(covariance, "mean_field"))
    assert gaussians.kl(loc, 1.1 * best, loc, covariance) > gaussians.least_kl(covariance, "mean_field") > 0
    one, other = (torch.distributions.MultivariateNormal(loc + shift, covariance) for shift in (0.0, 0.1))
    expected = float(torch.distributions.kl_divergence(one, other))
    assert gaussians.kl(loc, covariance, loc + 0.1, covariance) == pytest.approx(expected)


def test_a_gaussian_is_fitted_to_the_least_kl() -> None:
    row = gaussians.fit(dim=2, condition=100.0, family="mean_field")
    assert max(row["kl"]) < verdicts.KL_GOAL
    assert min(row["kl"]) > -1e-9


@pytest.mark.parametrize("model", [special.two_modes, special.banana])
def test_special_targets_are_normalized(model: Any) -> None:
    density = vl.Problem(model).density()
    axes = [torch.linspace(-9, 9, 361, dtype=Y.dtype), torch.linspace(-9, 40, 981, dtype=Y.dtype)]
    grid = torch.cartesian_prod(*axes)
    cell = (axes[0][1] - axes[0][0]) * (axes[1][1] - axes[1][0])
    assert float(density.log_prob(grid).exp().sum() * cell) == pytest.approx(1.0, abs=1e-4)


def test_every_special_target_is_a_density() -> None:
    for model in {case.model for case in special.CASES}:
        density = vl.Problem(model).density()
        assert torch.isfinite(density.log_prob(torch.zeros(1, density.dim, dtype=Y.dtype))).all()


def test_a_guide_that_is_not_there_is_skipped_with_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(special, "GUIDES", {})
    row = special.case(key="banana|flow")
    assert "no guide `flow`" in row["skipped"]
    assert row["absent"]  # so that it is asked again when there is one


def test_a_student_t_is_nearer_to_a_student_t() -> None:
    near, far = (
        special.case(key=f"Student-t (5), independent, D = 10|{guide}")
        for guide in ("mean_field_student_t", "mean_field")
    )
    assert near["kl"] < 0.01 + 5 * near["error"]
    assert far["kl"] > 0.05


# The rows


def test_rows_are_kept_and_not_measured_again(tmp_path: Path) -> None:
    store, measured = Store(tmp_path, "natural_gradient"), []

    def measure(lane: run.Lane) -> dict[str, Any]:
        measured.append(lane)
        return {"status": "converged"}

    groups = [[run.Task("part", f"row {i}", measure)] for i in range(3)]
    run._work(store, groups, 2, 0.0, quick=True)
    again = Store(tmp_path, "natural_gradient")
    run._work(again, groups, 2, 0.0, quick=True)
    assert len(measured) == 3
    assert set(again.rows["part"]) == {"row 0", "row 1", "row 2"}
    run._work(again, groups, 1, 0.0, quick=False)  # a smoke run is no measurement
    assert len(measured) == 6


def test_a_row_that_fails_is_said_and_tried_again(tmp_path: Path) -> None:
    store = Store(tmp_path, "natural_gradient")

    def measure(lane: run.Lane) -> dict[str, Any]:
        with lane.worker("in_sklearn", 30.0) as worker:
            return dict(worker.ask("unheard_of"))

    run._work(store, [[run.Task("part", "row", measure)]], 1, 0.0, quick=False)
    assert "KeyError" in store.rows["part"]["row"]["failed"]
    assert not store.has("part", "row", quick=False)


def test_a_mistake_of_ours_ends_the_run(tmp_path: Path) -> None:
    def measure(lane: run.Lane) -> dict[str, Any]:
        raise KeyError("oops")

    with pytest.raises(KeyError, match="oops"):
        run._work(Store(tmp_path, "natural_gradient"), [[run.Task("part", "row", measure)]], 2, 0.0, quick=False)


def test_a_row_that_takes_too_long_is_given_up() -> None:
    lane = run.Lane()
    with pytest.raises(channel.Failure, match="took longer than 0 s"), lane.worker("in_sklearn", 0.01) as worker:
        worker.receive()  # nothing was asked: it would wait for ever
    lane.close()


# What the page says


def made_up() -> dict[str, dict[str, dict[str, Any]]]:
    """Rows of every part: one posterior where all is well, one where it is not, and guides that do not suit."""
    base = {
        "dim": 3,
        "status": "converged",
        "steps": 10,
        "gradients": 640,
        "seconds": 0.1,
        "particles": [64, 64],
        "error": 0.001,
    }
    well = {
        **base,
        "elbo": -10.0,
        "common": -10.0,
        "judged": -10.0,
        "baseline": -10.05,
        "long": {"common": -9.99, "judged": -9.99, "steps": 90, "wanted": 90, "particles": 2048},
    }
    ill = {
        **well,
        "common": -10.5,
        "judged": -10.5,
        "status": "out of steps",
        "message": "no",
        "baseline": -9.0,
        "long": {**well["long"], "steps": 5},
    }
    path = [[200, 0.2, -10.3], [300, 0.3, -10.05], [400, 0.4, -10.02]]
    climbed = {
        "num_particles": 64,
        "lr": 0.1,
        "steps": 400,
        "seconds": 0.4,
        "path": path,
        "common": -10.0,
        "judged": -10.01,
        "runs": [],
    }
    peer = {"lr": 0.1, "arrived": True, "steps": 500, "seconds": 0.5, "gap": -0.02, "num_particles": 10, "runs": []}
    fits = [
        {"status": "converged", "common": value, "error": 0.01, "steps": 10, "wasted": 4}
        for value in (-10.0, -10.01, -10.4)
    ]
    return {
        "ours": {"one|full_rank": well, "two|full_rank": ill, "one|low_rank": {**base, "skipped": "its tails"}, "two|low_rank": {"failed": "MemoryError"}},
        "adam": {"one|full_rank": climbed, "two|full_rank": {**climbed, "path": path[:1], "steps": 50}},
        "pyro": {"one|full_rank": peer, "two|full_rank": {**peer, "arrived": False, "gap": 1e300}},
        "numpyro": {"one|full_rank": {"failed": "no JAX"}},
        "seeds": {"one|full_rank": {"dim": 3, "fits": fits, "seconds": 1.0}},
        "special": {"banana|flow": {"target": "banana", "guide": "flow", "exact": 0.0, "skipped": "there is none"}},
        "gaussians": {"2|1|full_rank": {"dim": 2, "condition": 1.0, "family": "full_rank", "statuses": ["converged"] * 3, "kl": [1e-9] * 3, "least": 0.0, "steps": [3, 3, 4], "seconds": 0.1}},
        "large": {"low_rank": {"family": "low_rank", "fit": {"particles": 64, "seconds": 0.02, "before": 100.0, "peak": 150.0}, "gradient": {"seconds": 0.01, "before": 100.0, "peak": 120.0}}},
    }  # fmt: skip


def test_distances_are_to_the_best_of_any_method() -> None:
    one, two, *others = verdicts.lines(made_up())
    assert one.best == pytest.approx(-9.99 + 0.02)  # Pyro was above the best of ours and Adam
    assert one.below_best == pytest.approx(0.03)
    assert one.below_longer == pytest.approx(0.01)
    assert one.adam_below == pytest.approx(0.01)
    assert one.below_baseline == pytest.approx(-0.05)
    assert one.adam_arrival == 300.0
    assert one.adam_ratio == pytest.approx(30.0)
    assert (two.adam_arrival, two.adam_ratio) == (None, pytest.approx(5.0))
    assert not any(line.suited for line in others)


def test_goals_name_what_misses_them() -> None:
    found = {goal.what: goal for goal in verdicts.goals(made_up())}
    assert [goal.verdict for goal in found.values()] == [
        "missed",
        "missed",
        "missed",
        "missed",
        "missed",
        "missed",
        "met",
        "met",
    ]
    assert "two, full_rank" in next(goal.found for what, goal in found.items() if "CONVERGED, of all" in what)
    assert "1 of 3 (33.3 %): one, full_rank 1" in next(goal.found for what, goal in found.items() if "false" in what)
    assert {goal.verdict for goal in verdicts.goals({})} == {"not measured"}


def test_a_stop_is_false_beyond_its_errors() -> None:
    (one,) = verdicts.stops(made_up())
    assert one.top == pytest.approx(-9.97)
    assert (one.false(), one.false(100.0)) == (1, 0)


def blocks(page: list[str]) -> Iterator[list[int]]:
    block: list[int] = []
    for line in [*page, ""]:
        if line.startswith("|"):
            block.append(line.count("|"))
        elif block:
            yield block
            block = []


@pytest.mark.parametrize("rows", [made_up(), {}], ids=["all", "nothing"])
def test_the_page_has_every_table_whole(rows: Any, tmp_path: Path) -> None:
    path = tmp_path / "natural_gradient.json"
    path.write_text(json.dumps({"versions": {"torch": "2"}, "processor": "a", "cores": 2, "rows": rows}))
    page = render(path)
    assert all(len(set(block)) == 1 for block in blocks(page))
    text = "\n".join(page)
    assert text.index("## Goals") < text.index("## Stops")
    if rows:
        assert "- Not one: its tails." in text
        assert "far below" in text
        assert "no JAX" in text
