"""What a new user does: run with the interpreter of an environment that has the wheel and nothing of this checkout.

The README's example comes from the wheel's own metadata.
"""

from __future__ import annotations

import re
import sys
import tempfile
from importlib import metadata
from pathlib import Path
from typing import Any

NAME = "pyro-vi-lab"
SECTION = "## From Python"


def example(readme: str) -> list[str]:
    """The Python blocks of the README's first section of code, before its first subsection."""
    section = readme.split(SECTION, 1)[1].split("\n##", 1)[0]
    return re.findall(r"^```python\n(.*?)^```$", section, flags=re.MULTILINE | re.DOTALL)


def main() -> None:
    """Run the example and save the report; what is installed is said first."""
    import pyro_vi_lab

    installed = Path(pyro_vi_lab.__file__).resolve()
    assert installed.is_relative_to(Path(sys.prefix).resolve()), f"not the installed package: {installed}"
    assert pyro_vi_lab.__version__ == metadata.version(NAME)
    assert (installed.parent / "py.typed").is_file()
    print(f"{NAME} {metadata.version(NAME)}, torch {metadata.version('torch')}, Python {sys.version.split()[0]}")
    names: dict[str, Any] = {"__name__": "example"}
    blocks = example(str(metadata.metadata(NAME).get_payload()))
    assert len(blocks) == 2
    for number, block in enumerate(blocks):
        exec(compile(block, f"README.md, block {number}", "exec"), names)
    assert names["fit"].status is pyro_vi_lab.Status.CONVERGED
    assert names["reference"].problems() == []
    with tempfile.TemporaryDirectory() as folder:
        paths = names["comparison"].save(folder)
        print("saved:", *sorted(path.name for path in Path(folder).iterdir()))
        assert "<html" in paths["report"].read_text(encoding="utf-8")


if __name__ == "__main__":
    main()
