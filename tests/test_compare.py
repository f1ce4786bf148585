from __future__ import annotations

import dataclasses
import json
import math
import sys
from pathlib import Path
from typing import Any

import arviz
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_vi_lab as vl
from pyro_vi_lab import Comparison, Posterior, Problem, Status, arviz_bridge, compare
from pyro_vi_lab.errors import ArgumentError, DataError, FileError, LabWarning
from pyro_vi_lab.report import warnings_about
from tests import comparisons

COLUMNS = [
    "candidate",
    "status",
    "verdict",
    "negative_elbo",
    "negative_elbo_se",
    "khat",
    "khat_se",
    "importance_ess",
    "max_mean_shift",
    "worst_mean_parameter",
    "min_sd_ratio",
    "max_sd_ratio",
    "steps",
    "seconds",
    "gradients",
    "reference_cost",
]


def coin(y: torch.Tensor) -> None:
    p = pyro.sample("p", dist.Beta(2.0, 2.0))
    with pyro.plate("toss", len(y)):
        pyro.sample("y", dist.Bernoulli(p), obs=y)


def coin_problem() -> Problem:
    return Problem(coin, torch.tensor([1.0, 0.0, 1.0, 1.0]))


def coin_reference(num_draws: int = 1000) -> Posterior:
    generator = np.random.default_rng(0)
    return Posterior({"p": torch.as_tensor(generator.beta(5, 3, size=(2, num_draws)))}, method="exact")


# --- numbers --------------------------------------------------------------------------------------------------------


def test_the_full_rank_fit_of_a_conjugate_model_is_its_exact_posterior() -> None:
    comparison = comparisons.regression()
    found = comparison.discrepancies["full_rank"]
    # Five Monte Carlo standard errors.
    assert (np.abs(found.mean_shift) < 5 * found.mean_shift_mcse).all()
    assert (np.abs(found.sd_ratio - 1) < 5 * found.sd_ratio_mcse).all()
    evidence = comparison.reference.info["log_evidence"]
    value, error = comparison.elbos["full_rank"]
    # The fit stops within 0.5 thousandths of a nat per dimension; below that the bound is the evidence itself.
    assert abs(value - evidence) < 5 * error + 5e-4 * comparison.problem.density().dim
    assert comparison.best == "full_rank"


def test_the_mean_field_fit_has_the_sds_that_its_theory_gives() -> None:
    # A mean-field normal fitted to N(m, V) has the mean m and the variances 1 / (V^-1)_ii (Bishop 2006, eq. 10.13).
    comparison = comparisons.regression()
    exact = comparisons.REGRESSION.exact(*comparison.problem.args)
    expected = (exact.covariance.inverse().diagonal() ** -0.5 / exact.covariance.diagonal().sqrt()).numpy()
    found = comparison.discrepancies["mean_field"]
    assert found.parameters[0] == "intercept"
    assert (np.abs(found.sd_ratio - expected) < 5 * found.sd_ratio_mcse).all()


def test_the_table_has_the_reference_first_and_one_row_per_candidate() -> None:
    comparison = comparisons.regression()
    table = comparison.table()
    assert list(table.columns) == COLUMNS
    assert table["candidate"].tolist() == ["reference", "full_rank", "mean_field"]
    assert table["verdict"].tolist()[1:] == ["trust", comparison.verdicts["mean_field"].decision]
    assert table["status"].tolist() == ["reference", "converged", "converged"]
    assert table.loc[0, "negative_elbo":"max_sd_ratio"].isna().all()  # type: ignore[misc]
    row = table.set_index("candidate").loc["mean_field"]
    fit, found = comparison.fits["mean_field"], comparison.discrepancies["mean_field"]
    assert row["negative_elbo"] == -comparison.elbos["mean_field"][0]
    assert row["steps"] == fit.num_steps
    assert row["gradients"] == fit.num_gradients
    assert row["seconds"] == fit.seconds
    assert row["khat"] == comparison.importance["mean_field"].khat
    assert row["max_mean_shift"] == np.abs(found.mean_shift).max()
    assert row["worst_mean_parameter"] == found.parameters[int(np.abs(found.mean_shift).argmax())]
    assert (row["min_sd_ratio"], row["max_sd_ratio"]) == (found.sd_ratio.min(), found.sd_ratio.max())
    assert table.attrs["reference_problems"] == []


