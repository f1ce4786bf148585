"""Every tutorial is stored with its output, and runs."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
TUTORIALS = sorted((ROOT / "tutorials").glob("*.ipynb"))
MAX_SIZE = 600_000
"""Bytes of a notebook with its output: what a review still shows."""
TIMEOUT = 300
"""Seconds that one cell may take, on a machine with other work."""
QUIET = "ignore::FutureWarning,ignore:IProgress not found"
"""What dependencies say at import: ArviZ of its next series, tqdm of a widget package that is not installed."""

every_tutorial = pytest.mark.parametrize("path", TUTORIALS, ids=lambda path: path.stem)


def outputs(book: dict[str, Any]) -> list[list[dict[str, Any]]]:
    """The outputs of every code cell."""
    return [cell["outputs"] for cell in book["cells"] if cell["cell_type"] == "code"]


def complaints(book: dict[str, Any]) -> list[str]:
    """Errors, and whatever was written to stderr: warnings, tracebacks, progress bars."""
    found = []
    for output in (one for cell in outputs(book) for one in cell):
        if output["output_type"] == "error":
            found.append(f"{output['ename']}: {output['evalue']}")
        if output.get("name") == "stderr":
            found.append("".join(output["text"]))
    return found


def words(book: dict[str, Any]) -> str:
    """All text that a reader sees below the cells."""
    parts: list[str] = []
    for output in (one for cell in outputs(book) for one in cell):
        parts += ["".join(output.get("text", ""))]
        parts += ["".join(value) for kind, value in output.get("data", {}).items() if kind.startswith("text/")]
    return "\n".join(parts)


def test_there_are_tutorials() -> None:
    assert [path.name for path in TUTORIALS][:1] == ["01_first_posterior.ipynb"]


@every_tutorial
def test_output_is_stored(path: Path) -> None:
    """Run once from top to bottom, in a fresh kernel, without complaints, paths or widgets."""
    book = json.loads(path.read_text(encoding="utf-8"))
    assert path.stat().st_size < MAX_SIZE
    code = [cell for cell in book["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    assert any("image/png" in output.get("data", {}) for cell in outputs(book) for output in cell)
    assert complaints(book) == []
    for forbidden in ("Traceback", "site-packages", "/home/", "/tmp/", str(ROOT)):
        assert forbidden not in words(book)


@pytest.mark.slow
@every_tutorial
def test_tutorial_runs(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With this interpreter and checkout, in an empty directory; gives outputs of the kinds that are stored."""
    spec = tmp_path / "kernels" / "python3"
    spec.mkdir(parents=True)
    argv = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    kernel = {"argv": argv, "display_name": "Python 3", "language": "python"}
    (spec / "kernel.json").write_text(json.dumps(kernel), encoding="utf-8")
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path))  # goes before the kernels of the user and of the system
    monkeypatch.setenv("JUPYTER_PLATFORM_DIRS", "1")
    for name in ("JUPYTER_RUNTIME_DIR", "JUPYTER_CONFIG_DIR", "IPYTHONDIR"):
        monkeypatch.setenv(name, str(tmp_path / name.lower()))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]))
    monkeypatch.setenv("PYTHONWARNINGS", QUIET)
    monkeypatch.delenv("MPLBACKEND", raising=False)  # the kernel has a backend of its own

    import nbformat
    from nbclient import NotebookClient

    book = nbformat.read(path, as_version=4)
    stored = [[output["output_type"] for output in cell] for cell in outputs(book)]
    where = tmp_path / "work"
    where.mkdir()
    client = NotebookClient(
        book,
        timeout=TIMEOUT,
        kernel_name="python3",
        resources={"metadata": {"path": str(where)}},
        allow_errors=True,
        coalesce_streams=True,  # a slow kernel sends the lines of one cell in several pieces
    )
    client.execute()
    assert complaints(book) == []
    assert [[output["output_type"] for output in cell] for cell in outputs(book)] == stored
    assert list(where.iterdir()) == []
