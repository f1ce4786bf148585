"""The documentation says only what works: its code runs, every public name is in it, it builds without a network."""

from __future__ import annotations

import importlib
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import pyro_vi_lab as vl
from docs.hooks import api, docstrings, formulas, pages
from tests.examples import assert_parses, blocks, commands, run

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = {path.relative_to(DOCS).as_posix(): path.read_text(encoding="utf-8") for path in sorted(DOCS.rglob("*.md"))}
FOLDERS = ("checks", "families", "guides", "models")
PEERS = {"numpyro": "from/numpyro.md", "pymc": "from/pymc.md"}
FENCES = {"python", "sh", "toml", *(f"{{ .python .{peer} }}" for peer in PEERS)}


@pytest.mark.parametrize("name", [name for name, text in PAGES.items() if blocks(text, "python")])
def test_the_code_of_a_page_runs_and_prints_what_it_says(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": "page"}
    wrong = []
    for number, block in enumerate(blocks(PAGES[name], "python")):
        wrong += run(block, names, source=f"docs/{name}, block {number}")
    assert wrong == []


@pytest.mark.slow
@pytest.mark.parametrize("peer", PEERS)
def test_the_code_of_the_others_runs_too(peer: str, tmp_path: Path) -> None:
    """In the environment of the benchmarks, which has them."""
    python = ROOT / ".venv-bench" / "bin" / "python"
    if not python.exists():
        pytest.skip(f"{peer} is installed in .venv-bench, which `make bench` creates")
    (block,) = blocks(PAGES[PEERS[peer]], f"{{ .python .{peer} }}")
    result = subprocess.run([str(python), "-c", block], cwd=tmp_path, check=False, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    said = re.findall(r"^print\(.*\)  # (.*)$", block, flags=re.MULTILINE)
    assert result.stdout.splitlines() == said


def test_no_code_is_left_out() -> None:
    for name, text in PAGES.items():
        assert set(re.findall(r"^``` ?(\S[^\n]*)\n(?:.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)) <= FENCES, name
        assert text.count("\n```") % 2 == 0, name


@pytest.mark.parametrize(
    "words",
    [words for text in PAGES.values() for words in commands(text) if words and words[0] == "pyro-vi-lab"],
    ids=shlex.join,
)
def test_commands_parse(words: list[str]) -> None:
    assert_parses(words)


# --- the interface --------------------------------------------------------------------------------------------------


def documented() -> list[str]:
    """The public names that have an entry on a page."""
    return [name for text in PAGES.values() for name in api.DIRECTIVE.findall(text)]


def test_every_public_name_is_documented_once() -> None:
    public = [f"vl.{name}" for name in vl.__all__ if name not in FOLDERS]
    for folder in FOLDERS:
        public += [f"vl.{folder}.{name}" for name in getattr(vl, folder).__all__]
    assert sorted(documented()) == sorted(public)


def test_every_kind_of_error_is_documented() -> None:
    (named,) = re.findall(r"members: \[(.*)\]", PAGES["api/errors.md"])
    errors = importlib.import_module("pyro_vi_lab.errors")
    kinds = {name for name, value in vars(errors).items() if isinstance(value, type) and issubclass(value, vl.LabError)}
    assert set(named.split(", ")) == kinds - {"LabError"}


def test_a_public_name_leads_to_its_object() -> None:
    for name in documented():
        module, _, own = api.canonical(name).rpartition(".")
        found: Any = vl
        for part in name.split(".")[1:]:
            found = getattr(found, part)
        assert getattr(importlib.import_module(module), own) is found, name


def test_paths_of_modules_and_members_stay_as_they_are() -> None:
    assert api.canonical("vl.compare.Comparison") == "pyro_vi_lab.compare.Comparison"
    assert api.canonical("vl.Fit.point") == "pyro_vi_lab.fit.Fit.point"
    assert api.public("checks")[0].startswith("vl.checks.")


# --- hooks ----------------------------------------------------------------------------------------------------------


def test_docstrings_become_markdown() -> None:
    text = (
        "Of :math:`q`, see :func:`~pyro_vi_lab.fit` and :class:`torch.Tensor`.\n\n"
        ".. math:: a =\n    b\n\nExample:\n    >>> 1\n    1\n\nwith ``code``"
    )
    made = docstrings.in_markdown(text, of="pyro_vi_lab.nuts.nuts")
    assert "Of $q$" in made
    assert '<autoref optional identifier="pyro_vi_lab.fit.fit"><code>fit</code></autoref>' in made
    assert "`torch.Tensor`" in made
    assert "$$a = b$$" in made
    assert "Examples:\n    >>> 1" in made
    assert "with `code`" in made


@pytest.mark.parametrize(
    ("role", "target"),
    [
        (":meth:`Fit.point`", "pyro_vi_lab.fitted.Fit.point"),
        (":func:`other`", "pyro_vi_lab.fitted.other"),
        (":meth:`the point <pyro_vi_lab.Fit.point>`", "pyro_vi_lab.fit.Fit.point"),
    ],
)
def test_short_roles_are_names_of_the_same_module(role: str, target: str) -> None:
    made = docstrings.in_markdown(f"See {role}.", of="pyro_vi_lab.fitted.draw")
    assert f'identifier="{target}"' in made


@pytest.mark.parametrize(
    "text", [r"\hat x = \arg\max_x p(x)", r"\tfrac12 \|\delta\|^2", r"\mathrm{KL}(q \,\|\, p) \le 1"]
)
def test_formulas_become_mathml(text: str) -> None:
    made, unknown = formulas.mathml(text, block=False)
    assert made.startswith("<math")
    assert unknown == ""


def test_names_of_functions_stand_apart_from_their_arguments() -> None:
    made, _ = formulas.mathml(r"\mathrm{E}[\tfrac12 \log p(z) + x \log (2)]", block=False)
    assert made.count(formulas.THIN) == 3  # after the half, before p, and after x
    assert '<mi mathvariant="normal">&#x00045;</mi>' in made


def test_an_unknown_command_of_tex_is_told() -> None:
    assert formulas.mathml(r"\nosuchthing x", block=True)[1] == r"\nosuchthing"


def test_a_notebook_becomes_a_page() -> None:
    book = {
        "cells": [
            {"cell_type": "markdown", "source": ["# Title\n", "See [next](02_x.ipynb#a)."]},
            {
                "cell_type": "code",
                "source": ["print('```')"],
                "outputs": [
                    {"output_type": "stream", "text": ["```\n"]},
                    {"output_type": "display_data", "data": {"image/png": "AAAA", "text/plain": "<Figure>"}},
                    {"output_type": "execute_result", "data": {"text/html": "<table>\n\n</table><style>x</style>"}},
                ],
            },
        ]
    }
    text, pictures = pages.notebook_page(book, "01_a")
    assert text.startswith("# Title\n\nThis page is a [notebook](01_a.ipynb)")
    assert "](02_x.md#a)" in text
    assert "````" in text  # longer than what the code has
    assert pictures == {"01_a-1.png": b"\0\0\0"}
    assert "![Picture 1, drawn by the code above it](01_a-1.png)" in text
    assert "<Figure>" not in text
    assert "style" not in text


def test_every_layer_is_shown_with_what_its_parts_are() -> None:
    table = pages.layers_page()
    named = re.findall(r"^\| \d* \| `([\w/]+)` \| (.*) \|$", table, flags=re.MULTILINE)
    package = ROOT / "pyro_vi_lab"
    written = [
        name
        for level in reversed(pages.layers())
        for name in level
        if (package / name / "__init__.py").is_file() or (package / f"{name}.py").is_file()
    ]
    assert [name for name, _ in named] == written


# --- the site -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_site_builds_and_loads_nothing_from_elsewhere(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    result = subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    made = {path.relative_to(tmp_path).as_posix(): path for path in tmp_path.rglob("*.html")}
    sources = {
        *PAGES,
        *(f"{folder}/{path.stem}.md" for folder in ("tutorials", "benchmarks") for path in shown(folder)),
    }
    assert {name.removesuffix(".md") + ".html" for name in sources} <= made.keys()
    for name, path in made.items():
        text = path.read_text(encoding="utf-8")
        loads = re.findall(
            r"<(?:link|script|img|iframe|source|video)\b[^>]*(?:href|src|srcset)=\"(https?:|//)[^>]*>", text
        )
        assert loads == [], name
        assert all("alt=" in tag for tag in re.findall(r"<img\b[^>]*>", text)), name
        assert not re.search(r":(func|class|meth|math|attr|data|mod):`|\.\. math::", text), name
    for path in tmp_path.rglob("*.css"):
        assert not re.search(r"(url\(|@import )[\"']?(https?:|//)", path.read_text(encoding="utf-8")), path.name
    index = json.loads((tmp_path / "search" / "search_index.json").read_text(encoding="utf-8"))
    assert any("vl.compare" in entry["title"] for entry in index["docs"])


def shown(folder: str) -> list[Path]:
    return pages.tutorials() if folder == "tutorials" else pages.benchmarks()
