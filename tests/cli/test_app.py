from __future__ import annotations

import errno
import json
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import arviz
import pytest
from typer.testing import CliRunner, Result

from pyro_vi_lab import Callback, Fit, Problem, fit
from pyro_vi_lab.cli import app
from pyro_vi_lab.models import MODELS

ROOT = Path(__file__).parent.parent.parent

HEADER = """
import pyro
import pyro.distributions as dist
import torch
from torch.distributions import constraints
import pyro_vi_lab as vl
"""

GOOD = """
def model(y):
    mean = pyro.sample("mean", dist.Normal(0.0, 10.0))
    with pyro.plate("row", len(y)):
        pyro.sample("y", dist.Normal(mean, 1.0), obs=y)

problem = vl.Problem(model, torch.tensor([1.0, 2.0, 4.0]))

def make():
    return problem

def not_one():
    return model
"""

REGRESSION = """
def model(x, y):
    slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
    with pyro.plate("row", {rows}):
        pyro.sample("y", dist.Normal(slope * x, 1.0), obs=y)

def problem():
    return vl.Problem(model, torch.tensor({x}), torch.tensor({y}))
"""

# What is wrong: the file, the object, and what the message must hold.
BAD_MODELS = {
    "nan in the data": (
        REGRESSION.format(rows=3, x=[1.0, 2.0, 3.0], y="[1.0, float('nan'), 2.0]"),
        "problem",
        ["'y'", "missing or infinite", "index (1,)"],
    ),
    "infinity in the data": (
        REGRESSION.format(rows=3, x=[1.0, 2.0, 3.0], y="[1.0, 2.0, float('inf')]"),
        "problem",
        ["'y'", "(inf)", "index (2,)"],
    ),
    "lengths that disagree": (
        REGRESSION.format(rows="len(x)", x=[1.0, 2.0, 3.0], y=[1.0, 2.0]),
        "problem",
        ["'y'"],
    ),
    "lengths that disagree with the plate": (
        REGRESSION.format(rows="len(y)", x=[1.0, 2.0, 3.0], y=[1.0, 2.0]),
        "problem",
        ["site y", "plate('row')"],
    ),
    "no latents": (
        """
def model():
    pyro.sample("y", dist.Normal(0.0, 1.0), obs=torch.tensor(1.0))

problem = lambda: vl.Problem(model)
""",
        "problem",
        ["no continuous latent sites"],
    ),
    "support without a bijection": (
        """
class Ring(constraints.Constraint):
    is_discrete = False
    event_dim = 0

    def check(self, value):
        return value.abs() == 1

class Odd(dist.Normal):
    support = Ring()

def model():
    pyro.sample("odd", Odd(0.0, 1.0))

problem = lambda: vl.Problem(model)
""",
        "problem",
        ["'odd'", "bijection"],
    ),
    "a sequential plate": (
        """
def model():
    for i in pyro.plate("rows", 3):
        pyro.sample(f"x{i}", dist.Normal(0.0, 1.0))

problem = lambda: vl.Problem(model)
""",
        "problem",
        ["sequential plate 'rows'", "with pyro.plate"],
    ),
    "structure that changes": (
        """
def model():
    x = pyro.sample("x", dist.Normal(0.0, 1.0))
    if x > 0.1:
        pyro.sample("sometimes", dist.Normal(0.0, 1.0))
    else:
        pyro.sample("otherwise", dist.Normal(0.0, 1.0))

problem = lambda: vl.Problem(model)
""",
        "problem",
        ["changes from run to run", "'otherwise'"],
    ),
    "an import that fails": (
        "import no_such_module_anywhere\n",
        "problem",
        ["ModuleNotFoundError", "bad.py", "line 7"],
    ),
    "a file that raises": ("def f():\n    raise KeyError('mine')\n\nf()\n", "problem", ["KeyError", "mine", "line 8"]),
    "a file that ends the program": ("raise SystemExit(0)\n", "problem", ["SystemExit", "bad.py"]),
    "a syntax error": ("def f(:\n", "problem", ["SyntaxError", "bad.py", "line 7"]),
    "an error while the problem is made": (
        "def problem():\n    return 1 / 0\n",
        "problem",
        ["ZeroDivisionError", "line 8"],
    ),
    "an object that is not there": (GOOD, "problm", ["'problm'", "did you mean 'problem'?"]),
    "an object of another type": ("problem = 3\n", "problem", ["bad.py:problem is int", "Problem"]),
    "a function that gives something else": (GOOD, "not_one", ["bad.py:not_one", "gives function"]),
    "the model in place of the problem": (GOOD, "model", ["needs arguments (y)", "Problem(model, y)"]),
}