def test_the_parameters_are_those_of_every_candidate() -> None:
    comparison = comparisons.regression()
    frame = comparison.parameters()
    assert frame["parameter"].tolist() == ["intercept", "beta[0]", "beta[1]", "beta[2]"] * 2
    assert frame["candidate"].tolist() == ["mean_field"] * 4 + ["full_rank"] * 4
    mean = comparison.posteriors["full_rank"].mean()["beta"][1]
    assert frame.loc[6, "mean"] == pytest.approx(float(mean), rel=1e-12)
    np.testing.assert_allclose(frame["sd_ratio"], frame["sd"] / frame["reference_sd"], rtol=1e-12)


def test_the_same_seed_gives_the_same_numbers_and_another_one_others() -> None:
    problem = coin_problem()

    def numbers(seed: int) -> dict[str, Any]:
        found = compare(problem, reference=coin_reference(), seed=seed, progress=False).to_dict()
        for row in found["candidates"]:
            del row["seconds"], row["reference_cost"], row["trust"]["seconds"]
        return found

    assert numbers(0) == numbers(0)
    assert numbers(0)["parameters"] != numbers(1)["parameters"]


@pytest.mark.slow
def test_without_a_reference_nuts_is_run() -> None:
    comparison = compare(coin_problem(), "full_rank", progress=False, seed=2)
    assert comparison.reference_name == "nuts"
    assert comparison.reference.info["seed"] == 2
    assert (comparison.reference.num_chains, comparison.reference.num_draws) == (4, 1000)
    assert comparison.reference_problems == []
    # Beta(5, 3): mean 5/8. Five Monte Carlo standard errors.
    error = float(arviz_bridge.mcse(comparison.reference.draws["p"].numpy()))
    assert abs(float(comparison.reference.mean()["p"]) - 5 / 8) < 5 * error


# --- an unfit reference, fits that fail -----------------------------------------------------------------------------


def test_an_unfit_reference_is_said_wherever_its_numbers_are_shown() -> None:
    comparison = comparisons.unfit()
    assert comparison.reference_problems
    assert "ESS" in comparison.reference_problems[0]
    table = comparison.table()
    assert table.attrs["reference_problems"] == comparison.reference_problems
    assert table.loc[0, "status"] == "unfit reference"
    assert comparison.to_dict()["reference"]["problems"] == comparison.reference_problems
    assert f"The reference is unfit: {comparison.reference_problems[0]}" in comparison.report()
    # k-hat needs no reference, the sd ratio does.
    assert all("standard deviation" not in reason for reason in comparison.warnings()["mean_field"])


def test_a_candidate_that_diverged_has_a_row_and_no_posterior() -> None:
    comparison = comparisons.diverged()
    assert comparison.best is None
    assert comparison.posteriors == {}
    table = comparison.table()
    assert table["status"].tolist() == ["reference", "diverged", "diverged"]
    assert table.loc[1:, "negative_elbo"].isna().all()
    assert comparison.parameters().empty
    (reason,) = comparison.warnings()["full_rank"]
    assert "diverged" in reason


def test_one_candidate_may_fail_beside_another(monkeypatch: pytest.MonkeyPatch) -> None:
    comparison = failing_beside(monkeypatch)
    assert comparison.best == "full_rank"
    assert list(comparison.posteriors) == ["full_rank"]
    assert list(comparison.fits) == ["mean_field", "full_rank"]
    assert "the fit diverged: on purpose" in comparison.report()


def failing_beside(monkeypatch: pytest.MonkeyPatch) -> Comparison:
    """A mean-field fit made to diverge, beside a full-rank one that converges."""
    real = vl.fit

    def fit(problem: Problem, guide: Any, **options: Any) -> vl.Fit:
        result = real(problem, guide, **options)
        if guide != "mean_field":
            return result
        return dataclasses.replace(result, statuses=(Status.DIVERGED,), message="diverged: on purpose")

    module = sys.modules["pyro_vi_lab.compare"]
    monkeypatch.setattr(module, "fit", fit)
    return compare(coin_problem(), reference=coin_reference(), progress=False)


