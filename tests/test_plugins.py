"""Guides and models of other packages: found by name, read late, and never in the place of ours."""

from __future__ import annotations

import importlib
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from typer.testing import CliRunner

import pyro_vi_lab as vl
from pyro_vi_lab import plugins
from pyro_vi_lab.cli import app
from pyro_vi_lab.errors import ArgumentError, PluginError

ROOT = Path(__file__).resolve().parents[1]
CODE = """
import pyro_vi_lab as vl
import pyro
import pyro.distributions as dist
import torch


class Wide(vl.guides.MeanFieldNormal):
    pass


def by_hand(*args):
    loc = pyro.param("their_loc", torch.tensor(0.0))
    pyro.sample("mean", dist.Normal(loc, 1.0))


def model():
    pyro.sample("mean", dist.Normal(0.0, 10.0))
    pyro.sample("y", dist.Normal(0.0, 1.0), obs=torch.tensor(1.0))


def problem():
    return vl.Problem(model, name="theirs")


def breaks():
    raise KeyError("their table")


example = vl.models.Example("of another package", problem)
number = 3
returns_a_number = lambda: 3
"""
Install = Callable[..., None]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Puts a package with a module ``their_module`` and entry points on the path, as pip would."""
    before = set(sys.modules)

    def make(
        *, guides: dict[str, str] | None = None, models: dict[str, str] | None = None, name: str = "theirs"
    ) -> None:
        (tmp_path / "their_module.py").write_text(CODE, encoding="utf-8")
        (tmp_path / "their_broken_module.py").write_text("import a_module_that_is_not_there", encoding="utf-8")
        folder = tmp_path / f"{name}-2.1.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 2.1\n", encoding="utf-8")
        lines = []
        for group, table in (("guides", guides), ("models", models)):
            lines += [f"[pyro_vi_lab.{group}]", *(f"{key} = {value}" for key, value in (table or {}).items())]
        (folder / "entry_points.txt").write_text("\n".join(lines), encoding="utf-8")
        importlib.invalidate_caches()
        plugins.entries.cache_clear()

    monkeypatch.syspath_prepend(str(tmp_path))
    yield make
    plugins.entries.cache_clear()
    for module in set(sys.modules) - before:
        if module.startswith("their_"):
            del sys.modules[module]


def normal_problem() -> vl.Problem:
    def model(y: torch.Tensor) -> None:
        mean = pyro.sample("mean", dist.Normal(0.0, 10.0))
        with pyro.plate("row", len(y)):
            pyro.sample("y", dist.Normal(mean, 1.0), obs=y)

    return vl.Problem(model, torch.tensor([1.0, 2.0, 3.0]))


def test_a_guide_class_of_another_package_is_fitted_by_name(install: Install) -> None:
    install(guides={"wide": "their_module:Wide"})
    fit = vl.fit(normal_problem(), "wide", progress=False)
    assert fit.status is vl.Status.CONVERGED
    assert type(fit.guide).__name__ == "Wide"
    assert fit.method == "wide"


def test_the_command_line_takes_names_of_other_packages(install: Install, tmp_path: Path) -> None:
    install(guides={"wide": "their_module:Wide"}, models={"theirs": "their_module:problem"})
    words = ["fit", "theirs", "--guide", "wide", "--out", str(tmp_path / "out"), "--draws", "50", "--quiet"]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    assert (tmp_path / "out" / "wide.nc").is_file()


def test_a_guide_function_of_another_package_is_trained(install: Install) -> None:
    install(guides={"by_hand": "their_module:by_hand"})
    fit = vl.fit(normal_problem(), "by_hand", max_steps=5, progress=False)
    assert fit.method == "by_hand"
    assert "their_loc" in pyro.get_param_store()


@pytest.mark.parametrize("what", ["problem", "example"])
def test_a_model_of_another_package_is_built(install: Install, what: str) -> None:
    install(models={"theirs": f"their_module:{what}"})
    assert vl.models.build("theirs").name == "theirs"


def test_an_unknown_name_lists_theirs_too(install: Install) -> None:
    install(guides={"wide": "their_module:Wide"}, models={"theirs": "their_module:problem"})
    with pytest.raises(ArgumentError, match=r"unknown guide 'wid': did you mean 'wide'\? Known: .*full_rank, .*wide"):
        vl.fit(normal_problem(), "wid")
    with pytest.raises(ArgumentError, match="unknown model 'thers': did you mean 'theirs'"):
        vl.models.build("thers")


@pytest.mark.parametrize(
    ("models", "expected"),
    [
        (
            {"x": "their_broken_module:x"},
            "theirs 2.1 cannot be imported from their_broken_module:x: ModuleNotFoundError",
        ),
        ({"x": "their_module:missing"}, "theirs 2.1 cannot be imported from their_module:missing: AttributeError"),
        ({"x": "their_module:number"}, "theirs 2.1 cannot be used: it is int, not an Example or a function"),
        ({"x": "their_module:returns_a_number"}, "theirs 2.1 cannot be used: it makes int, not a pyro_vi_lab.Problem"),
        ({"x": "their_module:breaks"}, "theirs 2.1 cannot be used: making it raises KeyError: 'their table'"),
        ({"x": "their_module:example", "eight_schools": "their_module:example"}, "package theirs 2.1 offers a model"),
    ],
)
def test_a_broken_package_is_named(install: Install, models: dict[str, str], expected: str) -> None:
    install(models=models)
    with pytest.raises(PluginError) as raised:
        vl.models.build("x")
    assert expected in str(raised.value)


def test_a_guide_that_is_none_is_named(install: Install) -> None:
    install(guides={"three": "their_module:number"})
    with pytest.raises(PluginError, match=r"guide 'three' of package theirs 2\.1 cannot be used: it is int"):
        vl.fit(normal_problem(), "three")


def test_two_packages_with_the_same_name_are_both_named(install: Install) -> None:
    for name in ("theirs", "others"):
        install(guides={"wide": "their_module:Wide"}, name=name)
    with pytest.raises(PluginError, match=r"theirs 2\.1 and others 2\.1|others 2\.1 and theirs 2\.1"):
        vl.guides.guide_named("wide")


def test_a_name_of_ours_stays_ours(install: Install) -> None:
    install(guides={"full_rank": "their_module:Wide"}, models={"eight_schools": "their_module:problem"})
    assert vl.guides.guide_named("full_rank") is vl.guides.FullRankNormal
    assert vl.models.build("eight_schools").name == "eight_schools"
    with pytest.raises(PluginError, match=r"theirs 2\.1 offers a guide 'full_rank'.*renamed"):
        vl.guides.guide_named("wide")


def test_names_of_ours_read_no_entry_points(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(group: str) -> Any:
        raise AssertionError(group)

    monkeypatch.setattr(plugins, "entries", fail)
    vl.guides.guide_named("flow")
    vl.models.build("eight_schools")


def test_the_import_reads_no_entry_points() -> None:
    script = """
import importlib.metadata
import pyro, torch
importlib.metadata.entry_points = lambda **_: 1 / 0
import pyro_vi_lab
"""
    run = subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=False, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