def write(directory: Path, text: str, name: str = "bad.py") -> Path:
    path = directory / name
    path.write_text(HEADER + text, encoding="utf-8")
    return path


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def check_refused(code: int, output: str, error: str, directory: Path, expected: list[str]) -> None:
    """Exit code 2, one line that says why, no traceback, and nothing written."""
    assert code == 2, error
    assert output == ""
    assert "Traceback" not in error
    lines = [line for line in error.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    for part in expected:
        assert part in error
    assert not (directory / "out").exists()
    assert not list(directory.rglob(".pyro-vi-lab-*"))


@pytest.mark.parametrize("command", ["compare", "fit"])
@pytest.mark.parametrize("case", BAD_MODELS)
def test_bad_models_are_refused_in_words(case: str, command: str, tmp_path: Path) -> None:
    text, name, expected = BAD_MODELS[case]
    path = write(tmp_path, text)
    result = run(command, f"{path}:{name}", "--out", tmp_path / "out", "--quiet")
    check_refused(result.exit_code, result.stdout, result.stderr, tmp_path, expected)


BAD_ARGUMENTS = {
    "an unknown model": (["eight_scools"], ["unknown model 'eight_scools'", "did you mean 'eight_schools'?"]),
    "an unknown guide": (["eight_schools", "--guide", "ful_rank"], ["'ful_rank'", "did you mean 'full_rank'?"]),
    "a file without an object": (
        [ROOT / "tests" / "conftest.py"],
        ["name the object in it too", "conftest.py:problem"],
    ),
    "a file that is not there": (["missing.py:problem"], ["there is no model file missing.py"]),
    "a file that is not Python": ([f"{ROOT / 'pyproject.toml'}:problem"], ["not a Python file"]),
}


@pytest.mark.parametrize("command", ["compare", "fit"])
@pytest.mark.parametrize("case", BAD_ARGUMENTS)
def test_bad_arguments_are_refused_in_words(case: str, command: str, tmp_path: Path) -> None:
    arguments, expected = BAD_ARGUMENTS[case]
    result = run(command, *arguments, "--out", tmp_path / "out")
    check_refused(result.exit_code, result.stdout, result.stderr, tmp_path, expected)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--chains", "0"], "num_chains"),
        (["--warmup", "0"], "num_warmup"),
        (["--draws", "0"], "num_draws"),
        (["--target-accept", "1.5"], "target_accept"),
    ],
)
def test_numbers_out_of_range_are_named(options: list[str], expected: str, tmp_path: Path) -> None:
    result = run("compare", f"{write(tmp_path, GOOD)}:problem", "--out", tmp_path / "out", "--quiet", *options)
    check_refused(result.exit_code, result.stdout, result.stderr, tmp_path, [expected])


def test_seeds_out_of_range_are_named(tmp_path: Path) -> None:
    for seed in (-1, 2**32 - 1):
        result = run("fit", "eight_schools", "--out", tmp_path / "out", "--seed", seed)
        assert result.exit_code == 2
        assert "--seed" in result.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", ["compare", "fit"])
def test_an_unwritable_out_is_found_before_any_work(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("fitting", "comparing"):
        monkeypatch.setattr(f"pyro_vi_lab.cli.{module}.read_problem", lambda *_, **__: pytest.fail("the work began"))
    (tmp_path / "file").write_text("mine")
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        result = run(command, "eight_schools", "--out", out)
        check_refused(result.exit_code, result.stdout, result.stderr, tmp_path, ["cannot write to", "file is a file"])
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.slow
@pytest.mark.parametrize("case", [*BAD_MODELS, *BAD_ARGUMENTS, "an out that cannot be written"])
def test_the_program_itself_refuses(case: str, tmp_path: Path) -> None:
    """The same in processes of their own, with all that a real interpreter prints."""
    out = tmp_path / "out"
    if case in BAD_MODELS:
        text, name, expected = BAD_MODELS[case]
        arguments: list[object] = [f"{write(tmp_path, text)}:{name}"]
    elif case in BAD_ARGUMENTS:
        found, expected = BAD_ARGUMENTS[case]
        arguments = list(found)
    else:
        (tmp_path / "file").write_text("")
        arguments, expected, out = ["eight_schools"], ["cannot write to"], tmp_path / "file" / "x"
    command = [sys.executable, "-m", "pyro_vi_lab", "compare", *map(str, arguments), "--out", str(out)]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=False
    )
    check_refused(done.returncode, done.stdout, done.stderr, tmp_path, expected)


