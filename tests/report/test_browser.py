"""The report in a real browser: what a reader sees, clicks and prints."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from tests import browser, comparisons
from tests.browser import Browser, Page

pytestmark = pytest.mark.skipif(browser.CHROMIUM is None, reason=browser.MISSING)
NAMES = [*comparisons.ALL, "eight_schools", "gaussian_mixture", pytest.param("crowd", marks=pytest.mark.slow)]
LONGEST_LOAD = 1000.0
"""Milliseconds until all is there."""


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    with Browser() as running:
        yield running


@pytest.fixture
def page(chromium: Browser) -> Iterator[Page]:
    with chromium.page() as opened:
        yield opened
        assert opened.complaints == []


@cache
def text(name: str) -> str:
    return (comparisons.ALL | comparisons.EXAMPLES)[name]().report()


def report(name: str, directory: Path) -> Path:
    path = directory / f"{name}.html"
    path.write_text(text(name), encoding="utf-8")
    return path


@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_wrong_on_any_screen(page: Page, name: str, tmp_path: Path) -> None:
    path = report(name, tmp_path)
    for width, scheme in ((390, "light"), (1280, "dark")):
        page.resize(width)
        page.media(scheme=scheme)
        page.open(path)
        assert page.run("document.documentElement.scrollWidth") <= width
    assert set(page.requests) == {path.as_uri()}
    seconds = []
    for _ in range(3):  # the fastest one: other tests run beside this one
        page.open(path)
        seconds.append(page.run("performance.getEntriesByType('navigation')[0].loadEventEnd"))
    assert min(seconds) < LONGEST_LOAD


@pytest.mark.parametrize("name", NAMES)
def test_every_picture_and_control_has_a_name(page: Page, name: str, tmp_path: Path) -> None:
    page.open(report(name, tmp_path))
    nodes = [node for node in page.call("Accessibility.getFullAXTree")["nodes"] if not node["ignored"]]
    named = {"image", "img", "graphics-document", "button", "searchbox", "table", "link", "region", "heading"}
    found = [(node["role"]["value"], node.get("name", {}).get("value", "")) for node in nodes]
    pictures = [name for role, name in found if role in {"image", "img", "graphics-document"}]
    shown = page.run("[...document.querySelectorAll('svg[role=img]')].filter(e => e.checkVisibility()).length")
    assert len(pictures) == shown > 0
    # tables are named by the regions around them
    assert [role for role, text in found if role in named - {"table"} and not text] == []


def column(page: Page, table: str, number: int) -> list[str]:
    found: list[str] = page.run(
        f"[...document.querySelectorAll('#{table} tbody')].filter(b => !b.hidden)"
        f".flatMap(b => [...b.rows].map(r => r.cells[{number}].textContent.trim()))"
    )
    return found


def test_candidates_are_sorted_by_a_click_and_by_a_key(page: Page, tmp_path: Path) -> None:
    page.open(report("regression", tmp_path))
    before = column(page, "table-candidates", 0)
    assert before == ["reference", "full_rank", "mean_field"]
    button = "#table-candidates th:nth-child(4) button"
    page.click(button)  # the lowest negative ELBO first; what has none comes last
    assert column(page, "table-candidates", 0) == ["full_rank", "mean_field", "reference"]
    assert page.run("document.querySelector('#table-candidates th:nth-child(4)').ariaSort") == "ascending"
    page.press("Enter", 13)
    assert column(page, "table-candidates", 0) == ["mean_field", "full_rank", "reference"]
    page.press(" ", 32)
    assert column(page, "table-candidates", 0) == before
    assert page.run("document.querySelectorAll('[aria-sort]').length") == 0


def test_parameters_are_sorted_by_the_worst_of_their_lines_and_found_by_name(page: Page, tmp_path: Path) -> None:
    page.open(report("large", tmp_path))
    page.click("#table-parameters th:nth-child(7) button")
    distances = [float(text) for text in column(page, "table-parameters", 6)]
    worst = [max(pair) for pair in zip(distances[::2], distances[1::2], strict=True)]
    assert worst == sorted(worst, reverse=True)
    page.click("#search-parameters")
    page.type("beta[7")
    names = [text for text in column(page, "table-parameters", 0) if text]
    assert len(names) == 11
    assert all("beta[7" in text for text in names)
    assert page.run("document.querySelector('.search output').value") == "11 of 100"
    page.type("7] covariate")
    assert [text for text in column(page, "table-parameters", 0) if text] == ["beta[77] covariate 77"]
    page.run(
        "(f => { f.value = ''; f.dispatchEvent(new Event('input')); })(document.querySelector('#search-parameters'))"
    )
    assert len(column(page, "table-parameters", 0)) == 200


def test_without_scripts_all_is_there_but_the_controls(page: Page, tmp_path: Path) -> None:
    page.call("Emulation.setScriptExecutionDisabled", value=True)
    page.open(report("regression", tmp_path))
    page.call("Emulation.setScriptExecutionDisabled", value=False)
    assert page.run("document.querySelectorAll('button').length") == 0
    assert not page.run("document.querySelector('.search').checkVisibility()")
    assert column(page, "table-candidates", 0) == ["reference", "full_rank", "mean_field"]


def test_text_is_readable_in_light_and_dark(page: Page, tmp_path: Path) -> None:
    path = report("regression", tmp_path)
    for scheme in ("light", "dark"):
        page.media(scheme=scheme)
        page.open(path)
        for css in ("body", ".lead", ".far", ".good", ".poor", ".tick"):
            contrast = page.run(CONTRAST % css)
            assert contrast >= 4.5, f"{css} in {scheme}"  # WCAG 2.2, 1.4.3


CONTRAST = """(css => {
  const parse = text => text.match(/[\\d.]+/g).map(Number);
  const light = rgb => rgb.slice(0, 3).map(v => v / 255)
    .map(v => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [.2126, .7152, .0722][i], 0);
  const element = document.querySelector(css), style = getComputedStyle(element);
  let below = element;
  while (below.parentElement && (parse(getComputedStyle(below).backgroundColor)[3] ?? 1) === 0) below = below.parentElement;
  const [a, b] = [element instanceof SVGElement ? style.fill : style.color, getComputedStyle(below).backgroundColor]
    .map(text => light(parse(text)));
  return (Math.max(a, b) + .05) / (Math.min(a, b) + .05);
})('%s')"""


def test_it_prints(page: Page, tmp_path: Path) -> None:
    page.open(report("regression", tmp_path))
    page.pdf(tmp_path / "report.pdf")
    assert (tmp_path / "report.pdf").read_bytes().startswith(b"%PDF")
    page.media(kind="print")
    page.resize(700)
    wide = page.run(
        "[...document.querySelectorAll('table, svg')].filter(e => e.checkVisibility())"
        ".filter(e => e.getBoundingClientRect().right > innerWidth + 1).length"
    )
    assert wide == 0
