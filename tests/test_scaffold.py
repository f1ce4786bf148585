"""The project's own files agree with each other."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pyro
import pytest
import torch
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
PINS = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").split())
PINNED = {canonicalize_name(name): Version(version) for name, version in PINS.items()}


UNDECLARED = {
    "pyro_vi_lab": "the package itself",
    "arviz_stats": "comes with ArviZ 1.x alone, and the bridge imports it only there",
    "IPython": "only where it runs already: a notebook shows the progress",
}
"""Imports that no requirement provides, and why."""


def declared(*, extras: bool) -> list[Requirement]:
    lists = [PROJECT["dependencies"], *(PROJECT["optional-dependencies"].values() if extras else [])]
    return [Requirement(line) for lines in lists for line in lines]


def all_requirements() -> list[Requirement]:
    """What pyproject.toml asks for and, from the installed packages, what that asks for in turn."""
    queue = [r for r in declared(extras=True) if canonicalize_name(r.name) != PROJECT["name"]]
    found = {}
    while queue:
        requirement = queue.pop()
        if str(requirement) in found:
            continue
        found[str(requirement)] = requirement
        for line in metadata.requires(requirement.name) or []:
            further = Requirement(line)
            extras = requirement.extras or {""}
            if further.marker is None or any(further.marker.evaluate({"extra": extra}) for extra in extras):
                queue.append(further)
    return list(found.values())


def test_everything_that_gets_installed_is_pinned_in_range() -> None:
    for requirement in all_requirements():
        name = canonicalize_name(requirement.name)
        assert name in PINNED, f"constraints.txt has no pin for {requirement}"
        assert PINNED[name] in requirement.specifier, f"{name}=={PINNED[name]} is outside {requirement}"


def test_pins_fit_every_build_of_a_version() -> None:
    assert [name for name, version in PINNED.items() if version.local] == []


def test_third_party_imports_are_declared() -> None:
    providers = metadata.packages_distributions()
    allowed = {canonicalize_name(r.name) for r in declared(extras=False)}
    for extra in ("examples", "formula", "parquet", "tensorboard"):
        allowed |= {canonicalize_name(Requirement(r).name) for r in PROJECT["optional-dependencies"][extra]}
    undeclared = set()
    for path in (ROOT / "pyro_vi_lab").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module or ""]
            for top in {name.split(".")[0] for name in names} - sys.stdlib_module_names - UNDECLARED.keys():
                if not allowed & {canonicalize_name(name) for name in providers.get(top, [])}:
                    undeclared.add(f"{path.name}: {top}")
    assert undeclared == set()


def planned(*arguments: str, **environment: str) -> list[str]:
    """The commands that make would run."""
    clean = {
        key: value
        for key, value in os.environ.items()
        if key not in ("ARGS", "SLOW", "MAKEFLAGS", "MAKELEVEL", "PYTHON")
    }
    run = subprocess.run(
        ["make", "--dry-run", *arguments],
        cwd=ROOT,
        env=clean | environment,
        check=True,
        capture_output=True,
        text=True,
    )
    return run.stdout.splitlines()


def test_the_demo_installs_pinned_versions_and_runs_the_main_job() -> None:
    # As if constraints.txt had just changed: the plan is the same whether .venv is there already or not.
    commands = planned("--assume-new=constraints.txt", "demo")
    assert commands[-1] == ".venv/bin/pyro-vi-lab compare eight_schools --out demo"
    assert any("pip install" in line and "-c constraints.txt" in line for line in commands)


def test_lint_checks_a_user_s_file_too() -> None:
    assert planned("lint")[-1] == ".venv/bin/mypy"
    config = (ROOT / "setup.cfg").read_text(encoding="utf-8")
    assert "\nfiles = pyro_vi_lab, tests/typed_user.py\n" in config


def test_the_wheel_is_tried_in_an_empty_environment() -> None:
    commands = planned("try-wheel")
    install = next(i for i, line in enumerate(commands) if line.startswith("build/new-user/bin/python -m pip install"))
    assert "-c constraints.txt" in commands[install]
    assert commands[install].endswith("dist/*.whl")
    assert any("twine check --strict" in line for line in commands[:install])
    assert "../../tests/try_wheel.py" in commands[install + 1]


def test_the_pages_are_built_after_their_examples_have_run() -> None:
    tests, build = planned("docs")[-2:]
    assert {"pyro_vi_lab", "tests/test_readme.py", "tests/test_docs.py", "tests/test_tutorials.py"} <= set(
        tests.split()
    )
    assert "mkdocs build --strict" in build


def test_slow_tests_run_where_they_are_asked_for() -> None:
    pytest_ = [".venv/bin/python", "-m", "pytest"]
    fast, all_ = (planned("test", **variables)[-1].split() for variables in ({}, {"SLOW": "1"}))
    assert fast[:3] == all_[:3] == pytest_
    assert fast == [*all_, "-m", '"not', 'slow"']


def test_ci_runs_lint_and_test_and_nothing_else() -> None:
    script = ROOT / ".ci" / "run"
    lines = script.read_text(encoding="utf-8").splitlines()
    assert os.access(script, os.X_OK)
    assert lines[1] == "set -euo pipefail"
    assert [line for line in lines if line.startswith("make")] == ["make lint", "make test"]


@pytest.mark.parametrize("turn", ["first", "second"])
def test_tests_are_isolated(turn: str) -> None:
    """Each turn finds the world in order, then disturbs it: the second sees whether that was undone."""
    assert torch.get_default_dtype() == torch.float32
    assert torch.get_num_threads() == 1
    assert pyro.settings.get("validate_infer")
    assert torch.distributions.Distribution._validate_args
    assert list(pyro.get_param_store()) == []
    assert torch.initial_seed() == 0
    pyro.param("left_behind", torch.zeros(1))
    pyro.enable_validation(False)
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(2)
    torch.manual_seed(1)
