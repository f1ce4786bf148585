from __future__ import annotations

import dataclasses
import html
import re
import shutil
import subprocess
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import pytest

from pyro_vi_lab.report import page
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
        if self.open and self.open[-1] != "style":
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
        assert tag not in {"script", "link", "img", "iframe", "object", "embed", "image", "base"}
        assert not [key for key in attributes if key.startswith("on") or key == "src"]
        for key in ("href", "xlink:href", "style", "content"):
            assert "//" not in (attributes.get(key) or "")
        if "href" in attributes:
            assert str(attributes["href"]).startswith("#")
    styles = re.findall(r"<style>(.*?)</style>", text, flags=re.DOTALL)
    assert len(styles) == 1
    assert "@import" not in styles[0]
    assert "url(" not in styles[0]


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
    assert "do not trust" in shown
    assert "agrees with the reference" in shown
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
    failed = [check["name"] for check in page.view(comparison)["checks"] if not check["ok"]]
    assert len(failed) == len(comparison.reference_problems)


def test_names_cannot_leave_their_place() -> None:
    text = comparisons.hostile().report()
    assert "<script" not in text
    assert "<img" not in text
    shown = words(text)
    assert "<script>alert('$x^2$')</script>[0]" in shown
    assert "naïve 模型" in shown


def test_many_parameters_are_limited_and_that_is_said() -> None:
    comparison = comparisons.large()
    text = comparison.report()
    assert len(text.encode()) < 5e6
    view = page.view(comparison)
    assert len(view["panels"]) == page.MAX_MARGINALS
    assert f"the {page.MAX_MARGINALS} of 100 parameters that are farthest" in words(text)
    worst = comparison.parameters().groupby("parameter")["wasserstein"].max().nlargest(page.MAX_MARGINALS)
    assert {panel["parameter"] for panel in view["panels"]} == set(worst.index)


def test_a_candidate_that_diverged_has_its_reason_in_place_of_numbers() -> None:
    shown = words(comparisons.diverged().report())
    assert "the fit diverged" in shown
    assert "All candidates on the reference" not in shown
    assert "nan" not in shown.lower().split()


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs the browser chromium")
@pytest.mark.parametrize("width", [360, 1280])
@EVERY
def test_a_browser_shows_the_page_without_sideways_scrolling(name: str, width: int, tmp_path: Path) -> None:
    """The page in a frame as wide as a phone or a desk; the frame's width comes back in the title."""
    frame = tmp_path / "frame.html"
    source = html.escape(comparisons.ALL[name]().report())
    frame.write_text(
        "<!doctype html><title></title><body style='margin:0'>"
        f'<iframe style=\'width:{width}px;height:900px;border:0\' srcdoc="{source}" onload="'
        "const d = this.contentDocument; document.title = [d.documentElement.scrollWidth,"
        "d.querySelectorAll('svg').length,"
        "this.contentWindow.performance.getEntriesByType('resource').length].join(' ')\"></iframe>",
        encoding="utf-8",
    )
    browser = [shutil.which("chromium") or "", "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom"]
    browser += ["--disable-background-networking", f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1400,1000"]
    run = subprocess.run([*browser, frame.as_uri()], capture_output=True, text=True, timeout=120, check=True)
    found = re.search(r"<title>([^<]*)</title>", run.stdout)
    assert found is not None
    scroll_width, pictures, requests = map(int, found[1].split())
    assert scroll_width <= width
    assert pictures > 0
    assert requests == 0
