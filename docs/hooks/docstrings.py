"""Docstrings are written with the roles of Sphinx, which editors and ``help`` show well; pages are Markdown.

``:func:`~a.b` `` becomes a link where ``a.b`` is on a page, ``:math:`` a formula, ``Example:`` a block of code.
"""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any

import griffe

ROLE = re.compile(r":(?:\w+:)?(\w+):`(~?)([^`]*)`", flags=re.DOTALL)
INDENTED = r"(?P<rest>(?:(?P=in)[ ]+[^\n]*\n|[ ]*\n)*)"
DISPLAY = re.compile(r"^(?P<in>[ ]*)\.\. math::(?P<first>[^\n]*)\n" + INDENTED, flags=re.MULTILINE)
BLOCK = re.compile(r"^(?P<in>[ ]*)\.\. code-block:: (?P<language>\w+)\n" + INDENTED, flags=re.MULTILINE)


class MarkdownDocstrings(griffe.Extension):
    """Rewrites every docstring of the package once, when its object is loaded."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rewrite one docstring."""
        if obj.docstring:
            obj.docstring.value = in_markdown(obj.docstring.value, of=obj.path)


def in_markdown(text: str, *, of: str = "") -> str:
    """A docstring of ours in the Markdown that mkdocstrings expects."""
    text = DISPLAY.sub(_display, text + "\n")
    text = BLOCK.sub(_block, text)
    text = ROLE.sub(lambda role: _role(role[1], role[2] == "~", role[3], of), text)
    text = re.sub(r"^( *)Example:$", r"\1Examples:", text, flags=re.MULTILINE)
    return re.sub(r"``([^`]+)``", r"`\1`", text).rstrip()


def _display(found: re.Match[str]) -> str:
    lines = [found["first"], *found["rest"].split("\n")]
    body = " ".join(line.strip() for line in lines if line.strip())
    return f"{found['in']}$${body}$$\n\n"


def _block(found: re.Match[str]) -> str:
    lines = found["rest"].strip("\n").split("\n")
    margin = min(len(line) - len(line.lstrip()) for line in lines if line.strip())
    body = "\n".join(found["in"] + line[margin:] for line in lines)
    return f"{found['in']}```{found['language']}\n{body.rstrip()}\n{found['in']}```\n\n"


def _role(kind: str, short: bool, text: str, of: str) -> str:
    text = " ".join(text.split())
    if kind == "math":
        return f"${text}$"
    titled = re.fullmatch(r"(.*) <(.*)>", text)
    if titled:
        return _link(titled[2], titled[1])
    if kind == "mod" or text.startswith("torch") or text.startswith("pyro."):
        return f"`{text}`"
    target = text if "." in text and text.startswith("pyro_vi_lab") else ""
    shown = text.rpartition(".")[2] if short or target else text
    if not target:  # a name of the same module, or a method of the same class
        target = f"{of.rpartition('.')[0]}.{text}" if "." not in text else f"{_module(of)}.{text}"
    return _link(target, shown)


def _link(target: str, shown: str) -> str:
    return f'<autoref optional identifier="{_canonical(target)}"><code>{shown}</code></autoref>'


def _module(path: str) -> str:
    """The module of a class's member or of a module's: all up to the first capital."""
    return re.split(r"\.(?=[A-Z_])", path)[0] if re.search(r"\.[A-Z_]", path) else path.rpartition(".")[0]


def _canonical(path: str) -> str:
    return _api().canonical(re.sub(r"^pyro_vi_lab\.", "vl.", path)) if path.startswith("pyro_vi_lab.") else path


def _api() -> Any:
    """The hook beside this file: griffe loads extensions by their path, outside of any package."""
    spec = importlib.util.spec_from_file_location("docs_hooks_api", Path(__file__).with_name("api.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