def test_checks_that_cannot_be_computed_are_reasons_not_to_trust() -> None:
    stuck = Posterior({"p": torch.full((2, 500), 0.5, dtype=torch.float64)}, method="stuck")
    comparison = compare(coin_problem(), ["full_rank"], reference=stuck, progress=False)
    assert comparison.discrepancies == {}
    (reason,) = comparison.notes["full_rank"]
    assert "cannot be compared with the reference" in reason
    assert reason in comparison.warnings()["full_rank"]
    assert comparison.to_dict()["parameters"] == []
    assert "cannot be compared" in comparison.report()


@pytest.mark.parametrize(
    ("numbers", "expected"),
    [
        ({"khat": 0.7, "max_mean_shift": 0.5, "min_sd_ratio": 0.5, "max_sd_ratio": 2.0}, []),
        ({"khat": 0.71}, ["k-hat is 0.71"]),
        ({"khat": math.inf}, ["k-hat is ∞"]),
        ({"khat": -math.inf}, []),
        ({"max_mean_shift": 0.6, "worst_mean_parameter": "tau"}, ["mean of tau is off by 0.60"]),
        ({"min_sd_ratio": 0.4}, ["0.40 times"]),
        ({"max_sd_ratio": 2.5}, ["2.50 times"]),
        ({"khat": None, "max_mean_shift": float("nan")}, []),
    ],
)
def test_warnings_have_limits(numbers: dict[str, Any], expected: list[str]) -> None:
    found = warnings_about(numbers, judged=True)
    assert len(found) == len(expected)
    assert all(part in sentence for part, sentence in zip(expected, found, strict=True))
    if "khat" not in numbers:
        assert warnings_about(numbers, judged=False) == []


# --- arguments ------------------------------------------------------------------------------------------------------


def test_a_fit_is_compared_as_it_is() -> None:
    problem = Problem(coin, torch.tensor([1.0, 0.0, 1.0, 1.0]))
    fitted = vl.fit(problem, "mean_field", seed=3, progress=False)
    reference = vl.fit(problem, "full_rank", seed=4, progress=False).posterior(2000)
    comparison = compare(problem, [fitted, "full_rank"], reference=reference, progress=False)
    assert comparison.fits["mean_field"] is fitted
    assert list(comparison.fits) == ["mean_field", "full_rank"]
    other = Problem(coin, torch.tensor([1.0, 0.0]))
    with pytest.raises(ArgumentError, match=r"the fit 'mine' is of .*, not of the problem"):
        compare(other, {"mine": fitted}, reference=reference, progress=False)
    point = vl.fit(problem, "map", progress=False)
    with pytest.raises(ArgumentError, match="guide 'map' is a point"):
        compare(problem, [point], reference=reference, progress=False)


def test_guides_can_be_classes_instances_or_named() -> None:
    instance = vl.guides.FullRankNormal(coin)
    problem, reference = coin_problem(), coin_reference()
    comparison = compare(problem, [vl.guides.MeanFieldNormal, instance], reference=reference, progress=False)
    assert list(comparison.fits) == ["MeanFieldNormal", "FullRankNormal"]
    named = compare(problem, {"plain": "full_rank", "a/b": "full_rank"}, reference=reference, progress=False)
    assert list(named.fits) == ["plain", "a_b"]
    assert named.elbos["plain"] == named.elbos["a_b"]


def test_names_never_clash_with_files_or_each_other() -> None:
    guides = {"nuts": "full_rank", "report": "full_rank"}
    comparison = compare(coin_problem(), guides, reference=coin_reference(), progress=False)
    assert list(comparison.fits) == ["nuts_2", "report_2"]
    same = [vl.guides.MeanFieldNormal, vl.guides.MeanFieldNormal]
    comparison = compare(coin_problem(), same, reference=coin_reference(), progress=False)
    assert list(comparison.fits) == ["MeanFieldNormal", "MeanFieldNormal_2"]


