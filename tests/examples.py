"""Code in Markdown: the blocks of a language, the commands of a shell, and a run of Python that checks what it prints."""

from __future__ import annotations

import ast
import io
import re
import shlex
from contextlib import redirect_stdout
from typing import Any

import typer

from pyro_vi_lab.cli import app
from pyro_vi_lab.models import MODELS


def blocks(text: str, language: str) -> list[str]:
    """What stands in the fences of a language: ``python``, or ``{ .python .numpyro }`` with attributes."""
    return re.findall(rf"^``` ?{re.escape(language)}\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)


def commands(text: str) -> list[list[str]]:
    """The words of every line of a shell block, without its comment."""
    return [shlex.split(line, comments=True) for block in blocks(text, "sh") for line in block.splitlines()]


def assert_parses(words: list[str]) -> None:
    """A command line of ours has a command and options that exist, and a problem that could."""
    group: Any = typer.main.get_command(app)
    with group.make_context(words[0], words[1:], resilient_parsing=True) as context:
        name, command, rest = group.resolve_command(context, words[1:])
    with command.make_context(name, list(rest)) as parsed:
        problem = parsed.params.get("problem")
    assert problem is None or problem in MODELS or ".py:" in problem


def run(block: str, names: dict[str, Any], *, source: str) -> list[str]:
    """Run a block, one statement after the other; a sentence for each that prints other than its comment says.

    A comment after ``print(...)`` on the same line is what it prints.
    """
    wrong = []
    lines = block.splitlines()
    for node in ast.parse(block).body:
        printed = io.StringIO()
        with redirect_stdout(printed):
            exec(compile(ast.Module([node], []), source, "exec"), names)
        comment = lines[(node.end_lineno or 1) - 1][node.end_col_offset :].strip()
        says, expected = printed.getvalue().strip(), comment.removeprefix("# ")
        if ast.unparse(node).startswith("print(") and comment.startswith("# ") and says != expected:
            wrong.append(f"{ast.unparse(node)} prints {says}, not {expected}")
    return wrong
