from __future__ import annotations

import sys
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

import pyro_vi_lab as vl
from pyro_vi_lab.errors import ArgumentError, DataError, ExtraError
from pyro_vi_lab.models import HierarchicalRegression, LinearRegression, PoissonRegression, regression

pytest.importorskip("formulae")


@pytest.fixture
def frame() -> pd.DataFrame:
    rng, n = np.random.default_rng(0), 40
    return pd.DataFrame(
        {
            "score": rng.normal(size=n),
            "iq": rng.normal(100, 15, n),
            "school": np.resize(["u", "v", "w"], n),
            "kind": np.resize(list("abca"), n),
            "time": rng.uniform(1, 2, n),
            "count": rng.poisson(3, n),
            "passed": rng.integers(0, 2, n),
        }
    )


def columns(frame: pd.DataFrame) -> np.ndarray:
    """The design of ``iq * kind``, made by hand."""
    b, c = (frame.kind == "b").to_numpy(float), (frame.kind == "c").to_numpy(float)
    iq = frame.iq.to_numpy()
    return np.column_stack([iq, b, c, iq * b, iq * c])


def test_a_formula_is_the_problem_of_its_columns(frame: pd.DataFrame) -> None:
    by_formula = regression("score ~ iq * kind", frame, standardize=False)
    by_hand = LinearRegression().problem(columns(frame), frame.score)
    assert by_formula.coords["feature"] == ["iq", "kind[b]", "kind[c]", "iq:kind[b]", "iq:kind[c]"]
    z = torch.randn(3, 7, generator=torch.Generator().manual_seed(0)).double()
    torch.testing.assert_close(by_formula.density().log_prob(z), by_hand.density().log_prob(z))


def test_new_rows_go_through_the_same_design(frame: pd.DataFrame) -> None:
    problem = regression("score ~ scale(iq) + kind", frame)
    prior, new = problem.prior(5), frame.iloc[[3, 1]].drop(columns="score")
    scaled = (new.iq - frame.iq.mean()) / frame.iq.std(ddof=0)
    X = np.column_stack([scaled, new.kind == "b", new.kind == "c"]).astype(float)
    torch.testing.assert_close(problem.model.predict(prior, new), problem.model.predict(prior, X))


@pytest.mark.parametrize(
    ("formula", "family", "kind"),
    [
        ("score ~ iq", "student_t", "RobustRegression"),
        ("passed ~ iq", "bernoulli", "LogisticRegression"),
        ("kind['b'] ~ iq", "bernoulli", "LogisticRegression"),
        ("kind ~ iq", "categorical", "MultinomialRegression"),
        ("count ~ iq", "categorical", "MultinomialRegression"),
        ("count ~ iq", "poisson", "PoissonRegression"),
        ("count ~ iq", "negative_binomial", "NegativeBinomialRegression"),
        ("count ~ iq + (iq | school)", "negative_binomial", "HierarchicalRegression"),
        ("score ~ 1 + (1 | school) + (0 + iq | kind)", "student_t", "HierarchicalRegression"),
    ],
)
def test_every_family_has_its_model(frame: pd.DataFrame, formula: str, family: str, kind: str) -> None:
    problem = regression(formula, frame, family=family)
    assert problem.name == kind
    prior = problem.prior(4)
    predicted = problem.model.predict(prior, frame.iloc[:3])
    assert predicted.shape[0] == 3
    torch.testing.assert_close(predicted, problem.model.predict(prior, frame)[:3])
    assert problem.model.predictive(prior, frame.iloc[:3]).shape == (1, 4, 3)
    assert torch.isfinite(problem.density().log_prob(torch.zeros(problem.density().dim).double()))


def test_terms_by_group_are_those_of_arrays(frame: pd.DataFrame) -> None:
    by_formula = regression("score ~ iq + (iq | school)", frame)
    by_hand = HierarchicalRegression().problem(
        frame[["iq"]], frame.score, group={"school": frame.school}, slopes=["iq"], standardize=True
    )
    assert by_formula.coords == by_hand.coords
    assert by_formula.coords["school_term"] == ["intercept", "iq"]
    z = torch.randn(2, by_hand.density().dim, generator=torch.Generator().manual_seed(0)).double()
    torch.testing.assert_close(by_formula.density().log_prob(z), by_hand.density().log_prob(z))