# --- what works -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> tuple[Result, Path]:
    """One comparison of a model file, small enough to run in seconds."""
    directory = tmp_path_factory.mktemp("compare")
    path = write(directory, GOOD, "good.py")
    arguments = ["--out", directory / "out", "--draws", 600, "--warmup", 200, "--chains", 2, "--seed", 3]
    return run("compare", f"{path}:make", *arguments), directory


def test_compare_prints_a_table_and_the_path_of_the_report(compared: tuple[Result, Path]) -> None:
    result, directory = compared
    assert result.exit_code == 0, result.stderr
    lines = result.stdout.splitlines()
    header = lines[0].split("  ")
    assert [title.strip() for title in header if title] == [
        "candidate",
        "verdict",
        "negative ELBO",
        "k-hat",
        "largest mean shift",
        "sd ratio",
        "seconds",
        "gradients",
    ]
    assert {line.split()[0] for line in lines[1:3]} == {"mean_field", "full_rank"}
    assert lines[3].startswith("nuts ")
    assert lines[-1] == str(directory / "out" / "report.html")
    assert "NUTS on model: 2 chains" in result.stderr


def test_compare_writes_what_it_names(compared: tuple[Result, Path]) -> None:
    out = compared[1] / "out"
    names = ["comparison.json", "full_rank.nc", "mean_field.nc", "nuts.nc", "report.html"]
    assert sorted(path.name for path in out.iterdir()) == names
    for name in names:
        if name.endswith(".nc"):
            assert "mean" in arviz.from_netcdf(str(out / name))["posterior"]
    numbers = json.loads((out / "comparison.json").read_text(encoding="utf-8"))
    assert numbers["reference"]["num_chains"] == 2
    assert numbers["seed"] == 3
    # Normal(0, 10) prior and three rows with noise 1: the exact mean is 7 / 3.01. Five standard errors of the draws.
    row = numbers["parameters"][1]
    assert abs(row["reference_mean"] - 7 / 3.01) < 5 * row["reference_sd"] / 400**0.5
    assert abs(row["mean_shift"]) < 5 * row["mean_shift_mcse"]


def test_the_command_in_the_report_gives_the_numbers_again(compared: tuple[Result, Path]) -> None:
    out = compared[1] / "out"
    before = json.loads((out / "comparison.json").read_text(encoding="utf-8"))
    program, *arguments = shlex.split(before["command"])
    assert program == "pyro-vi-lab"
    assert before["command"] in (out / "report.html").read_text(encoding="utf-8")
    result = run(*arguments, "--quiet")
    assert result.exit_code == 0
    assert result.stdout == f"{out / 'report.html'}\n"
    assert result.stderr == ""
    after = json.loads((out / "comparison.json").read_text(encoding="utf-8"))
    assert after["parameters"] == before["parameters"]
    assert after["candidates"][0]["negative_elbo"] == before["candidates"][0]["negative_elbo"]


def test_an_unfit_reference_is_said(tmp_path: Path) -> None:
    path = write(tmp_path, GOOD)
    result = run("compare", f"{path}:problem", "--out", tmp_path / "out", "--draws", 40, "--warmup", 20, "--chains", 2)
    assert result.exit_code == 0
    assert "nuts (unfit)" in result.stdout
    assert "The reference is unfit: " in result.stdout


def test_fit_prints_its_status_and_parameters(tmp_path: Path) -> None:
    path = write(tmp_path, GOOD)
    result = run("fit", f"{path}:problem", "--guide", "mean_field", "--out", tmp_path / "out")
    assert result.exit_code == 0, result.stderr
    assert "mean_field fit of model converged" in result.stdout
    row = next(line.split() for line in result.stdout.splitlines() if line.startswith("mean "))
    # sd 1 / sqrt(3.01) and 1000 draws: five standard errors.
    assert abs(float(row[1]) - 7 / 3.01) < 5 / (3.01 * 1000) ** 0.5
    assert result.stdout.splitlines()[-1] == str(tmp_path / "out" / "mean_field.nc")
    assert arviz.from_netcdf(str(tmp_path / "out" / "mean_field.nc")).attrs["method"] == "mean_field"
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mean_field.nc"]