@pytest.mark.parametrize(
    ("guides", "message"),
    [
        ([], "nothing to compare"),
        ({}, "nothing to compare"),
        (["full_rank", "full_rank"], "named twice"),
        (["full_rnk"], "did you mean 'full_rank'"),
    ],
)
def test_wrong_guides_are_named_before_any_sampling(guides: Any, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: object, **__: object) -> Posterior:
        pytest.fail("NUTS was run")

    monkeypatch.setattr(sys.modules["pyro_vi_lab.compare"], "nuts", unreachable)
    with pytest.raises(ArgumentError, match=message):
        compare(coin_problem(), guides, progress=False)


def test_a_reference_of_another_model_is_refused() -> None:
    other = Posterior({"q": torch.zeros(1, 10)})
    with pytest.raises(ArgumentError, match="it has q; the model has p"):
        compare(coin_problem(), reference=other, progress=False)
    wrong = Posterior({"p": torch.zeros(1, 10, 3)})
    with pytest.raises(DataError, match=r"site 'p' have shape \(3,\)"):
        compare(coin_problem(), reference=wrong, progress=False)


def test_a_reference_may_lack_a_site(tmp_path: Path) -> None:
    problem = comparisons.regression_problem()
    draws = {"beta": comparisons.regression_reference(problem).draws["beta"]}
    comparison = compare(problem, ["full_rank"], reference=Posterior(draws, method="published"), progress=False)
    assert comparison.discrepancies["full_rank"].parameters == ("beta[0]", "beta[1]", "beta[2]")
    comparison.save(tmp_path)
    assert "posterior_predictive" not in arviz.from_netcdf(str(tmp_path / "reference.nc"))


# --- files ----------------------------------------------------------------------------------------------------------


def test_the_numbers_are_strict_json() -> None:
    for make in comparisons.ALL.values():
        found = make().to_dict()
        assert json.loads(json.dumps(found, allow_nan=False)) == found
    found = comparisons.regression().to_dict()
    assert found["problem"] == "regression"
    assert found["sites"]["beta"] == {"kind": "latent", "shape": [3], "dims": ["feature"]}
    assert found["best"] == "full_rank"
    assert len(found["data_hash"]) == 64
    assert len(found["parameters"]) == 8
    candidate = found["candidates"][1]
    assert len(candidate["negative_elbo_history"]) == candidate["steps"] + 1
    assert candidate["status"] == "converged"


def test_saved_files_open_and_agree(tmp_path: Path) -> None:
    comparison = comparisons.regression()
    paths = comparison.save(tmp_path / "out")
    assert sorted(paths) == ["comparison", "full_rank", "mean_field", "reference", "report"]
    assert all(path.is_file() for path in paths.values())
    numbers = json.loads(paths["comparison"].read_text(encoding="utf-8"))
    assert numbers["files"] == sorted(path.name for path in (tmp_path / "out").iterdir())
    assert numbers["parameters"] == comparison.to_dict()["parameters"]
    assert paths["report"].read_text(encoding="utf-8").startswith("<!doctype html>")
    for name in ("full_rank", "mean_field"):
        found = arviz.from_netcdf(str(paths[name]))["posterior"]["beta"]
        np.testing.assert_array_equal(found.values, comparison.posteriors[name].draws["beta"].numpy())


def test_a_reference_by_nuts_is_saved_under_that_name(tmp_path: Path) -> None:
    reference = dataclasses.replace(coin_reference(), method="nuts")
    comparison = compare(coin_problem(), ["full_rank"], reference=reference, progress=False)
    assert "nuts" in comparison.save(tmp_path)
    assert (tmp_path / "nuts.nc").is_file()


def test_a_diverged_candidate_leaves_no_posterior_not_even_an_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compare(coin_problem(), reference=coin_reference(), progress=False).save(tmp_path)
    assert (tmp_path / "mean_field.nc").is_file()
    (tmp_path / "notes.txt").write_text("mine")
    failing_beside(monkeypatch).save(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "comparison.json",
        "full_rank.nc",
        "notes.txt",
        "reference.nc",
        "report.html",
    ]
    comparisons.diverged().save(tmp_path / "all")
    assert not list((tmp_path / "all").glob("*_*.nc"))


