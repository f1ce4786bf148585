"""Whether a fit may be believed: ``trust``, and ``--require trust``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

import typer
from rich.console import Console

from pyro_vi_lab.cli.fitting import fit_values, fitted
from pyro_vi_lab.cli.interruption import Interruption
from pyro_vi_lab.cli.options import (
    EXIT_INTERRUPTED,
    EXIT_NOT_TRUSTED,
    BudgetOption,
    DataOption,
    DeviceOption,
    DtypeOption,
    GuideOption,
    JsonOption,
    OptimOption,
    ProblemArgument,
    QuietOption,
    RequireOption,
    SeedOption,
    StepsOption,
    check_budget,
    check_guide,
    check_name,
)
from pyro_vi_lab.cli.printing import Output
from pyro_vi_lab.cli.problem_argument import read_problem
from pyro_vi_lab.fit import OPTIMS, Fit
from pyro_vi_lab.trust import trust
from pyro_vi_lab.verdict import Verdict

Budget = Literal["fast", "thorough"]


def trust_command(
    problem: ProblemArgument,
    data: DataOption = None,
    guide: GuideOption = "full_rank",
    budget: Annotated[Budget, typer.Option(help="How much work the checks may be.")] = "fast",
    optim: OptimOption = None,
    seed: SeedOption = 0,
    max_steps: StepsOption = None,
    time_budget: BudgetOption = None,
    require: RequireOption = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Fit a guide and say, without NUTS, whether the fit may be trusted, parameter by parameter.

    With --require trust the exit code is 3 unless it may.
    """
    check_guide(guide)
    check_name("optim", optim, OPTIMS)
    check_name("verdict", require, ["trust"])
    check_budget(time_budget)
    output = Output(as_json=as_json, quiet=quiet)
    with Interruption(output.say) as interruption:
        made = read_problem(problem, data=data, device=device, dtype=dtype, say=output.say)
        output.say(f"{guide} fit of {made.name} …")
        found = fitted(made, guide, interruption, output, optim=optim, seed=seed, steps=max_steps, budget=time_budget)
        if interruption.asked:
            typer.echo(f"interrupted: the {guide} fit of {made.name} was not judged ({found.message})", err=True)
            raise typer.Exit(EXIT_INTERRUPTED)
        if found.sampled is not None:  # 'auto' has judged its guides, and trusted none
            output.tell(found.message)
            values: dict[str, object] = {"decision": "sample", "reasons": [found.message]}
        else:
            output.say("checks …")
            verdict = trust(found, budget=budget, seed=seed)
            values = verdict.to_dict()
            if not quiet:
                Console(stderr=as_json, highlight=False, width=120).print(verdict)
    output.result(values["decision"], values | {"fit": fit_values(found, seed=seed)})
    leave_unless({guide: str(values["decision"])}, require)


def verdicts_of(fits: Mapping[str, Fit], output: Output, *, seed: int) -> dict[str, Verdict]:
    """A verdict for every fit, printed in one line each."""
    output.say("checks of each fit …")
    verdicts = {name: trust(found, seed=seed) for name, found in fits.items()}
    for name, verdict in verdicts.items():
        reason = f": {verdict.reasons[0]}" if verdict.reasons else ""
        output.tell(f"{name}: {verdict.decision}{reason}")
    return verdicts


def leave_unless(decisions: Mapping[str, str], require: str | None) -> None:
    """Leave with exit code 3 where a verdict is required that no candidate has."""
    if require is None or require in decisions.values():
        return
    found = ", ".join(f"{name} {decision}" for name, decision in decisions.items())
    typer.echo(f"no candidate has the verdict {require}: {found}", err=True)
    raise typer.Exit(EXIT_NOT_TRUSTED)