UNBOUNDED = """
def model():
    x = pyro.sample("x", dist.Normal(0.0, 1.0))
    pyro.factor("growth", x.exp())

problem = vl.Problem(model)
"""


def test_a_fit_that_diverges_says_so_and_leaves_no_posterior(tmp_path: Path) -> None:
    path, out = write(tmp_path, UNBOUNDED), tmp_path / "out"
    result = run("fit", f"{path}:problem", "--out", out)
    assert result.exit_code == 1
    assert "full_rank fit of model diverged: " in result.stderr
    assert "Traceback" not in result.stderr
    assert not out.exists()
    out.mkdir()
    (out / "full_rank.nc").write_text("of an earlier run")
    assert run("fit", f"{path}:problem", "--out", out, "--quiet").exit_code == 1
    assert list(out.iterdir()) == []


def test_models_are_listed_with_their_descriptions() -> None:
    result = run("models")
    assert result.exit_code == 0
    assert [line.split()[0] for line in result.stdout.splitlines()] == list(MODELS)
    assert all(example.description in result.stdout for example in MODELS.values())


def test_warnings_are_one_line_each(tmp_path: Path) -> None:
    eager = """
def model(y):
    x = pyro.sample("x", dist.Normal(0.0, 1.0))
    if float(x.detach()) > 1e9:
        x = x + 0.0
    pyro.sample("y", dist.Normal(x, 1.0), obs=y)

problem = vl.Problem(model, torch.tensor(1.0))
"""
    result = run("fit", f"{write(tmp_path, eager)}:problem", "--out", tmp_path / "out", "--quiet")
    assert result.exit_code == 0
    lines = result.stderr.splitlines()
    assert lines
    assert re.match(r"warning: model model runs in the eager tier", lines[0])
    assert all(re.match(r"warning: model model cannot be run for many draws at once", line) for line in lines[1:])


def test_modules_beside_the_file_can_be_imported_and_nothing_stays(tmp_path: Path) -> None:
    (tmp_path / "beside_the_model.py").write_text("ROWS = [1.0, 2.0]")
    text = GOOD.replace("torch.tensor([1.0, 2.0, 4.0])", "torch.tensor(ROWS)")
    path = write(tmp_path, f"from beside_the_model import ROWS\n{text}")
    before = list(sys.path)
    assert run("fit", f"{path}:problem", "--out", tmp_path / "out", "--quiet").exit_code == 0
    assert sys.path == before
    del sys.modules["beside_the_model"]


def test_help_is_there_for_every_command() -> None:
    commands = ("compare", "fit", "nuts", "trust", "report", "export", "models", "explain")
    for arguments in ([], ["--help"], *([name, "-h"] for name in commands)):
        output = run(*arguments).output
        assert "Usage" in output
        if len(arguments) == 2:
            lines = [line.strip() for line in output.splitlines()]
            start = lines.index("Examples:")
            assert lines[start + 1].startswith(f"pyro-vi-lab {arguments[0]}")


def test_the_module_and_the_console_script_are_the_same_program() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pyro_vi_lab", "models"], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert done.stdout == run("models").stdout


# --- data files -----------------------------------------------------------------------------------------------------

MODEL = """
def model(x, y):
    slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
    with pyro.plate("row", len(y)):
        pyro.sample("y", dist.Normal(slope * x, 1.0), obs=y)
"""

BAD_DATA = {
    "a missing column": ("d.csv", b"x,z\n1,2\n", ["d.csv has no column 'y'", "bad.py:model", "it has x, z"]),
    "a wrong type": ("d.csv", b"x,y\n1,2\nred,3\n", ["column 'x'", "d.csv has 'red' in row 2", "a number"]),
    "a missing value": ("d.csv", b"x,y\n1,2\n2,\n", ["column 'y'", "d.csv has no value in row 2"]),
    "an empty file": ("d.csv", b"", ["d.csv is empty"]),
    "a file that is not there": ("d.csv", None, ["there is no data file"]),
    "JSON that is no object": ("d.json", b"[]", ["d.json holds a list, expected an object"]),
    "lengths that disagree": ("d.json", b'{"x": [1, 2, 3], "y": [1, 2]}', ["site y", "x (3,), y (2,)"]),
}


