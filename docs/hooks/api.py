"""``::: vl.fit`` in a page stands for the public name, wherever its code is.

The package's ``__init__`` files are read and not imported, so a page needs neither torch nor Pyro to be built.
"""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path
from typing import Any

PACKAGE = Path(__file__).resolve().parents[2] / "pyro_vi_lab"
SHORT = "vl"
DIRECTIVE = re.compile(rf"^::: ({SHORT}\.[\w.]+)$", flags=re.MULTILINE)


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Replace each public name by a directive of mkdocstrings for the object behind it."""
    return DIRECTIVE.sub(lambda found: directive(found[1]), markdown)


def directive(name: str) -> str:
    """The directive that documents a public name, under the name that a user types."""
    shown = name.rpartition(".")[2]
    return f'::: {canonical(name)}\n    options:\n      heading: "{name}"\n      toc_label: "{shown}"'


def canonical(name: str) -> str:
    """The module path of a public name: ``vl.fit`` is ``pyro_vi_lab.fit.fit``.

    Example:
        >>> canonical("vl.guides.Flow")
        'pyro_vi_lab.guides.flow.Flow'
    """
    parts = name.split(".")[1:]
    folder = parts[:1] if len(parts) > 1 and (PACKAGE / parts[0]).is_dir() else []
    top, own, members = ".".join([PACKAGE.name, *folder]), parts[len(folder)], parts[len(folder) + 1 :]
    if not folder and members and (PACKAGE / f"{own}.py").is_file():  # a module, such as that of vl.compare
        return ".".join([top, own, *members])
    return ".".join([exports(PACKAGE.joinpath(*folder), top).get(own, f"{top}.{own}"), *members])


@cache
def exports(package: Path, top: str) -> dict[str, str]:
    """What the ``__init__`` of a package imports: name to path."""
    tree = ast.parse((package / "__init__.py").read_text(encoding="utf-8"))
    found = {}
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith(top):
            found |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    return found


def public(package: str = "") -> list[str]:
    """``__all__`` of the package, or of one of its folders, as a user writes the names."""
    tree = ast.parse((PACKAGE / package / "__init__.py").read_text(encoding="utf-8"))
    (names,) = (
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
    )
    return [".".join(filter(None, [SHORT, package, name])) for name in names]
