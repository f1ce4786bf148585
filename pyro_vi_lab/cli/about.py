"""What there is, and how it would run: ``models`` and ``explain``."""

from __future__ import annotations

import io
from typing import Annotated

import typer

from pyro_vi_lab import plugins
from pyro_vi_lab.cli.options import (
    DataOption,
    DeviceOption,
    DtypeOption,
    GuideOption,
    JsonOption,
    ProblemArgument,
)
from pyro_vi_lab.cli.printing import Output
from pyro_vi_lab.cli.problem_argument import read_problem
from pyro_vi_lab.explain import explain
from pyro_vi_lab.guides import guide_named
from pyro_vi_lab.models import MODELS


def models_command(as_json: JsonOption = False) -> None:
    """List the example problems."""
    known = {name: example.description for name, example in MODELS.items()}
    known |= dict.fromkeys(plugins.offered("model", MODELS), "of another package")
    if as_json:
        Output(as_json=True).result("", known)
        return
    width = max(map(len, known))
    for name, description in known.items():
        typer.echo(f"{name:<{width}}  {description}")


def explain_command(
    problem: ProblemArgument,
    data: DataOption = None,
    guide: GuideOption = "full_rank",
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    as_json: JsonOption = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No notes.")] = False,
) -> None:
    """Say how a problem runs on this machine: which tier, why, and what a gradient takes."""
    guide_named(guide)  # refuses unknown names
    output, text = Output(as_json=as_json, quiet=quiet), io.StringIO()
    made = read_problem(problem, data=data, device=device, dtype=dtype, say=output.say)
    explain(made, guide, file=text)
    lines = text.getvalue().rstrip("\n")
    output.result(lines, {"problem": made.name, "guide": guide, "lines": lines.splitlines()})