@pytest.mark.parametrize("command", ["compare", "fit", "nuts"])
@pytest.mark.parametrize("case", BAD_DATA)
def test_bad_data_are_refused_in_words(case: str, command: str, tmp_path: Path) -> None:
    name, content, expected = BAD_DATA[case]
    if content is not None:
        (tmp_path / name).write_bytes(content)
    path = write(tmp_path, MODEL)
    result = run(command, f"{path}:model", "--data", tmp_path / name, "--out", tmp_path / "out", "--quiet")
    check_refused(result.exit_code, result.stdout, result.stderr, tmp_path, expected)


@pytest.fixture
def regression(tmp_path: Path) -> list[object]:
    """Arguments that name a model and its data."""
    (tmp_path / "d.csv").write_text("\ufeffx,y,remark\n0.5,1.0,a\n1.0,1.5,b\n2.0,4.5,\n", encoding="utf-8")
    return [f"{write(tmp_path, MODEL)}:model", "--data", tmp_path / "d.csv", "--out", tmp_path / "out"]


# Normal(0, 1) prior and three rows with noise 1: the precision is 1 + 0.25 + 1 + 4, the mean 11 / 6.25.
EXACT_MEAN, EXACT_SD = (0.5 * 1.0 + 1.0 * 1.5 + 2.0 * 4.5) / 6.25, 0.4


def test_fit_gives_json_and_nothing_else_on_standard_output(regression: list[object]) -> None:
    result = run("fit", *regression, "--json")
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    assert (found["status"], found["guide"], found["interrupted"]) == ("converged", "full_rank", False)
    (row,) = found["parameters"]
    assert row["parameter"] == "slope"
    assert abs(row["mean"] - EXACT_MEAN) < 5 * EXACT_SD / 1000**0.5
    assert Path(found["file"]).is_file()
    assert "full_rank fit of bad converged" in result.stderr
    assert "columns that" in result.stderr
    assert "remark" in result.stderr
    result = run("fit", *regression, "--json", "--quiet")
    assert result.stderr == ""
    assert json.loads(result.stdout)["parameters"] == found["parameters"]


def test_nuts_draws_checks_and_writes(regression: list[object], tmp_path: Path) -> None:
    result = run("nuts", *regression, "--chains", 2, "--warmup", 300, "--draws", 600, "--json")
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    assert abs(found["parameters"][0]["mean"] - EXACT_MEAN) < 5 * EXACT_SD / 200**0.5
    assert found["problems"] == [] or "ESS" in found["problems"][0]
    assert "slope" in arviz.from_netcdf(found["file"])["posterior"]
    assert (
        run("nuts", *regression, "--chains", 1, "--warmup", 5, "--draws", 20).stdout.count("unfit as a reference") > 0
    )


def test_compare_gives_json(regression: list[object], tmp_path: Path) -> None:
    small = ["--chains", 2, "--warmup", 100, "--draws", 200, "--guide", "mean_field", "--optim", "fixed_draws"]
    result = run("compare", *regression, *small, "--json", "--quiet")
    assert result.exit_code == 0, result.stderr
    assert result.stderr == ""
    found = json.loads(result.stdout)
    assert found["candidates"][0]["candidate"] == "mean_field"
    assert Path(found["files"]["report"]).is_file()
    words = shlex.split(found["command"])
    assert words[:3] == ["pyro-vi-lab", "compare", str(regression[0])]
    for option, value in (("--data", str(regression[2])), ("--optim", "fixed_draws"), ("--guide", "mean_field")):
        assert words[words.index(option) + 1] == value
    assert "--json" not in words


def test_explain_says_the_tier(regression: list[object]) -> None:
    result = run("explain", *regression[:3])
    assert result.exit_code == 0, result.stderr
    assert "bad: log density on R^1" in result.stdout
    found = json.loads(run("explain", *regression[:3], "--json").stdout)
    assert any("captured graph" in line for line in found["lines"])


def test_models_are_listed_as_json() -> None:
    assert set(json.loads(run("models", "--json").stdout)) >= set(MODELS)


def test_points_and_budgets_are_refused_before_any_work(regression: list[object], tmp_path: Path) -> None:
    for options, expected in (
        (["--guide", "map"], "guide 'map' is a point"),
        (["--time-budget", "0"], "--time-budget is a number of seconds above 0"),
        (["--optim", "adam"], "unknown optim 'adam'"),
    ):
        result = run("compare", *regression, *options)
        check_refused(result.exit_code, result.stdout, result.stderr, tmp_path, [expected])