def test_offsets_are_exposures(frame: pd.DataFrame) -> None:
    by_formula = regression("count ~ iq + offset(np.log(time))", frame, family=PoissonRegression(prior="ridge"))
    by_hand = PoissonRegression(prior="ridge").problem(
        frame[["iq"]], frame["count"], exposure=frame.time, standardize=True
    )
    z = torch.randn(2, 3, generator=torch.Generator().manual_seed(0)).double()
    torch.testing.assert_close(by_formula.density().log_prob(z), by_hand.density().log_prob(z))
    prior = by_formula.prior(3)
    torch.testing.assert_close(
        by_formula.model.predict(prior, frame), by_hand.model.predict(prior, frame[["iq"]], exposure=frame.time)
    )


@pytest.mark.parametrize(
    ("formula", "options", "message"),
    [
        ("score ~ IQ", {}, "names 'IQ', which is no column of the data: .*Columns: score, iq"),
        ("score ~ iqq + kind", {}, "names 'iqq', which is no column of the data: did you mean 'iq'"),
        ("score ~ iq + (1 | schol)", {}, "names 'schol', .* did you mean 'school'"),
        ("score ~ 0 + iq", {}, "takes away the intercept"),
        (3, {}, "formula must be a string such as 'y ~ x', got int"),
        ("score ~ (iq", {}, "'score ~ .iq' cannot be read: Expect '.' after expression"),
        ("iq", {}, "has no outcome"),
        ("kind ~ iq", {}, "the outcome 'kind' is of names .*family='categorical'"),
        ("score ~ 1", {}, "has no covariates"),
        ("score ~ iq", {"family": "gausian"}, "unknown family 'gausian': did you mean 'gaussian'"),
        ("kind ~ iq + (1|school)", {"family": "categorical"}, "has no terms by group"),
        ("score ~ iq + (1|school)", {"family": LinearRegression()}, "take HierarchicalRegression as the family"),
        ("score ~ iq", {"family": HierarchicalRegression()}, "has no term by group"),
        ("score ~ iq + (1|school:kind)", {}, "'school:kind' .* is not a column of the data"),
        ("score ~ iq + foo(iq)", {}, "uses 'foo', which is no function"),
    ],
)
def test_wrong_formulas_are_named(frame: pd.DataFrame, formula: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        regression(formula, frame, **options)


def test_wrong_data_are_named(frame: pd.DataFrame) -> None:
    with pytest.raises(ArgumentError, match="data must be a pandas DataFrame, got dict"):
        regression("score ~ iq", {"iq": [1.0]})  # type: ignore[arg-type]
    missing = frame.assign(iq=frame.iq.where(frame.index != 7))
    with pytest.raises(DataError, match=r"column 'iq' has 1 missing value\(s\), the first in row 7"):
        regression("score ~ iq", missing)
    with pytest.raises(DataError, match="column 'iq' of X is constant"):
        regression("score ~ iq + kind", frame.assign(iq=3.0))
    with pytest.raises(DataError, match=r"no counts, the first .* in row 0; counts are whole"):
        regression("time ~ iq", frame, family="poisson")
    problem = regression("score ~ iq + kind + (1 | school)", frame)
    prior = problem.prior(3)
    for change, message in [
        ({"kind": "z"}, r"levels \(z\) in 'kind'"),
        ({"school": "q"}, "row 0 is of the group 'q' of 'school'"),
        ({"iq": np.nan}, r"column 'iq' has 40 missing value"),
    ]:
        with pytest.raises(DataError, match=message):
            problem.model.predict(prior, frame.assign(**change))
    with pytest.raises(ArgumentError, match="names 'iq', which is no column"):
        problem.model.predict(prior, frame.drop(columns="iq"))
    with pytest.raises(ArgumentError, match="leave out group"):
        problem.model.predict(prior, frame, group=frame.school)


def test_without_formulae_the_extra_is_named(frame: pd.DataFrame, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "formulae", None)
    with pytest.raises(ExtraError, match=r"pip install 'pyro-vi-lab\[formula\]'"):
        regression("score ~ iq", frame)


def test_a_fit_of_a_formula_is_least_squares(frame: pd.DataFrame) -> None:
    problem = regression("score ~ iq * kind", frame)
    point = vl.fit(problem, "mle", progress=False).point()
    A = np.column_stack([np.ones(40), columns(frame)])
    expected = np.linalg.lstsq(A, frame.score.to_numpy())[0]
    found = torch.cat([point["intercept"][None], point["beta"]])
    torch.testing.assert_close(found, torch.from_numpy(expected), rtol=1e-5, atol=1e-6)
