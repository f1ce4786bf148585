"""What is published: one version, everything that the code needs, nothing else."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml
from packaging.version import Version

import pyro_vi_lab as vl
from tests.try_wheel import example

ROOT = Path(__file__).resolve().parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
GENERATED = shutil.ignore_patterns(
    ".*", "__pycache__", "*.egg-info", "build", "dist", "demo", "site", "htmlcov", "shared"
)


def test_the_version_stands_in_one_place() -> None:
    assert "version" not in PYPROJECT["project"]
    assert PYPROJECT["project"]["dynamic"] == ["version"]
    assert PYPROJECT["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "pyro_vi_lab.__version__"}
    assert str(Version(vl.__version__)) == vl.__version__
    assigned = [path for path in (ROOT / "pyro_vi_lab").rglob("*.py") if "__version__ =" in path.read_text("utf-8")]
    assert [path.name for path in assigned] == ["__init__.py"]


def test_the_citation_is_of_this_project() -> None:
    """The keys that the Citation File Format 1.2.0 requires; no version, which stands elsewhere."""
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["cff-version"] == "1.2.0"
    assert {"message", "title", "authors"} <= citation.keys()
    assert "version" not in citation
    assert citation["license"] == PYPROJECT["project"]["license"]
    assert citation["title"].startswith(PYPROJECT["project"]["name"])
    assert citation["authors"] == PYPROJECT["project"]["authors"]
    assert set(citation["keywords"]) == set(PYPROJECT["project"]["keywords"])


def test_the_example_that_a_new_user_tries_is_in_the_readme() -> None:
    model, rest = example((ROOT / "README.md").read_text(encoding="utf-8"))
    assert "vl.Problem(" in model
    for call in ("vl.fit(", "vl.nuts(", "vl.compare(", "vl.to_arviz("):
        assert call in rest


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with wheel and source distribution, built from a copy with the setuptools that is installed."""
    source, out = tmp_path_factory.mktemp("source") / "project", tmp_path_factory.mktemp("dist")
    shutil.copytree(ROOT, source, ignore=GENERATED)
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(source)]
    run = subprocess.run(command, check=False, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    return out


@pytest.mark.slow
def test_the_wheel_holds_the_package_and_nothing_else(built: Path) -> None:
    (path,) = built.glob("*.whl")
    with zipfile.ZipFile(path) as wheel:
        names = set(wheel.namelist())
        (meta,) = (name for name in names if name.endswith(".dist-info/METADATA"))
        text = wheel.read(meta).decode()
        (entries,) = (name for name in names if name.endswith(".dist-info/entry_points.txt"))
        scripts = wheel.read(entries).decode()
    ours = {name for name in names if ".dist-info/" not in name}
    package = ROOT / "pyro_vi_lab"
    files = {path for path in package.rglob("*") if path.is_file() and "__pycache__" not in path.parts}
    assert ours == {path.relative_to(ROOT).as_posix() for path in files}
    assert {"pyro_vi_lab/py.typed", "pyro_vi_lab/report/page.html.j2"} <= ours
    assert f"\nVersion: {vl.__version__}\n" in text
    assert "pyro-vi-lab = pyro_vi_lab.cli:main" in scripts


@pytest.mark.slow
def test_the_source_distribution_can_be_tested(built: Path) -> None:
    (path,) = built.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    wanted = {"README.md", "LICENSE", "CHANGELOG.md", "CITATION.cff", "Makefile", "constraints.txt", "setup.cfg"}
    wanted |= {path.relative_to(ROOT).as_posix() for path in (ROOT / "tests").rglob("*.py")}
    assert wanted - names == set()
    assert not [name for name in names if re.search(r"(^|/)(\.venv|\.git|demo|site|__pycache__)/", name)]


@pytest.mark.slow
def test_twine_finds_nothing_wrong(built: Path) -> None:
    files = [str(path) for path in built.iterdir()]
    run = subprocess.run(
        [sys.executable, "-m", "twine", "check", "--strict", *files], check=False, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stdout + run.stderr
