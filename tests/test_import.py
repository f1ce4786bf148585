"""Importing the package is cheap and changes nothing for its user."""

from __future__ import annotations

import compileall
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent

SCRIPT = """
import json, random, sys, time, warnings
begin = time.process_time()
import numpy, pyro, torch
pyro_seconds = time.process_time() - begin

def state():
    return {
        "pyro settings": pyro.settings.get(),
        "pyro validation": pyro.infer.util.is_validation_enabled(),
        "torch validation": torch.distributions.Distribution._validate_args,
        "default dtype": str(torch.get_default_dtype()),
        "default device": str(torch.get_default_device()),
        "grad enabled": torch.is_grad_enabled(),
        "threads": [torch.get_num_threads(), torch.get_num_interop_threads()],
        "random states": hash(str([torch.initial_seed(), numpy.random.get_state(), random.getstate()])),
        "torch random state": hash(tuple(torch.get_rng_state().tolist())),
        "param store": sorted(pyro.get_param_store().keys()),
        "warning filters": [str(f) for f in warnings.filters],
        "numpy errors": numpy.geterr(),
    }

before, modules, start = state(), set(sys.modules), time.process_time()
import pyro_vi_lab
seconds = time.process_time() - start
new = sorted({name.split(".")[0] for name in set(sys.modules) - modules})
found = {"file": pyro_vi_lab.__file__, "seconds": seconds, "pyro": pyro_seconds, "new": new}
print(json.dumps({"before": before, "after": state(), **found}))
"""


@pytest.fixture(scope="module")
def observed() -> dict[str, Any]:
    """What a fresh interpreter sees when it imports the package after Pyro."""
    # bytecode is there from the second import on, and Pyro's is there already
    assert compileall.compile_dir(ROOT / "pyro_vi_lab", quiet=1)
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", SCRIPT], cwd=ROOT, check=False, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    result: dict[str, Any] = json.loads(run.stdout)
    assert Path(result["file"]).parent.name == "pyro_vi_lab"
    return result


def test_global_state_is_left_alone(observed: dict[str, Any]) -> None:
    assert observed["after"] == observed["before"]


@pytest.mark.parametrize(
    "heavy",
    ["arviz", "jinja2", "matplotlib", "nutpie", "pandas", "rich", "sklearn", "typer", "xarray", "zuko"],
)
def test_heavy_packages_are_left_for_later(observed: dict[str, Any], heavy: str) -> None:
    assert heavy not in observed["new"]


def test_the_import_adds_little_to_that_of_pyro(observed: dict[str, Any]) -> None:
    # In processor time, and as a part of Pyro's own: machines differ, and are shared.
    assert observed["seconds"] < 0.2 * observed["pyro"]
