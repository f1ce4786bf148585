"""Pages that are made of files outside of docs/: tutorials, benchmarks, the layers, the changelog.

Notebooks are shown with the output that is stored in them; nothing is run. Written here because the two plugins that
do it (mkdocs-jupyter, and nbconvert behind it) bring a page style of their own and load MathJax from a network.
"""

from __future__ import annotations

import ast
import base64
import html
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[2]
COPIED = {"changelog.md": "CHANGELOG.md", "contributing.md": "CONTRIBUTING.md"}
FROM_ROOT = {"LICENSE", "Makefile", "constraints.txt"}
"""Files of the checkout that pages name and that are no pages."""


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Fill the empty sections of the navigation with all tutorials and all benchmarks."""
    sections = {
        "Tutorials": [f"tutorials/{path.stem}.md" for path in tutorials()],
        "Benchmarks": [f"benchmarks/{path.name}" for path in benchmarks()],
    }
    for entry in config.nav or []:
        for title in sections.keys() & (entry.keys() if isinstance(entry, dict) else set()):
            entry[title] = sections[title]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages, their pictures, and the notebooks as they are."""
    for path in tutorials():
        text, pictures = notebook_page(json.loads(path.read_text(encoding="utf-8")), path.stem)
        files.append(File.generated(config, f"tutorials/{path.stem}.md", content=text))
        files.append(File.generated(config, f"tutorials/{path.name}", abs_src_path=str(path)))
        for name, content in pictures.items():
            files.append(File.generated(config, f"tutorials/{name}", content=content))
    for path in benchmarks():
        files.append(File.generated(config, f"benchmarks/{path.name}", content=path.read_text(encoding="utf-8")))
    for name, source in COPIED.items():
        files.append(File.generated(config, name, content=copied_page((ROOT / source).read_text(encoding="utf-8"))))
    return files


def on_page_markdown(markdown: str, *, page: Page, **_: Any) -> str:
    """Put the table of layers where a page asks for it."""
    return markdown.replace("<!-- layers -->", layers_page()) if page.file.src_uri == "how-it-is-built.md" else markdown


def tutorials() -> list[Path]:
    """The notebooks, in the order of their numbers."""
    return sorted((ROOT / "tutorials").glob("*.ipynb"))


def benchmarks() -> list[Path]:
    """The pages that the benchmarks write."""
    return sorted((ROOT / "benchmarks").glob("*.md"))


def notebook_page(book: dict[str, Any], stem: str) -> tuple[str, dict[str, bytes]]:
    """A notebook as a page of Markdown, and its pictures by file name."""
    parts: list[str] = []
    pictures: dict[str, bytes] = {}
    for cell in book["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(with_pages(source))
            continue
        parts.append(fenced(source, "python"))
        for output in cell["outputs"]:
            for kind, value in shown(output):
                if kind == "image/png":
                    name = f"{stem}-{len(pictures) + 1}.png"
                    pictures[name] = base64.b64decode(value)
                    parts.append(f"![Picture {len(pictures)}, drawn by the code above it]({name})")
                else:
                    parts.append(table(value) if kind == "text/html" else fenced(value, "text"))
    title, rest = parts[0].split("\n", 1) if "\n" in parts[0] else (parts[0], "")
    parts[0] = f"{title}\n\nThis page is a [notebook]({stem}.ipynb), with the output of its last run.\n{rest}"
    return "\n\n".join(parts) + "\n", pictures


def shown(output: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """What a reader sees of an output of a cell: its kind and text, the richest form only."""
    if output["output_type"] == "stream":
        yield "text/plain", "".join(output["text"])
        return
    data = output.get("data", {})
    for kind in ("image/png", "text/html", "text/plain"):
        if kind in data:
            yield kind, "".join(data[kind])
            return


def fenced(text: str, language: str) -> str:
    """Text in a fence that is longer than any in it."""
    longest = max((len(run) for run in re.findall(r"`{3,}", text)), default=2)
    fence = "`" * (longest + 1)
    css = " .output" if language == "text" else ""
    return f"{fence} {{ .{language}{css} }}\n{text.rstrip()}\n{fence}"


def table(text: str) -> str:
    """A table of pandas without its own style, scrolling by itself where it is wide."""
    text = re.sub(r"<style.*?</style>", "", text, flags=re.DOTALL)
    text = re.sub(r' border="\d+"| style="[^"]*"', "", text)
    rows = "\n".join(line for line in text.split("\n") if line.strip())
    return f'<div class="output-table">\n{rows}\n</div>'


def with_pages(text: str) -> str:
    """Links to notebooks lead to their pages."""
    return re.sub(r"\]\((?!\w+://)([^)]*)\.ipynb", r"](\1.md", text)


def copied_page(text: str) -> str:
    """A page of the checkout's root: links to files that are no pages become their names."""

    def replace(link: re.Match[str]) -> str:
        return link[1] if link[2] in FROM_ROOT else link[0]

    return re.sub(r"\[([^\]]*)\]\(([^)\s]+)\)", replace, text)


def layers_page() -> str:
    """The layers from the top down, each with its modules and what they say they are."""
    rows = ["| layer | part | what it is |", "|---|---|---|"]
    levels = layers()
    for level in reversed(range(len(levels))):
        for number, name in enumerate(filter(first_sentence, levels[level])):  # some are not written yet
            rows.append(f"| {level if number == 0 else ''} | `{name}` | {first_sentence(name)} |")
    return "\n".join(rows)


def layers() -> tuple[tuple[str, ...], ...]:
    """The table that tests/test_layers.py holds the imports to, from the bottom up."""
    tree = ast.parse((ROOT / "tests" / "test_layers.py").read_text(encoding="utf-8"))
    (value,) = (
        node.value for node in tree.body if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "LAYERS"
    )
    found: tuple[tuple[str, ...], ...] = ast.literal_eval(value)
    return found


def first_sentence(name: str) -> str:
    """The first paragraph of a module's docstring, as text of a cell."""
    path = ROOT / "pyro_vi_lab" / (f"{name}__init__.py" if name.endswith("/") else f"{name}.py")
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) if path.is_file() else None
    paragraph = " ".join((docstring or "").split("\n\n")[0].split())
    plain = re.sub(r":\w+:`~?([^`]*)`", lambda role: role[1].rpartition(".")[2], paragraph.replace("``", ""))
    return html.escape(plain).replace("|", "&#124;")