def test_nothing_is_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    comparison = comparisons.regression()

    def broken(_: Comparison) -> str:
        raise RuntimeError("no report")

    monkeypatch.setattr(Comparison, "report", broken)
    with pytest.raises(RuntimeError, match="no report"):
        comparison.save(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "text", ["", "[]", "{", '{"files": 3}', '{"files": ["../keep.nc", "/keep.nc", 3, "keep.txt"]}', "\xff"]
)
def test_an_old_account_of_files_is_not_trusted(tmp_path: Path, text: str) -> None:
    out = tmp_path / "out"
    out.mkdir()
    for keep in (tmp_path / "keep.nc", out / "keep.txt"):
        keep.write_text("mine")
    (out / "comparison.json").write_bytes(text.encode("latin-1"))
    comparisons.diverged().save(out)
    assert (tmp_path / "keep.nc").read_text() == (out / "keep.txt").read_text() == "mine"
    assert json.loads((out / "comparison.json").read_text(encoding="utf-8"))["problem"] == "unbounded"


def test_an_unwritable_directory_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(FileError, match="choose another directory"):
        comparisons.diverged().save(tmp_path / "file")


def test_pointwise_groups_that_would_be_huge_are_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = sys.modules["pyro_vi_lab.compare"]
    monkeypatch.setattr(module, "MAX_POINTWISE", 40 * 1000)  # 40 rows, 1000 draws of each fit, 4000 of the reference
    with pytest.warns(LabWarning, match="of reference are left out"):
        comparisons.regression().save(tmp_path)
    assert "log_likelihood" not in arviz.from_netcdf(str(tmp_path / "reference.nc"))
    assert "log_likelihood" in arviz.from_netcdf(str(tmp_path / "full_rank.nc"))


def test_candidates_are_ranked_by_verdict_then_by_bound() -> None:
    comparison = comparisons.regression()
    assert comparison.ranked == ["full_rank", "mean_field"]
    assert comparison.best == "full_rank"
    assert comparison.verdicts["full_rank"].decision == "trust"
    assert comparison.verdicts["mean_field"].decision != "trust"
    assert comparison.warnings()["full_rank"] == []
    assert any("off by more than" in reason for reason in comparison.warnings()["mean_field"])


def test_an_unfit_reference_leads_to_no_verdict_by_itself() -> None:
    """The fit is judged without it, and the reasons say which of its checks failed."""
    comparison = comparisons.unfit()
    assert comparison.reference_problems
    for verdict in comparison.verdicts.values():
        assert any(reason.startswith("the reference is unfit and was not used: ") for reason in verdict.reasons)
        assert "reference" not in set(verdict.parameters["source"])


def test_a_reference_speaks_against_a_fit_that_nothing_else_doubts() -> None:
    problem = coin_problem()
    shifted = {name: value + 0.5 * value.std() for name, value in coin_reference().draws.items()}
    comparison = compare(problem, ["full_rank"], reference=vl.Posterior(shifted, method="given"), progress=False)
    verdict = comparison.verdicts["full_rank"]
    assert verdict.decision != "trust"
    assert verdict.parameters["source"].tolist() == ["reference"]


def test_further_references_are_held_against_the_first() -> None:
    references = {"exact": coin_reference(), "again": coin_reference(num_draws=900)}
    table = compare(coin_problem(), ["full_rank"], reference=references, progress=False).table()
    assert table["candidate"].tolist() == ["reference", "again", "full_rank"]
    assert table.loc[1, "max_mean_shift"] < 0.2
    with pytest.raises(vl.LabError, match="reference is an empty dict"):
        compare(coin_problem(), reference={}, progress=False)


def test_auto_is_a_candidate() -> None:
    comparison = compare(coin_problem(), ["auto"], reference=coin_reference(), progress=False)
    assert comparison.fits["auto"].path[-1].decision == "trust"
    assert comparison.verdicts["auto"].decision == "trust"
