from __future__ import annotations

import base64
import dataclasses
import hashlib
import re
from collections import Counter
from html.parser import HTMLParser

import pytest

from pyro_vi_lab import Posterior, compare
from pyro_vi_lab.report import page, parameters
from tests import comparisons

VOID = {"meta", "br", "img", "link", "hr", "input"}
EVERY = pytest.mark.parametrize("name", comparisons.ALL)


class Reader(HTMLParser):
    """Checks that tags are closed in order, and keeps what they hold."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in {"style", "script"}:
            self.text.append(data)


def read(text: str) -> Reader:
    reader = Reader()
    reader.feed(text)
    reader.close()
    assert reader.open == []
    return reader


def words(text: str) -> str:
    return " ".join(" ".join(read(text).text).split())


@EVERY
def test_the_page_needs_nothing_else(name: str) -> None:
    text = comparisons.ALL[name]().report()
    reader = read(text)
    for tag, attributes in reader.tags:
        assert tag not in {"img", "iframe", "object", "embed", "image", "base"}
        assert not [key for key in attributes if key.startswith("on") or key in {"src", "style", "xlink:href"}]
        if "href" in attributes:
            assert str(attributes["href"]).startswith("#") or (tag == "link" and attributes["href"] == "data:,")
    styles = re.findall(r"<style>(.*?)</style>", text, flags=re.DOTALL)
    assert len(styles) == 1
    assert "@import" not in styles[0]
    assert "url(" not in styles[0]


@EVERY
def test_the_policy_allows_what_is_there_and_nothing_else(name: str) -> None:
    text = comparisons.ALL[name]().report()
    (policy,) = re.findall(r'http-equiv="Content-Security-Policy" content="([^"]*)"', text)
    assert "default-src &#39;none&#39;" in policy
    assert "unsafe" not in policy
    for tag in ("style", "script"):
        (content,) = re.findall(rf"<{tag}>(.*?)</{tag}>", text, flags=re.DOTALL)
        known = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert f"{tag}-src &#39;sha256-{known}&#39;" in policy


@EVERY
def test_ids_are_unique_and_every_picture_has_a_text(name: str) -> None:
    reader = read(comparisons.ALL[name]().report())
    ids = Counter(attributes["id"] for _, attributes in reader.tags if "id" in attributes)
    assert not [key for key, count in ids.items() if count > 1]
    pictures = [attributes for tag, attributes in reader.tags if tag == "svg"]
    assert pictures
    assert all(p.get("aria-hidden") == "true" or (p.get("role") == "img" and p.get("aria-label")) for p in pictures)
    headings = [tag for tag, _ in reader.tags if tag in {"h1", "h2", "h3"}]
    assert headings[0] == "h1"
    assert headings.count("h1") == 1


def test_the_page_shows_the_numbers_of_the_table() -> None:
    comparison = comparisons.regression()
    shown = words(comparison.report())
    for row in comparison.table().to_dict("records")[1:]:
        for key in ("negative_elbo", "khat", "max_mean_shift", "min_sd_ratio", "max_sd_ratio"):
            assert page.number(row[key]) in shown
    for parameter in comparison.discrepancies["full_rank"].parameters:
        assert parameter in shown
    assert "covariate 2" in shown
    assert "full_rank may be trusted" in shown
    for name, verdict in comparison.verdicts.items():
        assert f"{name} {verdict.decision} " in shown
        assert all(reason in shown for reason in verdict.reasons)
    assert "Beside the reference agrees" in shown
    assert "Beside the reference differs" in shown
    without = words(dataclasses.replace(comparison, verdicts={}).report())
    assert "do not trust" in without
    assert "agrees with the reference" in without
    assert comparison.to_dict()["data_hash"] in shown


def test_the_page_says_how_it_was_made() -> None:
    comparison = comparisons.regression()
    assert "vl.compare(problem, ['mean_field', 'full_rank'], reference=reference" in words(comparison.report())
    command = "pyro-vi-lab compare 'my file.py:problem' --out out"
    assert command in words(dataclasses.replace(comparison, command=command).report())


def test_the_checks_of_the_reference_are_shown_with_their_limits() -> None:
    assert "passed" in words(comparisons.regression().report())
    shown = words(comparisons.unfit().report())
    assert "smallest bulk ESS" in shown
    assert "failed" in shown
    assert "unfit reference" in shown


@EVERY
def test_the_checks_shown_are_those_that_decide(name: str) -> None:
    comparison = comparisons.ALL[name]()
    failed = [check["name"] for check in page.view(comparison, {})["checks"] if not check["ok"]]
    assert len(failed) == len(comparison.reference_problems)


def test_names_cannot_leave_their_place() -> None:
    text = comparisons.hostile().report()
    assert text.count("<script") == 1  # the page's own
    assert "<img" not in text
    shown = words(text)
    assert "<script>alert('$x^2$')</script>[0]" in shown
    assert "naïve 模型" in shown


def test_many_parameters_are_limited_and_that_is_said() -> None:
    comparison = comparisons.large()
    text = comparison.report()
    assert len(text.encode()) < 5e6
    view = page.view(comparison, {})
    assert len(view["panels"]) == page.MAX_MARGINALS
    assert f"the {page.MAX_MARGINALS} of 100 parameters that are farthest" in words(text)
    worst = comparison.parameters().groupby("parameter")["wasserstein"].max().nlargest(page.MAX_MARGINALS)
    assert {panel["parameter"] for panel in view["panels"]} == set(worst.index)


def test_a_candidate_that_diverged_has_its_reason_in_place_of_numbers() -> None:
    shown = words(comparisons.diverged().report())
    assert "the fit diverged" in shown
    assert "All candidates on the reference" not in shown
    assert "nan" not in shown.lower().split()


def test_links_inside_the_page_lead_somewhere() -> None:
    reader = read(comparisons.regression().report())
    ids = {attributes["id"] for _, attributes in reader.tags if "id" in attributes}
    targets = {str(attributes["href"])[1:] for tag, attributes in reader.tags if tag == "a"}
    assert targets
    assert targets <= ids


def test_all_parameters_are_in_the_table_as_far_as_it_has_room(monkeypatch: pytest.MonkeyPatch) -> None:
    comparison = comparisons.large()
    assert len(page.view(comparison, {})["parameters"]) == 100
    monkeypatch.setattr(parameters, "MAX_LINES", 21)
    rows = page.view(comparison, {})["parameters"]
    assert [len(row["lines"]) for row in rows] == [2] * 10
    assert "the 10 of 100 parameters that are farthest" in words(comparison.report())


def test_the_bound_is_shown_against_steps_and_against_seconds() -> None:
    text = comparisons.regression().report()
    assert "Negative ELBO against steps: mean_field from" in text
    assert "Negative ELBO against seconds: mean_field from" in text


def test_a_reference_without_all_sites_is_compared_and_shown_without_pairs() -> None:
    comparison = comparisons.regression()
    part = Posterior({"intercept": comparison.reference.draws["intercept"]}, method="exact")
    again = compare(comparison.problem, dict(comparison.fits), reference=part, progress=False)
    shown = words(again.report())
    assert "There are none: no value for latent site" in shown
    assert "reference is left out: the posterior has no draws of the latent site" in shown