def test_a_fit_ends_when_its_time_is_over(tmp_path: Path) -> None:
    guide = "flow"
    result = run("fit", "eight_schools", "--guide", guide, "--time-budget", 0.5, "--out", tmp_path / "out", "--json")
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    assert found["status"] == "out of steps"
    assert found["message"].startswith("stopped by TimeBudget after ") or "of the normal" in found["message"]


# --- Ctrl-C ---------------------------------------------------------------------------------------------------------


class Pressed(Callback):
    """Ctrl-C in the first step of a fit, so many times."""

    def __init__(self, times: int) -> None:
        self.times = times

    def on_step(self, step: int, record: Mapping[str, float]) -> None:
        if step == 1:
            for _ in range(self.times):
                signal.raise_signal(signal.SIGINT)


def press(monkeypatch: pytest.MonkeyPatch, *, guide: str, times: int = 1) -> None:
    def with_ctrl_c(problem: Problem, name: str, *, callbacks: Sequence[Callback], **options: Any) -> Fit:
        more = [Pressed(times)] if name == guide else []
        return fit(problem, name, callbacks=[*callbacks, *more], **options)

    monkeypatch.setattr("pyro_vi_lab.cli.fitting.fit", with_ctrl_c)


def test_ctrl_c_ends_a_fit_with_what_it_has(
    regression: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    press(monkeypatch, guide="full_rank")
    before = signal.getsignal(signal.SIGINT)
    result = run("fit", *regression, "--json")
    assert result.exit_code == 130
    found = json.loads(result.stdout)
    assert found["interrupted"]
    assert found["message"].startswith("stopped by Interruption after 2 steps")
    assert "Ctrl-C: the fit ends after this step" in result.stderr
    assert "slope" in arviz.from_netcdf(found["file"])["posterior"]
    assert signal.getsignal(signal.SIGINT) is before


def test_ctrl_c_twice_ends_everything(
    regression: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    press(monkeypatch, guide="full_rank", times=2)
    before = signal.getsignal(signal.SIGINT)
    result = run("fit", *regression)
    assert result.exit_code == 130
    assert result.stderr.splitlines()[-1] == "interrupted: nothing was written"
    assert not (tmp_path / "out").exists()
    assert signal.getsignal(signal.SIGINT) is before


def test_ctrl_c_keeps_the_fits_of_a_comparison(
    regression: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    press(monkeypatch, guide="full_rank")
    result = run("compare", *regression)
    assert result.exit_code == 130
    assert "interrupted before the comparison was made: mean_field and full_rank are kept in" in result.stderr
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["full_rank.nc", "mean_field.nc"]
    assert "NUTS" not in result.stderr


def test_ctrl_c_while_nuts_runs_keeps_the_fits(
    regression: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pyro_vi_lab.cli.fitting.nuts", lambda *_, **__: signal.raise_signal(signal.SIGINT))
    result = run("compare", *regression, "--json")
    assert result.exit_code == 130
    found = json.loads(result.stdout)
    assert {name: one["status"] for name, one in found["fits"].items()} == dict.fromkeys(
        ("mean_field", "full_rank"), "converged"
    )
    assert "NUTS on bad" in result.stderr
    assert all(Path(path).is_file() for path in found["files"].values())


def test_a_disk_that_is_full_leaves_nothing_half_written(
    regression: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "full_rank.nc").write_text("of an earlier run")

    def full(tree: object, path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("pyro_vi_lab.cli.fitting.save_arviz", full)
    for command in ("fit", "nuts"):
        result = run(command, *regression, "--draws", 50)
        assert result.exit_code == 2
        assert result.stderr.splitlines()[-1].startswith("error: cannot write to ")
        assert "No space left on device" in result.stderr
        assert [path.name for path in (tmp_path / "out").iterdir()] == ["full_rank.nc"]
    assert (tmp_path / "out" / "full_rank.nc").read_text() == "of an earlier run"


@pytest.mark.slow
def test_ctrl_c_of_a_terminal(regression: list[object], tmp_path: Path) -> None:
    """The real signal, to the program in the middle of NUTS."""
    command = [sys.executable, "-m", "pyro_vi_lab", "compare", *map(str, regression), "--draws", "1000000"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}
    ) as program:
        assert program.stderr is not None
        for line in program.stderr:
            if line.startswith("NUTS on"):
                break
        time.sleep(2)
        program.send_signal(signal.SIGINT)
        error = program.stderr.read()
    assert program.returncode == 130
    assert "mean_field and full_rank are kept" in error
    assert "Traceback" not in error
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["full_rank.nc", "mean_field.nc"]


# --- a new user -----------------------------------------------------------------------------------------------------

FIFTEEN_LINES = """\
\"\"\"Does a longer night make a faster runner?\"\"\"

import pyro
import pyro.distributions as dist


def problem(hours, minutes, club):
    intercept = pyro.sample("intercept", dist.Normal(50.0, 20.0))
    slope = pyro.sample("slope", dist.Normal(0.0, 5.0))
    of_club = pyro.sample("of_club", dist.Normal(0.0, 2.0))
    noise = pyro.sample("noise", dist.HalfNormal(5.0))
    with pyro.plate("runner", len(minutes)):
        mean = intercept + slope * hours + of_club * club
        pyro.sample("minutes", dist.Normal(mean, noise), obs=minutes)
"""


@pytest.mark.slow
def test_a_file_of_fifteen_lines_gives_a_report_without_a_compiler(tmp_path: Path) -> None:
    """As a new user would: a file, a table, one command, and no compiler on the machine."""
    assert len(FIFTEEN_LINES.splitlines()) <= 15
    (tmp_path / "file.py").write_text(FIFTEEN_LINES)
    noise = random.Random(0)
    rows = [(noise.gauss(0, 1), i % 6 - 2.5) for i in range(90)]  # as differences from the mean
    lines = [f"{hours:.2f},{52 - 4 * hours + club + noise.gauss(0, 4):.1f},{club}" for hours, club in rows]
    (tmp_path / "d.csv").write_text("\n".join(["hours,minutes,club", *lines]), encoding="utf-8-sig")
    environment = {name: value for name, value in os.environ.items() if name not in ("CC", "CXX")}
    environment |= {"PATH": str(tmp_path), "PYTHONPATH": str(ROOT), "HOME": str(tmp_path)}
    command = [sys.executable, "-m", "pyro_vi_lab", "compare", "file.py:problem", "--data", "d.csv", "--out", "out"]
    began, before = time.perf_counter(), os.times()
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, check=False)
    seconds = time.perf_counter() - began
    assert done.returncode == 0, done.stderr
    busy = os.times().children_user - before.children_user
    print(f"{seconds:.1f} s, of which {busy:.1f} s on a processor")  # noqa: T201
    assert "no C compiler" in done.stderr or "compiler" in done.stderr
    assert done.stdout.splitlines()[-1] == "out/report.html"
    assert "file" in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")


# --- verdicts -------------------------------------------------------------------------------------------------------

# The posterior is normal with a correlation of 0.99, which a mean-field normal cannot have.
NARROW = """
def model(y):
    a = pyro.sample("a", dist.Normal(0.0, 1.0))
    b = pyro.sample("b", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Normal(a - b, 0.07), obs=y)

problem = vl.Problem(model, torch.tensor(0.3))
"""


def test_trust_gives_a_verdict_and_an_exit_code(tmp_path: Path) -> None:
    problem = f"{write(tmp_path, NARROW)}:problem"
    good = run("trust", problem, "--require", "trust")
    assert good.exit_code == 0, good.stderr
    assert good.stdout.startswith("trust: full_rank fit of model")
    assert good.stdout.splitlines()[-1] == "trust"
    bad = run("trust", problem, "--guide", "mean_field", "--json", "--require", "trust")
    assert bad.exit_code == 3
    found = json.loads(bad.stdout)
    assert found["decision"] in ("refine", "reweight", "sample")
    assert found["fit"]["guide"] == "mean_field"
    assert f"no candidate has the verdict trust: mean_field {found['decision']}" in bad.stderr
    assert run("trust", problem, "--guide", "mean_field", "--quiet").stdout == f"{found['decision']}\n"


def test_other_requirements_are_refused(tmp_path: Path) -> None:
    for command in (["trust", "eight_schools"], ["compare", "eight_schools", "--out", tmp_path / "out"]):
        result = run(*command, "--require", "trusted")
        check_refused(result.exit_code, result.stdout, result.stderr, tmp_path, ["'trusted': did you mean 'trust'"])


@pytest.mark.slow
def test_compare_requires_one_candidate_to_be_trusted(tmp_path: Path) -> None:
    problem, out = f"{write(tmp_path, NARROW)}:problem", tmp_path / "out"
    small = ["--chains", 2, "--warmup", 100, "--draws", 200, "--require", "trust", "--out", out]
    assert run("compare", problem, *small, "--guide", "mean_field").exit_code == 3
    assert (out / "report.html").is_file()
    both = run("compare", problem, *small, "--json")
    assert both.exit_code == 0, both.stderr
    best = json.loads(both.stdout)["candidates"][0]
    assert (best["candidate"], best["trust"]["decision"]) == ("full_rank", "trust")


def test_auto_is_a_guide(tmp_path: Path) -> None:
    problem, out = f"{write(tmp_path, NARROW)}:problem", tmp_path / "out"
    result = run("fit", problem, "--guide", "auto", "--time-budget", 60, "--out", out, "--json", "--quiet")
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    assert [stage["guide"] for stage in found["path"]] == ["mean_field", "full_rank"]
    assert found["verdict"]["decision"] == "trust"
    assert [path.name for path in out.iterdir()] == ["auto.nc"]


# --- what was saved -------------------------------------------------------------------------------------------------


def test_report_is_made_again_from_the_saved_draws(
    compared: tuple[Result, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    shutil.copytree(compared[1] / "out", out)
    before = json.loads((out / "comparison.json").read_text(encoding="utf-8"))
    (out / "report.html").unlink()
    monkeypatch.setattr(sys.modules["pyro_vi_lab.compare"], "nuts", lambda *_, **__: pytest.fail("NUTS ran again"))
    result = run("report", out, "--quiet")
    assert result.exit_code == 0, result.stderr
    assert result.stdout == f"{out / 'report.html'}\n"
    after = json.loads((out / "comparison.json").read_text(encoding="utf-8"))
    assert after["parameters"] == before["parameters"]
    assert after["command"] == before["command"]
    assert after["reference"]["gradients"] == before["reference"]["gradients"]
    assert before["command"] in (out / "report.html").read_text(encoding="utf-8")


def test_reports_that_cannot_be_made_are_refused(compared: tuple[Result, Path], tmp_path: Path) -> None:
    out = tmp_path / "saved"
    shutil.copytree(compared[1] / "out", out)
    for arguments, expected in (
        ([tmp_path / "nothing"], "there is no comparison in"),
        ([out, "eight_schools"], "the data of eight_schools are not those of the comparison in"),
        ([out, "eight_scools"], "did you mean 'eight_schools'"),
    ):
        result = run("report", *arguments)
        check_refused(result.exit_code, result.stdout, result.stderr, tmp_path, [expected])
    (out / "nuts.nc").unlink()
    assert "there are no draws of the reference" in run("report", out).stderr
    (out / "comparison.json").write_text('{"command": null}')
    assert "is not what pyro-vi-lab compare writes" in run("report", out).stderr
    (out / "comparison.json").write_text("[1")
    assert "cannot be read" in run("report", out).stderr
    assert not list(out.glob(".pyro-vi-lab-*"))


def test_export_writes_zarr_and_netcdf(compared: tuple[Result, Path], tmp_path: Path) -> None:
    source = compared[1] / "out" / "nuts.nc"
    there, back = tmp_path / "nuts.zarr", tmp_path / "nuts.nc"
    assert run("export", source, there).stdout == f"{there}\n"
    assert json.loads(run("export", there, back, "--json").stdout)["file"] == str(back)
    before, after = arviz.from_netcdf(str(source)), arviz.from_netcdf(str(back))
    assert before.groups() == after.groups()
    assert before["posterior"].equals(after["posterior"])
    for arguments, expected in (
        ([source, tmp_path / "x.csv"], "it has to end in .nc or .zarr"),
        ([tmp_path / "missing.nc", back], "there is no file"),
        ([source, source], "is the source itself"),
    ):
        result = run("export", *arguments)
        assert result.exit_code == 2
        assert expected in result.stderr
    (tmp_path / "bad.nc").write_bytes(b"nothing of the kind")
    result = run("export", tmp_path / "bad.nc", tmp_path / "new.nc")
    assert result.exit_code == 2
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "new.nc").exists()
