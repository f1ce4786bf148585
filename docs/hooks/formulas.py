r"""Formulas as MathML, written into the pages when they are built.

latex2mathml: pure Python, maintained, and all that our formulas need; browsers draw MathML themselves. MathJax and
KaTeX would be megabytes of scripts and fonts in the site, or a load from a network; markdown-katex ships binaries.
"""

from __future__ import annotations

import html
import logging
import re
from typing import Any

from latex2mathml.converter import convert
from mkdocs.structure.pages import Page

FORMULA = re.compile(
    r'<(span|div) class="arithmatex">(?:\\\((.*?)\\\)|\\\[(.*?)\\\])</\1>',
    flags=re.DOTALL,
)
REPLACED = {r"\arg": r"\operatorname{arg}"}
"""Commands of TeX that latex2mathml lacks."""
UPRIGHT = re.compile(r"<mi>(&#x000[0-9A-F]{2};)</mi>")
"""One letter in ``\\mathrm``: written as an entity, but without the variant that keeps browsers from slanting it."""
FUNCTION = r"<mi>(?:log|exp|tanh|sin|cos)</mi>"
BEFORE = re.compile(rf"(?<=</mi>|</mn>|msub>|msup>|tyle>|frac>)(?={FUNCTION})")
AFTER = re.compile(rf"(?:{FUNCTION})(?=<m(?:i|n|sub|sup|frac|row|style|over|o movablelimits)\b)")
THIN = '<mspace width="0.167em" />'
"""The thin space that TeX has around the name of a function."""
log = logging.getLogger("mkdocs.hooks.formulas")


def on_page_content(content: str, *, page: Page, **_: Any) -> str:
    """Replace what arithmatex has marked."""

    def replace(found: re.Match[str]) -> str:
        block = found[2] is None
        text = html.unescape(found[3] if block else found[2])
        made, left = mathml(text, block=block)
        if left:
            log.warning("%s: %s is no command that a formula can have here: %s", page.file.src_uri, left, text)
        return made

    return FORMULA.sub(replace, content)


def mathml(text: str, *, block: bool) -> tuple[str, str]:
    """A formula as a ``math`` element, and the first command in it that was not understood, if any."""
    for command, other in REPLACED.items():
        text = re.sub(re.escape(command) + r"(?![a-zA-Z])", lambda _, other=other: other, text)
    made = convert(" ".join(text.split()), display="block" if block else "inline")
    made = UPRIGHT.sub(r'<mi mathvariant="normal">\1</mi>', made)
    made = AFTER.sub(lambda name: name[0] + THIN, BEFORE.sub(THIN, made))
    unknown = re.search(r">(\\[^<]*)<", made)
    return made, unknown[1] if unknown else ""
